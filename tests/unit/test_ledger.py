"""What is done is done once, and only what is done counts."""

import os

import pytest

from one4all.corpus import ObjectVersion, OutputObject, Unit, list_units
from one4all.errors import BindingError, NotFoundError
from one4all.ledger.census import take_census
from one4all.ledger.ledger import MAX_ATTEMPTS, Ledger
from one4all.ledger.records import BadImage, Binding, Manifest, UnitDistances
from one4all.storage import ObjectInfo, open_storage

BINDING = Binding(
    source_uri="/in",
    protector="tiny",
    protector_sha256="00",
    epsilon_levels=8,
    output_format="match",
    on_bad_image="drop",
    max_image_pixels=1000,
    sidecar_patterns=(),
    transform_version=1,
)
SHARD = Unit("a/b.tar", (ObjectVersion("a/b.tar", 10, '"x"'),))
CHANGED = Unit("a/b.tar", (ObjectVersion("a/b.tar", 10, '"y"'),))


def manifest_of(shard: Unit, sha256: str = "00", etag: str = "e") -> Manifest:
    return Manifest(
        name=shard.name,
        source=shard.objects,
        outputs=(OutputObject(shard.name, 1, etag, sha256),),
        num_samples=1,
        num_images=1,
        num_protected=1,
        num_members=1,
        distances=UnitDistances(),
    )


def test_destination_is_bound_once(storage):
    ledger = Ledger(storage)
    with pytest.raises(NotFoundError):
        ledger.binding()
    ledger.bind(BINDING)
    ledger.bind(BINDING)
    other = BINDING.model_copy(update={"output_format": "lossless", "epsilon_levels": 4})
    with pytest.raises(BindingError, match=r"epsilon_levels 8 -> 4.*output_format"):
        ledger.bind(other)


def test_data_of_somebody_else_is_not_written_over(storage):
    storage.write_bytes("precious.tar", b"x")
    with pytest.raises(BindingError, match=r"precious\.tar"):
        Ledger(storage).bind(BINDING)


def test_done_is_told_from_listings_and_a_changed_source_is_not_done(storage):
    ledger = Ledger(storage)
    ledger.record(manifest_of(SHARD))
    ledger.begin_attempt(CHANGED, "run")  # from here the old bytes may be written over
    assert ledger.done() == set()
    ledger.record(manifest_of(CHANGED))
    assert ledger.done() == {CHANGED.id}


def test_manifest_that_is_there_already_is_accepted_if_it_says_the_same(storage):
    ledger = Ledger(storage)
    storage.write_bytes(SHARD.name, b"x")
    ledger.record(manifest_of(SHARD))
    ledger.record(manifest_of(SHARD))
    assert ledger.manifest(SHARD).outputs[0].sha256 == "00"


def test_manifest_describes_the_object_that_stands(storage):
    ledger = Ledger(storage)
    storage.write_bytes(SHARD.name, b"first")
    ledger.record(manifest_of(SHARD, "first", storage.head(SHARD.name).etag))
    storage.write_bytes(SHARD.name, b"second one")
    ledger.record(manifest_of(SHARD, "second", storage.head(SHARD.name).etag))
    assert ledger.manifest(SHARD).outputs[0].sha256 == "second"
    ledger.record(manifest_of(SHARD, "a loser", "of bytes that are gone"))
    assert ledger.manifest(SHARD).outputs[0].sha256 == "second"


def test_shard_is_quarantined_after_three_failures(storage):
    ledger = Ledger(storage)
    for expected in (1, 2, 3):
        assert ledger.begin_attempt(SHARD, "run") == expected
        ledger.fail_attempt(SHARD, expected, "run", f"reason {expected}")
    assert ledger.quarantined() == {SHARD.id: "reason 3"}
    assert ledger.begin_attempt(SHARD, "another run") == MAX_ATTEMPTS + 1


