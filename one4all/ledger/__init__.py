"""What is done at a destination, and who is at work on it.

* `ledger`: the records below ``_one4all/``: binding, manifests, attempts.
* `census`: the ledger held against what stands on both sides.
* `lease`: one run at a time.
"""

from one4all.ledger.census import Census, Move, compare_places, done_manifests, take_census
from one4all.ledger.lease import Lease
from one4all.ledger.ledger import MAX_ATTEMPTS, MAX_KILLED, Attempts, Entry, Ledger, read_binding
from one4all.ledger.records import BadImage, Binding, Manifest, UnitDistances

__all__ = [
    "MAX_ATTEMPTS",
    "MAX_KILLED",
    "Attempts",
    "BadImage",
    "Binding",
    "Census",
    "Entry",
    "Lease",
    "Ledger",
    "Manifest",
    "Move",
    "UnitDistances",
    "compare_places",
    "done_manifests",
    "read_binding",
    "take_census",
]
