"""The verbs as a user calls them, in processes of their own: quiet, and true to their help."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from support.builders import make_image

from pipelines.demo.report import DISCREET, STRONG


def one4all(
    *arguments: str, timeout: float = 200, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipelines", *arguments],
        env=os.environ | {"RAY_ADDRESS": ""} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
@pytest.mark.parametrize(
    ("module", "said"),
    [("typer", ""), ("pydantic", "one4all: interrupted; run the same command again to go on\n")],
)
def test_interrupt_while_it_starts_is_quiet(module, said, number, tmp_path):
    """It comes while the command line, or what its verb needs, is being imported."""
    interrupt = f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(60)\n"
    (tmp_path / f"{module}.py").write_text(interrupt)
    run = one4all("protect", "x", "y", PYTHONPATH=str(tmp_path))
    assert (run.returncode, run.stderr) == (130, said)


def test_pack_protect_verify_status_preview(tmp_path: Path, protector_folder: Path, monkeypatch):
    """The round trip of the README, with relative paths, and nothing on the terminal but ours."""
    monkeypatch.chdir(tmp_path)
    for label, first in (("cat", 0), ("dog", 3)):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for index in range(first, first + 3):
            image = make_image(seed=index)
            (tmp_path / "photos" / label / f"{index}.jpg").write_bytes(image)
    protector = Path(os.path.relpath(protector_folder, tmp_path))
    packed = one4all("pack", "photos", "in", "--images-per-shard", "4")
    assert packed.stdout.startswith("6 images in 2 shards")
    protected = one4all("protect", "in", "out", "--protector", str(protector))
    assert protected.returncode == 0, protected.stderr
    assert protected.stdout == "2 of 2 shards protected (2 now, 6 images); 0 bad images\n"
    assert "ray" not in protected.stderr.lower()
    verified = one4all("verify", "in", "out")
    assert verified.returncode == 0
    assert verified.stdout.startswith("every promise holds: 2 shards, 6 samples, 6 images")
    status = one4all("status", "out")
    assert "2 of 2 shards" in status.stdout
    shown = one4all("preview", "in/train-000000.tar", "sheet.png", "--protector", str(protector))
    assert shown.stdout == "4 images drawn to sheet.png\n"
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 300  # three columns, and the captions

    damaged = bytearray((tmp_path / "out" / "train-000000.tar").read_bytes())
    damaged[2000] ^= 1
    (tmp_path / "out" / "train-000000.tar").write_bytes(damaged)
    found = one4all("verify", "in", "out")
    assert found.returncode == 1
    assert "train-000000.tar" in found.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "no-such-corpus", "x"], "no corpus 'no-such-corpus'"),
        (["preview", "no-such.jpg"], "no such file"),
        (["preview", "no-such.jpg", "."], "is a folder; name the PNG file"),
        (["status", "nowhere"], "no such folder"),
        (["train"], "train needs a source"),
        (["fit", "vocabulary:broad", "x", "--concepts", "9"], "--concepts is for a corpus"),
        (["verify", "in", "in"], "no such folder"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_two(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = one4all(*arguments)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_folder_that_was_deleted_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for arguments in (["protect", "/in", "/out"], ["status", "x"]):
        done = one4all(*arguments)
        assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)
        assert "runs in was deleted" in done.stderr


@pytest.mark.timeout(600)
def test_demo_protects_twice_and_judges_by_controls(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, label in enumerate(("cat", "dog")):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for index in range(6):
            image = make_image(seed=10 * number + index)
            (tmp_path / "photos" / label / f"{index}.jpg").write_bytes(image)
    done = one4all("demo", "out", "--photos", "photos", timeout=500)
    assert (done.returncode, done.stderr) == (0, "")
    *steps, summary, last = done.stdout.splitlines()
    assert all(line.startswith("[") for line in steps), done.stdout
    assert last == "report: out/report.html"
    for copy in (DISCREET, STRONG, "random noise", "class-wise oracle"):
        assert f"{copy} " in summary
    assert any("too small to fit one" in line for line in steps), "says what protect says"
    out = tmp_path / "out"
    audits = json.loads((out / "verification.json").read_text())
    assert [audits[title]["num_images"] for title in (DISCREET, STRONG)] == [10, 10]
    report = (out / "report.html").read_text()
    headings = re.findall("<h2>(.*?)</h2>", report)
    wanted = ["Can you see it?", "What did the adversary learn?", "Protected and verified"]
    assert headings == wanted
    assert summary.partition("] ")[2].partition(" ±")[0] in report
