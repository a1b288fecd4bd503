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
from typing import Annotated, ClassVar, Literal, Self, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field

from one4all.encoders import Encoder, EncoderConfig, load_encoder
from one4all.evaluation.labelled import LabelledImages
from one4all.evaluation.methods.base import Arrays, FittedCard, make_card, seeded
from one4all.evaluation.methods.clusters import EncoderWise, load_fitted_encoder
from one4all.evaluation.methods.controls import ControlConfig, WithoutArrays
from one4all.evaluation.methods.surrogate import chunks
from one4all.images import Pixels
from one4all.perturbation import DEFAULT_EPSILON_LEVELS, Levels, resize_perturbation
from one4all.protectors.generator import Generator, GeneratorConfig

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
RELEASED_L2 = 16.0  # on the [0, 1] scale, of a whole image
RELEASED_SIZE = 224  # pixels


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


class UntrainedGenerator(EncoderWise):
    """``epsilon * tanh(G(e, x))`` with random weights.

    Args:
        card: Description; its config has an ``encoder`` and a ``generator``.
        generator: The network.
        encoder: Loaded when first needed unless given.
    """

    def __init__(
        self, card: FittedCard, generator: Generator, encoder: Encoder | None = None
    ) -> None:
        super().__init__(card, encoder)
        self.generator = generator.eval().requires_grad_(False)

    def perturb(self, images: LabelledImages, *, own: bool, seed: int) -> Iterator[Levels]:
        """See the base class; nothing is drawn."""
        stride = self.generator.config.total_stride
        size = int(self.card.config["working_size"]) or -(-images.size // stride) * stride
        for part in chunks(len(images), 64):
            batch = torch.from_numpy(images.images_NHWC[part]).permute(0, 3, 1, 2).float() / 255
            working = F.interpolate(batch, (size, size), mode="bilinear", antialias=True)
            with torch.inference_mode():
                delta = self.generator(self.encoder.encode_image(working), working)
            yield from (self.card.epsilon_levels * delta).permute(0, 2, 3, 1).numpy()

    def arrays(self) -> Arrays:
        return {name: tensor.numpy() for name, tensor in self.generator.state_dict().items()}

    @classmethod
    def from_arrays(cls, card: FittedCard, arrays: Arrays) -> Self:
        config = GeneratorConfig.model_validate(card.config["generator"])
        encoder = load_fitted_encoder(card)
        generator = Generator(config, encoder.embedding_dim)
        generator.load_state_dict({name: torch.from_numpy(a) for name, a in arrays.items()})
        return cls(card, generator, encoder)


class ReleasedL2(UntrainedGenerator):
    """The released code's budget: every perturbation has L2 norm 16 at 224x224, on [0, 1].

    At another size the norm is scaled by ``size / 224``, which keeps the root mean square: 10.5
    levels. **Not within the budget**: even a flat perturbation exceeds 8 levels, and a Gaussian one
    peaks near 48.
    """

    within_budget: ClassVar[bool] = False

    def perturb(self, images: LabelledImages, *, own: bool, seed: int) -> Iterator[Levels]:
        """See the base class; at the image's own size."""
        random = np.random.default_rng([self.card.seed, seed])
        shape = (images.size, images.size, 3)
        if self.card.config["direction"] == "noise":
            directions = (
                random.standard_normal(shape).astype(np.float32) for _ in range(len(images))
            )
        else:
            directions = (_resize(d, shape[:2]) for d in super().perturb(images, own=own, seed=0))
        norm = 255 * RELEASED_L2 * images.size / RELEASED_SIZE
        return (d * np.float32(norm / np.linalg.norm(d)) for d in directions)


class ReleasedPreprocessing(WithoutArrays):
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
) -> UntrainedGenerator:
    """Draw the weights of a generator."""
    return _draw(UntrainedGenerator, "untrained_generator", images, config, epsilon_levels, seed)


def fit_released_l2(
    images: LabelledImages,
    config: ReleasedL2Config,
    *,
    epsilon_levels: int = DEFAULT_EPSILON_LEVELS,
    seed: int,
    **unused: object,
) -> ReleasedL2:
    """Draw the weights of a generator, whose output is then rescaled; the budget is ignored."""
    return _draw(ReleasedL2, "released_l2", images, config, epsilon_levels, seed)


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


_Untrained = TypeVar("_Untrained", bound=UntrainedGenerator)


def _draw(
    fitted_type: type[_Untrained],
    method: str,
    images: LabelledImages,
    config: UntrainedGeneratorConfig,
    epsilon_levels: int,
    seed: int,
) -> _Untrained:
    encoder = load_encoder(config.encoder)
    with seeded(seed):
        generator = Generator(config.generator, encoder.embedding_dim)
    card = make_card(
        fitted_type,
        method,
        images,
        config,
        epsilon_levels=epsilon_levels,
        seed=seed,
        encoder_hash=encoder.content_hash(),
    )
    return fitted_type(card, generator, encoder)
