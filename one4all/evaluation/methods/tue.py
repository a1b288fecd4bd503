"""TUE: transferable unlearnable examples (Ren et al., ICLR 2023).

    min over theta and |delta_i| <= epsilon of  w_ssl * L_contrastive + w_csd * L_CSD

The class-wise separability discriminant L_CSD asks that perturbations of one class are alike and
those of two classes apart; it is what carries over to supervised adversaries and other corpora.

Departures: in the released code sigma is a constant, so that only the distance between classes is
optimised; here gradients flow through both (preset "released_csd" is theirs). Its applied noise is
truncated at +-9 levels; here the budget rule holds. There each view has a perturbation and they are
averaged; here both share it. With ``ssl_weight`` 0, as in the published SimCLR and SimSiam recipes,
perturbations do not depend on the network, so none is trained.

Shape suffixes: N images, B batch, K classes of a batch, P values of a perturbation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.functional import pdist

from one4all.errors import UsageError
from one4all.evaluation.labelled import LabelledImages
from one4all.evaluation.methods.base import OnFitProgress, make_card, seeded, silent
from one4all.evaluation.methods.contrastive import Learner, LearnerConfig
from one4all.evaluation.methods.surrogate import (
    Index,
    batches,
    check_classes,
    signed_step,
    to_levels,
    uniform_start,
)
from one4all.evaluation.methods.transfer import SampleWise, to_stored
from one4all.perturbation import DEFAULT_EPSILON_LEVELS

_SMALL = 1e-5


class TueConfig(BaseModel):
    """The alternation.

    Attributes:
        learner: The contrastive network; "simclr" or "simsiam".
        epochs: Passes over the corpus.
        train_steps: Steps of the network before each pass.
        noise_steps: Signed steps on each batch of a pass.
        step_levels: Length of one, in levels.
        ssl_weight, csd_weight: Weights of the two losses.
        spread_gradient: Whether gradients flow through the spread within classes too. False is what
            the released code does: perturbations then grow to the edge of the budget, while with
            True, once classes are tight, little asks them to grow.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    learner: LearnerConfig = LearnerConfig(optimizer="adam", learning_rate=1e-3, batch_size=512)
    epochs: Annotated[int, Field(ge=1)] = 6
    train_steps: Annotated[int, Field(ge=1)] = 20
    noise_steps: Annotated[int, Field(ge=1)] = 20
    step_levels: Annotated[float, Field(gt=0)] = 0.8
    ssl_weight: Annotated[float, Field(ge=0)] = 0.0
    csd_weight: Annotated[float, Field(gt=0)] = 0.1
    spread_gradient: bool = True


_SIMSIAM = LearnerConfig(
    algorithm="simsiam", width=64, stem_stride=1, learning_rate=0.06, batch_size=512
)
PRESETS: dict[str, TueConfig] = {
    "default": TueConfig(),
    "published": TueConfig(
        learner=LearnerConfig(
            width=64, stem_stride=1, optimizer="adam", learning_rate=1e-3, batch_size=512
        ),
        epochs=40,
    ),
    "released_csd": TueConfig(spread_gradient=False),
    "published_simsiam": TueConfig(learner=_SIMSIAM, epochs=50, train_steps=25),
}


