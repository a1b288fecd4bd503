"""What a corpus may be given as: a folder or prefix, one shard, or a pattern of shards.

WebDataset names shards by patterns such as ``train-{0000..0099}.tar``, in its own notation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import product
from typing import NoReturn
from urllib.parse import unquote

from one4all.corpus.tar import SUFFIX
from one4all.errors import UsageError
from one4all.storage import LocalStorage, ObjectInfo, Reader, Storage, Writer, open_storage

_MAX_SHARDS = 1_000_000
_BRACES = re.compile(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{},]*(?:,[^{},]*)+))\}")


def open_source(uri: str) -> Storage:
    """The storage of a corpus, which may be one shard or some of the shards of a folder.

    Args:
        uri: As `open_storage` takes it; or one that ends in ``.tar``, or in a pattern with braces:
            ``{0000..0099}``, ``{train,test}``. What is a folder counts as one, whatever its name.

    Raises:
        UsageError: As `open_storage`; or the pattern cannot be read.
    """
    storage = open_storage(uri)
    braces = _BRACES.search(uri)
    if not braces and not uri.endswith(SUFFIX):
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
    return Selection(root, pattern)


class Selection(Storage):
    """Some objects of another storage, under the same keys; read only.

    Args:
        root: Where they are.
        pattern: Key, or a pattern of keys with braces.
    """

    def __init__(self, root: Storage, pattern: str) -> None:
        self.root = root
        self.uri = f"{root.uri.rstrip('/')}/{pattern}"
        self._keys = frozenset(_expand(pattern))
        self._prefix = pattern.partition("{")[0]  # what all keys begin with

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

    def writer(self, key: str, *, guarded: bool = True) -> Writer:
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
