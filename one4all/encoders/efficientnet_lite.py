"""EfficientNet-lite, as far as inference and fine-tuning need it.

The same network as timm's ``tf_efficientnet_lite*``: tensors and kinds of modules have timm's
names, which content hashes are made of. To import timm takes seconds, and torchvision.

Source: Tan and Le, EfficientNet, ICML 2019, without squeeze-and-excitation and with ReLU6;
TensorFlow's padding and epsilon of batch norms.

Shape suffixes: B batch, C channels, H W image, D width of the embedding.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

# Of each stage: blocks, kernel size, stride, expansion, channels; before scaling.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_SCALES = {"lite0": (1.0, 1.0), "lite2": (1.1, 1.2)}  # of channels, of blocks
_STEM, _WIDTH, _NUM_CLASSES = 32, 1280, 1000


class EfficientNet(nn.Module):
    """Images to logits; or to embeddings, without the classifier.

    Args:
        name: "lite0" or "lite2".
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        wider, deeper = _SCALES[name]
        self.conv_stem = _convolution(3, _STEM, 3, stride=2)
        self.bn1 = BatchNormAct2d(_STEM)
        stages, channels = [], _STEM
        for number, (repeats, kernel, stride, expansion, width) in enumerate(_STAGES):
            # The first and the last stage have as many blocks in all sizes.
            if 0 < number < len(_STAGES) - 1:
                repeats = math.ceil(repeats * deeper)
            blocks: list[nn.Module] = []
            for index in range(repeats):
                out = _scaled(width, wider)
                step = stride if index == 0 else 1
                blocks.append(
                    DepthwiseSeparableConv(channels, out, kernel)
                    if expansion == 1
                    else InvertedResidual(channels, out, kernel, step, expansion)
                )
                channels = out
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.conv_head = _convolution(channels, _WIDTH, 1)
        self.bn2 = BatchNormAct2d(_WIDTH)
        self.global_pool = SelectAdaptivePool2d()
        self.classifier: nn.Module = nn.Linear(_WIDTH, _NUM_CLASSES)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits, (B, 1000); (B, D) with D = 1280 once the classifier is reset."""
        features = self.blocks(self.bn1(self.conv_stem(image_BCHW)))
        pooled = self.global_pool(self.bn2(self.conv_head(features)))
        result: Tensor = self.classifier(pooled)
        return result

    def weights_of_classes(self) -> Tensor:
        """The rows of the classifier, (1000, D)."""
        assert isinstance(self.classifier, nn.Linear)
        return self.classifier.weight.detach()

    def reset_classifier(self, num_classes: int) -> None:
        """Another classifier, untrained; 0 classes for none."""
        self.classifier = nn.Linear(_WIDTH, num_classes) if num_classes else nn.Identity()


class InvertedResidual(nn.Module):
    """Wider by a pointwise convolution, a depthwise one, and narrow again."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.conv_pw = _convolution(channels, wide, 1)
        self.bn1 = BatchNormAct2d(wide)
        self.conv_dw = _convolution(wide, wide, kernel, stride=stride, groups=wide)
        self.bn2 = BatchNormAct2d(wide)
        self.conv_pwl = _convolution(wide, out, 1)
        self.bn3 = BatchNormAct2d(out, activation=False)
        self._has_skip = stride == 1 and channels == out

    def forward(self, x_BCHW: Tensor) -> Tensor:
        wide = self.bn2(self.conv_dw(self.bn1(self.conv_pw(x_BCHW))))
        result: Tensor = self.bn3(self.conv_pwl(wide))
        return result + x_BCHW if self._has_skip else result


class DepthwiseSeparableConv(nn.Module):
    """A depthwise convolution and a pointwise one."""

    def __init__(self, channels: int, out: int, kernel: int) -> None:
        super().__init__()
        self.conv_dw = _convolution(channels, channels, kernel, groups=channels)
        self.bn1 = BatchNormAct2d(channels)
        self.conv_pw = _convolution(channels, out, 1)
        self.bn2 = BatchNormAct2d(out, activation=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        result: Tensor = self.bn2(self.conv_pw(self.bn1(self.conv_dw(x_BCHW))))
        return result


class BatchNormAct2d(nn.BatchNorm2d):
    """A batch norm and the activation that follows it."""

    def __init__(self, channels: int, *, activation: bool = True) -> None:
        super().__init__(channels, eps=1e-3)
        self.act = nn.ReLU6(inplace=True) if activation else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        result: Tensor = self.act(super().forward(x_BCHW))
        return result


class Conv2dSame(nn.Conv2d):
    """A convolution of stride above 1, padded as TensorFlow does: more at the end than before."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride in zip(
            x_BCHW.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True
        ):
            # Whole numbers also while traced: a fixed padding is one with its convolution.
            total = max((-(-int(size) // stride) - 1) * stride + kernel - int(size), 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x_BCHW, pads))


class SelectAdaptivePool2d(nn.Module):
    """The mean over the image."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        result: Tensor = self.flatten(self.pool(x_BCHW))
        return result


def _convolution(
    channels: int, out: int, kernel: int, *, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    if stride > 1:
        return Conv2dSame(channels, out, kernel, stride, groups=groups, bias=False)
    return nn.Conv2d(channels, out, kernel, padding=kernel // 2, groups=groups, bias=False)


def _scaled(channels: int, factor: float) -> int:
    """A multiple of 8 near the product, and no more than a tenth below it."""
    wanted = channels * factor
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded
