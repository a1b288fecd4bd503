"""A Ray cluster of real processes on this machine: a head with the jobs API, and more nodes.

Every node is a ``ray start --block`` of its own on a loopback address of its own, with ports of its
own. Processes are ended by their own ids, whatever else runs Ray here.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
PROGRAM = f"{sys.executable} -m pipelines"  # for one4all submit --program
_MARK = "ONE4ALL_TEST_CLUSTER"
_START_SECONDS = 180


@dataclass
class Node:
    """One node: the process that started it, and where its metrics are."""

    ip: str
    process: subprocess.Popen[bytes]
    metrics_url: str
    log: Path


class RayCluster:
    """A head and any number of nodes; use `ray_cluster`.

    Attributes:
        address: Of the jobs API.
        nodes: The head is the first.
        variables: What a client of the cluster needs in its environment; its token is in it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mark = uuid.uuid4().hex
        self._port, self._dashboard_port = free_port(), free_port()
        self.address = f"http://127.0.0.1:{self._dashboard_port}"
        self.nodes: list[Node] = []
        self.variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
        self._clients: list[subprocess.Popen[str]] = []

    def start_head(self, *, num_cpus: int = 0) -> Node:
        head = self._start(
            "--head",
            f"--port={self._port}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self._dashboard_port}",
            f"--ray-client-server-port={free_port()}",
            f"--temp-dir={self._folder}",
            num_cpus=num_cpus,
        )
        self._wait_for(head, lambda: head.ip in self._alive())
        return head

    def add_node(self, *, num_cpus: int = 1) -> Node:
        """Another node, on the next loopback address.

        The cluster knows it on return: nodes that start at once may choose the same sockets.
        """
        node = self._start(f"--address={self.nodes[0].ip}:{self._port}", num_cpus=num_cpus)
        self._wait_for(node, lambda: node.ip in self._alive())
        return node

    def announce_loss(self, node: Node, *, seconds: int) -> None:
        """Tell the cluster what a cloud tells of a spot node; the node itself stays."""
        drain = ["drain-node", f"--address={self.nodes[0].ip}:{self._port}"]
        drain += [f"--node-id={self._alive()[node.ip]}", "--reason-message=spot"]
        drain += ["--reason=DRAIN_NODE_REASON_PREEMPTION"]
        drain += [f"--deadline-remaining-seconds={seconds}"]
        subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", *drain],
            env=os.environ | self.variables,
            check=True,
            capture_output=True,
            timeout=120,
        )

    def lose(self, *nodes: Node) -> None:
        """End nodes without notice; the cluster knows on return."""
        for node in nodes:
            root = psutil.Process(node.process.pid)
            below = root.children(recursive=True)
            # None if its loss was announced: then it leaves by itself.
            raylet = next((child for child in below if child.name().startswith("raylet")), None)
            kill_tree(root, first=raylet)
            node.process.wait(timeout=30)
        lost = {node.ip for node in nodes}
        self._wait_for(self.nodes[0], lambda: not lost & self._alive().keys())

    @staticmethod
    def _wait_for(node: Node, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not condition():
            assert node.process.poll() is None, node.log.read_text()
            assert time.monotonic() < deadline, node.log.read_text()
            time.sleep(0.5)

    def metrics(self) -> set[str]:
        """Names of our metrics that some node exports now."""
        names: set[str] = set()
        for node in self.nodes:
            with suppress(OSError), urllib.request.urlopen(node.metrics_url, timeout=5) as answer:
                page = answer.read().decode()
                names |= set(re.findall(r"^(ray_one4all_\w+)", page, re.MULTILINE))
        return names

    def _alive(self) -> dict[str, str]:
        """Ids of the nodes that are alive, by address."""
        with suppress(OSError), self.get("/api/v0/nodes?limit=100&detail=1") as answer:
            nodes = json.load(answer)["data"]["result"]["result"]
            return {n["node_ip"]: n["node_id"] for n in nodes if n["state"] == "ALIVE"}
        return {}

    def get(self, path: str) -> http.client.HTTPResponse:
        """Ask the dashboard."""
        token = {"Authorization": f"Bearer {self.variables['RAY_AUTH_TOKEN']}"}
        request = urllib.request.Request(self.address + path, headers=token)
        return urllib.request.urlopen(request, timeout=10)

    def open(self, command: list[str], **environment: str) -> subprocess.Popen[str]:
        """Start a client of the cluster; output and errors are one stream of lines."""
        client = subprocess.Popen(
            command,
            env=os.environ | self.variables | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._clients.append(client)
        return client

    def end_clients(self) -> None:
        """End the clients that a test has left, so that its failure stays its own."""
        for client in self._clients:
            with client:  # closes its pipe, waits for it
                if client.poll() is None:
                    kill_tree(psutil.Process(client.pid))
        self._clients.clear()

    def stop(self) -> None:
        """End all that was started here; nothing of it is left."""
        for node in reversed(self.nodes):
            with suppress(psutil.NoSuchProcess):
                kill_tree(psutil.Process(node.process.pid))
            node.process.wait(timeout=30)
        for process in self.processes():  # whose parent died before them
            with suppress(psutil.NoSuchProcess):
                kill_tree(process)

    def processes(self) -> list[psutil.Process]:
        """What is alive of this cluster, by its folder or by the mark that children inherit."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                ours = process.environ().get(_MARK) == self._mark or any(
                    str(self._folder) in argument for argument in process.cmdline()
                )
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def _start(self, *options: str, num_cpus: int) -> Node:
        ip = f"127.0.0.{len(self.nodes) + 2}"  # Ray takes 127.0.0.1 for the machine's own address
        metrics_port = free_port()
        log = self._folder / f"node-{len(self.nodes)}.log"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *options]
        command += [
            f"--node-ip-address={ip}",
            f"--num-cpus={num_cpus}",
            "--object-store-memory=100000000",
            f"--dashboard-agent-listen-port={free_port()}",
            f"--dashboard-agent-grpc-port={free_port()}",
            f"--metrics-export-port={metrics_port}",
            "--disable-usage-stats",
        ]
        environment = os.environ | {
            _MARK: self._mark,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "RAY_USAGE_STATS_ENABLED": "0",
            # A lost node is known after five of them, instead of 15 s.
            "RAY_health_check_period_ms": "1000",
            # Ray Train asks for the workers of a drained node once more, and for 60 s.
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
            **self.variables,
        }
        environment.pop("RAY_ADDRESS", None)
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
        node = Node(ip, process, f"http://{ip}:{metrics_port}/metrics", log)
        self.nodes.append(node)
        return node


@contextmanager
def ray_cluster(*, num_nodes: int = 0) -> Iterator[RayCluster]:
    """A cluster with a head and some nodes, which inherit the environment of this process."""
    # Sockets live below it, and their paths must be short.
    folder = Path(tempfile.mkdtemp(prefix="o4-", dir="/tmp"))
    cluster = RayCluster(folder)
    try:
        cluster.start_head()
        for _ in range(num_nodes):
            cluster.add_node()
        yield cluster
    finally:
        cluster.stop()
        left = cluster.processes()
        shutil.rmtree(folder, ignore_errors=True)
        assert not left, f"orphans: {left}"


def kill_tree(root: psutil.Process, *, first: psutil.Process | None = None) -> None:
    """SIGKILL a process and all below it, ``first`` before the others."""
    tree = [root, *root.children(recursive=True)]
    for process in ([first] if first else []) + tree:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(tree, timeout=30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
