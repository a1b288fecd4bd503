"""The census: the ledger of a destination held against the listing of its source."""

from __future__ import annotations

from dataclasses import dataclass, field

from one4all.corpus import Unit, find_container
from one4all.ledger.ledger import Ledger
from one4all.storage import Storage


@dataclass
class Census:
    """The ledger of a destination held against the listing of its source.

    Attributes:
        num_units: Units of the source that count: all, or those written since a given time.
        num_done: Of these, with a manifest.
        pending: Without one, largest first, so that none is left alone at the end.
        quarantined: Given up: name to last reason.
        num_others: Objects of the source that are no units.
        other: The first of them.
        num_older: Units written before the given time, left out of all of the above.
        older_done: Ids of those with a manifest.
    """

    num_units: int = 0
    num_done: int = 0
    pending: list[Unit] = field(default_factory=list)
    quarantined: dict[str, str] = field(default_factory=dict)
    num_others: int = 0
    other: str = ""
    num_older: int = 0
    older_done: set[str] = field(default_factory=set)

    @property
    def num_older_undone(self) -> int:
        return self.num_older - len(self.older_done)


def take_census(source: Storage, ledger: Ledger, *, since: float | None = None) -> Census:
    """Tell what is done from listings alone, without reading any unit or manifest.

    With ``since``, in POSIX seconds, units written before it are counted apart and left alone.
    Memory grows with the number of manifests and of pending units, by some 500 bytes each; time
    with the length of the listings.
    """
    done, given_up = ledger.done(), ledger.quarantined()
    census = Census()
    for found in find_container(source).scan(source):
        if not isinstance(found, Unit):
            census.num_others += 1
            census.other = census.other or found.key
            continue
        if found.is_older(since):
            census.num_older += 1
            if found.id in done:
                census.older_done.add(found.id)
            continue
        census.num_units += 1
        if found.id in done:
            census.num_done += 1
        elif (reason := given_up.get(found.id)) is not None:
            census.quarantined[found.name] = reason
        else:
            census.pending.append(found)
    census.pending.sort(key=lambda unit: (-unit.size, unit.name))
    return census
