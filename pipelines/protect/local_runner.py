"""Waves of a run, worked on by processes of this machine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from one4all.corpus import Unit
from one4all.ledger import MAX_ATTEMPTS
from pipelines.local_machine import share_out
from pipelines.local_pool import LocalPool, Lost
from pipelines.protect.unit_status import UnitStatus
from pipelines.protect.worker import ProtectWorker

if TYPE_CHECKING:
    from pipelines.protect.runner import Job, RunWave, Wave


@contextmanager
def local_runner(job: Job, *, num_units: int, max_dead_starts: int) -> Iterator[RunWave]:
    """Runs waves in processes that start with the first one, and stay for all.

    Raises:
        UsageError: This machine does not hold one worker.
        One4AllError: No worker can start; raised in a wave.
    """
    config = job.config
    shares = share_out(
        config.num_workers,
        config.cpus_per_worker,
        config.gpus_per_worker,
        num_cpus=config.ray.num_cpus,
        num_tasks=num_units,
    )
    # Starts that end in death are counted by the pool, which sees also those before the first line.
    make = job.worker(cpus=shares[0].cpus, gpus=shares[0].gpus, max_starts=sys.maxsize)
    pool: LocalPool[tuple[Unit, str], UnitStatus] = LocalPool(
        partial(_start, make),
        [share.environment for share in shares],
        max_deaths=MAX_ATTEMPTS + 1,  # one more than the ledger, which gives its units up itself
        max_dead_starts=max_dead_starts,
    )

    def run_wave(wave: Wave) -> Iterator[UnitStatus]:
        for (unit, _), status in pool.run(wave):
            if isinstance(status, Lost):
                status = UnitStatus.of(unit, "failed", status.reason)
            yield status

    with pool:
        yield run_wave


def _start(make: Callable[[], ProtectWorker]) -> Callable[[tuple[Unit, str]], UnitStatus]:
    worker = make()
    return lambda task: worker.protect(task[0], recorded=task[1])
