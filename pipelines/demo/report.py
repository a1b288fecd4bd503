"""The sections of the demo's report, and its verdict in a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from one4all.evaluation.verdict import MIN_SEEDS, Verdict
from one4all.report import Section, plot_accuracies, plot_curves
from one4all.storage import INTERNAL, open_storage
from one4all.visibility import VisibilitySummary
from pipelines.evaluation.records import TrialRecord
from pipelines.evaluation.report import Table, explain, verdicts
from pipelines.evaluation.trials import CLEAN, EvaluateConfig, grid_trials
from pipelines.fit import PICTURE
from pipelines.protect.job import ProtectResult
from pipelines.train.config import TrainConfig
from pipelines.train.progress import CURVES_FILE
from pipelines.verify import Verification

DISCREET = "discreet"
STRONG = "strong"
_CLAIMS: dict[Verdict, str] = {
    "protects": "protects",
    "weak effect": "has a weak effect, which is no protection",
    "no effect": "has NO effect",
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
    """The verdict, in a sentence, and what is left of clean accuracy."""
    column = table.columns[0]
    clean = table.cell(CLEAN, column)
    said = verdicts(table, column)
    if "oracle fails" in said.values():
        verdict = "Inconclusive: even the positive control does not protect here"
    elif "too few seeds" in said.values():
        verdict = f"{_too_few(len(clean.last))}: an indication, not evidence"
    else:
        verdict = "Against this adversary, " + "; ".join(
            f"{title} {_CLAIMS[verdict]}" for title, verdict in said.items()
        )
    left = ", ".join(f"{row} {_share(table, row)} %" for row in table.rows if row != CLEAN)
    return f"{verdict}. Of clean accuracy, {clean} %, is left: {left}."


def _too_few(num_seeds: int) -> str:
    return "One seed" if num_seeds == 1 else f"Only {num_seeds} seeds of {MIN_SEEDS}"


def _share(table: Table, row: str) -> str:
    """Of clean accuracy, in %; "-" if clean photos taught nothing."""
    accuracy, clean = (table.cell(name, table.columns[0]).mean for name in (row, CLEAN))
    return f"{100 * accuracy / clean:.0f}" if clean else "-"


def learnt_section(
    table: Table,
    config: EvaluateConfig,
    records: Mapping[str, TrialRecord],
    seen: Mapping[str, VisibilitySummary],
) -> Section:
    """What the adversary learnt of each copy, as bars, as curves and in figures.

    Args:
        table: Filled from ``records``.
        config: The evaluation, of one grid.
        records: Of its trials, by key.
        seen: How visible a protected copy is, by its title.
    """
    column = table.columns[0]
    curves: dict[str, list[tuple[float, ...]]] = {}
    for trial in grid_trials(table.grid, config):
        curves.setdefault(trial.copy.method.name, []).append(records[trial.key].outcome.curve)
    accuracies = {row: table.cell(row, column).last for row in table.rows}
    num_seeds = len(accuracies[CLEAN])
    over = f"{num_seeds} seed" + "s" * (num_seeds > 1)
    bars = plot_accuracies(
        accuracies,
        chance=table.majority(column),
        title=f"Trained on each copy, tested on clean photos; {over}",
    )
    means = {row: 100 * np.mean(found, axis=0) for row, found in curves.items()}
    lines = plot_curves(
        {row: [*enumerate(values.tolist(), start=1)] for row, values in means.items()},
        xlabel="epoch",
        ylabel="test accuracy, %",
        title=f"Mean of {over}",
    )
    figures = VisibilitySummary().cells()
    return Section(
        table.grid.title,
        text=[table.grid.note, *explain(table)],
        gallery=[[("", bars)], [("", lines)]],
        table=[
            ("trained on", "test accuracy, %", "share of clean, %", *figures),
            *(
                (
                    row,
                    table.cell(row, column),
                    _share(table, row),
                    *(seen[row].cells().values() if row in seen else ("" for _ in figures)),
                )
                for row in table.rows
            ),
        ],
    )


def patterns_section(corpus: ProtectedCorpus) -> list[Section]:
    """The largest concepts of the protector that was fitted, if one was, and their patterns."""
    storage = open_storage(corpus.uri)
    found = [o.key for o in storage.list(f"{INTERNAL}protectors/") if o.key.endswith(PICTURE)]
    about = (
        "No labels and no training: photos that the encoder finds alike share a pattern. It is "
        "shown at its strongest, above photos that get it."
    )
    pictures = [("The largest groups of like photos", storage.read_bytes(key)) for key in found]
    return [Section("How it was protected", text=[about], pictures=pictures)] if found else []


def verified_section(corpora: Mapping[str, ProtectedCorpus]) -> Section:
    results = [corpus.result for corpus in corpora.values()]
    audits = [corpus.audit for corpus in corpora.values()]
    return Section(
        "Protected and verified",
        text=[
            "Re-read from the object store and compared with the source, byte for byte. No image "
            "was changed by more than the budget; JPEG then adds an error of its own."
        ],
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
            f"{config.steps} steps of {config.num_workers} x {config.batch_size} images, with Ray "
            "Train. A short run, to show that it works: nothing above was protected with it.",
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
