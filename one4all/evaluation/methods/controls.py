"""Controls: perturbations that tell what an accuracy gap is evidence of.

* ``clean``, ``constant`` (one perturbation for all images), ``uniform_noise``, ``sign_noise``: hold
  no information about a class. A method must beat them.
* ``class_oracle``: one fixed pattern per *true* class. It needs the labels, so it is no method; it
  shows that the bench can see protection at all (the positive control). ``concept_oracle``: the
  same with a chosen share of wrong patterns: what a label-free method could reach at that purity.

Two more kinds, the untrained generator and what the released code does, are in `released`.

Shape suffixes: M patterns, C colour channels, h w perturbation grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from one4all.evaluation.labelled import LabelledImages, Labels
from one4all.evaluation.methods.base import FittedCard, Perturbations, make_card
from one4all.evaluation.methods.surrogate import check_classes
from one4all.evaluation.methods.transfer import ClassWise
from one4all.perturbation import DEFAULT_EPSILON_LEVELS, Levels
from one4all.protectors.config import STRENGTHS
from one4all.protectors.pattern import draw_patterns

# --- patterns and noise ----------------------------------------------------------------------


def uniform_noise(size: int, *, epsilon_levels: int, seed: int) -> Levels:
    """Independent uniform noise, (size, size, 3) float32 within +-``epsilon_levels``."""
    return _uniform(size, epsilon_levels, np.random.default_rng(seed))


def _uniform(size: int, epsilon_levels: int, random: np.random.Generator) -> Levels:
    bound = epsilon_levels + 0.5  # so that rounding makes all levels equally likely
    return random.uniform(-bound, bound, (size, size, 3)).astype(np.float32)


def _signs(size: int, epsilon_levels: int, random: np.random.Generator) -> Levels:
    signs = random.choice((-1.0, 1.0), (size, size, 3))
    return (epsilon_levels * signs).astype(np.float32)


def class_patterns(
    num_classes: int, size: int, *, epsilon_levels: int, seed: int, block: int = 8
) -> Levels:
    """One random pattern of colour blocks per class, every value at the edge of the budget.

    Args:
        num_classes: Number of patterns.
        size: Side in pixels; a multiple of ``block``.
        epsilon_levels: Budget.
        seed: Seed of the patterns.
        block: Side of a block in pixels.

    Returns:
        (num_classes, size, size, 3) float32, each value +-``epsilon_levels``.
    """
    random = np.random.default_rng(seed)
    coarse = random.choice((-1.0, 1.0), (num_classes, size // block, size // block, 3))
    fine = coarse.repeat(block, axis=1).repeat(block, axis=2)
    return (epsilon_levels * fine).astype(np.float32)


# --- configurations --------------------------------------------------------------------------


class ControlConfig(BaseModel):
    """Nothing to choose."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PatternConfig(ControlConfig):
    """Which fixed patterns.

    Attributes:
        kind: "blocks": random colours, `class_patterns`. "codebook": those of our codebooks,
            `one4all.protectors.pattern.draw_patterns`, hard and strong, which are learnt sooner.
        block: Side of a block in pixels; "codebook" ignores it.
    """

    kind: Literal["blocks", "codebook"] = "blocks"
    block: Annotated[int, Field(ge=1)] = 8


class ConceptOracleConfig(PatternConfig):
    """Fixed patterns, some of them wrong.

    Attributes:
        purity: Share of images that get their own class's pattern, 0..1.
    """

    purity: Annotated[float, Field(ge=0, le=1)] = 0.8


# --- fitted controls -------------------------------------------------------------------------


class Constant(Perturbations):
    """One perturbation for all images.

    Args:
        card: Description.
        pattern_hwC: (h, w, 3) float32, in levels.
    """

    def __init__(self, card: FittedCard, pattern_hwC: Levels) -> None:
        super().__init__(card)
        self.pattern_hwC = pattern_hwC

    def perturb(self, images: LabelledImages, *, own: bool, seed: int) -> Iterator[Levels]:
        """See the base class; nothing is drawn."""
        return (self.pattern_hwC for _ in range(len(images)))


class RandomNoise(Perturbations):
    """Fresh noise for each image, at the image's own size."""

    def perturb(self, images: LabelledImages, *, own: bool, seed: int) -> Iterator[Levels]:
        """See the base class."""
        draw = _uniform if self.card.method == "uniform_noise" else _signs
        random = np.random.default_rng([self.card.seed, seed])
        return (draw(images.size, self.card.epsilon_levels, random) for _ in range(len(images)))


