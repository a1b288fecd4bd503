"""Where a result comes from: the commit of the code that made it."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit() -> str:
    """Commit of the checkout that this runs from; "" if it is installed.

    A "+" behind it says that files which the commit holds have been changed.
    """
    try:
        # An installed package may lie below somebody else's checkout, such as in its .venv.
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        head = _git("rev-parse", "HEAD")
        return head + "+" if _git("status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
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
