"""Starting or joining Ray, quietly. Nobody else gets into a Ray that is started here.

Whoever reaches a Ray may run code in it. So a local one asks for a token that only its own
processes know, listens on loopback alone, and keeps its sockets and logs in a private folder: each
for what the others leave open. A cluster is joined on its own terms.
"""

from __future__ import annotations

import logging
import math
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Any

from one4all.errors import AccessError, One4AllError, UsageError
from one4all.extras import require
from pipelines.local_machine import most_workers

if TYPE_CHECKING:  # it brings PyTorch, for which `one4all submit` would wait
    from pipelines.settings import RayConfig, RunnerName

# Must be set before Ray starts.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # Ray prints to standard output whenever a worker dies; we say ourselves what became of it.
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
    "RAY_TRAIN_V2_ENABLED": "1",
}
_ANSWER_SECONDS = 30.0  # for a cluster, which may be starting its head again; Ray waits 14 minutes
_HOST_AND_PORT = re.compile(r"(?:ray://)?\[?([^/\]]+)\]?:(\d+)")
# What both sides of HTTP/2 begin with, and so of gRPC: the preface of a client, and settings.
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HTTP2_SETTINGS = b"\0\0\0\4\0\0\0\0\0"  # length, type 4, flags, stream
_MAX_SOCKET_PATH = 107 if sys.platform == "linux" else 103  # bytes
_LONGEST_SOCKET = "ray/session_2026-11-01_12-00-00_123456_1234567/sockets/plasma_store"
_MOST = 0.9  # of what could be used, where nodes differ
_NOISY_LOGGERS = ("ray", "ray.data", "ray.train")


def prepare_environment() -> None:
    """Set the variables for joining a Ray, unless they are set.

    Token authentication would be switched on by the mere presence of ~/.ray/auth_token, which a
    local session of another program leaves behind: a token is used if the environment gives one.
    """
    token = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    variables = _ENVIRONMENT | {
        "RAY_AUTH_MODE": "token" if token else "disabled",
        # Each takes 40 s. Ray's 20 would wait for 14 minutes where another token is asked for.
        "RAY_NUM_REDIS_GET_RETRIES": "1",
    }
    for name, value in variables.items():
        os.environ.setdefault(name, value)


@contextmanager
def ray_session(config: RayConfig) -> Iterator[None]:
    """Join the Ray that is running here or is named by ``config``, or start a local one.

    A session that was running before is left running. A local one stops with the block.
    """
    require("ray", "jobs")
    if _is_running():
        yield
        return
    address = _address(config)
    with _joined_ray(address) if address else _local_ray(config):
        _quieten_ray_data()
        yield


def check_cluster(config: RayConfig) -> None:
    """Find out whether there is a cluster to join, if `ray_session` is going to join one.

    Raises:
        AccessError: Nothing like Ray answers there within 30 s.
    """
    address = _address(config)
    if address and not _is_running():
        require("ray", "jobs")
        _await_answer(address)


def uses_ray(runner: RunnerName, config: RayConfig) -> bool:
    """Whether a job is run by Ray: on a cluster, in a Ray that runs here already, or if asked to.

    Otherwise processes of this machine do, see `pipelines.local_pool`.
    """
    if runner == "auto":
        return joins_cluster(config) or _is_running()
    return runner == "ray"


def joins_cluster(config: RayConfig) -> bool:
    """Whether a cluster is joined, and no Ray of our own started, which nobody else can join."""
    return bool(_address(config))


def _address(config: RayConfig) -> str:
    """Of the cluster to join; "" for a Ray of our own."""
    address = config.address or os.environ.get("RAY_ADDRESS", "")
    return "" if address == "local" else address


def _await_answer(address: str) -> None:
    """Wait until a server answers; an address of another form is Ray's to refuse."""
    if address == "auto":
        address = _running_here()
    if (found := _HOST_AND_PORT.fullmatch(address)) is None:
        return
    end = time.monotonic() + _ANSWER_SECONDS
    while True:
        try:
            _greet(found[1], int(found[2]), seconds=max(end - time.monotonic(), 0.1))
            return
        except OSError as error:
            if time.monotonic() + 1 > end:
                raise AccessError(
                    f"no Ray cluster answers at {address} within {_ANSWER_SECONDS:.0f} s: "
                    f"{error.strerror or error}; correct RAY_ADDRESS or ray.address, or unset it "
                    "to start Ray here"
                ) from error
        time.sleep(1)


