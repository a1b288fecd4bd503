"""One protected image, written to a file and checked as a reader will see it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from isal import isal_zlib

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
_CHECKED = ("PNG", "JPEG")  # by `encode`, without decoding what it wrote


@dataclass(frozen=True)
class RecodedImage:
    """A protected image file, and how far it is from the clean image.

    Attributes:
        payload: The file.
        max_before_encoding: Largest |difference| before the codec, in levels; within the budget.
        max_decoded: The same of what a reader decodes; the codec's own error included. None of a
            JPEG that was not decoded again.
        psnr_db: PSNR of what a reader decodes, in dB; None likewise.
    """

    payload: bytes
    max_before_encoding: int
    max_decoded: int | None
    psnr_db: float | None


def recode(
    clean: DecodedImage,
    pixels: Pixels,
    *,
    output_format: OutputFormat,
    epsilon_levels: int,
    max_pixels: int,
    measured: bool = False,
) -> RecodedImage:
    """Encode protected pixels as the clean image was, and measure what comes out.

    The file is decoded for that; a PNG seldom, since `encode` has inflated it again and compared.

    Args:
        clean: The clean image.
        pixels: Its protected pixels, same shape, uint8.
        output_format: See `encode`.
        epsilon_levels: Budget in 8-bit levels.
        max_pixels: As `decode` was given.
        measured: Whether a JPEG is decoded again in any case. If not, about one in 16 is, the same
            ones each time; of the others `encode` has seen that they are whole, and no distance is
            stated.

    Raises:
        BadImageError: The format cannot hold it, or the perturbation changed no pixel.
        BudgetError: Over the budget before encoding, or after it where the codec is lossless.
    """
    max_before_encoding = max_difference(clean.pixels, pixels)
    if not max_before_encoding:
        raise BadImageError("the perturbation changes no pixel of it")
    payload = encode(replace(clean, pixels=pixels), output_format)
    kind = written_format(clean.format, output_format)
    seen = pixels if kind == "PNG" else None
    if kind not in _CHECKED or (kind == "JPEG" and measured) or _is_sampled(payload):
        seen = decode(payload, max_pixels=max_pixels).pixels
        if seen.shape != pixels.shape:
            raise BadImageError(f"cannot be written back: {pixels.shape} became {seen.shape}")
    max_decoded: int | None = max_before_encoding
    if seen is not pixels:
        max_decoded = None if seen is None else max_difference(clean.pixels, seen)
    exact = is_exact(clean, output_format)
    worst = max(max_before_encoding, (max_decoded or 0) if exact else 0)
    if worst > epsilon_levels:
        raise BudgetError(
            f"differs by {worst} levels, over the budget of {epsilon_levels}; this is a defect of "
            "the program, nothing is published"
        )
    return RecodedImage(
        payload=payload,
        max_before_encoding=max_before_encoding,
        max_decoded=max_decoded,
        psnr_db=None if seen is None else psnr_db(clean.pixels, seen),
    )


def _is_sampled(payload: bytes) -> bool:
    """Whether a file that `encode` has checked is decoded again all the same.

    By its checksum: about one of ``_SAMPLED``, and the same ones each time.
    """
    return isal_zlib.crc32(payload) % _SAMPLED == 0
