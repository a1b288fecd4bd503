"""What a corpus may be given as: a folder or prefix, one file, a pattern or a list of files.

WebDataset names shards by patterns such as ``train-{0000..0099}.tar``, in its own notation. A list
is a text file among the shards, or above them.
"""

from __future__ import annotations

import math
import os.path
import re
from collections.abc import Iterator
from itertools import product
from typing import NoReturn
from urllib.parse import unquote

from one4all.errors import NotFoundError, UsageError
from one4all.storage import (
    Attributes,
    LocalStorage,
    ObjectInfo,
    Reader,
    Storage,
    Writer,
    open_storage,
)
from one4all.text import shown

SUFFIXES = (".tar", ".parquet")  # of files that are a corpus by themselves
LIST_SUFFIX = ".txt"
_MAX_SHARDS = 1_000_000
_MAX_LIST_BYTES = 1 << 28
_BRACES = re.compile(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{},]*(?:,[^{},]*)+))\}")


def open_source(uri: str) -> Storage:
    """The storage of a corpus, which may be one shard or some of the shards of a folder.

    Args:
        uri: As `open_storage` takes it; or one that ends in ``.tar`` or ``.parquet``, or in a
            pattern with braces: ``{0000..0099}``, ``{train,test}``; or in ``.txt``, a list with one
            of them in each line, as a path below the folder of the list or a whole URI there; ``#``
            begins a comment. What is a folder counts as one, whatever its name.

    Raises:
        UsageError: As `open_storage`; or the pattern or the list cannot be read.
    """
    storage = open_storage(uri)
    braces = _BRACES.search(uri)
    if not braces and not uri.endswith((*SUFFIXES, LIST_SUFFIX)):
        return storage
    if isinstance(storage, LocalStorage) and storage.root.is_dir():
        return storage
    folder, slash, _ = uri[: braces.start() if braces else None].rpartition("/")
    if folder.endswith(":/"):  # the name of a bucket ends in .tar
        return storage
    pattern = uri[len(folder) + len(slash) :]
    if uri.startswith("file:"):
        pattern = unquote(pattern)
    root = open_storage(folder or slash or ".")
    while isinstance(root, LocalStorage) and "/" in pattern:
        below = root.root / pattern.partition("/")[0]
        if not below.is_dir():
            break
        root, pattern = LocalStorage(below), pattern.partition("/")[2]  # braces of its own
    keys = _listed(root, pattern) if pattern.endswith(LIST_SUFFIX) else _expand(pattern)
    return Selection(root, pattern, frozenset(keys))