class ConceptOracle(ClassWise):
    """Patterns of the true classes, but ``1 - purity`` of the images get another class's."""

    def perturb(self, images: LabelledImages, *, own: bool, seed: int) -> Iterator[Levels]:
        """See the base class."""
        random = np.random.default_rng([self.card.seed, seed])
        return (self.pattern(int(concept)) for concept in self._concepts(images, random))

    def _concepts(self, images: LabelledImages, random: np.random.Generator) -> Labels:
        check_classes(images, self.card.method)
        num_wrong = round((1 - float(self.card.config["purity"])) * len(images))
        wrong = random.permutation(len(images))[:num_wrong]
        concepts = images.labels_N.copy()
        concepts[wrong] += random.integers(1, images.num_classes, num_wrong)
        return concepts % images.num_classes


# --- fits ------------------------------------------------------------------------------------
# Nothing is fitted, so a progress callback and a device, which every method takes, are not used.


def fit_clean(
    images: LabelledImages,
    config: ControlConfig,
    *,
    epsilon_levels: int = DEFAULT_EPSILON_LEVELS,
    seed: int,
    **unused: object,
) -> Constant:
    """No perturbation."""
    card = make_card(Constant, "clean", images, config, epsilon_levels=epsilon_levels, seed=seed)
    return Constant(card, np.zeros((1, 1, 3), np.float32))


def fit_constant(
    images: LabelledImages,
    config: PatternConfig,
    *,
    epsilon_levels: int = DEFAULT_EPSILON_LEVELS,
    seed: int,
    **unused: object,
) -> Constant:
    """One pattern for all images: tells a universal perturbation from one by class."""
    card = make_card(Constant, "constant", images, config, epsilon_levels=epsilon_levels, seed=seed)
    return Constant(card, _patterns(1, images, config, epsilon_levels, seed)[0])


def fit_uniform_noise(
    images: LabelledImages,
    config: ControlConfig,
    *,
    epsilon_levels: int = DEFAULT_EPSILON_LEVELS,
    seed: int,
    **unused: object,
) -> RandomNoise:
    """Independent uniform noise, fresh for each image."""
    return RandomNoise(
        make_card(
            RandomNoise, "uniform_noise", images, config, epsilon_levels=epsilon_levels, seed=seed
        )
    )


def fit_sign_noise(
    images: LabelledImages,
    config: ControlConfig,
    *,
    epsilon_levels: int = DEFAULT_EPSILON_LEVELS,
    seed: int,
    **unused: object,
) -> RandomNoise:
    """Independent signs at the edge of the budget, fresh for each image: all the energy allowed."""
    return RandomNoise(
        make_card(
            RandomNoise, "sign_noise", images, config, epsilon_levels=epsilon_levels, seed=seed
        )
    )


def fit_class_oracle(
    images: LabelledImages,
    config: PatternConfig,
    *,
    epsilon_levels: int = DEFAULT_EPSILON_LEVELS,
    seed: int,
    **unused: object,
) -> ClassWise:
    """One pattern per true class."""
    card = make_card(
        ClassWise, "class_oracle", images, config, epsilon_levels=epsilon_levels, seed=seed
    )
    return ClassWise(card, _patterns(images.num_classes, images, config, epsilon_levels, seed))


def fit_concept_oracle(
    images: LabelledImages,
    config: ConceptOracleConfig,
    *,
    epsilon_levels: int = DEFAULT_EPSILON_LEVELS,
    seed: int,
    **unused: object,
) -> ConceptOracle:
    """Patterns of the true classes at a chosen purity.

    Raises:
        UsageError: Only one class.
    """
    check_classes(images, "concept_oracle")
    card = make_card(
        ConceptOracle, "concept_oracle", images, config, epsilon_levels=epsilon_levels, seed=seed
    )
    return ConceptOracle(card, _patterns(images.num_classes, images, config, epsilon_levels, seed))


def _patterns(
    num: int, images: LabelledImages, config: PatternConfig, epsilon: int, seed: int
) -> Levels:
    if config.kind == "codebook":
        patterns_KChw = draw_patterns(num, STRENGTHS["strong"], seed=seed)
        return epsilon * patterns_KChw.permute(0, 2, 3, 1).numpy()
    return class_patterns(
        num, images.size, epsilon_levels=epsilon, seed=seed, block=min(config.block, images.size)
    )
