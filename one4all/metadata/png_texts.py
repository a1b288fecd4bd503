"""Metadata blocks in the texts of a PNG.

XMP has a text of its own (ISO 16684-1). What ImageMagick has written since before PNG had EXIF is
called ``Raw profile type NAME``: the name, the number of bytes, and the bytes in hexadecimal;
exiftool and Pillow read it.
"""

from __future__ import annotations

import re
import zlib

XMP = b"XML:com.adobe.xmp"
RAW_PROFILE = b"Raw profile type "
BLOCKS = {XMP, *(RAW_PROFILE + name for name in (b"exif", b"APP1", b"xmp", b"iptc", b"8bim"))}
_LONGEST_TEXT = 1 << 20  # bytes, once inflated
_PROFILE = re.compile(rb"\s*\S*\s+(\d{1,9})\s+([0-9A-Fa-f\s]*)", re.ASCII)


def read_text(kind: bytes, payload: bytes) -> tuple[bytes, bytes]:
    """Keyword and text of a chunk, inflated up to 1 MB; the text is b"" if it is damaged.

    Args:
        kind: Type of the chunk: tEXt, zTXt or iTXt.
        payload: Its content.
    """
    keyword, _, text = payload.partition(b"\0")
    compressed = kind == b"zTXt"
    if kind == b"iTXt":  # flag and method, then language and translated keyword
        compressed, text = text[:1] == b"\1", text[2:].partition(b"\0")[2].partition(b"\0")[2]
    elif compressed:
        text = text[1:]
    if compressed:
        try:
            text = zlib.decompressobj().decompress(text, _LONGEST_TEXT)
        except zlib.error:
            text = b""
    return keyword, text


def read_raw_profile(text: bytes) -> bytes:
    """The block in a raw profile; b"" if it is none."""
    found = _PROFILE.match(text)
    if found is None:
        return b""
    digits = b"".join(found[2].split())
    return bytes.fromhex(digits[: len(digits) // 2 * 2].decode())[: int(found[1])]


def write_raw_profile(name: str, block: bytes) -> bytes:
    """The content of a zTXt chunk that holds a block."""
    digits = block.hex()
    lines = "\n".join(digits[start : start + 72] for start in range(0, len(digits), 72))
    text = f"\n{name}\n{len(block):8d}\n{lines}\n".encode()
    return RAW_PROFILE + name.encode() + b"\0\0" + zlib.compress(text)


def write_xmp(packet: bytes) -> bytes:
    """The content of an iTXt chunk that holds an XMP packet."""
    return XMP + bytes(5) + packet
