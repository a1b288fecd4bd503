"""Memory of a worker, speed on each container, and what planning takes.

Throughput beside other programs is in `pipelines.peers`. Ratios can be compared between machines;
absolute rates cannot.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from one4all.corpus import CONTAINERS, Unit, images_of, list_units, read_samples
from one4all.corpus.tar import write_shard
from one4all.errors import One4AllError
from one4all.ledger.census import take_census
from one4all.ledger.ledger import Ledger, digest_of
from one4all.ledger.objects import ObjectRow, write_rows
from one4all.protectors.card import DEFAULT_PROTECTOR, load_card
from one4all.storage import INTERNAL, ObjectInfo, Reader, Storage, open_storage
from pipelines.local_machine import available_cpus
from pipelines.protect.config import ProtectConfig
from pipelines.protect.job import protect
from pipelines.protect.unit_status import UnitStatus
from pipelines.protect.worker import ProtectWorker
from pipelines.train.config import TrainConfig
from pipelines.train.speed import STAGES, Speed, measure_stages, measure_start, this_machine

ROUNDS = 3
LISTED_AT_ONCE = 1000  # objects, by one request to S3


def bench_memory(shard_gb: float, output: Path, *, say: Callable[[str], None]) -> str:
    """Peak memory of a worker on one large shard, beside a shard a twentieth of its size.

    Args:
        shard_gb: Size of the large shard, in 1e9 bytes; of JPEG photos of 2000x1500.
        output: JSON file.
        say: Receives a line for each measurement.

    Returns:
        The result in one line.
    """
    num_threads = available_cpus()
    record: dict[str, Any] = {"shard_bytes": [], "peak_bytes": []}
    size = (2000, 1500)
    with tempfile.TemporaryDirectory() as scratch:
        probe = make_photo_corpus(
            Path(scratch) / "probe", num_shards=1, images_per_shard=8, size=size
        )
        image_bytes = next(iter(open_storage(probe).list())).size / 8
        for share in (0.05, 1.0):
            corpus, target = Path(scratch) / f"corpus-{share}", Path(scratch) / f"out-{share}"
            count = max(8, round(share * shard_gb * 1e9 / image_bytes))
            make_photo_corpus(corpus, num_shards=1, images_per_shard=count, size=size)
            shard_bytes = next(iter(open_storage(str(corpus)).list())).size
            statuses: list[UnitStatus] = []
            config = ProtectConfig(
                protector=DEFAULT_PROTECTOR,
                runner="local",
                num_workers=1,
                cpus_per_worker=num_threads,
            )
            protect(str(corpus), str(target), config, on_progress=statuses.append)
            record["shard_bytes"].append(shard_bytes)
            record["peak_bytes"].append(statuses[0].peak_bytes)
            say(
                f"shard of {shard_bytes / 1e9:.2f} GB, {count} images: "
                f"{statuses[0].peak_bytes / 1e9:.2f} GB peak"
            )
            shutil.rmtree(target)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")
    small, large = record["peak_bytes"]
    return (
        f"peak memory of a worker: {large / 1e9:.2f} GB on a shard of "
        f"{record['shard_bytes'][1] / 1e9:.2f} GB, {small / 1e9:.2f} GB on one of "
        f"{record['shard_bytes'][0] / 1e9:.2f} GB; {output}"
    )


def bench_train(config: TrainConfig, output: Path, *, say: Callable[[str], None]) -> str:
    """Images/s and CPU seconds of each stage of one worker that trains.

    Args:
        config: Settings of a training; without a source, 4 shards of 64 photo crops are made.
        output: JSON file.
        say: Receives a line for each measurement.

    Returns:
        The result in one line.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if not config.source:
            corpus = make_photo_corpus(Path(scratch) / "corpus", num_shards=4)
            config = config.model_copy(update={"source": corpus})
            source = "photo crops, 500x375 JPEG"
        else:
            source = config.source
        start = measure_start(config)
        say(
            f"start of a worker: {start.sent:.2f} CPU s; {start.embedding:.2f} if it embedded the "
            "concepts itself"
        )
        speeds: dict[str, list[Speed]] = {stage: [] for stage in STAGES}
        for speed in measure_stages(config, num_images=256, num_steps=2, rounds=ROUNDS):
            speeds[speed.stage].append(speed)
            say(
                f"round {len(speeds[speed.stage])}: {speed.stage} {speed.images_per_second:.1f} "
                f"images/s, {1000 * speed.cpu_seconds:.2f} ms of CPU an image"
            )
    record = {
        "source": source,
        **this_machine()._asdict(),
        "batch_size": config.images_per_step,
        "start_cpu_seconds": asdict(start),
        "images_per_second": {
            stage: [speed.images_per_second for speed in found] for stage, found in speeds.items()
        },
        "cpu_ms_an_image": {
            stage: [1000 * speed.cpu_seconds for speed in found] for stage, found in speeds.items()
        },
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")
    told = ", ".join(
        f"{stage} {statistics.median(s.images_per_second for s in found):.1f}"
        for stage, found in speeds.items()
    )
    return f"training, images/s of one worker: {told}; {output}"


def bench_containers(num_images: int, output: Path, *, say: Callable[[str], None]) -> str:
    """Images/s of one worker on the same photos as a tar shard, a Parquet file and loose images.

    Args:
        num_images: Photo crops of 500x375.
        output: JSON file.
        say: Receives a line for each measurement.

    Returns:
        The result in one line.
    """
    num_threads = available_cpus()
    rates: dict[str, list[float]] = {name: [] for name in CONTAINERS}
    cpu: dict[str, list[float]] = {name: [] for name in CONTAINERS}
    with tempfile.TemporaryDirectory() as scratch:
        corpora = _make_containers(Path(scratch), num_images)
        for index in range(ROUNDS):
            for name, corpus in corpora.items():
                target = Path(scratch) / "out"
                worker = ProtectWorker(
                    ProtectConfig(protector=DEFAULT_PROTECTOR),
                    corpus.uri,
                    str(target),
                    "bench",
                    protector_sha256=load_card(DEFAULT_PROTECTOR).content_hash,
                    num_threads=num_threads,
                )
                start, cpu_start = time.perf_counter(), time.process_time()
                statuses = [worker.protect(unit) for unit in list_units(corpus)]
                seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
                if sum(status.num_protected for status in statuses) != num_images:
                    raise One4AllError(f"not all was protected: {statuses}")
                shutil.rmtree(target)
                rates[name].append(num_images / seconds)
                cpu[name].append(1000 * cpu_seconds / num_images)
                say(
                    f"round {index + 1}: {name} {rates[name][-1]:.1f} images/s, "
                    f"{cpu[name][-1]:.1f} ms of CPU an image"
                )
    ratios = {
        name: statistics.median(a / b for a, b in zip(rates[name], rates["tar"], strict=True))
        for name in rates
    }
    record = {"images_per_second": rates, "cpu_ms_an_image": cpu, "ratio_to_tar": ratios}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")
    told = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    return f"images/s of each container, relative to tar: {told}; {output}"


def _make_containers(folder: Path, num_images: int) -> dict[str, Storage]:
    """The same photos in each container, by its name."""
    import pyarrow as pa
    from pyarrow import parquet

    (folder / "parquet").mkdir()
    corpora = {name: open_storage(str(folder / name)) for name in CONTAINERS}
    make_photo_corpus(folder / "tar", num_shards=1, images_per_shard=num_images)
    (unit,) = list_units(corpora["tar"])
    photos: list[bytes] = []
    for sample in read_samples(corpora["tar"], unit):
        photos += [member.payload for member in images_of(sample)]
        corpora["images"].write_bytes(f"{len(photos) // 100}/{sample.key}.jpg", photos[-1])
    rows = pa.table({"image": photos, "label": list(range(len(photos)))})
    parquet.write_table(rows, folder / "parquet" / "photos.parquet", row_group_size=100)
    return corpora


def bench_plan(count: int, output: Path, *, what: str, say: Callable[[str], None]) -> str:
    """Time and memory of planning over simulated listings, when nothing and when 99 % is done.

    The simulated stores can only be listed: reading any shard or image would end the measurement.
    Records of images are real ones.

    Args:
        count: Of the source; a quarter and a half of it are measured too.
        output: JSON file.
        what: What the source holds: "shards" or "images".
        say: Receives a line for each measurement.

    Returns:
        The result in one line.
    """
    measure = _measure_plan if what == "shards" else _measure_plan_of_images
    record: list[dict[str, float]] = []
    for percent_done in (0, 99):
        for part in (count // 4, count // 2, count):
            # In a fresh process, for its peak of memory.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                entry = pool.apply(measure, (part, percent_done))
            record.append(entry)
            say(
                f"planning {part:,} {what}, {percent_done} % done: {entry['seconds']:.1f} s, "
                f"{entry['bytes'] / 1e6:.0f} MB, {entry['num_pending']:,} pending, "
                f"{entry['requests']:,} requests on S3"
            )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")
    worst = max(record, key=lambda entry: entry["bytes"])
    growth = [record[i + 2]["seconds"] / record[i]["seconds"] for i in (0, 3)]
    return (
        f"planning {count:,} {what}: {worst['bytes'] / 1e6:.0f} MB at most, four times as many "
        f"take {growth[0]:.1f} and {growth[1]:.1f} times as long; {output}"
    )


def _measure_plan(num_shards: int, percent_done: int) -> dict[str, float]:
    """One census; seconds beside those of walking through both listings, and growth in bytes."""
    source = _SimulatedStorage(lambda: _simulated_source(num_shards))
    destination = _SimulatedStorage(lambda: _simulated_destination(num_shards, percent_done))
    return _measure_census(source, destination, num_shards, percent_done)


def _measure_plan_of_images(num_images: int, percent_done: int) -> dict[str, float]:
    """`_measure_plan` of loose images; their records lie in a folder."""

    def standing() -> Iterator[ObjectInfo]:
        for index, info in enumerate(_simulated_images(num_images)):
            if index % 100 < percent_done:
                yield replace(info, etag='"' + info.etag[2:-1] + 'f"')

    def rows() -> Iterator[ObjectRow]:
        outputs = iter(standing())
        for index, info in enumerate(_simulated_images(num_images)):
            if index % 100 < percent_done:
                written = next(outputs)
                yield ObjectRow(
                    key=info.key,
                    size=info.size,
                    etag=info.etag,
                    output=info.key,
                    output_size=written.size,
                    output_etag=written.etag,
                    output_sha256=hashlib.sha256(info.key.encode()).hexdigest(),
                    num_protected=1,
                    bad="",
                    max_before_encoding=8,
                    max_decoded=21,
                    mean_psnr_db=36.5,
                    run_id="0123456789ab",
                )

    with tempfile.TemporaryDirectory() as folder:
        records = open_storage(folder)
        with (Path(folder) / "part").open("wb") as part:
            write_rows(rows(), part)
        records.write_bytes(f"{INTERNAL}objects/all.parquet", (Path(folder) / "part").read_bytes())
        source = _SimulatedStorage(lambda: _simulated_images(num_images))
        destination = _SimulatedStorage(standing, records)
        return _measure_census(source, destination, num_images, percent_done)


def _measure_census(
    source: _SimulatedStorage, destination: _SimulatedStorage, count: int, percent_done: int
) -> dict[str, float]:
    listing = time.perf_counter()
    for storage in (source, destination):
        for _ in storage.list(""):
            pass
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    source.num_listed = destination.num_listed = destination.num_read = 0
    start = time.perf_counter()
    census = take_census(source, Ledger(destination))
    end = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "count": count,
        "percent_done": percent_done,
        "num_pending": census.num_pending,
        "seconds": end - start,
        "listing_seconds": start - listing,
        "bytes": peak - before,
        "requests": destination.num_read
        + sum(-(-storage.num_listed // LISTED_AT_ONCE) for storage in (source, destination)),
    }


def _simulated_images(num_images: int) -> Iterator[ObjectInfo]:
    for index in range(num_images):
        key = f"photos/{index // 5000:06d}/IMG_{index:09d} {index * 2654435761 % 2**32:08x}.jpg"
        yield ObjectInfo(key, 120_000 + index % 9973, f'"{index * 0x9E3779B97F4A7C15:032x}"')


def _simulated_source(num_shards: int) -> Iterator[ObjectInfo]:
    for index in range(num_shards):
        key = f"train/part-{index // 1000:05d}/shard-{index:09d}.tar"
        yield ObjectInfo(key, 100_000_000 + index, f'"{index:032x}"')


def _simulated_destination(num_shards: int, percent_done: int) -> Iterator[ObjectInfo]:
    """Manifests, and then outputs that differ from their sources by the ETag alone."""

    def done() -> Iterator[ObjectInfo]:
        for index, info in enumerate(_simulated_source(num_shards)):
            if index % 100 < percent_done:
                yield info

    for info in done():
        unit, written = Unit.of_object(info), digest_of([replace(info, etag='"w"')])
        yield ObjectInfo(f"{INTERNAL}shards/{unit.id}-{written}-0.json", 1000, '"x"')
    for info in done():
        yield replace(info, etag='"w"')


class _SimulatedStorage(Storage):
    """Lists what a generator says; only records can be read.

    Args:
        entries: What is listed.
        records: Where records lie; None if there are none to be read.

    Attributes:
        num_listed, num_read: Objects that were listed, and requests that read a part of one.
    """

    uri = "simulated://"

    def __init__(
        self, entries: Callable[[], Iterator[ObjectInfo]], records: Storage | None = None
    ) -> None:
        self._entries, self._records = entries, records
        self.num_listed = self.num_read = 0

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        if self._records is not None and prefix.startswith(INTERNAL):
            found = self._records.list(prefix)
        else:
            found = (info for info in self._entries() if info.key.startswith(prefix))
        for info in found:
            self.num_listed += 1
            yield info

    def read_range(self, key: str, start: int, size: int, *, etag: str | None = None) -> bytes:
        if self._records is None or not key.startswith(INTERNAL):
            self._refuse()
        self.num_read += 1
        return self._records.read_range(key, start, size, etag=etag)

    def open(self, key: str, *, etag: str | None = None) -> Reader:
        if self._records is None or not key.startswith(INTERNAL):
            self._refuse()
        self.num_read += 1
        return self._records.open(key, etag=etag)

    def _refuse(self, *arguments: object, **options: object) -> NoReturn:
        raise AssertionError("planning looked into an object")

    head = writer = create = replace = age_seconds = delete = check = sweep = _refuse


def make_photo_corpus(
    folder: Path,
    *,
    num_shards: int = 6,
    images_per_shard: int = 64,
    size: tuple[int, int] = (500, 375),
) -> str:
    """Shards of random crops of the embedded photos, JPEG at quality 90; the same every time."""
    photos = [
        Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
        for path in sorted(Path(str(files("one4all") / "assets" / "photos")).glob("*.jpg"))
    ]
    random = np.random.default_rng(0)
    storage = open_storage(str(folder))
    for shard in range(num_shards):
        with storage.writer(f"photos-{shard:06d}.tar") as writer:
            write_shard(writer, _photo_members(photos, random, shard, images_per_shard, size))
            writer.commit()
    return str(folder)


def _photo_members(
    photos: list[Image.Image],
    random: np.random.Generator,
    shard: int,
    count: int,
    size: tuple[int, int],
) -> Iterator[tuple[str, bytes]]:
    for index in range(count):
        photo = photos[int(random.integers(len(photos)))]
        side = random.uniform(0.5, 1.0)
        width, height = photo.width * side, photo.height * side
        left = random.uniform(0, photo.width - width)
        top = random.uniform(0, photo.height - height)
        box = (left, top, left + width, top + height)
        crop = photo.resize(size, Image.Resampling.BICUBIC, box=box)
        buffer = io.BytesIO()
        crop.save(buffer, "JPEG", quality=90)
        yield f"{shard:03d}_{index:05d}.jpg", buffer.getvalue()
        yield f"{shard:03d}_{index:05d}.cls", b"0"
