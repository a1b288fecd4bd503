"""Train a generator with Ray Train: any number of workers, checkpoints, resume.

The result is a protector folder. The run folder holds checkpoints (Ray Train's), metrics.jsonl,
TensorBoard files and loss_curves.png; running the same command again, on this cluster or another,
resumes from its last checkpoint, at the same position of the same stream of images.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from one4all.concepts import ConceptBank
from one4all.errors import (
    ConfigError,
    ConflictError,
    NotFiniteError,
    NotFoundError,
    One4AllError,
    UsageError,
)
from one4all.ledger.lease import Lease
from one4all.protectors.card import ProtectorCard
from one4all.storage import Storage, open_storage
from one4all.training.trainer import GeneratorTrainer
from pipelines.placement import await_room, watched_start
from pipelines.provenance import commit
from pipelines.ray_session import our_signal_handlers, ray_session, worker_layout
from pipelines.settings import absolute_path, absolute_weights
from pipelines.train.config import TrainConfig
from pipelines.train.progress import FAILURE_FILE, Entry, Failure, RunLog, progress_board
from pipelines.train.status import RUN_FILE, leave_pointer
from pipelines.train.worker import train_loop

_WORKER_ACTOR = "RayTrainWorker"  # what Ray Train calls its workers
CONCEPTS_FILE = "concepts.safetensors"  # in the run folder: embedded once for all sittings
_NAMED_IMAGES = 16  # in an error; the run folder has them all
_NAMED = 100  # damaged shards, at most, in the card; the run folder has them all


def train(
    config: TrainConfig,
    *,
    command: str = "",
    on_start: Callable[[], None] = lambda: None,
    on_metrics: Callable[[Entry], None] = lambda entry: None,
    on_damage: Callable[[str, str], None] = lambda uri, reason: None,
    on_wait: Callable[[str], None] = lambda sentence: None,
    on_note: Callable[[str], None] = lambda sentence: None,
) -> ProtectorCard:
    """Train to the end, resuming if the run folder has a checkpoint, and write the protector.

    Args:
        config: What to learn from, how, and with which workers.
        command: Command line, for the record in the card.
        on_start: Called when all checks have passed.
        on_metrics: Called on the driver with what rank 0 logs, every ``log_every`` steps.
        on_damage: Called with the URI of each shard that cannot be read to its end, and why. Its
            images before the damage are used.
        on_wait: Called with a sentence before waiting for a run that may have died.
        on_note: Called with a sentence on what goes on otherwise than it was asked for.

    Returns:
        The card; ``training`` in it names damaged shards, too.

    Raises:
        UsageError: Nothing to train on, or a setting that cannot work; before Ray starts.
        LeaseHeldError: Another run trains in this run folder, or took it over.
        NotFiniteError: A loss or a gradient is NaN or infinite; the images are named.
        One4AllError: Training failed more often than ``max_failures``.
    """
    if not config.source:
        raise UsageError("train needs a source: a folder or s3:// prefix of WebDataset shards")
    given, config = config, _with_absolute_paths(config)
    for uri in filter(None, f"{config.source},{config.validation_source}".split(",")):
        open_storage(uri).check(writable=False)
    known = _known_concepts(config)
    bank = _checked(config, known)
    open_storage(config.output).check(writable=True)
    _refuse_other_run(config)
    lease = Lease(
        open_storage(config.run_folder),
        uuid.uuid4().hex[:12],
        seconds=config.lease_seconds,
        on_wait=on_wait,
    )
    with lease:
        leave_pointer(open_storage(config.output), config.run_folder)
        if bank is not None and (known is None or known.hash != bank.hash):
            open_storage(config.run_folder).write_bytes(CONCEPTS_FILE, bank.to_bytes())
        log = RunLog(config.run_folder)
        on_start()
        checkpoint = _fit(config, bank, log, on_metrics, on_damage, on_note)
        lease.check()  # what the other run writes is as good, but not ours
        with checkpoint.as_directory() as folder:
            return _export(config, bank, given.source, Path(folder), log, command)


def _fit(
    config: TrainConfig,
    bank: ConceptBank | None,
    log: RunLog,
    on_metrics: Callable[[Entry], None],
    on_damage: Callable[[str, str], None],
    on_note: Callable[[str], None],
) -> Any:
    """Run Ray Train to the end; its last checkpoint."""

    def log_entry(entry: Entry) -> None:
        if not log.knows(entry):
            on_metrics(log.add(entry))

    def log_damage(damaged: dict[str, str]) -> None:
        for uri, reason in log.add_damage(damaged).items():
            on_damage(uri, reason)

    import ray

    with ray_session(config.ray), log, progress_board(log_entry, log_damage, on_note) as board:
        from ray.exceptions import RayError
        from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
        from ray.train.v2.api.exceptions import TrainingFailedError

        _, _, gpus = worker_layout(
            config.max_workers, config.cpus_per_worker, config.gpus_per_worker
        )
        await_room(config.ray, cpus=config.cpus_per_worker, gpus=gpus)
        workers: dict[str, Any] = {  # Ray's types know neither a range nor the seconds
            "num_workers": config.num_workers,
            "elastic_resize_monitor_interval_s": config.resize_seconds,
        }
        trainer = TorchTrainer(
            train_loop,
            train_loop_config={
                "config": config.model_dump_json(),
                "board": board,
                "concepts": b"" if bank is None else bank.to_bytes(),
            },
            scaling_config=ScalingConfig(
                **workers,
                use_gpu=gpus > 0,
                resources_per_worker={
                    "CPU": config.cpus_per_worker,
                    **({"GPU": gpus} if gpus else {}),
                },
            ),
            run_config=RunConfig(
                **_ray_storage(config.run_folder),
                # Nodes that were announced to go are not counted, and may be any number.
                failure_config=FailureConfig(max_failures=config.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=config.keep_checkpoints),
            ),
        )
        try:
            room = watched_start(_WORKER_ACTOR, cpus=config.cpus_per_worker, gpus=gpus)
            with _stopped_by_ray(), room:
                result = trainer.fit()
            failure = ray.get(board.failure.remote())
        except (TrainingFailedError, RayError) as error:
            raise One4AllError(f"training failed: {_root_cause(error)}") from error
        if failure is not None:
            raise _not_finite(failure, config, log)
        if result.checkpoint is None:
            raise One4AllError("training ended without a checkpoint")
        return result.checkpoint


def _not_finite(failure: Failure, config: TrainConfig, log: RunLog) -> NotFiniteError:
    """The error that ends a training, with the images that may be the reason by their shards."""
    said, images = failure
    log.add_failure(failure)
    by_unit: dict[str, list[str]] = {}
    for unit, key in images[:_NAMED_IMAGES]:
        by_unit.setdefault(unit, []).append(key)
    named = "; ".join(f"{unit}: {', '.join(keys)}" for unit, keys in by_unit.items())
    others = f" and {len(images) - _NAMED_IMAGES} more" if len(images) > _NAMED_IMAGES else ""
    return NotFiniteError(
        f"{said}; images: {named}{others}, all in {FAILURE_FILE} of {config.run_folder}. No "
        "weights were changed by it. Leave out the image that is the reason, or begin a new run "
        "with a lower learning_rate",
        images,
    )


@contextmanager
def _stopped_by_ray() -> Iterator[None]:
    """Within it, SIGINT and SIGTERM stop Ray Train, and then are a KeyboardInterrupt as elsewhere.

    Ray replaces the handler of SIGINT by its own, which gives back what the workers had reserved:
    if a driver just ends, the cluster keeps that for three more minutes. Then it leaves, with an
    exit status of its own.
    """
    with our_signal_handlers():
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
        try:
            yield
        except SystemExit:
            raise KeyboardInterrupt from None


def _export(
    config: TrainConfig,
    bank: ConceptBank | None,
    source: str,
    checkpoint: Path,
    log: RunLog,
    command: str,
) -> ProtectorCard:
    """Write the protector folder from the last checkpoint."""
    trainer = GeneratorTrainer(config, bank=bank)
    trainer.load(checkpoint)
    history = log.history
    training = {
        "source": source,
        "steps": config.steps,
        "batch_size": config.images_per_step,
        "num_workers": config.num_workers,
        "seed": config.seed,
        "learning_rate": config.learning_rate,
        "objective": config.objective.model_dump(),
        "first_metrics": history[0] if history else {},
        "last_metrics": history[-1] if history else {},
        "num_damaged_shards": len(log.damaged),
        "damaged_shards": dict(islice(log.damaged.items(), _NAMED)),
        "commit": commit(),
        "command": command,
    }
    name = Path(config.output.rstrip("/")).name
    return trainer.protector(name, training).publish(open_storage(config.output))


def _checked(config: TrainConfig, known: ConceptBank | None) -> ConceptBank | None:
    """The concepts of a training that can begin; None if its objective has none."""
    trainer = GeneratorTrainer(config, bank=known)
    trainer.check()
    return trainer.objective.bank


def _known_concepts(config: TrainConfig) -> ConceptBank | None:
    """The concepts that an earlier sitting has embedded, if there was one."""
    try:
        return ConceptBank.from_bytes(open_storage(config.run_folder).read_bytes(CONCEPTS_FILE))
    except (NotFoundError, ConfigError):
        return None


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Workers run in another directory, perhaps on another machine: paths are absolute."""
    return config.model_copy(
        update={
            "source": _absolute(config.source),
            "validation_source": _absolute(config.validation_source),
            "output": open_storage(config.output).uri,
            "run_folder": open_storage(config.run_folder).uri,
            "vocabulary": absolute_path(config.vocabulary),
            "encoder": absolute_weights(config.encoder),
        }
    )


