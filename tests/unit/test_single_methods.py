"""Each compared method does what its paper says, on a corpus small enough for seconds."""

import math
from importlib.resources import files

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.builders import TINY_ENCODER, make_pixels

from one4all.clustering import k_means
from one4all.encoders import load_encoder
from one4all.errors import UsageError
from one4all.evaluation.labelled import LabelledImages
from one4all.evaluation.methods import find_method
from one4all.evaluation.methods.ar import Autoregressive, _run
from one4all.evaluation.methods.contrastive import Learner, LearnerConfig, info_nce, random_view
from one4all.evaluation.methods.cp import _descend
from one4all.evaluation.methods.embeddings import encode_corpus
from one4all.evaluation.methods.emn import EmnClassConfig, EmnSampleConfig
from one4all.evaluation.methods.surrogate import (
    Surrogate,
    SurrogateConfig,
    flip_and_shift,
    to_levels,
    uniform_start,
)
from one4all.evaluation.methods.tap import TapConfig, _attack
from one4all.evaluation.methods.tue import TueConfig, class_separability
from one4all.evaluation.methods.unlearnable_clusters import UnlearnableClustersConfig
from one4all.images import decode, working_copy
from one4all.protectors.config import CodebookConfig, GeneratorConfig

pytestmark = pytest.mark.slow

NET = SurrogateConfig(width=8, batch_size=32)
CPU = torch.device("cpu")


def make_corpus(num: int = 96, *, num_classes: int = 4, contrast: float = 1.0) -> LabelledImages:
    """Random pictures: nothing in them says the class, but a network can learn them by heart."""
    images = np.stack([make_pixels(32, 32, seed=i) for i in range(num)])
    images = np.rint(128 + contrast * (images.astype(float) - 128)).astype(np.uint8)
    return LabelledImages(images, np.arange(num) % num_classes)


def lines_of(method: str, config, corpus=None):
    lines = []
    fitted = find_method(method).fit(
        corpus or make_corpus(), config, seed=0, on_progress=lambda _, line: lines.append(line)
    )
    return fitted, lines


# --- surrogates and labels -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("emn_sample", EmnSampleConfig(surrogate=NET, noise_steps=5, max_rounds=12)),
        ("emn_class", EmnClassConfig(surrogate=NET, max_rounds=40, subset=1.0)),
    ],
)
def test_emn_lowers_the_error_of_a_network_that_sees_it(name, config):
    fitted, lines = lines_of(name, config)
    first = float(lines[0].rpartition(" ")[2])
    assert first > 0.5
    assert fitted.card.record["training_error"] <= config.stop_error


def test_emn_keeps_negative_noise():
    """The released code drops it."""
    fitted = find_method("emn_sample").fit(
        make_corpus(), EmnSampleConfig(surrogate=NET, max_rounds=2), seed=0
    )
    assert (fitted.deltas_NhwC < 0).mean() == pytest.approx(0.5, abs=0.1)


def test_tap_reaches_the_next_class_on_its_surrogate():
    config = TapConfig(surrogate=NET, epochs=30, iterations=30)
    # Pictures this random are far apart; less contrast brings classes within reach of 8 levels.
    corpus = make_corpus(contrast=0.3)
    fitted, _ = lines_of("tap", config, corpus)
    idle = config.model_copy(update={"iterations": 1, "step_share": 1e-6})
    untouched, _ = lines_of("tap", idle, corpus)
    assert fitted.card.record["surrogate_accuracy"] > 0.9
    assert untouched.card.record["on_target"] < 0.2
    assert fitted.card.record["on_target"] > 0.8


def test_best_of_all_restarts_is_kept_for_each_image():
    """The first of six starts is the only one of one, so that six leave no larger loss."""
    torch.manual_seed(1)
    surrogate = Surrogate(4, NET, CPU)
    surrogate.model.eval().requires_grad_(False)
    corpus = make_corpus(24)
    clean = to_levels(corpus.images_NHWC, CPU)
    targets = torch.from_numpy(corpus.labels_N + 1) % 4

    def losses(restarts: int) -> torch.Tensor:
        torch.manual_seed(0)
        config = TapConfig(surrogate=NET, iterations=2, restarts=restarts)
        delta = _attack(surrogate, clean, targets, config, 8.0)
        logits = surrogate.logits(clean + delta, augment=False)
        return F.cross_entropy(logits, targets, reduction="none")

    one, six = losses(1), losses(6)
    assert (six <= one).all()
    assert (six < one).float().mean() > 0.5


