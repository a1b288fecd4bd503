"""What is said about a perturbation, on corpora where the answer is known."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from support.builders import TINY_ENCODER, make_pixels

from one4all.clustering import k_means
from one4all.concepts import ConceptBank
from one4all.encoders import load_encoder
from one4all.errors import UsageError
from one4all.evaluation import diagnostics
from one4all.evaluation.diagnostics import (
    codec_survival,
    concept_cosines,
    delta_distances,
    delta_separability,
    diagnose,
    distortion,
    encoder_purity,
    loss_by_k,
)
from one4all.evaluation.labelled import LabelledImages
from pipelines.evaluation.records import DiagnosisRecord

SIDE, NUM_CLASSES = 32, 4


@pytest.fixture(scope="module")
def clean():
    """Mid-range pictures, so that nothing is clipped; labels have nothing to do with them."""
    pictures = [make_pixels(SIDE, SIDE, seed=seed) // 2 + 64 for seed in range(160)]
    return LabelledImages(np.stack(pictures), np.arange(160) % NUM_CLASSES)


@pytest.fixture(scope="module")
def encoder():
    return load_encoder(TINY_ENCODER)


@pytest.fixture(scope="module")
def bank(encoder):
    return ConceptBank.build("broad", encoder)


def protect(clean, deltas):
    """Copies with a perturbation for each image, within 8 levels."""
    images = clean.images_NHWC + np.clip(np.rint(deltas), -8, 8)
    return LabelledImages(images.astype(np.uint8), clean.labels_N)


def white_noise(number):
    return np.random.default_rng(1).choice([-8, 8], (number, SIDE, SIDE, 3))


def smooth_patterns(number):
    """Random 4x4 colours, enlarged."""
    coarse = np.random.default_rng(2).uniform(0, 255, (number, 4, 4, 3)).astype(np.uint8)
    large = [Image.fromarray(c).resize((SIDE, SIDE), Image.Resampling.BILINEAR) for c in coarse]
    return (np.stack([np.asarray(image) for image in large]).astype(float) - 127.5) / 16


def test_class_patterns_are_separable_and_random_noise_is_not(clean):
    shift = np.random.default_rng(3).normal(0, 1, (160, 1, 1, 1))
    patterns = smooth_patterns(NUM_CLASSES)[clean.labels_N] + shift
    by_class, by_chance = protect(clean, patterns), protect(clean, white_noise(160))
    assert delta_separability(clean, by_class).accuracy > 0.98
    found = delta_separability(clean, by_chance)
    assert abs(found.accuracy - found.majority) < 0.15
    assert found.majority == 0.25
    assert delta_distances(clean, by_class).ratio > 3
    distances = delta_distances(clean, by_chance)
    assert distances.ratio < 0.25
    assert distances.ratio == pytest.approx(distances.shuffled_ratio, rel=0.05)


def test_distances_equal_their_definition(clean):
    protected = protect(clean, white_noise(160) * (1 + clean.labels_N)[:, None, None, None] / 4)
    delta = (protected.images_NHWC.astype(float) - clean.images_NHWC).reshape(160, -1)
    means = [delta[clean.labels_N == c].mean(axis=0) for c in range(NUM_CLASSES)]
    within = np.mean(
        [
            np.mean([math.dist(row, means[c]) for row in delta[clean.labels_N == c]])
            for c in range(NUM_CLASSES)
        ]
    )
    between = np.mean([math.dist(means[a], means[b]) for a in range(4) for b in range(a)])
    found = delta_distances(clean, protected)
    assert (found.within, found.between) == pytest.approx((within, between), rel=1e-5)
    assert found.ratio == pytest.approx(between / within, rel=1e-4)


@pytest.mark.slow
def test_identical_copies_have_no_distance_and_the_diagnosis_survives_the_disk(
    clean, encoder, bank
):
    found = diagnose(clean, clean, encoder, bank, max_images=40)
    assert found.num_images == 40
    assert found.separability.accuracy == 0.25
    assert (found.distances.within, found.distances.between, found.distances.ratio) == (0, 0, 0)
    cosines = found.cosines
    assert cosines.changed == 0
    assert cosines.own_before == cosines.own_after > cosines.opposite_before
    assert cosines.opposite_before == cosines.opposite_after
    assert (found.distortion.psnr_db, found.distortion.worst_psnr_db) == (99, 99)
    assert (found.distortion.max_levels, found.distortion.feature_distance) == (0, 0)
    assert all((s.kept, s.error_levels) == (0, 0) for s in found.survival)
    assert list(found.purity.purity) == [10]
    assert found.losses[0].k == 1
    record = DiagnosisRecord(diagnosis=found, picture=bytes(range(256)))
    assert DiagnosisRecord.model_validate_json(record.model_dump_json()) == record
    assert found == diagnose(clean, clean, encoder, bank, max_images=40)


def test_smooth_perturbations_survive_and_white_noise_does_not(clean):
    few = LabelledImages(clean.images_NHWC[:24], clean.labels_N[:24])
    smooth = protect(few, smooth_patterns(24))
    noisy = protect(few, white_noise(24))
    written, rough = codec_survival(few, smooth, codecs=("jpeg-95-444", "jpeg-75"))
    assert written.kept == pytest.approx(1, abs=0.05)
    assert written.error_levels < rough.error_levels < 4
    (noise,) = codec_survival(few, noisy, codecs=("jpeg-75",))
    assert noise.kept < 0.5 < rough.kept
    with pytest.raises(UsageError, match="name a purifier"):
        codec_survival(few, noisy, codecs=("mixup",))


def test_distortion_reports_mean_and_worst(clean):
    two = LabelledImages(clean.images_NHWC[:2], clean.labels_N[:2])
    levels = np.array([2, -8])[:, None, None, None]
    found = distortion(two, protect(two, levels))
    psnr = [10 * math.log10(255**2 / square) for square in (4, 64)]
    assert found.psnr_db == pytest.approx(np.mean(psnr))
    assert found.worst_psnr_db == pytest.approx(psnr[1])
    assert found.worst_ssim < found.ssim < 1
    assert (found.max_levels, found.mean_levels) == (8, 5)


@pytest.mark.slow
def test_purity_is_one_for_a_cluster_an_image_and_chance_for_one(clean, encoder):
    few = LabelledImages(clean.images_NHWC[:40], clean.labels_N[:40])
    found = encoder_purity(few, encoder, ks=(1, 40))
    assert found.purity == found.shuffled == {1: 0.25, 40: 1}
    with pytest.raises(UsageError, match="41 clusters of 40 points"):
        encoder_purity(few, encoder, ks=(41,))


def test_k_means_and_the_probe_find_separate_clouds():
    generator = torch.Generator().manual_seed(0)
    labels = np.arange(90) % 3
    clouds = 10 * torch.eye(3)[labels] + torch.randn(90, 3, generator=generator)
    clusters = k_means(clouds, 3, seed=1)[1].numpy()
    assert len({(c, label) for c, label in zip(clusters, labels, strict=True)}) == 3
    assert diagnostics._probe(clouds, labels, 0).accuracy == 1


@pytest.mark.slow
def test_cosines_and_losses_equal_slow_references(clean, encoder, bank):
    few = LabelledImages(clean.images_NHWC[:6], clean.labels_N[:6])
    protected = protect(few, white_noise(6))
    texts = bank.embeddings.double().numpy()
    centred = texts - texts.mean(axis=0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    x, y = (
        encoder.encode_image(torch.from_numpy(both.images_NHWC).permute(0, 3, 1, 2))
        .double()
        .numpy()
        for both in (few, protected)
    )
    own = [max(range(len(texts)), key=lambda n, i=i: x[i] @ texts[n]) for i in range(6)]
    opposite = [min(range(len(texts)), key=lambda n, i=i: x[i] @ centred[n]) for i in range(6)]
    found = concept_cosines(few, protected, encoder, bank)
    assert found.own_before == pytest.approx(np.mean([x[i] @ texts[own[i]] for i in range(6)]))
    assert found.own_after == pytest.approx(np.mean([y[i] @ texts[own[i]] for i in range(6)]))
    assert found.changed == np.mean([np.argmax(texts @ y[i]) != own[i] for i in range(6)])
    for loss in loss_by_k(few, protected, encoder, bank, ks=(1, 3)):
        similar = [sorted(range(len(texts)), key=lambda n, i=i: -x[i] @ texts[n]) for i in range(6)]
        l1 = np.mean([1 - y[i] @ texts[opposite[i]] for i in range(6)])
        l2 = np.mean([1 - y[i] @ texts[n] for i in range(6) for n in similar[i][: loss.k]])
        assert (loss.l1, loss.l2) == pytest.approx((l1, l2), rel=1e-5)
        assert loss.log_ratio == pytest.approx(math.log(l1 / l2), rel=1e-4, abs=1e-5)


def test_other_corpora_are_refused(clean, encoder, bank):
    shuffled = LabelledImages(clean.images_NHWC, clean.labels_N[::-1])
    with pytest.raises(UsageError, match="copies of one corpus"):
        diagnose(clean, shuffled, encoder, bank)
