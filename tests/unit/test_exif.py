"""EXIF is edited as bytes: values stay, whatever they are, and pictures go."""

import io
import json
import shutil
import struct
import subprocess

import numpy as np
import pytest
from PIL import Image
from support.metadata_blocks import block_of

from one4all.metadata import exif

MAX = 60_000


def read(block: bytes) -> dict[tuple[int, int], tuple[int, int, bytes]]:
    return {(e.directory, e.tag): (e.type, e.count, e.value) for e in exif.entries(block)}


@pytest.mark.parametrize("order", ["<", ">"])
def test_every_value_stays_byte_for_byte(order):
    utf8, latin1 = "© Zoë Müller".encode(), "© Zoë".encode("latin-1")
    short = struct.pack(f"{order}H", 6)
    block = block_of(
        (0, [(0x0112, 3, 1, short), (0x8298, 2, len(utf8), utf8), (0x013B, 2, 5, latin1[:5])]),
        (0x8769, [(0x9204, 10, 1, struct.pack(f"{order}ii", -1, 3)), (0x9000, 7, 4, b"0232")]),
        (0x8825, [(0x0000, 2, 4, b"odd\0"), (0x0006, 5, 1, struct.pack(f"{order}ii", -1, -1))]),
        (0xA005, [(0x0001, 2, 4, b"R98\0")]),
        order=order,
    )
    kept = exif.without_pictures(exif.PREFIX + block, max_bytes=MAX)
    assert read(kept) == read(block)
    assert len(read(kept)) == 8
    assert kept[:4] == block[:4]
    assert exif.orientation(kept) == 6
    assert exif.without_pictures(kept, max_bytes=MAX) == kept


def test_what_may_hold_a_picture_goes():
    secret = b"\xff\xd8\xffJPEG" * 40
    block = block_of(
        (0, [(0x0112, 3, 1, b"\3\0"), (0x014A, 4, 1, b"xxxx"), (0x02BC, 1, len(secret), secret)]),
        (0x8769, [(0x927C, 7, len(secret), secret), (0xA420, 2, 3, b"id\0")]),
        (1, [(0x0201, 4, 1, b"\x10\0\0\0"), (0x0202, 4, 1, b"\x10\0\0\0")]),
    )
    kept = exif.without_pictures(block, max_bytes=MAX)
    assert set(read(kept)) == {(0, 0x0112), (0x8769, 0xA420)}
    assert b"JPEG" not in kept
    assert len(kept) < 100


def test_limit_is_on_the_sum_and_the_longest_values_go_first():
    long = [(0x9C9B + n, 1, 1000 + n, bytes(1000 + n)) for n in range(50)]
    block = block_of((0, [(0x0112, 3, 1, b"\6\0"), (0x010F, 2, 8, b"a maker\0"), *long]))
    kept = exif.without_pictures(block, max_bytes=4096)
    assert len(kept) <= 4096
    assert {(0, 0x0112), (0, 0x010F), (0, 0x9C9B)} <= set(read(kept))
    assert exif.orientation(kept) == 6
    assert exif.without_pictures(block, max_bytes=20) == b""
    assert (
        exif.without_pictures(block_of((0, [(0x9C9B, 1, 2049, bytes(2049))])), max_bytes=MAX) == b""
    )


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"Exif\0\0",
        b"II*\0",
        b"II*\0\xff\xff\xff\xff",
        b"II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x03\0\1\0\0\0\6\0\0\0",  # 65,535 entries announced
        b"II*\0\x08\0\0\0\1\0" + b"\x69\x87\4\0\1\0\0\0\x08\0\0\0",  # a directory in itself
        b"II*\0\x08\0\0\0\1\0" + b"\x0f\1\2\0\xff\xff\xff\xff\x08\0\0\0",  # 4 GB of text
    ],
)
def test_broken_blocks_are_read_as_far_as_they_go(broken):
    kept = exif.without_pictures(broken, max_bytes=MAX)
    assert exif.orientation(kept) == exif.orientation(broken)
    assert set(read(kept)) <= {(0, 0x0112)}


def test_nothing_that_is_thrown_at_it_breaks_it():
    random = np.random.default_rng(0)
    good = bytearray(Image.Exif().tobytes() or b"")
    image = Image.new("RGB", (4, 4))
    tags = image.getexif()
    tags[0x0112], tags[0x8298], tags[0x011A] = 8, "me", 72.0
    tags.get_ifd(0x8769)[0x9003] = "2026:11:28 10:00:00"
    good = bytearray(tags.tobytes().removeprefix(exif.PREFIX))
    for _ in range(3000):
        bad = bytearray(good)
        for _ in range(int(random.integers(1, 6))):
            bad[int(random.integers(len(bad)))] = int(random.integers(256))
        bad = bad[: int(random.integers(len(bad) + 1))]
        kept = exif.without_pictures(bytes(bad), max_bytes=MAX)
        assert read(kept).items() <= read(bytes(bad)).items()
        assert len(kept) <= len(bad) + 64


@pytest.mark.skipif(not shutil.which("exiftool"), reason="needs Debian's libimage-exiftool-perl")
def test_another_reader_sees_the_same(tmp_path):
    random = np.random.default_rng(1)
    for number in range(8):
        order = "<>"[number % 2]
        texts = [(0x010E + n, 2, 9, random.bytes(8) + b"\0") for n in (0, 1, 2)]
        numbers = [(0x0112, 3, 1, struct.pack(f"{order}H", 1 + number))]
        rational = struct.pack(f"{order}ii", int(random.integers(-99, 99)), 7)
        block = block_of(
            (0, [*texts, *numbers]),
            (0x8769, [(0x9204, 10, 1, rational), (0xA434, 2, 5, b"lens\0")]),
            (0x8825, [(0x001D, 2, 11, b"2026:11:28\0")]),
            order=order,
        )
        seen = []
        for version in (block, exif.without_pictures(block, max_bytes=MAX)):
            buffer = io.BytesIO()
            Image.new("RGB", (8, 8)).save(buffer, "JPEG", exif=exif.PREFIX + version)
            path = tmp_path / "x.jpg"
            path.write_bytes(buffer.getvalue())
            command = ["exiftool", "-j", "-b", "-G1", "-EXIF:all", str(path)]
            found = subprocess.run(command, capture_output=True, check=True).stdout
            seen.append({k: v for k, v in json.loads(found)[0].items() if ":" in k})
        assert seen[0] == seen[1]
        assert len(seen[0]) >= 7
