"""One shard through the worker's stages: the contract of an output shard."""

import io
import resource
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import webdataset
from support.builders import (
    first_unit,
    make_16_bit_png,
    make_binding,
    make_bomb_png,
    make_image,
    make_samples,
    make_tar,
    read_members,
    write_corpus,
)
from support.hostile import tar_header, tar_of

from one4all.audit import audit_unit
from one4all.corpus import list_units
from one4all.errors import PerturbationError, ProtectorError, ShardError
from one4all.images import decode
from one4all.ledger.census import take_census
from one4all.ledger.ledger import Ledger
from one4all.protectors.card import load_card
from one4all.protectors.protector import Protector
from one4all.rewrite import rewrite_unit
from one4all.storage import open_storage
from pipelines.protect.config import ProtectConfig
from pipelines.protect.cpu_limit import CpuLimit
from pipelines.protect.worker import ProtectWorker

SMALL = {"batch_size": 4}


@pytest.fixture
def run(tmp_path, protector, pool):
    """Protect one shard of given members; returns (manifest, members written, audit)."""

    def protect(files, *, pool=pool, **options):
        tar = files if isinstance(files, bytes) else make_tar(files)
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / "s.tar").write_bytes(tar)
        config = ProtectConfig(**(SMALL | options))
        source, out = open_storage(str(tmp_path / "in")), open_storage(str(tmp_path / "out"))
        manifest = rewrite_unit(first_unit(source), source, out, protector, config, pool=pool)
        binding = make_binding(source.uri, **config.bound)
        audit = audit_unit(first_unit(source), manifest, source, out, binding)
        written = (tmp_path / "out" / "s.tar").read_bytes()
        return manifest, read_members(written), audit

    return protect


@pytest.mark.slow
@pytest.mark.parametrize("output_format", ["match", "lossless"])
def test_names_order_and_sidecars_are_kept_and_images_are_protected(run, output_format):
    files = make_samples(11)
    manifest, written, audit = run(files, output_format=output_format)
    extension = {"match": "jpg", "lossless": "png"}[output_format]
    assert list(written) == [name.replace("jpg", extension) for name, _ in files]
    for name, payload in files:
        if name.endswith(".jpg"):
            clean = decode(payload).pixels.astype(int)
            difference = np.abs(decode(written[name.replace("jpg", extension)]).pixels - clean)
            assert difference.max() > 0
            assert output_format == "match" or difference.max() <= 8
        else:
            assert written[name] == payload
    assert (manifest.num_samples, manifest.num_images, manifest.num_protected) == (11, 11, 11)
    assert manifest.distances.max_before_encoding <= 8
    assert manifest.distances.max_decoded > 0  # the first image is measured in any case
    assert manifest.distances.mean_psnr_db > 20
    assert audit.problems == []
    assert len(audit.images) == 11


# webdataset leaves the file to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_output_is_read_by_webdataset_and_tarfile(run, tmp_path):
    run(make_samples(6))
    path = tmp_path / "out" / "s.tar"
    dataset = webdataset.WebDataset(str(path), shardshuffle=False).decode("rgb8")
    samples = list(dataset)
    assert [sample["__key__"] for sample in samples] == [f"sample{i:04d}" for i in range(6)]
    assert samples[0]["jpg"].shape == (40, 56, 3)
    assert samples[3]["cls"] == 0
    with tarfile.open(path) as archive:
        assert archive.getmember("sample0000.jpg").uname == "ann"


def test_same_shard_makes_the_same_bytes_whatever_the_threads(run):
    files = make_samples(9)
    digests = set()
    for num_threads in (1, 4):
        torch.set_num_threads(num_threads)
        with ThreadPoolExecutor(num_threads) as pool:
            digests.add(run(files, pool=pool)[0].outputs[0].sha256)
    assert len(digests) == 1


