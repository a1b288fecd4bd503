"""The command line: its verbs, what they print, and what a log file gets to see."""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import pytest
import typer
import yaml
from pydantic import BaseModel, Field
from typer.testing import CliRunner

from one4all.audit import ImageDistances, UnitAudit
from one4all.errors import UsageError
from one4all.visibility import Visibility
from pipelines import verify as verifying
from pipelines.cli import terminal
from pipelines.cli.app import app
from pipelines.cli.learning import training_note
from pipelines.cli.operating import VERBS_WITH_SETTINGS, default_settings, parse
from pipelines.cli.settings_file import meanings, settings_yaml
from pipelines.cli.terminal import Progress, in_words, size_in_words
from pipelines.settings import load_config
from pipelines.verify import Verification

VERBS = typer.main.get_command(app)
QUICK = Path(__file__).parents[2] / "configs" / "evaluate" / "quick.yaml"


def one4all(*words: str) -> str:
    """What a verb prints that succeeds."""
    done = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_version_is_that_of_the_distribution():
    assert one4all("--version") == f"one4all {version('one4all')}\n"


def test_completion_offers_the_verbs():
    environment = {
        "_ONE4ALL_COMPLETE": "complete_bash",
        "COMP_WORDS": "one4all p",
        "COMP_CWORD": "1",
    }
    done = CliRunner().invoke(app, [], prog_name="one4all", env=environment)
    assert {"protect", "pack", "preview", "plan"} == set(done.stdout.split())


# `one4all config`


@pytest.mark.parametrize("verb", VERBS_WITH_SETTINGS)
def test_printed_settings_load_back(verb, tmp_path):
    defaults = default_settings(verb)
    path = tmp_path / "settings.yaml"
    path.write_text(one4all("config", verb), "utf-8")
    assert load_config(type(defaults), path) == defaults
    assert yaml.safe_load(path.read_text("utf-8")).keys() == type(defaults).model_fields.keys()


def models_in(value):
    """The models of a configuration, the outermost first."""
    if isinstance(value, BaseModel):
        yield value
        for key in type(value).model_fields:
            yield from models_in(getattr(value, key))
    elif isinstance(value, dict | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from models_in(inner)


@pytest.mark.parametrize("verb", VERBS_WITH_SETTINGS)
def test_every_key_has_a_meaning(verb):
    for model in {type(found) for found in models_in(default_settings(verb))}:
        silent = model.model_fields.keys() - meanings(model).keys()
        assert not silent, f"keys without a line in the Attributes of {model.__name__}"


class Inner(BaseModel):
    """What is inside.

    Attributes:
        rate, decay: Of Adam: ``1e-4`` is usual, and
            needs two lines.
    """

    rate: float = Field(1e-5, gt=0, le=1)
    decay: float = 0.0


class Base(BaseModel):
    """A base.

    Attributes:
        name: Of the base.
        size: Side in pixels.
    """

    name: str = "yes: no"
    size: int = Field(0, ge=0)


class Outer(Base):
    """Settings.

    Attributes:
        name: Replaces the base's.
        parts: Some.
        only: Must be given.

    Not an attribute: this.
    """

    name: str = "null"
    mode: Literal["a", "b"] | None = None
    inner: Inner = Inner()
    parts: tuple[Inner, ...] = (Inner(), Inner(rate=1))
    by_name: dict[str, Inner] = {"on: off": Inner()}
    empty: dict[str, Inner] = {}
    numbers: tuple[int, ...] = ()
    only: str


def test_settings_as_yaml_say_meaning_kind_and_bounds():
    text = settings_yaml(Outer(only="x"))
    assert Outer.model_validate(yaml.safe_load(text)) == Outer(only="x")
    lines = text.splitlines()
    assert lines[:2] == ["# Replaces the base's. (text)", "name: 'null'"]
    assert "# Side in pixels. (whole number, at least 0)" in lines
    assert "# (one of: a, b or null)" in lines
    assert "# What is inside." in lines
    assert "# Must be given. Required: what stands here is an example. (text)" in lines
    about_rate = "# Of Adam: `1e-4` is usual, and needs two lines. (number, more than 0, at most 1)"
    # Inside `inner`, the first of `parts`, and `by_name`: what follows is not explained again.
    assert [line.strip() for line in lines].count(about_rate) == 2
    assert f"  - {about_rate}" in lines
    assert "    decay: 0.0" in lines


def test_verb_without_settings_is_told_which_have_some():
    done = CliRunner().invoke(app, ["config", "status"])
    assert done.exit_code == 2
    assert "'status' has no settings, only protect, verify" in done.output


# `one4all verify --per-image`


@pytest.mark.parametrize("there", [True, False], ids=["installed", "missing"])
def test_visibility_is_measured_for_each_image_or_said_to_be_missing(monkeypatch, tmp_path, there):
    distances = ImageDistances("a.png", 8, 31.0, 0.99, Visibility(4, 0.1, 75) if there else None)
    audit = UnitAudit("s.tar", images=[distances])
    asked = []

    def audit_nothing(source, destination, config, *, on_plan, on_audit):
        on_plan(1)
        asked.append(config.visibility)
        result = Verification(source, destination, "match", 8)
        result.add(audit)
        on_audit(audit)
        return result

    monkeypatch.setattr(verifying, "verify", audit_nothing)
    if not there:
        monkeypatch.setitem(sys.modules, "ssimulacra2", None)
    lines = tmp_path / "images.jsonl"
    seen = one4all("verify", "in", "out", "--per-image", str(lines))
    assert ("  CIEDE2000 4.0 (4.0), FLIP 0.100 (0.100), SSIMULACRA2 75.0 (75.0)" in seen) == there
    assert ("visibility was not measured: pip install 'one4all[visibility]'" in seen) != there
    one4all("verify", "in", "out")
    assert asked == [there, False]
    measured = {"ciede2000": 4, "flip": 0.1, "ssimulacra2": 75} if there else {}
    expected = {"shard": "s.tar", "member": "a.png", "max_levels": 8, "psnr_db": 31.0, "ssim": 0.99}
    assert json.loads(lines.read_text()) == expected | measured


# `one4all plan`, and how it was spelt before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["plan", "in", "--workers", "3"], ["plan", "protect", "in", "--workers", "3"]),
        (["plan", "--json", "in"], ["plan", "protect", "--json", "in"]),
    ],
)
def test_plan_of_a_source_is_a_plan_of_protect(old, new):
    before, after = parse(VERBS, old), parse(VERBS, new)
    assert after.info_name == "protect"
    assert (before.info_name, before.params) == (after.info_name, after.params)


