"""Settings of `one4all train`."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from one4all.training.trainer import TrainerConfig
from pipelines.settings import JobConfig, RayConfig


def _workers(value: object) -> object:
    """A number of workers, or a range of two."""
    least, most = value if isinstance(value, list | tuple) and len(value) == 2 else (value, value)
    # Not isinstance, to which True is a number.
    if type(least) is not int or type(most) is not int or not 1 <= least <= most:
        raise ValueError("write a number of workers such as 4, or the least and most as [2, 8]")
    return value


def _whole_gpus(value: float) -> float:
    """A number of GPUs; a part of one cannot be trained on, for workers of one GPU cannot talk."""
    if value > 0 and not value.is_integer():
        raise ValueError(
            f"training gives each worker whole GPUs, not {value:g}; write 1, or 0 for CPUs alone, "
            "and fewer workers with a larger batch_size if a GPU has room"
        )
    return value


class TrainConfig(TrainerConfig, JobConfig):
    """`one4all train`: what `TrainerConfig` says of the training itself, and how it is run.

    Attributes:
        output: Protector folder or URI to write.
        run_folder: Folder of checkpoints, metrics.jsonl, TensorBoard files and curves; s3:// for
            several nodes. The same folder resumes.
        log_every: Steps from one entry of metrics.jsonl to the next.
        checkpoint_every: Steps from one checkpoint to the next.
        keep_checkpoints: Number of checkpoints that are kept, the last ones.
        num_workers: Ray Train workers: a number, or the range [least, most], within which Ray takes
            as many as fit, when it starts and after each lost node.
        cpus_per_worker: CPUs that each worker takes.
        gpus_per_worker: GPUs that each worker takes, whole ones; below 0 means 1 if there is any.
        resize_seconds: How often a group of a range looks whether more workers fit. Growing costs a
            restart, and the steps since the last checkpoint.
        max_failures: Restarts after lost workers; one more, and training has failed. A node whose
            end was announced is not counted.
        lease_seconds: Life of the lease that keeps a second run off the run folder; renewed four
            times in it.
        ray: How to reach Ray.
    """

    output: str = "protector"
    run_folder: str = "runs/train"
    log_every: Annotated[int, Field(ge=1)] = 10
    checkpoint_every: Annotated[int, Field(ge=1)] = 100
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    num_workers: Annotated[int | tuple[int, int], BeforeValidator(_workers)] = 1
    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    gpus_per_worker: Annotated[float, AfterValidator(_whole_gpus)] = -1
    resize_seconds: Annotated[float, Field(ge=1)] = 60.0
    max_failures: Annotated[int, Field(ge=0)] = 3
    lease_seconds: Annotated[float, Field(ge=1, le=3600)] = 60.0
    ray: RayConfig = RayConfig()

    @property
    def min_workers(self) -> int:
        """The least number of workers."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """The largest number of workers."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]
