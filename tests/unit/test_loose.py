"""Loose images: what is copied with them, what is done again, and what a fault of one costs."""

import json
import os
import stat
from io import BytesIO
from itertools import count

import numpy as np
import pytest
from PIL import Image
from support.builders import make_image, make_samples, make_tar

from one4all.corpus import find_container, list_units, loose, read_samples
from one4all.errors import NotFoundError, ShardError, StorageError, UsageError
from one4all.images import decode
from one4all.ledger import Ledger, done_manifests, take_census
from one4all.ledger.objects import ObjectRecords, ObjectRow
from one4all.storage import INTERNAL, Attributes, LocalStorage, open_storage
from one4all.training.loader import ImageStream, Share
from pipelines.protect.worker import ProtectWorker
from pipelines.status import read_bad_images, read_status

ODD_KEYS = (
    "a b/p q.jpg",
    "a%20b/ü+é%.jpg",
    "a/.hidden/x.jpg",
    "a/" + "n" * 200 + ".jpg",
    "b.jpg",
    "noextension",
    "z~$&'()=@,;:.jpg",
)


@pytest.fixture(params=["folder", "s3"])
def sides(request, tmp_path):
    """A corpus of loose images with a text and a bad image among them; and where it goes."""
    uri = str(tmp_path) if request.param == "folder" else request.getfixturevalue("s3_uri")
    source = open_storage(f"{uri}/in")
    for index, key in enumerate(ODD_KEYS):
        source.write_bytes(key, make_image(seed=index))
    source.write_bytes("b.txt", b"what b shows")
    source.write_bytes("c.jpg", b"\xff\xd8\xff no picture")
    return source, open_storage(f"{uri}/out")


def contents(storage) -> dict[str, bytes]:
    return {info.key: storage.read_bytes(info.key) for info in storage.list_data()}


def recomputed(protector_folder) -> dict[str, object]:
    return {"recompute": 1.0, "protector": str(protector_folder)}


def worked_on(monkeypatch) -> list[str]:
    """Keys that workers are given from now on."""
    keys: list[str] = []
    original = ProtectWorker.protect

    def noted(worker, unit, *, recorded=""):
        keys.extend(part.key for part in unit.objects)
        return original(worker, unit, recorded=recorded)

    monkeypatch.setattr(ProtectWorker, "protect", noted)
    return keys


def test_same_keys_images_protected_and_all_else_as_it_was(
    sides, protect, problems, protector_folder
):
    source, destination = sides
    result = protect(source.uri, destination.uri)
    assert (result.exit_code, result.container, result.noun) == (3, "images", "file")
    assert (result.num_done, result.num_images, result.num_bad_images) == (9, 7, 1)
    before, after = contents(source), contents(destination)
    assert after.keys() == before.keys() - {"c.jpg"}
    assert after["b.txt"] == before["b.txt"]
    for key in ODD_KEYS:
        difference = decode(after[key]).pixels.astype(int) - decode(before[key]).pixels
        assert np.any(difference)
        assert Image.open(BytesIO(after[key])).format == "JPEG"
    assert problems(source.uri, destination.uri, **recomputed(protector_folder)) == []
    status = read_status(destination.uri)
    assert (status.num_done, status.num_protected, status.num_bad) == (9, 7, 1)
    ((_, bad),) = read_bad_images(destination.uri)
    assert (bad.key, bad.action) == ("c.jpg", "dropped")


def test_only_what_is_new_or_changed_is_worked_on(sides, protect, problems, monkeypatch):
    source, destination = sides
    protect(source.uri, destination.uri)
    first = contents(destination)
    new = {f"a/new {index}.jpg": make_image(seed=50 + index) for index in range(10)}
    for key, data in new.items():
        source.write_bytes(key, data)
    source.write_bytes("b.jpg", make_image(seed=99))
    source.delete("noextension")
    destination.delete("a b/p q.jpg")
    keys = worked_on(monkeypatch)
    result = protect(source.uri, destination.uri)
    assert sorted(keys) == sorted([*new, "b.jpg", "a b/p q.jpg"])
    assert (result.num_protected_now, result.num_damaged, result.orphan) == (12, 1, "noextension")
    assert problems(source.uri, destination.uri) == ["noextension: is no file of the source"]
    assert protect(source.uri, destination.uri, prune=True).num_pruned == 1
    after = contents(destination)
    assert after.keys() == first.keys() - {"noextension"} | new.keys()
    assert {key for key in after.keys() & first.keys() if after[key] != first[key]} == {"b.jpg"}
    keys.clear()
    assert protect(source.uri, destination.uri).num_protected_now == 0
    assert keys == []
    assert problems(source.uri, destination.uri) == []


