"""What is done is done once, and only what is done counts."""

import hashlib
import os
from dataclasses import replace

import pytest
from support.builders import make_binding

from one4all.corpus import ObjectVersion, OutputObject, Unit, list_units
from one4all.errors import BindingError, NotFoundError
from one4all.ledger.census import Move, compare_places, take_census
from one4all.ledger.ledger import MAX_ATTEMPTS, MAX_KILLED, Entry, Ledger
from one4all.ledger.records import BadImage, Manifest, UnitDistances
from one4all.storage import ObjectInfo, Storage, open_storage

BINDING = make_binding("/in", protector_sha256="00", max_image_pixels=1000)
SHARD = Unit("a/b.tar", (ObjectVersion("a/b.tar", 10, '"x"'),))
CHANGED = Unit("a/b.tar", (ObjectVersion("a/b.tar", 10, '"y"'),))


def manifest_of(unit: Unit, sha256: str = "00", etag: str = "e", num_bad: int = 0) -> Manifest:
    bad = BadImage(key="a", member="a.jpg", reason="garbage", action="dropped")
    return Manifest(
        name=unit.name,
        source=unit.objects,
        outputs=(OutputObject(unit.name, 1, etag, sha256),),
        num_samples=1,
        num_images=1,
        num_protected=1,
        num_members=1,
        bad_images=(bad,) * num_bad,
        distances=UnitDistances(),
    )


def write_output(destination: Storage, unit: Unit, *, num_bad: int = 0) -> Manifest:
    """An output of one byte stands; its manifest, not yet recorded."""
    destination.write_bytes(unit.name, b"x")
    sha256 = hashlib.sha256(b"x").hexdigest()
    return manifest_of(unit, sha256, destination.head(unit.name).etag, num_bad)


def test_destination_is_bound_once(storage):
    ledger = Ledger(storage)
    with pytest.raises(NotFoundError):
        ledger.binding()
    ledger.bind(BINDING)
    ledger.bind(BINDING)
    other = BINDING.model_copy(update={"output_format": "lossless", "epsilon_levels": 4})
    with pytest.raises(BindingError, match=r"epsilon_levels 8 -> 4.*output_format"):
        ledger.bind(other)


def test_destination_is_bound_to_another_place_of_the_same_source(storage):
    ledger, here = Ledger(storage), BINDING.source_uri
    moved = BINDING.model_copy(update={"source_uri": "s3://elsewhere"})
    with pytest.raises(NotFoundError):
        ledger.rebind(moved, moved_from=here)
    ledger.bind(BINDING)
    with pytest.raises(BindingError, match=f"--moved-from {here}"):
        ledger.bind(moved)
    with pytest.raises(BindingError, match="source_uri"):
        ledger.rebind(moved, moved_from="s3://another")
    with pytest.raises(BindingError, match="epsilon_levels 8 -> 4"):
        ledger.rebind(moved.model_copy(update={"epsilon_levels": 4}), moved_from=here)
    assert ledger.binding() == BINDING
    ledger.rebind(moved, moved_from=here)
    ledger.rebind(moved, moved_from=here)
    assert ledger.binding() == moved


def test_data_of_somebody_else_is_not_written_over(storage):
    storage.write_bytes("precious.tar", b"x")
    with pytest.raises(BindingError, match=r"precious\.tar"):
        Ledger(storage).bind(BINDING)


def test_manifest_that_is_there_already_says_the_same(storage):
    ledger = Ledger(storage)
    manifest = write_output(storage, SHARD, num_bad=2)
    ledger.record(manifest)
    ledger.record(manifest)
    (entry,) = ledger.entries()
    assert (entry.name, entry.version, entry.num_bad) == (SHARD.name, SHARD.version, 2)
    assert entry == Entry.of_manifest(manifest)
    assert ledger.manifest(entry) == manifest


def test_names_that_no_file_or_no_json_can_hold_are_filed(tmp_path):
    storage = open_storage(str(tmp_path))
    ledger = Ledger(storage)
    names = ["n" * 251 + ".tar", "d/" + "\u00fc" * 120 + ".tar", "caf\udce9.tar", "x.tar@copy.tar"]
    for name in names:
        unit = Unit.of_object(ObjectInfo(name, 1, "e"))
        assert ledger.begin_attempt(unit, "run") == 1
        ledger.record(write_output(storage, unit))
    assert {manifest.name for manifest in ledger.manifests()} == set(names)
    assert ledger.attempts() == {}


def reasons(ledger: Ledger, *, given_up: bool) -> dict[str, str]:
    return ledger.reasons({k: a for k, a in ledger.attempts().items() if a.given_up == given_up})


