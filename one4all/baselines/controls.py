"""Controls: perturbations that tell what an accuracy gap is evidence of.

* `uniform_noise`: any perturbation of the same size. A method must beat it.
* `class_patterns`: one fixed pattern per *true* class. It needs the labels, so it is no method; it
  shows that the bench can see protection at all (the positive control).

All are within the budget and go through `apply_perturbation` like every method.
"""

from __future__ import annotations

import numpy as np

from one4all.perturbation import Levels


def uniform_noise(size: int, *, epsilon_levels: int, seed: int) -> Levels:
    """Independent uniform noise, (size, size, 3) float32 within +-``epsilon_levels``."""
    random = np.random.default_rng(seed)
    bound = epsilon_levels + 0.5  # so that rounding makes all levels equally likely
    return random.uniform(-bound, bound, (size, size, 3)).astype(np.float32)


def class_patterns(
    num_classes: int, size: int, *, epsilon_levels: int, seed: int, block: int = 8
) -> Levels:
    """One random pattern of colour blocks per class, every value at the edge of the budget.

    Args:
        num_classes: Number of patterns.
        size: Side in pixels; a multiple of ``block``.
        epsilon_levels: Budget.
        seed: Of the patterns.
        block: Side of a block in pixels.

    Returns:
        (num_classes, size, size, 3) float32, each value +-``epsilon_levels``.
    """
    random = np.random.default_rng(seed)
    coarse = random.choice((-1.0, 1.0), (num_classes, size // block, size // block, 3))
    fine = coarse.repeat(block, axis=1).repeat(block, axis=2)
    return (epsilon_levels * fine).astype(np.float32)
