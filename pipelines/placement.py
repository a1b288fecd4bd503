"""Room for workers on the nodes of a cluster, and what is said while there is none.

Ray waits without a word, and without end, for a node that can hold a worker. So does nobody here.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from one4all.errors import UsageError
from pipelines.ray_session import joins_cluster
from pipelines.settings import RayConfig

_log = logging.getLogger(__name__)

SAY_SECONDS = 15.0  # without a worker that starts, until it is said
SAY_AGAIN_SECONDS = 300.0
GIVE_UP_SECONDS = 300.0  # for a node that somebody starts by hand
_POLL_SECONDS = 1.0


def await_room(config: RayConfig, *, cpus: int, gpus: float) -> None:
    """Wait until some node can hold a worker, or there is an autoscaler that may bring one.

    Whether the node is free does not matter: a node that is busy will be free again.

    Args:
        config: How Ray was reached: nobody else can join a Ray of our own, so that is not waited
            for.
        cpus, gpus: Of one worker.

    Raises:
        UsageError: No node could ever hold one.
    """
    patience = GIVE_UP_SECONDS if joins_cluster(config) else 0.0
    start, said = time.monotonic(), False
    while True:
        nodes = _nodes()
        if any(_holds(node, cpus, gpus) for node in nodes) or _has_autoscaler():
            return
        problem = (
            f"no node can hold a worker of {in_words(cpus, gpus)}: there are "
            f"{nodes_in_words(nodes)}, and no autoscaler that adds others"
        )
        waited = time.monotonic() - start
        if waited >= patience:
            raise UsageError(f"{problem}; lower cpus_per_worker or gpus_per_worker, or add a node")
        if waited >= SAY_SECONDS and not said:
            _log.warning("%s; waiting %.0f s for such a node", problem, patience - waited)
            said = True
        time.sleep(_POLL_SECONDS)


@contextmanager
def watched_start(class_name: str, *, cpus: int, gpus: float) -> Iterator[None]:
    """Say it within the block if no worker has started for long, until one has.

    Args:
        class_name: Of the workers' actor, or a part of it.
        cpus, gpus: Of one worker.
    """
    import ray

    job = ray.get_runtime_context().get_job_id()
    stop = threading.Event()

    def watch() -> None:
        start, pause = time.monotonic(), SAY_SECONDS
        while not stop.wait(pause) and not _has_started(class_name, job):
            _log.warning(
                "no worker has started for %.0f s: each asks for %s; there are %s",
                *(time.monotonic() - start, in_words(cpus, gpus)),
                nodes_in_words(_nodes(), _free()),
            )
            pause = SAY_AGAIN_SECONDS

    watcher = threading.Thread(target=watch, name="placement", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join(timeout=10)


def in_words(cpus: float, gpus: float) -> str:
    """Resources of a worker or a node: "7 CPUs and 1 GPU"."""
    amounts = [(cpus, "CPU")] + ([(gpus, "GPU")] if gpus else [])
    return " and ".join(f"{amount:g} {unit}" + "s" * (amount != 1) for amount, unit in amounts)


def nodes_in_words(
    nodes: Sequence[Mapping[str, Any]], free: Mapping[str, Mapping[str, float]] | None = None
) -> str:
    """Nodes of the same kind counted together; ``free`` is what is unused of them, by node."""

    def describe(node: Mapping[str, Any]) -> str:
        words = in_words(*_size(node["Resources"]))
        if free is None:
            return words
        return f"{words} ({in_words(*_size(free.get(node['NodeID'], {})))} free)"

    kinds = Counter(map(describe, nodes))
    return ", ".join(
        f"{count} node{'s' * (count > 1)} of {kind}" for kind, count in kinds.most_common()
    )


def _nodes() -> list[dict[str, Any]]:
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in nodes if node["Alive"]]


def _size(resources: Mapping[str, float]) -> tuple[float, float]:
    return resources.get("CPU", 0.0), resources.get("GPU", 0.0)


def _holds(node: Mapping[str, Any], cpus: int, gpus: float) -> bool:
    there = _size(node["Resources"])
    return there[0] >= cpus and there[1] >= gpus


def _free() -> dict[str, dict[str, float]]:
    import ray._private.state as state

    free: Any = state.available_resources_per_node()  # type: ignore[no-untyped-call]
    return dict(free)


def _has_started(class_name: str, job: str) -> bool:
    """Whether an actor of this job has, or had, a process."""
    import ray._private.state as state

    return any(
        actor["Pid"] or actor["State"] in ("ALIVE", "RESTARTING")
        for actor in state.actors().values()
        if class_name in actor["ActorClassName"] and actor["JobID"] == job
    )


def _has_autoscaler() -> bool:
    """Whether something adds nodes on demand.

    The autoscaler of either version tells Ray's head of itself. Without one, version 1 still
    reports: each node as a type of its own, named after the node.
    """
    import ray._private.state as state
    from ray.experimental.internal_kv import _internal_kv_get

    config = state.state.get_cluster_config()
    if config is not None and any(
        group.max_count == -1 or group.max_count > group.min_count
        for group in config.node_group_configs
    ):
        return True
    told = json.loads(_internal_kv_get("__autoscaling_status") or b"{}")
    report = told.get("autoscaler_report") or {}
    return any(not kind.startswith("node_") for kind in report.get("active_nodes") or ())
