"""What is read off clusters: purity, merged labels, quality of a number of clusters.

Shape suffixes: N points, K clusters, D features, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from one4all.clustering import k_means
from one4all.errors import UsageError
from one4all.extras import require

MERGE_SEED = 35  # of the released code's k-means


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
        seed: Seed of k-means.

    Raises:
        UsageError: K is below 2 or not below N; or scikit-learn is not installed.

    Source: Rousseeuw 1987 (silhouette); Calinski and Harabasz 1974.
    """
    count = len(features_ND)
    if not 2 <= num_clusters < count:
        raise UsageError(f"{num_clusters} clusters of {count} points cannot be judged")
    require("sklearn", "evaluate")
    from sklearn.metrics import calinski_harabasz_score, silhouette_score

    features = torch.from_numpy(features_ND)
    centres, assignment = k_means(features, num_clusters, seed=seed, restarts=10)
    points, labels = features.double().numpy(), assignment.numpy()
    return ClusterQuality(
        num_clusters,
        sse=float(np.square(points - centres.double().numpy()[labels]).sum()),
        silhouette=float(silhouette_score(points, labels)),
        calinski_harabasz=float(calinski_harabasz_score(points, labels)),
    )
