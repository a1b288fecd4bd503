"""What an AVIF or a HEIC says about its picture: its boxes, read before any decoder sees the file.

Both are HEIF (ISO/IEC 23008-12): items in a box ``meta``, with properties, references to each other
and places in the file. One item is the primary picture, coded as a whole or as a grid of tiles. All
that is read here decides whether it can be protected, and bounds what decoding it costs: frames in
the coded data and their size, the pixels of all tiles, the items and bytes. A structure that
readers could take in two ways is refused.

Nothing else of a file is looked at, and nothing of it is ever written back: thumbnails, depth and
gain maps, further pictures, films.
"""

from __future__ import annotations

import struct
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from one4all.errors import BadImageError

MAX_ITEMS = 1000  # and properties; what libheif reads. A phone's photo of 48 megapixels has 200
MAX_EXTENTS = 32  # of one item
_MAX_ASSOCIATIONS = 64  # properties of one item
_MAX_LAYERS = 4  # pictures in the data of one item, of which the last is shown
_MAX_UNITS = 10_000  # of its data, such as slices
_PADDING = 1 << 20  # pixels that the tiles at the edges may have beyond the picture, and thrice it

_CODED = {"AVIF": b"av01", "HEIC": b"hvc1"}
_SEQUENCE_BRANDS = frozenset((b"avis", b"msf1", b"hevc", b"hevx", b"hevm", b"hevs"))
_NO_PICTURES = frozenset((b"Exif", b"mime", b"uri ", b"tmap"))
# Transformations, in the only order that all readers agree on.
_ORDER = (b"clap", b"irot", b"imir")
_SRGB = (1, 13)


@dataclass(frozen=True)
class HeifPicture:
    """The primary picture of a file.

    Attributes:
        size: (width, height), cropped, before it is turned.
        quarter_turns: Anticlockwise, to be applied first.
        mirror: Then: 0 top to bottom, 1 left to right, or None.
        is_cropped: It has a clean aperture, which not all decoders apply.
        icc_profile: ICC profile, or b"".
        cicp: Colour primaries and transfer characteristics (ITU-T H.273) of a picture without ICC
            profile; None for sRGB, and where nothing is stated.
        exif: EXIF block in TIFF structure.
        xmp: XMP packet.
        decodable: The file for a decoder: without EXIF, which some would parse at any cost.
        num_pictures: Pictures in the file that are no part, thumbnail or map of another.
    """

    size: tuple[int, int]
    quarter_turns: int
    mirror: int | None
    is_cropped: bool
    icc_profile: bytes = field(repr=False)
    cicp: tuple[int, int] | None
    exif: bytes = field(repr=False)
    xmp: bytes = field(repr=False)
    decodable: bytes = field(repr=False)
    num_pictures: int


def read_picture(data: bytes, kind: str) -> HeifPicture:
    """Read the boxes of a file.

    Args:
        data: The file.
        kind: "AVIF" or "HEIC".

    Raises:
        BadImageError: It cannot be protected, or decoding it would cost more than its pixels and
            bytes warrant.
    """
    try:
        return _Meta(data, kind).picture()
    except (struct.error, IndexError) as error:
        raise BadImageError(f"cannot be decoded: a broken box of {kind}") from error


