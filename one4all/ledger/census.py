"""The census: the ledger of a destination held against what stands on both sides."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from one4all.corpus import Container, Unit, UnitList, filed_name, find_container
from one4all.corpus.loose import GROUP_OBJECTS, Grouping, names_of_output
from one4all.errors import NotFoundError, StorageError
from one4all.ledger.ledger import Attempts, Entry, Ledger, digest_of
from one4all.ledger.objects import ObjectRow, manifest_of
from one4all.ledger.records import Manifest
from one4all.ledger.walk import Walk
from one4all.storage import INTERNAL, ObjectInfo, Storage

OnRecorded = Callable[[Unit, Entry], None]
"""Receives a unit that was recorded in its present version, and the entry that says so."""

_MAX_SIZES = 1000  # manifests that a comparison of two places reads
_MAX_NAMED = 1000  # damaged objects that are named; they may be as many as the corpus has
_FEW = 1000  # keys that are asked for one by one, rather than looked for in a listing
_MERGED = 3  # times that another program may merge records while we read them


@dataclass
class Census:
    """The ledger of a destination held against the listings of its source and of itself.

    Units are what is counted, or objects where units are groups made up of them.

    Attributes:
        container: What the corpus is made of.
        num_units: Units of the source that count: all, those written since a given time, or those
            that were asked for.
        num_done: Of these, done: what stands was made from what stands at the source.
        num_bad: Images of these that could not be protected.
        num_protected, output_bytes: Images of these that were protected, and bytes written; only of
            objects, of which the records have been read. None of units.
        pending: Units not done, largest first, so that none is left alone at the end.
        num_pending: Units or objects in it.
        oldest_pending: When the oldest of them was written, in POSIX seconds; None if there is
            none, or the store does not say.
        num_damaged: Of the pending ones, those that were done before, until an output went missing
            or was replaced.
        damaged: Of these, name to the entry that says how it was; of objects a few, without entry.
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
        num_left_out: Units or objects that were not asked for.
        num_absent: What was asked for by name and is not there.
        absent: The first of these.
    """

    container: Container
    num_units: int = 0
    num_done: int = 0
    num_bad: int = 0
    num_protected: int | None = None
    output_bytes: int | None = None
    pending: Sequence[Unit] = ()
    num_pending: int = 0
    oldest_pending: float | None = None
    num_damaged: int = 0
    damaged: dict[str, Entry | None] = field(default_factory=dict)
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
    num_left_out: int = 0
    num_absent: int = 0
    absent: str = ""


def take_census(
    source: Storage,
    ledger: Ledger,
    *,
    container: str = "",
    since: float | None = None,
    only: Collection[str] | None = None,
    on_recorded: OnRecorded = lambda unit, entry: None,
) -> Census:
    """Tell what is done from listings and, of loose objects, their records; reads no data.

    The listings are walked side by side. Memory grows with what is *not* done, by some 500 bytes
    for each pending unit; of loose objects it does not, for which there are temporary files. Time
    grows with the length of the listings.

    Args:
        source: Corpus.
        ledger: Ledger of the destination.
        container: What the corpus is made of, as the destination is bound to; see `find_container`.
        since: POSIX seconds; what was written before it is counted apart and left alone.
        only: Names of units, or keys of objects, that are asked for; the others are left out.
        on_recorded: Called with each unit that is done or damaged, older ones included; see
            `done_manifests` for objects.
    """
    kind = find_container(source, container)
    if kind.has_units:
        return _census_of_units(source, ledger, kind, since, only, on_recorded)
    return _patiently(lambda: _census_of_objects(source, ledger, kind, since, only))


def _census_of_units(
    source: Storage,
    ledger: Ledger,
    container: Container,
    since: float | None,
    only: Collection[str] | None,
    on_recorded: OnRecorded,
) -> Census:
    census = Census(container)
    pending: list[Unit] = []
    absent = set(only or ())
    attempts = ledger.attempts()
    entries = Walk((entry.key, entry.name, entry) for entry in ledger.entries())
    outputs = Walk((info.key, info.key, info) for info in ledger.outputs())
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
        absent.discard(found.name)
        if only is not None and found.name not in only:
            census.num_left_out += 1
            continue
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
            pending.append(found)
            if entry is not None:
                census.damaged[found.name] = entry
            if tried.failed:
                census.failing[found.name] = tried
    census.pending = sorted(pending, key=lambda unit: (-unit.size, unit.name))
    census.num_pending, census.num_damaged = len(pending), len(census.damaged)
    times = (unit.modified for unit in pending if unit.modified is not None)
    census.oldest_pending = min(times, default=None)
    census.num_absent, census.absent = len(absent), min(absent, default="")
    _account_for_the_rest(census, container, entries.rest(), outputs.rest())
    return census


class _Found(NamedTuple):
    """An object of the source, and what is known of it.

    Attributes:
        info: The object, as it stands.
        row: The line of this version that describes what stands; or else one of this version.
        is_done: Whether it is the former.
        left: Keys of outputs that still stand and are of other versions, where this one has none.
    """

    info: ObjectInfo
    row: ObjectRow | None
    is_done: bool
    left: tuple[str, ...] = ()


class _ObjectWalk:
    """The objects of a source, each with what is recorded of it and what stands for it.

    Args:
        source: Corpus.
        ledger: Ledger of the destination.
        only: Keys that are asked for; None for all.
    """

    def __init__(self, source: Storage, ledger: Ledger, only: Collection[str] | None) -> None:
        self._source, self._only = source, only
        rows, outputs = ledger.objects.rows(), ledger.outputs()
        if only is not None:
            rows = (row for row in rows if row.key in only)
            wanted = {name for key in only for name in names_of_output(key)}
            outputs = _some(ledger.storage, wanted, few=len(only) <= _FEW)
        self._rows = Walk((row.key, row.key, row) for row in rows)
        self._outputs = Walk((info.key, info.key, info) for info in outputs)

    def __iter__(self) -> Iterator[_Found]:
        for info in self._objects():
            recorded = self._rows.take(info.key, info.key)
            standing = {info.key: self._outputs.take(info.key, info.key)}
            for row in recorded:
                if row.output not in standing:
                    standing[row.output] = self._outputs.take(row.output, row.output)
            of_version = [row for row in recorded if row.is_of(info)]
            done = [row for row in of_version if row.describes(standing[row.output])]
            left: tuple[str, ...] = ()
            if done and len(recorded) > 1:
                written = {row.output for row in recorded if standing[row.output]}
                left = tuple(written - {done[0].output})
            yield _Found(info, next(iter(done or of_version), None), bool(done), left)

    def _objects(self) -> Iterator[ObjectInfo]:
        """The objects that count, in the order of keys."""
        if self._only is None:
            return self._source.list_data()
        return _some(self._source, self._only, few=len(self._only) <= _FEW)

    def rest(self) -> tuple[dict[str, list[ObjectRow]], dict[str, list[ObjectInfo]]]:
        """Lines of which the source is gone, and outputs that no object of it stands for."""
        return self._rows.rest(), self._outputs.rest()


def _census_of_objects(
    source: Storage,
    ledger: Ledger,
    container: Container,
    since: float | None,
    only: Collection[str] | None,
) -> Census:
    census = Census(container, num_protected=0, output_bytes=0)
    attempts, suspects = ledger.attempts(), ledger.suspects()
    pending, groups = UnitList(), Grouping()
    absent = set(only or ())
    walk = _ObjectWalk(source, ledger, only)
    for found in walk:
        info, row = found.info, found.row
        absent.discard(info.key)
        if since is not None and Unit.of_object(info).is_older(since):
            census.num_older += 1
            census.num_older_undone += not found.is_done
            continue
        census.num_units += 1
        if found.is_done and row is not None:
            census.num_done += 1
            census.orphans += found.left
            census.num_bad += bool(row.bad)
            census.num_protected = (census.num_protected or 0) + row.num_protected
            census.output_bytes = (census.output_bytes or 0) + row.output_size
            continue
        tried = Attempts()
        if attempts:
            tried = attempts.get(Unit.of_object(info, container.name).id, tried)
        if tried.given_up:
            census.quarantined[info.key] = tried
            continue
        census.num_pending += 1
        if info.modified is not None:
            census.oldest_pending = min(census.oldest_pending or info.modified, info.modified)
        if row is not None:
            census.num_damaged += 1
            if len(census.damaged) < _MAX_NAMED:
                census.damaged[info.key] = None
        if tried.failed:
            census.failing[info.key] = tried
        if tried.failed or tried.num_killed or info.key in suspects:
            pending.append(Unit.of_object(info, container.name))  # it may spoil a group
            continue
        for unit in groups.add(info):
            pending.append(unit)
    for unit in groups.rest():
        pending.append(unit)
    census.pending = pending
    census.num_absent, census.absent = len(absent), min(absent, default="")
    if only is None:
        rows, outputs = walk.rest()
        gone = {row.output for lines in rows.values() for row in lines if row.output}
        _sort_out(census, container, outputs, gone.__contains__)
    return census


def done_manifests(
    source: Storage, ledger: Ledger, *, since: float | None = None
) -> Iterator[tuple[Unit, Manifest]]:
    """Loose objects that are done, in groups of neighbours, each with what is recorded of it.

    Raises:
        StorageError: Another program merged the records meanwhile.
    """
    group: list[ObjectRow] = []

    def closed() -> tuple[Unit, Manifest]:
        manifest = manifest_of(group)
        return manifest.unit, manifest

    try:
        for found in _ObjectWalk(source, ledger, None):
            if not found.is_done or found.row is None:
                continue
            if Unit.of_object(found.info).is_older(since):
                continue
            group.append(found.row)
            if len(group) == GROUP_OBJECTS:
                yield closed()
                group = []
    except NotFoundError as error:
        raise StorageError(f"records were merged meanwhile ({error}); run again") from error
    if group:
        yield closed()


def _some(store: Storage, keys: Collection[str], *, few: bool) -> Iterator[ObjectInfo]:
    """Those objects of these keys that are there, in the order of keys; few are asked for alone."""
    if not few:
        yield from (info for info in store.list_data() if info.key in keys)
        return
    for key in sorted(keys):
        try:
            yield store.head(key)
        except NotFoundError:
            continue


def _patiently(take: Callable[[], Census]) -> Census:
    """A census of records that another program may merge while they are read."""
    for _ in range(_MERGED - 1):
        try:
            return take()
        except NotFoundError:
            continue
    return take()


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


def compare_places(source: Storage, ledger: Ledger, container: str = "") -> Move:
    """Tell whether a source holds the units that a destination was made from.

    Names and versions are told from listings. The manifests of the first thousand units that
    differ are read, for their sizes; of objects, the records have them.
    """
    kind = find_container(source, container)
    if not kind.has_units:
        return _compare_objects(source, ledger)
    move = Move()
    entries = Walk((entry.key, entry.name, entry) for entry in ledger.entries())
    for found in kind.scan(source):
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


def _compare_objects(source: Storage, ledger: Ledger) -> Move:
    move = Move()
    rows = Walk((row.key, row.key, row) for row in ledger.objects.rows())
    for info in source.list_data():
        recorded = rows.take(info.key, info.key)
        if any(row.is_of(info) for row in recorded):
            move.num_same += 1
        elif recorded:
            move.num_touched += 1
            if not move.other and all(row.size != info.size for row in recorded):
                move.other = info.key
    move.num_missing = len(rows.rest())
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
    _sort_out(census, container, outputs, lambda key: filed_name(key) in entries)
    census.orphan_records = [entry.key for records in entries.values() for entry in records]


def _sort_out(
    census: Census,
    container: Container,
    outputs: Collection[str],
    was_ours: Callable[[str], bool],
) -> None:
    """Tell orphans from what somebody else has put at the destination."""
    marker = f"/{INTERNAL}"
    nested = {key.partition(marker)[0] + "/" for key in outputs if marker in key}
    for key in outputs:
        if any(key.startswith(other_destination) for other_destination in nested):
            continue
        if was_ours(key):
            census.orphans.append(key)
        else:
            (census.strangers if container.may_belong(key) else census.beside).append(key)
