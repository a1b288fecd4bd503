"""A shard is whole or refused; what is copied is copied byte for byte."""

import bz2
import gzip
import io
import lzma
import os
import string
import tarfile
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.builders import make_image, make_samples, make_tar, read_members
from support.hostile import pax_record, tar_header, tar_of, with_pax

from one4all.corpus import images_of, list_units
from one4all.corpus import tar as shards
from one4all.corpus.tar import TarWriter, read_tar, write_shard
from one4all.errors import ShardError
from one4all.image_kinds import is_image
from one4all.storage import open_storage

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
    end = tar.rindex(b"ustar") - 257 + 512 + 512 + 512  # last header, payload, end of archive
    for cut in [*range(0, end, 512), 100, 700, end - 1, end + 1, end + 511]:
        with pytest.raises(ShardError, match="truncated"):
            list(shards.read_members(io.BytesIO(tar[:cut])))
    for end_of_file in (end, end + 512):  # one block of zeros, and two
        assert copy_of(tar[:end_of_file]) == tar


def test_data_behind_one_block_of_zeros_is_refused():
    one = make_tar(make_samples(1))
    end = one.rindex(b"ustar") - 257 + 512 + 512 + 512
    with pytest.raises(ShardError, match="after a single zero block"):
        list(shards.read_members(io.BytesIO(one[:end] + make_tar(make_samples(1)))))


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
        pytest.param(gzip.compress(os.urandom(600)), "gzip-compressed", id="gzip-named-tar"),
        pytest.param(bz2.compress(os.urandom(600)), "bzip2-compressed", id="bzip2-named-tar"),
        pytest.param(lzma.compress(os.urandom(600)), "xz-compressed", id="xz-named-tar"),
        pytest.param(b"\x28\xb5\x2f\xfd" + bytes(600), "zstd-compressed", id="zstd-named-tar"),
        pytest.param(b"PK\3\4" + bytes(600), "a zip archive", id="zip-named-tar"),
        pytest.param(make_tar(make_samples(1)) + b"x", "garbage after", id="trailing-garbage"),
        pytest.param(
            make_tar([("a.jpg", b"1"), ("a.jpg", b"2")]), "appears twice", id="duplicate-member"
        ),
        pytest.param(
            make_tar([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.cls", b"3")]),
            "must be consecutive: .* tar --sort=name",
            id="key-comes-back",
        ),
    ],
)
def test_damaged_shard_is_refused_with_a_reason(tar, reason):
    with pytest.raises(ShardError, match=reason):
        list(read_tar(io.BytesIO(tar)))


def test_member_whose_name_begins_like_another_format_is_read():
    for name in ("BZh9.jpg", "PK\x03\x04.jpg"):
        assert [m.name for m in shards.read_members(io.BytesIO(make_tar([(name, b"x")])))] == [name]


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


APPLE_DOUBLE = b"\0\x05\x16\x07\0\2\0\0Mac OS X        " + bytes(100)


def test_files_without_a_key_between_members_of_a_sample_belong_to_it():
    """As macOS writes a tar; WebDataset passes over them."""
    files = [
        (f"./{prefix}{key}.{extension}", APPLE_DOUBLE if prefix else content)
        for key in ("0", "1")
        for extension, content in (("jpg", make_image()), ("txt", b"hi"))
        for prefix in ("._", "")
    ]
    files += [("./Makefile", b""), ("./1.cls", b"1"), ("./.DS_Store", b"")]
    tar = make_tar(files)
    samples = list(read_tar(io.BytesIO(tar)))
    keys = [sample.key for sample in samples]
    assert keys == ["./._0.jpg", "./0", "./._1.jpg", "./1", "./.DS_Store"]
    assert [m.name for sample in samples for m in sample.members] == [name for name, _ in files]
    images = [member.name for sample in samples for member in images_of(sample)]
    assert images == ["./0.jpg", "./1.jpg"]
    assert copy_of(tar) == tar


