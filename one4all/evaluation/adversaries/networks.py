"""The networks an adversary trains from scratch: one door, six of the field's usual ones.

``width`` is one knob for all: 64 is the network as published, 16 has a quarter of its channels in
every layer. Images below 128 pixels get a gentler stem than ImageNet's, see `build_network`.

Shape suffixes: B batch, C channels, H W image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.shufflenetv2 import ShuffleNetV2
from torchvision.models.vision_transformer import VisionTransformer

from one4all.errors import ConfigError

FULL_WIDTH = 64
MIN_IMAGE_SIZE = 16
IMAGENET_STEM_FROM = 128  # pixels

_VGG16_BLOCKS = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))  # (multiple of width, convolutions)
_SHUFFLENET_CHANNELS = (24, 116, 232, 464, 1024)  # x1.0
_VIT_HEADS = 8
_VIT_MOST_PATCHES = 28  # a side; attention costs the fourth power of it


def build_network(
    name: str, num_classes: int, *, image_size: int, width: int = FULL_WIDTH, stem_stride: int = 2
) -> nn.Module:
    """Build a network with random weights, drawn from torch's global generator.

    ====================  =========================================================  ===========
    name                  what ``width`` is                                          full, 224 px
    ====================  =========================================================  ===========
    resnet18, resnet50    channels of the first stage (He et al. 2016)               11.7 M, 25.6 M
    mobilenet_v2          torchvision's multiplier times 64 (Sandler et al. 2018)    3.5 M
    shufflenet_v2         channels of every layer, times 64/1 (Ma et al. 2018)       2.3 M
    vgg16                 channels of the first block, with batch norm (Simonyan     138.4 M
                          and Zisserman 2015); 64 times it in the hidden layers
    vit                   a quarter of the hidden width: 64 is the 14A paper's, 4    2.0 M
                          layers, 8 heads, hidden and MLP 256, dropout 0.1
    ====================  =========================================================  ===========

    The stem. From 128 pixels it is ImageNet's, and ``stem_stride`` is not used. Below, the first
    convolution is 3x3 with stride ``stem_stride``, and convolutional networks reduce the image
    ``16 * stem_stride`` times in all: VGG16 goes without its fifth pooling and has one linear
    layer, as is usual for CIFAR. An ImageNet stem on 32 pixels gives other accuracies altogether
    (HanxunH/Unlearnable-Examples#1). resnet18 is then `NarrowResNet18`.

    Patches of the transformer. 16 pixels at 224, otherwise the divisor of ``image_size`` that is
    nearest to a fourteenth of it, below 128 pixels times ``stem_stride``: 2 or 4 at 32 pixels, 4
    or 8 at 64, 8 at 128.

    VGG16 has batch norm because without it SGD at the learning rate of the others does not start.

    Args:
        name: One of `NETWORKS`.
        num_classes: Width of the output.
        image_size: Side of the images in pixels, 16 or more.
        width: 8 to 128; layers are rounded to what their blocks need. Below 8, gradients of the
            convolutions corrupt the heap on CPUs without AVX-512 (oneDNN 3.12, torch 2.14.1).
        stem_stride: 1 or 2; below 128 pixels only.

    Returns:
        Module from normalised images, float32 (B, 3, image_size, image_size), to logits,
        (B, num_classes).

    Raises:
        ConfigError: No such network, or images that it cannot take.
    """
    if name not in NETWORKS:
        raise ConfigError(f"no network {name!r}; there are {', '.join(NETWORKS)}")
    if image_size < MIN_IMAGE_SIZE:
        raise ConfigError(
            f"images of {image_size} pixels are too small for {name}; it needs {MIN_IMAGE_SIZE}"
        )
    return NETWORKS[name](num_classes, image_size, width, stem_stride)


# --- residual networks -----------------------------------------------------------------------


class NarrowResNet18(nn.Module):
    """ResNet18 with a 3x3 stem, 2x2 max-pooling after it, and ``width`` instead of 64 channels.

    Source: He et al. 2016; the stem suits images of 32 to 96 pixels.
    """

    def __init__(self, num_classes: int, *, width: int, stem_stride: int) -> None:
        super().__init__()
        self.stem = _small_stem(width, stem_stride)
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


def _resnet18(num_classes: int, image_size: int, width: int, stem_stride: int) -> nn.Module:
    if image_size < IMAGENET_STEM_FROM:
        return NarrowResNet18(num_classes, width=width, stem_stride=stem_stride)
    return _resnet(BasicBlock, (2, 2, 2, 2), num_classes, width, _imagenet_stem(width))


def _resnet50(num_classes: int, image_size: int, width: int, stem_stride: int) -> nn.Module:
    small = image_size < IMAGENET_STEM_FROM
    stem = _small_stem(width, stem_stride) if small else _imagenet_stem(width)
    return _resnet(Bottleneck, (3, 4, 6, 3), num_classes, width, stem)


def _resnet(
    block: Any, repeats: Sequence[int], num_classes: int, width: int, stem: nn.Module
) -> nn.Module:
    """torchvision's ResNet, whose 64 channels cannot be set, from its own blocks."""
    blocks: list[nn.Module] = []
    before = width
    for stage, count in enumerate(repeats):
        channels = width << stage
        after = channels * block.expansion
        for position in range(count):
            stride = 2 if stage > 0 and position == 0 else 1
            shortcut = None
            if position == 0 and (stride, before) != (1, after):
                shortcut = nn.Sequential(
                    nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
                )
            blocks.append(block(before, channels, stride, shortcut))
            before = after
    network = nn.Sequential(
        stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, num_classes)
    )
    _draw_convolutions(network)
    return network


