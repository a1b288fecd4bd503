"""Memory does not grow with what a sample or a shard holds; what is bounded is still whole."""

import io
import itertools
import struct
import tarfile
import threading

import pytest
from PIL import Image
from support.builders import (
    first_unit,
    make_binding,
    make_image,
    make_pixels,
    make_samples,
    make_tar,
    read_members,
)
from support.hostile import tar_header, tar_of

from one4all import rewrite
from one4all.audit import audit_unit
from one4all.corpus import Member, Sample
from one4all.corpus.tar import TarContainer
from one4all.errors import ShardError
from one4all.images import DecodedImage, encode, pillow_format
from one4all.rewrite import RewriteConfig, rewrite_unit
from one4all.storage import open_storage

PIXELS = 40 * 56  # of an image of `make_image`


@pytest.fixture
def protect(tmp_path, protector, pool):
    """Protect one shard; returns (manifest, its bytes, audit as a function of options)."""

    def run(tar: bytes, **options):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / "s.tar").write_bytes(tar)
        config = RewriteConfig(**({"batch_size": 4} | options))
        source, out = open_storage(str(tmp_path / "in")), open_storage(str(tmp_path / "out"))
        unit = first_unit(source)
        manifest = rewrite_unit(unit, source, out, protector, config, pool=pool)
        binding = make_binding(source.uri, **config.bound)

        def audit(**bounds):
            return audit_unit(unit, manifest, source, out, binding, **bounds).problems

        return manifest, (tmp_path / "out" / "s.tar").read_bytes(), audit

    return run


class _Alive:
    """How many decoded images there are at once: from their decoding to the end of encoding."""

    def __init__(self, monkeypatch) -> None:
        self.now = self.most = 0
        lock = threading.Lock()
        decode, recode = rewrite.decode_with_copy, rewrite.recode

        def count(step: int) -> None:
            with lock:
                self.now += step
                self.most = max(self.most, self.now)

        def counted_decode(*arguments, **options):
            count(1)
            return decode(*arguments, **options)

        def counted_recode(*arguments, **options):
            result = recode(*arguments, **options)
            count(-1)
            return result

        monkeypatch.setattr(rewrite, "decode_with_copy", counted_decode)
        monkeypatch.setattr(rewrite, "recode", counted_recode)


def test_images_of_one_sample_are_decoded_a_batch_at_a_time(protect, monkeypatch):
    files = [(f"a.{index:02d}.png", make_image("PNG", seed=index)) for index in range(30)]
    tar = make_tar([("0.png", make_image("PNG")), *files, ("b.png", make_image("PNG"))])
    _, expected, _ = protect(tar, batch_size=4)
    alive = _Alive(monkeypatch)
    manifest, written, audit = protect(tar, batch_size=4, batch_pixels=2 * PIXELS)
    assert alive.most <= 6  # two in each of three batches
    assert written == expected
    assert manifest.num_protected == 32
    assert audit() == []


def test_image_larger_than_a_batch_is_in_memory_alone(protect, monkeypatch):
    """Photos of 200 megapixels take 3 GB each: not three of them at once, nor a batch beside."""
    small = [(f"{index}.png", make_image("PNG", seed=index)) for index in range(8)]
    large_png = encode(DecodedImage(make_pixels(80, 112), "PNG"), "match")
    large = [(f"5{name}.png", large_png) for name in "abc"]
    tar = make_tar([*small[:6], *large, *small[6:]])
    _, expected, _ = protect(tar)
    alive = _Alive(monkeypatch)
    at_large = []
    recode = rewrite.recode

    def seen(clean, *arguments, **options):
        if clean.pixels.shape[0] == 80:
            at_large.append(alive.now)
        return recode(clean, *arguments, **options)

    monkeypatch.setattr(rewrite, "recode", seen)
    manifest, written, audit = protect(tar, batch_pixels=2 * PIXELS)
    assert at_large == [1, 1, 1]
    assert written == expected
    assert manifest.num_protected == 11
    assert audit() == []


def test_sample_spread_over_batches_is_dropped_whole(protect):
    files = [(f"a.{index}.png", make_image("PNG", seed=index)) for index in range(9)]
    files[1] = ("a.1.png", b"not an image")
    tar = make_tar([*files, ("b.png", make_image("PNG"))])
    manifest, written, audit = protect(tar, batch_pixels=PIXELS)
    assert list(read_members(written)) == ["b.png"]
    assert [bad.member for bad in manifest.bad_images] == ["a.1.png"]
    assert audit() == []


