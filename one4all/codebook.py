"""A codebook: one fixed pattern for each concept, written on the images of that concept.

    p_k(x) ~ exp(-|E_I(x) - c_k|^2 / 2 T)    how much x is like each of K concepts
    g_r(x) = argmax_g sum_{k in g} p_k(x)    the likeliest group of concepts, for each row r
    delta  = epsilon * the rows of colours of g_1(x), g_2(x), ...

Concepts are clusters of image embeddings of an unlabelled corpus, or the names of a vocabulary.
Like concepts have like patterns: a tree of the concepts is cut into ever finer groups, and each row
of a pattern's cells is coloured by a group of one cut. So a class that spreads over several
concepts still has most rows in common, and an image between two concepts of a group has its row.

No label is read, at fitting or at protection, and nothing is trained. It is the other kind of
generator beside `Generator`: the same artefact, budget and commands, and far less to compute.
What it protects, and what it does not, is measured in RESULTS.md.

Shape suffixes: B batch, K concepts, D embedding width, C channels, g cells a side, R rows of cells,
N items, h w grid.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from one4all.clustering import k_means, squared_distances, ward
from one4all.encoders import EncoderConfig
from one4all.errors import UsageError

# Two networks and 224 pixels: each alone, and 160 pixels, tell concepts apart less well.
DEFAULT_ENCODER = EncoderConfig(model_name="lite0+lite2", input_size=224)
DEFAULT_CELLS = 4
PIXELS_PER_CELL = 8

# The corners of the colour cube without black and white.
_COLOURS = torch.tensor(
    [(1, -1, -1), (-1, 1, -1), (-1, -1, 1), (-1, 1, 1), (1, -1, 1), (1, 1, -1)], dtype=torch.int8
)


class CodebookConfig(BaseModel):
    """Size of a codebook.

    Attributes:
        num_concepts: K. Several for each kind of thing in the corpus: more are purer.
        coarsest: Groups by which the first row is coloured. They grow geometrically to half of
            ``num_concepts`` in the last: two concepts in the same group there look the same. At
            ``num_concepts`` or above, no concept is like another.
        cells: Cells of a pattern a side. Few and large ones are learnt fastest and survive
            resizing: 4 on Caltech-101 (docs/method.md).
        temperature: T above, in squared distance of embeddings of unit length. Towards 0, each row
            is that of the nearest concept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_concepts: Annotated[int, Field(ge=2, le=100_000)]
    coarsest: Annotated[int, Field(ge=2)] = 12
    cells: Annotated[int, Field(ge=1, le=64)] = DEFAULT_CELLS
    temperature: Annotated[float, Field(gt=0, le=1)] = 0.04


DEFAULT_CODEBOOK = CodebookConfig(num_concepts=400)


class Codebook(nn.Module):
    """Embeddings in, perturbations within +-1 out; `Generator`'s interface.

    Args:
        config: Size.
        embedding_dim: Width D of the encoder's embedding.
    """

    centres_KD: Tensor
    groups_RK: Tensor
    signs_KCgg: Tensor

    def __init__(self, config: CodebookConfig, embedding_dim: int) -> None:
        super().__init__()
        self.config = config
        num_concepts, cells = config.num_concepts, config.cells
        self.register_buffer("centres_KD", torch.zeros(num_concepts, embedding_dim))
        # A group bears the number of its first concept.
        self.register_buffer("groups_RK", torch.zeros(cells, num_concepts, dtype=torch.int64))
        shape = (num_concepts, 3, cells, cells)
        self.register_buffer("signs_KCgg", torch.zeros(shape, dtype=torch.int8))

    def forward(self, embedding_BD: Tensor, image_BCHW: Tensor) -> Tensor:
        """Perturbations on the scale of the budget.

        Args:
            embedding_BD: L2-normalised image embeddings, float (B, D).
            image_BCHW: Not looked at: what an image gets depends on its embedding alone.

        Returns:
            float (B, 3, h, w) with h = w = 8 * ``config.cells``, each value -1 or 1.
        """
        return self.patterns(self.vote(embedding_BD)).to(embedding_BD)

    def vote(self, embedding_BD: Tensor) -> Tensor:
        """The group of each image in each row, int64 (R, B), on the CPU.

        Summed on the CPU: a sum in no fixed order, as on a GPU, would give images at a border
        another pattern from one run to the next.
        """
        score_BK = self._distances(embedding_BD) / (-2 * self.config.temperature)
        likeness_BK = torch.softmax(score_BK, dim=1).cpu()
        votes = torch.zeros_like(likeness_BK)
        return torch.stack(
            [
                votes.zero_().index_add_(1, group_K, likeness_BK).argmax(dim=1)
                for group_K in self.groups_RK.cpu()
            ]
        )

    def patterns(self, groups_RN: Tensor) -> Tensor:
        """Patterns of `vote`'s groups, float32 (N, 3, h, w), see `forward`."""
        signs_KCgg = self.signs_KCgg.cpu()
        rows = [signs_KCgg[group_N, :, row] for row, group_N in enumerate(groups_RN)]
        return enlarge(torch.stack(rows, dim=2))

    def concepts(self, embedding_BD: Tensor) -> Tensor:
        """The nearest concept of each image, int64 (B,)."""
        return self._distances(embedding_BD).argmin(dim=1)

    def _distances(self, embedding_BD: Tensor) -> Tensor:
        """In float32 whatever autocast says: a coarser distance would give images at a border
        another concept on another device."""
        with torch.autocast(embedding_BD.device.type, enabled=False):
            return squared_distances(embedding_BD.float(), self.centres_KD)


