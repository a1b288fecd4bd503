"""The command line as a whole: the verbs, what goes for all of them, and how it ends.

A verb parses its words, loads a configuration, calls one function and shows the result. What it
needs beyond that it imports when it runs: `one4all --help` waits for no PyTorch.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from one4all.errors import One4AllError, UsageError
from pipelines.cli import evaluating, learning, operating, planning, protecting
from pipelines.cli.terminal import INTERRUPTED, EscapedFormatter, interrupt, show, show_text

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        show(f"one4all {version('one4all')}")
        raise typer.Exit


@app.callback()
def one4all(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Print it and end."),
    ] = False,
) -> None:
    """Protect images against training without consent: fit, protect, verify."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UsageError(
            "the folder that this command runs in was deleted; change to one that is there"
        ) from None


for family in (protecting, learning, planning, evaluating, operating):
    family.add_verbs(app)


def main() -> None:
    """Entry point: every expected error is one sentence and an exit code."""
    _keep_native_messages_off_the_terminal()
    log = logging.StreamHandler()
    log.setFormatter(EscapedFormatter("%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[log])
    shards = logging.getLogger("one4all.shards")  # said on request: one JSON line each
    shards.handlers = [logging.StreamHandler(sys.stderr)]
    shards.setLevel(logging.INFO)
    shards.propagate = False
    # A scheduler stops us with SIGTERM: unwind as for Ctrl-C, so that uploads are aborted.
    interrupt.install()
    try:
        app()
    except One4AllError as error:
        show_text(f"one4all: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            advice = f"; {interrupt.advice}" if interrupt.advice else ""
            show(f"one4all: interrupted{advice}", file=sys.stderr)
        raise


def _keep_native_messages_off_the_terminal() -> None:
    """Let only Python write to standard error.

    Ray's C++ core prints to file descriptor 2 whatever its log level, such as a warning about every
    restartable actor of Ray Data. ONE4ALL_NATIVE_LOG names a file that keeps these messages.
    """
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="replace")
    target = os.environ.get("ONE4ALL_NATIVE_LOG", os.devnull)
    with open(target, "ab") as log:
        os.dup2(log.fileno(), 2)
