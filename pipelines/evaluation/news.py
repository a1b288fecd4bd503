"""What the tasks of an evaluation tell while they work, minutes before they end.

A task adds lines to a board, an actor; the driver takes them off while it waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

Kind = Literal["line", "epoch"]
_SECONDS_BETWEEN = 20.0  # lines of one copy


class Board:
    """Lines that nobody has read yet, each with its kind; runs as a Ray actor."""

    def __init__(self) -> None:
        self._lines: list[tuple[Kind, str]] = []

    def add(self, kind: Kind, line: str) -> None:
        self._lines.append((kind, line))

    def take(self) -> list[tuple[Kind, str]]:
        """All lines, once."""
        taken, self._lines = self._lines, []
        return taken


def new_board() -> Any:
    """A handle of a board, for the tasks."""
    import ray

    return ray.remote(num_cpus=0)(Board).remote()


def take_news(board: Any) -> list[tuple[Kind, str]]:
    """What is on the board; nothing if it is lost, which is no reason to end an evaluation."""
    import ray
    from ray.exceptions import RayError

    try:
        lines: list[tuple[Kind, str]] = ray.get(board.take.remote())
    except RayError:
        return []
    return lines


def copy_progress(board: Any, title: str) -> Callable[[float, str], None]:
    """An `OnFitProgress` that adds a line now and then."""
    last = time.monotonic()

    def on_progress(share: float, message: str) -> None:
        nonlocal last
        if time.monotonic() - last >= _SECONDS_BETWEEN:
            last = time.monotonic()
            board.add.remote("line", f"copy {title}: {message}, fit {100 * share:.0f} % done")

    return on_progress