def test_shard_is_quarantined_after_three_failures(storage):
    ledger = Ledger(storage)
    for expected in (1, 2, 3):
        assert ledger.begin_attempt(SHARD, "run") == expected
        assert reasons(ledger, given_up=True) == {}
        ledger.fail_attempt(SHARD, expected, "run", f"reason {expected}")
    assert reasons(ledger, given_up=True) == {SHARD.id: "reason 3"}
    assert ledger.begin_attempt(SHARD, "another run") == MAX_ATTEMPTS + 1


def test_shard_that_kills_its_process_is_quarantined(storage):
    ledger = Ledger(storage)
    for expected in (1, 2, 3, 4):  # nobody reports back
        assert ledger.begin_attempt(SHARD, "run") == expected
    assert "the worker process died" in reasons(ledger, given_up=True)[SHARD.id]


def test_shard_that_stalls_run_after_run_until_they_are_killed_is_quarantined(storage):
    ledger = Ledger(storage)
    for run in range(MAX_KILLED):
        assert ledger.begin_attempt(SHARD, f"run {run}") == 1
    assert reasons(ledger, given_up=True) == {}
    assert ledger.begin_attempt(SHARD, "one more") == MAX_ATTEMPTS + 1
    assert "killed while at work on it, 10 times" in reasons(ledger, given_up=True)[SHARD.id]


def test_what_was_given_up_can_be_tried_again_and_nothing_else_is_forgotten(storage):
    ledger = Ledger(storage)
    for number in (1, 2, 3):
        ledger.fail_attempt(SHARD, number, "run", "memory")
    ledger.fail_attempt(CHANGED, 1, "run", "memory")
    ledger.forget_quarantined()
    assert list(ledger.attempts()) == [CHANGED.id]
    assert ledger.begin_attempt(SHARD, "another run") == 1


def test_success_forgets_the_failures(storage):
    ledger = Ledger(storage)
    ledger.fail_attempt(SHARD, 1, "run", "network")
    ledger.begin_attempt(SHARD, "run")
    ledger.record(manifest_of(SHARD))
    assert ledger.attempts() == {}


def test_failure_elsewhere_is_not_held_against_the_shard(storage):
    ledger = Ledger(storage)
    for run in range(2 * MAX_KILLED):
        number = ledger.begin_attempt(SHARD, f"run {run}")
        assert number == 1
        ledger.withdraw_attempt(SHARD, number, f"run {run}")
    assert ledger.attempts() == {}


def test_failures_of_two_runs_are_both_counted(storage):
    ledger = Ledger(storage)
    for run in ("a", "b"):
        ledger.begin_attempt(SHARD, run)
    for run in ("a", "b"):
        ledger.fail_attempt(SHARD, 1, run, f"reason of {run}")
    assert len(ledger.attempts()[SHARD.id].failed) == 2


def test_reasons_are_read_up_to_a_limit(storage):
    ledger = Ledger(storage)
    for unit in (SHARD, CHANGED):
        ledger.fail_attempt(unit, 1, "run", "because")
    found = ledger.reasons(ledger.attempts(), limit=1)
    assert sorted(found.values()) == ["because", "see one4all status"]


def test_outputs_that_were_copied_are_restated_and_changed_ones_are_not(storage):
    ledger = Ledger(storage)
    old = write_output(storage, SHARD).model_copy(update={"run_id": "r"})
    old = old.model_copy(update={"outputs": (replace(old.outputs[0], etag="of another store"),)})
    ledger.record(old)
    (entry,) = ledger.entries()
    restated = ledger.restate(entry.key)
    assert restated is not None
    assert restated.outputs[0].etag == storage.head(SHARD.name).etag
    assert len(list(ledger.entries())) == 2
    for other in (b"y", b"xx"):
        storage.write_bytes(SHARD.name, other)
        assert ledger.restate(entry.key) is None
    storage.delete(SHARD.name)
    assert ledger.restate(entry.key) is None


@pytest.fixture
def sides(tmp_path) -> tuple[Storage, Storage, Ledger]:
    """Source, destination and its ledger."""
    source, destination = open_storage(str(tmp_path / "in")), open_storage(str(tmp_path / "out"))
    return source, destination, Ledger(destination)


