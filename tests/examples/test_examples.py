"""The examples, run as a user runs them, on small inputs."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image
from support.builders import make_image, write_corpus

import one4all

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.slow  # each loads an encoder


@pytest.fixture
def run(monkeypatch, protector_folder):
    """Run an example in this process, with a tiny protector; its exit code."""

    def run(name: str, *arguments: object) -> int:
        words = [name, *map(str, arguments), "--protector", str(protector_folder)]
        monkeypatch.setattr(sys, "argv", words)
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return run


def write_photos(folder: Path, count: int) -> Path:
    """Photos of several formats, in a flat folder."""
    folder.mkdir()
    for index in range(count):
        format, suffix = (("JPEG", "jpg"), ("PNG", "png"))[index % 2]
        (folder / f"photo-{index}.{suffix}").write_bytes(make_image(format, seed=index))
    return folder


def read_image(path: Path) -> Image.Image:
    """An image that keeps no file open."""
    return Image.open(io.BytesIO(path.read_bytes()))


def largest_difference(clean: Path, protected: Path) -> int:
    first, second = (np.asarray(read_image(path), dtype=int) for path in (clean, protected))
    assert first.shape == second.shape
    return int(np.abs(first - second).max())


# One image


def test_one_image_is_protected_within_the_budget_and_keeps_its_metadata(run, tmp_path):
    exif = Image.Exif()
    exif[0x8298] = "Copyright Ann"
    (tmp_path / "photo.png").write_bytes(make_image("PNG", exif=exif))
    assert run("one_image.py", tmp_path / "photo.png", tmp_path / "protected.png") == 0
    assert 0 < largest_difference(tmp_path / "photo.png", tmp_path / "protected.png") <= 8
    assert read_image(tmp_path / "protected.png").getexif()[0x8298] == "Copyright Ann"


# A folder


def test_a_folder_keeps_its_names_and_formats(run, tmp_path, capsys):
    photos = write_photos(tmp_path / "photos", 11)  # more than one batch
    (photos / ".hidden").write_text("left alone")
    assert run("folder.py", photos, tmp_path / "protected") == 0
    assert capsys.readouterr().out == "11 of 11 images protected\n"
    written = {path.name: path for path in (tmp_path / "protected").iterdir()}
    assert written.keys() == {path.name for path in photos.iterdir()} - {".hidden"}
    for name, path in written.items():
        assert read_image(path).format == read_image(photos / name).format
        if path.suffix == ".png":
            assert 0 < largest_difference(photos / name, path) <= 8


def test_a_bad_image_is_named_and_does_not_stop_the_others(run, tmp_path, capsys):
    photos = write_photos(tmp_path / "photos", 3)
    (photos / "broken.jpg").write_bytes(make_image()[:200])
    (photos / "notes.txt").write_text("no image at all")
    assert run("folder.py", photos, tmp_path / "protected") == 1
    said = capsys.readouterr()
    assert said.out == "3 of 5 images protected\n"
    named = [line.split(": ")[:2] for line in said.err.splitlines()]
    assert named == [["not protected", "broken.jpg"], ["not protected", "notes.txt"]]
    written = sorted(path.name for path in (tmp_path / "protected").iterdir())
    assert written == ["photo-0.jpg", "photo-1.png", "photo-2.jpg"]


def test_a_killed_write_leaves_no_half_image(tmp_path, monkeypatch):
    example = runpy.run_path(str(EXAMPLES / "folder.py"))
    (tmp_path / "photo.jpg").write_bytes(b"whole, of an earlier run")

    def killed(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        example["write_whole"](tmp_path / "photo.jpg", b"whole, of this run")
    assert (tmp_path / "photo.jpg").read_bytes() == b"whole, of an earlier run"


@pytest.mark.parametrize("destination", ["photos", "photos/../photos"])
def test_a_folder_is_never_protected_onto_itself(run, tmp_path, capsys, destination):
    photos = write_photos(tmp_path / "photos", 1)
    assert run("folder.py", photos, tmp_path / destination) == 2
    assert "choose another folder" in capsys.readouterr().err


def test_a_user_runs_it_with_the_shipped_protector(tmp_path):
    """In a process of its own, from another folder, with nothing but the documented command."""
    write_photos(tmp_path / "photos", 2)
    ran = subprocess.run(
        [sys.executable, EXAMPLES / "folder.py", "photos", "protected"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ran.returncode, ran.stdout) == (0, "2 of 2 images protected\n"), ran.stderr
    clean = (tmp_path / "photos/photo-1.png").read_bytes()
    expected = one4all.load("default").protect_file(clean)
    assert (tmp_path / "protected/photo-1.png").read_bytes() == expected


# One shard


def test_one_shard_of_a_corpus_is_rewritten_and_its_manifest_printed(run, tmp_path, capsys):
    write_corpus(tmp_path / "in", num_shards=2, num_samples=3)
    assert run("one_shard.py", tmp_path / "in", tmp_path / "out", "shard-001.tar") == 0
    manifest = json.loads(capsys.readouterr().out)
    assert (manifest["name"], manifest["num_protected"]) == ("shard-001.tar", 3)
    tars = [path.name for path in (tmp_path / "out").rglob("*.tar")]
    assert tars == ["shard-001.tar"]


def test_a_shard_that_is_not_there_or_damaged_is_named(run, tmp_path, capsys):
    write_corpus(tmp_path / "in", num_shards=1)
    assert run("one_shard.py", tmp_path / "in", tmp_path / "out", "other.tar") == 2
    assert "has no shard other.tar, only shard-000.tar" in capsys.readouterr().err
    shard = tmp_path / "in/shard-000.tar"
    shard.write_bytes(shard.read_bytes()[:1000])
    assert run("one_shard.py", tmp_path / "in", tmp_path / "out", "shard-000.tar") == 1
    assert capsys.readouterr().err.startswith("not protected: shard-000.tar: ")
    assert not list((tmp_path / "out").rglob("*.tar"))


# Spark


def test_a_spark_task_protects_its_shards_and_goes_on_after_a_bad_one(tmp_path, protector_folder):
    """What runs in a task is a plain function; Spark itself is in the next test."""
    write_corpus(tmp_path / "in", num_shards=3, num_samples=2)
    (tmp_path / "in/shard-001.tar").write_bytes(b"garbage" * 100)
    protect_units = runpy.run_path(str(EXAMPLES / "spark.py"))["protect_units"]
    units = one4all.list_units(one4all.open_storage(str(tmp_path / "in")))
    places = (str(tmp_path / "in"), str(tmp_path / "out"), str(protector_folder))
    rows = list(protect_units(units, *places))
    assert [(row["name"], row["protected"], bool(row["error"])) for row in rows] == [
        ("shard-000.tar", 2, False),
        ("shard-001.tar", 0, True),
        ("shard-002.tar", 2, False),
    ]
    written = sorted(path.name for path in (tmp_path / "out").glob("*.tar"))
    assert written == ["shard-000.tar", "shard-002.tar"]


@pytest.mark.skipif(
    importlib.util.find_spec("pyspark") is None or shutil.which("java") is None,
    reason="needs pip install pyspark, and Java 17 or newer",
)
def test_spark_protects_a_corpus(tmp_path, protector_folder):
    write_corpus(tmp_path / "in", num_shards=3, num_samples=2)
    command = [sys.executable, EXAMPLES / "spark.py", "in", "out", "--partitions", "2"]
    ran = subprocess.run(
        [*command, "--protector", protector_folder],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        f"shard-00{index}.tar: 2 images protected, 0 bad" for index in range(3)
    ]
    written = sorted(path.name for path in (tmp_path / "out").glob("*.tar"))
    assert written == ["shard-000.tar", "shard-001.tar", "shard-002.tar"]


# The notebook


@pytest.mark.timeout(900)  # a kernel of its own, on a machine that may be busy
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Jupyter's own packages
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    from nbclient import NotebookClient

    notebook = nbformat.read(EXAMPLES / "codebook.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 3
    printed = "".join(
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.output_type == "stream" and output.name == "stdout"
    )
    largest = re.search(r"largest difference: (\d+) levels", printed)
    assert largest, printed
    assert 1 <= int(largest[1]) <= 8
