"""An HTTP proxy between client and S3 server that breaks what it is told to break.

    with FaultProxy(upstream) as proxy:
        proxy.plan(Fault("truncate", r"GET .*\\.tar", times=2, after_bytes=1000))

One request a connection and each body held in memory: made for tests, not for speed. The Host
header is passed on as the client signed it.
"""

from __future__ import annotations

import asyncio
import random
import re
import socket
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, Self
from urllib.parse import urlsplit

Kind = Literal["slow_down", "deny", "no_upload", "reset", "truncate", "latency", "reset_after"]

_REFUSALS = {
    "slow_down": (503, "SlowDown"),
    "deny": (403, "ExpiredToken"),
    "no_upload": (404, "NoSuchUpload"),
}


@dataclass
class Fault:
    """What goes wrong, and with which requests.

    Attributes:
        kind: ``slow_down``, ``deny`` and ``no_upload`` answer 503, 403 and 404 without asking the
            server; ``reset`` resets the connection before anything is answered; ``reset_after``
            does so when the server has already carried the request out; ``truncate`` breaks off
            the body of the answer; ``latency`` waits first.
        pattern: Regular expression on ``METHOD /path?query``.
        times: How many requests it hits; None for all.
        skip: Matching requests that are let through before.
        after_bytes: For ``truncate``: bytes of the body that arrive.
        seconds: For ``latency``.
        probability: Share of the matching requests that are hit.
    """

    kind: Kind
    pattern: str
    times: int | None = 1
    skip: int = 0
    after_bytes: int = 0
    seconds: float = 0.0
    probability: float = 1.0
    hits: int = field(default=0, init=False)

    def takes(self, request: str, chance: random.Random) -> bool:
        if not re.search(self.pattern, request) or chance.random() >= self.probability:
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.times is not None and self.hits >= self.times:
            return False
        self.hits += 1
        return True


class FaultProxy:
    """The proxy, in a thread of its own, as a ``with`` block.

    Attributes:
        endpoint: URL to give to the client.
        requests: ``METHOD /path?query`` of everything that arrived.
    """

    def __init__(self, upstream: str, *, seed: int = 0) -> None:
        self._upstream = urlsplit(upstream)
        self._chance = random.Random(seed)
        self._faults: list[Fault] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.endpoint = ""
        self.requests: list[str] = []

    def plan(self, *faults: Fault) -> None:
        """Replace the faults. The first that takes a request is carried out."""
        self._faults = list(faults)

    def __enter__(self) -> Self:
        self._thread.start()
        starting = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20), self._loop
        )
        self._server = starting.result(timeout=10)
        self.endpoint = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *exception: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(timeout=30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        # One that is already closing its connection is cancelled there, which is as well.
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, client: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)  # the loop itself holds tasks only weakly
        try:
            await self._one_request(client, answer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client went away, the server did, or the test is over
        finally:
            await _close(answer)
            self._tasks.discard(task)

    async def _one_request(
        self, client: asyncio.StreamReader, answer: asyncio.StreamWriter
    ) -> None:
        head = await client.readuntil(b"\r\n\r\n")
        first_line, *lines = head.decode("latin-1").rstrip().split("\r\n")
        method, target, _ = first_line.split(" ", 2)
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        if headers.get("expect", "").lower() == "100-continue":
            answer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await _read_body(client, headers)
        request = f"{method} {target}"
        self.requests.append(request)
        fault = next((f for f in self._faults if f.takes(request, self._chance)), None)
        if fault is not None:
            if fault.kind in _REFUSALS:
                answer.write(_refusal(*_REFUSALS[fault.kind]))
                await answer.drain()
                return
            if fault.kind == "reset":
                _reset(answer)
                return
            if fault.kind == "latency":
                await asyncio.sleep(fault.seconds)
        # The body is whole now, so it goes on with a length instead of chunks.
        dropped = ("expect:", "connection:", "transfer-encoding:", "content-length:")
        kept = [line for line in lines if not line.lower().startswith(dropped)]
        kept += [f"Content-Length: {len(body)}", "Connection: close"]
        upstream, sending = await asyncio.open_connection(
            self._upstream.hostname, self._upstream.port
        )
        try:
            sending.write("\r\n".join([first_line, *kept, "", ""]).encode("latin-1") + body)
            await sending.drain()
            await self._relay(upstream, answer, fault)
        finally:
            await _close(sending)

    async def _relay(
        self, upstream: asyncio.StreamReader, answer: asyncio.StreamWriter, fault: Fault | None
    ) -> None:
        kind = fault.kind if fault else ""
        head = await upstream.readuntil(b"\r\n\r\n")
        if kind == "reset_after":
            await upstream.read()
            _reset(answer)
            return
        answer.write(head)
        left = fault.after_bytes if fault and kind == "truncate" else None
        while left is None or left > 0:
            data = await upstream.read(1 << 16 if left is None else min(left, 1 << 16))
            if not data:
                return
            answer.write(data)
            await answer.drain()
            left = None if left is None else left - len(data)


async def _close(stream: asyncio.StreamWriter) -> None:
    stream.close()
    with suppress(OSError):
        await stream.wait_closed()


async def _read_body(client: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if "chunked" not in headers.get("transfer-encoding", "").lower():
        return await client.readexactly(int(headers.get("content-length", 0)))
    body = b""
    while size := int((await client.readline()).split(b";")[0], 16):
        body += await client.readexactly(size)
        await client.readline()
    while (await client.readline()).strip():  # trailers
        pass
    return body


def _refusal(status: int, code: str) -> bytes:
    body = f"<Error><Code>{code}</Code><Message>{code} by the fault proxy</Message></Error>"
    return (
        f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}"
    ).encode()


def _reset(answer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN."""
    connection = answer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    answer.transport.abort()
