"""Which images are of one kind, and how many kinds there are; no labels are read.

Shape suffixes: N points, M points of a sample, D features, K groups.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from one4all.clustering import draw_together, k_means, nearest

_RESTARTS = 10  # of k-means; fewer leave more to chance
_MOST_POINTS = 4000  # of which the number of groups is found
_SUBSAMPLES, _SHARE, _TRIAL_RESTARTS = 8, 0.8, 3
_STEP = 2**0.25  # between numbers that are tried
_AS_GOOD = 0.02


def group(points_ND: Tensor, num_groups: int, *, seed: int) -> Tensor:
    """Groups of like points: clusters after each point was drawn towards its neighbours.

    Args:
        points_ND: float32 (N, D), of unit length.
        num_groups: K, at most N.
        seed: Of the clusters' starts.

    Returns:
        The group of each point, int64 (N,).

    Raises:
        UsageError: Fewer points than groups.
    """
    drawn_ND = draw_together(points_ND)
    return k_means(drawn_ND, num_groups, seed=seed, restarts=_RESTARTS)[1]


def group_centres(points_ND: Tensor, group_N: Tensor, num_groups: int) -> Tensor:
    """Mean direction of each group, float32 (K, D), of unit length; 0 where it is empty."""
    total_KD = torch.zeros(num_groups, points_ND.shape[1])
    return F.normalize(total_KD.index_add_(0, group_N, points_ND), dim=1)


def stable_number(points_ND: Tensor, fewest: int, most: int, *, seed: int) -> int:
    """The number of groups that depends least on which images there are.

    A fifth of the points is left out, and the others are grouped. With as many groups as there are
    kinds of things, that gives the same groups whichever points are left out. With fewer, kinds
    are put together, and with more they are cut apart, each time in another way. Of numbers that
    are about as good it is the smallest: the larger the groups, the more often images of a kind
    are in the same one.

    Args:
        points_ND: float32 (N, D), of unit length. Of more than 4,000 a sample is looked at.
        fewest, most: Least and largest number, at most .8 N.
        seed: Of what is left out, and of the clusters' starts.

    Source: stability of clusterings, Ben-Hur, Elisseeff and Guyon 2002.
    """
    random = np.random.default_rng(seed)
    points_ND = points_ND[_draw(len(points_ND), min(len(points_ND), _MOST_POINTS), random)]
    kept = int(_SHARE * len(points_ND))
    chosen = [points_ND[_draw(len(points_ND), kept, random)] for _ in range(_SUBSAMPLES)]
    samples = [(sample_ND, draw_together(sample_ND)) for sample_ND in chosen]
    numbers = [fewest]
    while numbers[-1] * _STEP < most:
        numbers.append(round(numbers[-1] * _STEP + 0.5))
    stability = [_stability(points_ND, samples, number, seed) for number in numbers]
    enough = max(stability) - _AS_GOOD
    return next(number for number, value in zip(numbers, stability, strict=True) if value >= enough)


def _draw(num_points: int, count: int, random: np.random.Generator) -> Tensor:
    return torch.from_numpy(np.sort(random.choice(num_points, count, replace=False)))


def _stability(
    points_ND: Tensor, samples: list[tuple[Tensor, Tensor]], num_groups: int, seed: int
) -> float:
    """How much groupings of all points agree that were learnt from samples; at most 1."""
    found = []
    for sample_MD, drawn_MD in samples:
        group_M = k_means(drawn_MD, num_groups, seed=seed, restarts=_TRIAL_RESTARTS)[1]
        centres_KD = group_centres(sample_MD, group_M, num_groups)
        found.append(nearest(points_ND, centres_KD).numpy())
    pairs = itertools.combinations(found, 2)
    return float(np.mean([_agreement(first, second, num_groups) for first, second in pairs]))


def _agreement(first_N: np.ndarray, second_N: np.ndarray, num_groups: int) -> float:
    """Adjusted Rand index: 1 for equal groupings, 0 for what chance would give.

    Source: Hubert and Arabie 1985.
    """
    both_KK = np.zeros((num_groups, num_groups))
    np.add.at(both_KK, (first_N, second_N), 1)
    together, first, second = (
        float((count * (count - 1)).sum()) for count in (both_KK, both_KK.sum(1), both_KK.sum(0))
    )
    chance = first * second / max(len(first_N) * (len(first_N) - 1), 1)
    largest = (first + second) / 2
    return (together - chance) / (largest - chance) if largest > chance else 1.0
