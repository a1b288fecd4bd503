"""What a training run would take: from its settings, a listing and shapes; before it is paid for.

No image is read, no weight is fetched and Ray is not started. Speed is what the caller says, or
what the run folder tells of an earlier sitting, or a guess from the arithmetic; which, is said.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from statistics import median

import torch

from one4all.corpus import open_corpora
from one4all.errors import NotFoundError, UsageError
from one4all.storage import Storage, open_storage
from one4all.training.cost import ImageCost, cost_of_an_image
from one4all.training.loader import SHUFFLE_BYTES
from pipelines.train.config import TrainConfig
from pipelines.train.progress import METRICS_FILE, Entry

SIZES_FILE = "sizes.json"  # of the webdataset world: images of each shard, by name
_PROCESS_BYTES = 1 << 30  # measured: Python with PyTorch and Ray, 0.7 to 1.0 GB
# Sustained by one worker, guessed low: an A100 in bfloat16 can do six times as much, and two CPU
# cores of a shared machine did this.
_GPU_FLOPS, _CPU_FLOPS = 50e12, 0.03e12


@dataclass(frozen=True)
class TrainEstimate:
    """What training takes with one number of workers.

    Attributes:
        num_workers: Number of workers.
        images_per_step: Images of all of them in one step.
        epochs: Times that the source is gone through; None if its number of images is not known.
        seconds: Time from the first step to the last.
        worker_hours: Hours of all workers together.
        gpu_hours: Hours of all GPUs together; None on CPUs.
        price: Price of the worker-hours; None if nobody said what one costs.
    """

    num_workers: int
    images_per_step: int
    epochs: float | None
    seconds: float
    worker_hours: float
    gpu_hours: float | None
    price: float | None


@dataclass(frozen=True)
class TrainPlan:
    """What a run would take.

    Attributes:
        steps: Number of optimiser steps.
        num_shards: Number of shards of the source.
        num_bytes: Bytes of the source.
        num_images: Images of the source; None if neither told nor written down there.
        cost: Memory and arithmetic of one image.
        on_gpu: Whether workers have GPUs, and compute in bfloat16.
        device_bytes: Weights, optimiser and activations of one batch; on a CPU, in its memory.
        host_bytes: Memory of a worker's process and the images that it holds.
        images_per_second: Speed of one worker.
        speed_from: Where that speed is from, in words.
        estimates: Time and price with the least and with the most workers.
    """

    steps: int
    num_shards: int
    num_bytes: int
    num_images: int | None
    cost: ImageCost
    on_gpu: bool
    device_bytes: int
    host_bytes: int
    images_per_second: float
    speed_from: str
    estimates: tuple[TrainEstimate, ...]


def plan_training(
    config: TrainConfig,
    *,
    num_images: int | None = None,
    images_per_second: float | None = None,
    price_per_hour: float | None = None,
) -> TrainPlan:
    """Count, trace and multiply.

    Args:
        config: Settings, as for `train`.
        num_images: Images of the source; default: the sum of its ``sizes.json``, if it has one.
        images_per_second: Speed of one worker; default: measured or guessed, as
            `TrainPlan.speed_from` says.
        price_per_hour: Price of an hour of one worker, in any currency.

    Raises:
        UsageError: No source, no shards, or settings that do not fit together.
    """
    if not config.source:
        raise UsageError("train needs a source: a folder or s3:// prefix of WebDataset shards")
    uris = config.source.split(",")
    sizes = [unit.size for _, unit in open_corpora(uris)]
    cost = cost_of_an_image(config)
    on_gpu = config.gpus_per_worker > 0 or (
        config.gpus_per_worker < 0 and torch.cuda.is_available()
    )
    if num_images is None:
        counted = [_counted(open_storage(uri.strip())) for uri in uris]
        known = [count for count in counted if count is not None]
        num_images = sum(known) if len(known) == len(counted) else None
    speed, speed_from = _speed(config, cost, on_gpu, images_per_second)
    activations = config.batch_size * cost.activation_bytes // (2 if on_gpu else 1)
    device_bytes = cost.encoder_bytes + cost.generator_bytes + activations
    return TrainPlan(
        steps=config.steps,
        num_shards=len(sizes),
        num_bytes=sum(sizes),
        num_images=num_images,
        cost=cost,
        on_gpu=on_gpu,
        device_bytes=device_bytes,
        host_bytes=_PROCESS_BYTES + min(SHUFFLE_BYTES, sum(sizes)),
        images_per_second=speed,
        speed_from=speed_from,
        estimates=tuple(
            _estimate(config, count, num_images, speed, price_per_hour, on_gpu)
            for count in sorted({config.min_workers, config.max_workers})
        ),
    )


def _estimate(
    config: TrainConfig,
    num_workers: int,
    num_images: int | None,
    speed: float,
    price_per_hour: float | None,
    on_gpu: bool,
) -> TrainEstimate:
    images_per_step = config.images_per_step * num_workers
    seconds = config.steps * config.images_per_step / speed
    worker_hours = seconds * num_workers / 3600
    learnt = num_images and num_images * (1 - config.validation_share)
    gpus = config.gpus_per_worker if config.gpus_per_worker > 0 else 1.0
    return TrainEstimate(
        num_workers=num_workers,
        images_per_step=images_per_step,
        epochs=config.steps * images_per_step / learnt if learnt else None,
        seconds=seconds,
        worker_hours=worker_hours,
        gpu_hours=worker_hours * gpus if on_gpu else None,
        price=None if price_per_hour is None else worker_hours * price_per_hour,
    )


def _counted(source: Storage) -> int | None:
    """Images of a corpus by its ``sizes.json``."""
    try:
        return sum(int(count) for count in json.loads(source.read_bytes(SIZES_FILE)).values())
    except NotFoundError:
        return None
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{source.uri}/{SIZES_FILE} must map names of shards to numbers of images"
        ) from error


def _speed(
    config: TrainConfig, cost: ImageCost, on_gpu: bool, said: float | None
) -> tuple[float, str]:
    """Images a second of one worker, and where that is from."""
    if said is not None:
        return said, "as given"
    try:
        lines = open_storage(config.run_folder).read_bytes(METRICS_FILE).decode().splitlines()
    except NotFoundError:
        lines = []
    entries: list[Entry] = [json.loads(line) for line in lines[-100:]]
    speeds = [e["images_per_second"] / e["world_size"] for e in entries if "world_size" in e]
    if speeds:
        return median(speeds), f"measured by the run in {config.run_folder}"
    flops = _GPU_FLOPS if on_gpu else _CPU_FLOPS
    return flops / cost.flops, f"a guess: {flops / 1e12:g} TFLOP/s for each worker"
