"""Protectors, the artefacts that ship, among the compared methods.

``protector`` is one that is there already. A method that makes one, such as ``codebook``, gives it
to `FittedProtector`: what is measured is the very object that `one4all protect` would load.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from one4all.concepts import ConceptBank
from one4all.encoders import Encoder, EncoderConfig
from one4all.errors import UsageError
from one4all.evaluation.labelled import LabelledImages
from one4all.evaluation.methods.base import FittedMethod, Savable, check_epsilon
from one4all.perturbation import DEFAULT_EPSILON_LEVELS
from one4all.protectors.card import DEFAULT_PROTECTOR, ProtectorCard, load_card
from one4all.protectors.codebook import Codebook
from one4all.protectors.generator import Generator
from one4all.protectors.protector import Protector, golden_embedding

_SMALLEST_WORKING_SIZE = 16  # of a card


class ProtectorConfig(BaseModel):
    """Which protector.

    Attributes:
        protector: Name, folder or URI.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    protector: str = DEFAULT_PROTECTOR


class FittedProtector(FittedMethod, Savable):
    """A protector. It reads no label, and protects the images of its fit as it does any other.

    Args:
        protector: The artefact.
    """

    def __init__(self, protector: Protector) -> None:
        self.protector = protector

    def protect(self, images: LabelledImages, *, own: bool, seed: int) -> LabelledImages:
        """See the base class; nothing is drawn, so neither ``own`` nor ``seed`` matters."""
        protected = self.protector.protect(list(images.images_NHWC))
        return replace(images, images_NHWC=np.stack(protected))

    def save(self, folder: Path) -> None:
        """Write a protector folder, which `one4all protect` takes too."""
        self.protector.save(folder)

    @classmethod
    def load(cls, folder: Path) -> FittedProtector:
        """The inverse of `save`.

        Raises:
            ProtectorError: No protector, a damaged one, or its encoder is not the one found here.
        """
        return cls(Protector.load(str(folder)))


def fit_protector(
    images: LabelledImages,
    config: ProtectorConfig,
    *,
    epsilon_levels: int = DEFAULT_EPSILON_LEVELS,
    seed: int,
    **unused: object,
) -> FittedProtector:
    """Load a protector; ``images`` and ``seed`` do not matter.

    Raises:
        ProtectorError: There is none, or it cannot be used here.
        UsageError: Its budget is larger than ``epsilon_levels``.
    """
    protector = Protector.load(config.protector)
    if protector.card.epsilon_levels > epsilon_levels:
        raise UsageError(
            f"protector {config.protector} has a budget of {protector.card.epsilon_levels} levels "
            f"and the evaluation one of {epsilon_levels}; choose a larger budget, or a protector "
            "of a smaller one"
        )
    return FittedProtector(protector)


def identify_protector(config: ProtectorConfig) -> dict[str, Any]:
    """What is behind the name: the same protector at another place makes the same copy.

    Raises:
        ProtectorError: There is none.
    """
    return {"content_hash": load_card(config.protector).content_hash}


def build_protector(
    name: str,
    network: Codebook | Generator,
    encoder: Encoder,
    encoder_config: EncoderConfig,
    *,
    working_size: int,
    epsilon_levels: int,
    training: dict[str, Any],
    bank: ConceptBank | None = None,
) -> Protector:
    """A protector of what was just made.

    Args:
        name: Name in the card.
        network: What makes perturbations.
        encoder: Frozen encoder, which ``encoder_config`` names.
        encoder_config: Its configuration.
        working_size: Side in pixels of the copy that encoder and network see.
        epsilon_levels: Budget.
        training: How it was made, for the card.
        bank: Names that the network stands for, if any.

    Raises:
        UsageError: The budget is out of range.
    """
    check_epsilon(epsilon_levels)
    card = ProtectorCard(
        name=name,
        encoder=encoder_config,
        encoder_hash=encoder.content_hash(),
        golden_embedding=golden_embedding(encoder),
        vocabulary=bank.vocabulary if bank else "",
        concept_bank_hash=bank.hash if bank else "",
        generator=network.config,
        working_size=max(_SMALLEST_WORKING_SIZE, working_size),
        epsilon_levels=epsilon_levels,
        training=training,
    )
    return Protector(card, encoder, network)
