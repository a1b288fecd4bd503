"""Images and shards that are broken in any way, against what is promised of them: `make fuzz`.

Files made by test code are mutated: bytes changed, cut, repeated, spliced. What is checked:

* an image is decoded, or a `BadImageError`; a shard is protected, or a `ShardError`: nothing else;
* the CPU time of either has a bound in proportion to its bytes and pixels;
* a member of a protected shard is the source's, byte for byte, or a protected image;
* no member that was copied is an image to Pillow; the audit finds no problem.

Rounds go on, each with a seed of its own, until the time is over. What breaks a promise is made as
small as can be and kept in the folder. CI runs fixed seeds (tests/unit/test_fuzz.py).
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
import tarfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from support import hostile
from support.builders import (
    first_unit,
    make_16_bit_png,
    make_binding,
    make_image,
    make_pixels,
    make_protector,
    make_tar,
)
from support.phone_photos import KINDS, jxl_of_frames, make_heic, make_photo, make_turned

from one4all.audit import audit_unit
from one4all.corpus.tar import read_members
from one4all.errors import BadImageError, ShardError
from one4all.images import decode, encode, peek_num_pixels, pillow_format
from one4all.protectors.protector import Protector
from one4all.rewrite import RewriteConfig, rewrite_unit
from one4all.storage import open_storage

MAX_PIXELS = 300_000
LARGEST = 1 << 18  # bytes of a mutated file
IMAGES_A_ROUND, SHARDS_A_ROUND = 1000, 150
EXIF = Image.Exif()
EXIF[0x0112], EXIF[0x010F] = 6, "Maker"
EXIF.get_ifd(0x8769)[0x9003] = "2026:11:23 08:00:00"
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _saved(format: str, mode: str = "RGB", **options: object) -> bytes:
    """In a format that Pillow writes and we do not protect."""
    buffer = io.BytesIO()
    image = Image.open(io.BytesIO(make_image("PNG"))).convert(mode)
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _animated(format: str) -> bytes:
    frames = [Image.open(io.BytesIO(make_image("PNG", seed=i))) for i in range(3)]
    return _saved(format, save_all=True, append_images=frames)


SEEDS = (
    make_image("JPEG", exif=EXIF, icc_profile=PROFILE),
    make_image("JPEG", "CMYK"),
    make_image("JPEG", "L", progressive=True, dpi=(300, 300)),
    make_image("PNG", exif=EXIF, icc_profile=PROFILE),
    make_image("PNG", "P", transparency=3),
    make_image("PNG", "LA"),
    make_image("WEBP", exif=EXIF),
    make_image("WEBP", "RGBA", lossless=True),
    make_image("BMP"),
    make_image("TIFF", "RGBA", compression="tiff_lzw"),
    make_image("TIFF", tile=None, exif=EXIF, icc_profile=PROFILE),
    *(make_photo(kind) for kind in KINDS),
    *(make_photo(kind, make_pixels(channels=4)) for kind in KINDS),
    make_turned("AVIF", 5),
    make_heic(tile_size=64, thumbnails=[32]),
    jxl_of_frames(3),
    make_16_bit_png(3),
    *(_animated(format) for format in ("MPO", "WEBP", "PNG", "TIFF", "GIF")),
    *(_saved(format) for format in ("GIF", "ICO", "JPEG2000", "PPM", "PCX", "QOI", "SGI", "DDS")),
    *(_saved(format, "1") for format in ("XBM", "MSP", "PPM")),
    hostile.jpeg_of_scans(90),
    hostile.jpeg_with(hostile.jpeg_segment(0xE1, b"Exif\0\0" + hostile.overlapping_exif(99, 900))),
    hostile.png_with(*[(b"tEXt", b"transparency\x003")] * 9, mode="L"),
    hostile.tiff_of_strips(2, overlap=False),
    hostile.tiff_of_pages(9),
    hostile.big_tiff_of_pages(),
    hostile.run_length_bmp(100, 100),
    b"<?xml version='1.0'?><svg/>",
    b"a text",
    b"",
)
NUM_PROTECTABLE = 20  # those that come first
_NUMBERS = (0, 1, 2, 8, 255, 256, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF)

_place = st.floats(0, 1)
_change = st.one_of(
    st.tuples(st.just("set"), _place, st.binary(min_size=1, max_size=4)),
    st.tuples(
        st.just("set"),
        _place,
        st.builds(
            lambda number, size, order: (number % 256**size).to_bytes(size, order),
            st.sampled_from(_NUMBERS),
            st.sampled_from((1, 2, 4)),
            st.sampled_from(("big", "little")),
        ),
    ),
    st.tuples(st.just("cut"), _place, _place),
    st.tuples(st.just("end"), _place, st.none()),
    st.tuples(st.just("repeat"), _place, st.tuples(st.integers(1, 600), st.integers(1, 999))),
    st.tuples(st.just("splice"), _place, st.sampled_from(SEEDS)),
)


def _changed(data: bytes, change: tuple[str, float, object]) -> bytes:
    what, place, detail = change
    at = int(place * len(data))
    match what, detail:
        case "set", bytes():
            return data[:at] + detail + data[at + len(detail) :]
        case "cut", float():
            return data[:at] + data[at + int(detail * (len(data) - at) / 9) :]
        case "end", _:
            return data[: (at + len(data)) // 2]
        case "repeat", (int(length), int(times)):
            return data[:at] + data[at : at + length] * times + data[at + length :]
        case "splice", bytes():
            return data[:at] + detail + data[at:]
    raise AssertionError(what)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A file, mutated up to three times: mostly behind its signature, often in its headers."""
    data = draw(st.sampled_from(SEEDS[:NUM_PROTECTABLE]) | st.sampled_from(SEEDS))
    for what, place, detail in draw(st.lists(_change, max_size=3)):
        kept, nearer = draw(st.sampled_from(((0, 1), (12, 1), (12, 1), (12, 20), (12, 20))))
        changed = _changed(data[kept:], (what, place / nearer, detail))
        data = (data[:kept] + changed)[:LARGEST]
    return data


