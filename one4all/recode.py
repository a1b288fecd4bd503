"""One protected image, written to a file and checked as a reader will see it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from one4all.distances import max_difference, psnr_db
from one4all.errors import BadImageError, BudgetError
from one4all.images import DecodedImage, OutputFormat, Pixels, decode, encode, is_exact


@dataclass(frozen=True)
class RecodedImage:
    """A protected image file, and how far it is from the clean image.

    Attributes:
        payload: The file.
        max_before_encoding: Largest |difference| before the codec, in levels; within the budget.
        max_decoded: The same of what a reader decodes; the codec's own error included.
        psnr_db: PSNR of what a reader decodes, in dB.
    """

    payload: bytes
    max_before_encoding: int
    max_decoded: int
    psnr_db: float


def recode(
    clean: DecodedImage,
    pixels: Pixels,
    *,
    output_format: OutputFormat,
    epsilon_levels: int,
    max_pixels: int,
) -> RecodedImage:
    """Encode protected pixels as the clean image was, and measure what comes out.

    Args:
        clean: The clean image.
        pixels: Its protected pixels, same shape, uint8.
        output_format: See `encode`.
        epsilon_levels: Budget in 8-bit levels.
        max_pixels: As `decode` was given.

    Raises:
        BadImageError: The format cannot hold it, or the perturbation changed no pixel.
        BudgetError: Over the budget before encoding, or after it where the codec is lossless.
    """
    payload = encode(replace(clean, pixels=pixels), output_format)
    seen = decode(payload, max_pixels=max_pixels).pixels
    if seen.shape != clean.pixels.shape:
        raise BadImageError(f"cannot be written back: {clean.pixels.shape} became {seen.shape}")
    if np.array_equal(clean.pixels, pixels):
        raise BadImageError("the perturbation changes no pixel of it")
    result = RecodedImage(
        payload=payload,
        max_before_encoding=max_difference(clean.pixels, pixels),
        max_decoded=max_difference(clean.pixels, seen),
        psnr_db=psnr_db(clean.pixels, seen),
    )
    exact = is_exact(clean, output_format)
    worst = max(result.max_before_encoding, result.max_decoded if exact else 0)
    if worst > epsilon_levels:
        raise BudgetError(
            f"differs by {worst} levels, over the budget of {epsilon_levels}; this is a defect of "
            "the program, nothing is published"
        )
    return result
