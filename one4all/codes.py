"""Binary codes of points that keep neighbours alike.

Shape suffixes: N points, D features, R directions, M codes, B bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ITERATIONS = 100
_STARTS = 10
_MOST_BITS = 12  # of which all codes are held against each point


def quantise(
    features_ND: Tensor, num_bits: int, weights_N: Tensor, *, seed: int, starts: int = 1
) -> Tensor:
    """Signs of principal components, rotated so that rounding them to +-1 loses least.

    Like points may have the same code.

    Args:
        features_ND: float32 (N, D).
        num_bits: B. Where the points span fewer dimensions, several bits share one.
        weights_N: How much each point counts, above 0.
        seed: Seed of the first rotations.
        starts: Number of rotations, of which that one counts that loses least in the end.

    Returns:
        int8 (N, B), each 1 or -1.

    Source: iterative quantisation, Gong and Lazebnik 2011.
    """
    components_NB = _components(features_ND, num_bits, _shares(weights_N), seed, starts)
    return _signs(components_NB).to(torch.int8)


def quantise_apart(features_ND: Tensor, num_bits: int, weights_N: Tensor, *, seed: int) -> Tensor:
    """Codes as of `quantise`, but each point has one of its own: of all assignments the nearest.

    There are ten starts, which leaves less to chance than one. Where there are more points than
    codes, and for codes of more than 12 bits, which hardly meet by chance, they are those of
    `quantise`.

    Args, returns: As of `quantise`.
    """
    from scipy import optimize

    share_N1 = _shares(weights_N)
    components_NB = _components(features_ND, num_bits, share_N1, seed, _STARTS)
    if num_bits > _MOST_BITS or len(features_ND) > 1 << num_bits:
        return _signs(components_NB).to(torch.int8)
    spread_B = (share_N1 * components_NB.square()).sum(dim=0).sqrt()
    scaled_NB = components_NB / spread_B.clamp_min(torch.finfo(torch.float64).tiny)
    codes_MB = bits_of(torch.arange(1 << num_bits), num_bits)
    # The squared distance, but for constants.
    cost_NM = -share_N1 * (scaled_NB @ codes_MB.double().T)
    _, chosen_N = optimize.linear_sum_assignment(cost_NM.numpy())
    return codes_MB[torch.from_numpy(chosen_N)].to(torch.int8)


def bits_of(number_N: Tensor, num_bits: int) -> Tensor:
    """Codes that whole numbers stand for, the lowest bit first; int64 (N, B), each 1 or -1."""
    return 2 * (number_N[:, None] >> torch.arange(num_bits) & 1) - 1


def _shares(weights_N: Tensor) -> Tensor:
    return (weights_N.double() / weights_N.sum())[:, None]


def _components(
    features_ND: Tensor, num_bits: int, share_N1: Tensor, seed: int, starts: int
) -> Tensor:
    """The rotated components whose signs are the code, float64 (N, B)."""
    centred_ND = features_ND.double()
    centred_ND = centred_ND - (centred_ND * share_N1).sum(dim=0)
    # Of few points or features there are fewer directions: the rest of the columns stays zero.
    _, _, axes_RD = torch.linalg.svd(centred_ND * share_N1.sqrt(), full_matrices=False)
    components_NB = torch.zeros(len(centred_ND), num_bits, dtype=torch.float64)
    directions = axes_RD[:num_bits]
    components_NB[:, : len(directions)] = centred_ND @ directions.T
    generator = torch.Generator().manual_seed(seed)
    rotated = (_rotated(components_NB, share_N1, generator) for _ in range(starts))
    # All have the same length, so the least is lost where the sum of absolute values is largest.
    return max(rotated, key=lambda rotated_NB: float((share_N1 * rotated_NB.abs()).sum()))


def _rotated(components_NB: Tensor, share_N1: Tensor, generator: torch.Generator) -> Tensor:
    """Components, rotated so that rounding loses less with each step from a random start."""
    num_bits = components_NB.shape[1]
    start = torch.randn(num_bits, num_bits, dtype=torch.float64, generator=generator)
    rotation, _ = torch.linalg.qr(start)
    for _ in range(_ITERATIONS):
        signs_NB = _signs(components_NB @ rotation)
        left, _, right = torch.linalg.svd(components_NB.T @ (share_N1 * signs_NB))
        rotation = left @ right
    rotated_NB: Tensor = components_NB @ rotation
    return rotated_NB


def _signs(values: Tensor) -> Tensor:
    """1 or -1; there is no third."""
    return torch.where(values >= 0, 1.0, -1.0).to(values)
