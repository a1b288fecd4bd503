"""EXIF blocks, edited as bytes: what may hold a picture is left out, all else stays as it is.

A block has the structure of a TIFF file: a header, and directories of entries of 12 bytes. An entry
has a tag, a type, a count, and the value, or where it lies if it takes more than 4 bytes (CIPA
DC-008, "Exif 2.32", section 4.6). Decoding the values and encoding them again would change text
that is not ASCII, and fail at one odd value of many. So the entries that are kept move to a new
block with their bytes as they are; nothing but offsets is written anew.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

PREFIX = b"Exif\0\0"
ORIENTATION = 0x0112

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 129: 1}
# Bytes of the numbers that a value of a type is made of.
UNITS = {3: 2, 4: 4, 5: 4, 8: 2, 9: 4, 10: 4, 11: 4, 12: 8, 13: 4}
# Directories that are entries of another: Exif, GPS, interoperability.
_DIRECTORIES = frozenset((0x8769, 0x8825, 0xA005))
# Sub-images, JPEG tables and thumbnails, XMP, IPTC, Photoshop blocks, ICC (kept elsewhere), maker
# notes, PrintIM, strips and tiles.
_PICTURES = {0x0111, 0x0117, 0x0144, 0x0145, 0x014A, 0x015B, 0x0201, 0x0202}
_PICTURES |= {0x02BC, 0x83BB, 0x8649, 0x8773, 0x927C, 0xC4A5, 0xC634}
LONGEST_VALUE = 2048  # bytes; a thumbnail does not fit
_FRAME_BYTES = 8 + 4 * (2 + 4) + 3 * 12  # header, four directories, three pointers to them
_MAX_ENTRIES = 1000  # of a block; cameras write some 60


@dataclass(frozen=True)
class Entry:
    """One entry of a directory.

    Attributes:
        directory: Tag of the directory's own entry; 0 for the first.
        tag, type: As in the block.
        count: Number of values.
        value: Bytes of the values, in the byte order of the block.
    """

    directory: int
    tag: int
    type: int
    count: int
    value: bytes = field(repr=False)

    @property
    def may_hold_a_picture(self) -> bool:
        return self.tag in _PICTURES

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes in a block, at most."""
        return 12 + (len(self.value) + 1 if len(self.value) > 4 else 0)


def entries(block: bytes, *, max_value: int = LONGEST_VALUE) -> list[Entry]:
    """Entries of the directories that describe the picture itself, in their order.

    Args:
        block: EXIF block, with or without its prefix. What cannot be read in it is left out: a
            value that lies outside, a directory that comes back.

        max_value: Bytes of a value; longer ones are left out.

    Returns:
        No entry of a thumbnail; none at all if it is no EXIF block.
    """
    block = block.removeprefix(PREFIX)
    order = _byte_order(block)
    if not order:
        return []
    (first,) = struct.unpack_from(f"{order}I", block, 4)
    found: list[Entry] = []
    pending, seen = [(0, first)], {0}
    while pending and len(found) < _MAX_ENTRIES:
        directory, offset = pending.pop(0)
        for entry in _read_directory(block, order, directory, offset, max_value):
            if entry.tag not in _DIRECTORIES:
                found.append(entry)
            elif entry.tag not in seen and len(entry.value) == 4:
                seen.add(entry.tag)
                pending.append((entry.tag, *struct.unpack(f"{order}I", entry.value)))
    return found[:_MAX_ENTRIES]


def without_pictures(block: bytes, *, max_bytes: int) -> bytes:
    """The same block without what may hold a second, unprotected copy of the picture.

    Left out are thumbnails, sub-images, maker notes, embedded blocks of other kinds, values of over
    2 KB, and then the longest ones until the rest fits.

    Args:
        block: EXIF block, with or without its prefix.
        max_bytes: Bytes that it may have.

    Returns:
        Block in TIFF structure without prefix; b"" if nothing is left.
    """
    block = block.removeprefix(PREFIX)
    kept = [entry for entry in entries(block) if not entry.may_hold_a_picture]
    room = max_bytes - _FRAME_BYTES
    for entry in sorted(kept, key=lambda entry: len(entry.value)):
        room -= entry.num_bytes
        if room < 0:
            kept.remove(entry)
    return _write(_byte_order(block), kept) if kept else b""


def without_orientation(block: bytes) -> bytes:
    """The block, as `without_pictures` returns it, for pixels that have been turned upright."""
    kept = [e for e in entries(block) if (e.directory, e.tag) != (0, ORIENTATION)]
    return _write(_byte_order(block), kept) if kept else b""


def orientation(block: bytes) -> int:
    """Orientation, 1 to 8; 1, upright, if the block states none or another number."""
    order = _byte_order(block.removeprefix(PREFIX))
    for entry in entries(block):
        if (entry.directory, entry.tag, entry.type) == (0, ORIENTATION, 3) and len(entry.value) > 1:
            (value,) = struct.unpack_from(f"{order}H", entry.value)
            return value if 1 <= value <= 8 else 1
    return 1


def _byte_order(block: bytes) -> str:
    """Struct's sign for the byte order of a block; "" if it is none."""
    return {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4], "") if len(block) >= 8 else ""


def _read_directory(
    block: bytes, order: str, directory: int, offset: int, max_value: int
) -> Iterator[Entry]:
    if offset + 2 > len(block):
        return
    (count,) = struct.unpack_from(f"{order}H", block, offset)
    for position in range(offset + 2, offset + 2 + 12 * count, 12):
        if position + 12 > len(block):
            return
        tag, type_, num_values = struct.unpack_from(f"{order}HHI", block, position)
        size = _SIZES.get(type_, 0) * num_values
        if size > max_value:
            continue
        if size <= 4:  # or of a type that nobody knows: then the 4 bytes are all there is
            value = block[position + 8 : position + 8 + (size or 4)]
        else:
            (start,) = struct.unpack_from(f"{order}I", block, position + 8)
            value = block[start : start + size]
            if len(value) < size:
                continue
        yield Entry(directory, tag, type_, num_values, value)


def _write(order: str, kept: list[Entry]) -> bytes:
    """A block of these entries; a directory that is empty is left out, its pointer too."""
    by_directory: dict[int, list[Entry]] = {}
    for entry in kept:
        by_directory.setdefault(entry.directory, []).append(entry)
    for inner, outer in ((0xA005, 0x8769), (0x8769, 0), (0x8825, 0)):
        if inner in by_directory:
            pointer = Entry(outer, inner, 4, 1, bytes(4))
            by_directory[outer] = sorted(
                [*by_directory.get(outer, []), pointer], key=lambda entry: entry.tag
            )
    names = sorted(by_directory)
    places, end = {}, 8
    for name in names:
        places[name] = end
        end += 2 + 12 * len(by_directory[name]) + 4
    directories, values = [], b""
    for name in names:
        rows = [struct.pack(f"{order}H", len(by_directory[name]))]
        for entry in by_directory[name]:
            value = entry.value
            if entry.tag in _DIRECTORIES:
                value = struct.pack(f"{order}I", places[entry.tag])
            elif len(value) > 4:
                values += b"\0" * (len(values) % 2)  # values begin at even bytes
                values, value = values + value, struct.pack(f"{order}I", end + len(values))
            head = struct.pack(f"{order}HHI", entry.tag, entry.type, entry.count)
            rows.append(head + value.ljust(4, b"\0"))
        directories.append(b"".join(rows) + bytes(4))
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return header + b"".join(directories) + values
