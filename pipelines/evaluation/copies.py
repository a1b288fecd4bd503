"""Data sets and their protected copies, as an evaluation needs them: labelled, in memory, one size.

Shape suffixes: N images, H W image, C channels or classes, D embedding.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from one4all.corpus.packing import LabelledImage, open_corpus, pack
from one4all.encoders import EncoderConfig, load_encoder
from one4all.errors import UsageError
from one4all.evaluation.labelled import LabelledImages, read_corpus, read_labelled
from one4all.evaluation.methods import FittedMethod, Savable
from one4all.evaluation.methods.base import OnFitProgress, silent
from one4all.evaluation.methods.embeddings import kept_in
from one4all.report import to_png
from one4all.storage import open_storage
from pipelines.evaluation.trials import (
    Copy,
    DataConfig,
    EvaluateConfig,
    MethodConfig,
    all_trials,
)

_log = logging.getLogger(__name__)


def load_data(config: DataConfig, split: str) -> LabelledImages:
    """One split of a data set, "train" or "test", at the size at which it is protected.

    Raises:
        UsageError: It is not there, or cannot be read.
    """
    limit = config.max_train if split == "train" else 0
    size = config.protect_size or config.size
    if config.source:
        images = open_corpus(
            config.source,
            split="train" if split == "train" else "test",
            labels=config.granularity,
            root=Path(config.root) if config.root else None,
        )
        found = read_corpus(images, config.source, size=size, max_images=limit)
    else:
        uri = config.train if split == "train" else config.test
        open_storage(uri).check(writable=False)
        found = read_labelled(
            uri, size=size, max_images=limit, sidecar_patterns=config.sidecar_patterns
        )
    return replace(found, class_names=config.class_names or found.class_names)


def make_copy(
    clean: LabelledImages,
    fit_on: LabelledImages | None,
    method: MethodConfig,
    *,
    epsilon_levels: int,
    cache: Path | None = None,
    embeddings: Path | None = None,
    on_progress: OnFitProgress = silent,
) -> LabelledImages:
    """Protect a data set.

    Args:
        clean: The data set.
        fit_on: Where to fit a method that needs it; None fits it on ``clean``.
        method: What to protect with.
        epsilon_levels: Budget.
        cache: Folder that holds the fitted method, or will if its fit takes time. That of a
            codebook is a protector folder.
        embeddings: Folder of embeddings of images, which methods share.
        on_progress: See `OnFitProgress`.

    Returns:
        Same labels and order; within the budget if the method claims to be.

    Raises:
        One4AllError: What the method is made of is not there, or does not suit the data set.
    """
    corpus = clean if fit_on is None else fit_on
    with kept_in(embeddings):
        fitted = _fitted(corpus, method, epsilon_levels, cache, on_progress)
        on_progress(1.0, "protecting")
        return fitted.protect(clean, own=fit_on is None, seed=method.seed)


def _fitted(
    images: LabelledImages,
    method: MethodConfig,
    epsilon_levels: int,
    cache: Path | None,
    on_progress: OnFitProgress,
) -> FittedMethod:
    """A method fitted to images, or read from where its fit was kept."""
    known = method.known
    if cache is not None and cache.exists():
        return known.load(cache)
    fitted = known.fit(
        images,
        method.settings,
        epsilon_levels=epsilon_levels,
        seed=method.seed,
        on_progress=on_progress,
    )
    if cache is not None and known.needs_fit and isinstance(fitted, Savable):
        # Whole or not at all: a killed run must not leave half a method.
        cache.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{cache.name}-", dir=cache.parent))
        fitted.save(scratch)
        try:
            scratch.rename(cache)
        except OSError:  # another run was faster, with the same content
            _log.debug("fitted method %s is there already", cache)
    return fitted


def load_copy(copy: Copy, config: EvaluateConfig) -> tuple[LabelledImages, LabelledImages]:
    """The training split of a data set, clean and protected."""
    clean = load_data(copy.data_config, "train")
    fit_on = load_data(copy.fitted_on_config, "train") if copy.fitted_on_config else None
    protected = make_copy(
        clean,
        fit_on,
        copy.method,
        epsilon_levels=copy.epsilon_levels,
        cache=fitted_folder(copy, config),
        embeddings=embeddings_folder(config),
    )
    return clean, protected


def fitted_folder(copy: Copy, config: EvaluateConfig) -> Path | None:
    """Where a fitted method is kept; nowhere if the output is remote."""
    return None if "://" in config.output else Path(config.output) / "fitted" / copy.key


def embeddings_folder(config: EvaluateConfig) -> Path | None:
    """Where embeddings of the data sets are kept; nowhere if the output is remote."""
    return None if "://" in config.output else Path(config.output) / "embeddings"


def mix(copy: LabelledImages, clean: LabelledImages, *, share: float) -> LabelledImages:
    """Protected images for a share of the data set, clean ones for the rest.

    Which ones does not depend on the method, and a larger share contains a smaller one.
    """
    if share == 1:
        return copy
    order = np.random.default_rng(0).permutation(len(clean))
    chosen = order[: round(share * len(clean))]
    images = clean.images_NHWC.copy()
    images[chosen] = copy.images_NHWC[chosen]
    return replace(clean, images_NHWC=images)


def embed_class_names(
    data: str, names: tuple[str, ...], encoder: EncoderConfig
) -> npt.NDArray[np.float32]:
    """Text embeddings of class names, (C, D) float32.

    Raises:
        UsageError: The data set does not say what its classes are called.
    """
    if not names:
        raise UsageError(
            f"data set {data!r} has no class names, which label-agnostic trials cluster; list them "
            f"in data.{data}.class_names"
        )
    loaded = load_encoder(encoder)
    prompts = [template.format(name) for name in names for template in loaded.templates]
    with torch.no_grad():
        rows = loaded.encode_text(prompts).reshape(len(names), len(loaded.templates), -1)
        return torch.nn.functional.normalize(rows.mean(dim=1), dim=1).numpy()


def export_copies(config: EvaluateConfig, destination: str) -> list[str]:
    """Write every copy of an evaluation as a corpus of shards, to be looked at or trained on.

    Images are written without loss at the size at which they are protected, with their labels, by
    the shard writer that `one4all pack` uses, below ``<destination>/<data>/<method>``.

    Returns:
        Where each copy went.

    Raises:
        UsageError: A place holds shards already.
    """
    places = []
    for _, group in groupby(all_trials(config), key=lambda trial: trial.copy.key):
        copy = next(group).copy
        _, protected = load_copy(copy, config)
        place = f"{destination.rstrip('/')}/{copy.data}/{_file_name(copy.method.name)}"
        pack(_as_corpus(protected), open_storage(place), prefix="train")
        places.append(place)
    return places


def _as_corpus(images: LabelledImages) -> Iterator[LabelledImage]:
    names = images.class_names
    for index, (pixels, label) in enumerate(
        zip(images.images_NHWC, images.labels_N.tolist(), strict=True)
    ):
        data = to_png(Image.fromarray(pixels))
        yield LabelledImage(
            f"{index:07d}", data, "png", label, names[label] if names else str(label)
        )


def _file_name(title: str) -> str:
    return "".join(c if c.isalnum() or c in "-._" else "-" for c in title)