def test_census_holds_the_ledger_against_the_listings(sides):
    source, destination, ledger = sides
    for key in ("a.tar", "b.tar.gz", "index.json", "_one4all/shards/a.tar", "x/y.tar", "z.tar"):
        source.write_bytes(key, b"")
    source.write_bytes("large.tar", b"large")
    shards = {shard.name: shard for shard in list_units(source)}
    assert list(shards) == ["a.tar", "large.tar", "x/y.tar", "z.tar"]
    ledger.record(write_output(destination, shards["a.tar"], num_bad=3))
    for number in range(MAX_ATTEMPTS):
        ledger.fail_attempt(shards["z.tar"], number, "run", "damaged")
    ledger.fail_attempt(shards["x/y.tar"], 1, "run", "once")
    census = take_census(source, ledger)
    assert (census.num_units, census.num_done, census.num_others) == (4, 1, 2)
    assert census.num_bad == 3
    assert census.pending == [shards["large.tar"], shards["x/y.tar"]]
    assert ledger.reasons(census.quarantined) == {"z.tar": "damaged"}
    assert ledger.reasons(census.failing) == {"x/y.tar": "once"}
    source.write_bytes("a.tar", b"changed")
    census = take_census(source, ledger)
    assert (census.pending[0].name, census.damaged) == ("a.tar", {})
    assert (census.orphans, census.strangers) == ([], [])


def test_places_are_compared_by_names_versions_and_sizes(sides):
    source, destination, ledger = sides
    for key in ("same.tar", "touched.tar", "gone.tar", "larger.tar"):
        source.write_bytes(key, b"x")
    for unit in list(list_units(source)):
        ledger.record(write_output(destination, unit))
    os.utime(f"{source.uri}/touched.tar", (0, 0))
    source.delete("gone.tar")
    source.write_bytes("new.tar", b"x")
    assert compare_places(source, ledger) == Move(2, 1, 1)
    source.write_bytes("larger.tar", b"xy")
    assert compare_places(source, ledger) == Move(1, 2, 1, "larger.tar")


def test_output_that_is_missing_or_replaced_is_pending_again(sides):
    source, destination, ledger = sides
    for name in "abc":
        source.write_bytes(f"{name}.tar", name.encode())
    for unit in list_units(source):
        ledger.record(write_output(destination, unit))
    assert take_census(source, ledger).num_done == 3
    destination.delete("a.tar")
    destination.write_bytes("b.tar", b"clean")
    found = []
    census = take_census(source, ledger, on_recorded=lambda unit, entry: found.append(unit.name))
    assert (census.num_done, list(census.damaged)) == (1, ["a.tar", "b.tar"])
    assert [unit.name for unit in census.pending] == ["a.tar", "b.tar"]
    assert found == ["a.tar", "b.tar", "c.tar"]
    by_name = {unit.name: unit for unit in list_units(source)}
    ledger.record(write_output(destination, by_name["b.tar"]))
    census = take_census(source, ledger)
    assert (census.num_done, list(census.damaged)) == (2, ["a.tar"])
    assert len(census.superseded) == 1


def test_what_has_no_source_any_more_is_told_apart(sides):
    source, destination, ledger = sides
    names = ("gone.tar", "x.tar", "x.tar-2.tar", "x.tar@copy.tar", "y" * 200 + ".tar")
    for name in names:
        source.write_bytes(name, b"s")
    for unit in list_units(source):
        ledger.record(write_output(destination, unit))
    census = take_census(source, ledger)
    assert (census.num_done, census.superseded) == (5, [])
    for name in ("gone.tar", names[-1]):
        source.delete(name)
    destination.write_bytes("precious.tar", b"p")
    destination.write_bytes("00000_stats.json", b"an importer's")
    destination.write_bytes("v2/z.tar", b"another destination's")
    destination.write_bytes("v2/_one4all/binding.json", b"{}")
    census = take_census(source, ledger)
    assert census.num_done == 3
    assert census.orphans == ["gone.tar", names[-1]]
    assert len(census.orphan_records) == 2
    assert census.strangers == ["precious.tar"]
    assert census.beside == ["00000_stats.json"]


def test_census_reads_no_record_of_what_is_done(sides, monkeypatch):
    source, destination, ledger = sides
    source.write_bytes("a.tar", b"a")
    (unit,) = list_units(source)
    ledger.record(write_output(destination, unit, num_bad=1))
    monkeypatch.setattr(type(destination), "open", lambda *_, **__: pytest.fail("it was opened"))
    assert take_census(source, ledger).num_bad == 1


def test_census_leaves_older_shards_out(sides, tmp_path):
    source, destination, ledger = sides
    for name, written in (("done.tar", 900), ("old.tar", 999.9), ("new.tar", 1000.2)):
        source.write_bytes(name, b"x")
        os.utime(tmp_path / "in" / name, (written, written))
    shards = {shard.name: shard for shard in list_units(source)}
    ledger.record(write_output(destination, shards["done.tar"], num_bad=1))
    census = take_census(source, ledger, since=1000.9)  # S3 would say 1000 for new.tar
    assert (census.num_units, census.pending) == (1, [shards["new.tar"]])
    assert (census.num_older, census.num_older_undone, census.num_bad) == (2, 1, 0)
    # A store that gives no times must not make a shard disappear.
    assert not Unit.of_object(ObjectInfo("a.tar", 1, "x")).is_older(1000.0)
