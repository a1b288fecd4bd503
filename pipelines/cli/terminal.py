"""What the verbs share: options, progress, interrupts, and numbers in words."""

from __future__ import annotations

import json
import logging
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, TextIO

import typer
from tqdm import tqdm

from one4all.text import shown

INTERRUPTED = 130  # what typer makes of KeyboardInterrupt
LINE_SECONDS = 30.0  # between two lines of progress in a log file

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="YAML file holding what differs from the defaults."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one key: key.path=value. May be repeated."),
]
TrainingSource = Annotated[
    str | None,
    typer.Argument(help="Folder or s3:// prefix of shards; several separated by commas."),
]
TrainingOutput = Annotated[
    str | None,
    typer.Argument(help="Protector folder or s3:// prefix to write."),
]
EvaluationFile = Annotated[
    Path,
    typer.Argument(help="YAML file: data sets, methods, grids."),
]


def show(*lines: str, file: TextIO | None = None) -> None:
    """Print lines; what is not fit for a terminal in them is escaped. Nothing else here prints."""
    print("\n".join(shown(line, keep="\t") for line in lines), file=file, flush=True)


def show_text(text: str, file: TextIO | None = None) -> None:
    """Print several lines."""
    show(*text.rstrip("\n").split("\n"), file=file)


def show_json(document: Any) -> None:
    """Print a document for programs."""
    show_text(json.dumps(document, indent=1).replace("\x7f", "\\u007f"))


def redraw(lines: Sequence[str], height: int) -> None:
    """Print lines on a terminal in the place of the last ``height``."""
    # Up to where the last drawing began, and everything below erased.
    print(f"\x1b[{height}F\x1b[J" * bool(height), end="")
    show(*lines)


class EscapedFormatter(logging.Formatter):
    """Log records that are fit for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """See the base class."""
        return shown(super().format(record), keep="\n\t")


class Interrupt:
    """Ctrl-C or SIGTERM, remembered.

    An exception raised while one of Ray's callbacks runs is swallowed, so that the request to stop
    would be lost; the next news from the job then raises it again.

    Attributes:
        advice: What to do after an interrupt; "" if the verb has said it already.
    """

    def __init__(self) -> None:
        self.advice = "run the same command again to go on"
        self._received = False

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)
        sys.unraisablehook = self._report_unraisable

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._received = True
        raise KeyboardInterrupt

    @staticmethod
    def _report_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
        """Print what was swallowed, but not our own request to stop: it is raised again."""
        if unraisable.exc_type is not KeyboardInterrupt:
            sys.__unraisablehook__(unraisable)

    def check(self) -> None:
        if self._received:
            raise KeyboardInterrupt


interrupt = Interrupt()


class Progress:
    """Progress that appears with the first news: a quick failure shows only its message.

    A bar on a terminal; in a log file, a plain line now and then.
    """

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._bar: Any = None

    def start(self, total: int, unit: str = "") -> None:
        self._unit = unit or self._unit
        if self._bar is not None:  # of what was done before
            self._bar.close()
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total,
                unit=self._unit,
                mininterval=0.2,
                dynamic_ncols=True,
                file=sys.stderr,
            )
        else:
            self._bar = _PlainLines(total, self._unit)

    def advance(self, steps: int = 1, note: str = "") -> None:
        interrupt.check()
        if note:
            self._bar.set_postfix_str(shown(note), refresh=False)
        self._bar.update(steps)

    def advance_to(self, position: int, note: str) -> None:
        self.advance(max(0, position - self._bar.n), note)

    def say(self, line: str) -> None:
        interrupt.check()
        tqdm.write(shown(line), file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()


class _PlainLines:
    """What `Progress` needs of a tqdm bar, without a carriage return."""

    def __init__(self, total: int, unit: str) -> None:
        self.n = 0
        self._total, self._unit, self._note = total, unit, ""
        self._start = self._last_line = time.monotonic()
        self._last_n = 0

    def set_postfix_str(self, note: str, refresh: bool) -> None:
        self._note = note

    def update(self, steps: int) -> None:
        self.n += steps
        if time.monotonic() - self._last_line >= LINE_SECONDS:
            self._print()

    def close(self) -> None:
        if self.n > self._last_n:
            self._print()

    def _print(self) -> None:
        now = time.monotonic()
        self._last_line, self._last_n = now, self.n
        rate = self.n / max(now - self._start, 1e-9)
        parts = [f"{self.n:,} of {self._total:,} {self._unit}s", f"{rate:.3g} a second"]
        if rate and self.n < self._total:
            parts.append(f"about {in_words((self._total - self.n) / rate)} left")
        print(", ".join([*parts, self._note] if self._note else parts), file=sys.stderr)


def in_words(seconds: float) -> str:
    """A duration with two or three digits and the unit that fits."""
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:,.1f} days"


def number_in_words(number: float) -> str:
    """Three digits, or all before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def size_in_words(num_bytes: float) -> str:
    size = float(num_bytes)
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.2f} TB"


def command_line() -> str:
    return " ".join(["one4all", *sys.argv[1:]])


def choice(option: str, value: str, *allowed: str) -> Any:
    """The value of an option that has a few."""
    if value not in allowed:
        raise typer.BadParameter(f"{option} must be {' or '.join(allowed)}, not {value!r}")
    return value
