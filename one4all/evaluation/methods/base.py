"""What all compared methods share: a fit gives an object that protects any labelled corpus.

    fitted = find_method("lsp").fit(train, seed=0)
    protected = fitted.protect(train, own=True, seed=0)

Most methods are `Perturbations`: they give a perturbation for each image, in levels of 8 bits,
which reaches pixels through `apply_perturbation`. So the budget holds whatever a method returns.

Shape suffixes: N images, C colour channels, h w perturbation grid.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.numpy import load_file, save_file

from one4all.errors import UsageError
from one4all.evaluation.labelled import LabelledImages
from one4all.perturbation import DEFAULT_EPSILON_LEVELS, Levels, apply_perturbation

CARD = "card.json"
TENSORS = "fitted.safetensors"
MAX_EPSILON_LEVELS = 127  # stored sample-wise perturbations are int8
WHOLE_RANGE = 255

Arrays: TypeAlias = dict[str, npt.NDArray[Any]]
OnFitProgress: TypeAlias = Callable[[float, str], None]
"""Receives the share of a fit that is done, 0..1, and a line that says how it goes."""


def silent(share: float, message: str) -> None:
    """An `OnFitProgress` that says nothing."""


class FittedMethod(ABC):
    """A compared method, or a control, ready to protect.

    Attributes:
        within_budget: Whether no pixel moves by more than the budget. The report says of every copy
            how far one moved.
    """

    within_budget: ClassVar[bool] = True

    @abstractmethod
    def protect(self, images: LabelledImages, *, own: bool, seed: int) -> LabelledImages:
        """Protect a corpus.

        Args:
            images: Any corpus; its images may have another size and number than those fitted.
            own: Whether it is the corpus of the fit, in the same order. Perturbations that were
                made for single images are then used by index; else the rule of `transfer` holds.
            seed: Seed of whatever is drawn here. Same seed, same images.

        Returns:
            The same labels, size and order.

        Raises:
            UsageError: ``own`` with a corpus that cannot be the one of the fit, or a corpus that
                does not suit the method.
        """


class Savable(ABC):
    """A fitted method whose fit takes time, so that it is kept in a folder."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write it where `Method.load` will read it."""


class FittedCard(BaseModel):
    """What was fitted, and how.

    Attributes:
        kind: Class of the fitted object; the loader's key.
        method: Name in the registry.
        epsilon_levels: Budget it was fitted for, 8-bit levels.
        seed: Seed of the fit.
        config: The method's configuration, as JSON.
        num_images, num_classes, size: The corpus it was fitted on; side in pixels.
        record: Figures of the fit, such as the surrogate's last error.
        encoder_hash: `Encoder.content_hash` of the encoder it must be used with, if any.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    kind: str
    method: str
    epsilon_levels: Annotated[int, Field(ge=1, le=MAX_EPSILON_LEVELS)]
    seed: int
    config: dict[str, Any]
    num_images: int
    num_classes: int
    size: int
    record: dict[str, float] = Field(default_factory=dict)
    encoder_hash: str = ""


class Perturbations(FittedMethod):
    """A perturbation for each image of any labelled corpus.

    Args:
        card: What was fitted, and how.
    """

    def __init__(self, card: FittedCard) -> None:
        self.card = card

    @abstractmethod
    def perturb(self, images: LabelledImages, *, own: bool, seed: int) -> Iterator[Levels]:
        """One perturbation for each image, in order; arguments and errors as for `protect`.

        Yields:
            (h, w, 3) float32, in levels, at the method's own size.
        """

    def protect(self, images: LabelledImages, *, own: bool, seed: int) -> LabelledImages:
        """See the base class; image by image, by the integer budget rule.

        ``max |protected - clean| <= card.epsilon_levels`` in uint8 levels if ``within_budget``; a
        control that is not has the whole range of 255 levels.
        """
        budget = self.card.epsilon_levels if self.within_budget else WHOLE_RANGE
        protected = np.empty_like(images.images_NHWC)
        deltas = self.perturb(images, own=own, seed=seed)
        for index, delta in zip(range(len(images)), deltas, strict=True):
            protected[index] = apply_perturbation(
                images.images_NHWC[index], delta, epsilon_levels=budget
            )
        return replace(images, images_NHWC=protected)

    def check_own(self, images: LabelledImages) -> None:
        """Refuse a corpus that cannot be the one of the fit.

        Raises:
            UsageError: Another number of images or another size.
        """
        facts = (len(images), images.size)
        if facts != (self.card.num_images, self.card.size):
            raise UsageError(
                f"{self.card.method} was fitted on {self.card.num_images} images of "
                f"{self.card.size} pixels and these are {facts[0]} of {facts[1]}; say own=False to "
                "transfer its perturbations to another corpus"
            )


class SavablePerturbations(Perturbations, Savable):
    """Perturbations whose fit takes time: a card, and arrays."""

    @abstractmethod
    def arrays(self) -> Arrays:
        """All that `perturb` needs beside the card."""

    @classmethod
    @abstractmethod
    def from_arrays(cls, card: FittedCard, arrays: Arrays) -> Self:
        """The inverse of `arrays`."""

    def save(self, folder: Path) -> None:
        """Write ``fitted.safetensors``, then ``card.json``: no card, no fitted method."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CARD).unlink(missing_ok=True)
        contiguous = {name: np.ascontiguousarray(array) for name, array in self.arrays().items()}
        save_file(contiguous, folder / TENSORS)
        (folder / CARD).write_text(json.dumps(self.card.model_dump(), indent=2) + "\n")


def make_card(
    fitted_type: type[Perturbations],
    method: str,
    images: LabelledImages,
    config: BaseModel,
    *,
    epsilon_levels: int,
    seed: int,
    record: dict[str, float] | None = None,
    encoder_hash: str = "",
) -> FittedCard:
    """The card of a fit on ``images``.

    Raises:
        UsageError: The budget is out of range.
    """
    check_epsilon(epsilon_levels)
    return FittedCard(
        kind=fitted_type.__name__,
        method=method,
        epsilon_levels=epsilon_levels,
        seed=seed,
        config=config.model_dump(mode="json"),
        num_images=len(images),
        num_classes=images.num_classes,
        size=images.size,
        record=record or {},
        encoder_hash=encoder_hash,
    )


def read_fitted(folder: Path) -> tuple[FittedCard, Arrays]:
    """Card and arrays of a folder that `SavablePerturbations.save` wrote.

    Raises:
        UsageError: No such folder, or not readable as one.
    """
    try:
        card = FittedCard.model_validate_json((folder / CARD).read_text())
        arrays: Arrays = load_file(folder / TENSORS)
    except FileNotFoundError as error:
        raise UsageError(f"{folder} holds no fitted method: {error.filename} is missing") from error
    except (ValidationError, OSError, ValueError) as error:
        raise UsageError(f"{folder} holds no readable fitted method: {error}") from error
    return card, arrays


def check_epsilon(epsilon_levels: int) -> None:
    """Refuse a budget outside 1..127 levels.

    Raises:
        UsageError: It is.
    """
    if not 1 <= epsilon_levels <= MAX_EPSILON_LEVELS:
        raise UsageError(
            f"a budget of {epsilon_levels} levels is not possible; allowed are 1 to "
            f"{MAX_EPSILON_LEVELS}, usual is {DEFAULT_EPSILON_LEVELS}"
        )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """PyTorch's random numbers from ``seed``, and as they were before afterwards (on the CPU)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
