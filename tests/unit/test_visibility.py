"""Visibility: zero for what is the same, worse for what is worse, whatever the size."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from support.builders import make_pixels

from one4all import visibility as module
from one4all.visibility import IDENTICAL, Visibility, VisibilitySummary, visibility


def noisy(image, levels):
    noise = np.random.default_rng(0).choice([-levels, levels], image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def smooth(height, width):
    noise = np.random.default_rng(1).normal(size=(height, width, 3))
    field = gaussian_filter(noise, (6, 6, 0), mode="wrap")
    return np.clip(128 + 40 * field / field.std(), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "shape", [(96, 64, 3), (64, 64, 1), (40, 50, 4), (30, 30, 2), (5, 9, 3), (1, 1, 3)], ids=str
)
def test_identical_images_are_invisible(shape, capfd):
    image = make_pixels(*shape)
    assert visibility(image, image.copy()) == IDENTICAL
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("shape", [(96, 64), (5, 9)], ids=str)
def test_more_noise_is_worse_by_all_three(shape):
    image = smooth(*shape)
    faint, strong = (visibility(image, noisy(image, levels)) for levels in (2, 8))
    assert 0 < faint.ciede2000 < strong.ciede2000
    assert 0 < faint.flip < strong.flip < 1
    assert 100 > faint.ssimulacra2 > strong.ssimulacra2


def test_colour_differences_are_those_of_the_formula():
    from skimage.color import deltaE_ciede2000

    pairs = {  # Sharma et al., 2005, Table 1: pairs 1, 7, 17 and 25
        ((50, 2.6772, -79.7751), (50, 0, -82.7485)): 2.0425,
        ((50, 0, 0), (50, -1, 2)): 2.3669,
        ((50, 2.5, 0), (73, 25, -18)): 27.1492,
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387)): 1.2644,
    }
    for (first, second), expected in pairs.items():
        found = deltaE_ciede2000(np.array(first), np.array(second))
        assert found == pytest.approx(expected, abs=1e-4)
    red, green = (np.full((4, 4, 3), c, np.uint8) for c in ((255, 0, 0), (0, 255, 0)))
    assert visibility(red, green).ciede2000 == pytest.approx(86.608, abs=0.01)


def test_alpha_is_left_out_and_gray_is_three_equal_channels():
    clean, protected = make_pixels(40, 40, 1), make_pixels(40, 40, 1, seed=1)
    expected = visibility(*(np.repeat(image, 3, axis=2) for image in (clean, protected)))
    alpha = np.zeros((2, 40, 40, 1), np.uint8)
    alpha[1] = 255
    with_alpha = [
        np.concatenate(pair, axis=2) for pair in zip((clean, protected), alpha, strict=True)
    ]
    assert visibility(clean, protected) == visibility(*with_alpha) == expected


def test_windows_bound_the_memory_and_change_no_mean_over_pixels(monkeypatch):
    clean = smooth(150, 310)
    protected = noisy(clean, 8)
    whole = visibility(clean, protected)
    sizes = []
    measure = module._ssimulacra2
    monkeypatch.setattr(module, "_WINDOW", 100)
    monkeypatch.setattr(
        module, "_ssimulacra2", lambda a, b: sizes.append(a.shape[:2]) or measure(a, b)
    )
    parts = visibility(clean, protected)
    assert sizes == [(75, w) for w in (77, 78, 77, 78)] * 2
    assert parts.ciede2000 == pytest.approx(whole.ciede2000, rel=1e-5)
    assert parts.flip == pytest.approx(whole.flip, rel=1e-5)
    assert parts.ssimulacra2 == pytest.approx(whole.ssimulacra2, abs=3)


@pytest.mark.parametrize("side", [224, 96, 64])
def test_quality_of_a_small_image_is_that_of_a_large_one(side):
    """The package alone says less than 0 of 96 pixels, for want of scales."""
    clean = smooth(256, 256)
    protected = noisy(clean, 8)
    large = visibility(clean, protected).ssimulacra2
    small = visibility(clean[:side, :side], protected[:side, :side]).ssimulacra2
    assert small == pytest.approx(large, abs=5)


def test_summary_has_the_mean_and_the_worst_of_each():
    summary = VisibilitySummary.of([Visibility(1, 0.2, 80), Visibility(3, 0.1, 90)])
    assert summary.num_images == 2
    assert summary.mean == Visibility(2, pytest.approx(0.15), 85)
    assert summary.worst == Visibility(3, 0.2, 80)
    assert str(summary) == "CIEDE2000 2.0 (3.0), FLIP 0.150 (0.200), SSIMULACRA2 85.0 (80.0)"
    assert summary.figures() == {
        "ciede2000": 2,
        "ciede2000_worst": 3,
        "flip": pytest.approx(0.15),
        "flip_worst": 0.2,
        "ssimulacra2": 85,
        "ssimulacra2_worst": 80,
    }
