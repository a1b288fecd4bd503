"""Folders and S3 keep the same promises."""

import errno
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from one4all.errors import (
    AccessError,
    ConflictError,
    NotFoundError,
    SourceChangedError,
    StorageError,
    UsageError,
)
from one4all.storage import (
    LocalStorage,
    Storage,
    conditional_write_defects,
    local,
    open_storage,
)
from one4all.storage.s3 import PART_BYTES


def read_all(storage: Storage, key: str, **options) -> bytes:
    with closing(storage.open(key, **options)) as reader:
        return b"".join(iter(lambda: reader.read(1 << 20), b""))


def run_at_once(call: Callable[[int], str]) -> list[str]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(call, range(8)))


def try_to_create(storage: Storage, key: str, writer: int) -> str:
    """The ETag; "" for a loser."""
    try:
        return storage.create(key, f"writer {writer}".encode())
    except ConflictError:
        return ""


def files_below(storage: Storage) -> list[str]:
    """All that a stranger sees, hidden files of a folder included."""
    if isinstance(storage, LocalStorage):
        return sorted(p.name for p in storage.root.rglob("*") if p.is_file())
    return [info.key for info in storage.list()]


def open_uploads(storage: Storage) -> int:
    if isinstance(storage, LocalStorage):
        return 0
    listed = storage._client.list_multipart_uploads(Bucket=storage._bucket)
    return sum(u["Key"].startswith(storage._prefix) for u in listed.get("Uploads", []))


@pytest.mark.parametrize("size", [0, 10, 2 * PART_BYTES + 12345])
def test_object_is_what_was_written(storage, size):
    data = os.urandom(size)
    with storage.writer("a/b.tar") as writer:
        for start in range(0, size, 1_000_000):
            writer.write(data[start : start + 1_000_000])
        etag = writer.commit()
    info = storage.head("a/b.tar")
    assert (info.size, info.etag) == (size, etag)
    assert info.modified == pytest.approx(time.time(), abs=60)
    assert next(iter(storage.list("a/"))).modified == pytest.approx(info.modified, abs=2)
    assert read_all(storage, "a/b.tar", etag=etag) == data
    assert files_below(storage) in (["b.tar"], ["a/b.tar"])


@pytest.mark.parametrize("size", [10, 2 * PART_BYTES + 5])
def test_exception_while_writing_leaves_nothing(storage, size):
    with pytest.raises(RuntimeError), storage.writer("x.tar") as writer:  # noqa: PT012
        writer.write(bytes(size))
        raise RuntimeError
    assert files_below(storage) == []
    assert open_uploads(storage) == 0
    with pytest.raises(NotFoundError):
        storage.head("x.tar")


def test_old_object_stands_until_the_new_one_is_whole(storage):
    storage.write_bytes("x", b"old")
    with pytest.raises(RuntimeError), storage.writer("x") as writer:  # noqa: PT012
        writer.write(b"new")
        raise RuntimeError
    assert storage.read_bytes("x") == b"old"


def test_only_one_creates(storage):
    storage.create("_one4all/x.json", b"first")
    with pytest.raises(ConflictError):
        storage.create("_one4all/x.json", b"second")
    assert storage.read_bytes("_one4all/x.json") == b"first"


