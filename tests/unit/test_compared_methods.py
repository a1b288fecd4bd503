"""What holds for every compared method and control, and for the controls alone."""

from importlib.resources import files

import numpy as np
import pytest
from support.builders import TINY_ENCODER, TINY_GENERATOR, make_pixels, make_protector

from one4all.distances import psnr_db
from one4all.errors import ConfigError, UsageError
from one4all.evaluation.labelled import LabelledImages
from one4all.evaluation.methods import METHODS, Savable, find_method
from one4all.evaluation.methods.ar import ArConfig
from one4all.evaluation.methods.contrastive import LearnerConfig
from one4all.evaluation.methods.controls import ConceptOracleConfig, PatternConfig
from one4all.evaluation.methods.cp import CpClassConfig, CpSampleConfig
from one4all.evaluation.methods.emn import EmnClassConfig, EmnSampleConfig
from one4all.evaluation.methods.protectors import ProtectorConfig
from one4all.evaluation.methods.surrogate import SurrogateConfig
from one4all.evaluation.methods.tap import TapConfig
from one4all.evaluation.methods.transfer import transform_block
from one4all.evaluation.methods.tue import TueConfig
from one4all.images import decode, working_copy
from one4all.protectors.config import CodebookConfig
from one4all.protectors.protector import Protector

pytestmark = pytest.mark.slow

NET = SurrogateConfig(width=8, batch_size=16)
LEARNER = LearnerConfig(width=8, projection_dim=16, batch_size=16)
CP = CpClassConfig(learner=LEARNER, epochs=2, model_steps=2, noise_steps=2)

TINY = {
    "emn_sample": EmnSampleConfig(surrogate=NET, noise_steps=2, max_rounds=2),
    "emn_class": EmnClassConfig(surrogate=NET, max_rounds=2),
    "tap": TapConfig(surrogate=NET, epochs=2, iterations=2, restarts=2),
    "cp_class": CP,
    "cp_sample": CpSampleConfig(**CP.model_dump(), class_wise=CP),
    "tue": TueConfig(learner=LEARNER, epochs=2, train_steps=2, noise_steps=2, ssl_weight=1.0),
    "unlearnable_clusters": find_method("unlearnable_clusters")
    .presets["default"]
    .model_copy(
        update={
            "encoder": TINY_ENCODER,
            "num_clusters": 3,
            "generator": TINY_GENERATOR,
            "steps": 3,
        }
    ),
    "codebook": find_method("codebook")
    .presets["default"]
    .model_copy(
        update={
            "encoder": TINY_ENCODER,
            "codebook": CodebookConfig(num_concepts=3, pattern="strong"),
        }
    ),
    "untrained_generator": find_method("untrained_generator")
    .presets["default"]
    .model_copy(update={"encoder": TINY_ENCODER, "generator": TINY_GENERATOR}),
    "released_l2": find_method("released_l2")
    .presets["default"]
    .model_copy(update={"encoder": TINY_ENCODER, "generator": TINY_GENERATOR}),
}
# "corpus", which only reads what was protected before, is in test_evaluation.
ALL = sorted(METHODS.keys() - {"corpus"})


def make_corpus(num: int = 24, *, size: int = 32, num_classes: int = 3, seed: int = 0):
    images = np.stack([make_pixels(size, size, seed=100 * seed + i) for i in range(num)])
    images[0], images[1] = 0, 255  # no room below, none above
    return LabelledImages(images, np.arange(num) % num_classes)


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """Small configurations; without one, a method's default is small enough."""
    folder = tmp_path_factory.mktemp("protector")
    make_protector().save(folder)
    return TINY | {"protector": ProtectorConfig(protector=str(folder))}


