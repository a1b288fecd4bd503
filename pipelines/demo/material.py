"""What the demo protects and attacks: embedded photos or drawings, or photos of the user's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from one4all.corpus.packing import LabelledImage, Split, open_corpus
from one4all.errors import UsageError

PHOTOS = "caltech-photos"
DRAWINGS = "emoji-nature"
_HELD_OUT = 5  # of a folder of photos, every fifth of a class is for the test


@dataclass(frozen=True)
class Material:
    """What is protected, and adversaries are trained on.

    Attributes:
        name: Name of the corpus, in folders and tables.
        images: Its images by split.
        sizes: Keys of `DataConfig`: at which they are protected and trained on.
        about: What they are, and at which size the controls are made.
    """

    name: str
    images: Callable[[Split], Iterable[LabelledImage]]
    sizes: dict[str, int]
    about: str


def embedded_photos() -> Material:
    """The embedded photos of Caltech-101."""
    return Material(
        name=PHOTOS,
        images=lambda split: open_corpus(PHOTOS, split=split),
        sizes={"size": 64},
        about=(
            "Photos of Caltech-101 (Li, Andreeto, Ranzato, Perona; CC BY 4.0), shrunk to 128 "
            "pixels; on this set, at its full size, the method was tuned. The protected copies are "
            "read back from the store, where JPEG has added its own error, and shrunk to 64 pixels "
            "like all others; the controls are made at 64. Other sets, and larger photos: "
            "docs/results.md, or yours, by one4all demo --photos."
        ),
    )


def drawings() -> Material:
    """The embedded corpus of emoji."""
    return Material(
        name=DRAWINGS,
        images=lambda split: open_corpus(DRAWINGS, split=split),
        sizes={},
        about="Drawings of 64 pixels, of which the encoder knows little: the hard case.",
    )


def photos(source: str) -> Material:
    """Photos of the user's.

    Args:
        source: A folder of class folders, of which every fifth photo of a class is held out for the
            test; or a torchvision data set, which has splits of its own.

    Raises:
        UsageError: There are no two classes to train and to test on.
    """

    def images(split: Split) -> Iterator[LabelledImage]:
        found = open_corpus(source, split=split)
        return held_out(found, split) if Path(source).is_dir() else found

    labels = (image.label for image in images("test"))
    first = next(labels, None)
    if all(label == first for label in labels):
        raise UsageError(
            f"{source} has fewer than two classes of {_HELD_OUT} photos or more; give a folder "
            "with a sub-folder for each class, better of a hundred photos each"
        )
    return Material(
        name="photos",
        images=images,
        sizes={"size": 64, "protect_size": 224},
        about=(
            "The protected copies are read back from the store, where JPEG has added its own "
            "error; the controls are made at 224 pixels. The adversary shrinks every copy to 64."
        ),
    )


def held_out(images: Iterable[LabelledImage], split: Split) -> Iterator[LabelledImage]:
    """One part of images that come without splits: every fifth of a class is for the test."""
    seen: Counter[int] = Counter()
    for image in images:
        seen[image.label] += 1
        if (seen[image.label] % _HELD_OUT == 0) == (split == "test"):
            yield image
