"""What a run beside others is measured by."""

import subprocess
import sys

import pytest

pytest.importorskip("psutil")
pytest.importorskip("ray")

from pipelines.peers import Clock

_BUSY = "import time\nwhile time.process_time() < 1: pass"


def test_cpu_time_of_a_child_that_has_ended_counts_and_its_memory_did():
    clock = Clock()
    with subprocess.Popen(
        [sys.executable, "-c", "x = b'1' * 200_000_000; input()"], stdin=subprocess.PIPE
    ) as large:
        while clock._memory() < 200_000_000:
            assert large.poll() is None
        clock.tick(64)
        large.communicate(b"\n")
    subprocess.run([sys.executable, "-c", _BUSY], check=True)
    clock.tick(164)
    measured = clock.measured()
    assert measured.cpu_ms * 100 > 900
    assert measured.num_bytes > 200_000_000
