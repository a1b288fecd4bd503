"""Waves of a run, worked on by the nodes of a Ray cluster, through Ray Data.

One unit is one row, one block, one actor call. Ray carries a unit in and its status out; pixels
never leave the worker.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from one4all.corpus import Unit
from pipelines.placement import await_room, watched_start
from pipelines.protect.unit_status import UnitStatus
from pipelines.ray_session import ray_session, worker_layout

if TYPE_CHECKING:
    from pipelines.protect.runner import Job, RunWave, Wave

_log = logging.getLogger(__name__)

MAX_GROWTH = 16  # times the workers that a wave begins with, as nodes join
_ACTOR = "ProtectWorker"


@contextmanager
def ray_runner(job: Job, *, num_units: int, max_dead_starts: int) -> Iterator[RunWave]:
    """Runs waves within a Ray session, each by one execution of Ray Data with actors of its own.

    Raises:
        UsageError: No node could ever hold a worker.
    """
    with ray_session(job.config.ray):
        yield lambda wave: _run_wave(wave, job, num_units, max_dead_starts)


def _run_wave(wave: Wave, job: Job, num_units: int, max_dead_starts: int) -> Iterator[UnitStatus]:
    import ray
    from ray.data import ActorPoolStrategy
    from ray.exceptions import RayError

    config = job.config
    num_workers, cpus, gpus = worker_layout(
        config.num_workers,
        config.cpus_per_worker,
        config.gpus_per_worker,
        num_tasks=num_units,
    )
    await_room(config.ray, cpus=cpus, gpus=gpus)
    # A number that is not given grows with the cluster.
    most_workers = min(config.num_workers or MAX_GROWTH * num_workers, len(wave))
    # Ray restarts a dead actor and retries its unit without end, and offers no bound. Ours are
    # durable: attempts at a unit, and starts of workers that never came to look at one.
    max_starts = max(num_workers, most_workers) + max_dead_starts
    make = job.worker(cpus=cpus, gpus=gpus, max_starts=max_starts)

    class Worker:
        # Arguments are bound here because Ray prints a warning, in C++, about restartable actors
        # whose constructor takes any.
        def __init__(self) -> None:
            self._worker = make()

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            unit = Unit.from_json(str(batch["unit"][0]))
            return {"status": [self._worker.protect(unit, recorded=str(batch["recorded"][0]))]}

    Worker.__name__ = Worker.__qualname__ = _ACTOR
    rows = [{"unit": unit.to_json(), "recorded": recorded} for unit, recorded in wave]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        Worker,
        batch_size=1,
        num_cpus=cpus,
        num_gpus=gpus or None,
        compute=ActorPoolStrategy(
            min_size=min(num_workers, most_workers),
            max_size=most_workers,
            max_tasks_in_flight_per_actor=1,
        ),
    )
    try:
        with watched_start(_ACTOR, cpus=cpus, gpus=gpus):
            for row in dataset.iter_rows():
                yield row["status"]
    except RayError as error:  # what did not come back is planned again from the ledger
        reason = str(error).splitlines()[-1].strip().partition(". ")[0]
        _log.warning("Ray gave up on a part of this pass: %s", reason)
