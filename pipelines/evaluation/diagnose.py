"""What the copies of an evaluation are, beside what adversaries make of them.

For each method that the configuration names, on each data set of the first grid: separability and
distances of its perturbations, the encoder's purity, cosines to concepts, distortion, survival of
codecs, and a strip of sample images. Kept below ``diagnoses/`` of the output, like trials.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import numpy as np
import torch
from pydantic import ValidationError

from one4all.concepts import ConceptBank
from one4all.encoders import load_encoder
from one4all.evaluation.diagnostics import diagnose
from one4all.evaluation.labelled import LabelledImages
from one4all.report import Section, plot_curves, sample_grid, to_png
from one4all.storage import open_storage
from pipelines.evaluation.copies import load_copy
from pipelines.evaluation.records import DiagnosisRecord
from pipelines.evaluation.trials import Copy, EvaluateConfig, grid_trials
from pipelines.ray_session import ray_session

VOCABULARY = "imagenet1k"
_DIAGNOSES = "diagnoses/"
_NUM_SAMPLES = 6

_log = logging.getLogger(__name__)


def diagnose_copies(
    config: EvaluateConfig, *, say: Callable[[str], None] = lambda line: None
) -> list[Section]:
    """Diagnose what has no record yet; sections for the report.

    Args:
        config: See ``diagnose`` there.
        say: Receives a line for each copy that is diagnosed.
    """
    copies = {
        trial.copy.key: trial.copy
        for trial in grid_trials(config.grids[0], config)
        if trial.copy.method.name in config.diagnose
    }
    storage = open_storage(config.output)
    found: dict[str, DiagnosisRecord] = {}
    for info in storage.list(_DIAGNOSES):
        key = info.key.removeprefix(_DIAGNOSES).removesuffix(".json")
        if key in copies:
            try:
                found[key] = DiagnosisRecord.model_validate_json(storage.read_bytes(info.key))
            except ValidationError:
                _log.warning("record %s cannot be read and is made again", info.key)
    todo = [copy for key, copy in copies.items() if key not in found]
    if todo:
        import ray

        with ray_session(config.ray):
            task = ray.remote(num_cpus=config.cpus_per_trial)(_diagnose_task)
            waiting = {task.remote(copy, config): copy for copy in todo}
            while waiting:
                ready, _ = ray.wait(list(waiting), num_returns=1)
                copy = waiting.pop(ready[0])
                found[copy.key] = ray.get(ready[0])
                storage.write_bytes(
                    f"{_DIAGNOSES}{copy.key}.json", found[copy.key].model_dump_json().encode()
                )
                say(f"diagnosed: {copy.title}")
    return [
        section
        for data in config.grids[0].data
        for section in _sections(
            data, {c.method.name: found[key] for key, c in copies.items() if c.data == data}
        )
    ]


def _diagnose_task(copy: Copy, config: EvaluateConfig) -> DiagnosisRecord:
    torch.set_num_threads(config.cpus_per_trial)
    clean, protected = load_copy(copy, config)
    encoder = load_encoder(config.encoder)
    bank = ConceptBank.build(VOCABULARY, encoder)
    return DiagnosisRecord(
        diagnosis=diagnose(clean, protected, encoder, bank), picture=_samples(clean, protected)
    )


def _samples(clean: LabelledImages, protected: LabelledImages) -> bytes:
    """Clean, difference times 12, protected, as PNG."""
    chosen = np.linspace(0, len(clean) - 1, _NUM_SAMPLES).astype(int)
    before, after = clean.images_NHWC[chosen], protected.images_NHWC[chosen]
    difference = np.clip(128 + 12 * (after.astype(int) - before), 0, 255).astype(np.uint8)
    columns = (("clean", before), ("difference x 12", difference), ("protected", after))
    return to_png(sample_grid([(title, list(images)) for title, images in columns]))


def _sections(data: str, records: Mapping[str, DiagnosisRecord]) -> list[Section]:
    if not records:
        return []
    found = {name: record.diagnosis for name, record in records.items()}
    header = (
        *("method", "separable", "distance ratio (shuffled)", "PSNR, dB (worst)", "SSIM"),
        *("largest", "own cosine", "opposite cosine", "concept changed"),
    )
    rows = [
        (
            name,
            f"{100 * d.separability.accuracy:.0f} %",
            f"{d.distances.ratio:.2f} ({d.distances.shuffled_ratio:.2f})",
            f"{d.distortion.psnr_db:.1f} ({d.distortion.worst_psnr_db:.1f})",
            f"{d.distortion.ssim:.3f}",
            d.distortion.max_levels,
            f"{d.cosines.own_before:.3f} -> {d.cosines.own_after:.3f}",
            f"{d.cosines.opposite_before:.3f} -> {d.cosines.opposite_after:.3f}",
            f"{100 * d.cosines.changed:.0f} %",
        )
        for name, d in found.items()
    ]
    any_method = next(iter(found.values()))
    codecs = [entry.codec for entry in any_method.survival]
    survival = [
        (name, *(f"{100 * entry.kept:.0f} %" for entry in d.survival)) for name, d in found.items()
    ]
    purity = any_method.purity
    losses = {
        f"{term} {name}": [(entry.k, getattr(entry, term)) for entry in d.losses]
        for name, d in found.items()
        for term in ("l1", "l2")
    }
    return [
        Section(
            f"Perturbations on {data}",
            text=[
                f"{any_method.num_images} images. Separable: held-out accuracy of a linear "
                "probe on the perturbation alone; the largest class has "
                f"{100 * any_method.separability.majority:.0f} %.",
                "Purity of the encoder's clusters, in brackets with shuffled labels: "
                + ", ".join(
                    f"k = {k}: {value:.2f} ({purity.shuffled[k]:.2f})"
                    for k, value in purity.purity.items()
                )
                + f"; linear probe {100 * purity.probe.accuracy:.0f} %.",
            ],
            table=[header, *rows],
            pictures=[
                *((name, record.picture) for name, record in records.items()),
                (
                    "Loss terms of Eq. 4 by the number of similar concepts (paper, Figure 4a)",
                    plot_curves(losses, xlabel="k", ylabel="1 - cosine", title=data),
                ),
            ],
        ),
        Section(
            f"What codecs leave of the perturbation on {data}",
            table=[("method", *codecs), *survival],
        ),
    ]
