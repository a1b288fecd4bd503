"""What one Ray Train worker does: train, tell, save; also when its node is about to go."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from one4all.concepts import ConceptBank
from one4all.errors import NotFiniteError
from one4all.training.trainer import GeneratorTrainer
from pipelines import telemetry
from pipelines.train.config import TrainConfig
from pipelines.train.progress import Entry, Failure, Told

_T = TypeVar("_T")
_NOTICE_SECONDS = 5.0  # between two questions; Ray looks for news as often


@telemetry.gauges_kept()
def train_loop(settings: dict[str, Any]) -> None:
    """Train from the last checkpoint, if there is one, to the end.

    Args:
        settings: ``config``, a `TrainConfig` as JSON; ``board``, the actor for progress; and
            ``concepts``, a `ConceptBank` as bytes, or none.
    """
    import ray.train
    from ray.train import Checkpoint
    from ray.train.torch import get_device, prepare_model

    config = TrainConfig.model_validate_json(settings["config"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(config.cpus_per_worker)
    trainer = GeneratorTrainer(
        config,
        rank=rank,
        world_size=world_size,
        device=get_device(),
        num_threads=config.cpus_per_worker,
        bank=ConceptBank.from_bytes(settings["concepts"]) if settings["concepts"] else None,
        wrap=prepare_model,
    )
    told = Told()
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            trainer.load(Path(folder))
            told.load(Path(folder))
    board = settings["board"]
    if rank == 0:
        for earlier in told.entries:
            board.post.remote(earlier)
    if config.compile and (problem := trainer.compile()) and rank == 0:
        board.post_note.remote(problem)
    destination = {"destination": config.output}
    for name in ("one4all_trained_images", "one4all_trained_steps", "one4all_trained_seconds"):
        telemetry.begin(name, **destination)
    stopwatch = _Stopwatch(trainer.step_number, config.images_per_step * world_size)
    notice = _Notice(trainer.step_number)
    with (
        _not_finite_told(board, rank, world_size),
        _damage_told(trainer, board) as tell_damage,
    ):
        for step in trainer.steps():
            tell_damage()
            telemetry.count("one4all_trained_images", config.images_per_step, **destination)
            entry: Entry = {}
            due = step % config.log_every == 0 or step in (1, config.steps)
            if rank == 0 and (due or trainer.validates):
                seconds, images_per_second = stopwatch.since_last(step)
                entry = trainer.metrics() | {
                    "world_size": world_size,
                    "images_per_second": images_per_second,
                }
                if trainer.validates:
                    entry |= trainer.validate()
                    stopwatch.restart()
                board.post.remote(entry)
                told.entries.append(entry)
                telemetry.count("one4all_trained_steps", stopwatch.num_steps, **destination)
                telemetry.count(
                    "one4all_trained_seconds", seconds * stopwatch.num_steps, **destination
                )
                telemetry.observe("one4all_step_seconds", seconds, **destination)
                telemetry.show("one4all_training_step", step, **destination)
                telemetry.show("one4all_training_workers", world_size, **destination)
            announced = notice.is_new(step)
            if announced or step % config.checkpoint_every == 0 or step == config.steps:
                of_ranks = _of_all_ranks(trainer.shares, world_size)
                # report() is a barrier: every rank calls it, at the same steps.
                with tempfile.TemporaryDirectory() as folder:
                    if rank == 0:
                        trainer.save(Path(folder), of_ranks)
                        told.save(Path(folder))
                    ray.train.report(
                        entry or {"step": step},
                        checkpoint=Checkpoint.from_directory(folder) if rank == 0 else None,
                        checkpoint_dir_name=f"step-{step:08d}",
                    )


@contextmanager
def _not_finite_told(board: Any, rank: int, world_size: int) -> Iterator[None]:
    """Within the block, a `NotFiniteError` ends the training: the driver is told, and raises it.

    All ranks meet it at the same step and end without an error: whoever raises is started again,
    and would meet the same images with the same weights.
    """
    try:
        yield
    except NotFiniteError as error:
        import ray

        of_ranks = _of_all_ranks((str(error), error.images, error.is_loss), world_size)
        if rank == 0:
            ray.get(board.post_failure.remote(one_failure(of_ranks)), timeout=30)


def one_failure(of_ranks: Sequence[tuple[str, list[tuple[str, str]], bool]]) -> Failure:
    """What to say of errors that are one: that of the rank with the bad loss, else all images.

    Args:
        of_ranks: Message, images and `NotFiniteError.is_loss` of each rank.
    """
    for message, images, is_loss in of_ranks:
        if is_loss:
            return message, images
    return of_ranks[0][0], [image for _, images, _ in of_ranks for image in images]


@contextmanager
def _damage_told(trainer: GeneratorTrainer, board: Any) -> Iterator[Callable[[], None]]:
    """Within the block, a function that tells the driver of damaged shards that are new.

    It is called once more when the block ends, even with an error: damage may be the reason for it.
    """
    told = 0

    def tell() -> Any:
        nonlocal told
        if len(trainer.damaged) == told:
            return None
        told = len(damaged := dict(trainer.damaged))
        return board.post_damage.remote(damaged)

    try:
        yield tell
    finally:
        if (delivery := tell()) is not None:
            import ray

            ray.get(delivery, timeout=30)


class _Stopwatch:
    """Speed of the run between two entries of its log.

    Args:
        step: Step at which the run, or this sitting of it, begins.
        images_per_step: Images of all workers in one step.

    Attributes:
        num_steps: Steps between the last two calls.
    """

    def __init__(self, step: int, images_per_step: int) -> None:
        self._step, self._time, self.num_steps = step, time.monotonic(), 0
        self._images_per_step = images_per_step

    def since_last(self, step: int) -> tuple[float, float]:
        """Seconds for one step, and images a second, since the last call."""
        now = time.monotonic()
        self.num_steps = step - self._step
        seconds = max(now - self._time, 1e-9) / self.num_steps
        self._step, self._time = step, now
        return seconds, self._images_per_step / seconds

    def restart(self) -> None:
        """Leave out what was done since the last call."""
        self._time = time.monotonic()


class _Notice:
    """Whether it was announced that a node of this run will be taken away.

    Asking is a barrier, too dear for every step, and all ranks must ask at the same steps: rank 0
    says which is the next, some seconds ahead by its own clock.
    """

    def __init__(self, step: int) -> None:
        self._step, self._time = step, time.monotonic()
        self._next = step + 1
        self._last: object = None

    def is_new(self, step: int) -> bool:
        """True once for each announcement, on all ranks alike."""
        import ray.train
        from ray.train.collective import broadcast_from_rank_zero

        if step < self._next:
            return False
        info = ray.train.get_preemption_info()
        now, steps = time.monotonic(), step - self._step
        wanted = int(_NOTICE_SECONDS * steps / max(now - self._time, 1e-9))
        # The first steps may be fast, from prefetched images: approach the pace step by step.
        self._next = step + broadcast_from_rank_zero(max(1, min(wanted, 2 * steps)))
        self._step, self._time = step, now
        is_new = info is not None and info != self._last
        self._last = info
        return is_new


def _of_all_ranks(mine: _T, world_size: int) -> Sequence[_T]:
    """What every rank calls this with, by rank."""
    if world_size == 1:
        return [mine]
    of_ranks: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(of_ranks, mine)
    return of_ranks
