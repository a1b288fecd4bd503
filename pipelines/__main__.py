"""Entry point of `one4all` and `python -m pipelines`.

Importing the command line takes a moment. An interrupt meanwhile must end quietly: nothing has
begun.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

from one4all.errors import UsageError
from one4all.extras import require

_NEEDED = ("typer", "tqdm", "yaml")  # without which no verb runs


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    try:
        for module in _NEEDED:
            require(module, "jobs")
    except UsageError as error:
        print(f"one4all: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    from pipelines.cli.app import main as command_line

    command_line()


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
