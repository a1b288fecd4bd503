"""An evaluation through Ray: resumed, reused, and honest about what failed."""

import json

import pytest
from support.builders import make_samples, make_tar

from one4all.visibility import IDENTICAL
from pipelines.evaluation.diagnose import diagnose_copies
from pipelines.evaluation.job import evaluate, report
from pipelines.evaluation.trials import EvaluateConfig

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.fixture
def config(tmp_path) -> EvaluateConfig:
    for split, seed in (("train", 0), ("test", 1000)):
        (tmp_path / split).mkdir()
        samples = make_samples(40, seed=seed)
        (tmp_path / split / "s.tar").write_bytes(make_tar(samples))
    adversary = {"width": 8, "epochs": 1, "batch_size": 8}
    return EvaluateConfig.model_validate(
        {
            "output": str(tmp_path / "out"),
            "data": {
                "d": {
                    "train": str(tmp_path / "train"),
                    "test": str(tmp_path / "test"),
                    "size": 32,
                    "class_names": ["cat", "dog", "car"],
                }
            },
            "encoder": {"input_size": 32},
            "diagnose": ["lsp"],
            "grids": [
                {
                    "title": "T",
                    "data": ["d"],
                    "methods": ["clean", "lsp"],
                    "labels": ["own", "clusters-2"],
                    "adversaries": {"a": adversary},
                    "seeds": [0, 1],
                }
            ],
        }
    )


def test_finished_trials_are_never_run_again(tmp_path, config):
    first = evaluate(config, command="test")
    assert (first.num_new, first.failed) == (8, {})
    again = evaluate(config, command="test")
    assert (again.num_new, len(again.records)) == (0, 8)
    assert again.records == first.records
    some = sorted((tmp_path / "out" / "trials").iterdir())
    some[0].unlink()
    some[1].write_text("garbage")
    third = evaluate(config, command="another")
    assert third.num_new == 2
    for key, record in third.records.items():
        kept = first.records[key]
        assert record.outcome.curve == kept.outcome.curve  # deterministic
    assert {r.environment.command for r in third.records.values()} == {"test", "another"}
    assert len(next(iter(first.records.values())).outcome.confusion) == 3
    assert all(copy.max_levels <= 8 for copy in third.copies.values())
    assert len(third.copies) == 2
    clean, lsp = sorted((c.visibility for c in third.copies.values()), key=lambda s: s.mean.flip)
    assert (clean.num_images, clean.worst) == (lsp.num_images, IDENTICAL)
    assert lsp.num_images == 24
    assert 0 < lsp.mean.flip <= lsp.worst.flip < 1


def test_copy_that_is_made_again_gets_the_visibility_its_old_record_lacks(tmp_path, config):
    grid = config.grids[0].model_dump() | {"labels": ("own",), "seeds": (0,), "methods": ("lsp",)}
    config = EvaluateConfig.model_validate(config.model_dump() | {"grids": [grid]})
    evaluate(config, command="test")
    [record] = (tmp_path / "out" / "copies").iterdir()
    old = json.loads(record.read_text())
    assert old.pop("visibility")["num_images"] == 24
    record.write_text(json.dumps(old))
    report(config, evaluate(config, command="test"))
    assert "| lsp | d | itself | 8 | 8 |" in (tmp_path / "out" / "results.md").read_text()
    [trial] = (tmp_path / "out" / "trials").iterdir()
    trial.unlink()
    evaluate(config, command="test")
    assert json.loads(record.read_text())["visibility"]["num_images"] == 24


def test_what_is_being_made_is_said_before_the_first_trial_ends(config):
    news, epochs = [], []
    evaluate(
        config,
        command="test",
        on_plan=lambda todo, num_trials: news.append(f"{len(todo)} of {num_trials}"),
        on_epoch=epochs.append,
        on_trial=lambda trial, record: news.append("trial"),
        say=news.append,
    )
    before = news[: news.index("trial")]
    assert before[:3] == ["8 of 8", "starting Ray", "reading data set: d"]
    assert before[3].startswith("data set read: d, 40 images to train on and 40 to test on, 3 cl")
    assert "making copy: clean on d" in before
    assert any(line.startswith("copy made: clean on d, ") for line in news)
    assert any(line.startswith("copy made: lsp on d, ") for line in news)
    assert "making copy: lsp on d" in news
    assert len(epochs) == 8
    assert sum(line.startswith("lsp, on d, a, seed 1: epoch 1 of 1, ") for line in epochs) == 2


def test_report_has_tables_curves_of_clusters_and_diagnoses(tmp_path, config):
    result = evaluate(config, command="test")
    done = []
    sections = diagnose_copies(config, say=done.append)
    assert done == ["diagnosed: lsp on d"]
    assert diagnose_copies(config, say=lambda line: pytest.fail("done before"))
    printed = report(config, result, diagnoses=sections)
    assert "| lsp |" in printed
    html = (tmp_path / "out" / "report.html").read_text()
    for heading in ("<h2>T</h2>", "Clusters of class names", "Perturbations on d", "Copies"):
        assert heading in html
    assert html.count("data:image/png;base64") >= 5


def test_one_failure_does_not_stop_the_rest(tmp_path, config):
    grid = config.grids[0].model_dump() | {"labels": ("own",), "seeds": (0,)}
    grid["methods"] = [
        "clean",
        {"method": "corpus", "config": {"corpus": str(tmp_path / "nowhere")}},
    ]
    failing = EvaluateConfig.model_validate(config.model_dump() | {"grids": [grid]})
    result = evaluate(failing, command="test")
    assert result.num_new == 1
    assert list(result.failed) == ["corpus, on d, a, seed 0"]
    assert "nowhere" in next(iter(result.failed.values()))
    assert json.loads((tmp_path / "out" / "trials").iterdir().__next__().read_text())["title"]
