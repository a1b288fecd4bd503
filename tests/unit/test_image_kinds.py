"""What is an image counts as one, whatever it is called; what is a sidecar does not."""

import io
import json
import re
import struct

import numpy as np
import pytest
from PIL import Image
from support.builders import make_image, make_pixels

from one4all.errors import BadImageError
from one4all.image_kinds import image_kind, is_image
from one4all.images import FORMATS, decode

SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="data:"/></svg>'


def saved(format: str, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(make_pixels()).convert(mode).save(buffer, format)
    return buffer.getvalue()


@pytest.mark.parametrize("extension", "qoi PCX orf raf rw2 svg hif ico psd jxl cr3 dcm".split())
def test_name_of_an_image_format_is_enough(extension):
    assert is_image(f"folder/a.{extension}", b"")
    with pytest.raises(BadImageError, match="not an image file"):
        decode(b"garbage")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        pytest.param(make_image("JPEG"), "JPEG", id="jpeg"),
        pytest.param(make_image("PNG"), "PNG", id="png"),
        pytest.param(make_image("WEBP"), "WEBP", id="webp"),
        pytest.param(make_image("BMP"), "BMP", id="bmp"),
        pytest.param(make_image("TIFF"), "TIFF", id="tiff"),
        pytest.param(saved("GIF"), "GIF", id="gif"),
        pytest.param(saved("ICO"), "ICO", id="ico"),
        pytest.param(saved("JPEG2000"), "JPEG 2000", id="jpeg-2000"),
        pytest.param(saved("QOI"), "QOI", id="qoi"),
        pytest.param(saved("PCX"), "PCX", id="pcx"),
        pytest.param(saved("TGA"), "TGA", id="tga"),
        pytest.param(saved("SGI"), "SGI", id="sgi"),
        pytest.param(saved("DDS"), "DDS", id="dds"),
        pytest.param(saved("EPS"), "EPS", id="eps"),
        pytest.param(saved("DIB"), "DIB", id="bmp-without-header"),
        pytest.param(saved("XBM", "1"), "XBM", id="xbm"),
        pytest.param(saved("PPM", "1"), "PNM", id="pbm"),
        pytest.param(saved("PPM", "L"), "PNM", id="pgm"),
        pytest.param(saved("PPM"), "PNM", id="ppm"),
        pytest.param(b"P3 # text\n2 1\n255\n1 2 3 4 5 6\n", "PNM", id="plain-ppm"),
        pytest.param(b"P1\n2 2\n0110\n", "PNM", id="plain-pbm"),
        pytest.param(b"8BPS\0\1" + bytes(20), "PSD", id="psd"),
        pytest.param(b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL", id="jpeg-xl"),
        # What cjxl writes for 512x512: eight times 64, ratio 1:1.
        pytest.param(b"\xff\x0a\x7f\x00" + bytes(99), "JPEG XL", id="jpeg-xl-codestream"),
        pytest.param(b"\0\0\0\x18ftypheix\0\0\0\0mif1heix", "HEIC", id="heif"),
        pytest.param(b"\0\0\0\x18ftypmif1\0\0\0\0avifmif1", "AVIF", id="avif"),
        pytest.param(b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "camera raw", id="canon-cr3"),
        pytest.param(b"FUJIFILMCCD-RAW 0201", "camera raw", id="fuji-raf"),
        pytest.param(b"IIRO\x08\0\0\0", "camera raw", id="olympus-orf"),
        pytest.param(b"IIU\0\x18\0\0\0", "camera raw", id="panasonic-rw2"),
        pytest.param(b"AT&TFORM\0\0\1\0DJVUINFO", "DjVu", id="djvu"),
        pytest.param(b"\x97JB2\r\n\x1a\n\1", "JBIG2", id="jbig2"),
        pytest.param(SVG, "SVG", id="svg"),
        pytest.param(SVG.decode().encode("utf-16"), "SVG", id="svg-utf-16"),
        pytest.param(
            b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- <html> -->\n'
            b'<!DOCTYPE svg [<!ENTITY a "b">]>\n<s:svg xmlns:s="http://www.w3.org/2000/svg"/>',
            "SVG",
            id="svg-behind-a-prolog",
        ),
    ],
)
def test_content_of_an_image_is_enough(data, kind):
    assert is_image("member.bin", data)
    assert image_kind(data) == kind
    if kind not in FORMATS:
        with pytest.raises(BadImageError, match=re.escape(f"format {kind} is not supported")):
            decode(data)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(text.encode(), id=text[:12] or "empty")
        for text in (
            "",
            "7",
            "P5 is what netpbm calls it",
            "P5 12 13 255 birds",
            "P1 2 3 4 5",
            "BMW beside a tree, seen from the left and from above",
            "GIF89a is a picture format",
            "MMORPG players",
            "SIMPLE = True",
            "#define N_width 3\nint main() {}",
            "qoif",
            "<html><svg></svg></html>",
            '<?xml version="1.0"?><annotation><svg/></annotation>',
            "<!-- svg",
            json.dumps({"jpg": "x" * 300}),
        )
    ]
    + [
        pytest.param(_bytes, id=_id)
        for _id, _bytes in {
            "npy": b"\x93NUMPY\x01\0v\0" + bytes(200),
            "zip": b"PK\x03\x04" + bytes(200),
            "pickle": b"\x80\x04\x95" + bytes(200),
            "mp4": b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41",
            "wav": b"RIFF\0\0\0\0WAVEfmt " + bytes(200),
            "avi": b"RIFF\0\0\0\0AVI LIST" + bytes(200),
            "zeros": bytes(3000),
            "floats": np.linspace(-1, 1, 999, dtype=np.float32).tobytes(),
            "numbers": np.arange(999, dtype=np.int32).tobytes(),
            "tokens": np.arange(65_536, 66_000, dtype=np.int32).tobytes(),
            "icon-without-icons": struct.pack("<3H", 0, 1, 3) + bytes(200),
        }.items()
    ],
)
def test_sidecar_is_no_image(data):
    assert image_kind(data) == ""
    assert not is_image("a.txt", data)


def test_random_bytes_are_no_image():
    """Embeddings and the like are nearly random: a short signature must not be enough."""
    noise = np.random.default_rng(0).bytes(64 * 20_000)
    found = [image_kind(noise[a : a + 64]) for a in range(0, len(noise), 64)]
    assert sum(map(bool, found)) <= 1
