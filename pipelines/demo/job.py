"""All of it, small: pack, train, fit, protect onto S3, verify, preview, attack; one HTML report.

Everything runs on two CPU cores in minutes, from what ships in the package. That is drawings; given
photos of your own, it shows what happens to these. They are protected twice: by the protector that
ships, which is hardly seen, and by a codebook that was fitted to them, in the strength that is. The
report says what protected and what did not, by comparison with the controls, whatever the outcome.
"""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from one4all.corpus.packing import LabelledImage, open_corpus, pack
from one4all.encoders import EncoderConfig
from one4all.errors import One4AllError
from one4all.evaluation.adversaries import AdversaryConfig
from one4all.evaluation.labelled import read_labelled
from one4all.protectors.card import DEFAULT_PROTECTOR
from one4all.protectors.codebook import CodebookConfig
from one4all.protectors.generator import GeneratorConfig
from one4all.protectors.pattern import STRENGTHS
from one4all.report import write_report
from one4all.storage import open_storage
from pipelines.demo.material import TRAINING_CORPUS, Material
from pipelines.demo.report import (
    FITTED,
    SHIPPED,
    ProtectedCorpus,
    looks_section,
    summarise,
    training_section,
    verified_section,
)
from pipelines.evaluation.job import Say, evaluate
from pipelines.evaluation.records import TrialRecord
from pipelines.evaluation.report import fill_table, table_section
from pipelines.evaluation.trials import (
    DataConfig,
    EvaluateConfig,
    GridConfig,
    MethodConfig,
    Trial,
    all_trials,
)
from pipelines.fit import PICTURE, FitConfig, fit
from pipelines.local_s3 import local_s3
from pipelines.protect.config import ProtectConfig
from pipelines.protect.job import protect
from pipelines.ray_session import ray_session
from pipelines.settings import RayConfig
from pipelines.train.config import TrainConfig
from pipelines.train.job import train
from pipelines.verify import VerifyConfig, verify

BUCKET = "one4all-demo"

# For every copy: that of docs/results.md with a coarse stem, which is the default.
_ADVERSARY = AdversaryConfig(epochs=20, augmentation="flip_crop", warm_up=0.3)
_ORACLE = MethodConfig(
    method="class_oracle", title="class-wise oracle", config={"kind": "codebook"}
)


def demo(folder: Path, material: Material, *, say: Say) -> Path:
    """Run everything and write ``report.html``.

    Args:
        folder: Emptied, then holds corpora, training run, codebook, evaluation and report.
        material: What to protect: `drawings`, or `photos`.
        say: Receives a line for each step.

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

    with local_s3(BUCKET) as endpoint, ray_session(RayConfig(object_store_bytes=2_000_000_000)):
        step(f"packing {TRAINING_CORPUS} and {material.name}")
        corpora = folder / "corpora"
        _pack(open_corpus(TRAINING_CORPUS), corpora / TRAINING_CORPUS / "train")
        for split in ("train", "test"):
            _pack(material.images(split), corpora / material.name / split)
        source = str(corpora / material.name / "train")
        size = material.sizes.get("protect_size", 0)
        clean = read_labelled(source, size=size)  # a photo that cannot be read ends it here

        config = _training_config(folder)
        step(
            f"training a generator on {TRAINING_CORPUS}: {config.steps} steps, "
            f"{config.num_workers} Ray Train workers"
        )
        history: list[dict[str, float]] = []
        train(config, command="one4all demo", on_metrics=history.append)

        step(f"fitting a codebook to {material.name}: no labels, no training")
        codebook = folder / "codebook"
        _fit(source, codebook)
        protected = {}
        for title, protector in {SHIPPED: DEFAULT_PROTECTOR, FITTED: str(codebook)}.items():
            target = f"s3://{BUCKET}/{title.replace(' ', '-')}"
            step(f"protecting {material.name}, and verifying: {title}, {target} at {endpoint}")
            result = protect(source, target, ProtectConfig(protector=protector))
            audit = verify(source, target, VerifyConfig())
            protected[title] = ProtectedCorpus(target, result, audit)
        audits = {title: corpus.audit.to_json() for title, corpus in protected.items()}
        (folder / "verification.json").write_text(json.dumps(audits, indent=1))
        for title, corpus in protected.items():
            if not corpus.audit.ok:
                raise One4AllError(f"verification failed: {title}: {corpus.audit.problems[0]}")

        shipped = read_labelled(protected[SHIPPED].uri, size=size)
        evaluation = _evaluation_config(folder, material, protected)
        grid = evaluation.grids[0]
        num_trials = len(all_trials(evaluation))
        step(
            f"training {num_trials} adversaries: {len(grid.methods)} copies of the corpus, "
            f"{len(grid.seeds)} seeds"
        )
        trained = itertools.count(1)

        def on_trial(_trial: Trial, _record: TrialRecord) -> None:
            if (done := next(trained)) % len(grid.seeds) == 0:
                step(f"{done} of {num_trials} adversaries")

        results = evaluate(evaluation, command="one4all demo", on_trial=on_trial)
        if results.failed:
            raise One4AllError(f"an adversary failed: {results.failed}")
        table = fill_table(grid, evaluation, results.records, results.copies)

    step("writing the report")
    report = folder / "report.html"
    sections = [
        table_section(table),
        verified_section(protected),
        looks_section(material.name, clean, shipped, (codebook / PICTURE).read_bytes()),
        training_section(folder, config, history),
    ]
    summary = summarise(table)
    write_report(report, title="one4all demo", summary=summary, sections=sections)
    step(summary)
    return report


def _pack(images: Iterable[LabelledImage], folder: Path) -> None:
    pack(images, open_storage(str(folder)), prefix=folder.name, images_per_shard=500)


def _fit(source: str, output: Path) -> None:
    """Fit a codebook to all of a corpus, in the look that protects most and shows most."""
    codebook = CodebookConfig(pattern=STRENGTHS["strong"])
    config = FitConfig(source=source, output=str(output), codebook=codebook)
    fit(config, command="one4all demo")


def _evaluation_config(
    folder: Path, material: Material, protected: Mapping[str, ProtectedCorpus]
) -> EvaluateConfig:
    """One adversary on several copies; what was protected is read from where it is."""
    clean = folder / "corpora" / material.name
    grid = GridConfig(
        title="Does it protect?",
        note=(
            f"Adversary: ResNet18 of width {_ADVERSARY.width}, from scratch, {_ADVERSARY.epochs} "
            f"epochs, augmentation {_ADVERSARY.augmentation}, tested on clean images. No "
            "perturbation exceeds 8 levels of 255. The class-wise oracle uses the true labels and "
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
            MethodConfig(method="untrained_generator", title="untrained generator"),
            _ORACLE,
        ),
        adversaries={"resnet18": _ADVERSARY},
    )
    data = DataConfig(train=str(clean / "train"), test=str(clean / "test"), **material.sizes)
    return EvaluateConfig(
        output=str(folder / "evaluation"), data={material.name: data}, grids=(grid,)
    )


def _training_config(folder: Path) -> TrainConfig:
    """A short run: minutes on two CPU cores, enough to see every term of the loss move."""
    return TrainConfig(
        source=str(folder / "corpora" / TRAINING_CORPUS / "train"),
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
