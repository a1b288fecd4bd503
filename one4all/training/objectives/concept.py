"""The training objective: concept-wise discriminant loss, Eq. 4 of the paper.

    L = l1 - lambda * l2
    l1 = d(E_I(x'), E_T(opposite))              to the most dissimilar concept: pulled together
    l2 = 1/k * sum_j d(E_I(x'), E_T(similar_j)) to the k nearest concepts: pushed apart

with d = 1 - cosine. The paper writes "cosine similarity" for d, which with its signs would do the
reverse of what its text says. Each departure is numbered as in docs/method.md.

Shape suffixes: B batch, C channels, H W image, D embedding width, N concepts, K similar concepts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from one4all.errors import ConfigError


class ObjectiveConfig(BaseModel):
    """Choices that the paper leaves open; the defaults are the ``default`` preset.

    Attributes:
        select_by: Whose embedding chooses opposite and similar concepts. "protected" is the
            paper's, recomputed each step without gradient; the targets then move with x'.
            "clean" gives every image one fixed target (8).
        num_similar: k of Eq. 4 (10).
        centre_concepts: Subtract the mean text embedding before ranking the opposite. Without it a
            few hub concepts are the opposite of nearly everything, and a direction that all images
            share separates no class (11).
        weighting: "ratio" is the paper's lambda = |l1 / l2|, detached, within [0.1, 10] (6); if it
            were not detached, the loss would be identically zero. "fixed" uses ``lambda_``.
        lambda_: Weight of l2 for "fixed".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    select_by: Literal["clean", "protected"] = "clean"
    num_similar: Annotated[int, Field(ge=1, le=100)] = 5
    centre_concepts: bool = True
    weighting: Literal["fixed", "ratio"] = "fixed"
    lambda_: Annotated[float, Field(ge=0, le=100)] = 1.0


PRESETS: dict[str, ObjectiveConfig] = {
    "default": ObjectiveConfig(),
    "paper": ObjectiveConfig(select_by="protected", centre_concepts=False, weighting="ratio"),
}

_LAMBDA_RANGE = (0.1, 10.0)
_SMALLEST_DENOMINATOR = 1e-6


@dataclass(frozen=True)
class Targets:
    """Concepts chosen for each image: opposite (B,) and similar (B, K), int64 indices."""

    opposite: Tensor
    similar: Tensor


@dataclass(frozen=True)
class ObjectiveTerms:
    """The loss and what it is made of; all scalars but ``targets``.

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
        num_similar: k; the nearest concept, the image's own, is one of them (12).
        centre: Rank the opposite by cosine to centred concepts (11).

    Raises:
        ConfigError: The vocabulary is too small for k similar concepts and an opposite.
    """
    num_concepts = len(concepts_ND)
    if num_concepts <= num_similar:
        raise ConfigError(
            f"a vocabulary of {num_concepts} concepts is too small for {num_similar} similar ones "
            f"and an opposite; at least {num_similar + 1} are needed"
        )
    cosine_BN = embedding_BD @ concepts_ND.T
    similar = cosine_BN.topk(num_similar, dim=1).indices
    if centre:
        centred_ND = concepts_ND - concepts_ND.mean(dim=0)
        centred_ND = centred_ND / centred_ND.norm(dim=1, keepdim=True).clamp_min(1e-12)
        cosine_BN = embedding_BD @ centred_ND.T
    return Targets(opposite=cosine_BN.argmin(dim=1), similar=similar)


def concept_objective(
    clean_BD: Tensor, protected_BD: Tensor, concepts_ND: Tensor, config: ObjectiveConfig
) -> ObjectiveTerms:
    """Eq. 4, image by image, averaged over the batch.

    Each image is compared with its own targets only; the released code averages all images
    against all targets of the batch, which dilutes an image's own by the batch size (7).

    Args:
        clean_BD: L2-normalised embeddings of the clean images; used without gradient.
        protected_BD: L2-normalised embeddings of the protected images; carries the gradient.
        concepts_ND: L2-normalised text embeddings of the vocabulary.
        config: Open points, see there.
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
        lambda_ = l1.new_tensor(config.lambda_)
    return ObjectiveTerms(
        loss=l1 - lambda_ * l2,
        l1=l1.detach(),
        l2=l2.detach(),
        lambda_=lambda_,
        cosine_own=(protected_BD * concepts_ND[own]).sum(dim=1).mean().detach(),
        cosine_opposite=to_opposite_B.mean().detach(),
        targets=targets,
    )


def normalised_entropy(counts_N: Tensor) -> float:
    """Entropy of a histogram of chosen concepts, as a share of what its size allows.

    Args:
        counts_N: How often each concept was chosen, (N,).

    Returns:
        0 when one concept takes all (hub collapse), 1 when choices are spread as evenly as the
        number of choices and concepts permits.
    """
    total = float(counts_N.sum())
    if total <= 1:
        return 0.0
    share = counts_N[counts_N > 0].double() / total
    entropy = float(-(share * share.log()).sum())
    return entropy / float(torch.tensor(min(total, len(counts_N))).double().log())
