"""The wheel as somebody gets it: built, installed into a fresh environment, used elsewhere.

The environment is made from a package index and `constraints.txt`; nothing of this checkout, and
nothing of the environment that runs the tests, is in it. The tests of this file go on from each
other: first the core alone, then the extra `all`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from support.builders import make_image, make_tar

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
PHOTO = ROOT / "one4all" / "assets" / "photos" / "chelsea.jpg"
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "one4all", "pipelines")

pytestmark = [pytest.mark.wheel, pytest.mark.timeout(900)]

# What a person writes first; no extra is installed.
THREE_LINES = """
import one4all
from PIL import Image
one4all.load("default").protect_image(Image.open("photo.jpg")).save("protected.png")
"""

# A codebook of a handful of pictures, and a file protected by it.
FIT = """
from pathlib import Path
import numpy as np
import one4all
random = np.random.default_rng(0)
images = [random.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(12)]
protector = one4all.fit(images, num_concepts=8, seed=0)
protector.save(Path("mine"))
Path("protected.jpg").write_bytes(one4all.load("mine").protect_file(Path("photo.jpg").read_bytes()))
"""


@dataclass(frozen=True)
class Fresh:
    """A virtual environment outside the checkout, and an empty folder to work in."""

    programs: Path
    folder: Path

    def pip_install(self, *requirements: str) -> None:
        command = [str(self.programs / "python"), "-m", "pip", "install", "--quiet"]
        command += ["--disable-pip-version-check", "--no-compile"]  # what is run is compiled then
        command += ["--constraint", str(CONSTRAINTS), *requirements]
        # With PYTHONPATH, pip would find what the checkout has, and leave it out.
        subprocess.run(command, env=self._environment(), check=True)

    def start(self, program: str, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(self.programs / program), *arguments],
            cwd=self.folder,
            env=self._environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        process = self.start(program, *arguments)
        out, errors = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, errors)

    def _environment(self) -> dict[str, str]:
        """Of a person who has just installed it: nothing that leads back to the checkout."""
        ours = ("PYTHON", "VIRTUAL_ENV", "RAY_", "AWS_")
        outside = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        path = f"{self.programs}{os.pathsep}{outside.get('PATH', '')}"
        return outside | {"PATH": path, "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources: what an earlier build left in the checkout stays out."""
    copy = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*command, "--wheel-dir", str(copy / "dist"), str(copy)], check=True)
    [built] = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Fresh:
    """With the core alone."""
    folder = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    (folder / "work").mkdir()
    environment = Fresh(folder / "venv" / "bin", folder / "work")
    shutil.copy(PHOTO, environment.folder / "photo.jpg")
    environment.pip_install(str(wheel))
    return environment


@pytest.fixture(scope="module")
def complete(fresh: Fresh, wheel: Path) -> Fresh:
    """With the extra `all`."""
    fresh.pip_install(f"{wheel}[all]")
    return fresh


def test_wheel_holds_the_packages_and_their_assets(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"one4all", "pipelines"}
    for package in ("one4all", "pipelines"):
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert str(path.relative_to(ROOT)) in names


def test_three_lines_protect_a_photo_without_any_extra(fresh: Fresh):
    done = fresh.run("python", "-c", THREE_LINES)
    assert (done.returncode, done.stderr) == (0, "")
    with Image.open(PHOTO) as photo, Image.open(fresh.folder / "protected.png") as protected:
        difference = np.asarray(protected).astype(int) - np.asarray(photo)
    assert 0 < np.abs(difference).max() <= 8


def test_codebook_is_fitted_without_any_extra(fresh: Fresh):
    done = fresh.run("python", "-c", FIT)
    assert (done.returncode, done.stderr) == (0, "")
    with Image.open(PHOTO) as photo, Image.open(fresh.folder / "protected.jpg") as protected:
        assert (protected.format, protected.size) == ("JPEG", photo.size)


def test_what_needs_an_extra_says_which(fresh: Fresh):
    done = fresh.run("one4all", "--version")
    assert done.returncode == 2
    assert done.stderr == "one4all: typer is not installed: pip install 'one4all[jobs]'\n"
    done = fresh.run("python", "-c", "import one4all; one4all.open_storage('s3://bucket/prefix')")
    assert "UsageError: boto3 is not installed: pip install 'one4all[s3]'" in done.stderr


def test_command_line_works_outside_a_checkout(complete: Fresh):
    assert complete.run("one4all", "--version").stdout.startswith("one4all ")
    printed = complete.run("one4all", "config", "protect")
    assert yaml.safe_load(printed.stdout)["protector"] == ""
    (complete.folder / "settings.yaml").write_text(printed.stdout, "utf-8")
    (complete.folder / "in").mkdir()
    shard = make_tar([("a.jpg", make_image()), ("a.cls", b"1"), ("b.png", make_image("PNG"))])
    (complete.folder / "in" / "shard.tar").write_bytes(shard)
    done = complete.run("one4all", "protect", "in", "out", "--config", "settings.yaml")
    assert done.stdout == "1 of 1 shards protected (1 now, 2 images); 0 bad images\n", done.stderr
    assert complete.run("one4all", "verify", "in", "out").returncode == 0


def test_demo_begins_outside_a_checkout(complete: Fresh):
    """Until photos are protected on S3: they are packed, and a protector is fitted to them.

    What follows is the same code wherever it is started, and takes minutes.
    """
    process = complete.start("one4all", "demo")
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if "verifying" in line:
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert "verifying" in said[-1], f"{''.join(said)}{errors}"
    assert process.returncode == 130, errors
    assert (complete.folder / "runs" / "demo" / "corpora").is_dir()
