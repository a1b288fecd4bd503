"""The model an unauthorised trainer would fit: trained from scratch, tested on clean images.

One pipeline for every copy of a corpus, so that two accuracies differ by the copy and nothing
else: same architecture, schedule, augmentation, seeds and order of batches.

Shape suffixes: N images, B batch, C channels, H W image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from one4all.errors import UsageError
from one4all.images import Pixels


class AdversaryConfig(BaseModel):
    """How the adversary trains.

    Attributes:
        width: Channels of the first stage of the ResNet18; 64 is the full network.
        stem_stride: 1 for 32-pixel images, 2 halves the cost at 64 pixels and above.
        augmentation: "none", the paper's own protocol; "flip_crop": mirror, and shift by up to an
            eighth of the side.
        epochs, batch_size, learning_rate, weight_decay: SGD, momentum 0.9, cosine to 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: Annotated[int, Field(ge=4, le=128)] = 16
    stem_stride: Literal[1, 2] = 2
    augmentation: Literal["none", "flip_crop"] = "none"
    epochs: Annotated[int, Field(ge=1)] = 10
    batch_size: Annotated[int, Field(ge=2)] = 64
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4


@dataclass(frozen=True)
class AdversaryResult:
    """Test accuracy in 0..1: of the last epoch, of the best one, and of each."""

    last: float
    peak: float
    curve: tuple[float, ...]


def train_adversary(
    train_images_NHWC: Pixels,
    train_labels_N: npt.NDArray[np.int64],
    test_images_NHWC: Pixels,
    test_labels_N: npt.NDArray[np.int64],
    config: AdversaryConfig,
    *,
    seed: int,
    on_epoch: Callable[[int, float], None] = lambda epoch, accuracy: None,
) -> AdversaryResult:
    """Train from scratch on one copy of a corpus and test on clean images.

    Args:
        train_images_NHWC: (N, H, W, 3) uint8, clean or protected.
        train_labels_N: Class indices.
        test_images_NHWC, test_labels_N: Clean images and labels.
        config: Recipe.
        seed: Of initial weights, order and augmentation.
        on_epoch: Called with the epoch (from 1) and its test accuracy.

    Raises:
        UsageError: Numbers of images and labels differ, or there are none.
    """
    if not len(train_images_NHWC) == len(train_labels_N) > 0 or not len(test_images_NHWC):
        raise UsageError(
            f"{len(train_images_NHWC)} training images with {len(train_labels_N)} labels and "
            f"{len(test_images_NHWC)} test images"
        )
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    num_classes = int(max(train_labels_N.max(), test_labels_N.max())) + 1
    model = NarrowResNet18(num_classes, width=config.width, stem_stride=config.stem_stride)
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.learning_rate,
        momentum=0.9,
        weight_decay=config.weight_decay,
    )
    num_batches = max(1, len(train_images_NHWC) // config.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs * num_batches)
    curve = []
    for epoch in range(1, config.epochs + 1):
        model.train()
        order = random.permutation(len(train_images_NHWC))
        for batch in np.array_split(order[: num_batches * config.batch_size], num_batches):
            images = train_images_NHWC[batch]
            if config.augmentation == "flip_crop":
                images = _flip_and_shift(images, random)
            loss = F.cross_entropy(
                model(_to_input(images)), torch.from_numpy(train_labels_N[batch])
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        curve.append(_accuracy(model, test_images_NHWC, test_labels_N))
        on_epoch(epoch, curve[-1])
    return AdversaryResult(last=curve[-1], peak=max(curve), curve=tuple(curve))


class NarrowResNet18(nn.Module):
    """ResNet18 with a 3x3 stem, 2x2 max-pooling after it, and ``width`` instead of 64 channels.

    Source: He et al. 2016; the stem suits images of 32 to 96 pixels.
    """

    def __init__(self, num_classes: int, *, width: int, stem_stride: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, stem_stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )
        channels = [width, width, 2 * width, 4 * width, 8 * width]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    _BasicBlock(before, after, 1 if before == after else 2),
                    _BasicBlock(after, after, 1),
                )
                for before, after in pairwise(channels)
            )
        )
        self.classifier = nn.Linear(channels[-1], num_classes)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits, (B, num_classes), of normalised images."""
        features = self.stages(self.stem(image_BCHW)).mean(dim=(2, 3))
        logits: Tensor = self.classifier(features)
        return logits


class _BasicBlock(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.shortcut: nn.Module = nn.Identity()
        if before != after:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, hidden: Tensor) -> Tensor:
        return F.relu(self.layers(hidden) + self.shortcut(hidden))


def _to_input(images_BHWC: Pixels) -> Tensor:
    """Normalised (B, C, H, W) float32 with channels last in memory."""
    images = torch.from_numpy(np.ascontiguousarray(images_BHWC)).permute(0, 3, 1, 2)
    return images.float().div(127.5).sub(1)


def _flip_and_shift(images_BHWC: Pixels, random: np.random.Generator) -> Pixels:
    """Mirror half of the images; shift each by up to an eighth of its side, edges reflected."""
    size = images_BHWC.shape[1]
    reach = size // 8
    padded = np.pad(images_BHWC, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="reflect")
    result = np.empty_like(images_BHWC)
    for index, (top, left) in enumerate(random.integers(2 * reach + 1, size=(len(result), 2))):
        crop = padded[index, top : top + size, left : left + images_BHWC.shape[2]]
        result[index] = crop[:, ::-1] if random.random() < 0.5 else crop
    return result


@torch.inference_mode()
def _accuracy(model: nn.Module, images_NHWC: Pixels, labels_N: npt.NDArray[np.int64]) -> float:
    model.eval()
    right = 0
    for start in range(0, len(images_NHWC), 256):
        logits = model(_to_input(images_NHWC[start : start + 256]))
        right += int((logits.argmax(dim=1).numpy() == labels_N[start : start + 256]).sum())
    return right / len(images_NHWC)