def test_dry_run_of_an_evaluation_is_its_plan():
    plan = one4all("plan", "evaluate", str(QUICK))
    assert "10 trials in all" in plan
    assert one4all("evaluate", str(QUICK), "--dry-run") == plan


@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_help_shows_one_spelling(verb):
    assert "--dry-run" not in one4all(verb, "--help")


def test_words_of_a_plan_need_a_plan():
    with pytest.raises(UsageError, match="for one4all plan train"):
        CliRunner().invoke(app, ["train", "in", "--num-images", "9"], catch_exceptions=False)


# On the terminal


def test_training_note_shows_whatever_the_objective_reports():
    entry = {
        "step": 20,
        "epoch": 1,
        "loss": 0.12345,
        "reading": 3.0,
        "learning_rate": 1e-4,
        "world_size": 2,
        "images_per_second": 41.27,
    }
    assert training_note(entry) == "loss 0.123 reading 3 41.3 images/s"


def test_progress_in_a_log_file_is_plain_lines(monkeypatch, capsys):
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: float(next(clock)))
    with Progress("shard") as progress:
        progress.start(12)
        for _ in range(11):
            progress.advance()
        progress.say("failed: a.tar: truncated")
        progress.advance(note="loss 0.5")
    errors = capsys.readouterr().err
    assert "\r" not in errors
    assert "\x1b" not in errors
    lines = errors.splitlines()
    assert lines[0] == "2 of 12 shards, 0.0333 a second, about 5 min left"
    assert "failed: a.tar: truncated" in lines
    assert lines[-1].startswith("12 of 12 shards")
    assert lines[-1].endswith("loss 0.5")


def test_progress_that_never_started_says_nothing(capsys):
    with Progress("shard"):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.5, "0.5 s"), (119, "119 s"), (600, "10 min"), (36_000, "10 h"), (864_000, "10.0 days")],
)
def test_durations_read_well(seconds, words):
    assert in_words(seconds) == words


def test_sizes_read_well():
    assert size_in_words(1_500_000) == "1.5 MB"
    assert size_in_words(2.5e12) == "2.50 TB"
