"""All of it, small: pack, protect onto S3, verify, attack; one HTML report.

Everything runs on two CPU cores in minutes, from what ships in the package. The photos are
protected twice, as `one4all protect` does it: in the look that it takes if nobody says another, and
in the strongest one. The report shows both beside the clean photos, and says what protected and
what did not, by comparison with the controls, whatever the outcome.
"""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from one4all.corpus.packing import LabelledImage, pack
from one4all.encoders import EncoderConfig
from one4all.encoders.backends import cpu_has_bfloat16
from one4all.errors import One4AllError
from one4all.evaluation.adversaries import AdversaryConfig
from one4all.evaluation.labelled import read_labelled
from one4all.protectors.config import GeneratorConfig
from one4all.report import Section, write_report
from one4all.storage import open_storage
from pipelines.demo.looks import looks_section
from pipelines.demo.material import PHOTOS, Material, embedded_photos
from pipelines.demo.report import (
    DISCREET,
    STRONG,
    ProtectedCorpus,
    learnt_section,
    patterns_section,
    summarise,
    training_section,
    verified_section,
)
from pipelines.evaluation.job import Evaluation, Say, evaluate
from pipelines.evaluation.records import TrialRecord
from pipelines.evaluation.report import fill_table
from pipelines.evaluation.trials import (
    DataConfig,
    EvaluateConfig,
    GridConfig,
    MethodConfig,
    Trial,
    all_trials,
)
from pipelines.local_s3 import local_s3
from pipelines.protect.config import ProtectConfig
from pipelines.protect.job import protect
from pipelines.train.config import TrainConfig
from pipelines.train.job import train
from pipelines.verify import VerifyConfig, verify

BUCKET = "one4all-demo"
SEEDS = (0, 1, 2)  # as many as a verdict needs
_PER_SHARD = 100  # few: all cores have as much to do, also at the end

# By title; the first is what `one4all protect` does by itself.
_LOOKS = {DISCREET: ProtectConfig(), STRONG: ProtectConfig(strength="strong")}
_ORACLE = MethodConfig(
    method="class_oracle", title="class-wise oracle", config={"kind": "codebook"}
)


def demo(folder: Path, material: Material, *, say: Say, with_training: bool = False) -> Path:
    """Run everything and write ``report.html``.

    Args:
        folder: Emptied, then holds corpora, evaluation and report.
        material: What to protect: `embedded_photos`, `drawings`, or `photos`.
        say: Receives a line for each step.
        with_training: Also train a generator on the embedded photos for a few steps, by Ray Train;
            nothing is protected with it.

    Returns:
        Path of the report.

    Raises:
        One4AllError: A step failed, or verification found a broken promise.
    """
    start = time.monotonic()
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)

    def step(text: str) -> None:
        say(f"[{time.monotonic() - start:5.0f} s] {text}")

    with local_s3(BUCKET) as endpoint:
        step(f"packing {material.name}")
        corpora = folder / "corpora" / material.name
        for split in ("train", "test"):
            _pack(material.images(split), corpora / split)
        source = str(corpora / "train")
        # A photo that cannot be read ends it here.
        num_images = len(read_labelled(source, size=material.sizes.get("size", 0)))

        protected = {
            title: _protect(source, title, config, endpoint, step)
            for title, config in _LOOKS.items()
        }
        audits = {title: corpus.audit.to_json() for title, corpus in protected.items()}
        (folder / "verification.json").write_text(json.dumps(audits, indent=1))
        for title, corpus in protected.items():
            if not corpus.audit.ok:
                raise One4AllError(f"verification failed: {title}: {corpus.audit.problems[0]}")
        step("looking at photos, clean and protected")
        uris = {title: corpus.uri for title, corpus in protected.items()}
        looks, seen = looks_section(source, uris, num_images=num_images)
        patterns = patterns_section(protected[DISCREET])
        training = [_train(folder, step)] if with_training else []

        evaluation = _evaluation_config(folder, material, protected)
        results = _attack(evaluation, step)

    step("writing the report")
    report = folder / "report.html"
    table = fill_table(evaluation.grids[0], evaluation, results.records, results.copies)
    learnt = learnt_section(table, evaluation, results.records, seen)
    summary = summarise(table)
    write_report(
        report,
        title="one4all demo",
        summary=summary,
        sections=[looks, learnt, verified_section(protected), *patterns, *training],
    )
    step(summary)
    return report


