"""The checks for a GPU machine run, at tiny sizes, where as little is installed as there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gpu import adversaries, travel
from gpu.codes import read_codes
from gpu.record import Record
from support.builders import make_image, make_tar

from one4all.evaluation.labelled import read_labelled
from one4all.protectors.protector import Protector

ROOT = Path(__file__).parents[2]
ABSENT = ("ray", "open_clip", "boto3", "openvino", "typer", "flip_evaluator", "ssimulacra2")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A photo set as it travels."""
    folder = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 12), ("test", 6)):
        files = []
        for index in range(count):
            files.append((f"{index:03d}.jpg", make_image(seed=index + 100 * count)))
            files.append((f"{index:03d}.cls", str(index % 3).encode()))
        (folder / "source" / split).mkdir(parents=True)
        (folder / "source" / split / "a.tar").write_bytes(make_tar(files))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # others would spin
    travel.pack_photos(
        str(folder / "source" / "train"),
        str(folder / "source" / "test"),
        folder / "set",
        num_classes=2,
        train_per_class=3,
        test_per_class=2,
    )
    torch.set_num_threads(threads)
    return folder / "set"


@pytest.fixture
def check(tmp_path):
    """Runs a command on a machine without these packages; its result."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    code = f"import sys\nfor name in {ABSENT}: sys.modules[name] = None\n"
    (blocked / "sitecustomize.py").write_text(code)

    def check(command: str, *options: object) -> SimpleNamespace:
        output = tmp_path / "result.json"
        done = subprocess.run(
            [
                *(sys.executable, ROOT / "tests/gpu/check.py", command, "--tiny"),
                *("--output", output, *options),
            ],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(blocked), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert output.exists(), done.stderr
        record = json.loads(output.read_text())
        assert done.returncode == 0, [row for row in record["rows"] if "error" in row]
        return SimpleNamespace(rows=record["rows"], text=done.stdout, record=record)

    return check


def test_protect_is_measured_on_a_bare_machine(check, photos):
    result = check("protect", "--photos", photos)
    rows = {row["row"]: row for row in result.rows}
    exact, coarse = rows["float32, cpu"], rows["bfloat16, compiled, cpu"]
    assert (exact["same code"], exact["same bytes"], exact["most levels from clean"]) == (1, 1, 8)
    assert exact["embeddings apart"] < 1e-4 < coarse["embeddings apart"]
    assert "rewrite of shards" in result.text
    for name in ("as shipped", "float32", "bfloat16", "codecs alone", "bfloat16, compiled"):
        row = rows[f"{name}, batches of 2"]
        assert (row["images"], row["images/s"][0] > 0) == (6, True)
        assert row["bound by"] in row["seconds of stages"]
    for config in ("imagenet", "paper"):
        for step in ("step alone", "with the loader", "DDP of one rank, gloo"):
            assert rows[f"{config}.yaml, {step}"]["images/s"] > 0


def test_adversaries_are_trained_on_a_bare_machine(check, photos):
    result = check("adversaries", "--photos", photos)
    copies = {row["row"]: row for row in result.rows if row["table"] == "copies"}
    assert {name: row["most levels from clean"] for name, row in copies.items()} == {
        condition: 0 if condition == "clean" else 8 for condition in adversaries.CONDITIONS
    }
    trained = [row for row in result.rows if row["table"] == "adversaries"]
    assert {(row["condition"], row["augmentation"]) for row in trained} == {
        (condition, kind)
        for condition in adversaries.CONDITIONS
        for kind in adversaries.AUGMENTATIONS
    }
    assert all(0 <= row["accuracy"] <= 1 for row in trained)
    assert "accuracy on clean test photos" in result.text
    assert "not measured" not in result.text


def test_codes_protect_as_the_protector_does(photos):
    images = read_labelled(str(photos / "train"))
    protected = Protector.load("default").protect(list(images.images_NHWC))
    codes = read_codes(photos)
    assert np.array_equal(codes["shipped"].protect(images).images_NHWC, np.stack(protected))
    assert codes["corpus"].bits_Nb.shape == codes["shipped"].bits_Nb.shape


def test_a_row_that_fails_takes_no_other_with_it(tmp_path):
    record = Record(tmp_path / "r.json", "protect", {}, minutes=1)
    assert record.measure("t", "broken", lambda: {"share": 1 / 0}) is None
    assert json.loads((tmp_path / "r.json").read_text())["rows"][0]["row"] == "broken"
    assert record.measure("t", "whole", lambda: {"share": 0.5}) == {"share": 0.5}
    first, second = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert first["error"] == "ZeroDivisionError: division by zero"
    assert (second["share"], record.num_failed) == (0.5, 1)
    assert "| whole | " in record.markdown()


def test_no_row_begins_when_the_time_is_over(tmp_path):
    record = Record(tmp_path / "r.json", "protect", {}, minutes=0)
    assert record.measure("t", "late", lambda: pytest.fail("begun")) is None
    assert record.rows[0]["not begun"] == "the time was over"


def test_a_process_that_dies_takes_no_other_with_it(tmp_path):
    record = Record(tmp_path / "r.json", "adversaries", {}, minutes=1)
    calls = {"dies": partial(os._exit, 1), "lives": partial(dict, share=1.0)}
    with adversaries._Processes(1) as processes:
        succeeded = adversaries._measure_all(record, "t", calls, processes)
    assert succeeded == {"lives"}
    assert "BrokenProcessPool" in next(row for row in record.rows if row["row"] == "dies")["error"]


def test_shares_of_clean_are_of_the_same_seed(tmp_path):
    record = Record(tmp_path / "r.json", "adversaries", {}, minutes=1)
    for condition, accuracies in (("clean", (0.4, 0.8)), ("shipped", (0.1, 0.4))):
        for seed, accuracy in enumerate(accuracies):
            entry = {"condition": condition, "augmentation": "gray", "seed": seed}
            record.add(adversaries.TABLE, "", 1.0, entry | {"accuracy": accuracy})
    row = "| shipped | not measured | not measured | 25.0 % (38 % of clean) |"
    assert row in adversaries.markdown(record)
