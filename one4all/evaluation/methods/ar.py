"""AR: autoregressive perturbations (Sandoval-Segura et al., NeurIPS 2022).

No model: each class has one 3x3 filter per channel. A perturbation starts as Gaussian noise at its
top and left edge; every further value is the filter's weighted sum of the eight neighbours above
and to the left in its 3x3 window. A single convolution can tell the classes apart, although a
linear classifier of pixels cannot: every image has its own start.

Departures: the published norm, L2 = 1 at 32 pixels, has no cap; here its root mean square of 4.6
levels is scaled with the budget and capped by the integer rule ("l2"), or the largest value is set
to the budget, which leaves the recursion exact up to rounding ("peak"). Filters are drawn until one
neither dies out nor grows; the published search also asks that they differ much.

Shape suffixes: N images, M classes, C colour channels, K coefficients, S side.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from one4all.evaluation.labelled import LabelledImages
from one4all.evaluation.methods.base import (
    Arrays,
    FittedCard,
    OnFitProgress,
    SavablePerturbations,
    check_epsilon,
    make_card,
    silent,
)
from one4all.evaluation.methods.surrogate import chunks
from one4all.evaluation.methods.transfer import transform_block
from one4all.perturbation import DEFAULT_EPSILON_LEVELS, Levels

NUM_COEFFICIENTS = 8
_CROP = 4  # pixels dropped at the top and left edge, where the start shows
_RMS_SHARE = (255 / (3 * 32 * 32) ** 0.5) / 8  # L2 = 1 at 32 pixels, of a budget of 8 levels
_MAX_GROWTH, _LEAST_SPREAD = 5.0, 0.3
_CANDIDATES, _MAX_DRAWS = 64, 200

Coefficients = npt.NDArray[np.float64]


class ArConfig(BaseModel):
    """How the process is scaled.

    Attributes:
        scaling: "l2": root mean square 4.6 levels for a budget of 8, then capped. "peak": largest
            value equal to the budget.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scaling: Literal["l2", "peak"] = "l2"


PRESETS: dict[str, ArConfig] = {"default": ArConfig(), "published": ArConfig()}


class Autoregressive(SavablePerturbations):
    """Filters of the classes; a perturbation is generated for each image.

    Args:
        card: Description.
        filters_MCK: float64 (M, 3, 8), the window row by row without its last place; the sum of the
            eight is 1.
    """

    def __init__(self, card: FittedCard, filters_MCK: Coefficients) -> None:
        super().__init__(card)
        self.filters_MCK = filters_MCK

    def perturb(self, images: LabelledImages, *, own: bool, seed: int) -> Iterator[Levels]:
        """See the base class; at the size of the fit, because filters may grow beyond it."""
        if own:
            self.check_own(images)
        return self._generate(images, np.random.default_rng([self.card.seed, seed]))

    def _generate(self, images: LabelledImages, random: np.random.Generator) -> Iterator[Levels]:
        epsilon, size = self.card.epsilon_levels, self.card.size
        for part in chunks(len(images), 256):
            blocks, sources = np.divmod(images.labels_N[part], len(self.filters_MCK))
            noise_NCSS = _run(self.filters_MCK[sources], size + _CROP, random)[..., _CROP:, _CROP:]
            if self.card.config["scaling"] == "peak":
                scale = epsilon / np.abs(noise_NCSS).max(axis=(1, 2, 3))
            else:
                scale = epsilon * _RMS_SHARE / np.sqrt(np.square(noise_NCSS).mean(axis=(1, 2, 3)))
            scaled = (noise_NCSS * scale[:, None, None, None]).astype(np.float32)
            for block, delta in zip(blocks, scaled.transpose(0, 2, 3, 1), strict=True):
                yield transform_block(delta, int(block))

    def arrays(self) -> Arrays:
        return {"filters": self.filters_MCK}

    @classmethod
    def from_arrays(cls, card: FittedCard, arrays: Arrays) -> Self:
        return cls(card, arrays["filters"])


def fit(
    images: LabelledImages,
    config: ArConfig,
    *,
    epsilon_levels: int = DEFAULT_EPSILON_LEVELS,
    seed: int,
    on_progress: OnFitProgress = silent,
    device: str = "cpu",
) -> Autoregressive:
    """Draw the classes' filters; of ``images`` only size and number of classes matter.

    Args:
        images: Corpus.
        config: Scaling.
        epsilon_levels: Budget.
        seed: Seed of filters and, later, starts.
        on_progress: See `OnFitProgress`.
        device: Not used.

    Raises:
        RuntimeError: No usable filters after many draws; cannot happen below some thousand pixels.
    """
    check_epsilon(epsilon_levels)
    filters = _draw_filters(3 * images.num_classes, images.size, np.random.default_rng(seed))
    card = make_card(Autoregressive, "ar", images, config, epsilon_levels=epsilon_levels, seed=seed)
    on_progress(1.0, f"{images.num_classes} classes")
    return Autoregressive(card, filters.reshape(images.num_classes, 3, NUM_COEFFICIENTS))


def _draw_filters(num: int, size: int, random: np.random.Generator) -> Coefficients:
    """Filters (num, 8) whose process keeps its size and does not become flat."""
    found: list[Coefficients] = []
    for _ in range(_MAX_DRAWS):
        drawn = random.standard_normal((_CANDIDATES, 1, NUM_COEFFICIENTS))
        drawn /= drawn.sum(axis=2, keepdims=True)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            noise = _run(drawn, size + _CROP, random)[:, 0, _CROP:, _CROP:]
            half = size // 2
            first = np.sqrt(np.square(noise[:, :half, :half]).mean(axis=(1, 2)))
            last = np.sqrt(np.square(noise[:, half:, half:]).mean(axis=(1, 2)))
            growth, spread = last / first, noise[:, half:, half:].std(axis=(1, 2)) / last
            usable = (growth < _MAX_GROWTH) & (growth > 1 / _MAX_GROWTH) & (spread > _LEAST_SPREAD)
        found.extend(drawn[usable, 0])
        if len(found) >= num:
            return np.stack(found[:num])
    raise RuntimeError(f"found {len(found)} of {num} stable autoregressive filters")


def _run(filters_NCK: Coefficients, size: int, random: np.random.Generator) -> Coefficients:
    """Processes (N, C, size, size), float64, from a Gaussian start."""
    num, channels = filters_NCK.shape[:2]
    noise = random.standard_normal((size, size, num, channels))
    weights = np.ascontiguousarray(filters_NCK.transpose(2, 0, 1))
    for row in range(2, size):
        # What the two rows above give is the same for the whole row; only the last two terms recur.
        above = sum(
            weights[3 * i + j] * noise[row - 2 + i, j : size - 2 + j]
            for i in range(2)
            for j in range(3)
        )
        for column in range(2, size):
            noise[row, column] = (
                above[column - 2]
                + weights[6] * noise[row, column - 2]
                + weights[7] * noise[row, column - 1]
            )
    return noise.transpose(2, 3, 0, 1)
