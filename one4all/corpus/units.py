"""The unit of work: objects of a corpus that are read, rewritten and accounted for together."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field, replace

from one4all.storage import ObjectInfo

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
    def from_json(cls, text: str) -> Unit:
        """The inverse of `to_json`."""
        name, parts, container = json.loads(text)
        return cls(name, tuple(ObjectVersion(*part) for part in parts), container)


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
