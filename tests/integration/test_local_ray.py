"""The Ray that a run starts on this machine is nobody else's."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

STRANGER = """
import ray, sys
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
print("ran as", ray.get(ray.remote(lambda: "a guest").options(num_cpus=0).remote(), timeout=60))
"""

IMPORTED_BEFORE = """
import psutil, ray
from pipelines.ray_session import ray_session
from pipelines.settings import RayConfig

with ray_session(RayConfig(num_cpus=1)):
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    sockets = [s for process in processes for s in process.net_connections()]
    print({s.laddr.ip.removeprefix("::ffff:") for s in sockets if s.status == psutil.CONN_LISTEN})
"""


def let_in(environment: dict[str, str], tmp_path: Path) -> bool:
    """Whether a process that knows the address, and this environment, runs code in the session."""
    import ray

    bare = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # or Ray will not look on loopback
        "RAY_NUM_REDIS_GET_RETRIES": "2",  # it gives up sooner
    }
    guest = subprocess.run(
        [sys.executable, "-c", STRANGER, ray.get_runtime_context().gcs_address],
        env=bare | environment,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert (guest.returncode == 0) == ("ran as a guest" in guest.stdout), guest.stderr
    return guest.returncode == 0


@pytest.mark.fault("stranger who reaches the Ray of a local run")
@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RAY_AUTH_MODE": "disabled"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
    ],
    ids=["nothing", "no authentication", "another token"],
)
def test_a_stranger_is_refused(ray_local, tmp_path, environment):
    assert not let_in(environment, tmp_path)


def test_who_has_the_token_is_let_in(ray_local, tmp_path):
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    assert let_in({name: os.environ[name] for name in names}, tmp_path)


def test_nothing_listens_beyond_this_machine(ray_local):
    import ray

    ray.get(ray.remote(lambda: None).options(num_cpus=0).remote())  # so that there is a worker
    # Whoever trained in an earlier test, and listens for its peers, may take a while to end.
    deadline = time.monotonic() + 60
    while (found := _listening()) and time.monotonic() < deadline:
        if len(found) > 5 and all(ip == "127.0.0.1" for ip, _ in found):
            break
        time.sleep(1)
    assert len(found) > 5
    assert {(ip, who) for ip, who in found if ip != "127.0.0.1"} == set()


def test_nothing_listens_beyond_this_machine_if_ray_was_imported_before():
    alone = subprocess.run(
        [sys.executable, "-c", IMPORTED_BEFORE],
        capture_output=True,
        text=True,
        timeout=150,
        check=True,
    )
    assert alone.stdout == "{'127.0.0.1'}\n"


def _listening() -> list[tuple[str, str]]:
    """Address, and command line, of every socket of ours that somebody may connect to."""
    ours = {process.pid: process for process in _processes()}
    return [
        (connection.laddr.ip.removeprefix("::ffff:"), _command(ours[connection.pid]))
        for connection in psutil.net_connections("inet")
        if connection.pid in ours and connection.status == psutil.CONN_LISTEN
    ]


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return "gone"


def test_the_token_is_in_no_argument_and_in_no_file_that_others_can_read(ray_local):
    import ray

    token = os.environ["RAY_AUTH_TOKEN"]
    assert len(token) == 64
    for process in _processes():
        assert not any(token in argument for argument in process.cmdline())
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    assert stat.S_IMODE(session.parents[1].stat().st_mode) == 0o700
    files = [path for path in session.rglob("*") if path.is_file()]
    assert files
    assert not any(token.encode() in path.read_bytes() for path in files)


def _processes() -> list[psutil.Process]:
    """The driver, which is this process, and all of Ray below it."""
    return [psutil.Process(), *psutil.Process().children(recursive=True)]
