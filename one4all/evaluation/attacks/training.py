"""Attacks in the training loop: each is a loss of one batch.

A loss takes the network, images as float levels 0..255 (B, C, H, W), labels (B,) int64 and a NumPy
generator for all its draws; it returns the scalar to descend on.

Shape suffixes: B batch, C channels, H W image, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[nn.Module, Tensor, Tensor, np.random.Generator], Tensor]


@dataclass(frozen=True)
class TrainingAttack:
    """Another loss for the adversary.

    Attributes:
        name: In `one4all.evaluation.attacks.ATTACKS`.
        description: Line for reports.
        loss: See the module.
    """

    name: str
    description: str
    loss: Loss = field(repr=False, compare=False)


# --- mixing ----------------------------------------------------------------------------------


def mixup_loss(
    network: nn.Module, image_BCHW: Tensor, label_B: Tensor, random: np.random.Generator
) -> Tensor:
    """Each image blended with another of the batch, and their labels alike.

    The share of the first is drawn from Beta(1, 1), once a batch. Source: Zhang et al. 2018. The
    released code of 14A blends an image with its own colour channels instead, which is not mixup.
    """
    share, other = float(random.beta(1, 1)), _partners(image_BCHW, random)
    mixed = share * image_BCHW + (1 - share) * image_BCHW[other]
    logits: Tensor = network(mixed)
    return F.cross_entropy(logits, soft_labels(label_B, label_B[other], share, logits.shape[1]))


def cutmix_loss(
    network: nn.Module, image_BCHW: Tensor, label_B: Tensor, random: np.random.Generator
) -> Tensor:
    """A rectangle of another image pasted in, labels mixed by area; half of the batches.

    The area that stays is drawn from Beta(1, 1), once a batch; the rectangle, clipped at the edges,
    is at the same place in each image. Source: Yun et al. 2019; ISS and OPA use probability 0.5.
    """
    if random.random() >= 0.5:
        return F.cross_entropy(network(image_BCHW), label_B)
    other = _partners(image_BCHW, random)
    height, width = image_BCHW.shape[-2:]
    side = float(np.sqrt(1 - random.beta(1, 1)))
    rows, columns = _window(height, side, random), _window(width, side, random)
    mixed = image_BCHW.clone()
    mixed[:, :, rows, columns] = image_BCHW[other][:, :, rows, columns]
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    logits: Tensor = network(mixed)
    soft = soft_labels(label_B, label_B[other], 1 - area / (height * width), logits.shape[1])
    return F.cross_entropy(logits, soft)


def cutout_loss(
    network: nn.Module, image_BCHW: Tensor, label_B: Tensor, random: np.random.Generator
) -> Tensor:
    """A gray square of half the side, about a random point of each image, clipped at the edges.

    Source: DeVries and Taylor 2017; 16 pixels at 32 as APBench and ISS, 112 at 224 by scale.
    """
    masked = image_BCHW.clone()
    height, width = image_BCHW.shape[-2:]
    for image in masked:
        image[:, _window(height, 0.5, random), _window(width, 0.5, random)] = 127.5
    return F.cross_entropy(network(masked), label_B)


def soft_labels(first_B: Tensor, second_B: Tensor, share: float, num_classes: int) -> Tensor:
    """Probabilities (B, K): ``share`` for the first label, the rest for the second."""
    first, second = F.one_hot(first_B, num_classes), F.one_hot(second_B, num_classes)
    return share * first + (1 - share) * second


def _partners(image_BCHW: Tensor, random: np.random.Generator) -> Tensor:
    return torch.from_numpy(random.permutation(len(image_BCHW))).to(image_BCHW.device)


def _window(length: int, share: float, random: np.random.Generator) -> slice:
    """``share`` of a length about a random point, clipped."""
    centre, reach = int(random.integers(length)), round(length * share) // 2
    return slice(max(0, centre - reach), min(length, centre + reach))


# --- UEraser ---------------------------------------------------------------------------------


def ueraser_loss(
    network: nn.Module,
    image_BCHW: Tensor,
    label_B: Tensor,
    random: np.random.Generator,
    *,
    num_draws: int,
) -> Tensor:
    """Heavy augmentation; of several draws, for each image the one with the largest loss.

    ``ueraser-lite`` is one draw, ``ueraser-max`` five in every epoch. Source: Qin et al. 2023
    (UEraser). Departure: the draws are compared without gradients and the network then runs
    once more on the worst, which costs half as much as a gradient through all; batch norm sees
    them all, as there. `erase` says what is drawn.
    """
    draws = [erase(image_BCHW, random) for _ in range(num_draws)]
    if num_draws == 1:
        return F.cross_entropy(network(draws[0]), label_B)
    with torch.no_grad():
        losses = [F.cross_entropy(network(draw), label_B, reduction="none") for draw in draws]
    worst_B = torch.stack(losses).argmax(dim=0)
    chosen = torch.stack(draws)[worst_B, torch.arange(len(worst_B), device=worst_B.device)]
    return F.cross_entropy(network(chosen), label_B)


def erase(image_BCHW: Tensor, random: np.random.Generator) -> Tensor:
    """One draw of UEraser's augmentation; float levels 0..255, same shape.

    1. Plasma brightness: plus a map of -1..1 times 255 times an intensity of 0.5 to 1.
    2. Plasma contrast: the distance to mid-gray times a map of 0..4.
    3. Channels shuffled in half of the images.
    4. TrivialAugment (Mueller and Hutter 2021), torchvision's wide one, for each image.

    The maps are `plasma` of roughness 0.3 to 0.7. Source: Qin et al. 2023; kornia's diamond-square
    maps and its TrivialAugment are approximated. Runs on the CPU, image by image, for step 4.
    """
    image = image_BCHW.cpu() / 255
    size, count = image.shape[-1], len(image)
    intensity = torch.from_numpy(random.uniform(0.5, 1, (count, 1, 1, 1)).astype(np.float32))
    image = (image + (2 * plasma(count, size, random) - 1) * intensity).clamp(0, 1)
    image = ((image - 0.5) * 4 * plasma(count, size, random) + 0.5).clamp(0, 1)
    order = np.tile(np.arange(3), (count, 1))
    shuffled = random.random(count) < 0.5
    order[shuffled] = random.permuted(order[shuffled], axis=1)
    image = image[torch.arange(count)[:, None], torch.from_numpy(order)]
    pixels = (image * 255).round().to(torch.uint8)
    return _trivial_augment(pixels, random).float().to(image_BCHW)


def plasma(count: int, size: int, random: np.random.Generator) -> Tensor:
    """Fractal noise: octaves of smooth noise, each finer one weaker by the roughness.

    Args:
        count: Number of maps.
        size: Side in pixels.
        random: Draws a roughness of 0.3 to 0.7 for each map, and the noise.

    Returns:
        float32 (count, 1, size, size); each map spans 0 to 1.
    """
    roughness = torch.from_numpy(random.uniform(0.3, 0.7, (count, 1, 1, 1)).astype(np.float32))
    total = torch.zeros(count, 1, size, size)
    cells, octave = 2, 0
    while cells < 2 * size:
        side = min(cells + 1, size)
        draw = random.standard_normal((count, 1, side, side), dtype=np.float32)
        noise = F.interpolate(
            torch.from_numpy(draw), (size, size), mode="bilinear", align_corners=True
        )
        total += roughness**octave * noise
        cells, octave = 2 * cells, octave + 1
    low, high = total.amin(dim=(2, 3), keepdim=True), total.amax(dim=(2, 3), keepdim=True)
    return (total - low) / (high - low).clamp(min=1e-6)


def _trivial_augment(pixels_BCHW: Tensor, random: np.random.Generator) -> Tensor:
    """torchvision draws from torch's global generator: lent a state of ours, and restored."""
    from torchvision.transforms import TrivialAugmentWide

    transform: Any = TrivialAugmentWide()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(random.integers(2**62)))
        return torch.stack([transform(image) for image in pixels_BCHW])


