"""Images inside of other files are seen: what holds one is no sidecar."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile

import numpy as np
import pytest
from support.builders import make_image, make_tar

from one4all.corpus import Member, is_protectable
from one4all.errors import BadImageError
from one4all.images import decode

JPEG = make_image()


def make_zip(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, jpg=np.arange(9))
    return buffer.getvalue()


LONG = "folder/" + "x" * 300 + ".heic"


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        pytest.param("a.jpg.gz", gzip.compress(JPEG), "compressed by gzip; decompress", id="gz"),
        pytest.param("a.bin", gzip.compress(JPEG), "compressed by gzip", id="gz-by-content"),
        pytest.param("a.jpg.bz2", bz2.compress(JPEG), "compressed by bzip2", id="bz2"),
        pytest.param("a.dat", lzma.compress(JPEG), "compressed by xz", id="xz-by-content"),
        pytest.param("a.PNG.zst", b"\x28\xb5\x2f\xfd", "compressed by zstd", id="zst"),
        pytest.param("a.jpg.gz", gzip.compress(b"text"), "compressed by gzip", id="gz-by-name"),
        pytest.param("a.jpg.gz", b"junk", "not an image file", id="gz-that-is-none"),
        pytest.param("a.zip", make_zip({"x/b.jpg": JPEG}), "zip .* 'x/b.jpg'; unpack", id="zip"),
        pytest.param(
            "a.cbz", make_zip({"t": b"", "b.PNG": b""}, zipfile.ZIP_STORED), "zip", id="zip-stored"
        ),
        pytest.param("a.tar", make_tar([("t", b"hi"), ("b.jpg", JPEG)]), "tar .*'b.jpg'", id="tar"),
        pytest.param("a.bin", make_tar([("t", b"hi"), ("0", JPEG)]), "tar .*'0'", id="tar-content"),
        *(
            pytest.param(
                "a", make_tar([(LONG, b"")], format=f), "tar .*'folder/xxx", id=f"long-{f}"
            )
            for f in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
        ),
        pytest.param("a.tgz", gzip.compress(make_tar([("b.jpg", JPEG)])), "by gzip", id="tgz"),
        pytest.param(
            "a.bin", make_tar([("b", make_zip({"c.tif": b""}))]), "tar .*'b'", id="zip-in-tar"
        ),
    ],
)
def test_what_holds_an_image_is_a_bad_image(name, data, reason):
    assert is_protectable(Member(name=name, payload=data))
    assert not is_protectable(Member(name=name, payload=data), (name,))
    with pytest.raises(BadImageError, match=reason):
        decode(data)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        pytest.param("a.json.gz", gzip.compress(b'{"a": 1}'), id="gz"),
        pytest.param("a.gz", gzip.compress(b"text")[:9], id="gz-cut"),
        pytest.param("a.bz2", b"BZh9 is how a text may begin", id="bz2-text"),
        pytest.param("a.xz", b"\xfd7zXZ\0" + bytes(99), id="xz-garbled"),
        pytest.param("a.zip", make_zip({"a.txt": b"jpg", "b.npy": b""}), id="zip"),
        pytest.param("a.npz", npz(), id="npz"),
        pytest.param("a.tar", make_tar([("a.txt", b".jpg")]), id="tar"),
        pytest.param("a.tar.gz", gzip.compress(make_tar([("a.txt", b"")])), id="tgz"),
        pytest.param("im.gz", gzip.compress(b"text"), id="name-without-extension"),
    ],
)
def test_what_holds_none_is_a_sidecar(name, data):
    assert not is_protectable(Member(name=name, payload=data))
