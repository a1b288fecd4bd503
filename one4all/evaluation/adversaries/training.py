"""The model an unauthorised trainer would fit, tested on clean images.

One pipeline for every copy of a corpus, so that two accuracies differ by the copy and nothing
else: same architecture, schedule, augmentation, seeds and order of batches.

Shape suffixes: N images, B batch, C channels, H W image, D features.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor, nn

from one4all.errors import ConfigError, One4AllError, UsageError
from one4all.evaluation.adversaries.augmentation import Augmentation, augment, prepare
from one4all.evaluation.adversaries.classifier import Classifier, build_classifier, is_published
from one4all.evaluation.adversaries.networks import FULL_WIDTH, NETWORKS
from one4all.evaluation.attacks import Attack, Loss, Purifier
from one4all.evaluation.labelled import LabelledImages, Labels

_EVALUATION_BATCH = 256


class AdversaryConfig(BaseModel):
    """How the adversary trains.

    Attributes:
        network: One of `NETWORKS`, "efficientnet_lite0", ``timm:NAME`` or ``open_clip:NAME``.
        initial: "scratch"; "fine_tune" or "linear_probe", which need published weights.
        weights: Published weights, a tag or a local file; "" is the model's own.
        input_size: Side in pixels to which images are resized for a published model; 0 is its own.
        width: 64 is the network as published, see `build_network`; published models ignore it.
        stem_stride: Below 128 pixels: 1 for 32-pixel images, 2 halves the cost at 64 pixels.
        augmentation: "none", the paper's own protocol; "flip_crop"; or one of everyday training,
            see `augment`.
        epochs, batch_size: The last, incomplete batch of an epoch is left out.
        optimizer: "sgd" with ``momentum``, or "adamw".
        learning_rate, final_learning_rate: Cosine from one to the other, by step. 0.1 is the
            paper's for each network; in a few hundred steps resnet50 and mobilenet_v2 learn nothing
            with it, and do with 0.02 (CIFAR-10, 4,000 images, 4 epochs: 10 against 31 and 21 %).
        warm_up: Share of the steps in which the rate first rises from 0, linearly. The paper has
            none; 0.3 makes a short training learn clean images better (docs/evaluation.md).
        momentum, weight_decay: Settings of the optimizer.
        precision: "bfloat16" runs the network under autocast.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: str = "resnet18"
    initial: Literal["scratch", "fine_tune", "linear_probe"] = "scratch"
    weights: str = ""
    input_size: Annotated[int, Field(ge=0, le=1024)] = 0
    width: Annotated[int, Field(ge=8, le=128)] = 16
    stem_stride: Literal[1, 2] = 2
    augmentation: Augmentation = "none"
    epochs: Annotated[int, Field(ge=1)] = 10
    batch_size: Annotated[int, Field(ge=2)] = 64
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    final_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    warm_up: Annotated[float, Field(ge=0, lt=1)] = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    precision: Literal["float32", "bfloat16"] = "float32"

    @field_validator("network")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in NETWORKS and not is_published(name):
            raise ValueError(
                f"no network {name!r}; there are {', '.join(NETWORKS)}, efficientnet_lite0, "
                "timm:NAME and open_clip:NAME"
            )
        return name

    @model_validator(mode="after")
    def _has_weights(self) -> AdversaryConfig:
        if self.initial != "scratch" and not is_published(self.network):
            raise ValueError(f"{self.network} has no published weights; initial must be 'scratch'")
        return self


PRESETS: dict[str, AdversaryConfig] = {
    # Ours: minutes on a CPU.
    "default": AdversaryConfig(),
    # The 14A paper's, with two departures: inputs are normalised, and crop and flip are on for
    # every copy. Its networks are the six of `build_network`.
    "adv-14a": AdversaryConfig(
        width=FULL_WIDTH,
        stem_stride=1,
        augmentation="flip_crop",
        epochs=200,
        batch_size=64,
        final_learning_rate=1e-6,
        weight_decay=3e-5,
    ),
    "fine-tune": AdversaryConfig(
        network="efficientnet_lite0",
        initial="fine_tune",
        augmentation="flip_crop",
        learning_rate=0.01,
        weight_decay=1e-4,
    ),
    "linear-probe": AdversaryConfig(
        network="efficientnet_lite0", initial="linear_probe", weight_decay=0.0
    ),
}


