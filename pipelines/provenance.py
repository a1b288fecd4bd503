"""Where a result comes from: the code that made it."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit() -> str:
    """The commit of the checkout that the code runs from.

    Returns:
        Its hash, with "+" if files differ from it; "" if the code runs from no checkout.
    """
    try:
        return _git("rev-parse", "HEAD") + ("+" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()
