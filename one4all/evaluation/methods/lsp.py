"""LSP: linearly separable perturbations (Yu et al., "Availability Attacks Create Shortcuts", KDD
2022).

No model: each class is a vertex of a hypercube, each image a Gaussian sample around it; a feature
colours one square patch. Samples are scaled to an L2 norm, then capped to the L-infinity budget by
the integer rule.

Departures: the published norm, 6/255 * sqrt(3 H W), has no cap; it is scaled with the budget (6
levels root mean square for a budget of 8) and then capped. Points are drawn here as the recipe of
scikit-learn's make_classification says, without its label noise.

Shape suffixes: N images, M classes, F features, C colour channels, H W image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

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
from one4all.evaluation.methods.transfer import transform_block
from one4all.perturbation import DEFAULT_EPSILON_LEVELS, Levels

_RMS_SHARE = 6 / 8


class LspConfig(BaseModel):
    """Patches and points.

    Attributes:
        patch: Side of a patch in pixels.
        class_separation: Half the side of the hypercube, in standard deviations before mixing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    patch: Annotated[int, Field(ge=1)] = 8
    class_separation: Annotated[float, Field(gt=0)] = 10.0


PRESETS: dict[str, LspConfig] = {"default": LspConfig(), "published": LspConfig()}


class LinearSeparable(SavablePerturbations):
    """Vertices and covariances of the classes; a perturbation is drawn for each image.

    Args:
        card: Description.
        vertices_MF: float32.
        mixing_MFF: float32; a sample is ``z @ mixing + vertex`` with z standard normal.
    """

    def __init__(self, card: FittedCard, vertices_MF: Levels, mixing_MFF: Levels) -> None:
        super().__init__(card)
        self.vertices_MF = vertices_MF
        self.mixing_MFF = mixing_MFF

    def perturb(self, images: LabelledImages, *, own: bool, seed: int) -> Iterator[Levels]:
        """See the base class; before the cap, root mean square 0.75 of the budget."""
        if own:
            self.check_own(images)
        random = np.random.default_rng([self.card.seed, seed])
        return (self._sample(int(label), random) for label in images.labels_N)

    def _sample(self, label: int, random: np.random.Generator) -> Levels:
        block, source = divmod(label, len(self.vertices_MF))
        num_features = self.vertices_MF.shape[1]
        point = random.standard_normal((1, num_features), np.float32)[0] @ self.mixing_MFF[source]
        point += self.vertices_MF[source]
        side = round((num_features / 3) ** 0.5)
        patch, size = int(self.card.config["patch"]), self.card.size
        fine = point.reshape(side, side, 3).repeat(patch, axis=0).repeat(patch, axis=1)
        fine = fine[:size, :size]
        rms = _RMS_SHARE * self.card.epsilon_levels
        return transform_block(fine * (rms / float(np.sqrt(np.square(fine).mean()))), block)

    def arrays(self) -> Arrays:
        return {"vertices": self.vertices_MF, "mixing": self.mixing_MFF}

    @classmethod
    def from_arrays(cls, card: FittedCard, arrays: Arrays) -> Self:
        return cls(card, arrays["vertices"], arrays["mixing"])


def fit(
    images: LabelledImages,
    config: LspConfig,
    *,
    epsilon_levels: int = DEFAULT_EPSILON_LEVELS,
    seed: int,
    on_progress: OnFitProgress = silent,
    device: str = "cpu",
) -> LinearSeparable:
    """Draw the classes' points; of ``images`` only size and number of classes matter.

    Args:
        images: Corpus.
        config: Patches and points.
        epsilon_levels: Budget.
        seed: Seed of vertices, covariances and, later, samples.
        on_progress, device: Not used; nothing takes time.
    """
    check_epsilon(epsilon_levels)
    random = np.random.default_rng(seed)
    side = -(-images.size // config.patch)
    num_features = 3 * side * side
    signs = _distinct_signs(images.num_classes, num_features, random)
    mixing = random.uniform(-1, 1, (images.num_classes, num_features, num_features))
    card = make_card(
        LinearSeparable, "lsp", images, config, epsilon_levels=epsilon_levels, seed=seed
    )
    on_progress(1.0, f"{images.num_classes} classes of {num_features} features")
    return LinearSeparable(
        card, (config.class_separation * signs).astype(np.float32), mixing.astype(np.float32)
    )


def _distinct_signs(num: int, num_features: int, random: np.random.Generator) -> Levels:
    """Vertices (num, F) of +-1, all different where F allows it."""
    chosen: dict[bytes, Levels] = {}
    for _ in range(100 * num):
        vertex = random.choice((-1.0, 1.0), num_features).astype(np.float32)
        chosen[vertex.tobytes()] = vertex
        if len(chosen) == num:
            return np.stack(list(chosen.values()))
    repeats = [list(chosen.values())[i % len(chosen)] for i in range(num)]
    return np.stack(repeats)
