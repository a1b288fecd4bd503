"""The compared methods and controls, by name.

for name, method in METHODS.items(): ...
fitted = find_method("emn_sample").fit(train, preset="default", seed=0)
protected = fitted.protect(train, own=True, seed=0)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from one4all.errors import ConfigError, UsageError
from one4all.evaluation.labelled import LabelledImages
from one4all.evaluation.methods import (
    ar,
    codebook,
    controls,
    cp,
    emn,
    lsp,
    protectors,
    released,
    stored,
    tap,
    tue,
    unlearnable_clusters,
)
from one4all.evaluation.methods.base import (
    FittedMethod,
    OnFitProgress,
    SavablePerturbations,
    read_fitted,
    silent,
)
from one4all.evaluation.methods.clusters import ClusterWise
from one4all.evaluation.methods.transfer import ClassWise, SampleWise
from one4all.perturbation import DEFAULT_EPSILON_LEVELS

Kind = Literal["method", "negative control", "control"]


def load_perturbations(folder: Path) -> FittedMethod:
    """What `SavablePerturbations.save` wrote; its perturbations are the same.

    Raises:
        UsageError: Not a folder of a fitted method, or one of a newer version.
    """
    card, arrays = read_fitted(folder)
    if card.kind not in _SAVABLE:
        raise UsageError(f"{folder} holds a {card.kind}, which this version does not know")
    return _SAVABLE[card.kind].from_arrays(card, arrays)


def _as_json(config: BaseModel) -> dict[str, Any]:
    return config.model_dump(mode="json")


@dataclass(frozen=True)
class Method:
    """One compared method or control.

    Attributes:
        name: Key in `METHODS`.
        kind: "method"; or else evidence about the bench: "negative control", which cannot protect
            and which a method must beat, or another "control".
        needs_labels: Whether it reads the labels of what it protects.
        needs_fit: Whether it is fitted to a corpus, which takes time and may be another corpus than
            the one that is protected. What is fitted can be saved (`Savable`).
        within_budget: Whether its perturbations obey the budget; the integer rule sees to that.
        presets: Configurations by name; all have "default", which takes a minute or two on one core
            for some thousand images of 32 to 64 pixels, and those with a published schedule have
            "published", which needs a GPU.
        function: See `fit`.
        load: Reads what was saved of a fit; its copies are the same.
        identify: What of a configuration determines the copies, as JSON. Raises a `One4AllError`
            if the configuration names something that is not there.
    """

    name: str
    kind: Kind
    needs_labels: bool
    needs_fit: bool
    within_budget: bool
    presets: Mapping[str, BaseModel]
    function: Callable[..., FittedMethod]
    load: Callable[[Path], FittedMethod] = load_perturbations
    identify: Callable[[Any], dict[str, Any]] = _as_json

    @property
    def config_type(self) -> type[BaseModel]:
        return type(self.presets["default"])

    def fit(
        self,
        images: LabelledImages,
        config: BaseModel | None = None,
        *,
        preset: str = "default",
        epsilon_levels: int = DEFAULT_EPSILON_LEVELS,
        seed: int,
        on_progress: OnFitProgress = silent,
        device: str = "cpu",
    ) -> FittedMethod:
        """Fit on a corpus.

        Args:
            images: Clean images; labels are read if ``needs_labels``.
            config: A configuration of this method; else that of ``preset``.
            preset: Name in ``presets``.
            epsilon_levels: Budget, 1..127 levels of 8 bits.
            seed: Seed of everything that is drawn. Same seed, same result on one machine.
            on_progress: Receives the share that is done and a line about it.
            device: PyTorch device.

        Raises:
            ConfigError: An unknown preset, or the configuration of another method.
            UsageError: The corpus does not suit the method, or the budget is out of range.
        """
        if config is None:
            if preset not in self.presets:
                raise ConfigError(
                    f"{self.name} has no preset {preset!r}; choose from {', '.join(self.presets)}"
                )
            config = self.presets[preset]
        if type(config) is not self.config_type:
            raise ConfigError(
                f"{self.name} takes a {self.config_type.__name__}, not a {type(config).__name__}"
            )
        return self.function(
            images,
            config,
            epsilon_levels=epsilon_levels,
            seed=seed,
            on_progress=on_progress,
            device=device,
        )


def _one(config: BaseModel) -> dict[str, BaseModel]:
    return {"default": config}


# fmt: off
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        #      name          kind     labels fit    budget presets
        Method("emn_sample",  "method", True,  True,  True, emn.SAMPLE_PRESETS, emn.fit_sample),
        Method("emn_class",   "method", True,  True,  True, emn.CLASS_PRESETS, emn.fit_class),
        Method("tap",         "method", True,  True,  True, tap.PRESETS, tap.fit),
        Method("cp_sample",   "method", True,  True,  True, cp.SAMPLE_PRESETS, cp.fit_sample),
        Method("cp_class",    "method", True,  True,  True, cp.CLASS_PRESETS, cp.fit_class),
        Method("tue",         "method", True,  True,  True, tue.PRESETS, tue.fit),
        Method("lsp",         "method", True,  True,  True, lsp.PRESETS, lsp.fit),
        Method("ar",          "method", True,  True,  True, ar.PRESETS, ar.fit),
        Method("unlearnable_clusters","method", False, True,  True,
               unlearnable_clusters.PRESETS, unlearnable_clusters.fit),
        Method("codebook",    "method", False, True,  True, codebook.PRESETS, codebook.fit,
               load=protectors.FittedProtector.load),
        Method("protector",   "method", False, False, True,
               _one(protectors.ProtectorConfig()), protectors.fit_protector,
               identify=protectors.identify_protector),
        # What a codec added to it is not ours to bound; the report says how far it went.
        Method("corpus",      "method", False, False, False,
               _one(stored.CorpusConfig()), stored.fit),
        Method("clean",       "negative control", False, False, True,
               _one(controls.ControlConfig()), controls.fit_clean),
        Method("constant",    "negative control", False, False, True,
               _one(controls.PatternConfig()), controls.fit_constant),
        Method("uniform_noise","negative control", False, False, True,
               _one(controls.ControlConfig()), controls.fit_uniform_noise),
        Method("sign_noise",  "negative control", False, False, True,
               _one(controls.ControlConfig()), controls.fit_sign_noise),
        Method("untrained_generator","negative control", False, False, True,
               _one(released.UntrainedGeneratorConfig()), released.fit_untrained_generator),
        Method("class_oracle","control", True, False, True,
               _one(controls.PatternConfig()), controls.fit_class_oracle),
        Method("concept_oracle","control", True, False, True,
               _one(controls.ConceptOracleConfig()), controls.fit_concept_oracle),
        Method("released_l2", "control", False, False, False,
               _one(released.ReleasedL2Config()), released.fit_released_l2),
        Method("released_preprocessing","control", False, False, False,
               _one(controls.ControlConfig()), released.fit_released_preprocessing),
    )
}
# fmt: on

_SAVABLE: dict[str, type[SavablePerturbations]] = {
    kind.__name__: kind
    for kind in (ClassWise, SampleWise, ClusterWise, lsp.LinearSeparable, ar.Autoregressive)
}


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ConfigError: There is none; the message lists all.
    """
    if name not in METHODS:
        raise ConfigError(f"no compared method {name!r}; choose from {', '.join(METHODS)}")
    return METHODS[name]
