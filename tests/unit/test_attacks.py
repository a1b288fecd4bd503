"""Attacks against slow references and against what they promise."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from one4all.distances import psnr_db
from one4all.errors import ConfigError, UsageError
from one4all.evaluation.adversaries import AdversaryConfig, train_adversary
from one4all.evaluation.attacks import _ALL, ATTACKS, Purifier, TrainingAttack, find_attack
from one4all.evaluation.attacks.projection import find_directions, remove_directions
from one4all.evaluation.attacks.purification import gaussian_blur, gaussian_taps, reduce_bit_depth
from one4all.evaluation.attacks.training import (
    adversarial_loss,
    cutmix_loss,
    cutout_loss,
    erase,
    mixup_loss,
    pgd,
    plasma,
    soft_labels,
    ueraser_loss,
)
from one4all.evaluation.labelled import LabelledImages

pytestmark = pytest.mark.slow

PURIFIERS = [a for a in ATTACKS.values() if isinstance(a, Purifier)]
IN_TRAINING = [a for a in ATTACKS.values() if isinstance(a, TrainingAttack)]


def by_name(attack):
    return attack.name


def smooth(count: int, *, size: int = 24, seed: int = 0) -> LabelledImages:
    """Colour gradients with noise; class = which side is bright."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    ramp = np.linspace(0, 1, size)
    sides = np.stack(
        [np.add.outer(ramp, 0 * ramp), np.add.outer(0 * ramp, ramp), np.outer(ramp, ramp)]
    )
    images = 150 * sides[labels][..., None] + random.uniform(0, 40, (count, 1, 1, 3))
    images += random.normal(40, 5, images.shape)
    return LabelledImages(images.round().clip(0, 255).astype(np.uint8), labels.astype(np.int64))


@pytest.fixture(scope="module")
def images() -> LabelledImages:
    return smooth(70)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 5, 4), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(150, 3)
    return nn.Sequential(*layers)


