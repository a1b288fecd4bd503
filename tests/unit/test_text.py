"""Names come with data: what is in them is shown, and never obeyed."""

import ast
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from one4all import report
from one4all.text import drawn, shown
from pipelines.cli import terminal

ROOT = Path(__file__).parents[2]
HOSTILE = "a\x1b[2J\r\nall is well\u202e\udce9"
HARMLESS = r"a\x1b[2J\r\nall is well\u202e\xe9"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HOSTILE, HARMLESS),
        ("\0\x7f\x9b1m\u2028\ud800", r"\x00\x7f\x9b1m\u2028\ud800"),
        ("Müller 写真 👩‍💻 a\\b $x$ é", "Müller 写真 👩‍💻 a\\b $x$ é"),
    ],
    ids=["hostile", "odd", "names of this world"],
)
def test_control_characters_are_shown_and_all_else_is_kept(text, expected):
    assert shown(text) == expected
    assert shown("a\n\tb", keep="\n") == "a\n\\tb"


def test_one_function_prints():
    """Wherever the command line or a job prints, it is through `terminal`."""
    allowed = {"pipelines/cli/terminal.py", "pipelines/__main__.py"}
    found = {
        f"{path.relative_to(ROOT)}"
        for path in [*(ROOT / "pipelines").rglob("*.py"), *(ROOT / "one4all").rglob("*.py")]
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Name) and node.id == "print"
    }
    assert found <= allowed


@pytest.mark.fault("control characters in names")
def test_whatever_is_printed_is_harmless(capsys):
    terminal.show(HOSTILE, "b")
    terminal.show_text(f"one\n{HOSTILE}\n")
    terminal.show_json({"name": HOSTILE + "\x7f"})
    progress = terminal.Progress("shard")
    with progress:
        progress.start(2)
        progress.say(HOSTILE)
        progress.advance(1, HOSTILE)
    record = logging.LogRecord("x", logging.WARNING, "", 0, "%s", (HOSTILE,), None)
    logged = terminal.EscapedFormatter("%(levelname)s %(message)s").format(record)
    out, err = capsys.readouterr()
    assert out.startswith(f"{HARMLESS}\nb\none\n")
    assert json.loads(out[out.index("{") :]) == {"name": HOSTILE + "\x7f"}
    assert err.startswith(f"{HARMLESS}\n")
    assert err.count(HARMLESS) == 2
    assert logged == HARMLESS.replace(r"\n", "\n").join(["WARNING ", ""])
    assert not {"\x1b", "\x7f", "\r", "\udce9"} & set(out + err + logged)


@pytest.mark.fault("control characters in names")
def test_error_that_names_a_hostile_folder_is_harmless(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "verify", f"{tmp_path}/\x1b[2J\udce9", str(tmp_path)],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert rb"\x1b[2J\xe9" in done.stderr
    assert b"\x1b" not in done.stderr
    assert b"Traceback" not in done.stderr


NAMES = ("a", r"$\foo$", HOSTILE, "$5 and $6", "_x^2 #1 %", r"\$")


@pytest.mark.fault("names that are formulas to a plot")
@pytest.mark.parametrize(
    "plot",
    [
        lambda path: report.plot_confusion(np.eye(len(NAMES)), title=r"$\foo$", names=NAMES),
        lambda path: report.plot_accuracies(
            {name: [0.5] for name in NAMES}, chance=0.1, title=r"$\foo$"
        ),
        lambda path: report.plot_curves(
            {name: [(0, 1), (1, 2)] for name in NAMES if not name.startswith("_")},
            xlabel=r"$\foo$",
            ylabel=HOSTILE,
            title=r"$\foo$",
        ),
        lambda path: report.plot_loss_curves([{"step": 1, r"$\foo$": 1, HOSTILE: 2}], path),
        lambda path: report.sample_grid([(n, [np.zeros((4, 4, 3), np.uint8)]) for n in NAMES]),
        lambda path: report.contact_sheet([(n, *np.zeros((2, 4, 4, 3), np.uint8)) for n in NAMES]),
        lambda path: report.write_report(
            path, title=HOSTILE, summary="", sections=[report.Section(HOSTILE, table=[[HOSTILE]])]
        ),
    ],
    ids=["confusion", "accuracies", "curves", "losses", "grid", "sheet", "page"],
)
def test_no_name_breaks_a_picture(tmp_path, plot):
    plot(tmp_path / "picture")


def test_dollar_signs_are_drawn_as_they_are():
    from matplotlib.cbook import is_math_text
    from matplotlib.text import Text

    for name in (r"$\foo$", r"a\$b$", "$5 and $6", "plain"):
        assert not is_math_text(drawn(name))
        assert Text(text=drawn(name))._preprocess_math(drawn(name)) == (name, False)
