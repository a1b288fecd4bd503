"""Room for workers: how large each is on which nodes, and what is said while none can start."""

import logging
import time

import pytest

from one4all.errors import UsageError
from pipelines import placement
from pipelines.placement import await_room, nodes_in_words, watched_start
from pipelines.ray_session import worker_layout
from pipelines.settings import RayConfig

pytest.importorskip("ray")
CLUSTER = RayConfig(address="10.0.0.1:6379")


def nodes(*sizes):
    """Nodes of (CPUs, GPUs)."""
    return [
        {"Alive": True, "NodeID": str(i), "Resources": {"CPU": float(cpus), "GPU": float(gpus)}}
        for i, (cpus, gpus) in enumerate(sizes)
    ]


@pytest.fixture
def cluster(monkeypatch):
    """Decides which nodes there are; no autoscaler, and no time that passes."""
    there = []
    monkeypatch.setattr("ray.nodes", lambda: list(there))
    monkeypatch.setattr(placement, "_has_autoscaler", lambda: False)
    return there


GPU_NODE, CPU_NODE, HEAD = (96, 8), (32, 0), (4, 0)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([GPU_NODE] * 2, (16, 12, 1.0)),
        ([GPU_NODE] * 2 + [CPU_NODE] * 3, (16, 12, 1.0)),
        ([HEAD] + [GPU_NODE] * 2, (16, 12, 1.0)),
        ([(0, 0)] + [GPU_NODE] * 2, (16, 12, 1.0)),
        ([GPU_NODE] * 2 + [(4, 1)], (16, 12, 1.0)),  # its GPU is not worth CPUs of all the others
        ([(96, 8), (16, 4)], (12, 4, 1.0)),  # but four of twelve are
        ([(2, 8)], (2, 1, 1.0)),  # fewer CPUs than GPUs
        ([(2, 0)] * 2, (4, 1, 0.0)),
        ([HEAD] + [(96, 0)] * 2, (196, 1, 0.0)),
        ([(8, 0), (16, 0)], (24, 1, 0.0)),
        ([(0, 0), (8, 0)], (8, 1, 0.0)),
    ],
    ids=str,
)
def test_workers_are_as_large_as_their_nodes_allow(cluster, sizes, expected):
    cluster += nodes(*sizes)
    assert worker_layout(0, 0, -1) == expected


@pytest.mark.parametrize(
    ("num_tasks", "expected"),
    [(1, (2, 16, 0.0)), (4, (4, 8, 0.0)), (5, (6, 5, 0.0)), (16, (16, 2, 0.0)), (99, (32, 1, 0.0))],
)
def test_few_tasks_get_large_workers_on_a_cluster(cluster, num_tasks, expected):
    cluster += nodes((16, 0), (16, 0), (0, 0))
    assert worker_layout(0, 0, -1, num_tasks=num_tasks) == expected


def test_nodes_with_little_memory_get_large_workers(cluster):
    cluster += nodes((16, 0), (16, 0))
    for node in cluster:
        node["Resources"]["memory"] = 6e9
    assert worker_layout(0, 0, -1) == (8, 4, 0.0)


def test_fractions_of_a_gpu_share_its_cpus(cluster):
    cluster += nodes(GPU_NODE)
    assert worker_layout(0, 0, 0.5) == (16, 6, 0.5)
    assert worker_layout(0, 4, 0.1) == (24, 4, 0.1)
    assert worker_layout(3, 0, 2) == (3, 24, 2)


def test_empty_cluster_is_not_one_small_worker(cluster):
    cluster += nodes((0, 0))
    with pytest.raises(UsageError, match=r"no node of the cluster has a CPU.*--set num_workers"):
        worker_layout(0, 0, -1)
    with pytest.raises(UsageError, match="no node of the cluster has a CPU"):
        worker_layout(4, 7, -1)  # whether with GPUs is not said
    assert worker_layout(0, 7, 0) == (1, 7, 0.0)  # all that matters is said; their number grows


def test_worker_that_no_node_can_hold_is_refused(cluster, monkeypatch, caplog):
    cluster += nodes((2, 0), (2, 0), (4, 1))
    problem = (
        "no node can hold a worker of 7 CPUs: there are 2 nodes of 2 CPUs, 1 node of 4 CPUs and "
        "1 GPU, and no autoscaler"
    )
    began = time.monotonic()
    with pytest.raises(UsageError, match=problem):
        await_room(RayConfig(), cpus=7, gpus=0)
    assert time.monotonic() - began < 1, "nobody joins a Ray of our own"
    with pytest.raises(UsageError, match="a worker of 4 CPUs and 2 GPUs"):
        await_room(RayConfig(), cpus=4, gpus=2)
    monkeypatch.setattr(placement, "SAY_SECONDS", 0.01)
    monkeypatch.setattr(placement, "GIVE_UP_SECONDS", 0.05)
    monkeypatch.setattr(placement, "_POLL_SECONDS", 0.01)
    with caplog.at_level(logging.WARNING), pytest.raises(UsageError, match=problem):
        await_room(CLUSTER, cpus=7, gpus=0)
    assert [record.getMessage().split(": there")[0] for record in caplog.records] == [
        "no node can hold a worker of 7 CPUs"
    ]


def test_node_or_autoscaler_that_comes_is_waited_for(cluster, monkeypatch):
    cluster += nodes((2, 0))
    monkeypatch.setattr(time, "sleep", lambda seconds: cluster.extend(nodes((8, 0))))
    await_room(CLUSTER, cpus=7, gpus=0)
    assert len(cluster) == 2
    monkeypatch.setattr(placement, "_has_autoscaler", lambda: True)
    await_room(CLUSTER, cpus=7000, gpus=0)


def test_silence_of_workers_is_broken(cluster, monkeypatch, caplog):
    cluster += nodes((8, 0))
    monkeypatch.setattr("ray.get_runtime_context", lambda: type("", (), {"get_job_id": str})())
    monkeypatch.setattr(placement, "SAY_SECONDS", 0.05)
    monkeypatch.setattr(placement, "_free", lambda: {"0": {"CPU": 1.0}})
    started = []
    monkeypatch.setattr(placement, "_has_started", lambda *_: bool(started))
    with caplog.at_level(logging.WARNING), watched_start("W", cpus=7, gpus=0):
        time.sleep(0.3)
    [said] = caplog.messages
    assert said.endswith("each asks for 7 CPUs; there are 1 node of 8 CPUs (1 CPU free)")
    caplog.clear()
    started.append(1)
    with watched_start("W", cpus=7, gpus=0):
        time.sleep(0.2)
    assert not caplog.messages


def test_nodes_of_a_kind_are_counted_together():
    assert nodes_in_words(nodes((1, 0))) == "1 node of 1 CPU"
