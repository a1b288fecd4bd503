"""Labelled images in memory, at one size: what adversaries are trained and tested on.

Shape suffixes: N images, H W image.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from one4all.errors import ShardError, UsageError
from one4all.images import DEFAULT_MAX_PIXELS, Pixels, colour, decode
from one4all.ledger import list_shards
from one4all.shards import is_protectable, read_samples
from one4all.storage import open_storage

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LabelledImages:
    """One split of a data set.

    Attributes:
        images_NHWC: (N, H, W, 3) uint8.
        labels_N: (N,) int64 class indices from 0.
    """

    images_NHWC: Pixels
    labels_N: Labels

    def __post_init__(self) -> None:
        if not len(self.images_NHWC) == len(self.labels_N) > 0:
            raise UsageError(
                f"{len(self.images_NHWC)} images with {len(self.labels_N)} labels; one label for "
                "each image, and at least one image, are needed"
            )

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def num_classes(self) -> int:
        return int(self.labels_N.max()) + 1

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        return int(self.images_NHWC.shape[1])


def read_labelled(uri: str, *, size: int = 0) -> LabelledImages:
    """Read a labelled corpus of shards: one image and one ``.cls`` member a sample.

    Args:
        uri: Folder or s3:// prefix.
        size: Side in pixels: the middle square of each image, resized. 0 keeps images that are
            square and of one size.

    Returns:
        Images and labels in shard order.

    Raises:
        UsageError: No shards, or images of several sizes and ``size`` is 0.
        ShardError: A sample without a readable image or without a class index.
    """
    images, labels = [], []
    storage = open_storage(uri)
    shards, _ = list_shards(storage)
    if not shards:
        raise UsageError(f"{uri} holds no .tar shard; one4all pack makes some")
    for shard in shards:
        with closing(storage.open(shard.name)) as reader:
            for sample in read_samples(reader):
                members = {m.name.rpartition(".")[2].lower(): m for m in sample.members}
                pictures = [m for m in sample.members if is_protectable(m, ())]
                if len(pictures) != 1 or "cls" not in members:
                    raise ShardError(
                        f"{shard.name}: sample {sample.key!r} needs one image and one .cls member"
                    )
                try:
                    labels.append(int(members["cls"].payload))
                except ValueError as error:
                    raise ShardError(
                        f"{shard.name}: sample {sample.key!r}: its .cls is not a class index"
                    ) from error
                images.append(_square(pictures[0].payload, size))
    if len({image.shape for image in images}) != 1:
        raise UsageError(f"{uri} holds images of several sizes; say which size to use")
    return LabelledImages(np.stack(images), np.array(labels, np.int64))


def _square(payload: bytes, size: int) -> Pixels:
    pixels = colour(decode(payload, max_pixels=DEFAULT_MAX_PIXELS).pixels)
    if pixels.shape[2] == 1:
        pixels = pixels.repeat(3, axis=2)
    if not size:
        return pixels
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    square = np.ascontiguousarray(pixels[top : top + side, left : left + side])
    if side == size:
        return square
    return np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.LANCZOS))
