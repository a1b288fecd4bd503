"""EXIF, XMP, IPTC and TIFF, written by hand: what no library of ours may write for a test."""

import struct

RIGHTS_XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    b'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    b'xmlns:plus="http://ns.useplus.org/ldf/xmp/1.0/" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
    b'xmlns:dc="http://purl.org/dc/elements/1.1/" tiff:Orientation="6" '
    b'plus:DataMining="http://ns.useplus.org/ldf/vocab/DMI-PROHIBITED-AIMLTRAINING">'
    b"<dc:rights><rdf:Alt><rdf:li xml:lang='x-default'>\xc2\xa9 Zo\xc3\xab</rdf:li></rdf:Alt>"
    b"</dc:rights>%s</rdf:Description></rdf:RDF></x:xmpmeta>"
)


def block_of(
    *directories: tuple[int, list[tuple[int, int, int, bytes]]], order: str = "<"
) -> bytes:
    """An EXIF block of directories, given by their tag (0 is the first) and entries.

    A directory's own entry is added to the first one, that of 0xA005 to 0x8769; 1 is a thumbnail.
    """
    content = {tag: list(entries) for tag, entries in directories}
    for inner, outer in ((0xA005, 0x8769), (0x8769, 0), (0x8825, 0)):
        if inner in content:
            content[outer].append((inner, 4, 1, b"here"))
    places, end = {}, 8
    for tag, entries in content.items():
        places[tag] = end
        end += 2 + 12 * len(entries) + 4
    body, values = b"", b""
    for tag, entries in content.items():
        body += struct.pack(f"{order}H", len(entries))
        for number, type_, count, value in sorted(entries):
            if value == b"here":
                value = struct.pack(f"{order}I", places[number])
            elif len(value) > 4:
                values, value = values + value, struct.pack(f"{order}I", end + len(values))
            body += struct.pack(f"{order}HHI", number, type_, count) + value.ljust(4, b"\0")
        body += struct.pack(f"{order}I", places.get(1, 0) if tag == 0 else 0)
    return (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8) + body + values


def data_set(record: int, number: int, value: bytes) -> bytes:
    return struct.pack(">BBBH", 0x1C, record, number, len(value)) + value


def tiff_with(tags: list[tuple[int, int, int, bytes]], *, order: str, bands: int = 3) -> bytes:
    """A TIFF of 4x4 pixels and some tags."""
    short, long = f"{order}H", f"{order}I"
    rows = [(256, 4, 1, 4), (257, 4, 1, 4), (262, 3, 1, 2), (277, 3, 1, bands), (278, 4, 1, 4)]
    layout = [(t, k, n, struct.pack(short if k == 3 else long, v)) for t, k, n, v in rows]
    layout += [(258, 3, bands, struct.pack(f"{order}{bands}H", *[8] * bands))]
    layout += [(259, 3, 1, struct.pack(short, 1)), (273, 4, 1, b"here")]
    layout += [(279, 4, 1, struct.pack(long, 16 * bands))]
    if bands > 3:
        layout.append((338, 3, bands - 3, struct.pack(f"{order}{bands - 3}H", *[0] * (bands - 3))))
    entries = sorted([*layout, *tags])
    end = 8 + 2 + 12 * len(entries) + 4
    values = bytes(range(16)) * bands
    body = struct.pack(short, len(entries))
    for tag, kind, count, value in entries:
        if value == b"here":
            value = struct.pack(long, end)
        elif len(value) > 4:
            values, value = values + value, struct.pack(long, end + len(values))
        body += struct.pack(f"{order}HHI", tag, kind, count) + value.ljust(4, b"\0")
    data = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(long, 8) + body + bytes(4)
    return data + values
