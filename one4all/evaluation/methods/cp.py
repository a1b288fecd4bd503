"""CP: contrastive poisoning (He, Zha, Katabi, "Indiscriminate Poisoning Attacks on Unsupervised
Contrastive Learning", ICLR 2023). SimCLR is the victim.

    min over theta and |delta| <= epsilon of the contrastive loss of x + delta

Network and perturbation go downhill together: some steps of the network, then some signed steps of
the perturbation. Class-wise (CP-C) first; sample-wise (CP-S) starts from it, each image with a copy
of its class's, and with a new network.

Departures: views by this package's differentiable augmentation instead of one that matches Pillow;
the released program needs several GPUs, this one none.

Shape suffixes: N images, M classes, B batch, C channels, H W image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from one4all.evaluation.labelled import LabelledImages, Labels
from one4all.evaluation.methods.base import OnFitProgress, make_card, seeded, silent
from one4all.evaluation.methods.contrastive import Learner, LearnerConfig, cosine_schedule
from one4all.evaluation.methods.surrogate import (
    batches,
    check_classes,
    signed_step,
    to_levels,
    uniform_start,
)
from one4all.evaluation.methods.transfer import ClassWise, SampleWise, to_stored
from one4all.perturbation import DEFAULT_EPSILON_LEVELS

PUBLISHED_LEARNER = LearnerConfig(width=64, stem_stride=1, learning_rate=0.5, batch_size=512)


class CpClassConfig(BaseModel):
    """The alternation.

    Attributes:
        learner: The victim.
        epochs: Rounds of the alternation; the learning rate falls to 0 over them.
        warm_up: Epochs of rising learning rate.
        model_steps: Steps of the network in an epoch.
        noise_steps: Batches in an epoch on which the perturbation descends.
        num_steps: Signed steps on each of them.
        step_share: Length of one, as a share of the budget.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    learner: LearnerConfig = LearnerConfig()
    epochs: Annotated[int, Field(ge=1)] = 30
    warm_up: Annotated[int, Field(ge=0)] = 2
    model_steps: Annotated[int, Field(ge=1)] = 10
    noise_steps: Annotated[int, Field(ge=1)] = 10
    num_steps: Annotated[int, Field(ge=1)] = 1
    step_share: Annotated[float, Field(gt=0, le=1)] = 0.1


class CpSampleConfig(CpClassConfig):
    """The second stage; see `CpClassConfig`.

    Attributes:
        class_wise: The first stage.
    """

    class_wise: CpClassConfig = CpClassConfig(epochs=12)
    epochs: Annotated[int, Field(ge=1)] = 5
    noise_steps: Annotated[int, Field(ge=1)] = 20
    num_steps: Annotated[int, Field(ge=1)] = 3


_PUBLISHED_CLASS = CpClassConfig(
    learner=PUBLISHED_LEARNER, epochs=1000, warm_up=10, model_steps=20, noise_steps=20
)
CLASS_PRESETS: dict[str, CpClassConfig] = {
    "default": CpClassConfig(),
    "published": _PUBLISHED_CLASS,
}
SAMPLE_PRESETS: dict[str, CpSampleConfig] = {
    "default": CpSampleConfig(),
    # 98 batches of 512 are the whole of CIFAR-10, as the released default of 1000 amounts to.
    "published": CpSampleConfig(
        class_wise=_PUBLISHED_CLASS,
        learner=PUBLISHED_LEARNER,
        epochs=200,
        warm_up=10,
        model_steps=98,
        noise_steps=98,
        num_steps=5,
    ),
}


def fit_class(
    images: LabelledImages,
    config: CpClassConfig,
    *,
    epsilon_levels: int = DEFAULT_EPSILON_LEVELS,
    seed: int,
    on_progress: OnFitProgress = silent,
    device: str = "cpu",
) -> ClassWise:
    """CP-C: one perturbation per class.

    Args:
        images: Clean images and true labels, which only say who shares a perturbation.
        config: Schedule.
        epsilon_levels: Budget.
        seed: Seed of the start, the network, views and batches.
        on_progress: See `OnFitProgress`.
        device: PyTorch device.

    Raises:
        UsageError: Only one class.
    """
    check_classes(images, "cp_class")
    with seeded(seed):
        patterns, record = _class_stage(images, config, epsilon_levels, seed, on_progress, device)
    card = make_card(
        ClassWise,
        "cp_class",
        images,
        config,
        epsilon_levels=epsilon_levels,
        seed=seed,
        record=record,
    )
    return ClassWise(card, patterns.permute(0, 2, 3, 1).contiguous().numpy())