def _running_here() -> str:
    """The address that Ray takes "auto" for: of the cluster last started on this machine."""
    prepare_environment()
    from ray._private.services import canonicalize_bootstrap_address

    try:
        return canonicalize_bootstrap_address("auto") or ""
    except ConnectionError as error:
        raise AccessError("no Ray cluster runs here, and the address auto asks for one") from error


def _greet(host: str, port: int, *, seconds: float) -> None:
    """Exchange the first bytes of gRPC with a server. Raises: OSError."""
    with socket.create_connection((host, port), timeout=seconds) as connection:
        if os.environ.get("RAY_USE_TLS") == "1":
            return
        connection.sendall(_HTTP2_PREFACE + _HTTP2_SETTINGS)
        if connection.recv(len(_HTTP2_SETTINGS))[3:4] != _HTTP2_SETTINGS[3:4]:
            raise OSError("what answers is not Ray")


def _is_running() -> bool:
    ray = sys.modules.get("ray")  # to be imported only when its variables are set
    return ray is not None and ray.is_initialized()


@contextmanager
def _joined_ray(address: str) -> Iterator[None]:
    _await_answer(address)
    prepare_environment()
    with _ray(f"join the Ray cluster at {address}", address=address):
        yield


@contextmanager
def _local_ray(config: RayConfig) -> Iterator[None]:
    """Start a Ray of our own; what the environment says of authentication is for clusters."""
    with set_variables(_local_variables()), _private_folder() as folder:
        options: dict[str, Any] = {
            "address": "local",
            "num_cpus": config.num_cpus or None,
            "object_store_memory": config.object_store_bytes,
            "include_dashboard": False,
            "_temp_dir": folder,
        }
        with _loopback_alone(), _ray("start Ray here", **options):
            yield


@contextmanager
def _ray(what: str, **options: Any) -> Iterator[None]:
    """Ray with these options of `ray.init`; ``what`` says for an error what they ask for."""
    import ray

    try:
        with _signals_held():
            try:
                ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
            except Exception as error:  # Ray raises plain Exception when a node does not start
                reason = str(error).strip().partition("\n")[0]
                raise One4AllError(f"cannot {what}: {reason}") from error
        yield
    finally:
        ray.shutdown()


@contextmanager
def _signals_held() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM until the block ends, and put back what Ray replaces in it.

    An exception out of the middle of `ray.init` leaves threads behind that crash the process at its
    end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    with our_signal_handlers():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: held.append(number))
        yield
    if held:
        signal.raise_signal(held[0])


def _quieten_ray_data() -> None:
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
    # A pool of actors grows when all of them are busy: each is given one task at a time, so more
    # than that, which Ray wants by default, would never be reached.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0