def test_sample_that_grows_beyond_memory_is_refused(protect, monkeypatch):
    monkeypatch.setattr(rewrite, "DEFAULT_MAX_SAMPLE_BYTES", 20_000)
    files = [(f"a.{index}.jpg", make_image("JPEG", seed=index, quality=20)) for index in range(9)]
    with pytest.raises(ShardError, match="once it is protected"):
        protect(
            make_tar(files),
            batch_pixels=PIXELS,
            max_sample_bytes=20_000,
            output_format="lossless",
        )


@pytest.mark.parametrize("size", [0, 1_000_000])
def test_samples_without_images_fill_a_batch(protector, pool, size):
    """An endless shard of texts: the first batch comes, and is of bounded size."""
    read: list[Sample] = []

    def samples():
        for index in itertools.count():
            member = Member(name=f"{index}.txt", payload=bytes(size), envelope=bytes(512))
            read.append(Sample(member.key, (member,)))
            yield read[-1]

    config = RewriteConfig(batch_size=4, batch_pixels=1_000_000)
    quiet = (lambda seconds: None, lambda: None)
    work = rewrite._UnitRewrite(protector, config, TarContainer(), pool, *quiet)
    batches = work._batches(samples())
    for _ in range(3):
        batch = next(batches)
        assert sum(sample.stored_bytes for sample in batch.samples) <= 8_400_000
    assert len(read) < 60_000


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_link_that_may_dangle_once_jpeg_becomes_png_is_refused(protect, kind):
    image = make_image("JPEG")
    tar = tar_of(
        tar_header("a.jpg", size=len(image)),
        image,
        tar_header("first.jpg", kind=kind, link="a.jpg"),
    )
    with pytest.raises(ShardError, match="use output_format match"):
        protect(tar, output_format="lossless")
    _, written, audit = protect(tar, output_format="match")
    with tarfile.open(fileobj=io.BytesIO(written)) as archive:
        assert archive.getmember("first.jpg").linkname in archive.getnames()
    assert audit() == []


@pytest.mark.parametrize("name", ["a.svg", "a.qoi", "a.raf", "a.bin"])
def test_image_that_cannot_be_protected_is_no_sidecar(protect, name):
    buffer = io.BytesIO()
    Image.fromarray(make_pixels()).save(buffer, "ICO")
    files = [("a.txt", b"1"), (name, buffer.getvalue()), *make_samples(1)]
    manifest, written, audit = protect(make_tar(files))
    assert name not in read_members(written)
    assert "a.txt" not in read_members(written)
    assert [bad.member for bad in manifest.bad_images] == [name]
    assert audit() == []
    _, written, audit = protect(make_tar(files), sidecar_patterns=("a.*",))
    assert read_members(written)[name] == buffer.getvalue()
    assert audit() == []


def test_audit_has_an_eye_of_its_own_for_images(protect, monkeypatch):
    """What decides is an image, the table, may be wrong: the audit asks somebody else."""
    files = [("a.bin", make_image("GIF", "P")), *make_samples(1)]
    monkeypatch.setattr("one4all.corpus.samples.is_image", lambda name, data: name.endswith("jpg"))
    _, written, audit = protect(make_tar(files))
    assert "a.bin" in read_members(written)
    assert audit() == ["a.bin: was copied, and is a GIF image"]


def test_eye_of_the_audit_sees_no_image_in_sidecars():
    texts = [b"", b"7", b"P5 12 13 255 birds", b"GIF89a is a format", b"\x93NUMPY", bytes(3000)]
    assert [pillow_format(text) for text in texts] == [""] * len(texts)
    assert pillow_format(struct.pack("<9H", 0, 2, 0, 0, 0, 0, 4, 4, 24) + bytes(99)) == ""
    assert pillow_format(make_image("JPEG")) == "JPEG"


def test_audit_heeds_the_limit_that_protect_had(protect):
    text = bytes(200_000)
    tar = make_tar([("a.txt", text), ("a.png", make_image("PNG"))])
    _, _, audit = protect(tar, max_sample_bytes=300_000)
    assert audit(max_sample_bytes=300_000) == []
    assert "over the limit" in audit(max_sample_bytes=100_000)[0]
