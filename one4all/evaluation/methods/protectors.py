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

from one4all.errors import UsageError
from one4all.evaluation.labelled import LabelledImages
from one4all.evaluation.methods.base import FittedMethod, Savable
from one4all.evaluation.methods.embeddings import encode_to_protect
from one4all.perturbation import DEFAULT_EPSILON_LEVELS
from one4all.protectors.card import DEFAULT_PROTECTOR, load_card
from one4all.protectors.protector import Protector

SMALLEST_WORKING_SIZE = 16  # pixels, of a protector's card


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
        embeddings = encode_to_protect(self.protector, images)
        protected = self.protector.protect(list(images.images_NHWC), embeddings_ND=embeddings)
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
