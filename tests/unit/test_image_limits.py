"""The work on an image is bounded by its pixels and bytes, whatever it is made of."""

import struct
import time
import zlib

import numpy as np
import pytest
from support.builders import make_image
from support.hostile import (
    big_tiff_of_pages,
    jpeg_of_scans,
    jpeg_segment,
    jpeg_with,
    overlapping_exif,
    png_with,
    run_length_bmp,
    tiff,
    tiff_end,
    tiff_of_pages,
    tiff_of_strips,
)

from one4all.errors import BadImageError
from one4all.image_limits import is_plausible_exif
from one4all.images import decode, encode, peek_num_pixels
from one4all.metadata import MAX_EXIF


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(jpeg_of_scans(1000, side=2000), "over 100 scans", id="scans"),
        pytest.param(
            jpeg_with(jpeg_segment(0xE1, b"Exif\0\0" + bytes(90)) * 100_000),
            "over 1,000 segments",
            id="exif-segments",
        ),
        pytest.param(
            jpeg_with(jpeg_segment(0xFE, b"") + bytes(100_000)), "between its segments", id="junk"
        ),
        pytest.param(jpeg_with(jpeg_segment(0xF3, b"")), "broken segment", id="odd-segment"),
        pytest.param(
            jpeg_with(jpeg_segment(0xCC, jpeg_segment(0xE1, b"Exif\0\0"))),
            "broken segment",
            id="segment-inside-another",
        ),
        pytest.param(jpeg_with(make_image("JPEG", seed=1)[2:400]), "several frames", id="frames"),
        pytest.param(png_with(*[(b"tEXt", b"a\0b")] * 100_000), "chunks", id="texts"),
        pytest.param(png_with(*[(b"IDAT", b"")] * 100_000), "chunks", id="empty-chunks"),
        pytest.param(tiff_of_pages(40_000), "multi-page", id="pages"),
        pytest.param(big_tiff_of_pages(), "multi-page", id="page-after-itself"),
        pytest.param(big_tiff_of_pages(">"), "big-endian BigTIFF", id="big-endian"),
        pytest.param(tiff_of_strips(20_000), "more strips", id="strips"),
        pytest.param(tiff_of_strips(16, rows=65_535), "more strips", id="strips-of-all-rows"),
        pytest.param(run_length_bmp(60_000, 1000), "run-length BMP", id="run-length"),
    ],
)
def test_file_that_costs_more_than_its_pixels_is_refused_at_once(data, reason):
    start = time.process_time()
    with pytest.raises(BadImageError, match=reason):
        decode(data)
    assert peek_num_pixels(data) == 0
    assert time.process_time() - start < 2


def test_preview_of_a_raw_file_is_not_taken_for_its_picture():
    """Pillow reads the first directory of a NEF or DNG, and the raw data would be thrown away."""
    pixels = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8)]
    for more in ([(254, 4, 1, 1)], [(50706, 1, 4, 0x0401)], [(330, 4, 1, 8)]):
        with pytest.raises(BadImageError, match="first picture is a preview"):
            decode(tiff(sorted(pixels + more), bytes(99)))
    thumbnail = tiff_end(6)
    entry = struct.pack("<HHHII", 1, 254, 4, 1, 1) + bytes(4)
    kept = decode(tiff(sorted([*pixels, (330, 4, 1, thumbnail)]), entry + bytes(99)))
    assert kept.pixels.shape == (8, 8, 1)


EXIF = overlapping_exif(900, 50_000)
BOMB = b"a\0\0" + zlib.compress(bytes(1_000_000))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(jpeg_with(jpeg_segment(0xE1, b"Exif\0\0" + EXIF)), id="exif"),
        pytest.param(jpeg_with(jpeg_segment(0xE2, b"MPF\0" + EXIF)), id="picture-index"),
        pytest.param(
            jpeg_with(*(jpeg_segment(0xE1, b"Exif\0\0" + EXIF[a : a + 9000]) for a in (0, 9000))),
            id="exif-in-parts",
        ),
        pytest.param(png_with((b"eXIf", EXIF)), id="png-exif"),
        pytest.param(png_with(*[(b"eXIf", overlapping_exif(1, 9))] * 900), id="png-exif-again"),
        pytest.param(png_with(*[(b"iCCP", BOMB)] * 900), id="png-profiles"),
        pytest.param(png_with(*[(b"zTXt", BOMB)] * 900), id="png-texts"),
        pytest.param(make_image("WEBP", lossless=True, exif=b"Exif\0\0" + EXIF), id="webp-exif"),
    ],
)
def test_costly_description_is_left_out_and_the_picture_kept(data):
    start = time.process_time()
    image = decode(data)
    kinds = [kind for kind, _ in image.png_chunks]
    assert time.process_time() - start < 1
    assert image.pixels.shape == (40, 56, 3)
    assert len(image.description.exif) <= MAX_EXIF
    assert image.converted == ""
    assert set(kinds) <= {b"eXIf", b"zTXt"}
    assert len(encode(image, "lossless")) < 36_000


def test_files_at_the_limit_are_decoded():
    assert decode(jpeg_of_scans(100)).pixels.shape == (64, 64, 1)
    strips = decode(tiff_of_strips(2, overlap=False)).pixels
    np.testing.assert_array_equal(strips.ravel(), np.arange(256))
    assert decode(jpeg_with(jpeg_segment(0xFE, b"x") * 900)).pixels.shape == (40, 56, 3)
    assert decode(run_length_bmp(100, 10)).pixels.shape == (10, 100, 3)


def test_exif_directory_of_one_entry_that_points_to_itself_is_read_once():
    entry = struct.pack("<HHII", 0x8769, 4, 1, 8)
    block = b"II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    assert is_plausible_exif(block)
    assert not is_plausible_exif(overlapping_exif(900, 50_000))
    assert not is_plausible_exif(overlapping_exif(1001, 4))
    assert not is_plausible_exif(b"II*\0" + bytes(1 << 20))
