"""Labelled images in memory, at one size: what adversaries are trained and tested on.

Shape suffixes: N images, H W image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import numpy.typing as npt
from PIL import Image

from one4all.corpus import Sample, Unit, images_of, list_units, read_samples
from one4all.corpus.packing import LabelledImage
from one4all.errors import BadImageError, ShardError, UsageError
from one4all.images import DEFAULT_MAX_PIXELS, Pixels, colour, decode
from one4all.storage import open_storage

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LabelledImages:
    """One split of a data set.

    Attributes:
        images_NHWC: (N, H, W, 3) uint8.
        labels_N: (N,) int64 class indices from 0.
        class_names: By class index; empty if the data set does not say.
    """

    images_NHWC: Pixels
    labels_N: Labels
    class_names: tuple[str, ...] = ()

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

    def resized(self, size: int) -> LabelledImages:
        """The same at another side in pixels, as a trainer makes it: antialiased (Lanczos)."""
        if size == self.size:
            return self
        images = np.empty((len(self), size, size, 3), np.uint8)
        for index, pixels in enumerate(self.images_NHWC):
            images[index] = _resize(pixels, size)
        return replace(self, images_NHWC=images)


def read_labelled(
    uri: str, *, size: int = 0, max_images: int = 0, sidecar_patterns: Sequence[str] = ()
) -> LabelledImages:
    """Read a labelled corpus of shards: one image and one ``.cls`` member a sample.

    Args:
        uri: Folder or s3:// prefix.
        size: Side in pixels: the middle square of each image, resized. 0 keeps images that are
            square and of one size.
        max_images: Take only the first; 0 takes all.
        sidecar_patterns: Images of a sample that are no photos, such as ``*.seg.png``; see
            `one4all.corpus.images_of`.

    Returns:
        Images and labels in shard order; class names from ``.txt`` members, if there are any.

    Raises:
        UsageError: No shards, or images of several sizes and ``size`` is 0.
        ShardError: A sample without a readable image or without a class index.
    """
    return _collect(_samples(uri, sidecar_patterns), uri, size, max_images)


def read_corpus(
    images: Iterable[LabelledImage], name: str, *, size: int = 0, max_images: int = 0
) -> LabelledImages:
    """The same from `one4all.corpus.packing.open_corpus`; ``name`` is for messages."""
    samples = ((image.key, image.data, image.label, image.label_name) for image in images)
    return _collect(samples, name, size, max_images)


def _samples(uri: str, sidecar_patterns: Sequence[str]) -> Iterator[tuple[str, bytes, int, str]]:
    """Key, image file, class index and class name of each sample of a corpus of shards."""
    storage = open_storage(uri)
    for unit in list_units(storage):
        for sample in _named(unit, read_samples(storage, unit)):
            members = {m.name.rpartition(".")[2].lower(): m.payload for m in sample.members}
            pictures = [member.payload for member in images_of(sample, sidecar_patterns)]
            if len(pictures) != 1 or "cls" not in members:
                hint = "; name masks and the like in sidecar_patterns" * (len(pictures) > 1)
                raise ShardError(
                    f"{unit.name}: sample {sample.key!r} needs one image and one .cls member, "
                    f"and has {len(pictures)} and {int('cls' in members)}{hint}"
                )
            try:
                label = int(members["cls"])
            except ValueError as error:
                raise ShardError(
                    f"{unit.name}: sample {sample.key!r}: its .cls is not a class index"
                ) from error
            class_name = members.get("txt", b"").decode("utf-8", "replace")
            yield sample.key, pictures[0], label, class_name


def _named(unit: Unit, samples: Iterator[Sample]) -> Iterator[Sample]:
    """The samples of a unit; an error names it. Leaving it out would be another experiment."""
    try:
        yield from samples
    except ShardError as error:
        raise ShardError(f"{unit.name}: {error}") from error


def _collect(
    samples: Iterable[tuple[str, bytes, int, str]], name: str, size: int, max_images: int
) -> LabelledImages:
    images, labels, names = [], [], dict[int, str]()
    for key, payload, label, class_name in islice(samples, max_images or None):
        try:
            images.append(_square(payload, size))
        except BadImageError as error:
            raise ShardError(f"{name}: sample {key!r}: {error}") from error
        labels.append(label)
        names.setdefault(label, class_name.strip())
    if not images:
        raise UsageError(f"{name} holds no image; for shards, one4all pack makes some")
    if len({image.shape for image in images}) != 1:
        raise UsageError(f"{name} holds images of several sizes; say which size to use")
    complete = all(names.get(label) for label in range(max(labels) + 1))
    class_names = tuple(names[label] for label in range(max(labels) + 1)) if complete else ()
    return LabelledImages(np.stack(images), np.array(labels, np.int64), class_names)


def _square(payload: bytes, size: int) -> Pixels:
    pixels = colour(decode(payload, max_pixels=DEFAULT_MAX_PIXELS).pixels)
    if pixels.shape[2] == 1:
        pixels = pixels.repeat(3, axis=2)
    if not size:
        return pixels
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    square = np.ascontiguousarray(pixels[top : top + side, left : left + side])
    return square if side == size else _resize(square, size)


def _resize(pixels: Pixels, size: int) -> Pixels:
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.LANCZOS))
