"""EMN: error-minimising noise (Huang et al., "Unlearnable Examples", ICLR 2021).

    min over theta of E min over |delta| <= epsilon of CE(f_theta(x + delta), y)

Alternates a few steps of a network from scratch with projected descent of the perturbation, until
the network no longer errs on perturbed images. The perturbation says what the label says, so that
nothing is left to learn from the picture.

Departures: the released code adds the noise to uint8 images and clamps at 0 in a way that drops
every negative value; here they are kept. The surrogate has a 2x2 pooling behind its stem.

Shape suffixes: N images, M classes, B batch, C channels, H W image.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from one4all.evaluation.labelled import LabelledImages
from one4all.evaluation.methods.base import OnFitProgress, make_card, seeded, silent
from one4all.evaluation.methods.surrogate import (
    FULL_RESNET18,
    Index,
    Surrogate,
    SurrogateConfig,
    batches,
    check_classes,
    chunks,
    signed_step,
    to_levels,
    uniform_start,
)
from one4all.evaluation.methods.transfer import ClassWise, SampleWise, to_stored
from one4all.perturbation import DEFAULT_EPSILON_LEVELS


class EmnConfig(BaseModel):
    """The alternation, for both kinds.

    Attributes:
        surrogate: The network. Augmentation "flip_crop" makes perturbations that outlive an
            adversary's: with "none", as in the published preset, they protected CIFAR-10 here from
            an adversary without augmentation only.
        model_steps: SGD steps of a round.
        noise_steps: Descent steps of a round, for each image.
        step_levels: Length of one, in levels.
        stop_error: Training error on perturbed images below which it ends, 0..1.
        max_rounds: It ends after these in any case.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    surrogate: SurrogateConfig = SurrogateConfig(augmentation="flip_crop")
    model_steps: Annotated[int, Field(ge=1)] = 10
    noise_steps: Annotated[int, Field(ge=1)] = 20
    step_levels: Annotated[float, Field(gt=0)] = 0.8
    stop_error: Annotated[float, Field(ge=0, le=1)] = 0.01
    max_rounds: Annotated[int, Field(ge=1)] = 15


class EmnSampleConfig(EmnConfig):
    """One perturbation per image; see `EmnConfig`."""

    noise_steps: Annotated[int, Field(ge=1)] = 10


class EmnClassConfig(EmnConfig):
    """One perturbation per class; see `EmnConfig`.

    Attributes:
        subset: Share of the images that a round of descent looks at, 0..1.
    """

    noise_steps: Annotated[int, Field(ge=1)] = 1
    stop_error: Annotated[float, Field(ge=0, le=1)] = 0.1
    max_rounds: Annotated[int, Field(ge=1)] = 60
    subset: Annotated[float, Field(gt=0, le=1)] = 0.2


SAMPLE_PRESETS: dict[str, EmnSampleConfig] = {
    "default": EmnSampleConfig(),
    "published": EmnSampleConfig(surrogate=FULL_RESNET18, noise_steps=20, max_rounds=1000),
}
CLASS_PRESETS: dict[str, EmnClassConfig] = {
    "default": EmnClassConfig(),
    "published": EmnClassConfig(surrogate=FULL_RESNET18, max_rounds=1000),
}


def fit_sample(
    images: LabelledImages,
    config: EmnSampleConfig,
    *,
    epsilon_levels: int = DEFAULT_EPSILON_LEVELS,
    seed: int,
    on_progress: OnFitProgress = silent,
    device: str = "cpu",
) -> SampleWise:
    """One error-minimising perturbation per image.

    Memory: 12 bytes for each pixel of the corpus.

    Args:
        images: Clean images and true labels.
        config: Schedule.
        epsilon_levels: Budget.
        seed: Seed of the start, the network, the order of batches.
        on_progress: See `OnFitProgress`.
        device: PyTorch device.

    Raises:
        UsageError: Only one class.
    """
    check_classes(images, "emn_sample")
    fit = _Fit(images, config, epsilon_levels, seed, device)
    with seeded(seed):
        surrogate = Surrogate(images.num_classes, config.surrogate, fit.device)
        deltas = uniform_start((len(images), 3, *images.images_NHWC.shape[1:3]), epsilon_levels)
        error, rounds = 1.0, 0
        while error > config.stop_error and rounds < config.max_rounds:
            for _ in range(config.model_steps):
                batch = next(fit.order)
                surrogate.step(fit.clean(batch) + deltas[batch].to(fit.device), fit.labels[batch])
            surrogate.model.eval()
            wrong = 0
            for part in chunks(len(images), 256):
                clean, labels = fit.clean(part), fit.labels[part]
                delta = deltas[part].to(fit.device)
                for _ in range(config.noise_steps):
                    delta = fit.descend(surrogate, clean, delta, labels)
                deltas[part] = delta.cpu()
                wrong += int((surrogate.predict(clean + delta) != labels).sum())
            rounds, error = rounds + 1, wrong / len(images)
            on_progress(rounds / config.max_rounds, f"round {rounds}: training error {error:.3f}")
    card = make_card(
        SampleWise,
        "emn_sample",
        images,
        config,
        epsilon_levels=epsilon_levels,
        seed=seed,
        record={"rounds": rounds, "training_error": error},
    )
    return SampleWise(card, to_stored(deltas.numpy()), images.labels_N)


