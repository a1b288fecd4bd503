"""A codebook: one fixed code for each concept, written on the images of that concept.

    z      = normalise(A (E_I(x) - m))          what tells its kinds apart: 64 directions
    p_k(x) ~ exp(-|z - c_k|^2 / 2 T)            how much x is like each of K concepts
    b_j(x) = sign sum_k p_k(x) b_jk             each bit of its code, by the vote of all concepts
    delta  = +-epsilon * (-1, 1, -1)            a green or magenta cell for each bit, or its look

Concepts are clusters of image embeddings of an unlabelled corpus, or the names of a vocabulary.
Embeddings are looked at along directions in which images differ, but not from those that are most
like them; and they are drawn towards their neighbours before they are clustered. So a concept
follows what images there are, and not the axes of the encoder. Like concepts have like codes: their
bits are signs of the directions in which they differ most, in the encoder's own measure. So a class
that spreads over several concepts still has most of its cells in common, and an image between two
concepts has the cells that they share. No two clusters have the same code, or the picture would be
needed to tell them apart.

No label is read, at fitting or at protection, and nothing is trained. It is the other kind of
generator beside `Generator`: the same artefact, budget and commands, and far less to compute. How
a code looks on a picture is told in `one4all.protectors.pattern`. What it protects, and what it
does not, is measured in docs/results.md.

Shape suffixes: B batch, K concepts, D embedding width, P directions, b bits, C channels, N items.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from one4all.clustering import squared_distances
from one4all.codes import quantise, quantise_apart
from one4all.directions import discriminant_directions, principal_directions
from one4all.errors import UsageError
from one4all.grouping import group, group_centres, stable_number
from one4all.images import Pixels
from one4all.perturbation import Levels, around_middle
from one4all.protectors.config import MAX_CONCEPTS, CodebookConfig, PatternConfig
from one4all.protectors.model import PerturbationModel
from one4all.protectors.pattern import hide, paint

# How far bfloat16 may move A (E_I(x) - m) across the border of a bit. At T = .04 it moved none of
# 1,708 photos by over .0162 with seven codebooks (of names; fitted, 16 to 86 concepts), and with
# nine others (fitted, 24 to 147) turned bits up to .0202 away. With sixteen in 3 to 512 principal
# directions it moved none of 5,788 photos and thumbnails by over .0209.
_DRAFT_ERROR = 0.022


class Codebook(PerturbationModel):
    """Embeddings in, perturbations within +-1 out; `Generator`'s interface.

    Args:
        config: Size; with the numbers of concepts and directions that there are.
        embedding_dim: Width D of the encoder's embedding.
    """

    sees_image = False
    takes_drafts = True

    mean_D: Tensor
    axes_DP: Tensor
    centres_KP: Tensor
    bits_Kb: Tensor

    def __init__(self, config: CodebookConfig, embedding_dim: int) -> None:
        super().__init__(config, embedding_dim)
        self.config = config
        num_concepts, num_axes = config.num_concepts, min(config.directions, embedding_dim)
        self.register_buffer("mean_D", torch.zeros(embedding_dim))
        self.register_buffer("axes_DP", torch.zeros(embedding_dim, num_axes))
        self.register_buffer("centres_KP", torch.zeros(num_concepts, num_axes))
        shape = (num_concepts, config.pattern.num_bits)
        self.register_buffer("bits_Kb", torch.ones(shape, dtype=torch.int8))

    def forward(self, embedding_BD: Tensor, image_BCHW: Tensor) -> Tensor:
        """Perturbations on the scale of the budget.

        Args:
            embedding_BD: L2-normalised image embeddings, float (B, D).
            image_BCHW: Not looked at: the code of an image depends on its embedding alone.

        Returns:
            float (B, 3, h, w) with h = w = ``config.pattern.side``, in [-1, 1].
        """
        return self.paint(self.vote(embedding_BD)).to(embedding_BD)

    @property
    def is_coloured(self) -> bool:
        """See the base class: unless it is stripes."""
        return not self.config.pattern.stripes

    def place(self, delta_hwC: Levels, clean: Pixels) -> Levels:
        """See the base class: on the middle square, and hidden in the photo's colours."""
        whole = around_middle(delta_hwC, *clean.shape[:2])
        return hide(whole, clean, self.config.pattern)

    def vote(self, embedding_BD: Tensor) -> Tensor:
        """Code of each image, int8 (B, b), on the CPU.

        Summed on the CPU and in float64: a sum in another order, as on a GPU, would give images at
        a border another code from one run to the next.
        """
        score_BK = self._distances(embedding_BD) / (-2 * self.config.temperature)
        likeness_BK = torch.softmax(score_BK, dim=1).cpu().double()
        votes_Bb = likeness_BK @ self.bits_Kb.cpu().double()
        return torch.where(votes_Bb >= 0, 1, -1).to(torch.int8)

    def is_settled(self, embedding_BD: Tensor) -> Tensor:
        """See the base class: whether an embedding is far from where a bit of its code turns.

        A bit is the sign of log odds. To first order these change by dz (c+ - c-) / T, where c+ and
        c- are the mean centres of the concepts that vote for it and against it.
        """
        score_BK = self._distances(embedding_BD) / (-2 * self.config.temperature)
        likeness_BK = torch.softmax(score_BK, dim=1)
        votes_2bK = torch.stack([self.bits_Kb > 0, self.bits_Kb < 0]).mT  # for it, and against it
        weight_B2bK = likeness_BK[:, None, None] * votes_2bK
        total_B2b = weight_B2bK.sum(dim=3).clamp_min(torch.finfo(torch.float32).tiny)
        centre_B2bP = weight_B2bK @ self.centres_KP / total_B2b[..., None]
        odds_Bb = total_B2b.log().diff(dim=1)[:, 0].abs()
        slope_Bb = centre_B2bP.diff(dim=1)[:, 0].norm(dim=2) / self.config.temperature
        # z is of unit length: an error counts for more where the embedding is near the mean.
        length_B = ((embedding_BD - self.mean_D) @ self.axes_DP).norm(dim=1)
        settled_Bb: Tensor = odds_Bb * length_B[:, None] > slope_Bb * _DRAFT_ERROR
        return settled_Bb.all(dim=1)

    def paint(self, bits_Nb: Tensor) -> Tensor:
        """Patterns of codes, float32 (N, 3, h, w), as the configuration says.

        One at a time: painted together they differ in the last digit, so the bytes of an image
        would hang on what else is in its batch.
        """
        config = self.config.pattern
        return torch.cat([_painted(tuple(code), config) for code in bits_Nb.tolist()])

    def concepts(self, embedding_BD: Tensor) -> Tensor:
        """The nearest concept of each image, int64 (B,)."""
        return self._distances(embedding_BD).argmin(dim=1)

    def _distances(self, embedding_BD: Tensor) -> Tensor:
        """In float32 whatever autocast says: a coarser distance would give images at a border
        another concept on another device."""
        with torch.autocast(embedding_BD.device.type, enabled=False):
            projected_BP = _project(embedding_BD.float(), self.mean_D, self.axes_DP)
            return squared_distances(projected_BP, self.centres_KP)


