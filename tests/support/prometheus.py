"""A real Prometheus, from Debian's package, on loopback; it is installed by install_debian.sh."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml
from support.ray_cluster import free_port

SCRAPE_SECONDS = 2


class Prometheus:
    """Asks a server on a port of this machine."""

    def __init__(self, port: int) -> None:
        self._address = f"http://127.0.0.1:{port}/api/v1"

    def query(self, expression: str) -> dict[str, float]:
        """Values of an instant query, by their labels as text; "" for a value without labels."""
        question = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"{self._address}/query?{question}", timeout=30) as answer:
            result = json.load(answer)["data"]["result"]
        return {
            ",".join(f"{k}={v}" for k, v in sorted(one["metric"].items())): float(one["value"][1])
            for one in result
        }

    def is_ready(self) -> bool:
        with suppress(OSError):
            self.query("vector(1)")
            return True
        return False


def program(name: str = "prometheus") -> str | None:
    """Path of ``prometheus`` or ``promtool``; None if Debian's package is not installed."""
    return shutil.which(name)


@contextmanager
def prometheus(folder: Path, targets: Sequence[str]) -> Iterator[Prometheus]:
    """One that scrapes some HOST:PORT, and ends with the block."""
    port = free_port()
    scrape = {"job_name": "ray", "static_configs": [{"targets": list(targets)}]}
    settings = {
        "global": {"scrape_interval": f"{SCRAPE_SECONDS}s", "scrape_timeout": f"{SCRAPE_SECONDS}s"},
        "scrape_configs": [scrape],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
    command = [str(program()), f"--config.file={folder / 'prometheus.yml'}"]
    command += [f"--storage.tsdb.path={folder / 'tsdb'}", f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        server = Prometheus(port)
        deadline = time.monotonic() + 60
        while not server.is_ready():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        process.wait(timeout=30)
