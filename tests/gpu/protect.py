"""What a GPU changes for `protect`: whether it makes the same images, how fast, and what bounds it.

Rows that compile are last: they take minutes, and the time may be over.

Shape suffixes: N images, B batch, D embedding width, h w grid of a perturbation, C channels, b
bits.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice, product
from os import cpu_count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from gpu.record import Figures, Record, peak_memory
from gpu.training import measure_training
from torch import Tensor

from one4all.corpus import images_of, list_units, read_samples
from one4all.images import Pixels, decode, working_copy
from one4all.perturbation import Levels
from one4all.protectors.protector import Protector
from one4all.rewrite import STAGES, RewriteConfig, rewrite_unit
from one4all.storage import open_storage
from pipelines.bench import make_photo_corpus

PROTECTOR = "default"
PARITY, REWRITE = "parity with float32 on the CPU", "rewrite of shards"
AS_SHIPPED = "as shipped"
FLOAT32, BFLOAT16, COMPILED = "float32", "bfloat16", "bfloat16, compiled"
EAGER_MODES = (AS_SHIPPED, FLOAT32, BFLOAT16)
_SAME_LEVELS = 1e-3  # patterns of float32 that differ by less are one pattern


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        shards, images_per_shard, image_size: Crops of photos that are rewritten.
        parity_images: Images that both devices protect.
        parity_batch: Images in one pass there.
        batch_sizes: Images in one pass of the rewrite.
        rounds: Times that a corpus is rewritten.
        passes: Passes of the device alone.
        compiler: Backend of torch.compile; "eager" traces and compiles nothing.
        threads: Threads of the codecs and of the loader.
    """

    shards: int = 8
    images_per_shard: int = 256
    image_size: tuple[int, int] = (500, 375)
    parity_images: int = 200
    parity_batch: int = 64
    batch_sizes: tuple[int, ...] = (8, 64)
    rounds: int = 2
    passes: int = 30
    compiler: str = "inductor"
    threads: int = cpu_count() or 1


TINY = Sizes(2, 3, (80, 60), 3, 2, (2,), 1, 1, "eager", 2)


def run(record: Record, work: Path, *, photos: Path | None, tiny: bool) -> None:
    """Measure all rows.

    Args:
        record: Where they go.
        work: Empty folder.
        photos: Corpus for parity; None takes crops of the embedded photos.
        tiny: See whether it runs.
    """
    sizes = TINY if tiny else Sizes()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if tiny:
        torch.set_num_threads(1)  # others would spin
    corpus = make_photo_corpus(
        work / "crops",
        num_shards=sizes.shards,
        images_per_shard=sizes.images_per_shard,
        size=sizes.image_size,
    )
    images = list(islice(read_photos(str(photos or corpus)), sizes.parity_images))

    @cache
    def reference() -> Protected:
        return protect_all(load(AS_SHIPPED, "cpu", sizes), images, sizes)

    @cache
    def loaded(mode: str) -> Protector:
        return load(mode, device, sizes)

    def parity(mode: str) -> Figures:
        return compare(reference(), protect_all(loaded(mode), images, sizes), images)

    def rewrite(protector: Callable[[], Protector], batch_size: int) -> Figures:
        return measure_rewrite(protector(), corpus, batch_size, work, sizes)

    def rows(modes: tuple[str, ...]) -> None:
        for mode in modes:
            record.measure(PARITY, f"{mode}, {device.type}", partial(parity, mode))
        for mode, batch_size in product(modes, sizes.batch_sizes):
            row = f"{mode}, batches of {batch_size}"
            record.measure(REWRITE, row, partial(rewrite, partial(loaded, mode), batch_size))

    rows(EAGER_MODES)
    largest = sizes.batch_sizes[-1]
    record.measure(
        REWRITE,
        f"codecs alone, batches of {largest}",
        partial(rewrite, lambda: without_device(loaded(AS_SHIPPED)), largest),
    )
    measure_training(record, corpus, device, sizes.threads, tiny=tiny, compiler="")
    rows((COMPILED,))
    measure_training(record, corpus, device, sizes.threads, tiny=tiny, compiler=sizes.compiler)


def load(mode: str, device: torch.device | str, sizes: Sizes) -> Protector:
    """The shipped protector on a device, its encoder computing in one of the modes."""
    protector = Protector.load(PROTECTOR).to(device)
    if mode == AS_SHIPPED:
        return protector
    encoder: Any = protector.encoder
    encode: Callable[[Tensor], Tensor] = encoder.encode_image
    if mode == COMPILED:
        encode = torch.compile(encode, dynamic=False, backend=sizes.compiler)

    def encode_image(image_BCHW: Tensor) -> Tensor:
        """In this mode, whatever the caller has chosen; float32 is no TF32."""
        kind = image_BCHW.device.type
        with (
            torch.autocast(kind, torch.bfloat16, enabled=mode != FLOAT32),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        ):
            return encode(image_BCHW)

    encoder.encode_image = encode_image
    return protector


