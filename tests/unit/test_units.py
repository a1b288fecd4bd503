"""A unit is a list of objects; what is done stays done across versions of the ledger."""

import json

import pytest

from one4all.corpus import ObjectVersion, Unit, find_container, list_units, open_corpora
from one4all.errors import UsageError
from one4all.ledger import Ledger, Manifest
from one4all.storage import ObjectInfo, open_storage

PARTS = (ObjectVersion("a/1.jpg", 10, "x"), ObjectVersion("a/2.jpg", 20, "y"))


def test_a_shard_keeps_the_version_that_ledgers_of_before_name_it_by():
    assert Unit.of_object(ObjectInfo("a/b.tar", 10, '"x"')).id == "a/b.tar@ebd16c8fb8c3fecb"


@pytest.mark.parametrize(
    "other",
    [
        PARTS[:1],
        (PARTS[1], PARTS[0]),
        (PARTS[0], ObjectVersion("a/2.jpg", 20, "z")),
        (PARTS[0], ObjectVersion("a/2.jpg", 21, "y")),
        (PARTS[0], ObjectVersion("a/3.jpg", 20, "y")),
    ],
    ids=["one missing", "another order", "another etag", "another size", "another key"],
)
def test_a_unit_of_several_objects_changes_with_each_of_them(other):
    unit = Unit("group", PARTS)
    assert unit.size == 30
    assert Unit("group", PARTS).id == unit.id
    assert Unit("group", other).version != unit.version


def test_a_unit_reaches_a_worker_whole():
    unit = Unit("g\udce9 ü", (ObjectVersion("g\udce9 ü.tar", 1, '"e"'), *PARTS), modified=5.0)
    assert Unit.from_json(unit.to_json()) == unit


def test_units_are_told_from_what_lies_beside_them(tmp_path):
    storage = open_storage(str(tmp_path))
    for key in ("b.tar", "a.tar", "notes.txt", "_one4all/shards/a.tar@0.json"):
        storage.write_bytes(key, b"x")
    assert [unit.name for unit in list_units(storage)] == ["a.tar", "b.tar"]
    others = [f for f in find_container(storage).scan(storage) if isinstance(f, ObjectInfo)]
    assert [info.key for info in others] == ["notes.txt"]


def test_a_corpus_without_units_is_named(tmp_path):
    (tmp_path / "notes.txt").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"no \.tar shard.* or image in .*one4all pack makes some"):
        open_corpora([str(tmp_path)])


def test_a_manifest_of_before_units_had_several_objects_still_counts(tmp_path):
    """The text is what version 0.1.0 wrote."""
    text = {
        "format": 1,
        "source": {"name": "a/b.tar", "size": 10, "etag": '"x"'},
        "output_etag": "e",
        "output_size": 12,
        "output_sha256": "00ff",
        "num_samples": 3,
        "num_images": 2,
        "num_protected": 1,
        "num_members": 9,
        "bad_images": [{"key": "k", "member": "k.jpg", "reason": "16 bits", "action": "dropped"}],
        "converted": {"P to RGB": 1},
        "distances": {"max_before_encoding": 8, "max_decoded": 20, "mean_psnr_db": 30.5},
        "seconds": {"read": 0.1},
        "run_id": "r",
    }
    storage = open_storage(str(tmp_path))
    storage.write_bytes("_one4all/shards/a/b.tar@ebd16c8fb8c3fecb.json", json.dumps(text).encode())
    ledger = Ledger(storage)
    unit = Unit.of_object(ObjectInfo("a/b.tar", 10, '"x"'))
    (entry,) = ledger.entries()
    assert (entry.name, entry.version, entry.outputs) == (unit.name, unit.version, "")
    manifest = ledger.manifest(entry)
    assert manifest.unit == unit
    assert (manifest.output_size, manifest.outputs[0].sha256) == (12, "00ff")
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
