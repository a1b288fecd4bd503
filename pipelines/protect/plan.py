"""What protecting a corpus would take: measured on a sample, before anything is paid for.

A few images of a few shards go through the real worker, from and to a temporary folder. What the
whole corpus takes is extrapolated by bytes, and the spread between the sampled shards is shown as
the uncertainty; what was not measured is said.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from one4all.corpus import (
    CONTAINERS,
    ObjectVersion,
    Sample,
    Unit,
    images_of,
    open_source,
    read_samples,
    what_is_read,
    write_unit,
)
from one4all.corpus.sources import read_list
from one4all.errors import NotFoundError, One4AllError, ShardError, UsageError
from one4all.images import Pixels
from one4all.ledger.census import Census, take_census
from one4all.ledger.ledger import Ledger
from one4all.perturbation import Levels
from one4all.protectors.card import DEFAULT_PROTECTOR, load_card, locate
from one4all.protectors.protector import Protector
from one4all.storage import Storage, open_storage
from pipelines.local_machine import share_out
from pipelines.placement import await_room
from pipelines.protect.config import ProtectConfig
from pipelines.protect.job import start_of
from pipelines.protect.worker import ProtectWorker
from pipelines.ray_session import ray_session, uses_ray, worker_layout

_log = logging.getLogger(__name__)
_Item = TypeVar("_Item")

NUM_SHARDS = 4  # sampled, evenly over the sizes
IMAGES_PER_SHARD = 32
MAX_BYTES = 64 << 20  # read of one shard


@dataclass(frozen=True)
class Sampled:
    """What one shard of the sample told.

    Attributes:
        num_bytes: Read from its beginning, whole samples.
        num_images: In these bytes.
        read_seconds: That reading these bytes took.
        num_measured: Images that went through the worker, evenly out of the former.
        seconds: That these took.
        codec_seconds: That they took again, with a device that answers at once.
        cpu_seconds: That they took again, on a GPU node, with CPUs alone; 0 if not measured.
        encoder: What computed embeddings, and how precisely.
    """

    name: str
    num_bytes: int
    num_images: int
    read_seconds: float
    num_measured: int
    seconds: float = 0.0
    codec_seconds: float = 0.0
    cpu_seconds: float = 0.0
    encoder: str = ""

    def all_seconds(self, measured_seconds: float) -> float:
        """Of one worker for all images, if those measured took so long.

        It reads ahead in a thread, so the slower of both counts.
        """
        work = measured_seconds / self.num_measured * self.num_images
        return max(work, self.read_seconds)

    @property
    def seconds_per_byte(self) -> float:
        """Of one worker."""
        return self.all_seconds(self.seconds) / self.num_bytes


@dataclass(frozen=True)
class ProtectEstimate:
    """Time and worker-hours with a number of workers."""

    num_workers: int
    seconds: float
    worker_hours: float


@dataclass(frozen=True)
class Plan:
    """What protecting would take.

    Attributes:
        num_done: Shards that need nothing.
        num_shards, num_bytes: What is to do; of loose images, files are counted.
        noun: Word for what is counted.
        num_units: What is worked on in one piece; None if that is shards.
        num_images: Estimated.
        device: "cpu" or "cuda"; one worker is ``cpus_per_worker`` CPUs and ``gpus_per_worker``.
        images_per_second: Of one worker.
        relative_low, relative_high: Seconds by the fastest and the slowest sampled shard, relative
            to the estimate; None if only one shard could be sampled.
        encoder: What computed embeddings on it, and how precisely.
        limited_by: "reading", "codecs" or "the device": what takes most of the time.
        codec_share: Part of a worker's time that a device that answers at once would leave.
        cpu_images_per_second: Of a worker without a GPU.
        gpu_images_per_second: Of a worker with one; if measured without, no more than this.
    """

    source: str
    num_shards: int
    num_bytes: int
    num_done: int = 0
    noun: str = "shard"
    num_units: int | None = None
    num_images: int = 0
    device: str = "cpu"
    cpus_per_worker: int = 1
    gpus_per_worker: float = 0.0
    images_per_second: float = 0.0
    relative_low: float | None = None
    relative_high: float | None = None
    encoder: str = ""
    limited_by: str = ""
    codec_share: float = 0.0
    cpu_images_per_second: float | None = None
    gpu_images_per_second: float | None = None
    sampled: list[Sampled] = field(default_factory=list)
    estimates: list[ProtectEstimate] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan(
    source_uri: str,
    config: ProtectConfig,
    *,
    destination_uri: str | None = None,
    num_workers: int = 1,
) -> Plan:
    """List a corpus, measure a sample, and extrapolate.

    With a Ray cluster configured, the sample is measured on one of its workers; else here.

    Args:
        source_uri: Corpus.
        config: What protect would be given; ``since`` counts.
        destination_uri: Only what is pending there counts.
        num_workers: Estimated for 1, 4 and this number.

    Raises:
        UsageError: Nothing to read, or no image in the sample.
    """
    source = open_source(source_uri)
    source.check(writable=False)
    config = config.model_copy(update={"protector": locate(config.protector or DEFAULT_PROTECTOR)})
    load_card(config.protector)
    found = _what_to_do(source, destination_uri, config)
    noun, units = found.container.noun, found.pending
    if not units and not found.num_done:
        raise UsageError(f"source {source.uri} holds no {what_is_read()} that counts")
    if not units:
        return Plan(source.uri, 0, 0, found.num_done, noun)
    chosen = choose(units, NUM_SHARDS)
    if uses_ray(config.runner, config.ray):
        sampled, cpus, gpus = _measure_on_cluster(source.uri, chosen, config, len(units))
    else:
        share = share_out(
            0,
            config.cpus_per_worker,
            config.gpus_per_worker,
            num_cpus=config.ray.num_cpus,
            num_tasks=len(units),
        )[0]
        cpus, gpus = share.cpus, share.gpus
        sampled = measure(source.uri, chosen, config, cpus, "cuda" if gpus else "cpu")
    return extrapolate(
        Plan(
            source.uri,
            found.num_pending,
            sum(unit.size for unit in units),
            found.num_done,
            noun,
            len(units),
            device="cuda" if gpus else "cpu",
            cpus_per_worker=cpus,
            gpus_per_worker=gpus,
        ),
        sampled,
        largest=max(unit.size for unit in units),
        workers=sorted({1, 4, num_workers}),
    )


def _what_to_do(source: Storage, destination_uri: str | None, config: ProtectConfig) -> Census:
    """What counts and is not done; of an empty place, if there is no destination."""
    with tempfile.TemporaryDirectory(prefix="one4all-plan-") as nothing:
        destination = open_storage(destination_uri or nothing)
        ledger = Ledger(destination)
        container = config.container
        if not container:
            with suppress(NotFoundError):
                container = ledger.binding().container
        only = frozenset(read_list(config.only, source)) if config.only else None
        return take_census(source, ledger, container=container, since=start_of(config), only=only)


def choose(items: Sequence[_Item], count: int) -> list[_Item]:
    """At most ``count`` of a sequence, evenly over it; the middle one, if it is only one."""
    count = min(count, len(items))
    return [items[(2 * index + 1) * len(items) // (2 * count)] for index in range(count)]


def extrapolate(
    plan: Plan, sampled: Sequence[Sampled], *, largest: int, workers: Sequence[int]
) -> Plan:
    """Complete a plan by what the sample says about all its bytes.

    Args:
        plan: With the bytes to do.
        sampled: At least one shard.
        largest: Bytes of the largest shard, which one worker does alone.
        workers: Numbers of workers to estimate for.
    """
    num_bytes = sum(shard.num_bytes for shard in sampled)
    seconds_per_byte = sum(s.seconds_per_byte * s.num_bytes for s in sampled) / num_bytes
    seconds = seconds_per_byte * plan.num_bytes
    num_images = round(plan.num_bytes * sum(s.num_images for s in sampled) / num_bytes)
    each = [shard.seconds_per_byte / seconds_per_byte for shard in sampled]
    reading = sum(s.read_seconds for s in sampled)
    working = sum(s.seconds / s.num_measured * s.num_images for s in sampled)
    codecs = sum(s.codec_seconds / s.num_measured * s.num_images for s in sampled)
    codec_share = min(1.0, codecs / working)

    def speed(seconds: Callable[[Sampled], float]) -> float | None:
        """Images/s if those measured take so long; None if that was not measured."""
        told = [shard for shard in sampled if seconds(shard)]
        total = sum(shard.all_seconds(seconds(shard)) for shard in told)
        return sum(shard.num_images for shard in told) / total if told else None

    measured, undelayed = speed(lambda s: s.seconds), speed(lambda s: s.codec_seconds)
    on_gpu = plan.device != "cpu"
    estimates = []
    for count in workers:
        at_once = min(count, plan.num_units or plan.num_shards)
        wall = max(seconds / at_once, seconds_per_byte * largest)
        estimates.append(ProtectEstimate(count, wall, count * wall / 3600))
    return replace(
        plan,
        num_images=num_images,
        images_per_second=num_images / seconds,
        relative_low=min(each) if len(each) > 1 else None,
        relative_high=max(each) if len(each) > 1 else None,
        limited_by=(
            "reading" if reading > working else "codecs" if codec_share >= 0.5 else "the device"
        ),
        encoder=sampled[0].encoder,
        codec_share=codec_share,
        cpu_images_per_second=speed(lambda s: s.cpu_seconds) if on_gpu else measured,
        gpu_images_per_second=measured if on_gpu else undelayed,
        sampled=list(sampled),
        estimates=estimates,
    )


def measure(
    source_uri: str, shards: Sequence[Unit], config: ProtectConfig, cpus: int, device: str
) -> list[Sampled]:
    """Send a sample of each shard through a worker that has been warmed up.

    Raises:
        UsageError: No shard of the sample holds an image.
    """
    source = open_source(source_uri)
    with tempfile.TemporaryDirectory(prefix="one4all-plan-") as scratch:
        copied = [_copy_sample(source, shard, Path(scratch) / "in", config) for shard in shards]
        samples = [(head, unit) for head, unit in copied if head.num_measured]
        if not samples:
            raise UsageError(f"no image in the first {MAX_BYTES >> 20} MiB of what was sampled")
        copies = open_storage(str(Path(scratch) / "in"))
        worker = ProtectWorker(
            config,
            copies.uri,
            str(Path(scratch) / "out"),
            "plan",
            protector_sha256=load_card(config.protector).content_hash,
            num_threads=cpus,
            device=device,
        )
        _run(worker, samples[0][1])
        with _rehearsed(worker) as rehearsal:
            found = []
            for head, unit in samples:
                rehearsal.begin()
                seconds = _run(worker, unit)
                rehearsal.repeat()
                again = _run(worker, unit)
                told = replace(head, seconds=seconds, codec_seconds=again, encoder=worker.encoder)
                found.append(told)
            if device != "cpu":
                rehearsal.begin()
                rehearsal.protector.to("cpu")
                alone = _run(worker, samples[0][1])
                found[0] = replace(found[0], cpu_seconds=alone)
        return found


class _Rehearsal:
    """Stands for the protector of a worker: a device that may answer at once.

    Args:
        protector: The real one; each of its answers is kept. Whatever else a worker may ask of its
            protector, it answers itself.
    """

    def __init__(self, protector: Protector) -> None:
        self.protector = protector
        self._answers: list[Levels] = []
        self._repeated: Iterator[Levels] | None = None

    def begin(self) -> None:
        """Forget all answers, and compute those to come."""
        self._answers, self._repeated = [], None

    def repeat(self) -> None:
        """Give the same answers again, in the same order."""
        self._repeated = iter(self._answers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.protector, name)

    def perturb(self, working_NHWC: Pixels, *, batch_size: int) -> Levels:
        """As `Protector.perturb`."""
        if self._repeated is not None:
            return next(self._repeated)
        self._answers.append(self.protector.perturb(working_NHWC, batch_size=batch_size))
        return self._answers[-1]


@contextmanager
def _rehearsed(worker: ProtectWorker) -> Iterator[_Rehearsal]:
    """Put a rehearsal in the place of a worker's protector."""
    real: Any = worker._protector
    rehearsal: Any = _Rehearsal(real)
    worker._protector = rehearsal
    try:
        yield rehearsal
    finally:
        worker._protector = real


