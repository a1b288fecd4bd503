"""k-means, Ward's tree and what is read off clusters: purity, merged labels, quality of a number.

Shape suffixes: N points, K clusters, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from one4all.errors import UsageError

Assignment: TypeAlias = npt.NDArray[np.int32]
MERGE_SEED = 35  # of the released code's k-means (docs/method.md, label-agnostic)


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


def ward(features_ND: Tensor, sizes: Sequence[int]) -> Tensor:
    """One tree of clusters, cut several times: always merge the two that lose least by it.

    Nothing is drawn. Keeps the distances of all pairs, 4 bytes times N squared: for vocabularies
    and centres, not for corpora.

    Args:
        features_ND: float32 (N, D).
        sizes: Number of clusters K of each cut, at most N.

    Returns:
        For each cut the cluster of each feature, int64 (cuts, N), numbered 0..K-1. A finer cut
        splits the clusters of a coarser one.

    Raises:
        UsageError: Fewer features than clusters.

    Source: Ward 1963.
    """
    from scipy.cluster import hierarchy  # a third of a second, which no protect worker needs

    _check_enough(features_ND, max(sizes))
    tree = hierarchy.linkage(features_ND.double().numpy(), "ward")
    # One call each: asked for several at once, it misplaces the cut that leaves all apart.
    cuts = [hierarchy.cut_tree(tree, size)[:, 0] for size in sizes]
    return torch.from_numpy(np.stack(cuts).astype(np.int64))


def _check_enough(features_ND: Tensor, num_clusters: int) -> None:
    if len(features_ND) < num_clusters:
        raise UsageError(
            f"{num_clusters} clusters of {len(features_ND)} points are not possible; ask for at "
            f"most {len(features_ND)}"
        )


def cluster_purity(
    assignment_N: npt.NDArray[np.integer[Any]], labels_N: npt.NDArray[np.int64]
) -> float:
    """Share of points whose label is the most frequent one of their cluster, 0..1.

    For reports only; no label-free method reads it.
    """
    table = np.zeros((assignment_N.max() + 1, labels_N.max() + 1), np.int64)
    np.add.at(table, (assignment_N, labels_N), 1)
    return float(table.max(axis=1).sum() / len(labels_N))


def merge_labels(
    embeddings_CD: npt.NDArray[np.float32], num_clusters: int
) -> npt.NDArray[np.int64]:
    """New labels for a label-agnostic test: classes whose names are near in text space are one.

    Args:
        embeddings_CD: Text embedding of each class name, float32 (C, D).
        num_clusters: Number of new labels, below C.

    Returns:
        New label of each class, int64 (C,), numbered in the order of their first class.

    Raises:
        UsageError: There are not more classes than clusters.

    Source: paper section 4.3: k-means of CLIP text embeddings, 20 clusters.
    """
    if num_clusters >= len(embeddings_CD):
        raise UsageError(
            f"{len(embeddings_CD)} classes cannot be merged into {num_clusters}; choose fewer "
            "clusters than classes"
        )
    _, assignment = k_means(
        torch.from_numpy(embeddings_CD), num_clusters, seed=MERGE_SEED, restarts=10
    )
    order = {old: new for new, old in enumerate(dict.fromkeys(assignment.tolist()))}
    return np.array([order[old] for old in assignment.tolist()], np.int64)


@dataclass(frozen=True)
class ClusterQuality:
    """How well a number of clusters fits; the three curves of the paper's Figure 5.

    Attributes:
        num_clusters: K.
        sse: Sum of squared distances to the centres; falls with K.
        silhouette: Mean silhouette coefficient, -1..1; higher is better.
        calinski_harabasz: Ratio of the spread between to that within clusters; higher is better.
    """

    num_clusters: int
    sse: float
    silhouette: float
    calinski_harabasz: float


def cluster_quality(
    features_ND: npt.NDArray[np.float32], num_clusters: int, *, seed: int = MERGE_SEED
) -> ClusterQuality:
    """Cluster and judge; all pairs of points are compared, so N is a few thousand at most.

    Args:
        features_ND: float32 (N, D), N above K.
        num_clusters: K, at least 2.
        seed: Of k-means.

    Raises:
        UsageError: K is below 2 or not below N.

    Source: Rousseeuw 1987 (silhouette); Calinski and Harabasz 1974.
    """
    features = torch.from_numpy(features_ND).double()
    count = len(features)
    if not 2 <= num_clusters < count:
        raise UsageError(f"{num_clusters} clusters of {count} points cannot be judged")
    centres, assignment = k_means(features.float(), num_clusters, seed=seed, restarts=10)
    centres = centres.double()
    sizes = torch.bincount(assignment, minlength=num_clusters)
    sse = (features - centres[assignment]).square().sum()
    between = (sizes[:, None] * (centres - features.mean(dim=0)).square()).sum()
    ratio = (between / (num_clusters - 1)) / (sse / (count - num_clusters))

    membership = torch.nn.functional.one_hot(assignment, num_clusters).double()
    to_clusters = torch.cdist(features, features) @ membership  # sums of distances, (N, K)
    own = sizes[assignment]
    rows = torch.arange(count)
    within = to_clusters[rows, assignment] / (own - 1).clamp_min(1)
    others = to_clusters / sizes
    others[rows, assignment] = torch.inf
    nearest_other = others.min(dim=1).values
    silhouette = (nearest_other - within) / torch.maximum(nearest_other, within).clamp_min(1e-12)
    silhouette[own == 1] = 0
    return ClusterQuality(num_clusters, float(sse), float(silhouette.mean()), float(ratio))


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
