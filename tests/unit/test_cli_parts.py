"""What a log file gets to see."""

import pytest

from pipelines.cli import terminal as cli_parts
from pipelines.cli.terminal import Progress, in_words, size_in_words


def test_progress_in_a_log_file_is_plain_lines(monkeypatch, capsys):
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr(cli_parts.time, "monotonic", lambda: float(next(clock)))
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
