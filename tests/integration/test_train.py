"""Ray Train: two workers, a killed worker, a killed driver; the run goes on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch
from support.builders import TINY_ENCODER, TINY_GENERATOR, write_corpus

from one4all.concepts import ConceptBank
from one4all.encoders import load_encoder
from one4all.errors import LeaseHeldError, NotFiniteError, UsageError
from one4all.ledger.lease import Lease
from one4all.protectors.protector import Protector
from one4all.storage import open_storage
from pipelines.train.config import TrainConfig
from pipelines.train.job import CONCEPTS_FILE, train


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return str(write_corpus(tmp_path_factory.mktemp("corpus") / "c", num_shards=2, num_samples=24))


def config_for(corpus: str, folder: Path, **options) -> TrainConfig:
    defaults = dict(
        source=corpus,
        output=str(folder / "protector"),
        run_folder=str(folder / "run"),
        encoder=TINY_ENCODER,
        generator=TINY_GENERATOR,
        vocabulary="broad",
        steps=40,
        batch_size=4,
        learning_rate=5e-3,
        log_every=1,
        checkpoint_every=10,
        num_workers=2,
        lease_seconds=4,
    )
    return TrainConfig(**(defaults | options))


def read_log(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("ray_local")
def test_killed_worker_resumes_from_the_last_checkpoint(corpus, tmp_path):
    steps: list[int] = []

    def kill_once(metrics: dict[str, float]) -> None:
        steps.append(int(metrics["step"]))
        if metrics["step"] >= 22 and not killed:
            for process in psutil.process_iter(["cmdline"]):
                if "RayTrainWorker" in " ".join(process.info["cmdline"] or []):
                    killed.append(process.pid)
                    process.send_signal(signal.SIGKILL)
                    break

    killed: list[int] = []
    config = config_for(
        corpus, tmp_path, steps=60, validation_source=corpus, validate_every=25, keep_checkpoints=4
    )
    card = train(config, command="test", on_metrics=kill_once)
    assert killed
    assert steps[-1] == 60
    repeated = [b for a, b in pairwise(steps) if b <= a]
    assert len(repeated) == 1  # one restart
    assert repeated[0] > 1
    assert (repeated[0] - 1) % config.checkpoint_every == 0
    history = read_log(tmp_path / "run")
    assert [int(entry["step"]) for entry in history] == list(range(1, 61))
    first, last = (sum(entry["loss"] for entry in part) for part in (history[:10], history[-10:]))
    assert last < first
    seen = {
        entry["step"]: entry["validation_loss"] for entry in history if "validation_l1" in entry
    }
    assert seen.keys() == {25, 50, 60}
    assert seen[60] < history[0]["loss"]
    assert len(list((tmp_path / "run").glob("step-*"))) == 4
    assert (tmp_path / "run/concepts.safetensors").is_file()
    assert Protector.load(str(tmp_path / "protector")).card == card
    assert (tmp_path / "run/loss_curves.png").stat().st_size > 1000
    assert list((tmp_path / "run/tensorboard").glob("events*"))


@pytest.mark.usefixtures("ray_local")
@pytest.mark.fault("shard of a training damaged, another one gone")
def test_damaged_shards_are_left_out_and_named(corpus, tmp_path):
    source = tmp_path / "in"
    shutil.copytree(corpus, source)
    shutil.copy(source / "shard-000.tar", source / "shard-002.tar")
    cut = source / "shard-001.tar"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    said: dict[str, str] = {}
    entries: list[dict[str, float]] = []

    def remove_one(entry: dict[str, float]) -> None:
        entries.append(entry)
        (source / "shard-002.tar").unlink(missing_ok=True)

    config = config_for(str(source), tmp_path, max_failures=0, shuffle_buffer=1)
    card = train(config, on_metrics=remove_one, on_damage=said.__setitem__)
    cut_uri, gone_uri = (f"{source}/shard-00{number}.tar" for number in (1, 2))
    assert said.keys() == {cut_uri, gone_uri}
    assert "truncated" in said[cut_uri]
    assert re.search("no such file|went away", said[gone_uri])
    assert card.training["damaged_shards"] == said
    assert card.training["num_damaged_shards"] == 2
    assert json.loads((tmp_path / "run" / "damaged_shards.json").read_text()) == said
    assert [entry["step"] for entry in entries] == list(range(1, 41)), "it was started again"
    assert entries[-1]["damaged_shards"] == read_log(tmp_path / "run")[-1]["damaged_shards"] == 2


@pytest.mark.usefixtures("ray_local")
@pytest.mark.fault("loss of a training that is NaN")
def test_loss_that_is_no_number_ends_the_run_and_is_not_tried_again(corpus, tmp_path):
    bank = ConceptBank.build("broad", load_encoder(TINY_ENCODER))
    spoilt = replace(bank, embeddings=bank.embeddings * torch.nan)
    config = config_for(corpus, tmp_path)
    open_storage(config.run_folder).write_bytes(CONCEPTS_FILE, spoilt.to_bytes())
    entries: list[dict[str, float]] = []
    with pytest.raises(NotFiniteError, match=rf"step 1, rank 0: .* nan; images: {corpus}/shard-00"):
        train(config, on_metrics=entries.append)
    assert entries == []
    found = json.loads((tmp_path / "run" / "not_finite.json").read_text())
    assert len(found["images"]) == config.batch_size
    assert not list((tmp_path / "run").glob("step-*"))
    assert not list((tmp_path / "protector").glob("*.json")), "only the pointer to its run folder"


def test_killed_driver_resumes_with_the_same_command(corpus, tmp_path):
    config = config_for(corpus, tmp_path, steps=60, num_workers=1)
    path = tmp_path / "train.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json", exclude={"ray"})))
    command = [sys.executable, "-m", "pipelines", "train", "--config", str(path)]
    command += ["--set", "ray.num_cpus=1"]
    environment = os.environ | {"RAY_ADDRESS": ""}
    driver = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    run, deadline = tmp_path / "run", time.monotonic() + 120
    while not list(run.glob("step-*")) and time.monotonic() < deadline and driver.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not list((tmp_path / "protector").glob("*.json")), "only the pointer to its run folder"
    time.sleep(3)
    (run / "metrics.jsonl").unlink(missing_ok=True)  # as if it had not been written lately
    [told, *_] = sorted(run.glob("step-*/entries.jsonl"))  # a later one may not be whole
    before = [json.loads(line) for line in told.read_text().splitlines()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    log = read_log(run)
    assert [entry["step"] for entry in log] == list(range(1, 61))
    assert 1 <= len(before) < 60
    assert all(old.items() <= new.items() for old, new in zip(before, log, strict=False))
    assert Protector.load(str(tmp_path / "protector"))

    other = config.model_copy(update={"learning_rate": 1e-3})
    with pytest.raises(UsageError, match=r"belongs to another run \(learning_rate"):
        train(other)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_training_ends_with_one_sentence(corpus, tmp_path, number):
    config = config_for(corpus, tmp_path, steps=100_000, num_workers=1)
    path = tmp_path / "train.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json", exclude={"ray"})))
    command = [sys.executable, "-m", "pipelines", "train", "--config", str(path)]
    driver = subprocess.Popen(
        [*command, "--set", "ray.num_cpus=1"],
        env=os.environ | {"RAY_ADDRESS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert driver.stdout is not None
    assert " steps, " in driver.stdout.readline()
    driver.send_signal(number)
    printed, _ = driver.communicate(timeout=60)
    assert driver.returncode == 130
    *progress, last = printed.splitlines()
    assert all(" steps, " in line for line in progress), printed
    assert last == "one4all: interrupted; run the same command again to go on"


def test_mistakes_are_found_before_ray_starts(corpus, tmp_path):
    with pytest.raises(UsageError, match="train needs a source"):
        train(config_for("", tmp_path))
    with pytest.raises(UsageError, match="no such folder"):
        train(config_for(str(tmp_path / "none"), tmp_path))
    many = config_for(corpus, tmp_path).model_dump() | {"objective": {"num_similar": 50}}
    with pytest.raises(UsageError, match="too small for 50 similar"):
        train(TrainConfig(**many))
    odd = config_for(corpus, tmp_path, working_size=36)
    with pytest.raises(UsageError, match="36x36 is not a multiple of 8"):
        train(odd)
    assert list(tmp_path.iterdir()) == []


def test_second_run_in_one_run_folder_is_turned_away(corpus, tmp_path):
    config = config_for(corpus, tmp_path)
    waits: list[str] = []
    with (
        Lease(open_storage(config.run_folder), "somebody", seconds=2),
        pytest.raises(LeaseHeldError, match=r"run somebody on .* is writing to .*/run"),
    ):
        train(config, on_wait=waits.append)
    assert len(waits) == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.usefixtures("ray_local")
def test_source_run_folder_and_protector_may_all_live_on_s3(corpus, tmp_path, s3_uri):
    for path in Path(corpus).glob("*.tar"):
        open_storage(f"{s3_uri}/in").write_bytes(path.name, path.read_bytes())
    places = {
        "source": f"{s3_uri}/in",
        "run_folder": f"{s3_uri}/run",
        "output": f"{s3_uri}/protector",
    }
    config = config_for(corpus, tmp_path, steps=4, num_workers=1, **places)
    card = train(config)
    assert Protector.load(f"{s3_uri}/protector").card == card
    run = {info.key.split("/")[0] for info in open_storage(f"{s3_uri}/run").list()}
    assert {"metrics.jsonl", "loss_curves.png", "run.json", "step-00000004"} <= run