def test_shifts_are_whole_pixels_and_let_gradients_through():
    torch.manual_seed(0)
    image = torch.rand(1, 3, 32, 32).mul(255).round().repeat(64, 1, 1, 1).requires_grad_()
    moved = flip_and_shift(image)
    assert len(moved.detach().flatten(1).unique(dim=0)) > 32
    torch.testing.assert_close(moved, moved.round(), atol=0.05, rtol=0)
    moved.sum().backward()
    assert image.grad is not None
    assert float(image.grad.sum()) == pytest.approx(image.numel(), rel=1e-3)


# --- contrastive -----------------------------------------------------------------------------


def test_info_nce_equals_the_obvious_loops():
    first, second = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    views = [v / v.norm() for v in [*first, *second]]
    total = 0.0
    for i, view in enumerate(views):
        similar = [math.exp(float(view @ other) / 0.5) for other in views]
        total -= math.log(similar[(i + 5) % 10] / (sum(similar) - similar[i]))
    assert float(info_nce(first, second, temperature=0.5)) == pytest.approx(total / 10, rel=1e-5)


@pytest.mark.parametrize("algorithm", ["simclr", "simsiam"])
def test_contrastive_gradients_reach_the_images(algorithm):
    torch.manual_seed(0)
    learner = Learner(LearnerConfig(algorithm=algorithm, width=8, projection_dim=16), CPU)
    images = torch.full((8, 3, 32, 32), 128.0) + torch.randn(8, 3, 32, 32)
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(learner.loss(images), images)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_views_differ_and_stay_in_range():
    torch.manual_seed(0)
    view = random_view(torch.rand(32, 3, 32, 32))
    assert view.shape == (32, 3, 32, 32)
    assert -1 <= view.min() < view.max() <= 1
    gray = (view[:, 0] - view[:, 1]).abs().flatten(1).amax(dim=1) < 1e-5
    assert 0 < gray.float().mean() < 0.5


def test_contrastive_poisoning_makes_the_loss_easier():
    """Against a network that is held still, over views that the descent has not seen."""
    torch.manual_seed(0)
    corpus = make_corpus(contrast=0.3)
    clean, labels = to_levels(corpus.images_NHWC, CPU), torch.from_numpy(corpus.labels_N)
    learner = Learner(LearnerConfig(width=8, learning_rate=0.03), CPU)
    start = uniform_start((4, 3, 32, 32), 8)
    for _ in range(60):
        learner.step(clean + start[labels])
    learner.train(False)

    def loss(patterns):
        torch.manual_seed(1)
        with torch.no_grad():
            return np.mean([float(learner.loss(clean + patterns[labels])) for _ in range(10)])

    patterns = start
    for _ in range(90):
        patterns, _ = _descend(learner.loss, clean, patterns, labels, step=0.8, epsilon=8)
    assert patterns.abs().max() <= 8
    assert loss(patterns) < loss(start) - 0.02


def separability(delta, labels):
    """L_CSD by its words, in doubles."""
    classes = sorted(set(labels))
    centre, sigma = {}, {}
    for k in classes:
        members = [d for d, y in zip(delta, labels, strict=True) if y == k]
        centre[k] = sum(members) / len(members)
        sigma[k] = sum(math.sqrt(float(((m - centre[k]) ** 2).sum())) for m in members) / len(
            members
        )
    terms = [
        (sigma[i] + sigma[j] + 1e-5)
        / (math.sqrt(float(((centre[i] - centre[j]) ** 2).sum())) + 1e-5)
        for i in classes
        for j in classes
        if i != j
    ]
    return sum(terms) / len(terms)


