"""Verify a protected corpus: audit every shard against its source, on all workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import Field

from one4all.audit import UnitAudit, audit_unit
from one4all.corpus import Unit
from one4all.errors import One4AllError, UsageError
from one4all.ledger import Binding, Ledger, read_binding, take_census
from one4all.storage import open_storage
from pipelines.ray_session import ray_session, worker_layout
from pipelines.settings import JobConfig, RayConfig


class VerifyConfig(JobConfig):
    """`one4all verify`.

    Attributes:
        num_workers: Tasks at once; 0 means as many as the CPUs allow.
        wave_shards: Shards handed to Ray at once.
    """

    num_workers: Annotated[int, Field(ge=0)] = 0
    wave_shards: Annotated[int, Field(ge=1)] = 5000
    ray: RayConfig = RayConfig()


@dataclass
class Verification:
    """The audit of a corpus; ``problems`` empty means every promise holds.

    Attributes:
        max_levels: Largest |difference| of a decoded image, in levels.
        budget_exact: Whether the output format promises the budget on decoded pixels.
    """

    source: str
    destination: str
    output_format: str
    epsilon_levels: int
    num_shards: int = 0
    num_samples: int = 0
    num_images: int = 0
    num_sidecars: int = 0
    num_dropped: int = 0
    num_passed_through: int = 0
    num_within_budget: int = 0
    max_levels: int = 0
    mean_psnr_db: float = 0.0
    min_psnr_db: float = math.inf
    mean_ssim: float = 0.0
    min_ssim: float = math.inf
    num_problems: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.num_problems == 0

    def add(self, audit: UnitAudit) -> None:
        """Add one shard; what is kept does not grow with the number of images."""
        self.num_samples += audit.num_samples
        self.num_sidecars += audit.num_sidecars
        self.num_dropped += audit.num_dropped
        self.num_passed_through += audit.num_passed_through
        for image in audit.images:
            self.num_images += 1
            self.num_within_budget += image.max_levels <= self.epsilon_levels
            self.max_levels = max(self.max_levels, image.max_levels)
            self.mean_psnr_db += (image.psnr_db - self.mean_psnr_db) / self.num_images
            self.mean_ssim += (image.ssim - self.mean_ssim) / self.num_images
            self.min_psnr_db = min(self.min_psnr_db, image.psnr_db)
            self.min_ssim = min(self.min_ssim, image.ssim)
        self.num_problems += audit.num_problems
        self.problems += [f"{audit.name}: {problem}" for problem in audit.problems]

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok} | asdict(self)


def verify(
    source_uri: str,
    destination_uri: str,
    config: VerifyConfig,
    *,
    on_plan: Callable[[int], None] = lambda num_shards: None,
    on_audit: Callable[[UnitAudit], None] = lambda audit: None,
) -> Verification:
    """Re-read source and destination and check every promise.

    Args:
        source_uri, destination_uri: As given to protect.
        config: See there.
        on_plan: Called once with the number of shards to audit.
        on_audit: Called with the audit of each shard, which lists every image.

    Raises:
        UsageError: The destination was never written by protect, or a side cannot be read.
    """
    source, destination = open_storage(source_uri), open_storage(destination_uri)
    source.check(writable=False)
    destination.check(writable=False)
    binding = read_binding(destination)
    if binding.source_uri != source.uri:
        raise UsageError(
            f"{destination.uri} was made from {binding.source_uri}, not from {source.uri}"
        )
    result = Verification(
        source.uri, destination.uri, binding.output_format, binding.epsilon_levels
    )
    ledger = Ledger(destination)
    todo: list[tuple[Unit, str]] = []
    census = take_census(
        source, ledger, on_recorded=lambda unit, entry: todo.append((unit, entry.key))
    )
    result.num_shards = census.num_units
    reasons = ledger.reasons(census.quarantined)
    problems = [f"{name}: not protected ({reason})" for name, reason in reasons.items()]
    problems += [
        f"{unit.name}: not protected (no manifest)"
        for unit in census.pending
        if unit.name not in census.damaged
    ]
    problems += [
        f"{key}: is no shard of the source" for key in (*census.orphans, *census.strangers)
    ]
    result.problems, result.num_problems = problems, len(problems)
    on_plan(len(todo))
    for audit in _audit_all(todo, source.uri, destination.uri, binding, config):
        result.add(audit)
        on_audit(audit)
    result.problems.sort()
    result.notes = _notes(result)
    return result


def _audit_all(
    recorded: list[tuple[Unit, str]],
    source_uri: str,
    destination_uri: str,
    binding: Binding,
    config: VerifyConfig,
) -> Iterator[UnitAudit]:
    if not recorded:
        return

    def audit(batch: dict[str, Any]) -> dict[str, Any]:
        unit, key = Unit.from_json(str(batch["unit"][0])), str(batch["manifest"][0])
        return {"audit": [audit_one(unit, key, source_uri, destination_uri, binding)]}

    with ray_session(config.ray):
        import ray
        from ray.data import TaskPoolStrategy

        workers, _, _ = worker_layout(config.num_workers, 1, 0)
        for start in range(0, len(recorded), config.wave_shards):
            wave = recorded[start : start + config.wave_shards]
            rows = [{"unit": unit.to_json(), "manifest": key} for unit, key in wave]
            dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                audit, batch_size=1, num_cpus=1, compute=TaskPoolStrategy(min(workers, len(rows)))
            )
            for row in dataset.iter_rows():
                yield row["audit"]


def audit_one(
    unit: Unit, manifest_key: str, source_uri: str, destination_uri: str, binding: Binding
) -> UnitAudit:
    """Audit one unit that was recorded; never raises for what the unit can cause."""
    source, destination = open_storage(source_uri), open_storage(destination_uri)
    try:
        manifest = Ledger(destination).manifest(manifest_key)
    except One4AllError as error:
        lost = UnitAudit(unit.name)
        lost.report(str(error))
        return lost
    return audit_unit(unit, manifest, source, destination, binding)


def _notes(result: Verification) -> list[str]:
    """What holds but a reader should know."""
    notes = []
    if result.num_dropped:
        notes.append(f"{result.num_dropped} samples were dropped, as the manifests record")
    if result.num_passed_through:
        notes.append(f"{result.num_passed_through} images left UNPROTECTED, as recorded")
    if result.num_within_budget < result.num_images and result.output_format == "match":
        notes.append(
            f"{result.num_images - result.num_within_budget} images differ by more than "
            f"{result.epsilon_levels} levels once decoded: JPEG adds its own error to the "
            "perturbation; output_format lossless keeps the budget exactly"
        )
    return notes
