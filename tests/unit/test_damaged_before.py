"""What version 0.1.0 damaged without a word is found by the audit, and is right now."""

import hashlib
from pathlib import Path

import pytest
from support.builders import first_unit, make_binding
from support.damaged_before import sources

from one4all.audit import audit_unit
from one4all.corpus import OutputObject
from one4all.metadata import xmp
from one4all.rewrite import RewriteConfig, rewrite_unit
from one4all.storage import open_storage

FIXTURES = Path(__file__).parents[1] / "fixtures"
BINDING = make_binding()
EXPECTED = {
    "rights": [
        "copyright.jpg: its EXIF is not the source's",
        "odd.jpg: its EXIF is not the source's",
        "odd.jpg: lies on another side: orientation 6 became 1",
        "xmp.jpg: its EXIF is not the source's",  # it got one, with the orientation of the XMP
        "xmp.jpg: its XMP is not the source's",
    ],
    "orientation": [
        "raw.png: its EXIF is not the source's",
        "raw.png: lies on another side: orientation 6 became 1",
    ],
}


@pytest.fixture(params=list(EXPECTED))
def sides(request, tmp_path, protector, pool):
    """Name, source, destination, and the manifest of what is written now."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "s.tar").write_bytes(sources()[request.param])
    source, destination = open_storage(str(tmp_path / "in")), open_storage(str(tmp_path / "out"))
    config = RewriteConfig(batch_size=4)
    manifest = rewrite_unit(first_unit(source), source, destination, protector, config, pool=pool)
    return request.param, source, destination, manifest


def test_audit_finds_what_was_damaged_before_and_nothing_now(sides):
    name, source, destination, manifest = sides
    unit = first_unit(source)
    assert audit_unit(unit, manifest, source, destination, BINDING).problems == []
    old = (FIXTURES / f"{name}.tar").read_bytes()
    destination.write_bytes("s.tar", old)
    output = OutputObject("s.tar", len(old), "", hashlib.sha256(old).hexdigest())
    planted = manifest.model_copy(update={"outputs": (output,)})
    assert audit_unit(unit, planted, source, destination, BINDING).problems == EXPECTED[name]


def test_reservation_is_written_and_expected(sides, protector, pool):
    _, source, destination, unmarked = sides
    config = RewriteConfig(batch_size=4, mark_no_ai_training=True)
    unit = first_unit(source)
    marked = BINDING.model_copy(update={"mark_no_ai_training": True})
    assert "XMP" in str(audit_unit(unit, unmarked, source, destination, marked).problems)
    manifest = rewrite_unit(unit, source, destination, protector, config, pool=pool)
    assert audit_unit(unit, manifest, source, destination, marked).problems == []
    assert xmp.PROHIBITED.encode() in destination.read_bytes("s.tar")
