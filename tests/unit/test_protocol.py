"""The commit protocol, in all interleavings of two writers and a source that is replaced.

The code is the real one: `rewrite_unit`, `Ledger`, `take_census`. Only the stores are in memory;
they let one writer take one step at a time. Every order of steps is tried, so a pause, or a death,
at every step of either writer is among them. After each step the census is asked, and what it calls
done must be made from what stands at the source.
"""

import hashlib
import io
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest
from support.builders import make_tar

from one4all import rewrite
from one4all.corpus import list_units
from one4all.corpus.tar import TarContainer
from one4all.errors import ConflictError, NotFoundError, One4AllError, SourceChangedError
from one4all.ledger import Ledger, census
from one4all.rewrite import rewrite_unit
from one4all.storage import INTERNAL, ObjectInfo, Storage
from one4all.storage.base import Writer

pytestmark = pytest.mark.slow

KEY = "s.tar"
VERSIONS = [make_tar([("a.txt", f"version {n}".encode())]) for n in range(3)]


class Store:
    """Objects in memory.

    Args:
        etags: "content": two equal objects have one ETag, as on S3; "unique": each write has its
            own, as in a folder.
        obeys: Whether a guarded writer's condition is kept; where parts are uploaded, some servers
            ignore it.
    """

    def __init__(self, *, etags: str = "content", obeys: bool = True) -> None:
        self.objects: dict[str, tuple[str, bytes]] = {}
        self.obeys = obeys
        self._etags, self._count = etags, itertools.count()

    def put(self, key: str, data: bytes) -> str:
        unique = next(self._count) if self._etags == "unique" else 0
        etag = hashlib.sha256(data).hexdigest() + f"-{unique}"
        self.objects[key] = (etag, data)
        return etag


class View(Storage):
    """A store as one process sees it; ``step`` is called before every request that matters."""

    def __init__(self, store: Store, step: Callable[[], None] = lambda: None) -> None:
        self.uri, self._store, self._step = "memory://", store, step

    def _request(self, key: str) -> dict[str, tuple[str, bytes]]:
        if not key.startswith(f"{INTERNAL}attempts/"):  # they say nothing of what is done
            self._step()
        return self._store.objects

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        objects = self._request(prefix)
        found = [ObjectInfo(k, len(d), e) for k, (e, d) in objects.items() if k.startswith(prefix)]
        return iter(sorted(found, key=lambda info: info.key))

    def head(self, key: str) -> ObjectInfo:
        objects = self._request(key)
        if key not in objects:
            raise NotFoundError(key)
        etag, data = objects[key]
        return ObjectInfo(key, len(data), etag)

    def open(self, key: str, *, etag: str | None = None) -> io.BytesIO:
        objects = self._request(key)
        if key not in objects:
            raise NotFoundError(key)
        current, data = objects[key]
        if etag is not None and etag != current:
            raise SourceChangedError(key)
        return io.BytesIO(data)

    def writer(self, key: str, *, guarded: bool = True, **others) -> Writer:
        return ViewWriter(self, key, guarded=guarded)

    def create(self, key: str, data: bytes) -> str:
        if key in self._request(key):
            raise ConflictError(key)
        return self._store.put(key, data)

    def delete(self, key: str) -> None:
        self._request(key).pop(key, None)

    def replace(self, key, data, *, etag):
        raise NotImplementedError

    def age_seconds(self, key):
        raise NotImplementedError

    def check(self, *, writable):
        raise NotImplementedError

    def sweep(self, *, exclusive):
        raise NotImplementedError


class ViewWriter(Writer):
    def __init__(self, view: View, key: str, *, guarded: bool) -> None:
        super().__init__()
        self._view, self._key, self._data = view, key, b""
        self._guarded = guarded and view._store.obeys
        self._replaces = view._request(key).get(key) if guarded else None

    def _write(self, data: bytes) -> None:
        self._data += data

    def _commit(self) -> str:
        standing = self._view._request(self._key).get(self._key)
        if self._guarded and standing != self._replaces:
            raise ConflictError(self._key)
        return self._view._store.put(self._key, self._data)

    def _abort(self) -> None:
        pass


