"""What is done, pending, bad and quarantined at a destination."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from one4all.corpus import CONTAINERS, Unit, UnitList, open_source
from one4all.errors import NotFoundError, One4AllError, SourceChangedError
from one4all.ledger import (
    BadImage,
    Entry,
    Ledger,
    Manifest,
    done_manifests,
    read_binding,
    take_census,
)
from one4all.storage import Storage, open_storage
from pipelines.protect.run_record import RunRecord, read_records

MAX_TOTALS = 20_000  # manifests that are read without being asked to
_READERS = 16
_NEWS = 200  # manifests read for the rate, at each look


@dataclass
class Status:
    """A destination as its ledger and its source show it; bytes and counts.

    ``output_bytes`` and ``num_protected`` are totals over manifests, None if these were not read.

    Shards are what is counted; of loose images, files are.

    Attributes:
        container: What the corpus is made of.
        noun: Word for what is counted: "shard" or "file".
        num_damaged: Pending shards that were done, until an output went missing or was replaced.
        num_orphans: Outputs whose source is gone.
        num_bad: Images of done shards that could not be protected.
        failing, quarantined: Name of a shard to why its last attempt failed.
        last_success: POSIX seconds of the last run that left nothing to do; None if none did.
    """

    destination: str
    source: str
    protector: str
    output_format: str
    container: str = "tar"
    noun: str = "shard"
    num_shards: int = 0
    num_done: int = 0
    num_pending: int = 0
    pending_bytes: int = 0
    num_damaged: int = 0
    num_orphans: int = 0
    num_bad: int = 0
    output_bytes: int | None = None
    num_protected: int | None = None
    last_success: float | None = None
    failing: dict[str, str] = field(default_factory=dict)
    quarantined: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rate:
    """How fast a destination has grown since the first look; None before a shard was done.

    Attributes:
        num_done: Shards since then.
        images_per_second: Over these shards.
        seconds_left: Until all pending bytes are read, at this rate.
    """

    num_done: int = 0
    images_per_second: float | None = None
    seconds_left: float | None = None


def read_status(destination_uri: str, *, totals: bool | None = None) -> Status:
    """Read the ledger of a destination and list its source.

    Args:
        destination_uri: What protect writes to.
        totals: Read every manifest for the totals; None means if there are not too many.

    Raises:
        UsageError: Never written by protect, or a side cannot be reached.
    """
    destination = open_storage(destination_uri)
    destination.check(writable=False)
    binding = read_binding(destination)
    ledger = Ledger(destination)
    status = Status(destination.uri, binding.source_uri, binding.protector, binding.output_format)
    source = _open_source(binding.source_uri)
    census = take_census(source, ledger, container=binding.container)
    status.container, status.noun = census.container.name, census.container.noun
    status.num_shards, status.num_done = census.num_units, census.num_done
    status.num_pending, status.num_damaged = census.num_pending, census.num_damaged
    status.pending_bytes = _num_bytes(census.pending)
    status.num_bad, status.num_orphans = census.num_bad, len(census.orphans)
    status.quarantined = ledger.reasons(census.quarantined)
    status.failing = ledger.reasons(census.failing)
    status.last_success = ledger.last_success()
    if not census.container.has_units:
        status.output_bytes, status.num_protected = census.output_bytes, census.num_protected
    elif totals or (totals is None and status.num_done <= MAX_TOTALS):
        stale = {*census.superseded, *census.orphan_records}
        stale |= {entry.key for entry in census.damaged.values() if entry}
        keys = (entry.key for entry in ledger.entries() if entry.key not in stale)
        status.output_bytes = status.num_protected = 0
        for manifest in _read_manifests(ledger, keys):
            status.output_bytes += manifest.output_size
            status.num_protected += manifest.num_protected
    return status


def _num_bytes(units: Sequence[Unit]) -> int:
    return units.num_bytes if isinstance(units, UnitList) else sum(unit.size for unit in units)


def read_bad_images(destination_uri: str) -> Iterator[tuple[str, BadImage]]:
    """(Shard, image) of each image of done shards that could not be protected, in order.

    Only manifests are read that have some, by their names.

    Raises:
        UsageError: As `read_status`.
    """
    destination = open_storage(destination_uri)
    destination.check(writable=False)
    binding, ledger = read_binding(destination), Ledger(destination)
    source = _open_source(binding.source_uri)
    if not CONTAINERS[binding.container].has_units:
        for _, manifest in done_manifests(source, ledger):
            yield from ((image.key, image) for image in manifest.bad_images)
        return
    with_some: dict[str, Entry] = {}

    def note(unit: Unit, entry: Entry) -> None:
        if entry.num_bad:
            with_some[unit.name] = entry

    census = take_census(source, ledger, container=binding.container, on_recorded=note)
    keys = (entry.key for name, entry in with_some.items() if name not in census.damaged)
    for manifest in _read_manifests(ledger, keys):
        for image in manifest.bad_images:
            yield manifest.name, image


def read_runs(destination_uri: str, *, limit: int = 20) -> list[RunRecord]:
    """How the last runs have ended, the newest first.

    Raises:
        UsageError: Never written by protect, or it cannot be reached.
    """
    destination = open_storage(destination_uri)
    destination.check(writable=False)
    read_binding(destination)
    return read_records(destination, limit=limit)


def watch(
    destination_uri: str, *, every_seconds: float, totals: bool = False
) -> Iterator[tuple[Status, Rate]]:
    """Look again and again until nothing is pending; ``totals`` reads every manifest each time.

    A look lists both sides, so looking never takes more than half of the time.
    """
    ledger = Ledger(open_storage(destination_uri))
    growth: _GrowthRate | None = None
    first: tuple[Status, float] | None = None
    while True:
        before = time.monotonic()
        status = read_status(destination_uri, totals=totals)
        if CONTAINERS[status.container].has_units:
            done, now = {entry.key for entry in ledger.entries()}, time.monotonic()
            growth = growth or _GrowthRate(done, now)
            news = _read_manifests(ledger, islice(done - growth.known, _NEWS))
            yield status, growth.rate(done, list(news), status.pending_bytes, now)
        else:
            first = first or (status, time.monotonic())
            yield status, _rate_of_objects(*first, status, time.monotonic())
        if not status.num_pending:
            return
        time.sleep(max(every_seconds, time.monotonic() - before))


def _rate_of_objects(first: Status, start: float, status: Status, now: float) -> Rate:
    """The rate since the first look, where records say how many images are protected."""
    num_new = status.num_done - first.num_done
    if num_new <= 0 or now <= start:
        return Rate(max(num_new, 0))
    num_images = (status.num_protected or 0) - (first.num_protected or 0)
    read = max(first.pending_bytes - status.pending_bytes, 1)
    left = status.pending_bytes * (now - start) / read
    return Rate(num_new, num_images / (now - start), left)


class _GrowthRate:
    """The rate since the first look, from a sample of what is new at each look.

    Args:
        known: Keys of the manifests that stood at the first look.
        start: Time of that look, in seconds.
    """

    def __init__(self, known: set[str], start: float) -> None:
        self.known, self._start = known, start
        self._num_new = self._num_read = self._num_images = self._num_bytes = 0

    def rate(
        self, done: set[str], sample: Sequence[Manifest], pending_bytes: int, now: float
    ) -> Rate:
        """The rate until now; ``sample`` are manifests of some shards that are new."""
        self._num_new += len(done - self.known)
        self.known = done
        self._num_read += len(sample)
        self._num_images += sum(manifest.num_images for manifest in sample)
        self._num_bytes += sum(manifest.unit.size for manifest in sample)
        if not self._num_read or now <= self._start:
            return Rate(self._num_new)
        shards_per_second = self._num_new / (now - self._start)
        images_per_second = shards_per_second * self._num_images / self._num_read
        bytes_per_second = shards_per_second * self._num_bytes / self._num_read
        return Rate(self._num_new, images_per_second, pending_bytes / max(bytes_per_second, 1e-9))


def _read_manifests(ledger: Ledger, keys: Iterable[str]) -> Iterator[Manifest]:
    """Manifests of some keys, read side by side; one that is deleted meanwhile is left out."""

    def read(key: str) -> Manifest | None:
        try:
            return ledger.manifest(key)
        except (NotFoundError, SourceChangedError):
            return None

    rest = iter(keys)
    with ThreadPoolExecutor(_READERS, "manifests") as pool:
        while window := list(islice(rest, 16 * _READERS)):  # no queue of a million futures
            yield from (manifest for manifest in pool.map(read, window) if manifest is not None)


def _open_source(source_uri: str) -> Storage:
    source = open_source(source_uri)
    try:
        source.check(writable=False)
    except One4AllError as error:
        raise type(error)(f"the source of this destination: {error}") from error
    return source
