"""One unit, rewritten: read, decode, perturb, encode, write, commit.

    source -> container's reader -> decode -> device -> encode -> container's writer -> destination

Batches of images move through the stages in order, at most three at a time, each bounded in
images, pixels, members and bytes, so memory does not grow with the unit. A sample whose images are
more than one batch may hold is spread over several, and written whole after the last. An image of
more pixels than a batch may hold moves alone, when all before it are written. What a batch holds
depends on the unit alone, never on timing: the same unit makes the same bytes.
"""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from one4all.corpus import (
    CONTAINERS,
    DEFAULT_MAX_SAMPLE_BYTES,
    Container,
    Member,
    OutputObject,
    ReadOptions,
    Sample,
    Unit,
    UnitWriter,
    images_of,
    printable,
    read_samples,
    write_unit,
)
from one4all.errors import BadImageError, BudgetError, ShardError
from one4all.gray_images import in_colour, is_gray
from one4all.images import (
    DEFAULT_MAX_PIXELS,
    DecodedImage,
    OutputFormat,
    Pixels,
    decode_with_copy,
    extension_for,
    peek_num_pixels,
)
from one4all.ledger.records import BadImage, Binding, Manifest, UnitDistances
from one4all.perturbation import Levels
from one4all.recode import RecodedImage, recode
from one4all.storage import Storage

if TYPE_CHECKING:
    from one4all.protectors.protector import Protector

STAGES = ("read", "decode", "device", "encode", "write")
_LOOKAHEAD = 1  # batches waiting between two stages
_MAX_BATCH_MEMBERS = 16_384  # each takes about 3 KB, though it may be empty

OnBatch = Callable[[float], None]
"""Receives the seconds of one batch on the device."""

OnStep = Callable[[], None]
"""Called whenever a batch of samples has moved on by a stage."""