# --- adversarial training --------------------------------------------------------------------


def adversarial_loss(
    network: nn.Module,
    image_BCHW: Tensor,
    label_B: Tensor,
    random: np.random.Generator,
    *,
    epsilon_levels: float,
    num_steps: int = 10,
) -> Tensor:
    """The loss on adversarial examples found by `pgd`. Source: Madry et al. 2018."""
    attacked = pgd(
        network, image_BCHW, label_B, random, epsilon_levels=epsilon_levels, num_steps=num_steps
    )
    return F.cross_entropy(network(attacked), label_B)


def pgd(
    network: nn.Module,
    image_BCHW: Tensor,
    label_B: Tensor,
    random: np.random.Generator,
    *,
    epsilon_levels: float,
    num_steps: int = 10,
) -> Tensor:
    """Projected gradient ascent on the cross-entropy, with the network in evaluation mode.

    Args:
        network: Left in the mode it was in; its weights get no gradient.
        image_BCHW: Float levels 0..255.
        label_B: Labels.
        random: Source of the start, uniform within the budget.
        epsilon_levels: L-infinity budget in levels of 255; a step is a quarter of it.
        num_steps: 10 in APBench and ISS.

    Returns:
        Float levels 0..255, within the budget of ``image_BCHW``.
    """
    was_training = network.training
    network.eval()
    low = (image_BCHW - epsilon_levels).clamp(min=0)
    high = (image_BCHW + epsilon_levels).clamp(max=255)
    start = random.uniform(-epsilon_levels, epsilon_levels, image_BCHW.shape).astype(np.float32)
    attacked = torch.clamp(image_BCHW + torch.from_numpy(start).to(image_BCHW), low, high)
    for _ in range(num_steps):
        attacked.requires_grad_(True)
        loss = F.cross_entropy(network(attacked), label_B)
        (gradient,) = torch.autograd.grad(loss, attacked)
        step = epsilon_levels / 4 * gradient.sign()
        attacked = torch.clamp(attacked.detach() + step, low, high)
    network.train(was_training)
    return attacked


TRAINING_ATTACKS = (
    TrainingAttack("mixup", "mixup, Beta(1, 1)", mixup_loss),
    TrainingAttack("cutmix", "CutMix, Beta(1, 1), half of the batches", cutmix_loss),
    TrainingAttack("cutout", "cutout of half the side", cutout_loss),
    TrainingAttack("ueraser-lite", "UEraser, one draw", partial(ueraser_loss, num_draws=1)),
    TrainingAttack("ueraser-max", "UEraser, worst of five", partial(ueraser_loss, num_draws=5)),
    *(
        TrainingAttack(
            f"adversarial-{levels}",
            f"adversarial training, PGD-10 within {levels} levels",
            partial(adversarial_loss, epsilon_levels=levels),
        )
        for levels in (2, 4, 8)
    ),
)
