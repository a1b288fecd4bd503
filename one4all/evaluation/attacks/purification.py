"""Attacks on the images: uint8 in, uint8 out, once, before training.

Lossy by design, so a purifier also costs the adversary some accuracy on *clean* images. Compare a
protected copy with the clean copy under the same purifier.

Shape suffixes: N images, B batch, C channels, H W image.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from one4all.errors import UsageError
from one4all.evaluation.labelled import LabelledImages
from one4all.images import Pixels

_BATCH = 64
_BLUR_KERNEL = 23

BatchFilter = Callable[[Pixels], Pixels]


@dataclass(frozen=True)
class Purifier:
    """A change of the training images before training.

    Attributes:
        name: In `one4all.evaluation.attacks.ATTACKS`.
        description: Line for reports.
        apply: Called with the labelled images, the array to fill, (N, H, W, 3) uint8, and a seed.
    """

    name: str
    description: str
    apply: Callable[[LabelledImages, Pixels, int], None] = field(repr=False, compare=False)

    def purify(
        self, images: LabelledImages, *, seed: int, out: Pixels | None = None
    ) -> LabelledImages:
        """Purified images with the same labels, in the same order.

        Args:
            images: Left as they are. A memory map will do: they are read in batches.
            seed: Seed of whatever is random; most purifiers have nothing.
            out: Where the result goes, (N, H, W, 3) uint8, such as a writable memory map; new
                memory if not given.

        Raises:
            UsageError: ``out`` has another shape or type.
        """
        source = images.images_NHWC
        if out is None:
            out = np.empty(source.shape, np.uint8)
        if out.shape != source.shape or out.dtype != np.uint8:
            raise UsageError(
                f"out is {out.shape} {out.dtype}, but the result is {source.shape} uint8"
            )
        self.apply(images, out, seed)
        return LabelledImages(out, images.labels_N)


# --- filters: (B, H, W, 3) uint8 to the same ------------------------------------------------------


def gaussian_blur(images_BHWC: Pixels, *, sigma: float) -> Pixels:
    """Gaussian of standard deviation ``sigma`` in pixels, 23 taps, edges reflected, rounded.

    Source: the released code of 14A, kernel 23 and sigma 1. APBench and ISS state kernel 3 and
    sigma 0.1, which is the identity and not used here.
    """
    taps = gaussian_taps(sigma).astype(np.float32)
    reach = _BLUR_KERNEL // 2
    padded = np.pad(images_BHWC, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="symmetric")
    image = torch.from_numpy(padded).permute(0, 3, 1, 2).float().contiguous()
    kernel = torch.from_numpy(taps).repeat(3, 1)
    image = F.conv2d(image, kernel[:, None, :, None], groups=3)
    image = F.conv2d(image, kernel[:, None, None, :], groups=3)
    return image.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def gaussian_taps(sigma: float) -> npt.NDArray[np.float64]:
    """The 23 weights of a Gaussian; their sum is 1."""
    offsets = np.arange(_BLUR_KERNEL) - _BLUR_KERNEL // 2
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    return np.asarray(weights / weights.sum())


def grayscale(images_BHWC: Pixels) -> Pixels:
    """ITU-R BT.601 luma, as Pillow's "L", in all three channels.

    Source: ISS (Liu et al. 2023), on the training images only.
    """
    return _each(images_BHWC, lambda image: image.convert("L").convert("RGB"))


def reduce_bit_depth(images_BHWC: Pixels, *, bits: int) -> Pixels:
    """Keep the highest ``bits`` of each channel, the others become 0 (Pillow's posterise).

    Source: APBench (Qin et al. 2023), 2 bits. It darkens a picture by 32 levels on average, as
    there; the test images stay.
    """
    return images_BHWC & np.uint8(256 - (256 >> bits))


def recompress(images_BHWC: Pixels, *, kind: str, quality: int) -> Pixels:
    """Write as JPEG (Pillow's default, 4:2:0) or lossy WebP of a quality, and read again.

    Source: ISS (Liu et al. 2023), JPEG 10; the other qualities are those that pictures meet on
    their way. Once before training instead of in each epoch: the same, except that augmentation
    comes after it.
    """

    def through(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, format=kind, quality=quality)
        return Image.open(buffer).convert("RGB")

    return _each(images_BHWC, through)


def resize_down_up(images_BHWC: Pixels, *, factor: float) -> Pixels:
    """Shrink to ``factor`` of each side and enlarge again, both bicubic, antialiased.

    Source: none in particular; what thumbnails and re-uploads do.
    """

    def through(image: Image.Image) -> Image.Image:
        small = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        kind = Image.Resampling.BICUBIC
        return image.resize(small, kind).resize(image.size, kind)

    return _each(images_BHWC, through)


def median(images_BHWC: Pixels, *, size: int) -> Pixels:
    """Median of a ``size`` x ``size`` neighbourhood in each channel, edges repeated.

    Source: ISS (Liu et al. 2023), 3x3.
    """
    return _each(images_BHWC, lambda image: image.filter(ImageFilter.MedianFilter(size)))


def _each(images_BHWC: Pixels, change: Callable[[Image.Image], Image.Image]) -> Pixels:
    return np.stack([np.asarray(change(Image.fromarray(image))) for image in images_BHWC])


def _filter_all(images: LabelledImages, out: Pixels, seed: int, *, batch_filter: Any) -> None:
    for start in range(0, len(images), _BATCH):
        out[start : start + _BATCH] = batch_filter(images.images_NHWC[start : start + _BATCH])


def _purifier(name: str, description: str, batch_filter: BatchFilter) -> Purifier:
    return Purifier(name, description, partial(_filter_all, batch_filter=batch_filter))


PURIFIERS = (
    *(
        _purifier(
            f"blur-{sigma:g}",
            f"Gaussian blur, sigma {sigma:g} pixels",
            partial(gaussian_blur, sigma=sigma),
        )
        for sigma in (0.5, 1.0, 2.0)
    ),
    _purifier("grayscale", "grayscale", grayscale),
    _purifier("bit-depth-2", "2 bits a channel", partial(reduce_bit_depth, bits=2)),
    *(
        _purifier(
            f"jpeg-{quality}",
            f"JPEG of quality {quality}, 4:2:0",
            partial(recompress, kind="JPEG", quality=quality),
        )
        for quality in (10, 30, 50, 75, 90)
    ),
    _purifier("webp-75", "WebP of quality 75", partial(recompress, kind="WEBP", quality=75)),
    _purifier("resize-0.5", "halved and enlarged", partial(resize_down_up, factor=0.5)),
    _purifier("median-3", "median of 3x3 pixels", partial(median, size=3)),
)
