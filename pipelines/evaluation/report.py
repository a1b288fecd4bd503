"""Results of an evaluation as tables (Markdown, CSV) and one HTML page with plots.

A cell is the mean over seeds of the last epoch's test accuracy, with the spread between seeds.
What a column is evidence of is said by `verdict`: a gap counts only beside its controls.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from one4all.evaluation.label_clusters import ClusterQuality
from one4all.evaluation.verdict import Judgement, Verdict, judge
from one4all.report import Section, plot_accuracies, plot_confusion, plot_curves, write_report
from one4all.visibility import VisibilitySummary
from pipelines.evaluation.records import CopyRecord, Outcome, TrialRecord
from pipelines.evaluation.trials import (
    CLEAN,
    NO_ATTACK,
    Copy,
    EvaluateConfig,
    GridConfig,
    Trial,
    grid_trials,
)

ORACLE = "class_oracle"
VISIBILITY_COLUMNS = tuple(VisibilitySummary().cells())
_MAX_ROWS_IN_CONFUSION = 40
_SHARES = "Share of clean accuracy left, %"
_LEADS: dict[Verdict, str] = {
    "protects": "Protects",
    "weak effect": "Weak effect",
    "no effect": "No effect",
    "too few seeds": "Inconclusive",
    "oracle fails": "Inconclusive",
}


@dataclass(frozen=True)
class Cell:
    """One place of a table: the seeds of one combination.

    Attributes:
        last, peak: Test accuracies, 0..1, one for each seed that has a record.
        majority: Accuracy of always answering the most frequent test label.
    """

    last: tuple[float, ...] = ()
    peak: tuple[float, ...] = ()
    majority: float = 0.0

    @property
    def mean(self) -> float:
        return float(np.mean(self.last)) if self.last else float("nan")

    @property
    def spread(self) -> float:
        """Standard deviation between seeds; 0 for one seed."""
        return float(np.std(self.last, ddof=1)) if len(self.last) > 1 else 0.0

    def __str__(self) -> str:
        if not self.last:
            return "-"
        if len(self.last) == 1:
            return f"{100 * self.mean:.1f}"
        return f"{100 * self.mean:.1f} ± {100 * self.spread:.1f}"


@dataclass
class Table:
    """A grid filled with results; cells by (row, column).

    ``visibility`` has that of each row which stands for one protected copy.
    """

    grid: GridConfig
    rows: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    cells: dict[tuple[str, str], Cell] = field(default_factory=dict)
    trials: dict[tuple[str, str], Trial] = field(default_factory=dict)
    visibility: dict[str, VisibilitySummary] = field(default_factory=dict)

    def cell(self, row: str, column: str) -> Cell:
        return self.cells.get((row, column), Cell())

    def text(self) -> list[list[str]]:
        """Header and rows."""
        body = [[row, *(str(self.cell(row, c)) for c in self.columns)] for row in self.rows]
        majority = [f"{100 * self.majority(column):.1f}" for column in self.columns]
        table = [[self.grid.rows, *self.columns], *body, ["(most frequent class)", *majority]]
        if self.visibility:
            seen = [_visibility_cells(self.visibility.get(row)) for row in self.rows]
            beside = [VISIBILITY_COLUMNS, *seen, ["" for _ in VISIBILITY_COLUMNS]]
            table = [[*left, *right] for left, right in zip(table, beside, strict=True)]
        return table

    def markdown(self) -> str:
        lines = [f"### {self.grid.title}", ""]
        lines += [self.grid.note, ""] if self.grid.note else []
        return "\n".join([*lines, *_markdown(self.text()), ""])

    def majority(self, column: str) -> float:
        """Share of test images of the commonest class, 0..1: what always naming it would reach."""
        return max((self.cell(row, column).majority for row in self.rows), default=0.0)


def fill_table(
    grid: GridConfig,
    config: EvaluateConfig,
    records: Mapping[str, TrialRecord],
    copies: Mapping[str, CopyRecord],
) -> Table:
    """Put the records of a grid where they belong; seeds without a record are left out."""
    gathered: dict[tuple[str, str], list[Outcome]] = {}
    in_row: dict[str, set[str]] = {}
    table = Table(grid)
    for trial in grid_trials(grid, config):
        place = _place(trial, grid)
        in_row.setdefault(place[0], set()).add(trial.copy.key)
        table.trials.setdefault(place, trial)
        gathered.setdefault(place, [])
        if trial.key in records:
            gathered[place].append(records[trial.key].outcome)
    table.rows = list(dict.fromkeys(row for row, _ in gathered))
    table.columns = list(dict.fromkeys(column for _, column in gathered))
    table.cells = {
        place: Cell(
            last=tuple(outcome.last for outcome in found),
            peak=tuple(outcome.peak for outcome in found),
            majority=max((outcome.majority for outcome in found), default=0.0),
        )
        for place, found in gathered.items()
    }
    for row, keys in in_row.items():
        known = [copies[key].visibility for key in keys if key in copies]
        if len(keys) == 1 and known and known[0]:
            table.visibility[row] = known[0]
    return table


def verdicts(table: Table, column: str) -> dict[str, Verdict]:
    """The verdict on each method of a column; empty unless it has its controls."""
    return {name: found.verdict for name, found in _judgements(table, column).items()}


def _judgements(table: Table, column: str) -> dict[str, Judgement]:
    names = {method.method: method.name for method in table.grid.methods}
    if table.grid.rows != "methods" or not {CLEAN, ORACLE} <= names.keys():
        return {}
    accuracies = {row: table.cell(row, column).last for row in table.rows}
    kinds = {method.name: method.known.kind for method in table.grid.methods}
    clean = names[CLEAN]
    controls = {
        name: accuracies[name]
        for name, kind in kinds.items()
        if kind == "negative control" and name != clean
    }
    return {
        name: judge(
            accuracies[name],
            clean=accuracies[clean],
            oracle=accuracies[names[ORACLE]],
            controls=controls,
        )
        for name, kind in kinds.items()
        if kind == "method"
    }


def explain(table: Table) -> list[str]:
    """What each column is evidence of, and which condition decided it."""
    sentences = []
    for column in table.columns:
        named: dict[Judgement, list[str]] = {}
        for name, judgement in _judgements(table, column).items():
            named.setdefault(judgement, []).append(name)
        parts = [
            f"{lead}: {'; '.join(names)} ({judgement.reason})."
            for verdict, lead in _LEADS.items()
            for judgement, names in named.items()
            if judgement.verdict == verdict
        ]
        if parts:
            sentences.append(f"{column}: " * (len(table.columns) > 1) + " ".join(parts))
    return sentences


def shares_of_clean(table: Table) -> list[list[str]]:
    """Header and rows: accuracy over that of clean images under the same treatment, in %.

    With several data sets, their mean is beside them: what is chosen on one set suits that set.
    Empty if the grid has no clean images.
    """
    grid = table.grid
    clean = next((method.name for method in grid.methods if method.method == CLEAN), None)
    columns = [
        column
        for column in table.columns
        if grid.rows == "methods" or table.trials[table.rows[0], column].copy.method.name != clean
    ]
    if clean is None or not columns:
        return []
    groups: dict[str, list[str]] = {}
    for column in columns:
        groups.setdefault(_without_data(table, column), []).append(column)
    means = {name: members for name, members in groups.items() if len(members) > 1}
    lines = [[grid.rows, *columns, *(f"{name} mean of sets".strip() for name in means)]]
    for row in table.rows:
        shares = {column: _share_of_clean(table, row, column, clean) for column in columns}
        averages = [float(np.mean([shares[c] for c in members])) for members in means.values()]
        found = [*shares.values(), *averages]
        lines.append([row, *("-" if np.isnan(share) else f"{100 * share:.0f}" for share in found)])
    return lines


def _share_of_clean(table: Table, row: str, column: str, clean: str) -> float:
    if table.grid.rows == "methods":
        base = table.cell(clean, column)
    else:
        method = table.trials[row, column].copy.method.name
        base = table.cell(row, clean + column.removeprefix(method))
    return table.cell(row, column).mean / base.mean if base.mean else float("nan")


def _without_data(table: Table, column: str) -> str:
    """A column less the data set that it is named by."""
    return " ".join(_column(table.trials[table.rows[0], column], table.grid, without="data"))


def write_results(
    folder: Path,
    config: EvaluateConfig,
    records: Mapping[str, TrialRecord],
    copies: Mapping[str, CopyRecord],
    *,
    qualities: Mapping[str, Sequence[ClusterQuality]],
    diagnoses: Sequence[Section] = (),
) -> Path:
    """Write results.md, results.csv and report.html.

    Args:
        folder: Where to.
        config: The evaluation.
        records, copies: By key.
        qualities: By data set: how well numbers of label clusters fit (paper, Figure 5).
        diagnoses: Sections about perturbations.

    Returns:
        Path of the report.
    """
    tables = [fill_table(grid, config, records, copies) for grid in config.grids]
    folder.mkdir(parents=True, exist_ok=True)
    explained = [explain(table) for table in tables]
    markdown = []
    for table, sentences in zip(tables, explained, strict=True):
        markdown += [table.markdown(), *(f"* {sentence}" for sentence in sentences), ""]
        if shares := shares_of_clean(table):
            markdown += [f"{_SHARES}: {table.grid.title}", "", *_markdown(shares), ""]
    of_copies = _copies_section(config, copies)
    markdown += [
        f"### {of_copies.title}",
        "",
        " ".join(of_copies.text),
        "",
        *_markdown(of_copies.table),
        "",
    ]
    (folder / "results.md").write_text("\n".join(markdown), "utf-8")
    (folder / "results.csv").write_text(_csv(tables, copies), "utf-8")
    sections = []
    for table in tables:
        sections.append(table_section(table, records))
        if shares := shares_of_clean(table):
            sections.append(Section(f"{_SHARES}: {table.grid.title}", table=shares))
    sections += diagnoses
    if qualities:
        sections.append(_quality_section(qualities))
    sections.append(of_copies)
    report = folder / "report.html"
    summary = " ".join(sentence for sentences in explained for sentence in sentences[:1])
    write_report(report, title="one4all evaluate", summary=summary, sections=sections)
    return report


def _place(trial: Trial, grid: GridConfig) -> tuple[str, str]:
    """Row and column of a trial; a column is named by what differs within the grid."""
    row = _parts(trial, grid)[grid.rows][0]
    return row, " ".join(_column(trial, grid)) or trial.copy.data


def _column(trial: Trial, grid: GridConfig, *, without: str = "") -> list[str]:
    """What names the column of a trial; ``without`` a list of the grid."""
    return [
        text
        for axis, (text, count) in _parts(trial, grid).items()
        if count > 1 and axis not in (grid.rows, without)
    ]


def _parts(trial: Trial, grid: GridConfig) -> dict[str, tuple[str, int]]:
    """By list of the grid: what the trial has of it, and how many there are."""
    return {
        "methods": (trial.copy.method.name, len(grid.methods)),
        "attacks": (trial.attack, len(grid.attacks)),
        "augmentations": (trial.adversary.augmentation, len(grid.augmentations)),
        "shares": (f"{100 * trial.share:.0f} % protected", len(grid.shares)),
        "budgets": (f"{trial.budget} levels", len(grid.budgets)),
        "data": (trial.copy.data, len(grid.data)),
        "labels": (trial.labels, len(grid.labels)),
        "adversaries": (trial.adversary_name, len(grid.adversaries)),
    }


def table_section(table: Table, records: Mapping[str, TrialRecord] | None = None) -> Section:
    """Table, verdicts and plots of one grid; confusion pictures if there are records."""
    grid = table.grid
    sentences, seen = explain(table), table.visibility.values()
    pictures = []
    if grid.rows == "methods" and len(table.columns) == 1:
        column = table.columns[0]
        accuracies = {r: table.cell(r, column).last for r in table.rows}
        pictures.append(
            (
                "Test accuracy of adversaries on clean images",
                plot_accuracies(
                    {row: values for row, values in accuracies.items() if values},
                    chance=max(table.cell(r, column).majority for r in table.rows),
                    title=grid.title,
                ),
            )
        )
        pictures += _confusions(table, column, records or {})
    if grid.rows == "shares":
        label = "protected, % of the training images"
        pictures.append(_curve(table, lambda trial: 100 * trial.share, label))
    if grid.rows == "budgets":
        pictures.append(_curve(table, lambda trial: trial.budget, "budget, levels of 255"))
    pictures += _purity_curve(table)
    return Section(
        grid.title,
        text=[t for t in (grid.note, *sentences, *_about_visibility(seen)) if t],
        table=table.text(),
        pictures=pictures,
    )


def _confusions(
    table: Table, column: str, records: Mapping[str, TrialRecord]
) -> list[tuple[str, bytes]]:
    """Confusion of the first seed, for clean, the oracle, and each method that is no control."""
    pictures = []
    for method in table.grid.methods:
        if method.known.kind != "method" and method.method not in (CLEAN, ORACLE):
            continue
        record = records.get(table.trials[method.name, column].key)
        if record and len(record.outcome.confusion) <= _MAX_ROWS_IN_CONFUSION:
            confusion = np.array(record.outcome.confusion, np.int64)
            pictures.append((f"Confusion: {method.name}", plot_confusion(confusion, title="")))
    return pictures


def _curve(table: Table, value: Callable[[Trial], float], label: str) -> tuple[str, bytes]:
    """Accuracy over what the rows stand for."""
    series = {
        column: [
            (value(table.trials[row, column]), 100 * table.cell(row, column).mean)
            for row in table.rows
            if table.cell(row, column).last
        ]
        for column in table.columns
    }
    curve = plot_curves(series, xlabel=label, ylabel="test accuracy, %", title=table.grid.title)
    return f"Test accuracy by {label}", curve


def _purity_curve(table: Table) -> list[tuple[str, bytes]]:
    """Accuracy over the purity of the concept-wise oracle, if a grid has several of them."""
    oracles = [m for m in table.grid.methods if m.method == "concept_oracle"]
    if len(oracles) < 2 or table.grid.rows != "methods":
        return []
    series = {
        column: sorted(
            (float(m.settings.model_dump()["purity"]), 100 * table.cell(m.name, column).mean)
            for m in oracles
            if table.cell(m.name, column).last
        )
        for column in table.columns
    }
    curve = plot_curves(
        series, xlabel="purity of the concepts", ylabel="test accuracy, %", title=table.grid.title
    )
    return [("Accuracy by the purity of the concepts that choose the pattern", curve)]


def _quality_section(qualities: Mapping[str, Sequence[ClusterQuality]]) -> Section:
    curves = (
        ("sse", "sum of squared distances"),
        ("silhouette", "silhouette"),
        ("calinski_harabasz", "Calinski-Harabasz"),
    )
    pictures = [
        (
            label,
            plot_curves(
                {
                    data: [(q.num_clusters, getattr(q, name)) for q in found]
                    for data, found in qualities.items()
                },
                xlabel="clusters of class names",
                ylabel=label,
                title="",
            ),
        )
        for name, label in curves
    ]
    return Section("Clusters of class names (label-agnostic scenario)", pictures=pictures)


def _copies_section(config: EvaluateConfig, copies: Mapping[str, CopyRecord]) -> Section:
    seen: dict[str, Copy] = {}
    for grid in config.grids:
        for trial in grid_trials(grid, config):
            seen.setdefault(trial.copy.key, trial.copy)
    rows = [
        (
            copy.method.name,
            copy.data,
            copy.fitted_on or ("itself" if copy.method.known.needs_fit else "-"),
            copy.epsilon_levels,
            copies[key].max_levels,
            f"{copies[key].psnr_db:.1f}",
            *_visibility_cells(copies[key].visibility),
            f"{copies[key].seconds:.0f}",
        )
        for key, copy in seen.items()
        if key in copies
    ]
    header = (
        *("method", "data", "fitted on", "budget", "largest difference", "PSNR, dB"),
        *VISIBILITY_COLUMNS,
        "seconds to make",
    )
    made = [copies[key].visibility for key in seen if key in copies]
    return Section("Copies", text=_about_visibility(made), table=[header, *rows])


def _about_visibility(summaries: Collection[VisibilitySummary | None]) -> list[str]:
    """What the figures are of, and why some are missing."""
    numbers = sorted({summary.num_images for summary in summaries if summary})
    sentences = []
    if numbers:
        sentences.append(
            "CIEDE2000 and FLIP say how different clean and protected images look (0: identical), "
            "SSIMULACRA2 how good the protected ones do (100: identical): mean and, in brackets, "
            f"worst of {' or '.join(map(str, numbers))} images, spread evenly over the copy, at "
            "the size at which they were protected."
        )
    if None in summaries:
        sentences.append(
            "Where visibility is missing, the copy was made by an older version, or without the "
            "packages that measure it: pip install 'one4all[visibility]'. It is measured when the "
            "copy is made again, for a trial that has no record yet."
        )
    return sentences


def _visibility_cells(summary: VisibilitySummary | None) -> list[str]:
    cells = summary.cells() if summary else {}
    return [cells.get(name, "-") for name in VISIBILITY_COLUMNS]


def _markdown(table: Sequence[Sequence[object]]) -> list[str]:
    """A table, its header first, in lines."""
    header, *body = (f"| {' | '.join(map(str, row))} |" for row in table)
    return [header, "|" + "---|" * len(table[0]), *body]


def _csv(tables: Sequence[Table], copies: Mapping[str, CopyRecord]) -> str:
    """One line for each place of each table."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(
        "table method data fitted_on labels share budget attack adversary augmentation "
        "num_seeds last_mean last_std peak_mean majority max_levels psnr_db".split()
        + list(VisibilitySummary().figures())
    )
    for table in tables:
        for place, trial in table.trials.items():
            cell, facts = table.cells[place], copies.get(trial.copy.key)
            writer.writerow(
                (
                    table.grid.title,
                    trial.copy.method.name,
                    trial.copy.data,
                    trial.copy.fitted_on,
                    trial.labels,
                    trial.share,
                    trial.budget,
                    "" if trial.attack == NO_ATTACK else trial.attack,
                    trial.adversary_name,
                    trial.adversary.augmentation,
                    len(cell.last),
                    f"{cell.mean:.4f}",
                    f"{cell.spread:.4f}",
                    f"{np.mean(cell.peak):.4f}" if cell.peak else "nan",
                    f"{cell.majority:.4f}",
                    facts.max_levels if facts else "",
                    facts.psnr_db if facts else "",
                    *_visibility_figures(facts),
                )
            )
    return out.getvalue()


def _visibility_figures(facts: CopyRecord | None) -> list[object]:
    if facts and facts.visibility:
        return [f"{value:.4f}" for value in facts.visibility.figures().values()]
    return ["" for _ in VisibilitySummary().figures()]
