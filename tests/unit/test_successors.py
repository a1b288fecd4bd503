"""AVIF, HEIC and JPEG XL: written in kind, whole, upright, and never at any cost."""

import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw, ImageOps
from support.builders import (
    first_unit,
    make_binding,
    make_pixels,
    make_protector,
    make_tar,
    read_members,
)
from support.metadata_blocks import RIGHTS_XMP
from support.phone_photos import (
    KINDS,
    jxl_of_frames,
    make_heic,
    make_heic_of_two,
    make_photo,
    make_turned,
    replaced,
    with_frames,
    with_size,
)

from one4all import successors
from one4all.audit import audit_unit
from one4all.distances import psnr_db
from one4all.errors import BadImageError
from one4all.heif import with_cicp
from one4all.images import DecodedImage, decode, encode, extension_for, peek_num_pixels
from one4all.metadata import Description, exif
from one4all.rewrite import RewriteConfig, rewrite_unit
from one4all.storage import open_storage

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
ODD_TEXT = "Fotografin: Zoë".encode("latin-1")


def _described() -> Description:
    fields = Image.Exif()
    fields[0x013B], fields[0x0112] = "?" * len(ODD_TEXT), 6
    block = fields.tobytes().replace(b"?" * len(ODD_TEXT), ODD_TEXT)
    return Description.of(exif=block, xmp=RIGHTS_XMP % b"")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("channels", "kept"),
    [(1, 1), (2, (2, 4)), (3, 3), (4, 4)],
    ids=["gray", "gray-alpha", "rgb", "alpha"],
)
def test_picture_is_written_back_in_kind(kind, channels, kept):
    """AVIF and HEIC have no gray with alpha; JPEG XL has."""
    kept = kept if isinstance(kept, int) else kept[kind != "JPEG XL"]
    clean = make_pixels(channels=channels)
    image = decode(make_photo(kind, clean))
    assert (image.format, image.pixels.shape) == (kind, (40, 56, kept))
    assert peek_num_pixels(make_photo(kind, clean)) == 40 * 56
    again = decode(encode(image, "match"))
    assert (again.format, again.pixels.shape) == (kind, image.pixels.shape)
    assert psnr_db(image.pixels, again.pixels) > 36
    lossless = decode(encode(image, "lossless"))
    np.testing.assert_array_equal(lossless.pixels, image.pixels)
    expected = ("JPEG XL", "a.b") if kind == "JPEG XL" else ("PNG", "a.png")
    assert (lossless.format, extension_for("a.b", image, "lossless")) == expected
    if kind == "JPEG XL":
        np.testing.assert_array_equal(image.pixels, clean)
    elif kind == "AVIF" and channels == 4:
        np.testing.assert_array_equal(again.pixels[:, :, 3], clean[:, :, 3])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("output_format", ["match", "lossless"])
def test_rights_survive_byte_for_byte(kind, output_format):
    about = _described()
    image = decode(make_photo(kind, description=about))
    assert ODD_TEXT in image.description.exif
    assert exif.orientation(image.description.exif) == 1
    assert image.description == about.upright()
    marked = replace(image, description=image.description.with_data_mining_prohibited())
    again = decode(encode(marked, output_format))
    assert again.description == marked.description


@pytest.mark.parametrize("kind", ["AVIF", "HEIC"])
@pytest.mark.parametrize("output_format", ["match", "lossless"])
def test_colours_stay_what_they_are(kind, output_format):
    with_profile = decode(make_photo(kind, icc_profile=PROFILE))
    assert decode(encode(with_profile, output_format)).icc_profile == PROFILE
    display_p3 = decode(with_cicp(make_photo(kind), (12, 13)))
    assert display_p3.png_chunks == ((b"cICP", bytes((12, 13, 0, 1))),)
    assert decode(encode(display_p3, output_format)).png_chunks == display_p3.png_chunks
    assert decode(make_photo(kind)).png_chunks == ()


