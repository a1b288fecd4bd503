"""What every storage promises; see `one4all.storage`."""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Protocol, Self

from one4all.errors import NotFoundError, One4AllError

_log = logging.getLogger(__name__)

INTERNAL = "_one4all/"  # our own records below a destination; never listed as data


@dataclass(frozen=True)
class ObjectInfo:
    """One version of one object.

    Attributes:
        key: Path below the storage root, ``/``-separated.
        size: Bytes.
        etag: Identifies the version: the S3 ETag, or size and modification time of a file.
        modified: When it was written, in POSIX seconds, as the store says; None if it does not. S3
            knows whole seconds, and for a multipart upload says when it was begun.
    """

    key: str
    size: int
    etag: str
    modified: float | None = None


@dataclass(frozen=True)
class Attributes:
    """What a store keeps beside the bytes of an object. A folder keeps other things than S3 does.

    Attributes:
        headers: Of S3, by the names of its API, such as ``{"ContentType": "image/jpeg"}``.
        metadata: User metadata of S3.
        tags: Tags of S3.
        mode: Permissions of a file; None on S3.
        modified_ns: When a file was modified, in nanoseconds since 1970; None on S3.
    """

    headers: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    mode: int | None = None
    modified_ns: int | None = None

    @property
    def is_of_file(self) -> bool:
        """Whether they come from a folder."""
        return self.mode is not None

    def to_bytes(self) -> bytes:
        """Text that is equal for equal attributes."""
        return json.dumps(asdict(self), sort_keys=True).encode()


class Reader(Protocol):
    """A byte stream; `read` may return fewer bytes than asked for, and ``b""`` at the end.

    Attributes:
        attributes: What the store keeps beside the bytes.
    """

    @property
    def attributes(self) -> Attributes: ...
    def read(self, size: int, /) -> bytes: ...
    def close(self) -> None: ...


class Writer(ABC):
    """An object being written. Leave the ``with`` block without `commit` and it never existed."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0
        self._committed = False

    def write(self, data: bytes, /) -> None:
        self.sha256.update(data)
        self.num_bytes += len(data)
        self._write(data)

    def commit(self) -> str:
        """Publish, replacing what stood there when the writer was opened; returns the ETag.

        Raises:
            ConflictError: Something else stands there by now, which is left alone.
        """
        etag = self._commit()
        self._committed = True
        return etag

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._committed:
            return
        try:
            self._abort()
        except One4AllError as problem:  # must not hide the error that brought us here
            _log.warning("cleaning up an unfinished object failed: %s", problem)

    @abstractmethod
    def _write(self, data: bytes) -> None: ...
    @abstractmethod
    def _commit(self) -> str: ...
    @abstractmethod
    def _abort(self) -> None: ...


class Storage(ABC):
    """Objects below one URI."""

    uri: str

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key starts with ``prefix``, in key order."""

    def list_data(self) -> Iterator[ObjectInfo]:
        """Objects that are no records of ours, in key order."""
        return (info for info in self.list() if not info.key.startswith(INTERNAL))

    @abstractmethod
    def head(self, key: str) -> ObjectInfo:
        """Raises: NotFoundError."""

    @abstractmethod
    def open(self, key: str, *, etag: str | None = None) -> Reader:
        """Stream one version of an object.

        Raises:
            NotFoundError: No such object.
            SourceChangedError: ``etag`` is given and is not the current version; also from `read`.
        """

    def read_range(self, key: str, start: int, size: int, *, etag: str | None = None) -> bytes:
        """A part of one version of an object; shorter only where the object ends.

        Args:
            key: The object.
            start: Place of the first byte.
            size: Number of bytes.
            etag: The version.

        Raises:
            NotFoundError, SourceChangedError: As `open`.
        """
        reader = self.open(key, etag=etag)
        try:
            while start and (skipped := len(reader.read(min(start, 1 << 20)))):
                start -= skipped
            parts: list[bytes] = []
            while size and (part := reader.read(size)):
                parts.append(part)
                size -= len(part)
            return b"".join(parts)
        finally:
            reader.close()

    def standing(self, key: str) -> str:
        """ETag of what stands under a key; "" if nothing does."""
        try:
            return self.head(key).etag
        except NotFoundError:
            return ""

    @abstractmethod
    def writer(
        self,
        key: str,
        *,
        guarded: bool = True,
        replaces: str | None = None,
        attributes: Attributes | None = None,
    ) -> Writer:
        """Write an object that becomes visible at `Writer.commit`, whole.

        A guarded writer replaces only what stood there when it was opened: one that was paused for
        an hour must not write over what others have done since. A store may ignore that condition
        where an upload of many parts is completed (Ceph 16 does), so nothing may rest on it alone.

        Args:
            key: The object.
            guarded: See above.
            replaces: What a guarded writer replaces, if that is known: see `standing`.
            attributes: What to keep beside the bytes, of what this store can; on S3 the type of
                content is told from the key, if they do not say it.
        """

    @abstractmethod
    def create(self, key: str, data: bytes) -> str:
        """Create a small object and return its ETag; raises `ConflictError` if it exists.

        After a reset connection the SDK tries again by itself, and may then lose against its own
        first try: a conflict means "somebody, maybe me". Read back and compare.
        """

    @abstractmethod
    def replace(self, key: str, data: bytes, *, etag: str) -> str:
        """Replace one version of a small object by another (compare and swap); returns its ETag.

        Raises:
            ConflictError: ``etag`` is not the current version; see `create` for lost answers.
        """

    @abstractmethod
    def age_seconds(self, key: str) -> float:
        """Time since an object was written, by the store's own clock. Raises: NotFoundError."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete an object; no error if there is none."""

    @abstractmethod
    def check(self, *, writable: bool) -> None:
        """Raise `AccessError` unless the root can be used; writes nothing."""

    @abstractmethod
    def sweep(self, *, exclusive: bool) -> int:
        """Remove what killed writers left below the root; returns how many.

        Never visible, but it takes space. A folder knows which process was writing. S3 does not, so
        unfinished uploads are removed only under ``exclusive``: the caller vouches that nobody else
        is writing here, by holding the lease; what lies below another destination, which has
        records of its own, is left alone. A writer that is swept by mistake fails, and its shard
        is written again.
        """

    def read_bytes(self, key: str) -> bytes:
        """A whole small object."""
        reader = self.open(key)
        try:
            return b"".join(iter(lambda: reader.read(1 << 20), b""))
        finally:
            reader.close()

    def write_bytes(self, key: str, data: bytes) -> None:
        """Write a whole small object, replacing whatever stands there."""
        with self.writer(key, guarded=False) as writer:
            writer.write(data)
            writer.commit()
