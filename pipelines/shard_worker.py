"""What one worker does with one shard: read, decode, perturb, encode, write, commit.

    source -> strict tar reader -> decode -> device -> encode -> ordered tar writer -> sink

One worker is one process with the protector loaded once. Batches of samples move through the
stages in order, at most three at a time, each bounded in images and in pixels, so memory does not
grow with the shard. What a batch holds depends on the shard alone, never on timing: the same shard
makes the same bytes.
"""

from __future__ import annotations

import logging
import resource
import time
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from one4all.errors import (
    BadImageError,
    One4AllError,
    PerturbationError,
    ProtectorError,
    ShardError,
    SourceChangedError,
    StorageError,
    UsageError,
)
from one4all.images import (
    DecodedImage,
    Pixels,
    decode,
    encode,
    extension_for,
    peek_num_pixels,
    working_copy,
)
from one4all.ledger import MAX_ATTEMPTS, BadImage, Distances, Ledger, Manifest, SourceShard
from one4all.metrics import max_difference, psnr_db
from one4all.perturbation import Levels, apply_perturbation
from one4all.protector import Protector, fill_batch
from one4all.shards import (
    Member,
    Sample,
    ShardWriter,
    is_protectable,
    printable,
    read_samples,
)
from one4all.storage import Storage, open_storage
from pipelines import metrics
from pipelines.config import ProtectConfig

_log = logging.getLogger(__name__)
STAGES = ("read", "decode", "device", "encode", "write")
_LOOKAHEAD = 1  # batches waiting between two stages


class BadImagePolicyError(ShardError):
    """A bad image under the policy "fail"; trying again cannot help."""


@dataclass(frozen=True)
class _Protected:
    """One image, ready to be written."""

    name: str
    payload: bytes
    converted: str
    max_before_encoding: int
    max_decoded: int
    psnr_db: float


@dataclass
class _Batch:
    """Samples on their way through the stages; futures are keyed by member name."""

    samples: list[Sample]
    decoded: dict[str, Future[tuple[DecodedImage, Pixels]]] = field(default_factory=dict)
    protected: dict[str, Future[_Protected]] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)


