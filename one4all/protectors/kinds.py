"""The kinds of protector there are. A new one is a module of its own and a line here."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from one4all.protectors.codebook import Codebook
from one4all.protectors.generator import Generator
from one4all.protectors.model import PerturbationModel

KINDS: dict[str, type[PerturbationModel]] = {model.kind: model for model in (Generator, Codebook)}

# Cards of these were written before cards named their kind.
UNNAMED_KINDS = (Generator.kind, Codebook.kind)


def kind_of(config: object) -> str:
    """Name of the kind that a configuration is of; "" if it is of none.

    Args:
        config: A configuration, or the mapping of one in a card that names no kind.
    """
    if isinstance(config, dict):
        return Codebook.kind if "num_concepts" in config else Generator.kind
    return next((name for name, model in KINDS.items() if type(config) is model.config_type), "")


def parse_config(kind: str, value: Any) -> BaseModel:
    """The configuration of a kind.

    Raises:
        ValueError: No such kind, or a value it does not take.
    """
    if kind not in KINDS:
        raise ValueError(f"no kind of protector {kind!r}, only {', '.join(KINDS)}")
    try:
        return KINDS[kind].config_type.model_validate(value)
    except ValidationError as error:
        problem = error.errors()[-1]
        key = ".".join(map(str, problem["loc"]))
        raise ValueError(f"{key}: {problem['msg']}" if key else problem["msg"]) from error


def build_model(config: BaseModel, embedding_dim: int) -> PerturbationModel:
    """An untrained model of the kind that a configuration is of."""
    return KINDS[kind_of(config)](config, embedding_dim)
