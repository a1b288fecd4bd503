"""How fast one worker trains here, stage by stage: start, reading, decoding, both, and the step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch

from one4all.training.loader import Batch, EncodedImage, ImageStream, Share
from one4all.training.trainer import GeneratorTrainer, TrainerConfig

STAGES = ("reading", "decoding", "both", "step")
_SHARE = Share(0, 0, 1)


@dataclass(frozen=True)
class Speed:
    """What one stage took in one round.

    Attributes:
        stage: One of `STAGES`; "both" is reading and decoding as training has them, overlapping.
        images_per_second: By the clock.
        cpu_seconds: CPU seconds of all threads for one image.
    """

    stage: str
    images_per_second: float
    cpu_seconds: float


@dataclass(frozen=True)
class StartCost:
    """CPU seconds until a worker is ready for its first step.

    Attributes:
        embedding: Of a worker that embeds the concepts itself.
        sent: Of one that is sent them.
    """

    embedding: float
    sent: float


class Machine(NamedTuple):
    """What is measured on: threads that decode and compute, and the device, "cpu" or "cuda"."""

    threads: int
    device: str


def this_machine() -> Machine:
    """As many threads as PyTorch has, and a GPU if there is one."""
    return Machine(torch.get_num_threads(), "cuda" if torch.cuda.is_available() else "cpu")


def measure_start(config: TrainerConfig) -> StartCost:
    """Build a trainer twice: without known concepts, and with them.

    Raises:
        UsageError, ConfigError: As `GeneratorTrainer`.
    """
    GeneratorTrainer(config)  # what is loaded once for a process counts for neither
    start = time.process_time()
    trainer = GeneratorTrainer(config)
    middle = time.process_time()
    GeneratorTrainer(config, bank=trainer.objective.bank)
    return StartCost(middle - start, time.process_time() - middle)


def measure_stages(
    config: TrainerConfig, *, num_images: int, num_steps: int, rounds: int
) -> Iterator[Speed]:
    """Measure each stage in turn, ``rounds`` times.

    The clock of "both" starts with the first batch, before which a block has to be read.

    Args:
        config: What is learnt from, and how; on a GPU, if there is one.
        num_images: Images, at most, of each stage but the step; held in memory.
        num_steps: Steps of each round.
        rounds: Number of rounds.
    """
    machine = this_machine()
    trainer = GeneratorTrainer(config, device=machine.device, num_threads=machine.threads)
    stream = trainer.stream
    images = list(islice(stream.encoded(_SHARE), num_images))
    num_batches = max(1, len(images) // config.images_per_step - 1)
    with closing(stream.batches(config.images_per_step, (_SHARE,))) as batches:
        batch = next(batches)
    trainer.step(batch.image_BHWC, batch.names)  # the first one is slow
    for _ in range(rounds):
        yield _timed("reading", partial(_read, stream, num_images))
        yield _timed("decoding", partial(_decode, stream, images))
        with closing(stream.batches(config.images_per_step, (_SHARE,))) as batches:
            next(batches)
            yield _timed("both", partial(_take, batches, num_batches))
        yield _timed("step", partial(_step, trainer, batch, num_steps))


def _read(stream: ImageStream, num_images: int) -> int:
    return sum(1 for _ in islice(stream.encoded(_SHARE), num_images))


def _decode(stream: ImageStream, images: list[EncodedImage]) -> int:
    return sum(1 for _ in stream.crops(_SHARE, list(enumerate(images))))


def _take(batches: Iterator[Batch], num_batches: int) -> int:
    return sum(len(batch.names) for batch in islice(batches, num_batches))


def _step(trainer: GeneratorTrainer, batch: Batch, num_steps: int) -> int:
    for _ in range(num_steps):
        trainer.step(batch.image_BHWC, batch.names)
    return num_steps * len(batch.names)


def _timed(stage: str, work: Callable[[], int]) -> Speed:
    """The speed of work that returns its number of images."""
    start, cpu_start = time.perf_counter(), time.process_time()
    count = work()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return Speed(stage, count / seconds, cpu_seconds / count)
