"""All of it, small: pack, train, fit, protect onto S3, verify, preview, attack; one HTML report.

Everything runs on two CPU cores in minutes, from what ships in the package. That is drawings; given
photos of your own, it shows what happens to these. They are protected twice: by the protector that
ships, and by a codebook that was fitted to them. The report says what protected and what did not,
by comparison with the controls, whatever the outcome.
"""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from one4all.corpus.packing import LabelledImage, Split, open_corpus, pack
from one4all.errors import One4AllError, UsageError
from one4all.evaluation.adversaries import AdversaryConfig
from one4all.evaluation.labelled import LabelledImages, read_labelled
from one4all.images import decode
from one4all.protectors.card import DEFAULT_PROTECTOR
from one4all.protectors.codebook import CodebookConfig
from one4all.protectors.protector import Protector
from one4all.report import Section, contact_sheet, to_png, write_report
from one4all.storage import open_storage
from pipelines.evaluation.job import Record, evaluate
from pipelines.evaluation.report import Table, fill_table, table_section, verdicts
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
from pipelines.protect.job import ProtectResult, protect
from pipelines.ray_session import ray_session
from pipelines.settings import RayConfig, load_config
from pipelines.train.config import TrainConfig
from pipelines.train.job import train
from pipelines.train.progress import CURVES_FILE
from pipelines.verify import Verification, VerifyConfig, verify

DRAWINGS = "emoji-nature"
TRAINING_CORPUS = "emoji-things"
BUCKET = "one4all-demo"
SHIPPED = "shipped protector"
FITTED = "codebook of the corpus"
_DEMO_CONFIG = Path(__file__).parent.parent / "configs" / "train" / "demo.yaml"
_HELD_OUT = 5  # of a folder of photos, every fifth of a class is for the test
_IMAGES_PER_CONCEPT, _MOST_CONCEPTS = 2, 2000  # RESULTS.md, section 6

# Of every copy: the one of RESULTS.md with a coarse stem, which is the default.
_ADVERSARY = AdversaryConfig(epochs=20, augmentation="flip_crop", warm_up=0.3)
_ORACLE = MethodConfig(
    method="class_oracle", title="class-wise oracle", config={"kind": "codebook"}
)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Material:
    """What is protected, and adversaries are trained on.

    Attributes:
        name: Of the corpus, in folders and tables.
        images: Its images by split.
        sizes: Keys of `DataConfig`: at which they are protected and trained on.
        about: What they are to the protector.
    """

    name: str
    images: Callable[[Split], Iterable[LabelledImage]]
    sizes: dict[str, int]
    about: str


@dataclass(frozen=True)
class Copy:
    """A protected copy of the material, in the store: how it was made, what verification found."""

    uri: str
    result: ProtectResult
    audit: Verification


def drawings() -> Material:
    """The embedded corpus of emoji."""
    return Material(
        name=DRAWINGS,
        images=lambda split: open_corpus(DRAWINGS, split=split),
        sizes={},
        about=(
            "These are drawings, of which the encoder knows little: the hard case. Photographs: "
            "RESULTS.md, or yours, by one4all demo --photos."
        ),
    )


def photos(source: str) -> Material:
    """Photos of the user's.

    Args:
        source: A folder of class folders, of which every fifth photo of a class is held out for the
            test; or a torchvision data set, which has splits of its own.

    Raises:
        UsageError: There are no two classes to train and to test on.
    """

    def images(split: Split) -> Iterator[LabelledImage]:
        found = open_corpus(source, split=split)
        return held_out(found, split) if Path(source).is_dir() else found

    labels = (image.label for image in images("test"))
    first = next(labels, None)
    if all(label == first for label in labels):
        raise UsageError(
            f"{source} has fewer than two classes of {_HELD_OUT} photos or more; give a folder "
            "with a sub-folder for each class, better of a hundred photos each"
        )
    return Material(
        name="photos",
        images=images,
        sizes={"size": 64, "protect_size": 224},
        about=(
            "The protected copies are read back from the store, where JPEG has added its own "
            "error; the others are made at 224 pixels. The adversary shrinks every copy to 64."
        ),
    )


def held_out(images: Iterable[LabelledImage], split: Split) -> Iterator[LabelledImage]:
    """One part of images that come without splits: every fifth of a class is for the test."""
    seen: Counter[int] = Counter()
    for image in images:
        seen[image.label] += 1
        if (seen[image.label] % _HELD_OUT == 0) == (split == "test"):
            yield image


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
        _fit(source, codebook, num_images=len(clean))
        copies = {}
        for title, protector in {SHIPPED: DEFAULT_PROTECTOR, FITTED: str(codebook)}.items():
            target = f"s3://{BUCKET}/{title.replace(' ', '-')}"
            step(f"protecting {material.name}, and verifying: {title}, {target} at {endpoint}")
            result = protect(source, target, ProtectConfig(protector=protector))
            copies[title] = Copy(target, result, verify(source, target, VerifyConfig()))
        audits = {title: copy.audit.to_json() for title, copy in copies.items()}
        (folder / "verification.json").write_text(json.dumps(audits, indent=1))
        for title, copy in copies.items():
            if not copy.audit.ok:
                raise One4AllError(f"verification failed: {title}: {copy.audit.problems[0]}")

        protected = read_labelled(copies[SHIPPED].uri, size=size)
        evaluation = _evaluation_config(folder, material, copies)
        grid = evaluation.grids[0]
        num_trials = len(all_trials(evaluation))
        step(
            f"training {num_trials} adversaries: {len(grid.methods)} copies of the corpus, "
            f"{len(grid.seeds)} seeds"
        )
        trained = itertools.count(1)

        def on_trial(_trial: Trial, _record: Record) -> None:
            if (done := next(trained)) % len(grid.seeds) == 0:
                step(f"{done} of {num_trials} adversaries")

        results = evaluate(evaluation, command="one4all demo", on_trial=on_trial)
        if results.failed:
            raise One4AllError(f"an adversary failed: {results.failed}")
        table = fill_table(grid, evaluation, results.records)

    step("writing the report")
    report = folder / "report.html"
    looks = _looks(material.name, clean, protected, (codebook / PICTURE).read_bytes())
    sections = [table_section(table), _verified(copies), looks, _trained(folder, config, history)]
    summary = _summary(table)
    write_report(report, title="one4all demo", summary=summary, sections=sections)
    step(summary)
    return report