_names = st.one_of(
    st.builds(
        "{}.{}".format, st.sampled_from("ab"), st.sampled_from("jpg txt bin json 1.png".split())
    ),
    st.text(min_size=1, max_size=120).filter(lambda name: "\0" not in name),
)
_records = st.builds(
    hostile.pax_record,
    st.sampled_from("path size linkpath mtime uid uname GNU.sparse.major hdrcharset x".split()),
    st.one_of(st.text(max_size=12), st.sampled_from(("a.jpg", "0", "7", "-1", "1.5", "BINARY"))),
)


@st.composite
def shards(draw: st.DrawFn) -> bytes:
    """A tar of such files, mutated itself; its checksums are often made right again."""
    members = draw(st.lists(st.tuples(_names, files()), max_size=4, unique_by=lambda m: m[0]))
    dialect = draw(st.sampled_from((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)))
    tar = make_tar(members, format=dialect)
    if draw(st.integers(0, 3)) == 3:
        extension = b"".join(draw(st.lists(_records, max_size=4)))
        for change in draw(st.lists(_change, max_size=1)):
            extension = _changed(extension, change)[:LARGEST]
        tar = hostile.with_pax(extension, content=draw(files()))[:-1024] + tar
    if draw(st.integers(0, 3)) == 3:
        link = draw(st.sampled_from((b"1", b"2", b"5", b"g", b"L", b"S", b"\0")))
        size = draw(st.sampled_from((0, 0, b"\xff" * 12, b"\x80" + bytes(10) + b"\1", b"7" * 12)))
        tar = hostile.tar_header("link", kind=link, size=size, link="a.jpg") + tar
    for what, place, detail in draw(st.lists(_change, max_size=2)):
        block = int(place * len(tar)) // 512 * 512
        if what == "set" and tar[block + 257 : block + 262] == b"ustar":
            at = block + draw(st.integers(0, 511))
            tar = tar[:at] + detail + tar[at + len(detail) :]
            header = hostile.with_checksum(tar[block : block + 512])
            tar = tar[:block] + header + tar[block + 512 :]
        else:
            tar = _changed(tar, (what, place, detail))[: 4 * LARGEST]
    return tar


