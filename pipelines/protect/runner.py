"""Where the units of a run are worked on: in processes of this machine, or on a cluster by Ray.

Both keep the same promises. A unit whose worker dies is tried again, each attempt being on record
before it begins; what no worker could report on is planned again from the ledger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from one4all.corpus import Unit
from pipelines.protect.config import ProtectConfig
from pipelines.protect.unit_status import UnitStatus
from pipelines.protect.worker import ProtectWorker
from pipelines.ray_session import uses_ray

MAX_DEAD_STARTS = 5  # workers of one run that may die while they load the protector

Wave = Sequence[tuple[Unit, str]]
"""Units, each with the key of a manifest that may be restated, see `ProtectWorker.protect`."""

RunWave = Callable[[Wave], Iterator[UnitStatus]]
"""Attempts each unit of a wave; statuses come in no order, and one may not come at all."""


@dataclass(frozen=True)
class Job:
    """What all workers of a run are made of.

    Attributes:
        protector_sha256: Of the binding: whatever lies at the protector's place by now, no worker
            writes with another one.
    """

    config: ProtectConfig
    source_uri: str
    destination_uri: str
    run_id: str
    protector_sha256: str

    def worker(self, *, cpus: int, gpus: float, max_starts: int) -> Callable[[], ProtectWorker]:
        """What makes one, in a process that has so many CPUs and GPUs; see `ProtectWorker`."""
        return partial(
            ProtectWorker,
            self.config,
            self.source_uri,
            self.destination_uri,
            self.run_id,
            protector_sha256=self.protector_sha256,
            num_threads=cpus,
            device="cuda" if gpus else "cpu",
            max_starts=max_starts,
        )


@contextmanager
def open_runner(job: Job, num_units: int) -> Iterator[RunWave]:
    """What runs the waves of a run, by what its configuration says.

    Args:
        job: What to do.
        num_units: So many will come, at first: with few, workers are large.

    Raises:
        UsageError: There is no room for a worker.
    """
    if uses_ray(job.config.runner, job.config.ray):
        from pipelines.protect.ray_runner import ray_runner as chosen
    else:
        from pipelines.protect.local_runner import local_runner as chosen
    with chosen(job, num_units=num_units, max_dead_starts=MAX_DEAD_STARTS) as run_wave:
        yield run_wave
