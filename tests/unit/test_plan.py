"""What protecting would take: the arithmetic, and one real measurement."""

import pytest
from support.builders import make_samples, make_tar, write_corpus

from one4all.corpus import Unit, list_units
from one4all.errors import UsageError
from one4all.storage import open_storage
from pipelines.cli.planning import _print_protect_plan
from pipelines.protect import plan as planning
from pipelines.protect.config import ProtectConfig
from pipelines.protect.plan import Plan, Sampled, choose, extrapolate
from pipelines.protect.plan import plan as make_plan
from pipelines.protect.worker import ProtectWorker


def sampled(
    *, num_bytes=1_000_000, num_images=10, seconds=1.0, read_seconds=0.0, measured=5, **more
):
    more = {"codec_seconds": seconds} | more
    return Sampled("a.tar", num_bytes, num_images, read_seconds, measured, seconds, **more)


def test_time_grows_with_bytes_and_shrinks_with_workers():
    todo = Plan("/in", num_shards=100, num_bytes=10_000_000_000)
    # 10 images in a megabyte, 5 a second: 100,000 images, 20,000 s for one worker.
    found = extrapolate(todo, [sampled()], largest=100_000_000, workers=[1, 4, 1000])
    assert (found.num_images, found.images_per_second) == (100_000, pytest.approx(5))
    one, four, many = found.estimates
    assert (one.seconds, four.seconds) == (pytest.approx(20_000), pytest.approx(5_000))
    assert one.worker_hours == pytest.approx(four.worker_hours) == pytest.approx(20_000 / 3600)
    # More workers than shards wait for one shard, and are paid for while they do.
    assert many.seconds == pytest.approx(200)
    assert many.worker_hours == pytest.approx(1000 * 200 / 3600)


def test_largest_shard_bounds_the_time():
    todo = Plan("/in", num_shards=100, num_bytes=1_000_000_000)
    found = extrapolate(todo, [sampled()], largest=500_000_000, workers=[50])
    assert found.estimates[0].seconds == pytest.approx(1000)


def test_slower_of_reading_and_working_counts():
    todo = Plan("/in", num_shards=10, num_bytes=1_000_000)
    slow = extrapolate(todo, [sampled(read_seconds=8.0)], largest=1, workers=[1])
    assert (slow.estimates[0].seconds, slow.limited_by) == (pytest.approx(8), "reading")
    assert extrapolate(todo, [sampled()], largest=1, workers=[1]).limited_by == "codecs"


def test_stage_that_bounds_the_work_says_what_a_gpu_saves(capsys):
    todo = Plan("/in", num_shards=10, num_bytes=1_000_000, cpus_per_worker=2)
    found = extrapolate(todo, [sampled(codec_seconds=0.91)], largest=1, workers=[1])
    assert (found.limited_by, found.codec_share) == ("codecs", pytest.approx(0.91))
    assert found.cpu_images_per_second == pytest.approx(5)
    assert found.gpu_images_per_second == pytest.approx(5 / 0.91)
    _print_protect_plan(found)
    printed = capsys.readouterr().out
    assert "of 2 CPUs, limited by codecs (codecs 91 %: a GPU saves at most 9 %)" in printed
    assert "on nodes of CPUs: 5 images/s for 2 CPUs\n" in printed
    assert "on nodes of GPUs: at most 5.49 images/s for 1 GPU and 2 CPUs\n" in printed

    slow = extrapolate(todo, [sampled(codec_seconds=0.2)], largest=1, workers=[1])
    assert slow.limited_by == "the device"
    todo = Plan("/in", 10, 1_000_000, device="cuda", cpus_per_worker=12, gpus_per_worker=1.0)
    shards = [sampled(codec_seconds=0.7, cpu_seconds=4.0), sampled(codec_seconds=0.7)]
    found = extrapolate(todo, shards, largest=1, workers=[1])
    assert found.gpu_images_per_second == pytest.approx(5)
    assert found.cpu_images_per_second == pytest.approx(5 / 4)
    _print_protect_plan(found)
    printed = capsys.readouterr().out
    assert "limited by codecs (codecs 70 %: more CPUs for each GPU save at most" in printed
    assert "on nodes of GPUs: 5 images/s for 1 GPU and 12 CPUs\n" in printed


