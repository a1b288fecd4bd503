"""Workers of this machine: what ends one of them, or their driver, and what is left then."""

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from one4all.errors import One4AllError, ShardError, UsageError
from pipelines.local_pool import LocalPool, Lost
from pipelines.protect.cpu_limit import CpuLimit

HANG = """
import sys
from test_local_pool import hangs_in_c
from pipelines.local_pool import LocalPool

with LocalPool(hangs_in_c, [{}], max_deaths=1) as pool:  # no "if __name__": it must not run twice
    print("begun", flush=True)
    list(pool.run([sys.argv[1]]))
"""


def doubles():
    def work(number):
        time.sleep(0.02)
        return 2 * number, os.getpid(), os.environ.get("PLACE")

    return work


def kills(folder, times):
    """Kills its process so many times over a negative number."""

    def work(number):
        marks = len(list(folder.iterdir()))
        if number < 0 and marks < times:
            (folder / str(marks)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    return work


def dies_at_start(folder):
    (folder / str(os.getpid())).touch()
    os.kill(os.getpid(), signal.SIGSEGV)


def cannot_start(error):
    raise error


def raises():
    def work(error):
        print("this is not for the standard output of the driver")
        logging.getLogger("a.library").warning("about to raise %s", error)
        raise error

    return work


def hangs_in_c():
    def work(mark):
        Path(mark).write_text(str(os.getpid()))
        re.match("(a+)+$", 100 * "a" + "b")  # for years, and the interpreter's lock is not let go

    return work


def is_limited():
    def work(_):
        with CpuLimit(1):
            re.match("(a+)+$", 100 * "a" + "b")

    return work


def test_workers_stay_and_share_the_tasks():
    with LocalPool(doubles, [{"PLACE": "0"}, {"PLACE": "1"}], max_deaths=1) as pool:
        first = list(pool.run(range(40)))
        second = list(pool.run(range(40, 60)))
        assert list(pool.run([])) == []
    assert sorted(task for task, _ in first) == list(range(40))
    assert all(2 * task == result for task, (result, _, _) in first + second)
    processes = {(pid, place) for _, (_, pid, place) in first + second}
    assert sorted(place for _, place in processes) == ["0", "1"], "they did not stay"
    assert all(_is_gone(pid) for pid, _ in processes)


def test_one_task_starts_one_worker():
    before = set(psutil.Process().children())
    with LocalPool(doubles, [{}, {}], max_deaths=1) as pool:
        list(pool.run([1]))
        assert len(set(psutil.Process().children()) - before) == 1


@pytest.mark.parametrize("times", [2, 3], ids=["in the end it works", "it is given up"])
def test_task_that_kills_its_worker_is_tried_again(tmp_path, caplog, times):
    with LocalPool(partial(kills, tmp_path, times), [{}], max_deaths=3) as pool:
        found = dict(pool.run([1, -1, 2]))
    lost = Lost("the worker process died: SIGKILL")
    assert found == {1: 1, 2: 2, -1: -1 if times < 3 else lost}
    assert len(list(tmp_path.iterdir())) == times
    assert Counter(caplog.messages) == {"a worker process died at work: SIGKILL": times}


def test_task_that_hangs_in_c_is_ended_by_its_limit():
    with LocalPool(is_limited, [{}], max_deaths=1) as pool:
        assert list(pool.run([1])) == [(1, Lost("the worker process died: SIGXCPU"))]


def test_workers_that_die_while_they_start_end_it(tmp_path):
    start = partial(dies_at_start, tmp_path)
    with LocalPool(start, [{}], max_deaths=1, max_dead_starts=2) as pool:
        for _ in range(2):  # the second time at once
            with pytest.raises(One4AllError, match="no worker can start: SIGSEGV"):
                list(pool.run([1, 2]))
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("error", [UsageError("no such encoder"), OSError("the disk is gone")])
def test_what_a_worker_cannot_start_for_is_told(error, caplog):
    with (
        LocalPool(partial(cannot_start, error), [{}], max_deaths=1, max_dead_starts=1) as pool,
        pytest.raises(One4AllError, match=str(error)),
    ):
        list(pool.run([1]))
    assert len(caplog.messages) == (1 if isinstance(error, UsageError) else 2)


@pytest.mark.parametrize("error", [ShardError("cut off"), KeyError("name")], ids=["ours", "a bug"])
def test_what_a_task_raises_is_raised_here(error, caplog, capfd):
    with (
        LocalPool(raises, [{}], max_deaths=3) as pool,
        pytest.raises(ShardError if isinstance(error, ShardError) else One4AllError) as raised,
    ):
        list(pool.run([error]))
    assert str(error) in str(raised.value)
    assert caplog.messages == [f"about to raise {error}"], "what it logs is lost"
    assert capfd.readouterr().out == ""


def test_tasks_under_way_are_ended_with_the_loop_over_them(tmp_path):
    mark = tmp_path / "pid"
    with LocalPool(hangs_in_c, [{}], max_deaths=1) as pool:
        results = pool.run([str(mark)])
        with pytest.raises(_StopError), _stopped_when(lambda: mark.exists() and mark.read_text()):
            next(results)
        results.close()
        assert _is_gone(int(mark.read_text()))


def test_a_task_that_was_sent_this_moment_is_ended_too(tmp_path, monkeypatch):
    mark = tmp_path / "pid"
    send = Connection.send

    def interrupted(connection, value):
        send(connection, value)
        if value == str(mark):
            _wait_until(lambda: mark.exists() and mark.read_text())
            raise _StopError

    monkeypatch.setattr(Connection, "send", interrupted)
    with LocalPool(hangs_in_c, [{}], max_deaths=1) as pool:
        with pytest.raises(_StopError):
            next(pool.run([str(mark)]))
        assert _is_gone(int(mark.read_text()))


@pytest.mark.fault("driver killed -9 while a worker hangs in C")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda n: n.name)
def test_workers_end_with_their_driver(tmp_path, number):
    mark = tmp_path / "pid"
    program = tmp_path / "program.py"
    program.write_text(HANG)
    (tmp_path / "queue.py").write_text("raise ImportError('a file of the current folder')")
    paths = [str(Path(__file__).parent), *filter(None, sys.path)]
    driver = subprocess.Popen(
        [sys.executable, "-P", program, mark],
        cwd=tmp_path,  # whose queue.py is not imported
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    _wait_until(lambda: mark.exists() and mark.read_text())
    driver.send_signal(number)
    printed, _ = driver.communicate(timeout=10)
    assert printed == "begun\n"
    _wait_until(lambda: _is_gone(int(mark.read_text())))


class _StopError(Exception):
    pass


@contextmanager
def _stopped_when(condition):
    """Raises from a signal handler, as Ctrl-C does, as soon as something is so."""

    def look(*_):
        if condition():
            raise _StopError

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _is_gone(pid):
    """Whether a process has ended, though nobody may have asked how yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
