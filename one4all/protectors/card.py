"""The card of a protector: what it is and where it comes from, as JSON that people can read.

No network is loaded here, and no PyTorch for it.
"""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from safetensors import deserialize

from one4all.encoders.config import EncoderConfig
from one4all.errors import NotFoundError, ProtectorError, UsageError
from one4all.perturbation import DEFAULT_EPSILON_LEVELS
from one4all.protectors.config import PatternConfig
from one4all.protectors.kinds import UNNAMED_KINDS, kind_of, parse_config, tensor_names
from one4all.storage import open_storage

CARD = "card.json"
WEIGHTS = "generator.safetensors"
SHIPPED = files("one4all") / "assets" / "protectors"
DEFAULT_PROTECTOR = "default"


class ProtectorCard(BaseModel):
    """What a protector is, and where it comes from.

    Attributes:
        kind: Kind of protector; see `one4all.protectors.kinds`. Cards of before kinds had names
            keep their hash.
        encoder: The frozen encoder it was trained against and must be used with.
        encoder_hash: `Encoder.content_hash` at training.
        golden_embedding: Digest of the embedding of a fixed test image. Catches what a hash of
            weights cannot: another activation, another library version.
        vocabulary, concept_bank_hash: Concepts of the training objective or of a codebook of names,
            and the identity of their text embeddings; empty for a codebook fitted to images.
        generator: Configuration of that kind.
        working_size: Side in pixels of the copy that encoder and generator see.
        epsilon_levels: Budget in 8-bit levels.
        training: Free record: data, steps, seeds, objective, commit, command, final figures.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    name: str
    encoder: EncoderConfig
    encoder_hash: str
    golden_embedding: tuple[float, ...]
    vocabulary: str = ""
    concept_bank_hash: str = ""
    kind: str = ""
    generator: SerializeAsAny[BaseModel]
    working_size: Annotated[int, Field(ge=16, le=2048)]
    epsilon_levels: Annotated[int, Field(ge=1, le=255)] = DEFAULT_EPSILON_LEVELS
    weights_sha256: str = ""
    training: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _named_kind(cls, values: Any) -> Any:
        """Cards did not always name their kind, and who makes one need not."""
        if isinstance(values, dict) and "kind" not in values:
            return {"kind": kind_of(values.get("generator")), **values}
        return values

    @field_validator("generator", mode="wrap")
    @classmethod
    def _of_that_kind(cls, value: Any, _handler: Any, info: ValidationInfo) -> BaseModel:
        return parse_config(info.data.get("kind", ""), value)

    @property
    def content_hash(self) -> str:
        """Identity of the protector: all that determines its output, nothing that does not."""
        unnamed = {"kind"} if self.kind in UNNAMED_KINDS else set()
        content = self.model_dump(exclude={"name", "training", "golden_embedding"} | unnamed)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def with_strength(self, strength: str) -> ProtectorCard:
        """The card of a codebook with the same concepts and codes, and another look.

        Args:
            strength: A name of `STRENGTHS`. Cells stay as many as they are.

        Raises:
            UsageError: There is no such strength, or the protector is no codebook.
        """
        pattern: PatternConfig | None = getattr(self.generator, "pattern", None)
        if pattern is None:
            raise UsageError(
                f"protector {self.name!r} is trained, and has one look; leave out strength "
                f"{strength!r}, or take a codebook"
            )
        changed = {"pattern": pattern.with_strength(strength)}
        return self.model_copy(update={"generator": self.generator.model_copy(update=changed)})


def load_card(protector: str) -> ProtectorCard:
    """The card of a protector, without loading a network. Raises: ProtectorError."""
    try:
        return ProtectorCard.model_validate_json(read_part(protector, CARD))
    except ValidationError as error:
        last = error.errors()[-1]
        what = ": ".join([*map(str, last["loc"][-1:]), last["msg"]])
        if last["type"] == "value_error":  # of a kind's configuration: it names its own key
            what = str(last["ctx"]["error"])
        raise ProtectorError(
            f"{CARD} of protector {protector!r} is damaged, or of another version of one4all "
            f"({what}); copy the folder again, or make the protector again, by "
            "the command in its card"
        ) from error


def check_protector(protector: str) -> ProtectorCard:
    """The card of a protector whose weights are those it describes; no encoder is loaded.

    For whoever starts workers that will load it: what can be known before is known before.

    Raises:
        ProtectorError: Missing, damaged, or of another version.
    """
    card = load_card(protector)
    found = {name for name, _ in deserialize(read_weights(protector, card))}  # type: ignore[no-untyped-call]
    if found != tensor_names(card.generator):
        raise other_tensors(protector)
    return card


def read_weights(protector: str, card: ProtectorCard) -> bytes:
    """The file of weights that a card describes. Raises: ProtectorError if it is another one."""
    weights = read_part(protector, WEIGHTS)
    if hashlib.sha256(weights).hexdigest() != card.weights_sha256:
        raise ProtectorError(
            f"{WEIGHTS} of protector {protector!r} is not the file its card describes; copy the "
            "folder again"
        )
    return weights


def other_tensors(protector: str) -> ProtectorError:
    """The error of weights that are not those of the model that the card describes."""
    return ProtectorError(
        f"{WEIGHTS} of protector {protector!r} holds other tensors than this version of one4all "
        "needs; make the protector again, by the command in its card, or use the version that made "
        "it"
    )


def locate(protector: str) -> str:
    """The name of a shipped protector as it is, or else the absolute URI of the folder."""
    return protector if is_shipped(protector) else open_storage(protector).uri


def is_shipped(protector: str) -> bool:
    return "/" not in protector and (SHIPPED / protector / CARD).is_file()


def read_part(protector: str, name: str) -> bytes:
    """One file of a protector, wherever it lives."""
    if is_shipped(protector):
        return (SHIPPED / protector / name).read_bytes()
    try:
        return open_storage(protector).read_bytes(name)
    except NotFoundError as error:
        known = sorted(entry.name for entry in SHIPPED.iterdir()) if SHIPPED.is_dir() else []
        raise ProtectorError(
            f"no protector at {protector!r} ({name} is missing); give a folder, an s3:// URI, or "
            f"one of {', '.join(known)}"
        ) from error
