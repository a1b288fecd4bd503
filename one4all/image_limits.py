"""Bounds on what an image file may cost: its structure, read in linear time before Pillow sees it.

The work of decoding must be bounded by the pixels and the bytes of a file. Pillow and the libraries
below it are slower than that for some files, none of which a camera or a program writes: scans,
strips or chunks by the thousand, directories whose values overlap. Such a file is a bad image. What
only describes a picture (EXIF, an index of further pictures, texts) is left out instead, and the
picture is kept.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator

from one4all.errors import BadImageError

# Ten is what a progressive JPEG has; cjpeg writes 100 at most, libtiff reads 100 at most.
MAX_SCANS = 100
MAX_JPEG_SEGMENTS = 1000  # before the first scan; long ICC profiles and XMP take up to 300
MAX_EXIF_SEGMENTS = 16
MAX_PNG_CHUNKS = 1000  # and one for each 256 bytes; ordinary ones hold 8192
MAX_DIRECTORY_ENTRIES = 1000  # of TIFF or EXIF; cameras write about 60
MAX_EXIF_BYTES = 1 << 20  # a JPEG segment holds 64 KB
MAX_ICC_PROFILE = 1 << 20  # bytes; profiles that hold tables are this long
MAX_RLE_PIXELS = 10_000_000  # Pillow's decoder of run-length BMP is Python: 0.1 to 0.4 s a million
_MAX_JUNK = 1 << 16  # bytes between the segments of a JPEG

# Segments that a JPEG may have before its first scan.
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_SEGMENTS = _JPEG_FRAMES | {0xC4, 0xCC, 0xDB, 0xDC, 0xDD, *range(0xE0, 0xF0), 0xFE}
_ARITHMETIC, _START_OF_SCAN, _END = 0xCC, 0xDA, 0xD9
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd8]", re.DOTALL)

# What decides the pixels of a PNG, or is kept of what describes them.
_PNG_NEEDED = frozenset(
    b"IHDR PLTE IDAT IEND tRNS acTL fcTL fdAT iCCP gAMA cHRM sRGB cICP pHYs eXIf".split()
)
_PNG_REPEATED = frozenset((b"IDAT", b"fcTL", b"fdAT"))

_TIFF_TYPE_BYTES = dict.fromkeys((1, 2, 6, 7), 1) | dict.fromkeys((3, 8), 2)
_TIFF_TYPE_BYTES |= dict.fromkeys((4, 9, 11, 13), 4) | dict.fromkeys((5, 10, 12, 16, 17, 18), 8)
_TIFF_INTEGERS = {1: "B", 3: "H", 4: "L", 13: "L", 16: "Q"}
_TIFF_PREFIXES = (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+")
_SUB_DIRECTORIES = (0x8769, 0x8825, 0xA005)  # EXIF, GPS, interoperability
_WIDTH, _HEIGHT, _STRIPS, _SAMPLES, _ROWS, _STRIP_BYTES = 256, 257, 273, 277, 278, 279
_KIND, _SUB_IMAGES, _DNG_VERSION = 254, 330, 50706
_PLANAR, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES = 284, 322, 323, 324, 325


def within_limits(data: bytes, kind: str) -> bytes:
    """What may be given to the decoder: ``data``, without descriptions beyond all bounds.

    Args:
        data: An image file.
        kind: Its format, see `image_kind`.

    Raises:
        BadImageError: Decoding it would cost more than its pixels and bytes warrant.
    """
    check = {"JPEG": _jpeg, "PNG": _png, "TIFF": _tiff, "BMP": _bmp}.get(kind)
    return check(data) if check else data


def exif_of_jpeg(data: bytes) -> bytes:
    """The first EXIF block of a JPEG, also one that `within_limits` cuts out; b"" if none."""
    for marker, start, end in _jpeg_segments(data):
        if marker == 0xE1 and data.startswith(b"Exif\0\0", start + 4):
            return data[start + 4 : end]
    return b""


def is_whole_jpeg(data: bytes, shape: tuple[int, int, int]) -> bool:
    """Whether a JPEG is one frame of this shape, (H, W, C), and one scan up to the file's end."""
    frames, scan = [], len(data)
    for marker, start, end in _jpeg_segments(data):
        if marker in _JPEG_FRAMES:
            frames.append(struct.unpack_from(">BHHB", data, start + 4))
        elif marker == _START_OF_SCAN:
            scan = end
    found = _MARKER.search(data, scan)
    ends = found is not None and found.end() == len(data) and data[-1] == _END
    return ends and frames == [(8, *shape)]


