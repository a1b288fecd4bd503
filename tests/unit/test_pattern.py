"""How a code looks on a picture: within the budget, without edges, and hidden in its colours."""

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from scipy.ndimage import gaussian_filter
from support.builders import make_pixels

from one4all.perturbation import apply_perturbation, around_middle
from one4all.protectors import pattern
from one4all.protectors.card import load_card
from one4all.protectors.config import STRENGTHS, PatternConfig
from one4all.protectors.pattern import draw_patterns, hide, paint

STRONG, DISCREET = STRENGTHS["strong"], STRENGTHS["discreet"]
GRAY_PROOF = STRENGTHS["gray-proof"]
BLURRED = STRONG.model_copy(update={"smoothing": 0.625})


def one_pattern(config: PatternConfig, *, seed: int = 0) -> np.ndarray:
    """(h, w, 3) in levels of a budget of 8."""
    return 8 * draw_patterns(1, config, seed=seed)[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("cells", [1, 3, 4])
@pytest.mark.parametrize("strength", STRENGTHS)
def test_patterns_look_the_same_in_a_mirror_and_are_of_two_colours(cells, strength):
    config = STRENGTHS[strength].model_copy(update={"cells": cells})
    drawn = draw_patterns(4, config, seed=0)
    assert drawn.shape == (4, 3, config.side, config.side)
    torch.testing.assert_close(drawn, drawn.flip(3))
    red, green, blue = drawn.unbind(1)
    assert torch.equal(red, green if config.stripes else -green)
    assert torch.equal(red, blue)
    assert drawn.abs().amax(dim=(1, 2, 3)).tolist() == pytest.approx([config.amplitude] * 4)


@pytest.mark.parametrize("cells", [1, 3, 4])
def test_stripes_are_upright_or_lying_and_leave_brightness_as_it_is(cells):
    config = GRAY_PROOF.model_copy(update={"cells": cells})
    bits = torch.stack([torch.ones(config.num_bits), -torch.ones(config.num_bits)])
    upright, lying = paint(bits, config)[:, 0]
    assert (upright == upright[:1]).all()
    torch.testing.assert_close(lying, upright.T)
    assert abs(upright.mean()) < 0.11
    changes = (upright[0].diff() != 0).sum()  # two in each period, but at the edges
    assert abs(int(changes) - 2 * cells * config.stripes) <= 1


def test_stripes_survive_gray_and_a_size_of_64_pixels():
    """What is left of them once a training pipeline has shrunk the photo, and averaged it."""
    clean = np.full((500, 700, 3), 128, np.uint8)
    delta = around_middle(one_pattern(GRAY_PROOF), 500, 700)
    protected = apply_perturbation(clean, hide(delta, clean, GRAY_PROOF), epsilon_levels=8)
    gray = (
        Image.fromarray(protected[:, 100:600]).convert("L").resize((64, 64), Image.Resampling.BOX)
    )
    assert np.asarray(gray, np.float64).std() > 3.5
    assert np.abs(protected.astype(int) - clean).max() == 8


def test_what_hides_a_colour_does_not_hide_stripes():
    with pytest.raises(ValidationError, match="smoothing does not hide stripes"):
        PatternConfig(stripes=5)


def test_protectors_made_before_stripes_keep_their_hash():
    assert "stripes" not in DISCREET.model_dump()
    assert PatternConfig.model_validate(GRAY_PROOF.model_dump()) == GRAY_PROOF
    shipped = "2621c2b394b122e4791a6d85dbd56a0d523af7526d040f46be6dc62dea24adbd"
    assert load_card("default").content_hash == shipped


@pytest.mark.parametrize("seed", range(5))
def test_up_to_256_codes_have_patterns_of_which_none_comes_twice(seed):
    patterns = draw_patterns(257, STRONG, seed=seed)
    assert patterns.shape == (257, 3, 32, 32)
    assert len(patterns[:256].unique(dim=0)) == 256
    assert torch.equal(patterns[256], patterns[0])


def test_a_bit_colours_its_cell_and_the_mirror_of_it():
    bits = -torch.ones(8)
    bits[3] = 1  # second row, second cell
    green = paint(bits[None], STRONG)[0, 1, 4::8, 4::8]
    expected = -torch.ones(4, 4)
    expected[1, 1:3] = 1
    assert torch.equal(green, expected)


def test_smoothed_patterns_have_no_edge_and_say_the_same():
    """Between two neighbours of a hard pattern lies the whole budget, twice."""
    bits = 2 * torch.randint(0, 2, (20, 8), generator=torch.Generator().manual_seed(0)) - 1
    before, after = paint(bits, STRONG), paint(bits, BLURRED)
    assert before.diff(dim=2).abs().max() == 2
    assert after.diff(dim=2).abs().max() < 0.35
    agree = (after[:, 1] * before[:, 1]).mean(dim=(1, 2))
    assert (agree > 0.2).all(), "the cells are not to be seen in it"


def test_a_blur_is_that_of_a_gaussian():
    cells = one_pattern(STRONG)[:, :, 1].astype(np.float64)
    expected = gaussian_filter(cells, 5.0, mode="nearest", truncate=3.0)
    expected *= 8 / np.abs(expected).max()
    np.testing.assert_allclose(one_pattern(BLURRED)[:, :, 1], expected, atol=2e-4)


def test_colour_of_the_photo_is_counted_in():
    """It changes what is added, but never its sign, and never beyond the budget."""
    delta = one_pattern(DISCREET)
    random = np.random.default_rng(0)
    coarse = random.uniform(-1, 1, (6, 8))
    tint = np.kron(coarse, np.ones((40, 40)))  # green here, magenta there, by up to 6 levels
    photo = 128 + 6 * tint[:, :, None] * [-1, 1, -1]
    clean = np.rint(photo).clip(0, 255).astype(np.uint8)
    whole = np.tile(delta, (1, 2, 1))[:, :42]
    added = hide(whole, clean, DISCREET)
    wanted, given = whole[:, :, 1], added[:, :, 1]
    assert (np.sign(given) * np.sign(wanted) >= 0).all()
    assert (np.abs(given) <= np.abs(wanted) / DISCREET.amplitude + 1e-5).all()
    assert np.abs(given).max() <= 8
    assert np.abs(given - wanted).max() > 1
    assert np.array_equal(added[:, :, 0], -given)
    assert np.array_equal(added[:, :, 2], -given)


def test_where_the_photo_is_green_less_green_is_added_and_where_magenta_more():
    config = PatternConfig(cells=1, masking=0)
    delta = one_pattern(config)
    if delta[0, 0, 1] < 0:
        delta = -delta
    clean = np.full((80, 80, 3), 128, np.uint8)
    clean[:, :40] += np.array([0, 8, 0], np.uint8)
    given = hide(delta, clean, config)[:, :, 1]
    assert given[:, 0].max() < delta[:, 0, 1].min() < given[:, -1].min()


def test_chroma_is_that_of_cielab():
    from skimage.color import rgb2lab

    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    _, a, b = np.moveaxis(rgb2lab(pixels), 2, 0)
    found = pattern._chroma(torch.from_numpy(pixels).float())
    np.testing.assert_allclose(found, np.hypot(a, b), atol=0.05)


def test_more_is_added_on_strong_colours_where_the_eye_sees_it_less():
    config = PatternConfig(in_place=0)
    delta = one_pattern(config)
    added = []
    for rgb in ([128, 128, 128], [190, 110, 60]):
        clean = np.broadcast_to(np.array(rgb, np.uint8), (64, 64, 3)).copy()
        added.append(np.abs(hide(delta, clean, config)[:, :, 1]).mean())
    assert added[0] == pytest.approx(np.abs(delta[:, :, 1]).mean(), rel=1e-3)
    assert 2.5 < added[1] / added[0] <= 1 / config.amplitude + 1e-6


def test_how_much_more_is_a_setting_and_gray_gets_what_it_gets():
    clean = {name: np.full((64, 64, 3), 128, np.uint8) for name in ("gray", "brownish")}
    clean["brownish"] += np.array([20, 0, -20], np.int8).astype(np.uint8)
    added = {name: [] for name in clean}
    for masking in (0, 1, 2):
        config = PatternConfig(in_place=0, masking=masking)
        delta = one_pattern(config)
        for name, pixels in clean.items():
            added[name].append(np.abs(hide(delta, pixels, config)).mean())
    assert added["gray"] == pytest.approx([added["gray"][0]] * 3, rel=1e-3)
    more = np.diff(added["brownish"])
    assert more[0] == pytest.approx(more[1], rel=0.02)
    assert more[0] > added["gray"][0] / 2
    with pytest.raises(ValidationError, match="masking"):
        PatternConfig(masking=3.1)


@pytest.mark.parametrize("channels", [1, 2])
def test_gray_has_no_colour_to_hide(channels):
    delta = one_pattern(DISCREET)
    assert hide(delta, make_pixels(50, 60, channels), DISCREET) is delta
    gray = np.repeat(make_pixels(50, 60, 1), 3, axis=2)
    np.testing.assert_allclose(hide(delta, gray, DISCREET), delta, atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (2, 2), (700, 5)])
def test_photos_smaller_than_the_pattern_are_counted_in_too(size):
    added = hide(one_pattern(DISCREET), make_pixels(*size), DISCREET)
    assert np.isfinite(added).all()
    assert np.abs(added).max() <= 8


def test_large_photo_is_looked_at_here_and_there_with_the_same_outcome():
    small = make_pixels(256, 320)
    large = np.kron(small, np.ones((10, 10, 1), np.uint8))
    delta = np.tile(one_pattern(DISCREET), (1, 2, 1))[:, :40]
    exact, sampled = hide(delta, small, DISCREET), hide(delta, large, DISCREET)
    np.testing.assert_allclose(sampled, exact, atol=0.15)
