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
from typing import Any

import numpy as np
import torch

from one4all.adversaries import AdversaryConfig, AdversaryResult, train_adversary
from one4all.baselines.controls import class_patterns, uniform_noise
from one4all.corpora import open_corpus, pack
from one4all.errors import One4AllError
from one4all.generator import Generator
from one4all.images import decode
from one4all.labelled import LabelledImages, read_labelled
from one4all.perturbation import apply_perturbation
from one4all.protector import DEFAULT_PROTECTOR, Protector, load_card
from one4all.report import (
    Section,
    contact_sheet,
    plot_accuracies,
    to_png,
    write_report,
)
from one4all.storage import open_storage
from pipelines.config import ProtectConfig, RayConfig, TrainConfig, VerifyConfig, load_config
from pipelines.local_s3 import local_s3
from pipelines.progress import CURVES_FILE
from pipelines.protect import ProtectResult, protect
from pipelines.ray_session import ray_session
from pipelines.train import train
from pipelines.verify import Verification, verify

CORPUS = "emoji-nature"
TRAINING_CORPUS = "emoji-things"
BUCKET = "one4all-demo"
SEEDS = (0, 1, 2)
ADVERSARY = AdversaryConfig(epochs=8)
_PROTECTS_BELOW = 0.6  # of clean accuracy
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

    with local_s3(BUCKET) as endpoint, ray_session(RayConfig()):
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

        clean, test = (
            read_labelled(str(folder / "corpora" / CORPUS / split)) for split in ("train", "test")
        )
        protected = read_labelled(target)
        step(f"training {5 * len(SEEDS)} adversaries: 5 copies of the corpus, {len(SEEDS)} seeds")
        results = _attack(_copies(clean, protected), test)

    step("writing the report")
    report = folder / "report.html"
    sections = _sections(folder, config, history, result, audit, results, clean, protected, test)
    summary = verdict({name: [r.last for r in runs] for name, runs in results.items()})
    write_report(report, title="one4all demo", summary=summary, sections=sections)
    step(summary)
    return report


def verdict(accuracies: dict[str, list[float]]) -> str:
    """What the accuracies are evidence of, in a sentence or two.

    Protection is claimed only if the positive control shows that the bench can see it, and the
    protected copy is far below clean and below every control.

    Args:
        accuracies: Per copy, one test accuracy (0..1) for each seed. Needs "clean", "protected",
            "class-wise oracle"; every other name is a negative control.
    """
    means = {name: float(np.mean(values)) for name, values in accuracies.items()}
    clean, protected, oracle = means["clean"], means["protected"], means["class-wise oracle"]
    controls = {n: m for n, m in means.items() if n not in ("protected", "class-wise oracle")}
    spread = max(float(np.std(accuracies[n], ddof=1)) for n in (*controls, "protected"))
    margin = min(controls.values()) - protected
    figures = (
        f"test accuracy {100 * clean:.1f} % trained on clean images, {100 * protected:.1f} % on "
        f"protected ones, {100 * oracle:.1f} % with the class-wise oracle"
    )
    if oracle > _PROTECTS_BELOW * clean:
        return f"Inconclusive: even the positive control does not protect here ({figures})."
    if margin > 2 * spread and protected <= _PROTECTS_BELOW * clean:
        return f"The shipped protector protects this corpus against this adversary: {figures}."
    if margin > 2 * spread:
        return (
            f"A weak effect, not protection: {figures}; the protected copy is below every control "
            "by more than twice the spread between seeds, but an adversary still learns."
        )
    return (
        f"The shipped protector does NOT protect this corpus against this adversary: {figures}. "
        "The difference to the controls is within the noise. The bench can see protection, as the "
        "oracle shows."
    )


def _training_config(folder: Path) -> TrainConfig:
    return load_config(
        TrainConfig,
        _DEMO_CONFIG,
        source=str(folder / "corpora" / TRAINING_CORPUS / "train"),
        output=str(folder / "protector"),
        run_folder=str(folder / "train"),
    )


