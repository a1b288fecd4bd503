"""The command line: parse, load a configuration, call one function, show the result."""

from __future__ import annotations

import json
import logging
import os
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from one4all.errors import One4AllError, UsageError
from pipelines.cli import operate as cli_operate
from pipelines.cli.terminal import (
    INTERRUPTED,
    ConfigOption,
    Progress,
    SetOption,
    choice,
    command_line,
    interrupt,
)

app = typer.Typer(
    help="Protect images against training without consent: train, protect, verify.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def protect(
    source: Annotated[str, typer.Argument(help="Folder or s3:// prefix of .tar shards.")],
    destination: Annotated[str, typer.Argument(help="Folder or s3:// prefix to write to.")],
    protector: Annotated[
        str | None,
        typer.Option(help="Name, folder or s3:// URI of a protector."),
    ] = None,
    output_format: Annotated[
        str | None,
        typer.Option(help="match (keep file formats) or lossless (JPEG becomes PNG)."),
    ] = None,
    on_bad_image: Annotated[
        str | None,
        typer.Option(help="drop, fail or passthrough."),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(help="Only shards written since: 2026-11-01T00:00Z, or 36h before now."),
    ] = None,
    log_json: Annotated[
        bool | None,
        typer.Option("--log-json", help="Also write one JSON line for each shard to stderr."),
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Protect every shard of a corpus that is not protected yet. Safe to kill and to repeat."""
    from pipelines.protect.config import ProtectConfig
    from pipelines.protect.job import protect as run
    from pipelines.settings import load_config

    settings = load_config(
        ProtectConfig,
        config,
        set_,
        protector=protector,
        output_format=output_format,
        on_bad_image=on_bad_image,
        since=since,
        log_json=log_json,
    )
    progress = Progress("shard")

    def on_plan(todo: Any, num_shards: int) -> None:
        if len(todo) < num_shards:
            progress.say(f"{num_shards - len(todo)} of {num_shards} shards are done already")
        progress.start(len(todo))

    def on_progress(status: Any) -> None:
        if status.outcome == "done":
            progress.advance()
        else:
            progress.say(f"{status.outcome}: {status.name}: {status.error}")

    with progress:
        result = run(
            source,
            destination,
            settings,
            on_plan=on_plan,
            on_progress=on_progress,
            on_wait=progress.say,
        )
    print(
        f"{result.num_done} of {result.num_shards} shards protected "
        f"({result.num_protected_now} now, {result.num_images} images); "
        f"{result.num_bad_images} bad images"
    )
    for name, reason in (result.failed | result.quarantined).items():
        print(f"  not protected: {name}: {reason}")
    if result.num_older:
        print(
            f"  {result.num_older} shards are older than {settings.since} and were left out; "
            f"{result.num_older_undone} of them are not protected"
        )
    if result.num_others:
        print(
            f"  {result.num_others} objects are no .tar shards and were left alone, such as "
            f"{result.other}"
        )
    raise typer.Exit(result.exit_code)


@app.command()
def verify(
    source: Annotated[str, typer.Argument(help="The source that was protected.")],
    destination: Annotated[str, typer.Argument(help="What protect wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    per_image: Annotated[
        Path | None,
        typer.Option(help="Also write one JSON line for each image to this file."),
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Re-read both sides and check every promise; exit 0 only if all hold."""
    from pipelines.settings import load_config
    from pipelines.verify import VerifyConfig
    from pipelines.verify import verify as run

    settings = load_config(VerifyConfig, config, set_)
    progress = Progress("shard")

    def on_audit(audit: Any) -> None:
        progress.advance()
        if lines is not None:
            lines.writelines(
                json.dumps({"shard": audit.name} | asdict(image)) + "\n" for image in audit.images
            )

    with progress, per_image.open("w", encoding="utf-8") if per_image else nullcontext() as lines:
        result = run(
            source,
            destination,
            settings,
            on_plan=progress.start,
            on_audit=on_audit,
        )
    if as_json:
        print(json.dumps(result.to_json(), indent=1))
    else:
        _print_verification(result)
    raise typer.Exit(0 if result.ok else 1)


@app.command()
def train(
    source: Annotated[
        str | None,
        typer.Argument(help="Folder or s3:// prefix of shards; several separated by commas."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Argument(help="Protector folder or s3:// prefix to write."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only say what it would take; reads no image."),
    ] = False,
    num_images: Annotated[
        int | None, typer.Option(min=1, help="Dry run: images of the source, for epochs.")
    ] = None,
    images_per_second: Annotated[
        float | None, typer.Option(min=1e-6, help="Dry run: speed of one worker, if known.")
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Dry run: what an hour of one worker costs.")
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Train a generator with Ray Train; the same command resumes an interrupted run."""
    from pipelines.settings import load_config
    from pipelines.train.config import TrainConfig

    settings = load_config(TrainConfig, config, set_, source=source, output=output)
    if dry_run:
        from pipelines.train.plan import plan_training

        found = plan_training(
            settings,
            num_images=num_images,
            images_per_second=images_per_second,
            price_per_hour=price_per_hour,
        )
        cli_operate.print_train_plan(found)
        return
    if (num_images, images_per_second, price_per_hour) != (None, None, None):
        raise UsageError("--num-images, --images-per-second and --price-per-hour need --dry-run")
    from pipelines.train.job import train as run

    progress = Progress("step")

    def on_metrics(metrics: dict[str, float]) -> None:
        progress.advance_to(
            int(metrics["step"]),
            f"l1 {metrics['l1']:.3f} l2 {metrics['l2']:.3f} "
            f"own {metrics['cosine_own']:.3f} opposite {metrics['cosine_opposite']:.3f} "
            f"{metrics['images_per_second']:.3g} images/s",
        )

    with progress:
        card = run(
            settings,
            command=command_line(),
            on_start=lambda: progress.start(settings.steps),
            on_metrics=on_metrics,
            on_wait=progress.say,
        )
    print(f"protector {card.content_hash[:12]} written to {settings.output}")
    print(f"  loss curves, metrics and checkpoints: {settings.run_folder}")


@app.command()
def fit(
    source: Annotated[
        str | None,
        typer.Argument(
            help="Folder or s3:// prefix of shards; several separated by commas; or "
            "vocabulary:imagenet1k, for a codebook that sees no image."
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Argument(help="Protector folder or s3:// prefix to write."),
    ] = None,
    concepts: Annotated[
        int | None,
        typer.Option(help="Several for each kind of thing in the corpus; default 400."),
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Fit a codebook to a corpus or a vocabulary: one look, no labels, no training."""
    from pipelines.fit import VOCABULARY, FitConfig, describe
    from pipelines.fit import fit as run
    from pipelines.settings import load_config

    overrides = [*(set_ or []), *([f"codebook.num_concepts={concepts}"] if concepts else [])]
    settings = load_config(FitConfig, config, overrides, source=source, output=output)
    if concepts and settings.source.startswith(VOCABULARY):
        raise UsageError(
            "--concepts is for a corpus; a codebook of names has a concept for each name, and "
            "--set codebook.groups='[16, 128]' says how many groups have patterns of their own"
        )
    progress = Progress("shard")
    with progress:
        result = run(
            settings,
            command=command_line(),
            on_plan=progress.start,
            on_shard=lambda name: progress.advance(),
        )
    print(describe(result, settings))


@app.command()
def pack(
    source: Annotated[
        str,
        typer.Argument(help="Embedded corpus, folder of class folders, or torchvision:NAME."),
    ],
    destination: Annotated[str, typer.Argument(help="Folder or s3:// prefix for the shards.")],
    split: Annotated[str, typer.Option(help="train or test.")] = "train",
    labels: Annotated[str, typer.Option(help="coarse or fine; embedded corpora have both.")] = (
        "coarse"
    ),
    root: Annotated[
        Path | None,
        typer.Option(help="Where torchvision keeps its files."),
    ] = None,
    download: Annotated[bool, typer.Option(help="Let torchvision download.")] = False,
    images_per_shard: Annotated[int, typer.Option(min=1)] = 1000,
) -> None:
    """Pack labelled images into WebDataset shards."""
    from one4all.corpus.packing import open_corpus
    from one4all.corpus.packing import pack as run
    from one4all.storage import open_storage

    images = open_corpus(
        source,
        split=choice("--split", split, "train", "test"),
        labels=choice("--labels", labels, "coarse", "fine"),
        root=root,
        download=download,
    )
    storage = open_storage(destination)
    storage.check(writable=True)
    num_shards, num_images = run(
        tqdm(images, unit="image", disable=None, leave=False),
        storage,
        prefix=split,
        images_per_shard=images_per_shard,
    )
    print(f"{num_images} images in {num_shards} shards written to {storage.uri}")


@app.command()
def preview(
    source: Annotated[str, typer.Argument(help="An image, a folder of images, or a .tar shard.")],
    output: Annotated[Path, typer.Argument(help="PNG file to write.")] = Path("preview.png"),
    protector: Annotated[str, typer.Option(help="Name, folder or s3:// URI.")] = "default",
    num_images: Annotated[int, typer.Option(min=1, max=64)] = 6,
) -> None:
    """Draw a contact sheet: clean, amplified perturbation, protected."""
    from pipelines.preview import preview as run

    count = run(source, output, protector=protector, num_images=num_images)
    print(f"{count} images drawn to {output}")


@app.command()
def evaluate(
    config: Annotated[Path, typer.Argument(help="YAML file: data sets, methods, grids.")],
    output: Annotated[
        str | None,
        typer.Option(help="Folder or s3:// prefix of results; the same one resumes."),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Show the trials and stop.")] = False,
    export: Annotated[
        str | None,
        typer.Option(help="Write the copies there, as shards, instead of evaluating them."),
    ] = None,
    set_: SetOption = None,
) -> None:
    """Train adversaries on clean and protected copies and compare; resumable."""
    from pipelines.evaluation.copies import export_copies
    from pipelines.evaluation.diagnose import diagnose_copies
    from pipelines.evaluation.job import evaluate as run
    from pipelines.evaluation.job import report
    from pipelines.evaluation.trials import EvaluateConfig, describe
    from pipelines.settings import load_config

    settings = load_config(EvaluateConfig, config, set_, output=output)
    if dry_run:
        print(describe(settings))
        return
    if export:
        for place in export_copies(settings, export):
            print(f"written: {place}")
        return
    progress = Progress("trial")

    def on_plan(num_todo: int, num_trials: int) -> None:
        if num_todo < num_trials:
            progress.say(f"{num_trials - num_todo} of {num_trials} trials are done already")
        progress.start(num_todo)

    def on_trial(trial: Any, record: dict[str, Any]) -> None:
        progress.advance(note=f"{trial.title}: {100 * record['last']:.1f} %")

    with progress:
        result = run(settings, command=command_line(), on_plan=on_plan, on_trial=on_trial)
        diagnoses = diagnose_copies(settings)
    print(report(settings, result, diagnoses=diagnoses))
    for title, reason in result.failed.items():
        print(f"  failed: {title}: {reason}")
    raise typer.Exit(1 if result.failed else 0)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where results go.")] = Path("runs/demo"),
    photos: Annotated[
        str,
        typer.Option(
            help="Protect and attack these instead of the embedded drawings: a folder with one "
            "sub-folder a class, or torchvision:NAME below data/."
        ),
    ] = "",
) -> None:
    """Run everything, small: pack, train, protect to S3, verify, and attack; writes report.html."""
    from pipelines import demo as parts

    material = parts.photos(photos) if photos else parts.drawings()
    report = parts.demo(folder, material, say=print)
    print(f"report: {report}")


@app.command()
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
) -> None:
    """Measure protect against a plain loop that does the same work."""
    from pipelines.bench import bench as run
    from pipelines.bench import bench_memory, bench_plan

    if plan_shards:
        print(bench_plan(plan_shards, output, say=print))
    elif shard_gb > 0:
        print(bench_memory(shard_gb, output, say=print))
    else:
        print(run(source, output, say=print))


cli_operate.add_verbs(app)


def main() -> None:
    """Entry point: every expected error is one sentence and an exit code."""
    _keep_native_messages_off_the_terminal()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    shards = logging.getLogger("one4all.shards")  # said on request: one JSON line each
    shards.handlers = [logging.StreamHandler(sys.stderr)]
    shards.setLevel(logging.INFO)
    shards.propagate = False
    # A scheduler stops us with SIGTERM: unwind as for Ctrl-C, so that uploads are aborted.
    interrupt.install()
    try:
        app()
    except One4AllError as error:
        print(f"one4all: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            advice = f"; {interrupt.advice}" if interrupt.advice else ""
            print(f"one4all: interrupted{advice}", file=sys.stderr)
        raise


def _keep_native_messages_off_the_terminal() -> None:
    """Let only Python write to standard error.

    Ray's C++ core prints to file descriptor 2 whatever its log level, such as a warning about every
    restartable actor of Ray Data. ONE4ALL_NATIVE_LOG names a file that keeps these messages.
    """
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="replace")
    target = os.environ.get("ONE4ALL_NATIVE_LOG", os.devnull)
    with open(target, "ab") as log:
        os.dup2(log.fileno(), 2)


def _print_verification(result: Any) -> None:
    verdict = "every promise holds" if result.ok else f"{result.num_problems} PROBLEMS"
    print(
        f"{verdict}: {result.num_shards} shards, {result.num_samples} samples, "
        f"{result.num_images} images, {result.num_sidecars} sidecars"
    )
    if result.num_images:
        print(
            f"  {result.num_within_budget} of {result.num_images} images within "
            f"{result.epsilon_levels} levels once decoded (largest {result.max_levels})"
        )
        print(
            f"  PSNR {result.mean_psnr_db:.1f} dB (worst {result.min_psnr_db:.1f}), "
            f"SSIM {result.mean_ssim:.3f} (worst {result.min_ssim:.3f})"
        )
    for note in result.notes:
        print(f"  note: {note}")
    for problem in result.problems:
        print(f"  problem: {problem}")
