"""Gray images: they stay so and are counted, or they become colour images and hold the pattern."""

import io
import struct
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageCms
from support.builders import (
    TINY_ENCODER,
    first_unit,
    make_binding,
    make_image,
    make_tar,
    read_members,
)
from support.phone_photos import make_photo

from one4all import Protector
from one4all.audit import audit_unit
from one4all.encoders import load_encoder
from one4all.gray_images import in_colour
from one4all.images import decode
from one4all.protectors.codebook import Codebook
from one4all.protectors.config import CodebookConfig
from one4all.rewrite import RewriteConfig, rewrite_unit
from one4all.storage import open_storage

FILES = {
    "a.jpg": make_image("JPEG", "L"),
    "b.png": make_image("PNG", "LA"),
    "c.png": make_image("PNG", "1"),
    "d.tiff": make_image("TIFF", "L"),
    "e.bmp": make_image("BMP", "L"),
    "f.jpg": make_image("JPEG", "RGB"),
}


def one_curve_profile(gamma: float) -> bytes:
    """A profile of gray with a power for its curve, as version 2 of ICC.1 lays it out."""
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in (0.9642, 1, 0.8249)))
    curve = b"curv\0\0\0\0" + struct.pack(">IH2x", 1, round(gamma * 256))
    table, blocks, start = struct.pack(">I", 2), b"", 128 + 4 + 2 * 12
    for name, block in ((b"wtpt", white), (b"kTRC", curve)):
        table += name + struct.pack(">II", start + len(blocks), len(block))
        blocks += block
    header = struct.pack(">I4xI4s4s4s", start + len(blocks), 0x02400000, b"mntr", b"GRAY", b"XYZ ")
    header = header.ljust(36, b"\0") + b"acsp" + bytes(28)
    return (header + white[8:]).ljust(128, b"\0") + table + blocks


@pytest.fixture(scope="module")
def make_protector():
    """A codebook of some look."""
    encoder = load_encoder(TINY_ENCODER)

    def make(strength: str = "strong") -> Protector:
        config = CodebookConfig(num_concepts=2, pattern=strength)
        return Protector.assemble(
            *(TINY_ENCODER, encoder, Codebook(config, encoder.embedding_dim)),
            **{"name": "green", "working_size": 32, "config": config},
        )

    return make


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory, make_protector):
    """A shard of gray images and one in colour, protected."""

    def rewrite(tint_gray: bool, strength: str = "strong"):
        protector = make_protector(strength)
        folder = tmp_path_factory.mktemp("gray")
        (folder / "in").mkdir()
        (folder / "in" / "s.tar").write_bytes(make_tar([*FILES.items()]))
        source, out = open_storage(f"{folder}/in"), open_storage(f"{folder}/out")
        settings = RewriteConfig(tint_gray=tint_gray)
        unit = first_unit(source)
        manifest = rewrite_unit(unit, source, out, protector, settings)

        def audit(**changes):
            binding = make_binding(source.uri, **(settings.bound | changes))
            return audit_unit(unit, manifest, source, out, binding).problems

        return manifest, read_members((folder / "out" / "s.tar").read_bytes()), audit

    return rewrite


def test_gray_stays_gray_and_is_counted(rewritten):
    manifest, written, audit = rewritten(tint_gray=False)
    assert audit() == []
    assert (manifest.num_protected, manifest.num_gray) == (6, 5)
    assert [decode(file).pixels.shape[2] for file in written.values()] == [1, 2, 1, 1, 1, 3]
    assert "pixels became" in str(audit(tint_gray=True))
    stripes, *_ = rewritten(tint_gray=False, strength="gray-proof")
    assert stripes.num_gray == 0  # which gray holds, too


def test_gray_becomes_colour_and_holds_the_pattern(rewritten, make_protector):
    manifest, written, audit = rewritten(tint_gray=True)
    assert audit() == []
    assert manifest.num_gray == 0
    assert manifest.converted == {"1 to L and L to RGB": 1, "L to RGB": 3, "LA to RGBA": 1}
    for name, file in written.items():
        clean, found = in_colour(decode(FILES[name])).pixels, decode(file).pixels
        assert found.shape == clean.shape
        np.testing.assert_array_equal(found[:, :, 3:], clean[:, :, 3:])
        added = (found.astype(int) - clean)[:, :, :3].mean(axis=(0, 1))
        # Towards green, but where black or white leaves no room.
        assert added[1] - added[0] > 3, name
        assert added[1] - added[2] > 3, name
    assert "pixels became" in str(audit(tint_gray=False))
    # And so from Python.
    assert make_protector().protect_files([*FILES.values()], tint_gray=True) == [*written.values()]


@pytest.mark.parametrize("mode", ["L", "LA", "RGB"])
def test_a_gray_pillow_image_becomes_colour_if_it_is_so_wished(make_protector, mode):
    image = Image.open(io.BytesIO(make_image("PNG", mode)))
    assert make_protector().protect_image(image).mode == mode
    tinted = make_protector().protect_image(image, tint_gray=True)
    assert tinted.mode == {"L": "RGB", "LA": "RGBA"}.get(mode, mode)
    added = np.asarray(tinted, int)[:, :, :3] - np.asarray(image.convert("RGB"), int)
    assert added[:, :, 1].mean() > added[:, :, 0].mean() + 3


@pytest.mark.parametrize("kind", ["AVIF", "HEIC", "JPEG XL"])
def test_gray_phone_photo_becomes_colour(kind):
    clean = in_colour(decode(make_photo(kind, decode(FILES["a.jpg"]).pixels)))
    assert clean.pixels.shape[2] == 3


@pytest.mark.parametrize(
    ("profile", "shade"),
    [
        (b"", 128),
        (one_curve_profile(1.0), 188),  # half of the light
        (one_curve_profile(2.2), 128),
        (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), 128),  # not of gray
    ],
)
def test_tones_of_a_profile_are_kept_and_it_is_not(profile, shade):
    options = {"icc_profile": profile} if profile else {}
    image = decode(make_image("PNG", "L", **options))
    assert image.icc_profile == profile
    stated = ((b"gAMA", struct.pack(">I", 55556)), (b"pHYs", bytes(9)))
    middle = np.full((9, 7, 1), 128, np.uint8)
    colour = in_colour(replace(image, pixels=middle, png_chunks=image.png_chunks + stated))
    assert colour.icc_profile == b""
    assert dict(colour.png_chunks) == dict(stated[1:] if profile else stated)
    assert colour.pixels.shape[2] == 3
    assert np.abs(colour.pixels.astype(int) - shade).max() <= 1
    assert in_colour(colour) is colour