def _copies(clean: LabelledImages, protected: LabelledImages) -> dict[str, Any]:
    """The copies that adversaries train on, as Ray references; all within the same budget."""
    import ray

    card = load_card(DEFAULT_PROTECTOR)
    epsilon, size, labels = card.epsilon_levels, clean.size, clean.labels_N
    patterns = class_patterns(clean.num_classes, size, epsilon_levels=epsilon, seed=0)
    noise = [
        apply_perturbation(
            image, uniform_noise(size, epsilon_levels=epsilon, seed=i), epsilon_levels=epsilon
        )
        for i, image in enumerate(clean.images_NHWC)
    ]
    oracle = [
        apply_perturbation(image, patterns[label], epsilon_levels=epsilon)
        for image, label in zip(clean.images_NHWC, labels, strict=True)
    ]
    copy = ray.put(clean)
    return {
        "clean": copy,
        "protected": ray.put(protected),
        "random noise": ray.put(LabelledImages(np.stack(noise), labels)),
        "untrained generator": ray.remote(num_cpus=1)(_protect_untrained).remote(copy),
        "class-wise oracle": ray.put(LabelledImages(np.stack(oracle), labels)),
    }


def _protect_untrained(clean: LabelledImages) -> LabelledImages:
    """The shipped protector with its generator's weights drawn anew."""
    protector = Protector.load(DEFAULT_PROTECTOR)
    torch.manual_seed(0)
    generator = Generator(protector.card.generator, protector.encoder.embedding_dim)
    untrained = Protector(protector.card, protector.encoder, generator)
    return LabelledImages(np.stack(untrained.protect(list(clean.images_NHWC))), clean.labels_N)


def _attack(copies: dict[str, Any], test: LabelledImages) -> dict[str, list[AdversaryResult]]:
    """Train one adversary for each copy and seed, as Ray tasks."""
    import ray

    def attack(copy: LabelledImages, seed: int) -> AdversaryResult:
        torch.set_num_threads(1)
        return train_adversary(copy, test, ADVERSARY, seed=seed)

    task = ray.remote(num_cpus=1)(attack)
    runs = {name: [task.remote(copy, seed) for seed in SEEDS] for name, copy in copies.items()}
    return {name: ray.get(pending) for name, pending in runs.items()}


def _sections(
    folder: Path,
    config: TrainConfig,
    history: list[dict[str, float]],
    result: ProtectResult,
    audit: Verification,
    results: dict[str, list[AdversaryResult]],
    clean: LabelledImages,
    protected: LabelledImages,
    test: LabelledImages,
) -> list[Section]:
    first, last = history[0], history[-1]
    chance = float(np.bincount(test.labels_N).max() / len(test))
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
        Section(
            "Does it protect?",
            text=[
                f"Adversary: ResNet18 of width {ADVERSARY.width}, from scratch, {ADVERSARY.epochs} "
                f"epochs, augmentation {ADVERSARY.augmentation}, {len(SEEDS)} seeds, trained on a "
                f"copy of {CORPUS} ({len(clean)} images, {test.num_classes} "
                f"classes), tested on {len(test)} clean images. Every copy is within "
                f"{audit.epsilon_levels} levels of 255. The class-wise oracle uses the true labels "
                "and is no method: it shows that the bench can see protection.",
            ],
            table=[
                ("trained on", "mean, %", "spread between seeds", "best epoch, %"),
                *(
                    (
                        name,
                        f"{100 * np.mean([r.last for r in runs]):.1f}",
                        f"{100 * np.std([r.last for r in runs], ddof=1):.1f}",
                        f"{100 * np.mean([r.peak for r in runs]):.1f}",
                    )
                    for name, runs in results.items()
                ),
            ],
            pictures=[
                (
                    "Accuracy of adversaries, by the copy they were trained on",
                    plot_accuracies(
                        {name: [r.last for r in runs] for name, runs in results.items()},
                        chance=chance,
                        title=f"{CORPUS}, no augmentation",
                    ),
                )
            ],
        ),
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
                "corpus above is protected with the shipped protector, which trained for longer.",
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
