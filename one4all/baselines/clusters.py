"""Perturbations by cluster of an encoder's features: what label-free methods share.

Shape suffixes: N images, K clusters, D features, C colour channels, h w perturbation grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from one4all.baselines.base import Arrays, FittedCard, FittedMethod
from one4all.baselines.surrogate import chunks
from one4all.encoders import Encoder, EncoderConfig, load_encoder
from one4all.errors import ProtectorError, UsageError
from one4all.labelled import LabelledImages
from one4all.perturbation import Levels

Assignment = npt.NDArray[np.int32]
_ENCODE_BATCH = 64


class ClusterWise(FittedMethod):
    """One perturbation per cluster; an image gets that of the nearest centre. Labels are not read.

    This is also its transfer rule: new images are encoded and go to the nearest centre.

    Args:
        card: Description; its config has an ``encoder``.
        patterns_KhwC: (K, h, w, 3) float32, in levels.
        centres_KD: float32.
        own_N: Clusters of the images of the fit, so that they are not encoded again.
        encoder: The one of the fit; loaded when first needed unless given.
    """

    def __init__(
        self,
        card: FittedCard,
        patterns_KhwC: Levels,
        centres_KD: Levels,
        own_N: Assignment,
        encoder: Encoder | None = None,
    ) -> None:
        super().__init__(card)
        self.patterns_KhwC = patterns_KhwC
        self.centres_KD = centres_KD
        self.own_N = own_N
        self._encoder = encoder

    def perturb(self, images: LabelledImages, *, own: bool, seed: int) -> Iterator[Levels]:
        """See the base class; nothing is drawn, so ``seed`` does not matter."""
        if own:
            self.check_own(images)
        assignment = self.own_N if own else self.assign(images)
        return (self.patterns_KhwC[cluster] for cluster in assignment)

    def assign(self, images: LabelledImages) -> Assignment:
        """Cluster of each image, int32 (N,).

        Raises:
            ProtectorError: The encoder is not the one of the fit; centres would mean nothing.
        """
        if self._encoder is None:
            self._encoder = load_fitted_encoder(self.card)
        features = encode_corpus(self._encoder, images, torch.device("cpu"))
        return nearest(features, torch.from_numpy(self.centres_KD)).numpy().astype(np.int32)

    def arrays(self) -> Arrays:
        return {"patterns": self.patterns_KhwC, "centres": self.centres_KD, "own": self.own_N}

    @classmethod
    def from_arrays(cls, card: FittedCard, arrays: Arrays) -> Self:
        return cls(card, arrays["patterns"], arrays["centres"], arrays["own"])


def load_fitted_encoder(card: FittedCard) -> Encoder:
    """The encoder that a fitted method was fitted with.

    Raises:
        ProtectorError: What loads here under that configuration is another one.
    """
    encoder = load_encoder(EncoderConfig.model_validate(card.config["encoder"]))
    if encoder.content_hash() != card.encoder_hash:
        raise ProtectorError(
            f"{card.method} was fitted with encoder {card.encoder_hash[:12]} and this is "
            f"{encoder.content_hash()[:12]}; install the one it was fitted with, or fit again"
        )
    return encoder


@torch.inference_mode()
def encode_corpus(encoder: Encoder, images: LabelledImages, device: torch.device) -> Tensor:
    """L2-normalised features of all images, float32 (N, D) on the CPU."""
    encoder.to(device)
    parts = []
    for part in chunks(len(images), _ENCODE_BATCH):
        batch = torch.from_numpy(images.images_NHWC[part]).permute(0, 3, 1, 2)
        parts.append(encoder.encode_image(batch.to(device)).cpu())
    return torch.cat(parts)


def nearest(features_ND: Tensor, centres_KD: Tensor) -> Tensor:
    """Index of the nearest centre (Euclidean), int64 (N,)."""
    # |f - c|^2 without |f|^2, which is the same for all centres.
    return (centres_KD.square().sum(dim=1) - 2 * features_ND @ centres_KD.T).argmin(dim=1)


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
    if len(features_ND) < num_clusters:
        raise UsageError(
            f"{num_clusters} clusters of {len(features_ND)} images are not possible; ask for at "
            f"most {len(features_ND)}"
        )
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


def cluster_purity(assignment_N: Assignment, labels_N: npt.NDArray[np.int64]) -> float:
    """Share of images whose label is the most frequent one of their cluster, 0..1.

    For the report only; no label-free method reads it.
    """
    table = np.zeros((assignment_N.max() + 1, labels_N.max() + 1), np.int64)
    np.add.at(table, (assignment_N, labels_N), 1)
    return float(table.max(axis=1).sum() / len(labels_N))
