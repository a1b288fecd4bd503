"""What test accuracies are evidence of.

A gap between clean and protected is no evidence by itself: any perturbation may cause one, and a
bench on which even the true labels do not help to protect sees nothing. So a method is held against
its controls, and against the spread between seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

PROTECTS_BELOW = 0.6  # of clean accuracy
MIN_SEEDS = 3

Verdict = Literal["protects", "weak effect", "no effect", "too few seeds", "oracle fails"]
Accuracies = Sequence[float]


def judge(
    protected: Accuracies, *, clean: Accuracies, oracle: Accuracies, controls: Sequence[Accuracies]
) -> Verdict:
    """Judge one method by test accuracies (0..1, one for each seed) of the same adversary.

    Args:
        protected: Trained on what the method protected.
        clean: Trained on clean images.
        oracle: Trained with the class-wise oracle, the positive control.
        controls: Trained on each negative control: noise, an untrained generator.

    Returns:
        "too few seeds" with fewer than three of anything that is compared; "oracle fails" if not
        even the oracle protects. Both are no verdict: this comparison shows nothing of the method.
        "protects" if the accuracy is at most 60 % of clean and below every control by more than
        twice the largest spread; "weak effect" if only the latter; "no effect" otherwise.
    """
    compared = (protected, clean, oracle, *controls)
    if min(len(values) for values in compared) < MIN_SEEDS:
        return "too few seeds"
    reference = float(np.mean(clean))
    if np.mean(oracle) > PROTECTS_BELOW * reference:
        return "oracle fails"
    spread = max(float(np.std(values, ddof=1)) for values in (protected, clean, *controls))
    floor = min(float(np.mean(values)) for values in (clean, *controls))
    if floor - np.mean(protected) <= 2 * spread:
        return "no effect"
    return "protects" if np.mean(protected) <= PROTECTS_BELOW * reference else "weak effect"
