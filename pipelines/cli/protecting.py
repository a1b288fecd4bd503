"""The verbs of who protects a corpus: protect, verify, status, preview."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from pipelines.cli.learning import training_lines
from pipelines.cli.terminal import (
    ConfigOption,
    Progress,
    SetOption,
    in_words,
    interrupt,
    redraw,
    show,
    show_json,
    size_in_words,
)

_WATCH_SECONDS = 5.0
_KINDS = {"tar": ".tar shards", "parquet": "Parquet files", "images": "loose images"}


def add_verbs(app: typer.Typer) -> None:
    """Add the verbs of this module to the command line."""
    app.command()(protect)
    app.command()(verify)
    app.command(cls=_StatusCommand)(status)
    app.command()(preview)


def protect(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder or s3:// prefix of images, .tar shards or Parquet files; one such file, "
            "'train-{0000..0099}.tar', or a list of them (.txt)."
        ),
    ],
    destination: Annotated[str, typer.Argument(help="Folder or s3:// prefix to write to.")],
    protector: Annotated[
        str | None,
        typer.Option(
            help="Name, folder or s3:// URI of a protector; else one is fitted to the corpus."
        ),
    ] = None,
    strength: Annotated[
        str | None,
        typer.Option(help="Look of the fitted one: discreet, balanced, strong or gray-proof."),
    ] = None,
    output_format: Annotated[
        str | None,
        typer.Option(help="match (keep file formats) or lossless (JPEG, AVIF, HEIC become PNG)."),
    ] = None,
    on_bad_image: Annotated[
        str | None,
        typer.Option(help="drop, fail or passthrough."),
    ] = None,
    container: Annotated[
        str | None,
        typer.Option(help="What the source is made of: tar, parquet or images; else found out."),
    ] = None,
    image_column: Annotated[
        list[str] | None,
        typer.Option(help="Column of Parquet files that holds images, if it is not found out."),
    ] = None,
    others: Annotated[
        str | None,
        typer.Option(help="What lies among loose images and is none: copy or skip."),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(help="File or s3:// object that lists what to do, a path in each line."),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(help="Only what was written since: 2026-11-01T00:00Z, or 36h before now."),
    ] = None,
    mark_no_ai_training: Annotated[
        bool | None,
        typer.Option("--mark-no-ai-training", help="Write a data-mining reservation (XMP)."),
    ] = None,
    tint_gray: Annotated[
        bool | None,
        typer.Option("--tint-gray", help="Make gray images colour images, to hold the pattern."),
    ] = None,
    prune: Annotated[
        bool | None,
        typer.Option("--prune", help="Remove outputs whose source is gone."),
    ] = None,
    retry_quarantined: Annotated[
        bool | None,
        typer.Option("--retry-quarantined", help="Try again what was given up."),
    ] = None,
    moved_from: Annotated[
        str | None,
        typer.Option(help="Where the source was before, if the same corpus lies elsewhere now."),
    ] = None,
    log_json: Annotated[
        bool | None,
        typer.Option("--log-json", help="Also write one JSON line for each shard to stderr."),
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Protect all of a corpus that is not protected yet. Safe to kill and to repeat."""
    from pipelines.protect.config import ProtectConfig
    from pipelines.protect.job import protect as run
    from pipelines.settings import load_config

    settings = load_config(
        ProtectConfig,
        config,
        set_,
        protector=protector,
        strength=strength,
        output_format=output_format,
        on_bad_image=on_bad_image,
        container=container,
        image_columns=image_column,
        others=others,
        only=only,
        since=since,
        mark_no_ai_training=mark_no_ai_training,
        tint_gray=tint_gray,
        prune=prune,
        retry_quarantined=retry_quarantined,
        moved_from=moved_from,
        log_json=log_json,
    )
    progress = Progress("shard")
    tries: Counter[str] = Counter()

    def on_fit(sentence: str, num_shards: int) -> None:
        if sentence:
            progress.say(sentence)
        elif num_shards:
            progress.start(num_shards, "part")
        else:
            progress.advance()

    def on_plan(census: Any) -> None:
        noun = census.container.noun
        progress.say(f"{source} is read as {_KINDS[census.container.name]}")
        if census.num_done:
            progress.say(f"{census.num_done:,} of {census.num_units:,} {noun}s are done already")
        if census.num_damaged:
            progress.say(
                f"{census.num_damaged:,} {noun}s were done, and their outputs are missing or were "
                f"replaced since, such as {next(iter(census.damaged))}; they are written again"
            )
        progress.start(census.num_pending, noun)

    def on_progress(status: Any) -> None:
        if status.outcome in ("done", "restated"):
            progress.advance(status.num_objects)
        else:
            tries[status.name] += 1
            which = _which_attempt(status, tries[status.name])
            progress.say(f"{status.outcome}{which}: {status.name}: {status.error}")

    with progress:
        result = run(
            source,
            destination,
            settings,
            on_plan=on_plan,
            on_progress=on_progress,
            on_wait=progress.say,
            on_fit=on_fit,
        )
    show(*_result_lines(result, settings, destination))
    raise typer.Exit(result.exit_code)


