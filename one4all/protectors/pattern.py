"""How the bits of a code look on a picture: green and magenta cells, or cells of stripes.

Photos vary most in brightness, less between yellow and blue, and least between green and magenta.
There a cell of a few levels stands out most, and a network finds it in fewer steps than any other
colour (docs/lab-notebook.md, "Patterns"). A gray copy has no colour; stripes of brightness are what
it keeps, and what everybody sees.

Shape suffixes: N patterns, B bits, C channels, g cells a side, h w grid.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from one4all.codes import bits_of
from one4all.images import Pixels, colour
from one4all.perturbation import Levels
from one4all.protectors.config import VALUES_PER_CELL, PatternConfig

COLOUR = (-1.0, 1.0, -1.0)  # red, green, blue of a bit that is 1
_PHOTO_BLUR = 0.25  # cells
_SAMPLES_A_SIDE = 8  # of a value of the grid; more would not change what is left after the blur
_CHROMA_WEIGHT = 0.045  # of CIEDE2000
# sRGB to XYZ relative to the white point D65 (IEC 61966-2-1).
_RGB_TO_XYZ = torch.tensor(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
) / torch.tensor([[0.9505], [1.0], [1.089]])


def paint(bits_NB: Tensor, config: PatternConfig) -> Tensor:
    """Patterns of codes.

    Args:
        bits_NB: 1 green or upright, -1 magenta or lying; the cells of the left half, row by row.
        config: Their look.

    Returns:
        float32 (N, 3, h, w), h = w = ``config.side``, within +- ``config.amplitude``. A blurred
        pattern is scaled until its largest value is that again.
    """
    half, cells = config.bits_of_a_row, config.cells
    left_N1gq = bits_NB.float().view(-1, 1, cells, half)
    signs_N1gg = torch.cat([left_N1gq, left_N1gq[..., : cells // 2].flip(3)], dim=3)
    pattern_N1hw = F.interpolate(signs_N1gg, size=(config.side,) * 2, mode="nearest")
    if config.stripes:
        upright_w = _stripes(config)
        lying_hw = upright_w[:, None].expand(-1, config.side)
        pattern_N1hw = torch.where(pattern_N1hw > 0, upright_w, lying_hw)
        return config.amplitude * pattern_N1hw.repeat(1, 3, 1, 1)
    if config.smoothing:
        pattern_N1hw = _blur(pattern_N1hw, config.smoothing * VALUES_PER_CELL)
        pattern_N1hw = pattern_N1hw / pattern_N1hw.abs().amax(dim=(2, 3), keepdim=True)
    return config.amplitude * pattern_N1hw * torch.tensor(COLOUR)[:, None, None]


def _stripes(config: PatternConfig) -> Tensor:
    """Lighter and darker by turns along a side, float32 (w,); a stripe lies on the middle."""
    values_w = torch.arange(config.side)
    from_middle_w = (2 * values_w - config.side + 1).abs() // 2
    wide = VALUES_PER_CELL // 2
    return 1.0 - 2.0 * ((from_middle_w + wide // 2) // wide % 2)


def draw_patterns(num_patterns: int, config: PatternConfig, *, seed: int) -> Tensor:
    """Patterns of which none is like another.

    Args:
        num_patterns: N. Of 4x4 cells there are 256; more come again, each as often as any other.
        config: Their look.
        seed: Same seed, same patterns.

    Returns:
        float32 (N, 3, h, w), see `paint`.
    """
    generator = torch.Generator().manual_seed(seed)
    looks = torch.randperm(1 << config.num_bits, generator=generator)
    look_N = looks[torch.arange(num_patterns) % len(looks)]
    return paint(bits_of(look_N, config.num_bits), config)


def hide(delta_hwC: Levels, clean: Pixels, config: PatternConfig) -> Levels:
    """Fit a pattern to the colours of a photo; see ``masking`` and ``in_place`` of its look.

    Args:
        delta_hwC: (h, w, 3) float32 in levels, painted as ``config`` says, over the whole image.
        clean: (H, W, C) uint8. Gray has no colour, and leaves it as it is.
        config: Its look.

    Returns:
        (h, w, 3) float32. No value changes its sign, or grows beyond 1 / amplitude of what it was.

    Source of the weight of chroma: Sharma, Wu and Dalal 2005, S_C.
    """
    pixels = colour(clean)
    if not (config.masking or config.in_place) or pixels.shape[2] == 1:
        return delta_hwC
    own_hwC = torch.from_numpy(_shrunk(pixels, *delta_hwC.shape[:2])).float()
    painted_hw = torch.from_numpy(delta_hwC[:, :, 1])
    most_hw = painted_hw.abs() / config.amplitude
    seen_less_hw = 1 + config.masking * _CHROMA_WEIGHT * _soften(_chroma(own_hwC))
    wanted_hw = (painted_hw.abs() * seen_less_hw).minimum(most_hw)
    tint_hw = _soften(own_hwC @ torch.tensor([-0.25, 0.5, -0.25]))  # in units of `COLOUR`
    tint_hw = (tint_hw - tint_hw.mean()) * painted_hw.sign()
    added_hw = (wanted_hw - config.in_place * tint_hw).clamp(min=0)
    added_hw = added_hw.minimum(2 * wanted_hw).minimum(most_hw) * painted_hw.sign()
    result: Levels = (added_hw[:, :, None] * torch.tensor(COLOUR)).numpy()
    return result


def _shrunk(pixels: Pixels, height: int, width: int) -> Pixels:
    """Mean colours on a grid; of a large photo, those of its every second pixel, or third ..."""
    apart = min(pixels.shape[0] // height, pixels.shape[1] // width) // _SAMPLES_A_SIDE
    sampled = np.ascontiguousarray(pixels[:: max(apart, 1), :: max(apart, 1)])
    return np.array(Image.fromarray(sampled).resize((width, height), Image.Resampling.BOX))


def _soften(image_hw: Tensor) -> Tensor:
    """What the eye sees of a colour where a pattern lies: no details."""
    return _blur(image_hw[None, None], _PHOTO_BLUR * VALUES_PER_CELL)[0, 0]


def _chroma(rgb_hwC: Tensor) -> Tensor:
    """Chroma C of CIELAB, white point D65, of sRGB in levels."""
    share = rgb_hwC / 255
    linear = torch.where(share > 0.04045, ((share + 0.055) / 1.055) ** 2.4, share / 12.92)
    relative = linear @ _RGB_TO_XYZ.T
    cube_root = relative.clamp(min=1e-9) ** (1 / 3)
    f_hw3 = torch.where(relative > 216 / 24389, cube_root, relative * (841 / 108) + 4 / 29)
    x, y, z = f_hw3.unbind(2)
    return torch.hypot(500 * (x - y), 200 * (y - z))


def _blur(image_N1hw: Tensor, sigma: float) -> Tensor:
    """Gaussian blur; values at the edges are repeated beyond them."""
    kernel = _gaussian(sigma)
    padded = F.pad(image_N1hw, (len(kernel) // 2,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel.view(1, 1, -1, 1))
    return F.conv2d(rows, kernel.view(1, 1, 1, -1))


@cache
def _gaussian(sigma: float) -> Tensor:
    """Weights of a Gaussian, cut off at three times sigma; their number is odd."""
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-offsets.square() / (2 * sigma**2))
    return kernel / kernel.sum()
