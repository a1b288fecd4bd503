"""The verbs of who measures: evaluate, demo, bench."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from one4all.errors import UsageError
from pipelines.cli.planning import plan_evaluate
from pipelines.cli.terminal import (
    ConfigOption,
    EvaluationFile,
    Progress,
    SetOption,
    command_line,
    show,
    show_text,
)


def add_verbs(app: typer.Typer) -> None:
    """Add the verbs of this module to the command line."""
    app.command()(evaluate)
    app.command()(demo)
    app.command()(bench)


def evaluate(
    config: EvaluationFile,
    output: Annotated[
        str | None,
        typer.Option(help="Folder or s3:// prefix of results; the same one resumes."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", hidden=True)] = False,
    export: Annotated[
        str | None,
        typer.Option(help="Write the copies there, as shards, instead of evaluating them."),
    ] = None,
    set_: SetOption = None,
) -> None:
    """Train adversaries on clean and protected copies and compare; resumable."""
    if dry_run:  # as it was spelt before
        plan_evaluate(config, output, set_)
        return
    from pipelines.evaluation.copies import export_copies
    from pipelines.evaluation.diagnose import diagnose_copies
    from pipelines.evaluation.job import evaluate as run
    from pipelines.evaluation.job import report
    from pipelines.evaluation.records import TrialRecord
    from pipelines.evaluation.trials import EvaluateConfig, Trial, describe
    from pipelines.settings import load_config

    settings = load_config(EvaluateConfig, config, set_, output=output)
    if export:
        for place in export_copies(settings, export):
            show(f"written: {place}")
        return
    progress = Progress("epoch")

    def on_plan(todo: Sequence[Trial], num_trials: int) -> None:
        for line in describe(settings).splitlines():
            progress.say(line)
        num_copies = len({trial.copy.key for trial in todo})
        progress.say(f"to do: {len(todo)} of {num_trials} trials, on {num_copies} copies")
        progress.start(sum(trial.adversary.epochs for trial in todo))

    def on_trial(trial: Trial, record: TrialRecord) -> None:
        progress.say(f"{trial.title}: {100 * record.outcome.last:.1f} %")

    with progress:
        result = run(
            settings,
            command=command_line(),
            on_plan=on_plan,
            on_epoch=lambda line: progress.advance(note=line),
            on_trial=on_trial,
            say=progress.say,
        )
        diagnoses = diagnose_copies(settings, say=progress.say)
    show_text(report(settings, result, diagnoses=diagnoses))
    for title, reason in result.failed.items():
        show(f"  failed: {title}: {reason}")
    raise typer.Exit(1 if result.failed else 0)


def demo(
    folder: Annotated[Path, typer.Argument(help="Where results go.")] = Path("runs/demo"),
    photos: Annotated[
        str,
        typer.Option(
            help="Protect and attack these instead of the embedded photos: a folder with one "
            "sub-folder a class, or torchvision:NAME below data/."
        ),
    ] = "",
    drawings: Annotated[
        bool,
        typer.Option("--drawings", help="The embedded drawings instead, the hard case; longer."),
    ] = False,
    train: Annotated[
        bool,
        typer.Option("--train", help="Also train a generator for 120 steps, by Ray Train."),
    ] = False,
) -> None:
    """Run everything, small: pack, protect to S3, verify, and attack; writes report.html."""
    from pipelines import demo as parts

    if photos and drawings:
        raise UsageError("give --photos or --drawings, not both")
    if photos:
        material = parts.photos(photos)
    else:
        material = parts.drawings() if drawings else parts.embedded_photos()
    report = parts.demo(folder, material, say=show, with_training=train)
    show(f"report: {report}")


def bench(
    source: Annotated[
        str | None,
        typer.Argument(help="Shards to measure on; default: photos made here."),
    ] = None,
    output: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("runs/bench.json"),
    shard_gb: Annotated[
        float,
        typer.Option(help="Measure memory on one shard of this size instead, in GB."),
    ] = 0.0,
    plan_shards: Annotated[
        int,
        typer.Option(help="Measure planning over this many simulated shards instead.", min=0),
    ] = 0,
    plan_images: Annotated[
        int,
        typer.Option(help="Measure planning over this many simulated images instead.", min=0),
    ] = 0,
    containers: Annotated[
        int,
        typer.Option(
            help="Measure so many photos as tar, Parquet and loose images instead.", min=0
        ),
    ] = 0,
    train: Annotated[
        bool,
        typer.Option("--train", help="Measure reading, decoding and steps of a training instead."),
    ] = False,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Measure protect beside a plain loop, Ray Data and webdataset that do the same work."""
    from pipelines.bench import bench_containers, bench_memory, bench_plan

    if (config or set_) and not train:
        raise UsageError("--config and --set are settings of a training, for bench --train")
    if train:
        from pipelines.bench import bench_train
        from pipelines.settings import load_config
        from pipelines.train.config import TrainConfig

        settings = load_config(TrainConfig, config, set_, source=source)
        show_text(bench_train(settings, output, say=show))
    elif plan_shards or plan_images:
        what = "shards" if plan_shards else "images"
        show_text(bench_plan(plan_shards or plan_images, output, what=what, say=show))
    elif containers:
        show_text(bench_containers(containers, output, say=show))
    elif shard_gb > 0:
        show_text(bench_memory(shard_gb, output, say=show))
    else:
        from pipelines.peers import bench_peers

        show_text(bench_peers(source, output, say=show))