def _result_lines(result: Any, settings: Any, destination: str) -> list[str]:
    """What a run did, in lines."""
    noun = result.noun
    lines = [
        f"{result.num_done} of {result.num_shards} {noun}s protected "
        f"({result.num_protected_now} now, {result.num_images} images); "
        f"{result.num_bad_images} bad images{_fate(result.num_bad_images, settings.on_bad_image)}"
    ]
    if result.num_bad_images:
        lines.append(f"  one4all status {destination} --bad lists them with their reasons")
    if result.converted:
        changes = ", ".join(f"{count} {change}" for change, count in result.converted.most_common())
        lines += [
            f"  converted now: {changes}",
            "  label maps and masks do not survive that; sidecar_patterns copies them, such as "
            "--set 'sidecar_patterns=[\"*.seg.png\"]'",
        ]
    if result.num_gray:
        lines.append(
            f"  {result.num_gray} images are gray and stay so: the pattern is a colour, so they "
            "are hardly protected; --tint-gray, at a new destination, makes them colour images"
        )
    lines += [
        f"  not protected: {name}: {reason}"
        for name, reason in (result.failed | result.quarantined).items()
    ]
    if result.quarantined:
        lines.append(
            f"  {len(result.quarantined)} of these {noun}s are given up; --retry-quarantined tries "
            "them again"
        )
    if result.num_older:
        lines.append(
            f"  {result.num_older} {noun}s are older than {settings.since} and were left out; "
            f"{result.num_older_undone} of them are not protected"
        )
    if result.num_left_out:
        lines.append(f"  {result.num_left_out} {noun}s are not in {settings.only}: left out")
    if result.num_absent:
        lines.append(
            f"  {result.num_absent} names in {settings.only} are not at the source, such as "
            f"{result.absent}"
        )
    if result.num_pruned:
        lines.append(f"  {result.num_pruned} outputs were removed, because their source is gone")
    if result.num_orphans:
        lines.append(
            f"  {result.num_orphans} outputs have no source any more, such as {result.orphan}; "
            "--prune removes them"
        )
    if result.num_others:
        lines.append(
            f"  {result.num_others} objects are no {_KINDS[result.container]} and were left "
            f"alone, such as {result.other}"
        )
    return lines


def _which_attempt(status: Any, num_tries: int) -> str:
    """Which attempt at a shard failed: one that counts against it, or a try that does not."""
    from one4all.ledger import MAX_ATTEMPTS

    if status.outcome != "failed":
        return ""
    if status.attempt:
        return f", attempt {status.attempt} of {MAX_ATTEMPTS}"
    return f", try {num_tries} of this run, not counted against the shard"


def _fate(num_bad: int, policy: str) -> str:
    """What became of bad images that are not refused."""
    if not num_bad:
        return ""
    return ", dropped" if policy == "drop" else ", passed through WITHOUT protection"