def fit(
    images: LabelledImages,
    config: TueConfig,
    *,
    epsilon_levels: int = DEFAULT_EPSILON_LEVELS,
    seed: int,
    on_progress: OnFitProgress = silent,
    device: str = "cpu",
) -> SampleWise:
    """One transferable perturbation per image.

    Args:
        images: Clean images and true labels.
        config: Schedule.
        epsilon_levels: Budget.
        seed: Seed of the start, the network, views and batches.
        on_progress: See `OnFitProgress`.
        device: PyTorch device.

    Raises:
        UsageError: Only one class.
    """
    check_classes(images, "tue")
    on = torch.device(device)
    random = np.random.default_rng(seed)
    with seeded(seed):
        learner = Learner(config.learner, on) if config.ssl_weight else None
        deltas = uniform_start((len(images), 3, *images.images_NHWC.shape[1:3]), epsilon_levels)
        order = batches(len(images), config.learner.batch_size, random)
        num_batches = -(-len(images) // config.learner.batch_size)
        separability = 0.0
        for epoch in range(1, config.epochs + 1):
            if learner is not None:
                _train(learner, images, deltas, order, config.train_steps, on)
            values = []
            for batch in np.array_split(random.permutation(len(images)), num_batches):
                if len(np.unique(images.labels_N[batch])) < 2:
                    continue
                delta, value = _descend(learner, images, deltas, batch, config, epsilon_levels, on)
                deltas[batch] = delta
                values.append(value)
            separability = float(np.mean(values)) if values else float("nan")
            on_progress(epoch / config.epochs, f"epoch {epoch}: CSD {separability:.4f}")
    card = make_card(
        SampleWise,
        "tue",
        images,
        config,
        epsilon_levels=epsilon_levels,
        seed=seed,
        record={"separability": separability},
    )
    return SampleWise(card, to_stored(deltas.numpy()), images.labels_N)


def class_separability(
    delta_BP: Tensor, labels_B: Tensor, *, spread_gradient: bool = True
) -> Tensor:
    """L_CSD: how far perturbations spread within classes, against how far classes are apart.

    Mean over pairs of classes i != j of ``(sigma_i + sigma_j + 1e-5) / (d_ij + 1e-5)``, where c_k
    is the mean perturbation of class k, sigma_k the mean Euclidean distance to it, and d_ij the
    distance of c_i and c_j. Gradients flow through sigma and d, or d alone.

    Args:
        delta_BP: Flattened perturbations, float (B, P).
        labels_B: int64 (B,).
        spread_gradient: Whether they flow through sigma.

    Returns:
        Scalar, at least 0; small is good.

    Raises:
        UsageError: Fewer than two classes.

    Source: Ren et al. 2023, definition of CSD; the released code detaches sigma.
    """
    classes, place = torch.unique(labels_B, return_inverse=True)
    num_classes = len(classes)
    if num_classes < 2:
        raise UsageError("class separability needs perturbations of at least two classes")
    count = torch.bincount(place, minlength=num_classes).to(delta_BP)
    zeros = delta_BP.new_zeros(num_classes, delta_BP.shape[1])
    centre_KP = zeros.index_add(0, place, delta_BP) / count[:, None]
    away_B = torch.linalg.vector_norm(delta_BP - centre_KP[place], dim=1)
    sigma_K = delta_BP.new_zeros(num_classes).index_add(0, place, away_B) / count
    if not spread_gradient:
        sigma_K = sigma_K.detach()
    first, second = torch.triu_indices(num_classes, num_classes, 1, device=delta_BP.device)
    return ((sigma_K[first] + sigma_K[second] + _SMALL) / (pdist(centre_KP) + _SMALL)).mean()


def _train(
    learner: Learner,
    images: LabelledImages,
    deltas: Tensor,
    order: Iterator[Index],
    steps: int,
    device: torch.device,
) -> None:
    for _ in range(steps):
        batch = next(order)
        learner.step(to_levels(images.images_NHWC[batch], device) + deltas[batch].to(device))


def _descend(
    learner: Learner | None,
    images: LabelledImages,
    deltas: Tensor,
    batch: Index,
    config: TueConfig,
    epsilon: int,
    device: torch.device,
) -> tuple[Tensor, float]:
    """All steps of one batch; its perturbations and their separability before the last step."""
    delta = deltas[batch].to(device)
    labels = torch.from_numpy(images.labels_N[batch]).to(device)
    clean = to_levels(images.images_NHWC[batch], device) if learner else None
    if learner is not None:
        learner.train(False)
    separability = torch.zeros(())
    for _ in range(config.noise_steps):
        delta = delta.detach().requires_grad_()
        separability = class_separability(
            delta.flatten(1), labels, spread_gradient=config.spread_gradient
        )
        loss = config.csd_weight * separability
        if learner is not None and clean is not None:
            loss = loss + config.ssl_weight * learner.loss(clean + delta)
        (gradient,) = torch.autograd.grad(loss, delta)
        delta = signed_step(delta.detach(), gradient, step=config.step_levels, epsilon=epsilon)
    return delta.cpu(), float(separability.detach())
