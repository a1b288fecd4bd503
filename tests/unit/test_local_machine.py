"""What the workers of this machine get of it."""

import math
import os

import pytest

from one4all.errors import UsageError
from pipelines import local_machine
from pipelines.local_machine import available_bytes, available_cpus, share_out


@pytest.fixture
def machine(monkeypatch):
    """Decides what there is."""

    def has(cpus, *gpus, memory=1e12):
        monkeypatch.setattr(local_machine, "available_cpus", lambda: cpus)
        monkeypatch.setattr(local_machine, "available_gpus", lambda: list(gpus))
        monkeypatch.setattr(local_machine, "available_bytes", lambda: memory)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    return has


@pytest.mark.parametrize(
    ("asked", "cpus_each"),
    [
        ((0, 0, -1), [1] * 8),
        ((3, 0, -1), [2, 2, 2]),
        ((0, 3, -1), [3, 3]),
        ((9, 3, -1), [3, 3]),  # as many as fit
        ((1, 3, 0), [3]),
        ((20, 0, 0), [1] * 8),
    ],
    ids=str,
)
def test_cpus_are_shared_out_evenly(machine, asked, cpus_each):
    machine(8)
    shares = share_out(*asked)
    assert [share.cpus for share in shares] == cpus_each
    assert [share.environment for share in shares] == [
        {"OMP_NUM_THREADS": str(cpus)} for cpus in cpus_each
    ]


@pytest.mark.parametrize(
    ("cpus", "num_tasks", "cpus_each"),
    [
        (1, 0, [1]),
        (2, 0, [1] * 2),
        (2, 1, [2]),
        (3, 9, [1] * 3),
        (16, 100, [1] * 16),
        (16, 8, [2] * 8),
        (16, 3, [5] * 3),
        (16, 1, [16]),
    ],
)
def test_few_tasks_get_few_large_workers(machine, cpus, num_tasks, cpus_each):
    machine(cpus)
    assert [share.cpus for share in share_out(0, 0, -1, num_tasks=num_tasks)] == cpus_each


@pytest.mark.parametrize(("memory", "cpus_each"), [(64e9, [1] * 16), (6e9, [4] * 4), (1e9, [16])])
def test_little_memory_holds_few_workers(machine, memory, cpus_each):
    machine(16, memory=memory)
    assert [share.cpus for share in share_out(0, 0, -1)] == cpus_each
    assert len(share_out(16, 1, 0)) == 16  # who asks for them gets them


def test_each_worker_sees_its_own_gpus(machine):
    machine(96, "0", "1", "GPU-2", "3")

    def seen(*asked):
        shares = share_out(*asked)
        return shares[0].cpus, [share.environment["CUDA_VISIBLE_DEVICES"] for share in shares]

    assert seen(0, 0, -1) == (24, ["0", "1", "GPU-2", "3"])
    assert seen(0, 0, 2) == (48, ["0,1", "GPU-2,3"])
    assert seen(0, 0, 0.5) == (12, ["0", "0", "1", "1", "GPU-2", "GPU-2", "3", "3"])
    assert seen(2, 4, 1) == (4, ["0", "1"])
    assert "CUDA_VISIBLE_DEVICES" not in share_out(0, 0, 0)[0].environment
    assert len(share_out(0, 0, -1, num_tasks=1)) == 4
    machine(2, "0", "1", "2", "3")
    assert seen(0, 0, -1) == (1, ["0", "1"])  # fewer CPUs than GPUs


def test_worker_that_does_not_fit_is_refused(machine):
    machine(2, "0")
    for asked in ((0, 7, -1), (0, 0, 2)):
        with pytest.raises(UsageError, match="does not fit on this machine: it has 2 CPUs and 1 G"):
            share_out(*asked)
    with pytest.raises(UsageError, match=r"gpus_per_worker is 1\.5"):
        share_out(0, 0, 1.5)
    assert share_out(0, 7, 0, num_cpus=7)[0].cpus == 7


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "20000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({}, 8),
    ],
    ids=str,
)
def test_container_is_as_large_as_its_quota(tmp_path, monkeypatch, files, cpus):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(local_machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert available_cpus() == cpus


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.max": "2000000000\n"}, 2e9),
        ({"memory/memory.limit_in_bytes": "3000000000\n"}, 3e9),
        ({"memory.max": "max\n"}, 8 * 4096),
        ({"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 8 * 4096),  # none
        ({}, 8 * 4096),
    ],
    ids=str,
)
def test_container_has_no_more_memory_than_its_limit(tmp_path, monkeypatch, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    pages = 8 if expected == 8 * 4096 else 1 << 30
    values = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": pages}
    monkeypatch.setattr(local_machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sysconf", values.__getitem__)
    assert available_bytes() == expected


def test_memory_that_nobody_tells_is_no_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(local_machine, "_CGROUP", tmp_path)
    monkeypatch.delattr(os, "sysconf")
    assert available_bytes() == math.inf