def _copy_sample(
    source: Storage, shard: Unit, folder: Path, config: ProtectConfig
) -> tuple[Sampled, Unit]:
    """Write some samples of the beginning of a unit, evenly chosen, and what holds no sample."""
    samples: list[Sample] = []
    num_bytes = 0
    start = time.perf_counter()
    with closing(read_samples(source, shard, config.read_options)) as found:
        try:
            for sample in found:
                samples.append(sample)
                num_bytes += sum(member.stored_bytes for member in sample.members)
                if num_bytes >= MAX_BYTES:
                    break
        except ShardError as error:  # protect will say so; what was whole will do here
            _log.warning("sampling: %s", error)
    read_seconds = time.perf_counter() - start
    with_images = [sample for sample in samples if _num_images(sample, config)]
    chosen = choose(with_images, IMAGES_PER_SHARD)
    wanted = {id(sample) for sample in chosen}
    with write_unit(open_storage(str(folder)), shard) as output:
        for sample in samples:
            # The layout of a table is a member that is no file.
            if id(sample) in wanted or not any(member.is_file for member in sample.members):
                for member in sample.members:
                    output.copy(member)
        written = output.commit()
    parts = tuple(ObjectVersion(o.key, o.size, o.etag) for o in written)
    name = shard.name if CONTAINERS[shard.container].has_units else "sample"
    sampled = Sampled(
        shard.name,
        num_bytes,
        num_images=sum(_num_images(sample, config) for sample in with_images),
        read_seconds=read_seconds,
        num_measured=sum(_num_images(sample, config) for sample in chosen),
    )
    return sampled, Unit(name, parts, shard.container)


