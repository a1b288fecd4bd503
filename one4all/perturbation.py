"""The integer budget rule: how a perturbation reaches the pixels of an image.

Every method (ours, a baseline, a control) adds its perturbation here and nowhere else, so that

    max |protected - clean| <= epsilon_levels      for every image, in uint8 levels

holds by construction and not by trust in a network. Levels are steps of an 8-bit channel: the
paper's budget of 8/255 is 8 levels.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from one4all.errors import PerturbationError
from one4all.images import Pixels

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_EPSILON_LEVELS = 8

Levels: TypeAlias = npt.NDArray[np.float32]

_BAND_PIXELS = 1 << 15  # what is computed of them stays in a core's cache
_LONGEST = 4  # middle squares
_MANY_ROWS = 16  # of an image for each of its perturbation


def apply_perturbation(clean: Pixels, delta_hwC: Levels, *, epsilon_levels: int) -> Pixels:
    """Add a perturbation to one image, at the image's own size, within the budget.

    The perturbation is resized, never the image. A gray image gets the green channel of the
    perturbation and stays gray: its luma would be a fraction of the budget. Alpha is copied. Large
    images are processed in bands of rows, so that the memory beside ``clean`` and the result does
    not grow with the image's height.

    Args:
        clean: (H, W, C) uint8, C in 1..4.
        delta_hwC: (h, w, 3) float32, in levels, any range and any size.
        epsilon_levels: Budget, 0..255.

    Returns:
        (H, W, C) uint8: ``clip(round(clean + delta), clean -+ epsilon)``, within 0..255.

    Raises:
        PerturbationError: A value is infinite or not a number; cast to integers it would be 0, and
            the image would leave clean.

    Source: paper section 3.2, budget 8/255; docs/method.md decisions 14 and 20.
    """
    if not np.isfinite(delta_hwC).all():
        raise PerturbationError("the perturbation holds values that are not numbers")
    height, width, channels = clean.shape
    num_colours = 1 if channels < 3 else 3
    if num_colours == 1:
        delta_hwC = delta_hwC[:, :, 1:2]
    protected = np.empty_like(clean)
    protected[:, :, num_colours:] = clean[:, :, num_colours:]
    resized = _BandResizer(delta_hwC, height, width)
    over = resized.largest > epsilon_levels
    for top in range(0, height, resized.band):
        bottom = min(top + resized.band, height)
        delta = resized.rows(top, bottom)
        np.rint(delta, out=delta)
        if over:
            np.clip(delta, -epsilon_levels, epsilon_levels, out=delta)
        band = clean[top:bottom, :, :num_colours].astype(np.int16)
        band += delta.astype(np.int16)
        protected[top:bottom, :, :num_colours] = np.clip(band, 0, 255, out=band)
    return protected


def around_middle(delta_hwC: Levels, height: int, width: int) -> Levels:
    """Widen a perturbation of the middle square of an image to one of the image.

    Who trains on photos takes their middle squares, or squashes the whole. So the pattern lies on
    the middle square, and its edges reach to the edges of the image.

    Args:
        delta_hwC: (h, w, C) float32.
        height, width: Of the image. In one of more than 4:1, the pattern is stretched to a quarter
            of the longer side.

    Returns:
        (h', w', C) float32, with h' : h = height : width of the middle, to the nearest value.
    """
    side = min(height, width)
    beyond = [
        round(size * (min(total / side, _LONGEST) - 1) / 2)
        for size, total in zip(delta_hwC.shape, (height, width), strict=False)
    ]
    return np.pad(delta_hwC, [(beyond[0],) * 2, (beyond[1],) * 2, (0, 0)], mode="edge")


def resize_perturbation(delta_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize perturbations bilinearly, antialiased when shrinking; used while training.

    Args:
        delta_BCHW: (B, C, h, w) float.
        size: (height, width) in pixels.

    Returns:
        (B, C, height, width) float. Interpolation is a weighted mean, so a bound is kept.
    """
    from torch.nn.functional import interpolate  # takes seconds; a card's budget needs it not

    if tuple(delta_BCHW.shape[-2:]) == tuple(size):
        return delta_BCHW
    return interpolate(delta_BCHW, size=size, mode="bilinear", antialias=True, align_corners=False)


class _BandResizer:
    """Rows of a resized perturbation, on demand; equal to `resize_perturbation` row for row.

    Attributes:
        band: Rows that may be asked for at once.
    """

    def __init__(self, delta_hwC: Levels, height: int, width: int) -> None:
        import torch

        delta = torch.from_numpy(np.ascontiguousarray(delta_hwC)).permute(2, 0, 1)[None].float()
        source_rows = min(delta.shape[2], height)
        # Width, and height where it shrinks, at once: that is small. Rows are added band by band.
        wide = resize_perturbation(delta, (source_rows, width))
        self._wide: Levels = np.ascontiguousarray(wide[0].permute(1, 2, 0).numpy())
        self._to_next = np.zeros_like(self._wide)
        np.subtract(self._wide[1:], self._wide[:-1], out=self._to_next[:-1])
        centre = (np.arange(height, dtype=np.float64) + 0.5) * source_rows / height - 0.5
        centre = centre.clip(0, source_rows - 1)
        self._above = np.floor(centre).astype(np.intp)
        self._weight = (centre - self._above).astype(np.float32)[:, None, None]
        # Rows below each source row, if they are many: then they are computed together.
        many = height >= _MANY_ROWS * source_rows
        starts = np.searchsorted(self._above, range(source_rows + 1)) if many else ()
        self._runs = list(pairwise(int(start) for start in starts))
        self.band = min(height, max(1, _BAND_PIXELS // width))
        self._rows, self._more = np.empty((2, self.band, *self._wide.shape[1:]), np.float32)

    @property
    def largest(self) -> float:
        """Bound of the absolute values of all rows: a weighted mean is not beyond its values."""
        return float(max(self._wide.max(), -self._wide.min()))

    def rows(self, top: int, bottom: int) -> Levels:
        """Rows ``top`` to ``bottom``, (bottom - top, W, C) float32.

        They stand until the next ones are asked for, and may be overwritten.
        """
        above = self._above[top:bottom]
        rows: Levels = self._rows[: bottom - top]
        if self._runs:
            for index in range(above[0], above[-1] + 1):
                start, end = self._runs[index]
                start, end = max(start, top), min(end, bottom)
                part = rows[start - top : end - top]
                np.multiply(self._to_next[index], self._weight[start:end], out=part)
                part += self._wide[index]
            return rows
        more = self._more[: bottom - top]
        # No index is out of range; told so, NumPy writes without a detour.
        np.take(self._to_next, above, axis=0, out=rows, mode="clip")
        rows *= self._weight[top:bottom]
        rows += np.take(self._wide, above, axis=0, out=more, mode="clip")
        return rows
