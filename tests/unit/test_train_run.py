"""A run folder belongs to one run, also when another version of the code goes on with it."""

import json
from pathlib import Path

import pytest

from one4all.errors import UsageError
from pipelines.train.config import TrainConfig
from pipelines.train.job import _refuse_other_run


def begin(folder: Path, **options) -> tuple[TrainConfig, dict]:
    """A begun run, and its record."""
    config = TrainConfig(source=str(folder / "c"), run_folder=str(folder / "run"), **options)
    _refuse_other_run(config)
    return config, json.loads((folder / "run" / "run.json").read_text())


def rewrite(folder: Path, record: dict) -> None:
    (folder / "run" / "run.json").write_text(json.dumps(record))


@pytest.mark.parametrize("objective", ["default", "paper"])
def test_run_begun_before_a_setting_was_known_goes_on_if_the_setting_is_the_default(
    tmp_path, objective
):
    config, record = begin(tmp_path, objective=objective)
    del record["objective"]["name"], record["sidecar_patterns"], record["generator"]["norm"]
    rewrite(tmp_path, record)
    _refuse_other_run(config)
    other = config.model_copy(update={"sidecar_patterns": ("*.seg.png",)})
    with pytest.raises(
        UsageError, match=r"another run \(sidecar_patterns \[\] -> \['\*.seg.png'\]"
    ):
        _refuse_other_run(other)


def test_settings_that_only_say_how_a_run_is_worked_on_may_change(tmp_path):
    config, _ = begin(tmp_path)
    _refuse_other_run(config.model_copy(update={"num_workers": (1, 4), "log_every": 3}))
    with pytest.raises(UsageError, match=r"another run \(learning_rate 0.0001 -> 0.1; steps 1000"):
        _refuse_other_run(config.model_copy(update={"steps": 5, "learning_rate": 0.1}))


def test_record_with_a_setting_that_is_unknown_here_is_named(tmp_path):
    config, record = begin(tmp_path)
    rewrite(tmp_path, record | {"colour": "green"})
    with pytest.raises(UsageError, match=r"of another version of one4all \(colour: Extra"):
        _refuse_other_run(config)
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(UsageError, match=r"run.json in run folder .*/run is damaged"):
        _refuse_other_run(config)
