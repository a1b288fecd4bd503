"""Trials have names, tables have verdicts, and a verdict claims no more than its controls allow."""

import csv
from pathlib import Path

import numpy as np
import pytest
from support.builders import (
    TINY_ENCODER,
    make_image,
    make_pixels,
    make_protector,
    make_samples,
    make_tar,
)

from one4all.clustering import k_means
from one4all.encoders import backends, load_encoder
from one4all.errors import ConfigError, ShardError, UsageError
from one4all.evaluation.label_clusters import cluster_quality, merge_labels
from one4all.evaluation.labelled import LabelledImages, read_labelled
from one4all.evaluation.methods import embeddings
from one4all.evaluation.verdict import judge
from one4all.protectors.protector import Protector
from one4all.visibility import IDENTICAL, Visibility, VisibilitySummary
from pipelines.evaluation.copies import export_copies, load_data, make_copy, mix
from pipelines.evaluation.records import CopyRecord, Environment, Outcome, TrialRecord
from pipelines.evaluation.report import explain, fill_table, shares_of_clean, write_results
from pipelines.evaluation.trials import (
    DataConfig,
    EvaluateConfig,
    MethodConfig,
    all_trials,
    describe,
    grid_trials,
)
from pipelines.settings import load_config

CLEAN, NOISE, ORACLE = [0.66, 0.67, 0.65], [0.66, 0.65, 0.66], [0.2, 0.2, 0.2]
ROOT = Path(__file__).parent.parent.parent
CONFIGS = sorted((ROOT / "configs" / "evaluate").rglob("*.yaml"))


@pytest.mark.parametrize(
    ("protected", "oracle", "expected"),
    [
        ([0.65, 0.66, 0.66], ORACLE, "no effect"),
        ([0.30, 0.31, 0.29], ORACLE, "protects"),
        ([0.55, 0.56, 0.55], ORACLE, "weak effect"),
        ([0.30, 0.31, 0.29], [0.6, 0.6, 0.6], "oracle fails"),
        ([0.20, 0.66, 0.25], ORACLE, "no effect"),
        ([0.30, 0.31], ORACLE, "too few seeds"),
        ([0.30, 0.31], [0.6, 0.6, 0.6], "too few seeds"),
    ],
)
def test_verdict_claims_no_more_than_the_controls_allow(protected, oracle, expected):
    assert verdict_on(protected, oracle).verdict == expected


def verdict_on(protected, oracle=ORACLE, clean=CLEAN, **controls):
    return judge(protected, clean=clean, oracle=oracle, controls=controls or {"noise": NOISE})


def test_gap_that_a_control_shows_too_is_no_evidence():
    found = verdict_on([0.30, 0.31, 0.29], generator=[0.31, 0.30, 0.32])
    assert found.verdict == "no effect"
    assert found.reason == (
        "not far enough from generator: 1.0 points below generator, the rule is more than 2.0, "
        "twice the largest spread"
    )


@pytest.mark.parametrize(
    ("judgement", "reason"),
    [
        (verdict_on([0.3, 0.31], clean=CLEAN[:2], oracle=ORACLE[:2], a=NOISE[:2]), "two seeds;"),
        (verdict_on([0.3, 0.31, 0.3], clean=CLEAN[:1]), "one seed of clean images; a verdict"),
        (verdict_on([], a=[]), "no seeds of the method and a; a verdict needs three"),
        (verdict_on([0.42, 0.42, 0.42]), "63.6 % of clean accuracy, the rule is at most 60"),
        (verdict_on([0.33, 0.33, 0.33]), "50.0 % of clean accuracy, the rule is at most 60; 32.7"),
        (verdict_on([0.3, 0.3, 0.3], [0.6, 0.6, 0.6]), "even the class-wise oracle leaves 90.9 %"),
    ],
)
def test_verdict_says_which_condition_decided_it(judgement, reason):
    assert judgement.reason.startswith(reason)


def config_of(**grid) -> EvaluateConfig:
    methods = ["clean", "uniform_noise", {"method": "lsp"}, "class_oracle"]
    return EvaluateConfig.model_validate(
        {
            "data": {"a": {"train": "a", "test": "b", "size": 8}, "c": {"source": "emoji-nature"}},
            "grids": [{"title": "T", "data": ["a"], "methods": methods} | grid],
        }
    )