def test_every_kind_of_image_in_one_shard(run):
    files = [
        ("gray.jpg", make_image("JPEG", "L")),
        ("cmyk.jpg", make_image("JPEG", "CMYK")),
        ("palette.png", make_image("PNG", "P")),
        ("alpha.png", make_image("PNG", "RGBA")),
        ("web.webp", make_image("WEBP")),
        ("bitmap.bmp", make_image("BMP")),
        ("tagged.tiff", make_image("TIFF")),
        ("hidden.bin", make_image("PNG", seed=5)),
    ]
    manifest, written, audit = run(files)
    assert manifest.num_protected == 8
    assert manifest.converted == {"CMYK to RGB": 1, "P to RGB": 1}
    assert audit.problems == []
    assert written["hidden.bin"] != files[-1][1]
    alpha = decode(written["alpha.png"]).pixels[:, :, 3]
    np.testing.assert_array_equal(alpha, decode(files[3][1]).pixels[:, :, 3])
    for name, payload in files:
        assert decode(written[name]).pixels.shape == decode(payload).pixels.shape


BAD = [
    ("a.jpg", make_image(seed=1)),
    ("a.cls", b"1"),
    ("b.cls", b"2"),  # before its image: must not be written before the image is known to be good
    ("b.jpg", make_image(seed=2)[:-300]),
    ("c.png", make_16_bit_png(3)),
    ("c.cls", b"3"),
    ("d.png", make_bomb_png()),
    ("e.jpg", make_image(seed=3)),
    ("e.heic", b"????ftypheic"),
    ("f.jpg", make_image(seed=4)),
]


def test_dropped_samples_leave_nothing_and_are_recorded(run):
    manifest, written, audit = run(BAD)
    assert list(written) == ["a.jpg", "a.cls", "f.jpg"]
    assert [(b.key, b.member, b.action) for b in manifest.bad_images] == [
        ("b", "b.jpg", "dropped"),
        ("c", "c.png", "dropped"),
        ("d", "d.png", "dropped"),
        ("e", "e.heic", "dropped"),
    ]
    assert "16 bits" in manifest.bad_images[1].reason
    assert (manifest.num_samples, manifest.num_images, manifest.num_protected) == (6, 7, 2)
    assert audit.problems == []
    assert audit.num_dropped == 4


def test_passed_through_images_are_unchanged_and_recorded(run):
    manifest, written, audit = run(BAD, on_bad_image="passthrough")
    assert list(written) == [name for name, _ in BAD]
    assert written["b.jpg"] == BAD[3][1]
    assert written["e.jpg"] != BAD[7][1]
    assert {b.action for b in manifest.bad_images} == {"passed through"}
    assert audit.problems == []
    assert audit.num_passed_through == 4


def test_policy_fail_publishes_nothing(run, tmp_path):
    with pytest.raises(ShardError, match=r"b\.jpg: cannot be decoded.*on_bad_image is fail"):
        run(BAD, on_bad_image="fail")
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


def test_sidecar_patterns_keep_masks_untouched(run):
    mask = make_image("PNG", "L", seed=7)
    files = [("a.jpg", make_image()), ("a.seg.png", mask)]
    manifest, written, audit = run(files, sidecar_patterns=("*.seg.png",))
    assert written["a.seg.png"] == mask
    assert manifest.num_images == 1
    assert audit.problems == []


def test_two_members_that_would_get_one_name_are_refused(run):
    files = [("a.jpg", make_image()), ("a.png", make_image("PNG"))]
    assert run(files)[2].problems == []
    with pytest.raises(ShardError, match="second member of one name"):
        run(files, output_format="lossless")


def test_image_in_a_dot_file_gets_a_name_that_verify_expects(run):
    names = [".jpg", "a.jpg", "._a.jpg", "._b.jpeg", "x/.b.c.jpg"]
    files = [(name, make_image(seed=seed)) for seed, name in enumerate(names)]
    _, written, audit = run(files, output_format="lossless")
    assert list(written) == [".jpg.png", "a.png", "._a.png", "._b.png", "x/.b.c.png"]
    assert audit.problems == []
    _, written, audit = run(files)
    assert (list(written), audit.problems) == (names, [])
    for order in (1, -1):
        twice = [("._a.png", make_image("PNG")), ("b.txt", b""), ("._a.jpg", make_image())]
        with pytest.raises(ShardError, match="second member of one name"):
            run(twice[::order], output_format="lossless")


def test_links_to_images_are_refused_where_these_get_other_names(run):
    tar = tar_of(
        tar_header("a.jpg", size=len(make_image())),
        make_image(),
        tar_header("b.jpg", kind=b"1", link="a.jpg"),
    )
    assert run(tar)[2].problems == []
    with pytest.raises(ShardError, match=r"'b\.jpg' is a link to 'a\.jpg'.*output_format match"):
        run(tar, output_format="lossless")