def without_device(protector: Protector) -> Protector:
    """One with the same perturbation for all: what is left of a rewrite is codecs and writing."""
    size = protector.card.working_size
    one_1hwC = protector.perturb(np.zeros((1, size, size, 3), np.uint8))

    def perturb(working_NHWC: Pixels, *arguments: Any, **options: Any) -> Levels:
        return one_1hwC.repeat(len(working_NHWC), axis=0)

    changed: Any = copy(protector)
    changed.perturb = perturb
    return cast(Protector, changed)


def read_photos(uri: str) -> Iterator[Pixels]:
    """Decoded images of a corpus."""
    storage = open_storage(uri)
    for unit in list_units(storage):
        for sample in read_samples(storage, unit):
            for member in images_of(sample, ()):
                yield decode(member.payload).pixels


# --- parity ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Protected:
    """What a protector made of images: embeddings, codes, perturbations, images."""

    embedding_ND: Tensor
    bits_Nb: npt.NDArray[np.int8]
    deltas_NhwC: Levels
    images: list[Pixels]


def protect_all(protector: Protector, images: list[Pixels], sizes: Sizes) -> Protected:
    """Protect images, in passes of one size."""
    size, batch = protector.card.working_size, sizes.parity_batch
    embedding_ND = protector.embed(images, batch_size=batch)
    device = next(protector.model.buffers()).device
    model: Any = protector.model
    with torch.inference_mode():
        bits_Nb = model.vote(embedding_ND.to(device)).cpu().numpy()
    deltas = []
    for start in range(0, len(images), batch):
        working = np.zeros((batch, size, size, 3), np.uint8)  # full: one shape
        part = images[start : start + batch]
        working[: len(part)] = [working_copy(pixels, size) for pixels in part]
        deltas.append(protector.perturb(working)[: len(part)])
    deltas_NhwC = np.concatenate(deltas)
    with ThreadPoolExecutor(sizes.threads) as pool:
        protected = list(pool.map(protector.apply, images, deltas_NhwC))
    return Protected(embedding_ND, bits_Nb, deltas_NhwC, protected)


def compare(here: Protected, there: Protected, clean: list[Pixels]) -> Figures:
    """How alike two devices protect.

    Returns:
        The largest difference of a value of an embedding; shares of images whose codes, patterns
        and bytes are the same; the largest difference of a pixel's value between the two, and from
        the clean images, in levels.
    """
    apart_N = np.abs(here.deltas_NhwC - there.deltas_NhwC).max(axis=(1, 2, 3))
    pairs = list(zip(here.images, there.images, strict=True))
    between = [int(np.abs(a.astype(int) - b).max()) for a, b in pairs]
    moved = [int(np.abs(a.astype(int) - b).max()) for a, b in zip(there.images, clean, strict=True)]
    return {
        "images": len(clean),
        "embeddings apart": float((here.embedding_ND - there.embedding_ND).abs().max()),
        "same code": float((here.bits_Nb == there.bits_Nb).all(axis=1).mean()),
        "same bits": float((here.bits_Nb == there.bits_Nb).mean()),
        "same pattern": float((apart_N < _SAME_LEVELS).mean()),
        "same bytes": float(np.mean([difference == 0 for difference in between])),
        "most levels between": max(between),
        "most levels from clean": max(moved),
    }


# --- the rewrite of shards ---------------------------------------------------------------------


def measure_rewrite(
    protector: Protector, corpus: str, batch_size: int, work: Path, sizes: Sizes
) -> Figures:
    """Images/s of the rewrite of a corpus, and for how long each stage kept it waiting.

    Returns:
        Images/s of each round; of the last, the seconds of the stages and the stage that bounds it;
        images/s of the device alone, and its peak memory.
    """
    size = protector.card.working_size
    working = np.random.default_rng(0).integers(0, 256, (batch_size, size, size, 3), np.uint8)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(2):  # whatever is chosen or compiled at first
        protector.perturb(working)
    warm_up = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(sizes.passes):  # each brings its result to the CPU, and so has waited for it
        protector.perturb(working)
    device_rate = sizes.passes * batch_size / (time.perf_counter() - start)
    config = RewriteConfig(batch_size=batch_size, batch_pixels=64_000_000)
    source, rates = open_storage(corpus), []
    waited: Counter[str] = Counter()
    with ThreadPoolExecutor(sizes.threads, "codec") as pool:
        for _ in range(sizes.rounds):
            waited.clear()
            with TemporaryDirectory(dir=work) as target:
                destination, count = open_storage(target), 0
                start = time.perf_counter()
                for unit in list_units(source):
                    manifest = rewrite_unit(unit, source, destination, protector, config, pool=pool)
                    count += manifest.num_protected
                    waited.update(manifest.seconds)
                rates.append(count / (time.perf_counter() - start))
    return {
        "images/s": [round(rate, 1) for rate in rates],
        "bound by": max(STAGES, key=lambda stage: waited[stage]),
        "seconds of stages": {stage: round(waited[stage], 3) for stage in STAGES},
        "images": count,
        "device alone, images/s": round(device_rate, 1),
        "warm-up, s": round(warm_up, 2),
        **peak_memory(),
    }
