"""A folder with one sub-folder of images for each class: what it holds, without reading it.

Which images are duplicates, and which are for testing, is decided here.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath

import numpy as np

from one4all.errors import UsageError
from one4all.image_kinds import IMAGE_EXTENSIONS
from one4all.storage import LocalStorage, Storage
from one4all.text import shown

OnDuplicate = Callable[[str, str], None]
"""Receives the name of a file that is left out, and of the one that has the same bytes."""


@dataclass(frozen=True)
class ImageFile:
    """One image of a folder.

    Attributes:
        name: Path within the folder.
        key: Unique within the folder; fit to be a WebDataset key.
        label: Index of its class, by the sorted names of the sub-folders.
        size: Bytes.
    """

    name: str
    key: str
    label: int
    size: int

    @property
    def extension(self) -> str:
        return PurePosixPath(self.name).suffix.lower().lstrip(".")

    @property
    def label_name(self) -> str:
        return PurePosixPath(self.name).parts[0]


def list_image_files(root: Path) -> list[ImageFile]:
    """The images of a folder, by class and path.

    Raises:
        UsageError: No sub-folders, or a name that cannot become a key.
        AccessError: A folder that cannot be read.
    """
    storage = LocalStorage(root)
    storage.check(writable=False)
    classes = sorted(
        entry.name for entry in root.iterdir() if entry.is_dir() and entry.name[0] != "."
    )
    if not classes:
        raise UsageError(f"{root} has no sub-folders; it needs one for each class")
    found = []
    for label, name in enumerate(classes):
        taken: set[str] = set()
        # Not Path.rglob, which passes over folders that cannot be read.
        sizes = {PurePosixPath(info.key): info.size for info in storage.list(f"{name}/")}
        for relative in sorted(sizes):
            extension = relative.suffix.lower().lstrip(".")
            hidden = any(part.startswith(".") for part in relative.parts)
            if extension not in IMAGE_EXTENSIONS or hidden:
                continue
            path = root / relative
            if not _is_utf8(str(relative)):
                raise UsageError(f"{shown(str(path))} has a name that is not UTF-8; rename it")
            key = _safe_key(relative.with_suffix("").as_posix())
            if key in taken:  # a.jpg beside a.png, or a.b.jpg beside a_b.jpg
                key = _safe_key(relative.as_posix())
            if key in taken:
                raise UsageError(f"{path} would get a key that another image has; rename it")
            taken.add(key)
            found.append(ImageFile(str(relative), key, label, sizes[relative]))
    return found


def without_duplicates(
    files: Sequence[ImageFile], storage: Storage, on_duplicate: OnDuplicate
) -> list[ImageFile]:
    """Of files with the same bytes only the first, whatever their classes.

    Only files of equal size are read.
    """
    counts = Counter(file.size for file in files)
    first: dict[str, str] = {}
    kept = []
    for file in files:
        if counts[file.size] > 1:
            digest = hashlib.sha256(storage.read_bytes(file.name)).hexdigest()
            if first.setdefault(digest, file.name) != file.name:
                on_duplicate(file.name, first[digest])
                continue
        kept.append(file)
    return kept


def split_by_class(
    files: Sequence[ImageFile], test_share: float, *, seed: int
) -> tuple[list[ImageFile], list[ImageFile]]:
    """Images to train on and to test on, each class in the same proportion.

    Args:
        files: By class.
        test_share: Share of each class to test on, rounded; each class of two images or more has
            one on either side.
        seed: Seed of the choice.
    """
    train: list[ImageFile] = []
    test: list[ImageFile] = []
    for label, group in groupby(files, key=lambda file: file.label):
        members = list(group)
        count = min(max(1, round(test_share * len(members))), len(members) - 1)
        order = np.random.default_rng([seed, label]).permutation(len(members))
        chosen = set(order[:count].tolist())
        for index, file in enumerate(members):
            (test if index in chosen else train).append(file)
    return train, test


def _is_utf8(text: str) -> bool:
    """Whether a name of the file system is text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _safe_key(text: str) -> str:
    """A WebDataset key: no dot in the last component, since the first dot ends the key."""
    folder, slash, base = text.rpartition("/")
    return folder + slash + re.sub(r"\.", "_", base)
