"""The sections of the demo's report, and its verdict in a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from one4all.evaluation.labelled import LabelledImages
from one4all.evaluation.verdict import Verdict
from one4all.images import decode
from one4all.protectors.card import DEFAULT_PROTECTOR
from one4all.protectors.protector import Protector
from one4all.report import Section, contact_sheet, to_png
from pipelines.demo.material import TRAINING_CORPUS
from pipelines.evaluation.report import Table, verdicts
from pipelines.protect.job import ProtectResult
from pipelines.train.config import TrainConfig
from pipelines.train.progress import CURVES_FILE
from pipelines.verify import Verification

SHIPPED = "shipped protector"
FITTED = "strong codebook of the corpus"
_WINDOW = 300  # pixels: three of them beside each other are as wide as the page
_CLAIMS: dict[Verdict, str] = {
    "protects": "protects",
    "weak effect": "has a weak effect, which is no protection",
    "no effect": "has NO effect",
    "too few seeds": "was tried too few times to tell",
}


@dataclass(frozen=True)
class ProtectedCorpus:
    """The material, protected, in the store.

    Attributes:
        uri: Where it is.
        result: How it was made.
        audit: What verification found.
    """

    uri: str
    result: ProtectResult
    audit: Verification


def summarise(table: Table) -> str:
    """The verdict, in a sentence with its figures."""
    column = table.columns[0]
    said = verdicts(table, column)
    if "oracle fails" in said.values():
        verdict = "Inconclusive: even the positive control does not protect here"
    else:
        verdict = "Against this adversary, " + "; ".join(
            f"the {title} {_CLAIMS[said[title]]}" for title in (SHIPPED, FITTED)
        )
    figures = ", ".join(f"{row} {table.cell(row, column)}" for row in table.rows)
    return f"{verdict}. Test accuracy in %: {figures}."


def verified_section(corpora: Mapping[str, ProtectedCorpus]) -> Section:
    results = [corpus.result for corpus in corpora.values()]
    audits = [corpus.audit for corpus in corpora.values()]
    return Section(
        "Protected and verified",
        text=["Re-read from the object store and compared with the source, byte for byte."],
        table=[
            ("what", *corpora),
            ("shards", *(f"{r.num_done} of {r.num_shards}" for r in results)),
            ("samples", *(a.num_samples for a in audits)),
            ("images", *(a.num_images for a in audits)),
            ("sidecars, all byte-identical", *(a.num_sidecars for a in audits)),
            (
                f"images within {audits[0].epsilon_levels} levels once decoded",
                *(f"{a.num_within_budget} of {a.num_images}" for a in audits),
            ),
            ("largest difference, levels", *(a.max_levels for a in audits)),
            (
                "PSNR, mean and worst",
                *(f"{a.mean_psnr_db:.1f} / {a.min_psnr_db:.1f} dB" for a in audits),
            ),
            ("SSIM, mean and worst", *(f"{a.mean_ssim:.3f} / {a.min_ssim:.3f}" for a in audits)),
        ],
    )


def training_section(folder: Path, config: TrainConfig, history: list[dict[str, float]]) -> Section:
    first, last = history[0], history[-1]
    return Section(
        "Training a generator",
        text=[
            f"{config.steps} steps of {config.num_workers} x {config.batch_size} images on "
            f"{TRAINING_CORPUS}, with Ray Train. A short run, to show that it works: nothing above "
            "was protected with it.",
        ],
        table=[
            ("metric", "first step", "last step", "wanted"),
            *(
                (label, f"{first[key]:.3f}", f"{last[key]:.3f}", wanted)
                for key, label, wanted in (
                    ("l1", "l1, distance to the opposite concept", "falls"),
                    ("l2", "l2, distance to similar concepts", "rises"),
                    ("cosine_own", "cosine to the own concept", "falls"),
                    ("cosine_opposite", "cosine to the opposite concept", "rises"),
                    ("opposite_entropy", "entropy of chosen opposites", "stays near 1"),
                )
            ),
        ],
        pictures=[("Loss curves", (folder / "train" / CURVES_FILE).read_bytes())],
    )


def looks_section(
    name: str, clean: LabelledImages, protected: LabelledImages, concepts: bytes
) -> Section:
    """Clean and protected, side by side: of the corpus, and the embedded photographs."""
    chosen = np.linspace(0, len(clean) - 1, 5).astype(int)
    rows = [(f"image {i}", clean.images_NHWC[i], protected.images_NHWC[i]) for i in chosen]
    paths = _embedded_photos()
    embedded = [decode(path.read_bytes()).pixels for path in paths]
    embedded_protected = Protector.load(DEFAULT_PROTECTOR).protect(embedded)
    embedded_rows = list(
        zip([path.name for path in paths], embedded, embedded_protected, strict=True)
    )
    return Section(
        "What it looks like",
        pictures=[
            (f"{name}, {SHIPPED}", to_png(contact_sheet(rows, window=_WINDOW))),
            (f"Photographs, {SHIPPED}", to_png(contact_sheet(embedded_rows, window=_WINDOW))),
            (f"{name}, {FITTED}: its largest concepts and their patterns", concepts),
        ],
    )


def _embedded_photos() -> list[Path]:
    return sorted(Path(str(files("one4all") / "assets" / "photos")).glob("*.jpg"))
