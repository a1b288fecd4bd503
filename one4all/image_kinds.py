"""What counts as an image: by the extension of its name, or by how its content begins.

Both lists are wider than what can be protected. A member that is an image and cannot be protected
is a bad image, and the policy decides; what is missing here is copied as a sidecar, unprotected.

Held against the registries of Pillow, ``filetype`` (17 formats) and ``puremagic`` (disks and
documents, too). None serves as it is: they take two bytes for a format ("P5", "BM"), so that a
caption would become a bad image. Here a signature is four bytes at least that no text begins with,
or the header behind it has to make sense. Names that common sidecars share (``.pcd`` point clouds,
``.raw``, ``.fit``, ``.ps``) count by content alone.

Pixels inside documents, videos and arrays are not looked for: PDF, MP4, HDF5, NumPy. Those inside
compressed files and archives are: `one4all.wrapped_images`.
"""

from __future__ import annotations

import re
import struct

IMAGE_EXTENSIONS = frozenset(
    # Web and office
    "jpg jpeg jpe jfif jif jfi pjpeg pjp jps mpo thm png apng pns mng jng gif webp wp2 bmp dib "
    "tif tiff ptif btf ico cur ani icns "
    # Successors of JPEG
    "jp2 j2k j2c jpc jpf jpx jpm jph jhc jxl jxr wdp hdp jxs jls heic heics heif heifs hif avif "
    "avifs avci avcs bpg flif qoi "
    # Drawings
    "svg svgz eps epsf epsi wmf wmz emf emz "
    # Painting and layout programs
    "psd psb pdd xcf psp pspimage kra ora pdn "
    # Raw files of cameras
    "3fr ari arw bay cr2 cr3 crw dcr dng erf fff gpr iiq k25 kdc mef mos mrw nef nrw orf pef raf "
    "rw2 rwl rwz sr2 srf srw x3f "
    # Film, textures, science
    "exr sxr hdr rgbe xyze dpx cin pfm phm dds ktx ktx2 pvr vtf blp astc fits fts dcm dicom svs "
    "ndpi "
    # Old friends
    "pbm pgm ppm pnm pam xbm xpm xwd wbmp pcx dcx tga targa icb vda vst sgi rgb rgba bw ras sun "
    "pct pict pic pxr msp fli flc im lbm ilbm djv djvu jb2 jbig2 ntf nitf fpx".split()
)

_COMPRESSED_EXTENSIONS = frozenset("gz bz2 xz lzma zst lz4 br z".split())

