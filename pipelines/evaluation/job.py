"""Evaluate methods: train adversaries on copies of data sets, as Ray tasks, resumable.

Every finished trial is one small JSON record below ``trials/`` of the output, so the same command
does the rest after an interruption, and a grid that is added later reuses what is there.
Adversaries are always tested on clean images, with the labels that they were trained on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import ValidationError

from one4all.distances import max_difference, psnr_db
from one4all.errors import One4AllError
from one4all.evaluation.adversaries import train_adversary
from one4all.evaluation.attacks import find_attack
from one4all.evaluation.label_clusters import ClusterQuality, cluster_quality, merge_labels
from one4all.evaluation.labelled import LabelledImages, Labels
from one4all.images import Pixels
from one4all.report import Section
from one4all.storage import Storage, open_storage
from one4all.visibility import VisibilitySummary, measurable, visibility
from pipelines.evaluation.copies import (
    embed_class_names,
    embeddings_folder,
    fitted_folder,
    load_data,
    make_copy,
    mix,
)
from pipelines.evaluation.news import copy_progress, new_board, take_news
from pipelines.evaluation.records import CopyRecord, Environment, Outcome, TrialRecord
from pipelines.evaluation.report import write_results
from pipelines.evaluation.trials import (
    NO_ATTACK,
    Copy,
    EvaluateConfig,
    MethodConfig,
    Trial,
    all_trials,
    num_clusters,
)
from pipelines.ray_session import ray_session

_log = logging.getLogger(__name__)
_TRIALS, _COPIES = "trials/", "copies/"
_NEWS_SECONDS = 2.0  # how long the driver waits before it looks for news
_PSNR_IMAGES = 256  # of a copy, for its distortion
_SEEN_IMAGES = 24  # of a copy, for its visibility, which takes seconds a megapixel

Say = Callable[[str], None]
_Record = TypeVar("_Record", TrialRecord, CopyRecord)


@dataclass
class Evaluation:
    """Outcome of a run.

    Attributes:
        records: By trial key; all that exist for the configuration, whichever run made them.
        copies: By copy key, likewise.
        num_new: Trials of this run.
        failed: Title of a trial that failed, with its reason.
    """

    records: dict[str, TrialRecord] = field(default_factory=dict)
    copies: dict[str, CopyRecord] = field(default_factory=dict)
    num_new: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def evaluate(
    config: EvaluateConfig,
    *,
    command: str,
    on_plan: Callable[[Sequence[Trial], int], None] = lambda todo, num_trials: None,
    on_epoch: Say = lambda line: None,
    on_trial: Callable[[Trial, TrialRecord], None] = lambda trial, record: None,
    say: Say = lambda line: None,
) -> Evaluation:
    """Run every trial that has no record yet.

    Args:
        config: What to evaluate.
        command: Command line, for the records.
        on_plan: Called once, before anything is done, with the trials to do and the number of all.
        on_epoch: Receives a line after each epoch of an adversary.
        on_trial: Called with each trial as it ends.
        say: Receives a line for each data set that is read and each copy that is made: the first
            trial may end long after.

    Raises:
        UsageError: A data set, protector or output cannot be used.
    """
    trials = all_trials(config)
    storage = open_storage(config.output)
    storage.check(writable=True)
    result = Evaluation(
        records=_read_records(storage, _TRIALS, {t.key for t in trials}, TrialRecord),
        copies=_read_records(storage, _COPIES, {t.copy.key for t in trials}, CopyRecord),
    )
    todo = [trial for trial in trials if trial.key not in result.records]
    on_plan(todo, len(trials))
    if todo:
        environment = Environment.here(command)
        for trial, outcome in _run(todo, config, result, storage, on_epoch, say):
            if isinstance(outcome, str):
                result.failed[trial.title] = outcome
                continue
            record = TrialRecord(
                trial=trial.identity, title=trial.title, outcome=outcome, environment=environment
            )
            storage.write_bytes(f"{_TRIALS}{trial.key}.json", record.model_dump_json().encode())
            result.records[trial.key] = record
            result.num_new += 1
            on_trial(trial, record)
    return result


def report(config: EvaluateConfig, result: Evaluation, *, diagnoses: Sequence[Section] = ()) -> str:
    """Write tables, plots and pictures to the output; returns the tables and where the rest is.

    A remote output gets the records; the report is then written below runs/evaluate here.
    """
    remote = "://" in config.output
    folder = Path("runs/evaluate") if remote else Path(config.output)
    qualities = {
        name: _label_qualities(name, config)
        for name in dict.fromkeys(
            data
            for grid in config.grids
            for data in grid.data
            if any(num_clusters(labels) for labels in grid.labels)
        )
    }
    path = write_results(
        folder,
        config,
        result.records,
        result.copies,
        qualities=qualities,
        diagnoses=diagnoses,
    )
    return (folder / "results.md").read_text("utf-8") + f"report: {path}"


def _label_qualities(data: str, config: EvaluateConfig) -> list[ClusterQuality]:
    """The curves of the paper's Figure 5 for the class names of a data set."""
    names = load_data(config.data[data], "train").class_names
    embeddings = embed_class_names(data, names, config.encoder)
    chosen = [k for k in (2, 3, 5, 8, 10, 15, 20, 25, 30, 40, 50, 75) if k < len(names)]
    return [cluster_quality(embeddings, k) for k in chosen]


