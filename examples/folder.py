"""Protect a flat folder of images: the same names, in another folder.

    python examples/folder.py photos protected [--protector NAME_OR_FOLDER]

An image that cannot be protected is named with the reason, is not written, and does not stop the
others. Exit code 0: all are protected. 1: some are not. 2: nothing could be done.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import one4all

BATCH = 8  # images in one pass of the encoder; one by one is slower


def main() -> int:
    parser = argparse.ArgumentParser(description="Protect a flat folder of images.")
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--protector", default="default")
    options = parser.parse_args()
    if not options.source.is_dir():
        parser.error(f"{options.source} is no folder")
    if options.destination.resolve() == options.source.resolve():
        parser.error("the destination is the source; choose another folder")
    paths = sorted(p for p in options.source.iterdir() if p.is_file() and p.name[0] != ".")
    if not paths:
        parser.error(f"{options.source} holds no file")
    try:
        protector = one4all.load(options.protector)
    except one4all.UsageError as error:
        parser.error(str(error))

    options.destination.mkdir(parents=True, exist_ok=True)
    num_protected = 0
    for path, result in protect_all(protector, paths):
        if isinstance(result, one4all.BadImageError):
            print(f"not protected: {path.name}: {result}", file=sys.stderr)
        else:
            write_whole(options.destination / path.name, result)
            num_protected += 1
    print(f"{num_protected} of {len(paths)} images protected")
    return 0 if num_protected == len(paths) else 1


def protect_all(
    protector: one4all.Protector, paths: Sequence[Path]
) -> Iterator[tuple[Path, bytes | one4all.BadImageError]]:
    """Each path with its protected file, or with the reason why there is none."""
    for start in range(0, len(paths), BATCH):
        batch = paths[start : start + BATCH]
        try:
            files = protector.protect_files([path.read_bytes() for path in batch])
            yield from zip(batch, files, strict=True)
        except one4all.BadImageError:  # one of them: find out which
            for path in batch:
                try:
                    yield path, protector.protect_file(path.read_bytes())
                except one4all.BadImageError as error:
                    yield path, error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is visible only when it is whole: a killed run leaves no half image."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