def is_plausible_exif(block: bytes) -> bool:
    """Whether an EXIF block, in TIFF structure, is small and can be parsed in linear time."""
    if len(block) > MAX_EXIF_BYTES:
        return False
    if not block.startswith(_TIFF_PREFIXES):
        return True  # nobody will parse it
    try:
        first = _Directory(block, _first_directory(block))
        num_bytes = first.num_bytes + sum(sub.num_bytes for sub in first.sub_directories())
    except BadImageError:
        return False
    return num_bytes <= 4 * len(block)


def is_icc_profile(profile: bytes) -> bool:
    """Whether bytes are a colour profile: its signature, and the size that its header says."""
    padding = len(profile) - int.from_bytes(profile[:4], "big")
    return profile[36:40] == b"acsp" and 0 <= padding < 4 and len(profile) <= MAX_ICC_PROFILE


def is_icc_chunk(payload: bytes) -> bool:
    """Whether an ``iCCP`` chunk of a PNG holds a colour profile, and nothing behind it."""
    name, _, rest = payload.partition(b"\0")
    inflate = zlib.decompressobj()
    try:
        profile = inflate.decompress(rest[1:], MAX_ICC_PROFILE + 1)
    except zlib.error:
        return False
    alone = inflate.eof and not inflate.unused_data
    return alone and len(name) < 80 and is_icc_profile(profile)


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, end) of each chunk of a PNG, length and checksum included, up to ``IEND``.

    The last one ends behind the data if the file was cut.

    Raises:
        BadImageError: Too many of them.
    """
    position, limit = 8, MAX_PNG_CHUNKS + len(data) // 256
    for _ in range(limit):
        if position + 8 > len(data):
            return
        length, kind = struct.unpack_from(">I4s", data, position)
        yield kind, position, position + 12 + length
        if kind == b"IEND":
            return
        position += 12 + length
    raise BadImageError(f"a PNG of over {limit:,} chunks")


def _png(data: bytes) -> bytes:
    """Drop texts, which Pillow would decompress and take for other things, and repetitions."""
    needed, dropped = [data[:8]], False
    seen: set[bytes] = set()
    for kind, start, end in png_chunks(data):
        # A critical chunk that nobody knows has a capital first: an error, and left to be one.
        kept = kind in _PNG_NEEDED or not kind[0] & 0x20
        kept = kept and (kind not in seen or kind in _PNG_REPEATED)
        if kept and (kind != b"iCCP" or is_icc_chunk(data[start + 8 : end - 4])):
            needed.append(data[start:end])
        else:
            dropped = True
        seen.add(kind)
    return b"".join(needed) if dropped else data


def _jpeg(data: bytes) -> bytes:
    """Count segments and scans; cut out EXIF and picture indexes that cost too much to read."""
    exif: list[tuple[int, int]] = []
    cut: list[tuple[int, int]] = []
    num_frames = 0
    for marker, start, end in _jpeg_segments(data):
        if marker in _JPEG_FRAMES:
            num_frames += 1
            if (bits := data[start + 4]) > 8:
                raise BadImageError(f"a JPEG of {bits} bits a channel; convert it to 8 bits")
        if marker == _START_OF_SCAN and data.count(b"\xff\xda") > MAX_SCANS:
            _refuse_scans(data, start)
        elif marker == 0xE1 and data.startswith(b"Exif\0\0", start + 4):
            exif.append((start, end))
        elif marker == 0xE2 and data.startswith(b"MPF\0", start + 4):
            cut += [] if is_plausible_exif(data[start + 8 : end]) else [(start, end)]
    if num_frames > 1:
        raise BadImageError("a JPEG of several frames")
    # Pillow joins them.
    block = b"".join(data[start + 10 : end] for start, end in exif[:MAX_EXIF_SEGMENTS])
    if len(exif) > MAX_EXIF_SEGMENTS or not is_plausible_exif(block.removeprefix(b"Exif\0\0")):
        cut += exif
    for start, end in sorted(cut, reverse=True):
        data = data[:start] + data[end:]
    return data


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of each segment up to the first scan, which comes last."""
    position, junk = 2, 0
    for _ in range(MAX_JPEG_SEGMENTS):
        start = data.find(b"\xff", position)
        if start < 0:
            return
        at = start + 1
        while data[at : at + 1] == b"\xff" and at - start < _MAX_JUNK:
            at += 1
        junk += at - 1 - position
        if junk > _MAX_JUNK:
            raise BadImageError(f"a JPEG with over {_MAX_JUNK:,} bytes between its segments")
        if at + 3 > len(data):
            return
        marker, position = data[at], at + 1
        if marker == 0 or 0xD0 <= marker <= _END:
            continue  # these stand alone
        if marker == _START_OF_SCAN:
            yield marker, at - 1, position
            return
        length = int.from_bytes(data[position : position + 2], "big")
        position += length
        # Pillow reads on inside of a DAC segment, where nothing can look like a marker.
        hides = marker == _ARITHMETIC and _MARKER.search(data, at + 3, position)
        if marker not in _JPEG_SEGMENTS or length < 2 or hides:
            raise BadImageError(f"a JPEG with a broken segment at byte {at - 1:,}")
        yield marker, at - 1, position
    raise BadImageError(f"a JPEG of over {MAX_JPEG_SEGMENTS:,} segments before its first scan")


