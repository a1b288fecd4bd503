"""What one worker does with a unit: attempt it, record it, tell what became of it.

One worker is one process with the protector loaded once; `one4all.rewrite` handles the bytes. The
driver, too, imports this, to say what a worker is made of: PyTorch is imported where one is made.
"""

from __future__ import annotations

import logging
import resource
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from one4all.corpus import Unit, is_group, open_source, printable
from one4all.errors import (
    One4AllError,
    PerturbationError,
    ProtectorError,
    SourceChangedError,
    StorageError,
    UsageError,
)
from one4all.ledger import MAX_ATTEMPTS, Ledger
from one4all.rewrite import BadImagePolicyError, rewrite_unit
from one4all.storage import open_storage
from pipelines.protect.config import ProtectConfig
from pipelines.protect.cpu_limit import CpuLimit
from pipelines.protect.unit_status import Outcome, UnitStatus

if TYPE_CHECKING:
    from one4all.protectors.protector import Protector

_log = logging.getLogger(__name__)

_NO_PROTECTOR = "workers die while they load the protector"
# Faults that are not of the unit: it may be fine tomorrow.
_ELSEWHERE = (StorageError, UsageError, SourceChangedError, PerturbationError, OSError)


class ProtectWorker:
    """Protects one unit at a time, in a process of its own; a plain object in tests.

    Attributes:
        encoder: What computes its embeddings, and how precisely.

    Args:
        config: The run's configuration.
        source_uri, destination_uri: Corpora.
        run_id: Names this run in manifests and attempts.
        protector_sha256: Content hash of the protector that the destination is bound to.
        num_threads: Threads for codecs, and for the device when that is the CPU.
        device: "cpu" or "cuda".
        max_starts: Workers of this run that may be loading, or have died of it, before this one
            gives up; it then answers every unit with "failed".

    Raises:
        ProtectorError: The protector found here is not the one that the destination is bound to.
        ConfigError, UsageError: The encoder backend of the configuration cannot be had here.
    """

    def __init__(
        self,
        config: ProtectConfig,
        source_uri: str,
        destination_uri: str,
        run_id: str,
        *,
        protector_sha256: str,
        num_threads: int,
        device: str = "cpu",
        max_starts: int = 1,
    ) -> None:
        import torch

        torch.set_num_threads(num_threads)
        self._config = config
        self._run_id = run_id
        self._source = open_source(source_uri)
        self._destination = open_storage(destination_uri)
        self._ledger = Ledger(self._destination)
        self._pool = ThreadPoolExecutor(num_threads, "codec")
        self._protector: Protector | None = None
        self.encoder = ""
        worker = uuid.uuid4().hex
        if self._ledger.begin_start(run_id, worker) <= max_starts:
            protector = _load(config, protector_sha256).to(device)
            self.encoder = protector.backend.label  # loads it, before a unit's time counts
            self._protector = protector
            self._ledger.end_start(run_id, worker)

    def protect(self, unit: Unit, *, recorded: str = "") -> UnitStatus:
        """Attempt one unit, and say what became of it; never raises for what a unit can cause.

        Args:
            unit: What to protect.
            recorded: Key of a manifest that calls it done, though other outputs seem to stand.
        """
        with CpuLimit(self._config.max_step_cpu_seconds) as limit:
            status = self._attempt(unit, recorded, limit)
        return replace(status, peak_bytes=_peak_bytes(), encoder=self.encoder)

    def _attempt(self, unit: Unit, recorded: str, limit: CpuLimit) -> UnitStatus:
        if is_group(unit):
            return self._attempt_group(unit, limit)
        status = UnitStatus.of(unit)
        if self._protector is None:
            return replace(status, outcome="failed", error=_NO_PROTECTOR)
        number = 0
        try:
            attempt = self._ledger.begin_attempt(unit, self._run_id)
            if attempt > MAX_ATTEMPTS:
                reason = f"quarantined after {MAX_ATTEMPTS} attempts"
                return replace(status, outcome="quarantined", error=reason)
            number = attempt
            if recorded and self._ledger.restate(recorded) is not None:
                return replace(status, outcome="restated")
            status = self._rewrite(unit, limit, status)
        except Exception as error:  # one unit must not end the run, whatever is wrong with it
            if number and self._close_attempt(unit, number, error, _reason(error)):
                status = replace(status, attempt=number)
            refused = isinstance(error, BadImagePolicyError)
            return _failed(status, error, outcome="refused" if refused else "failed")
        return status

    def _attempt_group(self, unit: Unit, limit: CpuLimit) -> UnitStatus:
        """Attempt loose objects together; what spoils the attempt is found one by one, later."""
        status = UnitStatus.of(unit)
        if self._protector is None:
            return replace(status, outcome="failed", error=_NO_PROTECTOR)
        record = ""
        try:
            record = self._ledger.begin_group(unit, self._run_id)
            if not record:
                return replace(status, outcome="failed", error="the worker process died")
            status = self._rewrite(unit, limit, status)
            self._ledger.end_group(record)
        except Exception as error:  # as above
            # Of one of its objects, perhaps: archived, not ours to read, without a name on a disk.
            if record and isinstance(error, SourceChangedError | PerturbationError):
                with suppress(One4AllError, OSError):
                    self._ledger.end_group(record)
            return _failed(status, error)
        return status

    def _rewrite(self, unit: Unit, limit: CpuLimit, status: UnitStatus) -> UnitStatus:
        """Write and record a unit."""
        assert self._protector is not None
        batches: list[float] = []
        manifest = rewrite_unit(
            unit,
            self._source,
            self._destination,
            self._protector,
            self._config,
            pool=self._pool,
            run_id=self._run_id,
            on_batch=batches.append,
            on_step=limit.next_step,
        )
        if not manifest.source:
            raise SourceChangedError("gone, or replaced, since it was listed")
        self._ledger.record(manifest)
        return replace(
            status,
            num_objects=len(manifest.source) if is_group(unit) else 1,
            num_images=manifest.num_images,
            num_bad=len(manifest.bad_images),
            num_protected=manifest.num_protected,
            num_batches=len(batches),
            num_gray=manifest.num_gray,
            converted=manifest.converted,
            num_bytes_written=manifest.output_size,
            seconds=manifest.seconds,
        )

    def _close_attempt(self, unit: Unit, number: int, error: Exception, reason: str) -> bool:
        """Count the attempt against the unit, unless the fault lies elsewhere; whether it counts.

        An outage of a store, expired credentials, a full disk or the policy "fail" must not end in
        quarantine: the same unit may be fine tomorrow.
        """
        counts = not isinstance(error, (*_ELSEWHERE, BadImagePolicyError))
        try:
            if not counts:
                self._ledger.withdraw_attempt(unit, number, self._run_id)
            else:
                self._ledger.fail_attempt(unit, number, self._run_id, reason)
        except (One4AllError, OSError) as problem:
            _log.warning("recording a failed attempt at %s: %s", unit.name, problem)
        return counts


def _failed(status: UnitStatus, error: Exception, *, outcome: Outcome = "failed") -> UnitStatus:
    """The status of an attempt that ended with an error."""
    kind = type(error).__name__
    return replace(status, outcome=outcome, error=_reason(error), error_kind=kind)


def _reason(error: Exception) -> str:
    """Why an attempt failed, in a line."""
    reason = printable(f"{error}" or type(error).__name__)
    return reason if isinstance(error, One4AllError) else f"{type(error).__name__}: {reason}"


def _load(config: ProtectConfig, sha256: str) -> Protector:
    """The protector that the destination is bound to, whatever lies on this node."""
    from one4all.protectors.protector import Protector

    loaded = Protector.load(config.protector, encoder_backend=config.encoder_backend)
    if loaded.card.content_hash != sha256:
        raise ProtectorError(
            f"protector {config.protector} changed, or another copy of it lies on this node: "
            f"{loaded.card.content_hash[:12]} instead of {sha256[:12]}"
        )
    return loaded


def _peak_bytes() -> int:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