def _num_images(sample: Sample, config: ProtectConfig) -> int:
    return len(images_of(sample, config.sidecar_patterns))


def _run(worker: ProtectWorker, shard: Unit) -> float:
    """Seconds that a worker takes for a shard."""
    start = time.perf_counter()
    status = worker.protect(shard)
    if status.outcome != "done":
        raise One4AllError(f"the sample of {shard.name} was not protected: {status.error}")
    return time.perf_counter() - start


def _measure_on_cluster(
    source_uri: str, shards: Sequence[Unit], config: ProtectConfig, num_units: int
) -> tuple[list[Sampled], int, float]:
    """`measure` as a task with the resources of one worker; these are returned too."""
    with ray_session(config.ray):
        import ray
        from ray.exceptions import RayTaskError

        _, cpus, gpus = worker_layout(
            0, config.cpus_per_worker, config.gpus_per_worker, num_tasks=num_units
        )
        await_room(config.ray, cpus=cpus, gpus=gpus)
        task: Any = ray.remote(num_cpus=cpus, num_gpus=gpus)(measure)
        device = "cuda" if gpus else "cpu"
        try:
            sampled = ray.get(task.remote(source_uri, shards, config, cpus, device))
        except RayTaskError as error:
            raise error.cause from None
        return sampled, cpus, gpus
