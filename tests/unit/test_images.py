"""Each kind of image file has a defined result."""

import io
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo
from support.builders import make_16_bit_png, make_bomb_png, make_image, make_pixels
from support.hostile import png_with
from support.metadata_blocks import RIGHTS_XMP, block_of, data_set, tiff_with

from one4all import images, recode
from one4all.errors import BadImageError
from one4all.image_kinds import is_image
from one4all.images import (
    DecodedImage,
    decode,
    decode_with_copy,
    encode,
    extension_for,
    from_pillow,
    pillow_orientation,
    working_copy,
)
from one4all.metadata import MAX_EXIF, MAX_TEXTS, exif, iptc, xmp


@pytest.mark.parametrize(
    ("data", "channels", "converted"),
    [
        pytest.param(make_image("JPEG"), 3, "", id="jpeg"),
        pytest.param(make_image("JPEG", "L"), 1, "", id="gray-jpeg"),
        pytest.param(make_image("JPEG", "CMYK"), 3, "CMYK to RGB", id="cmyk-jpeg"),
        pytest.param(make_image("PNG", "L"), 1, "", id="gray-png"),
        pytest.param(make_image("PNG", "LA"), 2, "", id="gray-alpha-png"),
        pytest.param(make_image("PNG", "RGBA"), 4, "", id="alpha-png"),
        pytest.param(make_image("PNG", "P"), 3, "P to RGB", id="palette-png"),
        pytest.param(make_image("PNG", "P", transparency=3), 4, "P to RGBA", id="palette-alpha"),
        pytest.param(make_image("PNG", "L", transparency=9), 2, "L to LA", id="colour-keyed-gray"),
        pytest.param(make_image("PNG", "1"), 1, "1 to L", id="bilevel-png"),
        pytest.param(make_image("WEBP", "RGBA", lossless=True), 4, "", id="alpha-webp"),
        pytest.param(make_image("BMP"), 3, "", id="bmp"),
        pytest.param(make_image("TIFF", "RGBA"), 4, "", id="tiff"),
    ],
)
def test_kind_of_image_is_decoded_and_written_back_without_loss(
    data, channels, converted, monkeypatch
):
    image = decode(data)
    assert image.pixels.shape == (40, 56, channels)
    assert image.converted == converted
    again = decode(encode(image, "lossless"))
    np.testing.assert_array_equal(again.pixels, image.pixels)
    assert decode(encode(image, "match")).format == image.format
    monkeypatch.setattr(images, "_BAND_PIXELS", 500)  # as if it were large
    np.testing.assert_array_equal(decode(data).pixels, image.pixels)
    found, copy = decode_with_copy(data, 16)
    np.testing.assert_array_equal(found.pixels, image.pixels)
    np.testing.assert_array_equal(copy, working_copy(image.pixels, 16))


def _animated(format: str) -> bytes:
    frames = [Image.fromarray(make_pixels(seed=i)) for i in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, format, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"not an image", "not an image file", id="garbage"),
        pytest.param(b"", "not an image file", id="empty"),
        pytest.param(
            make_image("JPEG").replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c"),
            "a JPEG of 12 bits a channel; convert it to 8 bits",
            id="12-bit-jpeg",
        ),
        pytest.param(make_image("JPEG")[:-400], "cannot be decoded", id="truncated-jpeg"),
        pytest.param(make_image("PNG")[:-400], "cannot be decoded", id="truncated-png"),
        pytest.param(make_16_bit_png(1), "16 bits a channel", id="16-bit-gray"),
        pytest.param(make_16_bit_png(3), "16 bits a channel", id="16-bit-rgb"),
        pytest.param(make_image("GIF", "P"), "format GIF is not supported", id="gif"),
        pytest.param(_animated("WEBP"), "animated or multi-page", id="animated-webp"),
        pytest.param(_animated("PNG"), "animated or multi-page", id="animated-png"),
        pytest.param(_animated("TIFF"), "animated or multi-page", id="multi-page-tiff"),
        pytest.param(make_bomb_png(), "more than the limit", id="400-megapixels"),
    ],
)
def test_image_that_cannot_be_kept_whole_is_refused_with_a_reason(data, reason):
    with pytest.raises(BadImageError, match=reason):
        decode(data)


