"""How far a training is, from outside: from what its run folder holds, without Ray."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from one4all.errors import NotFoundError
from one4all.storage import INTERNAL, Storage, open_storage
from pipelines.train.progress import DAMAGED_FILE, METRICS_FILE, Entry

RUN_FILE = "run.json"
_POINTER = f"{INTERNAL}training.json"  # of a training output, to its run folder
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class TrainingStatus:
    """A training as its run folder shows it.

    Attributes:
        run_folder, output: Where it keeps its state, and the protector that it makes.
        num_steps: Of the whole run.
        images_per_step: Of one worker.
        history: What was logged, in step order.
        damaged: Why a shard could not be read to its end, by its URI.
    """

    run_folder: str
    output: str
    num_steps: int
    images_per_step: int
    history: list[Entry] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """The last that was logged; 0 before."""
        return int(self.history[-1]["step"]) if self.history else 0

    @property
    def seconds_left(self) -> float | None:
        """At the last speed; None before the first entry."""
        if not self.history:
            return None
        last = self.history[-1]
        images = (self.num_steps - self.step) * self.images_per_step * last["world_size"]
        return images / max(last["images_per_second"], 1e-9)


def leave_pointer(output: Storage, run_folder: str) -> None:
    """Note in a training output where its run folder is; the rest of it is written at the end."""
    output.write_bytes(_POINTER, json.dumps({"run_folder": run_folder}).encode())


def read_training(uri: str) -> TrainingStatus | None:
    """Of a training output or a run folder; None if it is neither.

    Raises:
        UsageError: It cannot be reached.
    """
    storage = open_storage(uri)
    storage.check(writable=False)
    pointer = _read(storage, _POINTER)
    run = open_storage(json.loads(pointer)["run_folder"]) if pointer else storage
    settings = _read(run, RUN_FILE)
    if not settings:
        return None
    found = json.loads(settings)  # not as settings, whose class waits for PyTorch
    lines = _read(run, METRICS_FILE).splitlines()
    by_step: dict[float, Entry] = {entry["step"]: entry for entry in map(json.loads, lines)}
    return TrainingStatus(
        run.uri,
        found["output"],
        found["steps"],
        found["batch_size"] * found.get("accumulate_batches", 1),
        [by_step[step] for step in sorted(by_step)],
        json.loads(_read(run, DAMAGED_FILE) or "{}"),
    )


def curve(values: Sequence[float], *, width: int = 60) -> str:
    """A line of bars, of the means of as many stretches as there is room for."""
    if not values:
        return ""
    width = min(width, len(values))
    edges = [index * len(values) // width for index in range(width + 1)]
    stretches = (values[a:b] for a, b in pairwise(edges))
    means = [sum(stretch) / len(stretch) for stretch in stretches]
    low, high = min(means), max(means)
    top = len(_BARS) - 1
    return "".join(_BARS[round((m - low) / (high - low) * top) if high > low else 0] for m in means)


def _read(storage: Storage, name: str) -> str:
    """Text of an object; "" if it is not there."""
    try:
        return storage.read_bytes(name).decode()
    except NotFoundError:
        return ""
