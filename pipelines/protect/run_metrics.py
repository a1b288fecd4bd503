"""What a run of protect tells Prometheus, from its driver: all that its workers report to it."""

from __future__ import annotations

import time
from typing import get_args

from one4all import errors
from one4all.ledger import MAX_ATTEMPTS, Census
from one4all.rewrite import STAGES
from pipelines import telemetry
from pipelines.protect.unit_status import Outcome, UnitStatus

OTHER = "other"
# Of failed attempts; each is a series that begins at 0, so their number is kept.
KINDS = sorted(
    {
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.One4AllError)
    }
    | {"BadImagePolicyError", "MemoryError", "OSError", OTHER}
)
# Of shards that are done: the metric, and the field of a status that it sums up.
_COUNTED = {
    "one4all_images": "num_protected",
    "one4all_bad_images": "num_bad",
    "one4all_bytes_read": "num_bytes",
    "one4all_bytes_written": "num_bytes_written",
    "one4all_batches": "num_batches",
}


class RunMetrics:
    """The metrics of one run, within a Ray session.

    Args:
        run_id: Of this run.
        destination_uri: What it writes to.
        last_success: When a run last left nothing to do there, in POSIX seconds; None if none did.
    """

    def __init__(self, run_id: str, destination_uri: str, last_success: float | None) -> None:
        self._run = {"run": run_id, "destination": destination_uri}
        self._destination = {"destination": destination_uri}
        self._num_pending = 0
        for name in _COUNTED:
            telemetry.begin(name, **self._run)
        for status in get_args(Outcome):
            telemetry.begin("one4all_shards", status=status, **self._run)
        for kind in KINDS:
            telemetry.begin("one4all_failures", kind=kind, **self._run)
        for stage in STAGES:
            telemetry.begin("one4all_stage_seconds", stage=stage, **self._run)
        if last_success is not None:
            name = "one4all_last_success_timestamp_seconds"
            telemetry.show(name, last_success, **self._destination)

    def plan(self, census: Census) -> None:
        """Show what is to do."""
        self._num_pending = census.num_pending
        telemetry.show("one4all_pending_shards", self._num_pending, **self._run)
        oldest = time.time() if census.oldest_pending is None else census.oldest_pending
        telemetry.show("one4all_oldest_pending_timestamp_seconds", oldest, **self._destination)

    def tell(self, status: UnitStatus) -> None:
        """Count an attempt."""
        telemetry.count("one4all_shards", status.num_objects, status=status.outcome, **self._run)
        given_up = status.outcome == "quarantined" or status.attempt >= MAX_ATTEMPTS
        is_over = given_up or status.outcome in ("done", "restated")
        self._num_pending -= status.num_objects * is_over
        telemetry.show("one4all_pending_shards", self._num_pending, **self._run)
        if status.error_kind:
            kind = status.error_kind if status.error_kind in KINDS else OTHER
            telemetry.count("one4all_failures", kind=kind, **self._run)
        if status.outcome != "done":
            return
        for name, field in _COUNTED.items():
            telemetry.count(name, getattr(status, field), **self._run)
        for stage, seconds in status.seconds.items():
            telemetry.count("one4all_stage_seconds", seconds, stage=stage, **self._run)
            telemetry.observe("one4all_shard_seconds", seconds, stage=stage, **self._run)
