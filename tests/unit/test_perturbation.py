"""The budget holds for every image, by construction."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.builders import make_pixels

from one4all import perturbation
from one4all.perturbation import apply_perturbation, around_middle, resize_perturbation


@settings(max_examples=60, deadline=None)
@given(
    clean=hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))),
    delta=hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 12), st.integers(1, 12), st.just(3)),
        elements=st.floats(-1000, 1000, width=32),
    ),
    epsilon=st.integers(0, 20),
)
def test_no_image_and_no_perturbation_breaks_the_budget(clean, delta, epsilon):
    protected = apply_perturbation(clean, delta, epsilon_levels=epsilon)
    assert protected.dtype == np.uint8
    difference = np.abs(protected.astype(int) - clean)
    assert difference.max() <= epsilon
    if clean.shape[2] in (2, 4):
        np.testing.assert_array_equal(protected[:, :, -1], clean[:, :, -1])


@pytest.mark.parametrize("size", [(7, 90), (33, 33), (64, 48), (200, 301), (600, 20)])
def test_bands_equal_resizing_the_whole(size, monkeypatch):
    monkeypatch.setattr(perturbation, "_BAND_PIXELS", 1000)
    delta = np.random.default_rng(0).uniform(-8, 8, (32, 32, 3)).astype(np.float32)
    clean = np.full((*size, 3), 128, np.uint8)
    whole = resize_perturbation(torch.from_numpy(delta).permute(2, 0, 1)[None], size)
    expected = 128 + np.rint(whole[0].permute(1, 2, 0).numpy())
    found = apply_perturbation(clean, delta, epsilon_levels=8)
    # Two ways of interpolating may round one value in thousands to the other side.
    assert (found != expected).mean() < 1e-3
    assert np.abs(found - expected).max() <= 1
    monkeypatch.setattr(perturbation, "_MANY_ROWS", 1 if size[0] < 600 else 1000)
    again = apply_perturbation(clean, delta, epsilon_levels=8)
    np.testing.assert_array_equal(again, found)  # rows one by one, or many together


def test_values_are_rounded_not_cut():
    clean = np.full((1, 2, 3), 100, np.uint8)
    delta = np.array([[[0.6, -0.6, 7.5]]], np.float32)
    protected = apply_perturbation(clean, delta, epsilon_levels=8)
    assert protected[0, 0].tolist() == [101, 99, 108]


def test_gray_image_gets_the_green_channel_of_the_perturbation():
    delta = np.full((4, 4, 3), -8, np.float32)
    delta[:, :, 1] = 8
    protected = apply_perturbation(make_pixels(4, 4, 1), delta, epsilon_levels=8)
    assert protected.shape == (4, 4, 1)
    assert (protected.astype(int) - make_pixels(4, 4, 1)).max() == 8


@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40), (40, 40)])
def test_a_pattern_lies_on_the_middle_square_and_reaches_to_the_edges(height, width):
    delta = np.zeros((8, 8, 3), np.float32)
    delta[:, :4], delta[:, 4:], delta[:4, 3:5] = -8, 8, 0
    clean = np.full((height, width, 3), 100, np.uint8)
    whole = around_middle(delta, height, width)
    protected = apply_perturbation(clean, whole, epsilon_levels=8)
    top, left = (height - 40) // 2, (width - 40) // 2
    middle = protected[top : top + 40, left : left + 40]
    square = apply_perturbation(clean[:40, :40], delta, epsilon_levels=8)
    np.testing.assert_array_equal(middle[2:-2, 2:-2], square[2:-2, 2:-2])
    assert (protected[:, 0] == 92).all()
    assert (protected[:, -1] == 108).all()


def test_a_pattern_of_a_panorama_is_stretched_and_does_not_grow_without_limit():
    delta = np.zeros((8, 8, 3), np.float32)
    assert around_middle(delta, 1, 50_000).shape == (8, 32, 3)
    assert around_middle(delta, 50_000, 1).shape == (32, 8, 3)