@lru_cache(maxsize=256)  # all codes of 4x4 cells
def _painted(code: tuple[int, ...], config: PatternConfig) -> Tensor:
    return paint(torch.tensor([code], dtype=torch.int8), config)


def fit_codebook(
    embeddings_ND: Tensor, config: CodebookConfig, *, seed: int
) -> tuple[Codebook, Tensor]:
    """Cluster embeddings and give each cluster a code of its own.

    Args:
        embeddings_ND: L2-normalised image embeddings of an unlabelled corpus, float32 (N, D).
        config: Size.
        seed: Seed of the clusters' starts and of the codes.

    Returns:
        The codebook, and the concept that is nearest to each image, int64 (N,).

    Raises:
        UsageError: Fewer images than concepts, or than two.
    """
    num_images = len(embeddings_ND)
    fewest, most = config.concepts_between(num_images)
    if num_images < fewest:
        raise UsageError(
            f"{fewest} concepts cannot be found in {num_images} images; give more images, or a "
            "smaller num_concepts"
        )
    mean_D, axes_DP = discriminant_directions(embeddings_ND, config.directions)
    projected_NP = _project(embeddings_ND, mean_D, axes_DP)
    num_concepts = fewest
    if fewest < most:
        num_concepts = stable_number(projected_NP, fewest, most, seed=seed)
    kind_N = group(projected_NP, num_concepts, seed=seed)
    sizes_K = torch.bincount(kind_N, minlength=num_concepts).clamp_min(1)
    # What tells two kinds apart is one thing, how far apart they are another: codes follow the
    # large differences between images, which discriminant directions make small.
    seen_NP = _project(embeddings_ND, *principal_directions(embeddings_ND, config.directions))
    apart_KP = group_centres(seen_NP, kind_N, num_concepts)
    bits_Kb = quantise_apart(apart_KP, config.pattern.num_bits, sizes_K, seed=seed)
    centres_KP = group_centres(projected_NP, kind_N, num_concepts)
    codebook = _codebook(config, mean_D, axes_DP, centres_KP, bits_Kb)
    return codebook, codebook.concepts(embeddings_ND)


def name_codebook(embeddings_ND: Tensor, config: CodebookConfig, *, seed: int) -> Codebook:
    """A codebook that has seen no image: its concepts are names.

    Made once, it protects any corpus by inference alone; a corpus's own codebook is purer.

    Args:
        embeddings_ND: L2-normalised text embeddings of a vocabulary, float32 (N, D).
        config: Look; there are as many concepts as names.
        seed: Seed of the codes.

    Returns:
        A codebook of N concepts.

    Raises:
        UsageError: More than `MAX_CONCEPTS` names.
    """
    check_num_concepts(len(embeddings_ND))
    mean_D, axes_DP = principal_directions(embeddings_ND, config.directions)
    centres_NP = _project(embeddings_ND, mean_D, axes_DP)
    bits_Nb = quantise(centres_NP, config.pattern.num_bits, torch.ones(len(centres_NP)), seed=seed)
    return _codebook(config, mean_D, axes_DP, centres_NP, bits_Nb)


def check_num_concepts(count: int) -> None:
    """Refuse, before the work, more concepts than are possible.

    Raises:
        UsageError: There are more than `MAX_CONCEPTS`.
    """
    if count > MAX_CONCEPTS:
        raise UsageError(
            f"{count:,} concepts are too many: each image is held against all of them; at most "
            f"{MAX_CONCEPTS:,} are possible"
        )


def _project(embedding_BD: Tensor, mean_D: Tensor, axes_DP: Tensor) -> Tensor:
    """z above, float32 (B, P), of unit length."""
    return F.normalize((embedding_BD - mean_D) @ axes_DP, dim=1)


def _codebook(
    config: CodebookConfig,
    mean_D: Tensor,
    axes_DP: Tensor,
    centres_KP: Tensor,
    bits_Kb: Tensor,
) -> Codebook:
    config = config.model_copy(update={"num_concepts": len(centres_KP)})
    codebook = Codebook(config, len(mean_D))
    codebook.mean_D.copy_(mean_D)
    codebook.axes_DP.copy_(axes_DP)
    codebook.centres_KP.copy_(centres_KP)
    codebook.bits_Kb.copy_(bits_Kb)
    return codebook
