"""Perturbations by what an encoder says of an image.

Shape suffixes: N images, K clusters, D features, C colour channels, h w perturbation grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import numpy as np
import torch

from one4all.clustering import Assignment, nearest
from one4all.encoders import EncoderConfig, load_encoder
from one4all.encoders.base import Encoder
from one4all.errors import ProtectorError
from one4all.evaluation.labelled import LabelledImages
from one4all.evaluation.methods.base import Arrays, FittedCard, SavablePerturbations
from one4all.evaluation.methods.embeddings import encode_corpus
from one4all.perturbation import Levels


class ClusterWise(SavablePerturbations):
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
            ProtectorError: The encoder that loads here is another one than that of the fit.
        """
        if self._encoder is None:
            self._encoder = _load_encoder_of(self.card)
        features = encode_corpus(self._encoder, images, torch.device("cpu"))
        return nearest(features, torch.from_numpy(self.centres_KD)).numpy().astype(np.int32)

    def arrays(self) -> Arrays:
        return {"patterns": self.patterns_KhwC, "centres": self.centres_KD, "own": self.own_N}

    @classmethod
    def from_arrays(cls, card: FittedCard, arrays: Arrays) -> Self:
        return cls(card, arrays["patterns"], arrays["centres"], arrays["own"])


def _load_encoder_of(card: FittedCard) -> Encoder:
    encoder = load_encoder(EncoderConfig.model_validate(card.config["encoder"]))
    if encoder.content_hash() != card.encoder_hash:
        raise ProtectorError(
            f"{card.method} was fitted with encoder {card.encoder_hash[:12]} and this is "
            f"{encoder.content_hash()[:12]}; install the one it was fitted with, or fit again"
        )
    return encoder
