"""Builds the labelled corpus of small photos that ships with the package.

The recipe takes photos of Caltech-101 (Fei-Fei Li, Marco Andreeto, Marc'Aurelio Ranzato and Pietro
Perona, CaltechDATA, CC BY 4.0), shrinks them to 128 pixels and writes ``caltech-photos.parquet``.
`TAKEN` was chosen by eye: classes without people, and photos on which nobody can be recognised and
no name, watermark or mark of copyright was found. Most drawings were left out, too. Of photos that
are nearly the same one was taken. A fifth of each class is for the test. The same photos and the
same Pillow give the same bytes.

DIR holds the classes as the archive of the publishers has them, ``DIR/bonsai/image_0001.jpg``.
Needed: ``pillow`` and ``pyarrow``.

Run ``python tools/build_photos.py --photos DIR --out one4all/assets/corpora``.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

NAME = "caltech-photos"
SIDE = 128  # pixels of the longer side
QUALITY = 85
TEST_EVERY = 5

COLUMNS = [("key", "string"), ("split", "string"), ("image", "binary"), ("format", "string")]
COLUMNS += [("coarse", "int32"), ("coarse_name", "string"), ("source", "string")]

#: Each class, followed by the numbers of its photos.
TAKEN = """
    bonsai: 1 3 5-6 8-9 11-13 16 19 21-24 26-27 30-34 37 40-43 46 50 52-54 56-65 67-70 72-73
        76-78 82 84 90 96-97 99 101 104-109 112 116 119 124 127
    butterfly: 1-2 4 6-8 10 12-16 18-20 23-30 32 35-38 41-42 44-45 48-49 52 54 56-58 60-61 63-64
        67-68 70-74 76-77 79 81-82 84-86 88-91
    chandelier: 1 3-5 7 9 11-13 16-20 22-26 30 32 34 36 40 43-45 47-54 56 58-59 61-65 67-70 72-76
        78-80 82 84-85 87 89-91 93 95-103 106-107
    crab: 1-2 4-5 8 10-11 14-16 20-37 39-42 44-49 52-62 64-65 67-73
    crayfish: 2-3 5 7 9 11-16 18-19 21-23 25-26 28-29 31-37 39-40 42-44 47 50 52-53 55-56 58-64 66
        69-70
    elephant: 1-9 12-13 15-20 23 25-27 29-31 33-34 36 38-43 45 47-51 53 55-60 62 64
    ewer: 1-37 39-40 42-65 68-75 77 79-80 82 84
    flamingo: 2-6 8 11-13 15-17 19-28 32-35 37-39 41-47 50-51 53-54 56-60 62 64-67
    grand_piano: 1-4 7-8 10 13-15 17-19 21-25 33 37-40 42-45 47 50 52-55 57 60-65 68-76 79-82
        86 89-91 93-99
    hawksbill: 1 3 6-16 18 21-22 25-28 31 34-36 41-44 46-49 52-53 55-57 60 62 66-69 71 73-74 77-78
        81-83 85-86 89-91 93-95 97-99
    hedgehog: 1-3 5-7 9 11 13-18 20-31 33 35-39 42-44 46-54
    ibis: 1-13 15-19 21-23 25-42 45-46 48-78 80
    joshua_tree: 1-3 5-15 17-20 22-33 35 37 39 42-57 59-60 63-64
    kangaroo: 1-3 5-7 9-14 16-17 19-20 22 27 29 32-35 37-40 42-46 48-49 51-58 60-61 63-64 67-71
        74-76 78-86
    ketch: 2-3 5-8 10 12 15 17 19 21-22 24-25 27-30 32 34-35 38-40 42-44 47-51 55-57 59-60 62-65
        67-68 70-72 74-79 81 83-86 88-89 91-95 98 100 104-108 112-114
    lamp: 1-7 9 11-17 19-25 27-33 35-43 45-47 49-50 52-57 59-61
    llama: 1 3 6-9 11-14 16-17 19-20 22-23 26-33 35-37 43 45-47 49 51-52 54-61 64-65 68-75 78
    lotus: 1-8 10-14 16-22 26-32 34-46 48-49 51 53-57 59-66
    minaret: 1-13 15-23 25-40 42-50 52-54 57-73 75-76
    rhino: 1-6 8 10 12-24 26 28 30 32-35 37-54 56-59
    scorpion: 1 3-16 18-30 33-38 41 43-44 46 48 50 52-55 57-63 65 67-71 73-75 77 79-80 83-84
    starfish: 1-3 6-12 14-19 21-26 28-44 46-47 49 51 53-56 59 61-64 66 68 70-72 74-78 81-84 86
    sunflower: 1-3 5-12 14 19-21 23-25 27 29-32 34-43 45 47-55 58 61-66 68-71 73-81 83-84
    trilobite: 2-10 12-14 16-18 20-21 23-30 32-36 38-41 43-56 58-63 65-67 69-76 78 80-81 83-86
    windsor_chair: 1-7 10-25 27-35 37 40 43-45 47-48 50-54 56
