"""One run at a time; a dead one is noticed, and no clock but the store's is trusted."""

import threading
import time

import pytest

from one4all.errors import AccessError, ConflictError, LeaseHeldError, StalledRunError, StorageError
from one4all.ledger.lease import Lease
from one4all.storage import LocalStorage, conditional_write_defects

SECONDS = 1.2


def test_second_run_is_told_who_is_at_work(storage):
    waited = []
    with (
        Lease(storage, "first", seconds=SECONDS),
        pytest.raises(LeaseHeldError, match=r"run first on .* is writing"),
        Lease(storage, "second", seconds=SECONDS, on_wait=waited.append),
    ):
        pass
    assert len(waited) == 1
    assert LeaseHeldError.exit_code == 75


def test_holder_that_gets_nothing_done_is_called_stuck(storage):
    """A schedule takes 75 for success, and this one would answer it for ever."""
    with Lease(storage, "stuck", seconds=SECONDS) as lease:
        later = {"seconds": SECONDS, "stalled_seconds": 0.2}
        with pytest.raises(StalledRunError, match=r"run stuck on .* nothing done for"):
            Lease(storage, "next", **later).__enter__()
        assert StalledRunError.exit_code == 1
        stop = threading.Event()
        beat = threading.Thread(
            target=lambda: [lease.progressed() for _ in iter(lambda: stop.wait(0.01), True)]
        )
        beat.start()
        with pytest.raises(LeaseHeldError):
            Lease(storage, "next", **later).__enter__()
        stop.set()
        beat.join()


@pytest.mark.parametrize(
    "record", [b"", b"[]", b"{}", b'{"run_id": "r", "host": "h", "seconds": "x"}']
)
def test_lease_that_cannot_be_read_is_one_sentence(storage, record):
    storage.write_bytes("_one4all/lease.json", record)
    with pytest.raises(StorageError, match="cannot be read; delete it if no run is active"):
        Lease(storage, "next", seconds=SECONDS).__enter__()


def test_lease_outlives_its_life_by_renewal_and_is_free_when_released(storage):
    with Lease(storage, "first", seconds=SECONDS) as lease:
        time.sleep(1.5 * SECONDS)
        lease.check()
    start = time.monotonic()
    with Lease(storage, "second", seconds=SECONDS):
        pass
    assert time.monotonic() - start < SECONDS  # nobody waited for


def test_dead_holder_is_taken_over_and_notices_it(storage):
    dead = Lease(storage, "dead", seconds=SECONDS)
    dead._acquire()  # and never renews
    with Lease(storage, "next", seconds=SECONDS) as lease:
        lease.check()
        assert lease.confirm()
        assert not dead.confirm()
        with pytest.raises(LeaseHeldError, match="run next took over"):
            dead.check()


def test_of_many_that_take_over_one_succeeds(storage):
    Lease(storage, "dead", seconds=SECONDS)._acquire()
    leases = [Lease(storage, f"run {n}", seconds=SECONDS) for n in range(6)]
    won, lost = [], []

    def take(lease: Lease) -> None:
        try:
            with lease:
                won.append(lease)
                time.sleep(3 * SECONDS)
                lease.check()
        except LeaseHeldError:
            lost.append(lease)

    threads = [threading.Thread(target=take, args=[lease]) for lease in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 5)


def test_store_that_keeps_its_promises_passes_and_keeps_nothing(storage):
    assert conditional_write_defects(storage) == []
    assert list(storage.list()) == []


class _Ignoring(LocalStorage):
    """Accepts conditions and ignores them."""

    def create(self, key, data):
        self.write_bytes(key, data)
        return self.head(key).etag

    def replace(self, key, data, *, etag):
        return self.create(key, data)


class _Racing(LocalStorage):
    """Checks a condition, but without a lock."""

    def create(self, key, data):
        if list(self.list(key)):
            raise ConflictError("exists")
        time.sleep(0.05)
        self.write_bytes(key, data)
        return self.head(key).etag


class _Lacking(LocalStorage):
    def create(self, key, data):
        raise StorageError("NotImplemented")


class _Denying(LocalStorage):
    def create(self, key, data):
        raise AccessError("denied")


@pytest.mark.parametrize(
    ("store", "defect"),
    [
        (_Ignoring, "8 of 8 concurrent writers"),
        (_Ignoring, "under the ETag of another"),
        (_Racing, "concurrent writers created the same object"),
        (_Lacking, "a conditional write failed: NotImplemented"),
    ],
)
def test_store_that_breaks_its_promises_is_named(tmp_path, store, defect):
    assert any(defect in found for found in conditional_write_defects(store(tmp_path)))


def test_denied_writing_is_not_called_a_defect(tmp_path):
    with pytest.raises(AccessError):
        conditional_write_defects(_Denying(tmp_path))


def test_only_one_replaces_a_version(storage):
    etag = storage.create("x", b"0")
    changed = storage.replace("x", b"1", etag=etag)
    with pytest.raises(ConflictError):
        storage.replace("x", b"2", etag=etag)
    with pytest.raises(ConflictError):
        storage.replace("none", b"2", etag=etag)
    assert storage.read_bytes("x") == b"1"
    assert storage.head("x").etag == changed
    assert 0 <= storage.age_seconds("x") < 60
