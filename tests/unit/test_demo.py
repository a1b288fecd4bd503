"""The demo on photos of one's own: what it trains and tests on."""

from pathlib import Path

import pytest
from support.builders import make_image

from one4all.errors import ShardError, UsageError
from one4all.evaluation.labelled import read_corpus
from pipelines.demo import photos
from pipelines.demo.job import _training_config
from pipelines.demo.report import FITTED, SHIPPED, summarise
from pipelines.evaluation.report import Cell, Table
from pipelines.evaluation.trials import GridConfig, MethodConfig


def folder_of(root, counts: dict[str, int]) -> str:
    for name, count in counts.items():
        (root / name).mkdir()
        for index in range(count):
            (root / name / f"{index}.png").write_bytes(make_image(seed=index))
    return str(root)


def test_every_fifth_photo_of_a_class_is_held_out_for_the_test(tmp_path):
    material = photos(folder_of(tmp_path, {"cat": 12, "dog": 5, "rare": 4}))
    keys = {split: [image.key for image in material.images(split)] for split in ("train", "test")}
    assert len(keys["test"]) == 3
    assert {key.partition("/")[0] for key in keys["test"]} == {"cat", "dog"}
    assert len(set(keys["train"]) | set(keys["test"])) == len(keys["train"]) + 3 == 21


@pytest.mark.parametrize("counts", [{"cat": 20}, {"cat": 20, "dog": 4}])
def test_photos_of_one_class_are_refused_before_anything_starts(tmp_path, counts):
    with pytest.raises(UsageError, match="fewer than two classes of 5 photos or more"):
        photos(folder_of(tmp_path, counts))


def test_photo_that_cannot_be_read_is_named(tmp_path):
    folder = folder_of(tmp_path, {"cat": 5, "dog": 5})
    (tmp_path / "dog" / "2.png").write_bytes(b"garbage")
    images = photos(folder).images("train")
    with pytest.raises(ShardError, match="mine: sample 'dog/2': not an image file"):
        read_corpus(images, "mine", size=8)


def test_settings_of_the_training_need_no_file_beside_the_package(tmp_path, monkeypatch):
    """An installed package has no configs/ beside it."""
    for name in ("open", "read_text", "read_bytes"):
        monkeypatch.setattr(Path, name, lambda path, *_, **__: pytest.fail(f"reads {path}"))
    config = _training_config(tmp_path)
    assert config.source == str(tmp_path / "corpora" / "emoji-things" / "train")
    assert config.steps * config.batch_size * config.max_workers < 2000  # minutes on a CPU


@pytest.mark.parametrize(
    ("fitted", "oracle", "verdict"),
    [
        ((0.2, 0.2, 0.2), (0.1, 0.1, 0.1), f"; the {FITTED} protects."),
        ((0.5, 0.5, 0.5), (0.1, 0.1, 0.1), f"; the {FITTED} has a weak effect, which is no "),
        ((0.2, 0.2), (0.1, 0.1, 0.1), f"; the {FITTED} was tried too few times to tell."),
        ((0.2, 0.2, 0.2), (0.5, 0.5, 0.5), "Inconclusive: even the positive control does not"),
    ],
)
def test_summary_claims_what_the_table_shows(fitted, oracle, verdict):
    stored = {"method": "corpus", "config": {"corpus": "x"}}
    methods = (
        MethodConfig(method="clean"),
        *(MethodConfig(title=title, **stored) for title in (SHIPPED, FITTED)),
        MethodConfig(method="class_oracle"),
    )
    seeds = {"clean": (0.6, 0.61, 0.6), SHIPPED: (0.6, 0.6, 0.6), FITTED: fitted}
    cells = {
        (row, "c"): Cell(last=last) for row, last in (seeds | {"class_oracle": oracle}).items()
    }
    grid = GridConfig(title="T", data=("c",), methods=methods)
    table = Table(grid, [method.name for method in methods], ["c"], cells)
    summary = summarise(table)
    assert verdict in summary
    assert "Test accuracy in %: clean 60.3" in summary