def run_trial(
    copy: LabelledImages,
    clean: LabelledImages,
    test: LabelledImages,
    trial: Trial,
    merged: Labels,
    *,
    on_epoch: Callable[[int, float], None] = lambda epoch, accuracy: None,
) -> Outcome:
    """Train one adversary; accuracies in 0..1.

    Args:
        copy, clean: Training images, protected and clean, in the same order, at the size at which
            they are protected; here they are resized to that of the adversary.
        test: Clean test images, likewise.
        trial: What to do.
        merged: New label of each class; empty keeps the labels.
        on_epoch: See `train_adversary`.
    """
    size = trial.copy.data_config.size or clean.size
    train, test = mix(copy, clean, share=trial.share).resized(size), test.resized(size)
    if len(merged):
        train, test = (replace(s, labels_N=merged[s.labels_N]) for s in (train, test))
    result = train_adversary(
        train,
        test,
        trial.adversary,
        attack=None if trial.attack == NO_ATTACK else find_attack(trial.attack),
        seed=trial.seed,
        on_epoch=on_epoch,
    )
    counts = np.bincount(test.labels_N)
    return Outcome(
        last=result.last,
        peak=result.peak,
        curve=tuple(result.curve),
        majority=float(counts.max() / counts.sum()),
        confusion=result.confusion(test.labels_N).tolist(),
        seconds=round(result.seconds, 2),
    )


def _run(
    todo: list[Trial],
    config: EvaluateConfig,
    result: Evaluation,
    storage: Storage,
    on_epoch: Say,
    say: Say,
) -> Iterator[tuple[Trial, Outcome | str]]:
    """Trials as they end; at most two copies are in memory beside those in use."""
    import ray
    from ray.exceptions import RayError

    say("starting Ray")
    with ray_session(config.ray):
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        gpus = config.gpus_per_trial
        if gpus < 0:
            gpus = 1.0 if resources.get("GPU") else 0.0
        num_slots = _num_slots(resources, config.cpus_per_trial, gpus)
        remote: Any = ray.remote(num_cpus=config.cpus_per_trial, num_gpus=gpus)
        copy_task, trial_task = remote(_copy_task), remote(_trial_task)
        data = _Data(config, say)
        board = new_board()
        waiting: dict[Any, Trial] = {}
        copies: dict[Any, Copy] = {}

        def relay() -> None:
            for kind, line in take_news(board):
                (on_epoch if kind == "epoch" else say)(line)

        def finished(at_most: int) -> Iterator[tuple[Trial, Outcome | str]]:
            while len(waiting) > at_most or (copies and not at_most):
                ready, _ = ray.wait([*copies, *waiting], num_returns=1, timeout=_NEWS_SECONDS)
                relay()
                if not ready:
                    continue
                try:
                    outcome: Any = ray.get(ready[0])
                except RayError as error:
                    outcome = _reason(error)
                if ready[0] in copies:
                    _note_copy(copies.pop(ready[0]), outcome, result, storage, say)
                else:
                    yield waiting.pop(ready[0]), outcome

        for _, group in groupby(todo, key=lambda trial: trial.copy.key):
            trials = list(group)
            copy = trials[0].copy
            clean, test = data.get(copy.data)
            fit_on = data.get(copy.fitted_on)[0] if copy.fitted_on else None
            protected, facts = copy_task.options(num_returns=2).remote(
                clean,
                fit_on,
                copy.method,
                copy.title,
                epsilon_levels=copy.epsilon_levels,
                num_threads=config.cpus_per_trial,
                cache=fitted_folder(copy, config),
                embeddings=embeddings_folder(config),
                board=board,
            )
            copies[facts] = copy
            for trial in trials:
                merged = data.merged(copy.data, trial.labels)
                reference = trial_task.remote(
                    protected, clean, test, trial, merged, config.cpus_per_trial, board
                )
                waiting[reference] = trial
            del protected
            yield from finished(at_most=2 * num_slots)
        yield from finished(at_most=0)
        relay()


def _note_copy(
    copy: Copy, outcome: CopyRecord | str, result: Evaluation, storage: Storage, say: Say
) -> None:
    """Keep the record of a copy, and say how it went; why it failed, its trials tell."""
    if isinstance(outcome, str):
        return
    seen = f", {outcome.visibility.mean}" if outcome.visibility else ""
    say(
        f"copy made: {copy.title}, {outcome.seconds:.0f} s, "
        f"largest difference {outcome.max_levels} levels{seen}"
    )
    known = result.copies.get(copy.key)
    if known is None or known.visibility is None:  # records of before have none
        result.copies[copy.key] = outcome
        storage.write_bytes(f"{_COPIES}{copy.key}.json", outcome.model_dump_json().encode())