@pytest.fixture(scope="module")
def fitted(configs):
    """Every method, fitted once on the same corpus; made when asked for."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = METHODS[name].fit(make_corpus(), configs.get(name), seed=3)
        return made[name]

    return get


def copy_of(method, images, **options):
    return method.protect(images, **{"own": True, "seed": 0} | options).images_NHWC


def levels(method, images, **options):
    return [d.copy() for d in method.perturb(images, **{"own": True, "seed": 0} | options)]


def difference(clean, protected):
    return protected.images_NHWC.astype(int) - clean.images_NHWC


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("own", [True, False], ids=["own", "transferred"])
def test_budget_holds_unless_the_method_says_otherwise(name, own, fitted):
    """Also on black and white images, and on a corpus of another size with more classes."""
    clean = make_corpus() if own else make_corpus(20, size=48, num_classes=7, seed=1)
    protected = fitted(name).protect(clean, own=own, seed=0)
    assert protected.images_NHWC.dtype == np.uint8
    np.testing.assert_array_equal(protected.labels_N, clean.labels_N)
    largest = np.abs(difference(clean, protected)).max()
    assert METHODS[name].within_budget == fitted(name).within_budget == (largest <= 8)
    if name != "clean":
        assert largest > 0


@pytest.mark.parametrize("name", [n for n in ALL if METHODS[n].needs_fit])
def test_what_was_fitted_is_saved_and_protects_as_before(name, fitted, tmp_path):
    assert isinstance(fitted(name), Savable)
    fitted(name).save(tmp_path)
    loaded = METHODS[name].load(tmp_path)
    other = make_corpus(10, num_classes=5, seed=1)
    for corpus, own in ((make_corpus(), True), (other, False)):
        before = copy_of(fitted(name), corpus, own=own)
        np.testing.assert_array_equal(before, copy_of(loaded, corpus, own=own))


@pytest.mark.parametrize("name", ALL)
def test_same_seed_same_images(name, fitted, configs):
    corpus = make_corpus()
    again = METHODS[name].fit(corpus, configs.get(name), seed=3)
    np.testing.assert_array_equal(copy_of(fitted(name), corpus), copy_of(again, corpus))
    if name not in ("clean", "protector", "released_preprocessing"):
        other = METHODS[name].fit(corpus, configs.get(name), seed=4)
        assert not np.array_equal(copy_of(again, corpus), copy_of(other, corpus))


@pytest.mark.parametrize("name", [n for n in ALL if not METHODS[n].needs_labels])
def test_label_free_methods_do_not_read_labels(name, fitted, configs):
    corpus = make_corpus()
    shuffled = LabelledImages(corpus.images_NHWC, (corpus.labels_N * 5 + 1) % 3)
    again = METHODS[name].fit(shuffled, configs.get(name), seed=3)
    np.testing.assert_array_equal(copy_of(fitted(name), corpus), copy_of(again, shuffled))


# --- protectors ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["codebook", "protector", "untrained_generator"])
def test_what_is_measured_is_a_protector_that_others_can_load(name, fitted, tmp_path):
    corpus = make_corpus()
    fitted(name).save(tmp_path)
    shipped = Protector.load(str(tmp_path))
    protected = np.stack(shipped.protect(list(corpus.images_NHWC)))
    np.testing.assert_array_equal(protected, copy_of(fitted(name), corpus))


@pytest.mark.parametrize("size", [16, 32, 80])
def test_codebook_is_written_at_the_edge_of_any_budget(size):
    corpus = make_corpus(size=size)
    gray = LabelledImages(np.full_like(corpus.images_NHWC, 128), corpus.labels_N)
    for epsilon in (2, 8):
        method = METHODS["codebook"].fit(corpus, TINY["codebook"], epsilon_levels=epsilon, seed=0)
        assert method.protector.card.epsilon_levels == epsilon
        assert np.abs(difference(gray, method.protect(gray, own=False, seed=0))).max() == epsilon


def test_protector_is_known_by_its_content_and_not_by_its_place(tmp_path):
    identify = METHODS["protector"].identify
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_protector(seed=seed).save(tmp_path / folder)
    a, b, c = (identify(ProtectorConfig(protector=str(tmp_path / name))) for name in "abc")
    assert a == b != c
    with pytest.raises(UsageError, match="no protector at"):
        identify(ProtectorConfig(protector=str(tmp_path / "d")))


def test_protector_of_a_larger_budget_is_refused(configs):
    with pytest.raises(UsageError, match="a budget of 8 levels and the evaluation one of 4"):
        METHODS["protector"].fit(make_corpus(), configs["protector"], epsilon_levels=4, seed=0)


# --- names -----------------------------------------------------------------------------------


def test_unknown_names_are_answered_with_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match="no compared method 'emm'; choose from emn_sample, "):
        find_method("emm")
    with pytest.raises(ConfigError, match="no preset 'huge'; choose from default, published"):
        find_method("tap").fit(make_corpus(), preset="huge", seed=0)
    with pytest.raises(ConfigError, match="tap takes a TapConfig, not a ArConfig"):
        find_method("tap").fit(make_corpus(), ArConfig(), seed=0)
    with pytest.raises(UsageError, match=r"card\.json is missing"):
        METHODS["tap"].load(tmp_path)


# --- transfer --------------------------------------------------------------------------------

SAMPLE_WISE = ["emn_sample", "tap", "cp_sample", "tue"]


@pytest.mark.parametrize("name", SAMPLE_WISE)
def test_sample_wise_perturbations_are_used_by_index(name, fitted):
    """Indexed by label, images of one class would share one: the method would be class-wise."""
    deltas = levels(fitted(name), make_corpus())
    np.testing.assert_array_equal(deltas, fitted(name).deltas_NhwC)
    assert len(np.unique(np.reshape(deltas, (24, -1)), axis=0)) == 24


def test_another_corpus_is_not_taken_for_the_own_one(fitted):
    method, corpus = fitted("tap"), make_corpus()
    with pytest.raises(UsageError, match="fitted on 24 images of 32 pixels and these are 20 of 32"):
        method.perturb(make_corpus(20), own=True, seed=0)
    reordered = LabelledImages(corpus.images_NHWC[1:].repeat(2, axis=0)[:24], corpus.labels_N[::-1])
    with pytest.raises(UsageError, match="by index"):
        method.perturb(reordered, own=True, seed=0)


def test_transferred_samples_come_from_the_assigned_class_without_replacement(fitted):
    """Class 4 of the target is class 1 of the second block: other pixels, same source."""
    method = fitted("tap")
    target = LabelledImages(make_corpus(20).images_NHWC, np.array([1] * 10 + [4] * 10))
    deltas = levels(method, target, own=False)
    pool = method.deltas_NhwC[method.labels_N == 1]
    assert len(pool) == 8

    def origin(delta, block):
        matches = [
            i for i, d in enumerate(pool) if np.array_equal(transform_block(d, block), delta)
        ]
        assert len(matches) == 1
        return matches[0]

    for block, part in ((0, deltas[:10]), (1, deltas[10:])):
        drawn = [origin(delta, block) for delta in part]
        assert sorted(drawn[:8]) == list(range(8))
        assert len(set(drawn[8:])) == 2
    assert not np.array_equal(deltas, levels(method, target, own=False, seed=1))


@pytest.mark.parametrize("name", ["class_oracle", "emn_class", "cp_class"])
def test_classes_stay_distinct_when_the_target_has_more(name, fitted):
    target = make_corpus(60, size=48, num_classes=60, seed=1)
    target = LabelledImages(np.full_like(target.images_NHWC, 128), target.labels_N)
    protected = difference(target, fitted(name).protect(target, own=False, seed=0))
    for i in range(60):
        for j in range(i):
            for seen in (protected[j], protected[j][:, ::-1]):  # adversaries mirror
                assert np.mean(protected[i] != seen) > 0.2, (i, j)


def test_a_block_moves_values_and_keeps_them(fitted):
    delta = np.random.default_rng(0).normal(size=(32, 32, 3))
    np.testing.assert_array_equal(transform_block(delta, 0), delta)
    np.testing.assert_array_equal(transform_block(delta, 5), transform_block(delta, 5))
    np.testing.assert_array_equal(np.sort(transform_block(delta, 5), None), np.sort(delta, None))


# --- controls --------------------------------------------------------------------------------


@pytest.mark.parametrize("purity", [0.0, 0.35, 0.8, 1.0])
def test_concept_oracle_has_the_purity_asked_for(purity):
    corpus = LabelledImages(np.zeros((1000, 32, 32, 3), np.uint8), np.arange(1000) % 7)
    method = find_method("concept_oracle").fit(corpus, ConceptOracleConfig(purity=purity), seed=0)
    deltas = np.stack(levels(method, corpus))
    own = (deltas == method.patterns_MhwC[corpus.labels_N]).all(axis=(1, 2, 3))
    assert own.mean() == pytest.approx(purity, abs=1e-3)
    known = {pattern.tobytes() for pattern in method.patterns_MhwC}
    assert {delta.tobytes() for delta in deltas} <= known


def test_noise_is_fresh_and_a_constant_is_not(fitted):
    corpus = make_corpus()
    for name, num in (("uniform_noise", 24), ("sign_noise", 24), ("constant", 1), ("clean", 1)):
        deltas = np.reshape(levels(fitted(name), corpus), (24, -1))
        assert len(np.unique(deltas, axis=0)) == num, name


def test_released_preprocessing_alone_is_about_12_db_from_the_original():
    """C0: no perturbation at all."""

    photos = sorted((files("one4all") / "assets" / "photos").iterdir(), key=str)
    images = np.stack([working_copy(decode(p.read_bytes()).pixels, 64) for p in photos])
    corpus = LabelledImages(images, np.zeros(len(images), np.int64))
    method = find_method("released_preprocessing").fit(corpus, seed=0)
    protected = copy_of(method, corpus)
    values = (images / 255 - [0.48145466, 0.4578275, 0.40821073]) / [
        0.26862954,
        0.26130258,
        0.27577711,
    ]
    np.testing.assert_allclose(protected, 255 * values.clip(0, 1), atol=0.51)
    distances = [psnr_db(a, b) for a, b in zip(images, protected, strict=True)]
    assert np.mean(distances) == pytest.approx(12, abs=1.5)


def test_released_l2_has_the_released_norm(fitted):
    for size in (32, 224):
        corpus = make_corpus(2, size=size)
        for delta in levels(fitted("released_l2"), corpus, own=False):
            assert delta.shape == (size, size, 3)
            assert np.linalg.norm(delta / 255) == pytest.approx(16 * size / 224, rel=1e-4)


def test_pattern_block_is_the_one_asked_for():
    method = find_method("class_oracle").fit(make_corpus(), PatternConfig(block=16), seed=0)
    assert (np.abs(np.diff(method.patterns_MhwC[0], axis=0)).max(axis=(1, 2)) > 0).sum() <= 1
