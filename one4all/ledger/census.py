"""The census: the ledger of a destination held against what stands on both sides."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from one4all.corpus import Container, Unit, filed_name, find_container
from one4all.ledger.ledger import Attempts, Entry, Ledger, digest_of
from one4all.storage import INTERNAL, ObjectInfo, Storage

OnRecorded = Callable[[Unit, Entry], None]
"""Receives a unit that was recorded in its present version, and the entry that says so."""

_MAX_SIZES = 1000  # manifests that a comparison of two places reads
_Value = TypeVar("_Value", Entry, ObjectInfo)


@dataclass
class Census:
    """The ledger of a destination held against the listings of its source and of itself.

    Attributes:
        num_units: Units of the source that count: all, or those written since a given time.
        num_done: Of these, done: what stands was made from what stands at the source.
        num_bad: Images of these that could not be protected.
        pending: Not done, largest first, so that none is left alone at the end.
        damaged: Of the pending ones, those that were done before, until an output went missing or
            was replaced: unit name to the entry that says how it was.
        quarantined: Given up: unit name to its attempts.
        failing: Pending ones that have failed before: unit name to their attempts.
        num_others: Objects of the source that are no units.
        other: The first of them.
        num_older: Units written before the given time, left out of all of the above.
        num_older_undone: Of these, not done.
        orphans: Keys of outputs whose source is gone.
        orphan_records: Keys of manifests whose source is gone.
        strangers: Keys of objects at the destination that no record is about, and that look like a
            part of a unit.
        beside: Keys of other objects there, which somebody has put beside the outputs.
        superseded: Keys of manifests of what was written over since.
    """

    num_units: int = 0
    num_done: int = 0
    num_bad: int = 0
    pending: list[Unit] = field(default_factory=list)
    damaged: dict[str, Entry] = field(default_factory=dict)
    quarantined: dict[str, Attempts] = field(default_factory=dict)
    failing: dict[str, Attempts] = field(default_factory=dict)
    num_others: int = 0
    other: str = ""
    num_older: int = 0
    num_older_undone: int = 0
    orphans: list[str] = field(default_factory=list)
    orphan_records: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    superseded: list[str] = field(default_factory=list)


def take_census(
    source: Storage,
    ledger: Ledger,
    *,
    since: float | None = None,
    on_recorded: OnRecorded = lambda unit, entry: None,
) -> Census:
    """Tell what is done from listings alone, without reading any unit, output or manifest.

    The listings are walked side by side. Memory grows with what is *not* done, by some 500 bytes
    for each pending unit; time grows with the length of the listings.

    Args:
        source: Corpus.
        ledger: Ledger of the destination.
        since: POSIX seconds; units written before it are counted apart and left alone.
        on_recorded: Called with each unit that is done or damaged, older ones included.
    """
    census = Census()
    attempts = ledger.attempts()
    entries = _Walk((entry.key, entry.name, entry) for entry in ledger.entries())
    outputs = _Walk((info.key, info.key, info) for info in ledger.outputs())
    container = find_container(source)
    for found in container.scan(source):
        if not isinstance(found, Unit):
            census.num_others += 1
            census.other = census.other or found.key
            continue
        standing = [info for part in found.objects for info in outputs.take(part.key, part.key)]
        recorded = entries.take(found.filed_name, Entry.key_behind(found.filed_name))
        entry = _find(found, recorded, standing)
        is_done = entry is not None and _describes(entry, found, standing)
        if entry is not None:
            on_recorded(found, entry)
        if is_done:
            census.superseded += [other.key for other in recorded if other is not entry]
        if found.is_older(since):
            census.num_older += 1
            census.num_older_undone += not is_done
            continue
        census.num_units += 1
        tried = attempts.get(found.id, Attempts())
        if entry is not None and is_done:
            census.num_done += 1
            census.num_bad += entry.num_bad
        elif tried.given_up:
            census.quarantined[found.name] = tried
        else:
            census.pending.append(found)
            if entry is not None:
                census.damaged[found.name] = entry
            if tried.failed:
                census.failing[found.name] = tried
    census.pending.sort(key=lambda unit: (-unit.size, unit.name))
    _account_for_the_rest(census, container, entries.rest(), outputs.rest())
    return census


@dataclass
class Move:
    """What was recorded, held against a place that the source may have been moved to.

    Attributes:
        num_same: Units recorded in the version that stands there.
        num_touched: Units recorded with another modification time or ETag; they are done again.
        num_missing: Units recorded that are not there.
        other: The first unit that has another size there; "" if there is none.
    """

    num_same: int = 0
    num_touched: int = 0
    num_missing: int = 0
    other: str = ""


def compare_places(source: Storage, ledger: Ledger) -> Move:
    """Tell whether a source holds the units that a destination was made from.

    Names and versions are told from listings. The manifests of the first thousand units that
    differ are read, for their sizes.
    """
    move = Move()
    entries = _Walk((entry.key, entry.name, entry) for entry in ledger.entries())
    for found in find_container(source).scan(source):
        if not isinstance(found, Unit):
            continue
        recorded = entries.take(found.filed_name, Entry.key_behind(found.filed_name))
        if not recorded:
            continue
        if any(entry.version == found.version for entry in recorded):
            move.num_same += 1
            continue
        move.num_touched += 1
        if move.num_touched <= _MAX_SIZES and not move.other:
            sizes = {ledger.manifest(entry).unit.size for entry in recorded}
            move.other = "" if found.size in sizes else found.name
    move.num_missing = len(entries.rest())
    return move


def _find(unit: Unit, recorded: list[Entry], standing: list[ObjectInfo]) -> Entry | None:
    """The entry of the unit's present version; of several, that of the outputs that stand."""
    of_version = [entry for entry in recorded if entry.version == unit.version]
    matching = [entry for entry in of_version if _describes(entry, unit, standing)]
    return next(iter(matching or of_version), None)


