"""The directions in which points are looked at: where they vary most, or where kinds differ most.

Shape suffixes: N points, D features, Q principal directions, P directions, E pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from one4all.clustering import most_alike

_NEIGHBOURS = 8
_WIDEST = 256  # principal directions in which the others are sought
_EVEN = 0.1  # share of their scatter that is spread evenly, as it is known from few pairs


def principal_directions(features_ND: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The directions along which points differ most.

    Args:
        features_ND: float32 (N, D).
        count: P; D if it is larger. Directions beyond the rank of the points hold nothing.

    Returns:
        Mean (D,) and orthonormal directions (D, P), float32, the widest first. The largest entry of
        each direction is positive, so that one set of points has one answer.
    """
    features = features_ND.double()
    mean_D = features.mean(dim=0)
    return mean_D.float(), _widest(_scatter(features - mean_D), count).float()


def discriminant_directions(features_ND: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The directions along which points differ most, measured by how much neighbours differ there.

    Two images that chose each other as neighbours mostly show one kind of things. How they differ
    still, in light, pose and background, says nothing of kinds. So each direction is divided by the
    spread of such pairs before the widest ones are taken. No labels are needed.

    Args:
        features_ND: float32 (N, D), of unit length.
        count: P; D if it is larger.

    Returns:
        Mean (D,) and directions (D, P), float32, the most telling first. They are not orthonormal;
        on average points are as far from their mean as along as many principal directions. If no
        neighbours differ, they are the principal directions.

    Source: relevant component analysis, Bar-Hillel et al. 2003, with mutual neighbours in place of
    pairs that are known to be of one kind; linear discriminants, Fisher 1936.
    """
    mean_D, wide_DQ = principal_directions(features_ND, max(_WIDEST, count))
    points_NQ = ((features_ND - mean_D) @ wide_DQ).double()
    differences_EQ = _differences(points_NQ, F.normalize(points_NQ[:, :count].float(), dim=1))
    within_QQ = _scatter(differences_EQ)
    even = within_QQ.diagonal().mean()
    if not even > 0:
        return mean_D, wide_DQ[:, :count]
    identity_QQ = torch.eye(len(within_QQ), dtype=torch.float64)
    within_QQ = (1 - _EVEN) * within_QQ + _EVEN * even * identity_QQ
    spread_Q, own_QQ = torch.linalg.eigh(within_QQ)
    whitening_QQ = own_QQ / spread_Q.sqrt() @ own_QQ.T
    inner_QP = whitening_QQ @ _widest(_scatter(points_NQ @ whitening_QQ), count)
    before, after = (
        points.norm(dim=1).mean() for points in (points_NQ[:, :count], points_NQ @ inner_QP)
    )
    return mean_D, (wide_DQ.double() @ inner_QP * (before / after)).float()


def _differences(points_NQ: Tensor, unit_NP: Tensor) -> Tensor:
    """Between points that are among each other's neighbours, each pair once; float64 (E, Q)."""
    index_Nk, _ = most_alike(unit_NP, _NEIGHBOURS)
    first_E = torch.arange(len(index_Nk)).repeat_interleave(index_Nk.shape[1])
    second_E = index_Nk.flatten()
    mutual_E = (index_Nk[second_E] == first_E[:, None]).any(dim=1) & (first_E < second_E)
    return points_NQ[first_E[mutual_E]] - points_NQ[second_E[mutual_E]]


def _scatter(points_NQ: Tensor) -> Tensor:
    return points_NQ.T @ points_NQ


def _widest(scatter_QQ: Tensor, count: int) -> Tensor:
    """Its leading eigenvectors, float64 (Q, count), the largest entry of each positive."""
    from scipy import linalg  # no protect worker needs it

    last = len(scatter_QQ) - 1
    first = max(last - count + 1, 0)
    _, vectors = linalg.eigh(scatter_QQ.numpy(), subset_by_index=(first, last))
    axes_QP = torch.from_numpy(vectors).flip(1)
    largest_P = axes_QP.gather(0, axes_QP.abs().argmax(dim=0, keepdim=True))
    return axes_QP * largest_P.sign()
