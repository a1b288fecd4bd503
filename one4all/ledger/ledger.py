"""What is done: prefix binding, manifests, attempts.

Everything lives below ``_one4all/`` of the destination, as small objects:

    binding.json                    what determines the bytes; created once, compared ever after
    shards/<id>-<outputs>-<bad>.json   manifest: this version of this unit was written like this
    attempts/<id>/<n>-<run>.running    an attempt that is at work, or was when its run died
    attempts/<id>/<n>-<run>.killed     one that a later run found like that
    attempts/<id>/<n>-<run>.failed     one that failed; its content is the reason
    objects/<digest>.parquet        what became of loose objects, see `objects`; no manifests then
    groups/<version>-<run>.json     loose objects that are at work together, or were
    starts/<run>/<worker>           a worker that is loading the protector, or died of it
    last-success.json               the last run that left nothing to do

The name of a manifest says it all: *id* is ``<name>@<version>``, the version a digest of ETag and
size of the source, *outputs* one of keys, sizes and ETags of what was written, *bad* the number of
images that could not be protected. A unit is done if a manifest says that what stands at the
destination was made from what stands at the source. So what is done is told from listings, without
opening a record, and no writer can make it untrue unnoticed, whenever it wakes and whatever it
writes over: then the names no longer agree, and the unit is written again.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property

from pydantic import BaseModel

from one4all.corpus import CONTAINERS, OutputObject, Unit, is_group
from one4all.errors import (
    BindingError,
    ConflictError,
    NotFoundError,
    ShardError,
    SourceChangedError,
    UsageError,
)
from one4all.ledger.objects import ObjectRecords
from one4all.ledger.records import Binding, Manifest
from one4all.storage import INTERNAL, ObjectInfo, Storage

MAX_ATTEMPTS = 3  # that failed, or killed their worker
_READERS = 16
_MAX_SUSPECTS = 64  # groups
MAX_KILLED = 10  # that were under way when their whole run was killed
_BINDING = f"{INTERNAL}binding.json"
_SHARDS = f"{INTERNAL}shards/"
_ATTEMPTS = f"{INTERNAL}attempts/"
_STARTS = f"{INTERNAL}starts/"
_GROUPS = f"{INTERNAL}groups/"
_LAST_SUCCESS = f"{INTERNAL}last-success.json"
_DIGEST = "[0-9a-f]{16}"
_ENTRY = re.compile(
    rf"{_SHARDS}(.+)@({_DIGEST})(?:-({_DIGEST})-([0-9]+))?\.json", re.DOTALL | re.ASCII
)


@dataclass(frozen=True, slots=True)
class Entry:
    """What the name of a manifest says.

    Attributes:
        key: Key of the manifest.
        name: Filed name of the unit, see `Unit.filed_name`.
        version: Version of the unit that was read.
        outputs: Digest of what was written, see `digest_of`; "" in manifests of older programs.
        num_bad: Images of it that could not be protected; 0 in manifests of older programs.
    """

    key: str
    name: str
    version: str
    outputs: str = ""
    num_bad: int = 0

    @classmethod
    def of_key(cls, key: str) -> Entry | None:
        """From the key of a manifest; None if it is none."""
        found = _ENTRY.fullmatch(key)
        if found is None:
            return None
        name, version, outputs, num_bad = found.groups()
        return cls(key, name, version, outputs or "", int(num_bad or 0))

    @staticmethod
    def key_behind(name: str) -> str:
        """A key behind those of all entries of a filed name."""
        return f"{_SHARDS}{name}@g"

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> Entry:
        """The entry that a manifest is filed under."""
        unit, outputs = manifest.unit, digest_of(manifest.outputs)
        num_bad = len(manifest.bad_images)
        key = f"{_SHARDS}{unit.id}-{outputs}-{num_bad}.json"
        return cls(key, unit.filed_name, unit.version, outputs, num_bad)


@dataclass
class Attempts:
    """Attempts at one version of one unit that did not succeed.

    Attributes:
        failed: Keys of the records of those that failed, or killed their worker.
        num_killed: Those that were under way when their whole run was killed.
    """

    failed: list[str] = field(default_factory=list)
    num_killed: int = 0

    def add(self, key: str) -> None:
        """Count the attempt of a record; one that is under way does not count."""
        if key.endswith(".failed") and key not in self.failed:
            self.failed.append(key)
        self.num_killed += key.endswith(".killed")

    @property
    def given_up(self) -> bool:
        """Whether the unit is quarantined: it is not tried again."""
        return len(self.failed) >= MAX_ATTEMPTS or self.num_killed >= MAX_KILLED


class Ledger:
    """The records of one destination."""

    def __init__(self, destination: Storage) -> None:
        self._storage = destination

    @property
    def storage(self) -> Storage:
        """The destination."""
        return self._storage

    @cached_property
    def objects(self) -> ObjectRecords:
        """Records of objects that are worked on in groups."""
        return ObjectRecords(self._storage)

    def is_bound(self, binding: Binding) -> bool:
        """Whether the destination is bound to this configuration, or may be; writes nothing.

        Raises:
            BindingError: Bound to another configuration, or the prefix holds data that is not ours.
        """
        bound = self.bound_to()
        if bound is None:
            return False
        if bound != binding:
            old, new = bound.model_dump(), binding.model_dump()
            changed = [key for key in new if old[key] != new[key]]
            changes = [f"{key} {old[key]!r} -> {new[key]!r}" for key in changed]
            advice = "use the same configuration and version, or another prefix"
            if changed == ["source_uri"]:
                advice = f"if it is the same corpus, moved: protect --moved-from {bound.source_uri}"
            if changed == ["encoder_precision"]:
                named = bound.encoder_precision
                backend = "auto" if named == "float32" else named
                advice = f"use --set encoder_backend={backend}, or another prefix"
            raise BindingError(
                f"destination {self._storage.uri} is bound to another configuration "
                f"({'; '.join(changes)}); {advice}"
            )
        return True

    def bound_to(self) -> Binding | None:
        """What the destination is bound to; None if it may be bound yet.

        Raises:
            BindingError: The prefix holds data that is not ours.
        """
        try:
            return self.binding()
        except NotFoundError:
            stranger = next(self._storage.list_data(), None)
        if stranger is not None:
            raise BindingError(
                f"destination {self._storage.uri} holds {stranger.key!r}, which this program did "
                "not write; choose an empty prefix"
            )
        return None

    def bind(self, binding: Binding) -> None:
        """Bind the destination, or check that it is bound to the same configuration.

        Raises:
            BindingError: See `is_bound`.
        """
        if not self.is_bound(binding):
            try:
                self._storage.create(_BINDING, _to_json(binding))
            except ConflictError:  # another run was faster, or our answer was lost
                self.is_bound(binding)

    def rebind(self, binding: Binding, *, moved_from: str) -> None:
        """Bind the destination to the place that its source was moved to.

        Args:
            binding: What it is bound to, but for ``source_uri``.
            moved_from: The ``source_uri`` that it is bound to.

        Raises:
            NotFoundError: It was never bound.
            BindingError: Bound to another source, or to another configuration.
        """
        etag = self._storage.head(_BINDING).etag  # first, so that a change is noticed
        if self.binding() == binding:
            return
        self.is_bound(binding.model_copy(update={"source_uri": moved_from}))
        try:
            self._storage.replace(_BINDING, _to_json(binding), etag=etag)
        except ConflictError:  # another run was faster, or our answer was lost
            self.is_bound(binding)

    def binding(self) -> Binding:
        """Raises: NotFoundError if the destination was never bound; BindingError if unreadable."""
        data = self._storage.read_bytes(_BINDING)
        try:
            return Binding.model_validate(json.loads(data))
        except ValueError as error:
            raise BindingError(
                f"{self._storage.uri}/{_BINDING} was written by another version of this program; "
                "use another prefix"
            ) from error

    def outputs(self) -> Iterator[ObjectInfo]:
        """Data of the destination, in key order; one listing."""
        return self._storage.list_data()

    def entries(self) -> Iterator[Entry]:
        """What the manifests say by their names, in key order; one listing."""
        found = (Entry.of_key(info.key) for info in self._storage.list(_SHARDS))
        return (entry for entry in found if entry is not None)

    def manifest(self, entry: Entry | str) -> Manifest:
        """Of an entry or its key. Raises: NotFoundError; ShardError if it cannot be read."""
        key = entry if isinstance(entry, str) else entry.key
        data = self._storage.read_bytes(key)
        try:
            return Manifest.model_validate(json.loads(data))
        except ValueError as error:
            raise ShardError(f"manifest {key} cannot be read: {error}") from error

    def manifests(self) -> Iterator[Manifest]:
        """All manifests, in key order; one that is deleted meanwhile is left out."""
        for entry in self.entries():
            try:
                yield self.manifest(entry)
            except (NotFoundError, SourceChangedError):
                continue

    def record(self, manifest: Manifest) -> None:
        """Declare what was written; the data must be complete before.

        If the record is there already, its name says the same: somebody was faster, perhaps this
        very process before a retry.
        """
        if not CONTAINERS[manifest.container].has_units:
            self.objects.add(manifest)
        else:
            with suppress(ConflictError):
                self._storage.create(Entry.of_manifest(manifest).key, _to_json(manifest))
        if not is_group(manifest.unit):
            self._delete_all(_attempts_prefix(manifest.unit))

    def restate(self, key: str) -> Manifest | None:
        """Record anew what stands under other ETags, such as a destination that was copied.

        Args:
            key: Key of a manifest whose outputs have changed by their ETags.

        Returns:
            The new manifest, recorded; None if the bytes are not those of the old one.
        """
        try:
            manifest = self.manifest(key)
            standing = [self._restated(output) for output in manifest.outputs]
        except (NotFoundError, SourceChangedError, ShardError):
            return None
        outputs = tuple(output for output in standing if output is not None)
        if len(outputs) < len(standing):
            return None
        restated = manifest.model_copy(update={"outputs": outputs})
        self.record(restated)
        return restated

    def _restated(self, output: OutputObject) -> OutputObject | None:
        """An output as it stands, if its bytes are still the same."""
        info = self._storage.head(output.key)
        if info.size != output.size:
            return None
        sha256 = hashlib.sha256()
        with closing(self._storage.open(output.key, etag=info.etag)) as reader:
            while part := reader.read(1 << 20):
                sha256.update(part)
        return replace(output, etag=info.etag) if sha256.hexdigest() == output.sha256 else None

    def remove(self, keys: Iterable[str]) -> None:
        """Delete records or outputs; no error if one is gone."""
        for key in keys:
            self._storage.delete(key)

    def begin_attempt(self, unit: Unit, run_id: str) -> int:
        """Record durably that an attempt starts, before a byte of the unit is looked at.

        An attempt of the same run that never reported back has killed its process: it failed. One
        of an earlier run was under way when that run was killed, which may be the fault of the
        machine, and counts for less: a unit that stalls every run that meets it is given up, too.

        Returns:
            The number of this attempt, from 1. Above ``MAX_ATTEMPTS`` the unit is quarantined and
            must be left alone.
        """
        before = Attempts()
        for info in list(self._storage.list(_attempts_prefix(unit))):
            stem, _, state = info.key.rpartition(".")
            if state == "running":
                died = stem.endswith(f"-{run_id}")
                state, reason = ("failed", b"the worker process died") if died else ("killed", b"")
                self._storage.write_bytes(f"{stem}.{state}", reason)
                self._storage.delete(info.key)
            before.add(f"{stem}.{state}")
        if before.given_up:
            return MAX_ATTEMPTS + 1
        number = len(before.failed) + 1
        self._storage.write_bytes(_attempt_key(unit, number, run_id, "running"), b"")
        return number

    def fail_attempt(self, unit: Unit, number: int, run_id: str, error: str) -> None:
        """Count an attempt against the unit, with its reason."""
        reason = error.encode("utf-8", "replace")
        self._storage.write_bytes(_attempt_key(unit, number, run_id, "failed"), reason)
        self.withdraw_attempt(unit, number, run_id)

    def withdraw_attempt(self, unit: Unit, number: int, run_id: str) -> None:
        """Forget an attempt that failed through no fault of the unit."""
        self._storage.delete(_attempt_key(unit, number, run_id, "running"))

    def begin_group(self, unit: Unit, run_id: str) -> str:
        """Record durably that an attempt at a group of objects starts.

        Objects of a group that was not finished are suspects, and are tried one by one from then
        on: so one that kills its process or stalls it spoils no other, and is the one to be given
        up.

        Returns:
            Key of the record, for `end_group`; "" if this run has begun the group before, and died.
        """
        key = f"{_GROUPS}{unit.version}-{run_id}.json"
        keys = [part.key for part in unit.objects]
        try:
            self._storage.create(key, json.dumps(keys).encode())
        except ConflictError:
            return ""
        return key

    def end_group(self, key: str) -> None:
        """Forget the attempt at a group: it succeeded, or failed through no fault of the group."""
        self._storage.delete(key)

    def suspects(self) -> set[str]:
        """Keys of objects of groups that were begun and not finished.

        None if these are many: no object is to blame where a disk is full, or a store is down.
        """
        found: set[str] = set()
        begun = list(self._storage.list(_GROUPS))
        for info in begun if len(begun) <= _MAX_SUSPECTS else ():
            with suppress(NotFoundError, SourceChangedError):
                found.update(json.loads(self._storage.read_bytes(info.key)))
        return found

    def forget_suspects(self) -> None:
        """Forget all groups: what is wrong with one of their objects is recorded by now."""
        self._delete_all(_GROUPS)

    def begin_start(self, run_id: str, worker: str) -> int:
        """Record that a worker begins to load; returns how many of the run are doing so, or died.

        Ray starts a dead worker again without end. Those that die before they take a unit are
        counted here, since there is no unit to count them against.
        """
        self._storage.write_bytes(f"{_STARTS}{run_id}/{worker}", b"")
        return sum(1 for _ in self._storage.list(f"{_STARTS}{run_id}/"))

    def end_start(self, run_id: str, worker: str) -> None:
        """The worker lives."""
        self._storage.delete(f"{_STARTS}{run_id}/{worker}")

    def forget_starts(self) -> None:
        """Remove what dead workers of all runs left."""
        self._delete_all(_STARTS)

    def attempts(self) -> dict[str, Attempts]:
        """Attempts that did not succeed, by unit id; one listing."""
        found: defaultdict[str, Attempts] = defaultdict(Attempts)
        for info in self._storage.list(_ATTEMPTS):
            found[info.key[len(_ATTEMPTS) :].rpartition("/")[0]].add(info.key)
        return found

    def forget_quarantined(self) -> None:
        """Forget the attempts at units that were given up, so that they are tried again."""
        for unit_id, tried in self.attempts().items():
            if tried.given_up:
                self._delete_all(f"{_ATTEMPTS}{unit_id}/")

    def reasons(self, tried: Mapping[str, Attempts], *, limit: int | None = None) -> dict[str, str]:
        """Why the last attempt at each unit did not succeed; reads a record for each.

        Args:
            tried: Unit name to attempts.
            limit: Records to read at most; the other reasons are left to be looked up.
        """
        with ThreadPoolExecutor(_READERS, "reasons") as pool:
            names = list(tried)
            found = pool.map(self._reason, [tried[name] for name in names[:limit]])
            return dict.fromkeys(names, "see one4all status") | dict(
                zip(names, found, strict=False)
            )

    def _reason(self, attempts: Attempts) -> str:
        """Why the last attempt did not succeed; reads one record at most."""
        if not attempts.failed:
            return f"its run was killed while at work on it, {attempts.num_killed} times"
        try:
            return self._storage.read_bytes(attempts.failed[-1]).decode("utf-8", "replace")
        except (NotFoundError, SourceChangedError):
            return "unknown"

    def record_success(self, run_id: str) -> None:
        """Note that a run left nothing to do."""
        note = {"run_id": run_id, "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        self._storage.write_bytes(_LAST_SUCCESS, json.dumps(note).encode())

    def last_success(self) -> float | None:
        """POSIX seconds, by the store's clock, of the last run that left nothing to do, if any."""
        try:
            return self._storage.head(_LAST_SUCCESS).modified
        except NotFoundError:
            return None

    def _delete_all(self, prefix: str) -> None:
        self.remove([info.key for info in self._storage.list(prefix)])


def read_binding(destination: Storage) -> Binding:
    """The binding of a destination. Raises: UsageError if it never was one."""
    try:
        return Ledger(destination).binding()
    except NotFoundError as error:
        raise UsageError(f"{destination.uri} was not written by one4all protect") from error


def digest_of(outputs: Sequence[ObjectInfo | OutputObject]) -> str:
    """Digest of keys, sizes and ETags of what was written, or of what stands, in any order."""
    # Ceph's listings and answers do not agree about the quotes.
    lines = sorted(f"{o.size} {o.etag.strip(chr(34))} {o.key}" for o in outputs)
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _attempts_prefix(unit: Unit) -> str:
    return f"{_ATTEMPTS}{unit.id}/"


def _attempt_key(unit: Unit, number: int, run_id: str, state: str) -> str:
    return f"{_attempts_prefix(unit)}{number}-{run_id}.{state}"


def _to_json(record: BaseModel) -> bytes:
    # Not pydantic's own, which cannot write a file name that is no UTF-8.
    return json.dumps(record.model_dump(), indent=1).encode() + b"\n"
