"""The paper's objective: concept-wise discriminant loss, Eq. 4.

    L = l1 - lambda * l2
    l1 = d(E_I(x'), E_T(opposite))              to the most dissimilar concept: pulled together
    l2 = 1/k * sum_j d(E_I(x'), E_T(similar_j)) to the k nearest concepts: pushed apart

with d = 1 - cosine. The paper writes "cosine similarity" for d, which with its signs would do the
reverse of what its text says. Each departure is numbered as in docs/method.md.

Shape suffixes: B batch, C channels, H W image, D embedding width, N concepts, K similar concepts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from one4all.errors import ConfigError
from one4all.training.objectives.base import (
    Objective,
    ObjectiveConfig,
    ObjectiveContext,
    Scalars,
    TrainingBatch,
)

_RECENT_IMAGES = 64  # whose opposites are counted for the entropy


class ConceptObjectiveConfig(ObjectiveConfig):
    """Choices that the paper leaves open; the defaults are the ``default`` preset.

    Attributes:
        name: Name in the registry.
        select_by: Whose embedding chooses opposite and similar concepts. "protected" is the
            paper's, recomputed each step without gradient; the targets then move with x'.
            "clean" gives every image one fixed target (8).
        num_similar: Number k of similar concepts in Eq. 4 (10).
        centre_concepts: Subtract the mean text embedding before ranking the opposite. Without it a
            few hub concepts are the opposite of nearly everything, and a direction that all images
            share separates no class (11).
        weighting: "ratio" is the paper's lambda = |l1 / l2|, detached, within [0.1, 10] (6); if it
            were not detached, the loss would be identically zero. "fixed" uses ``lambda_``.
        lambda_: Weight of l2 for "fixed".
    """

    name: Literal["concept"] = "concept"
    select_by: Literal["clean", "protected"] = "clean"
    num_similar: Annotated[int, Field(ge=1, le=100)] = 5
    centre_concepts: bool = True
    weighting: Literal["fixed", "ratio"] = "fixed"
    lambda_: Annotated[float, Field(ge=0, le=100)] = 1.0


PRESETS: dict[str, ConceptObjectiveConfig] = {
    "default": ConceptObjectiveConfig(),
    "paper": ConceptObjectiveConfig(
        select_by="protected", centre_concepts=False, weighting="ratio"
    ),
}

_LAMBDA_RANGE = (0.1, 10.0)
_SMALLEST_DENOMINATOR = 1e-6


@dataclass(frozen=True)
class Targets:
    """Concepts chosen for each image: opposite (B,) and similar (B, K), int64 indices."""

    opposite: Tensor
    similar: Tensor


@dataclass(frozen=True)
class ConceptTerms:
    """The loss of Eq. 4 and what it is made of; all are scalars but ``targets``.

    ``loss`` carries the gradient. With "ratio" weighting its value is always 0 where lambda is not
    clamped, so watch ``l1`` and ``l2``, never the loss.
    """

    loss: Tensor
    l1: Tensor
    l2: Tensor
    lambda_: Tensor
    cosine_own: Tensor
    cosine_opposite: Tensor
    targets: Targets


def select_targets(
    embedding_BD: Tensor, concepts_ND: Tensor, *, num_similar: int, centre: bool
) -> Targets:
    """Opposite and similar concepts of each image (paper section 3.3).

    Args:
        embedding_BD: L2-normalised image embeddings.
        concepts_ND: L2-normalised text embeddings of the vocabulary.
        num_similar: Number k of similar concepts; the nearest one, the image's own, is one of
            them (12).
        centre: Rank the opposite by cosine to centred concepts (11).

    Raises:
        ConfigError: The vocabulary is too small for k similar concepts and an opposite.
    """
    _refuse_small_vocabulary(len(concepts_ND), num_similar)
    cosine_BN = embedding_BD @ concepts_ND.T
    similar = cosine_BN.topk(num_similar, dim=1).indices
    if centre:
        centred_ND = concepts_ND - concepts_ND.mean(dim=0)
        centred_ND = centred_ND / centred_ND.norm(dim=1, keepdim=True).clamp_min(1e-12)
        cosine_BN = embedding_BD @ centred_ND.T
    return Targets(opposite=cosine_BN.argmin(dim=1), similar=similar)


def concept_objective(
    clean_BD: Tensor, protected_BD: Tensor, concepts_ND: Tensor, config: ConceptObjectiveConfig
) -> ConceptTerms:
    """Eq. 4, image by image, averaged over the batch.

    Each image is compared with its own targets only; the released code averages all images
    against all targets of the batch, which dilutes an image's own by the batch size (7).

    Args:
        clean_BD: L2-normalised embeddings of the clean images; used without gradient.
        protected_BD: L2-normalised embeddings of the protected images; carries the gradient.
        concepts_ND: L2-normalised text embeddings of the vocabulary.
        config: Choices that the paper leaves open.

    Raises:
        ConfigError: The vocabulary is too small.
    """
    with torch.no_grad():
        targets = select_targets(
            clean_BD if config.select_by == "clean" else protected_BD,
            concepts_ND,
            num_similar=config.num_similar,
            centre=config.centre_concepts,
        )
        own = (clean_BD @ concepts_ND.T).argmax(dim=1)
    to_opposite_B = (protected_BD * concepts_ND[targets.opposite]).sum(dim=1)
    to_similar_BK = torch.einsum("bd,bkd->bk", protected_BD, concepts_ND[targets.similar])
    l1 = (1 - to_opposite_B).mean()
    l2 = (1 - to_similar_BK).mean()
    if config.weighting == "ratio":
        with torch.no_grad():
            lambda_ = (l1 / l2.clamp_min(_SMALLEST_DENOMINATOR)).abs().clamp(*_LAMBDA_RANGE)
    else:
        lambda_ = torch.full_like(l1, config.lambda_)
    return ConceptTerms(
        loss=l1 - lambda_ * l2,
        l1=l1.detach(),
        l2=l2.detach(),
        lambda_=lambda_,
        cosine_own=(protected_BD * concepts_ND[own]).sum(dim=1).mean().detach(),
        cosine_opposite=to_opposite_B.mean().detach(),
        targets=targets,
    )


class ConceptObjective(Objective):
    """Eq. 4 on the protected images, as the frozen encoder sees them.

    Scalars: the terms of Eq. 4, the cosines of the protected images to their own and to their
    opposite concept, and ``opposite_entropy``, how evenly opposites were chosen for the last 64
    images of this worker, or when not in training for those of the batch (`normalised_entropy`).

    Args:
        config: Choices that the paper leaves open.
        context: Encoder and vocabulary are used.

    Raises:
        ConfigError: The vocabulary cannot be embedded.
    """

    config_type = ConceptObjectiveConfig
    presets: ClassVar[Mapping[str, ObjectiveConfig]] = PRESETS

    def __init__(self, config: ConceptObjectiveConfig, context: ObjectiveContext) -> None:
        super().__init__(config, context)
        self.config = config
        self.bank = context.concept_bank()
        self._encode_image = context.encode_image
        # No buffers: checkpoints need neither, and workers need not tell each other.
        self._concepts_ND = self.bank.embeddings
        self._recent_opposites = torch.empty(0, dtype=torch.int64)

    def check(self) -> None:
        """See `Objective.check`."""
        _refuse_small_vocabulary(len(self._concepts_ND), self.config.num_similar)

    def forward(self, batch: TrainingBatch) -> tuple[Tensor, Scalars]:
        """See `Objective.forward`."""
        protected_BD = self._encode_image(batch.protected_BCHW)
        self._concepts_ND = self._concepts_ND.to(protected_BD.device)
        with torch.autocast(protected_BD.device.type, enabled=False):
            terms = concept_objective(
                batch.embedding_BD, protected_BD, self._concepts_ND, self.config
            )
        # All of it stays on the device: asking for a value would make the CPU wait for every batch.
        chosen = terms.targets.opposite
        if self.training:
            recent = torch.cat([self._recent_opposites.to(chosen.device), chosen])
            self._recent_opposites = chosen = recent[-_RECENT_IMAGES:]
        counts_N = chosen.new_zeros(len(self._concepts_ND))
        counts_N.scatter_add_(0, chosen, torch.ones_like(chosen))
        return terms.loss, {
            "l1": terms.l1,
            "l2": terms.l2,
            "lambda": terms.lambda_,
            "cosine_own": terms.cosine_own,
            "cosine_opposite": terms.cosine_opposite,
            "opposite_entropy": normalised_entropy(counts_N),
        }


def _refuse_small_vocabulary(num_concepts: int, num_similar: int) -> None:
    if num_concepts <= num_similar:
        raise ConfigError(
            f"a vocabulary of {num_concepts} concepts is too small for {num_similar} similar ones "
            f"and an opposite; at least {num_similar + 1} are needed"
        )


def normalised_entropy(counts_N: Tensor) -> Tensor:
    """Entropy of a histogram of chosen concepts, as a share of what its size allows.

    Args:
        counts_N: How often each concept was chosen, (N,).

    Returns:
        float32 (): 0 when one concept takes all (hub collapse), 1 when choices are spread as evenly
        as the number of choices and concepts permits. On the device of the counts.
    """
    counts_N = counts_N.float()
    total = counts_N.sum()
    entropy: Tensor = torch.special.entr(counts_N / total.clamp_min(1)).sum()
    return entropy / total.clamp(2, max(2, len(counts_N))).log()