def test_too_many_files_without_a_key_stand_alone(monkeypatch):
    monkeypatch.setattr(shards, "MAX_SAMPLE_MEMBERS", 3)
    names = ["a.jpg", ".1", ".2", ".3", ".4", "b.jpg"]
    samples = read_tar(io.BytesIO(make_tar([(name, b"") for name in names])))
    assert [sample.key for sample in samples] == ["a", ".1", ".2", ".3", ".4", "b"]


def test_companion_of_macos_is_no_image_and_no_shard(tmp_path):
    assert not is_image("a/._a.jpg", APPLE_DOUBLE)
    assert is_image("a/a.jpg", APPLE_DOUBLE)  # of that name it is a photo that is broken
    assert is_image("a/._a.jpg", make_image())
    for name, content in (("._0.tar", APPLE_DOUBLE), ("._1.tar", make_tar([])), ("1.tar", b"")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "._2.tar").symlink_to(tmp_path / "nothing")
    units = list_units(open_storage(str(tmp_path)))
    assert [unit.name for unit in units] == ["._1.tar", "._2.tar", "1.tar"]


def test_volume_label_is_copied():
    tar = tar_of(tar_header("my shards", kind=b"V"), tar_header("a.txt", size=2), b"hi")
    assert copy_of(tar)[: len(tar)] == tar
    assert [s.key for s in read_tar(io.BytesIO(tar))] == ["my shards", "a"]


BASE_256 = b"\xff" * 12


@pytest.mark.parametrize(
    ("tar", "reason"),
    [
        pytest.param(with_pax(b"1" * 131_072), "garbled extension", id="digits"),
        pytest.param(with_pax(b"1" * 7 + b" a=\n"), "garbled extension", id="record-too-long"),
        pytest.param(with_pax(b"0 a=\n"), "garbled extension", id="record-of-0-bytes"),
        pytest.param(with_pax(b"9 path=ab"), "garbled extension", id="record-without-end"),
        pytest.param(with_pax(b"6 =ab\n"), "garbled extension", id="no-keyword"),
        pytest.param(with_pax(b"6 \xff=a\n"), "garbled extension", id="keyword-no-utf8"),
        pytest.param(with_pax(pax_record("a", "b") * 2000), None, id="a-record-2000-times"),
        pytest.param(
            with_pax(b"".join(pax_record(f"a{i}", "") for i in range(1001))),
            "garbled extension",
            id="1001-records",
        ),
        pytest.param(with_pax(pax_record("path", "a\0.jpg")), "garbled extension", id="nul"),
        pytest.param(with_pax(pax_record("path", "")), "garbled extension", id="no-name"),
        pytest.param(with_pax(pax_record("path", "a" * 5000)), "over 4,096", id="long-name"),
        *(
            pytest.param(with_pax(pax_record(k, v)), f"its {k} is", id=f"{k}={v}")
            for k, v in (
                ("size", "-1"),
                ("size", "1e3"),
                ("size", ""),
                ("uid", "1_0"),
                ("uid", "9" * 30),
                ("mtime", "nan"),
                ("mtime", "1e400"),
            )
        ),
        pytest.param(with_pax(pax_record("size", "9" * 18)), "over the limit", id="pax-size"),
        *(
            pytest.param(with_pax(pax_record(k, "a.txt")), "member 'a.txt'.* is a sparse", id=k)
            for k in ("GNU.sparse.major", "GNU.sparse.name", "SCHILY.realsize", "SUN.holesdata")
        ),
        pytest.param(tar_of(tar_header("a", kind=b"S")), "'a' is a sparse file", id="sparse"),
        pytest.param(tar_of(tar_header("a", kind=b"M")), "of another volume", id="volume"),
        pytest.param(tar_of(tar_header("a", size=BASE_256)), "its size is -1", id="size-below-0"),
        pytest.param(
            tar_of(tar_header("a", size=b"\xff" + bytes(11))),
            "its size is -",
            id="far-below-0",
        ),
        pytest.param(
            tar_of(tar_header("a", kind=b"x", size=b"\xff" + bytes(11))),
            "its size is -",
            id="extension-far-below-0",
        ),
        pytest.param(
            tar_of(tar_header("a", size=b"\x80" + b"\xff" * 11)),
            "over the limit",
            id="2-to-88",
        ),
        pytest.param(tar_of(tar_header("a", size=b"-0000000001\0")), "its size", id="minus"),
        pytest.param(tar_of(tar_header("a", size=b"00000000_1 \0")), "its size", id="underscore"),
        pytest.param(tar_of(tar_header("a", size=b"1\0" + b"7" * 10)), "its size", id="two"),
        *(
            pytest.param(
                tar_of(tar_header("a", kind=kind, size=512, link="b"), b"x" * 512),
                "no file and declares 512",
                id=f"content-of-type-{kind.decode()}",
            )
            for kind in (b"1", b"2", b"5")
        ),
        pytest.param(
            tar_of(tar_header("L", kind=b"L", size=4), b"a\0b\0", tar_header("a")),
            "garbled extension",
            id="two-long-names",
        ),
        pytest.param(
            tar_of(
                tar_header("L", kind=b"L", size=2),
                b"b\0",
                tar_header("x", kind=b"x", size=10),
                b"10 path=a\n",
                tar_header("c"),
            ),
            "too many",
            id="names-of-two-dialects",
        ),
        pytest.param(
            tar_of(tar_header("g", kind=b"g", size=14), b"14 linkpath=a\n", tar_header("c")),
            "overrides names",
            id="global-link",
        ),
    ],
)
def test_header_that_no_writer_writes_is_refused_at_once(tar, reason):
    start = time.process_time()
    if reason is None:
        assert list(read_tar(io.BytesIO(tar)))
    else:
        with pytest.raises(ShardError, match=reason):
            list(read_tar(_NoNegativeReads(tar)))
    assert time.process_time() - start < 1


