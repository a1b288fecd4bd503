"""Perturbations by what an encoder says of an image.

Shape suffixes: N images, K clusters, D features, C colour channels, h w perturbation grid.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Self

import numpy as np
import torch
from torch import Tensor

from one4all.clustering import Assignment, nearest
from one4all.encoders import Encoder, EncoderConfig, load_encoder
from one4all.errors import ProtectorError
from one4all.evaluation.labelled import LabelledImages
from one4all.evaluation.methods.base import Arrays, FittedCard, SavablePerturbations
from one4all.evaluation.methods.surrogate import chunks
from one4all.perturbation import Levels

_ENCODE_BATCH = 64
_MOST_RECENT = 4
_recent: dict[tuple[str, str, str], Tensor] = {}


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


def encode_corpus(encoder: Encoder, images: LabelledImages, device: torch.device) -> Tensor:
    """L2-normalised features of all images, float32 (N, D) on the CPU.

    The last few are remembered: the methods of a grid see the same images through one encoder.
    """
    pixels = hashlib.sha256(np.ascontiguousarray(images.images_NHWC).data).hexdigest()
    key = (encoder.content_hash(), pixels, str(device))
    if key not in _recent:
        while len(_recent) >= _MOST_RECENT:
            del _recent[next(iter(_recent))]
        _recent[key] = _encode(encoder, images, device)
    return _recent[key].clone()


@torch.inference_mode()
def _encode(encoder: Encoder, images: LabelledImages, device: torch.device) -> Tensor:
    encoder.to(device)
    parts = []
    for part in chunks(len(images), _ENCODE_BATCH):
        batch = torch.from_numpy(images.images_NHWC[part]).permute(0, 3, 1, 2)
        parts.append(encoder.encode_image(batch.to(device)).cpu())
    return torch.cat(parts)
