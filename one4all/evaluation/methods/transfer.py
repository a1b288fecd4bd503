"""Perturbations made for one corpus, used on another (docs/evaluation.md, "Scenarios").

No published method but the generators says how its perturbations reach a second corpus, so the
bench fixes one rule for all that need labels, and reports it:

* Space: bilinear resize to the image's size and clamping to the budget, both in
  `apply_perturbation`. The perturbation is not scaled up again afterwards.
* Classes: class j of the target uses class j mod M of the source. Where the target has more than M
  classes, each further block of M goes through its own fixed permutation of tiles, colour channels
  and mirror image, so that classes stay distinct.
* Samples: a target image draws a perturbation from the assigned source class, without replacement;
  when the class is used up, all over again.

Shape suffixes: N images, M source classes, C colour channels, h w perturbation grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Self

import numpy as np
import numpy.typing as npt

from one4all.errors import UsageError
from one4all.evaluation.labelled import LabelledImages, Labels
from one4all.evaluation.methods.base import Arrays, FittedCard, SavablePerturbations
from one4all.perturbation import Levels

_TILES = 4  # a side; fewer where the side of the perturbation is not a multiple
_BLOCK_SEED = 2_404  # fixed: the rule is part of the bench, not of a trial


class ClassWise(SavablePerturbations):
    """One perturbation per class.

    Args:
        card: Description.
        patterns_MhwC: (M, h, w, 3) float32, in levels.
    """

    def __init__(self, card: FittedCard, patterns_MhwC: Levels) -> None:
        super().__init__(card)
        self.patterns_MhwC = patterns_MhwC

    def perturb(self, images: LabelledImages, *, own: bool, seed: int) -> Iterator[Levels]:
        """See the base class; nothing is drawn, so ``seed`` does not matter."""
        if own:
            self.check_own(images)
        return (self.pattern(int(label)) for label in images.labels_N)

    def pattern(self, label: int) -> Levels:
        """The perturbation of a class of any corpus, (h, w, 3)."""
        block, source = divmod(label, len(self.patterns_MhwC))
        return transform_block(self.patterns_MhwC[source], block)

    def arrays(self) -> Arrays:
        return {"patterns": self.patterns_MhwC}

    @classmethod
    def from_arrays(cls, card: FittedCard, arrays: Arrays) -> Self:
        return cls(card, arrays["patterns"])


class SampleWise(SavablePerturbations):
    """One perturbation per image of the source, used by *index* on the source itself.

    Args:
        card: Description.
        deltas_NhwC: (N, h, w, 3) int8, in levels. Whole levels lose nothing: `apply_perturbation`
            rounds to them anyway. A quarter of the memory of float32.
        labels_N: Labels of the source, which choose the pool that a transferred one is drawn from.
    """

    def __init__(
        self, card: FittedCard, deltas_NhwC: npt.NDArray[np.int8], labels_N: Labels
    ) -> None:
        super().__init__(card)
        self.deltas_NhwC = deltas_NhwC
        self.labels_N = labels_N

    def perturb(self, images: LabelledImages, *, own: bool, seed: int) -> Iterator[Levels]:
        """See the base class.

        Raises:
            UsageError: ``own`` with another number, size or labelling of images: perturbations
                would reach the wrong ones.
        """
        if own:
            self.check_own(images)
            if not np.array_equal(images.labels_N, self.labels_N):
                raise UsageError(
                    f"{self.card.method} was fitted on these images in another order, or with "
                    "other labels; its perturbations belong to images by index. Say own=False to "
                    "transfer them"
                )
            return (delta.astype(np.float32) for delta in self.deltas_NhwC)
        return self._transfer(images, np.random.default_rng([seed, 1]))

    def _transfer(self, images: LabelledImages, random: np.random.Generator) -> Iterator[Levels]:
        present = np.unique(self.labels_N)
        pools: dict[int, list[int]] = {}
        for label in map(int, images.labels_N):
            block, source = divmod(label, len(present))
            if not pools.get(label):
                members = np.flatnonzero(self.labels_N == present[source])
                pools[label] = random.permutation(members).tolist()
            delta = self.deltas_NhwC[pools[label].pop()].astype(np.float32)
            yield transform_block(delta, block)

    def arrays(self) -> Arrays:
        return {"deltas": self.deltas_NhwC, "labels": self.labels_N}

    @classmethod
    def from_arrays(cls, card: FittedCard, arrays: Arrays) -> Self:
        return cls(card, arrays["deltas"], arrays["labels"])


def transform_block(delta_hwC: Levels, block: int) -> Levels:
    """Move a perturbation so that a further block of classes gets one of its own.

    Args:
        delta_hwC: (h, w, 3).
        block: ``label // M``; 0 leaves it alone. Each other block has one fixed permutation of 4x4
            tiles (fewer where the side is no multiple of 4) and of the channels, half of them with
            a mirror image. A mirror image alone would not do: adversaries mirror too.

    Returns:
        Same shape, values moved and not changed.
    """
    if block == 0:
        return delta_hwC
    random = np.random.default_rng([_BLOCK_SEED, block])
    height, width, channels = delta_hwC.shape
    tiles = math.gcd(height, width, _TILES)
    order = random.permutation(tiles * tiles)
    grid = delta_hwC.reshape(tiles, height // tiles, tiles, width // tiles, channels)
    grid = grid.swapaxes(1, 2).reshape(tiles * tiles, height // tiles, width // tiles, channels)
    grid = grid[order].reshape(tiles, tiles, height // tiles, width // tiles, channels)
    moved = grid.swapaxes(1, 2).reshape(height, width, channels)
    moved = moved[:, :, random.permutation(channels)]
    return moved[:, ::-1] if random.random() < 0.5 else moved


def to_stored(deltas_NChw: npt.NDArray[np.float32]) -> npt.NDArray[np.int8]:
    """Perturbations (N, C, h, w) in levels, as stored: (N, h, w, C) int8, rounded."""
    return np.rint(deltas_NChw).astype(np.int8).transpose(0, 2, 3, 1)