def test_photo_of_180_megapixels_is_read_and_written_back_whole():
    """More than `Image.open` accepts. Its bands are put together as they were."""
    pixels = np.zeros((13_000, 13_900, 1), np.uint8)
    pixels[:, ::17] = (np.arange(13_000) % 251).astype(np.uint8)[:, None, None]
    image = decode(encode(DecodedImage(pixels, "PNG"), "match"))
    assert np.array_equal(image.pixels, pixels)


def test_first_picture_of_a_multi_picture_jpeg_is_kept():
    image = decode(_animated("MPO"))
    assert (image.format, image.pixels.shape) == ("JPEG", (40, 56, 3))
    assert "first picture" in image.converted


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("output_format", ["match", "lossless"])
def test_orientation_and_colour_profile_survive(format, output_format):
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = make_image(format, exif=exif, icc_profile=profile)
    written = Image.open(io.BytesIO(encode(decode(data), output_format)))
    assert written.size == (56, 40)  # stored pixels, not turned
    assert written.getexif()[0x0112] == 6
    assert written.info["icc_profile"] == profile


def test_text_and_density_of_a_png_survive():
    text = PngInfo()
    text.add_itxt("Copyright", "Ännchen", lang="de")
    data = make_image("PNG", pnginfo=text, dpi=(300, 300))
    written = Image.open(io.BytesIO(encode(decode(data), "match")))
    assert written.text == {"Copyright": "Ännchen"}
    assert round(written.info["dpi"][0]) == 300


def _tiff_block(entries: list[tuple[int, int, int, bytes]], thumbnail: bytes) -> bytes:
    """An EXIF block: IFD0 with entries (tag, type, count, value) and a JPEG thumbnail in IFD1."""
    ifd0 = struct.pack("<H", len(entries))
    data_at = 8 + 2 + 12 * len(entries) + 4
    data = b""
    for tag, kind, count, value in entries:
        if len(value) > 4:
            ifd0 += struct.pack("<HHII", tag, kind, count, data_at + len(data))
            data += value
        else:
            ifd0 += struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")
    ifd1_at = data_at + len(data)
    ifd0 += struct.pack("<I", ifd1_at)
    ifd1 = struct.pack("<H", 2)
    ifd1 += struct.pack("<HHII", 0x0201, 4, 1, ifd1_at + 2 + 24 + 4)
    ifd1 += struct.pack("<HHII", 0x0202, 4, 1, len(thumbnail)) + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8) + ifd0 + data + ifd1 + thumbnail


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_unprotected_copies_in_exif_do_not_survive(format):
    thumbnail = make_image("JPEG", seed=9)
    block = _tiff_block(
        [(0x0112, 3, 1, struct.pack("<H", 6)), (0x927C, 7, len(thumbnail), thumbnail)], thumbnail
    )
    data = make_image(format, exif=b"Exif\0\0" + block)
    assert data.count(thumbnail[:200]) == 2
    for output_format in ("match", "lossless"):
        written = encode(decode(data), output_format)
        assert thumbnail[100:200] not in written
        assert Image.open(io.BytesIO(written)).getexif()[0x0112] == 6


def test_dates_and_places_in_exif_survive():
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9003] = "2026:11:23 08:00:00"
    exif.get_ifd(0x8825)[1] = "N"
    exif[0x010F] = "Maker"
    written = Image.open(io.BytesIO(encode(decode(make_image("JPEG", exif=exif)), "match")))
    found = written.getexif()
    assert found[0x010F] == "Maker"
    assert found.get_ifd(0x8769)[0x9003] == "2026:11:23 08:00:00"
    assert found.get_ifd(0x8825)[1] == "N"


