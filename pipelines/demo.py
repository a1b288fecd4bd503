"""All of it, small: pack, train, protect onto S3, verify, preview, attack; one HTML report.

Everything runs on two CPU cores in minutes, from what ships in the package. The report says what
protected and what did not, by comparison with the controls, whatever the outcome.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import numpy as np

from one4all.adversaries import AdversaryConfig
from one4all.corpora import open_corpus, pack
from one4all.errors import One4AllError
from one4all.images import decode
from one4all.labelled import LabelledImages, read_labelled
from one4all.protector import DEFAULT_PROTECTOR, Protector
from one4all.report import Section, contact_sheet, to_png, write_report
from one4all.storage import open_storage
from pipelines.config import ProtectConfig, RayConfig, TrainConfig, VerifyConfig, load_config
from pipelines.evaluate import evaluate
from pipelines.evaluation_report import Table, fill_table, table_section, verdicts
from pipelines.local_s3 import local_s3
from pipelines.progress import CURVES_FILE
from pipelines.protect import ProtectResult, protect
from pipelines.ray_session import ray_session
from pipelines.train import train
from pipelines.trials import DataConfig, EvaluateConfig, GridConfig, MethodConfig, all_trials
from pipelines.verify import Verification, verify

CORPUS = "emoji-nature"
TRAINING_CORPUS = "emoji-things"
BUCKET = "one4all-demo"
PROTECTED = "protected"
ADVERSARY = AdversaryConfig(epochs=8)
_DEMO_CONFIG = Path(__file__).parent.parent / "configs" / "train" / "demo.yaml"

Say = Callable[[str], None]


def demo(folder: Path, *, say: Say) -> Path:
    """Run everything and write ``report.html``.

    Args:
        folder: Emptied, then holds corpora, training run, protector and report.
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

    with local_s3(BUCKET) as endpoint, ray_session(RayConfig(object_store_bytes=500_000_000)):
        step(f"packing the embedded corpora {TRAINING_CORPUS} and {CORPUS}")
        for name, split in ((TRAINING_CORPUS, "train"), (CORPUS, "train"), (CORPUS, "test")):
            where = open_storage(str(folder / "corpora" / name / split))
            pack(open_corpus(name, split=split), where, prefix=split, images_per_shard=500)  # type: ignore[arg-type]
        source = str(folder / "corpora" / CORPUS / "train")

        config = _training_config(folder)
        step(
            f"training a generator on {TRAINING_CORPUS}: {config.steps} steps, "
            f"{config.num_workers} Ray Train workers"
        )
        history: list[dict[str, float]] = []
        train(config, command="one4all demo", on_metrics=history.append)

        target = f"s3://{BUCKET}/protected"
        step(f"protecting {CORPUS} with the shipped protector: {target} at {endpoint}")
        result = protect(source, target, ProtectConfig())
        step("verifying every shard, sidecar and image against the source")
        audit = verify(source, target, VerifyConfig())
        (folder / "verification.json").write_text(json.dumps(audit.to_json(), indent=1))
        if not audit.ok:
            raise One4AllError(f"verification failed: {audit.problems[0]}")

        clean = read_labelled(source)
        protected = read_labelled(target)
        evaluation = _evaluation_config(folder, source, target)
        num_adversaries = len(all_trials(evaluation))
        step(f"training {num_adversaries} adversaries: 5 copies of the corpus, 3 seeds")
        results = evaluate(evaluation, command="one4all demo")
        if results.failed:
            raise One4AllError(f"an adversary failed: {results.failed}")
        table = fill_table(evaluation.grids[0], evaluation, results.records)

    step("writing the report")
    report = folder / "report.html"
    sections = _sections(folder, config, history, result, audit, table, clean, protected)
    summary = _summary(table)
    write_report(report, title="one4all demo", summary=summary, sections=sections)
    step(summary)
    return report


def _evaluation_config(folder: Path, source: str, target: str) -> EvaluateConfig:
    """One adversary on five copies of the corpus; what was protected is read from where it is."""
    test = str(folder / "corpora" / CORPUS / "test")
    grid = GridConfig(
        title="Does it protect?",
        note=(
            f"Adversary: ResNet18 of width {ADVERSARY.width}, from scratch, {ADVERSARY.epochs} "
            f"epochs, augmentation {ADVERSARY.augmentation}, tested on clean images. Every copy "
            "is within 8 levels of 255. The class-wise oracle uses the true labels and is no "
            "method: it shows that the bench can see protection. These are drawings, of which the "
            "encoder knows little: the hard case. Photographs: RESULTS.md."
        ),
        data=(CORPUS,),
        methods=(
            MethodConfig(method="clean"),
            MethodConfig(method="corpus", corpus=target, title=PROTECTED),
            MethodConfig(method="uniform_noise", title="random noise"),
            MethodConfig(method="untrained_generator", title="untrained generator"),
            MethodConfig(method="class_oracle", title="class-wise oracle"),
        ),
        adversaries={"resnet18": ADVERSARY},
    )
    return EvaluateConfig(
        output=str(folder / "evaluation"),
        data={CORPUS: DataConfig(train=source, test=test)},
        grids=(grid,),
    )


