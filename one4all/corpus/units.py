"""Which objects of a store are shards, and in which version."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from one4all.storage import INTERNAL, ObjectInfo, Storage

SHARD_SUFFIX = ".tar"


@dataclass(frozen=True, slots=True)
class SourceShard:
    """One version of one shard of the source. A plan may hold a million of them."""

    name: str
    size: int
    etag: str

    @classmethod
    def from_columns(cls, batch: dict[str, Any]) -> SourceShard:
        """From a Ray Data batch of one row, made by `dataclasses.asdict`."""
        return cls(str(batch["name"][0]), int(batch["size"][0]), str(batch["etag"][0]))

    @property
    def version(self) -> str:
        return hashlib.sha256(f"{self.size} {self.etag}".encode()).hexdigest()[:16]

    @property
    def id(self) -> str:
        return f"{self.name}@{self.version}"


def list_shards(source: Storage) -> Iterator[SourceShard]:
    """The shards of a corpus, in name order."""
    return (to_shard(info) for info in source.list() if is_shard(info))


def is_shard(info: ObjectInfo) -> bool:
    return info.key.endswith(SHARD_SUFFIX) and not info.key.startswith(INTERNAL)


def is_older(info: ObjectInfo, since: float | None) -> bool:
    """Whether an object was written before ``since``; never, where the store does not say when."""
    # S3 gives whole seconds, rounded down: a shard must not be missed for that.
    return since is not None and info.modified is not None and info.modified < math.floor(since)


def to_shard(info: ObjectInfo) -> SourceShard:
    return SourceShard(info.key, info.size, info.etag)
