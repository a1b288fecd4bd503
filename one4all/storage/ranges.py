"""One version of an object as a file in which a reader may jump about, such as that of Parquet."""

from __future__ import annotations

import io
import os
from typing import Any, Protocol

from one4all.storage.base import ObjectInfo


class _Ranges(Protocol):
    def read_range(self, key: str, start: int, size: int, *, etag: str | None = None) -> bytes: ...


class RangeFile(io.RawIOBase):
    """A file of which only what is asked for is read, and always of the same version.

    Args:
        store: Where the object is.
        info: The version; with an empty ETag whatever stands.
    """

    def __init__(self, store: _Ranges, info: ObjectInfo) -> None:
        super().__init__()
        self._store, self._info = store, info
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._info.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def size(self) -> int:
        """Bytes of the object."""
        return self._info.size

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self._info.size - self._position)
        wanted = left if size is None or size < 0 else min(size, left)
        if not wanted:
            return b""
        data = self._store.read_range(
            self._info.key, self._position, wanted, etag=self._info.etag or None
        )
        self._position += len(data)
        return data

    def readinto(self, buffer: Any, /) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
