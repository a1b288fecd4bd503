"""How far a training is, as somebody sees it who has only its output or its run folder."""

import json

import pytest
from typer.testing import CliRunner

from one4all.storage import open_storage
from pipelines.cli.app import app
from pipelines.train.config import TrainConfig
from pipelines.train.progress import RunLog
from pipelines.train.status import RUN_FILE, curve, leave_pointer, read_training


@pytest.fixture
def training(tmp_path):
    """A training of 100 steps, of which 40 were logged, by two workers; one shard is damaged."""
    output, run = str(tmp_path / "protector"), str(tmp_path / "run")
    config = TrainConfig(
        source="in", output=output, run_folder=run, steps=100, batch_size=8, num_workers=2
    )
    open_storage(run).write_bytes(RUN_FILE, config.model_dump_json().encode())
    leave_pointer(open_storage(output), run)
    log = RunLog(run)
    for step in range(1, 41):
        entry = {"step": step, "epoch": 0, "loss": 8 / step, "world_size": 2}
        if step % 20 == 0:
            entry["validation_loss"] = 20 / step
        log.add(entry | {"images_per_second": 32.0, "learning_rate": 0.1})
    log._write()
    log.add_damage({"in/a.tar": "truncated"})
    return output, run


def test_learning_curve_is_seen_from_the_output_and_from_the_run_folder(training):
    for place in training:
        shown = CliRunner().invoke(app, ["status", place], catch_exceptions=False).output
        assert "step        40 of 100; 32 images/s of 2 workers, about 30 s left" in shown
        assert "loss         8 -> 0.2  █" in shown
        assert "of validation 1 -> 0.5  █▁" in shown
        assert "damaged shard in/a.tar: truncated" in shown
    found = json.loads(CliRunner().invoke(app, ["status", training[0], "--json"]).output)
    assert [entry["loss"] for entry in found["history"]][:2] == [8, 4]


def test_training_that_has_logged_nothing_and_what_is_none(tmp_path, training):
    _, run = training
    open_storage(run).delete("metrics.jsonl")
    shown = CliRunner().invoke(app, ["status", run]).output
    assert "of 100: nothing was logged yet" in shown
    (tmp_path / "other").mkdir()
    assert read_training(str(tmp_path / "other")) is None


def test_curve_is_of_means_and_bounded():
    assert curve([]) == ""
    assert curve([1.0, 1.0]) == "▁▁"
    assert curve([0.0, 7.0]) == "▁█"
    assert len(curve(list(range(1000)))) == 60
    assert curve([0.0, 10.0, 0.0, 10.0, 20.0, 20.0], width=3) == "▁▁█"
