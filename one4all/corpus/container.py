"""The seam behind which a corpus may be made of anything.

A container says which objects of a store are one unit of work, reads a unit as a stream of samples
with bounded memory, and writes the same unit with its images replaced and all else kept. Whoever
trains, fits, protects or audits knows units and samples, and not what they are made of. A new
container is a module of its own and a line in `one4all.corpus.containers`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from one4all.corpus.samples import DEFAULT_MAX_SAMPLE_BYTES, Member, Sample
from one4all.corpus.units import Unit
from one4all.errors import NotFoundError
from one4all.image_kinds import is_apple_double
from one4all.storage import ObjectInfo, Reader, Storage


@dataclass(frozen=True, slots=True)
class OutputObject:
    """One object that was written.

    Attributes:
        key: Its key.
        size: Bytes.
        etag: ETag.
        sha256: Digest of its content.
        num_protected: Images in it that were protected; None in records of older programs.
    """

    key: str
    size: int
    etag: str
    sha256: str
    num_protected: int | None = None


@dataclass(frozen=True)
class ReadOptions:
    """What is asked of whoever reads a unit.

    Attributes:
        max_sample_bytes: A larger sample makes a bad unit; a sample has to fit in memory. In a
            Parquet file this goes for a row group.
        image_columns: Columns of tables of which every value is an image, whatever it looks like.
        others: Whether loose objects that are no images are there ("copy") or passed over ("skip").
        dropped: Keys of samples of the source that were not written. Where a key is a place, such
            as the number of a row, they are counted in.
    """

    max_sample_bytes: int = DEFAULT_MAX_SAMPLE_BYTES
    image_columns: tuple[str, ...] = ()
    others: Literal["copy", "skip"] = "copy"
    dropped: Collection[str] = frozenset()


DEFAULT_READ = ReadOptions()


class Opener(Protocol):
    """What reading needs of a `Storage`."""

    def open(self, key: str, *, etag: str | None = None) -> Reader: ...

    def read_range(self, key: str, start: int, size: int, *, etag: str | None = None) -> bytes: ...


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
        unit_name: Words for one unit, for people: ".tar shard".
        noun: Word for what is counted, of which the plural has an s: "shard".
        has_units: Whether units are there before anybody looks, as files are. Otherwise they are
            groups of objects, made up as it suits, and objects are what is counted and recorded.
    """

    name: ClassVar[str]
    unit_name: ClassVar[str]
    noun: ClassVar[str]
    has_units: ClassVar[bool] = True

    @abstractmethod
    def scan(self, source: Storage) -> Iterator[Unit | ObjectInfo]:
        """Units of a corpus in name order; an object that belongs to none comes as it is listed.

        Our own records (``_one4all/``) are left out. Memory does not grow with the listing.
        """

    def may_belong(self, key: str) -> bool:
        """Whether an object of this key may be part of a unit, as far as its name says."""
        return True

    def renamed(self, name: str, converted: str) -> str:
        """Name of a member whose file format changes.

        Args:
            name: Its name.
            converted: The same with another extension.
        """
        return converted

    def meet(self, before: Sample, after: Sample) -> bool:
        """Whether two samples are one before and after, as far as their keys say."""
        # The key of a dot file is its whole name, of which JPEG that becomes PNG changes the end.
        dot_files = before.members[0].is_dot_file and after.members[0].is_dot_file
        return before.key == after.key or dot_files

    @abstractmethod
    def read(
        self, store: Opener, unit: Unit, options: ReadOptions = DEFAULT_READ
    ) -> Generator[Sample]:
        """Samples of a unit, in order; the end is reached only if the unit is whole.

        Raises:
            ShardError: The unit is damaged, or holds a larger sample than is allowed.
            SourceChangedError: An object was replaced since the unit was listed.
        """

    @abstractmethod
    def write(self, destination: Storage, unit: Unit) -> UnitWriter:
        """Begin the copy of a unit, under the same keys."""


def is_companion(source: Storage, key: str) -> bool:
    """Whether an object is no unit, but what macOS puts beside one (``._00000.tar``)."""
    if not key.rpartition("/")[2].startswith("._"):
        return False
    try:
        with closing(source.open(key)) as reader:
            return is_apple_double(key, reader.read(512))
    except NotFoundError:  # a link to nothing: whoever reads it says so
        return False


class FileContainer(Container):
    """A corpus in which every object of one suffix is a unit.

    Attributes:
        suffix: End of their keys.
    """

    suffix: ClassVar[str]

    def scan(self, source: Storage) -> Iterator[Unit | ObjectInfo]:
        """See the base class."""
        for info in source.list_data():
            is_unit = self.may_belong(info.key) and not is_companion(source, info.key)
            yield Unit.of_object(info, self.name) if is_unit else info

    def may_belong(self, key: str) -> bool:
        """See the base class."""
        return key.endswith(self.suffix)