def test_damaged_shard_publishes_nothing(run, tmp_path):
    tar = make_tar(make_samples(9))
    with pytest.raises(ShardError, match="truncated"):
        run(tar[: len(tar) // 2 // 512 * 512])
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


def test_pickles_are_data(run):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was loaded",))

    import pickle

    files = [("a.jpg", make_image()), ("a.pyd", pickle.dumps(Bomb())), ("a.pth", b"\x80\x04.")]
    _, written, audit = run(files)
    assert (written["a.pyd"], written["a.pth"]) == (files[1][1], files[2][1])
    assert audit.problems == []


def test_audit_finds_what_was_tampered_with(run, tmp_path):
    manifest, _, _ = run(make_samples(4), output_format="lossless")
    source, out = open_storage(str(tmp_path / "in")), open_storage(str(tmp_path / "out"))
    path = tmp_path / "out" / "s.tar"
    honest = path.read_bytes()
    binding = make_binding(source.uri, output_format="lossless")

    def problems(tar: bytes) -> str:
        path.write_bytes(tar)
        return "\n".join(audit_unit(first_unit(source), manifest, source, out, binding).problems)

    assert problems(honest) == ""
    members = read_members(honest)

    def with_member(name: str, payload: bytes) -> bytes:
        return make_tar([(n, payload if n == name else p) for n, p in members.items()])

    assert "its bytes are not the source's" in problems(with_member("sample0001.cls", b"9"))
    clean = make_samples(4)
    assert "is not protected" in problems(
        with_member("sample0000.png", _as_png(decode(clean[0][1]).pixels))
    )
    far = decode(clean[0][1]).pixels ^ 64
    assert "the budget is 8" in problems(with_member("sample0000.png", _as_png(far)))
    assert "meets" in problems(make_tar(list(members.items())[4:]))
    assert "truncated" in problems(honest[: len(honest) // 2])
    assert "sha256" in problems(honest + bytes(512))


def _as_png(pixels) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_generator_of_broken_weights_publishes_nothing(tmp_path, protector_folder, pool):
    """NaN cast to integers is 0: images would leave clean and be called protected."""
    corpus = open_storage(str(write_corpus(tmp_path / "in", num_shards=1)))
    broken = Protector.load(str(protector_folder))
    broken.model.head.bias.data.fill_(float("nan"))
    out = open_storage(str(tmp_path / "out"))
    with pytest.raises(PerturbationError, match="not numbers"):
        rewrite_unit(first_unit(corpus), corpus, out, broken, ProtectConfig(**SMALL), pool=pool)
    assert list(out.list()) == []


def test_image_that_would_leave_unchanged_is_a_bad_image(tmp_path, protector_folder, pool):
    corpus = open_storage(str(write_corpus(tmp_path / "in", num_shards=1)))
    idle = Protector.load(str(protector_folder))
    idle.model.head.weight.data.fill_(0)
    idle.model.head.bias.data.fill_(0)
    out = open_storage(str(tmp_path / "out"))
    manifest = rewrite_unit(
        first_unit(corpus), corpus, out, idle, ProtectConfig(**SMALL), pool=pool
    )
    assert manifest.num_protected == 0
    assert {bad.reason for bad in manifest.bad_images} == {
        "the perturbation changes no pixel of it"
    }


def test_names_that_are_no_utf8_and_links_with_an_images_name(run):
    import tarfile as tar

    buffer = io.BytesIO()
    with tar.open(fileobj=buffer, mode="w", format=tar.GNU_FORMAT, encoding="latin-1") as archive:
        link = tar.TarInfo("link.jpg")
        link.type, link.linkname = tar.SYMTYPE, "caf\xe9.jpg"
        archive.addfile(link)
        for name, payload in (("caf\xe9.jpg", make_image()), ("bad\xe9.jpg", b"junk")):
            info = tar.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
    manifest, _, audit = run(buffer.getvalue())
    assert manifest.num_protected == 1
    assert manifest.bad_images[0].member == "bad\\xe9.jpg"
    assert audit.problems == []


def test_worker_refuses_a_protector_that_is_not_the_bound_one(tmp_path, protector_folder):
    config = ProtectConfig(protector=str(protector_folder))
    with pytest.raises(ProtectorError, match="changed, or another copy"):
        ProtectWorker(
            config, str(tmp_path), str(tmp_path), "run", protector_sha256="00", num_threads=1
        )


def test_worker_reports_a_status_and_records_it(tmp_path, protector_folder):
    source_uri = str(write_corpus(tmp_path / "in", num_shards=1))
    (tmp_path / "in" / "broken.tar").write_bytes(b"garbage" * 1000)
    config = ProtectConfig(protector=str(protector_folder), **SMALL)
    worker = ProtectWorker(
        config,
        source_uri,
        str(tmp_path / "out"),
        "run",
        protector_sha256=load_card(str(protector_folder)).content_hash,
        num_threads=1,
    )
    broken, good = map(worker.protect, list_units(open_storage(source_uri)))
    assert (good.outcome, good.num_images, good.error) == ("done", 5, "")
    assert (broken.outcome, broken.attempt) == ("failed", 1)
    assert "garbled header" in broken.error
    ledger = Ledger(open_storage(str(tmp_path / "out")))
    census = take_census(open_storage(source_uri), ledger)
    assert census.num_done == 1
    assert ledger.reasons(census.failing) == {"broken.tar": broken.error}
    assert not (tmp_path / "out" / "broken.tar").exists()


@pytest.mark.fault(
    "a file that keeps a decoder busy for ever, even with the interpreter's lock held"
)
def test_step_that_takes_for_ever_ends_the_worker_and_counts(tmp_path, protector_folder):
    source_uri = str(write_corpus(tmp_path / "in", num_shards=1))
    code = f"""
import re, sys
from one4all import rewrite
from one4all.corpus import list_units
from one4all.protectors.card import load_card
from one4all.storage import open_storage
from pipelines.protect.config import ProtectConfig
from pipelines.protect.worker import ProtectWorker

worker = ProtectWorker(
    ProtectConfig(protector={str(protector_folder)!r}, max_step_cpu_seconds=1),
    {source_uri!r}, {str(tmp_path / "out")!r}, "run", num_threads=1,
    protector_sha256=load_card({str(protector_folder)!r}).content_hash,
)
rewrite.decode_with_copy = lambda *_, **__: re.match("(a+)+$", "a" * 60 + "b")
worker.protect(next(list_units(open_storage({source_uri!r}))))
"""
    ended = subprocess.run([sys.executable, "-c", code], check=False, timeout=120)
    assert ended.returncode == -signal.SIGXCPU
    ledger = Ledger(open_storage(str(tmp_path / "out")))
    unit = first_unit(open_storage(source_uri))
    assert ledger.begin_attempt(unit, "run") == 2
    assert "the worker process died" in str(ledger.reasons(ledger.attempts()))


def test_cpu_limit_is_put_back_and_starts_anew_with_each_step():
    before = resource.getrlimit(resource.RLIMIT_CPU)
    with CpuLimit(100) as limit:
        first = resource.getrlimit(resource.RLIMIT_CPU)[0]
        assert first != before[0]
        used = time.process_time()
        while time.process_time() < used + 1.1:
            pass
        limit.next_step()
        assert resource.getrlimit(resource.RLIMIT_CPU)[0] > first
    assert resource.getrlimit(resource.RLIMIT_CPU) == before
    with CpuLimit(0):
        assert resource.getrlimit(resource.RLIMIT_CPU) == before


def test_outage_of_the_source_is_not_held_against_a_shard(tmp_path, protector_folder):
    source_uri = str(write_corpus(tmp_path / "in", num_shards=1))
    card = load_card(str(protector_folder))
    worker = ProtectWorker(
        ProtectConfig(protector=str(protector_folder), **SMALL),
        source_uri,
        str(tmp_path / "out"),
        "run",
        protector_sha256=card.content_hash,
        num_threads=1,
    )
    shard = first_unit(open_storage(source_uri))
    (tmp_path / "in").rename(tmp_path / "unmounted")
    for _ in range(4):
        status = worker.protect(shard)
        assert (status.outcome, status.attempt) == ("failed", 0)
        assert "no such file" in status.error
    (tmp_path / "unmounted").rename(tmp_path / "in")
    assert worker.protect(shard).outcome == "done"