def test_png_texts_that_may_hold_a_picture_do_not_survive():
    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", "<xmp>thumbnail</xmp>")
    text.add_text("Raw profile type exif", "cafe")
    text.add_text("long", "x" * 5000)
    text.add_text("Author", "Ann")
    for key in ("dpi", "icc_profile", "exif"):  # Pillow puts texts where it puts real metadata
        text.add_text(key, "abc")
    written = Image.open(io.BytesIO(encode(decode(make_image("PNG", pnginfo=text)), "match")))
    assert written.text["Author"] == "Ann"
    assert not {"XML:com.adobe.xmp", "Raw profile type exif", "long"} & set(written.text)


def test_png_text_is_not_taken_for_transparency():
    text = PngInfo()
    text.add_text("transparency", "3")
    for mode in ("L", "P", "RGB", "1"):
        image = decode(make_image("PNG", mode, pnginfo=text))
        assert image.pixels.shape[2] == (1 if mode in ("L", "1") else 3)
        opened = Image.open(io.BytesIO(make_image("PNG", mode, pnginfo=text)))
        np.testing.assert_array_equal(from_pillow(opened).pixels, image.pixels)


def _profile_with(rest: bytes) -> bytes:
    """Something that says it is an ICC profile, and is another file from byte 128 on."""
    profile = bytearray(128) + rest
    profile[36:40] = b"acsp"
    profile[:4] = len(profile).to_bytes(4, "big")
    return bytes(profile)


@pytest.mark.parametrize(
    "profile",
    [
        pytest.param(make_image("JPEG", seed=9), id="a-jpeg"),
        pytest.param(_profile_with(b"")[:-1] + make_image("JPEG", seed=9), id="profile-and-jpeg"),
        pytest.param(_profile_with(make_pixels(600, 900, seed=9).tobytes()), id="very-long"),
    ],
)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_what_is_no_colour_profile_does_not_survive(format, profile):
    image = decode(make_image(format, icc_profile=profile))
    assert image.icc_profile == b""
    assert profile[-200:] not in encode(image, "match")
    assert "icc_profile" not in Image.open(io.BytesIO(encode(image, "lossless"))).info


def test_file_behind_the_profile_of_a_png_does_not_survive():
    hidden = make_image("JPEG", seed=9)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    chunk = (b"iCCP", b"sRGB\0\0" + zlib.compress(profile) + hidden)
    assert hidden[:200] not in encode(decode(png_with(chunk)), "match")


@pytest.mark.parametrize("kind", [b"pHYs", b"cICP", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"abCd"])
def test_png_chunk_that_is_too_long_or_comes_twice_does_not_survive(kind):
    hidden = make_image("JPEG", seed=9)
    assert hidden[:200] not in encode(decode(png_with((kind, hidden))), "match")
    written = encode(decode(png_with(*[(b"gAMA", b"\0\0\xb1\x8f")] * 50)), "match")
    assert written.count(b"gAMA") == 1


def test_metadata_has_a_limit_in_sum():
    """A picture in many small parts is a picture."""
    texts = [(b"tEXt", b"part\0" + bytes([65 + i]) * 2000) for i in range(20)]
    kept = encode(decode(png_with(*texts)), "match").count(b"part\0")
    assert kept == MAX_TEXTS // 2005

    exif = Image.Exif()
    exif[0x0112] = 6
    exif.get_ifd(0x8769).update({0xC000 + i: bytes([i]) * 2000 for i in range(20)})
    exif.get_ifd(0x8769)[0xD000] = tuple(range(1025))  # 2050 bytes
    for format in ("JPEG", "PNG", "WEBP"):
        image = decode(make_image(format, exif=exif))
        assert 2000 < len(image.description.exif) <= MAX_EXIF
        found = Image.open(io.BytesIO(encode(image, "match"))).getexif()
        assert found[0x0112] == 6
        assert 0xD000 not in found.get_ifd(0x8769)