def _refuse_scans(data: bytes, position: int) -> None:
    """Count the scans of a JPEG from the first one on, up to its end."""
    num_scans = 0
    while match := _MARKER.search(data, position):
        position, marker = match.end(), data[match.start() + 1]
        if marker == _END:
            return
        num_scans += marker == _START_OF_SCAN
        if num_scans > MAX_SCANS:
            raise BadImageError(f"a JPEG of over {MAX_SCANS} scans")
        position += int.from_bytes(data[position : position + 2], "big")


def _bmp(data: bytes) -> bytes:
    if len(data) >= 34 and data[14] >= 40:
        width, height, _, compression = struct.unpack_from("<iiII", data, 18)
        if compression in (1, 2) and abs(width * height) > MAX_RLE_PIXELS:
            raise BadImageError(f"a run-length BMP of over {MAX_RLE_PIXELS:,} pixels")
    return data


def _tiff(data: bytes) -> bytes:
    """Look at the first directory alone: its pages are not walked, nor are its strips read."""
    if data.startswith(b"MM\0+"):
        raise BadImageError("a big-endian BigTIFF; libraries disagree about those")
    first = _Directory(data, _first_directory(data))
    if first.next:
        raise BadImageError("animated or multi-page: its first page points to another")
    if first.is_not_the_picture():
        raise BadImageError("a raw file: its first picture is a preview")
    if first.num_bytes > 2 * len(data):
        raise BadImageError("a TIFF whose tags overlap")
    if sum(sub.num_bytes for sub in first.sub_directories()) > MAX_EXIF_BYTES:
        raise BadImageError(f"a TIFF with over {MAX_EXIF_BYTES:,} bytes of EXIF")
    for offsets, num_bytes in ((_STRIPS, _STRIP_BYTES), (_TILES, _TILE_BYTES)):
        if first.count(offsets) > _num_parts(first, tiled=offsets == _TILES):
            raise BadImageError("a TIFF with more strips or tiles than its size has room for")
        if first.sum(num_bytes) > 2 * len(data):
            raise BadImageError("a TIFF whose strips or tiles overlap")
    return data


