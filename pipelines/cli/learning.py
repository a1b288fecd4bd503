"""The verbs of who makes a protector: fit, train; and pack, which makes corpora."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from one4all.errors import UsageError
from one4all.training import VALIDATION
from pipelines.cli.planning import plan_train
from pipelines.cli.terminal import (
    ConfigOption,
    Progress,
    SetOption,
    TrainingOutput,
    TrainingSource,
    choice,
    command_line,
    in_words,
    show,
    show_text,
)

_SEEN_LOSS = f"{VALIDATION}loss"
_NAMED = 20  # damaged shards, at the end
# Of an entry of the training's metrics: said otherwise, or the same all along.
_NOT_NOTED = {
    "step",
    "epoch",
    "learning_rate",
    "world_size",
    "images_per_second",
    "damaged_shards",
}


def add_verbs(app: typer.Typer) -> None:
    """Add the verbs of this module to the command line."""
    app.command()(fit)
    app.command()(train)
    app.command()(pack)


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
        typer.Option(help="Clusters of images; default: found from the images, 16 to 256."),
    ] = None,
    strength: Annotated[
        str | None,
        typer.Option(help="Look: discreet (the default), balanced, strong or gray-proof."),
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Fit a codebook to a corpus or a vocabulary: one look, no labels, no training."""
    from pipelines.fit import FitConfig, describe
    from pipelines.fit import fit as run
    from pipelines.settings import load_config

    overrides = [*(set_ or [])]
    if concepts:
        overrides.append(f"codebook.num_concepts={concepts}")
    if strength:
        overrides.append(f"codebook.pattern={strength}")
    settings = load_config(FitConfig, config, overrides, source=source, output=output)
    if concepts and settings.vocabulary:
        raise UsageError(
            "--concepts is for a corpus; a codebook of names has a concept for each name"
        )
    progress = Progress("shard")
    with progress:
        result = run(
            settings,
            command=command_line(),
            on_plan=progress.start,
            on_shard=lambda name: progress.advance(),
            on_group=lambda count: progress.say(f"finding kinds among {count:,} images"),
        )
    show_text(describe(result, settings))


