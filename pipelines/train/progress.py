"""Progress from workers to the driver, wherever the workers run, and the log kept of it."""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

from one4all.errors import NotFoundError
from one4all.report import plot_loss_curves
from one4all.storage import LocalStorage, open_storage

METRICS_FILE = "metrics.jsonl"
DAMAGED_FILE = "damaged_shards.json"
FAILURE_FILE = "not_finite.json"
CURVES_FILE = "loss_curves.png"
_ENTRIES_FILE = "entries.jsonl"
_KEPT_ENTRIES = 1000  # in a checkpoint
_REST = 20  # times as long as writing the log took, until it is written again
# Of the run, not of what it learns.
_NOT_PLOTTED = ("epoch", "world_size", "images_per_second", "damaged_shards")

Entry: TypeAlias = dict[str, float]
"""Figures of one step by name: those of `RESERVED_SCALARS`, and the objective's own scalars."""

Failure: TypeAlias = tuple[str, list[tuple[str, str]]]
"""What is wrong, and the unit and key of each image that may be the reason."""


class Told:
    """The last entries that rank 0 has told; they go into a checkpoint.

    The log may be written a while after the checkpoint of the same step. If the driver dies
    meanwhile, whoever goes on from the checkpoint tells them again, and the log has no hole.
    """

    def __init__(self) -> None:
        self.entries: deque[Entry] = deque(maxlen=_KEPT_ENTRIES)

    def save(self, folder: Path) -> None:
        """Write them to a folder of a checkpoint."""
        (folder / _ENTRIES_FILE).write_text(_lines(self.entries), "utf-8")

    def load(self, folder: Path) -> None:
        """Read them, if it has some: checkpoints of before have none."""
        with suppress(FileNotFoundError):
            text = (folder / _ENTRIES_FILE).read_text("utf-8")
            self.entries.extend(map(json.loads, text.splitlines()))


def _lines(entries: Iterable[Entry]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


class ProgressBoard:
    """Ray actor that workers write to and the driver reads."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._damaged: dict[str, str] = {}
        self._notes: list[str] = []
        self._failure: Failure | None = None

    def post(self, entry: Entry) -> None:
        """Add an entry."""
        self._entries.append(entry)

    def post_damage(self, damaged: dict[str, str]) -> None:
        """Add what a rank knows of damaged shards: the reason, by URI."""
        self._damaged |= damaged

    def post_note(self, sentence: str) -> None:
        """Say what goes on otherwise than it was asked for."""
        self._notes.append(sentence)

    def post_failure(self, failure: Failure) -> None:
        """Say why the training must not go on, nor be tried again."""
        self._failure = failure

    def failure(self) -> Failure | None:
        """Why the training must not go on; None if it may."""
        return self._failure

    def since(
        self, start: int, num_damaged: int, num_notes: int
    ) -> tuple[list[Entry], dict[str, str], list[str]]:
        """Entries from number ``start`` on, from 0; and damaged shards and notes likewise."""
        damaged = dict(islice(self._damaged.items(), num_damaged, None))
        return self._entries[start:], damaged, self._notes[num_notes:]


@contextmanager
def progress_board(
    on_entry: Callable[[Entry], None],
    on_damage: Callable[[dict[str, str]], None],
    on_note: Callable[[str], None],
) -> Iterator[Any]:
    """A board for workers.

    ``on_entry`` is called on the driver with each entry, in order; before it ``on_damage`` with
    damaged shards that are new, and ``on_note`` with each sentence.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Beside the driver: it must not go with the node of some worker.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board: Any = ray.remote(num_cpus=0)(ProgressBoard)
    board = board.options(scheduling_strategy=here).remote()
    stop = threading.Event()

    def watch() -> None:
        seen, num_damaged, num_notes, last = 0, 0, 0, False
        while not last:
            last = stop.wait(0.5)
            news = board.since.remote(seen, num_damaged, num_notes)
            entries, damaged, notes = ray.get(news)
            for note in notes:
                on_note(note)
            if damaged:
                on_damage(damaged)
            for entry in entries:
                on_entry(entry)
            seen, num_damaged = seen + len(entries), num_damaged + len(damaged)
            num_notes += len(notes)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield board
    finally:
        stop.set()
        watcher.join(timeout=10)
        ray.kill(board)


class RunLog:
    """metrics.jsonl, TensorBoard files and curves of a training run: of whatever is logged.

    A resumed run continues the log it finds; steps that are trained again replace their entries.
    Damaged shards have a file of their own, if there are any, and their number is in every entry.

    Args:
        run_folder: Folder or s3:// prefix. TensorBoard files go to a folder only, since their
            writer cannot write to S3.

    Attributes:
        damaged: Why a shard could not be read to its end, by its URI.
    """

    def __init__(self, run_folder: str) -> None:
        self._storage = open_storage(run_folder)
        lines = self._found(METRICS_FILE).splitlines()
        self._by_step: dict[float, Entry] = {
            entry["step"]: entry for entry in map(json.loads, lines)
        }
        self.damaged: dict[str, str] = json.loads(self._found(DAMAGED_FILE) or "{}")
        self._board: Any = None
        self._next_write = 0.0

    @property
    def history(self) -> list[Entry]:
        """Entries in step order."""
        return [self._by_step[step] for step in sorted(self._by_step)]

    def _found(self, name: str) -> str:
        """What an earlier sitting has written; "" if there is none."""
        try:
            return self._storage.read_bytes(name).decode()
        except NotFoundError:
            return ""

    def add_failure(self, failure: Failure) -> None:
        """Log why the training ends, with all images that may be the reason."""
        said, images = failure
        record = json.dumps({"error": said, "images": images}, indent=1)
        self._storage.write_bytes(FAILURE_FILE, record.encode())

    def add_damage(self, damaged: dict[str, str]) -> dict[str, str]:
        """Log damaged shards; those that are new."""
        new = {uri: reason for uri, reason in damaged.items() if uri not in self.damaged}
        if new:
            self.damaged |= new
            self._storage.write_bytes(DAMAGED_FILE, json.dumps(self.damaged, indent=1).encode())
        return new

    def knows(self, entry: Entry) -> bool:
        """Whether these figures of a step are logged."""
        return entry.items() <= self._by_step.get(entry["step"], {}).items()

    def add(self, entry: Entry) -> Entry:
        """Log the figures of one step; written at once, unless writing takes too much time.

        The file is written whole, since objects of S3 cannot grow.

        Returns:
            The entry as it is logged, with the number of damaged shards.
        """
        entry = {**entry, "damaged_shards": len(self.damaged)}
        self._by_step[entry["step"]] = entry
        start = time.monotonic()
        if start >= self._next_write:
            self._write()
            self._next_write = time.monotonic() + _REST * (time.monotonic() - start)
        if self._board is not None:
            for name, value in entry.items():
                self._board.add_scalar(name, value, int(entry["step"]))
        return entry

    def _write(self) -> None:
        self._storage.write_bytes(METRICS_FILE, _lines(self.history).encode())

    def __enter__(self) -> Self:
        if isinstance(self._storage, LocalStorage):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(self._storage.root / "tensorboard")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._board is not None:
            self._board.close()
        if self._by_step:
            self._write()
        if len(self._by_step) > 1:
            with tempfile.TemporaryDirectory() as folder:
                curves = Path(folder) / CURVES_FILE
                learnt = [
                    {name: value for name, value in entry.items() if name not in _NOT_PLOTTED}
                    for entry in self.history
                ]
                plot_loss_curves(learnt, curves)
                self._storage.write_bytes(CURVES_FILE, curves.read_bytes())
