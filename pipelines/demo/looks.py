"""Can it be seen? Photos as they are published, clean and protected, side by side at real size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from one4all.corpus import images_of, list_units, read_samples
from one4all.images import Pixels, decode
from one4all.report import Section, middle, to_png
from one4all.storage import open_storage
from one4all.visibility import NOT_INSTALLED, VisibilitySummary, measurable, visibility

_NUM_MEASURED = 24  # spread evenly over the corpus
_NUM_SHOWN = 6  # of these
_WINDOW = 300  # pixels: of a larger photo, the middle is shown and measured
_PAGE = 840  # pixels: so wide is a row of pictures


def looks_section(
    source: str, protected: Mapping[str, str], *, num_images: int
) -> tuple[Section, dict[str, VisibilitySummary]]:
    """Some photos beside their protected copies, and how visible the difference is.

    Args:
        source: URI of the clean corpus.
        protected: URI of each protected copy, by its title.
        num_images: Of the corpus.

    Returns:
        The section; visibility by title, empty if it cannot be measured here.
    """
    chosen = set(np.linspace(0, num_images - 1, _NUM_MEASURED).astype(int).tolist())
    clean = _photos(source, lambda place, key: place in chosen)
    copies = {
        title: _photos(uri, lambda place, key: key in clean) for title, uri in protected.items()
    }
    keys = [key for key in clean if all(key in copy for copy in copies.values())]
    measured = {
        title: [visibility(clean[key], copy[key]) for key in keys] if measurable() else []
        for title, copy in copies.items()
    }
    rows = []
    for index in sorted({*np.linspace(0, len(keys) - 1, _NUM_SHOWN).astype(int).tolist()}):
        key = keys[index]
        row = [("clean", to_png(clean[key]))]
        for title, copy in copies.items():
            figures = str(measured[title][index]).split(", ") if measured[title] else []
            row.append(("\n".join([title, *figures]), to_png(copy[key])))
        rows.append(row)
    seen = {title: VisibilitySummary.of(found) for title, found in measured.items() if found}
    return Section(
        "Can you see it?",
        text=[
            f"One pixel of a photo is one pixel here; of one over {_WINDOW} pixels the middle is "
            "shown, and measured. The protected ones are as they lie in the store.",
            f"Mean, and the worst in brackets, of {len(keys)} photos, JPEG's own error included. "
            "CIEDE2000 and FLIP: 0 is no difference. SSIMULACRA2: 100 is none, 90 is hard to tell "
            "from the original, 70 is high quality, 50 medium, 30 low."
            if seen
            else NOT_INSTALLED,
        ],
        table=[
            ("protected", *VisibilitySummary().cells()),
            *((title, *summary.cells().values()) for title, summary in seen.items()),
        ]
        if seen
        else (),
        gallery=_arranged(rows, max(pixels.shape[1] for pixels in clean.values())),
    ), seen


def _arranged(
    rows: Sequence[Sequence[tuple[str, bytes]]], widest: int
) -> list[list[tuple[str, bytes]]]:
    """Several photos in a row, if they are small enough."""
    together = max(1, _PAGE // (len(rows[0]) * widest))
    return [
        [cell for row in rows[start : start + together] for cell in row]
        for start in range(0, len(rows), together)
    ]


def _photos(uri: str, wanted: Callable[[int, str], bool]) -> dict[str, Pixels]:
    """The middle of the first image of each sample that is wanted, by key."""
    return {
        key: middle(decode(image).pixels, _WINDOW)
        for place, (key, image) in enumerate(_images(uri))
        if wanted(place, key)
    }


def _images(uri: str) -> Iterator[tuple[str, bytes]]:
    storage = open_storage(uri)
    for unit in list_units(storage):
        for sample in read_samples(storage, unit):
            if images := images_of(sample):
                yield sample.key, images[0].payload