def _absolute(corpora: str) -> str:
    return ",".join(open_storage(u.strip()).uri for u in corpora.split(",")) if corpora else ""


def _refuse_other_run(config: TrainConfig) -> None:
    """Bind the run folder to what the run computes, so that resuming never mixes two runs."""
    storage = open_storage(config.run_folder)
    storage.check(writable=True)
    # These may change between two sittings of one run.
    free = {
        "ray",
        "num_workers",
        "cpus_per_worker",
        "gpus_per_worker",
        "resize_seconds",
        "max_failures",
        "log_every",
        "lease_seconds",
        "keep_checkpoints",
        "validation_source",
        "validation_images",
        "validate_every",
        "compile",
    }
    wanted = config.model_dump(mode="json", exclude=free)
    try:
        storage.create(RUN_FILE, json.dumps(wanted, indent=1, sort_keys=True).encode())
    except ConflictError:
        found = _begun_run(storage).model_dump(mode="json", exclude=free)
        changes = [
            f"{key} {found[key]!r} -> {value!r}"
            for key, value in sorted(wanted.items())
            if found[key] != value
        ]
        if changes:
            raise UsageError(
                f"run folder {config.run_folder} belongs to another run ({'; '.join(changes)}); "
                "choose another run_folder, or delete it to start again"
            ) from None


