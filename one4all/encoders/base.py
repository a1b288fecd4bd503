"""What every image-text encoder is: frozen, normalising, hashed.

Shape suffixes: B batch, C channels, H W image, D embedding width, N texts.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Encoder(nn.Module):
    """A frozen image-text encoder.

    Attributes:
        input_size: Side of the square images it encodes, pixels.
        embedding_dim: D.
        templates: Prompt templates that suit its text side.
        can_draft: Whether it was measured how far bfloat16 moves its embeddings of images of its
            own size, which `PerturbationModel.is_settled` has to know.
    """

    input_size: int
    embedding_dim: int
    templates: tuple[str, ...]
    can_draft: bool = False
    _mean: Tensor
    _std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("_mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @property
    def mean(self) -> list[float]:
        """Normalisation: mean per channel, on the scale of 0..1."""
        return [float(value) for value in self._mean.flatten()]

    @property
    def std(self) -> list[float]:
        """Normalisation: standard deviation per channel, on the scale of 0..1."""
        return [float(value) for value in self._std.flatten()]

    def freeze(self) -> None:
        """Evaluation mode and no gradient for any weight; gradients to the *input* still flow."""
        self.eval()
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> Encoder:
        """Frozen means frozen: stays in evaluation mode whatever a training loop asks."""
        super().train(False)
        return self

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        """Image embeddings; differentiable with respect to the images.

        Args:
            image_BCHW: (B, 3, H, W), uint8 in 0..255 or float in [0, 1]. Resized to ``input_size``
                (bilinear, antialiased) and normalised here, always: un-normalised input is a
                silent error elsewhere (docs/method.md, 4).

        Returns:
            float (B, D), L2-normalised.
        """
        image = image_BCHW.float() / 255 if image_BCHW.dtype == torch.uint8 else image_BCHW
        if image.shape[-2:] != (self.input_size, self.input_size):
            image = F.interpolate(
                image, (self.input_size, self.input_size), mode="bilinear", antialias=True
            )
        return F.normalize(self._embed_image((image - self._mean) / self._std).float(), dim=1)

    @abstractmethod
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Text embeddings, float (N, D), L2-normalised.

        Raises:
            ConfigError: A text that this encoder cannot embed.
        """

    @abstractmethod
    def _embed_image(self, normalised_BCHW: Tensor) -> Tensor: ...

    @abstractmethod
    def content_hash(self) -> str:
        """Digest of all that determines an image embedding: weights, normalisation, activation."""

    def _digest(self, tower: nn.Module) -> str:
        shape = (self.input_size, self._mean.flatten().tolist(), self._std.flatten().tolist())
        kinds = sorted({type(module).__name__ for module in tower.modules()})
        digest = hashlib.sha256(json.dumps([shape, kinds]).encode())
        for name, tensor in sorted(tower.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()
