"""Contrastive learning that is differentiable with respect to its images: the victim of CP and TUE.

Views are drawn from images in levels, *after* perturbation, as SimCLR's are: random resized crop,
mirror image, colour jitter, gray. Hue turns in YIQ instead of HSV, which has kinks; the four kinds
of jitter keep one order.

Sources: Chen et al., "A Simple Framework for Contrastive Learning", ICML 2020 (SimCLR); Chen and
He, "Exploring Simple Siamese Representation Learning", CVPR 2021 (SimSiam).

Shape suffixes: B batch, C channels, H W image, D projection width.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from one4all.evaluation.adversaries.networks import NarrowResNet18
from one4all.evaluation.methods.surrogate import normalise
from one4all.images import LUMA

CROP_AREA = (0.2, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)
JITTER, HUE, JITTER_SHARE, GRAY_SHARE = 0.4, 0.1, 0.8, 0.2
_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


class LearnerConfig(BaseModel):
    """A contrastive learner on a ResNet18.

    Attributes:
        algorithm: "simclr" or "simsiam".
        width, stem_stride: As for `SurrogateConfig`.
        projection_dim: D.
        temperature: Temperature of SimCLR's loss.
        optimizer, learning_rate, weight_decay: SGD has momentum 0.9.
        batch_size: Images; twice as many views.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    algorithm: Literal["simclr", "simsiam"] = "simclr"
    width: Annotated[int, Field(ge=8, le=128)] = 16
    stem_stride: Literal[1, 2] = 2
    projection_dim: Annotated[int, Field(ge=8, le=2048)] = 128
    temperature: Annotated[float, Field(gt=0)] = 0.5
    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    batch_size: Annotated[int, Field(ge=2)] = 128


