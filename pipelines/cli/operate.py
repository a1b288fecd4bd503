"""The verbs of who runs it: plan, submit, status."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from pipelines.cli.terminal import (
    ConfigOption,
    SetOption,
    choice,
    in_words,
    interrupt,
    number_in_words,
    size_in_words,
)

_WATCH_SECONDS = 5.0
_NOT_AS_A_JOB = ("submit", "demo", "preview")


def add_verbs(app: typer.Typer) -> None:
    """Add the verbs of this module to the command line."""
    app.command()(plan)
    app.command(cls=_StatusCommand)(status)
    app.command(context_settings={"allow_interspersed_args": False})(submit)


def plan(
    source: Annotated[str, typer.Argument(help="Folder or s3:// prefix of .tar shards.")],
    protector: Annotated[
        str | None,
        typer.Option(help="Name, folder or s3:// URI of a protector."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Estimate for 1, 4 and this many.")] = 16,
    destination: Annotated[
        str | None,
        typer.Option(help="Count only what is pending there."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Say what protecting a corpus would take: images, time, worker-hours; from a sample."""
    from pipelines.protect.config import ProtectConfig
    from pipelines.protect.plan import plan as run
    from pipelines.settings import load_config

    settings = load_config(ProtectConfig, config, set_, protector=protector)
    found = run(source, settings, destination_uri=destination, num_workers=workers)
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        _print_plan(found)


def _print_plan(found: Any) -> None:
    done = f"; {found.num_done:,} more are done" if found.num_done else ""
    size = size_in_words(found.num_bytes)
    print(f"{found.source}: {found.num_shards:,} shards, {size} to do{done}")
    if not found.num_shards:
        return
    worker = f"{found.cpus_per_worker} CPU" + "s" * (found.cpus_per_worker > 1)
    if found.gpus_per_worker:
        worker = f"{found.gpus_per_worker:g} GPU and {worker}"
    measured = sum(shard.num_measured for shard in found.sampled)
    print(f"  about {found.num_images:,} images")
    print(
        f"  {found.images_per_second:.3g} images/s for one worker of {worker}, limited by "
        f"{found.limited_by}"
    )
    hours = "GPU-hours" if found.gpus_per_worker else "worker-hours"
    for estimate in found.estimates:
        amount = estimate.worker_hours * (found.gpus_per_worker or 1)
        print(
            f"  {estimate.num_workers:>5,} workers: {in_words(estimate.seconds):>9}, "
            f"{number_in_words(amount)} {hours}"
        )
    print(f"  measured on {measured} images of {len(found.sampled)} shards, on this hardware")
    if found.relative_low is None:
        print("  uncertainty: unknown, since only one shard could be sampled")
    else:
        print(
            f"  uncertainty: single sampled shards say {found.relative_low:.2g} to "
            f"{found.relative_high:.2g} times these times"
        )
    print(
        "  not in it: start-up (a minute or so), writing to the destination, other hardware or "
        "load; workers are taken to be equally fast side by side"
    )


def print_train_plan(found: Any) -> None:
    images = f", {found.num_images:,} images" if found.num_images else ""
    size = size_in_words(found.num_bytes)
    print(f"{found.steps:,} steps; {found.num_shards:,} shards, {size}{images}")
    print(
        f"  a worker needs about {size_in_words(found.device_bytes)} "
        f"{'on its GPU' if found.on_gpu else 'of memory'} for weights, optimiser and one batch at "
        f"{found.cost.working_size} pixels, and {size_in_words(found.host_bytes)} of memory besides"
    )
    print(
        f"  {number_in_words(found.images_per_second)} images/s of one worker "
        f"({found.speed_from}); {number_in_words(found.cost.flops / 1e9)} GFLOP an image"
    )
    for estimate in found.estimates:
        count = estimate.num_workers
        fewest, most = found.num_shards // count, -(-found.num_shards // count)
        shards = f"{fewest} to {most}" if fewest < most else f"{most}"
        epochs = "?" if estimate.epochs is None else number_in_words(estimate.epochs)
        hours = f"{number_in_words(estimate.worker_hours)} worker-hours"
        if estimate.gpu_hours is not None:
            hours = f"{number_in_words(estimate.gpu_hours)} GPU-hours"
        price = "" if estimate.price is None else f", price {estimate.price:,.2f}"
        print(
            f"  {count:>5,} workers: {estimate.images_per_step:,} images a step, {epochs} epochs, "
            f"{shards if fewest else 'all'} shards a rank: {in_words(estimate.seconds)}, "
            f"{hours}{price}"
        )
    if found.num_images is None:
        print("  epochs: say --num-images, or put a sizes.json beside the shards")