def test_spread_between_shards_is_the_uncertainty():
    todo = Plan("/in", num_shards=10, num_bytes=10_000_000)
    shards = [sampled(seconds=1.0), sampled(seconds=3.0)]
    found = extrapolate(todo, shards, largest=1, workers=[1])
    assert found.estimates[0].seconds == pytest.approx(40)
    assert (found.relative_low, found.relative_high) == (pytest.approx(0.5), pytest.approx(1.5))
    assert extrapolate(todo, shards[:1], largest=1, workers=[1]).relative_low is None


def test_sample_is_even_and_bounded():
    assert choose(range(8), 4) == [1, 3, 5, 7]
    assert choose(range(3), 4) == [0, 1, 2]
    assert choose([7], 1) == [7]
    assert choose([], 4) == []


@pytest.mark.slow
def test_plan_measures_the_real_worker_and_leaves_what_is_done(
    tmp_path, protector_folder, monkeypatch
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(planning, "NUM_SHARDS", 2)
    corpus = write_corpus(tmp_path / "in", num_shards=3, num_samples=6)
    (corpus / "text.tar").write_bytes(make_tar([("a.txt", b"no image")]))
    out = tmp_path / "out"
    config = ProtectConfig(protector=str(protector_folder), batch_size=4)
    found = make_plan(str(corpus), config, num_workers=16)
    assert (found.num_shards, found.num_done, found.device) == (4, 0, "cpu")
    assert found.num_images == pytest.approx(18, rel=0.5)
    assert found.images_per_second > 0
    assert 0 < found.codec_share <= 1
    assert all(0 < shard.codec_seconds < 2 * shard.seconds for shard in found.sampled)
    assert [estimate.num_workers for estimate in found.estimates] == [1, 4, 16]
    assert not out.exists()

    shards = {shard.name: shard for shard in list_units(open_storage(str(corpus)))}
    protect_one(corpus, out, shards["shard-001.tar"], config)
    rest = make_plan(str(corpus), config, destination_uri=str(out))
    assert (rest.num_shards, rest.num_done) == (3, 1)
    assert rest.num_bytes == found.num_bytes - shards["shard-001.tar"].size


def protect_one(corpus, out, shard: Unit, config) -> None:
    from one4all.protectors.card import load_card

    digest = load_card(config.protector).content_hash
    worker = ProtectWorker(
        config, str(corpus), str(out), "run", protector_sha256=digest, num_threads=1
    )
    assert worker.protect(shard).outcome == "done"


def test_sample_reads_only_the_beginning_of_a_large_shard(tmp_path, protector_folder, monkeypatch):
    corpus = tmp_path / "in"
    corpus.mkdir()
    (corpus / "large.tar").write_bytes(make_tar(make_samples(40)))
    monkeypatch.setattr(planning, "MAX_BYTES", 20_000)
    monkeypatch.setattr(planning, "IMAGES_PER_SHARD", 3)
    config = ProtectConfig(protector=str(protector_folder), batch_size=4)
    source = open_storage(str(corpus))
    (part,) = planning.measure(source.uri, list(list_units(source)), config, 1, "cpu")
    assert 20_000 <= part.num_bytes < 40_000
    assert part.num_measured == 3 < part.num_images < 40


def test_corpus_without_images_cannot_be_planned(tmp_path, protector_folder, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "text.tar").write_bytes(make_tar([("a.txt", b"no image")]))
    with pytest.raises(UsageError, match="no image in the first"):
        make_plan(str(tmp_path), ProtectConfig(protector=str(protector_folder)))
