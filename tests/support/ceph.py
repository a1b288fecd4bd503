"""A real S3 server on localhost: Ceph's gateway, with one monitor and one store in memory.

Unlike moto's it checks signatures and serves requests side by side, so refusals and races are real.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from one4all.errors import One4AllError, UsageError

_PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "radosgw", "radosgw-admin")
_START_SECONDS = 60
_STOP_SECONDS = 10
_TAIL_LINES = 6
_VARIABLES = {
    "AWS_ACCESS_KEY_ID": "ceph",
    "AWS_SECRET_ACCESS_KEY": "ceph-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    # Ceph 16 refuses uploads with a checksum behind the body, which is what pyarrow sends.
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
}
# One copy of everything on one store, no authentication between the servers, all below one folder.
# The monitor decides ten times a second instead of once: a start takes 3 s instead of 13. The store
# changes no map on start: at times it would ask before it knows the fsid, be refused, and end.
_CONF = """\
[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{mon_port}
mon initial members = a
mon allow pool size one = true
paxos propose interval = 0.1
auth cluster required = none
auth service required = none
auth client required = none
ms bind msgr2 = false
ms bind ipv6 = false
run dir = {folder}
admin socket =
log to file = false
log to stderr = true
mon data = {folder}/mon
osd data = {folder}/osd
osd objectstore = memstore
osd crush chooseleaf type = 0
osd crush update on start = false
osd class update on start = false
osd pool default size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
memstore device bytes = 4294967296
memstore page size = 65536
[osd]
public addr = 127.0.0.1
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{s3_port}
"""


def missing_programs() -> list[str]:
    """What is not installed of what `local_ceph` needs."""
    return [program for program in _PROGRAMS if shutil.which(program) is None]


@contextmanager
def local_ceph(*buckets: str) -> Iterator[str]:
    """Start the servers, create a user and buckets, and point this process to them.

    Args:
        buckets: Names, three characters or more.

    Yields:
        The endpoint's URL; also in AWS_ENDPOINT_URL until the block ends.

    Raises:
        UsageError: Ceph is not installed.
        One4AllError: A server does not start; with the ends of the logs.
    """
    if missing := missing_programs():
        raise UsageError(f"a local Ceph needs {', '.join(missing)}: make test-ceph installs it")
    mon_port, s3_port = _free_ports(2)
    endpoint = f"http://127.0.0.1:{s3_port}"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="ceph-")))
        cluster = _Cluster(folder, mon_port, s3_port)
        stack.callback(cluster.stop)
        cluster.start_all()
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in (_VARIABLES | {"AWS_ENDPOINT_URL": endpoint}).items():
            patch.setenv(name, value)
        import boto3

        client = boto3.Session().client("s3")  # the default one keeps the keys it began with
        for bucket in buckets:
            client.create_bucket(Bucket=bucket)
        yield endpoint


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


class _Cluster:
    """The servers of one folder; each process logs to a file named after its program."""

    def __init__(self, folder: Path, mon_port: int, s3_port: int) -> None:
        self._folder = folder
        self._s3_port = s3_port
        self._servers: list[subprocess.Popen[bytes]] = []
        conf = folder / "ceph.conf"
        conf.write_text(
            _CONF.format(folder=folder, fsid=uuid.uuid4(), mon_port=mon_port, s3_port=s3_port)
        )
        # `ceph` is a script of the system's Python, to which our path means nothing.
        ours = ("CEPH_", "PYTHON")
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        self._environment["CEPH_CONF"] = str(conf)

    def start_all(self) -> None:
        for name in ("mon", "osd"):
            (self._folder / name).mkdir()
        osd_id = str(uuid.uuid4())
        self._run("ceph-mon", "--mkfs", "-i", "a", "--keyring", os.devnull)
        self._serve("ceph-mon", "-f", "-i", "a")
        self._run("ceph", "osd", "new", osd_id, "0")
        self._run("ceph", "osd", "crush", "add", "osd.0", "1", "root=default")
        self._run("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", osd_id)
        self._serve("ceph-osd", "-f", "-i", "0")
        key, secret = _VARIABLES["AWS_ACCESS_KEY_ID"], _VARIABLES["AWS_SECRET_ACCESS_KEY"]
        user = ("--uid", "tests", "--display-name", "tests")
        self._run("radosgw-admin", "user", "create", *user, "--access-key", key, "--secret", secret)
        self._serve("radosgw", "-f", "-n", "client.rgw")
        self._wait(self._answers, "radosgw does not answer")

    def stop(self) -> None:
        """Last come, first gone: each takes its leave of the one before."""
        while self._servers:
            _end(self._servers.pop())

    def _serve(self, *command: str) -> None:
        self._servers.append(self._spawn(command))

    def _run(self, *command: str) -> None:
        process = self._spawn(command)
        try:
            self._wait(lambda: process.poll() is not None, f"{command[0]} does not end")
        finally:
            _end(process)
        if process.returncode:
            raise self._error(f"{' '.join(command)}: exit code {process.returncode}")

    def _spawn(self, command: tuple[str, ...]) -> subprocess.Popen[bytes]:
        with (self._folder / f"{command[0]}.log").open("ab") as log:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment
            )

    def _wait(self, happened: Callable[[], bool], otherwise: str) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not happened():
            for server in self._servers:
                if server.poll() is not None:
                    raise self._error(f"{server.args[0]} ended by itself")
            if time.monotonic() > deadline:
                raise self._error(f"{otherwise} in {_START_SECONDS} s")
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self._s3_port), timeout=1).close()
        except OSError:
            return False
        return True

    def _error(self, what: str) -> One4AllError:
        logs = []
        for path in sorted(self._folder.glob("*.log")):
            lines = [line for line in path.read_text(errors="replace").splitlines() if line]
            logs += [f"--- {path.name}", *lines[-_TAIL_LINES:]]
        return One4AllError("\n".join([f"the local Ceph does not start: {what}", *logs]))


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
