"""Settings of every kind of protector; read without PyTorch, which takes seconds.

`kinds` says which of them belongs to which kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from one4all.encoders.config import EncoderConfig
from one4all.errors import UsageError

# Two networks and 224 pixels: each alone, and 160 pixels, tell concepts apart less well.
DEFAULT_ENCODER = EncoderConfig(model_name="lite0+lite2", input_size=224)
MAX_CONCEPTS = 20_000
_FEWEST_CONCEPTS, _MOST_CONCEPTS = 16, 256  # between which their number is looked for
_IMAGES_PER_CONCEPT = 8  # at least, of concepts whose number is looked for
VALUES_PER_CELL = 8  # of a cell of one colour; stripes have as many for each of their periods


class GeneratorConfig(BaseModel):
    """Architecture of a generator; the defaults are the ``compact`` preset.

    Attributes:
        width: Channels of the first layer; doubled by each downsampling.
        stem_stride: Stride of the first layer; the perturbation grid is input / stem_stride.
        num_downsamplings: Halvings between the stem and the bottleneck.
        num_blocks: Residual blocks at the bottleneck.
        norm: "group" makes the output independent of the rest of the batch, also while training;
            "batch" does so only in eval mode.
        embedding_channels: Project the embedding to this many channels before it is joined; 0 joins
            the embedding itself, as the paper does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: Annotated[int, Field(ge=8, le=256, multiple_of=8)] = 32
    stem_stride: Literal[1, 2, 4] = 2
    num_downsamplings: Annotated[int, Field(ge=0, le=4)] = 2
    num_blocks: Annotated[int, Field(ge=0, le=48)] = 4
    norm: Literal["group", "batch"] = "group"
    embedding_channels: Annotated[int, Field(ge=0, le=1024)] = 128

    @property
    def total_stride(self) -> int:
        """Input sides must be a multiple of this."""
        return int(self.stem_stride * 2**self.num_downsamplings)


GENERATOR_PRESETS: Mapping[str, GeneratorConfig] = {
    "compact": GeneratorConfig(),
    "paper": GeneratorConfig(
        width=64,
        stem_stride=1,
        num_downsamplings=3,
        num_blocks=24,
        norm="batch",
        embedding_channels=0,
    ),
}


class PatternConfig(BaseModel):
    """Look of a pattern. A name of `STRENGTHS` stands for one, too.

    Attributes:
        cells: Cells a side; right mirrors left. Few and large ones are learnt fastest and survive
            resizing (docs/method.md).
        smoothing: Blur, in cells: the standard deviation of a Gaussian. 0 leaves flat cells with
            hard edges, which everybody sees.
        amplitude: Share of the budget that the strongest value of a pattern takes on gray.
        masking: How far the amplitude follows the eye, 0..3. On strong colours it sees a difference
            of colour less, by the weight that CIEDE2000 gives to chroma C: 1 + .045 C. 1 adds as
            much more there, up to the budget; 2 as if C were twice that; 0 adds the same
            everywhere.
        in_place: Share of the photo's own colour that is counted in, 0..1. Where a green cell
            falls on what is green already, less is added; where it falls on magenta, up to twice
            as much, within the budget. So a reader finds the same, and the eye sees less of it.
        stripes: Periods of stripes that a cell has, upright for a bit that is 1 and lying for one
            that is not; they are lighter and darker, in no colour. 0 means cells of one colour.
            What hides a colour (``smoothing``, ``masking``, ``in_place``) does not hide stripes,
            and must be 0 with them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    cells: Annotated[int, Field(ge=1, le=16)] = 4
    smoothing: Annotated[float, Field(ge=0, le=2)] = 0.2
    amplitude: Annotated[float, Field(gt=0, le=1)] = 0.22
    masking: Annotated[float, Field(ge=0, le=3)] = 1.83
    in_place: Annotated[float, Field(ge=0, le=1)] = 1.0
    stripes: Annotated[int, Field(ge=0, le=16)] = 0

    @model_validator(mode="after")
    def _stripes_are_not_hidden(self) -> Self:
        hiding = [name for name in ("smoothing", "masking", "in_place") if getattr(self, name)]
        if self.stripes and hiding:
            raise ValueError(f"{hiding[0]} does not hide stripes: set it to 0, or stripes to 0")
        return self

    @model_serializer(mode="wrap")
    def _without_stripes(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Protectors made before there were stripes keep their content hash."""
        dumped: dict[str, Any] = dump(self)
        if not self.stripes:
            dumped.pop("stripes", None)
        return dumped

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value not in STRENGTHS:
                raise ValueError(no_strength(value))
            return STRENGTHS[value].model_dump()
        return value

    def with_strength(self, strength: str) -> PatternConfig:
        """As many cells in the look of that name. Raises: UsageError if there is none."""
        if strength not in STRENGTHS:
            raise UsageError(no_strength(strength))
        return STRENGTHS[strength].model_copy(update={"cells": self.cells})

    def hard(self) -> PatternConfig:
        """The same cells as everybody sees them: no blur, the whole budget."""
        return self.model_copy(
            update={"smoothing": 0.0, "amplitude": 1.0, "masking": 0.0, "in_place": 0.0}
        )

    @property
    def side(self) -> int:
        """Values a side of a painted pattern."""
        return self.cells * VALUES_PER_CELL * max(1, self.stripes)

    @property
    def num_bits(self) -> int:
        """Cells that differ: left of the middle, and the middle."""
        return self.cells * self.bits_of_a_row

    @property
    def bits_of_a_row(self) -> int:
        """Cells of a row that differ."""
        return -(-self.cells // 2)


# Looks that have a name, the least visible first; measured in docs/results.md.
STRENGTHS: Mapping[str, PatternConfig] = {
    "discreet": PatternConfig(),
    "balanced": PatternConfig(amplitude=0.42),
    "strong": PatternConfig().hard(),
    "gray-proof": PatternConfig(smoothing=0, amplitude=1, masking=0, in_place=0, stripes=5),
}


def no_strength(name: object) -> str:
    """What is said of a name that is none of `STRENGTHS`."""
    return f"no strength {name!r}, only {', '.join(STRENGTHS)}"


class CodebookConfig(BaseModel):
    """Size and look of a codebook.

    Attributes:
        num_concepts: Number K of concepts, at most `MAX_CONCEPTS`; 0 means as many as there seem to
            be kinds of images, from 16 to 256 (`grouping.stable_number`). A codebook of names has
            one for each name, whatever this says.
        directions: Number P of directions of the embedding that are looked at, at most.
        temperature: T above, in squared distance of vectors of unit length. Towards 0, the nearest
            concept decides.
        pattern: Look of a code, or the name of one: discreet, balanced, strong or gray-proof.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_concepts: Annotated[int, Field(ge=0, le=MAX_CONCEPTS)] = 0
    directions: Annotated[int, Field(ge=2, le=1024)] = 64
    temperature: Annotated[float, Field(gt=0, le=1)] = 0.04
    pattern: PatternConfig = PatternConfig()

    def concepts_between(self, num_images: int) -> tuple[int, int]:
        """The least and the largest number of concepts for so many images."""
        if self.num_concepts:
            return self.num_concepts, self.num_concepts
        codes = min(_MOST_CONCEPTS, 1 << self.pattern.num_bits)
        fewest = max(min(_FEWEST_CONCEPTS, codes, num_images // 2), 2)
        return fewest, max(min(codes, num_images // _IMAGES_PER_CONCEPT), fewest)


DEFAULT_CODEBOOK = CodebookConfig()
