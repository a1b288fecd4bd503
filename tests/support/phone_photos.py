"""AVIF, HEIC and JPEG XL files as phones and sites write them, and some that none of them does."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pillow_heif
from PIL import Image
from support.builders import make_pixels

from one4all.images import DecodedImage, Pixels, encode
from one4all.jxl import _Codestream

KINDS = ("AVIF", "HEIC", "JPEG XL")


def make_photo(kind: str, pixels: Pixels | None = None, **options: Any) -> bytes:
    """A file of our own encoder, of 56x40 pixels.

    Args:
        kind: One of ``KINDS``.
        pixels: Others.
        options: Fields of `DecodedImage`.
    """
    pixels = make_pixels() if pixels is None else pixels
    return encode(DecodedImage(pixels, kind, **options), "match")


def make_turned(kind: str, orientation: int) -> bytes:
    """An AVIF or a HEIC that says how to turn it: in its boxes, and in EXIF, as phones do."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "Maker"
    image, buffer = Image.fromarray(make_pixels()), io.BytesIO()
    if kind == "AVIF":
        image.save(buffer, "AVIF", quality=95, subsampling="4:4:4", exif=exif)
    else:
        options = {"quality": 90, "chroma": 444, "exif": exif.tobytes()}
        pillow_heif.encode("RGB", image.size, image.tobytes(), buffer, **options)
    return buffer.getvalue()


def make_heic(*, mode: str = "RGB", **options: Any) -> bytes:
    """A HEIC with options of pillow-heif: a grid of tiles, thumbnails, more bits."""
    channels, buffer = len(mode.partition(";")[0]), io.BytesIO()
    pixels = make_pixels(160, 200, channels)
    data = (pixels.astype("<u2") * 257).tobytes() if ";16" in mode else pixels.tobytes()
    pillow_heif.encode(mode, (200, 160), data, buffer, quality=60, **options)
    return buffer.getvalue()


def make_heic_of_two() -> bytes:
    """A HEIC with a second picture behind the primary one."""
    first, second = (
        Image.fromarray(np.ascontiguousarray(make_pixels(seed=seed))) for seed in (0, 9)
    )
    opened, buffer = pillow_heif.from_pillow(first), io.BytesIO()
    opened.add_from_pillow(second)
    opened.save(buffer, quality=60)
    return buffer.getvalue()


def replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    """The file with other bytes in one place, which has to be there, and the only one."""
    assert data.count(old) == 1
    assert len(old) == len(new)
    return data.replace(old, new)


def with_size(data: bytes, width: int, height: int) -> bytes:
    """An AVIF or a HEIC that states another size."""
    at = data.index(b"ispe") + 8
    return data[:at] + struct.pack(">II", width, height) + data[at + 8 :]


def with_frames(avif: bytes, num_frames: int) -> bytes:
    """An AVIF of one item, to the data of which frames are added that nobody sees."""
    # The item comes last in the file; its place is told by offset and length.
    at = avif.index(b"mdat") + 4
    frames = (b"\x32\x00") * num_frames  # empty data units of the type "frame"
    length = struct.pack(">I", len(avif) - at)
    assert avif.count(length) == 1
    data = avif.replace(length, struct.pack(">I", len(avif) - at + len(frames)))
    size = struct.pack(">I", len(avif) - at + 8 + len(frames))
    return data[: at - 8] + size + data[at - 4 :] + frames


def jxl_of_frames(num_frames: int) -> bytes:
    """A JPEG XL of which the frame is repeated, each time but the last as a layer below."""
    data = make_photo("JPEG XL")
    places = _Places(data)
    bits = "".join(f"{byte:08b}"[::-1] for byte in data[: places.sections // 8 + 1])
    # 16 bits behind the start stands that it is the last; else two fields follow, all zero.
    last = places.frame + 16
    assert bits[last] == "1"
    header = bits[places.frame : last] + "0000" + bits[last + 1 : places.sections] + "0"
    header = header.ljust(-(-len(header) // 8) * 8, "0")
    layer = bytes(int(header[at : at + 8][::-1], 2) for at in range(0, len(header), 8))
    layer += data[places.sections // 8 + 1 :]
    start = places.frame // 8
    return data[:start] + layer * (num_frames - 1) + data[start:]


class _Places(_Codestream):
    """Where the frame and its table of sections begin, in bits."""

    def _skip_frame(self) -> bool:
        self.frame = self._bits.position
        return super()._skip_frame()

    def _skip_sections(self, *args: Any, **options: Any) -> None:
        self.sections = self._bits.position
        super()._skip_sections(*args, **options)
