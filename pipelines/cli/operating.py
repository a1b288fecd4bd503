"""The verbs of who runs it: submit, config."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from pipelines.cli.terminal import choice, interrupt, show, show_text

if TYPE_CHECKING:  # it waits for PyTorch
    from pipelines.settings import JobConfig

VERBS_WITH_SETTINGS = ("protect", "verify", "fit", "train", "evaluate")
_NOT_AS_A_JOB = ("submit", "demo", "preview", "config")
_EVALUATION = {
    "data": {"drawings": {"source": "emoji-nature", "size": 32, "max_train": 1000}},
    "grids": [
        {
            "title": "Controls on drawings",
            "data": ["drawings"],
            "methods": ["clean", "uniform_noise", "class_oracle"],
        }
    ],
}


def add_verbs(app: typer.Typer) -> None:
    """Add the verbs of this module to the command line."""
    app.command(context_settings={"allow_interspersed_args": False})(submit)
    app.command()(config)


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
            say=show,
            stop_on_interrupt=stop_on_interrupt,
        )
    )


def _check_command(ctx: typer.Context, command: list[str]) -> None:
    """Find mistakes here, before a cluster does."""
    group: Any = ctx.find_root().command
    jobs = sorted(group.commands.keys() - set(_NOT_AS_A_JOB))
    if command[0] not in jobs:
        raise typer.BadParameter(
            f"{command[0]!r} is no verb to run as a job, only {', '.join(jobs)}"
        )
    parse(group, command)


def parse(group: Any, words: list[str]) -> Any:
    """The context of the verb that these words of a command line name, and of its arguments.

    Raises:
        click.ClickException: A word is unknown or missing; the text is the command line's own.
    """
    context = group.make_context("one4all", list(words))
    while isinstance(context.command, TyperGroup):
        inner: Any
        words = [*context._protected_args, *context.args]
        name, inner, arguments = context.command.resolve_command(context, words)
        context = inner.make_context(name, arguments, parent=context)
    return context


def config(
    verb: Annotated[str, typer.Argument(help=f"One of: {', '.join(VERBS_WITH_SETTINGS)}.")],
) -> None:
    """Print every key of a verb's settings, with default and meaning, as YAML to start from."""
    from pipelines.cli.settings_file import settings_yaml

    if verb not in VERBS_WITH_SETTINGS:
        raise typer.BadParameter(f"{verb!r} has no settings, only {', '.join(VERBS_WITH_SETTINGS)}")
    if verb == "evaluate":
        show("# Settings of `one4all evaluate FILE`: the defaults, and a small example.")
    else:
        show(f"# Settings of `one4all {verb} ... --config FILE`: the defaults; keep what differs.")
    show("# One key alone: --set KEY=VALUE, and --set KEY.KEY=VALUE for a key inside another.", "")
    show_text(settings_yaml(default_settings(verb)))


def default_settings(verb: str) -> JobConfig:
    """The defaults of a verb; of `evaluate`, which has none for what it compares, an example."""
    if verb == "protect":
        from pipelines.protect.config import ProtectConfig

        return ProtectConfig()
    if verb == "verify":
        from pipelines.verify import VerifyConfig

        return VerifyConfig()
    if verb == "fit":
        from pipelines.fit import FitConfig

        return FitConfig()
    if verb == "train":
        from pipelines.train.config import TrainConfig

        return TrainConfig()
    from pipelines.evaluation.trials import EvaluateConfig

    return EvaluateConfig.model_validate(_EVALUATION)
