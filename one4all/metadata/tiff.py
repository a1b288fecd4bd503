"""Descriptive tags of a TIFF file, kept byte for byte in the file that is written in its place.

A TIFF file has the structure of an EXIF block, so `exif` reads it. The tags that say how the
pixels are stored are the new file's own; texts, rights, dates, places and GeoTIFF's tags (OGC
19-008r4) are those of the old one.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace

from one4all.metadata import exif

XMP, IPTC = 0x02BC, 0x83BB
GEO = frozenset((33550, 33922, 34264, 34735, 34736, 34737, 42112, 42113, 50844))
_MAX_GEO = 65_536  # bytes of one value: a grid of tie points
# Texts and dates; white point, primaries, transfer function, reference black; rating.
_KEPT = frozenset((269, 270, 271, 272, 285, 305, 306, 315, 316, 301, 318, 319, 532, 33432))
_KEPT |= GEO | {*range(0x9C9B, 0x9CA0), 18246, 18249}
_MAX_BYTES = 65_536 + 16_384  # of all entries


def entries(data: bytes) -> list[exif.Entry]:
    """Descriptive tags of a TIFF file, of its EXIF and of its GPS directory.

    Args:
        data: TIFF file. Of a BigTIFF nothing is read.

    Returns:
        Entries without what may hold a picture, their values in little-endian order. XMP and IPTC
        are not among them, see `block`.
    """
    kept = []
    swapped = data[:2] == b"MM"
    room = _MAX_BYTES
    for entry in exif.entries(data, max_value=_MAX_GEO):
        limit = _MAX_GEO if entry.tag in GEO else exif.LONGEST_VALUE
        wanted = entry.tag in _KEPT if entry.directory == 0 else not entry.may_hold_a_picture
        room -= entry.num_bytes if wanted and len(entry.value) <= limit else 0
        if wanted and len(entry.value) <= limit and room >= 0:
            kept.append(_little_endian(entry) if swapped else entry)
    return kept


def block(data: bytes, tag: int) -> bytes:
    """The value of a tag that is a block of bytes, `XMP` or `IPTC`; b"" if there is none."""
    for entry in exif.entries(data, max_value=1 << 20):
        if (entry.directory, entry.tag) == (0, tag):
            return entry.value
    return b""


def with_entries(written: bytes, kept: Sequence[exif.Entry], blocks: Mapping[int, bytes]) -> bytes:
    """A TIFF file with more tags.

    Args:
        written: File that was just written, little-endian, one page.
        kept: What `entries` gave.
        blocks: Value of `XMP` and `IPTC`; b"" for none.

    Returns:
        The same with a new directory at its end; tags that it has already stay its own.
    """
    added = [exif.Entry(0, tag, 1, len(value), value) for tag, value in blocks.items() if value]
    kept = [*kept, *added]
    if not kept:
        return written
    (offset,) = struct.unpack_from("<I", written, 4)
    (count,) = struct.unpack_from("<H", written, offset)
    rows = {}
    for position in range(offset + 2, offset + 2 + 12 * count, 12):
        rows[struct.unpack_from("<H", written, position)[0]] = written[position : position + 12]
    body = written + b"\0" * (len(written) % 2)
    for directory in (0x8825, 0x8769):
        if inner := [entry for entry in kept if entry.directory == directory]:
            body, new = _append(body, inner, {})
            rows[directory] = struct.pack("<HHII", directory, 4, 1, new)
    own = [entry for entry in kept if entry.directory == 0 and entry.tag not in rows]
    body, new = _append(body, own, rows)
    return body[:4] + struct.pack("<I", new) + body[8:]


def _little_endian(entry: exif.Entry) -> exif.Entry:
    """The same entry of a file of the other byte order."""
    unit, value = exif.UNITS.get(entry.type, 1), entry.value
    parts = (value[at : at + unit][::-1] for at in range(0, len(value), unit))
    return replace(entry, value=b"".join(parts))


def _append(body: bytes, added: Sequence[exif.Entry], rows: dict[int, bytes]) -> tuple[bytes, int]:
    """Values and a directory at the end of a file; the file, and where the directory begins."""
    rows = dict(rows)
    for entry in added:
        value = entry.value
        if len(value) > 4:
            at = len(body)
            body += value + b"\0" * (len(value) % 2)
            value = struct.pack("<I", at)
        head = struct.pack("<HHI", entry.tag, entry.type, entry.count)
        rows[entry.tag] = head + value.ljust(4, b"\0")
    begin = len(body)
    directory = b"".join(rows[tag] for tag in sorted(rows))
    return body + struct.pack("<H", len(rows)) + directory + bytes(4), begin
