"""Loose images of a folder or bucket, packed into WebDataset shards, one shard at a time.

The images are files by their names; no file is encoded again. A sample has the number of its place
as key, the image, and a ``.json`` with the path where it was; with labels also ``.cls`` (class
index) and ``.txt`` (class name), by the folder that it lies in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from one4all.corpus.loose import LooseImages
from one4all.corpus.tar import write_shard
from one4all.corpus.units import ObjectVersion, Unit
from one4all.errors import SourceChangedError, UsageError
from one4all.image_kinds import has_image_name
from one4all.storage import Storage


@dataclass(frozen=True)
class LoosePack:
    """What is packed, and in which order.

    Attributes:
        images: Images, in the order of their keys.
        order_N: int64 (N,) places in ``images``, in the order of the shards.
        classes: Names of the classes, sorted; none without labels.
    """

    images: Sequence[ObjectVersion]
    order_N: np.ndarray
    classes: tuple[str, ...] = ()

    def shards(self, images_per_shard: int) -> Iterator[tuple[int, list[ObjectVersion]]]:
        """Number of its first image, and images, of each shard."""
        for start in range(0, len(self.order_N), images_per_shard):
            places = self.order_N[start : start + images_per_shard]
            yield start, [self.images[place] for place in places]


def plan_loose_pack(source: Storage, *, labels: bool, shuffle: bool, seed: int = 0) -> LoosePack:
    """List the images of a place, and draw their order; memory grows by about 200 bytes an image.

    Args:
        source: Where they are, at any depth; hidden files and folders are left out.
        labels: Whether the first folder of a path is the class of an image. Then each has to lie in
            one.
        shuffle: In random order; else in that of their keys.
        seed: Seed of the order.

    Raises:
        UsageError: There is no image; or one lies in no folder, and is to have a label.
    """
    images = []
    for info in source.list_data():
        hidden = any(part.startswith(".") for part in info.key.split("/"))
        if has_image_name(info.key) and not hidden:
            images.append(ObjectVersion(info.key, info.size, info.etag))
    if not images:
        raise UsageError(f"{source.uri} holds no images")
    classes: set[str] = set()
    if labels:
        homeless = next((image.key for image in images if "/" not in image.key), None)
        if homeless is not None:
            raise UsageError(
                f"{homeless} in {source.uri} lies in no folder, so it has no class; --labels=none "
                "packs without labels"
            )
        classes = {image.key.partition("/")[0] for image in images}
    order_N = np.arange(len(images))
    if shuffle:
        order_N = np.random.default_rng(seed).permutation(len(images))
    return LoosePack(images, order_N, tuple(sorted(classes)))


def pack_loose_shard(
    source: Storage,
    destination: Storage,
    key: str,
    images: Sequence[ObjectVersion],
    *,
    first: int,
    classes: Sequence[str],
) -> None:
    """Write one shard; it becomes visible when it is whole.

    Args:
        source: Where the images are.
        destination: Where the shard goes.
        key: Its key.
        images: Images, in their order.
        first: Number of the first of them, which makes the keys of samples.
        classes: Names of all classes; none without labels.

    Raises:
        SourceChangedError: An image is gone, or was replaced since it was listed.
    """
    with destination.writer(key) as writer:
        write_shard(writer, _members(source, images, first, classes))
        writer.commit()


def _members(
    source: Storage, images: Sequence[ObjectVersion], first: int, classes: Sequence[str]
) -> Iterator[tuple[str, bytes]]:
    unit = Unit(images[0].key, tuple(images), LooseImages.name)
    with closing(LooseImages().read(source, unit)) as samples:
        for number, image in enumerate(images, start=first):
            sample = next(samples, None)
            if sample is None or sample.key != image.key:
                raise SourceChangedError(
                    f"{image.key} in {source.uri} is gone, or was replaced since it was listed"
                )
            name = f"{number:09d}"
            extension = image.key.rpartition(".")[2].lower()
            yield f"{name}.{extension}", sample.members[0].payload
            record: dict[str, str] = {"key": name, "path": image.key}
            if classes:
                label = image.key.partition("/")[0]
                yield f"{name}.cls", str(classes.index(label)).encode()
                yield f"{name}.txt", label.encode("utf-8", "replace")
                record["label"] = label
            yield f"{name}.json", json.dumps(record).encode()
