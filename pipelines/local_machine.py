"""What this machine has for workers, and the share of each, without Ray."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from one4all.errors import UsageError

_BYTES_PER_WORKER = 1_500_000_000  # it takes 1.1 GB on most photos
_CGROUP = Path("/sys/fs/cgroup")
# One of these is there wherever PyTorch may find a GPU: NVIDIA's, AMD's, Windows' below Linux.
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


@dataclass(frozen=True)
class Share:
    """What one worker of this machine gets.

    Attributes:
        cpus: CPUs, and so threads.
        gpus: GPUs; below 1 for a part of one.
        environment: Variables that tell its process so.
    """

    cpus: int
    gpus: float = 0.0
    environment: Mapping[str, str] = field(default_factory=dict)


def share_out(
    num_workers: int,
    cpus_per_worker: int,
    gpus_per_worker: float,
    *,
    num_cpus: int = 0,
    num_tasks: int = 0,
) -> list[Share]:
    """The shares of the workers that this machine holds; all of the same size, and at least one.

    Args:
        num_workers: Wanted; fewer are had if no more fit. 0 for as many as fit.
        cpus_per_worker: 0 for an even share of all. If neither GPUs nor ``num_workers`` say among
            how many, `most_workers` does.
        gpus_per_worker: Below 0 for one if there is any.
        num_cpus: CPUs to share out; 0 for those that this process may use.
        num_tasks: What they will work on, one thing each at a time; 0 if that is not known.

    Raises:
        UsageError: Not one worker of this size fits.
    """
    cpus = num_cpus or available_cpus()
    gpus = available_gpus() if gpus_per_worker else []
    gpus_each = gpus_per_worker if gpus_per_worker >= 0 else min(1.0, len(gpus))
    places = _places(gpus, gpus_each) if gpus_each else []
    among = num_workers or len(places) or most_workers(cpus, num_tasks, available_bytes())
    cpus_each = cpus_per_worker or max(1, cpus // among)
    fit = cpus // cpus_each
    if gpus_each:
        fit = min(fit, len(places))
    if not fit:
        raise UsageError(
            f"a worker of {cpus_each} CPUs and {gpus_each:g} GPUs does not fit on this machine: it "
            f"has {cpus} CPUs and {len(gpus)} GPUs; lower cpus_per_worker or gpus_per_worker"
        )
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cpus_each))}
    seen = [{"CUDA_VISIBLE_DEVICES": place} for place in places] or [{}] * fit
    count = min(num_workers or fit, fit)
    return [Share(cpus_each, gpus_each, threads | seen[index]) for index in range(count)]


def most_workers(cpus: int, num_tasks: int = 0, num_bytes: float = math.inf) -> int:
    """Workers without GPUs that a machine's CPUs are best shared out among: one for each.

    Python runs on one CPU of a process at a time, and does so for half of the time of a process on
    two (docs/operations.md, "How large a worker"). With few tasks, or little memory, workers are
    fewer and larger.

    Args:
        cpus: Of the machine.
        num_tasks: What they will work on; 0 if that is not known.
        num_bytes: Memory of the machine.
    """
    by_memory = int(min(num_bytes / _BYTES_PER_WORKER, cpus))
    return max(1, min(cpus, num_tasks or cpus, by_memory))


def _places(gpus: list[str], gpus_each: float) -> list[str]:
    """GPUs of each worker that these hold; whole ones, or several workers on one."""
    if gpus_each < 1:
        return [gpu for gpu in gpus for _ in range(int(1 / gpus_each + 1e-9))]
    if gpus_each % 1:
        raise UsageError(f"gpus_per_worker is {gpus_each:g}: give a whole number, or one below 1")
    each = int(gpus_each)
    return [",".join(gpus[i : i + each]) for i in range(0, len(gpus) - each + 1, each)]


def available_cpus() -> int:
    """CPUs that this process may use: by its affinity, and by the quota of its container."""
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, math.ceil(min(cpus, _quota())))


def _quota() -> float:
    """CPUs that the cgroup of a container may use; infinite without a limit."""
    try:
        if (limit := _CGROUP / "cpu.max").exists():  # version 2
            quota, period = limit.read_text().split()
        else:
            quota = (_CGROUP / "cpu/cpu.cfs_quota_us").read_text()
            period = (_CGROUP / "cpu/cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError):  # no cgroup, or "max"
        return math.inf


def available_bytes() -> float:
    """Memory that this process and its own may use: of the machine, and by the limit of its
    container; infinite if neither can be told."""
    limits = []
    with suppress(OSError, ValueError, AttributeError):  # no such system call, or name of a value
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # versions 2 and 1
        with suppress(OSError, ValueError):  # no cgroup, or "max"
            limits.append(int((_CGROUP / name).read_text()))
    return min((limit for limit in limits if limit > 0), default=math.inf)


def available_gpus() -> list[str]:
    """GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if not any(os.path.exists(device) for device in _GPU_DEVICES):
        return []
    import torch  # takes seconds, and nothing else knows all ways to hide a GPU

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return named[:count] if named != [""] else [str(index) for index in range(count)]
