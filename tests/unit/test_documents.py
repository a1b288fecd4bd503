"""What the documents show exists: links, files, commands, targets of make."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from pipelines.cli.app import app
from pipelines.cli.operating import parse

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "examples/README.md",
    ROOT / "cluster/README.md",
]
VERBS = typer.main.get_command(app)

document = pytest.mark.parametrize(
    "path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix()
)


def text_of(path: Path) -> str:
    return path.read_text("utf-8")


def prose_of(path: Path) -> str:
    """A document without its code blocks."""
    return re.sub(r"^ {4}.*$", "", text_of(path), flags=re.MULTILINE)


def anchors_of(path: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose_of(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands_of(text: str) -> list[str]:
    """Commands of one4all in code blocks; a line that ends with a backslash goes on."""
    blocks = text.replace("\\\n", " ")
    return re.findall(r"^ {4,}(one4all (?!--)[a-z][^#\n]*)", blocks, re.MULTILINE)


@document
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", prose_of(path))
    for link in (a or b for a, b in links):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors_of(target), link


@document
def test_files_that_are_named_exist(path):
    """Paths from the root of the repository, in code quotes."""
    rooms = r"one4all|pipelines|tests|configs|examples|cluster|docs|tools"
    for name in re.findall(rf"`((?:{rooms})/[\w./-]+)`", prose_of(path)):
        if "NAME" not in name:
            assert (ROOT / name).exists(), name


@document
def test_commands_exist(path):
    for command in commands_of(text_of(path)):
        words = shlex.split(command)[1:]
        if words[-1] == "...":  # more of the same
            words = words[:-1]
        parse(VERBS, words)


def test_commands_that_do_not_exist_are_found():
    text = "    one4all portect a b      # no such verb\n    one4all verify in out \\\n  --jsn\n"
    first, second = commands_of(text)
    with pytest.raises(Exception, match="No such command"):
        parse(VERBS, shlex.split(first)[1:])
    with pytest.raises(Exception, match="No such option"):
        parse(VERBS, shlex.split(second)[1:])


@document
def test_targets_of_make_exist(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^ {4}|`)make ([a-z-]+)", text_of(path), re.MULTILINE))
    assert named <= targets


def test_the_readme_is_a_door():
    assert len(text_of(ROOT / "README.md").splitlines()) <= 120


def test_the_index_has_every_document():
    index = text_of(ROOT / "docs/README.md")
    for path in sorted((ROOT / "docs").glob("*.md")):
        assert path.name == "README.md" or f"({path.name})" in index, path.name


def test_the_architecture_has_every_room():
    tree = text_of(ROOT / "docs/architecture.md").partition("## The tree")[2]
    for package in ("one4all", "pipelines"):
        for path in (ROOT / package).iterdir():
            is_room = path.is_dir() and any(path.glob("*.py"))
            if is_room:
                assert f" {path.name}/" in tree, path
            elif path.suffix == ".py" and not path.name.startswith("_"):
                assert f" {path.name}" in tree, path


def test_every_example_is_in_the_list_of_examples():
    listed = text_of(ROOT / "examples/README.md")
    for path in (ROOT / "examples").iterdir():
        if path.suffix in (".py", ".ipynb"):
            assert path.name in listed, path.name
