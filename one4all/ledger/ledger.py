"""What is done: prefix binding, manifests, attempts.

Everything lives below ``_one4all/`` of the destination, as small JSON objects:

    binding.json                       what determines the bytes; created once, compared ever after
    shards/<name>@<version>.json       manifest: this version of this unit is done
    bad/<name>@<version>.json          number of its bad images, if there are any
    attempts/<name>@<version>/<n>-<run>.json   an attempt that is running, or why it failed
    starts/<run>/<worker>              a worker that is loading the protector, or died of it

A *version* is a digest of the source object's ETag and size, so what is done can be told from two
listings, without opening a single manifest, and a changed source is simply another version. The
manifest is the only truth of "done": a unit without one is written again.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator

from pydantic import BaseModel

from one4all.corpus import Unit
from one4all.errors import (
    BindingError,
    ConflictError,
    NotFoundError,
    ShardError,
    SourceChangedError,
    UsageError,
)
from one4all.ledger.records import Binding, Manifest
from one4all.storage import INTERNAL, ObjectInfo, Storage

MAX_ATTEMPTS = 3
_BINDING = f"{INTERNAL}binding.json"
_SHARDS = f"{INTERNAL}shards/"
_BAD = f"{INTERNAL}bad/"
_ATTEMPTS = f"{INTERNAL}attempts/"
_STARTS = f"{INTERNAL}starts/"


class Ledger:
    """The records of one destination."""

    def __init__(self, destination: Storage) -> None:
        self._storage = destination

    def is_bound(self, binding: Binding) -> bool:
        """Whether the destination is bound to this configuration, or may be; writes nothing.

        Raises:
            BindingError: Bound to another configuration, or the prefix holds data that is not ours.
        """
        try:
            bound = self.binding()
        except NotFoundError:
            stranger = next(
                (info for info in self._storage.list() if not info.key.startswith(INTERNAL)), None
            )
            if stranger is not None:
                raise BindingError(
                    f"destination {self._storage.uri} holds {stranger.key!r}, which this program "
                    "did not write; choose an empty prefix"
                ) from None
            return False
        if bound != binding:
            old, new = bound.model_dump(), binding.model_dump()
            changes = [f"{key} {old[key]!r} -> {new[key]!r}" for key in new if old[key] != new[key]]
            raise BindingError(
                f"destination {self._storage.uri} is bound to another configuration "
                f"({'; '.join(changes)}); use the same configuration and version, or another prefix"
            )
        return True

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

    def binding(self) -> Binding:
        """Raises: NotFoundError if the destination was never bound; BindingError if unreadable."""
        data = self._storage.read_bytes(_BINDING)
        try:
            return Binding.model_validate_json(data)
        except ValueError as error:
            raise BindingError(
                f"{self._storage.uri}/{_BINDING} was written by another version of this program; "
                "use another prefix"
            ) from error

    def done(self) -> set[str]:
        """Ids (``name@version``) of the units that have a manifest; one listing."""
        return {
            info.key[len(_SHARDS) :].removesuffix(".json") for info in self._storage.list(_SHARDS)
        }

    def manifest(self, unit: Unit | str) -> Manifest:
        """Of a unit or of its id. Raises: NotFoundError; ShardError if it cannot be read."""
        unit_id = unit if isinstance(unit, str) else unit.id
        data = self._storage.read_bytes(f"{_SHARDS}{unit_id}.json")
        try:
            return Manifest.model_validate_json(data)
        except ValueError as error:
            raise ShardError(f"manifest of {unit_id} cannot be read: {error}") from error

    def manifests(self) -> Iterator[Manifest]:
        """All manifests, in key order."""
        for info, data in self._records(_SHARDS):
            try:
                yield Manifest.model_validate_json(data)
            except ValueError as error:
                raise ShardError(f"manifest {info.key} cannot be read: {error}") from error

    def record(self, manifest: Manifest) -> None:
        """Declare a unit done; the data object must be complete before.

        A lost conditional create means "somebody, maybe this very process before a retry". The
        same input and protector make the same bytes, so normally both manifests agree. Where they
        do not (two runs on different hardware), the manifest must describe the object that stands.
        """
        unit, key = manifest.unit, _manifest_key(manifest.unit)
        if manifest.bad_images:  # before the manifest: what is done must not hide what is bad
            count = json.dumps({"num_bad": len(manifest.bad_images)})
            self._storage.write_bytes(_bad_key(unit), count.encode())
        try:
            self._storage.create(key, _to_json(manifest))
        except ConflictError:
            if _content(self.manifest(unit)) != _content(manifest) and self._stand(manifest):
                self._storage.write_bytes(key, _to_json(manifest))
        self._delete_all(_attempts_prefix(unit))

    def _stand(self, manifest: Manifest) -> bool:
        """Whether the objects of a manifest are those at the destination."""
        return all(self._storage.head(o.key).etag == o.etag for o in manifest.outputs)

    def num_bad_images(self) -> dict[str, int]:
        """Bad images of each done unit that has any, by unit id; reads only those."""
        done = self.done()
        counts = {}
        for info, data in self._records(_BAD):
            unit_id = info.key[len(_BAD) :].removesuffix(".json")
            if unit_id in done:
                counts[unit_id] = int(json.loads(data)["num_bad"])
        return counts

    def begin_attempt(self, unit: Unit, run_id: str) -> int:
        """Record durably that an attempt starts, before a byte of the unit is looked at.

        An attempt of the same run that never reported back has killed its process, and counts.
        One of an earlier run does not: a killed driver or machine is not the unit's fault.
        Manifests of other versions are removed: from now on their bytes may be written over.

        Returns:
            The number of this attempt, from 1. Above ``MAX_ATTEMPTS`` the unit is quarantined and
            must be left alone.
        """
        counted = 0
        for info, data in self._records(_attempts_prefix(unit)):
            attempt = json.loads(data)
            if not attempt["error"] and attempt["run_id"] == run_id:
                attempt["error"] = "the worker process died"
                self._storage.write_bytes(info.key, json.dumps(attempt).encode())
            counted += bool(attempt["error"])
        if counted < MAX_ATTEMPTS:
            self._write_attempt(unit, counted + 1, run_id, error="")
            for prefix in (_SHARDS, _BAD):
                self._delete_all(f"{prefix}{unit.name}@", keep=unit.version)
        return counted + 1

    def fail_attempt(self, unit: Unit, number: int, run_id: str, error: str) -> None:
        """Count an attempt against the unit, with its reason."""
        self._write_attempt(unit, number, run_id, error)

    def withdraw_attempt(self, unit: Unit, number: int, run_id: str) -> None:
        """Forget an attempt that failed through no fault of the unit."""
        self._storage.delete(_attempt_key(unit, number, run_id))

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

    def failures(self) -> dict[str, list[str]]:
        """Reasons of failed attempts, by id of units not done; reads only what has failed."""
        reasons: dict[str, list[str]] = defaultdict(list)
        for info, data in self._records(_ATTEMPTS):
            if error := json.loads(data)["error"]:
                reasons[info.key[len(_ATTEMPTS) :].rpartition("/")[0]].append(error)
        done = self.done() if reasons else set()
        return {unit_id: why for unit_id, why in reasons.items() if unit_id not in done}

    def quarantined(self) -> dict[str, str]:
        """Shards given up after ``MAX_ATTEMPTS`` failures: id to last reason."""
        return {
            unit_id: reasons[-1]
            for unit_id, reasons in self.failures().items()
            if len(reasons) >= MAX_ATTEMPTS
        }

    def _records(self, prefix: str) -> Iterator[tuple[ObjectInfo, bytes]]:
        """Records and their contents; one that another run deletes meanwhile is left out."""
        for info in self._storage.list(prefix):
            try:
                data = self._storage.read_bytes(info.key)
            except (NotFoundError, SourceChangedError):
                continue
            yield info, data

    def _write_attempt(self, unit: Unit, number: int, run_id: str, error: str) -> None:
        attempt = {"run_id": run_id, "error": error}
        self._storage.write_bytes(_attempt_key(unit, number, run_id), json.dumps(attempt).encode())

    def _delete_all(self, prefix: str, *, keep: str = "") -> None:
        for info in self._storage.list(prefix):
            if info.key != f"{prefix}{keep}.json":
                self._storage.delete(info.key)


def read_binding(destination: Storage) -> Binding:
    """The binding of a destination. Raises: UsageError if it never was one."""
    try:
        return Ledger(destination).binding()
    except NotFoundError as error:
        raise UsageError(f"{destination.uri} was not written by one4all protect") from error


def _manifest_key(unit: Unit) -> str:
    return f"{_SHARDS}{unit.id}.json"


def _bad_key(unit: Unit) -> str:
    return f"{_BAD}{unit.id}.json"


def _attempts_prefix(unit: Unit) -> str:
    return f"{_ATTEMPTS}{unit.id}/"


def _attempt_key(unit: Unit, number: int, run_id: str) -> str:
    return f"{_attempts_prefix(unit)}{number}-{run_id}.json"


def _content(manifest: Manifest) -> list[tuple[str, str]]:
    """What the outputs of a manifest hold."""
    return [(output.key, output.sha256) for output in manifest.outputs]


def _to_json(record: BaseModel) -> bytes:
    return record.model_dump_json(indent=1).encode() + b"\n"
