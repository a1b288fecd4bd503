"""Mistakes are found before anything starts, all at once, each with its path."""

from pathlib import Path

import pytest

from one4all.encoders import EncoderConfig
from one4all.errors import ConfigError
from pipelines.protect.config import ProtectConfig
from pipelines.settings import absolute_weights, load_config, since_seconds
from pipelines.train.config import TrainConfig

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted((CONFIGS / "train").glob("*.yaml")), ids=lambda p: p.stem)
def test_training_configs_load(path):
    load_config(TrainConfig, path)


@pytest.mark.parametrize("path", sorted((CONFIGS / "protect").glob("*.yaml")), ids=lambda p: p.stem)
def test_protection_configs_load(path):
    load_config(ProtectConfig, path)


def test_workers_are_a_number_or_a_range():
    for text, least, most in (("3", 3, 3), ("[2, 8]", 2, 8), ("[4, 4]", 4, 4)):
        config = load_config(TrainConfig, None, [f"num_workers={text}"])
        assert (config.min_workers, config.max_workers) == (least, most)
        assert TrainConfig.model_validate_json(config.model_dump_json()) == config
    for text in (
        "0",
        "[8, 2]",
        "[1]",
        "[1, 2, 3]",
        "[]",
        "many",
        "2.5",
        "true",
        "[1, x]",
        "-1",
        "",
    ):
        with pytest.raises(ConfigError, match=r"num_workers: .*such as 4, or .* \[2, 8\]"):
            load_config(TrainConfig, None, [f"num_workers={text}"])


def test_a_worker_trains_on_whole_gpus():
    for text in ("-1", "0", "1", "2"):
        load_config(TrainConfig, None, [f"gpus_per_worker={text}"])
    for text in ("0.5", "1.5"):
        with pytest.raises(ConfigError, match=rf"gpus_per_worker: .*whole GPUs, not {text}; write"):
            load_config(TrainConfig, None, [f"gpus_per_worker={text}"])


def test_arguments_beat_set_beats_file_beats_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 7\nbatch_size: 3\nseed: 5\nencoder: {input_size: 64}\n")
    config = load_config(TrainConfig, path, ["batch_size=4", "seed=6"], seed=8, source=None)
    assert (config.steps, config.batch_size, config.seed, config.source) == (7, 4, 8, "")
    assert config.encoder.input_size == 64


def test_nested_keys_and_numbers_as_people_write_them():
    config = load_config(
        TrainConfig, None, ["learning_rate=3e-4", "objective.num_similar=2", "generator=paper"]
    )
    assert config.learning_rate == 3e-4
    assert config.objective.num_similar == 2
    assert config.generator.num_blocks == 24


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["protectr=x"], ["unknown key 'protectr'; known keys: ", ", protector, "]),
        (["output_format=png", "batch_size=0"], ["output_format", "batch_size"]),
        (["batch_size"], ["write key.path=value"]),
        (["ray.num_cpu=2"], ["unknown key 'ray.num_cpu'; known keys: address, num_cpus, "]),
    ],
)
def test_mistakes_are_explained(overrides, messages):
    with pytest.raises(ConfigError) as error:
        load_config(ProtectConfig, None, overrides)
    for message in messages:
        assert message in str(error.value)


def test_unknown_preset_and_unreadable_file(tmp_path):
    with pytest.raises(ConfigError, match="no preset 'big', only compact, paper"):
        load_config(TrainConfig, None, ["generator=big"])
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="cannot read configuration"):
        load_config(TrainConfig, tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match="cannot read configuration"):
        load_config(TrainConfig, tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1970-01-02", 86_400),
        ("1970-01-01T01:00Z", 3600),
        ("1970-01-01T01:00", 3600),  # without a zone: UTC, wherever the driver runs
        ("1970-01-01T01:00+01:00", 0),
        ("36h", 1_000_000 - 36 * 3600),
        ("1.5d", 1_000_000 - 129_600),
    ],
)
def test_since_is_a_time_or_a_duration(text, seconds):
    assert since_seconds(text, now=1_000_000) == seconds
    assert load_config(ProtectConfig, None, None, since=text).since == text


@pytest.mark.parametrize("text", ["yesterday", "36", "-1h", "2026-13-01"])
def test_since_that_says_neither_is_refused(text):
    with pytest.raises(ConfigError, match="neither a time such as"):
        load_config(ProtectConfig, None, None, since=text)


def test_since_may_be_what_yaml_takes_for_a_date():
    config = load_config(ProtectConfig, None, ["since=2026-11-01T00:00:00Z"])
    assert since_seconds(config.since, now=0) == since_seconds("2026-11-01", now=0)


def test_weights_in_a_file_are_found_from_another_folder(tmp_path, monkeypatch):
    (tmp_path / "clip.pt").touch()
    monkeypatch.chdir(tmp_path)
    encoder = EncoderConfig(kind="open_clip", model_name="ViT-B-32", pretrained="clip.pt")
    assert absolute_weights(encoder).pretrained == str(tmp_path / "clip.pt")
    tag = encoder.model_copy(update={"pretrained": "openai"})
    assert absolute_weights(tag) == tag