def _pack(images: Iterable[LabelledImage], folder: Path) -> None:
    pack(images, open_storage(str(folder)), prefix=folder.name, images_per_shard=500)


def _fit(source: str, output: Path, *, num_images: int) -> None:
    """Fit a codebook to all of a corpus; small ones get fewer concepts."""
    num_concepts = min(max(2, num_images // _IMAGES_PER_CONCEPT), _MOST_CONCEPTS)
    codebook = CodebookConfig(num_concepts=num_concepts)
    config = FitConfig(source=source, output=str(output), codebook=codebook)
    fit(config, command="one4all demo")


def _evaluation_config(
    folder: Path, material: Material, copies: Mapping[str, Copy]
) -> EvaluateConfig:
    """One adversary on several copies; what was protected is read from where it is."""
    corpus = folder / "corpora" / material.name
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
                MethodConfig(method="corpus", corpus=copy.uri, title=title)
                for title, copy in copies.items()
            ),
            MethodConfig(method="uniform_noise", title="random noise"),
            MethodConfig(method="untrained_generator", title="untrained generator"),
            _ORACLE,
        ),
        adversaries={"resnet18": _ADVERSARY},
    )
    data = DataConfig(train=str(corpus / "train"), test=str(corpus / "test"), **material.sizes)
    return EvaluateConfig(
        output=str(folder / "evaluation"), data={material.name: data}, grids=(grid,)
    )


def _summary(table: Table) -> str:
    """The verdict, in a sentence with its figures."""
    column = table.columns[0]
    said = verdicts(table, column)
    claims = {
        "protects": "protects",
        "weak effect": "has a weak effect, which is no protection",
        "no effect": "has NO effect",
    }
    if said[SHIPPED] == "inconclusive":
        verdict = "Inconclusive: even the positive control does not protect here"
    else:
        verdict = "Against this adversary, " + "; ".join(
            f"the {title} {claims[said[title]]}" for title in (SHIPPED, FITTED)
        )
    figures = ", ".join(f"{row} {table.cell(row, column)}" for row in table.rows)
    return f"{verdict}. Test accuracy in %: {figures}."


def _training_config(folder: Path) -> TrainConfig:
    return load_config(
        TrainConfig,
        _DEMO_CONFIG,
        source=str(folder / "corpora" / TRAINING_CORPUS / "train"),
        output=str(folder / "protector"),
        run_folder=str(folder / "train"),
    )


def _verified(copies: Mapping[str, Copy]) -> Section:
    results = [copy.result for copy in copies.values()]
    audits = [copy.audit for copy in copies.values()]
    return Section(
        "Protected and verified",
        text=["Re-read from the object store and compared with the source, byte for byte."],
        table=[
            ("what", *copies),
            ("shards", *(f"{r.num_done} of {r.num_shards}" for r in results)),
            ("samples", *(a.num_samples for a in audits)),
            ("images", *(a.num_images for a in audits)),
            ("sidecars, all byte-identical", *(a.num_sidecars for a in audits)),
            (
                f"images within {audits[0].epsilon_levels} levels once decoded",
                *(f"{a.num_within_budget} of {a.num_images}" for a in audits),
            ),
            ("largest difference, levels", *(a.max_levels for a in audits)),
            (
                "PSNR, mean and worst",
                *(f"{a.mean_psnr_db:.1f} / {a.min_psnr_db:.1f} dB" for a in audits),
            ),
            ("SSIM, mean and worst", *(f"{a.mean_ssim:.3f} / {a.min_ssim:.3f}" for a in audits)),
        ],
    )


def _trained(folder: Path, config: TrainConfig, history: list[dict[str, float]]) -> Section:
    first, last = history[0], history[-1]
    return Section(
        "Training a generator",
        text=[
            f"{config.steps} steps of {config.num_workers} x {config.batch_size} images on "
            f"{TRAINING_CORPUS}, with Ray Train. A short run, to show that it works: nothing above "
            "was protected with it.",
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
    )


def _looks(name: str, clean: LabelledImages, protected: LabelledImages, concepts: bytes) -> Section:
    """Clean and protected, side by side: of the corpus, and the embedded photographs."""
    chosen = np.linspace(0, len(clean) - 1, 5).astype(int)
    rows = [(f"image {i}", clean.images_NHWC[i], protected.images_NHWC[i]) for i in chosen]
    paths = _embedded_photos()
    embedded = [decode(path.read_bytes()).pixels for path in paths]
    embedded_protected = Protector.load(DEFAULT_PROTECTOR).protect(embedded)
    embedded_rows = list(
        zip([path.name for path in paths], embedded, embedded_protected, strict=True)
    )
    return Section(
        "What it looks like",
        pictures=[
            (f"{name}, {SHIPPED}", to_png(contact_sheet(rows, tile=192))),
            (f"Photographs at their own size, {SHIPPED}", to_png(contact_sheet(embedded_rows))),
            (f"{name}, {FITTED}: its largest concepts and their patterns", concepts),
        ],
    )


def _embedded_photos() -> list[Path]:
    return sorted(Path(str(files("one4all") / "assets" / "photos")).glob("*.jpg"))
