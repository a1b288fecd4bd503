"""How visible a protection is: three distances that follow the eye, in colour as in brightness.

PSNR counts levels and SSIM looks at brightness alone; both miss what people see first, a change of
colour over a large area. See docs/evaluation.md for what is a small value and what a large one.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import pairwise, product
from typing import Any

import numpy as np
from PIL import Image

from one4all.extras import installed, require
from one4all.images import Pixels, colour

_WINDOW = 1024  # side in pixels: bounds the memory, to about half a gigabyte
_FLIP_REACH = 16  # pixels: more than the radius of FLIP's filters at its viewing distance
_SSIMULACRA2_SIDE = 256  # pixels: its six scales need so many
_PACKAGES = ("flip_evaluator", "skimage", "ssimulacra2")
NOT_INSTALLED = "visibility was not measured: pip install 'one4all[visibility]'"
_FIGURES = {
    "ciede2000": ("CIEDE2000", ".1f"),
    "flip": ("FLIP", ".3f"),
    "ssimulacra2": ("SSIMULACRA2", ".1f"),
}


@dataclass(frozen=True)
class Visibility:
    """How different a clean and a protected image look.

    Attributes:
        ciede2000: Mean difference in colour over the pixels; 0 for identical images, and about 1
            is what a trained eye tells apart on two large patches.
        flip: Mean difference, 0..1, that somebody sees who flips between the two images, 70 cm
            from a screen that is 70 cm wide and has 3,840 pixels a row; 0 for identical images.
        ssimulacra2: Quality as people rate it; 100 for identical images, 90 is hard to tell from
            the original, 70 high, 50 medium, 30 low, and there is no lower end.

    Sources: Sharma, Wu, Dalal, "The CIEDE2000 color-difference formula", 2005 (CIE 142-2001);
    Andersson et al., "FLIP: a difference evaluator for alternating images", 2020; Cloudinary,
    SSIMULACRA 2.1, 2023.
    """

    ciede2000: float
    flip: float
    ssimulacra2: float

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {getattr(self, key):{form}}" for key, (name, form) in _FIGURES.items()
        )


IDENTICAL = Visibility(0.0, 0.0, 100.0)


@dataclass
class VisibilitySummary:
    """Mean and worst of several images; what is kept does not grow with their number.

    Attributes:
        num_images: How many were measured.
        mean: Of each distance.
        worst: Of each distance, whichever image has it.
    """

    num_images: int = 0
    mean: Visibility = IDENTICAL
    worst: Visibility = IDENTICAL

    @classmethod
    def of(cls, images: Iterable[Visibility]) -> VisibilitySummary:
        summary = cls()
        for image in images:
            summary.add(image)
        return summary

    def add(self, image: Visibility) -> None:
        self.num_images += 1
        mean, new = asdict(self.mean), asdict(image)
        self.mean = Visibility(
            **{key: mean[key] + (new[key] - mean[key]) / self.num_images for key in mean}
        )
        self.worst = Visibility(
            max(self.worst.ciede2000, image.ciede2000),
            max(self.worst.flip, image.flip),
            min(self.worst.ssimulacra2, image.ssimulacra2),
        )

    def cells(self) -> dict[str, str]:
        """Mean, and the worst in brackets, as text by the name of the distance."""
        return {
            name: f"{getattr(self.mean, key):{form}} ({getattr(self.worst, key):{form}})"
            for key, (name, form) in _FIGURES.items()
        }

    def __str__(self) -> str:
        return ", ".join(f"{name} {cell}" for name, cell in self.cells().items())

    def figures(self) -> dict[str, float]:
        """Columns of a table: each distance by its name, and its worst as ``<name>_worst``."""
        return {
            f"{field.name}{suffix}": getattr(of, field.name)
            for field in fields(Visibility)
            for suffix, of in (("", self.mean), ("_worst", self.worst))
        }


def measurable() -> bool:
    """Whether the packages that measure are installed."""
    return all(installed(package) for package in _PACKAGES)


def require_packages() -> None:
    """Make sure that visibility can be measured.

    Raises:
        UsageError: A package is missing; the text has the command that installs it.
    """
    require("flip_evaluator", "visibility")
    require("skimage", "visibility")
    require("ssimulacra2", "visibility")


def visibility(clean: Pixels, protected: Pixels) -> Visibility:
    """Measure how different two images look; takes about four seconds a megapixel.

    Colours are compared, taken as sRGB; alpha is not, and gray counts as three equal channels. An
    image of over 1,024 pixels a side is measured in equal windows, and the mean is taken over the
    windows. For CIEDE2000 and FLIP, which are means over pixels, that changes nothing: FLIP sees
    beyond the edge of its window. SSIMULACRA2 misses what is larger than a window: up to three
    points of the shipped protector on 1,400 pixels. An image of under 256 pixels a side is
    continued by its mirror image for SSIMULACRA2, because its weights fit six scales alone: on 224
    pixels the package computes five, and calls noise 60 that it calls 73 on 256.

    Args:
        clean, protected: (H, W, C) uint8 of the same shape, as `decode` returns.

    Raises:
        UsageError: The packages of the extra ``visibility`` are not installed.
    """
    require_packages()
    height, width = clean.shape[:2]
    first, second = _rgb(clean), _rgb(protected)
    ciede2000 = flip = ssimulacra2 = 0.0
    for rows, columns in product(_windows(height), _windows(width)):
        inside = slice(*rows), slice(*columns)
        share = (rows[1] - rows[0]) * (columns[1] - columns[0]) / (height * width)
        ciede2000 += share * _ciede2000(first[inside], second[inside])
        flip += share * _flip(first, second, rows, columns)
        ssimulacra2 += share * _ssimulacra2(first[inside], second[inside])
    return Visibility(ciede2000, flip, ssimulacra2)


def _rgb(pixels: Pixels) -> Pixels:
    channels = colour(pixels)
    rgb: Pixels = np.broadcast_to(channels, (*channels.shape[:2], 3))
    return rgb


def _windows(side: int) -> Iterator[tuple[int, int]]:
    """Equal parts of a side."""
    count = -(-side // _WINDOW)
    return pairwise(side * index // count for index in range(count + 1))


def _ciede2000(first: Pixels, second: Pixels) -> float:
    from skimage.color import deltaE_ciede2000, rgb2lab

    return _mean(deltaE_ciede2000(*(rgb2lab(_unit(image)) for image in (first, second))))


def _flip(first: Pixels, second: Pixels, rows: tuple[int, int], columns: tuple[int, int]) -> float:
    """Of one window, seen together with what lies around it."""
    from flip_evaluator import evaluate

    top, left = (max(0, span[0] - _FLIP_REACH) for span in (rows, columns))
    around = slice(top, rows[1] + _FLIP_REACH), slice(left, columns[1] + _FLIP_REACH)
    errors, _, _ = evaluate(
        _unit(first[around]),
        _unit(second[around]),
        "LDR",
        applyMagma=False,
        computeMeanError=False,
    )
    return _mean(errors[rows[0] - top : rows[1] - top, columns[0] - left : columns[1] - left])


def _ssimulacra2(first: Pixels, second: Pixels) -> float:
    from ssimulacra2 import compute_ssimulacra2

    return float(compute_ssimulacra2(_as_file(first), _as_file(second)))


def _as_file(image: Pixels) -> io.BytesIO:
    """The package reads files alone, but also from memory."""
    missing = [(0, max(0, _SSIMULACRA2_SIDE - side)) for side in image.shape[:2]]
    file = io.BytesIO()
    Image.fromarray(np.pad(image, [*missing, (0, 0)], "symmetric")).save(file, "PPM")
    file.seek(0)
    return file


def _unit(image: Pixels) -> Any:
    """Values in 0..1, float32, contiguous."""
    return np.ascontiguousarray(image, np.float32) / 255


def _mean(values: Any) -> float:
    return float(values.mean(dtype=np.float64))
