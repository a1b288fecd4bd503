"""The unit of work: objects of a corpus that are read, rewritten and accounted for together."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import overload

from one4all.storage import ObjectInfo

_IN_MEMORY = 8 << 20  # bytes of a list of units
_MAX_FILED_BYTES = 180  # of the last part of a name; the longest record adds 55 to it


@dataclass(frozen=True, slots=True)
class ObjectVersion:
    """One version of one object.

    Attributes:
        key: Path below the root of the corpus.
        size: Bytes.
        etag: ETag by which its store tells versions apart; "" for whatever stands there.
    """

    key: str
    size: int
    etag: str


@dataclass(frozen=True, slots=True)
class Unit:
    """One version of one unit of work. A plan may hold a million of them.

    Attributes:
        name: Name in the ledger, unique within the corpus; the key, if it is one object.
        objects: Objects it is made of, in their order; a tar shard is one.
        container: Name of the container that reads and writes it; see `containers`.
        modified: When the last of its objects was written, in POSIX seconds; None if the store
            does not say. No part of its identity.
    """

    name: str
    objects: tuple[ObjectVersion, ...]
    container: str = "tar"
    modified: float | None = field(default=None, compare=False)

    @classmethod
    def of_object(cls, info: ObjectInfo, container: str = "tar") -> Unit:
        """A unit that is one object."""
        version = ObjectVersion(info.key, info.size, info.etag)
        return cls(info.key, (version,), container, info.modified)

    @property
    def size(self) -> int:
        """Bytes of all objects."""
        return sum(part.size for part in self.objects)

    @property
    def label(self) -> str:
        """Name for people, which says how many objects there are."""
        others = len(self.objects) - 1
        return f"{self.name} and {others} more" if others else self.name

    @property
    def version(self) -> str:
        """Digest of sizes and ETags, and of keys if there are several: another source, another."""
        lines = [f"{part.size} {part.etag}" for part in self.objects]
        if len(self.objects) != 1 or self.objects[0].key != self.name:
            lines = [f"{line} {part.key}" for line, part in zip(lines, self.objects, strict=True)]
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]

    @property
    def latest(self) -> Unit:
        """The same objects in whatever version stands when they are read."""
        parts = (replace(part, etag="") for part in self.objects)
        return replace(self, objects=tuple(parts))

    @property
    def filed_name(self) -> str:
        """The name that records are filed under; see `filed_name`."""
        return filed_name(self.name)

    @property
    def id(self) -> str:
        """Filed name and version: what attempts are filed under."""
        return f"{self.filed_name}@{self.version}"

    def is_older(self, since: float | None) -> bool:
        """Whether it was written before ``since``; never, where the store does not say when."""
        # S3 gives whole seconds, rounded down: a unit must not be missed for that.
        return since is not None and self.modified is not None and self.modified < math.floor(since)

    def to_json(self) -> str:
        """Text that carries it to a worker."""
        parts = [[part.key, part.size, part.etag] for part in self.objects]
        return json.dumps([self.name, parts, self.container])

    @classmethod
    def from_json(cls, text: str | bytes) -> Unit:
        """The inverse of `to_json`."""
        name, parts, container = json.loads(text)
        return cls(name, tuple(ObjectVersion(*part) for part in parts), container)


class UnitList(Sequence[Unit]):
    """Units in a temporary file, where there are more than fit into a little memory.

    Attributes:
        num_objects: Objects of all of them.
        num_bytes: Bytes of all of them.
        largest: Bytes of the largest.
    """

    def __init__(self, units: Iterable[Unit] = ()) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 - kept open
        weakref.finalize(self, self._file.close)
        self._ends = array("Q", [0])
        self.num_objects = self.num_bytes = self.largest = 0
        for unit in units:
            self.append(unit)

    def append(self, unit: Unit) -> None:
        """Add a unit."""
        text = unit.to_json().encode()
        self._file.seek(self._ends[-1])
        self._file.write(text)
        self._ends.append(self._ends[-1] + len(text))
        self.num_objects += len(unit.objects)
        self.num_bytes += unit.size
        self.largest = max(self.largest, unit.size)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Unit: ...
    @overload
    def __getitem__(self, index: slice) -> list[Unit]: ...
    def __getitem__(self, index: int | slice) -> Unit | list[Unit]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        self._file.seek(self._ends[place])
        return Unit.from_json(self._file.read(self._ends[place + 1] - self._ends[place]))

    def __iter__(self) -> Iterator[Unit]:
        return (self[place] for place in range(len(self)))


def filed_name(name: str) -> str:
    """The name of a unit in the ledger: the name itself, or its beginning and its digest.

    A file name has 255 bytes at most, and records need some for themselves.
    """
    folder, slash, base = name.rpartition("/")
    raw = base.encode("utf-8", "surrogateescape")
    if len(raw) <= _MAX_FILED_BYTES:
        return name
    digest = hashlib.sha256(raw).hexdigest()[:32]
    return f"{folder}{slash}{raw[:100].decode('utf-8', 'replace')}~{digest}"