def test_lossless_says_so_by_one_more_extension(tmp_path, protect, problems, protector_folder):
    source = open_storage(str(tmp_path / "in"))
    source.write_bytes("a.jpg", make_image(seed=1))
    source.write_bytes("a.png", make_image("PNG", seed=2))
    out = tmp_path / "out"
    assert protect(source.uri, out, output_format="lossless").exit_code == 0
    assert contents(open_storage(str(out))).keys() == {"a.jpg.png", "a.png"}
    assert problems(source.uri, out, **recomputed(protector_folder)) == []
    assert protect(source.uri, out, output_format="lossless").num_protected_now == 0
    # A second object of that name cannot be: both would be written to one place.
    source.write_bytes("a.jpg.png", make_image("PNG", seed=3))
    assert protect(source.uri, out, output_format="lossless").exit_code == 1


def test_others_are_left_out_if_asked(sides, protect, problems):
    source, destination = sides
    assert protect(source.uri, destination.uri, others="skip").num_done == 9
    assert contents(destination).keys() == {*ODD_KEYS}
    assert problems(source.uri, destination.uri) == []
    assert protect(source.uri, destination.uri, others="skip").num_protected_now == 0


def test_modes_and_times_of_files_are_kept(tmp_path, protect, problems):
    source = open_storage(str(tmp_path / "in"))
    for key, data in {"a.jpg": make_image(), "b.txt": b"text"}.items():
        source.write_bytes(key, data)
        (source.root / key).chmod(0o640)
        os.utime(source.root / key, ns=(10**18, 10**18 + 123))
    protect(source.uri, tmp_path / "out")
    for key in ("a.jpg", "b.txt"):
        status = (tmp_path / "out" / key).stat()
        assert (stat.S_IMODE(status.st_mode), status.st_mtime_ns) == (0o640, 10**18 + 123)
    assert problems(source.uri, tmp_path / "out") == []
    (tmp_path / "out" / "b.txt").chmod(0o600)
    (problem,) = problems(source.uri, tmp_path / "out")
    assert problem.endswith("b.txt: its permissions are not the source's")


def test_what_s3_keeps_beside_the_bytes_is_kept(s3_uri, protect, problems):
    source, destination = open_storage(f"{s3_uri}/in"), open_storage(f"{s3_uri}/out")
    attributes = Attributes(
        {
            "ContentType": "image/pjpeg",
            "CacheControl": "max-age=60",
            "Expires": "Wed, 21 Oct 2026 07:28:00 GMT",
        },
        {"artist": "ann"},
        {"project": "a b/ü"},
    )
    for key, data in {"a.jpg": make_image(), "b.txt": b"text"}.items():
        with source.writer(key, attributes=attributes) as sink:
            sink.write(data)
            sink.commit()
    protect(source.uri, destination.uri)
    for key in ("a.jpg", "b.txt"):
        assert destination.open(key).attributes == attributes
    assert problems(source.uri, destination.uri) == []
    with destination.writer("b.txt") as sink:
        sink.write(b"text")
        sink.commit()
    found = "\n".join(problems(source.uri, destination.uri))
    assert all(f"its {what}" in found for what in ("CacheControl", "user metadata", "tags"))


def test_object_that_goes_or_changes_while_it_is_read_is_left_to_the_next_pass(
    sides, protect, problems, monkeypatch
):
    source, destination = sides
    original, changes = loose._fetch, iter([True])

    def late(store, part, options):
        if part.key == "b.jpg" and next(changes, False):
            source.write_bytes("b.jpg", make_image(seed=77))
            source.delete("noextension")
        elif part.key == "noextension":
            while source.standing("noextension"):
                pass
        return original(store, part, options)

    monkeypatch.setattr(loose, "_fetch", late)
    keys = worked_on(monkeypatch)
    assert protect(source.uri, destination.uri).num_done == 8
    assert keys.count("b.jpg") == 2
    assert len(keys) == 10  # and no other twice
    assert problems(source.uri, destination.uri) == []