class ShardWorker:
    """Protects one shard at a time. A Ray Data actor, and a plain object in tests.

    Args:
        config: The run's configuration.
        source_uri, destination_uri: Corpora.
        run_id: Names this run in manifests and attempts.
        protector_sha256: Content hash of the protector that the destination is bound to.
        num_threads: Threads for codecs, and for the device when that is the CPU.
        device: "cpu" or "cuda".
        max_starts: Workers of this run that may be loading, or have died of it, before this one
            gives up; it then answers every shard with "failed".

    Raises:
        ProtectorError: The protector found here is not the one that the destination is bound to.
    """

    def __init__(
        self,
        config: ProtectConfig,
        source_uri: str,
        destination_uri: str,
        run_id: str,
        *,
        protector_sha256: str,
        num_threads: int,
        device: str = "cpu",
        max_starts: int = 1,
    ) -> None:
        torch.set_num_threads(num_threads)
        self._config = config
        self._run_id = run_id
        self._source = open_storage(source_uri)
        self._destination = open_storage(destination_uri)
        self._ledger = Ledger(self._destination)
        self._pool = ThreadPoolExecutor(num_threads, "codec")
        self._protector: Protector | None = None
        worker = uuid.uuid4().hex
        if self._ledger.begin_start(run_id, worker) <= max_starts:
            self._protector = _load(config.protector, protector_sha256).to(device)
            self._ledger.end_start(run_id, worker)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Protect the one shard of a Ray Data batch; never raises for what a shard can cause.

        Args:
            batch: Columns ``name``, ``size``, ``etag``, one row each.

        Returns:
            One status row: ``name``, ``status`` (done, failed, refused or quarantined),
            ``num_images``, ``num_bad``, ``num_bytes``, ``num_bytes_written``, seconds of each stage
            (``read_seconds``, ...), ``peak_bytes`` of this process, ``error``.
        """
        shard = SourceShard.from_columns(batch)
        row = self.protect(shard) | {"peak_bytes": _peak_bytes()}
        return {key: [value] for key, value in row.items()}

    def protect(self, shard: SourceShard) -> dict[str, Any]:
        """Attempt one shard; the outcome as a status row."""
        row: dict[str, Any] = {
            "name": shard.name,
            "status": "done",
            "num_images": 0,
            "num_bad": 0,
            "num_bytes": shard.size,
            "num_bytes_written": 0,
            **{f"{stage}_seconds": 0.0 for stage in STAGES},
            "peak_bytes": 0,
            "error": "",
        }
        row |= self._attempt(shard)
        metrics.count("one4all_shards", status=row["status"])
        return row

    def _attempt(self, shard: SourceShard) -> dict[str, Any]:
        """What an attempt changes in the status row."""
        number = 0
        if self._protector is None:
            return {"status": "failed", "error": "workers die while they load the protector"}
        try:
            attempt = self._ledger.begin_attempt(shard, self._run_id)
            if attempt > MAX_ATTEMPTS:
                return {"status": "quarantined", "error": "quarantined after 3 attempts"}
            number = attempt
            manifest = protect_shard(
                shard,
                self._source,
                self._destination,
                self._protector,
                self._config,
                pool=self._pool,
                run_id=self._run_id,
            )
            self._ledger.record(manifest)
            return self._tell(manifest)
        except Exception as error:  # one shard must not end the run, whatever is wrong with it
            reason = printable(f"{error}" or type(error).__name__)
            if not isinstance(error, One4AllError):
                reason = f"{type(error).__name__}: {reason}"
            if number:
                self._close_attempt(shard, number, error, reason)
            status = "refused" if isinstance(error, BadImagePolicyError) else "failed"
            metrics.count("one4all_failures", kind=type(error).__name__)
            return {"status": status, "error": reason}

    def _tell(self, manifest: Manifest) -> dict[str, Any]:
        """A shard that is done: its metrics, and its part of the status row."""
        metrics.count("one4all_images", manifest.num_protected)
        metrics.count("one4all_bad_images", len(manifest.bad_images))
        metrics.count("one4all_bytes_read", manifest.source.size)
        metrics.count("one4all_bytes_written", manifest.output_size)
        for stage, seconds in manifest.seconds.items():
            metrics.observe("one4all_stage_seconds", seconds, stage=stage)
        return {
            "num_images": manifest.num_images,
            "num_bad": len(manifest.bad_images),
            "num_bytes_written": manifest.output_size,
            **{f"{stage}_seconds": manifest.seconds.get(stage, 0.0) for stage in STAGES},
        }

    def _close_attempt(
        self, shard: SourceShard, number: int, error: Exception, reason: str
    ) -> None:
        """Count the attempt against the shard, unless the fault lies elsewhere.

        An outage of a store, expired credentials, a full disk or the policy "fail" must not end in
        quarantine: the same shard may be fine tomorrow.
        """
        elsewhere = (
            StorageError,
            UsageError,
            SourceChangedError,
            BadImagePolicyError,
            PerturbationError,
            OSError,
        )
        try:
            if isinstance(error, elsewhere):
                self._ledger.withdraw_attempt(shard, number, self._run_id)
            else:
                self._ledger.fail_attempt(shard, number, self._run_id, reason)
        except (One4AllError, OSError) as problem:
            _log.warning("recording a failed attempt at %s: %s", shard.name, problem)


def _load(protector: str, sha256: str) -> Protector:
    """The protector that the destination is bound to, whatever lies on this node."""
    loaded = Protector.load(protector)
    if loaded.card.content_hash != sha256:
        raise ProtectorError(
            f"protector {protector} changed, or another copy of it lies on this node: "
            f"{loaded.card.content_hash[:12]} instead of {sha256[:12]}"
        )
    return loaded


def _peak_bytes() -> int:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def protect_shard(
    shard: SourceShard,
    source: Storage,
    destination: Storage,
    protector: Protector,
    config: ProtectConfig,
    *,
    pool: ThreadPoolExecutor,
    run_id: str = "",
) -> Manifest:
    """Write the protected copy of one shard and return its manifest, not yet recorded.

    Nothing is visible at the destination until the whole shard is written.

    Raises:
        ShardError: The shard is damaged or changed, or a bad image meets the policy "fail".
        StorageError: A store failed in spite of retries.
    """
    rewrite = _ShardRewrite(protector, config, pool)
    reader = source.open(shard.name, etag=shard.etag)
    with closing(reader), destination.writer(shard.name) as sink:
        output = ShardWriter(sink)
        rewrite.run(read_samples(reader, max_sample_bytes=config.max_sample_bytes), output)
        output.close()
        with rewrite.timer("write"):
            output_etag = sink.commit()
    return rewrite.manifest(
        shard,
        output_etag=output_etag,
        output_size=sink.num_bytes,
        output_sha256=sink.sha256.hexdigest(),
        run_id=run_id,
    )


class _ShardRewrite:
    """The stages of one shard, and the tally that its manifest is made of."""

    def __init__(
        self, protector: Protector, config: ProtectConfig, pool: ThreadPoolExecutor
    ) -> None:
        self._protector = protector
        self._config = config
        self._pool = pool
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._counts: Counter[str] = Counter()
        self._converted: Counter[str] = Counter()
        self._bad: list[BadImage] = []
        self._max_before_encoding = 0
        self._max_decoded = 0
        self._psnr_sum = 0.0

    def run(self, samples: Iterator[Sample], output: ShardWriter) -> None:
        """Move all samples through the stages, in order."""
        decoding: deque[_Batch] = deque()
        encoding: deque[_Batch] = deque()
        for batch in self._ahead(self._batches(samples)):
            self._start_decoding(batch)
            decoding.append(batch)
            if len(decoding) > _LOOKAHEAD:
                encoding.append(self._perturb(decoding.popleft()))
            if len(encoding) > _LOOKAHEAD:
                self._write(encoding.popleft(), output)
        while decoding:
            encoding.append(self._perturb(decoding.popleft()))
        while encoding:
            self._write(encoding.popleft(), output)

    def manifest(
        self,
        shard: SourceShard,
        *,
        output_etag: str,
        output_size: int,
        output_sha256: str,
        run_id: str,
    ) -> Manifest:
        num_protected = self._counts["protected"]
        return Manifest(
            source=shard,
            output_etag=output_etag,
            output_size=output_size,
            output_sha256=output_sha256,
            num_samples=self._counts["samples"],
            num_images=self._counts["images"],
            num_protected=num_protected,
            num_members=self._counts["members"],
            bad_images=tuple(self._bad),
            converted=dict(sorted(self._converted.items())),
            distances=Distances(
                max_before_encoding=self._max_before_encoding,
                max_decoded=self._max_decoded,
                mean_psnr_db=round(self._psnr_sum / num_protected, 3) if num_protected else 0.0,
            ),
            seconds={stage: round(value, 3) for stage, value in sorted(self._seconds.items())},
            run_id=run_id,
        )

    @contextmanager
    def timer(self, stage: str) -> Iterator[None]:
        """Add the time of the block, in seconds, to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] += time.perf_counter() - start

    def _batches(self, samples: Iterator[Sample]) -> Iterator[_Batch]:
        """Group whole samples until the next one would be too many images or pixels."""
        group: list[Sample] = []
        images = pixels = num_bytes = 0
        for sample in samples:
            payloads = [
                m.payload
                for m in sample.members
                if is_protectable(m, self._config.sidecar_patterns)
            ]
            more = sum(peek_num_pixels(payload) for payload in payloads)
            if group and (
                images + len(payloads) > self._config.batch_size
                or pixels + more > self._config.batch_pixels
                or num_bytes + sample.num_bytes > 4 * self._config.batch_pixels
            ):
                yield _Batch(group)
                group, images, pixels, num_bytes = [], 0, 0, 0
            group.append(sample)
            images, pixels = images + len(payloads), pixels + more
            num_bytes += sample.num_bytes
        if group:
            yield _Batch(group)

    def _ahead(self, batches: Iterator[_Batch]) -> Iterator[_Batch]:
        """Read the next batch in a thread of its own while this one is worked on."""
        with ThreadPoolExecutor(1, "reader") as reader:
            upcoming: Future[_Batch | None] = reader.submit(next, batches, None)
            while True:
                with self.timer("read"):
                    batch = upcoming.result()
                if batch is None:
                    return
                upcoming = reader.submit(next, batches, None)
                yield batch

    def _start_decoding(self, batch: _Batch) -> None:
        for sample in batch.samples:
            for member in sample.members:
                if is_protectable(member, self._config.sidecar_patterns):
                    batch.decoded[member.name] = self._pool.submit(self._decode, member)

    def _decode(self, member: Member) -> tuple[DecodedImage, Pixels]:
        image = decode(member.payload, max_pixels=self._config.max_image_pixels)
        return image, working_copy(image.pixels, self._protector.card.working_size)

    def _perturb(self, batch: _Batch) -> _Batch:
        """Wait for the pixels, run the device, start encoding."""
        images: dict[str, tuple[DecodedImage, Pixels]] = {}
        with self.timer("decode"):
            for name, future in batch.decoded.items():
                try:
                    images[name] = future.result()
                except BadImageError as error:
                    batch.bad[name] = str(error)
        batch.decoded.clear()
        names = list(images)
        size = self._config.batch_size
        for start in range(0, len(names), size):
            chosen = names[start : start + size]
            before = self._seconds["device"]
            with self.timer("device"):
                # Always a full batch: one shape, and results that do not depend on neighbours.
                working = fill_batch([images[name][1] for name in chosen], size)
                deltas = self._protector.perturb(working)
            metrics.observe("one4all_batch_seconds", self._seconds["device"] - before)
            for name, delta in zip(chosen, deltas, strict=False):
                batch.protected[name] = self._pool.submit(
                    self._encode, name, images[name][0], delta
                )
        return batch

    def _encode(self, name: str, clean: DecodedImage, delta: Levels) -> _Protected:
        """Add the perturbation, encode, and measure what a reader will decode."""
        epsilon = self._protector.card.epsilon_levels
        pixels = apply_perturbation(clean.pixels, delta, epsilon_levels=epsilon)
        payload = encode(replace(clean, pixels=pixels), self._config.output_format)
        seen = decode(payload, max_pixels=self._config.max_image_pixels).pixels
        if seen.shape != clean.pixels.shape:
            raise BadImageError(f"cannot be written back: {clean.pixels.shape} became {seen.shape}")
        if np.array_equal(clean.pixels, pixels):
            raise BadImageError("the perturbation changes no pixel of it")
        result = _Protected(
            name=extension_for(name, clean, self._config.output_format),
            payload=payload,
            converted=clean.converted,
            max_before_encoding=max_difference(clean.pixels, pixels),
            max_decoded=max_difference(clean.pixels, seen),
            psnr_db=psnr_db(clean.pixels, seen),
        )
        lossless = self._config.output_format == "lossless" or clean.format != "JPEG"
        if result.max_before_encoding > epsilon or (lossless and result.max_decoded > epsilon):
            raise ShardError(
                f"{name}: differs by {result.max_decoded} levels after decoding, over the budget "
                f"of {epsilon}; this is a defect of the program, the shard is not published"
            )
        return result

    def _write(self, batch: _Batch, output: ShardWriter) -> None:
        """Wait for the encoded images and write the samples, in the order of the source."""
        protected: dict[str, _Protected] = {}
        with self.timer("encode"):
            for name, future in batch.protected.items():
                try:
                    protected[name] = future.result()
                except BadImageError as error:
                    batch.bad[name] = str(error)
        with self.timer("write"):
            for sample in batch.samples:
                self._write_sample(sample, protected, batch.bad, output)

    def _write_sample(
        self,
        sample: Sample,
        protected: dict[str, _Protected],
        bad: dict[str, str],
        output: ShardWriter,
    ) -> None:
        self._counts["samples"] += any(member.is_file for member in sample.members)
        # A link may share its name with a file: only files are ever replaced.
        files = [member.name for member in sample.members if member.is_file]
        self._counts["images"] += sum(name in protected or name in bad for name in files)
        if not self._accept(sample.key, [name for name in files if name in bad], bad):
            return
        written = [protected[name].name if name in protected else name for name in files]
        if len(set(written)) < len(written):
            raise ShardError(
                f"sample {sample.key!r} would hold two members of one name once JPEG becomes PNG; "
                "use output_format match"
            )
        for member in sample.members:
            if member.is_file and (image := protected.get(member.name)):
                output.replace(member, name=image.name, payload=image.payload)
                self._count(image)
            else:
                output.copy(member)
        self._counts["members"] += len(sample.members)

    def _accept(self, key: str, bad_names: Sequence[str], reasons: dict[str, str]) -> bool:
        """Apply the bad-image policy to a sample; whether it is written at all."""
        policy = self._config.on_bad_image
        for name in bad_names:
            if policy == "fail":
                raise BadImagePolicyError(f"{name}: {reasons[name]} (on_bad_image is fail)")
            self._bad.append(
                BadImage(
                    key=printable(key),
                    member=printable(name),
                    reason=printable(reasons[name]),
                    action="dropped" if policy == "drop" else "passed through",
                )
            )
        return not bad_names or policy == "passthrough"

    def _count(self, image: _Protected) -> None:
        self._counts["protected"] += 1
        self._max_before_encoding = max(self._max_before_encoding, image.max_before_encoding)
        self._max_decoded = max(self._max_decoded, image.max_decoded)
        self._psnr_sum += image.psnr_db
        if image.converted:
            self._converted[image.converted] += 1
