"""What a generator is trained for: the objectives, by name.

An objective is a class with settings that bear its name, built once for a training and called on
every batch; see `Objective`. A new one is a file here and a line in `OBJECTIVES`. A configuration
names one of three ways: ``objective: concept``, a preset as in ``objective: paper``, or settings as
in ``objective: {name: concept, num_similar: 3}``, where the name may be left out for the default.
"""

from collections.abc import Mapping
from typing import Annotated

from pydantic import BeforeValidator, SerializeAsAny

from one4all.training.objectives.base import (
    RESERVED_SCALARS,
    Objective,
    ObjectiveConfig,
    ObjectiveContext,
    Scalars,
    TrainingBatch,
)
from one4all.training.objectives.concept import ConceptObjective, ConceptObjectiveConfig

__all__ = [
    "DEFAULT_OBJECTIVE",
    "OBJECTIVES",
    "RESERVED_SCALARS",
    "AnyObjectiveConfig",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveContext",
    "Scalars",
    "TrainingBatch",
    "build_objective",
    "objective_presets",
]

OBJECTIVES: dict[str, type[Objective]] = {
    "concept": ConceptObjective,
}
DEFAULT_OBJECTIVE = ConceptObjectiveConfig()


def build_objective(config: ObjectiveConfig, context: ObjectiveContext) -> Objective:
    """The objective that settings belong to.

    Raises:
        ConfigError: Something that it needs cannot be made.
    """
    return OBJECTIVES[config.name](config, context)


def objective_presets() -> dict[str, ObjectiveConfig]:
    """Settings that have a name, of all objectives."""
    return {name: config for kind in OBJECTIVES.values() for name, config in kind.presets.items()}


def _read(value: object) -> object:
    """Settings of the right class, from a name or a mapping."""
    presets = objective_presets()
    if isinstance(value, str):
        if value in presets:
            return presets[value]
        value = {"name": value}
    if isinstance(value, Mapping):
        name = str(value.get("name", DEFAULT_OBJECTIVE.name))
        if name not in OBJECTIVES:
            raise ValueError(
                f"no objective {name!r}, only {', '.join(sorted(OBJECTIVES))}; presets: "
                f"{', '.join(sorted(presets))}"
            )
        settings = OBJECTIVES[name].config_type
        if unknown := value.keys() - settings.model_fields.keys():
            raise ValueError(
                f"objective {name!r} has no setting {min(map(str, unknown))!r}, only "
                f"{', '.join(settings.model_fields)}"
            )
        return settings.model_validate({**value, "name": name})
    return value


AnyObjectiveConfig = Annotated[SerializeAsAny[ObjectiveConfig], BeforeValidator(_read)]
"""Type of a field that takes the settings of any registered objective."""