def records_of(
    config: EvaluateConfig, accuracies: dict[str, list[float]]
) -> dict[str, TrialRecord]:
    environment = Environment.here("test")
    return {
        trial.key: TrialRecord(
            trial=trial.identity,
            title=trial.title,
            outcome=Outcome(
                last=accuracies[trial.copy.method.name][trial.seed],
                peak=0.9,
                curve=(0.5, 0.9),
                majority=0.1,
                confusion=((3, 1), (0, 4)),
                seconds=1,
            ),
            environment=environment,
        )
        for trial in all_trials(config)
    }


def test_title_and_order_do_not_change_a_trials_key_and_everything_else_does():
    keys = {t.key for t in all_trials(config_of())}
    assert len(keys) == 12
    titled = ["clean", {"method": "lsp", "title": "X"}, "class_oracle", "uniform_noise"]
    assert {t.key for t in all_trials(config_of(methods=titled, title="U"))} == keys
    changed = [
        config_of(seeds=[7]),
        config_of(attacks=["blur-1"]),
        config_of(shares=[0.5]),
        config_of(budgets=[4], methods=["uniform_noise", "lsp", "class_oracle"]),
        config_of(labels=["clusters-2"]),
        config_of(adversaries={"resnet18": {"epochs": 3}}),
        config_of(data=["c"]),
        config_of(methods=[{"method": "lsp", "seed": 5}]),
    ]
    for config in changed:
        assert not {t.key for t in all_trials(config)} & keys


def test_only_what_needs_a_fit_depends_on_where_it_is_fitted():
    here, there = config_of(), config_of(fitted_on="c")
    moved = {t.key: t.copy.method.name for t in all_trials(there)}
    for trial in all_trials(here):
        assert (trial.key in moved) == (trial.copy.method.name != "lsp")


def test_table_has_means_spreads_and_verdicts():
    config = config_of()
    found = {
        "clean": CLEAN,
        "uniform_noise": NOISE,
        "lsp": [0.3, 0.31, 0.29],
        "class_oracle": ORACLE,
    }
    table = fill_table(config.grids[0], config, records_of(config, found), {})
    assert table.text()[1] == ["clean", "66.0 ± 1.0"]
    assert table.text()[-1] == ["(most frequent class)", "10.0"]
    assert explain(table)[0].startswith("Protects: lsp (45.5 % of clean accuracy, the rule is ")


def test_no_verdict_says_which_condition_failed():
    config = config_of()
    grid = config.grids[0]
    good = {"clean": CLEAN, "uniform_noise": NOISE, "lsp": [0.3, 0.31, 0.29]}
    records = records_of(config, good | {"class_oracle": ORACLE})
    two_seeds = {k: r for k, r in records.items() if r.outcome.last != 0.65}  # of clean and noise
    (sentence,) = explain(fill_table(grid, config, two_seeds, {}))
    assert sentence.startswith("Inconclusive: lsp (two seeds of clean images and uniform_noise;")
    records = records_of(config, good | {"class_oracle": [0.6, 0.6, 0.6]})
    (sentence,) = explain(fill_table(grid, config, records, {}))
    assert sentence.startswith("Inconclusive: lsp (even the class-wise oracle leaves 90.9 % of ")


def test_other_methods_are_judged_when_one_has_too_few_seeds():
    methods = ["clean", "uniform_noise", "lsp", "ar", "class_oracle"]
    config = config_of(methods=methods)
    found = {"clean": CLEAN, "uniform_noise": NOISE, "lsp": ORACLE, "ar": [0.4, 0.41, 0.42]}
    records = records_of(config, found | {"class_oracle": ORACLE})
    without = {k: r for k, r in records.items() if r.outcome.last != 0.41}
    (sentence,) = explain(fill_table(config.grids[0], config, without, {}))
    assert sentence.startswith("Protects: lsp (30.3 % of clean accuracy")
    assert "Inconclusive: ar (two seeds of the method;" in sentence


def test_records_survive_the_disk():
    for record in records_of(
        config_of(),
        {n: CLEAN for n in "clean lsp".split()} | {"uniform_noise": NOISE, "class_oracle": ORACLE},
    ).values():
        assert TrialRecord.model_validate_json(record.model_dump_json()) == record