def test_shard_that_kills_its_process_is_quarantined(storage):
    ledger = Ledger(storage)
    for expected in (1, 2, 3, 4):  # nobody reports back
        assert ledger.begin_attempt(SHARD, "run") == expected
    assert ledger.quarantined() == {SHARD.id: "the worker process died"}


def test_killed_runs_do_not_count_against_a_shard(storage):
    ledger = Ledger(storage)
    for run in range(10):
        assert ledger.begin_attempt(SHARD, f"run {run}") == 1
    assert ledger.quarantined() == {}


def test_success_forgets_the_failures(storage):
    ledger = Ledger(storage)
    ledger.fail_attempt(SHARD, 1, "run", "network")
    ledger.record(manifest_of(SHARD))
    assert ledger.failures() == {}


def test_failure_elsewhere_is_not_held_against_the_shard(storage):
    ledger = Ledger(storage)
    for run in range(5):
        number = ledger.begin_attempt(SHARD, f"run {run}")
        assert number == 1
        ledger.withdraw_attempt(SHARD, number, f"run {run}")
    assert ledger.failures() == {}


def test_failures_of_two_runs_are_both_counted(storage):
    ledger = Ledger(storage)
    for run in ("a", "b"):
        ledger.begin_attempt(SHARD, run)
    for run in ("a", "b"):
        ledger.fail_attempt(SHARD, 1, run, f"reason of {run}")
    assert len(ledger.failures()[SHARD.id]) == 2


def test_bad_images_of_what_is_done_are_remembered(storage):
    ledger = Ledger(storage)
    bad = BadImage(key="a", member="a.jpg", reason="garbage", action="dropped")
    ledger.record(manifest_of(SHARD).model_copy(update={"bad_images": (bad, bad)}))
    assert ledger.num_bad_images() == {SHARD.id: 2}
    ledger.begin_attempt(CHANGED, "run")
    ledger.record(manifest_of(CHANGED))
    assert ledger.num_bad_images() == {}


def test_census_holds_the_ledger_against_the_listing(tmp_path):
    source, destination = open_storage(str(tmp_path / "in")), open_storage(str(tmp_path / "out"))
    for key in ("a.tar", "b.tar.gz", "index.json", "_one4all/shards/a.tar", "x/y.tar", "z.tar"):
        source.write_bytes(key, b"")
    source.write_bytes("large.tar", b"large")
    ledger = Ledger(destination)
    shards = {shard.name: shard for shard in list_units(source)}
    assert list(shards) == ["a.tar", "large.tar", "x/y.tar", "z.tar"]
    ledger.record(manifest_of(shards["a.tar"]))
    for number in range(MAX_ATTEMPTS):
        ledger.fail_attempt(shards["z.tar"], number, "run", "damaged")
    census = take_census(source, ledger)
    assert (census.num_units, census.num_done, census.num_others) == (4, 1, 2)
    assert census.pending == [shards["large.tar"], shards["x/y.tar"]]
    assert census.quarantined == {"z.tar": "damaged"}
    source.write_bytes("a.tar", b"changed")
    assert take_census(source, ledger).pending[0].name == "a.tar"


def test_census_leaves_older_shards_out(tmp_path):
    source, destination = open_storage(str(tmp_path / "in")), open_storage(str(tmp_path / "out"))
    ledger = Ledger(destination)
    for name, written in (("done.tar", 900), ("old.tar", 999.9), ("new.tar", 1000.2)):
        source.write_bytes(name, b"x")
        os.utime(tmp_path / "in" / name, (written, written))
    shards = {shard.name: shard for shard in list_units(source)}
    ledger.record(manifest_of(shards["done.tar"]))
    census = take_census(source, ledger, since=1000.9)  # S3 would say 1000 for new.tar
    assert (census.num_units, census.pending) == (1, [shards["new.tar"]])
    assert (census.num_older, census.num_older_undone) == (2, 1)
    # A store that gives no times must not make a shard disappear.
    assert not Unit.of_object(ObjectInfo("a.tar", 1, "x")).is_older(1000.0)