class Inline:
    """An executor without threads."""

    def __init__(self, *_: object) -> None:
        pass

    def submit(self, work, *arguments) -> Future:
        future: Future = Future()
        future.set_result(work(*arguments))
        return future

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class Process:
    """A thread that does one step each time it is told to."""

    def __init__(self, work: Callable[[Callable[[], None]], None]) -> None:
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.ended = False

        def run() -> None:
            self._go.acquire()
            try:
                work(self._pause)
            except One4AllError:  # a lost race, a source that has changed: the attempt failed
                pass
            finally:
                self.ended = True
                self._stopped.release()

        self._thread = threading.Thread(target=run)
        self._thread.start()
        self.advance()  # to its first request

    def _pause(self) -> None:
        self._stopped.release()
        self._go.acquire()

    def advance(self) -> None:
        self._go.release()
        self._stopped.acquire()

    def end(self) -> None:
        while not self.ended:
            self.advance()
        self._thread.join()


def protect_once(source: View, destination: View) -> None:
    """What a run does: a census, and an attempt at what is pending."""
    ledger = Ledger(destination)
    found = census.take_census(source, ledger)
    for unit in found.pending:
        recorded = found.damaged.get(unit.name)
        if recorded is None or ledger.restate(recorded.key) is None:
            ledger.record(rewrite_unit(unit, source, destination, None, pool=Inline()))


def is_done(source: Store, destination: Store) -> bool:
    """What a census says; it must be true."""
    done = census.take_census(View(source), Ledger(View(destination))).num_done == 1
    if done:
        assert destination.objects[KEY][1] == source.objects[KEY][1], "done, and it is not"
    return done


def schedules(*steps: int) -> Iterator[tuple[int, ...]]:
    """All orders of the steps of some processes, each given by its number of steps."""
    if not any(steps):
        yield ()
    for process, left in enumerate(steps):
        if left:
            rest = [count - (index == process) for index, count in enumerate(steps)]
            for schedule in schedules(*rest):
                yield (process, *schedule)


@pytest.mark.parametrize(
    ("etags", "obeys", "stands"),
    [("content", True, False), ("unique", True, True), ("content", False, True)],
)
@pytest.mark.fault("a run paused past its lease, and the source replaced meanwhile")
def test_no_order_of_steps_makes_the_ledger_lie(monkeypatch, etags, obeys, stands):
    """And where the store obeys conditions, what was done stays done when all have ended."""
    monkeypatch.setattr(rewrite, "ThreadPoolExecutor", Inline)
    monkeypatch.setattr(
        census, "find_container", lambda source, name="": TarContainer()
    )  # one step less
    num_undone = num_schedules = 0
    # The late writer has taken its census; to look at the output, to open the source, to commit and
    # to record are before it. The other does all of a run. In between the source is replaced.
    for schedule in schedules(4, 7, 1):
        num_schedules += 1
        source, destination = Store(etags=etags), Store(etags=etags, obeys=obeys)
        if stands:
            source.put(KEY, VERSIONS[0])
            protect_once(View(source), View(destination))
        source.put(KEY, VERSIONS[1])
        (unit,) = list_units(View(source))

        def late(step, unit=unit, source=source, destination=destination):
            views = View(source, step), View(destination, step)
            Ledger(views[1]).record(rewrite_unit(unit, *views, None, pool=Inline()))

        def other(step, source=source, destination=destination):
            protect_once(View(source, step), View(destination, step))

        processes = Process(late), Process(other)
        was_done = False
        for number in schedule:
            if number == 2:
                source.put(KEY, VERSIONS[2])
                was_done = False
            elif not processes[number].ended:
                processes[number].advance()
            was_done |= is_done(source, destination)
        for process in processes:
            process.end()
        num_undone += was_done and not is_done(source, destination)
        # The next run, alone, finds what is to be done and does it.
        protect_once(View(source), View(destination))
        assert is_done(source, destination), schedule
        assert len(destination.objects) > 1
    assert num_schedules == 3960
    if obeys:
        assert num_undone == 0, "a late writer wrote over what was done"
    else:
        assert num_undone > 0, "this store should have let one through"
