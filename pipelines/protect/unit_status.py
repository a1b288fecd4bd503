"""What became of one attempt at one unit: all that a worker reports of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from one4all.corpus import Unit, is_group

Outcome = Literal["done", "restated", "failed", "refused", "quarantined"]


@dataclass(frozen=True)
class UnitStatus:
    """What became of one attempt at one unit.

    Attributes:
        name: Name of the unit; for a group of objects, that of the first and how many follow.
        num_objects: Objects of a group; 1 for every other unit.
        outcome: "done"; "restated": what stands is right, and was recorded anew; "failed";
            "refused" by the bad-image policy; "quarantined" before.
        num_images, num_bad: Images of the unit, and those of them that could not be protected.
        num_batches: Batches that the device has done.
        num_protected: Those that were; also less than the rest if a sample was dropped.
        num_gray: Those that are gray, and so hold hardly any of a pattern in colour.
        converted: Number of images by what had to be changed to protect them.
        num_bytes, num_bytes_written: Size of the unit, and of what was written.
        seconds: Time that the unit kept each stage waiting; a stage that it did not reach is 0.
        peak_bytes: Peak memory of the worker until now.
        encoder: What computes its embeddings, and how precisely.
        error: Why it is not done; "" if it is.
        error_kind: Name of the class of the error; "" without one.
        attempt: Number of this attempt, of those that count against the unit; 0 if it does not
            count, because the fault lies elsewhere.
    """

    name: str
    outcome: Outcome = "done"
    num_objects: int = 1
    num_images: int = 0
    num_bad: int = 0
    num_protected: int = 0
    num_batches: int = 0
    num_gray: int = 0
    converted: Mapping[str, int] = field(default_factory=dict)
    num_bytes: int = 0
    num_bytes_written: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    encoder: str = ""
    error: str = ""
    error_kind: str = ""
    attempt: int = 0

    @classmethod
    def of(cls, unit: Unit, outcome: Outcome = "done", error: str = "") -> UnitStatus:
        """The status of an attempt that has done nothing."""
        num_objects = len(unit.objects) if is_group(unit) else 1
        return cls(unit.label, outcome, num_objects, num_bytes=unit.size, error=error)