@pytest.mark.parametrize("kind", ["AVIF", "HEIC"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_picture_is_upright_and_looks_the_same_in_every_viewer(kind, orientation):
    buffer, fields = io.BytesIO(), Image.Exif()
    fields[0x0112] = orientation
    Image.fromarray(make_pixels()).save(buffer, "PNG", exif=fields)
    seen = np.asarray(ImageOps.exif_transpose(Image.open(buffer)))
    image = decode(make_turned(kind, orientation))
    assert image.pixels.shape == seen.shape
    assert psnr_db(seen, image.pixels) > 30
    written = encode(image, "match")
    assert (b"irot" in written, b"imir" in written) == (False, False)
    assert exif.orientation(decode(written).description.exif) == 1
    assert b"Maker" in decode(written).description.exif


def _animated_avif() -> bytes:
    frames, buffer = [Image.fromarray(make_pixels(seed=i)) for i in range(3)], io.BytesIO()
    frames[0].save(buffer, "AVIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def _jxl(mode: str, data: bytes, **options: object) -> bytes:
    encoder = successors._jxl().Encoder(mode, lossless=True, effort=1, num_threads=0, **options)
    return encoder(data, 8, 8, jpeg_encode=False)


def _screenshot() -> bytes:
    """A JPEG XL whose encoder found that glyphs come back."""
    image = Image.new("RGB", (400, 300), "white")
    for row in range(18):
        ImageDraw.Draw(image).text((10, 15 * row), "letters come back " * 4, fill="black")
    encoder = successors._jxl().Encoder("RGB", lossless=True, effort=7, num_threads=0)
    return encoder(image.tobytes(), 400, 300, jpeg_encode=False)


AVIF, HEIC, JXL = (make_photo(kind) for kind in KINDS)
GRID = make_heic(tile_size=64)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(
            replaced(AVIF, b"av1C\x81\x20\x00", b"av1C\x81\x20\x40"),
            "an AVIF of 10 bits a channel; convert it to 8 bits",
            id="10-bit-avif",
        ),
        pytest.param(
            make_heic(mode="RGB;16"), "a HEIC of 10 bits a channel; convert it", id="10-bit-heic"
        ),
        pytest.param(_jxl("I;16", bytes(128)), "JPEG XL of 16 bits a channel", id="16-bit-jxl"),
        pytest.param(_jxl("F", bytes(256)), "JPEG XL of floating point", id="float-jxl"),
        pytest.param(_animated_avif(), "animated or multi-page", id="animated-avif"),
        pytest.param(HEIC[:8] + b"msf1" + HEIC[12:], "animated or multi-page", id="heif-sequence"),
        pytest.param(
            GRID.replace(b"\0\0grid", b"\0\0iovl"), "whose picture is coded as 'iovl'", id="overlay"
        ),
        pytest.param(
            with_size(GRID, 8, 8), "far larger than the picture|not that of", id="small-grid"
        ),
        pytest.param(
            with_size(make_photo("AVIF", make_pixels(1200, 1000)), 8, 8),
            "an AVIF of which far more is coded than shown",
            id="small-avif",
        ),
        pytest.param(with_size(AVIF, 20_000, 20_000), "more than the limit", id="400-megapixels"),
        pytest.param(with_frames(AVIF, 9), "an AVIF of over 4 frames", id="unseen-frames"),
        pytest.param(jxl_of_frames(9), "a JPEG XL of over 8 frames", id="layers"),
        pytest.param(HEIC + b"\0\0\0\x08free" * 1001, "over 1,000 boxes", id="boxes"),
        pytest.param(AVIF + AVIF[32:], "two boxes 'meta'", id="two-metas"),
        pytest.param(_screenshot(), "a JPEG XL with patches or splines", id="patches"),
        pytest.param(HEIC[:-400], "cannot be decoded", id="truncated-heic"),
        pytest.param(AVIF[:-400], "cannot be decoded", id="truncated-avif"),
        pytest.param(JXL[:-400], "cannot be decoded", id="truncated-jxl"),
        pytest.param(
            b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x0ebrobExif\0\0", "compressed EXIF", id="brotli"
        ),
    ],
)
def test_what_cannot_be_kept_whole_or_costs_too_much_is_refused(data, reason):
    with pytest.raises(BadImageError, match=reason):
        decode(data)


def test_layers_of_a_jpeg_xl_are_decoded_together():
    np.testing.assert_array_equal(decode(jxl_of_frames(3)).pixels, make_pixels())


def test_tiles_are_put_together_and_thumbnails_are_not_kept():
    image = decode(make_heic(tile_size=64, thumbnails=[32]))
    assert (image.pixels.shape, image.converted) == ((160, 200, 3), "")
    assert psnr_db(make_pixels(160, 200), image.pixels) > 30
    assert b"thmb" not in encode(image, "match")


def test_large_heic_is_written_in_tiles_with_its_profile(monkeypatch):
    monkeypatch.setattr(successors, "_HEIC_WHOLE", 1000)
    monkeypatch.setattr(successors, "_HEIC_TILE", 64)
    pixels = make_pixels(100, 200)
    data = make_photo("HEIC", pixels, icc_profile=PROFILE, description=_described())
    image = decode(data)
    assert b"\0grid" in data
    assert (image.icc_profile, image.pixels.shape) == (PROFILE, pixels.shape)
    assert psnr_db(pixels, image.pixels) > 36
    assert ODD_TEXT in image.description.exif


def test_primary_picture_of_several_is_kept_and_counted():
    image = decode(make_heic_of_two())
    assert image.converted == "primary picture of a multi-picture HEIC"
    assert psnr_db(make_pixels(), image.pixels) > 30


@pytest.mark.parametrize(("kind", "package"), [("HEIC", "pillow_heif"), ("JPEG XL", "pillow_jxl")])
def test_missing_extra_is_named_with_the_pip_command(kind, package, monkeypatch):
    monkeypatch.setattr(successors, "find_spec", lambda name: None)
    reason = rf"format {kind} needs the extra formats: pip install 'one4all\[formats\]'"
    with pytest.raises(BadImageError, match=reason):
        decode({"HEIC": HEIC, "JPEG XL": JXL}[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_same_picture_makes_the_same_bytes_in_any_number_of_threads(kind):
    image = DecodedImage(make_pixels(300, 400), kind)
    alone = encode(image, "match")
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda _: encode(image, "match"), range(8)))
    assert {*together} == {alone}


_ONE_CPU = """
import hashlib, os, sys
sys.path.insert(0, "tests")
if sys.argv[1] == "1":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from support.phone_photos import KINDS, make_photo
from support.builders import make_pixels
for kind in KINDS:
    print(hashlib.sha256(make_photo(kind, make_pixels(300, 400))).hexdigest())
"""


@pytest.mark.slow
def test_same_bytes_on_one_cpu_and_on_all():
    outputs = [
        subprocess.run(
            [sys.executable, "-c", _ONE_CPU, cpus], capture_output=True, text=True, check=True
        ).stdout.split()
        for cpus in ("1", "all")
    ]
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == len(KINDS)


def test_pillow_of_the_program_around_us_stays_as_it_is():
    ask = (
        "import sys; sys.path.insert(0, 'tests'); from PIL import Image; Image.init(); "
        "before = set(Image.OPEN); from support.phone_photos import KINDS, make_photo; "
        "from one4all.images import decode; [decode(make_photo(kind)) for kind in KINDS]; "
        "print(set(Image.OPEN) - before); import pillow_jxl; print('JXL' in Image.OPEN)"
    )
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["set()", "True"]


@pytest.mark.parametrize("output_format", ["match", "lossless"])
def test_shard_of_phone_photos_is_protected_and_verified(tmp_path, output_format):
    files = [
        ("a.heic", make_heic(tile_size=64)),
        ("b.heic", make_turned("HEIC", 6)),
        ("c.avif", make_turned("AVIF", 5)),
        ("d.avif", make_photo("AVIF", make_pixels(channels=4), description=_described())),
        ("e.jxl", make_photo("JPEG XL", description=_described())),
    ]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "s.tar").write_bytes(make_tar(files))
    source, out = open_storage(f"{tmp_path}/in"), open_storage(f"{tmp_path}/out")
    unit = first_unit(source)
    config = RewriteConfig(output_format=output_format, mark_no_ai_training=True)
    manifest = rewrite_unit(unit, source, out, make_protector(), config)
    assert (manifest.num_protected, manifest.bad_images) == (5, ())
    assert manifest.distances.max_before_encoding <= 8
    written = read_members((tmp_path / "out" / "s.tar").read_bytes())
    suffix = ".png" if output_format == "lossless" else ""
    expected = [name.partition(".")[0] + suffix if suffix else name for name, _ in files[:4]]
    assert [*written] == [*expected, "e.jxl"]
    binding = make_binding(source.uri, **config.bound)
    assert audit_unit(unit, manifest, source, out, binding).problems == []
