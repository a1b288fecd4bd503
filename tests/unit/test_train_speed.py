"""The speed of training, stage by stage, as `one4all bench --train` shows it."""

import json

import pytest
from support.builders import TINY_ENCODER, TINY_GENERATOR, write_corpus
from typer.testing import CliRunner

from one4all.errors import UsageError
from pipelines.cli.app import app
from pipelines.train.speed import STAGES


@pytest.mark.slow
def test_each_stage_is_measured_in_turn(tmp_path):
    corpus = write_corpus(tmp_path / "c", num_shards=3, num_samples=8)
    settings = [f"encoder={TINY_ENCODER.model_dump_json()}", "batch_size=4", "vocabulary=broad"]
    settings += [f"generator={TINY_GENERATOR.model_dump_json()}"]
    arguments = ["bench", str(corpus), "--train", "--output", str(tmp_path / "bench.json")]
    for setting in settings:
        arguments += ["--set", setting]
    shown = CliRunner().invoke(app, arguments, catch_exceptions=False).output
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["source"] == str(corpus)
    assert found["batch_size"] == 4
    assert found["start_cpu_seconds"]["sent"] > 0
    for stage in STAGES:
        for rates in (found["images_per_second"][stage], found["cpu_ms_an_image"][stage]):
            assert len(rates) == 3
            assert all(rate > 0 for rate in rates)
        assert f"round 3: {stage} " in shown


def test_settings_of_a_training_are_for_bench_of_training():
    with pytest.raises(UsageError, match="for bench --train"):
        CliRunner().invoke(app, ["bench", "--set", "batch_size=4"], catch_exceptions=False)
