"""Protect a corpus: plan, hand units to workers, account for every one.

A unit goes to a worker and its status comes back; pixels never leave the worker. Success is the
ledger held against the source listing, never "nothing was raised".
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice

from one4all.corpus import find_container, is_empty, open_source, what_is_read
from one4all.corpus.sources import read_list
from one4all.encoders.config import precision_of
from one4all.errors import AccessError, One4AllError, StorageError, UsageError
from one4all.image_kinds import IMAGE_EXTENSIONS
from one4all.ledger import (
    MAX_ATTEMPTS,
    Binding,
    Census,
    Lease,
    Ledger,
    compare_places,
    take_census,
)
from one4all.protectors.card import check_protector, locate
from one4all.rewrite import STAGES
from one4all.storage import Storage, conditional_write_defects, open_storage
from pipelines import telemetry
from pipelines.protect.config import ProtectConfig
from pipelines.protect.own_protector import OnFit, own_protector
from pipelines.protect.run_metrics import RunMetrics
from pipelines.protect.run_record import recording
from pipelines.protect.runner import Job, RunWave, open_runner
from pipelines.protect.unit_status import UnitStatus
from pipelines.ray_session import check_cluster, uses_ray
from pipelines.settings import since_seconds

_log = logging.getLogger(__name__)
_shards_log = logging.getLogger("one4all.shards")

# Raise this when the same configuration would write other bytes than before.
TRANSFORM_VERSION = 5  # large photos are seen through reduced copies; float32 on GPUs, too

MAX_REASONS = 20  # of quarantined shards; each is a record to read
MAX_LOOKED_AT = 1000  # objects of a source without shards, to say what is there
_PACKED = tuple(".tgz .tbz .tbz2 .txz .tzst .gz .bz2 .xz .zst .lz4 .zip .7z .rar".split())

OnProgress = Callable[[UnitStatus], None]
OnPlan = Callable[[Census], None]


@dataclass
class ProtectResult:
    """What a run did, and what stands at the destination when it ends.

    Shards are what is counted; of loose images, files are.

    Attributes:
        container: What the corpus is made of.
        noun: Word for what is counted: "shard" or "file".
        num_shards: Shards of the source; only those written since ``config.since``.
        num_done: Of these, protected: they have a manifest.
        num_protected_now: Of these, in this run.
        num_images: Images protected in this run; none that was dropped or passed through.
        num_gray: Of these, gray ones, which hold hardly any of a pattern in colour.
        converted: Of this run: number of images by what had to be changed to protect them.
        num_bad_images: Dropped or passed through, in all done shards, whichever run met them.
        num_failed: Shards without a manifest, but for those given up.
        failed: Of these, with the reason; of loose images, groups.
        quarantined: Shards given up after three failures, with the reason.
        num_others: Objects of the source that are no shards, and were left alone.
        other: The first of them.
        num_older: Shards written before ``config.since``, left out of all of the above.
        num_older_undone: Of these, not protected yet.
        num_damaged: Shards that were done before this run, and their outputs missing or replaced.
        num_orphans: Outputs whose source is gone; those that were pruned do not count.
        orphan: The first of them.
        num_pruned: Outputs that were removed, because their source is gone.
        num_left_out: Shards that ``config.only`` does not name.
        num_absent: Names in it that are not at the source.
        absent: The first of them.
    """

    run_id: str
    container: str = "tar"
    noun: str = "shard"
    num_shards: int = 0
    num_done: int = 0
    num_protected_now: int = 0
    num_images: int = 0
    num_gray: int = 0
    converted: Counter[str] = field(default_factory=Counter)
    num_bad_images: int = 0
    num_failed: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    quarantined: dict[str, str] = field(default_factory=dict)
    num_others: int = 0
    other: str = ""
    num_older: int = 0
    num_older_undone: int = 0
    num_damaged: int = 0
    num_orphans: int = 0
    orphan: str = ""
    num_pruned: int = 0
    num_left_out: int = 0
    num_absent: int = 0
    absent: str = ""

    @property
    def exit_code(self) -> int:
        """0 everything protected; 3 finished but something was dropped or given up; 1 failure."""
        if self.failed:
            return 1
        return 3 if self.quarantined or self.num_bad_images else 0


def protect(
    source_uri: str,
    destination_uri: str,
    config: ProtectConfig,
    *,
    on_plan: OnPlan = lambda census: None,
    on_progress: OnProgress = lambda status: None,
    on_wait: Callable[[str], None] = lambda sentence: None,
    on_fit: OnFit = lambda sentence, num_shards: None,
) -> ProtectResult:
    """Protect every shard of a corpus that is not protected yet.

    Safe to kill, to run again, and to run twice at once: a shard is visible whole or not at all,
    and done only when its manifest stands.

    Args:
        source_uri: Folder or s3:// prefix of ``.tar`` shards, Parquet files or loose images; or a
            pattern, see `open_source`.
        destination_uri: Folder or prefix; bound to this configuration by its first run.
        config: See there.
        on_plan: Called once with what there is, what is done, and what is to do.
        on_progress: Called with what became of each attempt at a unit.
        on_wait: Called with a sentence before waiting for a run that may have died.
        on_fit: Called while a protector of the destination's own is made.

    Raises:
        UsageError: Nothing was protected.
        LeaseHeldError: Another run is at work on the destination, or took it over.
        StalledRunError: Another run holds the destination, and has done nothing for long.
        StorageError: A store failed in mid-run; what is done is done.
    """
    source, destination = open_source(source_uri), open_storage(destination_uri)
    _refuse_overlap(source, destination)
    since = start_of(config)
    if config.protector and config.strength:
        raise UsageError(
            "a strength is for a protector of the destination's own; leave out --strength, or "
            "--protector"
        )
    card = check_protector(config.protector) if config.protector else None
    source.check(writable=False)
    destination.check(writable=True)
    ledger = Ledger(destination)
    bound_to = ledger.bound_to()
    container = find_container(source, config.container or (bound_to.container if bound_to else ""))
    config = config.model_copy(update={"container": container.name})
    if is_empty(source, container):
        kind = container.unit_name if config.container and bound_to else what_is_read()
        raise UsageError(f"source {source.uri} holds no {kind}{_what_is_there(source)}")
    if config.others == "skip" and container.has_units:
        raise UsageError(f"others=skip is for loose images, and {source.uri} is of another kind")
    only = frozenset(read_list(config.only, source)) if config.only else None
    if config.moved_from and bound_to is None:
        raise UsageError(f"--moved-from {config.moved_from}: nothing was protected there yet")
    with ExitStack() as stack:
        if bound_to is None:  # there is nothing to compare with first
            _try_places(destination, config)
        if card is None:
            own = own_protector(source, destination, bound_to, config, stack, on_fit)
            config = config.model_copy(update={"protector": own})
            card = check_protector(own)
        # Workers run in another directory: no relative path reaches them.
        config = config.model_copy(update={"protector": locate(config.protector)})
        binding = Binding(
            source_uri=source.uri,
            container=container.name,
            protector=card.name,
            protector_sha256=card.content_hash,
            encoder_precision=precision_of(config.encoder_backend),
            epsilon_levels=card.epsilon_levels,
            **config.bound,
            transform_version=TRANSFORM_VERSION,
        )
        if config.moved_from:
            _follow_move(source, ledger, binding, config.moved_from)
        if bound_to is not None:
            ledger.is_bound(binding)  # before the probe, which writes
            _try_places(destination, config)
        ledger.bind(binding)
        run_id = uuid.uuid4().hex[:12]
        run = _Run(source, destination, config, binding, ledger, run_id, since, only)
        with recording(run_id, binding, destination, ledger) as record:
            try:
                with run.lease(on_wait):
                    run.sweep()
                    try:
                        result = run.passes(on_plan, record.telling(on_progress))
                        record.conclude(result)
                        return result
                    finally:
                        run.sweep()  # after an interrupt, which kills workers in mid-write
            except AccessError as error:  # the request was fine when it was checked
                raise StorageError(f"{error}; in mid-run: run the same command again") from error


def _try_places(destination: Storage, config: ProtectConfig) -> None:
    """Whether cluster and store keep what is needed of them; before the lease, which must not be
    held by a run that waits."""
    if uses_ray(config.runner, config.ray):
        check_cluster(config.ray)
    _refuse_unsafe_store(destination, allow=config.allow_unsafe_store)


class _Run:
    """One execution: its id, its two sides, its lease."""

    def __init__(
        self,
        source: Storage,
        destination: Storage,
        config: ProtectConfig,
        binding: Binding,
        ledger: Ledger,
        run_id: str,
        since: float | None,
        only: frozenset[str] | None,
    ) -> None:
        self._binding, self._since, self._only = binding, since, only
        self._source, self._destination = source, destination
        self._config, self._ledger, self._run_id = config, ledger, run_id
        self._job = Job(config, source.uri, destination.uri, run_id, binding.protector_sha256)
        self._lease: Lease | None = None

    @contextmanager
    def lease(self, on_wait: Callable[[str], None]) -> Iterator[None]:
        """Hold the destination, unless the configuration says not to."""
        if not self._config.lease_seconds:
            yield
            return
        with Lease(
            self._destination,
            self._run_id,
            seconds=self._config.lease_seconds,
            stalled_seconds=self._config.stalled_seconds,
            on_wait=on_wait,
        ) as self._lease:
            yield

    def passes(self, on_plan: OnPlan, on_progress: OnProgress) -> ProtectResult:
        """Passes over the plan until nothing is left to do or to try again."""
        result = ProtectResult(run_id=self._run_id)
        errors: dict[str, str] = {}
        refused: set[str] = set()
        self._ledger.forget_starts()
        if self._config.retry_quarantined:
            self._ledger.forget_quarantined()
        census, barren_passes = self._census(), 0
        result.container, result.noun = census.container.name, census.container.noun
        result.num_damaged = census.num_damaged
        on_plan(census)
        if _count(census, refused):
            units = len(census.pending)
            with open_runner(self._job, units) as run_wave, telemetry.gauges_kept():
                last_success = self._ledger.last_success()
                metrics = RunMetrics(self._run_id, self._destination.uri, last_success)
                while (num_todo := _count(census, refused)) and barren_passes < MAX_ATTEMPTS:
                    metrics.plan(census)
                    for status in self._waves(run_wave, census, refused):
                        done = status.outcome == "done"
                        metrics.tell(status)
                        if self._config.log_json:
                            _shards_log.info(_log_line(status, self._run_id))
                        on_progress(status)
                        result.num_protected_now += status.num_objects * done
                        result.num_images += status.num_protected
                        result.num_gray += status.num_gray
                        result.converted.update(status.converted)
                        if not done:
                            errors[status.name] = status.error
                        if status.outcome == "refused":
                            refused.add(status.name)
                    # A new census: a unit that changed while it was read is planned anew.
                    census = self._census()
                    barren_passes = 0 if _count(census, refused) < num_todo else barren_passes + 1
        self._account(result, census, errors)
        self._tidy(result, census)
        if not result.failed:
            self._ledger.record_success(self._run_id)
        return result

    def _census(self) -> Census:
        return take_census(
            self._source,
            self._ledger,
            container=self._binding.container,
            since=self._since,
            only=self._only,
        )

    def _account(self, result: ProtectResult, census: Census, errors: dict[str, str]) -> None:
        """Complete the result by what the ledger says, whatever the workers reported."""
        result.num_shards, result.num_done = census.num_units, census.num_done
        result.num_others, result.other = census.num_others, census.other
        result.num_older, result.num_older_undone = census.num_older, census.num_older_undone
        result.num_bad_images = census.num_bad
        result.quarantined = self._ledger.reasons(census.quarantined, limit=MAX_REASONS)
        result.num_left_out = census.num_left_out
        result.num_absent, result.absent = census.num_absent, census.absent
        result.num_failed = census.num_pending
        result.failed = {
            unit.label: errors.get(unit.label) or "no worker reported on it"
            for unit in census.pending
        }

    def _tidy(self, result: ProtectResult, census: Census) -> None:
        """Remove records that say nothing true any more and, if asked to, outputs without source.

        The outputs first: without a record nobody could tell that they are ours.
        """
        self._ledger.remove(census.superseded)
        if not census.container.has_units:
            self._ledger.forget_suspects()
            self._ledger.objects.merge(self._ledger.outputs)
        if self._config.prune:
            self._ledger.remove([*census.orphans, *census.orphan_records])
            result.num_pruned = len(census.orphans)
            return
        result.num_orphans = len(census.orphans)
        result.orphan = next(iter(census.orphans), "")

    def sweep(self) -> None:
        """Remove what killed writers left; a store that forbids it must not stop the run."""
        try:
            # A run that was taken over must not touch the uploads of the one that took over.
            exclusive = self._lease is not None and self._lease.confirm()
            self._destination.sweep(exclusive=exclusive)
        except One4AllError as error:
            _log.warning("left-overs of killed runs could not be removed: %s", error)

    def _waves(
        self, run_wave: RunWave, census: Census, refused: Collection[str]
    ) -> Iterator[UnitStatus]:
        size = self._config.wave_shards
        recorded = {name: entry.key for name, entry in census.damaged.items() if entry}
        for start in range(0, len(census.pending), size):
            wave = [u for u in census.pending[start : start + size] if u.label not in refused]
            if not wave:
                continue
            for status in run_wave([(unit, recorded.get(unit.name, "")) for unit in wave]):
                yield status
                if self._lease is not None:
                    self._lease.check()
                    self._lease.progressed()


def _count(census: Census, refused: Collection[str]) -> int:
    """Units and objects that are pending and were not refused."""
    if not refused:
        return census.num_pending
    return sum(unit.label not in refused for unit in census.pending)


def _follow_move(source: Storage, ledger: Ledger, binding: Binding, moved_from: str) -> None:
    """Bind the destination to the place of the source, if that holds what was protected.

    Raises:
        UsageError: It holds another corpus; or the destination is not bound to the old place.
    """
    bound_to = ledger.binding().source_uri
    if bound_to == source.uri:
        return
    if moved_from != bound_to:  # perhaps it is given relative to this folder
        moved_from = open_source(moved_from).uri
    move = compare_places(source, ledger, binding.container)
    if move.other or (move.num_missing and not move.num_same + move.num_touched):
        found = f"{move.other} has another size" if move.other else "no shard of it is there"
        raise UsageError(f"{source.uri} is not the corpus that was at {bound_to}: {found}")
    ledger.rebind(binding, moved_from=moved_from)
    if move.num_touched or move.num_missing:
        _log.warning(
            "of the shards that were protected from %s, %d are the same at %s, %d have another "
            "modification time or ETag and are protected again, %d are not there",
            *(moved_from, move.num_same, source.uri, move.num_touched, move.num_missing),
        )


def _log_line(status: UnitStatus, run_id: str) -> str:
    """One attempt at one unit, as JSON."""
    line = {
        "run": run_id,
        "name": status.name,
        "status": status.outcome,
        "images": status.num_images,
        "bad_images": status.num_bad,
        "bytes": status.num_bytes,
        "bytes_written": status.num_bytes_written,
        "seconds": {stage: status.seconds.get(stage, 0.0) for stage in STAGES},
        "error": status.error,
        "attempt": status.attempt,
    }
    return json.dumps(line)


def start_of(config: ProtectConfig) -> float | None:
    """``config.since`` as POSIX seconds, counted from now. Raises: UsageError if it is to come."""
    if not config.since:
        return None
    now = time.time()
    since = since_seconds(config.since, now=now)
    if since > now:
        raise UsageError(f"since {config.since} is in the future: nothing could be protected")
    return since


def _what_is_there(source: Storage) -> str:
    """What a source without units holds instead, and what to do about it."""
    for info in islice(source.list_data(), MAX_LOOKED_AT):
        name = info.key.lower()
        if name.endswith(_PACKED):
            return f", but {info.key}; only plain .tar files are read: unpack such files to .tar"
        if name.rpartition(".")[2] in IMAGE_EXTENSIONS:
            return f", but images, such as {info.key}; --container=images reads them"
    other = next(source.list_data(), None)
    return "" if other is None else f", but files such as {other.key}"


def _refuse_unsafe_store(destination: Storage, *, allow: bool) -> None:
    """Probe the destination's conditional writes."""
    defects = conditional_write_defects(destination)
    if not defects:
        return
    found = f"the store of {destination.uri} is not safe for concurrent runs: {'; '.join(defects)}"
    if not allow:
        raise UsageError(f"{found}; use another store, or --set allow_unsafe_store=true")
    _log.warning("%s", found)


def _refuse_overlap(source: Storage, destination: Storage) -> None:
    """Source and destination must not contain one another."""
    inner, outer = source.uri.rstrip("/") + "/", destination.uri.rstrip("/") + "/"
    if inner == outer:
        raise UsageError(f"source and destination are the same: {source.uri}")
    if inner.startswith(outer) or outer.startswith(inner):
        raise UsageError(
            f"source {source.uri} and destination {destination.uri} contain one another; the "
            "next run would take protected shards for new ones"
        )
