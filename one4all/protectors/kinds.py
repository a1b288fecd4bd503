"""The kinds of protector there are. A new one is a module of its own, its settings, a line here.

No model is loaded before it is asked for: to read a card, nobody waits for PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from one4all.protectors.config import GENERATOR_PRESETS, CodebookConfig, GeneratorConfig

if TYPE_CHECKING:
    from one4all.protectors.model import PerturbationModel


@dataclass(frozen=True)
class Kind:
    """One kind of protector.

    Attributes:
        config_type: Class of its configuration.
        load_model: Loads the class of its model.
        tensors: Names of a model's tensors, if they are the same for every configuration.
        presets: Configurations that have a name.
    """

    config_type: type[BaseModel]
    load_model: Callable[[], type[PerturbationModel]]
    tensors: frozenset[str] = frozenset()
    presets: Mapping[str, BaseModel] = field(default_factory=dict)


def _generator() -> type[PerturbationModel]:
    from one4all.protectors.generator import Generator

    return Generator


def _codebook() -> type[PerturbationModel]:
    from one4all.protectors.codebook import Codebook

    return Codebook


KINDS = {
    "generator": Kind(GeneratorConfig, _generator, presets=GENERATOR_PRESETS),
    "codebook": Kind(
        CodebookConfig, _codebook, frozenset(("mean_D", "axes_DP", "centres_KP", "bits_Kb"))
    ),
}

# Cards of these were written before cards named their kind.
UNNAMED_KINDS = ("generator", "codebook")


def kind_of(config: object) -> str:
    """Name of the kind that a configuration is of; "" if it is of none.

    Args:
        config: A configuration, or the mapping of one in a card that names no kind.
    """
    if isinstance(config, dict):
        return "codebook" if "num_concepts" in config else "generator"
    return next((name for name, kind in KINDS.items() if type(config) is kind.config_type), "")


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
    return KINDS[kind_of(config)].load_model()(config, embedding_dim)


def tensor_names(config: BaseModel) -> frozenset[str]:
    """Names of the tensors of a model; of a generator, that takes PyTorch."""
    if known := KINDS[kind_of(config)].tensors:
        return known
    import torch

    with torch.device("meta"):  # names do not depend on the encoder's width
        return frozenset(build_model(config, embedding_dim=1).state_dict())
