"""Starting or joining Ray, quietly."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from one4all.errors import One4AllError
from one4all.extras import require

if TYPE_CHECKING:  # it brings PyTorch, for which `one4all submit` would wait
    from pipelines.settings import RayConfig

# Must be set before Ray starts.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # Ray prints to standard output whenever a worker dies; we say ourselves what became of it.
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
    "RAY_TRAIN_V2_ENABLED": "1",
}
_NOISY_LOGGERS = ("ray", "ray.data", "ray.train")


def prepare_environment() -> None:
    """Set Ray's variables, unless they are set.

    Token authentication would be switched on by the mere presence of ~/.ray/auth_token, which an
    earlier local session leaves behind: a token is used if the environment gives one.
    """
    token = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    variables = _ENVIRONMENT | {"RAY_AUTH_MODE": "token" if token else "disabled"}
    for name, value in variables.items():
        os.environ.setdefault(name, value)


@contextmanager
def ray_session(config: RayConfig) -> Iterator[None]:
    """Join the Ray that is running here or is named by ``config``, or start a local one.

    A session that was running before is left running. A local one stops with the block.
    """
    require("ray", "jobs")
    prepare_environment()
    import ray

    if ray.is_initialized():
        yield
        return
    address = config.address or os.environ.get("RAY_ADDRESS", "")
    with our_signal_handlers():
        try:
            if address:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            else:
                ray.init(
                    address="local",
                    num_cpus=config.num_cpus or None,
                    object_store_memory=config.object_store_bytes,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
        except Exception as error:  # Ray raises plain Exception when a node does not start in time
            reason = str(error).strip().partition("\n")[0]
            where = f"join the Ray cluster at {address}" if address else "start Ray here"
            raise One4AllError(f"cannot {where}: {reason}") from error
    try:
        import ray.data
        import ray.train

        for name in _NOISY_LOGGERS:  # after the imports, which set their own levels
            logging.getLogger(name).setLevel(logging.CRITICAL)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        # A shard may take longer than Ray's default of 30 minutes without an output row.
        context.execution_no_progress_timeout_s = -1
        context.max_errored_blocks = 0
        yield
    finally:
        ray.shutdown()


@contextmanager
def our_signal_handlers() -> Iterator[None]:
    """Put back what Ray replaces in the block.

    The handler of SIGTERM that `ray.init` installs hides who stopped the run.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def worker_layout(
    num_workers: int, cpus_per_worker: int, gpus_per_worker: float
) -> tuple[int, int, float]:
    """Actors, CPUs each, GPUs each: what was asked for, completed by what the cluster has.

    Args:
        num_workers: 0 for as many as fit.
        cpus_per_worker: 0 for a fair share of a node.
        gpus_per_worker: Below 0 for one if there is any.
    """
    import ray

    all_nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = [node["Resources"] for node in all_nodes if node["Alive"]]
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    # A cluster that grows from nothing has no CPUs yet; then the settings must say it all.
    cpus_of_a_node = int(min((node["CPU"] for node in nodes if node.get("CPU")), default=1))
    gpus_each = gpus_per_worker if gpus_per_worker >= 0 else (1.0 if gpus else 0.0)
    if gpus_each:
        gpus_of_a_node = max(node.get("GPU", 0.0) for node in nodes)
        per_node = max(1, int(gpus_of_a_node / gpus_each))
        cpus_each = cpus_per_worker or max(1, cpus_of_a_node // per_node)
        return num_workers or max(1, int(gpus / gpus_each)), cpus_each, gpus_each
    cpus_each = cpus_per_worker or cpus_of_a_node
    total = sum(int(node.get("CPU", 0.0)) // cpus_each for node in nodes)
    return num_workers or max(1, total), cpus_each, 0.0
