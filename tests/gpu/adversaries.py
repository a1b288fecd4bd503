"""Adversaries at 224 pixels: what a full ResNet18 learns from protected photos, and from clean.

Each trial is a process of its own, and all share the GPU: one alone would wait for the CPU, which
launches the augmentation of each image. Methods, augmentations, networks and training are those of
`one4all.evaluation`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from gpu.codes import read_codes
from gpu.record import Figures, Record, markdown_table, peak_memory

from one4all.evaluation.adversaries import AdversaryConfig, Augmentation, train_adversary
from one4all.evaluation.adversaries.networks import FULL_WIDTH
from one4all.evaluation.labelled import LabelledImages, read_labelled
from one4all.evaluation.methods.controls import PatternConfig
from one4all.evaluation.methods.registry import find_method

SIZE = 224
CLEAN = "clean"
CONDITIONS = (CLEAN, "shipped", "corpus", "random noise", "class-wise oracle")
AUGMENTATIONS: tuple[Augmentation, ...] = ("flip_crop", "moco_v2", "gray")
TABLE, COPIES = "adversaries", "copies"
_MOST_TRIALS = 15  # at once; each holds some GB of the GPU


@dataclass(frozen=True)
class Trial:
    """One adversary: what it is trained on, and how."""

    condition: str
    augmentation: Augmentation
    seed: int

    @property
    def name(self) -> str:
        return f"{self.condition}, {self.augmentation}, seed {self.seed}"


def run(
    record: Record, work: Path, *, photos: Path, epochs: int, num_seeds: int, tiny: bool
) -> None:
    """Make the copies, then train adversaries on them.

    Args:
        record: Where the rows go.
        work: Empty folder.
        photos: What travel.py made: ``train``, ``test`` and ``codes.json``.
        epochs: Passes over the training photos.
        num_seeds: Seeds of each trial; the first seed of all comes first.
        tiny: See whether it runs: 32 pixels, one epoch, the narrowest network.
    """
    size = 32 if tiny else SIZE
    splits = {split: read_labelled(str(photos / split), size=size) for split in ("train", "test")}
    for split, images in splits.items():
        _keep(images, work, split)
    record.note(
        "photos",
        {
            split: f"{len(images)} in {images.num_classes} classes"
            for split, images in splits.items()
        },
    )
    config = AdversaryConfig(
        width=8 if tiny else FULL_WIDTH,
        epochs=1 if tiny else epochs,
        batch_size=4 if tiny else 32,
        warm_up=0.3,
        precision="bfloat16",
    )
    record.note("adversary", config.model_dump(mode="json"))
    parallel = min(_MOST_TRIALS, max(1, (os.cpu_count() or 1) - 1))
    with _Processes(parallel if torch.cuda.is_available() else 1) as processes:
        copies = {name: partial(_make_copy, photos, work, name) for name in CONDITIONS}
        made = _measure_all(record, COPIES, copies, processes)
        trials = [
            Trial(condition, augmentation, seed)
            for seed, augmentation, condition in product(
                range(num_seeds), AUGMENTATIONS, CONDITIONS
            )
            if condition in made
        ]
        # The slowest first; no longer trial begins when the others have ended.
        trials.sort(key=lambda trial: (trial.seed, trial.augmentation != "moco_v2"))
        ends_at = time.time() + record.seconds_left
        calls = {trial.name: partial(_train, work, trial, config, ends_at) for trial in trials}
        _measure_all(record, TABLE, calls, processes)


def markdown(record: Record) -> str:
    """Accuracy, and its share of clean accuracy, of the last epoch; means over the seeds."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for row in record.rows:
        if row["table"] == TABLE and "accuracy" in row:
            key = (row["condition"], row["augmentation"])
            found.setdefault(key, {})[row["seed"]] = row["accuracy"]

    def cell(condition: str, augmentation: str) -> str:
        own = found.get((condition, augmentation), {})
        clean = found.get((CLEAN, augmentation), {})
        if not own:
            return "not measured"
        told = f"{100 * np.mean(list(own.values())):.1f} %"
        shares = [own[seed] / clean[seed] for seed in own if clean.get(seed)]
        return f"{told} ({100 * np.mean(shares):.0f} % of clean)" if shares else told

    rows = [[name, *(cell(name, kind) for kind in AUGMENTATIONS)] for name in CONDITIONS]
    return "\n".join(
        ["### accuracy on clean test photos\n", *markdown_table(["", *AUGMENTATIONS], rows)]
    )


