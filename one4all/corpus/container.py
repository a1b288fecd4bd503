"""The seam behind which a corpus may be made of anything.

A container says which objects of a store are one unit of work, reads a unit as a stream of samples
with bounded memory, and writes the same unit with its images replaced and all else kept. Whoever
trains, fits, protects or audits knows units and samples, and not what they are made of. A new
container is a module of its own and a line in `one4all.corpus.containers`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Protocol

from one4all.corpus.samples import DEFAULT_MAX_SAMPLE_BYTES, Member, Sample
from one4all.corpus.units import Unit
from one4all.storage import ObjectInfo, Reader, Storage


@dataclass(frozen=True, slots=True)
class OutputObject:
    """One object that was written: key, bytes, ETag and digest of its content."""

    key: str
    size: int
    etag: str
    sha256: str


class Opener(Protocol):
    """What reading needs of a `Storage`."""

    def open(self, key: str, *, etag: str | None = None) -> Reader: ...


class UnitWriter(AbstractContextManager["UnitWriter"], ABC):
    """A unit being written, member by member, in order.

    Leave the ``with`` block without `commit` and nothing of it was ever visible.
    """

    @abstractmethod
    def copy(self, member: Member) -> None:
        """Write a member exactly as it was read."""

    @abstractmethod
    def replace(self, member: Member, *, name: str, payload: bytes) -> None:
        """Write a member with another content and perhaps another name, else as it was read."""

    @abstractmethod
    def commit(self) -> tuple[OutputObject, ...]:
        """Publish the unit, whole; what was there is replaced.

        Raises:
            StorageError: The store failed in spite of retries.
        """


class Container(ABC):
    """One way in which a corpus is laid out.

    Attributes:
        name: Name in units and manifests.
        unit_name: Word for one unit, for people: "tar shard".
    """

    name: ClassVar[str]
    unit_name: ClassVar[str]

    @abstractmethod
    def scan(self, source: Storage) -> Iterator[Unit | ObjectInfo]:
        """Units of a corpus in name order; an object that belongs to none comes as it is listed.

        Our own records (``_one4all/``) are left out. Memory does not grow with the listing.
        """

    def may_belong(self, key: str) -> bool:
        """Whether an object of this key may be part of a unit, as far as its name says."""
        return True

    @abstractmethod
    def read(
        self, store: Opener, unit: Unit, *, max_sample_bytes: int = DEFAULT_MAX_SAMPLE_BYTES
    ) -> Generator[Sample]:
        """Samples of a unit, in order; the end is reached only if the unit is whole.

        Raises:
            ShardError: The unit is damaged, or holds a larger sample.
            SourceChangedError: An object was replaced since the unit was listed.
        """

    @abstractmethod
    def write(self, destination: Storage, unit: Unit) -> UnitWriter:
        """Begin the copy of a unit, under the same keys."""
