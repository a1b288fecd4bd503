"""What every kind of protector computes: embeddings and images in, perturbations out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from one4all.images import Pixels
from one4all.perturbation import Levels


class PerturbationModel(nn.Module, ABC):
    """A kind of protector, without encoder and budget.

    It is built as ``Model(config, embedding_dim)``, and what it has learnt or was fitted to is in
    its state dictionary.

    Attributes:
        sees_image: Whether `forward` looks at images; if not, it is given none of their pixels.
        takes_drafts: Whether it can tell that an embedding in bfloat16 will do (`is_settled`).
    """

    sees_image: ClassVar[bool] = True
    takes_drafts: ClassVar[bool] = False

    @abstractmethod
    def __init__(self, config: BaseModel, embedding_dim: int) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, embedding_BD: Tensor, image_BCHW: Tensor) -> Tensor:
        """Perturbations on the scale of the budget.

        Args:
            embedding_BD: L2-normalised image embeddings, float (B, D).
            image_BCHW: Clean images, float (B, 3, H, W) in [0, 1].

        Returns:
            float (B, 3, h, w) in [-1, 1], on a grid of its own; multiply by epsilon.
        """

    def is_settled(self, embedding_BD: Tensor) -> Tensor:
        """Whether embeddings in bfloat16 give the perturbations that those in float32 would.

        Args:
            embedding_BD: (B, D) float32, computed in bfloat16 by an encoder that ``can_draft``.

        Returns:
            bool (B,), true only where that is sure.
        """
        return torch.zeros(len(embedding_BD), dtype=torch.bool)

    @property
    def is_coloured(self) -> bool:
        """Whether the pattern is mainly in colour, so that gray images hold hardly any of it."""
        return False

    def place(self, delta_hwC: Levels, clean: Pixels) -> Levels:
        """Lay a perturbation on an image of any shape; the whole of it, squashed, unless told else.

        Args:
            delta_hwC: (h, w, 3) float32 in levels, from `forward`.
            clean: The image, (H, W, C) uint8.

        Returns:
            (h', w', 3) float32, to be resized to the image.
        """
        return delta_hwC
