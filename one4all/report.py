"""Numbers to pictures, plots and one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from one4all.errors import UsageError
from one4all.extras import require
from one4all.images import Pixels, colour
from one4all.text import drawn, shown
from one4all.training import VALIDATION

AMPLIFICATION = 12
_MOST_NUMBERED_CLASSES = 20
_CURVE_COLUMNS = 3


def contact_sheet(
    rows: Sequence[tuple[str, Pixels, Pixels]],
    *,
    window: int = 512,
    amplification: int = AMPLIFICATION,
) -> Image.Image:
    """A picture of clean image, protected image and amplified perturbation, one row each.

    One pixel of an image is one pixel of the sheet: what can be seen there can be seen anywhere.

    Args:
        rows: (caption, clean, protected), (H, W, C) uint8 each; the caption goes below its row.
        window: Side in pixels of what is shown, the middle of an image that is larger.
        amplification: Factor on the difference, which is drawn around middle gray.
    """
    margin, line = 8, 16
    font = ImageFont.load_default(size=12)
    titles = ("clean", "protected", f"perturbation x {amplification}")
    pictures, captions = [], []
    for caption, clean, protected in rows:
        before, after = middle(clean, window), middle(protected, window)
        pictures.append(
            [_to_rgb(p) for p in (before, after, _amplify(before, after, amplification))]
        )
        captions.append(shown(caption) + _cropped(clean, before))
    column = max(
        *(row[0].width for row in pictures), *(math.ceil(font.getlength(t)) for t in titles)
    )
    width = max(3 * (column + margin), *(math.ceil(font.getlength(c)) + margin for c in captions))
    heights = [row[0].height + line + 2 * margin for row in pictures]
    sheet = Image.new("RGB", (margin + width, line + 2 * margin + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    lefts = [margin + index * (column + margin) for index in range(3)]
    for left, title in zip(lefts, titles, strict=True):
        draw.text((left, margin), title, "black", font)
    top = line + 2 * margin
    for caption, row, height in zip(captions, pictures, heights, strict=True):
        for left, picture in zip(lefts, row, strict=True):
            sheet.paste(picture, (left, top))
        draw.text((margin, top + row[0].height + 2), caption, "#555555", font)
        top += height
    return sheet


def middle(pixels: Pixels, window: int) -> Pixels:
    """The middle of an image, at most ``window`` pixels a side."""
    top, left = (max(0, side - window) // 2 for side in pixels.shape[:2])
    return pixels[top : top + window, left : left + window]


def _cropped(pixels: Pixels, shown_part: Pixels) -> str:
    if pixels.shape == shown_part.shape:
        return ""
    (height, width), (rows, columns) = pixels.shape[:2], shown_part.shape[:2]
    return f" (drawn: the middle, {columns} x {rows} of {width} x {height} pixels)"


def sample_grid(columns: Sequence[tuple[str, Sequence[Pixels]]], tile: int = 96) -> Image.Image:
    """A picture of the same images under several methods: one column a method, one row an image.

    Args:
        columns: (caption, images) pairs, (H, W, C) uint8 each, the same number in each column.
        tile: Side of the square that holds an image; a longer caption widens its column.

    Raises:
        UsageError: No columns, or columns of several lengths.
    """
    num_rows = {len(images) for _, images in columns}
    if len(num_rows) != 1:
        raise UsageError(f"columns hold {sorted(num_rows)} images; one row needs one from each")
    margin, header = 8, 24
    font = ImageFont.load_default(size=12)
    columns = [(shown(caption), images) for caption, images in columns]
    widths = [max(tile, math.ceil(font.getlength(caption))) for caption, _ in columns]
    size = (sum(widths) + margin * (len(columns) + 1), header + num_rows.pop() * (tile + margin))
    grid = Image.new("RGB", size, "white")
    draw, left = ImageDraw.Draw(grid), margin
    for (caption, images), width in zip(columns, widths, strict=True):
        draw.text((left, 5), caption, "black", font)
        for row, pixels in enumerate(images):
            grid.paste(_fit(pixels, tile), (left, header + row * (tile + margin)))
        left += width + margin
    return grid


def _amplify(clean: Pixels, protected: Pixels, amplification: int) -> Pixels:
    """The difference, enlarged around middle gray."""
    difference = colour(protected).astype(np.int16) - colour(clean)
    amplified: Pixels = np.clip(128 + amplification * difference, 0, 255).astype(np.uint8)
    return amplified


def _fit(pixels: Pixels, tile: int) -> Image.Image:
    """A picture of at most ``tile`` pixels a side; small ones enlarged by a whole number."""
    picture = _to_rgb(pixels)
    picture.thumbnail((tile, tile))
    factor = max(1, tile // max(picture.size))
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.NEAREST)


def plot_loss_curves(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """What was logged of a training, over its steps, as a PNG file: a panel for each name.

    Figures of validation images are in the panel of what they are figures of.

    Args:
        history: Figures by name, in the order of their "step", which every entry has. Other names
            may be missing here and there.
        path: File to write.
    """
    logged = {name for entry in history for name in entry}
    names = [
        name
        for name in dict.fromkeys(name for entry in history for name in entry)
        if name != "step" and name.removeprefix(VALIDATION) not in logged - {name}
    ]
    rows = math.ceil(len(names) / _CURVE_COLUMNS)
    figure = _figure(_CURVE_COLUMNS * 4.2, rows * 2.6)
    for index, name in enumerate(names):
        axes = figure.add_subplot(rows, _CURVE_COLUMNS, index + 1)
        for line, label in ((name, "training"), (VALIDATION + name, "validation")):
            if points := [(entry["step"], entry[line]) for entry in history if line in entry]:
                axes.plot(*zip(*points, strict=True), marker=".", label=label)
        if VALIDATION + name in logged:
            axes.legend(fontsize=7)
        axes.set_title(drawn(name), fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def plot_accuracies(
    accuracies: Mapping[str, Sequence[float]], *, chance: float, title: str
) -> bytes:
    """Test accuracy of adversaries by the data they were trained on, as PNG.

    Args:
        accuracies: Per variant, one value for each seed, in 0..1.
        chance: Accuracy of always answering the most frequent class.
        title: Above the plot.
    """
    figure = _figure(7.5, 0.55 * len(accuracies) + 1.4)
    axes = figure.add_subplot()
    names = list(accuracies)
    means = [100 * float(np.mean(values)) for values in accuracies.values()]
    colours = ["#4c72b0" if name == "clean" else "#b0b0b0" for name in names]
    axes.barh([drawn(name) for name in names], means, color=colours)
    for position, values in enumerate(accuracies.values()):
        axes.plot([100 * v for v in values], [position] * len(values), "k.", markersize=5)
        axes.text(
            100 * max(values) + 1.5, position, f"{means[position]:.1f}", va="center", fontsize=9
        )
    axes.axvline(100 * chance, color="#c44e52", linestyle="--", linewidth=1)
    axes.set_xlabel("test accuracy on clean images, % (dashed: most frequent class; dots: seeds)")
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    axes.set_title(drawn(title), fontsize=10)
    figure.tight_layout()
    return _to_png(figure)


def plot_curves(
    series: Mapping[str, Sequence[tuple[float, float]]], *, xlabel: str, ylabel: str, title: str
) -> bytes:
    """Named curves through (x, y) points, in the order of each, as PNG."""
    figure = _figure(6.5, 4.0)
    axes = figure.add_subplot()
    for name, points in series.items():
        axes.plot([x for x, _ in points], [y for _, y in points], label=drawn(name), marker=".")
    axes.set_xlabel(drawn(xlabel))
    axes.set_ylabel(drawn(ylabel))
    axes.set_title(drawn(title), fontsize=10)
    axes.grid(alpha=0.3)
    if series:
        axes.legend(fontsize=8)
    figure.tight_layout()
    return _to_png(figure)


def plot_confusion(confusion: npt.ArrayLike, *, title: str, names: Sequence[str] = ()) -> bytes:
    """A confusion matrix, as PNG: each row in shares of its class, numbers if there is room.

    Args:
        confusion: (K, K) counts; a row is the true class, a column the answer.
        title: Above the plot.
        names: Names of the K classes; numbers from 0 if not given.

    Raises:
        UsageError: Not square, or another number of names.
    """
    counts = np.asarray(confusion, np.float64)
    if counts.ndim != 2 or len(set(counts.shape)) != 1 or len(names) not in (0, len(counts)):
        raise UsageError(
            f"a confusion matrix of shape {counts.shape} with {len(names)} names; it must be "
            "square, with no names or one for each class"
        )
    shares = 100 * counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    side = min(10.0, 2.5 + 0.4 * len(counts))
    figure = _figure(side + 0.8, side)
    axes = figure.add_subplot()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(picture, label="% of the true class", fraction=0.046)
    if len(counts) <= _MOST_NUMBERED_CLASSES:
        for (row, column), share in np.ndenumerate(shares):
            ink = "white" if share > 60 else "black"
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=ink, fontsize=7)
    if names:
        labels = [drawn(name) for name in names]
        axes.set_xticks(range(len(names)), labels, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), labels, fontsize=7)
    axes.set_xlabel("answer")
    axes.set_ylabel("true class")
    axes.set_title(drawn(title), fontsize=10)
    figure.tight_layout()
    return _to_png(figure)


@dataclass(frozen=True)
class Section:
    """One section of a report.

    Attributes:
        title: Heading.
        text: Paragraphs, plain text.
        table: Header row, then rows; or empty.
        pictures: (caption, PNG file) pairs.
        gallery: Rows of such pairs, which stand beside each other at their own size, above the
            table. A caption may have several lines.
    """

    title: str
    text: Sequence[str] = ()
    table: Sequence[Sequence[object]] = ()
    pictures: Sequence[tuple[str, bytes]] = ()
    gallery: Sequence[Sequence[tuple[str, bytes]]] = ()


def write_report(path: Path, *, title: str, summary: str, sections: Sequence[Section]) -> None:
    """Write one HTML file that needs nothing beside it."""
    require("jinja2", "jobs")
    from jinja2 import Environment

    template = (files("one4all") / "assets" / "report.html.j2").read_text("utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    html = environment.from_string(template).render(title=title, summary=summary, sections=sections)
    path.write_text(html, "utf-8", errors="backslashreplace")


def to_png(image: Image.Image | Pixels) -> bytes:
    """A picture, or the colours of pixels, as a PNG file."""
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else _to_rgb(image)).save(buffer, "PNG")
    return buffer.getvalue()


def _to_rgb(pixels: Pixels) -> Image.Image:
    rgb = colour(pixels)
    return Image.fromarray(
        np.ascontiguousarray(rgb[:, :, 0] if rgb.shape[2] == 1 else rgb)
    ).convert("RGB")


def _figure(width: float, height: float) -> Any:
    # The object-oriented interface needs no display and keeps no global state.
    require("matplotlib", "jobs")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def _to_png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
