"""What a training objective is: from a batch of images and their perturbations to a loss.

Shape suffixes: B batch, C channels, H W image, h w perturbation grid, D embedding width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from one4all.concepts import ConceptBank

Scalars: TypeAlias = dict[str, Tensor | float]
"""Figures of a batch by name, without gradient; a tensor holds one number."""

RESERVED_SCALARS = frozenset(
    {
        "step",
        "epoch",
        "loss",
        "learning_rate",
        "world_size",
        "images_per_second",
        "damaged_shards",
    }
)
"""Names of what is logged for every objective; none may call a scalar of its own so."""


class ObjectiveConfig(BaseModel):
    """Settings of an objective.

    Attributes:
        name: Name of the objective in the registry. A subclass declares the one value that it
            takes, as ``name: Literal["concept"] = "concept"``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str


@dataclass(frozen=True)
class ObjectiveContext:
    """What an objective may use of the training that it belongs to.

    Attributes:
        encode_image: `Encoder.encode_image` of the frozen encoder whose embeddings the generator is
            given; differentiable with respect to the images. The encoder itself is not handed out:
            as an attribute of the objective it would be saved with it.
        embedding_dim: Width D of its embeddings.
        concept_bank: Embeds the vocabulary of the training, for who needs its concepts. Takes
            seconds. Raises ConfigError if that cannot be done.
        working_size: Side in pixels of the images of a batch.
        epsilon_levels: Budget in 8-bit levels.
    """

    encode_image: Callable[[Tensor], Tensor]
    embedding_dim: int
    concept_bank: Callable[[], ConceptBank]
    working_size: int
    epsilon_levels: int


@dataclass(frozen=True)
class TrainingBatch:
    """Images and what the generator made of them; float32 on the scale of 0..1.

    Attributes:
        clean_BCHW: Clean images, (B, 3, H, W), without gradient.
        embedding_BD: Embeddings of the clean images, of unit length, without gradient.
        delta_BChw: Perturbations on the generator's own grid, (B, 3, h, w), within the budget.
        protected_BCHW: Protected images, (B, 3, H, W): clean + resized perturbation, in 0..1.
    """

    clean_BCHW: Tensor
    embedding_BD: Tensor
    delta_BChw: Tensor
    protected_BCHW: Tensor


class Objective(nn.Module, ABC):
    """What a generator is trained for: a loss of a batch, and figures to watch.

    A module, so that an objective may hold networks of its own: their parameters are trained with
    the generator's, by the same optimiser, and its `state_dict`, as it is on rank 0, goes into the
    checkpoints. Random numbers may be drawn from torch's global generator, which the trainer seeds
    anew for each step: a resumed training draws the same.

    Attributes:
        config_type: Class of the settings.
        presets: Settings that have a name.
        bank: Concepts that the protector's card is to name; None if it trains towards none.

    Args:
        config: Settings, of ``config_type``.
        context: What it may use of the training.

    Raises:
        ConfigError: Something that it needs cannot be made.
    """

    config_type: ClassVar[type[ObjectiveConfig]]
    presets: ClassVar[Mapping[str, ObjectiveConfig]] = {}
    bank: ConceptBank | None = None

    def __init__(self, config: ObjectiveConfig, context: ObjectiveContext) -> None:
        super().__init__()

    def check(self) -> None:
        """Refuse settings that cannot work; called once, before any worker starts.

        Raises:
            ConfigError: Settings and context do not fit together.
        """

    @abstractmethod
    def forward(self, batch: TrainingBatch) -> tuple[Tensor, Scalars]:
        """The loss of a batch and its scalars.

        On a GPU this runs within bfloat16 autocast: switch it off where that is too coarse.

        Args:
            batch: Images and perturbations.

        Returns:
            ``(loss, scalars)``: the loss, a scalar with gradient, is minimised; the scalars are
            logged, plotted and shown. Their names are of the objective's choice, but for
            `RESERVED_SCALARS` and what begins with `VALIDATION`.
        """