def _small_stem(width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
    )


def _imagenet_stem(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 7, 2, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
    )


# --- the others ------------------------------------------------------------------------------


def _mobilenet_v2(num_classes: int, image_size: int, width: int, stem_stride: int) -> nn.Module:
    network: nn.Module = MobileNetV2(num_classes, width_mult=width / FULL_WIDTH)
    if image_size < IMAGENET_STEM_FROM:
        layers: Any = network.features
        layers[0][0].stride = (stem_stride, stem_stride)
    return network


def _shufflenet_v2(num_classes: int, image_size: int, width: int, stem_stride: int) -> nn.Module:
    # Half of a block's channels go through each branch, hence the multiple of 2.
    channels = [max(8, 2 * round(c * width / FULL_WIDTH / 2)) for c in _SHUFFLENET_CHANNELS]
    network: nn.Module = ShuffleNetV2([4, 8, 4], channels, num_classes)
    if image_size < IMAGENET_STEM_FROM:
        stem: Any = network.conv1
        stem[0].stride = (stem_stride, stem_stride)
    return network


def _vgg16(num_classes: int, image_size: int, width: int, stem_stride: int) -> nn.Module:
    small = image_size < IMAGENET_STEM_FROM
    layers: list[nn.Module] = []
    before = 3
    for block, (multiple, count) in enumerate(_VGG16_BLOCKS):
        after = multiple * width
        for _ in range(count):
            stride = stem_stride if small and not layers else 1
            layers += [
                nn.Conv2d(before, after, 3, stride, 1),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
            ]
            before = after
        if not small or block < len(_VGG16_BLOCKS) - 1:
            layers.append(nn.MaxPool2d(2, ceil_mode=small))
    if small:
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, num_classes)]
    else:
        hidden = 64 * width
        head = [
            nn.AdaptiveAvgPool2d(7),
            nn.Flatten(),
            nn.Linear(49 * before, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(hidden, num_classes),
        ]
    network = nn.Sequential(*layers, *head)
    _draw_convolutions(network)
    return network


def _vit(num_classes: int, image_size: int, width: int, stem_stride: int) -> nn.Module:
    divisors = [d for d in range(1, image_size + 1) if image_size % d == 0]
    wanted = image_size / 14 * (stem_stride if image_size < IMAGENET_STEM_FROM else 1)
    patch = min(divisors, key=lambda d: abs(d - wanted))
    if image_size // patch > _VIT_MOST_PATCHES:
        raise ConfigError(
            f"images of {image_size} pixels cannot be cut into patches for a vit; resize them to a "
            "multiple of 14 or 16"
        )
    hidden = _VIT_HEADS * max(1, round(4 * width / _VIT_HEADS))
    network: nn.Module = VisionTransformer(
        image_size=image_size,
        patch_size=patch,
        num_layers=4,
        num_heads=_VIT_HEADS,
        hidden_dim=hidden,
        mlp_dim=hidden,
        dropout=0.1,
        num_classes=num_classes,
    )
    return network


def _draw_convolutions(network: nn.Module) -> None:
    """He initialisation by fan-out, as torchvision's networks have it."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


NETWORKS: dict[str, Callable[[int, int, int, int], nn.Module]] = {
    "resnet18": _resnet18,
    "resnet50": _resnet50,
    "mobilenet_v2": _mobilenet_v2,
    "shufflenet_v2": _shufflenet_v2,
    "vgg16": _vgg16,
    "vit": _vit,
}