def _describes(entry: Entry, unit: Unit, standing: list[ObjectInfo]) -> bool:
    """Whether the outputs that stand are those of an entry; an older program did not note which."""
    if len(standing) < len(unit.objects):
        return False
    return entry.outputs in ("", digest_of(standing))


def _account_for_the_rest(
    census: Census,
    container: Container,
    entries: dict[str, list[Entry]],
    outputs: dict[str, list[ObjectInfo]],
) -> None:
    """What lies at the destination, and no unit of the source is behind it."""
    marker = f"/{INTERNAL}"
    nested = {key.partition(marker)[0] + "/" for key in outputs if marker in key}
    for key in outputs:
        if any(key.startswith(other_destination) for other_destination in nested):
            continue
        if filed_name(key) in entries:
            census.orphans.append(key)
        else:
            (census.strangers if container.may_belong(key) else census.beside).append(key)
    census.orphan_records = [entry.key for records in entries.values() for entry in records]


class _Walk(Generic[_Value]):
    """A sorted listing, walked along as it is asked for; what was passed by is kept until asked.

    Args:
        found: (key, name, value), sorted by key.
    """

    def __init__(self, found: Iterator[tuple[str, str, _Value]]) -> None:
        self._found: Iterator[tuple[str, str, _Value]] = found
        self._head: tuple[str, str, _Value] | None = next(found, None)
        self._passed: defaultdict[str, list[_Value]] = defaultdict(list)

    def take(self, name: str, last_key: str) -> list[_Value]:
        """All values of a name; none of them has a key behind ``last_key``."""
        while self._head is not None and self._head[0] <= last_key:
            self._pass()
        return self._passed.pop(name, [])

    def rest(self) -> dict[str, list[_Value]]:
        """What nobody asked for, by name."""
        while self._head is not None:
            self._pass()
        return self._passed

    def _pass(self) -> None:
        assert self._head is not None
        _, name, value = self._head
        self._passed[name].append(value)
        self._head = next(self._found, None)
