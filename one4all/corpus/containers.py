"""The containers there are, and how everybody lists, reads and writes units through them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import islice
from typing import overload

from one4all.corpus.container import DEFAULT_READ, Container, Opener, ReadOptions, UnitWriter
from one4all.corpus.loose import LooseImages
from one4all.corpus.parquet import ParquetContainer
from one4all.corpus.samples import Sample
from one4all.corpus.sources import Selection, open_source
from one4all.corpus.tar import TarContainer
from one4all.corpus.units import Unit, UnitList
from one4all.errors import ConfigError, UsageError
from one4all.image_kinds import is_image
from one4all.storage import ObjectInfo, Storage

CONTAINERS: dict[str, Container] = {
    container.name: container for container in (TarContainer(), ParquetContainer(), LooseImages())
}
_LOOKED_AT = 10_000  # objects of a listing
_OPENED = 20  # of them, if no name says what they are
_HEAD = 1 << 12


def find_container(source: Storage, name: str = "") -> Container:
    """The container that most bytes of a corpus are in, as far as names say.

    The beginning of the listing decides. So photos with a table of their titles are loose images,
    and shards with a picture beside them are shards. If no name says what a file is, the content of
    the first ones does.

    Args:
        source: Corpus.
        name: The container, if it is known.

    Returns:
        The container; that of tar shards, if there is nothing for any.

    Raises:
        ConfigError: There is no container of that name.
        AccessError: The source cannot be listed.
    """
    if name:
        if name not in CONTAINERS:
            raise ConfigError(f"no container {name!r}, only {', '.join(CONTAINERS)}")
        return CONTAINERS[name]
    num_bytes: Counter[str] = Counter()
    unnamed: list[ObjectInfo] = []
    for info in islice(source.list_data(), _LOOKED_AT):
        owners = [kind.name for kind in CONTAINERS.values() if kind.may_belong(info.key)]
        num_bytes.update(dict.fromkeys(owners, info.size))
        if not owners and len(unnamed) < _OPENED:
            unnamed.append(info)
    if num_bytes:
        return CONTAINERS[max(CONTAINERS, key=lambda kind: num_bytes.get(kind, -1))]
    if any(is_image(info.key, source.read_range(info.key, 0, _HEAD)) for info in unnamed):
        return CONTAINERS[LooseImages.name]
    return next(iter(CONTAINERS.values()))


def is_empty(source: Storage, container: Container) -> bool:
    """Whether there is nothing in a corpus to protect, as far as names say."""
    found = (unit for unit in container.scan(source) if isinstance(unit, Unit))
    return not any(container.has_units or _may_hold_images(source, unit) for unit in found)


def is_group(unit: Unit) -> bool:
    """Whether a unit is a group of objects that may as well be worked on one by one."""
    return len(unit.objects) > 1 and not CONTAINERS[unit.container].has_units


def list_units(source: Storage, container: str = "") -> Iterator[Unit]:
    """Units of a corpus, in name order; see `find_container`."""
    found = find_container(source, container).scan(source)
    return (unit for unit in found if isinstance(unit, Unit))


def open_corpora(uris: Sequence[str], container: str = "") -> Corpora:
    """The units of some corpora, in name order within each.

    Args:
        uris: Folders, s3:// prefixes or shards; see `open_source`.
        container: See `find_container`.

    Raises:
        UsageError: None of them holds a unit.
        AccessError: One cannot be read.
    """
    found = Corpora()
    for uri in uris:
        storage = open_source(uri.strip())
        storage.check(writable=False)
        place = storage.root if isinstance(storage, Selection) else storage
        found.add(place.uri, list_units(storage, container))
    if not found:
        raise UsageError(f"no {what_is_read()} in {', '.join(uris)}; one4all pack makes some")
    return found


def what_is_read() -> str:
    """What a corpus may be made of, in words."""
    *names, last = (container.unit_name for container in CONTAINERS.values())
    return f"{', '.join(names)} or {last}"


class Corpora(Sequence[tuple[str, Unit]]):
    """(URI, unit) of each unit of some corpora; the URI is that of the folder of its objects."""

    def __init__(self) -> None:
        self._units = UnitList()
        self._ends: list[tuple[int, str]] = []

    def add(self, uri: str, units: Iterable[Unit]) -> None:
        """Add the units of a corpus."""
        for unit in units:
            self._units.append(unit)
        self._ends.append((len(self._units), uri))

    def __len__(self) -> int:
        return len(self._units)

    @overload
    def __getitem__(self, index: int) -> tuple[str, Unit]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[str, Unit]]: ...
    def __getitem__(self, index: int | slice) -> tuple[str, Unit] | list[tuple[str, Unit]]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return next(uri for end, uri in self._ends if place < end), self._units[place]


def _may_hold_images(source: Storage, unit: Unit) -> bool:
    """Whether a group holds what is an image by its name, or one by the content of its first."""
    container = CONTAINERS[unit.container]
    if any(container.may_belong(part.key) for part in unit.objects):
        return True
    heads = ((p.key, source.read_range(p.key, 0, _HEAD)) for p in unit.objects[:_OPENED])
    return any(is_image(key, head) for key, head in heads)


def read_samples(
    store: Opener, unit: Unit, options: ReadOptions = DEFAULT_READ
) -> Generator[Sample]:
    """Samples of a unit, whatever it is made of; see `Container.read`."""
    return CONTAINERS[unit.container].read(store, unit, options)


def write_unit(destination: Storage, unit: Unit) -> UnitWriter:
    """Begin the copy of a unit; see `Container.write`."""
    return CONTAINERS[unit.container].write(destination, unit)