def verify(
    source: Annotated[str, typer.Argument(help="The source that was protected.")],
    destination: Annotated[str, typer.Argument(help="What protect wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    per_image: Annotated[
        Path | None,
        typer.Option(
            help="Also measure how visible each image's protection is (seconds an image), and "
            "write one JSON line for each image to this file."
        ),
    ] = None,
    recompute: Annotated[
        float | None,
        typer.Option(help="Share of the shards to protect again and compare, 0 to 1."),
    ] = None,
    protector: Annotated[
        str | None,
        typer.Option(help="The protector of the destination, for --recompute."),
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Re-read both sides and check every promise; exit 0 only if all hold."""
    from one4all.visibility import NOT_INSTALLED, measurable
    from pipelines.settings import load_config
    from pipelines.verify import VerifyConfig
    from pipelines.verify import verify as run

    settings = load_config(
        VerifyConfig,
        config,
        set_,
        recompute=recompute,
        protector=protector,
        visibility=True if per_image and measurable() else None,
    )
    progress = Progress("part")

    def on_audit(audit: Any) -> None:
        progress.advance()
        if lines is not None:
            lines.writelines(
                json.dumps({"shard": audit.name} | image.figures()) + "\n" for image in audit.images
            )

    with progress, per_image.open("w", encoding="utf-8") if per_image else nullcontext() as lines:
        result = run(
            source,
            destination,
            settings,
            on_plan=progress.start,
            on_audit=on_audit,
        )
    if per_image and not settings.visibility:
        result.notes.append(NOT_INSTALLED)
    if as_json:
        show_json(result.to_json())
    else:
        _print_verification(result)
    raise typer.Exit(0 if result.ok else 1)


def _print_verification(result: Any) -> None:
    verdict = "every promise holds" if result.ok else f"{result.num_problems} PROBLEMS"
    show(
        f"{verdict}: {result.num_shards} {result.noun}s, {result.num_samples} samples, "
        f"{result.num_images} images, {result.num_sidecars} sidecars"
    )
    if result.num_images:
        show(
            f"  {result.num_within_budget} of {result.num_images} images within "
            f"{result.epsilon_levels} levels once decoded (largest {result.max_levels})"
        )
        show(
            f"  PSNR {result.mean_psnr_db:.1f} dB (worst {result.min_psnr_db:.1f}), "
            f"SSIM {result.mean_ssim:.3f} (worst {result.min_ssim:.3f})"
        )
    if result.visibility:
        show(f"  {result.visibility}; in brackets the worst")
    for note in result.notes:
        show(f"  note: {note}")
    for problem in result.problems:
        show(f"  problem: {problem}")


class _StatusCommand(TyperCommand):
    """Lets --watch stand alone, or with seconds."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--watch" in args:
            after = args.index("--watch") + 1
            if after == len(args) or not args[after].replace(".", "", 1).isdigit():
                args = [*args[:after], str(_WATCH_SECONDS), *args[after:]]
        return super().parse_args(ctx, args)


def status(
    destination: Annotated[
        str,
        typer.Argument(help="What protect writes to; or the output or run folder of a training."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    watch: Annotated[
        float | None,
        typer.Option(
            metavar="[SECONDS]", min=0.1, help="Look again every few seconds (5) until it is done."
        ),
    ] = None,
    totals: Annotated[
        bool | None,
        typer.Option(help="Read every manifest for totals; by default up to 20,000, once."),
    ] = None,
    bad: Annotated[
        bool,
        typer.Option("--bad", help="List the images that could not be protected, with reasons."),
    ] = False,
    runs: Annotated[
        bool,
        typer.Option("--runs", help="List how the last runs have ended, the newest first."),
    ] = False,
) -> None:
    """Show what is done, pending, bad and quarantined at a destination."""
    from pipelines.status import read_bad_images, read_runs, read_status
    from pipelines.status import watch as look
    from pipelines.train.status import read_training

    if not (bad or runs) and read_training(destination) is not None:
        _show_training(destination, every_seconds=watch, as_json=as_json)
        return
    if bad:
        if watch is not None:
            raise typer.BadParameter("--bad is one list; it goes without --watch")
        _show_bad(read_bad_images(destination), as_json=as_json)
        return
    if runs:
        if watch is not None:
            raise typer.BadParameter("--runs is one list; it goes without --watch")
        _show_runs(read_runs(destination), as_json=as_json)
        return
    if watch is not None:
        interrupt.advice = ""
        _watch(look(destination, every_seconds=watch, totals=bool(totals)))
        return
    found = read_status(destination, totals=totals)
    if as_json:
        show_json(asdict(found))
    else:
        show(*_status_lines(found))


def _show_training(output: str, *, every_seconds: float | None, as_json: bool) -> None:
    """How far a training is; again and again until its last step, if asked to."""
    from pipelines.train.status import read_training

    interrupt.advice = ""
    height = 0
    while True:
        found: Any = read_training(output)
        if as_json:
            show_json(asdict(found))
            return
        lines = training_lines(found)
        if every_seconds is None or not sys.stdout.isatty():
            show(*lines)
        else:
            redraw(lines, height)
            height = len(lines)
        if every_seconds is None or found.step >= found.num_steps:
            return
        time.sleep(every_seconds)


def _show_bad(found: Any, *, as_json: bool) -> None:
    if as_json:
        show_json([{"shard": shard} | image.model_dump() for shard, image in found])
        return
    count = 0
    for shard, image in found:
        show(f"{shard}: {image.member}: {image.reason} ({image.action})")
        count += 1
    show(f"{count:,} bad images")


def _show_runs(found: Any, *, as_json: bool) -> None:
    if as_json:
        show_json([record.model_dump() for record in found])
        return
    for record in found:
        began = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(record.started))
        stands = "" if record.num_shards is None else f" of {record.num_shards:,}"
        done = record.num_protected_now if record.num_done is None else record.num_done
        show(
            f"{began}  {record.run_id}  exit code {record.exit_code}, {in_words(record.seconds)}: "
            f"{done:,}{stands} {record.noun}s, {record.num_protected_now:,} now "
            f"({record.num_images:,} images, {size_in_words(record.bytes_written)} written"
            + "".join(f"; embeddings by {encoder}" for encoder in record.encoders)
            + ")"
            + (f": {record.error}" if record.error else "")
        )
    if not found:
        show("no run has left a record")


def _watch(looks: Any) -> None:
    """Redraw on a terminal; elsewhere one plain line for each look."""
    height = 0
    for found, rate in looks:
        pace = f"no {found.noun} was done since this watch began"
        if rate.images_per_second is not None:
            pace = f"{rate.images_per_second:.3g} images/s since this watch began"
        if rate.seconds_left is not None and found.num_pending:
            pace += f", about {in_words(rate.seconds_left)} left"
        if not sys.stdout.isatty():
            done = f"{found.num_done:,} of {found.num_shards:,} {found.noun}s done"
            show(f"{done}, {found.num_pending:,} pending; {pace}")
            continue
        lines = [*_status_lines(found), f"  {pace}"]
        redraw(lines, height)
        height = len(lines)


def _status_lines(found: Any) -> list[str]:
    written = "" if found.output_bytes is None else f", {size_in_words(found.output_bytes)} written"
    to_read = size_in_words(found.pending_bytes)
    lines = [
        f"{found.destination}  <-  {found.source}  ({found.protector}, {found.output_format})",
        f"  done         {found.num_done:>9,} of {found.num_shards:,} {found.noun}s{written}",
        f"  pending      {found.num_pending:>9,} {found.noun}s, {to_read} to read",
    ]
    if found.num_damaged:
        lines.append(
            f"  damaged      {found.num_damaged:>9,} of the pending were done, and their outputs "
            "are missing or replaced; protect writes them again"
        )
    if found.num_protected is None:
        lines.append(f"  images       {found.num_bad:,} bad; --totals counts the protected ones")
    else:
        lines.append(
            f"  images       {found.num_protected:>9,} protected, {found.num_bad:,} bad",
        )
    if found.num_orphans:
        lines.append(f"  orphans      {found.num_orphans:>9,} outputs whose source is gone")
    lines.append(f"  last success {_ago(found.last_success)}")
    lines.append(f"  quarantined  {len(found.quarantined):>9,} {found.noun}s")  # the reasons follow
    return lines + [
        f"    {name}: {reason}" for name, reason in (found.failing | found.quarantined).items()
    ]


def _ago(seconds: float | None) -> str:
    """How long ago a run left nothing to do."""
    if seconds is None:
        return "none: no run has left nothing to do yet"
    return f"{in_words(max(0.0, time.time() - seconds))} ago"


def preview(
    source: Annotated[
        str, typer.Argument(help="An image; or images, .tar shards or Parquet files.")
    ],
    output: Annotated[Path, typer.Argument(help="PNG file to write.")] = Path("preview.png"),
    protector: Annotated[str, typer.Option(help="Name, folder or s3:// URI.")] = "default",
    num_images: Annotated[int, typer.Option(min=1, max=64)] = 6,
) -> None:
    """Draw a contact sheet at real size: clean, protected, amplified perturbation."""
    from one4all.visibility import NOT_INSTALLED, measurable
    from pipelines.preview import preview as run

    count = run(source, output, protector=protector, num_images=num_images)
    show(f"{count} images drawn to {output}")
    if not measurable():
        show(f"  note: {NOT_INSTALLED}")
