"""IPTC records: by-line, copyright and captions stay, previews go (IPTC-IIM 4.2).

A JPEG holds them in its APP13 segment, as one of the resources that Photoshop writes there. The
others, among them two kinds of thumbnails, are not kept.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

SIGNATURE = b"Photoshop 3.0\0"  # before the resources in a JPEG
RESOURCE = 0x0404  # of Photoshop's, that holds the records
_PREVIEWS = frozenset((200, 201, 202))  # of record 2: format, version and data of a preview
_RECORDS = frozenset(range(1, 7))  # 7 to 9 hold objects
_LONGEST_VALUE = 2048  # bytes of one value; captions may have 2,000


def without_pictures(records: bytes, *, max_bytes: int) -> bytes:
    """The same records without what may hold a picture.

    Args:
        records: IPTC-IIM data sets, one after the other.
        max_bytes: Bytes that they may have in sum; what comes later is left out.

    Returns:
        The records that are kept, byte for byte; b"" if there are none.
    """
    kept = b""
    for record, number, whole in _data_sets(records):
        preview = record == 2 and number in _PREVIEWS
        if record in _RECORDS and not preview and len(whole) <= _LONGEST_VALUE:
            if len(kept) + len(whole) > max_bytes:
                break
            kept += whole
    return kept


def of_photoshop(resources: bytes) -> bytes:
    """IPTC records of an APP13 segment; b"" if it holds none.

    Args:
        resources: The segment after its signature.
    """
    position = 0
    while resources[position : position + 4] == b"8BIM" and position + 12 <= len(resources):
        (number,) = struct.unpack_from(">H", resources, position + 4)
        name = resources[position + 6]
        start = position + 6 + (name + 2) // 2 * 2  # length and name fill an even number of bytes
        if start + 4 > len(resources):
            break
        (size,) = struct.unpack_from(">I", resources, start)
        if number == RESOURCE:
            return resources[start + 4 : start + 4 + size]
        position = start + 4 + size + size % 2
    return b""


def to_photoshop(records: bytes) -> bytes:
    """An APP13 segment, signature included, that holds these records."""
    resource = b"8BIM" + struct.pack(">HHI", RESOURCE, 0, len(records)) + records
    return SIGNATURE + resource + bytes(len(records) % 2)


def _data_sets(records: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Record, number and all bytes of each data set, up to the first that is damaged."""
    position = 0
    while position + 5 <= len(records) and records[position] == 0x1C:
        record, number, size = struct.unpack_from(">BBH", records, position + 1)
        end = position + 5 + size
        if size > 0x7FFF or end > len(records):  # an extended size: four more bytes at least
            return
        yield record, number, records[position:end]
        position = end
