"""The compared methods and controls, by name.

for name, method in METHODS.items(): ...
fitted = find_method("emn_sample").fit(train, preset="default", seed=0)
fitted.save(folder);  load_fitted(folder)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

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
    released,
    tap,
    tue,
    unlearnable_clusters,
)
from one4all.evaluation.methods.base import FittedMethod, Progress, read_fitted, silent
from one4all.evaluation.methods.clusters import ClusterWise
from one4all.evaluation.methods.transfer import ClassWise, SampleWise
from one4all.perturbation import DEFAULT_EPSILON_LEVELS


@dataclass(frozen=True)
class Method:
    """One compared method or control.

    Attributes:
        name: Key in `METHODS`.
        kind: "method", or "control": evidence about the bench and not a way to protect.
        needs_labels: It reads the labels of what it protects.
        within_budget: Its perturbations obey the budget; the integer rule sees to that.
        presets: Configurations by name; all have "default", which takes a minute or two on one core
            for some thousand images of 32 to 64 pixels, and those with a published schedule have
            "published", which needs a GPU.
    """

    name: str
    kind: str
    needs_labels: bool
    within_budget: bool
    presets: Mapping[str, BaseModel]
    function: Callable[..., FittedMethod]

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
        on_progress: Progress = silent,
        device: str = "cpu",
    ) -> FittedMethod:
        """Fit on a corpus.

        Args:
            images: Clean images; labels are read if ``needs_labels``.
            config: A configuration of this method; else that of ``preset``.
            preset: Name in ``presets``.
            epsilon_levels: Budget, 1..127 levels of 8 bits.
            seed: Of everything that is drawn. Same seed, same result on one machine.
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
        #      name                      kind     labels budget presets
        Method("emn_sample",             "method", True,  True, emn.SAMPLE_PRESETS, emn.fit_sample),
        Method("emn_class",              "method", True,  True, emn.CLASS_PRESETS, emn.fit_class),
        Method("tap",                    "method", True,  True, tap.PRESETS, tap.fit),
        Method("cp_sample",              "method", True,  True, cp.SAMPLE_PRESETS, cp.fit_sample),
        Method("cp_class",               "method", True,  True, cp.CLASS_PRESETS, cp.fit_class),
        Method("tue",                    "method", True,  True, tue.PRESETS, tue.fit),
        Method("lsp",                    "method", True,  True, lsp.PRESETS, lsp.fit),
        Method("ar",                     "method", True,  True, ar.PRESETS, ar.fit),
        Method("unlearnable_clusters",   "method", False, True,
               unlearnable_clusters.PRESETS, unlearnable_clusters.fit),
        Method("codebook",               "method", False, True, codebook.PRESETS, codebook.fit),
        Method("clean",                  "control", False, True,
               _one(controls.ControlConfig()), controls.fit_clean),
        Method("constant",               "control", False, True,
               _one(controls.PatternConfig()), controls.fit_constant),
        Method("uniform_noise",          "control", False, True,
               _one(controls.ControlConfig()), controls.fit_uniform_noise),
        Method("sign_noise",             "control", False, True,
               _one(controls.ControlConfig()), controls.fit_sign_noise),
        Method("untrained_generator",    "control", False, True,
               _one(released.UntrainedGeneratorConfig()), released.fit_untrained_generator),
        Method("class_oracle",           "control", True,  True,
               _one(controls.PatternConfig()), controls.fit_class_oracle),
        Method("concept_oracle",         "control", True,  True,
               _one(controls.ConceptOracleConfig()), controls.fit_concept_oracle),
        Method("released_l2",            "control", False, False,
               _one(released.ReleasedL2Config()), released.fit_released_l2),
        Method("released_preprocessing", "control", False, False,
               _one(controls.ControlConfig()), released.fit_released_preprocessing),
    )
}
# fmt: on

_KINDS: dict[str, type[FittedMethod]] = {
    kind.__name__: kind
    for kind in (
        ClassWise,
        SampleWise,
        ClusterWise,
        codebook.CodebookWise,
        lsp.LinearSeparable,
        ar.Autoregressive,
        controls.Constant,
        controls.RandomNoise,
        controls.ConceptOracle,
        released.UntrainedGenerator,
        released.ReleasedL2,
        released.ReleasedPreprocessing,
    )
}


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ConfigError: There is none; the message lists all.
    """
    if name not in METHODS:
        raise ConfigError(f"no compared method {name!r}; choose from {', '.join(METHODS)}")
    return METHODS[name]


def load_fitted(folder: Path) -> FittedMethod:
    """What `FittedMethod.save` wrote; its perturbations are the same.

    Raises:
        UsageError: Not a folder of a fitted method, or one of a newer version.
        ProtectorError: It needs an encoder that is not the one installed here.
    """
    card, arrays = read_fitted(folder)
    if card.kind not in _KINDS:
        raise UsageError(f"{folder} holds a {card.kind}, which this version does not know")
    return _KINDS[card.kind].from_arrays(card, arrays)