def test_png_that_hides_its_depth_is_refused():
    png = make_16_bit_png(3)
    text = struct.pack(">I", 4) + b"tEXta\0bc"
    text += struct.pack(">I", zlib.crc32(b"tEXta\0bc"))
    with pytest.raises(BadImageError, match=r"IHDR|cannot be decoded|not an image"):
        decode(png[:8] + text + png[8:])


def test_image_that_its_format_cannot_hold_is_refused():
    wide = DecodedImage(make_pixels(1, 17_000), "WEBP")
    with pytest.raises(BadImageError, match="cannot be written back as WEBP"):
        encode(wide, "match")


def test_opaque_alpha_of_webp_is_dropped_and_counted():
    pixels = make_pixels(channels=4)
    pixels[:, :, 3] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "BMP")
    image = decode(buffer.getvalue())
    assert image.pixels.shape[2] == 3


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    channels=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_our_png_is_what_pillow_reads_back(height, width, channels, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    written = encode(DecodedImage(pixels, "PNG"), "lossless")
    read = np.asarray(Image.open(io.BytesIO(written)))
    np.testing.assert_array_equal(read.reshape(pixels.shape), pixels)


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.jpg", b"garbage", True),
        ("a/b.JPEG", b"", True),
        ("a.heic", b"", True),
        ("a.bin", make_image("JPEG"), True),
        ("noextension", make_image("PNG"), True),
        ("a.dat", make_image("WEBP"), True),
        ("a.dat", make_image("BMP"), True),
        ("a.cls", b"7", False),
        ("a.json", b'{"jpg": 1}', False),
        ("jpg", b"the word jpg", True),
    ],
)
def test_image_is_recognised_by_name_or_by_content(name, data, expected):
    assert is_image(name, data) is expected


def test_only_a_jpeg_written_as_png_changes_its_name():
    jpeg, webp = decode(make_image("JPEG")), decode(make_image("WEBP"))
    assert extension_for("a.b/c.seg.jpeg", jpeg, "lossless") == "a.b/c.seg.png"
    assert extension_for("c", jpeg, "lossless") == "c.png"
    assert extension_for("c.jpeg", jpeg, "match") == "c.jpeg"
    assert extension_for("c.webp", webp, "lossless") == "c.webp"


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_working_copy_is_square_rgb(channels):
    copy = working_copy(make_pixels(1, 300, channels), 32)
    assert (copy.shape, copy.dtype) == ((32, 32, 3), np.uint8)


RIGHTS = "© 2026 Zoë Müller".encode()
LATIN = "© Zoë".encode("latin-1")


def rights_block(order: str = "<") -> bytes:
    """EXIF of a photo on its side, with text that is not ASCII and values that are odd."""
    odd = struct.pack(f"{order}ii", -35, 1)
    return block_of(
        (
            0,
            [
                (0x0112, 3, 1, struct.pack(f"{order}H", 6)),
                (0x8298, 2, len(RIGHTS), RIGHTS),
                (0x013B, 2, len(LATIN), LATIN),
                (0x011A, 10, 1, odd),
            ],
        ),
        (0x8769, [(0x9003, 2, 20, b"2026:11:28 10:00:00\0")]),
        (0x8825, [(0x0005, 2, 2, b"0\0"), (0x0006, 10, 1, odd)]),
        (0xA005, [(0x0001, 2, 4, b"R98\0")]),
        order=order,
    )


def all_entries(data: bytes) -> set[tuple]:
    """EXIF entries of a file, as bytes, by way of Pillow's raw block."""
    block = Image.open(io.BytesIO(data)).info["exif"]
    return {(e.directory, e.tag, e.type, e.count, e.value) for e in exif.entries(block)}


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("output_format", ["match", "lossless"])
def test_exif_survives_byte_for_byte(format, output_format, order):
    source = make_image(format, exif=exif.PREFIX + rights_block(order))
    written = encode(decode(source), output_format)
    assert all_entries(written) == all_entries(source)
    assert len(all_entries(written)) == 8
    assert pillow_orientation(written) == 6


