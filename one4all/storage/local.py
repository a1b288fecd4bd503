"""Local folders: objects are published by rename (replace) or by hard link (create).

A hard link fails if its name is taken, on every machine that shares the folder. Where there are
none (exFAT, some FUSE file systems such as gcsfuse), `LocalStorage.create` renames under the lock
of the folder, which only processes of one machine see. The object is whole or absent all the same.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import threading
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
    UsageError,
)
from one4all.storage.base import Attributes, ObjectInfo, Reader, Storage, Writer

ABANDONED_SECONDS = 24 * 3600  # on another host: of this age, a write has nobody behind it
TEMPORARY_SUFFIX = ".one4all-tmp"
_PERMISSIONS = 0o777
_LOST_AND_FOUND = "lost+found"  # what fsck found; root's alone, at the root of a file system
_NO_HARD_LINKS = frozenset((errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS))
_NO_SYNC_OF_FOLDERS = frozenset((errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS))
_log = logging.getLogger(__name__)
_warned: set[Path] = set()  # folders without hard links
_warning = threading.Lock()


class LocalStorage(Storage):
    """A folder."""

    def __init__(self, root: Path) -> None:
        # Resolved, so that two ways to one folder are seen as one.
        try:
            self.root = root.expanduser().resolve()
        except (RuntimeError, OSError, ValueError) as error:  # a link to itself, ~nobody, a NUL
            raise UsageError(f"{str(root)!r} is no path of a folder: {error}") from error
        self.uri = str(self.root)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        folder, _, stem = prefix.rpartition("/")
        return _walk(self.root / folder, folder, stem)

    def head(self, key: str) -> ObjectInfo:
        try:
            return _file_info(self._path(key), key)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(f"no such file: {self._path(key)}") from error
        except OSError as error:
            raise _unreadable(self._path(key), error) from error

    def open(self, key: str, *, etag: str | None = None) -> Reader:
        info = self.head(key)
        if etag is not None and info.etag != etag:
            raise SourceChangedError(f"{self._path(key)} changed since it was listed")
        return _LocalReader(self._path(key), info)

    def read_range(self, key: str, start: int, size: int, *, etag: str | None = None) -> bytes:
        path = self._path(key)
        try:
            with path.open("rb", buffering=0) as file:
                parts: list[bytes] = []
                while size and (part := os.pread(file.fileno(), size, start)):
                    parts.append(part)
                    start, size = start + len(part), size - len(part)
                changed = etag is not None and _file_info(path, key).etag != etag
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(f"no such file: {path}") from error
        except OSError as error:
            raise _unreadable(path, error) from error
        if changed:
            raise SourceChangedError(f"{path} changed since it was listed")
        return b"".join(parts)

    def writer(
        self,
        key: str,
        *,
        guarded: bool = True,
        replaces: str | None = None,
        attributes: Attributes | None = None,
    ) -> Writer:
        return _LocalWriter(self._path(key), guarded, replaces, attributes or Attributes())

    def create(self, key: str, data: bytes) -> str:
        path = self._path(key)
        with _local_errors(path), _temporary_file(path) as temporary:
            temporary.write_bytes(data)
            _sync(temporary)
            try:
                os.link(temporary, path)
            except FileExistsError as error:
                raise ConflictError(f"{path} exists already") from error
            except OSError as error:
                if error.errno not in _NO_HARD_LINKS:
                    raise
                _warn_of_no_hard_links(self.root)
                return _rename_if_absent(temporary, path)
            _sync_folder(path.parent)
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
                _sync_folder(path.parent)
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
        try:
            self._file = path.open("rb", buffering=0)
        except FileNotFoundError as error:
            raise NotFoundError(f"no such file: {path}") from error
        except OSError as error:
            raise _unreadable(path, error) from error
        self._left = info.size

    @property
    def attributes(self) -> Attributes:
        status = os.fstat(self._file.fileno())
        return Attributes(mode=status.st_mode & _PERMISSIONS, modified_ns=status.st_mtime_ns)

    def read(self, size: int, /) -> bytes:
        try:
            data = self._file.read(size)
        except OSError as error:
            raise _unreadable(self._path, error) from error
        self._left -= len(data)
        if not data and size and self._left == 0:
            # Renamed over: our handle still shows the old file. Written in place: it does not.
            try:
                etag = _file_info(self._path, self._info.key).etag
            except FileNotFoundError as error:
                raise SourceChangedError(f"{self._path} went away while it was read") from error
            if etag != self._info.etag:
                raise SourceChangedError(f"{self._path} changed while it was read")
        elif not data and size:
            raise SourceChangedError(f"{self._path} shrank while it was read")
        return data

    def close(self) -> None:
        self._file.close()


class _LocalWriter(Writer):
    def __init__(
        self, path: Path, guarded: bool, replaces: str | None, attributes: Attributes
    ) -> None:
        super().__init__()
        self._path, self._attributes = path, attributes
        with _local_errors(path):
            if guarded and replaces is None:
                replaces = _current_etag(path)
            self._replaces = replaces if guarded else None
            self._temporary = _temporary_path(path)
            self._file = self._temporary.open("xb", buffering=1 << 20)

    def _write(self, data: bytes) -> None:
        with _local_errors(self._path):
            self._file.write(data)

    def _commit(self) -> str:
        with _local_errors(self._path):
            self._file.flush()
            self._set_attributes(self._file.fileno())
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

    def _set_attributes(self, file: int) -> None:
        wanted = self._attributes
        if wanted.mode is not None:
            os.fchmod(file, wanted.mode)
        if wanted.modified_ns is not None:
            os.utime(file, ns=(wanted.modified_ns, wanted.modified_ns))

    def _publish(self) -> str:
        self._temporary.replace(self._path)
        _sync_folder(self._path.parent)
        return _file_info(self._path, "").etag

    def _abort(self) -> None:
        with suppress(OSError):  # a full disk fails again on the flush of close
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def _unreadable(path: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot read {path}: {error.strerror or error}")


def _walk(
    folder: Path, prefix: str, stem: str = "", above: tuple[tuple[int, int], ...] = ()
) -> Iterator[ObjectInfo]:
    """Files below ``folder`` in key order, without those that are being written.

    A folder ``lost+found`` that cannot be read is left out: no corpus is in it.

    Args:
        folder: Folder to list.
        prefix: Its key; "" for the root.
        stem: Only entries of the folder itself whose name starts so are looked at.
        above: Device and inode of the folders that led here.

    Raises:
        AccessError: A folder cannot be read, or leads back to one above it.
        StorageError: The disk fails.
    """
    entries = []
    try:
        status = folder.stat()
        identity = (status.st_dev, status.st_ino)
        with os.scandir(folder) as found:
            for entry in found:
                if entry.name.startswith(stem) and not entry.name.endswith(TEMPORARY_SUFFIX):
                    is_folder = not _leads_nowhere(entry) and entry.is_dir()
                    entries.append((entry.name + "/" * is_folder, is_folder, entry))
    except (FileNotFoundError, NotADirectoryError):
        return
    except PermissionError as error:
        if folder.name == _LOST_AND_FOUND:
            return
        raise AccessError(
            f"{error.filename or folder} cannot be read by this user, so what is there would be "
            "missed; change that, or move it elsewhere"
        ) from error
    except OSError as error:
        raise StorageError(f"cannot list {folder}: {error.strerror or error}") from error
    if identity in above:
        raise AccessError(
            f"folder {folder} leads back to one above it, so there is no end to what is below it; "
            "remove the link"
        )
    for _, is_folder, entry in sorted(entries, key=lambda item: item[0]):
        key = f"{prefix}/{entry.name}" if prefix else entry.name
        if is_folder:
            yield from _walk(Path(entry.path), key, above=(*above, identity))
        elif (info := _entry_info(entry, key)) is not None:
            yield info


def _leads_nowhere(entry: os.DirEntry[str]) -> bool:
    """Whether it is a symbolic link to what is not there, or to itself."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def _entry_info(entry: os.DirEntry[str], key: str) -> ObjectInfo | None:
    """What an entry that is no folder holds; None for one that is no file, or is gone."""
    try:
        if _leads_nowhere(entry):  # listed, so that the absence is noticed: reading it says so
            return _info(entry.stat(follow_symlinks=False), key)
        return _info(entry.stat(), key) if entry.is_file() else None
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise AccessError(f"{entry.path} cannot be looked at by this user") from error
    except OSError as error:
        raise StorageError(f"cannot list {entry.path}: {error.strerror or error}") from error


def _file_info(path: Path, key: str) -> ObjectInfo:
    return _info(path.stat(), key)


def _info(stat: os.stat_result, key: str) -> ObjectInfo:
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


def _rename_if_absent(temporary: Path, path: Path) -> str:
    """Publish a file under a name that is free, and return its ETag."""
    with _lock(path.parent):
        if os.path.lexists(path):
            raise ConflictError(f"{path} exists already")
        temporary.rename(path)
        _sync_folder(path.parent)
        return _file_info(path, "").etag


def _warn_of_no_hard_links(root: Path) -> None:
    """Say what is weaker, once for each folder."""
    with _warning:
        if root in _warned:
            return
        _warned.add(root)
    _log.warning(
        "%s is on a file system without hard links, so that records are created under a lock, "
        "which other machines do not see: do not protect into it from two machines at once",
        root,
    )


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


def _sync_folder(folder: Path) -> None:
    """Make a rename or link durable, where a file system knows how to."""
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in _NO_SYNC_OF_FOLDERS:
            raise


@contextmanager
def _local_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
