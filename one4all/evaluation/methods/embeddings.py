"""Embeddings of image sets, made once: the codebooks of one corpus, and all strengths, share them.

They are remembered by the content of the images and of the encoder: a few in memory and, within
`kept_in`, in a folder that several processes use.

Shape suffixes: N images, D embedding width.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from one4all.encoders.base import Encoder
from one4all.evaluation.labelled import LabelledImages
from one4all.evaluation.methods.surrogate import chunks
from one4all.protectors.protector import Protector

_ENCODE_BATCH = 64
_MOST_RECENT = 4
_recent: dict[str, Tensor] = {}
_folder: ContextVar[Path | None] = ContextVar("folder of embeddings", default=None)

OnShare = Callable[[float], None]
"""Receives the share that is done, 0..1."""


@contextmanager
def kept_in(folder: Path | None) -> Iterator[None]:
    """Embeddings that are asked for meanwhile are read from there, or kept there; None: nowhere."""
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


def encode_corpus(
    encoder: Encoder,
    images: LabelledImages,
    device: torch.device,
    *,
    on_share: OnShare = lambda share: None,
) -> Tensor:
    """L2-normalised features of all images, float32 (N, D) on the CPU; so is the encoder after."""
    key = _key(images, "corpus", encoder.content_hash(), str(device))
    return _recall(key, lambda: _encode(encoder, images, device, on_share))


def encode_to_protect(protector: Protector, images: LabelledImages) -> Tensor:
    """`Protector.embed` of all images, for `Protector.protect`, which then does not encode."""
    card = protector.card
    key = _key(images, "protect", card.encoder_hash, str(card.working_size))
    return _recall(key, lambda: protector.embed(list(images.images_NHWC)))


def _key(images: LabelledImages, *parts: str) -> str:
    digest = hashlib.sha256(" ".join((*parts, str(images.images_NHWC.shape))).encode())
    digest.update(np.ascontiguousarray(images.images_NHWC).data)
    return digest.hexdigest()


def _recall(key: str, make: Callable[[], Tensor]) -> Tensor:
    if key not in _recent:
        while len(_recent) >= _MOST_RECENT:
            del _recent[next(iter(_recent))]
        folder = _folder.get()
        _recent[key] = make() if folder is None else _kept(folder, key, make)
    return _recent[key].clone()


def _kept(folder: Path, key: str, make: Callable[[], Tensor]) -> Tensor:
    """Read from the folder; made by the first who asks, for whom the others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key}.npy"
    with (folder / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            scratch = folder / f".{key}.npy"
            np.save(scratch, make().numpy())
            scratch.rename(path)  # whole or not at all
    return torch.from_numpy(np.load(path))


@torch.inference_mode()
def _encode(
    encoder: Encoder, images: LabelledImages, device: torch.device, on_share: OnShare
) -> Tensor:
    encoder.to(device)
    parts = []
    for part in chunks(len(images), _ENCODE_BATCH):
        batch = torch.from_numpy(images.images_NHWC[part]).permute(0, 3, 1, 2)
        parts.append(encoder.encode_image(batch.to(device)).cpu())
        on_share(part.stop / len(images))
    encoder.to("cpu")  # where everybody else has it, also if the embeddings had been known
    return torch.cat(parts)