def png_text(keyword: str, text: str) -> bytes:
    chunks = PngInfo()
    chunks.add_text(keyword, text, zip=True)
    return make_image("PNG", pnginfo=chunks)


def test_blocks_in_texts_of_a_png_survive():
    """ImageMagick and old versions of Pillow write them; the picture lay on its side."""
    block = exif.PREFIX + rights_block()
    raw = f"\nexif\n{len(block):8d}\n{block.hex()}\n"
    for keyword in ("Raw profile type exif", "Raw profile type APP1"):
        written = encode(decode(png_text(keyword, raw)), "match")
        assert pillow_orientation(written) == 6
        assert len(all_entries(written)) == 8
    packet = (RIGHTS_XMP % b"").decode()
    chunks = PngInfo()
    chunks.add_itxt("XML:com.adobe.xmp", packet)
    written = encode(decode(make_image("PNG", pnginfo=chunks)), "match")
    assert pillow_orientation(written) == 6
    assert Image.open(io.BytesIO(written)).info["xmp"] == packet.encode()
    records = data_set(2, 80, b"A. Artist")
    resources = iptc.to_photoshop(records).removeprefix(iptc.SIGNATURE)
    raw = f"\niptc\n{len(resources):8d}\n{resources.hex()}\n"
    again = decode(encode(decode(png_text("Raw profile type iptc", raw)), "match"))
    assert again.description.iptc == records


@pytest.mark.parametrize("output_format", ["match", "lossless"])
def test_rights_in_a_jpeg_survive(output_format):
    packet = RIGHTS_XMP % b""
    records = data_set(2, 80, b"A. Artist") + data_set(2, 116, RIGHTS)
    segment = iptc.to_photoshop(records)
    extra = b"\xff\xed" + struct.pack(">H", len(segment) + 2) + segment
    source = make_image("JPEG", xmp=packet, comment=b"do not train", extra=extra)
    before = decode(source).description
    assert (before.xmp, before.iptc, before.comment) == (packet, records, b"do not train")
    written = encode(decode(source), output_format)
    assert decode(written).description == before
    seen = Image.open(io.BytesIO(written)).info
    assert seen["xmp"] == packet
    assert seen.get("comment", seen.get("Comment")) in (b"do not train", "do not train")
    if output_format == "match":
        assert seen["photoshop"][0x0404] == records


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_reservation_can_be_written_into_each_format(format):
    image = decode(make_image(format))
    marked = replace(image, description=image.description.with_data_mining_prohibited())
    for output_format in ("match", "lossless"):
        assert decode(encode(marked, output_format)).description.data_mining == xmp.PROHIBITED


@pytest.mark.parametrize("order", ["<", ">"])
def test_tags_of_a_tiff_survive(order):
    geo = struct.pack(f"{order}4H", 1, 1, 0, 1)
    scale = struct.pack(f"{order}3d", 0.5, 0.5, 0)
    source = tiff_with(
        [
            (33432, 2, len(RIGHTS), RIGHTS),
            (34735, 3, 4, geo),
            (33550, 12, 3, scale),
            (700, 1, len(RIGHTS_XMP % b""), RIGHTS_XMP % b""),
        ],
        order=order,
    )
    written = encode(decode(source), "match")
    found = Image.open(io.BytesIO(written))
    assert found.tag_v2[34735] == (1, 1, 0, 1)
    assert found.tag_v2[33550] == (0.5, 0.5, 0)
    assert found.tag_v2[33432].encode("latin-1") == RIGHTS
    assert decode(written).description == decode(source).description
    assert decode(written).description.data_mining == xmp.PROHIBITED
    np.testing.assert_array_equal(decode(written).pixels, decode(source).pixels)


@pytest.mark.parametrize("bands", [4, 5])
def test_bands_that_pillow_would_leave_out_are_refused(bands):
    with pytest.raises(BadImageError, match=f"{bands} bands"):
        decode(tiff_with([], order="<", bands=bands))


