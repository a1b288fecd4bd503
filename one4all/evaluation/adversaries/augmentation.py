"""Batch augmentation. All draws come from one NumPy generator, so they do not depend on the pixels
or the device: each copy of a corpus is augmented alike.

Shape suffixes: B batch, C channels, H W image.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from one4all.images import LUMA, Pixels

Augmentation = Literal["none", "flip_crop", "strong"]

_MAX_ANGLE = 10.0  # degrees, of rotation and of shear
_SCALES = (0.8, 1.2)
_JITTER = 0.2


def augment(
    images_BHWC: Pixels, kind: Augmentation, random: np.random.Generator, device: torch.device
) -> Tensor:
    """Augment one batch and move it to the device.

    Args:
        images_BHWC: (B, H, W, 3) uint8.
        kind: "none"; "flip_crop": mirror half of the images, and shift each by up to an eighth of
            its side, edges reflected; "strong": that, then rotation and shear of up to 10 degrees,
            scale 0.8 to 1.2, and brightness, contrast and saturation times 0.8 to 1.2.
        random: Advanced by as many draws as the batch needs.
        device: PyTorch device of the result.

    Returns:
        (B, 3, H, W) float32 levels, 0..255, channels last in memory.

    Source of "strong": Sandoval-Segura et al. 2023 (orthogonal projection attack). There, rotation
    and shear resample one after the other, and what comes in at the edges is black.
    """
    if kind == "none":
        return to_levels(images_BHWC, device)
    image = to_levels(_flip_and_shift(images_BHWC, random), device)
    if kind == "strong":
        image = _jitter(_warp(image, random), random)
    return image


def to_levels(images_BHWC: Pixels, device: torch.device) -> Tensor:
    """(B, 3, H, W) float32 levels, channels last in memory, on the device."""
    writable = np.require(images_BHWC, requirements=["C", "W", "E"])
    return torch.from_numpy(writable).to(device).permute(0, 3, 1, 2).float()


def _flip_and_shift(images_BHWC: Pixels, random: np.random.Generator) -> Pixels:
    size = images_BHWC.shape[1]
    reach = size // 8
    padded = np.pad(images_BHWC, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="reflect")
    result = np.empty_like(images_BHWC)
    for index, (top, left) in enumerate(random.integers(2 * reach + 1, size=(len(result), 2))):
        crop = padded[index, top : top + size, left : left + images_BHWC.shape[2]]
        result[index] = crop[:, ::-1] if random.random() < 0.5 else crop
    return result


def _warp(image_BCHW: Tensor, random: np.random.Generator) -> Tensor:
    """Rotate, shear and scale about the centre; bilinear, edges reflected."""
    turn, shear = np.deg2rad(random.uniform(-_MAX_ANGLE, _MAX_ANGLE, (2, len(image_BCHW))))
    scale = random.uniform(*_SCALES, len(image_BCHW))
    cos, sin, slope = np.cos(turn), np.sin(turn), np.tan(shear)
    zero = np.zeros_like(turn)
    # From output to input coordinates, hence the division by the scale.
    matrix = np.stack([cos, cos * slope - sin, zero, sin, sin * slope + cos, zero], axis=1)
    matrix[:, [0, 1, 3, 4]] /= scale[:, None]
    theta = torch.from_numpy(matrix.reshape(-1, 2, 3)).to(image_BCHW)
    grid = F.affine_grid(theta, list(image_BCHW.shape), align_corners=False)
    warped = F.grid_sample(image_BCHW, grid, padding_mode="reflection", align_corners=False)
    return warped.contiguous(memory_format=torch.channels_last)


def _jitter(image_BCHW: Tensor, random: np.random.Generator) -> Tensor:
    """Brightness, contrast and saturation, in this order, clamped after each."""
    draws = random.uniform(1 - _JITTER, 1 + _JITTER, (3, len(image_BCHW), 1, 1, 1))
    brightness, contrast, saturation = torch.from_numpy(draws).to(image_BCHW).unbind()
    luma = torch.from_numpy(LUMA).to(image_BCHW).view(1, 3, 1, 1)
    image = (image_BCHW * brightness).clamp(0, 255)
    mean = (image * luma).sum(dim=1, keepdim=True).mean(dim=(2, 3), keepdim=True)
    image = (mean + (image - mean) * contrast).clamp(0, 255)
    gray = (image * luma).sum(dim=1, keepdim=True)
    return (gray + (image - gray) * saturation).clamp(0, 255)
