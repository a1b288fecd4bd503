"""Verify a protected corpus: audit every shard against its source, on all workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from one4all.audit import UnitAudit, audit_unit
from one4all.corpus import DEFAULT_MAX_SAMPLE_BYTES, Unit, open_source
from one4all.corpus.loose import GROUP_OBJECTS
from one4all.encoders.config import BackendName, backend_of
from one4all.errors import One4AllError, UsageError
from one4all.ledger import (
    Binding,
    Census,
    Ledger,
    Manifest,
    done_manifests,
    read_binding,
    take_census,
)
from one4all.protectors.card import check_protector, locate
from one4all.recompute import recompute_unit
from one4all.storage import open_storage
from one4all.visibility import VisibilitySummary, require_packages
from pipelines.local_machine import share_out
from pipelines.local_pool import LocalPool, Lost
from pipelines.placement import await_room
from pipelines.protect.own_protector import find_own
from pipelines.ray_session import ray_session, uses_ray
from pipelines.settings import JobConfig, RayConfig, RunnerName

if TYPE_CHECKING:
    from one4all.protectors.protector import Protector

MAX_NAMED = 10_000  # shards or files that are not protected
_MAX_DEATHS = 3  # of workers, over one shard


class VerifyConfig(JobConfig):
    """`one4all verify`.

    Attributes:
        runner: Where shards are audited, as for protect.
        num_workers: Tasks at once; 0 means as many as the CPUs allow.
        wave_shards: Shards handed to workers at once.
        max_sample_bytes: Larger samples make a bad shard; what protect was given, if that is more.
        recompute: Share of the shards, 0 to 1, that are protected again and compared: the only way
            to tell a protected image from one that was merely changed. At least one if above 0.
        protector: Name, folder or URI of the protector that the destination is bound to, for
            ``recompute``. Empty: its own, or the shipped one.
        visibility: Whether the visibility of each image is measured, too; takes about four seconds
            a megapixel and the extra `visibility`.
    """

    runner: RunnerName = "auto"
    num_workers: Annotated[int, Field(ge=0)] = 0
    wave_shards: Annotated[int, Field(ge=1)] = 5000
    max_sample_bytes: Annotated[int, Field(ge=1)] = DEFAULT_MAX_SAMPLE_BYTES
    recompute: Annotated[float, Field(ge=0, le=1)] = 0.0
    protector: str = ""
    visibility: bool = False
    ray: RayConfig = RayConfig()


@dataclass
class Verification:
    """The audit of a corpus; ``problems`` empty means every promise holds.

    Shards are what is counted; of loose images, files are.

    Attributes:
        noun: Word for what is counted: "shard" or "file".
        max_levels: Largest |difference| of a decoded image, in levels.
        num_recomputed: Shards that were protected again and compared.
        visibility: Of all images, if it was measured.
    """

    source: str
    destination: str
    output_format: str
    epsilon_levels: int
    noun: str = "shard"
    num_shards: int = 0
    num_samples: int = 0
    num_images: int = 0
    num_sidecars: int = 0
    num_dropped: int = 0
    num_passed_through: int = 0
    num_recomputed: int = 0
    num_within_budget: int = 0
    max_levels: int = 0
    mean_psnr_db: float = 0.0
    min_psnr_db: float = math.inf
    mean_ssim: float = 0.0
    min_ssim: float = math.inf
    visibility: VisibilitySummary | None = None
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
            if image.visibility:
                self.visibility = self.visibility or VisibilitySummary()
                self.visibility.add(image.visibility)
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
        UsageError: The destination was never written by protect, a side cannot be read, or what
            measures visibility is not installed.
    """
    if config.visibility:
        require_packages()
    source, destination = open_source(source_uri), open_storage(destination_uri)
    source.check(writable=False)
    destination.check(writable=False)
    binding = read_binding(destination)
    if binding.source_uri != source.uri:
        raise UsageError(
            f"{destination.uri} was made from {binding.source_uri}, not from {source.uri}; if "
            "that is the same corpus, moved: protect --moved-from OLD says so"
        )
    result = Verification(
        source.uri, destination.uri, binding.output_format, binding.epsilon_levels
    )
    ledger = Ledger(destination)
    recorded: list[tuple[Unit, str]] = []
    census = take_census(
        source,
        ledger,
        container=binding.container,
        on_recorded=lambda unit, entry: recorded.append((unit, entry.key)),
    )
    result.noun, result.num_shards = census.container.noun, census.num_units
    _report_what_is_not_done(result, census, ledger)
    num_tasks, tasks = len(recorded), iter(recorded)
    if not census.container.has_units:
        num_tasks = -(-census.num_done // GROUP_OBJECTS)
        tasks = (
            (unit, manifest.model_dump_json()) for unit, manifest in done_manifests(source, ledger)
        )
    chosen = _choose(num_tasks, config.recompute)
    if chosen:
        own = config.protector or find_own(destination, binding)
        config = config.model_copy(update={"protector": own})
        _refuse_another_protector(config.protector, binding)
    to_audit = (
        AuditTask(unit, manifest, recompute=index in chosen)
        for index, (unit, manifest) in enumerate(tasks)
    )
    on_plan(num_tasks)
    for audit in _audit_all(to_audit, num_tasks, source.uri, destination.uri, binding, config):
        result.num_recomputed += audit.recomputed
        result.add(audit)
        on_audit(audit)
    result.problems.sort()
    result.notes = _notes(result)
    if census.beside:
        result.notes.append(
            f"{len(census.beside)} objects lie beside the outputs that protect did not write, such "
            f"as {census.beside[0]}"
        )
    return result


def _report_what_is_not_done(result: Verification, census: Census, ledger: Ledger) -> None:
    """The problems that can be told without reading any data."""
    if census.num_pending <= MAX_NAMED:
        pending = (part.key for unit in census.pending for part in unit.objects)
        names = pending if not census.container.has_units else (u.name for u in census.pending)
        unreported = [name for name in names if name not in census.damaged]
        problems = [f"{name}: not protected (no manifest)" for name in unreported]
    else:
        first = census.pending[0].name
        problems = [f"{census.num_pending:,} {result.noun}s are not protected, such as {first}"]
    if not census.container.has_units:
        problems += [f"{name}: its output is missing or was replaced" for name in census.damaged]
    reasons = ledger.reasons(census.quarantined)
    problems += [f"{name}: not protected ({reason})" for name, reason in reasons.items()]
    problems += [
        f"{key}: is no {result.noun} of the source" for key in (*census.orphans, *census.strangers)
    ]
    result.problems, result.num_problems = problems, len(problems)


@dataclass(frozen=True)
class AuditTask:
    """One unit to audit.

    Attributes:
        unit: The unit, in the version that was protected.
        manifest: Key of its manifest; or the manifest itself, as JSON.
        recompute: Whether it is protected again, too, and compared.
    """

    unit: Unit
    manifest: str
    recompute: bool = False


def _choose(count: int, share: float) -> set[int]:
    """Evenly chosen indices, a share of ``count`` and at least one, unless the share is 0."""
    wanted = math.ceil(count * share)
    return {index * count // wanted for index in range(wanted)}


def _refuse_another_protector(protector: str, binding: Binding) -> None:
    card = check_protector(protector)
    if card.content_hash != binding.protector_sha256:
        raise UsageError(
            f"protector {protector} is {card.content_hash[:12]}, and the destination is bound to "
            f"{binding.protector} {binding.protector_sha256[:12]}; give that one by --protector: "
            "a name, a folder or an s3:// URI"
        )


def _audit_all(
    tasks: Iterator[AuditTask],
    num_tasks: int,
    source_uri: str,
    destination_uri: str,
    binding: Binding,
    config: VerifyConfig,
) -> Iterator[UnitAudit]:
    if not num_tasks:
        return
    audit = partial(
        audit_one,
        source_uri=source_uri,
        destination_uri=destination_uri,
        binding=binding,
        protector=locate(config.protector) if config.protector else "",
        max_sample_bytes=config.max_sample_bytes,
        measure_visibility=config.visibility,
    )
    audit_all = _audit_by_ray if uses_ray(config.runner, config.ray) else _audit_here
    yield from audit_all(tasks, audit, config)


def _audit_here(
    tasks: Iterator[AuditTask], audit: Callable[[AuditTask], UnitAudit], config: VerifyConfig
) -> Iterator[UnitAudit]:
    shares = share_out(config.num_workers, 1, 0, num_cpus=config.ray.num_cpus)
    environments = [share.environment for share in shares]
    with LocalPool(partial(_start_auditor, audit), environments, max_deaths=_MAX_DEATHS) as pool:
        while wave := list(islice(tasks, config.wave_shards)):
            for task, found in pool.run(wave):
                if isinstance(found, Lost):
                    lost = UnitAudit(task.unit.name)
                    lost.report(f"could not be audited: {found.reason}")
                    found = lost
                yield found


def _start_auditor(audit: Callable[[AuditTask], UnitAudit]) -> Callable[[AuditTask], UnitAudit]:
    return audit


def _audit_by_ray(
    tasks: Iterator[AuditTask], audit: Callable[[AuditTask], UnitAudit], config: VerifyConfig
) -> Iterator[UnitAudit]:
    def audit_batch(batch: dict[str, Any]) -> dict[str, Any]:
        unit, key = Unit.from_json(str(batch["unit"][0])), str(batch["manifest"][0])
        return {"audit": [audit(AuditTask(unit, key, recompute=bool(batch["recompute"][0])))]}

    with ray_session(config.ray):
        import ray
        from ray.data import TaskPoolStrategy

        await_room(config.ray, cpus=1, gpus=0)
        while wave := list(islice(tasks, config.wave_shards)):
            rows = [
                {"unit": t.unit.to_json(), "manifest": t.manifest, "recompute": t.recompute}
                for t in wave
            ]
            dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                audit_batch,
                batch_size=1,
                num_cpus=1,
                compute=TaskPoolStrategy(config.num_workers or None),
            )
            for row in dataset.iter_rows():
                yield row["audit"]


def audit_one(
    task: AuditTask,
    source_uri: str,
    destination_uri: str,
    binding: Binding,
    protector: str,
    *,
    max_sample_bytes: int = DEFAULT_MAX_SAMPLE_BYTES,
    measure_visibility: bool = False,
) -> UnitAudit:
    """Audit one unit that was recorded; never raises for what the unit can cause."""
    unit = task.unit
    source, destination = open_source(source_uri), open_storage(destination_uri)
    try:
        if task.manifest.startswith("{"):
            manifest = Manifest.model_validate_json(task.manifest)
        else:
            manifest = Ledger(destination).manifest(task.manifest)
    except One4AllError as error:
        lost = UnitAudit(unit.name)
        lost.report(str(error))
        return lost
    audit = audit_unit(
        unit,
        manifest,
        source,
        destination,
        binding,
        max_sample_bytes=max_sample_bytes,
        measure_visibility=measure_visibility,
    )
    if task.recompute:
        loaded = _load(protector, backend_of(binding.encoder_precision))
        for problem in recompute_unit(
            unit,
            manifest,
            source,
            destination,
            loaded,
            binding,
            max_sample_bytes=max_sample_bytes,
        ):
            audit.report(problem)
        audit.recomputed = True
    return audit


@lru_cache(maxsize=1)
def _load(protector: str, encoder_backend: BackendName) -> Protector:
    from one4all.protectors.protector import Protector  # only who protects again needs PyTorch

    return Protector.load(protector, encoder_backend=encoder_backend)


def _notes(result: Verification) -> list[str]:
    """What holds but a reader should know."""
    notes = []
    if result.num_recomputed:
        what = "shards" if result.noun == "shard" else f"units of {result.noun}s"
        notes.append(f"{result.num_recomputed} {what} were protected again and compared")
    if result.num_dropped:
        notes.append(f"{result.num_dropped} samples were dropped, as the manifests record")
    if result.num_passed_through:
        notes.append(f"{result.num_passed_through} images left UNPROTECTED, as recorded")
    if result.num_within_budget < result.num_images and result.output_format == "match":
        notes.append(
            f"{result.num_images - result.num_within_budget} images differ by more than "
            f"{result.epsilon_levels} levels once decoded: lossy formats add their error to the "
            "perturbation; output_format lossless keeps the budget exactly"
        )
    return notes
