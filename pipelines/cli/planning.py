"""`one4all plan`: what protect, train or evaluate would take, before it is paid for."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pipelines.cli.terminal import (
    ConfigOption,
    EvaluationFile,
    SetOption,
    TrainingOutput,
    TrainingSource,
    in_words,
    number_in_words,
    show,
    show_json,
    show_text,
    size_in_words,
)


class _PlanGroup(TyperGroup):
    """Takes `one4all plan SOURCE`, as it was spelt before, for `one4all plan protect SOURCE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, *ctx.help_option_names}:
            args = ["protect", *args]
        return super().parse_args(ctx, args)


def add_verbs(app: typer.Typer) -> None:
    """Add the verb of this module, which has verbs of its own, to the command line."""
    plans = typer.Typer(cls=_PlanGroup, no_args_is_help=True)
    plans.command("protect")(plan_protect)
    plans.command("train")(plan_train)
    plans.command("evaluate")(plan_evaluate)
    app.add_typer(plans, name="plan", help="Say what protect, train or evaluate would take.")


def plan_protect(
    source: Annotated[
        str, typer.Argument(help="Folder or s3:// prefix of images, .tar shards or Parquet files.")
    ],
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
        show_json(found.to_json())
    else:
        _print_protect_plan(found)


def plan_train(
    source: TrainingSource = None,
    output: TrainingOutput = None,
    num_images: Annotated[
        int | None, typer.Option(min=1, help="Images of the source, for the number of epochs.")
    ] = None,
    images_per_second: Annotated[
        float | None, typer.Option(min=1e-6, help="Speed of one worker, if it is known.")
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Price of one hour of one worker.")
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Say what training would take: steps, memory, time, worker-hours; reads no image."""
    from pipelines.settings import load_config
    from pipelines.train.config import TrainConfig
    from pipelines.train.plan import plan_training

    settings = load_config(TrainConfig, config, set_, source=source, output=output)
    found = plan_training(
        settings,
        num_images=num_images,
        images_per_second=images_per_second,
        price_per_hour=price_per_hour,
    )
    _print_train_plan(found)


def plan_evaluate(
    config: EvaluationFile,
    output: Annotated[
        str | None, typer.Option(help="Folder or s3:// prefix that results would go to.")
    ] = None,
    set_: SetOption = None,
) -> None:
    """Say what an evaluation would take: grids, trials, epochs; trains nothing."""
    from pipelines.evaluation.trials import EvaluateConfig, describe
    from pipelines.settings import load_config

    show_text(describe(load_config(EvaluateConfig, config, set_, output=output)))


def _print_protect_plan(found: Any) -> None:
    done = f"; {found.num_done:,} more are done" if found.num_done else ""
    size = size_in_words(found.num_bytes)
    show(f"{found.source}: {found.num_shards:,} {found.noun}s, {size} to do{done}")
    if not found.num_shards:
        return
    worker = f"{found.cpus_per_worker} CPU" + "s" * (found.cpus_per_worker > 1)
    if found.gpus_per_worker:
        worker = f"{found.gpus_per_worker:g} GPU and {worker}"
    measured = sum(shard.num_measured for shard in found.sampled)
    show(f"  about {found.num_images:,} images")
    show(
        f"  {found.images_per_second:.3g} images/s for one worker of {worker}, limited by "
        f"{found.limited_by}{_what_would_help(found)}"
    )
    cpus = f"{found.cpus_per_worker} CPU" + "s" * (found.cpus_per_worker > 1)
    for nodes, speed, size, at_most in (
        ("CPUs", found.cpu_images_per_second, cpus, ""),
        (
            "GPUs",
            found.gpu_images_per_second,
            f"{found.gpus_per_worker or 1:g} GPU and {cpus}",
            "" if found.gpus_per_worker else "at most ",
        ),
    ):
        if speed is not None:
            show(f"      on nodes of {nodes}: {at_most}{speed:.3g} images/s for {size}")
    hours = "GPU-hours" if found.gpus_per_worker else "worker-hours"
    for estimate in found.estimates:
        amount = estimate.worker_hours * (found.gpus_per_worker or 1)
        show(
            f"  {estimate.num_workers:>5,} workers: {in_words(estimate.seconds):>9}, "
            f"{number_in_words(amount)} {hours}"
        )
    show(
        f"  measured on {measured} images of {len(found.sampled)} shards, on this hardware; "
        f"embeddings by {found.encoder}"
    )
    if found.relative_low is None:
        show("  uncertainty: unknown, since only one shard could be sampled")
    else:
        show(
            f"  uncertainty: single sampled shards say {found.relative_low:.2g} to "
            f"{found.relative_high:.2g} times these times"
        )
    show(
        "  not in it: start-up (a minute or so), writing to the destination, other hardware or "
        "load; workers are taken to be equally fast side by side"
    )


def _what_would_help(found: Any) -> str:
    """Which share of the time the codecs have, and so what other hardware saves at most."""
    if found.limited_by == "reading":
        return ": neither more CPUs nor GPUs help"
    codecs = round(100 * found.codec_share)
    if found.gpus_per_worker:
        return f" (codecs {codecs} %: more CPUs for each GPU save at most as much)"
    return f" (codecs {codecs} %: a GPU saves at most {100 - codecs} %)"


def _print_train_plan(found: Any) -> None:
    images = f", {found.num_images:,} images" if found.num_images else ""
    size = size_in_words(found.num_bytes)
    show(f"{found.steps:,} steps; {found.num_shards:,} shards, {size}{images}")
    show(
        f"  a worker needs about {size_in_words(found.device_bytes)} "
        f"{'on its GPU' if found.on_gpu else 'of memory'} for weights, optimiser and one batch at "
        f"{found.cost.working_size} pixels, and {size_in_words(found.host_bytes)} of memory besides"
    )
    show(
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
        show(
            f"  {count:>5,} workers: {estimate.images_per_step:,} images a step, {epochs} epochs, "
            f"{shards if fewest else 'all'} shards a rank: {in_words(estimate.seconds)}, "
            f"{hours}{price}"
        )
    if found.num_images is None:
        show("  epochs: say --num-images, or put a sizes.json beside the shards")
