"""Distances between a clean and a protected image, on what a reader decodes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from one4all.images import LUMA, Pixels, colour

IDENTICAL_PSNR_DB = 99.0
_BAND_PIXELS = 1 << 20
_CACHED_PIXELS = 1 << 15  # what is computed of them stays in a core's cache

Plane: TypeAlias = npt.NDArray[np.float32]


def max_difference(first: Pixels, second: Pixels) -> int:
    """Largest absolute difference of two (H, W, C) uint8 images, in levels; alpha included."""
    return max(
        int(_difference(first[rows], second[rows]).max()) for rows in _bands(first, _CACHED_PIXELS)
    )


def psnr_db(first: Pixels, second: Pixels) -> float:
    """Peak signal-to-noise ratio of the colour channels in dB; ``IDENTICAL_PSNR_DB`` at most."""
    squares = 0
    for rows in _bands(first, _CACHED_PIXELS):
        squares += _sum_of_squares(_difference(colour(first[rows]), colour(second[rows])))
    mse = squares / colour(first).size
    return min(IDENTICAL_PSNR_DB, 10 * math.log10(255**2 / mse)) if mse else IDENTICAL_PSNR_DB


def ssim(first: Pixels, second: Pixels) -> float:
    """Structural similarity of the luminance; 1 for identical images.

    Gaussian window 11x11, sigma 1.5, K1 = 0.01, K2 = 0.03, population statistics, valid region
    only. Smaller images use the largest odd window that fits.

    Source: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment", 2004.
    """
    side = min(11, *first.shape[:2])
    side -= 1 - side % 2
    offsets = np.arange(side) - side // 2
    weights = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = (weights / weights.sum()).astype(np.float32)
    total, count = 0.0, 0
    for rows in _bands(first, _BAND_PIXELS, overlap=side - 1):
        similarity = _similarity(luminance(first[rows]), luminance(second[rows]), window)
        total += float(similarity.sum(dtype=np.float64))
        count += similarity.size
    return total / count


def _difference(first: Pixels, second: Pixels) -> Pixels:
    """Absolute difference: uint8 arithmetic wraps, so larger minus smaller."""
    difference = np.maximum(first, second)
    difference -= np.minimum(first, second)
    return difference


def _sum_of_squares(difference: Pixels) -> int:
    """Exact: every sum on the way is a whole number that the type of float holds."""
    largest = int(difference.max())
    small = largest**2 * difference.size < 1 << 24
    values: npt.NDArray[Any] = difference.ravel().astype(np.float32 if small else np.float64)
    # Not `np.dot`: that of float64 wakes a thread of OpenBLAS for each core, which then spins.
    return int(np.einsum("i,i->", values, values))


def _bands(image: Pixels, num_pixels: int, *, overlap: int = 0) -> Iterator[slice]:
    """Rows in bands of about so many pixels, so that memory does not grow with the image."""
    height, width = image.shape[:2]
    rows = max(1, num_pixels // width)
    for top in range(0, height - overlap, rows):
        yield slice(top, min(height, top + rows + overlap))


def _similarity(x: Plane, y: Plane, window: Plane) -> Plane:
    """SSIM at every position where the window fits."""
    mean_x, mean_y = _blur(x, window), _blur(y, window)
    var_x, var_y = _blur(x * x, window) - mean_x**2, _blur(y * y, window) - mean_y**2
    covariance = _blur(x * y, window) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    result: Plane = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return result


def luminance(pixels: Pixels) -> Plane:
    """ITU-R BT.601 luma of an image, (H, W) float32 in 0..255; alpha is ignored."""
    channels = colour(pixels).astype(np.float32)
    return channels[:, :, 0] if channels.shape[2] == 1 else channels @ LUMA


def _blur(image: Plane, window: Plane) -> Any:
    """Separable filter, valid region. Sums of shifted views: ten times a one-channel conv2d."""
    height, width = image.shape[0] - len(window) + 1, image.shape[1] - len(window) + 1
    rows = sum(weight * image[i : i + height] for i, weight in enumerate(window))
    return sum(weight * rows[:, i : i + width] for i, weight in enumerate(window))
