"""Loose images become shards: all of them, in an order that stays the same, with their paths."""

import json

import pytest
from support.builders import make_image, read_members

from one4all.corpus.loose_packing import pack_loose_shard, plan_loose_pack
from one4all.errors import SourceChangedError, UsageError
from one4all.storage import open_storage
from pipelines.pack import is_loose


@pytest.fixture(params=["folder", "s3"])
def source(request, tmp_path):
    uri = str(tmp_path) if request.param == "folder" else request.getfixturevalue("s3_uri")
    source = open_storage(f"{uri}/in")
    for index, key in enumerate(("cat/a b.jpg", "cat/ü.JPG", "dog/1.png", "dog/.hidden/2.jpg")):
        source.write_bytes(key, make_image("PNG" if key.endswith("png") else "JPEG", seed=index))
    source.write_bytes("dog/notes.txt", b"no image")
    return source


def pack(source, destination, **options) -> list[dict[str, bytes]]:
    plan = plan_loose_pack(source, **options)
    shards = []
    for first, images in plan.shards(2):
        key = f"train-{first}.tar"
        pack_loose_shard(source, destination, key, images, first=first, classes=plan.classes)
        shards.append(read_members(destination.read_bytes(key)))
    return shards


def test_images_get_numbers_and_keep_their_paths(source, tmp_path):
    one, two = pack(source, open_storage(str(tmp_path / "out")), labels=True, shuffle=False)
    assert list(one) == [
        f"00000000{number}.{end}" for number in (0, 1) for end in ("jpg", "cls", "txt", "json")
    ]
    assert one["000000001.jpg"] == source.read_bytes("cat/ü.JPG")
    assert json.loads(two["000000002.json"]) == {
        "key": "000000002",
        "path": "dog/1.png",
        "label": "dog",
    }
    assert (one["000000000.cls"], two["000000002.cls"]) == (b"0", b"1")


def test_order_is_drawn_once_for_a_seed_and_labels_are_left_out(source, tmp_path):
    def paths(name, seed):
        shards = pack(
            source, open_storage(str(tmp_path / name)), labels=False, shuffle=True, seed=seed
        )
        members = {name: data for shard in shards for name, data in shard.items()}
        assert len(members) == 6
        return [json.loads(data)["path"] for name, data in members.items() if name.endswith("json")]

    drawn = [paths(f"out{seed}", seed) for seed in range(5)]
    assert paths("again", 0) == drawn[0]
    assert len({tuple(order) for order in drawn}) > 1
    assert {frozenset(order) for order in drawn} == {frozenset(drawn[0])}


def test_image_that_went_since_the_listing_stops_its_shard(source, tmp_path):
    destination = open_storage(str(tmp_path / "out"))
    plan = plan_loose_pack(source, labels=False, shuffle=False)
    source.delete("cat/ü.JPG")
    ((first, images), *_) = plan.shards(2)
    with pytest.raises(SourceChangedError, match=r"cat/ü\.JPG .* is gone"):
        pack_loose_shard(source, destination, "a.tar", images, first=first, classes=())
    assert list(destination.list()) == []


def test_what_cannot_be_meant_is_refused(source, tmp_path):
    source.write_bytes("zebra.jpg", make_image())
    with pytest.raises(UsageError, match=r"zebra\.jpg .* lies in no folder"):
        plan_loose_pack(source, labels=True, shuffle=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no images"):
        plan_loose_pack(open_storage(str(tmp_path / "empty")), labels=False, shuffle=True)


def test_folder_of_class_folders_is_packed_as_before(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / ".hidden").write_bytes(b"")
    assert not is_loose(str(tmp_path))
    (tmp_path / "1.jpg").write_bytes(b"x")
    assert is_loose(str(tmp_path))
    assert is_loose("s3://bucket/photos")
    assert not is_loose("emoji-nature")