def with_cicp(data: bytes, cicp: tuple[int, int]) -> bytes:
    """The same file with other colour primaries and transfer characteristics in its ``nclx``."""
    at = data.index(b"colrnclx") + 8
    return data[:at] + struct.pack(">HH", *cicp) + data[at + 4 :]


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, end) of the content of each box."""
    for _ in range(MAX_ITEMS):
        if start + 8 > end:
            return
        size, kind = struct.unpack_from(">I4s", data, start)
        head = 8
        if size == 1:
            (size,), head = struct.unpack_from(">Q", data, start + 8), 16
        elif size == 0:
            size = end - start
        if size < head or start + size > end:
            raise BadImageError("cannot be decoded: a box ends behind what holds it")
        yield kind, start + head, start + size
        start += size
    raise BadImageError(f"over {MAX_ITEMS:,} boxes")


def _unique(data: bytes, start: int, end: int) -> dict[bytes, tuple[int, int]]:
    """Boxes by type; two of one type, which readers choose from, are refused."""
    found: dict[bytes, tuple[int, int]] = {}
    for kind, first, last in _boxes(data, start, end):
        if kind in found and kind not in (b"free", b"skip", b"mdat", b"uuid"):
            raise BadImageError(f"two boxes {kind.decode('latin-1')!r}")
        found[kind] = (first, last)
    return found


class _Numbers:
    """Numbers of various widths, one behind the other."""

    def __init__(self, data: bytes, start: int, end: int) -> None:
        self._data, self.position, self.end = data, start, end

    def take(self, num_bytes: int) -> int:
        start, self.position = self.position, self.position + num_bytes
        if self.position > self.end:
            raise IndexError("behind the end of a box")
        return int.from_bytes(self._data[start : self.position], "big")

    def version(self) -> tuple[int, int]:
        """Version and flags of a full box."""
        both = self.take(4)
        return both >> 24, both & 0xFFFFFF


class _Meta:
    """The box ``meta`` of a file, as tables."""

    def __init__(self, data: bytes, kind: str) -> None:
        self._data, self._kind, self._coded = data, kind, _CODED[kind]
        self._a_file = "an AVIF" if kind == "AVIF" else f"a {kind}"
        self._exif_at: list[int] = []  # where items say that they are EXIF
        top = _unique(data, 0, len(data))
        if b"moov" in top or data[8:12] in _SEQUENCE_BRANDS:
            raise BadImageError(f"animated or multi-page: {self._a_file} with a sequence")
        if b"meta" not in top:
            raise BadImageError(f"cannot be decoded: {self._a_file} without a box 'meta'")
        start, end = top[b"meta"]
        self._boxes = _unique(data, start + 4, end)
        numbers = self._numbers(b"pitm")
        self._primary = numbers.take(4 if numbers.version()[0] else 2)
        self._types, self._hidden = self._read_items()
        self._places = self._read_places()
        self._references = self._read_references()
        self._properties = self._read_properties()

    def picture(self) -> HeifPicture:
        primary = self._primary
        coded = [primary]
        size = self._size(primary)
        if self._types.get(primary) == b"grid":
            coded = self._tiles(size)
        for item in dict.fromkeys(coded):
            if (found := self._types.get(item)) != self._coded:
                name = (found or b"nothing").decode("latin-1")
                raise BadImageError(f"{self._a_file} whose picture is coded as {name!r}")
            self._check_coded(item)
        self._refuse_depth({primary, *coded})
        transformations = [
            (name, content)
            for name, content in self._properties[primary]
            if name in (*_ORDER, b"iscl")
        ]
        names = [name for name, _ in transformations]
        if names != [name for name in _ORDER if name in names]:
            raise BadImageError(f"{self._a_file} with transformations that readers disagree about")
        turns = dict(transformations)
        icc_profile, cicp = self._colour({primary, coded[0]})
        exif, xmp = self._description()
        return HeifPicture(
            size=self._cropped(turns[b"clap"], size) if b"clap" in turns else size,
            quarter_turns=turns[b"irot"][0] & 3 if b"irot" in turns else 0,
            mirror=turns[b"imir"][0] & 1 if b"imir" in turns else None,
            is_cropped=b"clap" in turns,
            icc_profile=icc_profile,
            cicp=cicp,
            exif=exif,
            xmp=xmp,
            decodable=self._without_exif(),
            num_pictures=self._num_pictures(),
        )

    def _numbers(self, kind: bytes) -> _Numbers:
        if kind not in self._boxes:
            name = kind.decode("latin-1")
            raise BadImageError(f"cannot be decoded: {self._a_file} without a box {name!r}")
        return _Numbers(self._data, *self._boxes[kind])

    def _read_items(self) -> tuple[dict[int, bytes], set[int]]:
        """Type of each item; those that are hidden."""
        numbers = self._numbers(b"iinf")
        numbers.take(4 if numbers.version()[0] else 2)
        types: dict[int, bytes] = {}
        hidden = set()
        for kind, start, end in _boxes(self._data, numbers.position, numbers.end):
            if kind != b"infe":
                continue
            entry = _Numbers(self._data, start, end)
            version, flags = entry.version()
            if version < 2:
                continue
            item = entry.take(2 if version == 2 else 4)
            entry.take(2)
            if item in types:
                raise BadImageError(f"two items {item}")
            types[item] = self._data[entry.position : entry.position + 4]
            if types[item] == b"Exif":
                self._exif_at.append(entry.position)
            if flags & 1:
                hidden.add(item)
        return types, hidden

    def _read_places(self) -> dict[int, list[tuple[int, int, int]]]:
        """(method, offset, length) of the parts of each item; method 1 counts in ``idat``."""
        numbers = self._numbers(b"iloc")
        version, _ = numbers.version()
        sizes = numbers.take(2)
        offset_size, length_size, base_size = sizes >> 12, sizes >> 8 & 15, sizes >> 4 & 15
        index_size = sizes & 15 if version else 0
        count = numbers.take(2 if version < 2 else 4)
        if count > MAX_ITEMS:
            raise BadImageError(f"over {MAX_ITEMS:,} items")
        places: dict[int, list[tuple[int, int, int]]] = {}
        num_bytes = 0
        for _ in range(count):
            item = numbers.take(2 if version < 2 else 4)
            method = numbers.take(2) & 15 if version else 0
            numbers.take(2)
            base = numbers.take(base_size)
            num_parts = numbers.take(2)
            if num_parts > MAX_EXTENTS or item in places:
                raise BadImageError(f"an item in over {MAX_EXTENTS} parts, or in two places")
            places[item] = []
            for _ in range(num_parts):
                numbers.take(index_size)
                offset, length = base + numbers.take(offset_size), numbers.take(length_size)
                places[item].append((method, offset, length))
                num_bytes += length or len(self._data)  # 0: up to the end
        if num_bytes > 2 * len(self._data):
            raise BadImageError("items that overlap")
        return places

    def _read_references(self) -> dict[bytes, dict[int, list[int]]]:
        """By kind of reference: from which item, to which ones."""
        references: dict[bytes, dict[int, list[int]]] = defaultdict(dict)
        if b"iref" not in self._boxes:
            return references
        numbers = self._numbers(b"iref")
        wide = 4 if numbers.version()[0] else 2
        total = 0
        for kind, start, end in _boxes(self._data, numbers.position, numbers.end):
            entry = _Numbers(self._data, start, end)
            item, count = entry.take(wide), entry.take(2)
            total += count
            if total > 4 * MAX_ITEMS or item in references[kind]:
                raise BadImageError("too many references between items, or two lists of one kind")
            references[kind][item] = [entry.take(wide) for _ in range(count)]
        return references

    def _read_properties(self) -> dict[int, list[tuple[bytes, bytes]]]:
        """Type and content of the properties of each item, in their order."""
        start, end = self._numbers(b"iprp").position, self._boxes[b"iprp"][1]
        inner = _unique(self._data, start, end)
        if b"ipco" not in inner or b"ipma" not in inner:
            raise BadImageError("cannot be decoded: no properties")
        known = [
            (kind, self._data[first:last])
            for kind, first, last in _boxes(self._data, *inner[b"ipco"])
        ]
        numbers = _Numbers(self._data, *inner[b"ipma"])
        version, flags = numbers.version()
        count = numbers.take(4)
        if count > MAX_ITEMS:
            raise BadImageError(f"over {MAX_ITEMS:,} items")
        properties: dict[int, list[tuple[bytes, bytes]]] = defaultdict(list)
        for _ in range(count):
            item, number = numbers.take(4 if version else 2), numbers.take(1)
            if number > _MAX_ASSOCIATIONS or item in properties:
                raise BadImageError("an item with too many properties, or two lists of them")
            for _ in range(number):
                index = numbers.take(2) & 0x7FFF if flags & 1 else numbers.take(1) & 0x7F
                if 0 < index <= len(known):
                    properties[item].append(known[index - 1])
        return properties

    def _property(self, item: int, name: bytes) -> bytes:
        found = [content for kind, content in self._properties[item] if kind == name]
        if len(found) > 1:
            raise BadImageError(f"a picture with two properties {name.decode('latin-1')!r}")
        return found[0] if found else b""

    def _size(self, item: int) -> tuple[int, int]:
        width, height = struct.unpack_from(">II", self._property(item, b"ispe"), 4)
        return width, height

    def _content(self, item: int) -> bytes:
        """Bytes of an item; as far as they are there."""
        parts = []
        for method, offset, length in self._places.get(item, ()):
            start, end = (0, len(self._data)) if method == 0 else self._boxes.get(b"idat", (0, 0))
            start += offset
            parts.append(self._data[start : min(start + length, end) if length else end])
        return b"".join(parts)

    def _tiles(self, size: tuple[int, int]) -> list[int]:
        """Items of a grid, which has to be about as large as its tiles."""
        grid = self._content(self._primary)
        wide = ">II" if grid[1] & 1 else ">HH"
        rows, columns = grid[2] + 1, grid[3] + 1
        tiles = self._references[b"dimg"].get(self._primary, [])
        if struct.unpack_from(wide, grid, 4) != size or len(tiles) != rows * columns:
            raise BadImageError("a grid whose size is not that of the picture")
        num_pixels = 0
        for item, count in Counter(tiles).items():
            width, height = self._size(item)
            num_pixels += width * height * count
        if num_pixels > 4 * size[0] * size[1] + _PADDING:
            raise BadImageError("a grid whose tiles are far larger than the picture")
        return tiles

    def _check_coded(self, item: int) -> None:
        """Frames that nobody sees cost as much as those that are shown."""
        content = self._content(item)
        units = _av1_units(content) if self._kind == "AVIF" else _hevc_units(content)
        num_frames = 0
        for number, (is_frame, size) in enumerate(units):
            if number == _MAX_UNITS:
                raise BadImageError(f"{self._a_file} of over {_MAX_UNITS:,} units in one picture")
            num_frames += is_frame
            if num_frames > _MAX_LAYERS:
                raise BadImageError(f"{self._a_file} of over {_MAX_LAYERS} frames in one picture")
            self._refuse_larger(size, self._size(item))

    def _refuse_larger(self, coded: tuple[int, int], stated: tuple[int, int]) -> None:
        if coded[0] * coded[1] > 4 * stated[0] * stated[1] + _PADDING:
            raise BadImageError(f"{self._a_file} of which far more is coded than shown")

    def _refuse_depth(self, items: set[int]) -> None:
        bits = 8
        for item in items:
            for kind, content in self._properties[item]:
                if kind == b"pixi":
                    bits = max(bits, *content[5 : 5 + content[4]])
                elif kind == b"av1C":
                    bits = max(bits, 12 if content[2] & 0x20 else 10 if content[2] & 0x40 else 8)
                elif kind == b"hvcC":
                    bits = max(bits, 8 + (content[17] & 7), 8 + (content[18] & 7))
        if bits > 8:
            raise BadImageError(f"{self._a_file} of {bits} bits a channel; convert it to 8 bits")

    def _cropped(self, clean_aperture: bytes, size: tuple[int, int]) -> tuple[int, int]:
        """Size behind a clean aperture; it may hide an edge that coding needs, but not far more."""
        numbers = struct.unpack_from(">4I", clean_aperture)
        if not all(numbers):
            raise BadImageError(f"{self._a_file} of which nothing is shown")
        cropped = numbers[0] // numbers[1], numbers[2] // numbers[3]
        self._refuse_larger(size, cropped)
        return cropped

    def _colour(self, items: set[int]) -> tuple[bytes, tuple[int, int] | None]:
        """ICC profile; primaries and transfer, where there is none."""
        icc_profile, cicp = b"", None
        for item in sorted(items):
            for kind, content in self._properties[item]:
                if kind == b"colr" and content[:4] in (b"prof", b"rICC"):
                    icc_profile = icc_profile or content[4:]
                elif kind == b"colr" and content[:4] == b"nclx":
                    primaries, transfer = struct.unpack_from(">HH", content, 4)
                    cicp = cicp or (primaries, transfer)
        if icc_profile or cicp in (None, _SRGB, (2, 2)):
            return icc_profile, None
        if cicp and max(cicp) > 255:
            raise BadImageError(f"{self._a_file} of an unknown colour space")
        return b"", cicp

    def _description(self) -> tuple[bytes, bytes]:
        """EXIF and XMP of the primary picture: the first item of each kind."""
        exif = xmp = b""
        for item, about in self._references[b"cdsc"].items():
            if self._primary not in about:
                continue
            if self._types.get(item) == b"Exif" and not exif:
                block = self._content(item)
                exif = block[4 + int.from_bytes(block[:4], "big") :]
                if exif[:2] not in (b"II", b"MM"):
                    exif = block[4:]
            elif self._types.get(item) == b"mime" and not xmp:
                packet = self._content(item)
                xmp = packet if b"xmpmeta" in packet or b"rdf:RDF" in packet else b""
        return exif, xmp

    def _without_exif(self) -> bytes:
        """The same file, in which items of EXIF are of a kind that nobody knows."""
        if not self._exif_at:
            return self._data
        data = bytearray(self._data)
        for at in self._exif_at:
            data[at : at + 4] = b"none"
        return bytes(data)

    def _num_pictures(self) -> int:
        parts = {item for items in self._references[b"dimg"].values() for item in items}
        parts |= self._references[b"thmb"].keys() | self._references[b"auxl"].keys()
        return sum(
            kind not in _NO_PICTURES and item not in parts and item not in self._hidden
            for item, kind in self._types.items()
        )


def _av1_units(content: bytes) -> Iterator[tuple[bool, tuple[int, int]]]:
    """Of each data unit (OBU): whether it begins a frame, and the size that it sets, or (0, 0)."""
    position = 0
    while position < len(content):
        head = content[position]
        kind, has_size = head >> 3 & 15, head & 2
        position += 2 if head & 4 else 1
        size = 0 if has_size else len(content) - position
        for shift in range(0, 56, 7) if has_size else ():
            byte = content[position]
            position += 1
            size |= (byte & 127) << shift
            if not byte & 128:
                break
        sides = _av1_size(content[position : position + 64]) if kind == 1 else (0, 0)
        yield kind in (3, 6), sides  # frame header, frame
        position += size


def _av1_size(sequence: bytes) -> tuple[int, int]:
    """Largest width and height that a sequence header of AV1 allows (its specification, 5.5)."""
    bits, left = int.from_bytes(sequence, "big"), 8 * len(sequence)

    def take(count: int) -> int:
        nonlocal left
        left -= count
        if left < 0:
            raise IndexError("behind the end of a sequence header")
        return bits >> left & (1 << count) - 1

    take(4)
    if take(1):  # the short header of a still picture
        take(5)
    else:
        if take(1):
            raise BadImageError("an AVIF with the timing of a film")
        has_delays = take(1)
        for _ in range(take(5) + 1):
            take(12)
            if take(5) > 7:
                take(1)
            if has_delays and take(1):
                take(4)
    width_bits, height_bits = take(4) + 1, take(4) + 1
    return take(width_bits) + 1, take(height_bits) + 1


def _hevc_units(content: bytes) -> Iterator[tuple[bool, tuple[int, int]]]:
    """The same of HEVC (NAL units, each behind its length of four bytes); libheif checks sizes."""
    position = 0
    while position + 7 <= len(content):
        size = int.from_bytes(content[position : position + 4], "big")
        is_slice = content[position + 4] >> 1 & 63 < 32
        yield is_slice and content[position + 6] >= 128, (0, 0)  # the first slice of its picture
        position += 4 + size
