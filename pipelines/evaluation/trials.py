"""What to evaluate: grids of trials, each trial with a key that names its result.

A *trial* is one adversary, trained with one seed on one copy of one data set. A *copy* is a data
set protected by one method. A *grid* is every combination of a few lists, and becomes one table.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from one4all.encoders import EncoderConfig
from one4all.errors import One4AllError, UsageError
from one4all.evaluation.adversaries import AdversaryConfig, Augmentation
from one4all.evaluation.adversaries import find_preset as find_adversary
from one4all.evaluation.attacks import find_attack
from one4all.evaluation.methods import Method, find_method
from one4all.perturbation import DEFAULT_EPSILON_LEVELS
from pipelines.settings import JobConfig, RayConfig

# Raise this when the same trial would give another result than before.
EVALUATION_VERSION = 3

CLEAN = "clean"
NO_ATTACK = "none"
OWN_LABELS = "own"
_CLUSTERS = "clusters-"

Budget = Annotated[int, Field(ge=1, le=127)]


class DataConfig(JobConfig):
    """A labelled data set; either ``source`` or ``train`` and ``test``.

    Attributes:
        source: Embedded corpus, or ``torchvision:NAME``; its own splits are used.
        root: Where torchvision keeps its files.
        granularity: Granularity of the labels of embedded emoji.
        train, test: Corpora of shards, folders or s3:// prefixes.
        sidecar_patterns: Images in their samples that are no photos, such as ``*.seg.png``: masks,
            depth maps; matched against the last component of the name, as `protect` does.
        size: Side in pixels of what adversaries are trained and tested on: the middle square of
            each image, resized; 0 keeps the size.
        protect_size: Side in pixels at which images are protected, before adversaries resize them
            to ``size``: who publishes photos does not publish thumbnails. 0 protects at ``size``.
        max_train: Take only the first so many training images; 0 takes all.
        class_names: By class index, if the data does not hold them; label-agnostic grids need them.
    """

    source: str = ""
    root: str = ""
    granularity: Literal["coarse", "fine"] = "coarse"
    train: str = ""
    test: str = ""
    sidecar_patterns: tuple[str, ...] = ()
    size: Annotated[int, Field(ge=0, le=1024)] = 0
    protect_size: Annotated[int, Field(ge=0, le=1024)] = 0
    max_train: Annotated[int, Field(ge=0)] = 0
    class_names: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_way(self) -> DataConfig:
        if bool(self.source) == bool(self.train) or bool(self.train) != bool(self.test):
            raise ValueError("give either source, or train and test")
        if self.protect_size and not self.size:
            raise ValueError("protect_size needs size, to which adversaries then resize")
        return self


class MethodConfig(JobConfig):
    """A way to protect, or a control.

    Attributes:
        method: Name in `one4all.evaluation.methods.METHODS`.
        title: Name in tables; default: the method's name.
        preset: Preset of the method's configuration.
        config: Keys of the method's configuration that differ from the preset.
        seed: Seed of the fit and of what is drawn at protection.
    """

    method: str
    title: str = ""
    preset: str = "default"
    config: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0

    @model_validator(mode="after")
    def _is_known(self) -> MethodConfig:
        try:
            presets = self.known.presets
        except One4AllError as error:
            raise ValueError(str(error)) from error
        if self.preset not in presets:
            raise ValueError(
                f"{self.method} has no preset {self.preset!r}; choose from {', '.join(presets)}"
            )
        _ = self.settings
        return self

    @property
    def name(self) -> str:
        return self.title or self.method

    @property
    def known(self) -> Method:
        """The entry in the registry."""
        return find_method(self.method)

    @property
    def settings(self) -> BaseModel:
        """The method's whole configuration: of the preset, and what differs from it."""
        preset = self.known.presets[self.preset].model_dump(mode="json")
        return self.known.config_type.model_validate(preset | self.config)

    def identity(self) -> dict[str, Any]:
        """Whatever determines what it does to images; the title does not.

        Raises:
            UsageError: It names something that is not there.
        """
        try:
            config = self.known.identify(self.settings)
        except One4AllError as error:
            raise UsageError(f"method {self.name!r}: {error}") from error
        return {"method": self.method, "config": config, "seed": self.seed}


def _method(value: object) -> object:
    return {"method": value} if isinstance(value, str) else value


