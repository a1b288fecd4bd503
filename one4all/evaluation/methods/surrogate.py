"""The small network that labelled gradient methods fit, and their view of images.

All arithmetic is in levels: an image is float32 in 0..255, a perturbation in +-epsilon. Only the
network's input is normalised, after perturbation, clamping and augmentation, in this order; a
perturbation added behind an augmentation protects nothing that is published.

Shape suffixes: N images, B batch, C channels, H W image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from one4all.errors import UsageError
from one4all.evaluation.adversaries.networks import NarrowResNet18
from one4all.evaluation.labelled import LabelledImages
from one4all.images import Pixels

Index: TypeAlias = npt.NDArray[np.intp]

MAX_GRADIENT_NORM = 5.0


class SurrogateConfig(BaseModel):
    """A ResNet18 and its optimiser: SGD with momentum 0.9.

    Attributes:
        width: Channels of the first stage; 64 is the full network.
        stem_stride: 1 for 32-pixel images, 2 is a quarter of the cost.
        augmentation: "flip_crop": mirror, and shift by up to an eighth of the side; gradients pass
            through to the perturbation.
        batch_size, learning_rate, weight_decay: Settings of SGD.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: Annotated[int, Field(ge=8, le=128)] = 16
    stem_stride: Literal[1, 2] = 2
    augmentation: Literal["none", "flip_crop"] = "none"
    batch_size: Annotated[int, Field(ge=2)] = 128
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4


FULL_RESNET18 = SurrogateConfig(width=64, stem_stride=1)


class Surrogate:
    """A network from scratch that trains on batches in levels.

    Args:
        num_classes: Outputs.
        config: Architecture and optimiser.
        device: Where it lives.
    """

    def __init__(self, num_classes: int, config: SurrogateConfig, device: torch.device) -> None:
        self.config = config
        self.model = NarrowResNet18(
            num_classes, width=config.width, stem_stride=config.stem_stride
        ).to(device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=config.learning_rate,
            momentum=0.9,
            weight_decay=config.weight_decay,
        )

    def logits(self, levels_BCHW: Tensor, *, augment: bool = True) -> Tensor:
        """Logits (B, classes) of images in levels; clamped and, if configured, augmented here."""
        levels = levels_BCHW.clamp(0, 255)
        if augment and self.config.augmentation == "flip_crop":
            levels = flip_and_shift(levels)
        logits: Tensor = self.model(normalise(levels))
        return logits

    def step(self, levels_BCHW: Tensor, labels_B: Tensor) -> float:
        """One SGD step on cross-entropy with clipped gradients; returns the loss before it."""
        self.model.train()
        loss = F.cross_entropy(self.logits(levels_BCHW), labels_B)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        return float(loss.detach())

    @torch.no_grad()
    def predict(self, levels_BCHW: Tensor) -> Tensor:
        """Classes (B,) in evaluation mode, without augmentation."""
        self.model.eval()
        return self.logits(levels_BCHW, augment=False).argmax(dim=1)


def normalise(levels_BCHW: Tensor) -> Tensor:
    """Levels 0..255 to the -1..1 that networks here take, channels last in memory."""
    return levels_BCHW.div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


def to_levels(images_BHWC: Pixels, device: torch.device) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float32 in levels."""
    images = torch.from_numpy(np.ascontiguousarray(images_BHWC)).to(device)
    return images.permute(0, 3, 1, 2).float()


def flip_and_shift(levels_BCHW: Tensor) -> Tensor:
    """Mirror half of the images; shift each by up to an eighth of its side, edges reflected.

    Differentiable with respect to the images; drawn from PyTorch's global generator.
    """
    batch, _, height, width = levels_BCHW.shape
    reach = height // 8
    shift = torch.randint(-reach, reach + 1, (batch, 2)).float() * 2
    flip = torch.where(torch.rand(batch) < 0.5, -1.0, 1.0)
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = flip, 1.0
    theta[:, 0, 2], theta[:, 1, 2] = shift[:, 0] / width, shift[:, 1] / height
    grid = F.affine_grid(theta, [batch, 3, height, width], align_corners=False)
    return F.grid_sample(
        levels_BCHW, grid.to(levels_BCHW.device), padding_mode="reflection", align_corners=False
    )


def batches(num: int, batch_size: int, random: np.random.Generator) -> Iterator[Index]:
    """Indices of 0..num-1 in shuffled batches of ``batch_size`` (all, if fewer), for ever."""
    size = min(num, batch_size)
    while True:
        order = random.permutation(num)
        for start in range(0, num - size + 1, size):
            yield order[start : start + size]


def chunks(num: int, batch_size: int) -> Iterator[slice]:
    """0..num-1 once, in order."""
    for start in range(0, num, batch_size):
        yield slice(start, min(start + batch_size, num))


def check_classes(images: LabelledImages, method: str) -> None:
    """Refuse a corpus of one class.

    Raises:
        UsageError: It has one.
    """
    if images.num_classes < 2:
        raise UsageError(f"{method} tells classes apart and these images have only one")


def signed_step(delta: Tensor, gradient: Tensor, *, step: float, epsilon: float) -> Tensor:
    """Projected descent of L-infinity: ``clamp(delta - step * sign(gradient), +-epsilon)``."""
    return (delta - step * gradient.sign()).clamp(-epsilon, epsilon)


def uniform_start(shape: tuple[int, ...], epsilon: float) -> Tensor:
    """Independent uniform values within +-epsilon, float32 on the CPU."""
    return (torch.rand(shape) * 2 - 1) * epsilon
