"""Protect beside what else protects the same shards: the same protector, threads and photos.

Each side runs in a process of its own, in turn. Its clock starts when the first images are done, so
nobody pays for a start-up. CPU time and memory are those of the process and of all below it. Ratios
of one run can be compared between machines; absolute rates cannot.

The others are written as somebody would who knows them well:

* a plain loop: one process, one thing after the other;
* Ray Data: `read_webdataset`, `map_batches` with one actor for each CPU, `write_webdataset`;
* webdataset: a loader with one process for each CPU, and a `ShardWriter`.

All protect and check images by the same code. What else of a corpus they keep is compared, too.
"""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from one4all.corpus import images_of, list_units, read_samples, write_unit
from one4all.errors import One4AllError, UsageError
from one4all.extras import require
from one4all.images import DEFAULT_MAX_PIXELS, decode, working_copy
from one4all.protectors.card import DEFAULT_PROTECTOR
from one4all.protectors.protector import Protector
from one4all.recode import recode
from one4all.storage import open_storage
from pipelines.bench import make_photo_corpus
from pipelines.local_machine import available_cpus
from pipelines.protect.config import ProtectConfig
from pipelines.protect.job import protect
from pipelines.ray_session import ray_session
from pipelines.settings import RayConfig

ROUNDS = 3
BATCH_SIZE = ProtectConfig().batch_size
_FIRST = 64  # images, after which the clock starts
_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Measured:
    """What one side did between its first images and its last.

    Attributes:
        images_per_second: Images of that time, by it.
        cpu_ms: CPU time an image, in milliseconds, of all processes.
        num_bytes: Memory of all processes at the end, what they share counted once.
    """

    images_per_second: float
    cpu_ms: float
    num_bytes: int


@dataclass
class Clock:
    """Time, CPU time and peak memory of this process and of all below it."""

    _num_bytes: int = 0
    _look_at: int = _FIRST
    _start: tuple[int, float, float] | None = None
    _end: tuple[int, float, float] = (0, 0.0, 0.0)
    _cpu: dict[tuple[int, float], float] = field(default_factory=dict)  # by process, also ended

    def tick(self, num_images: int) -> None:
        """So many images are done by now; the first call with ``_FIRST`` of them is the start."""
        if num_images >= _FIRST:
            if num_images >= self._look_at:  # seldom, because it takes time
                self._num_bytes = max(self._num_bytes, self._memory())
                self._look_at = 2 * num_images
            self._end = (num_images, time.perf_counter(), self._cpu_seconds())
            self._start = self._start or self._end

    def measured(self) -> Measured:
        """What lies between the first tick and the last.

        Raises:
            One4AllError: There was only one.
        """
        if self._start is None or self._end[0] == self._start[0]:
            raise One4AllError(f"too few images to measure: {self._end[0]}, {_FIRST} to warm up")
        images, seconds, cpu = (
            end - start for start, end in zip(self._start, self._end, strict=True)
        )
        return Measured(images / seconds, 1000 * cpu / images, self._num_bytes)

    @staticmethod
    def _processes() -> list[Any]:
        import psutil

        this = psutil.Process()
        return [this, *this.children(recursive=True)]

    def _memory(self) -> int:
        """Proportional set size, in bytes: pages that processes share are counted once."""
        import psutil

        num_bytes = 0
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                num_bytes += process.memory_full_info().pss
        return num_bytes

    def _cpu_seconds(self) -> float:
        """Of a process that has ended, what was seen of it; or, if it was a child of this one and
        that is more, what the kernel says of all of these."""
        import psutil

        alive = 0.0
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                seen = self._cpu[process.pid, process.create_time()] = times.user + times.system
                alive += seen
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        return max(sum(self._cpu.values()), alive + ended.ru_utime + ended.ru_stime)


Side = Callable[[str, str, int], Measured]
"""Protects a source into a destination with so many threads."""