class _StatusCommand(TyperCommand):
    """Lets --watch stand alone, or with seconds."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--watch" in args:
            after = args.index("--watch") + 1
            if after == len(args) or not args[after].replace(".", "", 1).isdigit():
                args = [*args[:after], str(_WATCH_SECONDS), *args[after:]]
        return super().parse_args(ctx, args)


def status(
    destination: Annotated[str, typer.Argument(help="What protect writes to.")],
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
) -> None:
    """Show what is done, pending, bad and quarantined at a destination."""
    from pipelines.status import read_status
    from pipelines.status import watch as look

    if watch is not None:
        interrupt.advice = ""
        _watch(look(destination, every_seconds=watch, totals=bool(totals)))
        return
    found = read_status(destination, totals=totals)
    if as_json:
        print(json.dumps(asdict(found), indent=1))
    else:
        print("\n".join(_status_lines(found)))


def _watch(looks: Any) -> None:
    """Redraw on a terminal; elsewhere one plain line for each look."""
    height = 0
    for found, rate in looks:
        pace = "no shard was done since this watch began"
        if rate.images_per_second is not None:
            pace = f"{rate.images_per_second:.3g} images/s since this watch began"
        if rate.seconds_left is not None and found.num_pending:
            pace += f", about {in_words(rate.seconds_left)} left"
        if not sys.stdout.isatty():
            done = f"{found.num_done:,} of {found.num_shards:,} shards done"
            print(f"{done}, {found.num_pending:,} pending; {pace}", flush=True)
            continue
        lines = [*_status_lines(found), f"  {pace}"]
        # Up to where the last drawing began, and everything below erased.
        print(f"\x1b[{height}F\x1b[J" * bool(height) + "\n".join(lines), flush=True)
        height = len(lines)


def _status_lines(found: Any) -> list[str]:
    written = "" if found.output_bytes is None else f", {size_in_words(found.output_bytes)} written"
    to_read = size_in_words(found.pending_bytes)
    lines = [
        f"{found.destination}  <-  {found.source}  ({found.protector}, {found.output_format})",
        f"  done         {found.num_done:>9,} of {found.num_shards:,} shards{written}",
        f"  pending      {found.num_pending:>9,} shards, {to_read} to read",
    ]
    if found.num_protected is None:
        lines.append("  images       not counted; --totals reads every manifest")
    else:
        lines.append(
            f"  images       {found.num_protected:>9,} protected, {found.num_bad:,} bad",
        )
    lines.append(f"  quarantined  {len(found.quarantined):>9,} shards")
    return lines + [
        f"    {name}: {reason}" for name, reason in (found.failing | found.quarantined).items()
    ]


def submit(
    ctx: typer.Context,
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="VERB ARGS...", help="What to run; without it, a job of that id is followed."
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="The dashboard, http://HEAD:8265; else RAY_API_SERVER_ADDRESS."),
    ] = None,
    working_dir: Annotated[
        str | None,
        typer.Option(help="Folder to upload and run in, such as one with a --config file."),
    ] = None,
    submission_id: Annotated[
        str | None,
        typer.Option(help="Name of the job; one that exists is followed."),
    ] = None,
    slot: Annotated[
        str | None,
        typer.Option(help="hourly or daily: one job for each hour or day and these arguments."),
    ] = None,
    program: Annotated[
        str,
        typer.Option(help="How nodes of the cluster start one4all."),
    ] = "one4all",
    stop_on_interrupt: Annotated[
        bool,
        typer.Option("--stop-on-interrupt", help="Ctrl-C stops the job, not only following it."),
    ] = False,
) -> None:
    """Run a verb as a job of a Ray cluster; follows its log and ends with its exit status."""
    from pipelines.submit import cluster_address, plan_job
    from pipelines.submit import submit as run

    if command:
        _check_command(ctx, command)
    elif not submission_id:
        raise typer.BadParameter("give a verb, or the --submission-id of a job to follow")
    job = plan_job(
        command or [],
        submission_id=submission_id,
        slot=choice("--slot", slot, "hourly", "daily") if slot else None,
        working_dir=working_dir,
        program=program,
    )
    to = cluster_address(address, os.environ)
    interrupt.advice = ""  # said by submit
    raise typer.Exit(
        run(
            job,
            to,
            say=lambda line: print(line, flush=True),
            stop_on_interrupt=stop_on_interrupt,
        )
    )


def _check_command(ctx: typer.Context, command: list[str]) -> None:
    """Find mistakes here, before a cluster does."""
    verb, *arguments = command
    group: Any = ctx.find_root().command
    jobs = sorted(group.commands.keys() - set(_NOT_AS_A_JOB))
    if verb not in jobs:
        raise typer.BadParameter(f"{verb!r} is no verb to run as a job, only {', '.join(jobs)}")
    group.commands[verb].make_context(verb, list(arguments), parent=ctx.find_root())