def fit_class(
    images: LabelledImages,
    config: EmnClassConfig,
    *,
    epsilon_levels: int = DEFAULT_EPSILON_LEVELS,
    seed: int,
    on_progress: OnFitProgress = silent,
    device: str = "cpu",
) -> ClassWise:
    """One error-minimising perturbation per class: the mean over its images of their own steps.

    Args, raises: As `fit_sample`.
    """
    check_classes(images, "emn_class")
    fit = _Fit(images, config, epsilon_levels, seed, device)
    num_seen = max(1, round(config.subset * len(images)))
    with seeded(seed):
        surrogate = Surrogate(images.num_classes, config.surrogate, fit.device)
        shape = (images.num_classes, 3, *images.images_NHWC.shape[1:3])
        patterns = uniform_start(shape, epsilon_levels).to(fit.device)
        error, rounds = 1.0, 0
        while error > config.stop_error and rounds < config.max_rounds:
            for _ in range(config.model_steps):
                batch = next(fit.order)
                labels = fit.labels[batch]
                surrogate.step(fit.clean(batch) + patterns[labels], labels)
            surrogate.model.eval()
            total = torch.zeros_like(patterns)
            count = torch.zeros(images.num_classes, device=fit.device)
            seen = fit.random.permutation(len(images))[:num_seen]
            for part in chunks(num_seen, 256):
                clean, labels = fit.clean(seen[part]), fit.labels[seen[part]]
                delta = patterns[labels]
                for _ in range(config.noise_steps):
                    delta = fit.descend(surrogate, clean, delta, labels)
                total.index_add_(0, labels, delta)
                count.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float32))
            present = count > 0
            patterns[present] = total[present] / count[present][:, None, None, None]
            wrong = sum(
                int((surrogate.predict(fit.clean(seen[part]) + patterns[y]) != y).sum())
                for part in chunks(num_seen, 256)
                for y in (fit.labels[seen[part]],)
            )
            rounds, error = rounds + 1, wrong / num_seen
            on_progress(rounds / config.max_rounds, f"round {rounds}: training error {error:.3f}")
    card = make_card(
        ClassWise,
        "emn_class",
        images,
        config,
        epsilon_levels=epsilon_levels,
        seed=seed,
        record={"rounds": rounds, "training_error": error},
    )
    return ClassWise(card, patterns.permute(0, 2, 3, 1).contiguous().cpu().numpy())


class _Fit:
    """What both kinds hold during a fit."""

    def __init__(
        self, images: LabelledImages, config: EmnConfig, epsilon: int, seed: int, device: str
    ) -> None:
        self.device = torch.device(device)
        self.random = np.random.default_rng(seed)
        self.order = batches(len(images), config.surrogate.batch_size, self.random)
        self.labels = torch.from_numpy(images.labels_N).to(self.device)
        self._images = images
        self._step, self._epsilon = config.step_levels, epsilon

    def clean(self, index: slice | Index) -> Tensor:
        return to_levels(self._images.images_NHWC[index], self.device)

    def descend(self, surrogate: Surrogate, clean: Tensor, delta: Tensor, labels: Tensor) -> Tensor:
        """One step of each image's perturbation towards a smaller loss."""
        delta = delta.detach().requires_grad_()
        loss = F.cross_entropy(surrogate.logits(clean + delta), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, delta)
        return signed_step(delta.detach(), gradient, step=self._step, epsilon=self._epsilon)
