"""k-means, nearest neighbours, and points drawn towards them before they are clustered.

Shape suffixes: N points, K clusters, D features.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from one4all.errors import UsageError

Assignment: TypeAlias = npt.NDArray[np.int32]

_ROWS = 1024  # of the matrix of likenesses that are in memory at a time
_LEAST_LIKENESS = 1e-6  # so that a point far from all others has neighbours, too


def squared_distances(features_ND: Tensor, centres_KD: Tensor) -> Tensor:
    """Squared Euclidean distances less |f|^2, which is the same for all centres; float (N, K)."""
    return centres_KD.square().sum(dim=1) - 2 * features_ND @ centres_KD.T


def nearest(features_ND: Tensor, centres_KD: Tensor) -> Tensor:
    """Index of the nearest centre (Euclidean), int64 (N,)."""
    return squared_distances(features_ND, centres_KD).argmin(dim=1)


def k_means(
    features_ND: Tensor, num_clusters: int, *, seed: int, iterations: int = 50, restarts: int = 3
) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from k-means++ starts; the best of several.

    Args:
        features_ND: float32 (N, D).
        num_clusters: K, at most N.
        seed: Of the starts.
        iterations: At most, for each start.
        restarts: Number of starts.

    Returns:
        Centres, float32 (K, D), and the cluster of each feature, int64 (N,). An empty cluster is
        moved to the feature that is farthest from its centre.

    Raises:
        UsageError: Fewer features than clusters.

    Source: Lloyd 1982; Arthur and Vassilvitskii 2007.
    """
    _check_enough(features_ND, num_clusters)
    random = np.random.default_rng(seed)
    best: tuple[float, Tensor, Tensor] | None = None
    for _ in range(restarts):
        centres = _spread_start(features_ND, num_clusters, random)
        assignment = nearest(features_ND, centres)
        for _ in range(iterations):
            centres = _means(features_ND, centres, assignment)
            moved = nearest(features_ND, centres)
            if bool((moved == assignment).all()):
                break
            assignment = moved
        spread = float((features_ND - centres[assignment]).square().sum())
        if best is None or spread < best[0]:
            best = (spread, centres, assignment)
    assert best is not None
    return best[1], best[2]


def draw_together(points_ND: Tensor, *, neighbours: int = 15, rounds: int = 8) -> Tensor:
    """Points moved to where their neighbours are, so that a kind of things becomes one cluster.

    In each round a point becomes the mean of itself and its neighbours, weighted by likeness
    (cosine); who chose each other counts twice. The neighbours are those of the start.

    Args:
        points_ND: float32 (N, D), of unit length.
        neighbours: The most alike, for each point.
        rounds: Steps along the graph of neighbours.

    Returns:
        float32 (N, D), of unit length.

    Source: feature propagation of simple graph convolution, Wu et al. 2019.
    """
    from scipy import sparse  # no protect worker needs it

    num_points = len(points_ND)
    index_Nk, likeness_Nk = most_alike(points_ND, neighbours)
    rows = np.repeat(np.arange(num_points), index_Nk.shape[1])
    values = likeness_Nk.clamp_min(_LEAST_LIKENESS).flatten().numpy()
    shape = (num_points, num_points)
    graph = sparse.csr_matrix((values, (rows, index_Nk.flatten().numpy())), shape=shape)
    graph = graph + graph.T + sparse.identity(num_points, dtype=np.float32, format="csr")
    moved = points_ND
    for _ in range(rounds):
        moved = F.normalize(torch.from_numpy(graph @ moved.numpy()), dim=1)
    return moved


def most_alike(points_ND: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The nearest neighbours of each point, itself left out.

    Args:
        points_ND: float32 (N, D), of unit length.
        count: k; fewer where there are not so many others.

    Returns:
        Their indices, int64 (N, k), the most alike first, and their likeness (cosine), float32
        (N, k).
    """
    each = min(count, len(points_ND) - 1)
    index_Nk, likeness_Nk = [], []
    for start in range(0, len(points_ND), _ROWS):
        cosine_RN = points_ND[start : start + _ROWS] @ points_ND.T
        cosine_RN.diagonal(start).fill_(-torch.inf)
        likeness, index = cosine_RN.topk(each, dim=1)
        index_Nk.append(index)
        likeness_Nk.append(likeness)
    return torch.cat(index_Nk), torch.cat(likeness_Nk)


def _check_enough(features_ND: Tensor, num_clusters: int) -> None:
    if len(features_ND) < num_clusters:
        raise UsageError(
            f"{num_clusters} clusters of {len(features_ND)} points are not possible; ask for at "
            f"most {len(features_ND)}"
        )


def _spread_start(features: Tensor, num_clusters: int, random: np.random.Generator) -> Tensor:
    chosen = [int(random.integers(len(features)))]
    distance = (features - features[chosen[0]]).square().sum(dim=1)
    for _ in range(num_clusters - 1):
        weight = distance.double().numpy()
        total = weight.sum()
        share = weight / total if total > 0 else None
        chosen.append(int(random.choice(len(features), p=share)))
        distance = distance.minimum((features - features[chosen[-1]]).square().sum(dim=1))
    return features[chosen].clone()


def _means(features: Tensor, centres: Tensor, assignment: Tensor) -> Tensor:
    count = torch.bincount(assignment, minlength=len(centres))
    total = torch.zeros_like(centres).index_add_(0, assignment, features)
    means = total / count.clamp_min(1)[:, None]
    empty = torch.nonzero(count == 0).flatten()
    if len(empty):
        away = (features - centres[assignment]).square().sum(dim=1)
        means[empty] = features[away.topk(len(empty)).indices]
    return means