def test_object_that_spoils_its_group_is_given_up_alone(tmp_path, protect, problems, monkeypatch):
    source = open_storage(str(tmp_path / "in"))
    for index in range(6):
        source.write_bytes(f"{index}.jpg", make_image(seed=index))
    original = loose._fetch

    def spoilt(store, part, options):
        if part.key == "3.jpg":
            raise ShardError("poison")
        return original(store, part, options)

    monkeypatch.setattr(loose, "_fetch", spoilt)
    result = protect(source.uri, tmp_path / "out")
    assert (result.num_done, result.quarantined) == (5, {"3.jpg": "poison"})
    assert result.exit_code == 3
    monkeypatch.setattr(loose, "_fetch", original)
    assert protect(source.uri, tmp_path / "out").num_protected_now == 0
    assert protect(source.uri, tmp_path / "out", retry_quarantined=True).exit_code == 0
    assert problems(source.uri, tmp_path / "out") == []


def test_object_that_cannot_be_read_today_holds_up_no_other(tmp_path, protect, monkeypatch):
    """As one that is archived: it is not given up, and may be fine tomorrow."""
    source = open_storage(str(tmp_path / "in"))
    for index in range(4):
        source.write_bytes(f"{index}.jpg", make_image(seed=index))
    (source.root / "nowhere.jpg").symlink_to("not-there")
    original = loose._fetch

    def archived(store, part, options):
        if part.key == "2.jpg":
            raise StorageError("2.jpg is archived")
        return original(store, part, options)

    monkeypatch.setattr(loose, "_fetch", archived)
    result = protect(source.uri, tmp_path / "out")
    assert (result.exit_code, result.num_done, result.num_failed) == (1, 3, 2)
    assert result.failed["2.jpg"] == "2.jpg is archived"
    assert "gone, or replaced" in result.failed["nowhere.jpg"]
    (source.root / "nowhere.jpg").unlink()
    monkeypatch.setattr(loose, "_fetch", original)
    assert protect(source.uri, tmp_path / "out").exit_code == 0


def test_many_groups_that_failed_are_nobodys_fault(tmp_path, protect):
    source, ledger = open_storage(str(tmp_path / "in")), Ledger(open_storage(str(tmp_path / "out")))
    for index in range(65):
        source.write_bytes(f"{index}.jpg", b"x")
        ledger.begin_group(next(list_units(source)), f"run{index}")
    assert ledger.suspects() == set()
    assert len(take_census(source, ledger).pending) < 65


def test_group_that_killed_its_worker_is_not_begun_again_as_one(tmp_path):
    source, ledger = open_storage(str(tmp_path / "in")), Ledger(open_storage(str(tmp_path / "out")))
    for index in range(3):
        source.write_bytes(f"{index}.jpg", b"x")
    (group,) = take_census(source, ledger).pending
    assert ledger.begin_group(group, "run")
    assert not ledger.begin_group(group, "run")
    census = take_census(source, ledger)
    assert [len(unit.objects) for unit in census.pending] == [1, 1, 1]
    assert census.num_pending == 3
    ledger.forget_suspects()
    assert len(take_census(source, ledger).pending) == 1


def test_policy_fail_stops_the_bad_image_and_no_other(sides, protect):
    source, destination = sides
    result = protect(source.uri, destination.uri, on_bad_image="fail")
    assert (result.num_done, list(result.failed)) == (8, ["c.jpg"])
    assert "on_bad_image is fail" in result.failed["c.jpg"]
    assert not destination.standing("c.jpg")


def test_image_that_is_bad_by_now_leaves_nothing_of_the_old_one_unsaid(sides, protect):
    source, destination = sides
    protect(source.uri, destination.uri)
    source.write_bytes("b.jpg", b"\xff\xd8\xff no picture any more")
    result = protect(source.uri, destination.uri)
    assert (result.num_bad_images, result.orphan) == (2, "b.jpg")