@cache
def _local_variables() -> Mapping[str, str | None]:
    """The variables of all local sessions of this process: Ray remembers what it read first."""
    return {
        **{name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()},
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_AUTH_TOKEN_PATH": None,
        # Unset, it is switched on for what `ray.init` starts, even if Ray was imported before.
        "RAY_AUTH_MODE": None,
        # Without clusters Ray needs loopback alone; elsewhere than on Linux that is its default.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


@contextmanager
def _loopback_alone() -> Iterator[None]:
    """Tell a Ray that was imported before its variables were set what they would have said."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def set_variables(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Variables of this process and of what it starts, within the block; None unsets one."""
    before = {name: os.environ.get(name) for name in variables}
    _assign(variables)
    try:
        yield
    finally:
        _assign(before)


def _assign(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def _private_folder() -> Iterator[str]:
    """A folder below one that others cannot enter: Ray opens what it is given to all.

    Logs are in it too, and stay behind when the block ends with an exception.
    """
    # Not TMPDIR, which may be long: paths of sockets must not be.
    parent = os.environ.get("RAY_TMPDIR", "/tmp")
    try:
        folder = tempfile.mkdtemp(prefix="one4all-ray-", dir=parent)
    except OSError as error:
        raise One4AllError(
            f"cannot start Ray here: it needs a folder in {parent} ({error.strerror}); set "
            "RAY_TMPDIR to one that this user can write to"
        ) from error
    excess = len(os.fsencode(os.path.join(folder, _LONGEST_SOCKET))) - _MAX_SOCKET_PATH
    if excess > 0:
        os.rmdir(folder)
        raise One4AllError(
            f"cannot start Ray here: paths of its sockets below {parent} would be {excess} bytes "
            "too long; set RAY_TMPDIR to a folder with a shorter path, or unset it for /tmp"
        )
    try:
        yield os.path.join(folder, "ray")
    except BaseException:
        with suppress(OSError):  # it holds logs
            os.rmdir(folder)
        raise
    shutil.rmtree(folder, ignore_errors=True)


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
    num_workers: int, cpus_per_worker: int, gpus_per_worker: float, *, num_tasks: int = 0
) -> tuple[int, int, float]:
    """Workers, CPUs each, GPUs each: what was asked for, completed by what the cluster has.

    All workers are alike. Where they have GPUs, only nodes with GPUs tell how many CPUs each gets:
    a share of its node for each GPU. Of the sizes that nodes suggest, the largest is taken with
    which nine tenths of what could be used are used.

    Args:
        num_workers: 0 for as many as fit.
        cpus_per_worker: 0 for a fair share of a node: for each of its GPUs, or by `most_workers`.
        gpus_per_worker: Below 0 for one if there is any.
        num_tasks: What they will work on, one thing each at a time; 0 if that is not known.

    Raises:
        UsageError: The size of a worker is left to nodes, and no node has a CPU.
    """
    import ray

    all_nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = [node["Resources"] for node in all_nodes if node["Alive"]]
    sizes = [(int(node.get("CPU", 0.0)), node.get("GPU", 0.0)) for node in nodes]
    if not any(cpus for cpus, _ in sizes) and (not cpus_per_worker or gpus_per_worker < 0):
        raise UsageError(
            "no node of the cluster has a CPU for workers yet, so it does not tell how large one "
            "may be; say num_workers, cpus_per_worker and gpus_per_worker, such as --set "
            "num_workers=8 --set cpus_per_worker=12 --set gpus_per_worker=1"
        )
    gpus_each = gpus_per_worker
    if gpus_each < 0:
        gpus_each = 1.0 if any(gpus >= 1 for _, gpus in sizes) else 0.0

    def by_gpus(gpus: float) -> int:
        return int(gpus / gpus_each + 1e-9)

    def workers_on(cpus: int, gpus: float, cpus_each: int) -> int:
        by_cpus = cpus // cpus_each
        return min(by_cpus, by_gpus(gpus)) if gpus_each else by_cpus

    def used(cpus_each: int) -> int:
        """GPUs that would be used, in workers; or CPUs."""
        workers = sum(workers_on(*size, cpus_each) for size in sizes)
        return workers if gpus_each else workers * cpus_each

    cpus_each = cpus_per_worker
    if not cpus_each:
        # Of the tasks, each node with a CPU gets its part.
        on_a_node = -(-num_tasks // max(1, sum(cpus > 0 for cpus, _ in sizes)))
        memories = [float(node.get("memory", math.inf)) for node in nodes]
        shares = {
            max(1, cpus // (by_gpus(gpus) if gpus_each else most_workers(cpus, on_a_node, memory)))
            for (cpus, gpus), memory in zip(sizes, memories, strict=True)
            if cpus and (not gpus_each or by_gpus(gpus))
        } or {1}
        enough = _MOST * max(map(used, shares))
        cpus_each = max(share for share in shares if used(share) >= enough)
    fit = sum(workers_on(*size, cpus_each) for size in sizes)
    return num_workers or max(1, fit), cpus_each, gpus_each
