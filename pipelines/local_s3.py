"""A real S3 endpoint on localhost, for the demo and the tests: moto's server as a process.

moto looks whether an object exists and then writes it, in several threads: of two writers that both
ask for a new object, both may succeed. So conditional requests go through it one at a time.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from one4all.errors import One4AllError
from one4all.extras import require

_START_SECONDS = 60
_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "local",
    "AWS_SECRET_ACCESS_KEY": "local",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@contextmanager
def local_s3(*buckets: str) -> Iterator[str]:
    """Start the server, create buckets, and point this process and its children to it.

    Args:
        buckets: Names, three characters or more.

    Yields:
        The endpoint's URL; also in AWS_ENDPOINT_URL until the block ends.

    Raises:
        UsageError: moto is not installed.
        One4AllError: The server does not start.
    """
    require("moto", "demo")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "pipelines.local_s3", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"MOTO_S3_DEFAULT_KEY_BUFFER_SIZE": "65536"},
    )
    before = {name: os.environ.get(name) for name in (*_CREDENTIALS, "AWS_ENDPOINT_URL")}
    os.environ.update(_CREDENTIALS, AWS_ENDPOINT_URL=endpoint)
    try:
        _wait_until_ready(server, endpoint)
        import boto3

        client = boto3.client("s3")
        for bucket in buckets:
            client.create_bucket(Bucket=bucket)
        yield endpoint
    finally:
        server.terminate()
        server.wait(timeout=30)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _wait_until_ready(server: subprocess.Popen[bytes], endpoint: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{endpoint}/moto-api/", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise One4AllError(f"the local S3 server at {endpoint} does not answer")


def conditions_in_turn(answer: Callable[..., Any]) -> Callable[..., Any]:
    """A WSGI method that answers requests with a condition one at a time."""
    one_at_a_time = threading.Lock()

    def answer_in_turn(server: Any, environ: dict[str, Any], start_response: Any) -> Any:
        if environ.keys().isdisjoint({"HTTP_IF_NONE_MATCH", "HTTP_IF_MATCH"}):
            return answer(server, environ, start_response)
        with one_at_a_time:
            return answer(server, environ, start_response)

    return answer_in_turn


def _serve(port: str) -> None:
    from moto import server

    application = server.DomainDispatcherApplication
    application.__call__ = conditions_in_turn(application.__call__)
    server.main(["-H", "127.0.0.1", "-p", port])


if __name__ == "__main__":
    _serve(sys.argv[1])
