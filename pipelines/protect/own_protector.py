"""The protector of a destination's own: fitted to a sample of its corpus, and kept below it.

It is what `one4all protect` uses when it is told no other. Whatever arrives in the corpus later is
protected by the same one, and so is everything if a later version of one4all ships another.

    _one4all/protectors/<hash>/card.json, generator.safetensors, concepts.png
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from one4all.corpus import images_of, list_units, read_samples
from one4all.errors import NotFoundError, ProtectorError, ShardError, UsageError
from one4all.ledger import Binding
from one4all.protectors.card import (
    CARD,
    DEFAULT_PROTECTOR,
    WEIGHTS,
    ProtectorCard,
    load_card,
    read_part,
)
from one4all.protectors.config import STRENGTHS, CodebookConfig
from one4all.storage import INTERNAL, Storage
from pipelines.protect.config import DEFAULT_STRENGTH, ProtectConfig
from pipelines.ray_session import ray_session, uses_ray

NAME = "fitted"
FEWEST_IMAGES = 200  # in a sample; clusters of fewer say little
_PROTECTORS = f"{INTERNAL}protectors/"

OnFit = Callable[[str, int], None]
"""Receives a sentence, or "", and how many shards are to be read, or 0 for one that is done."""


def find_own(destination: Storage, bound_to: Binding) -> str:
    """URI of the protector of its own that a destination is bound to.

    Returns:
        The name of the shipped one, if it has none of its own: it may be bound to that.
    """
    place = _place(destination, bound_to.protector_sha256)
    try:
        load_card(place)
    except ProtectorError:
        return DEFAULT_PROTECTOR
    return place


def own_protector(
    source: Storage,
    destination: Storage,
    bound_to: Binding | None,
    config: ProtectConfig,
    session: ExitStack,
    on_fit: OnFit,
) -> str:
    """Place of a destination's own protector, which is made if the destination is bound to nothing.

    Args:
        source: Corpus.
        destination: Where it is kept, and looked for.
        bound_to: What the destination is bound to.
        config: Its ``strength``, and the size of the sample.
        session: Enters a Ray session, if there is something to fit by Ray; the caller goes on in
            it.
        on_fit: See `OnFit`.

    Raises:
        UsageError: The destination's own has another strength.
    """
    if bound_to:
        place = find_own(destination, bound_to)
        if config.strength:
            _refuse_another_strength(load_card(place), config.strength)
        return place
    with tempfile.TemporaryDirectory(prefix="one4all-fit-") as scratch:
        folder = Path(scratch) / NAME
        folder.mkdir()
        card = _fit(source, folder, config, session, on_fit)
        if card is None:
            card = _shipped(folder, config.strength or DEFAULT_STRENGTH)
        # The card goes last: a folder with a card is whole.
        for path in sorted(folder.iterdir(), key=lambda path: path.name == CARD):
            key = f"{_PROTECTORS}{card.content_hash}/{path.name}"
            destination.write_bytes(key, path.read_bytes())
    return _place(destination, card.content_hash)


def _place(destination: Storage, content_hash: str) -> str:
    return f"{destination.uri.rstrip('/')}/{_PROTECTORS}{content_hash}"


def _fit(
    source: Storage, folder: Path, config: ProtectConfig, session: ExitStack, on_fit: OnFit
) -> ProtectorCard | None:
    """Fit a codebook into a folder; None if it is not wanted, or the corpus too small."""
    if not config.fit_images:
        return None
    from pipelines.fit import FitConfig, fit  # it computes here, with PyTorch

    count = _count_images(source, config)
    if count >= FEWEST_IMAGES:
        on_fit("no protector is named: one is fitted to a sample of the corpus, once", 0)
        if uses_ray(config.runner, config.ray):
            session.enter_context(ray_session(config.ray))
        settings = FitConfig(
            source=(source.uri,),
            container=config.container,
            output=str(folder),
            codebook=CodebookConfig(pattern=STRENGTHS[config.strength or DEFAULT_STRENGTH]),
            num_images=config.fit_images,
            encoder_backend=config.encoder_backend,
            max_image_pixels=config.max_image_pixels,
            sidecar_patterns=config.sidecar_patterns,
            runner=config.runner,
            ray=config.ray,
        )
        try:
            found = fit(
                settings,
                command=f"one4all protect {source.uri}",
                on_plan=lambda num_shards: on_fit("", num_shards),
                on_shard=lambda name: on_fit("", 0),
                on_group=lambda count: on_fit(f"finding kinds among {count:,} images", 0),
            )
        except UsageError as error:  # of images that cannot be read
            on_fit(f"none could be fitted: {error}; takes the shipped one", 0)
            return None
        concepts = len(found.sizes_K)
        on_fit(f"fitted to {found.num_images:,} images, with {concepts} concepts", 0)
        return found.card
    on_fit(
        f"no protector is named, and a corpus of {count} is too small to fit one to (it takes "
        f"{FEWEST_IMAGES} images): takes the shipped one, which protects less",
        0,
    )
    return None


def _count_images(source: Storage, config: ProtectConfig) -> int:
    """Images of a corpus; counting ends when they are enough."""
    count = 0
    for unit in list_units(source, config.container):
        try:
            for sample in read_samples(source, unit, config.read_options):
                count += len(images_of(sample, config.sidecar_patterns))
                if count >= FEWEST_IMAGES:
                    return count
        except (ShardError, NotFoundError):
            continue  # the run will say what is wrong with it
    return count


def _shipped(folder: Path, strength: str) -> ProtectorCard:
    """The shipped codebook in a strength."""
    card = load_card(DEFAULT_PROTECTOR).with_strength(strength)
    (folder / WEIGHTS).write_bytes(read_part(DEFAULT_PROTECTOR, WEIGHTS))
    (folder / CARD).write_text(card.model_dump_json(indent=2) + "\n", "utf-8")
    return card


def _refuse_another_strength(card: ProtectorCard, strength: str) -> None:
    look = getattr(card.generator, "pattern", None)
    if look != STRENGTHS[strength]:
        bound = next((name for name, known in STRENGTHS.items() if known == look), "another")
        raise UsageError(
            f"this destination is protected with strength {bound}, and strength {strength} was "
            "asked for; leave --strength out, or give another destination"
        )
