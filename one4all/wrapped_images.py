"""Images inside of other files: compressed ones, and archives of which a member is an image.

They cannot be protected where they are. So whatever holds one is treated as an image itself, a bad
one, and the policy decides; it must not be copied as a sidecar, unseen.

Nothing is unpacked to disk. Of compressed data the first megabyte is looked at; of a zip archive
the names; of a tar archive names and contents, to a depth of three.
"""

from __future__ import annotations

import bz2
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator

from one4all.image_kinds import has_image_name, image_kind, is_image

_PEEK = 1 << 20  # bytes of compressed data, and of what they become
_MAX_DEPTH = 3
_LZMA_MEMORY = 64 << 20  # bytes; xz -9 takes 65 MB to unpack, -6 takes 9
_COMPRESSED = (
    (b"\x1f\x8b\x08", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x04\x22\x4d\x18", "lz4"),
)
_ZIP = b"PK\x03\x04"
_USTAR = b"ustar"  # at byte 257 of a tar
_ZIP_ENTRY = b"PK\x01\x02"  # of the directory at the end; the name stands 46 bytes behind
_PAX_PATH = re.compile(rb"\d+ path=([^\n]*)\n")


def why_wrapped(data: bytes) -> str:
    """Why the image inside of a file cannot be protected; "" if there is none, as far as we look.

    Args:
        data: A whole file.
    """
    return _reason(data, 1)


def is_archive(data: bytes) -> bool:
    """Whether a file is compressed, or an archive, as far as its beginning tells.

    Args:
        data: 512 bytes of it at least, if it has so many.
    """
    return bool(compression(data)) or data.startswith(_ZIP) or data[257:262] == _USTAR


def compression(data: bytes) -> str:
    """How a file is compressed: "gzip", "bzip2", "xz", "zstd" or "lz4"; "" if it is not."""
    return next((kind for magic, kind in _COMPRESSED if data.startswith(magic)), "")


def _reason(data: bytes, depth: int) -> str:
    if depth > _MAX_DEPTH:
        return ""
    if kind := compression(data):
        head = _decompressed(data, kind)
        holds = bool(image_kind(head)) or _reason(head, depth + 1)
        return f"compressed by {kind}; decompress it first" if holds else ""
    images: Iterator[str]
    if data.startswith(_ZIP):
        kind, images = "zip", (name for name in _names_in_zip(data) if has_image_name(name))
    else:
        kind, images = "tar", _images_in_tar(data, depth)
    found = next(images, None)
    if found is None:
        return ""
    return (
        f"a {kind} archive that holds images, such as {found[:100]!r}; unpack it first, or name it "
        "in sidecar_patterns to copy it"
    )


def _decompressed(data: bytes, kind: str) -> bytes:
    """The beginning of what a compressed file becomes; b"" if it is none, or a kind we cannot."""
    head = data[:_PEEK]
    try:
        if kind == "gzip":
            return zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head, _PEEK)
        if kind == "bzip2":
            return bz2.BZ2Decompressor().decompress(head, _PEEK)
        if kind == "xz":
            return lzma.LZMADecompressor(memlimit=_LZMA_MEMORY).decompress(head, _PEEK)
    except (zlib.error, OSError, ValueError, lzma.LZMAError, EOFError):
        return b""
    return b""


def _names_in_zip(data: bytes) -> Iterator[str]:
    """Names in the directory of a zip archive, and in those of archives that it only stores."""
    at = data.find(_ZIP_ENTRY)
    while at >= 0:
        length = int.from_bytes(data[at + 28 : at + 30], "little")
        yield data[at + 46 : at + 46 + length].decode("utf-8", "replace")
        at = data.find(_ZIP_ENTRY, at + 46)


def _images_in_tar(data: bytes, depth: int) -> Iterator[str]:
    for name, content in _members_of_tar(data):
        if is_image(name, content) or _reason(content, depth + 1):
            yield name


def _members_of_tar(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of the members of a tar archive; none, if it is no such."""
    at = 0
    while at + tarfile.BLOCKSIZE <= len(data) and data[at]:
        try:
            header = data[at : at + tarfile.BLOCKSIZE]
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            return
        start = at + tarfile.BLOCKSIZE
        content = data[start : start + max(info.size, 0)]
        if info.type == tarfile.GNUTYPE_LONGNAME:
            yield content.rstrip(b"\0").decode("utf-8", "replace"), b""
        elif info.type == tarfile.XHDTYPE:
            for name in _PAX_PATH.findall(content):
                yield name.decode("utf-8", "replace"), b""
        elif info.isreg():
            yield info.name, content
        at = start + len(content) + -len(content) % tarfile.BLOCKSIZE
