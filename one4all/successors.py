"""AVIF, HEIC and JPEG XL, which phones and sites write: read, bounded, and written in kind.

AVIF comes with Pillow. HEIC and JPEG XL take the extra ``formats``: pillow-heif, whose wheel holds
x265, and pillow-jxl-plugin, both of which are under the GPL in part or whole. Neither is registered
with Pillow, which belongs to the program around us.

Their decoders turn the pixels, or would leave it to whoever reads: here they are upright.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from types import ModuleType

from PIL import AvifImagePlugin, Image

from one4all import heif, jxl
from one4all.errors import BadImageError

SUCCESSORS = ("AVIF", "HEIC", "JPEG XL")
_PACKAGES = {"HEIC": "pillow_heif", "JPEG XL": "pillow_jxl"}
_EXTRA = "formats"

# By measurement as near to a JPEG of quality 95 as can be, and fast (docs/formats.md). Threads
# would not help, as images are encoded side by side; those of x265 change the bytes.
_AVIF_OPTIONS = {
    "quality": 92,
    "speed": 9,
    "max_threads": 1,
    "codec": "aom",
    "advanced": {"alpha:lossless": "1"},
}
_HEIC_QUALITY = 65
_HEIC_OPTIONS = {
    "preset": "ultrafast",
    "x265:pools": "none",
    "x265:wpp": "0",
    "x265:frame-threads": "1",
}
_HEIC_WHOLE = 1 << 25  # pixels; larger ones are coded in tiles, as levels of HEVC end there
_HEIC_TILE = 4096  # pixels a side
_JXL_EFFORT = 1
_TURNS = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
_MIRRORS = (Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.FLIP_LEFT_RIGHT)


@dataclass(frozen=True)
class Opened:
    """A file of which the header was read, and found to be bounded by its pixels and bytes.

    Attributes:
        size: (width, height), before or after it is turned.
        load: Decodes it, to an upright picture of mode L, LA, RGB or RGBA.
        exif, xmp: Blocks of the file. What they say of orientation does not count.
        icc_profile: ICC profile, or b"".
        cicp: Colour primaries and transfer characteristics, where they are not sRGB; see `heif`.
        converted: What is not kept of it, or "".
    """

    size: tuple[int, int]
    load: Callable[[], Image.Image] = field(repr=False)
    exif: bytes = field(repr=False)
    xmp: bytes = field(repr=False)
    icc_profile: bytes = field(default=b"", repr=False)
    cicp: tuple[int, int] | None = None
    converted: str = ""


def open_successor(data: bytes, kind: str) -> Opened:
    """Read the header of a file.

    Args:
        data: The file.
        kind: One of ``SUCCESSORS``.

    Raises:
        BadImageError: It cannot be protected, or its decoder is not installed.
    """
    package = _PACKAGES.get(kind)
    if package and find_spec(package) is None:
        raise BadImageError(
            f"format {kind} needs the extra {_EXTRA}: pip install 'one4all[{_EXTRA}]'"
        )
    if kind == "JPEG XL":
        header = jxl.read_header(data)
        load = partial(_load_jxl, header.codestream)
        return Opened(header.size, load, header.exif, header.xmp)
    picture = heif.read_picture(data, kind)
    if kind == "AVIF" and picture.is_cropped:
        raise BadImageError("an AVIF with a clean aperture, which not all readers apply; crop it")
    several = picture.num_pictures > 1
    return Opened(
        size=picture.size,
        load=partial(_load_avif if kind == "AVIF" else _load_heic, picture),
        exif=picture.exif,
        xmp=picture.xmp,
        icc_profile=picture.icc_profile,
        cicp=picture.cicp,
        converted=f"primary picture of a multi-picture {kind}" if several else "",
    )


def write_successor(
    image: Image.Image,
    kind: str,
    *,
    exif: bytes = b"",
    xmp: bytes = b"",
    icc_profile: bytes = b"",
    cicp: tuple[int, int] | None = None,
) -> bytes:
    """Encode a picture: AVIF and HEIC at a high quality and 4:4:4, JPEG XL without loss.

    Args:
        image: Mode L, LA, RGB or RGBA; upright.
        kind: One of ``SUCCESSORS``.
        exif: In TIFF structure, without orientation.
        xmp: Packet, without orientation.
        icc_profile, cicp: As in `Opened`. JPEG XL has neither.

    Returns:
        The same bytes for the same picture, whatever the number of threads.
    """
    if kind == "JPEG XL":
        return _write_jxl(image, exif, xmp)
    write = _write_avif if kind == "AVIF" else _write_heic
    return write(image, exif, xmp, icc_profile, cicp)


def _load_avif(picture: heif.HeifPicture) -> Image.Image:
    image: Image.Image = AvifImagePlugin.AvifImageFile(io.BytesIO(picture.decodable))
    image.load()
    if picture.quarter_turns:
        image = image.transpose(_TURNS[picture.quarter_turns - 1])
    if picture.mirror is not None:
        image = image.transpose(_MIRRORS[picture.mirror])
    return image


def _write_avif(
    image: Image.Image, exif: bytes, xmp: bytes, icc_profile: bytes, cicp: tuple[int, int] | None
) -> bytes:
    buffer = io.BytesIO()
    sampling = "4:0:0" if image.mode == "L" else "4:4:4"
    options = _AVIF_OPTIONS | {"subsampling": sampling, "icc_profile": icc_profile or None}
    image.save(buffer, "AVIF", exif=exif, xmp=xmp, **options)
    data = buffer.getvalue()
    return heif.with_cicp(data, cicp) if cicp and not icc_profile else data


def _load_heic(picture: heif.HeifPicture) -> Image.Image:
    import pillow_heif

    opened = pillow_heif.open_heif(picture.decodable, convert_hdr_to_8bit=False)
    image: Image.Image = opened.to_pillow()
    return image


def _write_heic(
    image: Image.Image, exif: bytes, xmp: bytes, icc_profile: bytes, cicp: tuple[int, int] | None
) -> bytes:
    import pillow_heif

    options: dict[str, object] = {"enc_params": dict(_HEIC_OPTIONS), "quality": _HEIC_QUALITY}
    if image.mode in ("RGB", "RGBA"):
        options["chroma"] = 444
    if image.width * image.height > _HEIC_WHOLE:
        options["tile_size"] = _HEIC_TILE
    if exif:
        options["exif"] = b"Exif\0\0" + exif
    if xmp:
        options["xmp"] = xmp
    if icc_profile:
        options["icc_profile"] = icc_profile
    elif cicp:
        options["color_primaries"], options["transfer_characteristics"] = cicp
        options["matrix_coefficients"], options["full_range_flag"] = 6, 1
    buffer = io.BytesIO()
    pillow_heif.encode(image.mode, image.size, image.tobytes(), buffer, **options)
    return buffer.getvalue()


def _load_jxl(codestream: bytes) -> Image.Image:
    _, info, pixels, _, _ = _jxl().Decoder(num_threads=0)(codestream)
    return Image.frombytes(info.mode, (info.width, info.height), pixels)


def _write_jxl(image: Image.Image, exif: bytes, xmp: bytes) -> bytes:
    encoder = _jxl().Encoder(
        image.mode,
        lossless=True,
        effort=_JXL_EFFORT,
        num_threads=0,
        use_container=bool(exif or xmp),
    )
    offset = bytes(4)  # of the block in its box
    blocks = {"exif": offset + exif if exif else None, "xmp": xmp or None, "jumb": None}
    written: bytes = encoder(
        image.tobytes(), *image.size, jpeg_encode=False, compress=False, **blocks
    )
    return written


@cache
def _jxl() -> ModuleType:
    """The native part of pillow_jxl: the package around it would register itself with Pillow."""
    package = find_spec("pillow_jxl")
    name = "pillow_jxl.pillow_jxl"
    spec = package and PathFinder.find_spec(name, package.submodule_search_locations)
    if not spec or not spec.loader:
        raise BadImageError("the installed pillow-jxl-plugin is not one that we know")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
