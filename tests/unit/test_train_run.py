"""What a run folder keeps: the run that it belongs to, and the concepts that were embedded."""

import json
import re
from pathlib import Path

import pytest
import torch
from support.builders import TINY_ENCODER, TINY_GENERATOR, write_corpus

from one4all.concepts import ConceptBank
from one4all.encoders import load_encoder
from one4all.encoders.embedded import EmbeddedEncoder
from one4all.errors import ConfigError, UsageError
from pipelines.train import job
from pipelines.train.config import TrainConfig
from pipelines.train.job import _refuse_other_run, train
from pipelines.train.progress import RunLog


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


def test_training_that_met_no_number_names_images_by_shard_and_keeps_them_all(tmp_path):
    config, _ = begin(tmp_path)
    images = [(f"in/{number // 10}.tar", f"k{number}") for number in range(20)]
    log = RunLog(config.run_folder)
    error = job._not_finite(("step 3, rank 1: the loss of a batch is nan", images), config, log)
    assert re.search(
        r"^step 3, rank 1: .* nan; images: in/0.tar: k0, .*, k9; in/1.tar: k10, .*, k15 and 4 more,"
        " all in not_finite.json of .*/run. No weights were changed",
        str(error),
    )
    found = json.loads((tmp_path / "run" / "not_finite.json").read_text())
    assert found["images"] == [list(image) for image in images]


@pytest.mark.slow
def test_concepts_are_embedded_once_for_all_workers_and_sittings(tmp_path, monkeypatch):
    embedded: list[int] = []
    sent: list[ConceptBank] = []

    def counted(self, texts):
        embedded.append(len(texts))
        return encode_text(self, texts)

    def fit(config, bank, *arguments):
        sent.append(ConceptBank.from_bytes(bank.to_bytes()))
        job.GeneratorTrainer(config, bank=sent[-1])  # as every worker does
        raise KeyboardInterrupt

    encode_text = EmbeddedEncoder.encode_text
    monkeypatch.setattr(EmbeddedEncoder, "encode_text", counted)
    monkeypatch.setattr(job, "_fit", fit)
    config = TrainConfig(
        source=str(write_corpus(tmp_path / "c")),
        output=str(tmp_path / "p"),
        run_folder=str(tmp_path / "run"),
        encoder=TINY_ENCODER,
        generator=TINY_GENERATOR,
        vocabulary="broad",
    )
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert len(embedded) == 1
    (tmp_path / "run" / "concepts.safetensors").write_bytes(b"damaged")
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert len(embedded) == 2
    assert all(torch.equal(bank.embeddings, sent[0].embeddings) for bank in sent)
    other = ConceptBank.build(
        "broad", load_encoder(TINY_ENCODER), templates=(" {}",), known=sent[0]
    )
    assert len(embedded) == 3
    assert other.hash != sent[0].hash


@pytest.mark.parametrize("data", [b"", b"damaged", bytes(64), b"\2\0\0\0\0\0\0\0{}"], ids=repr)
def test_bank_that_is_none_is_refused(data):
    with pytest.raises(ConfigError, match="no bank of concepts"):
        ConceptBank.from_bytes(data)