class _NoNegativeReads(io.BytesIO):
    """A read of -1 would be the rest of a shard of any size."""

    def read(self, size=-1, /):
        assert size >= 0
        return super().read(size)


@settings(max_examples=60, deadline=None)
@given(
    name=st.text(min_size=1, max_size=300).filter(
        lambda text: "\0" not in text and text.strip("/")
    ),
    numbers=st.tuples(*[st.integers(0, 2**40)] * 3),
    owner=st.text(max_size=20).filter(lambda text: "\0" not in text),
    records=st.dictionaries(
        # Capitals: the names of a header's own fields are small letters.
        st.text(string.ascii_uppercase, min_size=1),
        st.text(max_size=40),
        max_size=3,
    ),
    format=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_headers_say_what_tarfile_reads_in_them(name, numbers, owner, records, format):
    info = tarfile.TarInfo(name)
    info.uid, info.gid, info.mtime = numbers
    info.uname = owner
    info.pax_headers = records
    tar = info.tobuf(format, "utf-8", "surrogateescape") + bytes(1024)
    with tarfile.open(fileobj=io.BytesIO(tar), encoding="utf-8") as archive:
        expected = archive.next()
    (member,) = shards.read_members(io.BytesIO(tar))
    for attribute in ("name", "uid", "gid", "mtime", "uname", "gname", "size", "pax_headers"):
        assert getattr(member.info, attribute) == getattr(expected, attribute)
    sink = io.BytesIO()
    TarWriter(sink).replace(member, name=member.name, payload=b"")
    (written,) = shards.read_members(io.BytesIO(sink.getvalue() + bytes(1024)))
    for attribute in ("name", "uid", "gid", "mtime", "uname", "gname", "size"):
        assert getattr(written.info, attribute) == getattr(expected, attribute)


def test_extension_headers_count_as_bytes_of_a_sample():
    record = pax_record("comment", "x" * 900_000)
    parts = [
        part
        for index in range(4)
        for part in (
            tar_header("x", kind=b"x", size=len(record)),
            record,
            tar_header(f"a.{index}"),
        )
    ]
    tar = tar_of(*parts)
    assert len(list(read_tar(io.BytesIO(tar)))) == 1
    with pytest.raises(ShardError, match="3,000,000 bytes"):
        list(read_tar(io.BytesIO(tar), max_sample_bytes=3_000_000))


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