def _begun_run(run_folder: Storage) -> TrainConfig:
    """The settings that a run began with; where it knew none, it did as the default does."""
    try:
        return TrainConfig.model_validate_json(run_folder.read_bytes(RUN_FILE))
    except ValidationError as error:
        first = error.errors()[0]
        what = ": ".join([*map(str, first["loc"]), first["msg"]])
        raise UsageError(
            f"{RUN_FILE} in run folder {run_folder.uri} is damaged, or of another version of "
            f"one4all ({what}); choose another run_folder, or delete it to start again"
        ) from error


def _ray_storage(run_folder: str) -> dict[str, Any]:
    """The run folder as Ray Train wants it: storage path, run name, and a file system for S3.

    pyarrow's S3 client ignores AWS_ENDPOINT_URL, which everything else here honours.
    """
    if not run_folder.startswith("s3://"):
        path = Path(open_storage(run_folder).uri)
        return {"storage_path": str(path.parent), "name": path.name}
    from pyarrow.fs import S3FileSystem

    parent, _, name = run_folder.removeprefix("s3://").rstrip("/").rpartition("/")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    scheme, _, host = endpoint.rpartition("://")
    options = {"endpoint_override": host, "scheme": scheme or "https"} if endpoint else {}
    return {"storage_path": parent, "name": name, "storage_filesystem": S3FileSystem(**options)}


def _root_cause(error: BaseException) -> str:
    """The last line of the innermost failure: what a user can act on."""
    text = str(error).strip().splitlines()
    return text[-1] if text else type(error).__name__