def test_map_that_would_lose_its_place_is_refused():
    with pytest.raises(BadImageError, match="GeoTIFF"):
        decode(tiff_with([(33922, 12, 9000, bytes(72_000))], order="<"))


def test_panic_of_a_decoder_in_rust_is_a_bad_image_and_an_interrupt_is_none(monkeypatch):
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
    for raised, expected in (
        (panic("index out of bounds"), BadImageError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):

        def fail(*arguments, raised=raised):
            raise raised

        monkeypatch.setattr(images, "_decode", fail)
        with pytest.raises(expected):
            decode(b"")


def test_png_whose_samples_do_not_inflate_to_what_was_written_is_refused(monkeypatch):
    compress = images.isal_zlib.compress
    image = DecodedImage(make_pixels(300, 400), "PNG")
    for wrong in (
        lambda samples, level: compress(samples ^ 1, level),
        lambda samples, level: compress(samples[:-1], level),
        lambda samples, level: compress(samples, level)[:-9],
        lambda samples, level: compress(samples, level)[:-1] + b"?",  # the checksum
    ):
        monkeypatch.setattr(images.isal_zlib, "compress", wrong)
        with pytest.raises(BadImageError, match="cannot be written back as PNG"):
            encode(image, "match")


@pytest.mark.parametrize(
    ("format", "distances"), [("PNG", (1, 1)), ("JPEG", (1, None))], ids=["png", "jpeg"]
)
def test_few_files_are_decoded_again_and_always_the_same_ones(format, distances, monkeypatch):
    """Every PNG was inflated again, and compared; every JPEG was seen to be whole."""
    decoded: list[bytes] = []

    def count(data: bytes, *, max_pixels: int) -> DecodedImage:
        decoded.append(data)
        return decode(data, max_pixels=max_pixels)

    monkeypatch.setattr(recode, "decode", count)

    def recoded(seed: int, *, measured: bool) -> recode.RecodedImage:
        clean = DecodedImage(make_pixels(seed=seed), format)
        moved = np.where(clean.pixels < 128, clean.pixels + 1, clean.pixels - 1)
        return recode.recode(
            clean,
            moved,
            output_format="match",
            epsilon_levels=8,
            max_pixels=10**6,
            measured=measured,
        )

    for _ in range(2):
        for seed in range(64):
            before = len(decoded)
            found = recoded(seed, measured=False)
            if len(decoded) == before:
                assert (found.max_before_encoding, found.max_decoded) == distances
                assert (found.psnr_db is None) == (found.max_decoded is None)
            else:
                assert found.max_decoded >= 1
                assert found.psnr_db > 20
    assert 2 <= len(decoded) <= 2 * 16
    assert decoded[: len(decoded) // 2] == decoded[len(decoded) // 2 :]
    assert recoded(0, measured=True).psnr_db > 20


PROGRESSIVE, GRAY = make_image("JPEG", progressive=True), make_image("JPEG", "L")


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda jpeg: jpeg[:-2], id="without-its-end"),
        pytest.param(lambda jpeg: jpeg[: len(jpeg) // 2], id="cut"),
        pytest.param(lambda jpeg: jpeg + b"more", id="with-more-behind"),
        pytest.param(
            lambda jpeg: jpeg.replace(b"\x00\x28\x00\x38", b"\x00\x28\x00\x39"), id="wider"
        ),
        pytest.param(lambda _: PROGRESSIVE, id="of-several-scans"),
        pytest.param(lambda _: GRAY, id="gray"),
        pytest.param(lambda _: b"", id="nothing"),
    ],
)
def test_jpeg_that_is_not_whole_is_refused_without_decoding_it(spoil, monkeypatch):
    class Spoilt(io.BytesIO):
        def getvalue(self) -> bytes:
            return spoil(super().getvalue())

    image = DecodedImage(make_pixels(), "JPEG")
    assert encode(image, "match")
    monkeypatch.setattr(images.io, "BytesIO", Spoilt)
    with pytest.raises(BadImageError, match="no whole file"):
        encode(image, "match")