def test_large_file_is_copied_as_a_stream_and_an_archive_is_looked_into(
    tmp_path, protect, problems, monkeypatch
):
    source = open_storage(str(tmp_path / "in"))
    film = os.urandom(200_000)
    source.write_bytes("a.jpg", make_image(seed=1))
    source.write_bytes("film.mp4", film)
    source.write_bytes("more.tar", make_tar(make_samples(20)))
    monkeypatch.setattr(loose, "LARGE_BYTES", 10_000)
    result = protect(source.uri, tmp_path / "out", container="images")
    assert (result.num_done, result.num_bad_images) == (3, 1)
    ((_, bad),) = read_bad_images(str(tmp_path / "out"))
    assert bad.key == "more.tar"
    assert "tar archive that holds images" in bad.reason
    assert (tmp_path / "out" / "film.mp4").read_bytes() == film
    assert problems(source.uri, tmp_path / "out") == []
    (tmp_path / "out" / "film.mp4").write_bytes(film[:-1] + b"x")
    os.utime(tmp_path / "out" / "film.mp4", ns=(0, (tmp_path / "in/film.mp4").stat().st_mtime_ns))
    found = "\n".join(problems(source.uri, tmp_path / "out"))
    assert "film.mp4: its bytes are not the source's" in found


@pytest.mark.parametrize(
    ("sizes", "kind"),
    [
        ({"a.tar": 100, "b.jpg": 10}, "tar"),
        ({"a.tar": 10, "b.jpg": 100, "c.JPG": 1}, "images"),
        ({"photo": 0}, "images"),
        ({"notes.txt": 10}, "tar"),
        ({}, "tar"),
    ],
)
def test_what_most_bytes_are_in_decides(tmp_path, sizes, kind):
    storage = open_storage(str(tmp_path))
    for key, size in sizes.items():
        storage.write_bytes(key, bytes(size) or make_image())
    assert find_container(storage).name == kind


def test_tar_that_comes_later_does_not_change_what_a_corpus_is(sides, protect):
    source, destination = sides
    protect(source.uri, destination.uri)
    source.write_bytes("backup.tar", bytes(1_000_000))
    result = protect(source.uri, destination.uri)
    assert (result.container, result.num_done, result.num_orphans) == ("images", 10, 0)
    with pytest.raises(UsageError, match="container 'images' -> 'tar'"):
        protect(source.uri, destination.uri, container="tar")


def test_list_says_what_to_do(sides, protect, tmp_path, monkeypatch):
    source, destination = sides
    asked = ["b.jpg", f"{source.uri}/a/.hidden/x.jpg", "# c.jpg", "gone.jpg"]
    (tmp_path / "todo").write_text("\n".join(asked))
    keys = worked_on(monkeypatch)
    result = protect(source.uri, destination.uri, only=str(tmp_path / "todo"))
    assert sorted(keys) == ["a/.hidden/x.jpg", "b.jpg"]
    assert (result.num_shards, result.num_done, result.absent) == (2, 2, "gone.jpg")
    keys.clear()
    assert protect(source.uri, destination.uri, only=str(tmp_path / "todo")).num_done == 2
    assert keys == []
    (tmp_path / "todo").write_text("../b.jpg")
    with pytest.raises(UsageError, match="line 1 of"):
        protect(source.uri, destination.uri, only=str(tmp_path / "todo"))


def test_files_written_before_a_time_are_left_out(tmp_path, protect):
    source = open_storage(str(tmp_path / "in"))
    for index, key in enumerate(("old.jpg", "new.jpg")):
        source.write_bytes(key, make_image(seed=index))
    os.utime(source.root / "old.jpg", (0, 0))
    result = protect(source.uri, tmp_path / "out", since="1h")
    assert (result.num_done, result.num_older, result.num_older_undone) == (1, 1, 1)


def test_who_learns_reads_groups(sides):
    source, _ = sides
    (unit,) = list_units(source)
    keys = [sample.key for sample in read_samples(source, unit)]
    assert keys == sorted([*ODD_KEYS, "b.txt", "c.jpg"])
    stream = ImageStream([source.uri], size=16)
    batch = next(stream.batches(7, (Share(0, 0, 1),)))
    assert batch.image_BHWC.shape == (7, 16, 16, 3)


def make_row(key: str, version: int, *, output: str | None = None) -> ObjectRow:
    written = key if output is None else output
    return ObjectRow(key, version, f"e{version}", written, version, f"o{version}", "", 1, "", *ROW)