def test_budgets_go_down_the_table_and_clean_images_are_trained_on_once(tmp_path):
    config = config_of(rows="budgets", budgets=[2, 8], methods=["clean", "lsp"])
    trials = all_trials(config)
    assert [t.copy.epsilon_levels for t in trials if t.copy.method.name == "lsp"] == 3 * [2] + 3 * [
        8
    ]
    assert len(trials) == 9
    assert {t.key for t in trials} > {
        t.key for t in all_trials(config_of(methods=["clean", "lsp"]))
    }
    records = records_of(config, {"clean": CLEAN, "lsp": ORACLE})
    table = fill_table(config.grids[0], config, records, {})
    assert table.rows == ["2 levels", "8 levels"]
    assert table.text()[1][1] == table.text()[2][1] == "66.0 ± 1.0"
    assert "by budget" in write_results(tmp_path, config, records, {}, qualities={}).read_text()


def test_augmentations_go_down_the_table_and_are_those_of_an_adversary(tmp_path):
    kinds = ["flip_crop", "gray_0.2"]
    config = config_of(rows="augmentations", augmentations=kinds, methods=["clean", "lsp"])
    own = config_of(adversaries={"resnet18": {"augmentation": "gray_0.2"}}, methods=["lsp"])
    assert {t.key for t in all_trials(own)} < {t.key for t in all_trials(config)}
    assert len({t.title for t in all_trials(config)}) == 12
    records = records_of(config, {"clean": CLEAN, "lsp": ORACLE})
    write_results(tmp_path, config, records, {}, qualities={})
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert "| gray_0.2 | 66.0 ± 1.0 | 20.0 ± 0.0 |" in lines
    assert "| gray_0.2 | 30 |" in lines
    header, *rows = csv.reader((tmp_path / "results.csv").read_text().splitlines())
    assert [row[header.index("augmentation")] for row in rows] == 2 * kinds


def test_share_of_clean_accuracy_is_averaged_over_sets():
    for rows, kinds in (("methods", []), ("augmentations", ["none", "gray"])):
        config = config_of(
            data=["a", "c"], rows=rows, augmentations=kinds, methods=["clean", "lsp"], seeds=[0]
        )
        records = records_of(config, {"clean": [0.8], "lsp": [0.2]})
        for trial in all_trials(config):
            if trial.copy.data == "c" and trial.copy.method.name == "lsp":
                outcome = records[trial.key].outcome.model_copy(update={"last": 0.4})
                records[trial.key] = records[trial.key].model_copy(update={"outcome": outcome})
        shares = shares_of_clean(fill_table(config.grids[0], config, records, {}))
        if rows == "methods":
            assert shares[0] == ["methods", "a", "c", "mean of sets"]
            assert shares[2] == ["lsp", "25", "50", "38"]
        else:
            assert shares[0] == ["augmentations", "lsp a", "lsp c", "lsp mean of sets"]
            assert shares[2] == ["gray", "25", "50", "38"]


SEEN = VisibilitySummary(24, Visibility(4.04, 0.1, 75.0), Visibility(6.0, 0.2, 60.0))


def copies_of(config: EvaluateConfig, *seen: VisibilitySummary | None) -> dict[str, CopyRecord]:
    keys = dict.fromkeys(trial.copy.key for trial in all_trials(config))
    return {
        key: CopyRecord(max_levels=8, psnr_db=31, seconds=1, visibility=summary)
        for key, summary in zip(keys, seen, strict=True)
    }


def test_visibility_stands_beside_what_the_adversary_learnt(tmp_path):
    config = config_of(methods=["clean", "lsp"])
    records = records_of(config, {"clean": CLEAN, "lsp": ORACLE})
    same = VisibilitySummary(24, IDENTICAL, IDENTICAL)
    page = write_results(tmp_path, config, records, copies_of(config, same, SEEN), qualities={})
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert "| methods | a | CIEDE2000 | FLIP | SSIMULACRA2 |" in lines
    assert "| lsp | 20.0 ± 0.0 | 4.0 (6.0) | 0.100 (0.200) | 75.0 (60.0) |" in lines
    assert "| (most frequent class) | 10.0 |  |  |  |" in lines
    assert "worst of 24 images" in page.read_text()
    _, clean, lsp = csv.reader((tmp_path / "results.csv").read_text().splitlines())
    assert clean[-6:] == "0.0000 0.0000 0.0000 0.0000 100.0000 100.0000".split()
    assert lsp[-6:] == "4.0400 6.0000 0.1000 0.2000 75.0000 60.0000".split()