# --- in a process of its own -------------------------------------------------------------------


def _make_copy(photos: Path, work: Path, condition: str) -> Figures:
    """Make and keep the training photos as one condition has them."""
    torch.set_num_threads(1)
    clean = _kept(work, "train")
    if condition == "random noise":
        copy = find_method("uniform_noise").fit(clean, seed=0).protect(clean, own=True, seed=0)
    elif condition == "class-wise oracle":
        settings = PatternConfig(kind="codebook")  # the strong look of our own patterns
        oracle = find_method("class_oracle").fit(clean, settings, seed=0)
        copy = oracle.protect(clean, own=True, seed=0)
    elif condition != CLEAN:
        copy = read_codes(photos)[condition].protect(clean)
    else:
        copy = clean
    _keep(copy, work, condition)
    apart = [
        int(np.abs(a.astype(np.int16) - b).max())
        for a, b in zip(copy.images_NHWC, clean.images_NHWC, strict=True)
    ]
    return {"images": len(copy), "most levels from clean": max(apart)}


class _TimeIsOverError(Exception):
    """Ends a training between two epochs."""


def _train(work: Path, trial: Trial, config: AdversaryConfig, ends_at: float) -> Figures:
    """Train one adversary; until that time, in seconds since 1970, and no epoch longer."""
    torch.set_num_threads(1)
    curve: list[float] = []
    figures: dict[str, Any] = {**asdict(trial), "curve": curve}

    def on_epoch(epoch: int, accuracy: float) -> None:
        curve.append(round(accuracy, 4))
        if epoch < config.epochs and time.time() > ends_at:
            raise _TimeIsOverError

    try:
        result = train_adversary(
            _kept(work, trial.condition),
            _kept(work, "test"),
            config.model_copy(update={"augmentation": trial.augmentation}),
            seed=trial.seed,
            on_epoch=on_epoch,
        )
    except _TimeIsOverError:  # its learning rate was not to end yet: no accuracy to compare
        figures["unfinished"] = f"{len(curve)} of {config.epochs} epochs"
    else:
        figures |= {"accuracy": result.last, "peak": result.peak}
    figures |= peak_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return figures


def _keep(images: LabelledImages, work: Path, name: str) -> None:
    np.save(work / f"{name}.npy", images.images_NHWC)
    np.save(work / f"{name}-labels.npy", images.labels_N)


def _kept(work: Path, name: str) -> LabelledImages:
    """What was kept, its images on disk."""
    pixels = np.load(work / f"{name}.npy", mmap_mode="r")
    return LabelledImages(pixels, np.load(work / f"{name}-labels.npy"))


# --- many at once ------------------------------------------------------------------------------


class _Processes:
    """Processes that are used again; who dies is replaced, and spoils nobody else's call."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free: SimpleQueue[ProcessPoolExecutor] = SimpleQueue()
        for _ in range(count):
            self._free.put(_one_process())

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *exception: object) -> None:
        for _ in range(self.count):
            self._free.get().shutdown()

    def call(self, function: Callable[[], Figures]) -> Figures:
        """The result of a function, in a process of its own; waits for one that is free."""
        process = self._free.get()
        try:
            return process.submit(function).result()
        except BrokenProcessPool:
            process = _one_process()
            raise
        finally:
            self._free.put(process)


def _one_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def _measure_all(
    record: Record, table: str, calls: dict[str, Callable[[], Figures]], processes: _Processes
) -> set[str]:
    """A row of each call, as they end; those that succeeded.

    None begins that would last, as long as the longest until then, beyond the time.
    """
    longest = 0.0

    def timed(call: Callable[[], Figures]) -> tuple[float, Figures | Exception | None]:
        if record.seconds_left <= longest:
            return 0.0, None
        start = time.monotonic()
        try:
            result: Figures | Exception = processes.call(call)
        except Exception as error:
            result = error
        return time.monotonic() - start, result

    succeeded = set()
    with ThreadPoolExecutor(processes.count) as threads:
        futures: dict[Future[Any], str] = {
            threads.submit(timed, call): name for name, call in calls.items()
        }
        for future in as_completed(futures):
            name, (seconds, result) = futures[future], future.result()
            longest = max(longest, seconds)
            if result is None:
                record.add(table, name, 0.0, {"not begun": "the time was over"})
            elif isinstance(result, Exception):
                record.fail(table, name, seconds, result)
            else:
                record.add(table, name, seconds, result)
                succeeded.add(name)
    return succeeded