def find_preset(name: str) -> AdversaryConfig:
    """The preset of a name.

    Raises:
        ConfigError: No such preset.
    """
    if name not in PRESETS:
        raise ConfigError(f"no preset {name!r} of adversaries; there are {', '.join(PRESETS)}")
    return PRESETS[name]


@dataclass(frozen=True)
class AdversaryResult:
    """What an adversary has learnt.

    Attributes:
        last, peak: Test accuracy, 0..1, of the last epoch and of the best one. The best is what an
            adversary with clean validation images gets by early stopping.
        curve: Test accuracy of each epoch.
        predictions: Class of each test image after the last epoch.
        seconds: Wall time of everything, purification included. Not part of equality.
    """

    last: float
    peak: float
    curve: tuple[float, ...]
    predictions: tuple[int, ...] = field(repr=False)
    seconds: float = field(compare=False)

    def confusion(self, labels_N: Labels) -> npt.NDArray[np.int64]:
        """Counts of test images, (num_classes, num_classes): row is the label, column the guess.

        Args:
            labels_N: The labels of the test images.
        """
        guesses = np.array(self.predictions, np.int64)
        size = int(max(labels_N.max(), guesses.max())) + 1
        return np.bincount(labels_N * size + guesses, minlength=size * size).reshape(size, size)


def train_adversary(
    train: LabelledImages,
    test: LabelledImages,
    config: AdversaryConfig,
    *,
    attack: Attack | None = None,
    seed: int,
    on_epoch: Callable[[int, float], None] = lambda epoch, accuracy: None,
) -> AdversaryResult:
    """Train on one copy of a corpus and test on clean images.

    Runs on a GPU if there is one. The same seed gives the same weights, batches and augmentation
    for every copy of the corpus and every attack; the same everything gives the same result on a
    CPU with the same number of threads, and nearly so on a GPU. Seeds torch's global generator.

    Args:
        train: Clean or protected images; a memory map will do.
        test: Clean images of the same size.
        config: Recipe.
        attack: What the adversary tries against a protection; see `attacks`. A purifier holds a
                second copy of the training images in memory; purify beforehand, onto a memory map,
                when that is too much.
        seed: Seed of initial weights, order, augmentation and attack.
        on_epoch: Called with the epoch (from 1) and its test accuracy.

    Raises:
        UsageError: Sizes of training and test images differ, or published weights cannot be loaded.
        One4AllError: The training diverged: an accuracy would mean nothing.
    """
    start = time.monotonic()
    if train.images_NHWC.shape[1:] != test.images_NHWC.shape[1:]:
        raise UsageError(
            f"training images are {train.images_NHWC.shape[1:]}, test images "
            f"{test.images_NHWC.shape[1:]}; read both at the same size"
        )
    if isinstance(attack, Purifier):
        train = attack.purify(train, seed=seed)
        attack = None
    torch.manual_seed(seed)
    trainer = _Trainer(
        config,
        num_classes=max(train.num_classes, test.num_classes),
        image_size=train.size,
        loss=attack.loss if attack else _plain_loss,
        seed=seed,
    )
    train_inputs: npt.NDArray[Any] = train.images_NHWC
    test_inputs: npt.NDArray[Any] = test.images_NHWC
    if config.initial == "linear_probe" and config.augmentation == "none" and attack is None:
        # A frozen body sees each image alike in every epoch: once is enough.
        train_inputs, test_inputs = trainer.embed(train_inputs), trainer.embed(test_inputs)
    curve = []
    # Lasts for the training only, unlike the global switch.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        for epoch in trainer.epochs(train_inputs, train.labels_N):
            predictions = trainer.predict(test_inputs)
            curve.append(float((predictions == test.labels_N).mean()))
            on_epoch(epoch, curve[-1])
    return AdversaryResult(
        last=curve[-1],
        peak=max(curve),
        curve=tuple(curve),
        predictions=tuple(predictions.tolist()),
        seconds=time.monotonic() - start,
    )


def learning_rate_at(progress: float, config: AdversaryConfig) -> float:
    """The learning rate when a share ``progress``, 0..1, of the steps is done."""
    if progress < config.warm_up:
        return config.learning_rate * progress / config.warm_up
    fallen = (1 - math.cos(math.pi * (progress - config.warm_up) / (1 - config.warm_up))) / 2
    return config.learning_rate + (config.final_learning_rate - config.learning_rate) * fallen


