"""What a JPEG XL says about its picture: its headers, read before the decoder sees the file.

The decoder that we use decodes all of a file at once. So whatever decides the cost is read here,
bit by bit: size, channels, and each frame, with the pixels that it has (ISO/IEC 18181-1, annexes C
to F; container: 18181-2). A header that no ordinary encoder writes is refused.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from one4all.errors import BadImageError

MAX_FRAMES = 8  # that are no animation: layers, and coarser scales of one
_SIGNATURE = b"\xff\x0a"
_MAX_BOXES = 1000
_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
# Distributions of a number: how many bits it has, and what is added.
_Choices = tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int]]
_SIDE: _Choices = ((9, 1), (13, 1), (18, 1), (30, 1))
_ENUM: _Choices = ((0, 0), (0, 1), (4, 2), (6, 18))
_CROP: _Choices = ((8, 0), (11, 256), (14, 2304), (30, 18688))
_SECTION: _Choices = ((10, 0), (14, 1024), (22, 17408), (30, 4211712))
_NAME: _Choices = ((0, 0), (4, 0), (5, 16), (10, 48))
_SCALE: _Choices = ((0, 1), (0, 2), (0, 4), (0, 8))
_SMALL: _Choices = ((0, 0), (0, 1), (0, 2), (0, 3))
_BLEND: _Choices = ((0, 0), (0, 1), (0, 2), (2, 3))
_REGULAR, _COARSE, _REFERENCE, _SKIPPED = range(4)  # types of frames
_REPLACE, _OVER, _WEIGHTED, _MULTIPLY = 0, 2, 3, 4  # ways to blend them
_UNBOUNDED = 2 | 16  # flags: patches, of which each may cover all; splines
_HAS_COARSE = 32  # flag: its coarse scale is a frame of its own
_RGB, _GRAY, _D65, _SRGB_PRIMARIES, _SRGB_TRANSFER = 0, 1, 1, 1, 13


@dataclass(frozen=True)
class JxlHeader:
    """A picture of 8 bits a channel or fewer, in sRGB, with or without alpha.

    Attributes:
        size: (width, height) as coded; the decoder turns it upright.
        exif, xmp: Blocks of the container.
        codestream: The picture without its container.
    """

    size: tuple[int, int]
    exif: bytes = field(repr=False)
    xmp: bytes = field(repr=False)
    codestream: bytes = field(repr=False)


def read_header(data: bytes) -> JxlHeader:
    """Read the headers of a file and of all its frames.

    Raises:
        BadImageError: It cannot be protected, or decoding it would cost more than its pixels and
            bytes warrant.
    """
    try:
        codestream, exif, xmp = _unpack(data)
        return JxlHeader(_Codestream(codestream).size, exif, xmp, codestream)
    except (struct.error, EOFError) as error:
        raise BadImageError("cannot be decoded: a JPEG XL that ends too early") from error


def _unpack(data: bytes) -> tuple[bytes, bytes, bytes]:
    """Codestream, EXIF and XMP of a file with or without container."""
    if data.startswith(_SIGNATURE):
        return data, b"", b""
    parts: list[bytes] = []
    found: dict[bytes, bytes] = {}
    position = 0
    for _ in range(_MAX_BOXES):
        if position + 8 > len(data):
            break
        size, kind = struct.unpack_from(">I4s", data, position)
        head = 8
        if size == 1:
            (size,), head = struct.unpack_from(">Q", data, position + 8), 16
        elif size == 0:
            size = len(data) - position
        if size < head or position + size > len(data):
            raise EOFError("a box")
        content = data[position + head : position + size]
        position += size
        if kind == b"jxlc":
            parts.append(content)
        elif kind == b"jxlp":
            if int.from_bytes(content[:4], "big") & 0x7FFFFFFF != len(parts):
                raise BadImageError("a JPEG XL whose parts are not in order")
            parts.append(content[4:])
        elif kind == b"brob" and content[:4] in (b"Exif", b"xml "):
            raise BadImageError(
                "a JPEG XL with compressed EXIF or XMP; store them as they are "
                "(cjxl --compress_boxes=0)"
            )
        elif kind in (b"Exif", b"xml "):
            found.setdefault(kind, content)
    else:
        raise BadImageError(f"a JPEG XL of over {_MAX_BOXES:,} boxes")
    exif = found.get(b"Exif", b"")
    if exif[:2] not in (b"II", b"MM"):  # some leave out the offset that belongs there
        exif = exif[4 + int.from_bytes(exif[:4], "big") :]
    return b"".join(parts), exif, found.get(b"xml ", b"")


class _Bits:
    """Bits of a codestream, lowest first."""

    def __init__(self, data: bytes, position: int) -> None:
        self._data = data
        self.position = position  # in bits

    def take(self, count: int) -> int:
        first, last = self.position // 8, (self.position + count + 7) // 8
        if last > len(self._data):
            raise EOFError("a header")
        value = int.from_bytes(self._data[first:last], "little") >> self.position % 8
        self.position += count
        return value & (1 << count) - 1

    def choose(self, choices: _Choices) -> int:
        """A number of one of four ranges (U32)."""
        bits, offset = choices[self.take(2)]
        return self.take(bits) + offset

    def take_long(self) -> int:
        """A number of up to 64 bits (U64)."""
        if (selector := self.take(2)) < 3:
            bits, offset = ((0, 0), (4, 1), (8, 17))[selector]
            return self.take(bits) + offset
        value, shift = self.take(12), 12
        while self.take(1):
            if shift == 60:
                return value | self.take(4) << shift
            value |= self.take(8) << shift
            shift += 8
        return value

    def to_byte(self) -> None:
        self.position = -(-self.position // 8) * 8


class _Codestream:
    """Headers of a codestream; raises for what cannot be protected.

    Attributes:
        size: (width, height).
    """

    def __init__(self, data: bytes) -> None:
        if not data.startswith(_SIGNATURE):
            raise BadImageError("cannot be decoded: a JPEG XL without a codestream")
        self._num_bytes = len(data)
        self._bits = _Bits(data, 16)
        self.size = self._read_size()
        self._num_extra = 0
        self._is_xyb = True
        if not self._bits.take(1):
            self._read_metadata()
        if not self._bits.take(1):
            raise BadImageError("a JPEG XL with a colour transform of its own")
        self._bits.to_byte()
        self._read_frames()

    def _read_size(self) -> tuple[int, int]:
        bits = self._bits
        small = bits.take(1)
        height = 8 * (bits.take(5) + 1) if small else bits.choose(_SIDE)
        if ratio := bits.take(3):
            over, under = _RATIOS[ratio - 1]
            return height * over // under, height
        return 8 * (bits.take(5) + 1) if small else bits.choose(_SIDE), height

    def _read_metadata(self) -> None:
        bits = self._bits
        has_more = bits.take(1)
        if has_more:
            bits.take(3)  # orientation
            if bits.take(1):
                self._read_size()  # that it should be shown at
            if bits.take(1):
                raise BadImageError("a JPEG XL with a preview, which may be another picture")
            if bits.take(1):
                raise BadImageError("animated or multi-page: a JPEG XL animation")
        self._refuse_depth()
        bits.take(1)  # whether 16 bits are enough for its numbers
        self._num_extra = bits.choose(((0, 0), (0, 1), (4, 2), (12, 1)))
        if self._num_extra > 1:
            raise BadImageError(
                f"a JPEG XL of {self._num_extra} extra channels; only alpha can be protected"
            )
        if self._num_extra and not bits.take(1):
            self._read_extra_channel()
        self._is_xyb = bool(bits.take(1))
        self._refuse_other_than_srgb()
        if has_more and not bits.take(1):
            raise BadImageError("a JPEG XL of high dynamic range; convert it to 8-bit sRGB")
        self._refuse_extensions()

    def _refuse_depth(self) -> None:
        bits = self._bits
        if bits.take(1):
            raise BadImageError("a JPEG XL of floating point; convert it to 8-bit RGB")
        depth = bits.choose(((0, 8), (0, 10), (0, 12), (6, 1)))
        if depth > 8:
            raise BadImageError(f"a JPEG XL of {depth} bits a channel; convert it to 8 bits")

    def _read_extra_channel(self) -> None:
        bits = self._bits
        kind = bits.choose(_ENUM)
        self._refuse_depth()
        shift = bits.choose(((0, 0), (0, 3), (0, 4), (3, 1)))
        for _ in range(bits.choose(_NAME)):
            bits.take(8)
        if kind or shift or bits.take(1):
            raise BadImageError("a JPEG XL with an extra channel that is not plain alpha")

    def _refuse_other_than_srgb(self) -> None:
        """The encoder cannot write another colour space, and would shift all colours."""
        bits = self._bits
        if bits.take(1):
            return
        known = not bits.take(1)  # else an ICC profile
        if known:
            space = bits.choose(_ENUM)
            known = space in (_RGB, _GRAY) and bits.choose(_ENUM) == _D65
            known = known and (space == _GRAY or bits.choose(_ENUM) == _SRGB_PRIMARIES)
            known = known and not bits.take(1) and bits.choose(_ENUM) == _SRGB_TRANSFER
        if not known:
            raise BadImageError("a JPEG XL with a colour profile, which cannot be written back")
        bits.choose(_ENUM)  # rendering intent

    def _read_frames(self) -> None:
        for _ in range(MAX_FRAMES):
            if self._skip_frame():
                return
        raise BadImageError(f"a JPEG XL of over {MAX_FRAMES} frames")

    def _skip_frame(self) -> bool:
        """Move on behind a frame; whether it was the last."""
        bits, (width, height) = self._bits, self.size
        if bits.take(1):  # nothing special
            self._skip_sections(width, height)
            return True
        kind, is_modular, flags = bits.take(2), bool(bits.take(1)), bits.take_long()
        if flags & _UNBOUNDED:
            raise BadImageError(
                "a JPEG XL with patches or splines, whose cost no header tells; write it without "
                "(cjxl --patches=0)"
            )
        has_ycbcr = not self._is_xyb and bits.take(1)
        across = down = 0  # whether chroma has half the samples
        scale = num_passes = group_shift = 1
        if not flags & _HAS_COARSE:
            if has_ycbcr:
                samplings = [bits.take(2) for _ in range(3)]
                across = max(sampling in (1, 2) for sampling in samplings)
                down = max(sampling in (1, 3) for sampling in samplings)
            scale = bits.choose(_SCALE)
            for _ in range(self._num_extra):
                bits.choose(_SCALE)
        if is_modular:
            group_shift = bits.take(2)
        elif self._is_xyb:
            bits.take(6)  # scales of quantization
        if kind != _REFERENCE:
            num_passes = self._read_passes()
        is_partial = is_last = False
        if kind == _COARSE:
            scale *= 8 ** bits.choose(((0, 1), (0, 2), (0, 3), (0, 4)))
        elif bits.take(1):
            width, height, is_partial = self._read_crop(kind)
        mode = _REPLACE
        if kind in (_REGULAR, _SKIPPED):
            mode = self._read_blending(is_partial)
            for _ in range(self._num_extra):
                self._read_blending(is_partial)
            is_last = bool(bits.take(1))
        if kind != _COARSE and not is_last:
            bits.take(2)  # where it is kept
            if kind == _REFERENCE or (mode == _REPLACE and not is_partial):
                bits.take(1)  # whether before its colours are transformed
        for _ in range(bits.choose(_NAME)):
            bits.take(8)
        self._read_filter(is_modular)
        self._refuse_extensions()
        self._skip_sections(
            -(-width // scale),
            -(-height // scale),
            num_passes=num_passes,
            group=128 << group_shift,
            halved=(across, down),
        )
        return is_last

    def _skip_sections(
        self,
        width: int,
        height: int,
        *,
        num_passes: int = 1,
        group: int = 256,
        halved: tuple[int, int] = (0, 0),
    ) -> None:
        """Move on behind the sections of a frame, of which a table has the sizes."""
        if width * height > 2 * self.size[0] * self.size[1]:
            raise BadImageError("a JPEG XL with a frame far larger than the picture")
        bits = self._bits
        num_groups = -(-width // group) * -(-height // group)
        across, down = (
            -(-side // (8 << half)) << half
            for side, half in zip((width, height), halved, strict=True)
        )
        num_sections = 1
        if num_groups * num_passes > 1:
            num_coarse = -(-across // group) * -(-down // group)
            num_sections = 2 + num_coarse + num_groups * num_passes
        if 12 * num_sections > 8 * self._num_bytes:
            raise EOFError("a table of sections")
        if bits.take(1):
            raise BadImageError("a JPEG XL whose sections are out of order")
        bits.to_byte()
        num_bytes = sum(bits.choose(_SECTION) for _ in range(num_sections))
        bits.to_byte()
        bits.position += 8 * num_bytes
        if bits.position > 8 * self._num_bytes:
            raise EOFError("a frame")

    def _refuse_extensions(self) -> None:
        if self._bits.take_long():
            raise BadImageError("a JPEG XL with extensions, which nobody has defined")

    def _read_passes(self) -> int:
        bits = self._bits
        num_passes = bits.choose(((0, 1), (0, 2), (0, 3), (3, 4)))
        if num_passes > 1:
            num_scales = bits.choose(((0, 0), (0, 1), (0, 2), (1, 3)))
            bits.take(2 * (num_passes - 1))
            for _ in range(num_scales):
                bits.choose(_SCALE)
            for _ in range(num_scales):
                bits.choose(((0, 0), (0, 1), (0, 2), (3, 0)))
        return num_passes

    def _read_crop(self, kind: int) -> tuple[int, int, bool]:
        """Width and height of a frame, and whether it covers less than the picture."""
        bits = self._bits
        left = top = 0
        if kind in (_REGULAR, _SKIPPED):
            left, top = (_signed(bits.choose(_CROP)) for _ in range(2))
        width, height = bits.choose(_CROP), bits.choose(_CROP)
        covers = left <= 0 and top <= 0
        covers = covers and left + width >= self.size[0] and top + height >= self.size[1]
        return width, height, not covers

    def _read_blending(self, is_partial: bool) -> int:
        bits = self._bits
        mode = bits.choose(_BLEND)
        with_alpha = self._num_extra > 0 and mode in (_OVER, _WEIGHTED)
        if with_alpha:
            bits.choose(((0, 0), (0, 1), (0, 2), (3, 3)))
        if with_alpha or mode == _MULTIPLY:
            bits.take(1)
        if mode != _REPLACE or is_partial:
            bits.choose(_SMALL)
        return mode

    def _read_filter(self, is_modular: bool) -> None:
        bits = self._bits
        if bits.take(1):
            return
        if bits.take(1) and bits.take(1):  # sharpening, by its own weights
            bits.take(6 * 16)
        if bits.take(2):  # rounds of smoothing
            if not is_modular and bits.take(1):
                bits.take(8 * 16)
            if bits.take(1):
                bits.take(5 * 16)
            if bits.take(1):
                bits.take((3 if is_modular else 4) * 16)
            if is_modular:
                bits.take(16)
        self._refuse_extensions()


def _signed(number: int) -> int:
    return -(number + 1) // 2 if number & 1 else number // 2
