"""TAP: targeted adversarial poisoning (Fowl et al., "Adversarial Examples Make Strong Poisons",
NeurIPS 2021).

    min over |delta| <= epsilon of CE(f(x + delta), (y + 1) mod C)

against a network trained on the clean corpus, by projected gradient descent with restarts. The
perturbation carries true features of the next class under the old label.

Departures: the network is trained here, from scratch (the released code loads one); of several
restarts the best is kept for each image, not for each batch.

Shape suffixes: N images, B batch, C channels, H W image.
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
    Surrogate,
    SurrogateConfig,
    batches,
    check_classes,
    chunks,
    signed_step,
    to_levels,
    uniform_start,
)
from one4all.evaluation.methods.transfer import SampleWise, to_stored
from one4all.perturbation import DEFAULT_EPSILON_LEVELS


class TapConfig(BaseModel):
    """Surrogate and attack.

    Attributes:
        surrogate: The network that is attacked.
        epochs: It trains for these on the clean corpus, with a cosine schedule to 0.
        iterations: Descent steps of one restart.
        restarts: Random starts for each image; the one with the smallest loss is kept.
        step_share: Length of a step as a share of the budget.
        augment_attack: Attack under the surrogate's augmentation too: weaker, but what it finds
            outlives an adversary's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    surrogate: SurrogateConfig = SurrogateConfig(augmentation="flip_crop")
    epochs: Annotated[int, Field(ge=1)] = 25
    iterations: Annotated[int, Field(ge=1)] = 30
    restarts: Annotated[int, Field(ge=1)] = 1
    step_share: Annotated[float, Field(gt=0, le=1)] = 0.1
    augment_attack: bool = False


PRESETS: dict[str, TapConfig] = {
    "default": TapConfig(),
    "published": TapConfig(
        surrogate=FULL_RESNET18.model_copy(update={"augmentation": "flip_crop"}),
        epochs=40,
        iterations=250,
        restarts=8,
        step_share=0.05,
    ),
}


def fit(
    images: LabelledImages,
    config: TapConfig,
    *,
    epsilon_levels: int = DEFAULT_EPSILON_LEVELS,
    seed: int,
    on_progress: OnFitProgress = silent,
    device: str = "cpu",
) -> SampleWise:
    """One targeted adversarial perturbation per image.

    Args:
        images: Clean images and true labels.
        config: Schedule.
        epsilon_levels: Budget.
        seed: Seed of the network, the order of batches, the starts.
        on_progress: See `OnFitProgress`.
        device: PyTorch device.

    Raises:
        UsageError: Only one class.
    """
    check_classes(images, "tap")
    on = torch.device(device)
    labels = torch.from_numpy(images.labels_N).to(on)
    targets = (labels + 1) % images.num_classes
    deltas = np.empty((len(images), 3, *images.images_NHWC.shape[1:3]), np.float32)
    hits = 0
    with seeded(seed):
        surrogate = _train(images, labels, config, seed, on, on_progress)
        accuracy = _hits(surrogate, images, labels, on) / len(images)
        surrogate.model.eval().requires_grad_(False)
        for part in chunks(len(images), 256):
            clean = to_levels(images.images_NHWC[part], on)
            delta = _attack(surrogate, clean, targets[part], config, float(epsilon_levels))
            deltas[part] = delta.cpu().numpy()
            hits += int((surrogate.predict(clean + delta.round()) == targets[part]).sum())
            on_progress(
                0.5 + 0.5 * part.stop / len(images), f"{part.stop} images, {hits} on target"
            )
    card = make_card(
        SampleWise,
        "tap",
        images,
        config,
        epsilon_levels=epsilon_levels,
        seed=seed,
        record={"surrogate_accuracy": accuracy, "on_target": hits / len(images)},
    )
    return SampleWise(card, to_stored(deltas), images.labels_N)


def _train(
    images: LabelledImages,
    labels: Tensor,
    config: TapConfig,
    seed: int,
    device: torch.device,
    on_progress: OnFitProgress,
) -> Surrogate:
    surrogate = Surrogate(images.num_classes, config.surrogate, device)
    order = batches(len(images), config.surrogate.batch_size, np.random.default_rng(seed))
    steps = max(1, len(images) // config.surrogate.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        surrogate.optimizer, config.epochs * steps
    )
    for epoch in range(1, config.epochs + 1):
        losses = []
        for _ in range(steps):
            batch = next(order)
            clean = to_levels(images.images_NHWC[batch], device)
            losses.append(surrogate.step(clean, labels[batch]))
            schedule.step()
        on_progress(
            0.5 * epoch / config.epochs, f"surrogate, epoch {epoch}: loss {np.mean(losses):.3f}"
        )
    return surrogate


def _hits(
    surrogate: Surrogate, images: LabelledImages, labels: Tensor, device: torch.device
) -> int:
    return sum(
        int((surrogate.predict(to_levels(images.images_NHWC[p], device)) == labels[p]).sum())
        for p in chunks(len(images), 256)
    )


def _attack(
    surrogate: Surrogate, clean: Tensor, targets: Tensor, config: TapConfig, epsilon: float
) -> Tensor:
    """Perturbations (B, 3, H, W) in levels towards ``targets``, the best of all restarts."""

    def logits(levels: Tensor) -> Tensor:
        return surrogate.logits(levels, augment=config.augment_attack)

    best = torch.zeros_like(clean)
    smallest = clean.new_full((len(clean),), float("inf"))
    for _ in range(config.restarts):
        delta = uniform_start(tuple(clean.shape), epsilon).to(clean.device)
        for _ in range(config.iterations):
            delta.requires_grad_()
            loss = F.cross_entropy(logits(clean + delta), targets, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, delta)
            delta = signed_step(
                delta.detach(), gradient, step=config.step_share * epsilon, epsilon=epsilon
            )
        with torch.no_grad():
            final = F.cross_entropy(logits(clean + delta), targets, reduction="none")
        better = final < smallest
        best[better], smallest[better] = delta[better], final[better]
    return best