class Selection(Storage):
    """Some objects of another storage, under the same keys; read only.

    Args:
        root: Where they are.
        name: What they are called together: the pattern, or the key of the list.
        keys: Their keys, at least one.
    """

    def __init__(self, root: Storage, name: str, keys: frozenset[str]) -> None:
        self.root = root
        self.uri = f"{root.uri.rstrip('/')}/{name}"
        self._keys = keys
        self._prefix = os.path.commonprefix([min(keys), max(keys)])  # noqa: RUF071 - keys

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See the base class."""
        found = self.root.list(self._prefix)
        return (info for info in found if info.key in self._keys and info.key.startswith(prefix))

    def head(self, key: str) -> ObjectInfo:
        """See the base class."""
        return self.root.head(key)

    def open(self, key: str, *, etag: str | None = None) -> Reader:
        """See the base class."""
        return self.root.open(key, etag=etag)

    def check(self, *, writable: bool) -> None:
        """See the base class; every object has to be there."""
        if writable:
            self._refuse()
        self.root.check(writable=False)
        missing = sorted(self._keys - {info.key for info in self.list()})
        if missing:
            raise UsageError(
                f"{len(missing)} of the {len(self._keys)} shards of {self.uri} are not there, such "
                f"as {missing[0]}"
            )

    def age_seconds(self, key: str) -> float:
        """See the base class."""
        return self.root.age_seconds(key)

    def read_range(self, key: str, start: int, size: int, *, etag: str | None = None) -> bytes:
        """See the base class."""
        return self.root.read_range(key, start, size, etag=etag)

    def writer(
        self,
        key: str,
        *,
        guarded: bool = True,
        replaces: str | None = None,
        attributes: Attributes | None = None,
    ) -> Writer:
        """Refused."""
        self._refuse()

    def create(self, key: str, data: bytes) -> str:
        """Refused."""
        self._refuse()

    def replace(self, key: str, data: bytes, *, etag: str) -> str:
        """Refused."""
        self._refuse()

    def delete(self, key: str) -> None:
        """Refused."""
        self._refuse()

    def sweep(self, *, exclusive: bool) -> int:
        """Nothing is ever written here."""
        return 0

    def _refuse(self) -> NoReturn:
        raise UsageError(f"{self.uri} are shards: nothing can be written there; give a folder")


def read_list(uri: str, source: Storage) -> Iterator[str]:
    """Keys below a source that a list names.

    Args:
        uri: A file, local or on S3; a key or the whole URI of an object in each line, ``#`` begins
            a comment.
        source: Where they are.

    Raises:
        UsageError: It is not there, cannot be read, or names something else.
    """
    folder, slash, name = uri.rpartition("/")
    root = open_storage(folder or slash or ".")
    place = source.root if isinstance(source, Selection) else source
    for number, line in _lines(root, name):
        if (key := _key_below(place, line)) is None:
            raise UsageError(
                f"line {number} of {uri} is {shown(line)!r}; a line is the path of a file below "
                f"{place.uri}, or its whole URI there"
            )
        yield key


def _listed(root: Storage, name: str) -> Iterator[str]:
    """Keys in a list, which is itself an object of their storage."""
    for number, line in _lines(root, name):
        key = _key_below(root, line)
        if key is None or not key.endswith(SUFFIXES):
            raise UsageError(
                f"line {number} of {root.uri.rstrip('/')}/{name} is {shown(line)!r}; a line is the "
                f"path of a {' or '.join(SUFFIXES)} file below the folder of the list"
            )
        yield key


def _lines(root: Storage, name: str) -> Iterator[tuple[int, str]]:
    """Lines of a list that say something, with their numbers."""
    place = f"{root.uri.rstrip('/')}/{name}"
    try:
        size = root.head(name).size
        if size > _MAX_LIST_BYTES:
            raise UsageError(f"{place} has {size:,} bytes, too many for a list of files")
        lines = root.read_bytes(name).decode("utf-8").splitlines()
    except NotFoundError as error:
        raise UsageError(f"{place} is not there; it would be a list of files") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{place} is no list of files: it is not UTF-8") from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    found = [(number, line) for number, line in numbered if line and not line.startswith("#")]
    if not found:
        raise UsageError(f"{place} names nothing; write the path of a file in each line")
    yield from found


def _key_below(root: Storage, line: str) -> str | None:
    """The key that a line of a list names; None if it names nothing below this place."""
    folders = [f"{root.uri.rstrip('/')}/"]
    if isinstance(root, LocalStorage):
        folders.append(f"{root.root}/")
    key = next((line.removeprefix(f) for f in folders if line.startswith(f)), line)
    inside = not key.startswith("/") and "://" not in key and ".." not in key.split("/")
    return key if inside else None


def _expand(pattern: str) -> Iterator[str]:
    """Keys that a pattern stands for."""
    parts: list[list[str]] = []
    end = 0
    for found in _BRACES.finditer(pattern):
        parts.append([pattern[end : found.start()]])
        first, last, names = found.groups()
        parts.append(names.split(",") if names is not None else list(_numbers(first, last)))
        end = found.end()
    parts.append([pattern[end:]])
    if any("{" in text or "}" in text for part in parts for text in part):
        raise UsageError(
            f"the pattern {pattern!r} cannot be read; braces hold a range such as {{0000..0099}}, "
            "or names such as {train,test}"
        )
    if math.prod(len(part) for part in parts) > _MAX_SHARDS:
        raise UsageError(f"the pattern {pattern!r} names over {_MAX_SHARDS:,} shards")
    return ("".join(texts) for texts in product(*parts))


def _numbers(first: str, last: str) -> Iterator[str]:
    """Both ends and what is between them; with zeros in front, if one of them has some."""
    if not 0 <= int(last) - int(first) < _MAX_SHARDS:
        raise UsageError(
            f"the range {{{first}..{last}}} is empty, or names over {_MAX_SHARDS:,} shards"
        )
    padded = any(end[0] == "0" and len(end) > 1 for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    return (f"{number:0{width}}" for number in range(int(first), int(last) + 1))
