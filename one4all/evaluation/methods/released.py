"""Controls of the released code: an untrained generator, its L2 rule, its preprocessing.

* ``untrained_generator``: the method without its training. Within the budget.
* ``released_l2``: every perturbation rescaled to L2 = 16 at 224x224. **Not within the budget.**
* ``released_preprocessing`` (C0): what its script saves when delta is zero. **Not within the
  budget.** They tell how much of a published figure is the method's and how much is theirs.

Source: the released code of the 14A paper, read for facts only (docs/method.md).

Shape suffixes: B batch, H W image, C colour channels, h w perturbation grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from one4all.encoders import EncoderConfig, load_encoder
from one4all.evaluation.labelled import LabelledImages
from one4all.evaluation.methods.base import (
    FittedCard,
    Perturbations,
    check_epsilon,
    make_card,
    seeded,
)
from one4all.evaluation.methods.controls import ControlConfig
from one4all.evaluation.methods.protectors import SMALLEST_WORKING_SIZE, FittedProtector
from one4all.evaluation.methods.surrogate import chunks
from one4all.images import Pixels, working_copy
from one4all.perturbation import DEFAULT_EPSILON_LEVELS, Levels, resize_perturbation
from one4all.protectors.config import GeneratorConfig
from one4all.protectors.generator import Generator
from one4all.protectors.protector import Protector

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
RELEASED_L2 = 16.0  # on the [0, 1] scale, of a whole image
RELEASED_SIZE = 224  # pixels
_BATCH = 64


class UntrainedGeneratorConfig(ControlConfig):
    """A generator with random weights.

    Attributes:
        generator, encoder: As for a protector.
        working_size: Side in pixels of what the generator sees; 0 means the images' own, rounded up
            to a multiple of its stride.
    """

    generator: GeneratorConfig = GeneratorConfig()
    encoder: EncoderConfig = EncoderConfig(input_size=96)
    working_size: Annotated[int, Field(ge=0, le=2048)] = 0


class ReleasedL2Config(UntrainedGeneratorConfig):
    """What is scaled to the released norm.

    Attributes:
        direction: "generator": the output of one with random weights, the released method without
            its training. "noise": Gaussian.
    """

    direction: Literal["generator", "noise"] = "generator"


class ReleasedL2(Perturbations):
    """The released code's budget: every perturbation has L2 norm 16 at 224x224, on [0, 1].

    At another size the norm is scaled by ``size / 224``, which keeps the root mean square: 10.5
    levels. **Not within the budget**: even a flat perturbation exceeds 8 levels, and a Gaussian one
    peaks near 48.

    Args:
        card: What was drawn; its config is a `ReleasedL2Config`.
        protector: Network with random weights, whose perturbations are directions.
    """

    within_budget: ClassVar[bool] = False

    def __init__(self, card: FittedCard, protector: Protector) -> None:
        super().__init__(card)
        self.protector = protector

    def perturb(self, images: LabelledImages, *, own: bool, seed: int) -> Iterator[Levels]:
        """See the base class; at the image's own size."""
        if self.card.config["direction"] == "noise":
            directions = self._noise(images, np.random.default_rng([self.card.seed, seed]))
        else:
            directions = self._generated(images)
        norm = 255 * RELEASED_L2 * images.size / RELEASED_SIZE
        return (d * np.float32(norm / np.linalg.norm(d)) for d in directions)

    def _noise(self, images: LabelledImages, random: np.random.Generator) -> Iterator[Levels]:
        shape = (images.size, images.size, 3)
        return (random.standard_normal(shape).astype(np.float32) for _ in range(len(images)))

    def _generated(self, images: LabelledImages) -> Iterator[Levels]:
        working_size = self.protector.card.working_size
        for part in chunks(len(images), _BATCH):
            working = [working_copy(image, working_size) for image in images.images_NHWC[part]]
            for delta in self.protector.perturb(np.stack(working)):
                yield _resize(delta, (images.size, images.size))


class ReleasedPreprocessing(Perturbations):
    """C0: what the released generation script saves when its perturbation is zero.

    ``clamp(CLIP-normalise(x), 0, 1)`` as uint8, never un-normalised: about 12 dB from the original.
    **Not within the budget.**
    """

    within_budget: ClassVar[bool] = False

    def perturb(self, images: LabelledImages, *, own: bool, seed: int) -> Iterator[Levels]:
        """See the base class; nothing is drawn."""
        return (released_preprocessing(image) - image for image in images.images_NHWC)


def released_preprocessing(image_HWC: Pixels) -> Levels:
    """``round(255 * clamp((x / 255 - mean) / std, 0, 1))``, float32 of whole levels 0..255."""
    normalised = (image_HWC.astype(np.float32) / 255 - CLIP_MEAN) / CLIP_STD
    result: Levels = np.rint(255 * normalised.clip(0, 1))
    return result


def _resize(delta_hwC: Levels, size: tuple[int, ...]) -> Levels:
    delta = torch.from_numpy(np.ascontiguousarray(delta_hwC)).permute(2, 0, 1)[None]
    resized: Levels = resize_perturbation(delta, (size[0], size[1]))[0].permute(1, 2, 0).numpy()
    return resized


def fit_untrained_generator(
    images: LabelledImages,
    config: UntrainedGeneratorConfig,
    *,
    epsilon_levels: int = DEFAULT_EPSILON_LEVELS,
    seed: int,
    **unused: object,
) -> FittedProtector:
    """Draw the weights of a generator; of ``images`` only the size matters."""
    return FittedProtector(_draw(images, config, epsilon_levels, seed))


def fit_released_l2(
    images: LabelledImages,
    config: ReleasedL2Config,
    *,
    epsilon_levels: int = DEFAULT_EPSILON_LEVELS,
    seed: int,
    **unused: object,
) -> ReleasedL2:
    """Draw the weights of a generator, whose output is then rescaled; the budget is ignored."""
    protector = _draw(images, config, epsilon_levels, seed)
    card = make_card(
        ReleasedL2, "released_l2", images, config, epsilon_levels=epsilon_levels, seed=seed
    )
    return ReleasedL2(card, protector)


def fit_released_preprocessing(
    images: LabelledImages,
    config: ControlConfig,
    *,
    epsilon_levels: int = DEFAULT_EPSILON_LEVELS,
    seed: int,
    **unused: object,
) -> ReleasedPreprocessing:
    """Nothing is drawn; the budget is ignored."""
    return ReleasedPreprocessing(
        make_card(
            ReleasedPreprocessing,
            "released_preprocessing",
            images,
            config,
            epsilon_levels=epsilon_levels,
            seed=seed,
        )
    )


def _draw(
    images: LabelledImages, config: UntrainedGeneratorConfig, epsilon_levels: int, seed: int
) -> Protector:
    """A protector with random weights."""
    check_epsilon(epsilon_levels)
    encoder = load_encoder(config.encoder)
    with seeded(seed):
        generator = Generator(config.generator, encoder.embedding_dim)
    stride = config.generator.total_stride
    own_size = -(-max(images.size, SMALLEST_WORKING_SIZE) // stride) * stride
    return Protector.assemble(
        config.encoder,
        encoder,
        generator,
        name="untrained",
        working_size=config.working_size or own_size,
        config=config.generator,
        epsilon_levels=epsilon_levels,
        training={"steps": 0, "seed": seed},
    )
