"""What test accuracies are evidence of.

A gap between clean and protected is no evidence by itself: any perturbation may cause one, and a
bench on which even the true labels do not help to protect sees nothing. So a method is held against
its controls, and against the spread between seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

PROTECTS_BELOW = 0.6  # of clean accuracy
MIN_SEEDS = 3

Verdict = Literal["protects", "weak effect", "no effect", "too few seeds", "oracle fails"]
Accuracies = Sequence[float]

_RULE = f"the rule is at most {100 * PROTECTS_BELOW:.0f}"
_NUMBERS = ("no", "one", "two", "three")


@dataclass(frozen=True)
class Judgement:
    """A verdict, and the figures that decided it.

    Attributes:
        verdict: See `judge`.
        reason: Which condition failed, or that none did, with its figures; part of a sentence.
    """

    verdict: Verdict
    reason: str


def judge(
    protected: Accuracies,
    *,
    clean: Accuracies,
    oracle: Accuracies,
    controls: Mapping[str, Accuracies],
) -> Judgement:
    """Judge one method by test accuracies (0..1, one for each seed) of the same adversary.

    Args:
        protected: Trained on what the method protected.
        clean: Trained on clean images.
        oracle: Trained with the class-wise oracle, the positive control.
        controls: By name, trained on each negative control: noise, an untrained generator.

    Returns:
        "too few seeds" with fewer than three of anything that is compared; "oracle fails" if not
        even the oracle protects. Both are no verdict: this comparison shows nothing of the method.
        "protects" if the accuracy is at most 60 % of clean and below every control by more than
        twice the largest spread; "weak effect" if only the latter; "no effect" otherwise.
    """
    floors = {"clean images": clean, **controls}
    if lacking := _too_few({"the method": protected, "the oracle": oracle, **floors}):
        return Judgement("too few seeds", lacking)
    reference = float(np.mean(clean))
    if np.mean(oracle) > PROTECTS_BELOW * reference:
        return Judgement(
            "oracle fails",
            f"even the class-wise oracle leaves {_left(oracle, reference)}, {_RULE}: this "
            "adversary cannot show protection",
        )
    spread = max(float(np.std(values, ddof=1)) for values in (protected, *floors.values()))
    nearest = min(floors, key=lambda name: float(np.mean(floors[name])))
    gap = float(np.mean(floors[nearest]) - np.mean(protected))
    distance = (
        f"{100 * gap:.1f} points below {nearest}, the rule is more than {200 * spread:.1f}, twice "
        "the largest spread"
    )
    if gap <= 2 * spread:
        return Judgement("no effect", f"not far enough from {nearest}: {distance}")
    left = f"{_left(protected, reference)}, {_RULE}"
    if np.mean(protected) > PROTECTS_BELOW * reference:
        return Judgement("weak effect", left)
    return Judgement("protects", f"{left}; {distance}")


def _too_few(compared: Mapping[str, Accuracies]) -> str:
    """What has too few seeds; "" if nothing has."""
    counts = {name: len(values) for name, values in compared.items()}
    fewest = min(counts.values())
    if fewest >= MIN_SEEDS:
        return ""
    lacking = [name for name, count in counts.items() if count == fewest]
    of = "" if len(lacking) == len(counts) else f" of {' and '.join(lacking)}"
    seeds = f"{_NUMBERS[fewest]} seed{'s' * (fewest != 1)}"
    return f"{seeds}{of}; a verdict needs {_NUMBERS[MIN_SEEDS]} of everything that is compared"


def _left(accuracies: Accuracies, reference: float) -> str:
    return f"{100 * np.mean(accuracies) / reference:.1f} % of clean accuracy"
