"""Files that no camera or program writes, small, and slow or large for whom they surprise."""

from __future__ import annotations

import io
import re
import struct
import tarfile
import zlib
from collections.abc import Sequence

from PIL import Image
from support.builders import make_image


def jpeg_segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def jpeg_with(*segments: bytes) -> bytes:
    """A JPEG with segments of ours behind its first two bytes."""
    jpeg = make_image("JPEG")
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def jpeg_of_scans(num_scans: int, *, side: int = 64) -> bytes:
    """A progressive JPEG of which one refinement scan is repeated."""
    buffer = io.BytesIO()
    Image.new("L", (side, side), 77).save(buffer, "JPEG", progressive=True)
    jpeg = buffer.getvalue()
    starts = [match.start() for match in re.finditer(b"\xff\xda", jpeg)]
    scan = jpeg[starts[-1] : -2]
    return jpeg[:-2] + scan * (num_scans - len(starts)) + jpeg[-2:]


def png_chunk(kind: bytes, payload: bytes) -> bytes:
    body = kind + payload
    return struct.pack(">I", len(payload)) + body + struct.pack(">I", zlib.crc32(body))


def png_with(*chunks: tuple[bytes, bytes], mode: str = "RGB") -> bytes:
    """A PNG with chunks of ours behind its header."""
    png = make_image("PNG", mode)
    return png[:33] + b"".join(png_chunk(*chunk) for chunk in chunks) + png[33:]


def overlapping_exif(num_entries: int, num_bytes: int) -> bytes:
    """A directory whose entries all name the same bytes."""
    at = 8 + 2 + 12 * num_entries + 4
    entries = (struct.pack("<HHII", 0x9C9B + i, 1, num_bytes, at) for i in range(num_entries))
    directory = struct.pack("<H", num_entries) + b"".join(entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8) + directory + bytes(num_bytes)


def tiff(
    entries: Sequence[tuple[int, int, int, int]], rest: bytes = b"", *, next: int = 0
) -> bytes:
    """A TIFF of one directory; the rest begins at ``tiff_end(len(entries))``."""
    directory = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    head = struct.pack("<IH", 8, len(entries))
    return b"II*\0" + head + directory + struct.pack("<I", next) + rest


def tiff_end(num_entries: int) -> int:
    return 8 + 2 + 12 * num_entries + 4


def tiff_of_strips(num_strips: int, *, rows: int = 8, overlap: bool = True) -> bytes:
    """Gray, 16x16; each strip has ``rows`` rows."""
    layout = [(256, 3, 1, 16), (257, 3, 1, 16), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    at = tiff_end(len(layout) + 3)
    pixels = at + 8 * num_strips
    layout += [
        (273, 4, num_strips, at),
        (278, 3, 1, rows),
        (279, 4, num_strips, at + 4 * num_strips),
    ]
    step = 0 if overlap else 16 * rows
    offsets = b"".join(struct.pack("<I", pixels + step * i) for i in range(num_strips))
    return tiff(layout, offsets + struct.pack("<I", 16 * rows) * num_strips + bytes(range(256)))


def tiff_of_pages(num_pages: int) -> bytes:
    """A chain of directories, each of them a picture of one pixel."""
    entries = ((256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8))
    directory = struct.pack("<H", 5) + b"".join(struct.pack("<HHII", *e) for e in entries)
    pages, position = [], 8
    for page in range(num_pages):
        position += len(directory) + 4
        pages.append(directory + struct.pack("<I", position if page < num_pages - 1 else 0))
    return b"II*\0" + struct.pack("<I", 8) + b"".join(pages)


def big_tiff_of_pages(order: str = "<") -> bytes:
    """The same as BigTIFF, with a directory that comes after itself."""
    entries = ((256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8))
    mark = b"II" if order == "<" else b"MM"
    head = mark + struct.pack(order + "HHHQ", 43, 8, 0, 16)
    body = b"".join(struct.pack(order + "HHQQ", *entry) for entry in entries)
    return head + struct.pack(order + "Q", 5) + body + struct.pack(order + "Q", 16)


def run_length_bmp(width: int, height: int) -> bytes:
    """Each row is one pixel and an end of line."""
    data = b"\1\5\0\0" * height + b"\0\1"
    head = struct.pack("<IHHI", 54 + 1024 + len(data), 0, 0, 54 + 1024)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(data), 0, 0, 256, 0)
    return b"BM" + head + info + bytes(1024) + data


def tar_header(name: str, *, kind: bytes = b"0", size: int | bytes = 0, link: str = "") -> bytes:
    """A header block with a right checksum, whatever its size field holds."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    info.size = size if isinstance(size, int) else 0
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    if isinstance(size, bytes):
        header[124:136] = size
    return with_checksum(bytes(header))


def with_checksum(header: bytes) -> bytes:
    """A header block whose checksum is right."""
    total = sum(header[:148]) + 8 * 32 + sum(header[156:])
    return header[:148] + b"%06o\0 " % total + header[156:]


def tar_of(*parts: bytes) -> bytes:
    """Headers and contents, each filled to whole blocks, and the end of the archive."""
    return b"".join(part + bytes(-len(part) % 512) for part in parts) + bytes(1024)


def with_pax(payload: bytes, name: str = "a.txt", content: bytes = b"") -> bytes:
    """A tar of one member whose PAX header holds bytes of ours."""
    extension = tar_header("pax", kind=b"x", size=len(payload))
    return tar_of(extension, payload, tar_header(name, size=len(content)), content)


def pax_record(keyword: str, value: str) -> bytes:
    rest = f" {keyword}={value}\n".encode("utf-8", "surrogateescape")
    length = len(rest) + 1
    while len(str(length)) + len(rest) != length:
        length += 1
    return str(length).encode() + rest
