"""Fitting a codebook to images in this process: no labels, no training, no Ray.

`pipelines.fit` does the same to corpora of any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from one4all.encoders import EncoderConfig, load_encoder
from one4all.encoders.backends import load_backend
from one4all.encoders.config import BackendName
from one4all.errors import UsageError
from one4all.images import Pixels, check_pixels, decode, from_pillow, working_copy
from one4all.perturbation import DEFAULT_EPSILON_LEVELS
from one4all.protectors.codebook import fit_codebook
from one4all.protectors.config import DEFAULT_CODEBOOK, DEFAULT_ENCODER, CodebookConfig
from one4all.protectors.protector import Protector

Embeddings: TypeAlias = npt.NDArray[np.float32]

_BATCH = 32


def fit(
    images: Iterable[Image.Image | bytes | Pixels],
    *,
    strength: str = "",
    num_concepts: int | None = None,
    codebook: CodebookConfig = DEFAULT_CODEBOOK,
    encoder: EncoderConfig = DEFAULT_ENCODER,
    encoder_backend: BackendName = "auto",
    epsilon_levels: int = DEFAULT_EPSILON_LEVELS,
    seed: int = 0,
    name: str = "codebook",
    on_image: Callable[[int], None] = lambda count: None,
) -> Protector:
    """Fit a codebook to images, and return a protector with it.

    Args:
        images: Pillow images, image files as bytes, or (H, W, C) uint8 arrays; read once, and only
            a few are in memory at a time.
        strength: Look of the pattern: discreet (hardly seen), balanced, strong or gray-proof;
            default: as ``codebook`` says.
        num_concepts: Number of clusters of images; default: as ``codebook`` says.
        codebook: Other settings of it.
        encoder: Encoder whose embeddings are clustered.
        encoder_backend: What computes them; see `BackendName`. In another, clusters and so the
            protector may differ a little.
        epsilon_levels: Budget in 8-bit levels.
        seed: Seed of the clusters' starts and of the patterns.
        name: Name for people.
        on_image: Called with the number of images embedded so far.

    Raises:
        UsageError: Fewer than two images, or fewer than ``num_concepts``; or no such strength.
        BadImageError: An image that cannot be read; leave it out, and fit again.
    """
    given: dict[str, Any] = {}
    if num_concepts is not None:
        given["num_concepts"] = num_concepts
    if strength:
        given["pattern"] = codebook.pattern.with_strength(strength)
    config = CodebookConfig.model_validate(codebook.model_dump() | given)
    loaded = load_encoder(encoder)
    # Here all count; drafts are for the protector that is made of it, and shares the backend.
    backend = load_backend(loaded, encoder_backend, drafts=True)
    working = (working_copy(_pixels(image), loaded.input_size) for image in images)
    parts: list[Embeddings] = []
    count = 0
    while batch := list(islice(working, _BATCH)):
        parts.append(backend.embed(np.stack(batch)).numpy())
        count += len(batch)
        on_image(count)
    if count < 2:
        raise UsageError(f"a codebook needs two images or more, and here are {count}")
    fitted, _ = fit_codebook(torch.from_numpy(np.concatenate(parts)), config, seed=seed)
    return Protector.assemble(
        encoder,
        loaded,
        fitted,
        name=name,
        working_size=loaded.input_size,
        config=fitted.config,
        epsilon_levels=epsilon_levels,
        training={"num_images": count, "seed": seed},
    )


def _pixels(image: Any) -> Pixels:
    """Pixels of whatever an image may be given as."""
    if isinstance(image, bytes):
        return decode(image).pixels
    if isinstance(image, np.ndarray):
        return check_pixels(image)
    return from_pillow(image).pixels