def _adversary(value: object) -> object:
    """An adversary by the name of its preset, or as a preset and what differs from it."""
    try:
        if isinstance(value, str):
            return find_adversary(value)
        if isinstance(value, dict) and "preset" in value:
            value = dict(value)
            return find_adversary(value.pop("preset")).model_dump() | value
    except One4AllError as error:
        raise ValueError(str(error)) from error
    return value


def _attack(name: str) -> str:
    if name != NO_ATTACK:
        try:
            find_attack(name)
        except One4AllError as error:
            raise ValueError(f"{error}; or {NO_ATTACK}") from error
    return name


def _labels(name: str) -> str:
    number = name.removeprefix(_CLUSTERS)
    if name != OWN_LABELS and not (name.startswith(_CLUSTERS) and number.isdigit()):
        raise ValueError(f"labels are {OWN_LABELS!r} or {_CLUSTERS}K, such as {_CLUSTERS}20")
    return name


class GridConfig(JobConfig):
    """One table: every combination of these lists.

    Attributes:
        title, note: Heading and remark in the report.
        rows: Which list goes down the table; the others go across.
        data: Names in `EvaluateConfig.data`.
        fitted_on: Name of the data set on which methods that need a fit are fitted (cross-dataset);
            "" fits each on the data set it protects.
        methods: Ways to protect and controls; a string is a method's name.
        labels: "own", or "clusters-K": class names clustered in text space, the label-agnostic
            scenario. Protection always sees the original labels.
        shares: Share of the training images that are protected; the rest stays clean.
        budgets: In levels of 8 bits; () is the evaluation's.
        attacks: "none", or names in `one4all.evaluation.attacks.ATTACKS`.
        adversaries: By title; a preset's name, a configuration, or a preset and what differs.
        augmentations: Each adversary with each of these; () keeps its own.
        seeds: Seeds of the adversaries.
    """

    title: str
    note: str = ""
    rows: Literal["methods", "attacks", "augmentations", "shares", "budgets"] = "methods"
    data: tuple[str, ...]
    fitted_on: str = ""
    methods: tuple[Annotated[MethodConfig, BeforeValidator(_method)], ...]
    labels: tuple[Annotated[str, BeforeValidator(_labels)], ...] = (OWN_LABELS,)
    shares: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (1.0,)
    budgets: tuple[Budget, ...] = ()
    attacks: tuple[Annotated[str, BeforeValidator(_attack)], ...] = (NO_ATTACK,)
    adversaries: dict[str, Annotated[AdversaryConfig, BeforeValidator(_adversary)]] = Field(
        default_factory=lambda: {"resnet18": AdversaryConfig()}
    )
    augmentations: tuple[Augmentation, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)


class EvaluateConfig(JobConfig):
    """`one4all evaluate`.

    Attributes:
        output: Folder or s3:// prefix of results; the same one resumes.
        data: Data sets by name.
        grids: Tables.
        epsilon_levels: Budget of every method, in levels of 8 bits, where a grid names no other.
        encoder: Encoder whose text space clusters class names, and whose purity is measured.
        diagnose: Titles of methods to diagnose on each data set of the first grid.
        cpus_per_trial, gpus_per_trial: Resources of a trial; below 0 GPUs means 1 if there is any.
        ray: The object store holds the data sets and the copies in use.
    """

    output: str = "runs/evaluate"
    data: dict[str, DataConfig]
    grids: tuple[GridConfig, ...]
    epsilon_levels: Budget = DEFAULT_EPSILON_LEVELS
    encoder: EncoderConfig = EncoderConfig()
    diagnose: tuple[str, ...] = ()
    cpus_per_trial: Annotated[int, Field(ge=1)] = 1
    gpus_per_trial: float = -1
    ray: RayConfig = RayConfig(object_store_bytes=2_000_000_000)

    @model_validator(mode="after")
    def _data_is_there(self) -> EvaluateConfig:
        for grid in self.grids:
            for name in (*grid.data, *([grid.fitted_on] if grid.fitted_on else [])):
                if name not in self.data:
                    raise ValueError(
                        f"grid {grid.title!r} names data set {name!r}; there are "
                        f"{', '.join(self.data)}"
                    )
            names = [method.name for method in grid.methods]
            if len(set(names)) < len(names):
                raise ValueError(f"grid {grid.title!r}: give methods of one name a title each")
        return self


