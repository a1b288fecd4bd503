"""Rights that a picture states are kept, and what may hold a second picture is not."""

import io
import struct

import pytest
from PIL import Image
from support.metadata_blocks import RIGHTS_XMP, data_set

from one4all.metadata import iptc, xmp

MAX = 60_000
PLAIN = b"<?xpacket begin='' id='W5M0'?>" + RIGHTS_XMP % b"" + b"    <?xpacket end='w'?>"
THUMBNAIL = (
    b'<xmp:Thumbnails xmlns:xmp="http://ns.adobe.com/xap/1.0/" '
    b'xmlns:xmpGImg="http://ns.adobe.com/xap/1.0/g/img/"><rdf:Alt><rdf:li>'
    b"<xmpGImg:image>/9j/4AAQ</xmpGImg:image></rdf:li></rdf:Alt></xmp:Thumbnails>"
)
LONG = b'<v:blob xmlns:v="http://vendor.example/">' + b"QUJD" * 1000 + b"</v:blob>"


def test_packet_without_a_picture_stays_byte_for_byte():
    assert xmp.without_pictures(PLAIN, max_bytes=MAX) == PLAIN
    assert xmp.without_pictures(PLAIN, max_bytes=len(PLAIN) - 1) == b""
    assert xmp.orientation(PLAIN) == 6
    assert xmp.data_mining(PLAIN) == xmp.PROHIBITED


@pytest.mark.parametrize("picture", [THUMBNAIL, LONG, LONG.replace(b"blob", b"a") + THUMBNAIL])
def test_pictures_go_and_rights_stay(picture):
    kept = xmp.without_pictures(RIGHTS_XMP % picture, max_bytes=MAX)
    assert b"/9j/" not in kept
    assert b"QUJDQUJD" not in kept
    assert "© Zoë" in kept.decode()
    assert xmp.data_mining(kept) == xmp.PROHIBITED
    assert xmp.without_pictures(kept, max_bytes=MAX) == kept


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"no xml",
        b"<xmp>other XML</xmp>",
        b"<a>",
        b"\xff\xfe",
        b'<!DOCTYPE a [<!ENTITY b "ccc">]><a>&b;</a>',
        b"<?xml version='1.0' encoding='no-such'?><a/>",
    ],
)
def test_what_is_no_packet_is_left_out(packet):
    assert xmp.without_pictures(packet, max_bytes=MAX) == b""
    assert (xmp.orientation(packet), xmp.data_mining(packet)) == (1, "")


def test_orientation_is_taken_out_for_pixels_that_were_turned():
    assert xmp.orientation(xmp.without_orientation(PLAIN)) == 1
    assert xmp.data_mining(xmp.without_orientation(PLAIN)) == xmp.PROHIBITED
    element = PLAIN.replace(b'tiff:Orientation="6"', b"").replace(
        b"<dc:rights>", b"<tiff:Orientation>8</tiff:Orientation><dc:rights>"
    )
    assert xmp.orientation(element) == 8
    assert xmp.orientation(xmp.without_orientation(element)) == 1
    assert xmp.without_orientation(b"") == b""


def test_reservation_is_added_and_the_owners_own_word_is_kept():
    made = xmp.with_data_mining_prohibited(b"")
    assert xmp.data_mining(made) == xmp.PROHIBITED
    silent = PLAIN.replace(b"plus:DataMining", b"plus:Other")
    added = xmp.with_data_mining_prohibited(silent)
    assert xmp.data_mining(added) == xmp.PROHIBITED
    assert "© Zoë" in added.decode()
    other = PLAIN.replace(b"DMI-PROHIBITED-AIMLTRAINING", b"DMI-ALLOWED")
    assert xmp.with_data_mining_prohibited(other) == other
    assert xmp.with_data_mining_prohibited(made) == made


def test_records_of_text_stay_and_previews_go():
    text = data_set(2, 80, b"A. Artist") + data_set(2, 116, "© 2026".encode())
    preview = data_set(2, 202, b"\xff\xd8\xff preview")
    object_data = data_set(8, 10, b"\xff\xd8\xff object")
    records = text[:14] + preview + text[14:] + object_data + data_set(2, 5, bytes(3000))
    assert iptc.without_pictures(records, max_bytes=MAX) == text
    assert iptc.without_pictures(records, max_bytes=20) == text[:14]
    for broken in (b"", b"\x1c\2\5\xff\xff", b"garbage", text[:9]):
        assert iptc.without_pictures(broken, max_bytes=MAX) == b""


def test_segment_of_a_jpeg_is_read_and_written():
    records = data_set(2, 80, b"A. Artist")
    thumbnail = b"8BIM" + struct.pack(">HHI", 0x040C, 0, 5) + b"\xff\xd8\xff!!\0"
    named = b"8BIM" + struct.pack(">H", 0x0404) + b"\3abc" + struct.pack(">I", len(records))
    assert iptc.of_photoshop(thumbnail + named + records) == records
    segment = iptc.to_photoshop(records)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    data = buffer.getvalue()
    marker = b"\xff\xed" + struct.pack(">H", len(segment) + 2) + segment
    seen = Image.open(io.BytesIO(data[:2] + marker + data[2:]))
    assert seen.info["photoshop"][0x0404] == records
    for broken in (b"", b"8BIM", b"8BIM\4\4\xff", thumbnail[:-3], b"8BIM\4\4\0\0\xff\xff\xff\xff"):
        assert iptc.of_photoshop(broken) == b""