def _summary(table: Table) -> str:
    """The verdict, in a sentence with its figures."""
    column = table.columns[0]
    claims = {
        "protects": "The shipped protector protects this corpus against this adversary",
        "weak effect": "A weak effect, not protection: below every control, but still learnt",
        "no effect": "The shipped protector does NOT protect this corpus against this adversary",
        "inconclusive": "Inconclusive: even the positive control does not protect here",
    }
    return (
        f"{claims[verdicts(table, column)[PROTECTED]]}. Test accuracy in %: "
        f"{', '.join(f'{row} {table.cell(row, column)}' for row in table.rows)}."
    )


def _training_config(folder: Path) -> TrainConfig:
    return load_config(
        TrainConfig,
        _DEMO_CONFIG,
        source=str(folder / "corpora" / TRAINING_CORPUS / "train"),
        output=str(folder / "protector"),
        run_folder=str(folder / "train"),
    )


def _sections(
    folder: Path,
    config: TrainConfig,
    history: list[dict[str, float]],
    result: ProtectResult,
    audit: Verification,
    table: Table,
    clean: LabelledImages,
    protected: LabelledImages,
) -> list[Section]:
    first, last = history[0], history[-1]
    chosen = np.linspace(0, len(clean) - 1, 5).astype(int)
    photos = [decode(path.read_bytes()).pixels for path in _photos()]
    photo_rows = list(
        zip(
            [path.name for path in _photos()],
            photos,
            Protector.load(DEFAULT_PROTECTOR).protect(photos),
            strict=True,
        )
    )
    return [
        table_section(table),
        Section(
            "Protected and verified",
            text=["Re-read from the object store and compared with the source, byte for byte."],
            table=[
                ("what", "figure"),
                ("shards", f"{result.num_done} of {result.num_shards}"),
                ("samples", audit.num_samples),
                ("images", audit.num_images),
                ("sidecars, all byte-identical", audit.num_sidecars),
                (
                    f"images within {audit.epsilon_levels} levels once decoded",
                    f"{audit.num_within_budget} of {audit.num_images}",
                ),
                ("largest difference, levels", audit.max_levels),
                ("PSNR, mean and worst", f"{audit.mean_psnr_db:.1f} / {audit.min_psnr_db:.1f} dB"),
                ("SSIM, mean and worst", f"{audit.mean_ssim:.3f} / {audit.min_ssim:.3f}"),
            ],
        ),
        Section(
            "What it looks like",
            pictures=[
                (
                    f"{CORPUS}",
                    to_png(
                        contact_sheet(
                            [
                                (f"image {i}", clean.images_NHWC[i], protected.images_NHWC[i])
                                for i in chosen
                            ],
                            tile=192,
                        )
                    ),
                ),
                ("Photographs, at their own size", to_png(contact_sheet(photo_rows))),
            ],
        ),
        Section(
            "Training a generator",
            text=[
                f"{config.steps} steps of {config.num_workers} x {config.batch_size} images on "
                f"{TRAINING_CORPUS}, with Ray Train. A short run, to show that it works: the "
                "corpus above is protected with the shipped protector, which needs no training.",
            ],
            table=[
                ("metric", "first step", "last step", "wanted"),
                *(
                    (label, f"{first[key]:.3f}", f"{last[key]:.3f}", wanted)
                    for key, label, wanted in (
                        ("l1", "l1, distance to the opposite concept", "falls"),
                        ("l2", "l2, distance to similar concepts", "rises"),
                        ("cosine_own", "cosine to the own concept", "falls"),
                        ("cosine_opposite", "cosine to the opposite concept", "rises"),
                        ("opposite_entropy", "entropy of chosen opposites", "stays near 1"),
                    )
                ),
            ],
            pictures=[("Loss curves", (folder / "train" / CURVES_FILE).read_bytes())],
        ),
    ]


def _photos() -> list[Path]:
    return sorted(Path(str(files("one4all") / "assets" / "photos")).glob("*.jpg"))