# Each begins the content of a file. DOTALL: a dot is any byte.
_SIGNATURES = (
    ("JPEG", rb"\xff\xd8\xff"),
    ("PNG", rb"\x89PNG\r\n\x1a\n"),
    ("WEBP", rb"RIFF.{4}WEBP"),
    ("TIFF", rb"II\*\0|MM\0\*|II\+\0|MM\0\+|II\0\*|MM\*\0"),  # raw files of many cameras, too
    ("BMP", rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0"),
    ("GIF", rb"GIF8[79]a"),
    ("PSD", rb"8BPS\0[\x01\x02]"),
    ("JPEG 2000", rb"\xff\x4f\xff\x51|\0\0\0\x0cjP(?:  |\x1a\x1a)\r\n\x87\n"),
    ("JPEG XL", rb"\0\0\0\x0cJXL \r\n\x87\n"),
    ("JPEG XS", rb"\0\0\0\x0cJXS \r\n\x87\n|\xff\x10\xff\x50"),
    ("JPEG XR", rb"II\xbc[\0\x01]"),
    ("MNG", rb"\x8aMNG\r\n\x1a\n|\x8bJNG\r\n\x1a\n"),
    (
        "camera raw",
        rb"II(?:RO|RS)\x08\0\0\0|MMOR\0\0\0\x08|IIU\0|II\x1a\0\0\0HEAP|FUJIFILMCCD-RAW|\0MRM\0|FOVb|"
        rb"ARRI\x12\x34\x56\x78",
    ),
    ("QOI", rb"qoif"),
    ("FLIF", rb"FLIF"),
    ("BPG", rb"BPG\xfb"),
    ("ICNS", rb"icns"),
    ("ANI", rb"RIFF.{4}ACON"),
    ("XCF", rb"gimp xcf |.{20}GPAT"),
    ("PSP", rb"Paint Shop Pro Image File"),
    ("EPS", rb"%!PS|\xc5\xd0\xd3\xc6"),
    ("WMF", rb"\xd7\xcd\xc6\x9a\0\0|\x01\0\x09\0\0\x03|\x01\0\0\0.{36} EMF"),
    ("EXR", rb"\x76\x2f\x31\x01"),
    ("HDR", rb"#\?(?:RADIANCE|RGBE)\n"),
    ("DPX", rb"SDPX|XPDS|\x80\x2a\x5f\xd7|\xd7\x5f\x2a\x80"),
    ("DICOM", rb".{128}DICM"),
    ("FITS", rb"SIMPLE[ =]+T[ /]"),
    ("DDS", rb"DDS \x7c\0\0\0"),
    ("texture", rb"BLP[12]|FTEX|VTF\0|\xabKTX [12][10]\xbb|PVR\x03|\x13\xab\xa1\x5c"),
    ("SGI", rb"\x01\xda[\0\x01][\x01\x02]"),
    ("Sun raster", rb"\x59\xa6\x6a\x95"),
    ("DCX", rb"\xb1\x68\xde\x3a"),
    ("FLI", rb".{4}[\x11\x12]\xaf.{8}[\0\x03]\0"),
    ("farbfeld", rb"farbfeld"),
    ("MSP", rb"DanM|LinS"),
    ("PIXAR", rb"\x80\xe8\0\0"),
    ("PAM", rb"P7\n(?:#|WIDTH|HEIGHT|DEPTH|MAXVAL|TUPLTYPE)|P7 332"),
    ("IM", rb"Image type: "),
    ("XPM", rb"/\* XPM \*/"),
    ("PhotoCD", rb".{2048}PCD_"),
    ("ILBM", rb"FORM.{4}(?:ILBM|PBM )"),
    ("DjVu", rb"(?:AT&T)?FORM.{4}DJV[UM]"),
    ("JBIG2", rb"\x97JB2\r\n\x1a\n"),
    ("NITF", rb"NITF0\d|NSIF0\d"),
    ("X cursor", rb"Xcur\x10\0\0\0"),
)
_SIGNATURE = re.compile(b"|".join(b"(%s)" % text for _, text in _SIGNATURES), re.DOTALL)
# These are words, and a text may begin with them. A real file has control characters close behind.
_WORDS = frozenset(("GIF", "QOI", "FLIF", "ICNS", "texture", "farbfeld", "MSP", "DPX"))
_CONTROL = re.compile(rb"[\0-\x08\x0e-\x1f]")
_BRANDS = frozenset(  # of ISO base media files that hold pictures; the others are films
    b"avif avis heic heix heim heis hevc hevx hevm hevs mif1 mif2 msf1 miaf jxs jpm crx".split()
)
_APPLE_DOUBLE = (b"\0\x05\x16\x07\0\1\0\0", b"\0\x05\x16\x07\0\2\0\0")
_SPACE = rb"(?:\s|#[^\r\n]*[\r\n])"
_PNM = re.compile(rb"P([1-6])%s+(\d{1,9})%s+(\d{1,9})" % (_SPACE, _SPACE))
_PNM_MAXIMUM = re.compile(rb"%s+(\d{1,9})\s" % _SPACE)
_PNM_DIGITS = (b"0123456789", b"01")
_PFM = re.compile(rb"P([Ff])\s+(\d{1,9})\s+(\d{1,9})\s+[-+.\deE]{1,40}\s")
_PILLOW_PNM = re.compile(rb"(?:P0CMYK|PyP|PyRGBA|PyCMYK)\s+\d{1,9}\s+\d{1,9}\s")
_SVG_PROLOG = 1 << 16  # bytes in which the root of an SVG has to begin


def is_image(name: str, data: bytes) -> bool:
    """Whether a file must be treated as an image.

    Decided by extension, or else by content, so that a JPEG called ``photo.bin`` does not leave
    unprotected. ``a.jpg.gz`` counts as ``a.jpg`` does: WebDataset decompresses it on reading.

    Args:
        name: Its name.
        data: All of it. Little is read; but a short signature counts only if sizes that follow it
            fit the file.
    """
    if is_apple_double(name, data):
        return False
    return has_image_name(name) or bool(image_kind(data))


def has_image_name(name: str) -> bool:
    """Whether the extension of a name is that of an image, compressed or not."""
    stem, _, extension = name.rsplit("/", 1)[-1].lower().rpartition(".")
    if extension in _COMPRESSED_EXTENSIONS and "." in stem:
        extension = stem.rpartition(".")[2]
    return extension in IMAGE_EXTENSIONS


def is_apple_double(name: str, data: bytes) -> bool:
    """Whether a file is what macOS puts beside another: attributes, under its name behind ``._``.

    Args:
        name: Its name; of ``._a.jpg`` the content decides.
        data: Its beginning, of 8 bytes at least.
    """
    return name.rsplit("/", 1)[-1].startswith("._") and data.startswith(_APPLE_DOUBLE)


def image_kind(data: bytes) -> str:
    """Name of the image format that content is in; "" if it is none that we know.

    Args:
        data: A whole file.
    """
    if match := _SIGNATURE.match(data):
        kind = _SIGNATURES[int(match.lastindex or 0) - 1][0]
        return "" if kind in _WORDS and not _CONTROL.search(data, 0, 256) else kind
    for kind, looks_like in _CHECKS:
        if looks_like(data):
            return kind
    return ""


def _brands(data: bytes) -> tuple[bytes, ...]:
    """What an ISO media file says that it is, the main thing first."""
    if data[4:8] != b"ftyp":
        return ()
    end = min(int.from_bytes(data[:4], "big"), 512, len(data))
    brands = (data[8:12], *(data[at : at + 4] for at in range(16, end - 3, 4)))
    return tuple(brand.rstrip() for brand in brands)


def _is_avif(data: bytes) -> bool:
    return not {b"avif", b"avis"}.isdisjoint(_brands(data))


def _is_canon_raw(data: bytes) -> bool:
    return b"crx" in _brands(data)


def _is_iso_picture(data: bytes) -> bool:
    return not _BRANDS.isdisjoint(_brands(data))


def _is_svg(data: bytes) -> bool:
    """An XML document whose root is ``svg``, whatever comes before it."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = data[:_SVG_PROLOG].decode("utf-16", "replace").encode("utf-8", "replace")
    else:
        text = data[:_SVG_PROLOG].removeprefix(b"\xef\xbb\xbf")
    position = 0
    while True:
        while text[position : position + 1].isspace():
            position += 1
        if text.startswith(b"<!--", position):
            end, mark = text.find(b"-->", position + 4), b"-->"
        elif text.startswith(b"<?", position):
            end, mark = text.find(b"?>", position), b"?>"
        elif text.startswith(b"<!DOCTYPE", position):
            mark = b">"
            end = text.find(b">", position)
            subset = text.find(b"[", position, max(end, 0))
            if subset >= 0:
                mark = b"]>"
                end = text.find(mark, subset)
        else:
            return bool(re.match(rb"<(?:\w{1,40}:)?svg[\s>/]", text[position : position + 60]))
        if end < 0:
            return False
        position = end + len(mark)


def _is_x_bitmap(data: bytes) -> bool:
    """A piece of C that defines sizes and then bits."""
    head = data[:4096].lstrip()
    return head.startswith((b"#define", b"/*")) and b"_bits[]" in head


def _is_icon(data: bytes) -> bool:
    """ICO or CUR: an entry of the directory points to bytes behind it."""
    if data[:3] not in (b"\0\0\1", b"\0\0\2") or data[3:4] != b"\0":
        return False
    count = int.from_bytes(data[4:6], "little")
    for at in range(6, min(6 + 16 * count, len(data) - 15), 16):
        size, offset = struct.unpack_from("<II", data, at + 8)
        if size and 6 + 16 * count <= offset and offset + size <= len(data):
            return True
    return False


def _is_pnm(data: bytes) -> bool:
    """Portable anymap: there are as many samples as the header says."""
    if data[:1] != b"P":
        return False
    head = data[:4096]
    if match := _PFM.match(head):
        width, height = int(match[2]), int(match[3])
        return 0 < 4 * width * height * (3 if match[1] == b"F" else 1) <= len(data) - match.end()
    if _PILLOW_PNM.match(head):
        return True
    if not (match := _PNM.match(head)):
        return False
    kind, width, height = int(match[1]), int(match[2]), int(match[3])
    end, wide = match.end(), False
    if kind not in (1, 4):
        if not (maximum := _PNM_MAXIMUM.match(head, end)):
            return False
        end = maximum.end()
        wide = int(maximum[1]) > 255
    samples = width * height * (3 if kind in (3, 6) else 1)
    if kind <= 3:
        plain = not head[end : end + 256].strip(_PNM_DIGITS[kind == 1] + b" \t\r\n\f\v")
        return plain and 0 < samples * (1 if kind == 1 else 2) - 1 <= len(data) - end
    needed = (width + 7) // 8 * height if kind == 4 else samples * (1 + wide)
    return 0 < needed <= len(data) - end


def _is_pcx(data: bytes) -> bool:
    if len(data) < 128 or data[0] != 10 or data[1] not in (0, 2, 3, 4, 5):
        return False
    left, top, right, bottom = struct.unpack_from("<4H", data, 4)
    return data[3] in (1, 2, 4, 8) and left <= right and top <= bottom


def _is_dib(data: bytes) -> bool:
    """A BMP without its file header."""
    if len(data) < 40 or data[:4] not in (b"\x28\0\0\0", b"\x6c\0\0\0", b"\x7c\0\0\0"):
        return False
    width, height, planes, bits, compression = struct.unpack_from("<iiHHI", data, 4)
    plausible = planes == 1 and bits in (1, 2, 4, 8, 16, 24, 32) and compression < 7
    return plausible and 0 < width < 1 << 16 and 0 < abs(height) < 1 << 16


def _is_gimp_brush(data: bytes) -> bool:
    if len(data) < 28:
        return False
    header, version, width, height, depth = struct.unpack_from(">5I", data)
    fits = 0 < width * height * depth <= len(data) - header
    named = version == 1 or (version == 2 and data[20:24] == b"GIMP")
    return header >= 20 and depth in (1, 4) and named and fits


def _is_tga(data: bytes) -> bool:
    """Truevision: it has no signature, but later versions have a footer."""
    if data.endswith(b"TRUEVISION-XFILE.\0"):
        return True
    if len(data) < 20 or data[1] > 1 or data[2] not in (1, 2, 3, 9, 10, 11) or data[17] & 0xC0:
        return False
    colours, entry_bits = struct.unpack_from("<HB", data, 5)
    width, height, depth = struct.unpack_from("<HHB", data, 12)
    if data[1]:
        if data[2] & 7 != 1 or entry_bits not in (15, 16, 24, 32) or not 0 < colours <= 256:
            return False
    elif data[2] & 7 == 1 or any(data[3:8]):
        return False
    if depth not in ((8, 16) if data[2] & 7 != 2 else (15, 16, 24, 32)):
        return False
    room: int = len(data) - 18 - data[0] - colours * ((entry_bits + 7) // 8)
    pixels: int = width * height
    if data[2] & 8:  # runs of up to 128 pixels
        return 0 < pixels <= 128 * room
    return 0 < pixels * (int(depth + 7) // 8) <= room


def _is_jpeg_xl_codestream(data: bytes) -> bool:
    """JPEG XL without a box around it: two bytes, and then a size that the file can hold."""
    if data[:2] != b"\xff\x0a" or len(data) < 12:
        return False
    bits, position = int.from_bytes(data[2:12], "little"), 0

    def take(count: int) -> int:
        nonlocal position
        position += count
        return bits >> position - count & (1 << count) - 1

    def side(small: int) -> int:
        return 8 * (take(5) + 1) if small else take((9, 13, 18, 30)[take(2)]) + 1

    small = take(1)
    height = side(small)
    width = height if take(3) else side(small)
    return max(width, height) < 1 << 16 and width * height <= 10_000 * len(data)


_CHECKS = (
    ("AVIF", _is_avif),
    ("camera raw", _is_canon_raw),
    ("HEIC", _is_iso_picture),
    ("SVG", _is_svg),
    ("XBM", _is_x_bitmap),
    ("ICO", _is_icon),
    ("PNM", _is_pnm),
    ("PCX", _is_pcx),
    ("DIB", _is_dib),
    ("GIMP brush", _is_gimp_brush),
    ("TGA", _is_tga),
    ("JPEG XL", _is_jpeg_xl_codestream),
)
