"""Local folders: objects are published by rename (replace) or by hard link (create)."""

from __future__ import annotations

import fcntl
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from one4all.errors import (
    AccessError,
    ConflictError,
    NotFoundError,
    SourceChangedError,
    StorageError,
)
from one4all.storage.base import ObjectInfo, Reader, Storage, Writer

ABANDONED_SECONDS = 24 * 3600  # on another host: of this age, a write has nobody behind it
TEMPORARY_SUFFIX = ".one4all-tmp"


class LocalStorage(Storage):
    """A folder."""

    def __init__(self, root: Path) -> None:
        # Resolved, so that two ways to one folder are seen as one.
        self.root = root.expanduser().resolve()
        self.uri = str(self.root)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        folder = prefix.rpartition("/")[0]
        yield from (
            info for info in _walk(self.root / folder, folder) if info.key.startswith(prefix)
        )

    def head(self, key: str) -> ObjectInfo:
        try:
            return _file_info(self._path(key), key)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(f"no such file: {self._path(key)}") from error

    def open(self, key: str, *, etag: str | None = None) -> Reader:
        info = self.head(key)
        if etag is not None and info.etag != etag:
            raise SourceChangedError(f"{self._path(key)} changed since it was listed")
        return _LocalReader(self._path(key), info)

    def writer(self, key: str, *, guarded: bool = True) -> Writer:
        return _LocalWriter(self._path(key), guarded=guarded)

    def create(self, key: str, data: bytes) -> str:
        path = self._path(key)
        with _local_errors(path), _temporary_file(path) as temporary:
            temporary.write_bytes(data)
            _sync(temporary)
            try:
                os.link(temporary, path)
            except FileExistsError as error:
                raise ConflictError(f"{path} exists already") from error
            _sync(path.parent)
            return _file_info(temporary, key).etag

    def replace(self, key: str, data: bytes, *, etag: str) -> str:
        path = self._path(key)
        with _local_errors(path), _temporary_file(path) as temporary:
            temporary.write_bytes(data)
            _sync(temporary)
            with _lock(path.parent):  # a folder has no compare and swap of its own
                if _current_etag(path) != etag:
                    raise ConflictError(f"{path} is not the version that was expected")
                temporary.replace(path)
                _sync(path.parent)
                return _file_info(path, key).etag

    def age_seconds(self, key: str) -> float:
        path = self._path(key)
        try:
            written = path.stat().st_mtime
        except FileNotFoundError as error:
            raise NotFoundError(f"no such file: {path}") from error
        with _local_errors(path), _temporary_file(path) as probe:
            probe.touch()  # a file server's clock is not ours
            return probe.stat().st_mtime - written

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def check(self, *, writable: bool) -> None:
        if not writable:
            if not self.root.is_dir():
                raise AccessError(f"no such folder: {self.root}")
            if not os.access(self.root, os.R_OK | os.X_OK):
                raise AccessError(f"folder {self.root} cannot be read by this user")
            return
        existing = next(path for path in (self.root, *self.root.parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise AccessError(f"cannot write to {self.root}: {existing} is not a writable folder")

    def sweep(self, *, exclusive: bool) -> int:
        removed = 0
        for path in self.root.rglob(f".*{TEMPORARY_SUFFIX}"):
            with suppress(OSError):  # somebody else may be sweeping
                if _is_abandoned(path):
                    path.unlink()
                    removed += 1
        return removed

    def _path(self, key: str) -> Path:
        path = PurePosixPath(key)
        if not path.parts or ".." in path.parts or key.startswith("/"):
            raise StorageError(f"{key!r} is not a key below {self.root}")
        if str(path) != key:  # a//b would be the file of a/b
            raise StorageError(f"{key!r} cannot be the name of a file; rename it to {str(path)!r}")
        return self.root.joinpath(*path.parts)


class _LocalReader:
    def __init__(self, path: Path, info: ObjectInfo) -> None:
        self._path, self._info = path, info
        self._file = path.open("rb", buffering=0)
        self._left = info.size

    def read(self, size: int, /) -> bytes:
        data = self._file.read(size)
        self._left -= len(data)
        if not data and size and self._left == 0:
            # Renamed over: our handle still shows the old file. Written in place: it does not.
            if _file_info(self._path, self._info.key).etag != self._info.etag:
                raise SourceChangedError(f"{self._path} changed while it was read")
        elif not data and size:
            raise SourceChangedError(f"{self._path} shrank while it was read")
        return data

    def close(self) -> None:
        self._file.close()


class _LocalWriter(Writer):
    def __init__(self, path: Path, *, guarded: bool) -> None:
        super().__init__()
        self._path = path
        with _local_errors(path):
            self._replaces = _current_etag(path) if guarded else None
            self._temporary = _temporary_path(path)
            self._file = self._temporary.open("xb", buffering=1 << 20)

    def _write(self, data: bytes) -> None:
        with _local_errors(self._path):
            self._file.write(data)

    def _commit(self) -> str:
        with _local_errors(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            if self._replaces is None:
                return self._publish()
            with _lock(self._path.parent):
                if _current_etag(self._path) != self._replaces:
                    raise ConflictError(
                        f"{self._path} was written by somebody else meanwhile; theirs is kept"
                    )
                return self._publish()

    def _publish(self) -> str:
        self._temporary.replace(self._path)
        _sync(self._path.parent)
        return _file_info(self._path, "").etag

    def _abort(self) -> None:
        with suppress(OSError):  # a full disk fails again on the flush of close
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def _walk(folder: Path, prefix: str) -> Iterator[ObjectInfo]:
    """Files below ``folder`` in key order, without those that are being written."""
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    entries.sort(key=lambda entry: entry.name + "/" if entry.is_dir() else entry.name)
    for entry in entries:
        key = f"{prefix}/{entry.name}" if prefix else entry.name
        if entry.name.endswith(TEMPORARY_SUFFIX):
            continue
        if entry.is_dir():
            yield from _walk(Path(entry.path), key)
        elif entry.is_file():
            with suppress(FileNotFoundError):  # deleted since the folder was read
                yield _file_info(Path(entry.path), key)


def _file_info(path: Path, key: str) -> ObjectInfo:
    stat = path.stat()
    etag = f"{stat.st_size:x}-{stat.st_mtime_ns:x}"
    return ObjectInfo(key, stat.st_size, etag, modified=stat.st_mtime)


def _current_etag(path: Path) -> str:
    """ETag of what stands at a path; "" if nothing does."""
    try:
        return _file_info(path, "").etag
    except FileNotFoundError:
        return ""


def _temporary_path(path: Path) -> Path:
    """A hidden name beside the target, so that publishing is a rename within one file system."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = f"{socket.gethostname()}+{os.getpid()}"
    return path.parent / f".{writer}+{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"


def _is_abandoned(temporary: Path) -> bool:
    """Whether the process that wrote a temporary file is gone."""
    host, _, process_id = temporary.name[1:].rpartition("+")[0].rpartition("+")
    if host != socket.gethostname() or not process_id.isdigit():
        return time.time() - temporary.stat().st_mtime > ABANDONED_SECONDS
    try:
        os.kill(int(process_id), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it lives, and belongs to another user
        return False
    return False


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes; the kernel lets go if this one dies."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def _temporary_file(path: Path) -> Iterator[Path]:
    temporary = _temporary_path(path)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _local_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
