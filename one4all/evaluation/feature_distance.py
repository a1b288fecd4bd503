"""Distance of two images as a network sees them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from one4all.encoders.embedded import load_efficientnet_lite
from one4all.images import Pixels

_FEATURE_STAGES = (0, 1, 2, 4)  # of EfficientNet-lite0; strides 2, 4, 8, 16


@torch.inference_mode()
def feature_distance(first: Pixels, second: Pixels) -> float:
    """Distance of two (H, W, 3) images as a network sees them; 0 for identical images.

    It resembles LPIPS and is *not* the published LPIPS: four stages of EfficientNet-lite0, at the
    image's own size, and no weights fitted to what people see. The channels of each position are
    scaled to length 1; squared differences are summed over channels and averaged over positions
    and stages. Compare it only with itself, at one image size.

    Source: Zhang et al. 2018, "The unreasonable effectiveness of deep features", Eq. 1 with w = 1.
    """
    pair = zip(_feature_maps(first), _feature_maps(second), strict=True)
    return float(np.mean([float((x - y).square().sum(dim=1).mean()) for x, y in pair]))


def _feature_maps(pixels: Pixels) -> Iterator[torch.Tensor]:
    tower = _feature_tower()
    image_BCHW = torch.tensor(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    hidden = tower.bn1(tower.conv_stem(image_BCHW))
    for stage in range(max(_FEATURE_STAGES) + 1):
        hidden = tower.blocks[stage](hidden)
        if stage in _FEATURE_STAGES:
            yield F.normalize(hidden, dim=1)


@lru_cache(maxsize=1)
def _feature_tower() -> Any:
    return load_efficientnet_lite()
