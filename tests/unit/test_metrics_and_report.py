"""Distances against slow references; pictures and pages that open."""

import base64
import io
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from support.builders import make_pixels

from one4all import distances as metrics
from one4all.distances import luminance, max_difference, psnr_db, ssim
from one4all.errors import UsageError
from one4all.evaluation.feature_distance import feature_distance
from one4all.report import (
    Section,
    contact_sheet,
    middle,
    plot_accuracies,
    plot_confusion,
    plot_curves,
    plot_loss_curves,
    sample_grid,
    to_png,
    write_report,
)


def slow_ssim(first, second):
    """Window by window, as the formula reads."""
    x, y = luminance(first).astype(float), luminance(second).astype(float)
    weights = np.array([math.exp(-((i - 5) ** 2) / 4.5) for i in range(11)])
    window = np.outer(weights, weights) / weights.sum() ** 2
    c1, c2 = 6.5025, 58.5225
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
            cov = (window * (a - ma) * (b - mb)).sum()
            values.append(
                (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
            )
    return float(np.mean(values))


def test_distances_equal_their_definitions():
    first = make_pixels(24, 30, seed=1)
    second = np.clip(
        first.astype(int) + np.random.default_rng(0).integers(-9, 8, first.shape), 0, 255
    )
    second = second.astype(np.uint8)
    difference = first.astype(int) - second
    assert max_difference(first, second) == max_difference(second, first) == abs(difference).max()
    mse = np.mean(difference.astype(float) ** 2)
    assert psnr_db(first, second) == pytest.approx(10 * math.log10(255**2 / mse))
    assert abs(ssim(first, second) - slow_ssim(first, second)) < 1e-3
    white = np.full((300, 300, 3), 255, np.uint8)
    assert psnr_db(white, np.zeros_like(white)) == 0  # no digit of a large sum is lost


def test_a_distance_leaves_no_thread_spinning():
    """OpenBLAS has one for each core, which waits for more work at full speed."""
    program = (
        "import time, numpy as np; from one4all.distances import psnr_db; "
        "psnr_db(np.zeros((400, 400, 3), np.uint8), np.full((400, 400, 3), 90, np.uint8)); "
        "before = time.process_time(); time.sleep(0.2); print(time.process_time() - before)"
    )
    limits = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in limits}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 0.005


def test_bands_change_nothing(monkeypatch):
    first, second = make_pixels(90, 40), make_pixels(90, 40, seed=1)
    whole = (max_difference(first, second), psnr_db(first, second), ssim(first, second))
    monkeypatch.setattr(metrics, "_BAND_PIXELS", 400)
    banded = (max_difference(first, second), psnr_db(first, second), ssim(first, second))
    assert banded == pytest.approx(whole, rel=1e-5)


def test_identical_images_have_finite_distances():
    image = make_pixels(1, 3, 4)
    assert (max_difference(image, image), psnr_db(image, image), ssim(image, image)) == (
        0,
        99.0,
        1.0,
    )


@pytest.mark.slow
def test_feature_distance_grows_with_the_change_and_is_symmetric():
    image = make_pixels(32, 32)
    noise = np.random.default_rng(0).choice([-1, 1], image.shape)
    near, far = (np.clip(image + level * noise, 0, 255).astype(np.uint8) for level in (4, 16))
    assert feature_distance(image, image) == 0
    assert 0 < feature_distance(image, near) < feature_distance(image, far)
    assert feature_distance(image, far) == pytest.approx(feature_distance(far, image))


@pytest.mark.parametrize(("num_names", "rows"), [(1, 1), (3, 1), (4, 2)])
def test_training_curves_have_a_panel_for_whatever_was_logged(tmp_path, num_names, rows):
    names = [f"scalar {i}" for i in range(num_names)]
    history = [{"step": step, **dict.fromkeys(names, 1.0 * step)} for step in (1, 2, 5)]
    del history[1][names[-1]]  # an older version did not log it
    heights = []
    for path, entries in (("one.png", [{"step": 1, "loss": 0.5}]), ("all.png", history)):
        plot_loss_curves(entries, tmp_path / path)
        with Image.open(tmp_path / path) as curves:
            heights.append(curves.height)
    assert heights[1] == rows * heights[0]
    blank = tmp_path / "blank.png"
    plot_loss_curves([dict.fromkeys(["step", *names], math.nan)], blank)
    assert (tmp_path / "all.png").read_bytes() != blank.read_bytes()


