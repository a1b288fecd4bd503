"""The demo: what it trains and tests on, what it shows and what it claims."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.builders import make_image, make_tar

from one4all.errors import ShardError, UsageError
from one4all.evaluation.labelled import read_corpus
from one4all.visibility import NOT_INSTALLED, measurable
from pipelines.demo import embedded_photos, photos
from pipelines.demo.job import _evaluation_config, _train, _training_config
from pipelines.demo.looks import looks_section
from pipelines.demo.report import DISCREET, STRONG, summarise
from pipelines.evaluation.report import ORACLE, Cell, Table
from pipelines.evaluation.trials import GridConfig, MethodConfig
from pipelines.train.progress import CURVES_FILE


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
    config = _training_config(tmp_path, "source")
    assert config.source == "source"
    assert config.steps * config.batch_size * config.max_workers < 2000  # minutes on a CPU


def test_generator_is_trained_on_the_embedded_photos_whatever_is_protected(tmp_path, monkeypatch):
    """A folder of a few photos of one's own may hold less than a batch."""

    def two_steps(config, *, command, on_metrics):
        assert len(images_at(config.source)) > config.num_workers * config.batch_size
        names = ("l1", "l2", "cosine_own", "cosine_opposite", "opposite_entropy")
        (tmp_path / "train").mkdir()
        (tmp_path / "train" / CURVES_FILE).write_bytes(make_image("PNG"))
        on_metrics({"step": 1, **dict.fromkeys(names, 0.25)})
        on_metrics({"step": config.steps, **dict.fromkeys(names, 0.75)})

    monkeypatch.setattr("pipelines.demo.job.train", two_steps)
    said = []
    section = _train(tmp_path, said.append)
    assert said == ["training a generator: 120 steps, 2 Ray Train workers"]
    assert section.table[1][1:3] == ("0.250", "0.750")


def images_at(source):
    with tarfile.open(next(Path(source).glob("*.tar"))) as shard:
        return [name for name in shard.getnames() if name.endswith(".jpg")]


def test_embedded_photos_are_what_is_protected_by_default(tmp_path):
    material = embedded_photos()
    assert {next(iter(material.images(split))).extension for split in ("train", "test")} == {"jpg"}
    config = _evaluation_config(tmp_path, material, {})
    assert config.grids[0].seeds == (0, 1, 2)  # as many as a verdict needs
    assert config.grids[0].methods[-1].method == ORACLE


@pytest.mark.parametrize(
    ("strong", "oracle", "verdict"),
    [
        ((0.2, 0.2, 0.2), (0.1, 0.1, 0.1), f"{DISCREET} has NO effect; {STRONG} protects."),
        ((0.5, 0.5, 0.5), (0.1, 0.1, 0.1), f"; {STRONG} has a weak effect, which is no "),
        ((0.2, 0.2, 0.2), (0.5, 0.5, 0.5), "Inconclusive: even the positive control does not"),
        ((0.2, 0.2), (0.1, 0.1, 0.1), "Only 2 seeds of 3: an indication, not evidence."),
        ((0.2,), (0.1,), "One seed: an indication, not evidence."),
    ],
)
def test_summary_claims_what_the_table_shows(strong, oracle, verdict):
    num_seeds = len(strong)
    seeds = {"clean": (0.6, 0.61, 0.6), DISCREET: (0.6, 0.6, 0.6), STRONG: strong, ORACLE: oracle}
    table = table_of({row: last[:num_seeds] for row, last in seeds.items()})
    summary = summarise(table)
    assert verdict in summary
    share = round(100 * np.mean(strong) / np.mean(seeds["clean"][:num_seeds]))
    assert f"Of clean accuracy, {table.cell('clean', 'c')} %, is left: {DISCREET} " in summary
    assert f"{STRONG} {share} %, {ORACLE} " in summary


def test_summary_of_an_adversary_that_learnt_nothing_has_no_shares():
    rows = {"clean": (0.0,), DISCREET: (0.5,), STRONG: (0.0,), ORACLE: (0.0,)}
    assert summarise(table_of(rows)).endswith(
        f"is left: {DISCREET} - %, {STRONG} - %, {ORACLE} - %."
    )


def table_of(seeds: dict[str, tuple[float, ...]]) -> Table:
    stored = {"method": "corpus", "config": {"corpus": "x"}}
    methods = tuple(
        MethodConfig(title=row, **stored) if row in (DISCREET, STRONG) else MethodConfig(method=row)
        for row in seeds
    )
    cells = {(row, "c"): Cell(last=last) for row, last in seeds.items()}
    return Table(GridConfig(title="T", data=("c",), methods=methods), list(seeds), ["c"], cells)


def test_photos_stand_beside_their_protected_copies_at_real_size(tmp_path):
    clean = [Image.fromarray(np.full((40, 60, 3), 40 * n, np.uint8)) for n in range(5)]
    uris = {}
    for title, added in (("clean", 0), (DISCREET, 2), (STRONG, 8)):
        members = []
        for number, image in enumerate(clean):
            file = io.BytesIO()
            Image.fromarray(np.asarray(image) + np.uint8(added)).save(file, "PNG")
            members += [(f"{number}.png", file.getvalue()), (f"{number}.cls", b"0")]
        (tmp_path / title).mkdir()
        (tmp_path / title / "a.tar").write_bytes(make_tar(members))
        uris[title] = str(tmp_path / title)
    source = uris.pop("clean")
    section, seen = looks_section(source, uris, num_images=5)
    [first, *_] = section.gallery
    assert [caption.partition("\n")[0] for caption, _ in first[:3]] == ["clean", DISCREET, STRONG]
    shown = [np.asarray(Image.open(io.BytesIO(png))) for _, png in first[:3]]
    assert [picture.shape for picture in shown] == [(40, 60, 3)] * 3
    assert [int(picture[0, 0, 0]) - int(shown[0][0, 0, 0]) for picture in shown] == [0, 2, 8]
    assert sum(len(row) for row in section.gallery) == 5 * 3
    if measurable():
        assert seen[STRONG].mean.ciede2000 > seen[DISCREET].mean.ciede2000 > 0
        assert "SSIMULACRA2" in first[1][0]


def test_of_a_large_photo_the_middle_is_shown_and_measured(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (900, 700)).save(file, "PNG")
    (tmp_path / "a.tar").write_bytes(make_tar([("0.png", file.getvalue()), ("0.cls", b"0")]))
    section, seen = looks_section(str(tmp_path), {DISCREET: str(tmp_path)}, num_images=1)
    for _, png in section.gallery[0]:
        assert Image.open(io.BytesIO(png)).size == (300, 300)
    if measurable():
        assert seen[DISCREET].mean.ciede2000 == 0


def test_photos_are_shown_where_visibility_cannot_be_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.demo.looks.measurable", lambda: False)
    (tmp_path / "a.tar").write_bytes(make_tar([("0.png", make_image("PNG")), ("0.cls", b"0")]))
    section, seen = looks_section(str(tmp_path), {DISCREET: str(tmp_path)}, num_images=1)
    assert [[caption for caption, _ in row] for row in section.gallery] == [["clean", DISCREET]]
    assert not seen
    assert NOT_INSTALLED in section.text
