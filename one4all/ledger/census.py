"""The census: the ledger of a destination held against the listing of its source."""

from __future__ import annotations

from dataclasses import dataclass, field

from one4all.corpus.units import SourceShard, is_older, is_shard, to_shard
from one4all.ledger.ledger import Ledger
from one4all.storage import INTERNAL, Storage


@dataclass
class Census:
    """The ledger of a destination held against the listing of its source.

    Attributes:
        num_shards: Shards of the source that count: all, or those written since a given time.
        num_done: Of these, with a manifest.
        pending: Without one, largest first, so that none is left alone at the end.
        quarantined: Given up: name to last reason.
        num_others: Objects of the source that are no shards.
        other: The first of them.
        num_older: Shards written before the given time, left out of all of the above.
        older_done: Ids of those with a manifest.
    """

    num_shards: int = 0
    num_done: int = 0
    pending: list[SourceShard] = field(default_factory=list)
    quarantined: dict[str, str] = field(default_factory=dict)
    num_others: int = 0
    other: str = ""
    num_older: int = 0
    older_done: set[str] = field(default_factory=set)

    @property
    def num_older_undone(self) -> int:
        return self.num_older - len(self.older_done)


def take_census(source: Storage, ledger: Ledger, *, since: float | None = None) -> Census:
    """Tell what is done from listings alone, without reading any shard or manifest.

    With ``since``, in POSIX seconds, shards written before it are counted apart and left alone.
    Memory grows with the number of manifests and of pending shards, by some 200 bytes each; time
    with the length of the listings.
    """
    done, given_up = ledger.done(), ledger.quarantined()
    census = Census()
    for info in source.list():
        if not is_shard(info):
            if not info.key.startswith(INTERNAL):
                census.num_others += 1
                census.other = census.other or info.key
            continue
        shard = to_shard(info)
        if is_older(info, since):
            census.num_older += 1
            if shard.id in done:
                census.older_done.add(shard.id)
            continue
        census.num_shards += 1
        if shard.id in done:
            census.num_done += 1
        elif (reason := given_up.get(shard.id)) is not None:
            census.quarantined[shard.name] = reason
        else:
            census.pending.append(shard)
    census.pending.sort(key=lambda shard: (-shard.size, shard.name))
    return census
