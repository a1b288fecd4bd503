"""What is done, pending, bad and quarantined at a destination."""

from __future__ import annotations

from dataclasses import dataclass, field

from one4all.errors import One4AllError
from one4all.ledger import Ledger, take_census
from one4all.storage import Storage, open_storage
from pipelines.protect import read_binding


@dataclass
class Status:
    """A destination as its ledger and its source show it; bytes and counts."""

    destination: str
    source: str
    protector: str
    output_format: str
    num_shards: int = 0
    num_done: int = 0
    num_pending: int = 0
    pending_bytes: int = 0
    output_bytes: int = 0
    num_protected: int = 0
    num_bad: int = 0
    failing: dict[str, str] = field(default_factory=dict)
    quarantined: dict[str, str] = field(default_factory=dict)


def read_status(destination_uri: str) -> Status:
    """Read the ledger of a destination and list its source.

    Raises:
        UsageError: Never written by protect, or a side cannot be reached.
    """
    destination = open_storage(destination_uri)
    destination.check(writable=False)
    binding = read_binding(destination)
    ledger = Ledger(destination)
    status = Status(destination.uri, binding.source_uri, binding.protector, binding.output_format)
    for manifest in ledger.manifests():
        status.output_bytes += manifest.output_size
        status.num_protected += manifest.num_protected
        status.num_bad += len(manifest.bad_images)
    census = take_census(_open_source(binding.source_uri), ledger)
    status.num_shards, status.num_done = census.num_shards, census.num_done
    status.num_pending = len(census.pending)
    status.pending_bytes = sum(shard.size for shard in census.pending)
    status.quarantined = census.quarantined
    given_up = ledger.quarantined()
    status.failing = {
        shard_id.rpartition("@")[0]: reasons[-1]
        for shard_id, reasons in ledger.failures().items()
        if shard_id not in given_up
    }
    return status


def _open_source(source_uri: str) -> Storage:
    source = open_storage(source_uri)
    try:
        source.check(writable=False)
    except One4AllError as error:
        raise type(error)(f"the source of this destination: {error}") from error
    return source
