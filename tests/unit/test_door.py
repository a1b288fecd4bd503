"""The Python door: one picture in three lines, by the same path as a million."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image, ImageCms
from support.builders import make_16_bit_png, make_image, make_pixels, make_samples, make_tar

import one4all
from one4all.errors import BadImageError, UsageError
from one4all.images import decode
from one4all.protectors.codebook import Codebook, name_codebook
from one4all.protectors.config import (
    MAX_CONCEPTS,
    STRENGTHS,
    CodebookConfig,
    PatternConfig,
)


@pytest.mark.slow
@pytest.mark.parametrize("output_format", ["match", "lossless"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_file_gets_the_bytes_that_the_pipeline_writes(
    tmp_path, protector_folder, kind, output_format
):
    clean = make_image(kind, seed=3)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(make_tar([(f"x.{kind.lower()}", clean)]))
    protector = one4all.load(str(protector_folder))
    source, target = (one4all.open_storage(str(tmp_path / side)) for side in ("in", "out"))
    (unit,) = one4all.list_units(source)
    config = one4all.RewriteConfig(output_format=output_format)
    manifest = one4all.rewrite_unit(unit, source, target, protector, config)
    (written,) = one4all.list_units(target)
    ((member,),) = [sample.members for sample in one4all.read_samples(target, written)]
    assert protector.protect_file(clean, output_format=output_format) == member.payload
    stored = (tmp_path / "out" / "a.tar").read_bytes()
    assert hashlib.sha256(stored).hexdigest() == manifest.outputs[0].sha256


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "1", "P", "CMYK"])
def test_a_pillow_image_comes_back_protected_and_of_its_size(protector, mode):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    image = Image.open(io.BytesIO(make_image(kind, mode)))
    result = protector.protect_image(image)
    assert (result.size, result.mode) == (
        image.size,
        {"1": "L", "P": "RGB", "CMYK": "RGB"}.get(mode, mode),
    )
    clean = np.asarray(image.convert(result.mode), np.int16)
    difference = np.abs(np.asarray(result, np.int16) - clean)
    assert 0 < difference.max() <= 8
    if mode in ("LA", "RGBA"):
        assert not difference[:, :, -1].any(), "alpha was touched"


def test_a_pillow_image_keeps_orientation_rights_profile_and_resolution(protector):
    exif = Image.Exif()
    exif[0x0112], exif[0x8298] = 6, "(c) Ann"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = make_image("JPEG", exif=exif.tobytes(), icc_profile=profile, dpi=(300, 300))
    result = protector.protect_image(Image.open(io.BytesIO(data)))
    assert result.getexif()[0x0112] == 6
    assert result.getexif()[0x8298] == "(c) Ann"
    assert result.info["icc_profile"] == profile
    assert result.info["dpi"] == (300, 300)


@pytest.mark.slow
def test_batches_are_what_single_images_are(protector):
    files = [make_image("PNG", seed=seed) for seed in range(3)]
    assert protector.protect_files(files) == [protector.protect_file(file) for file in files]
    images = [Image.open(io.BytesIO(file)) for file in files]
    for one, file in zip(protector.protect_images(images), files, strict=True):
        expected = decode(protector.protect_file(file)).pixels
        assert np.array_equal(np.asarray(one), expected)
    assert protector.protect_files([]) == []
    assert protector.protect_images([]) == []


def animated() -> Image.Image:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return Image.open(buffer)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (lambda: Image.new("I;16", (9, 9)), "16 bits"),
        (lambda: Image.new("F", (9, 9)), "32 bits"),
        (lambda: Image.open(io.BytesIO(make_16_bit_png(3))), "16 bits"),
        (animated, "animated"),
        (lambda: Image.open(io.BytesIO(make_image("JPEG")[:-400])), "cannot be decoded"),
        (lambda: Image.new("RGB", (0, 9)), "holds no pixel"),
    ],
    ids=["16 bits", "floats", "16-bit RGB", "animated", "truncated", "empty"],
)
def test_a_pillow_image_that_cannot_be_protected_is_refused_with_the_reason(
    protector, image, reason
):
    with pytest.raises(BadImageError, match=reason):
        protector.protect_image(image())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (make_pixels()[:, :, 0], r"shape \(40, 56\) and type uint8"),
        (make_pixels().astype(np.float32), "type float32"),
        (make_pixels().transpose(2, 0, 1), r"shape \(3, 40, 56\)"),
        (make_pixels()[:0], r"shape \(0, 56, 3\)"),
        (Image.new("RGB", (8, 8)), "a Image is no image here"),
        ([[1, 2]], "a list"),
    ],
    ids=["2-D", "floats", "channels first", "empty", "Pillow", "list"],
)
def test_what_is_no_array_of_an_image_is_refused_at_the_door(protector, given, said):
    with pytest.raises(UsageError, match=said):
        protector.protect([given])


def test_what_is_no_file_and_no_picture_is_refused_at_the_door(protector):
    with pytest.raises(UsageError, match="a str is no image file; give its bytes"):
        protector.protect_file("photo.jpg")
    with pytest.raises(UsageError, match="a ndarray is no Pillow image"):
        protector.protect_image(make_pixels())


@pytest.mark.slow
def test_a_codebook_fitted_here_protects_and_is_loaded_again(tmp_path):
    files = [payload for name, payload in make_samples(6) if name.endswith("jpg")]
    images = [files[0], Image.open(io.BytesIO(files[1])), *(decode(f).pixels for f in files[2:])]
    counts = []
    small = one4all.EncoderConfig(input_size=32)
    protector = one4all.fit(
        images, encoder=small, strength="balanced", seed=1, on_image=counts.append
    )
    assert counts[-1] == 6
    assert protector.card.generator.num_concepts == 3
    assert protector.card.generator.pattern == STRENGTHS["balanced"]
    protector.save(str(tmp_path / "mine"))
    again = one4all.load(str(tmp_path / "mine"))
    assert again.protect_file(files[0]) == protector.protect_file(files[0])
    strong = one4all.load(str(tmp_path / "mine"), strength="strong")
    assert strong.card.content_hash != again.card.content_hash
    added = [
        np.abs(np.subtract(look.protect([images[3]])[0], images[3], dtype=int)).mean()
        for look in (again, strong)
    ]
    assert added[1] > 1.2 * added[0]
    with pytest.raises(UsageError, match="two images or more"):
        one4all.fit(files[:1], encoder=small)
    with pytest.raises(UsageError, match="9 concepts cannot be found in 6 images"):
        one4all.fit(files, num_concepts=9, encoder=small)


def test_a_strength_that_there_is_not_is_refused():
    with pytest.raises(UsageError, match="no strength 'loud', only discreet, balanced, strong, gr"):
        one4all.load("default", strength="loud")
    with pytest.raises(UsageError, match="no strength 'loud'"):
        one4all.fit([], strength="loud")
    with pytest.raises(UsageError, match="'14a' is trained, and has one look"):
        one4all.load("14a", strength="strong")
    few = CodebookConfig(pattern=PatternConfig(cells=6))
    card = one4all.load("default").card.model_copy(update={"generator": few})
    assert card.with_strength("strong").generator.pattern.num_bits == few.pattern.num_bits


@pytest.mark.slow
def test_a_fit_in_a_strength_keeps_the_cells_that_were_asked_for():
    files = [payload for name, payload in make_samples(3) if name.endswith("jpg")]
    six = CodebookConfig(pattern=PatternConfig(cells=6))
    small = one4all.EncoderConfig(input_size=32)
    fitted = one4all.fit(files, codebook=six, strength="strong", encoder=small)
    assert fitted.card.generator.pattern == PatternConfig(cells=6).hard()


def test_concepts_that_would_not_fit_in_memory_are_refused_before_the_work():
    import torch

    with pytest.raises(ValueError, match="less than or equal to 20000"):
        CodebookConfig(num_concepts=MAX_CONCEPTS + 1)
    many = torch.zeros(MAX_CONCEPTS + 1, 1)
    with pytest.raises(UsageError, match=r"20,001 concepts are too many"):
        name_codebook(many, CodebookConfig(), seed=0)
    assert issubclass(Codebook, one4all.PerturbationModel)