@pytest.fixture(params=[errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS], ids=errno.errorcode.get)
def without_hard_links(tmp_path, monkeypatch, request) -> LocalStorage:
    """A folder as exFAT and FUSE have it: no hard links, and no fsync of folders."""
    real = os.fsync

    def link(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(os, "fsync", fsync)
    return LocalStorage(tmp_path / "out")


@pytest.mark.fault("file system without hard links")
def test_only_one_creates_where_there_are_no_hard_links(without_hard_links, caplog):
    storage = without_hard_links
    assert conditional_write_defects(storage) == []
    assert storage.create("_one4all/x", b"first") == storage.head("_one4all/x").etag
    with pytest.raises(ConflictError, match="exists already"):
        storage.create("_one4all/x", b"second")
    assert storage.read_bytes("_one4all/x") == b"first"
    storage.write_bytes("a.tar", b"data")
    assert files_below(storage) == ["a.tar", "x"]
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "without hard links" in warning


def test_of_many_writers_one_creates_where_there_are_no_hard_links(without_hard_links):
    for round_ in range(20):
        tags = run_at_once(lambda n, key=f"{round_}": try_to_create(without_hard_links, key, n))
        assert len([tag for tag in tags if tag]) == 1


def test_listing_is_complete_and_in_key_order(storage):
    keys = ["a.tar", "a/b.tar", "a/c/d.tar", "b-1.tar", "b.tar", "ü ö.tar"]
    for key in reversed(keys):
        storage.write_bytes(key, b"x")
    assert [info.key for info in storage.list()] == sorted(keys)
    assert [info.key for info in storage.list("a/")] == ["a/b.tar", "a/c/d.tar"]
    assert [info.key for info in storage.list("b")] == ["b-1.tar", "b.tar"]


def test_records_are_left_out_of_the_data(storage):
    for key in ("A.tar", "_one4all/b.json", "_one4all/s/c.json", "_one4all.tar", "~.tar", "ü.tar"):
        storage.write_bytes(key, b"x")
    found = [info.key for info in storage.list_data()]
    assert found == ["A.tar", "_one4all.tar", "~.tar", "ü.tar"]


def test_listing_a_prefix_looks_at_nothing_else(tmp_path, monkeypatch):
    storage = open_storage(str(tmp_path))
    for key in ("a/x1", "a/x2", "a/x2/y", "a/z", "b/x1", "c"):
        if key != "a/x2":
            storage.write_bytes(key, b"1")
    looked_at = []
    info = local._info
    monkeypatch.setattr(local, "_info", lambda stat, key: looked_at.append(key) or info(stat, key))
    expected = {
        "a/x": ["a/x1", "a/x2/y"],
        "a/x2/": ["a/x2/y"],
        "a/x1": ["a/x1"],
        "a/": ["a/x1", "a/x2/y", "a/z"],
        "b": ["b/x1"],
        "a/q": [],
        "none/": [],
        "c/": [],
    }
    for prefix, keys in expected.items():
        looked_at.clear()
        assert [found.key for found in storage.list(prefix)] == keys == looked_at


@pytest.fixture
def folder_with_a_shard(tmp_path) -> Path:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "sub" / "a.tar").write_bytes(b"x")
    return tmp_path / "in"


@pytest.mark.fault("folder with a link that leads back, or nowhere")
def test_link_that_leads_back_is_named(folder_with_a_shard):
    (folder_with_a_shard / "sub" / "loop").symlink_to(folder_with_a_shard)
    with pytest.raises(AccessError, match="in/sub/loop leads back to one above it"):
        list(open_storage(str(folder_with_a_shard)).list())


def test_root_that_is_no_path_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for uri in (f"{tmp_path}/loop", "~nobody-of-this-name/x", f"{tmp_path}/a\0b"):
        with pytest.raises(UsageError, match="is no path of a folder"):
            open_storage(uri)


def test_folder_that_is_linked_twice_is_listed_twice(folder_with_a_shard):
    (folder_with_a_shard / "other").symlink_to(folder_with_a_shard / "sub")
    keys = [info.key for info in open_storage(str(folder_with_a_shard)).list()]
    assert keys == ["other/a.tar", "sub/a.tar"]


@pytest.mark.fault("folder with a link that leads back, or nowhere")
@pytest.mark.parametrize("target", ["nowhere", "b.tar"], ids=["dangling", "to itself"])
def test_link_to_nothing_is_listed_and_cannot_be_read(folder_with_a_shard, target):
    (folder_with_a_shard / "b.tar").symlink_to(target)
    storage = open_storage(str(folder_with_a_shard))
    assert [info.key for info in storage.list()] == ["b.tar", "sub/a.tar"]
    with pytest.raises(StorageError, match=r"(no such file|cannot read).*b\.tar"):
        storage.open("b.tar")