"""


def parse_taken(text: str) -> dict[str, list[int]]:
    """Reads the text of the classes into the numbers of their photos."""
    taken: dict[str, list[int]] = {}
    for word in text.split():
        if word.endswith(":"):
            numbers = taken[word[:-1]] = []
        else:
            first, _, last = word.partition("-")
            numbers.extend(range(int(first), int(last or first) + 1))
    return taken


def digest(key: str) -> str:
    """Returns a stable text by which keys are put into an order that says nothing of them."""
    return hashlib.sha256(key.encode()).hexdigest()


def shrink(path: Path) -> bytes:
    """Returns a photo as a small JPEG file."""
    with Image.open(path) as photo:
        small = photo.convert("RGB")
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=None)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return buffer.getvalue()


def build(photos: Path) -> pa.Table:
    """Shrinks the photos.

    Args:
        photos: Folder of class folders.

    Returns:
        The table: the training split first, each split in the order of a hash of the key.
    """
    rows: list[tuple[str | int | bytes, ...]] = []
    taken = parse_taken(TAKEN)
    for label, (name, numbers) in enumerate(taken.items()):
        for place, number in enumerate(sorted(numbers, key=lambda n: digest(f"{name}_{n:04d}"))):
            image = shrink(photos / name / f"image_{number:04d}.jpg")
            split = "train" if place % TEST_EVERY else "test"
            title = name.replace("_", " ")
            rows.append((f"{name}_{number:04d}", split, image, "jpg", label, title, "Caltech-101"))
    rows.sort(key=lambda row: (row[1] != "train", digest(str(row[0]))))
    about = {
        "name": NAME,
        "source": "https://data.caltech.edu/records/mzrjq-6wc02",
        "authors": "Fei-Fei Li, Marco Andreeto, Marc'Aurelio Ranzato, Pietro Perona",
        "licence": "CC-BY-4.0",
        "changes": f"selected, shrunk to {SIDE} pixels, encoded as JPEG of quality {QUALITY}",
    }
    schema = pa.schema(COLUMNS, metadata={b"one4all": json.dumps(about).encode()})
    return pa.table([list(column) for column in zip(*rows, strict=True)], schema=schema)


def main() -> None:
    """Builds the corpus and prints a summary of it."""
    parser = argparse.ArgumentParser(description="Builds the corpus of small photos.")
    parser.add_argument("--photos", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args()
    table = build(arguments.photos)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{NAME}.parquet"
    pq.write_table(table, path, compression="none", use_dictionary=["split", "format", "source"])
    print(f"{path.name}: {table.num_rows} rows, {path.stat().st_size} bytes")
    names, splits = (table[column].to_pylist() for column in ("coarse_name", "split"))
    counts = Counter(zip(names, splits, strict=True))
    for name in dict.fromkeys(sorted(names)):
        print(f"  {name:20} train {counts[name, 'train']:4} test {counts[name, 'test']:4}")


if __name__ == "__main__":
    main()