ROW = (8, 9, 40.0, "run")


def publish(records: ObjectRecords, rows: list[ObjectRow]) -> None:
    records._publish(sorted(rows))


@pytest.fixture
def records(tmp_path):
    return ObjectRecords(open_storage(str(tmp_path / "out")))


def test_records_are_read_in_the_order_of_listings_whatever_their_number(records, monkeypatch):
    """Also bytes of names that are no UTF-8, of which the order in UTF-8 is another one."""
    keys = ["b", "a\udce9", "a\U0001f600", "aé", "a/b", "a.jpg", "ü", "", "z"]
    keys = [f"{key}{index}" for index in range(40) for key in keys]
    random = np.random.default_rng(0)
    for chunk in np.array_split(random.permutation(len(keys)), 30):
        publish(records, [make_row(keys[index], 1) for index in chunk])
    monkeypatch.setattr("one4all.ledger.objects._ROWS_IN_MEMORY", 50)
    monkeypatch.setattr("one4all.ledger.objects._ROW_GROUP", 7)
    monkeypatch.setattr("one4all.ledger.objects._SMALL", 4000)
    assert [row.key for row in records.rows()] == sorted(keys)


def test_merging_keeps_what_is_true_once_and_nothing_else(records):
    storage = records._storage
    stamps = count(1)
    rows, standing = [], {}
    for index in range(20):
        key = f"{index:02d}.jpg"
        storage.write_bytes(key, bytes(next(stamps)))
        info = storage.head(key)
        true = ObjectRow(key, 1, "e", key, info.size, info.etag, "", 1, "", *ROW)
        rows += [true, true, make_row(key, 500), make_row(key, 7, output="")]
        standing[key] = true
    for start in range(0, len(rows), 5):
        publish(records, rows[start : start + 5])
    merge = records.merge(storage.list_data)
    assert merge.num_parts > 10
    expected = sorted([*standing.values(), *(make_row(key, 7, output="") for key in standing)])
    assert sorted(records.rows()) == expected
    assert len(list(storage.list(f"{INTERNAL}objects/"))) == 1
    assert records.merge(storage.list_data).num_parts == 0


def test_two_that_merge_at_once_lose_nothing(records, monkeypatch):
    storage = records._storage
    for index in range(12):
        storage.write_bytes(f"{index:02d}", b"x")
        info = storage.head(f"{index:02d}")
        row = ObjectRow(info.key, 1, "e", info.key, info.size, info.etag, "", 1, "", *ROW)
        publish(records, [row])
    before = sorted(records.rows())
    original, first = LocalStorage.delete, iter([True])

    def delete(self, key):
        if next(first, False):  # the other one merges all before this part is removed
            ObjectRecords(storage).merge(storage.list_data)
        original(self, key)

    monkeypatch.setattr(LocalStorage, "delete", delete)
    records.merge(storage.list_data)
    assert sorted(dict.fromkeys(records.rows())) == before


def test_census_begins_again_if_records_are_merged_meanwhile(sides, protect, monkeypatch):
    source, destination = sides
    protect(source.uri, destination.uri)
    ledger, original, failures = Ledger(destination), ObjectRecords.rows, iter([True, True])

    def rows(records):
        if next(failures, False):
            raise NotFoundError("merged")
        return original(records)

    monkeypatch.setattr(ObjectRecords, "rows", rows)
    assert take_census(source, ledger).num_done == 9
    assert sum(len(unit.objects) for unit, _ in done_manifests(source, ledger)) == 9


def test_damaged_record_is_a_sentence(sides, protect):
    source, destination = sides
    protect(source.uri, destination.uri)
    (part,) = destination.list(f"{INTERNAL}objects/")
    destination.write_bytes(part.key, b"PAR1 garbage PAR1")
    with pytest.raises(ShardError, match="records below _one4all/objects/ cannot be read"):
        take_census(source, Ledger(destination))


def test_line_of_the_log_names_the_group(sides, protect, caplog):
    source, destination = sides
    with caplog.at_level("INFO", logger="one4all.shards"):
        protect(source.uri, destination.uri, log_json=True)
    line = json.loads(caplog.messages[0])
    assert line["name"] == "a b/p q.jpg and 8 more"
