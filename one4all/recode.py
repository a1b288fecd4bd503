"""One protected image, written to a file and checked as a reader will see it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from one4all.distances import max_difference, psnr_db
from one4all.errors import BadImageError, BudgetError
from one4all.images import (
    DecodedImage,
    OutputFormat,
    Pixels,
    decode,
    encode,
    is_exact,
    written_format,
)

_SAMPLED = 16


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

    The file is decoded for that; a PNG seldom, since `encode` has inflated it again and compared.

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
    max_before_encoding = max_difference(clean.pixels, pixels)
    if not max_before_encoding:
        raise BadImageError("the perturbation changes no pixel of it")
    payload = encode(replace(clean, pixels=pixels), output_format)
    seen = pixels
    if written_format(clean.format, output_format) != "PNG" or _is_sampled(payload):
        seen = decode(payload, max_pixels=max_pixels).pixels
    if seen.shape != clean.pixels.shape:
        raise BadImageError(f"cannot be written back: {clean.pixels.shape} became {seen.shape}")
    result = RecodedImage(
        payload=payload,
        max_before_encoding=max_before_encoding,
        max_decoded=(max_before_encoding if seen is pixels else max_difference(clean.pixels, seen)),
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


def _is_sampled(png: bytes) -> bool:
    """Whether a PNG is decoded again; all of them were inflated again, by `encode`.

    By the checksum of its samples: about one of ``_SAMPLED``, and the same ones each time.
    """
    end = b"\0\0\0\0IEND\xaeB`\x82"
    return png[-len(end) - 1] % _SAMPLED == 0
