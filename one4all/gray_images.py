"""Gray images as colour images, so that there is room for a pattern in colour.

A file of one channel stays so unless it is asked for otherwise: a photographer of black and white
does not expect a tint. But then it holds none of the pattern that the other images have.
"""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
from PIL import Image, ImageCms

from one4all.images import DecodedImage

_COLOUR_SPACE = (b"iCCP", b"gAMA", b"cHRM", b"sRGB", b"cICP")  # not that of converted tones


def is_gray(image: DecodedImage) -> bool:
    """Whether its file has one channel, beside alpha; three equal channels are colour."""
    num_channels: int = image.pixels.shape[2]
    return num_channels < 3


def in_colour(image: DecodedImage) -> DecodedImage:
    """The same picture in three equal channels, if it has one; alpha is kept.

    Returns:
        (H, W, 3) or (H, W, 4) uint8 pixels in sRGB. A profile for one channel does not fit three:
        its tones are converted, each channel within half a level, and it is left out, as is all
        else of the file that states a colour space. Any other profile that such a file may have is
        left out, too; readers pay no heed to it.
    """
    if not is_gray(image):
        return image
    gray, chunks = Image.fromarray(image.pixels[:, :, 0]), image.png_chunks
    if image.icc_profile:
        gray = gray.point(_tones(image.icc_profile))
        chunks = tuple(chunk for chunk in chunks if chunk[0] not in _COLOUR_SPACE)
    pixels = np.repeat(np.asarray(gray)[:, :, None], 3, axis=2)
    target = "RGB"
    if image.pixels.shape[2] == 2:
        pixels, target = np.concatenate([pixels, image.pixels[:, :, 1:]], axis=2), "RGBA"
    before = f"{image.converted} and " if image.converted else ""
    return replace(
        image,
        pixels=pixels,
        icc_profile=b"",
        png_chunks=chunks,
        converted=f"{before}{'L' if target == 'RGB' else 'LA'} to {target}",
    )


def _tones(profile: bytes) -> list[int]:
    """Shade in sRGB of each of 256 shades of gray; itself, if the profile is not one of gray."""
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    try:
        shown = ImageCms.profileToProfile(
            ramp,
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
        )
    except (ImageCms.PyCMSError, OSError):
        return list(range(256))
    assert shown is not None  # it is, unless told to convert in place
    tones: list[int] = np.asarray(shown)[0, :, 1].tolist()
    return tones
