"""Labelled images from many places, packed into WebDataset shards.

A source is one of

* an embedded corpus (one4all/assets/corpora): the small photos ``caltech-photos``, or the rendered
  emoji ``emoji-nature`` and ``emoji-things``;
* a folder with one sub-folder of images for each class;
* a torchvision data set, ``torchvision:NAME`` (see ``TORCHVISION``).

A packed sample has an image member, ``.cls`` (class index), ``.txt`` (class name) and ``.json``
(key, label and, where the source has them, finer labels). Image files are packed as they are, never
encoded again; only data sets that exist as bare pixels (CIFAR) are written as PNG.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from one4all.corpus.class_folders import (
    OnDuplicate,
    list_image_files,
    split_by_class,
    without_duplicates,
)
from one4all.corpus.tar import write_shard
from one4all.errors import ConfigError, UsageError
from one4all.extras import require
from one4all.images import DecodedImage, encode
from one4all.storage import LocalStorage, Storage

Split = Literal["train", "test"]
Order = Callable[[int], Sequence[int]]
"""An order of so many images."""

_EMBEDDED = files("one4all") / "assets" / "corpora"
TORCHVISION = (
    "OxfordIIITPet",
    "Flowers102",
    "StanfordCars",
    "Food101",
    "SUN397",
    "CIFAR10",
    "CIFAR100",
    "ImageNet",
)


@dataclass(frozen=True)
class LabelledImage:
    """One image of a corpus.

    Attributes:
        key: Unique within the corpus; becomes the WebDataset key.
        data: The image file.
        extension: Of the image member, without the dot.
        label: Class index.
        label_name: Class name.
        extra: Goes into the ``.json`` member.
    """

    key: str
    data: bytes
    extension: str
    label: int
    label_name: str
    extra: dict[str, Any] = field(default_factory=dict)


def embedded_corpora() -> list[str]:
    """Names of the corpora inside the package."""
    return sorted(e.name.removesuffix(".parquet") for e in _EMBEDDED.iterdir())


def open_corpus(
    source: str,
    *,
    split: Split = "train",
    labels: Literal["coarse", "fine"] = "coarse",
    root: Path | None = None,
    download: bool = False,
    test_share: float = 0,
    shuffle: bool = False,
    seed: int = 0,
    on_duplicate: OnDuplicate | None = None,
) -> Iterator[LabelledImage]:
    """Images of a corpus, in an order that is always the same.

    Args:
        source: Embedded name, folder of class folders, or ``torchvision:NAME``.
        split: Part of the corpus; a folder has only what it holds.
        labels: Granularity of ``.cls``; only the embedded emoji have fine labels.
        root: Where torchvision keeps its files.
        download: Let torchvision fetch them.
        test_share: Share of each class of a folder that is its "test" split, 0..1; at 0 a folder
            has no split.
        shuffle: In random order; otherwise in that of the source, which is by class in a folder.
        seed: Seed of the order and of ``test_share``.
        on_duplicate: Given: files of a folder with the same bytes as an earlier one are left out,
            on both sides of a split, and named to it.

    Raises:
        UsageError: Unknown source, or nothing in it.
        ConfigError: Something that only another kind of source has.
    """

    def order(count: int) -> Sequence[int]:
        if not shuffle:
            return range(count)
        drawn: list[int] = np.random.default_rng(seed).permutation(count).tolist()
        return drawn

    if test_share and not Path(source).is_dir():
        raise ConfigError(f"{source!r} has a split of its own; only a folder is split by a share")
    if source in embedded_corpora():
        return _embedded(source, split, labels, order)
    if labels != "coarse":
        raise ConfigError(f"{source!r} has one set of labels; only embedded emoji have 'fine'")
    if source.startswith("torchvision:"):
        return _torchvision(source.removeprefix("torchvision:"), split, root, download, order)
    if Path(source).is_dir():
        return _image_folder(Path(source), split, test_share, order, seed, on_duplicate)
    raise UsageError(
        f"no corpus {source!r}: give a folder of class folders, torchvision:NAME with NAME one of "
        f"{', '.join(TORCHVISION)}, or one of {', '.join(embedded_corpora())}"
    )


def pack(
    images: Iterable[LabelledImage],
    destination: Storage,
    *,
    prefix: str,
    images_per_shard: int = 1000,
) -> tuple[int, int]:
    """Write images as shards ``<prefix>-000000.tar``, ``<prefix>-000001.tar``, ...

    The same images make the same bytes. A shard becomes visible when it is whole.

    Args:
        images: Corpus, in the order wanted.
        destination: Where the shards go.
        prefix: Start of the shard names.
        images_per_shard: Images in each but the last.

    Returns:
        Numbers of shards and images.

    Raises:
        UsageError: No images, or shards of that name exist already.
    """
    existing = next(destination.list(f"{prefix}-"), None)
    if existing is not None:
        raise UsageError(f"{destination.uri} already holds {existing.key}; choose another place")
    stream = iter(images)
    num_shards = num_images = 0
    while group := list(islice(stream, images_per_shard)):
        with destination.writer(f"{prefix}-{num_shards:06d}.tar") as writer:
            write_shard(writer, _members(group))
            writer.commit()
        num_shards, num_images = num_shards + 1, num_images + len(group)
    if not num_images:
        raise UsageError("the source holds no images")
    return num_shards, num_images


def _members(images: Sequence[LabelledImage]) -> Iterator[tuple[str, bytes]]:
    for image in images:
        record = {"key": image.key, "label": image.label_name} | image.extra
        yield f"{image.key}.{image.extension}", image.data
        yield f"{image.key}.cls", str(image.label).encode()
        yield f"{image.key}.txt", image.label_name.encode()
        yield f"{image.key}.json", json.dumps(record, ensure_ascii=False).encode()


def _embedded(
    name: str, split: Split, labels: Literal["coarse", "fine"], order: Order
) -> Iterator[LabelledImage]:
    require("pyarrow", "evaluate")
    import pyarrow.parquet as parquet

    with as_file(_EMBEDDED / f"{name}.parquet") as path:
        table = parquet.read_table(path, filters=[("split", "=", split)])
    if labels not in table.column_names:
        raise ConfigError(f"{name!r} has one set of labels; only embedded emoji have {labels!r}")
    about = {"coarse": "coarse_name", "fine": "fine_name", "style": "style", "source": "source"}
    rows = table.to_pylist()
    for row in (rows[index] for index in order(len(rows))):
        yield LabelledImage(
            key=row["key"],
            data=row["image"],
            extension=row["format"],
            label=row[labels],
            label_name=row[f"{labels}_name"],
            extra={key: row[column] for key, column in about.items() if column in row},
        )


def _image_folder(
    root: Path,
    split: Split,
    test_share: float,
    order: Order,
    seed: int,
    on_duplicate: OnDuplicate | None,
) -> Iterator[LabelledImage]:
    files = list_image_files(root)
    storage = LocalStorage(root)
    if on_duplicate:
        files = without_duplicates(files, storage, on_duplicate)
    if test_share:
        train, test = split_by_class(files, test_share, seed=seed)
        files = train if split == "train" else test
    for index in order(len(files)):
        file = files[index]
        data = storage.read_bytes(file.name)
        yield LabelledImage(file.key, data, file.extension, file.label, file.label_name)


def _torchvision(
    name: str, split: Split, root: Path | None, download: bool, order: Order
) -> Iterator[LabelledImage]:
    """Images of a torchvision data set; files as they are where it keeps files."""
    if name not in TORCHVISION:
        raise UsageError(f"no torchvision data set {name!r} here, only {', '.join(TORCHVISION)}")
    from torchvision import datasets

    constructor: Any = getattr(datasets, name)
    options: dict[str, Any] = {"root": root or Path("data")}
    if name.startswith("CIFAR"):
        options |= {"train": split == "train", "download": download}
    elif name == "ImageNet":
        options |= {"split": "train" if split == "train" else "val"}
    elif name == "OxfordIIITPet":
        options |= {"split": "trainval" if split == "train" else "test", "download": download}
    elif name == "SUN397":
        options |= {"download": download}
    else:
        options |= {"split": split, "download": download}
    try:
        dataset = constructor(**options)
    except (RuntimeError, OSError, ImportError) as error:
        raise UsageError(
            f"torchvision cannot open {name} below {options['root']}: {error}"
        ) from error
    chosen: Sequence[int] = range(len(dataset))
    if name == "SUN397":  # has no split of its own: the paper's 80/20 with its seed
        drawn = np.random.default_rng(35).permutation(len(dataset))
        cut = len(dataset) * 4 // 5
        chosen = sorted((drawn[:cut] if split == "train" else drawn[cut:]).tolist())
    names = [str(n[0] if isinstance(n, tuple) else n) for n in getattr(dataset, "classes", [])]
    paths = _file_paths(dataset)
    for index in (chosen[place] for place in order(len(chosen))):
        if paths is not None:
            data, extension = paths[index].read_bytes(), paths[index].suffix.lower().lstrip(".")
            label = _labels(dataset)[index]
        else:
            image, label = dataset[index]
            pixels = np.asarray(image.convert("RGB"))
            data, extension = encode(DecodedImage(pixels, "PNG"), "lossless"), "png"
        label_name = names[label] if names else str(label)
        yield LabelledImage(f"{split}-{index:08d}", data, extension, int(label), label_name)


def _file_paths(dataset: Any) -> list[Path] | None:
    """Image files of a torchvision data set, or None if it keeps bare pixels."""
    for attribute in ("_image_files", "_images"):
        if hasattr(dataset, attribute):
            return [Path(path) for path in getattr(dataset, attribute)]
    if hasattr(dataset, "samples") or hasattr(dataset, "_samples"):
        samples = getattr(dataset, "samples", None) or dataset._samples
        return [Path(path) for path, _ in samples]
    return None


def _labels(dataset: Any) -> Sequence[int]:
    if hasattr(dataset, "_labels"):
        labels: Sequence[int] = dataset._labels
        return labels
    samples = getattr(dataset, "samples", None) or dataset._samples
    return [label for _, label in samples]