def _pack(images: Iterable[LabelledImage], folder: Path) -> None:
    pack(images, open_storage(str(folder)), prefix=folder.name, images_per_shard=_PER_SHARD)


def _protect(
    source: str, title: str, config: ProtectConfig, endpoint: str, step: Say
) -> ProtectedCorpus:
    """Protect a corpus onto S3, and verify it."""
    target = f"s3://{BUCKET}/{title}"
    step(f"protecting, {title}: {target} at {endpoint}")
    result = protect(
        source, target, config, on_fit=lambda said, _: step(f"  {said}") if said else None
    )
    step("  verifying it")
    return ProtectedCorpus(target, result, verify(source, target, VerifyConfig()))


def _attack(config: EvaluateConfig, step: Say) -> Evaluation:
    """Train the adversary on every copy."""
    grid, num_trials = config.grids[0], len(all_trials(config))
    step(
        f"training {num_trials} adversaries: {len(grid.methods)} copies of the corpus, "
        f"{len(grid.seeds)} seeds"
    )
    trained = itertools.count(1)

    def on_trial(_trial: Trial, _record: TrialRecord) -> None:
        if (done := next(trained)) % len(grid.seeds) == 0:
            step(f"  {done} of {num_trials} adversaries")

    results = evaluate(config, command="one4all demo", on_trial=on_trial)
    if results.failed:
        raise One4AllError(f"an adversary failed: {results.failed}")
    return results


def _evaluation_config(
    folder: Path, material: Material, protected: Mapping[str, ProtectedCorpus]
) -> EvaluateConfig:
    """One adversary on several copies; what was protected is read from where it is."""
    clean = folder / "corpora" / material.name
    adversary = _adversary()
    grid = GridConfig(
        title="What did the adversary learn?",
        note=(
            f"Adversary: ResNet18 of width {adversary.width}, from scratch, {adversary.epochs} "
            f"epochs, augmentation {adversary.augmentation}, tested on clean images. No "
            "perturbation exceeds 8 levels of 255. The seeds are of the adversary; another draw of "
            "the patterns is another protector. The class-wise oracle uses the true labels and "
            f"is no method: it shows that the bench can see protection. {material.about}"
        ),
        data=(material.name,),
        methods=(
            MethodConfig(method="clean"),
            *(
                MethodConfig(method="corpus", config={"corpus": corpus.uri}, title=title)
                for title, corpus in protected.items()
            ),
            MethodConfig(method="uniform_noise", title="random noise"),
            _ORACLE,
        ),
        adversaries={"resnet18": adversary},
        seeds=SEEDS,
    )
    data = DataConfig(train=str(clean / "train"), test=str(clean / "test"), **material.sizes)
    return EvaluateConfig(
        output=str(folder / "evaluation"), data={material.name: data}, grids=(grid,)
    )


def _adversary() -> AdversaryConfig:
    """For every copy: that of docs/results.md with a coarse stem, which is the default."""
    precision = "bfloat16" if cpu_has_bfloat16() else "float32"  # a third less time
    return AdversaryConfig(epochs=16, augmentation="flip_crop", warm_up=0.3, precision=precision)


def _train(folder: Path, step: Say) -> Section:
    """Train a generator on the embedded photos for a few steps, and say how it went."""
    source = folder / "corpora" / PHOTOS / "train"
    if not source.exists():
        _pack(embedded_photos().images("train"), source)
    config = _training_config(folder, str(source))
    step(f"training a generator: {config.steps} steps, {config.num_workers} Ray Train workers")
    history: list[dict[str, float]] = []
    train(config, command="one4all demo --train", on_metrics=history.append)
    return training_section(folder, config, history)


def _training_config(folder: Path, source: str) -> TrainConfig:
    """A short run: minutes on two CPU cores, enough to see every term of the loss move."""
    return TrainConfig(
        source=source,
        output=str(folder / "protector"),
        run_folder=str(folder / "train"),
        encoder=EncoderConfig(input_size=64),
        generator=GeneratorConfig(width=16, num_blocks=2),
        steps=120,
        batch_size=8,
        learning_rate=1e-3,
        weight_decay=0,
        num_workers=2,
        log_every=5,
        checkpoint_every=40,
    )
