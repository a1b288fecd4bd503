"""How a run of protect has ended: one small object, for schedulers, events of a bucket, and people.

``_one4all/runs/<id>.json`` is written when the run ends, whatever it ends with, so that whoever
waits for it may carry on. A run that is killed without notice writes none. Nothing here is read by
a run: what is done is told by the ledger alone.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

import one4all
from one4all.errors import NotFoundError, One4AllError
from one4all.ledger import Binding, Ledger
from one4all.storage import INTERNAL, Storage

if TYPE_CHECKING:  # they wait for PyTorch, for which `one4all status` would
    from pipelines.protect.job import ProtectResult
    from pipelines.protect.unit_status import UnitStatus

_log = logging.getLogger(__name__)
_RUNS = f"{INTERNAL}runs/"


class RunRecord(BaseModel):
    """What one run did; times in POSIX seconds.

    Attributes:
        run_id: Names the run in manifests, metrics and logs, too.
        version: Of one4all.
        started, seconds: When it began, and how long it took.
        exit_code: What the command ended with, or 128 plus the number of the signal that ended it.
        error: Why it ended before its time; "" if it came to its end.
        source, destination: What was protected, and where to.
        protector, protector_sha256: Name and content hash.
        encoders: What computed embeddings in its workers; one, unless nodes differ.
        noun: Word for what is counted: "shard"; or "file", of loose images and Parquet.
        num_shards, num_done: Shards of the source, and those that are done; None if it did not come
            to its end.
        num_failed, num_quarantined: Of the others, likewise.
        num_bad_images: Images of done shards that could not be protected, likewise.
        num_protected_now, num_images: Shards and images that this run has protected.
        bytes_read, bytes_written: Of these shards, at the source and at the destination.
        last_success: When a run, perhaps this one, last left nothing to do; None if none has.
    """

    model_config = ConfigDict(extra="ignore")  # of newer programs

    run_id: str
    version: str = one4all.__version__
    started: float
    seconds: float = 0.0
    exit_code: int = 0
    error: str = ""
    source: str
    destination: str
    protector: str
    protector_sha256: str
    encoders: tuple[str, ...] = ()
    noun: str = "shard"
    num_shards: int | None = None
    num_done: int | None = None
    num_failed: int | None = None
    num_quarantined: int | None = None
    num_bad_images: int | None = None
    num_protected_now: int = 0
    num_images: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    last_success: float | None = None

    def conclude(self, result: ProtectResult) -> None:
        """Take over what stands at the destination at the end of the run."""
        self.num_shards, self.num_done = result.num_shards, result.num_done
        self.noun, self.num_failed = result.noun, result.num_failed
        self.num_quarantined = result.num_shards - result.num_done - self.num_failed
        self.num_bad_images, self.exit_code = result.num_bad_images, result.exit_code

    def telling(self, on_progress: Callable[[UnitStatus], None]) -> Callable[[UnitStatus], None]:
        """The same callback, which counts here too."""

        def count(status: UnitStatus) -> None:
            if status.outcome == "done":
                self.encoders = tuple(sorted({*self.encoders, status.encoder}))
                self.num_protected_now += status.num_objects
                self.num_images += status.num_protected
                self.bytes_read += status.num_bytes
                self.bytes_written += status.num_bytes_written
            on_progress(status)

        return count


@contextmanager
def recording(
    run_id: str, binding: Binding, destination: Storage, ledger: Ledger
) -> Iterator[RunRecord]:
    """A record that is written when the block ends, with what it ends with.

    A store that does not take it must not change how the run ends.
    """
    record = RunRecord(
        run_id=run_id,
        started=time.time(),
        source=binding.source_uri,
        destination=destination.uri,
        protector=binding.protector,
        protector_sha256=binding.protector_sha256,
    )
    try:
        yield record
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
        record.exit_code = 128 + signal.SIGINT if interrupted else getattr(error, "exit_code", 1)
        record.error = str(error) or type(error).__name__
        raise
    finally:
        record.seconds = time.time() - record.started
        try:
            record.last_success = ledger.last_success()
            data = record.model_dump_json(indent=1).encode()
            destination.write_bytes(f"{_RUNS}{run_id}.json", data)
        except (One4AllError, OSError) as problem:
            _log.warning("the record of run %s could not be written: %s", run_id, problem)


def read_records(destination: Storage, *, limit: int) -> list[RunRecord]:
    """Records of the runs that ended last, the newest first; none that cannot be read."""
    found = sorted(destination.list(_RUNS), key=lambda info: info.modified or 0, reverse=True)
    records = []
    for info in found[:limit]:
        try:
            records.append(RunRecord.model_validate_json(destination.read_bytes(info.key)))
        except (NotFoundError, ValueError) as problem:
            _log.warning("%s/%s cannot be read: %s", destination.uri, info.key, problem)
    return sorted(records, key=lambda record: -record.started)
