"""Jobs of a `RayCluster`, submitted as a user does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support.ray_cluster import PROGRAM, RayCluster


def start(cluster: RayCluster, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """`one4all submit`, as its user sees it: one stream of lines."""
    command = [sys.executable, "-m", "pipelines", "submit", "--address", cluster.address]
    command += ["--program", PROGRAM, *arguments]
    wrong = {"RAY_ADDRESS": "http://127.0.0.1:1"}  # the option has to win
    return cluster.open(command, **wrong, **environment)


def start_with_ray(
    cluster: RayCluster, working_dir: Path, *arguments: str
) -> subprocess.Popen[str]:
    """The same by Ray's own command, which uploads a folder and knows nothing of ours."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit"]
    command += ["--address", cluster.address, "--working-dir", str(working_dir), "--"]
    return cluster.open([*command, *PROGRAM.split(), *arguments])


def finish(run: subprocess.Popen[str], *, timeout: float = 240) -> tuple[int, str]:
    """Exit status and what was printed."""
    try:
        printed, _ = run.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        run.kill()
        raise AssertionError(run.communicate()[0]) from None
    assert "Traceback" not in printed, printed
    return run.returncode, printed


def read_until(run: subprocess.Popen[str], text: str) -> str:
    """Lines up to one that holds a text."""
    assert run.stdout is not None
    lines = []
    while (line := run.stdout.readline()) and text not in line:
        lines.append(line)
    assert line, "".join(lines)
    return line