def train(
    source: TrainingSource = None,
    output: TrainingOutput = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", hidden=True)] = False,
    num_images: Annotated[int | None, typer.Option(min=1, hidden=True)] = None,
    images_per_second: Annotated[float | None, typer.Option(min=1e-6, hidden=True)] = None,
    price_per_hour: Annotated[float | None, typer.Option(min=0, hidden=True)] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Train a generator with Ray Train; the same command resumes an interrupted run."""
    if dry_run:  # as it was spelt before
        plan_train(source, output, num_images, images_per_second, price_per_hour, config, set_)
        return
    if (num_images, images_per_second, price_per_hour) != (None, None, None):
        raise UsageError(
            "--num-images, --images-per-second and --price-per-hour are for one4all plan train"
        )
    from pipelines.settings import load_config
    from pipelines.train.config import TrainConfig
    from pipelines.train.job import train as run
    from pipelines.train.progress import DAMAGED_FILE

    settings = load_config(TrainConfig, config, set_, source=source, output=output)
    progress = Progress("step")

    def on_metrics(metrics: dict[str, float]) -> None:
        progress.advance_to(int(metrics["step"]), training_note(metrics))

    with progress:
        card = run(
            settings,
            command=command_line(),
            on_start=lambda: progress.start(settings.steps),
            on_metrics=on_metrics,
            on_damage=lambda uri, reason: progress.say(
                f"left out from its damage on: {uri}: {reason}"
            ),
            on_wait=progress.say,
            on_note=progress.say,
        )
    if num_damaged := card.training["num_damaged_shards"]:
        show(f"damaged shards, used up to their damage: {num_damaged}, named in {DAMAGED_FILE}")
        for uri, reason in islice(card.training["damaged_shards"].items(), _NAMED):
            show(f"  {uri}: {reason}")
    show(f"protector {card.content_hash[:12]} written to {settings.output}")
    show(f"  loss curves, metrics and checkpoints: {settings.run_folder}")


def training_lines(found: Any) -> list[str]:
    """A training seen from outside, in lines: the pace, the loss as a curve, damaged shards."""
    from pipelines.train.status import curve

    lines = [f"{found.output or '(no output)'}  <-  training in {found.run_folder}"]
    if not found.history:
        return [*lines, f"  step {0:>9} of {found.num_steps:,}: nothing was logged yet"]
    last = found.history[-1]
    pace = f"{last['images_per_second']:.3g} images/s of {last['world_size']:.0f} workers"
    if found.step < found.num_steps:
        pace += f", about {in_words(found.seconds_left)} left"
    losses = [entry["loss"] for entry in found.history]
    lines.append(f"  step {found.step:>9,} of {found.num_steps:,}; {pace}")
    lines.append(f"  loss {losses[0]:>9.3g} -> {losses[-1]:.3g}  {curve(losses)}")
    if seen := [entry[_SEEN_LOSS] for entry in found.history if _SEEN_LOSS in entry]:
        lines.append(f"  of validation {seen[0]:.3g} -> {seen[-1]:.3g}  {curve(seen)}")
    lines += [f"  damaged shard {uri}: {reason}" for uri, reason in found.damaged.items()]
    return lines


def training_note(entry: dict[str, float]) -> str:
    """One line of how training goes: the loss, the objective's own scalars, and the pace."""
    scalars = [
        f"{key} {value:.3g}"
        for key, value in entry.items()
        if key == _SEEN_LOSS or not (key in _NOT_NOTED or key.startswith(VALIDATION))
    ]
    if num_damaged := entry.get("damaged_shards"):
        scalars.append(f"damaged shards {num_damaged:.0f}")
    return " ".join([*scalars, f"{entry['images_per_second']:.3g} images/s"])


def pack(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder of class folders, any folder or s3:// prefix of images, an embedded "
            "corpus, or torchvision:NAME."
        ),
    ],
    destination: Annotated[str, typer.Argument(help="Folder or s3:// prefix for the shards.")],
    split: Annotated[
        str,
        typer.Option(
            help="train or test: that part of the source; or a share, such as 0.2: write this much "
            "of each class of a folder to DESTINATION/test, and the rest to DESTINATION/train."
        ),
    ] = "train",
    labels: Annotated[
        str,
        typer.Option(
            help="coarse or fine, of which the embedded emoji have both; folders; or none."
        ),
    ] = "",
    root: Annotated[
        Path | None,
        typer.Option(help="Where torchvision keeps its files."),
    ] = None,
    download: Annotated[bool, typer.Option(help="Let torchvision download.")] = False,
    images_per_shard: Annotated[int, typer.Option(min=1)] = 1000,
    shuffle: Annotated[
        bool, typer.Option(help="In random order; else a folder is packed class after class.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Seed of the order and of a split.", min=0)] = 0,
) -> None:
    """Pack labelled images into WebDataset shards; files with the same bytes only once."""
    from one4all.corpus.packing import open_corpus
    from one4all.corpus.packing import pack as run
    from one4all.storage import open_storage
    from pipelines.pack import is_loose

    if is_loose(source) or labels in ("folders", "none"):
        _pack_loose(source, destination, split, labels, images_per_shard, shuffle, seed)
        return
    granularity = choice("--labels", labels or "coarse", "coarse", "fine")
    test_share = _share(split)
    duplicates: dict[str, str] = {}
    sides: list[Any] = (
        ["train", "test"] if test_share else [choice("--split", split, "train", "test")]
    )
    for side in sides:
        images = open_corpus(
            source,
            split=side,
            labels=granularity,
            root=root,
            download=download,
            test_share=test_share,
            shuffle=shuffle,
            seed=seed,
            on_duplicate=duplicates.__setitem__,
        )
        storage = open_storage(f"{destination.rstrip('/')}/{side}" if test_share else destination)
        storage.check(writable=True)
        num_shards, num_images = run(
            tqdm(images, unit="image", disable=None, leave=False),
            storage,
            prefix=side,
            images_per_shard=images_per_shard,
        )
        show(f"{num_images} images in {num_shards} shards written to {storage.uri}")
    for name, other in islice(duplicates.items(), 1):
        show(f"left out as copies of others: {len(duplicates)}, such as {name} of {other}")


def _pack_loose(
    source: str,
    destination: str,
    split: str,
    labels: str,
    images_per_shard: int,
    shuffle: bool,
    seed: int,
) -> None:
    from pipelines.pack import pack_loose
    from pipelines.settings import RayConfig

    progress = Progress("shard")
    with progress:
        num_shards, num_images = pack_loose(
            source,
            destination,
            prefix=choice("--split", split, "train", "test"),
            labels=choice("--labels", labels or "none", "folders", "none") == "folders",
            shuffle=shuffle,
            seed=seed,
            images_per_shard=images_per_shard,
            ray_config=RayConfig(),
            on_plan=progress.start,
            on_shard=progress.advance,
        )
    show(f"{num_images} images in {num_shards} shards written to {destination}")


def _share(split: str) -> float:
    """A share of images to test on; 0 for the name of a split."""
    try:
        share = float(split)
    except ValueError:
        return 0.0
    if not 0 < share < 1:
        raise typer.BadParameter(f"--split as a share is between 0 and 1, not {split}")
    return share