def test_curve_of_validation_is_in_the_panel_of_training(tmp_path):
    names = ["loss", "l1", "l2"]
    plain = [{"step": step, **dict.fromkeys(names, 1.0 * step)} for step in (1, 2, 5)]
    seen = [*plain[:2], plain[2] | {f"validation_{name}": 2.0 for name in names}]
    sizes, pictures = [], []
    for path, entries in (("plain.png", plain), ("seen.png", seen)):
        plot_loss_curves(entries, tmp_path / path)
        with Image.open(tmp_path / path) as curves:
            sizes.append(curves.size)
            pictures.append(curves.tobytes())
    assert sizes[0] == sizes[1]
    assert pictures[0] != pictures[1]


def test_curves_and_confusion_are_png_files():
    curves = plot_curves({"a": [(0, 1), (2, 3)], "b": []}, xlabel="x", ylabel="y", title="t")
    small = plot_confusion([[3, 1], [0, 0]], title="t", names=("cat", "dog"))
    large = plot_confusion(np.eye(30), title="t")
    for png in (curves, small, large):
        with Image.open(io.BytesIO(png)) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 200
    with pytest.raises(UsageError, match=r"\(2, 3\) with 0 names"):
        plot_confusion(np.ones((2, 3)), title="t")


def test_sample_grid_has_a_column_a_method_and_a_row_an_image():
    red = np.full((32, 32, 3), (255, 0, 0), np.uint8)
    blue = np.full((200, 100, 3), (0, 0, 255), np.uint8)
    grid = sample_grid([("clean", [red, blue]), ("a very long caption " * 3, [red, red])], tile=96)
    assert grid.height == 24 + 2 * (96 + 8)
    assert grid.getpixel((8 + 95, 24 + 95)) == (255, 0, 0)
    assert grid.getpixel((8, 24 + 96 + 8)) == (0, 0, 255)
    assert grid.getpixel((8 + 96 + 8, 24)) == (255, 0, 0)
    assert grid.width > 300
    with pytest.raises(UsageError, match=r"\[1, 2\]"):
        sample_grid([("a", [red]), ("b", [red, red])])


def test_contact_sheet_shows_images_at_their_own_size_side_by_side():
    small = make_pixels(20, 30)
    large, changed = make_pixels(300, 200), make_pixels(300, 200, seed=1)
    sheet = np.asarray(contact_sheet([("a", small, small), ("b", large, changed)], window=150))
    top, lefts = 32, [8 + column * (150 + 8) for column in range(3)]
    for left, expected in zip(lefts, (small, small, np.full_like(small, 128)), strict=True):
        assert (sheet[top : top + 20, left : left + 30] == expected).all()
    top += 20 + 32
    middle = np.s_[75:225, 25:175]
    for left, expected in zip(lefts[:2], (large[middle], changed[middle]), strict=True):
        assert (sheet[top : top + 150, left : left + 150] == expected).all()
    assert sheet.shape[0] == top + 150 + 32
    long = contact_sheet([("a long caption" * 50, small, small)])
    assert long.width > 50 * 60


def test_report_is_one_file_with_its_pictures_inside(tmp_path):
    plot = plot_accuracies({"clean": [0.6, 0.7], "x": [0.1, 0.2]}, chance=0.1, title="t")
    gallery = [
        [("clean", to_png(middle(np.zeros((9, 7, 1), np.uint8), 5))), ("first\nsecond", plot)]
    ]
    section = Section("<One>", ["text & more"], [("a", "b"), (1, 2)], [("plot", plot)], gallery)
    write_report(tmp_path / "r.html", title="T", summary="S", sections=[section])
    html = (tmp_path / "r.html").read_text()
    assert "&lt;One&gt;" in html
    assert "<td>2</td>" in html
    files = re.findall('data:image/png;base64,([^"]*)', html)
    assert len(files) == 3
    with Image.open(io.BytesIO(base64.b64decode(files[0]))) as shown:
        assert (shown.size, shown.mode) == ((5, 5), "RGB")
    assert "<figcaption>first\nsecond</figcaption>" in html
    assert "http" not in html
