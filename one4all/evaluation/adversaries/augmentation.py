"""Batch augmentation: what an adversary does to its images before it looks at them.

The same seed augments each copy of a corpus alike. Whatever the pixels, a batch takes the same
draws of one NumPy generator; chains of torchvision's transforms take one draw a batch, which seeds
PyTorch's generator for that batch alone. Each image has draws of its own.

Shape suffixes: B batch, C channels, H W image.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from one4all.extras import require
from one4all.images import LUMA, Pixels

Augmentation = Literal[
    "none",
    "flip_crop",
    "strong",
    "jitter",
    "gray_0.1",
    "gray_0.2",
    "gray",
    "simclr",
    "moco_v2",
    "randaugment",
    "trivialaugment",
    "crop_0.35",
]

_MAX_ANGLE = 10.0  # degrees, of rotation and of shear
_SCALES = (0.8, 1.2)
_JITTER = 0.2
_CROPPING = ("simclr", "moco_v2", "crop_0.35")  # crop by themselves


def augment(
    images_BHWC: Pixels, kind: Augmentation, random: np.random.Generator, device: torch.device
) -> Tensor:
    """Augment one batch of training images and move it to the device.

    =============== ==============================================================================
    none            nothing
    flip_crop       half of the images mirrored, each shifted by up to an eighth of its side, edges
                    reflected
    strong          flip_crop, then rotation and shear of up to 10 degrees, scale 0.8 to 1.2, and
                    brightness, contrast and saturation times 0.8 to 1.2
    jitter          flip_crop, ColorJitter .4 .4 .4 .1
    gray_0.1, _0.2  flip_crop, one image in ten, in five, turned gray
    gray            flip_crop, every image gray, also at test (`prepare`); the attack "grayscale" is
                    that of ISS, whose network is tested in colour
    simclr          RandomResizedCrop .08 to 1, mirror, ColorJitter .8 .8 .8 .2 for 80 %, gray for
                    20 %, blur of sigma .1 to 2 pixels for 50 %
    moco_v2         RandomResizedCrop .2 to 1, ColorJitter .4 .4 .4 .1 for 80 %, gray for 20 %, the
                    same blur, mirror
    randaugment     flip_crop, 2 operations of magnitude 9
    trivialaugment  flip_crop, 1 operation of any magnitude
    crop_0.35       RandomResizedCrop .35 to 1, mirror
    =============== ==============================================================================

    A batch of 128 images of 64 pixels takes, in ms on one core: flip_crop 4, gray 10, gray_0.1 and
    gray_0.2 15, crop_0.35 and trivialaugment 26, randaugment 36, strong 39, jitter 77, simclr 134,
    moco_v2 141. A training step of resnet18 of width 16 with a coarse stem takes 75 in bfloat16.

    Args:
        images_BHWC: (B, H, W, 3) uint8.
        kind: See above.
        random: Advanced by as many draws as the batch needs.
        device: PyTorch device of the result.

    Returns:
        (B, 3, H, W) float32 levels, 0..255, channels last in memory.

    Raises:
        UsageError: torchvision, which has all but the first three and "gray", is missing.

    Sources: "strong": Sandoval-Segura et al. 2023 (orthogonal projection attack); there, rotation
    and shear resample one after the other, and what comes in at the edges is black. "simclr": Chen
    et al. 2020, appendix A, strength 1, as for ImageNet; its kernel is a tenth of the side.
    "moco_v2": Chen et al. 2020 ("Improved baselines"), its released code, with SimCLR's kernel.
    "randaugment": Cubuk et al. 2020, and "trivialaugment": Mueller and Hutter 2021, wide, both with
    torchvision's defaults, after shift and mirror as for CIFAR. Blur is in pixels of the image as
    it is trained on, whatever its size.
    """
    if kind == "none":
        return to_levels(images_BHWC, device)
    if kind not in _CROPPING:
        images_BHWC = _flip_and_shift(images_BHWC, random)
    if kind == "flip_crop":
        return to_levels(images_BHWC, device)
    if kind == "gray":
        return _all_gray(to_levels(images_BHWC, device))
    if kind == "strong":
        return _jitter(_warp(to_levels(images_BHWC, device), random), random)
    return _each(images_BHWC, _chain(kind, images_BHWC.shape[1]), random, device)


def prepare(images_BHWC: Pixels, kind: Augmentation, device: torch.device) -> Tensor:
    """One batch of test images for a network that was trained with ``kind``.

    Returns:
        As `augment`: the images as they are, or gray if all that the network saw was gray.
    """
    image = to_levels(images_BHWC, device)
    return _all_gray(image) if kind == "gray" else image


def to_levels(images_BHWC: Pixels, device: torch.device) -> Tensor:
    """(B, 3, H, W) float32 levels, channels last in memory, on the device."""
    return _channels_first(images_BHWC, device).float()


def _channels_first(images_BHWC: Pixels, device: torch.device) -> Tensor:
    """(B, 3, H, W) uint8, channels last in memory, on the device."""
    writable = np.require(images_BHWC, requirements=["C", "W", "E"])
    return torch.from_numpy(writable).to(device).permute(0, 3, 1, 2)


def _flip_and_shift(images_BHWC: Pixels, random: np.random.Generator) -> Pixels:
    size = images_BHWC.shape[1]
    reach = size // 8
    padded = np.pad(images_BHWC, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="reflect")
    result = np.empty_like(images_BHWC)
    for index, (top, left) in enumerate(random.integers(2 * reach + 1, size=(len(result), 2))):
        crop = padded[index, top : top + size, left : left + images_BHWC.shape[2]]
        result[index] = crop[:, ::-1] if random.random() < 0.5 else crop
    return result


def _warp(image_BCHW: Tensor, random: np.random.Generator) -> Tensor:
    """Rotate, shear and scale about the centre; bilinear, edges reflected."""
    turn, shear = np.deg2rad(random.uniform(-_MAX_ANGLE, _MAX_ANGLE, (2, len(image_BCHW))))
    scale = random.uniform(*_SCALES, len(image_BCHW))
    cos, sin, slope = np.cos(turn), np.sin(turn), np.tan(shear)
    zero = np.zeros_like(turn)
    # From output to input coordinates, hence the division by the scale.
    matrix = np.stack([cos, cos * slope - sin, zero, sin, sin * slope + cos, zero], axis=1)
    matrix[:, [0, 1, 3, 4]] /= scale[:, None]
    theta = torch.from_numpy(matrix.reshape(-1, 2, 3)).to(image_BCHW)
    grid = F.affine_grid(theta, list(image_BCHW.shape), align_corners=False)
    warped = F.grid_sample(image_BCHW, grid, padding_mode="reflection", align_corners=False)
    return warped.contiguous(memory_format=torch.channels_last)


def _jitter(image_BCHW: Tensor, random: np.random.Generator) -> Tensor:
    """Brightness, contrast and saturation, in this order, clamped after each."""
    draws = random.uniform(1 - _JITTER, 1 + _JITTER, (3, len(image_BCHW), 1, 1, 1))
    brightness, contrast, saturation = torch.from_numpy(draws).to(image_BCHW).unbind()
    image = (image_BCHW * brightness).clamp(0, 255)
    mean = _gray(image).mean(dim=(2, 3), keepdim=True)
    image = (mean + (image - mean) * contrast).clamp(0, 255)
    gray = _gray(image)
    return (gray + (image - gray) * saturation).clamp(0, 255)


def _gray(image_BCHW: Tensor) -> Tensor:
    """(B, 1, H, W)"""
    luma = torch.from_numpy(LUMA).to(image_BCHW).view(1, 3, 1, 1)
    return (image_BCHW * luma).sum(dim=1, keepdim=True)


def _all_gray(image_BCHW: Tensor) -> Tensor:
    gray = _gray(image_BCHW).clamp(0, 255).expand(-1, 3, -1, -1)
    return gray.contiguous(memory_format=torch.channels_last)


# --- chains of torchvision's transforms --------------------------------------------------------


def _each(
    images_BHWC: Pixels,
    chain: Callable[[Any], Tensor],
    random: np.random.Generator,
    device: torch.device,
) -> Tensor:
    """Every image through a chain, one after the other: on a batch it would draw once for all.

    On a CPU as Pillow images, in which colours are changed fastest; on a GPU where the batch is
    going to be, as a large image is slow to blur on one core. The draws are the same.
    """
    seed = int(random.integers(2**63))
    gpu = device.type != "cpu"
    inputs = _channels_first(images_BHWC, device) if gpu else map(Image.fromarray, images_BHWC)
    with torch.random.fork_rng(devices=[]):  # what the trainer draws elsewhere stays as it is
        torch.default_generator.manual_seed(seed)
        images = torch.stack([chain(image) for image in inputs])
    return images.to(device).float().contiguous(memory_format=torch.channels_last)


@lru_cache
def _chain(kind: Augmentation, size: int) -> Callable[[Any], Tensor]:
    """From a Pillow image, or a tensor (3, H, W) uint8, to such a tensor."""
    require("torchvision", "evaluate")
    from torchvision.transforms import v2

    def crop(smallest: float) -> Any:
        return v2.RandomResizedCrop(size, scale=(smallest, 1.0))

    def jitter(strength: float) -> Any:
        return v2.ColorJitter(strength, strength, strength, strength / 4)

    def sometimes(share: float, transform: Any) -> Any:
        return v2.RandomApply([transform], share)

    blur = sometimes(0.5, v2.GaussianBlur(size // 20 * 2 + 1, sigma=(0.1, 2.0)))
    mirror, to_tensor = v2.RandomHorizontalFlip(), v2.PILToTensor()
    chains = {
        "jitter": [jitter(0.4), to_tensor],
        "gray_0.1": [v2.RandomGrayscale(0.1), to_tensor],
        "gray_0.2": [v2.RandomGrayscale(0.2), to_tensor],
        "simclr": [
            *(crop(0.08), mirror, sometimes(0.8, jitter(0.8)), v2.RandomGrayscale(0.2)),
            *(to_tensor, blur),
        ],
        "moco_v2": [
            *(crop(0.2), sometimes(0.8, jitter(0.4)), v2.RandomGrayscale(0.2)),
            *(to_tensor, blur, mirror),
        ],
        "randaugment": [v2.RandAugment(), to_tensor],
        "trivialaugment": [v2.TrivialAugmentWide(), to_tensor],
        "crop_0.35": [crop(0.35), mirror, to_tensor],
    }
    chain: Callable[[Any], Tensor] = v2.Compose(chains[kind])
    return chain