def batch_of(images: LabelledImages, count: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.from_numpy(images.images_NHWC[:count]).permute(0, 3, 1, 2).float()
    return pixels, torch.from_numpy(images.labels_N[:count])


def test_attacks_are_found_by_name_and_travel_to_workers():
    assert len(ATTACKS) == len(_ALL), "two attacks of one name"
    assert "none" not in ATTACKS, "the absence of an attack, in a grid"
    for name, attack in ATTACKS.items():
        assert find_attack(name) is attack
        assert pickle.loads(pickle.dumps(attack)) == attack
        assert attack.description
    with pytest.raises(ConfigError, match=r"no attack 'jpeg-11'; there are blur-0.5, .*-8"):
        find_attack("jpeg-11")


# --- purification ----------------------------------------------------------------------------


@pytest.mark.parametrize("purifier", PURIFIERS, ids=by_name)
def test_purifier_changes_pixels_and_nothing_else(purifier, images):
    before = images.images_NHWC.copy()
    first, again = (purifier.purify(images, seed=0) for _ in range(2))
    np.testing.assert_array_equal(images.images_NHWC, before)
    np.testing.assert_array_equal(first.images_NHWC, again.images_NHWC)
    np.testing.assert_array_equal(first.labels_N, images.labels_N)
    assert first.images_NHWC.shape == before.shape
    assert first.images_NHWC.dtype == np.uint8
    difference = np.abs(first.images_NHWC.astype(int) - before)
    assert difference.mean() > 1
    assert difference.reshape(len(before), -1).max(axis=1).min() > 0  # each image
    if purifier.name not in ("opa", "opa-centred", "bit-depth-2"):
        assert difference.mean() < 16


def test_purifier_writes_where_it_is_told(images, tmp_path):
    out = np.lib.format.open_memmap(
        tmp_path / "out.npy", mode="w+", dtype=np.uint8, shape=images.images_NHWC.shape
    )
    result = find_attack("jpeg-50").purify(images, seed=0, out=out)
    assert result.images_NHWC is out
    with pytest.raises(UsageError, match=r"out is \(1, 24, 24, 3\) uint8"):
        find_attack("jpeg-50").purify(images, seed=0, out=out[:1])


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_blur_equals_direct_convolution(sigma, images):
    image = images.images_NHWC[0]
    padded = np.pad(image, ((11, 11), (11, 11), (0, 0)), mode="symmetric").astype(float)
    window = np.outer(gaussian_taps(sigma), gaussian_taps(sigma))
    expected = np.zeros(image.shape)
    for row, column in np.ndindex(*image.shape[:2]):
        patch = padded[row : row + 23, column : column + 23]
        expected[row, column] = (window[:, :, None] * patch).sum(axis=(0, 1))
    assert window.sum() == pytest.approx(1)
    assert window[11, 11] < 0.7  # far from the identity
    blurred = gaussian_blur(image[None], sigma=sigma)[0]
    assert np.abs(blurred - expected).max() <= 0.501


def test_two_bits_are_the_highest():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    np.testing.assert_array_equal(reduce_bit_depth(levels, bits=2), levels // 64 * 64)


def test_lower_jpeg_quality_loses_more(images):
    def quality(name: str) -> float:
        purified = find_attack(name).purify(images, seed=0).images_NHWC
        pairs = zip(images.images_NHWC, purified, strict=True)
        return float(np.mean([psnr_db(before, after) for before, after in pairs]))

    found = [quality(f"jpeg-{q}") for q in (10, 30, 50, 75, 90)]
    assert found == sorted(found)
    assert found[-1] - found[0] > 3


def test_projection_takes_a_class_pattern_away():
    """Noise images with a pattern of +-8 levels per class: linear, so it is found and removed."""
    random = np.random.default_rng(0)
    patterns = random.choice((-8, 8), (3, 16, 16, 3))
    labels = random.integers(0, 3, 300)
    pixels = (random.normal(128, 20, (300, 16, 16, 3)) + patterns[labels]).clip(0, 255)
    images = LabelledImages(pixels.astype(np.uint8), labels.astype(np.int64))
    directions = find_directions(images, seed=0)
    torch.testing.assert_close(directions.T @ directions, torch.eye(3), atol=1e-5, rtol=0)
    flat = torch.from_numpy(images.images_NHWC).flatten(1).float() / 255
    assert (remove_directions(flat, directions) @ directions).abs().max() < 1e-4

    def separation(values: np.ndarray) -> float:
        """Mean agreement of the class means with their patterns, in levels."""
        centred = values.astype(float) - values.mean(axis=0)
        means = np.stack([centred[labels == k].mean(axis=0) for k in range(3)])
        return float((means * (patterns - patterns.mean(axis=0))).mean() / 8)

    before = images.images_NHWC
    for name in ("opa", "opa-centred"):
        after = find_attack(name).purify(images, seed=0).images_NHWC
        assert separation(after) < 0.25 * separation(before)
    assert abs(after.mean() - before.mean()) < 1


# --- in training -----------------------------------------------------------------------------


@pytest.mark.parametrize("attack", IN_TRAINING, ids=by_name)
def test_training_attack_is_a_seeded_loss_that_reaches_the_weights(attack, images, network):
    pixels, labels = batch_of(images)
    before = pixels.clone()
    state = torch.random.get_rng_state()
    twin = copy.deepcopy(network)  # a loss moves the statistics of batch norm
    first, again = (
        attack.loss(n, pixels, labels, np.random.default_rng(1)) for n in (network, twin)
    )
    assert first == again
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(pixels, before)
    assert network.training
    first.backward()
    assert all(p.grad is not None for p in network.parameters())


class Recorder(nn.Module):
    """Keeps what it is shown; its logits know which images those were."""

    def forward(self, image):
        self.seen = image
        return torch.stack([image.mean(dim=(1, 2, 3)) * k / 255 for k in range(3)], dim=1)


def test_mixup_equals_its_definition(images):
    pixels, labels = batch_of(images)
    recorder = Recorder()
    loss = mixup_loss(recorder, pixels, labels, np.random.default_rng(4))
    random = np.random.default_rng(4)
    share, other = random.beta(1, 1), torch.from_numpy(random.permutation(16))
    torch.testing.assert_close(recorder.seen, share * pixels + (1 - share) * pixels[other])
    logits = recorder(recorder.seen)
    expected = share * F.cross_entropy(logits, labels) + (1 - share) * F.cross_entropy(
        logits, labels[other]
    )
    torch.testing.assert_close(loss, expected, check_dtype=False)
    soft = soft_labels(labels, labels[other], share, 3)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(16))


def test_cutmix_mixes_labels_by_area():
    """Images 0 and 255: the mean of a mixed image is its share of the bright one."""
    labels = torch.tensor([0, 1])
    pixels = labels.float().view(2, 1, 1, 1).expand(2, 3, 20, 20) * 255
    shares = []

    class Check(Recorder):
        def forward(self, image):
            shares.append(float(image[0].mean() / 255))
            return torch.log(torch.tensor([[0.3, 0.7], [0.3, 0.7]]))

    for seed in range(40):
        loss = cutmix_loss(Check(), pixels, labels, np.random.default_rng(seed))
        share = shares[-1]  # of label 1 in the first image, and of label 0 in the second
        swapped = -(np.log(0.3) + np.log(0.7)) / 2
        assert float(loss) == pytest.approx(swapped, abs=1e-5)
        assert 0 <= share <= 1
    assert 8 < sum(share > 0 for share in shares) < 32


def test_cutout_hides_up_to_a_quarter():
    pixels = torch.zeros(200, 3, 32, 32)
    recorder = Recorder()
    cutout_loss(recorder, pixels, torch.zeros(200, dtype=torch.long), np.random.default_rng(0))
    hidden = (recorder.seen == 127.5).all(dim=1).sum(dim=(1, 2))
    assert hidden.max() == 16 * 16
    assert hidden.min() >= 8 * 8
    assert not pixels.any()


def test_plasma_is_fractal_and_spans_the_range():
    maps = plasma(8, 64, np.random.default_rng(0))
    assert maps.shape == (8, 1, 64, 64)
    assert float(maps.amin(dim=(2, 3)).max()) == 0
    assert float(maps.amax(dim=(2, 3)).min()) == 1
    steps = (maps.diff(dim=3) ** 2).mean().sqrt()
    assert 0.01 < steps < 0.5 * maps.std()  # neither constant nor white noise


def test_ueraser_changes_pixels_and_its_worst_draw_is_no_better_than_one(images, network):
    pixels, labels = batch_of(images, 70)
    drawn = erase(pixels, np.random.default_rng(0))
    assert drawn.min() >= 0
    assert drawn.max() <= 255
    assert ((drawn - pixels).abs().mean(dim=(1, 2, 3)) > 5).all()
    network.eval()  # batch norm would make one image's loss depend on the others
    for seed in range(5):
        lite, worst = (
            ueraser_loss(network, pixels, labels, np.random.default_rng(seed), num_draws=n)
            for n in (1, 5)
        )
        assert worst > lite


@pytest.mark.parametrize("epsilon", [2, 4, 8])
def test_pgd_stays_within_budget_and_raises_the_loss(epsilon, images, network):
    pixels, labels = batch_of(images)
    random = np.random.default_rng(0)
    attacked = pgd(network, pixels, labels, random, epsilon_levels=epsilon)
    assert (attacked - pixels).abs().max() <= epsilon + 1e-4
    assert attacked.min() >= 0
    assert attacked.max() <= 255
    assert network.training
    assert all(p.grad is None for p in network.parameters())
    network.eval()
    losses = [F.cross_entropy(network(x), labels) for x in (pixels, attacked)]
    assert losses[1] > losses[0]
    repeated = adversarial_loss(
        network, pixels, labels, np.random.default_rng(0), epsilon_levels=epsilon
    )
    torch.testing.assert_close(repeated, losses[1])


# --- together --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["jpeg-10", "opa", "mixup", "ueraser-max", "adversarial-4"])
def test_attacked_adversary_is_seeded_and_still_learns(name):
    train, test = smooth(256), smooth(96, seed=1)
    config = AdversaryConfig(width=8, epochs=3, batch_size=16)
    first, second = (
        train_adversary(train, test, config, attack=find_attack(name), seed=0) for _ in range(2)
    )
    assert first == second
    plain = train_adversary(train, test, config, seed=0)
    assert first.curve != plain.curve or first.predictions != plain.predictions
    if name in ("jpeg-10", "mixup", "adversarial-4"):
        assert first.peak > 0.6
