"""The lease: one run at a time on a destination, so that a second one does not waste the GPUs.

Correctness never rests on it: racing runs write the same bytes and the ledger lets one of them win.
It is one small object, ``_one4all/lease.json``, taken by conditional create, renewed and taken over
by compare and swap, and aged by the store's own clock, so clocks of hosts do not matter. A holder
that dies stops renewing; the next run sees that nothing moves and takes over.
"""

from __future__ import annotations

import json
import logging
import math
import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from one4all.errors import (
    ConflictError,
    LeaseHeldError,
    NotFoundError,
    One4AllError,
    SourceChangedError,
    StalledRunError,
    StorageError,
)
from one4all.storage import INTERNAL, Storage

_log = logging.getLogger(__name__)
_KEY = f"{INTERNAL}lease.json"
_RENEWALS = 4  # in the life of a lease: three may fail before it is lost
_POLLS = 3  # between two renewals


@dataclass(frozen=True)
class _Holder:
    """What a version of the lease says; ``run_id`` is empty if it is free."""

    etag: str
    run_id: str
    host: str
    seconds: float
    idle_seconds: float


class Lease:
    """Holds a destination for one run, as a ``with`` block.

    Args:
        destination: Where the run writes.
        run_id: Names the run.
        seconds: Life of the lease without a renewal.
        stalled_seconds: Time without progress after which a holder that renews is called stuck.
        on_wait: Called once, with a sentence, if there is a holder that may be dead.

    Raises:
        LeaseHeldError: Another run holds the lease and renews it.
        StalledRunError: The same, and it has made no progress for ``stalled_seconds``.
    """

    def __init__(
        self,
        destination: Storage,
        run_id: str,
        *,
        seconds: float,
        stalled_seconds: float = math.inf,
        on_wait: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self._storage, self._run_id, self._seconds = destination, run_id, seconds
        self._stalled_seconds, self._on_wait = stalled_seconds, on_wait
        self._last_progress = time.monotonic()
        self._etag = ""
        self._num_renewals = 0
        self._lost_to = ""
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> Self:
        self._acquire()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._released.set()
        self._thread.join()
        if self._lost_to:
            return
        try:
            self._storage.replace(_KEY, self._record(run_id=""), etag=self._etag)
        except One4AllError as problem:
            _log.warning("the lease was not released and will expire: %s", problem)

    def check(self) -> None:
        """Raise `LeaseHeldError` if another run took over, because this one could not renew."""
        if self._lost_to:
            raise LeaseHeldError(
                f"run {self._lost_to} took over {self._storage.uri}, because this run could not "
                "renew its lease in time; what is done is done, the other run does the rest"
            )

    def progressed(self) -> None:
        """Note that the run has got on; a run that waits for the lease is told when it last did."""
        self._last_progress = time.monotonic()

    def confirm(self) -> bool:
        """Renew now; whether the lease is still ours, by the store's word. Never raises."""
        try:
            self._renew()
        except One4AllError as error:
            _log.warning("the lease could not be confirmed: %s", error)
            return False
        return not self._lost_to

    def _acquire(self) -> None:
        """Create the lease, take one that is free, or wait until a dead holder's expires."""
        watched = ""
        while True:
            try:
                self._etag = self._storage.create(_KEY, self._record())
                return
            except ConflictError:
                holder = self._read()
            if holder is None:  # it is being written this moment
                time.sleep(0.1)
                continue
            if holder.run_id == self._run_id:  # our own write, whose answer was lost
                self._etag = holder.etag
                return
            if not holder.run_id or self._storage.age_seconds(_KEY) > holder.seconds:
                try:
                    self._etag = self._storage.replace(_KEY, self._record(), etag=holder.etag)
                    return
                except ConflictError:  # another run was faster, or our answer was lost
                    continue
            if not watched:
                self._on_wait(
                    f"run {holder.run_id} on {holder.host} holds the lease of this destination; "
                    f"waiting up to {holder.seconds:.0f} s to see whether it is alive"
                )
            elif holder.etag != watched:
                if holder.idle_seconds > self._stalled_seconds:
                    raise StalledRunError(
                        f"run {holder.run_id} on {holder.host} holds the lease of "
                        f"{self._storage.uri}, but has got nothing done for "
                        f"{holder.idle_seconds / 3600:.1f} hours; look what it is at, end it, and "
                        "run again"
                    )
                raise LeaseHeldError(
                    f"run {holder.run_id} on {holder.host} is writing to {self._storage.uri}; "
                    "run again when it has ended"
                )
            watched = holder.etag
            time.sleep(holder.seconds / _RENEWALS / _POLLS)

    def _keep(self) -> None:
        """Renew until released or lost; while the store is down, try again."""
        while not self._lost_to and not self._released.wait(self._seconds / _RENEWALS):
            try:
                self._renew()
            except One4AllError as error:
                _log.warning("the lease was not renewed, trying again: %s", error)

    def _renew(self) -> None:
        with self._lock:
            if self._lost_to:
                return
            self._num_renewals += 1
            try:
                self._etag = self._storage.replace(_KEY, self._record(), etag=self._etag)
            except ConflictError:
                holder = self._read()
                if holder is not None and holder.run_id == self._run_id:
                    self._etag = holder.etag  # our own write, whose answer was lost
                else:
                    self._lost_to = (holder.run_id if holder else "") or "unknown"

    def _read(self) -> _Holder | None:
        """The current version; None if it changes or goes while we look."""
        try:
            etag = self._storage.head(_KEY).etag
            with closing(self._storage.open(_KEY, etag=etag)) as reader:
                record = json.loads(b"".join(iter(lambda: reader.read(1 << 16), b"")))
            return _Holder(
                etag,
                str(record["run_id"]),
                str(record["host"]),
                float(record["seconds"]),
                float(record.get("idle_seconds", 0)),  # older programs did not say
            )
        except (NotFoundError, SourceChangedError):
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(
                f"{self._storage.uri}/{_KEY} cannot be read; delete it if no run is active"
            ) from error

    def _record(self, *, run_id: str | None = None) -> bytes:
        # The count makes every version another object, also where the ETag is a digest.
        record = {
            "run_id": self._run_id if run_id is None else run_id,
            "host": socket.gethostname(),
            "seconds": self._seconds,
            "renewals": self._num_renewals,
            "idle_seconds": round(time.monotonic() - self._last_progress, 1),
        }
        return json.dumps(record).encode()
