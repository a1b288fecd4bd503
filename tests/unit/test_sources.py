"""A corpus may be a folder, one shard, a pattern or a list of shards."""

import pytest
from support.builders import make_samples, make_tar, write_corpus

from one4all.corpus import list_units, open_corpora, open_source
from one4all.errors import UsageError
from one4all.storage import open_storage


def names(uri: str) -> list[str]:
    source = open_source(uri)
    source.check(writable=False)
    again = open_source(source.uri)  # as a worker opens it
    assert list(again.list()) == list(source.list())
    return [unit.name for unit in list_units(source)]


@pytest.mark.parametrize("place", ["folder", "s3"])
def test_shards_are_named_one_by_one_or_by_a_pattern(place, tmp_path, s3_uri):
    folder = str(tmp_path / "in") if place == "folder" else f"{s3_uri}/in"
    storage = open_storage(folder)
    keys = [f"{part}/t-{n:02d}.tar" for part in ("test", "train") for n in range(8, 12)]
    for key in keys:
        storage.write_bytes(key, make_tar(make_samples(1)))
    storage.write_bytes("train/notes.txt", b"")
    assert names(folder) == keys
    assert names(f"{folder}/train/t-09.tar") == ["t-09.tar"]
    assert names(f"{folder}/train/t-{{09..11}}.tar") == ["t-09.tar", "t-10.tar", "t-11.tar"]
    assert names(f"{folder}/{{train,test}}/t-{{08..11}}.tar") == keys
    lines = ["# of late", "test/t-11.tar", "", f"{storage.uri.rstrip('/')}/train/t-08.tar "]
    lines += [f"{folder}/train/t-09.tar"]
    storage.write_bytes("some.txt", "\r\n".join(lines).encode())
    assert names(f"{folder}/some.txt") == ["test/t-11.tar", "train/t-08.tar", "train/t-09.tar"]
    with pytest.raises(UsageError, match=r"1 of the 4 shards .* such as t-12\.tar"):
        names(f"{folder}/train/t-{{09..12}}.tar")
    with pytest.raises(UsageError, match=r"1 of the 1 shards"):
        names(f"{folder}/train/t-99.tar")
    ((root, unit),) = open_corpora([f"{folder}/train/t-09.tar"])
    assert open_storage(root).head(unit.name).size == unit.size


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a-{9..1}.tar", "is empty"),
        ("a-{1..9999999}.tar", "over 1,000,000"),
        ("a-{1..2000}-{1..2000}.tar", "names over 1,000,000 shards"),
        ("a-{1..2}-{x.tar", "cannot be read"),
    ],
)
def test_pattern_that_cannot_be_meant_is_refused(pattern, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        open_source(f"{tmp_path}/{pattern}")


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (b"\n# a.tar\n", "names nothing; write the path"),
        (b"a.tar\n../b.tar\n", r"line 2 of .*is '\.\./b\.tar'; a line is the path"),
        (b"s3://elsewhere/a.tar", "line 1 of .*is 's3://elsewhere/a.tar'"),
        (b"a.tar\nphoto.jpg", "line 2 of .*'photo.jpg'"),
        (b"\xff\xfe", "not UTF-8"),
        (None, "is not there"),
    ],
)
def test_list_that_cannot_be_meant_is_refused(listed, message, tmp_path):
    if listed is not None:
        (tmp_path / "list.txt").write_bytes(listed)
    with pytest.raises(UsageError, match=message):
        open_source(f"{tmp_path}/list.txt")


def test_numbers_have_the_zeros_of_their_range(tmp_path):
    for name in ("a8.tar", "a9.tar", "a10.tar", "a08.tar", "a09.tar"):
        (tmp_path / name).write_bytes(b"")
    assert names(f"{tmp_path}/a{{8..10}}.tar") == ["a10.tar", "a8.tar", "a9.tar"]
    assert names(f"{tmp_path}/a{{08..10}}.tar") == ["a08.tar", "a09.tar", "a10.tar"]


def test_folder_is_a_folder_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(write_corpus(tmp_path / "x-{1..2}.tar", num_shards=2).parent)
    assert names("x-{1..2}.tar") == ["shard-000.tar", "shard-001.tar"]
    monkeypatch.chdir("x-{1..2}.tar")
    assert names("shard-001.tar") == ["shard-001.tar"]
    assert names(f"file://{tmp_path}/x-%7B1..2%7D.tar/shard-001.tar") == ["shard-001.tar"]


def test_nothing_is_written_to_a_selection(tmp_path):
    source = open_source(str(write_corpus(tmp_path) / "shard-000.tar"))
    for write in (
        lambda: source.write_bytes("a", b""),
        lambda: source.create("a", b""),
        lambda: source.replace("a", b"", etag=""),
        lambda: source.delete("shard-000.tar"),
        lambda: source.check(writable=True),
    ):
        with pytest.raises(UsageError, match="give a folder"):
            write()
    assert source.sweep(exclusive=True) == 0