class _Trainer:
    """One network and its state. Inputs are images (N, H, W, 3) uint8, or features (N, D)."""

    def __init__(
        self,
        config: AdversaryConfig,
        *,
        num_classes: int,
        image_size: int,
        loss: Loss,
        seed: int,
    ) -> None:
        self._config = config
        self._loss = loss
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # The attack draws elsewhere, so that it does not change order and augmentation.
        self._random = np.random.default_rng(seed)
        self._attack_random = np.random.default_rng([seed, 1])
        self._classifier: Classifier = build_classifier(
            config.network,
            num_classes,
            image_size=image_size,
            initial=config.initial,
            width=config.width,
            stem_stride=config.stem_stride,
            weights=config.weights,
            input_size=config.input_size,
        ).to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def epochs(self, inputs: npt.NDArray[Any], labels_N: Labels) -> Iterator[int]:
        """Train; yields the number of each epoch, from 1, after it."""
        config = self._config
        network = self._network_for(inputs)
        optimizer = self._optimizer()
        num_batches = max(1, len(inputs) // config.batch_size)
        steps = config.epochs * num_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_at(step / steps, config) / config.learning_rate
        )
        for epoch in range(1, config.epochs + 1):
            network.train()
            order = self._random.permutation(len(inputs))
            for batch in np.array_split(order[: num_batches * config.batch_size], num_batches):
                image = self._to_device(inputs[batch], training=True)
                label = torch.from_numpy(labels_N[batch]).to(self._device)
                with self._autocast():
                    loss = self._loss(network, image, label, self._attack_random)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
            self._refuse_divergence(epoch)
            yield epoch

    def _refuse_divergence(self, epoch: int) -> None:
        """An adversary that broke down would pass for one that was held off."""
        if all(bool(weight.isfinite().all()) for weight in self._classifier.parameters()):
            return
        config = self._config
        raise One4AllError(
            f"the adversary's weights are not finite after epoch {epoch} (learning_rate "
            f"{config.learning_rate}, precision {config.precision}): this says nothing about the "
            "images; use a lower learning_rate, or precision float32"
        )

    @torch.inference_mode()
    def predict(self, inputs: npt.NDArray[Any]) -> Labels:
        """Classes, (N,) int64, without augmentation."""
        network = self._network_for(inputs).eval()
        with self._autocast():
            found = [network(batch).argmax(dim=1) for batch in self._evaluation_batches(inputs)]
        return torch.cat(found).cpu().numpy()

    @torch.inference_mode()
    def embed(self, images_NHWC: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Features of the body, (N, D) float32."""
        self._classifier.eval()
        with self._autocast():
            batches = self._evaluation_batches(images_NHWC)
            found = [self._classifier.embed(batch).float().cpu() for batch in batches]
        return torch.cat(found).numpy()

    def _evaluation_batches(self, inputs: npt.NDArray[Any]) -> Iterator[Tensor]:
        for start in range(0, len(inputs), _EVALUATION_BATCH):
            yield self._to_device(inputs[start : start + _EVALUATION_BATCH], training=False)

    def _to_device(self, batch: npt.NDArray[Any], *, training: bool) -> Tensor:
        if batch.ndim == 2:
            return torch.from_numpy(batch).to(self._device)
        if training:
            return augment(batch, self._config.augmentation, self._random, self._device)
        return prepare(batch, self._config.augmentation, self._device)

    def _network_for(self, inputs: npt.NDArray[Any]) -> nn.Module:
        return self._classifier.head if inputs.ndim == 2 else self._classifier

    def _optimizer(self) -> torch.optim.Optimizer:
        config = self._config
        weights = [p for p in self._classifier.parameters() if p.requires_grad]
        if config.optimizer == "adamw":
            return torch.optim.AdamW(
                weights,
                lr=config.learning_rate,
                betas=(config.momentum, 0.999),
                weight_decay=config.weight_decay,
            )
        return torch.optim.SGD(
            weights,
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )

    def _autocast(self) -> torch.autocast:
        enabled = self._config.precision == "bfloat16"
        return torch.autocast(self._device.type, torch.bfloat16, enabled=enabled)


def _plain_loss(
    network: nn.Module, image_BCHW: Tensor, label_B: Tensor, random: np.random.Generator
) -> Tensor:
    return F.cross_entropy(network(image_BCHW), label_B)
