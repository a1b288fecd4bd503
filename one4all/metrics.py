"""Distances between a clean and a protected image, on what a reader decodes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from one4all.images import Pixels, colour
from one4all.perturbation import LUMA

IDENTICAL_PSNR_DB = 99.0


def max_difference(first: Pixels, second: Pixels) -> int:
    """Largest absolute difference of two (H, W, C) uint8 images, in levels; alpha included."""
    # uint8 arithmetic wraps, so: larger minus smaller.
    return int((np.maximum(first, second) - np.minimum(first, second)).max())


def psnr_db(first: Pixels, second: Pixels) -> float:
    """Peak signal-to-noise ratio of the colour channels in dB; ``IDENTICAL_PSNR_DB`` at most."""
    difference = colour(first).astype(np.int16) - colour(second)
    mse = float(np.square(difference, dtype=np.float32).mean(dtype=np.float64))
    return min(IDENTICAL_PSNR_DB, 10 * math.log10(255**2 / mse)) if mse else IDENTICAL_PSNR_DB


def ssim(first: Pixels, second: Pixels) -> float:
    """Structural similarity of the luminance; 1 for identical images.

    Gaussian window 11x11, sigma 1.5, K1 = 0.01, K2 = 0.03, population statistics, valid region
    only. Smaller images use the largest odd window that fits.

    Source: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment", 2004.
    """
    x, y = luminance(first), luminance(second)
    side = min(11, *x.shape)
    offsets = np.arange(side - 1 + side % 2) - (side - 1 + side % 2) // 2
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = (window / window.sum()).astype(np.float32)
    mean_x, mean_y = _blur(x, window), _blur(y, window)
    var_x, var_y = _blur(x * x, window) - mean_x**2, _blur(y * y, window) - mean_y**2
    covariance = _blur(x * y, window) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return float(similarity.mean(dtype=np.float64))


def luminance(pixels: Pixels) -> npt.NDArray[np.float32]:
    """ITU-R BT.601 luma of an image, (H, W) float32 in 0..255; alpha is ignored."""
    channels = colour(pixels).astype(np.float32)
    return channels[:, :, 0] if channels.shape[2] == 1 else channels @ LUMA


def _blur(image: npt.NDArray[np.float32], window: npt.NDArray[np.float32]) -> Any:
    """Separable filter, valid region. Sums of shifted views: ten times a one-channel conv2d."""
    height, width = image.shape[0] - len(window) + 1, image.shape[1] - len(window) + 1
    rows = sum(weight * image[i : i + height] for i, weight in enumerate(window))
    return sum(weight * rows[:, i : i + width] for i, weight in enumerate(window))