class RewriteConfig(BaseModel):
    """What decides the bytes of a rewritten shard, and the memory that the rewrite takes.

    Attributes:
        output_format: "match" keeps file formats (a JPEG is encoded again, so what a reader decodes
            is not within the budget bit for bit; nor AVIF and HEIC); "lossless" turns these into
            PNG.
        on_bad_image: For an image that cannot be protected: "drop" its sample, "passthrough" it
            unprotected, or "fail" the shard. Always recorded.
        sidecar_patterns: Members copied although they are images, such as ``*.seg.png``; matched
            against the last component of the name.
        mark_no_ai_training: Write into the XMP of each protected image that it must not be used to
            train AI (IPTC's Data Mining property), unless it states a reservation already. BMP
            cannot hold it.
        tint_gray: Make gray images colour images, so that they hold a pattern in colour. If not,
            they stay gray, and hold hardly any of it.
        max_image_pixels: Larger images are bad images; refused before they are decoded.
        max_sample_bytes: Larger samples make a bad shard; a sample has to fit in memory, and a row
            group of a Parquet file.
        image_columns: Columns of Parquet files of which every value is an image. Others are found
            by what the file says, or by the content of their values.
        others: For loose objects that are no images: "copy" or "skip" them.
        batch_size: Images in memory at once, and in one forward pass where the encoder's backend
            takes several; there, another size may round a pixel here and there to its other
            neighbour.
        batch_pixels: Pixels of decoded images in one batch; bounds memory: three are in flight. An
            image of more than these is in flight alone, and takes about 16 bytes a pixel.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    output_format: OutputFormat = "match"
    on_bad_image: Literal["drop", "fail", "passthrough"] = "drop"
    sidecar_patterns: tuple[str, ...] = ()
    mark_no_ai_training: bool = False
    tint_gray: bool = False
    max_image_pixels: Annotated[int, Field(ge=1, le=500_000_000)] = DEFAULT_MAX_PIXELS
    max_sample_bytes: Annotated[int, Field(ge=1)] = 1 << 30
    image_columns: tuple[str, ...] = ()
    others: Literal["copy", "skip"] = "copy"
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 8
    batch_pixels: Annotated[int, Field(ge=1)] = 24_000_000

    @property
    def bound(self) -> dict[str, Any]:
        """Settings of these that a destination is bound to, by their names in `Binding`."""
        return {name: getattr(self, name) for name in _BOUND}

    @property
    def read_options(self) -> ReadOptions:
        """How units are read under these settings."""
        return ReadOptions(self.max_sample_bytes, self.image_columns, self.others)

    @classmethod
    def of_binding(cls, binding: Binding, **others: Any) -> RewriteConfig:
        """The settings that a destination is bound to, and others."""
        return cls(**{name: getattr(binding, name) for name in _BOUND}, **others)


_BOUND = sorted(RewriteConfig.model_fields.keys() & Binding.model_fields.keys())
DEFAULT_REWRITE = RewriteConfig()


class BadImagePolicyError(ShardError):
    """A bad image under the policy "fail"; trying again cannot help."""


@dataclass(frozen=True)
class _Protected:
    """One image, ready to be written."""

    name: str
    converted: str
    lacks_colour: bool
    file: RecodedImage


@dataclass
class _Batch:
    """Images on their way through the stages; futures are keyed by member name.

    Attributes:
        images: Members to be decoded together.
        samples: Those of which the last image is here, to be written after it.
        num_pixels: Pixels that the images declare.
    """

    images: list[Member] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    num_pixels: int = 0
    decoded: dict[str, Future[tuple[DecodedImage, Pixels]]] = field(default_factory=dict)
    protected: dict[str, Future[_Protected]] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)


def rewrite_unit(
    unit: Unit,
    source: Storage,
    destination: Storage,
    protector: Protector,
    config: RewriteConfig = DEFAULT_REWRITE,
    *,
    pool: ThreadPoolExecutor | None = None,
    run_id: str = "",
    on_batch: OnBatch = lambda seconds: None,
    on_step: OnStep = lambda: None,
) -> Manifest:
    """Write the protected copy of one unit and return its manifest, not yet recorded.

    Nothing is visible at the destination until the whole unit is written; of a group of loose
    objects, until the whole object is. For programs of your own; `one4all protect` adds the ledger,
    which says what is done and tries again.

    Args:
        unit: What to protect; see `one4all.list_units`.
        source, destination: Where it is, and where its copy goes under the same keys.
        protector: Protector, on the device where it shall compute.
        config: What decides the bytes.
        pool: Threads for decoding and encoding; one for each CPU, if none are given.
        run_id: Name of the run, for the manifest.
        on_batch: Receives the seconds of each batch on the device.
        on_step: Called whenever a batch of samples has moved on, so that a stall can be told.

    Raises:
        ShardError: The unit is damaged or changed, or a bad image meets the policy "fail".
        ConflictError: Somebody else wrote an output since this call began; theirs is kept.
        StorageError: A store failed in spite of retries.
    """
    if pool is None:
        with ThreadPoolExecutor(os.cpu_count() or 1, "codec") as own:
            return rewrite_unit(
                unit,
                source,
                destination,
                protector,
                config,
                pool=own,
                run_id=run_id,
                on_batch=on_batch,
                on_step=on_step,
            )
    container = CONTAINERS[unit.container]
    rewrite = _UnitRewrite(protector, config, container, pool, on_batch, on_step)
    # The writer first: it replaces only what stands now. If the source is replaced after it was
    # opened, then whatever is made of its new version stands later than that, and is safe from us.
    with write_unit(destination, unit) as output:
        samples = read_samples(source, unit, config.read_options)
        with closing(samples):
            rewrite.run(samples, output)
        with rewrite.timer("write"):
            outputs = output.commit()
    return rewrite.manifest(unit, outputs, run_id=run_id)


class _UnitRewrite:
    """The stages of one unit, and the tally that its manifest is made of."""

    def __init__(
        self,
        protector: Protector,
        config: RewriteConfig,
        container: Container,
        pool: ThreadPoolExecutor,
        on_batch: OnBatch,
        on_step: OnStep,
    ) -> None:
        self._protector = protector
        self._config, self._container = config, container
        self._pool = pool
        self._on_batch, self._on_step = on_batch, on_step
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._counts: Counter[str] = Counter()
        self._seen: set[str] = set()  # keys of samples, where they are those of objects
        self._converted: Counter[str] = Counter()
        self._bad: list[BadImage] = []
        # Of samples that are not written yet, by member name; more than a batch holds of one only.
        self._finished: dict[str, _Protected] = {}
        self._reasons: dict[str, str] = {}
        # Written so far. Of other names a key tells that they are in one sample, or differ.
        self._dot_files: set[str] = set()
        self._max_before_encoding = 0
        self._max_decoded = 0
        self._psnr_sum, self._num_measured = 0.0, 0
        self._measured = False  # whether an image is, or will be, decoded again in any case

    def run(self, samples: Iterator[Sample], output: UnitWriter) -> None:
        """Move all samples through the stages, in order."""
        decoding: deque[_Batch] = deque()
        encoding: deque[_Batch] = deque()

        def advance(lookahead: int) -> None:
            """Move batches on, until no more than these wait between two stages."""
            while len(decoding) > lookahead:
                self._on_step()
                encoding.append(self._perturb(decoding.popleft()))
            while len(encoding) > lookahead:
                self._on_step()
                self._write(encoding.popleft(), output)

        # Closed before the samples are, which another thread may be reading.
        with closing(self._ahead(self._batches(samples))) as batches:
            for batch in batches:
                self._on_step()
                # Three at once of the largest images would take the memory of a whole machine.
                lookahead = _LOOKAHEAD if batch.num_pixels <= self._config.batch_pixels else 0
                if not lookahead:
                    advance(0)
                self._start_decoding(batch)
                decoding.append(batch)
                advance(lookahead)
        advance(0)

    def manifest(self, unit: Unit, outputs: tuple[OutputObject, ...], *, run_id: str) -> Manifest:
        """The manifest of what was written."""
        num_protected = self._counts["protected"]
        source = unit.objects
        if not self._container.has_units:  # of a group, some may have gone meanwhile
            source = tuple(part for part in source if part.key in self._seen)
        return Manifest(
            name=unit.name,
            container=unit.container,
            source=source,
            outputs=outputs,
            num_samples=self._counts["samples"],
            num_images=self._counts["images"],
            num_protected=num_protected,
            num_members=self._counts["members"],
            num_gray=self._counts["gray"],
            bad_images=tuple(self._bad),
            converted=dict(sorted(self._converted.items())),
            distances=UnitDistances(
                max_before_encoding=self._max_before_encoding,
                max_decoded=self._max_decoded,
                mean_psnr_db=round(self._psnr_sum / max(self._num_measured, 1), 3),
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
        """Group whole samples until the next one would be too much; spread one that alone is."""
        config = self._config
        batch = _Batch()
        members = num_bytes = 0
        for sample in samples:
            images = images_of(sample, config.sidecar_patterns)
            sizes = [peek_num_pixels(member.payload) for member in images]
            if batch.samples and (
                len(batch.images) + len(images) > config.batch_size
                or batch.num_pixels + sum(sizes) > config.batch_pixels
                or members + len(sample.members) > _MAX_BATCH_MEMBERS
                or num_bytes + sample.stored_bytes > 4 * config.batch_pixels
            ):
                yield batch
                batch, members, num_bytes = _Batch(), 0, 0
            spread = False
            for member, size in zip(images, sizes, strict=True):
                if batch.images and (
                    len(batch.images) == config.batch_size
                    or batch.num_pixels + size > config.batch_pixels
                ):
                    yield batch
                    batch, spread = _Batch(), True
                batch.images.append(member)
                batch.num_pixels += size
            batch.samples.append(sample)
            members, num_bytes = members + len(sample.members), num_bytes + sample.stored_bytes
            if spread:
                yield batch
                batch, members, num_bytes = _Batch(), 0, 0
        if batch.samples:
            yield batch

    def _ahead(self, batches: Iterator[_Batch]) -> Generator[_Batch]:
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
        for member in batch.images:
            batch.decoded[member.name] = self._pool.submit(self._decode, member)

    def _decode(self, member: Member) -> tuple[DecodedImage, Pixels]:
        size, limit = self._protector.card.working_size, self._config.max_image_pixels
        image, copy = decode_with_copy(member.payload, size, max_pixels=limit)
        return (in_colour(image) if self._config.tint_gray else image), copy

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
        if images:
            before = self._seconds["device"]
            with self.timer("device"):
                working_NHWC = np.stack([copy for _, copy in images.values()])
                deltas = self._protector.perturb(working_NHWC, batch_size=self._config.batch_size)
            self._on_batch(self._seconds["device"] - before)
            for (name, (image, _)), delta in zip(images.items(), deltas, strict=True):
                measured, self._measured = not self._measured, True
                batch.protected[name] = self._pool.submit(
                    self._encode, name, image, delta, measured
                )
        return batch

    def _encode(self, name: str, clean: DecodedImage, delta: Levels, measured: bool) -> _Protected:
        """Add the perturbation, encode, and measure what a reader will decode, see `recode`."""
        config = self._config
        if config.mark_no_ai_training:
            marked = clean.description.with_data_mining_prohibited()
            clean = replace(clean, description=marked)
        try:
            file = recode(
                clean,
                self._protector.apply(clean.pixels, delta),
                output_format=config.output_format,
                epsilon_levels=self._protector.card.epsilon_levels,
                max_pixels=config.max_image_pixels,
                measured=measured,
            )
        except BudgetError as error:
            raise BudgetError(f"{name}: {error}") from error
        written = extension_for(name, clean, config.output_format)
        if written != name:
            written = self._container.renamed(name, written)
        lacks_colour = self._protector.is_coloured and is_gray(clean)
        return _Protected(written, clean.converted, lacks_colour, file)

    def _write(self, batch: _Batch, output: UnitWriter) -> None:
        """Wait for the encoded images and write the samples, in the order of the source."""
        self._reasons |= batch.bad
        with self.timer("encode"):
            for name, future in batch.protected.items():
                try:
                    self._finished[name] = future.result()
                except BadImageError as error:
                    self._reasons[name] = str(error)
        self._refuse_growth(batch)
        with self.timer("write"):
            for sample in batch.samples:
                self._write_sample(sample, self._finished, self._reasons, output)
        if batch.samples:
            self._finished, self._reasons = {}, {}

    def _refuse_growth(self, batch: _Batch) -> None:
        """A sample is held until its last image is there, and a protected one may be larger."""
        limit = max(self._config.max_sample_bytes, DEFAULT_MAX_SAMPLE_BYTES)
        sizes = {name: len(image.file.payload) for name, image in self._finished.items()}
        if len(batch.samples) < 2 and sum(sizes.values()) > limit:
            raise ShardError(
                f"the sample of {next(iter(sizes))!r} would take over {limit:,} bytes once it is "
                "protected; split it, or raise max_sample_bytes"
            )

    def _write_sample(
        self,
        sample: Sample,
        protected: dict[str, _Protected],
        bad: dict[str, str],
        output: UnitWriter,
    ) -> None:
        if not self._container.has_units:
            self._seen.add(sample.key)
        self._counts["samples"] += any(member.is_file for member in sample.members)
        # A link may share its name with a file: only files are ever replaced.
        files = [member.name for member in sample.members if member.is_file]
        self._counts["images"] += sum(name in protected or name in bad for name in files)
        if not self._accept(sample.key, [name for name in files if name in bad], bad):
            return
        written = [protected[name].name if name in protected else name for name in files]
        if len(set(written)) < len(written) or not self._dot_files.isdisjoint(written):
            raise ShardError(
                f"sample {sample.key!r} would hold a second member of one name once images become "
                "PNG; use output_format match"
            )
        self._dot_files.update(name for name in written if name.rpartition("/")[2][:1] == ".")
        for member in sample.members:
            if member.link_target and self._config.output_format == "lossless":
                raise ShardError(
                    f"{member.name!r} is a link to {member.link_target!r}, which may get another "
                    "name once images become PNG; use output_format match"
                )
            if member.is_file and (image := protected.get(member.name)):
                output.replace(member, name=image.name, payload=image.file.payload)
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
        file = image.file
        self._max_before_encoding = max(self._max_before_encoding, file.max_before_encoding)
        if file.max_decoded is not None and file.psnr_db is not None:
            self._max_decoded = max(self._max_decoded, file.max_decoded)
            self._psnr_sum += file.psnr_db
            self._num_measured += 1
        self._counts["gray"] += image.lacks_colour
        if image.converted:
            self._converted[image.converted] += 1
