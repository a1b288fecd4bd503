"""What one worker does with a shard: attempt it, record it, tell what became of it.

One worker is one process with the protector loaded once; `shard_rewrite` is what it does to bytes.
"""

from __future__ import annotations

import logging
import resource
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from one4all.corpus.tar import printable
from one4all.corpus.units import SourceShard
from one4all.errors import (
    One4AllError,
    PerturbationError,
    ProtectorError,
    SourceChangedError,
    StorageError,
    UsageError,
)
from one4all.ledger.ledger import MAX_ATTEMPTS, Ledger
from one4all.ledger.records import Manifest
from one4all.protectors.protector import Protector
from one4all.rewrite import STAGES, BadImagePolicyError, protect_shard
from one4all.storage import open_storage
from pipelines import telemetry
from pipelines.protect.config import ProtectConfig

_log = logging.getLogger(__name__)


class ShardWorker:
    """Protects one shard at a time. A Ray Data actor, and a plain object in tests.

    Args:
        config: The run's configuration.
        source_uri, destination_uri: Corpora.
        run_id: Names this run in manifests and attempts.
        protector_sha256: Content hash of the protector that the destination is bound to.
        num_threads: Threads for codecs, and for the device when that is the CPU.
        device: "cpu" or "cuda".
        max_starts: Workers of this run that may be loading, or have died of it, before this one
            gives up; it then answers every shard with "failed".

    Raises:
        ProtectorError: The protector found here is not the one that the destination is bound to.
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
        torch.set_num_threads(num_threads)
        self._config = config
        self._run_id = run_id
        self._source = open_storage(source_uri)
        self._destination = open_storage(destination_uri)
        self._ledger = Ledger(self._destination)
        self._pool = ThreadPoolExecutor(num_threads, "codec")
        self._protector: Protector | None = None
        worker = uuid.uuid4().hex
        if self._ledger.begin_start(run_id, worker) <= max_starts:
            self._protector = _load(config.protector, protector_sha256).to(device)
            self._ledger.end_start(run_id, worker)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Protect the one shard of a Ray Data batch; never raises for what a shard can cause.

        Args:
            batch: Columns ``name``, ``size``, ``etag``, one row each.

        Returns:
            One status row: ``name``, ``status`` (done, failed, refused or quarantined),
            ``num_images``, ``num_bad``, ``num_bytes``, ``num_bytes_written``, seconds of each stage
            (``read_seconds``, ...), ``peak_bytes`` of this process, ``error``.
        """
        shard = SourceShard.from_columns(batch)
        row = self.protect(shard) | {"peak_bytes": _peak_bytes()}
        return {key: [value] for key, value in row.items()}

    def protect(self, shard: SourceShard) -> dict[str, Any]:
        """Attempt one shard; the outcome as a status row."""
        row: dict[str, Any] = {
            "name": shard.name,
            "status": "done",
            "num_images": 0,
            "num_bad": 0,
            "num_bytes": shard.size,
            "num_bytes_written": 0,
            **{f"{stage}_seconds": 0.0 for stage in STAGES},
            "peak_bytes": 0,
            "error": "",
        }
        row |= self._attempt(shard)
        telemetry.count("one4all_shards", status=row["status"])
        return row

    def _attempt(self, shard: SourceShard) -> dict[str, Any]:
        """What an attempt changes in the status row."""
        number = 0
        if self._protector is None:
            return {"status": "failed", "error": "workers die while they load the protector"}
        try:
            attempt = self._ledger.begin_attempt(shard, self._run_id)
            if attempt > MAX_ATTEMPTS:
                return {"status": "quarantined", "error": "quarantined after 3 attempts"}
            number = attempt
            manifest = protect_shard(
                shard,
                self._source,
                self._destination,
                self._protector,
                self._config,
                pool=self._pool,
                run_id=self._run_id,
                on_batch=lambda seconds: telemetry.observe("one4all_batch_seconds", seconds),
            )
            self._ledger.record(manifest)
            return self._tell(manifest)
        except Exception as error:  # one shard must not end the run, whatever is wrong with it
            reason = printable(f"{error}" or type(error).__name__)
            if not isinstance(error, One4AllError):
                reason = f"{type(error).__name__}: {reason}"
            if number:
                self._close_attempt(shard, number, error, reason)
            status = "refused" if isinstance(error, BadImagePolicyError) else "failed"
            telemetry.count("one4all_failures", kind=type(error).__name__)
            return {"status": status, "error": reason}

    def _tell(self, manifest: Manifest) -> dict[str, Any]:
        """A shard that is done: its metrics, and its part of the status row."""
        telemetry.count("one4all_images", manifest.num_protected)
        telemetry.count("one4all_bad_images", len(manifest.bad_images))
        telemetry.count("one4all_bytes_read", manifest.source.size)
        telemetry.count("one4all_bytes_written", manifest.output_size)
        for stage, seconds in manifest.seconds.items():
            telemetry.observe("one4all_stage_seconds", seconds, stage=stage)
        return {
            "num_images": manifest.num_images,
            "num_bad": len(manifest.bad_images),
            "num_bytes_written": manifest.output_size,
            **{f"{stage}_seconds": manifest.seconds.get(stage, 0.0) for stage in STAGES},
        }

    def _close_attempt(
        self, shard: SourceShard, number: int, error: Exception, reason: str
    ) -> None:
        """Count the attempt against the shard, unless the fault lies elsewhere.

        An outage of a store, expired credentials, a full disk or the policy "fail" must not end in
        quarantine: the same shard may be fine tomorrow.
        """
        elsewhere = (
            StorageError,
            UsageError,
            SourceChangedError,
            BadImagePolicyError,
            PerturbationError,
            OSError,
        )
        try:
            if isinstance(error, elsewhere):
                self._ledger.withdraw_attempt(shard, number, self._run_id)
            else:
                self._ledger.fail_attempt(shard, number, self._run_id, reason)
        except (One4AllError, OSError) as problem:
            _log.warning("recording a failed attempt at %s: %s", shard.name, problem)


def _load(protector: str, sha256: str) -> Protector:
    """The protector that the destination is bound to, whatever lies on this node."""
    loaded = Protector.load(protector)
    if loaded.card.content_hash != sha256:
        raise ProtectorError(
            f"protector {protector} changed, or another copy of it lies on this node: "
            f"{loaded.card.content_hash[:12]} instead of {sha256[:12]}"
        )
    return loaded


def _peak_bytes() -> int:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
