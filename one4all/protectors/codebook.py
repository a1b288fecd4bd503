"""A codebook: one fixed pattern for each concept, written on the images of that concept.

    p_k(x) ~ exp(-|E_I(x) - c_k|^2 / 2 T)    how much x is like each of K concepts
    g_l(x) = argmax_g sum_{k in g} p_k(x)    the likeliest group of concepts, at each level l
    delta  = +-epsilon * (-1, 1, -1)         green or magenta cells, some rows for each g_l(x);
                                             hard-edged, or blurred

Concepts are clusters of image embeddings of an unlabelled corpus, or the names of a vocabulary.
Like concepts have like patterns: a tree of the concepts is cut into few groups, which colour the
upper rows of a pattern's cells, and into many, which colour the lower rows. So a class that spreads
over several concepts still has rows in common, and an image between two concepts of a group has
its rows.

No label is read, at fitting or at protection, and nothing is trained. It is the other kind of
generator beside `Generator`: the same artefact, budget and commands, and far less to compute.
What it protects, and what it does not, is measured in docs/results.md.

Shape suffixes: B batch, K concepts, D embedding width, C channels, L levels, r rows of cells of a
level, q cells of a row, N items, h w grid.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from one4all.clustering import k_means, squared_distances, ward
from one4all.encoders import EncoderConfig
from one4all.errors import UsageError
from one4all.perturbation import Levels, around_middle
from one4all.protectors.model import PerturbationModel

# Two networks and 224 pixels: each alone, and 160 pixels, tell concepts apart less well.
DEFAULT_ENCODER = EncoderConfig(model_name="lite0+lite2", input_size=224)
PIXELS_PER_CELL = 8
# The tree of concepts keeps the distances of all pairs: 8 bytes times their number squared.
MAX_CONCEPTS = 20_000
_MOST_LOOKS = 1 << 20  # of the rows of a level: they are shuffled in memory


def _num_looks(num_rows: int, cells: int) -> int:
    return 1 << num_rows * _half(cells)


def _half(cells: int) -> int:
    """Cells of a row that differ: left of the middle, and the middle."""
    return -(-cells // 2)


class CodebookConfig(BaseModel):
    """Size of a codebook.

    Attributes:
        num_concepts: Number K of concepts, at most `MAX_CONCEPTS`, whose tree takes 3 GB. Several
            for each kind of thing in the corpus: more are purer. A codebook of names has one for
            each name, whatever this says.
        groups: Groups of concepts at each level, the coarsest first; at most K count. The rows of
            cells are shared out evenly among the levels. One level: no group is like another.
        cells: Cells of a pattern a side; right mirrors left. Few and large ones are learnt fastest
            and survive resizing: 4 on Caltech-101 (docs/method.md).
        temperature: T above, in squared distance of embeddings of unit length. Towards 0, the
            nearest concept decides.
        smoothing: Blur of a pattern, in cells: the standard deviation of a Gaussian. 0 leaves flat
            cells with hard edges, which people see; 0.625 leaves no edge, and adversaries read it
            less well (docs/results.md).
        green: Strength of green against that of red and blue, which is 1. At 0.7 green and magenta
            cells are nearly equally bright, which people see less.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_concepts: Annotated[int, Field(ge=2, le=MAX_CONCEPTS)] = 400
    groups: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(min_length=1)] = (16, 128)
    cells: Annotated[int, Field(ge=1, le=32)] = 4
    temperature: Annotated[float, Field(gt=0, le=1)] = 0.04
    smoothing: Annotated[float, Field(ge=0, le=2)] = 0.0
    green: Annotated[float, Field(ge=0.1, le=1)] = 1.0

    @model_validator(mode="after")
    def _can_be_told(self) -> CodebookConfig:
        if self.cells % len(self.groups):
            raise ValueError(
                f"{self.cells} rows of cells cannot be shared out evenly among {len(self.groups)} "
                "levels of groups"
            )
        if list(self.groups) != sorted(self.groups):
            raise ValueError(f"groups are {self.groups}; give the coarsest level first")
        looks = _num_looks(self.cells // len(self.groups), self.cells)
        if looks > _MOST_LOOKS:
            raise ValueError(
                f"{self.cells}x{self.cells} cells for {len(self.groups)} levels of groups have "
                f"more than {_MOST_LOOKS} looks a level; ask for fewer cells, or more levels"
            )
        if self.groups[0] > looks:
            raise ValueError(
                f"{self.groups[0]} groups in the first level, and its cells have {looks} looks; "
                "ask for more cells, or fewer groups"
            )
        return self


DEFAULT_CODEBOOK = CodebookConfig()


class Codebook(PerturbationModel):
    """Embeddings in, perturbations within +-1 out; `Generator`'s interface.

    Args:
        config: Size.
        embedding_dim: Width D of the encoder's embedding.
    """

    kind = "codebook"
    config_type = CodebookConfig
    later_keys = frozenset({"smoothing", "green"})

    centres_KD: Tensor
    groups_LK: Tensor
    signs_KLrq: Tensor

    def __init__(self, config: CodebookConfig, embedding_dim: int) -> None:
        super().__init__(config, embedding_dim)
        self.config = config
        num_concepts, num_levels = config.num_concepts, len(config.groups)
        self.register_buffer("centres_KD", torch.zeros(num_concepts, embedding_dim))
        # A group bears the number of its first concept.
        self.register_buffer("groups_LK", torch.zeros(num_levels, num_concepts, dtype=torch.int64))
        shape = (num_concepts, num_levels, config.cells // num_levels, config.cells)
        self.register_buffer("signs_KLrq", torch.zeros(shape, dtype=torch.int8))

    def forward(self, embedding_BD: Tensor, image_BCHW: Tensor) -> Tensor:
        """Perturbations on the scale of the budget.

        Args:
            embedding_BD: L2-normalised image embeddings, float (B, D).
            image_BCHW: Not looked at: what an image gets depends on its embedding alone.

        Returns:
            float (B, 3, h, w) with h = w = 8 * ``config.cells``, in [-1, 1].
        """
        return self.patterns(self.vote(embedding_BD)).to(embedding_BD)

    def place(self, delta_hwC: Levels, height: int, width: int) -> Levels:
        """See the base class: a pattern lies on the middle square (`around_middle`)."""
        return around_middle(delta_hwC, height, width)

    def vote(self, embedding_BD: Tensor) -> Tensor:
        """The group of each image at each level, int64 (L, B), on the CPU.

        Summed on the CPU: a sum in no fixed order, as on a GPU, would give images at a border
        another pattern from one run to the next.
        """
        score_BK = self._distances(embedding_BD) / (-2 * self.config.temperature)
        likeness_BK = torch.softmax(score_BK, dim=1).cpu()
        votes = torch.zeros_like(likeness_BK)
        return torch.stack(
            [
                votes.zero_().index_add_(1, group_K, likeness_BK).argmax(dim=1)
                for group_K in self.groups_LK.cpu()
            ]
        )

    def patterns(self, groups_LN: Tensor) -> Tensor:
        """Patterns of `vote`'s groups, float32 (N, 3, h, w), see `forward`."""
        signs_KLrq = self.signs_KLrq.cpu()
        levels = [signs_KLrq[group_N, level] for level, group_N in enumerate(groups_LN)]
        return self.paint(torch.cat(levels, dim=1))

    def paint(self, signs_Kgg: Tensor) -> Tensor:
        """Patterns of cells, float32 (K, 3, h, w), as the configuration says."""
        return paint(signs_Kgg, smoothing=self.config.smoothing, green=self.config.green)

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
        UsageError: Fewer images than concepts.
    """
    if len(embeddings_ND) < config.num_concepts:
        raise UsageError(
            f"{config.num_concepts} concepts cannot be found in {len(embeddings_ND)} images; "
            "give more images, or a smaller num_concepts"
        )
    centres_KD, assignment_N = k_means(embeddings_ND, config.num_concepts, seed=seed)
    return _codebook(centres_KD, config, seed), assignment_N


def name_codebook(embeddings_ND: Tensor, config: CodebookConfig, *, seed: int) -> Codebook:
    """A codebook that has seen no image: its concepts are names.

    Made once, it protects any corpus by inference alone; a corpus's own codebook is purer.

    Args:
        embeddings_ND: L2-normalised text embeddings of a vocabulary, float32 (N, D).
        config: Groups and cells; there are as many concepts as names.
        seed: Of the patterns.

    Returns:
        A codebook of N concepts.

    Raises:
        UsageError: More than `MAX_CONCEPTS` names.
    """
    check_num_concepts(len(embeddings_ND))
    return _codebook(embeddings_ND, config, seed)


def check_num_concepts(count: int) -> None:
    """Refuse, before the work, more concepts than a tree of them can be held in memory for.

    Raises:
        UsageError: There are more than `MAX_CONCEPTS`.
    """
    if count > MAX_CONCEPTS:
        raise UsageError(
            f"{count:,} concepts are too many: the tree of them would take "
            f"{8 * count**2 / 1e9:.0f} GB of memory; at most {MAX_CONCEPTS:,} are possible"
        )


def _codebook(centres_KD: Tensor, config: CodebookConfig, seed: int) -> Codebook:
    num_centres, embedding_dim = centres_KD.shape
    groups_LK = ward(centres_KD, [min(size, num_centres) for size in config.groups])
    codebook = Codebook(config.model_copy(update={"num_concepts": num_centres}), embedding_dim)
    codebook.centres_KD.copy_(centres_KD)
    codebook.groups_LK.copy_(
        torch.stack([_first_of_each(group_K)[group_K] for group_K in groups_LK])
    )
    codebook.signs_KLrq.copy_(_colour(groups_LK, config.cells, seed))
    return codebook


def _first_of_each(group_K: Tensor) -> Tensor:
    """Index of the first member of each group."""
    count, size = int(group_K.max()) + 1, len(group_K)
    return torch.full((count,), size).scatter_reduce(0, group_K, torch.arange(size), "amin")


# --- patterns --------------------------------------------------------------------------------


def draw_patterns(num_patterns: int, *, seed: int) -> Tensor:
    """Patterns of concepts of which none is like another.

    Args:
        num_patterns: K. There are 256; more come again, each as often as any other.
        seed: Same seed, same patterns.

    Returns:
        float32 (K, 3, h, w), see `Codebook.forward`.
    """
    signs_KLrq = _colour(torch.arange(num_patterns)[None], DEFAULT_CODEBOOK.cells, seed)
    return paint(signs_KLrq.squeeze(1))


def _colour(groups_LK: Tensor, cells: int, seed: int) -> Tensor:
    """Colour the rows of each level by each concept's group there, at random.

    Groups of one group of the level above look different, as long as there are looks. Left mirrors
    right, so an adversary that flips its images still sees one pattern and not two.

    Args:
        groups_LK: Groups at each level, numbered from 0, int64; each level splits the one before.
        cells: A side, a multiple of L.
        seed: Same seed, same colours.

    Returns:
        int8 (K, L, r, q): 1 green, -1 magenta.
    """
    generator = torch.Generator().manual_seed(seed)
    num_levels, num_concepts = groups_LK.shape
    num_rows, half = cells // num_levels, _half(cells)
    parents_K = torch.zeros(num_concepts, dtype=torch.int64)
    levels = []
    for group_K in groups_LK:
        look_K = torch.zeros_like(group_K)
        for parent in torch.unique(parents_K):
            inside = parents_K == parent
            children, child_K = torch.unique(group_K[inside], return_inverse=True)
            looks = torch.randperm(_num_looks(num_rows, cells), generator=generator)
            look_K[inside] = looks[torch.arange(len(children)) % len(looks)][child_K]
        bits = look_K[:, None] >> torch.arange(num_rows * half) & 1
        left_Krq = (2 * bits - 1).view(num_concepts, num_rows, half)
        levels.append(torch.cat([left_Krq, left_Krq[:, :, : cells // 2].flip(2)], dim=2))
        parents_K = group_K
    return torch.stack(levels, dim=1).to(torch.int8)


def paint(signs_Kgg: Tensor, *, smoothing: float = 0.0, green: float = 1.0) -> Tensor:
    """Green and magenta cells of 8x8 values.

    Args:
        signs_Kgg: Cells of each pattern: 1 green, -1 magenta.
        smoothing, green: As in `CodebookConfig`.

    Returns:
        float32 (K, 3, 8 g, 8 g) in [-1, 1]. A blurred pattern is scaled until its largest value is
        1 or -1 again, so that the budget is used.

    Photos vary most in brightness, less between yellow and blue, and least between green and
    magenta. There a cell of eight levels stands out most, and a network finds it in fewer steps
    than any other colours (docs/lab-notebook.md, "Patterns").
    """
    cells_K1hw = F.interpolate(
        signs_Kgg[:, None].float(), scale_factor=PIXELS_PER_CELL, mode="nearest"
    )
    if smoothing:
        cells_K1hw = _blur(cells_K1hw, smoothing * PIXELS_PER_CELL)
    colour_C = torch.tensor([-1.0, green, -1.0])
    return cells_K1hw * colour_C[:, None, None]


def _blur(image_K1hw: Tensor, sigma: float) -> Tensor:
    """Gaussian blur, edges repeated; each image scaled to a largest absolute value of 1."""
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-offsets.square() / (2 * sigma**2))
    kernel /= kernel.sum()
    padded = F.pad(image_K1hw, (radius,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel.view(1, 1, -1, 1))
    blurred = F.conv2d(rows, kernel.view(1, 1, 1, -1))
    return blurred / blurred.abs().amax(dim=(2, 3), keepdim=True)
