"""Settings of `one4all train`."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from one4all.training.trainer import TrainerConfig
from pipelines.settings import JobConfig, RayConfig


def _workers(value: object) -> object:
    """A number of workers, or a range of two."""
    least, most = value if isinstance(value, list | tuple) and len(value) == 2 else (value, value)
    # Not isinstance, to which True is a number.
    if type(least) is not int or type(most) is not int or not 1 <= least <= most:
        raise ValueError("write a number of workers such as 4, or the least and most as [2, 8]")
    return value


class TrainConfig(TrainerConfig, JobConfig):
    """`one4all train`: what `TrainerConfig` says of the training itself, and how it is run.

    Attributes:
        output: Protector folder or URI to write.
        run_folder: Checkpoints, metrics.jsonl, TensorBoard files and curves; s3:// for several
            nodes. The same folder resumes.
        log_every, checkpoint_every: Steps.
        num_workers: Ray Train workers: a number, or the range [least, most], within which Ray takes
            as many as fit, when it starts and after each lost node. Each takes ``gpus_per_worker``
            GPUs (below 0: 1 if there is any) and ``cpus_per_worker`` CPUs.
        cpus_per_worker: CPUs of a worker.
        gpus_per_worker: GPUs of a worker; below 0 means 1 if the cluster has any, else 0.
        resize_seconds: How often a group of a range looks whether more workers fit. Growing costs a
            restart, and the steps since the last checkpoint.
        max_failures: Restarts after a lost worker; of nodes whose end was announced, any number.
        lease_seconds: Life of the lease that keeps a second run off the run folder; renewed four
            times in it.
    """

    output: str = "protector"
    run_folder: str = "runs/train"
    log_every: Annotated[int, Field(ge=1)] = 10
    checkpoint_every: Annotated[int, Field(ge=1)] = 100
    num_workers: Annotated[int | tuple[int, int], BeforeValidator(_workers)] = 1
    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    gpus_per_worker: float = -1
    resize_seconds: Annotated[float, Field(ge=1)] = 60.0
    max_failures: Annotated[int, Field(ge=0)] = 3
    lease_seconds: Annotated[float, Field(ge=1, le=3600)] = 60.0
    ray: RayConfig = RayConfig()

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]
