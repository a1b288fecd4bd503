"""The contact sheet of `one4all preview`."""

import sys

from PIL import Image
from support.builders import make_image
from typer.testing import CliRunner

from one4all.images import decode
from one4all.protectors.protector import Protector
from one4all.visibility import visibility
from pipelines import preview as module
from pipelines.cli.app import app


def test_caption_says_how_visible_it_is(tmp_path, protector_folder, monkeypatch):
    (tmp_path / "a.png").write_bytes(make_image("PNG"))
    rows = []
    draw = module.contact_sheet
    monkeypatch.setattr(module, "contact_sheet", lambda r: rows.extend(r) or draw(r))
    words = ["preview", str(tmp_path / "a.png"), str(tmp_path / "sheet.png")]
    words += ["--protector", str(protector_folder)]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.stdout == f"1 images drawn to {tmp_path / 'sheet.png'}\n"
    clean = decode(make_image("PNG")).pixels
    [protected] = Protector.load(str(protector_folder)).protect([clean])
    assert rows[0][0] == f"a.png: {visibility(clean, protected)}"
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > clean.shape[0]

    monkeypatch.setitem(sys.modules, "flip_evaluator", None)
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert "note: visibility was not measured: pip install 'one4all[visibility]'" in done.stdout
    assert rows[1][0] == "a.png"