def test_row_of_several_copies_leaves_visibility_to_the_table_of_copies(tmp_path):
    config = config_of(data=["a", "c"], methods=["lsp"])
    records = records_of(config, {"lsp": ORACLE})
    write_results(tmp_path, config, records, copies_of(config, SEEN, None), qualities={})
    text = (tmp_path / "results.md").read_text()
    assert "| methods | a | c |\n" in text
    assert "| lsp | a | itself | 8 | 8 | 31.0 | 4.0 (6.0) | 0.100 (0.200) | 75.0 (60.0) |" in text
    assert "| lsp | c | itself | 8 | 8 | 31.0 | - | - | - |" in text
    assert "pip install 'one4all[visibility]'" in text


def test_records_of_before_visibility_was_measured_still_load():
    before = '{"max_levels": 8, "psnr_db": 31.5, "seconds": 2.0}'
    assert CopyRecord.model_validate_json(before).visibility is None
    now = CopyRecord(max_levels=8, psnr_db=31.5, seconds=2, visibility=SEEN)
    assert CopyRecord.model_validate_json(now.model_dump_json()) == now


def test_results_are_written_also_with_trials_missing(tmp_path):
    config = config_of(rows="attacks", attacks=["none", "blur-1"], methods=["clean", "lsp"])
    records = records_of(config, {"clean": CLEAN, "lsp": NOISE})
    records.pop(next(iter(records)))
    report = write_results(tmp_path, config, records, {}, qualities={})
    text = (tmp_path / "results.md").read_text()
    assert "| attacks | lsp |\n|---|---|\n| none | 99 |\n| blur-1 | 99 |" in text
    assert (tmp_path / "results.csv").read_text().count("\n") == 5
    assert "<h2>T</h2>" in report.read_text()


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"data": ["z"]}, "names data set 'z'"),
        ({"methods": ["lps"]}, "no compared method 'lps'"),
        ({"methods": [{"method": "lsp", "config": {"pach": 3}}]}, "pach"),
        ({"methods": ["clean", "clean"]}, "a title each"),
        ({"methods": ["corpus"]}, "say where the protected images are"),
        ({"methods": [{"method": "protector", "protector": "14a"}]}, "protector"),
        ({"attacks": ["blur"]}, "no attack 'blur'"),
        ({"adversaries": {"x": "resnet"}}, "no preset 'resnet'"),
        ({"adversaries": {"x": {"preset": "default", "network": "vgg"}}}, "no network 'vgg'"),
        ({"labels": ["20"]}, "clusters-20"),
        ({"shares": [0]}, "shares"),
    ],
)
def test_mistakes_in_a_grid_are_explained(tmp_path, grid, message):
    text = "data: {a: {train: x, test: y}}\ngrids:\n- " + str(
        {"title": "T", "data": ["a"], "methods": ["clean"]} | grid
    )
    (tmp_path / "e.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(EvaluateConfig, tmp_path / "e.yaml")
    assert message in str(error.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_loads_and_describes_itself(path):
    config = load_config(EvaluateConfig, path)
    assert "trials in all" in describe(config)
    for grid in config.grids:
        assert next(grid_trials(grid, config)).key


def images_of(count: int = 12, num_classes: int = 3, size: int = 16) -> LabelledImages:
    images = np.stack([make_pixels(size, size, seed=i) for i in range(count)])
    return LabelledImages(images, np.arange(count) % num_classes)


def test_larger_share_contains_the_smaller_one():
    clean = images_of()
    copy = LabelledImages(255 - clean.images_NHWC, clean.labels_N)

    def protected(share):
        mixed = mix(copy, clean, share=share).images_NHWC
        return {i for i in range(len(clean)) if (mixed[i] == copy.images_NHWC[i]).all()}

    assert [len(protected(share)) for share in (0.25, 0.5, 1.0)] == [3, 6, 12]
    assert protected(0.25) < protected(0.5) < protected(1.0)


def test_fitted_method_is_kept_and_gives_the_same_copy(tmp_path):
    clean, method = images_of(), MethodConfig(method="lsp")
    first = make_copy(clean, None, method, epsilon_levels=8, cache=tmp_path / "x")
    assert (tmp_path / "x").is_dir()
    again = make_copy(clean, None, method, epsilon_levels=8, cache=tmp_path / "x")
    assert np.array_equal(first.images_NHWC, again.images_NHWC)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.slow
def test_codebook_is_kept_as_a_protector_folder(tmp_path):
    clean = images_of(size=32)
    encoder = TINY_ENCODER.model_dump()
    method = MethodConfig(
        method="codebook", config={"encoder": encoder, "codebook": {"num_concepts": 3}}
    )
    first = make_copy(clean, None, method, epsilon_levels=4, cache=tmp_path / "x")
    protector = Protector.load(str(tmp_path / "x"))
    assert protector.card.epsilon_levels == 4
    protected = np.stack(protector.protect(list(clean.images_NHWC)))
    assert np.array_equal(first.images_NHWC, protected)
    again = make_copy(clean, None, method, epsilon_levels=4, cache=tmp_path / "x")
    assert np.array_equal(first.images_NHWC, again.images_NHWC)


@pytest.mark.slow
def test_codebooks_of_one_corpus_encode_it_once(tmp_path, monkeypatch):
    clean = images_of(size=32)
    encoded = []
    kind = type(load_encoder(TINY_ENCODER))
    original = kind._embed_image

    def count(self, image):
        encoded.append(len(image))
        return original(self, image)

    monkeypatch.setattr(kind, "_embed_image", count)
    monkeypatch.setattr(backends, "installed", lambda module: False)  # what it encodes, is counted

    def copy(strength: str, folder: Path | None) -> np.ndarray:
        embeddings._recent.clear()  # as in another process
        codebook = {"num_concepts": 3, "pattern": strength}
        settings = {"encoder": TINY_ENCODER.model_dump(), "codebook": codebook}
        method = MethodConfig(method="codebook", config=settings)
        made = make_copy(clean, None, method, epsilon_levels=8, embeddings=folder)
        return made.images_NHWC

    alone = copy("strong", None)
    num_alone = sum(size for size in encoded if size > 1)  # one: the test image of a card
    assert num_alone == 12 + 16  # for the fit; to protect, in full batches of 8
    encoded.clear()
    discreet, strong = copy("discreet", tmp_path), copy("strong", tmp_path)
    assert sum(size for size in encoded if size > 1) == num_alone
    assert np.array_equal(strong, alone)
    assert not np.array_equal(strong, discreet)


def test_what_needs_no_fit_is_not_kept(tmp_path):
    clean = images_of()
    for name in ("clean", "uniform_noise", "class_oracle"):
        make_copy(clean, None, MethodConfig(method=name), epsilon_levels=8, cache=tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_trial_belongs_to_what_its_protector_is_and_not_to_where_it_lies(tmp_path):
    def keys(folder: str) -> list[str]:
        method = {"method": "protector", "config": {"protector": str(tmp_path / folder)}}
        return [trial.key for trial in all_trials(config_of(methods=[method]))]

    for folder in ("here", "there"):
        make_protector().save(tmp_path / folder)
    first = keys("here")
    assert keys("there") == first
    make_protector(seed=1).save(tmp_path / "here")
    assert not set(keys("here")) & set(first)
    with pytest.raises(UsageError, match="method 'protector': no protector at"):
        keys("nowhere")


def test_copy_is_exported_as_a_corpus_that_is_read_back_to_the_bit(tmp_path):
    methods = [{"method": "lsp", "title": "LSP, 8/255"}, "class_oracle"]
    data = {"c": {"source": "emoji-nature", "size": 16, "max_train": 6}}
    grids = [{"title": "T", "data": ["c"], "methods": methods}]
    config = EvaluateConfig.model_validate(
        {"output": str(tmp_path / "out"), "data": data, "grids": grids}
    )
    places = export_copies(config, str(tmp_path / "copies"))
    assert [Path(place).name for place in places] == ["LSP--8-255", "class_oracle"]
    clean = load_data(config.data["c"], "train")
    trial = all_trials(config)[0]
    expected = make_copy(clean, None, trial.copy.method, epsilon_levels=8)
    found = read_labelled(places[0])
    assert np.array_equal(found.images_NHWC, expected.images_NHWC)
    assert np.array_equal(found.labels_N, clean.labels_N)
    as_method = MethodConfig(method="corpus", config={"corpus": places[0]})
    again = make_copy(clean, None, as_method, epsilon_levels=8)
    assert np.array_equal(again.images_NHWC, expected.images_NHWC)


def test_corpus_that_is_not_the_data_set_is_refused(tmp_path):
    (tmp_path / "s.tar").write_bytes(make_tar(make_samples(4)))
    method = MethodConfig(method="corpus", config={"corpus": str(tmp_path)})
    with pytest.raises(UsageError, match="4 images and the clean data set 12"):
        make_copy(images_of(), None, method, epsilon_levels=8)


def test_labelled_images_are_read_from_shards_and_embedded_corpora(tmp_path):
    (tmp_path / "s.tar").write_bytes(make_tar(make_samples(4)))
    found = read_labelled(str(tmp_path), size=24)
    assert found.images_NHWC.shape == (4, 24, 24, 3)
    assert found.labels_N.tolist() == [0, 1, 2, 0]
    assert found.class_names[1].startswith("ein Bild, 1")
    data = config_of().data["c"].model_copy(update={"size": 16, "max_train": 5})
    assert load_data(data, "train").images_NHWC.shape == (5, 16, 16, 3)
    with pytest.raises(UsageError, match="several sizes"):
        read_labelled(_two_sizes(tmp_path / "two"))
    (tmp_path / "s.tar").write_bytes(make_tar([("a.cls", b"1")]))
    with pytest.raises(ShardError, match="one image and one"):
        read_labelled(str(tmp_path))
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "a.tar").write_bytes(bytes(700))
    with pytest.raises(ShardError, match=r"a\.tar: truncated"):
        read_labelled(str(tmp_path / "cut"))


def test_masks_beside_the_photos_are_left_out(tmp_path):
    samples = [*make_samples(1), ("sample0000.seg.png", make_image("PNG", seed=7))]
    (tmp_path / "s.tar").write_bytes(make_tar(samples))
    data = {"train": str(tmp_path), "test": str(tmp_path), "size": 16}
    with pytest.raises(ShardError, match=r"and has 2 and 1; .*sidecar_patterns"):
        load_data(DataConfig(**data), "train")
    found = load_data(DataConfig(**data, sidecar_patterns=("*.seg.png",)), "train")
    (tmp_path / "s.tar").write_bytes(make_tar(make_samples(1)))
    photo = load_data(DataConfig(**data), "train")
    assert np.array_equal(found.images_NHWC, photo.images_NHWC)


def _two_sizes(folder: Path) -> str:
    from one4all.corpus.packing import open_corpus, pack
    from one4all.storage import open_storage

    images = list(open_corpus("emoji-nature"))[:2]
    pack(images, open_storage(str(folder)), prefix="x")
    samples = [("z.jpg", make_samples(1)[0][1]), ("z.cls", b"0")]
    (folder / "z.tar").write_bytes(make_tar(samples))
    return str(folder)


def blobs(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    centres = np.array([[0, 0], [8, 0], [0, 8]], np.float32)
    labels = np.repeat(np.arange(3), 10)
    return (centres[labels] + random.normal(0, 0.5, (30, 2))).astype(np.float32), labels


def test_classes_with_near_names_get_one_label():
    points, labels = blobs()
    merged = merge_labels(points, 3)
    assert merged.tolist() == labels.tolist()  # numbered by first appearance
    with pytest.raises(UsageError, match="30 classes cannot be merged into 30"):
        merge_labels(points, 30)


def test_cluster_quality_equals_its_definition():
    points, labels = blobs()
    quality = cluster_quality(points, 3)
    exact = points.astype(float)
    means = np.stack([exact[labels == k].mean(axis=0) for k in range(3)])
    sse = ((points - means[labels]) ** 2).sum()
    between = (10 * ((means - exact.mean(axis=0)) ** 2).sum(axis=1)).sum()
    assert quality.sse == pytest.approx(sse, rel=1e-6)
    assert quality.calinski_harabasz == pytest.approx((between / 2) / (sse / 27), rel=1e-6)
    values = []
    for i, point in enumerate(points):
        distances = np.linalg.norm(points.astype(float) - point, axis=1)
        a = distances[labels == labels[i]].sum() / 9
        b = min(distances[labels == k].mean() for k in range(3) if k != labels[i])
        values.append((b - a) / max(a, b))
    assert quality.silhouette == pytest.approx(np.mean(values), rel=1e-6)
    assert cluster_quality(points, 5).silhouette < quality.silhouette


def test_cluster_quality_by_hand():
    """{0, 1}, {10, 11}, {30}: one cluster has a single point, whose silhouette is 0."""
    quality = cluster_quality(np.array([[0], [1], [10], [11], [30]], np.float32), 3)
    assert quality.sse == pytest.approx(1)
    assert quality.silhouette == pytest.approx((2 * 9.5 / 10.5 + 2 * 8.5 / 9.5) / 5, abs=1e-6)
    assert quality.calinski_harabasz == pytest.approx((580.2 / 2) / (1 / 2), rel=1e-6)


def test_k_means_is_the_same_every_time():
    import torch

    points = torch.from_numpy(blobs()[0])
    first, again = (k_means(points, 4, seed=3)[1] for _ in range(2))
    assert torch.equal(first, again)
