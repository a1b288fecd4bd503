"""A shard is whole or refused; what is copied is copied byte for byte."""

import io
import tarfile

import pytest
from support.builders import make_samples, make_tar, read_members

from one4all.corpus import tar as shards
from one4all.corpus.tar import TarWriter, read_tar, write_shard
from one4all.errors import ShardError

LONG = "folder/" + "x" * 300 + ".jpg"


def copy_of(tar: bytes) -> bytes:
    sink = io.BytesIO()
    writer = TarWriter(sink)
    for member in shards.read_members(io.BytesIO(tar)):
        writer.copy(member)
    writer.close()
    return sink.getvalue()


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_copied_shard_is_identical(format):
    files = [*make_samples(3), ("ünï/cödé.txt", b"x"), ("../../etc/passwd", b"data"), ("/abs", b"")]
    if format != tarfile.USTAR_FORMAT:
        files.append((LONG, b"long"))
    tar = make_tar(files, format=format)
    assert copy_of(tar) == tar


def test_directories_links_and_global_headers_are_copied():
    buffer = io.BytesIO()
    headers = {"comment": "made by hand"}
    with tarfile.open(
        fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers=headers
    ) as tar:
        for name, kind in (("a", tarfile.DIRTYPE), ("a/link", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "x.jpg" if kind == tarfile.SYMTYPE else ""
            tar.addfile(info)
        info = tarfile.TarInfo("a/x.txt")
        info.size, info.mtime = 1, 1700000000.5
        tar.addfile(info, io.BytesIO(b"x"))
    assert copy_of(buffer.getvalue()) == buffer.getvalue()


def test_shard_cut_anywhere_is_refused():
    """At every block boundary, where tarfile reads a shorter shard without an error, and inside."""
    tar = make_tar(make_samples(2))
    end = tar.rindex(b"ustar") - 257 + 512 + 512 + 1024  # last header, payload, end of archive
    for cut in [*range(0, end, 512), 100, 700, end - 1]:
        with pytest.raises(ShardError, match="truncated"):
            list(shards.read_members(io.BytesIO(tar[:cut])))
    assert list(shards.read_members(io.BytesIO(tar[:end])))


def test_garbled_header_is_refused():
    tar = bytearray(make_tar(make_samples(3)))
    second = tar.index(b"sample0001.jpg")
    tar[second] ^= 1
    with pytest.raises(ShardError, match="garbled header"):
        list(shards.read_members(io.BytesIO(tar)))


@pytest.mark.parametrize(
    ("tar", "reason"),
    [
        pytest.param(b"", "truncated", id="0-byte"),
        pytest.param(b"\x1f\x8b" + bytes(600), "gzip", id="gzip-named-tar"),
        pytest.param(make_tar(make_samples(1)) + b"x", "garbage after", id="trailing-garbage"),
        pytest.param(
            make_tar([("a.jpg", b"1"), ("a.jpg", b"2")]), "appears twice", id="duplicate-member"
        ),
        pytest.param(
            make_tar([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.cls", b"3")]),
            "must be consecutive",
            id="key-comes-back",
        ),
    ],
)
def test_damaged_shard_is_refused_with_a_reason(tar, reason):
    with pytest.raises(ShardError, match=reason):
        list(read_tar(io.BytesIO(tar)))


def test_member_over_the_limit_is_refused_before_it_is_read():
    tar = make_tar([("a.bin", bytes(5000))])
    with pytest.raises(ShardError, match="over the limit"):
        list(shards.read_members(io.BytesIO(tar), max_sample_bytes=4999))


def test_sample_that_could_not_be_held_in_memory_is_refused():
    frames = make_tar([(f"video.{i:05d}.jpg", b"x") for i in range(300)])
    with pytest.raises(ShardError, match="ends at the first dot"):
        list(read_tar(io.BytesIO(frames)))


def test_members_that_start_with_a_dot_stand_alone():
    files = [("._a.jpg", b"1"), ("a.jpg", b"2"), ("._b.jpg", b"3"), ("b.jpg", b"4")]
    samples = read_tar(io.BytesIO(make_tar(files)))
    assert [sample.key for sample in samples] == ["._a.jpg", "a", "._b.jpg", "b"]


def test_endless_extension_headers_are_refused():
    info = tarfile.TarInfo("a")
    info.pax_headers = {"comment": "x"}
    extension = info.tobuf(tarfile.PAX_FORMAT)[:1024]
    with pytest.raises(ShardError, match="too many"):
        list(shards.read_members(io.BytesIO(extension * 1000)))


def test_empty_shard_is_whole():
    assert list(read_tar(io.BytesIO(bytes(1024)))) == []


def test_keys_are_those_of_webdataset():
    names = ["a/b.jpg", "a/b.seg.png", "c.x.y.jpg", "README", "d.tar.d/e"]
    samples = list(read_tar(io.BytesIO(make_tar([(n, b"") for n in names]))))
    assert [s.key for s in samples] == ["a/b", "c", "README", "d.tar.d/e"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_replaced_member_keeps_everything_but_payload_and_name(format):
    tar = make_tar([("a.jpg", b"old"), ("a.cls", b"1")], format=format)
    sink = io.BytesIO()
    writer = TarWriter(sink)
    for member in shards.read_members(io.BytesIO(tar)):
        if member.name == "a.jpg":
            writer.replace(member, name="a.png", payload=b"a new payload")
        else:
            writer.copy(member)
    writer.close()
    with tarfile.open(fileobj=io.BytesIO(sink.getvalue())) as archive:
        first, second = archive.getmembers()
        assert archive.extractfile(first).read() == b"a new payload"
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        original = archive.getmembers()
    kept = ("mtime", "mode", "uid", "gid", "uname", "gname", "type")
    assert first.name == "a.png"
    for attribute in kept:
        assert getattr(first, attribute) == getattr(original[0], attribute)
    assert second.get_info() == original[1].get_info()


def test_long_and_unicode_names_survive_a_replacement():
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        sink = io.BytesIO()
        writer = TarWriter(sink)
        for member in shards.read_members(
            io.BytesIO(make_tar([("ü" + LONG, b"x")], format=format))
        ):
            writer.replace(member, name=member.name, payload=b"y")
        writer.close()
        assert read_members(sink.getvalue()) == {"ü" + LONG: b"y"}


def test_same_files_make_the_same_shard():
    first, second = io.BytesIO(), io.BytesIO()
    for sink in (first, second):
        write_shard(sink, make_samples(2))
    assert first.getvalue() == second.getvalue()
    assert read_members(first.getvalue()) == dict(make_samples(2))