def _num_slots(resources: dict[str, float], cpus: int, gpus: float) -> int:
    """Trials that run at once."""
    by_cpu = int(resources.get("CPU", 1)) // cpus
    return max(1, min(by_cpu, int(resources.get("GPU", 0) / gpus)) if gpus else by_cpu)


def _reason(error: Exception) -> str:
    """What went wrong in a task, in one line."""
    cause = getattr(error, "cause", None) or error
    text = str(cause).strip().splitlines()[-1] if str(cause).strip() else ""
    return text if isinstance(cause, One4AllError) else f"{type(cause).__name__}: {text}"


def _read_records(
    storage: Storage, prefix: str, wanted: set[str], kind: type[_Record]
) -> dict[str, _Record]:
    """Records by key; one that cannot be read is made again."""
    found = {}
    for info in storage.list(prefix):
        key = info.key.removeprefix(prefix).removesuffix(".json")
        if key in wanted:
            try:
                found[key] = kind.model_validate_json(storage.read_bytes(info.key))
            except ValidationError:
                _log.warning("record %s cannot be read and is made again", info.key)
    return found


class _Data:
    """Data sets in Ray's object store, read when first needed."""

    def __init__(self, config: EvaluateConfig, say: Say) -> None:
        self._config = config
        self._say = say
        self._references: dict[str, tuple[Any, Any]] = {}
        self._names: dict[str, tuple[str, ...]] = {}
        self._merged: dict[tuple[str, str], Labels] = {}

    def get(self, name: str) -> tuple[Any, Any]:
        """References of the training and the test split."""
        import ray

        if name not in self._references:
            self._say(f"reading data set: {name}")
            start = time.monotonic()
            splits = [load_data(self._config.data[name], split) for split in ("train", "test")]
            train, test = splits
            self._say(
                f"data set read: {name}, {len(train):,} images to train on and {len(test):,} to "
                f"test on, {train.num_classes} classes, {time.monotonic() - start:.0f} s"
            )
            self._names[name] = splits[0].class_names
            self._references[name] = (ray.put(splits[0]), ray.put(splits[1]))
        return self._references[name]

    def merged(self, name: str, labels: str) -> Labels:
        """New label of each class, or nothing."""
        if not (count := num_clusters(labels)):
            return np.zeros(0, np.int64)
        self.get(name)
        if (name, labels) not in self._merged:
            embeddings = embed_class_names(name, self._names[name], self._config.encoder)
            self._merged[name, labels] = merge_labels(embeddings, count)
        return self._merged[name, labels]


def _copy_task(
    clean: LabelledImages,
    fit_on: LabelledImages | None,
    method: MethodConfig,
    title: str,
    *,
    epsilon_levels: int,
    num_threads: int,
    cache: Path | None,
    embeddings: Path | None,
    board: Any,
) -> tuple[LabelledImages, CopyRecord]:
    torch.set_num_threads(num_threads)
    board.add.remote("line", f"making copy: {title}")
    start = time.monotonic()
    protected = make_copy(
        clean,
        fit_on,
        method,
        epsilon_levels=epsilon_levels,
        cache=cache,
        embeddings=embeddings,
        on_progress=copy_progress(board, title),
    )
    seconds = round(time.monotonic() - start, 2)
    return protected, CopyRecord(
        max_levels=max_difference(clean.images_NHWC, protected.images_NHWC),
        psnr_db=float(np.mean([psnr_db(*p) for p in _pairs(clean, protected, _PSNR_IMAGES)])),
        seconds=seconds,
        visibility=VisibilitySummary.of(
            visibility(*pair) for pair in _pairs(clean, protected, _SEEN_IMAGES)
        )
        if measurable()
        else None,
    )


def _pairs(
    clean: LabelledImages, protected: LabelledImages, at_most: int
) -> Iterator[tuple[Pixels, Pixels]]:
    """Images before and after, spread evenly over a copy."""
    chosen = np.linspace(0, len(clean) - 1, min(at_most, len(clean))).astype(int)
    return ((clean.images_NHWC[i], protected.images_NHWC[i]) for i in chosen)


def _trial_task(
    copy: LabelledImages,
    clean: LabelledImages,
    test: LabelledImages,
    trial: Trial,
    merged: Labels,
    num_threads: int,
    board: Any,
) -> Outcome:
    torch.set_num_threads(num_threads)

    def on_epoch(epoch: int, accuracy: float) -> None:
        place = f"epoch {epoch} of {trial.adversary.epochs}"
        board.add.remote("epoch", f"{trial.title}: {place}, {100 * accuracy:.1f} %")

    return run_trial(copy, clean, test, trial, merged, on_epoch=on_epoch)
