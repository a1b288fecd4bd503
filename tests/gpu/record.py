"""What a check has measured: a JSON file that is whole after each row, and a Markdown table."""

from __future__ import annotations

import gc
import json
import os
import platform
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Figures = Mapping[str, Any]

_NOT_TOLD = ("traceback", "curve")  # the JSON has them
_TOLD_VERSIONS = ("torch", "torchvision", "timm", "numpy", "pillow", "scipy", "pyarrow")


class Record:
    """Rows of one command. A row that fails holds its error, and the others are measured.

    Args:
        path: JSON file, written anew after each row.
        command: Name of the command.
        options: Its options, for the file.
        minutes: No row is begun when these are over.
        say: Receives a line for each row.
    """

    def __init__(
        self,
        path: Path,
        command: str,
        options: Figures,
        *,
        minutes: float,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._path, self._say = path, say
        self._start, self._seconds = time.monotonic(), 60 * minutes
        self._content: dict[str, Any] = {
            "command": command,
            "options": dict(options),
            "machine": machine_facts(),
            "seconds": 0.0,
            "rows": [],
        }
        self.write()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows so far: ``table``, ``row``, ``seconds``, and figures or ``error``."""
        rows: list[dict[str, Any]] = self._content["rows"]
        return rows

    @property
    def num_failed(self) -> int:
        """Rows that hold an error."""
        return sum("error" in row for row in self.rows)

    @property
    def seconds_left(self) -> float:
        """Seconds until no row is begun any more."""
        return self._seconds - (time.monotonic() - self._start)

    def measure(self, table: str, row: str, function: Callable[[], Figures]) -> Figures | None:
        """Add a row of what the function returns, in this process.

        Args:
            table: Table that the row belongs to.
            row: Name of the row.
            function: Returns its figures; whatever it raises becomes the row's error.

        Returns:
            The figures, or None if it failed or was not begun.
        """
        if self.seconds_left <= 0:
            self.add(table, row, 0.0, {"not begun": "the time was over"})
            return None
        start = time.monotonic()
        try:
            figures = function()
        except Exception as error:
            self.fail(table, row, time.monotonic() - start, error)
            return None
        finally:
            free_memory()
        self.add(table, row, time.monotonic() - start, figures)
        return figures

    def add(self, table: str, row: str, seconds: float, figures: Figures) -> None:
        """Add a row that was measured elsewhere, in so many seconds."""
        entry = {"table": table, "row": row, "seconds": round(seconds, 2), **figures}
        self.rows.append(entry)
        self.write()
        told = [f"{k} {_told(v)}" for k, v in figures.items() if k not in _NOT_TOLD]
        self._say(f"{table}: {row}: " + ", ".join(told))

    def fail(self, table: str, row: str, seconds: float, error: BaseException) -> None:
        """Add a row that could not be measured."""
        told = f"{type(error).__name__}: {error}"
        trace = traceback.format_exception(error)[-8:]
        self.add(table, row, seconds, {"error": told, "traceback": "".join(trace)})

    def note(self, name: str, value: Any) -> None:
        """Add a fact beside the rows."""
        self._content[name] = value
        self.write()

    def write(self) -> None:
        """Write the file: whole, or as it was."""
        self._content["seconds"] = round(time.monotonic() - self._start, 1)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self._path.with_name(f".{self._path.name}")
        scratch.write_text(json.dumps(self._content, indent=1, default=str) + "\n", "utf-8")
        scratch.rename(self._path)

    def markdown(self) -> str:
        """The rows as Markdown, a table for each kind."""
        facts = self._content["machine"]
        place = ", ".join(
            str(facts[key]) for key in ("gpu", "cpus", "python", "torch") if facts.get(key)
        )
        parts = [f"`{self._content['command']}` on {place}:"]
        for table in dict.fromkeys(row["table"] for row in self.rows):
            rows = [row for row in self.rows if row["table"] == table]
            keys = (key for row in rows for key in row if key not in _NOT_TOLD)
            columns = [key for key in dict.fromkeys(keys) if key not in ("table", "row")]
            parts.append(f"\n### {table}\n")
            parts += markdown_table(
                ["", *columns],
                [[row["row"], *(_told(row.get(key, "")) for key in columns)] for row in rows],
            )
        return "\n".join(parts)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines]


def machine_facts() -> dict[str, Any]:
    """What a figure depends on, as far as it can be asked."""
    facts: dict[str, Any] = {
        "gpu": "no GPU",
        "cpus": f"{os.cpu_count()} CPUs",
        "processor": _processor(),
        "system": platform.platform(),
        "python": f"Python {platform.python_version()}",
    }
    for name in _TOLD_VERSIONS:
        try:
            facts[name] = f"{name} {version(name)}"
        except PackageNotFoundError:
            facts[name] = ""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = properties.name
        facts["gpu_memory_bytes"] = properties.total_memory
        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = torch.backends.cudnn.version()
    return facts


def peak_memory() -> Figures:
    """What the device held at most since `torch.cuda.reset_peak_memory_stats`; nothing on a CPU."""
    if not torch.cuda.is_available():
        return {}
    return {
        "peak GPU memory, GB": torch.cuda.max_memory_allocated() / 1e9,
        "reserved, GB": torch.cuda.max_memory_reserved() / 1e9,
    }


def free_memory() -> None:
    """Give the device's memory back: that of a failed row, too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.processor()


def _told(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_told(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_told, value))
    return str(value)


def _cell(text: str) -> str:
    """One line without bars, short enough for a table; the JSON has it whole."""
    line = " ".join(text.split()).replace("|", "/")
    return line if len(line) <= 160 else line[:157] + "..."