@dataclass(frozen=True)
class Copy:
    """A data set protected by one method.

    Attributes:
        data: Name of the data set.
        data_config, method: What and how.
        method_identity: `MethodConfig.identity`.
        fitted_on, fitted_on_config: Where the method was fitted; "" and None for ``data`` itself.
        epsilon_levels: Budget.
    """

    data: str
    data_config: DataConfig
    method: MethodConfig
    method_identity: dict[str, Any]
    fitted_on: str
    fitted_on_config: DataConfig | None
    epsilon_levels: int

    @cached_property
    def key(self) -> str:
        return _digest(self.identity)

    @property
    def identity(self) -> dict[str, Any]:
        """Whatever determines the copy; titles do not."""
        return {
            "version": EVALUATION_VERSION,
            "data": self.data_config.model_dump(mode="json"),
            "fitted_on": self.fitted_on_config and self.fitted_on_config.model_dump(mode="json"),
            "method": self.method_identity,
            "epsilon_levels": self.epsilon_levels,
        }

    @property
    def title(self) -> str:
        return f"{self.method.name} on {self.data}"


@dataclass(frozen=True)
class Trial:
    """One adversary on one copy.

    ``budget`` is that of its place in the grid: clean copies have one trial for all of them.
    """

    copy: Copy
    labels: str
    share: float
    budget: int
    attack: str
    adversary_name: str
    adversary: AdversaryConfig
    seed: int

    @cached_property
    def key(self) -> str:
        return _digest(self.identity)

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "copy": self.copy.identity,
            "labels": self.labels,
            "share": self.share,
            "attack": self.attack,
            "adversary": self.adversary.model_dump(mode="json"),
            "seed": self.seed,
        }

    @property
    def title(self) -> str:
        parts = [self.copy.method.name, f"on {self.copy.data}", self.adversary_name]
        parts += [self.adversary.augmentation] if self.adversary.augmentation != "none" else []
        parts += [self.attack] if self.attack != NO_ATTACK else []
        return ", ".join([*parts, f"seed {self.seed}"])


def grid_trials(grid: GridConfig, config: EvaluateConfig) -> Iterator[Trial]:
    """Every trial of a grid, those of one copy one after the other."""
    budgets = grid.budgets or (config.epsilon_levels,)
    for data, method, budget in itertools.product(grid.data, grid.methods, budgets):
        # What needs no fit is the same wherever others are fitted.
        fitted_on = grid.fitted_on if method.known.needs_fit and grid.fitted_on != data else ""
        copy = Copy(
            data=data,
            data_config=config.data[data],
            method=method,
            method_identity=method.identity(),
            fitted_on=fitted_on,
            fitted_on_config=config.data[fitted_on] if fitted_on else None,
            # Clean images are the same whatever the budget, and need one trial.
            epsilon_levels=config.epsilon_levels if method.method == CLEAN else budget,
        )
        for labels, share, attack, (name, adversary), seed in itertools.product(
            grid.labels, grid.shares, grid.attacks, _augmented(grid), grid.seeds
        ):
            yield Trial(copy, labels, share, budget, attack, name, adversary, seed)


def _augmented(grid: GridConfig) -> list[tuple[str, AdversaryConfig]]:
    """Title and configuration of each adversary with each augmentation."""
    return [
        (name, adversary.model_copy(update={"augmentation": augmentation}))
        for name, adversary in grid.adversaries.items()
        for augmentation in grid.augmentations or (adversary.augmentation,)
    ]


def all_trials(config: EvaluateConfig) -> list[Trial]:
    """The trials of all grids, each once, ordered by copy."""
    trials = {trial.key: trial for grid in config.grids for trial in grid_trials(grid, config)}
    order = {key: index for index, key in enumerate({t.copy.key: None for t in trials.values()})}
    return sorted(trials.values(), key=lambda trial: order[trial.copy.key])


def describe(config: EvaluateConfig) -> str:
    """What an evaluation will do, in lines."""
    trials = all_trials(config)
    lines = [
        f"{grid.title}: {sum(1 for _ in grid_trials(grid, config))} trials, "
        f"{len(grid.methods)} methods on {', '.join(grid.data)}"
        for grid in config.grids
    ]
    num_copies = len({trial.copy.key for trial in trials})
    epochs = sum(trial.adversary.epochs for trial in trials)
    lines.append(
        f"{len(trials)} trials in all, {epochs} epochs of adversaries, {num_copies} copies; "
        f"results in {config.output}"
    )
    return "\n".join(lines)


def num_clusters(labels: str) -> int:
    """K of "clusters-K"; 0 for the data set's own labels."""
    return 0 if labels == OWN_LABELS else int(labels.removeprefix(_CLUSTERS))


def _digest(identity: dict[str, Any]) -> str:
    text = json.dumps(identity, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]