class Learner:
    """A contrastive network from scratch, and its loss on images in levels."""

    def __init__(self, config: LearnerConfig, device: torch.device) -> None:
        self.config = config
        dim = config.projection_dim
        # The classifier of the ResNet is the first layer of the projection.
        backbone = NarrowResNet18(dim, width=config.width, stem_stride=config.stem_stride)
        layers: list[nn.Module] = [backbone, nn.ReLU(), nn.Linear(dim, dim)]
        if config.algorithm == "simsiam":
            layers.insert(1, nn.BatchNorm1d(dim))
            layers.append(nn.BatchNorm1d(dim, affine=False))
        self.project = nn.Sequential(*layers).to(device)
        self.predict = nn.Sequential(
            nn.Linear(dim, dim // 4), nn.BatchNorm1d(dim // 4), nn.ReLU(), nn.Linear(dim // 4, dim)
        ).to(device)
        weights = list(self.project.parameters())
        if config.algorithm == "simsiam":
            weights += list(self.predict.parameters())
        self.optimizer: torch.optim.Optimizer
        if config.optimizer == "adam":
            self.optimizer = torch.optim.Adam(
                weights, lr=config.learning_rate, weight_decay=config.weight_decay
            )
        else:
            self.optimizer = torch.optim.SGD(
                weights, lr=config.learning_rate, momentum=0.9, weight_decay=config.weight_decay
            )

    def train(self, mode: bool) -> None:
        """Batch statistics (True) or running ones (False)."""
        self.project.train(mode)
        self.predict.train(mode)

    def loss(self, levels_BCHW: Tensor) -> Tensor:
        """Contrastive loss of two random views; gradients reach the images through both."""
        views = [random_view(levels_BCHW.clamp(0, 255) / 255) for _ in range(2)]
        first, second = self.project(torch.cat(views)).chunk(2)
        if self.config.algorithm == "simclr":
            return info_nce(first, second, temperature=self.config.temperature)
        one, other = self.predict(first), self.predict(second)
        towards_other = F.cosine_similarity(one, second.detach(), dim=1).mean()
        return -(towards_other + F.cosine_similarity(other, first.detach(), dim=1).mean()) / 2

    def step(self, levels_BCHW: Tensor) -> float:
        """One step of the network; returns the loss before it."""
        self.train(True)
        loss = self.loss(levels_BCHW)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return float(loss.detach())


def cosine_schedule(
    optimizer: torch.optim.Optimizer, *, epochs: int, warm_up: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Cosine to 0 over ``epochs``, after a linear warm-up; step it once an epoch."""

    def factor(epoch: int) -> float:
        rise = min(1.0, (epoch + 1) / (warm_up + 1))
        return rise * (1 + math.cos(math.pi * epoch / epochs)) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def info_nce(first_BD: Tensor, second_BD: Tensor, *, temperature: float) -> Tensor:
    """NT-Xent over the 2B views: each has to find its partner among the 2B - 1 others.

    Source: Chen et al. 2020, Eq. 1.
    """
    batch = len(first_BD)
    views = F.normalize(torch.cat([first_BD, second_BD]), dim=1)
    similarity = views @ views.T / temperature
    similarity = similarity.masked_fill(
        torch.eye(2 * batch, dtype=torch.bool, device=views.device), float("-inf")
    )
    partner = torch.arange(2 * batch, device=views.device).roll(batch)
    return F.cross_entropy(similarity, partner)


def random_view(image_BCHW: Tensor) -> Tensor:
    """One random view of each image, (B, 3, H, W), normalised as networks here take it.

    Args:
        image_BCHW: float32 in [0, 1]; gradients pass through.
    """
    view = _jitter(_crop_and_flip(image_BCHW))
    return normalise(view.clamp(0, 1) * 255)


def _crop_and_flip(image_BCHW: Tensor) -> Tensor:
    batch, device = len(image_BCHW), image_BCHW.device
    area = _uniform(batch, *CROP_AREA)
    aspect = _uniform(batch, math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1])).exp()
    wide, high = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0] = wide * torch.where(torch.rand(batch) < 0.5, -1.0, 1.0)
    theta[:, 1, 1] = high
    theta[:, 0, 2] = (1 - wide) * _uniform(batch, -1, 1)
    theta[:, 1, 2] = (1 - high) * _uniform(batch, -1, 1)
    grid = F.affine_grid(theta, list(image_BCHW.shape), align_corners=False).to(device)
    return F.grid_sample(image_BCHW, grid, padding_mode="border", align_corners=False)


def _jitter(image_BCHW: Tensor) -> Tensor:
    batch, device = len(image_BCHW), image_BCHW.device

    def per_image(low: float, high: float) -> Tensor:
        return _uniform(batch, low, high).to(device)[:, None, None, None]

    luma = torch.from_numpy(LUMA).to(device)[:, None, None]
    view = image_BCHW * per_image(1 - JITTER, 1 + JITTER)
    mean = (view * luma).sum(dim=1, keepdim=True).mean(dim=(2, 3), keepdim=True)
    view = mean + (view - mean) * per_image(1 - JITTER, 1 + JITTER)
    gray = (view * luma).sum(dim=1, keepdim=True)
    view = gray + (view - gray) * per_image(1 - JITTER, 1 + JITTER)
    view = torch.einsum("bij,bjhw->bihw", _hue_turns(batch).to(device), view)
    view = torch.where(per_image(0, 1) < JITTER_SHARE, view, image_BCHW)
    gray = (view * luma).sum(dim=1, keepdim=True)
    return torch.where(per_image(0, 1) < GRAY_SHARE, gray, view)


def _hue_turns(batch: int) -> Tensor:
    """Colour matrices (B, 3, 3) that turn the hue by up to a tenth of the circle."""
    angle = 2 * math.pi * _uniform(batch, -HUE, HUE)
    turn = torch.zeros(batch, 3, 3)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = angle.cos()
    turn[:, 1, 2], turn[:, 2, 1] = -angle.sin(), angle.sin()
    matrices: Tensor = torch.linalg.inv(_YIQ) @ turn @ _YIQ
    return matrices


def _uniform(batch: int, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(batch)