def test_csd_equals_the_obvious_reference():
    delta = torch.randn(12, 7, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.tensor([0, 0, 0, 2, 2, 2, 5, 5, 5, 5, 9, 9])
    expected = separability(list(delta), labels.tolist())
    assert float(class_separability(delta, labels)) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(UsageError, match="at least two classes"):
        class_separability(delta, torch.zeros(12, dtype=torch.int64))


def test_csd_gradient_flows_through_both_spread_and_distance():
    """Two classes of two on a line: the exact derivative has a part of each."""
    delta = torch.tensor([[-3.0], [-1.0], [1.0], [3.0]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1])
    value = class_separability(delta, labels)
    (gradient,) = torch.autograd.grad(value, delta)
    # sigma = (b - a) / 2 for each class, d = 4. Both parts of the quotient rule:
    sigma, d = 1.0, 4.0
    by_sigma = torch.tensor([-0.5, 0.5, -0.5, 0.5]) / d
    by_distance = -2 * sigma / d**2 * torch.tensor([-0.5, -0.5, 0.5, 0.5])
    torch.testing.assert_close(
        gradient.flatten(), (by_sigma + by_distance).double(), atol=1e-4, rtol=0
    )
    released = class_separability(delta, labels, spread_gradient=False)
    (gradient,) = torch.autograd.grad(released, delta)
    assert released.item() == value.item()
    torch.testing.assert_close(gradient.flatten(), by_distance.double(), atol=1e-4, rtol=0)


def test_tue_separates_classes():
    """A nearest-mean classifier of perturbations alone is right on all."""
    fitted, _ = lines_of("tue", TueConfig(epochs=3))
    deltas = fitted.deltas_NhwC.reshape(96, -1).astype(float)
    means = np.stack([deltas[fitted.labels_N == k].mean(axis=0) for k in range(4)])
    nearest = ((deltas[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    np.testing.assert_array_equal(nearest, fitted.labels_N)
    assert fitted.card.record["separability"] < 0.3  # random perturbations of this size: above 3


# --- model-free ------------------------------------------------------------------------------


def perturbations_on_gray(name, num=200, num_classes=10, seed=0):
    gray = LabelledImages(np.full((num, 32, 32, 3), 128, np.uint8), np.arange(num) % num_classes)
    fitted = find_method(name).fit(gray, seed=seed)
    protected = fitted.protect(gray, own=True, seed=0)
    return fitted, gray.labels_N, protected.images_NHWC.astype(float) - 128


def test_lsp_is_linearly_separable_after_cap_and_rounding():
    _, labels, delta = perturbations_on_gray("lsp")
    flat = np.concatenate([delta.reshape(200, -1), np.ones((200, 1))], axis=1)
    half = np.arange(200) < 100
    weights = np.linalg.lstsq(flat[half], np.eye(10)[labels[half]], rcond=None)[0]
    assert (np.argmax(flat[~half] @ weights, axis=1) == labels[~half]).mean() > 0.95
    assert 4 < np.sqrt((delta**2).mean()) <= 6
    assert len(np.unique(delta.reshape(200, -1), axis=0)) == 200  # a sample for each image


def test_ar_is_separable_by_one_convolution():
    """Each class's own filter predicts its next value best: what a first layer can see.

    Not by pixels: every image starts anew, so that the mean of a class is nothing.
    """
    fitted, labels, delta = perturbations_on_gray("ar")
    assert isinstance(fitted, Autoregressive)
    np.testing.assert_allclose(fitted.filters_MCK.sum(axis=2), 1)
    images = delta.transpose(0, 3, 1, 2)
    windows = np.lib.stride_tricks.sliding_window_view(images, (3, 3), axis=(2, 3))
    windows = windows.reshape(200, 3, -1, 9)
    kernels = np.concatenate([fitted.filters_MCK, -np.ones((10, 3, 1))], axis=2)
    residual = np.abs(np.einsum("ncpk,mck->nmcp", windows, kernels)).mean(axis=(2, 3))
    assert (residual.argmin(axis=1) == labels).mean() > 0.95
    assert np.abs(delta).max() == 8
    assert np.sqrt((delta**2).mean()) > 3


def test_ar_follows_its_recursion():
    random = np.random.default_rng(0)
    filters = random.normal(size=(2, 3, 8)) / 10
    noise = _run(filters, 9, random)
    for n in range(2):
        for c in range(3):
            for row in range(2, 9):
                for column in range(2, 9):
                    window = noise[n, c, row - 2 : row + 1, column - 2 : column + 1].ravel()
                    assert window[8] == pytest.approx(window[:8] @ filters[n, c])


# --- label-free ------------------------------------------------------------------------------


def test_unlearnable_clusters_move_features_towards_the_next_centre():
    photos = sorted((files("one4all") / "assets" / "photos").iterdir(), key=str)
    whole = np.stack([working_copy(decode(p.read_bytes()).pixels, 128) for p in photos])
    tiles = whole.reshape(-1, 4, 32, 4, 32, 3).swapaxes(2, 3).reshape(-1, 32, 32, 3)
    corpus = LabelledImages(tiles, np.zeros(len(tiles), np.int64))
    config = UnlearnableClustersConfig(
        encoder=TINY_ENCODER,
        num_clusters=3,
        generator=GeneratorConfig(width=8, stem_stride=1, num_blocks=1, norm="batch"),
        steps=150,
        learning_rate=3e-3,
    )
    fitted, _ = lines_of("unlearnable_clusters", config, corpus)
    encoder = load_encoder(TINY_ENCODER)
    centres = torch.from_numpy(fitted.centres_KD)
    clean = encode_corpus(encoder, corpus, CPU)
    gains = []
    for cluster, delta in enumerate(fitted.patterns_KhwC):
        assert np.abs(delta).max() <= 8
        moved = np.clip(np.rint(tiles + delta), 0, 255).astype(np.uint8)
        feature = encode_corpus(encoder, LabelledImages(moved, corpus.labels_N), CPU)
        target = centres[(cluster + 1) % 3][None]
        before = F.cosine_similarity(clean, target).mean()
        gains.append(float(F.cosine_similarity(feature, target).mean() - before))
    assert np.mean(gains) > 0.01  # single clusters may lose: the loss is not the cosine


def test_an_encoder_is_back_on_the_cpu_when_a_corpus_is_encoded(monkeypatch):
    corpus = LabelledImages(make_pixels(32, 32)[None], np.zeros(1, np.int64))
    encoder, places = load_encoder(TINY_ENCODER), []
    to = encoder.to
    monkeypatch.setattr(encoder, "to", lambda device: places.append(str(device)) or to(device))
    encode_corpus(encoder, corpus, torch.device("cpu:0"))
    assert places == ["cpu:0", "cpu"]


def test_codebook_has_a_pattern_a_concept_and_reads_no_label():
    corpus = make_corpus(48)
    method = find_method("codebook")
    book = CodebookConfig(num_concepts=5, pattern="strong")
    config = method.presets["default"].model_copy(
        update={"encoder": TINY_ENCODER, "codebook": book}
    )
    card = method.fit(corpus, config, seed=0).protector.card
    assert (card.generator.num_concepts, card.working_size) == (5, 32)
    gray = LabelledImages(np.full_like(corpus.images_NHWC, 128), corpus.labels_N)
    fitted = method.fit(corpus, config, seed=0)
    delta = fitted.protector.perturb(corpus.images_NHWC)
    assert np.abs(delta).min() == np.abs(delta).max() == 8
    assert len(np.unique(delta, axis=0)) == 5
    assert len(np.unique(fitted.protector.perturb(gray.images_NHWC), axis=0)) == 1


def test_clusters_that_are_there_are_found():
    random = np.random.default_rng(0)
    centres = 10 * random.normal(size=(6, 8))
    truth = np.repeat(np.arange(6), 20)
    features = torch.from_numpy((centres[truth] + random.normal(size=(120, 8))).astype(np.float32))
    pairs = set(zip(truth.tolist(), k_means(features, 6, seed=0)[1].tolist(), strict=True))
    assert len(pairs) == 6
    with pytest.raises(UsageError, match="ask for at most 120"):
        k_means(features, 121, seed=0)


def test_k_means_survives_equal_features():
    centres, assignment = k_means(torch.ones(10, 4), 3, seed=0)
    assert torch.isfinite(centres).all()
    assert len(assignment) == 10
