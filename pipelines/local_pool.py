"""Worker processes on this machine, which the driver outlives, and which do not outlive the driver.

Each holds one object, made once, and does one task at a time. Whatever ends a process, a segfault,
the kernel for want of memory, a limit on its CPU time, costs that task an attempt and nothing else:
another process takes its place.

The driver and a worker share a socket, and either knows by its end that the other is gone. Workers
are plain interpreters, not those of `multiprocessing`: that would run the program that called us a
second time in each of them, unless it is written with that in mind.
"""

from __future__ import annotations

import ctypes
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from logging.handlers import QueueHandler
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from one4all.errors import One4AllError, UsageError

_log = logging.getLogger(__name__)

Task = TypeVar("Task")
Result = TypeVar("Result")

MAX_DEAD_STARTS = 5  # workers that may die before they are ready
# It finds what its driver finds, and nothing of the current folder beyond that.
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from pipelines.local_pool import serve; serve(int(sys.argv[1]))"
)
_PR_SET_PDEATHSIG = 1  # of Linux


@dataclass(frozen=True)
class Lost:
    """Stands for the result of a task that no worker has survived; says why."""

    reason: str


class LocalPool(Generic[Task, Result]):
    """Workers that start when there are tasks for them, and stay until the ``with`` block ends.

    Args:
        make: Makes what does a task; called once in each worker. It is pickled, with its arguments.
        environments: Variables of each worker's process; as many as there are workers at most.
        max_deaths: Workers that one task may cost before it is given up.
        max_dead_starts: Workers that may die before they are ready, until no more are started.
    """

    def __init__(
        self,
        make: Callable[[], Callable[[Task], Result]],
        environments: Sequence[Mapping[str, str]],
        *,
        max_deaths: int,
        max_dead_starts: int = MAX_DEAD_STARTS,
    ) -> None:
        self._make, self._environments = make, environments
        self._max_deaths, self._max_dead_starts = max_deaths, max_dead_starts
        self._workers: dict[int, _Worker] = {}  # by place
        self._num_dead_starts = 0
        self._last_death = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._end(list(self._workers))

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Result | Lost]]:
        """Do tasks; yields each with its result, as they come.

        Raises:
            One4AllError: A task raised it, or something else, which it tells; or no worker can
                start.
        """
        waiting = deque(_Attempt(task) for task in tasks)
        try:
            while waiting or self._busy():
                if self._num_dead_starts <= self._max_dead_starts:
                    self._start(len(waiting) + len(self._busy()))
                elif not self._workers:
                    raise One4AllError(f"no worker can start: {self._last_death}")
                self._hand_out(waiting)
                for place in self._heard():
                    worker = self._workers[place]
                    try:
                        kind, value = worker.connection.recv()
                    except (EOFError, OSError):
                        yield from self._bury(place, waiting)
                        continue
                    if kind == "log":
                        logging.getLogger(value.name).handle(value)
                    elif kind == "error":
                        if worker.is_ready:
                            raise value
                        if isinstance(value, UsageError):  # nor could another
                            self._num_dead_starts = self._max_dead_starts
                        yield from self._bury(place, waiting, reason=str(value))
                    elif kind == "ready":
                        worker.is_ready = True
                    else:
                        assert worker.attempt is not None
                        task, worker.attempt = worker.attempt.task, None
                        self._hand_out(waiting)  # before the caller takes its time
                        yield task, value
        finally:  # what is still under way is of no interest to anybody
            self._end(self._busy())

    def _busy(self) -> list[int]:
        return [place for place, worker in self._workers.items() if worker.attempt is not None]

    def _heard(self) -> list[int]:
        """Workers that have something to say, or are gone; waits for one."""
        places = {worker.connection: place for place, worker in self._workers.items()}
        return [places[heard] for heard in wait(list(places))]  # type: ignore[index]

    def _start(self, num_wanted: int) -> None:
        for place, environment in enumerate(self._environments):
            if place not in self._workers and len(self._workers) < num_wanted:
                self._workers[place] = _Worker.start(self._make, environment)

    def _hand_out(self, waiting: deque[_Attempt]) -> None:
        for worker in self._workers.values():
            if waiting and worker.is_ready and worker.attempt is None:
                # Before it is sent: an interrupt in between would leave the worker at work.
                worker.attempt = waiting.popleft()
                with suppress(OSError):  # gone: its connection says so next
                    worker.connection.send(worker.attempt.task)

    def _bury(
        self, place: int, waiting: deque[_Attempt], *, reason: str = ""
    ) -> Iterator[tuple[Any, Lost]]:
        """Take note of a dead worker; its task is tried again, or given up."""
        worker = self._workers.pop(place)
        ended = worker.end()
        self._last_death = reason or ended
        when = "at work" if worker.is_ready else "while it started"
        _log.warning("a worker process died %s: %s", when, self._last_death)
        self._num_dead_starts += not worker.is_ready
        if (attempt := worker.attempt) is None:
            return
        attempt.num_deaths += 1
        if attempt.num_deaths < self._max_deaths:
            waiting.appendleft(attempt)
        else:
            yield attempt.task, Lost(f"the worker process died: {self._last_death}")

    def _end(self, places: Iterable[int]) -> None:
        ended = [self._workers.pop(place) for place in places]
        for worker in ended:
            worker.process.kill()
        for worker in ended:
            worker.end()