def _num_parts(directory: _Directory, *, tiled: bool) -> int:
    """Strips or tiles that a TIFF of this size has."""
    width, height = directory.integer(_WIDTH, 0), directory.integer(_HEIGHT, 0)
    if tiled:
        tile = directory.integer(_TILE_WIDTH, 0), directory.integer(_TILE_HEIGHT, 0)
    else:
        tile = width, min(directory.integer(_ROWS, height), height)
    if min(*tile, width, height) < 1:
        return 1
    planes = directory.integer(_SAMPLES, 1) if directory.integer(_PLANAR, 1) == 2 else 1
    return -(-width // tile[0]) * -(-height // tile[1]) * planes


def _first_directory(data: bytes) -> int:
    order = "<" if data[:1] == b"I" else ">"
    big = data[2:3] == b"+"
    try:
        offset: int = struct.unpack_from(order + ("Q" if big else "L"), data, 8 if big else 4)[0]
    except struct.error as error:
        raise BadImageError("cannot be decoded: it ends in its header") from error
    return offset


class _Directory:
    """A directory of TIFF or EXIF, read without the values that stand elsewhere.

    Args:
        data: The file or block; its first bytes say byte order and width of numbers.
        offset: Where the directory begins.

    Attributes:
        next: Offset of the next directory; 0 if there is none.
        num_bytes: Bytes of all values that stand elsewhere; values that overlap count twice.

    Raises:
        BadImageError: Too many entries, or one of those that decide the layout comes twice.
    """

    def __init__(self, data: bytes, offset: int) -> None:
        self._data = data
        self._order = "<" if data[:1] == b"I" else ">"
        big = data[2:3] == b"+"
        entry = struct.Struct(self._order + ("HHQ8s" if big else "HHL4s"))
        head, self._pointer = ("Q", "Q") if big else ("H", "L")
        self._inline = 8 if big else 4
        self._entries: dict[int, tuple[int, int, bytes]] = {}
        self.next = self.num_bytes = 0
        start = offset + struct.calcsize("<" + head)
        if start > len(data):
            return
        (count,) = struct.unpack_from(self._order + head, data, offset)
        end = start + count * entry.size
        if min(count, (len(data) - start) // entry.size) > MAX_DIRECTORY_ENTRIES:
            raise BadImageError(f"a directory of over {MAX_DIRECTORY_ENTRIES:,} entries")
        whole = data[start:end]
        whole = whole[: len(whole) // entry.size * entry.size]
        for tag, kind, number, value in entry.iter_unpack(whole):
            size = number * _TIFF_TYPE_BYTES.get(kind, 0)
            if size > self._inline:
                (at,) = struct.unpack(self._order + self._pointer, value)
                self.num_bytes += min(size, max(0, len(data) - at))
            if tag in self._entries and _WIDTH <= tag <= _TILE_BYTES:
                raise BadImageError(f"a directory with two entries for tag {tag}")
            self._entries.setdefault(tag, (kind, number, value))
        if end + self._inline <= len(data):
            (self.next,) = struct.unpack_from(self._order + self._pointer, data, end)

    def sub_directories(self) -> list[_Directory]:
        """Those for EXIF, GPS and interoperability, here or in one of them."""
        found = [self]
        for directory in found:
            for tag in _SUB_DIRECTORIES:
                if directory.count(tag) == 1 and len(found) <= 2 * len(_SUB_DIRECTORIES):
                    found.append(_Directory(self._data, directory.integer(tag, 0)))
        return found[1:]

    def is_not_the_picture(self) -> bool:
        """Whether it is a preview of another picture, as in DNG, NEF and other raw files."""
        others = self._integers(_SUB_IMAGES, limit=16)
        full_size = (not _Directory(self._data, at).integer(_KIND, 0) & 1 for at in others)
        return self.count(_DNG_VERSION) > 0 or self.integer(_KIND, 0) & 1 > 0 or any(full_size)

    def count(self, tag: int) -> int:
        """Number of values of an entry; 0 if it is missing."""
        return self._entries[tag][1] if tag in self._entries else 0

    def integer(self, tag: int, default: int) -> int:
        """The first value of an entry, if it is an integer."""
        values = self._integers(tag, limit=1)
        return values[0] if values else default

    def sum(self, tag: int) -> int:
        """Sum of the values of an entry."""
        return sum(self._integers(tag, limit=len(self._data)))

    def _integers(self, tag: int, *, limit: int) -> tuple[int, ...]:
        kind, number, value = self._entries.get(tag, (0, 0, b""))
        letter = _TIFF_INTEGERS.get(kind)
        if letter is None:
            return ()
        content, at = value, 0
        if number * _TIFF_TYPE_BYTES[kind] > self._inline:
            content, (at,) = self._data, struct.unpack(self._order + self._pointer, value)
        number = min(number, limit, max(0, len(content) - at) // _TIFF_TYPE_BYTES[kind])
        return struct.unpack_from(f"{self._order}{number}{letter}", content, at)
