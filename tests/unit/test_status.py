"""How far a destination is, cheaply, and how fast it grows."""

import json

import pytest
import typer
from test_ledger import BINDING, manifest_of, write_output

from one4all.corpus import ObjectVersion, Unit, list_units
from one4all.ledger.ledger import Ledger
from one4all.storage import open_storage
from pipelines import status as looking
from pipelines.cli import protecting
from pipelines.status import Rate, read_status, watch


@pytest.fixture
def half_done(tmp_path):
    """A destination with two of four shards of 1 byte; its ledger and its shards."""
    source = open_storage(str(tmp_path / "in"))
    for name in "abcd":
        source.write_bytes(f"{name}.tar", b"x")
    destination = open_storage(str(tmp_path / "out"))
    ledger = Ledger(destination)
    ledger.bind(BINDING.model_copy(update={"source_uri": source.uri}))
    shards = list(list_units(source))
    for shard in shards[:2]:
        ledger.record(write_output(destination, shard))
    return str(tmp_path / "out"), ledger, shards


def test_totals_are_read_unless_there_are_too_many(half_done, monkeypatch):
    out, _, shards = half_done
    one = manifest_of(shards[0])
    status = read_status(out)
    assert (status.num_done, status.num_pending, status.pending_bytes) == (2, 2, 2)
    assert status.output_bytes == 2 * one.output_size
    assert status.num_protected == 2 * one.num_protected
    monkeypatch.setattr(looking, "MAX_TOTALS", 1)
    monkeypatch.setattr(Ledger, "manifest", lambda *_: pytest.fail("a manifest was read"))
    assert read_status(out).num_protected is None
    assert "--totals" in "\n".join(protecting._status_lines(read_status(out)))


def test_watch_ends_when_nothing_is_pending_and_knows_the_rate(half_done, monkeypatch, capsys):
    out, ledger, shards = half_done
    clock = [0.0]

    def another_shard(seconds: float) -> None:
        clock[0] += 10
        ledger.record(write_output(open_storage(out), todo.pop()))

    todo = shards[2:]
    monkeypatch.setattr(looking.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(looking.time, "sleep", another_shard)
    looks = list(watch(out, every_seconds=1))
    assert [status.num_pending for status, _ in looks] == [2, 1, 0]
    assert looks[0][1] == Rate()
    images = manifest_of(shards[0]).num_images
    per_second = 1 / 10
    assert looks[1][1].images_per_second == pytest.approx(images * per_second)
    size = manifest_of(Unit("a", (ObjectVersion("a", 1, "x"),))).unit.size
    assert looks[1][1].seconds_left == pytest.approx(1 / (size * per_second))
    assert looks[2][1].num_done == 2
    protecting._watch(looks)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 of 4 shards done, 2 pending; no shard was done since this watch began"
    assert lines[1].startswith("3 of 4 shards done, 1 pending; ")
    assert "\x1b" not in "".join(lines)


def test_bad_images_are_listed_with_shard_and_reason(half_done, monkeypatch, capsys):
    out, ledger, shards = half_done
    destination = open_storage(out)
    ledger.record(write_output(destination, shards[2], num_bad=2))
    ledger.record(write_output(destination, shards[3], num_bad=1))
    destination.delete(shards[3].name)  # no longer done
    read = []
    manifest = Ledger.manifest
    monkeypatch.setattr(Ledger, "manifest", lambda *of: read.append(of) or manifest(*of))
    protecting.status(out, bad=True)
    line = "c.tar: a.jpg: garbage (dropped)"
    assert capsys.readouterr().out.splitlines() == [line, line, "2 bad images"]
    assert len(read) == 1
    protecting.status(out, bad=True, as_json=True)
    image = {"key": "a", "member": "a.jpg", "reason": "garbage", "action": "dropped"}
    assert json.loads(capsys.readouterr().out) == [{"shard": "c.tar"} | image] * 2
    with pytest.raises(typer.BadParameter, match="without --watch"):
        protecting.status(out, bad=True, watch=1.0)