def check_image(data: bytes) -> None:
    """Decoded, or refused, in bounded time; and written in both formats, or refused."""
    started = time.process_time()
    pixels = min(peek_num_pixels(data), MAX_PIXELS)
    try:
        image = decode(data, max_pixels=MAX_PIXELS)
        for output_format in ("match", "lossless"):
            again = decode(encode(image, output_format), max_pixels=MAX_PIXELS)
            assert again.pixels.shape == image.pixels.shape
            assert output_format == "match" or (again.pixels == image.pixels).all()
    except BadImageError:
        pass
    _expect_bounded(started, len(data), pixels)


def check_shard(tar: bytes) -> None:
    """Refused, or copied and protected, with nothing let through."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "in").mkdir()
        (Path(folder) / "in" / "s.tar").write_bytes(tar)
        source, out = open_storage(f"{folder}/in"), open_storage(f"{folder}/out")
        unit, config = first_unit(source), RewriteConfig(max_image_pixels=MAX_PIXELS)
        started = time.process_time()
        try:
            manifest = rewrite_unit(unit, source, out, *_tools(), pool=_pool())
        except ShardError:
            assert not (Path(folder) / "out" / "s.tar").exists()
            return
        finally:
            # 512 bytes are a member at least, and an image may be as small as 30.
            _expect_bounded(started, len(tar), len(tar) // 512 * MAX_PIXELS)
        before = {member.name: member for member in read_members(io.BytesIO(tar))}
        written = (Path(folder) / "out" / "s.tar").read_bytes()
        num_protected = 0
        for member in read_members(io.BytesIO(written)):
            if member.payload == before[member.name].payload:
                assert member.envelope == before[member.name].envelope
                assert not pillow_format(member.payload), f"{member.name!r} was let through"
            else:
                num_protected += 1
        assert num_protected == manifest.num_protected
        binding = make_binding(source.uri, **config.bound)
        assert audit_unit(unit, manifest, source, out, binding).problems == []


def run(
    check: Callable[[bytes], None],
    inputs: st.SearchStrategy[bytes],
    *,
    number: int,
    examples: int,
    folder: Path,
) -> None:
    """Check mutated inputs; what breaks a promise is kept, as small as can be."""

    path = folder / f"{check.__name__}-{number}.bin"

    def keep_what_breaks(data: bytes) -> None:
        try:
            check(data)
        except BaseException:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            path.with_suffix(".txt").write_text(traceback.format_exc())
            raise

    options = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    try:
        seed(number)(options(given(inputs)(keep_what_breaks)))()
    except Exception as error:  # Hypothesis would print all of the input
        raise AssertionError(f"{error!r:.300}; {path} is the input, .txt the trace") from None


def _expect_bounded(started: float, num_bytes: int, num_pixels: int) -> None:
    seconds = time.process_time() - started
    bound = 1 + 5e-6 * num_bytes + 2e-6 * num_pixels
    assert seconds < bound, f"{seconds:.1f} CPU seconds for {num_bytes} bytes, {num_pixels} pixels"


@cache
def _tools() -> tuple[Protector, RewriteConfig]:
    return make_protector(), RewriteConfig(batch_size=2, max_image_pixels=MAX_PIXELS)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1000, help="of the first round")
    parser.add_argument("--folder", type=Path, default=Path("runs/fuzz"))
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    deadline = time.monotonic() + 60 * options.minutes
    number = options.seed
    while number == options.seed or time.monotonic() < deadline:
        run(check_image, files(), number=number, examples=IMAGES_A_ROUND, folder=options.folder)
        run(check_shard, shards(), number=number, examples=SHARDS_A_ROUND, folder=options.folder)
        print(f"seed {number}: {IMAGES_A_ROUND} images, {SHARDS_A_ROUND} shards", flush=True)
        number += 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