def fit_sample(
    images: LabelledImages,
    config: CpSampleConfig,
    *,
    epsilon_levels: int = DEFAULT_EPSILON_LEVELS,
    seed: int,
    on_progress: OnFitProgress = silent,
    device: str = "cpu",
) -> SampleWise:
    """CP-S: one perturbation per image, after a class-wise stage.

    Args, raises: As `fit_class`.
    """
    check_classes(images, "cp_sample")

    def first_half(share: float, message: str) -> None:
        on_progress(share / 2, f"class-wise, {message}")

    def second_half(share: float, message: str) -> None:
        on_progress(0.5 + share / 2, f"sample-wise, {message}")

    with seeded(seed):
        patterns, _ = _class_stage(
            images, config.class_wise, epsilon_levels, seed, first_half, device
        )
        start = patterns[torch.from_numpy(images.labels_N)]
        each = np.arange(len(images))
        deltas, record = _alternate(
            images, start, each, config, epsilon_levels, seed + 1, second_half, device
        )
    card = make_card(
        SampleWise,
        "cp_sample",
        images,
        config,
        epsilon_levels=epsilon_levels,
        seed=seed,
        record=record,
    )
    return SampleWise(card, to_stored(deltas.numpy()), images.labels_N)


def _class_stage(
    images: LabelledImages,
    config: CpClassConfig,
    epsilon: int,
    seed: int,
    on_progress: OnFitProgress,
    device: str,
) -> tuple[Tensor, dict[str, float]]:
    start = uniform_start((images.num_classes, 3, *images.images_NHWC.shape[1:3]), epsilon)
    return _alternate(images, start, images.labels_N, config, epsilon, seed, on_progress, device)


def _alternate(
    images: LabelledImages,
    deltas: Tensor,
    owner_N: Labels,
    config: CpClassConfig,
    epsilon: int,
    seed: int,
    on_progress: OnFitProgress,
    device: str,
) -> tuple[Tensor, dict[str, float]]:
    """Descend network and perturbations in turns.

    Args:
        deltas: Start, (K, 3, H, W) in levels; on the CPU.
        owner_N: Which of the K perturbations each image carries.

    Returns:
        Perturbations as ``deltas``, and the last losses before and after the noise steps.
    """
    on = torch.device(device)
    learner = Learner(config.learner, on)
    schedule = cosine_schedule(learner.optimizer, epochs=config.epochs, warm_up=config.warm_up)
    order = batches(len(images), config.learner.batch_size, np.random.default_rng(seed))
    owners = torch.from_numpy(owner_N)
    model_loss = noise_loss = 0.0
    for epoch in range(1, config.epochs + 1):
        for _ in range(config.model_steps):
            batch = next(order)
            delta = deltas[owners[batch]].to(on)
            model_loss = learner.step(to_levels(images.images_NHWC[batch], on) + delta)
        schedule.step()
        learner.train(False)
        learner.project.requires_grad_(False)
        for _ in range(config.noise_steps):
            batch = next(order)
            clean = to_levels(images.images_NHWC[batch], on)
            # Only the perturbations of this batch: of N, they are few when each image has its own.
            used, place = torch.unique(owners[batch], return_inverse=True)
            shared = deltas[used].to(on)
            for _ in range(config.num_steps):
                shared, noise_loss = _descend(
                    learner.loss,
                    clean,
                    shared,
                    place.to(on),
                    step=config.step_share * epsilon,
                    epsilon=epsilon,
                )
            deltas[used] = shared.cpu()
        learner.project.requires_grad_(True)
        on_progress(
            epoch / config.epochs,
            f"epoch {epoch}: loss {model_loss:.3f} of the network, {noise_loss:.3f} of the noise",
        )
    return deltas, {"model_loss": model_loss, "noise_loss": noise_loss}


def _descend(
    loss_of: Callable[[Tensor], Tensor],
    clean: Tensor,
    shared: Tensor,
    place: Tensor,
    *,
    step: float,
    epsilon: float,
) -> tuple[Tensor, float]:
    """One step of the perturbations that a batch carries, and the loss before it."""
    shared = shared.detach().requires_grad_()
    loss = loss_of(clean + shared[place])
    (gradient,) = torch.autograd.grad(loss, shared)
    moved = signed_step(shared.detach(), gradient, step=step, epsilon=epsilon)
    return moved, float(loss.detach())