@dataclass
class _Attempt:
    """A task, and how many workers it has cost."""

    task: Any
    num_deaths: int = 0


@dataclass
class _Worker:
    """One process, as the driver sees it."""

    process: subprocess.Popen[bytes]
    connection: Connection
    is_ready: bool = False
    attempt: _Attempt | None = None

    @classmethod
    def start(cls, make: Callable[[], Any], environment: Mapping[str, str]) -> _Worker:
        ours, theirs = Pipe()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, str(theirs.fileno()), *sys.path],
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=2,  # what is for programs is printed by the driver alone
                pass_fds=[theirs.fileno()],
            )
        with suppress(OSError):  # dead already: its connection says so next
            ours.send((os.getpid(), logging.getLogger().getEffectiveLevel()))
            ours.send_bytes(ForkingPickler.dumps(make))
        return cls(process, ours)

    def end(self) -> str:
        """Make sure that it is gone, and say in words how it went."""
        self.connection.close()
        try:
            code = self.process.wait(timeout=5)  # it closes its connection before it ends
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def serve(descriptor: int) -> None:
    """Be a worker: make what does a task, then do what comes until the driver is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver gets it, too, and ends us
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    driver, log_level = connection.recv()
    _die_with(driver)
    replies = _Replies(connection)
    logging.getLogger().setLevel(log_level)
    logging.getLogger().addHandler(_ToDriver(replies))
    made = connection.recv_bytes()
    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, tasks), daemon=True).start()
    try:
        work = ForkingPickler.loads(made)()
        replies.send("ready", None)
        while True:
            replies.send("result", work(tasks.get()))
    except One4AllError as error:
        replies.send("error", error)
    except Exception as error:
        traceback.print_exc()
        replies.send("error", One4AllError(f"{type(error).__name__}: {error}"))


def _receive(connection: Connection, tasks: queue.SimpleQueue[Any]) -> None:
    """Receive tasks; ends the process at once when the driver is gone."""
    try:
        while True:
            tasks.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)


def _die_with(driver: int) -> None:
    """Let the kernel end this process with its driver, even one that hangs in C; and first of all
    if memory runs out, before the driver and whatever else is here."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != driver:
        os._exit(0)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


class _Replies:
    """What goes to the driver, from any thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()

    def send(self, kind: str, value: object) -> None:
        with self._lock:
            self._connection.send((kind, value))


class _ToDriver(QueueHandler):
    """Hands log records to the driver, whose handlers know what to do with them."""

    def __init__(self, replies: _Replies) -> None:
        super().__init__(queue.SimpleQueue())
        self._replies = replies

    def enqueue(self, record: logging.LogRecord) -> None:
        """See the base class."""
        self._replies.send("log", record)