def fit_codebook(
    embeddings_ND: Tensor, config: CodebookConfig, *, seed: int
) -> tuple[Codebook, Tensor]:
    """Cluster embeddings and draw a pattern for each cluster.

    Args:
        embeddings_ND: L2-normalised image embeddings of an unlabelled corpus, float32 (N, D).
        config: Size.
        seed: Of the clusters' starts and the patterns.

    Returns:
        The codebook, and the concept of each image, int64 (N,).

    Raises:
        UsageError: Fewer images than concepts, or fewer different patterns.
    """
    _check_possible(embeddings_ND, config)
    centres_KD, assignment_N = k_means(embeddings_ND, config.num_concepts, seed=seed)
    return _codebook(centres_KD, config, seed), assignment_N


def name_codebook(embeddings_ND: Tensor, config: CodebookConfig, *, seed: int) -> Codebook:
    """A codebook that has seen no image: its concepts are names.

    Made once, it protects any corpus by inference alone; a corpus's own codebook is purer.

    Args:
        embeddings_ND: L2-normalised text embeddings of a vocabulary, float32 (N, D).
        config: Patterns are those of ``num_concepts`` groups of names, at most N.
        seed: Of the patterns.

    Returns:
        A codebook of N concepts.

    Raises:
        UsageError: Fewer names than groups asked for, or fewer different patterns.
    """
    _check_possible(embeddings_ND, config)
    return _codebook(embeddings_ND, config, seed)


def _check_possible(embeddings_ND: Tensor, config: CodebookConfig) -> None:
    if len(embeddings_ND) < config.num_concepts:
        raise UsageError(
            f"{config.num_concepts} concepts cannot be found in {len(embeddings_ND)} embeddings; "
            "give more images or names, or a smaller num_concepts"
        )
    num_patterns = len(_COLOURS) ** (config.cells * -(-config.cells // 2))
    if config.num_concepts > num_patterns:
        raise UsageError(
            f"there are {num_patterns} different patterns of {config.cells}x{config.cells} cells "
            f"and not {config.num_concepts}; ask for more cells or a smaller num_concepts"
        )


def _codebook(centres_KD: Tensor, config: CodebookConfig, seed: int) -> Codebook:
    first = min(config.coarsest, config.num_concepts)
    last = max(first, config.num_concepts // 2)
    sizes = np.geomspace(first, last, config.cells).round().astype(int)
    groups_RK = ward(centres_KD, sizes.tolist())
    num_centres, embedding_dim = centres_KD.shape
    codebook = Codebook(config.model_copy(update={"num_concepts": num_centres}), embedding_dim)
    codebook.centres_KD.copy_(centres_KD)
    codebook.groups_RK.copy_(
        torch.stack([_first_of_each(group_K)[group_K] for group_K in groups_RK])
    )
    codebook.signs_KCgg.copy_(_colour(groups_RK, seed))
    return codebook


def _first_of_each(group_K: Tensor) -> Tensor:
    """Index of the first member of each group."""
    count, size = int(group_K.max()) + 1, len(group_K)
    return torch.full((count,), size).scatter_reduce(0, group_K, torch.arange(size), "amin")


# --- patterns --------------------------------------------------------------------------------


def draw_patterns(num_patterns: int, cells: int, *, seed: int) -> Tensor:
    """Patterns of concepts of which none is like another.

    Args:
        num_patterns: K.
        cells: A side.
        seed: Same seed, same patterns.

    Returns:
        int8 (K, 3, cells, cells), -1 or 1.
    """
    return _colour(torch.arange(num_patterns).expand(cells, -1), seed)


def _colour(groups_RK: Tensor, seed: int) -> Tensor:
    """Colour row r of each concept's cells by its group there: what a network reads soon.

    Left mirrors right, so an adversary that flips its images still sees one pattern and not two.
    No cell is gray: photos vary most in brightness, which would drown it. With neither, a network
    that sees each pattern on random photos has learnt nothing in the time in which it learns a
    fifth of these (RESULTS.md, section 2). The cells of half a row are drawn apart: six colours
    name few groups, two cells of them 36.
    """
    generator = torch.Generator().manual_seed(seed)
    cells = len(groups_RK)

    def cell(groups_K: Tensor) -> Tensor:
        shuffled = torch.randperm(int(groups_K.max()) + 1, generator=generator)
        return _COLOURS[shuffled[groups_K] % len(_COLOURS)]  # each colour on as many groups

    half = [torch.stack([cell(row_K) for _ in range(-(-cells // 2))]) for row_K in groups_RK]
    columns = torch.stack(half, dim=1)  # (half a row, rows, K, colours)
    mirrored = torch.cat([columns, columns[: cells // 2].flip(0)])
    return mirrored.permute(2, 3, 1, 0).contiguous()


def enlarge(signs_KCgg: Tensor) -> Tensor:
    """Cells of 8x8 values, float32 (K, 3, 8 g, 8 g), from one value for each."""
    return F.interpolate(signs_KCgg.float(), scale_factor=PIXELS_PER_CELL, mode="nearest")