def test_name_that_is_no_utf8_is_listed_and_read(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.tar")).write_bytes(b"x")
    storage = open_storage(str(tmp_path))
    [info] = storage.list()
    assert os.fsencode(info.key) == b"caf\xe9.tar"
    assert read_all(storage, info.key) == b"x"


@pytest.fixture
def unreadable(monkeypatch) -> Callable[[Path], None]:
    """Makes a path unreadable, for root too, whom the modes of files do not stop."""

    def refuse(path: Path) -> None:
        path.chmod(0)
        if os.geteuid():
            return
        for module, name in ((os, "scandir"), (Path, "open")):
            real = getattr(module, name)

            def guarded(place, *arguments, real=real, **options):
                if Path(place) == path:
                    raise PermissionError(13, "Permission denied", str(place))
                return real(place, *arguments, **options)

            monkeypatch.setattr(module, name, guarded)

    return refuse


@pytest.mark.fault("folder or file that the user may not read")
def test_folder_or_file_that_cannot_be_read_is_named_and_never_left_out(
    folder_with_a_shard, unreadable
):
    storage = open_storage(str(folder_with_a_shard))
    unreadable(folder_with_a_shard / "sub" / "a.tar")
    [info] = storage.list()
    with pytest.raises(StorageError, match=r"cannot read .*/in/sub/a.tar: Permission denied"):
        storage.open(info.key)
    unreadable(folder_with_a_shard / "sub")
    with pytest.raises(AccessError, match="/in/sub cannot be read by this user"):
        list(storage.list())
    (folder_with_a_shard / "sub").chmod(0o700)


def test_lost_and_found_that_cannot_be_read_is_left_out(folder_with_a_shard, unreadable):
    """Every mount of ext4 has one, of root's alone."""
    (folder_with_a_shard / "lost+found").mkdir()
    unreadable(folder_with_a_shard / "lost+found")
    keys = [info.key for info in open_storage(str(folder_with_a_shard)).list()]
    assert keys == ["sub/a.tar"]
    (folder_with_a_shard / "lost+found").chmod(0o700)


@pytest.mark.fault("file that goes away while it is read")
@pytest.mark.parametrize("moment", ["before it is opened", "while it is read"])
def test_file_that_goes_away_is_noticed(tmp_path, monkeypatch, moment):
    storage = open_storage(str(tmp_path))
    storage.write_bytes("x", b"data")
    if moment == "while it is read":
        with closing(storage.open("x")) as reader:
            reader.read(10)
            (tmp_path / "x").unlink()
            with pytest.raises(SourceChangedError, match="went away while it was read"):
                reader.read(10)
        return
    info = storage.head("x")
    (tmp_path / "x").unlink()
    monkeypatch.setattr(LocalStorage, "head", lambda self, key: info)
    with pytest.raises(NotFoundError, match="no such file"):
        storage.open("x")


def test_replaced_source_is_noticed(storage):
    storage.write_bytes("x", b"one")
    etag = storage.head("x").etag
    storage.write_bytes("x", b"three")
    with pytest.raises(SourceChangedError):
        storage.open("x", etag=etag)


def test_file_written_over_while_it_is_read_is_noticed(tmp_path: Path):
    (tmp_path / "x").write_bytes(bytes(100))
    with closing(open_storage(str(tmp_path)).open("x")) as reader:
        reader.read(10)
        (tmp_path / "x").write_bytes(bytes(50))
        with pytest.raises(SourceChangedError):
            list(iter(lambda: reader.read(20), b""))


def test_broken_body_is_resumed_from_the_last_good_byte(s3_uri, monkeypatch):
    from botocore.exceptions import ReadTimeoutError

    monkeypatch.setattr("one4all.storage.s3._pause", lambda attempt: None)
    storage = open_storage(s3_uri)
    data = os.urandom(300_000)
    storage.write_bytes("x", data)
    reader = storage.open("x")
    breaks = iter([ReadTimeoutError(endpoint_url=""), OSError("reset"), b""])

    received = []
    while part := reader.read(50_000):
        received.append(part)
        if (fault := next(breaks, None)) is not None:
            reader._body = _BrokenBody(fault)
    assert b"".join(received) == data


class _BrokenBody:
    """Raises once, or ends early without an error."""

    def __init__(self, fault: Exception | bytes) -> None:
        self._fault = fault

    def read(self, size: int) -> bytes:
        if isinstance(self._fault, Exception):
            raise self._fault
        return self._fault

    def close(self) -> None:
        pass


def test_source_replaced_between_two_connections_is_noticed(s3_uri, monkeypatch):
    monkeypatch.setattr("one4all.storage.s3._pause", lambda attempt: None)
    storage = open_storage(s3_uri)
    storage.write_bytes("x", bytes(1000))
    reader = storage.open("x")
    reader.read(10)
    storage.write_bytes("x", b"1" * 1000)
    reader._body = _BrokenBody(OSError("reset"))
    with pytest.raises(SourceChangedError):
        reader.read(10)


def test_leftovers_of_killed_writers_are_swept_and_live_ones_kept(tmp_path):
    storage = open_storage(str(tmp_path))
    code = (
        "import os, sys; from one4all.storage import open_storage; "
        "w = open_storage(sys.argv[1]).writer('dead.tar'); w.write(b'x'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, storage.uri], check=False)
    with storage.writer("live.tar") as writer:
        writer.write(b"x")
        assert storage.sweep(exclusive=False) == 1
        writer.commit()
    assert files_below(storage) == ["live.tar"]


def test_key_cannot_leave_the_folder(tmp_path):
    storage = open_storage(str(tmp_path / "root"))
    for key in ("../x", "a/../../x", "/etc/passwd", ""):
        with pytest.raises(StorageError, match="not a key"):
            storage.write_bytes(key, b"")


@pytest.mark.parametrize(
    ("uri", "hint"),
    [
        ("http://x/y", "use s3://bucket/prefix"),
        ("gs://bucket/x", "use s3://bucket/prefix"),
        ("gs:/bucket/x", "use s3://bucket/prefix"),
        ("s3://", "names no bucket"),
        ("s3:///prefix", "did you mean s3://prefix"),
        ("s3:/bucket/prefix", "did you mean s3://bucket/prefix"),
        ("s3:bucket", "did you mean s3://bucket"),
        ("S3://bucket/prefix", "did you mean s3://bucket/prefix"),
        (" s3://bucket", "did you mean s3://bucket"),
        ("s3a://bucket/x", "did you mean s3://bucket/x"),
        ("s3://my bucket/x", "'my bucket' cannot be the name of a bucket"),
        ("file://photos/in", "did you mean file:///photos/in"),
        ("file:photos", "did you mean file:///photos"),
        ("file://", "use s3://bucket/prefix"),
        ("old:photos", r"or \./old:photos for a folder"),
        ("vocabluary:imagenet1k", "for a folder of that name"),
        ("", "no place is given"),
        ("  ", "no place is given"),
    ],
)
def test_other_uris_are_refused_with_what_to_write(tmp_path, monkeypatch, uri, hint):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=hint):
        open_storage(uri)


def test_folder_with_a_colon_in_its_name_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for uri in (
        "./s3:/x",
        f"{tmp_path}/s3:/x",
        "2026-11-28T10:00",
        "a/b:c",
        f"file://{tmp_path}/y",
    ):
        storage = open_storage(uri)
        assert isinstance(storage, LocalStorage)
        assert open_storage(storage.uri).root == storage.root
        assert storage.root.is_relative_to(tmp_path)
    assert open_storage("file:///a%20b?c#d").root == Path("/a b?c#d")


def test_missing_places_are_named(tmp_path, s3_endpoint):
    with pytest.raises(AccessError, match="no such folder"):
        open_storage(str(tmp_path / "no")).check(writable=False)
    with pytest.raises(AccessError, match="'no-such-bucket' does not exist"):
        open_storage("s3://no-such-bucket/x").check(writable=False)


def test_unreachable_server_is_named(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with pytest.raises(AccessError, match="cannot reach the S3 server"):
        open_storage("s3://bucket/x").check(writable=False)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"AWS_PROFILE": "nobody"}, r"profile \(nobody\).*set AWS_PROFILE"),
        ({"AWS_ENDPOINT_URL": "host:9000"}, r"host:9000; write .* with its scheme"),
        ({"AWS_DEFAULT_REGION": "eu west"}, r"'eu west'.*such as eu-west-1"),
        ({"AWS_CONFIG_FILE": "config"}, r"parse config file: .*config; mend that file"),
        ({"AWS_STS_REGIONAL_ENDPOINTS": "x"}, r"option x is invalid.*check the AWS_"),
        ({"AWS_WEB_IDENTITY_TOKEN_FILE": "no"}, "s3://bucket/x: .*No such file"),
        ({"AWS_REQUEST_PAYER": "me"}, "'me'; it must be requester"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_of_which_no_client_can_be_made_are_one_sentence(
    tmp_path, monkeypatch, variables, message
):
    monkeypatch.chdir(tmp_path)
    Path("config").write_text("[default\n")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in ({"AWS_ROLE_ARN": "x"} | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(AccessError, match=message):
        open_storage("s3://bucket/x").check(writable=False)


@pytest.mark.fault("archived object (Glacier)")
def test_archived_object_is_to_be_restored(s3_uri):
    storage = open_storage(s3_uri)
    storage._client.put_object(
        Bucket=storage._bucket, Key=f"{storage._prefix}a.tar", Body=b"x", StorageClass="GLACIER"
    )
    with pytest.raises(StorageError, match=r"is archived .* restore it first"):
        storage.read_bytes("a.tar")


def test_requester_pays_for_every_request_if_told_to(s3_uri, monkeypatch):
    def payers() -> set[str | None]:
        sent = set()
        storage = open_storage(s3_uri)
        storage._client.meta.events.register(
            "before-send.s3",
            lambda request, **_: sent.add(request.headers.get("x-amz-request-payer")),
        )
        with storage.writer("a.tar") as writer:
            writer.write(bytes(PART_BYTES + 5))
            writer.commit()
        storage.replace("a.tar", b"x", etag=storage.head("a.tar").etag)
        assert [info.size for info in storage.list()] == [len(storage.read_bytes("a.tar"))]
        storage.delete("a.tar")
        return sent

    assert payers() == {None}
    monkeypatch.setenv("AWS_REQUEST_PAYER", "requester")
    assert payers() == {b"requester"}


def test_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    storage = open_storage(str(tmp_path))
    real = os.fsync

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        storage.write_bytes("x", b"data")
    monkeypatch.setattr(os, "fsync", real)
    assert files_below(storage) == []


@pytest.mark.parametrize("before", [b"before", None])
def test_writer_that_was_overtaken_leaves_what_stands(storage, before):
    if before:
        storage.write_bytes("x.tar", before)
    with pytest.raises(ConflictError, match="theirs is kept"), storage.writer("x.tar") as late:  # noqa: PT012
        late.write(b"mine")
        storage.write_bytes("x.tar", b"theirs")
        late.commit()
    assert storage.read_bytes("x.tar") == b"theirs"
    with storage.writer("x.tar") as next_one:
        next_one.write(b"next")
        next_one.commit()
    assert storage.read_bytes("x.tar") == b"next"


def test_upload_that_was_overtaken_leaves_what_stands(s3_uri):
    """In parts; Ceph ignores this condition, and the census mends what it lets through."""
    storage = open_storage(s3_uri)
    with pytest.raises(ConflictError, match="theirs is kept"), storage.writer("x.tar") as late:  # noqa: PT012
        late.write(bytes(PART_BYTES + 5))
        storage.write_bytes("x.tar", b"theirs")
        late.commit()
    assert storage.read_bytes("x.tar") == b"theirs"
    assert open_uploads(storage) == 0


def test_keys_that_would_be_one_file_are_refused(tmp_path):
    storage = open_storage(str(tmp_path))
    for key in ("a//b.tar", "a/./b.tar", "./a.tar"):
        with pytest.raises(StorageError, match="cannot be the name of a file; rename it to"):
            storage.write_bytes(key, b"")


def test_sweep_leaves_uploads_of_a_destination_below(s3_uri):
    outer, inner = open_storage(f"{s3_uri}/d"), open_storage(f"{s3_uri}/d/v2")
    inner.create("_one4all/binding.json", b"{}")
    for storage, key in ((outer, "a.tar"), (outer, "v1/b.tar"), (inner, "c.tar")):
        storage._client.create_multipart_upload(Bucket=storage._bucket, Key=storage._prefix + key)
    assert outer.sweep(exclusive=True) == 2
    assert (open_uploads(outer), open_uploads(inner)) == (1, 1)
    assert inner.sweep(exclusive=True) == 1