def bench_peers(source: str | None, output: Path, *, say: Callable[[str], None]) -> str:
    """Measure all sides in turn, and write a JSON file.

    Args:
        source: Shards to measure on, in a folder; None makes 6 shards of 64 photo crops of 500x375.
        output: JSON file.
        say: Receives a line for each measurement.

    Returns:
        A table of the medians.

    Raises:
        UsageError: A package is missing, or the source is none that all sides can read.
    """
    for module in ("psutil", "webdataset"):
        require(module, "dev")
    num_threads = available_cpus()
    found: dict[str, list[Measured]] = {name: [] for name in SIDES}
    kept: dict[str, dict[str, bool]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        corpus = source or make_photo_corpus(Path(scratch) / "corpus")
        _check_source(corpus)
        alone = _alone(corpus, num_threads)
        for name, rate in alone.items():
            say(f"{name} alone: {rate:.1f} images/s")
        for index in range(ROUNDS):
            for name, side in SIDES.items():
                target = Path(scratch) / "out"
                found[name].append(_apart(side, corpus, str(target), num_threads))
                kept[name] = what_is_kept(Path(corpus), target)
                shutil.rmtree(target)
                last = found[name][-1]
                say(
                    f"round {index + 1}: {name}: {last.images_per_second:.1f} images/s, "
                    f"{last.cpu_ms:.1f} ms of CPU an image, {last.num_bytes / 1e9:.2f} GB"
                )
    ours = found["one4all protect"]
    lines = [
        "| | images/s | CPU ms an image | memory, GB | protect is faster by | keeps |",
        "|---|---|---|---|---|---|",
    ]
    for name, rounds in found.items():
        ratio = statistics.median(
            a.images_per_second / b.images_per_second for a, b in zip(ours, rounds, strict=True)
        )
        rate, cpu, memory = (
            statistics.median(values)
            for values in zip(
                *((m.images_per_second, m.cpu_ms, m.num_bytes / 1e9) for m in rounds), strict=True
            )
        )
        keeps = ", ".join(what for what, is_kept in kept[name].items() if is_kept)
        lines.append(
            f"| {name} | {rate:.1f} | {cpu:.1f} | {memory:.1f} | {ratio:.2f} | {keeps or '-'} |"
        )
    lines += [f"| {name} alone | {rate:.1f} | | | | |" for name, rate in alone.items()]
    record = {
        "source": source or "photo crops, 500x375 JPEG",
        "threads": num_threads,
        "versions": {name: importlib.metadata.version(name) for name in ("ray", "webdataset")},
        "alone": alone,
        "sides": {name: [vars(measured) for measured in rounds] for name, rounds in found.items()},
        "kept": kept,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")
    return "\n".join([*lines, f"{output}"])


def _check_source(source: str) -> None:
    """All sides read shards in a folder, of samples with one image each, ``jpg``."""
    shards = sorted(Path(source).glob("*.tar"))
    if not shards:
        raise UsageError(f"{source} is no folder with .tar shards; give one, or nothing")
    storage = open_storage(source)
    for unit in list_units(storage):
        for sample in read_samples(storage, unit):
            names = [member.name for member in images_of(sample)]
            if names != [f"{sample.key}.jpg"]:
                raise UsageError(
                    f"sample {sample.key!r} of {unit.name} has the images {names}; all sides can "
                    "read only samples of one image, whose extension is jpg"
                )


def _apart(side: Side, source: str, target: str, num_threads: int) -> Measured:
    """One side, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_run, (side, source, target, num_threads))


def _run(side: Side, source: str, target: str, num_threads: int) -> Measured:
    # A worker of a pool is a daemon, which may have no children, and loaders do.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    Path(target).mkdir()
    return side(source, target, num_threads)


@contextmanager
def _watched(num_images: Callable[[], int]) -> Iterator[Clock]:
    """A clock that looks how many images are done, until the block ends and once more."""
    clock, ended = Clock(), threading.Event()

    def watch() -> None:
        seen = 0
        while not ended.wait(_POLL_SECONDS):
            if (now := num_images()) != seen:  # else looking would cost more than it tells
                clock.tick(now)
                seen = now

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield clock
    finally:
        ended.set()
        watcher.join()
    clock.tick(num_images())


def ours(source: str, target: str, num_threads: int) -> Measured:
    """`one4all protect`, with workers as it chooses them."""
    config = ProtectConfig(
        protector=DEFAULT_PROTECTOR, runner="local", ray=RayConfig(num_cpus=num_threads)
    )
    storage = open_storage(source)
    sizes = {
        unit.name: sum(len(images_of(sample)) for sample in read_samples(storage, unit))
        for unit in list_units(storage)
    }

    def num_images() -> int:
        return sum(num for name, num in sizes.items() if (Path(target) / name).exists())

    with _watched(num_images) as clock:
        protect(source, target, config)
    return clock.measured()


def plain_loop(source_uri: str, target_uri: str, num_threads: int) -> Measured:
    """One process, one thing after the other: what a careful script would do."""
    torch.set_num_threads(num_threads)
    protector, clock, num_images = Protector.load(DEFAULT_PROTECTOR), Clock(), 0
    source, target = open_storage(source_uri), open_storage(target_uri)
    for unit in list(list_units(source)):
        with write_unit(target, unit) as writer:
            samples = list(read_samples(source, unit))
            images = [member for sample in samples for member in images_of(sample)]
            protected: dict[str, bytes] = {}
            for first in range(0, len(images), BATCH_SIZE):
                batch = images[first : first + BATCH_SIZE]
                files = protector.protect_files([member.payload for member in batch])
                protected |= {member.name: file for member, file in zip(batch, files, strict=True)}
            for member in (member for sample in samples for member in sample.members):
                if member.name in protected:
                    writer.replace(member, name=member.name, payload=protected[member.name])
                else:
                    writer.copy(member)
            writer.commit()
        num_images += len(images)
        clock.tick(num_images)
    return clock.measured()


class _Actor:
    """Protects the images of a batch of rows, with one thread."""

    def __init__(self, done: str) -> None:
        torch.set_num_threads(1)
        self._protector = Protector.load(DEFAULT_PROTECTOR)
        self._done = Path(done) / f"{os.getpid()}"

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        files = self._protector.protect_files([bytes(file) for file in batch["jpg"]])
        with self._done.open("ab") as done:
            done.write(bytes(len(files)))  # as many bytes as there are images
        return batch | {"jpg": files}


def ray_data(source: str, target: str, num_threads: int) -> Measured:
    """Ray Data's own reader and writer of shards, and one actor for each CPU."""
    # Twice as many as there are: with all of them taken by actors nothing would read or write.
    config = RayConfig(num_cpus=2 * num_threads)
    with tempfile.TemporaryDirectory() as folder, ray_session(config):
        import ray

        def num_images() -> int:
            return sum(path.stat().st_size for path in Path(folder).iterdir())

        dataset = ray.data.read_webdataset(source, decoder=None)
        dataset = dataset.map_batches(
            _Actor,
            fn_constructor_args=(folder,),
            batch_size=BATCH_SIZE,
            compute=ray.data.ActorPoolStrategy(size=num_threads),
            num_cpus=1,
        )
        with _watched(num_images) as clock:
            dataset.write_webdataset(target, encoder=None)
        return clock.measured()


def _protect_samples(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Protect the images of samples; the protector is loaded once in each process of a loader."""
    if not hasattr(_protect_samples, "protector"):
        torch.set_num_threads(1)
        _protect_samples.protector = Protector.load(DEFAULT_PROTECTOR)  # type: ignore[attr-defined]
    protector: Protector = _protect_samples.protector  # type: ignore[attr-defined]
    files = protector.protect_files([sample["jpg"] for sample in samples])
    return [sample | {"jpg": file} for sample, file in zip(samples, files, strict=True)]


def _as_it_is(samples: list[Any]) -> list[Any]:
    return samples


def loader(source: str, target: str, num_threads: int) -> Measured:
    """webdataset with PyTorch's loader, one process for each CPU, and a `ShardWriter`."""
    import webdataset

    clock, num_images = Clock(), 0
    shards = sorted(str(path) for path in Path(source).glob("*.tar"))
    first = next(iter(list_units(open_storage(source))))
    shard_images = sum(1 for _ in read_samples(open_storage(source), first))
    dataset = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)
    dataset = dataset.batched(BATCH_SIZE, collation_fn=_as_it_is).map(_protect_samples)
    batches = webdataset.WebLoader(dataset, batch_size=None, num_workers=num_threads)
    pattern = str(Path(target) / "photos-%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=shard_images, verbose=0) as writer:
        for batch in batches:
            for sample in batch:
                writer.write({k: v for k, v in sample.items() if k != "__url__"})
            num_images += len(batch)
            clock.tick(num_images)
        return clock.measured()


SIDES: dict[str, Side] = {
    "one4all protect": ours,
    "plain loop": plain_loop,
    "Ray Data": ray_data,
    "webdataset": loader,
}


def what_is_kept(source: Path, target: Path) -> dict[str, bool]:
    """What of a corpus stands at the other side as it was, of what a reader may rely on.

    Raises:
        One4AllError: There are fewer members, or an image that is not protected.
    """
    before, after = ([*_members(folder)] for folder in (source, target))
    payloads = {name: payload for _, name, payload in before}
    changed = [name for _, name, payload in after if payloads.get(name) != payload]
    images = [name for name in payloads if name.endswith(".jpg")]
    if sorted(name for _, name, _ in after) != sorted(payloads) or not set(images) <= {*changed}:
        raise One4AllError(f"not all that is in {source} was protected into {target}")
    return {
        "names of shards": {shard for shard, _, _ in before} == {shard for shard, _, _ in after},
        "what is in which shard": {m[:2] for m in before} == {m[:2] for m in after},
        "order": [name for _, name, _ in before] == [name for _, name, _ in after],
        "sidecars": sorted(changed) == sorted(images),
    }


def _members(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    """Name of the shard, name and payload of each member, in order."""
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as shard:
            for member in shard:
                if (file := shard.extractfile(member)) is not None:
                    yield path.name, member.name, file.read()


def _alone(source: str, num_threads: int) -> dict[str, float]:
    """Images/s of the two halves of the work without the other: what bounds everybody."""
    torch.set_num_threads(num_threads)
    protector, storage = Protector.load(DEFAULT_PROTECTOR), open_storage(source)
    unit = next(iter(list_units(storage)))
    files = [m.payload for sample in read_samples(storage, unit) for m in images_of(sample)]
    size, levels = protector.card.working_size, protector.card.epsilon_levels
    working = [working_copy(decode(file).pixels, size) for file in files]
    batches = [np.stack(working[i : i + BATCH_SIZE]) for i in range(0, len(files), BATCH_SIZE)]
    delta = protector.perturb(batches[0])[0]

    def codecs(file: bytes) -> None:
        clean = decode(file)
        working_copy(clean.pixels, size)
        pixels = protector.apply(clean.pixels, delta)
        recode(
            clean,
            pixels,
            output_format="match",
            epsilon_levels=levels,
            max_pixels=DEFAULT_MAX_PIXELS,
        )

    start = time.perf_counter()
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(codecs, files))
    middle = time.perf_counter()
    for batch in batches:
        protector.perturb(batch)
    end = time.perf_counter()
    return {"codecs": len(files) / (middle - start), "encoders": len(files) / (end - middle)}
