"""The containers there are, and how everybody lists, reads and writes units through them."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

from one4all.corpus.container import DEFAULT_READ, Container, Opener, ReadOptions, UnitWriter
from one4all.corpus.parquet import ParquetContainer
from one4all.corpus.samples import Sample
from one4all.corpus.sources import Selection, open_source
from one4all.corpus.tar import TarContainer
from one4all.corpus.units import Unit
from one4all.errors import UsageError
from one4all.storage import Storage

# In the order in which `find_container` asks them.
CONTAINERS: dict[str, Container] = {
    container.name: container for container in (TarContainer(), ParquetContainer())
}


def find_container(source: Storage, name: str = "") -> Container:
    """The container of a corpus: the first that finds a unit in it; the first of all, if none does.

    Args:
        source: Corpus.
        name: The container, if it is known.

    Raises:
        AccessError: The source cannot be listed.
    """
    if name:
        return CONTAINERS[name]
    for container in CONTAINERS.values():
        if any(isinstance(found, Unit) for found in container.scan(source)):
            return container
    return next(iter(CONTAINERS.values()))


def list_units(source: Storage, container: str = "") -> Iterator[Unit]:
    """Units of a corpus, in name order; see `find_container`."""
    found = find_container(source, container).scan(source)
    return (unit for unit in found if isinstance(unit, Unit))


def open_corpora(uris: Sequence[str]) -> list[tuple[str, Unit]]:
    """(URI, unit) of each unit of some corpora, in name order within each; the URI of its folder.

    Args:
        uris: Folders, s3:// prefixes or shards; see `open_source`.

    Raises:
        UsageError: None of them holds a unit.
        AccessError: One cannot be read.
    """
    found = []
    for uri in uris:
        storage = open_source(uri.strip())
        storage.check(writable=False)
        place = storage.root if isinstance(storage, Selection) else storage
        found += [(place.uri, unit) for unit in list_units(storage)]
    if not found:
        known = " or ".join(container.unit_name for container in CONTAINERS.values())
        raise UsageError(f"no {known} in {', '.join(uris)}; one4all pack makes some")
    return found


def read_samples(
    store: Opener, unit: Unit, options: ReadOptions = DEFAULT_READ
) -> Generator[Sample]:
    """Samples of a unit, whatever it is made of; see `Container.read`."""
    return CONTAINERS[unit.container].read(store, unit, options)


def write_unit(destination: Storage, unit: Unit) -> UnitWriter:
    """Begin the copy of a unit; see `Container.write`."""
    return CONTAINERS[unit.container].write(destination, unit)
