"""Fit a codebook: to a sample of a corpus's images, or to the names of a vocabulary.

No labels and no training; the result is a protector folder like any other. Images that arrive later
are protected by it as they are: they get the rows of the concepts that they are like.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from one4all.concepts import ConceptBank
from one4all.corpus import Unit, images_of, open_corpora, read_samples
from one4all.encoders import EncoderConfig, load_encoder
from one4all.encoders.backends import load_backend
from one4all.encoders.base import Encoder
from one4all.encoders.config import BackendName
from one4all.errors import BadImageError, NotFoundError, One4AllError, ShardError, UsageError
from one4all.fitting import Embeddings
from one4all.images import DEFAULT_MAX_PIXELS, Pixels, decode, working_copy
from one4all.perturbation import DEFAULT_EPSILON_LEVELS
from one4all.protectors.card import ProtectorCard
from one4all.protectors.codebook import Codebook, check_num_concepts, fit_codebook, name_codebook
from one4all.protectors.config import DEFAULT_CODEBOOK, DEFAULT_ENCODER, CodebookConfig
from one4all.protectors.pattern import paint
from one4all.protectors.protector import Protector
from one4all.report import sample_grid, to_png
from one4all.storage import Storage, open_storage
from one4all.text import shown
from one4all.vocabularies import load_vocabulary
from pipelines.local_machine import share_out
from pipelines.local_pool import LocalPool, Lost
from pipelines.placement import await_room, watched_start
from pipelines.ray_session import ray_session, uses_ray, worker_layout
from pipelines.settings import JobConfig, RayConfig, RunnerName, absolute_weights

PICTURE = "concepts.png"
VOCABULARY = "vocabulary:"
_BATCH = 32
_THUMBNAIL = 64  # pixels
_THUMBNAILS = 3000  # of all shards; a picture of concepts needs no more
_COLUMNS, _ROWS = 16, 8
_NAMED = 10  # damaged shards, at most, in an error
_FEWEST_PER_SHARD = 64
_MAX_DEATHS = 3  # of workers, over one shard


class FitConfig(JobConfig):
    """`one4all fit`.

    Attributes:
        source: Corpus of WebDataset shards, Parquet files or loose images, folder or s3://; or
            several, as a list or separated by commas; or ``vocabulary:NAME``, for a codebook that
            sees no image.
        container: What the corpus is made of, as for protect; empty to find out.
        output: Protector folder or s3:// prefix to write.
        encoder: Encoder whose embeddings are clustered; docs/results.md was measured at 224
            pixels.
        encoder_backend: What computes them, as for protect.
        codebook: Number of patterns, and their shape.
        epsilon_levels: Budget.
        num_images: About so many images are looked at, evenly over the shards.
        images_per_shard: At most so many of one shard, drawn evenly from it; bounds memory.
        max_image_pixels: Larger images are left out.
        sidecar_patterns: Images of samples that are no photos, such as ``*.seg.png``; left out.
        seed: Seed of the drawn images, the clusters and the patterns.
        runner: Where the images are looked at, as for protect.
        num_workers: Tasks at once; 0 means as many as CPUs or GPUs allow.
        cpus_per_worker, gpus_per_worker: Of a task; below 0 GPUs means 1 if there is any.
    """

    source: str | tuple[str, ...] = ""
    container: str = ""
    output: str = "protector"
    encoder: EncoderConfig = DEFAULT_ENCODER
    encoder_backend: BackendName = "auto"
    codebook: CodebookConfig = DEFAULT_CODEBOOK
    epsilon_levels: Annotated[int, Field(ge=1, le=255)] = DEFAULT_EPSILON_LEVELS
    num_images: Annotated[int, Field(ge=2)] = 20_000
    images_per_shard: Annotated[int, Field(ge=1, le=10_000)] = 1000
    max_image_pixels: Annotated[int, Field(ge=1)] = DEFAULT_MAX_PIXELS
    sidecar_patterns: tuple[str, ...] = ()
    seed: int = 0
    runner: RunnerName = "auto"
    num_workers: Annotated[int, Field(ge=0)] = 0
    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    gpus_per_worker: float = -1
    ray: RayConfig = RayConfig()

    @property
    def vocabulary(self) -> str:
        """Name of the vocabulary that is the source; "" if corpora are."""
        named = isinstance(self.source, str) and self.source.startswith(VOCABULARY)
        return str(self.source).removeprefix(VOCABULARY) if named else ""


@dataclass(frozen=True)
class Fit:
    """What was fitted.

    Attributes:
        card: Of the protector.
        num_images: Looked at; 0 for a vocabulary.
        num_bad: Images that could not be read, and were left out.
        sizes_K: Images, or names, of each pattern.
        bad_shards: Shards that could not be read to their end, or were gone, and were left out as a
            whole, with the reason.
    """

    card: ProtectorCard
    num_images: int
    num_bad: int
    sizes_K: tuple[int, ...]
    bad_shards: dict[str, str] = field(default_factory=dict)


def fit(
    config: FitConfig,
    *,
    command: str = "",
    on_plan: Callable[[int], None] = lambda num_shards: None,
    on_shard: Callable[[str], None] = lambda name: None,
    on_group: Callable[[int], None] = lambda num_images: None,
) -> Fit:
    """Fit a codebook and write its protector.

    Args:
        config: See there.
        command: Recorded in the card.
        on_plan: Called once with the number of shards that will be read.
        on_shard: Called with the name of each shard as it is done.
        on_group: Called with the number of images before kinds are found among them, which takes
            half a minute for 20,000.

    Raises:
        UsageError: No source, or too few readable images or names for so many concepts.
        ConfigError: No such vocabulary.
        One4AllError: The source cannot be read, the output not written, or a worker was lost.
    """
    if not config.source:
        raise UsageError(
            "fit needs a source: a folder or s3:// prefix of WebDataset shards, or "
            f"{VOCABULARY}NAME"
        )
    config = config.model_copy(update={"encoder": absolute_weights(config.encoder)})
    output = open_storage(config.output)
    output.check(writable=True)
    if config.vocabulary:
        return _fit_names(config, output, command)
    parts = _choose_parts(config)
    on_plan(len(parts))
    found = sorted(_embed_all(parts, config, on_shard), key=lambda part: part.unit)
    embeddings_ND = torch.from_numpy(np.concatenate([part.embeddings for part in found]))
    bad_shards = {part.unit: part.error for part in found if part.error}
    on_group(len(embeddings_ND))
    try:
        codebook, concepts_N = fit_codebook(embeddings_ND, config.codebook, seed=config.seed)
    except UsageError as error:
        lines = [f"left out: {name}: {why}" for name, why in islice(bad_shards.items(), _NAMED)]
        raise UsageError("\n  ".join([str(error), *lines])) from error
    num_bad = sum(part.num_bad for part in found)
    facts = {"num_images": len(embeddings_ND), "num_bad": num_bad, "command": command}
    card = _publish(codebook, load_encoder(config.encoder), config, output, facts)
    output.write_bytes(PICTURE, _picture(found, concepts_N, codebook))
    sizes = torch.bincount(concepts_N, minlength=codebook.config.num_concepts)
    return Fit(card, len(embeddings_ND), num_bad, tuple(sizes.tolist()), bad_shards)


def _fit_names(config: FitConfig, output: Storage, command: str) -> Fit:
    vocabulary = config.vocabulary
    check_num_concepts(len(load_vocabulary(vocabulary)))
    encoder = load_encoder(config.encoder)
    bank = ConceptBank.build(vocabulary, encoder)
    codebook = name_codebook(bank.embeddings, config.codebook, seed=config.seed)
    _, sizes = np.unique(codebook.bits_Kb.numpy(), axis=0, return_counts=True)
    card = _publish(codebook, encoder, config, output, {"command": command}, bank)
    return Fit(card, 0, 0, tuple(sizes.tolist()))


def _publish(
    codebook: Codebook,
    encoder: Encoder,
    config: FitConfig,
    output: Storage,
    facts: dict[str, Any],
    bank: ConceptBank | None = None,
) -> ProtectorCard:
    protector = Protector.assemble(
        config.encoder,
        encoder,
        codebook,
        name=Path(config.output.rstrip("/")).name,
        working_size=encoder.input_size,
        config=codebook.config,
        epsilon_levels=config.epsilon_levels,
        bank=bank,
        training={"source": config.source, "seed": config.seed, **facts},
    )
    return protector.publish(output)


@dataclass(frozen=True)
class _Part:
    """A unit to read, and how much to take of it."""

    uri: str
    unit: Unit
    num_images: int
    num_thumbnails: int


def _choose_parts(config: FitConfig) -> list[_Part]:
    """Units to read, evenly over the corpus."""
    sources = config.source.split(",") if isinstance(config.source, str) else config.source
    listed = open_corpora(sources, config.container)
    count = min(len(listed), max(1, config.num_images // _FEWEST_PER_SHARD))
    images = min(config.images_per_shard, -(-config.num_images // count))
    thumbnails = -(-_THUMBNAILS // count)
    chosen = (listed[i * len(listed) // count] for i in range(count))
    return [_Part(uri, unit, images, thumbnails) for uri, unit in chosen]


def _embed_all(
    parts: list[_Part], config: FitConfig, on_shard: Callable[[str], None]
) -> Iterator[PartEmbeddings]:
    embed = _embed_by_ray if uses_ray(config.runner, config.ray) else _embed_here
    for found in embed(parts, config):
        on_shard(found.unit)
        yield found


def _embed_here(parts: list[_Part], config: FitConfig) -> Iterator[PartEmbeddings]:
    shares = share_out(
        config.num_workers,
        config.cpus_per_worker,
        config.gpus_per_worker,
        num_cpus=config.ray.num_cpus,
    )
    pool: LocalPool[_Part, PartEmbeddings] = LocalPool(
        partial(_start_embedder, config.model_dump_json()),
        [share.environment for share in shares],
        max_deaths=_MAX_DEATHS,
    )
    with pool:
        for part, found in pool.run(parts):
            if isinstance(found, Lost):
                raise One4AllError(f"fit stopped at {part.unit.name}: {found.reason}")
            yield found


def _start_embedder(config: str) -> Callable[[_Part], PartEmbeddings]:
    return PartEmbedder(config).embed


def _embed_by_ray(parts: list[_Part], config: FitConfig) -> Iterator[PartEmbeddings]:
    with ray_session(config.ray):
        import ray
        from ray.exceptions import RayError

        workers, cpus, gpus = worker_layout(
            config.num_workers, config.cpus_per_worker, config.gpus_per_worker
        )
        await_room(config.ray, cpus=cpus, gpus=gpus)
        actor: Any = ray.remote(num_cpus=cpus, num_gpus=gpus)(PartEmbedder)
        actors = [actor.remote(config.model_dump_json()) for _ in range(min(workers, len(parts)))]
        pool = ray.util.ActorPool(actors)
        try:
            with watched_start(PartEmbedder.__name__, cpus=cpus, gpus=gpus):
                yield from pool.map_unordered(lambda a, part: a.embed.remote(part), parts)
        except RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, One4AllError):
                raise cause from None
            reason = str(cause or error).strip().splitlines()[-1]
            raise One4AllError(f"fit stopped: {reason}") from error


@dataclass(frozen=True)
class PartEmbeddings:
    """What was seen of one unit.

    Attributes:
        unit: URI and name of the unit.
        embeddings: float32 (n, D), in the order of the unit.
        thumbnails: (64, 64, 3) uint8 each, of the first of these images.
        num_bad: Images that were drawn and could not be read.
        error: Why nothing of a damaged unit was taken.
    """

    unit: str
    embeddings: Embeddings
    thumbnails: list[Pixels]
    num_bad: int = 0
    error: str = ""


class PartEmbedder:
    """Embeds a sample of each unit; the encoder is loaded once.

    Args:
        config: `FitConfig` as JSON.
    """

    def __init__(self, config: str) -> None:
        self._config = FitConfig.model_validate_json(config)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self._device.type == "cpu":
            torch.set_num_threads(self._config.cpus_per_worker)
        self._encoder: Encoder = load_encoder(self._config.encoder)
        self._encoder.to(self._device)
        backend = self._config.encoder_backend
        self._backend = load_backend(self._encoder, backend, device=self._device)

    def embed(self, part: _Part) -> PartEmbeddings:
        """Embeddings and thumbnails of one unit; a damaged one is a finding, not an exception."""
        name = f"{part.uri}/{part.unit.name}"
        empty = np.zeros((0, self._encoder.embedding_dim), np.float32)
        try:
            drawn = self._draw(part)
        except (ShardError, NotFoundError) as damage:
            return PartEmbeddings(name, empty, [], error=str(damage))
        working = [pixels for pixels in map(self._working_copy, drawn) if pixels is not None]
        found = [
            self._backend.embed(np.stack(working[start : start + _BATCH])).cpu().numpy()
            for start in range(0, len(working), _BATCH)
        ]
        return PartEmbeddings(
            name,
            np.concatenate([empty, *found]),
            [working_copy(pixels, _THUMBNAIL) for pixels in working[: part.num_thumbnails]],
            num_bad=len(drawn) - len(working),
        )

    def _draw(self, part: _Part) -> list[bytes]:
        """Image files drawn evenly from a unit, in its order; all if it holds no more."""
        name = part.unit.name.encode("utf-8", "surrogateescape")
        random = np.random.default_rng([self._config.seed, *name])
        kept: list[tuple[int, bytes]] = []
        number = 0
        for sample in read_samples(open_storage(part.uri), part.unit):
            for member in images_of(sample, self._config.sidecar_patterns):
                number += 1
                if len(kept) < part.num_images:
                    kept.append((number, member.payload))
                elif (place := int(random.integers(number))) < part.num_images:
                    kept[place] = (number, member.payload)
        return [payload for _, payload in sorted(kept)]

    def _working_copy(self, payload: bytes) -> Pixels | None:
        try:
            pixels = decode(payload, max_pixels=self._config.max_image_pixels).pixels
        except BadImageError:
            return None
        return working_copy(pixels, self._encoder.input_size)


def _picture(found: list[PartEmbeddings], concepts_N: Tensor, codebook: Codebook) -> bytes:
    """PNG of the largest concepts: a column each, its pattern above images of it."""
    examples: dict[int, list[Pixels]] = {}
    start = 0
    for part in found:
        concepts = concepts_N[start : start + len(part.thumbnails)].tolist()
        for concept, thumbnail in zip(concepts, part.thumbnails, strict=True):
            examples.setdefault(concept, []).append(thumbnail)
        start += len(part.embeddings)
    largest = sorted(examples, key=lambda concept: -len(examples[concept]))[:_COLUMNS]
    num_rows = min(_ROWS, min(len(examples[concept]) for concept in largest))
    # Hard and strong, whatever they look like on photos: here they shall be seen.
    colours_KChw = paint(codebook.bits_Kb, codebook.config.pattern.hard())
    patterns = np.rint(127.5 * (1 + colours_KChw.permute(0, 2, 3, 1).numpy())).astype(np.uint8)
    return to_png(
        sample_grid(
            [
                (f"concept {concept}", [patterns[concept], *examples[concept][:num_rows]])
                for concept in largest
            ],
            tile=_THUMBNAIL,
        )
    )


def describe(result: Fit, config: FitConfig) -> str:
    """What was fitted and how to use it, in lines."""
    bad = f", {result.num_bad} could not be read" if result.num_bad else ""
    kind = f"concepts of {result.num_images} images{bad}"
    if not result.num_images:
        kind = "patterns of names"
    look = f"; {PICTURE} there shows its concepts" if result.num_images else ""
    left_out = (
        f"  left out: {shown(f'{name}: {why}')}\n" for name, why in result.bad_shards.items()
    )
    return (
        f"{len(result.sizes_K)} {kind}; the smallest has {min(result.sizes_K)}, "
        f"the largest {max(result.sizes_K)}\n"
        + "".join(left_out)
        + f"protector {result.card.content_hash[:12]} written to {config.output}{look}\n"
        f"  one4all protect SOURCE DESTINATION --protector {shlex.quote(config.output)}"
    )
