"""A limit on the CPU time of one step, kept by the kernel.

A decoder that a hostile file sends round in circles cannot be stopped from Python: it may even hold
the interpreter's lock. So the kernel ends the process (SIGXCPU), the attempt counts against the
unit, and the run goes on.
"""

from __future__ import annotations

import resource
from typing import Self


class CpuLimit:
    """Ends this process when a step takes too long, as a ``with`` block around its steps.

    Args:
        seconds: CPU time of a step, over all threads; 0 sets no limit.
    """

    def __init__(self, seconds: int) -> None:
        self._seconds = seconds
        self._before: dict[int, tuple[int, int]] = {}

    def __enter__(self) -> Self:
        limits = (resource.RLIMIT_CPU, resource.RLIMIT_CORE)
        self._before = {limit: resource.getrlimit(limit) for limit in limits}
        self.next_step()
        return self

    def __exit__(self, *exception: object) -> None:
        for limit, values in self._before.items():
            resource.setrlimit(limit, values)

    def next_step(self) -> None:
        """A step is over, and the next one has all the time again."""
        if not self._seconds:
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        until = int(used.ru_utime + used.ru_stime) + 1 + self._seconds
        hard = self._before[resource.RLIMIT_CPU][1]
        if hard != resource.RLIM_INFINITY:
            until = min(until, hard)
        resource.setrlimit(resource.RLIMIT_CPU, (until, hard))
        # No core file: it would hold images and credentials.
        resource.setrlimit(resource.RLIMIT_CORE, (0, self._before[resource.RLIMIT_CORE][1]))
