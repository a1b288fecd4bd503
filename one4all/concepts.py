"""Concept vocabularies, and the bank of their text embeddings.

A vocabulary is a text file, one concept a line; ``#`` starts a comment, blank lines are skipped.
Shipped: ``imagenet1k`` (1,000 names) and ``broad`` (a few dozen everyday concepts).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from one4all.encoders import Encoder
from one4all.errors import ConfigError

_SHIPPED = files("one4all") / "assets" / "vocabularies"


@dataclass(frozen=True)
class ConceptBank:
    """Text embeddings of a vocabulary under one encoder.

    Attributes:
        vocabulary: Name or path it was loaded from.
        concepts: The N concepts.
        templates: Prompt templates; embeddings are averaged over them and normalised again.
        embeddings: float (N, D), L2-normalised.
        hash: Digest of concepts, templates and the encoder's content: the bank's identity.
    """

    vocabulary: str
    concepts: tuple[str, ...]
    templates: tuple[str, ...]
    embeddings: Tensor
    hash: str

    @classmethod
    def build(
        cls, vocabulary: str, encoder: Encoder, *, templates: tuple[str, ...] = ()
    ) -> ConceptBank:
        """Embed a vocabulary.

        Args:
            vocabulary: Name of a shipped vocabulary, or path of a text file.
            encoder: Frozen encoder.
            templates: Prompts with one ``{}``; empty means the encoder's own.

        Raises:
            ConfigError: Unknown vocabulary, or a template without ``{}``.
        """
        templates = templates or encoder.templates
        for template in templates:
            if template.count("{}") != 1:
                raise ConfigError(f"prompt template {template!r} must contain {{}} exactly once")
        concepts = load_vocabulary(vocabulary)
        with torch.no_grad():
            embeddings = torch.stack(
                [encoder.encode_text([t.format(c) for c in concepts]) for t in templates]
            ).mean(dim=0)
        identity = json.dumps([concepts, templates, encoder.content_hash()])
        return cls(
            vocabulary=vocabulary,
            concepts=concepts,
            templates=templates,
            embeddings=F.normalize(embeddings, dim=1),
            hash=hashlib.sha256(identity.encode()).hexdigest(),
        )


def load_vocabulary(vocabulary: str) -> tuple[str, ...]:
    """The concepts of a shipped vocabulary or of a text file, in order.

    Raises:
        ConfigError: Unknown, empty, or with a concept listed twice.
    """
    shipped = _SHIPPED / f"{vocabulary}.txt"
    path = Path(vocabulary)
    if "/" not in vocabulary and shipped.is_file():
        text = shipped.read_text("utf-8")
    elif path.is_file():
        text = path.read_text("utf-8")
    else:
        raise ConfigError(
            f"no vocabulary {vocabulary!r}: give a text file or one of "
            f"{', '.join(shipped_vocabularies())}"
        )
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    concepts = tuple(line for line in lines if line)
    if not concepts:
        raise ConfigError(f"vocabulary {vocabulary!r} lists no concept")
    doubled = sorted({concept for concept in concepts if concepts.count(concept) > 1})
    if doubled:
        raise ConfigError(f"vocabulary {vocabulary!r} lists {doubled[0]!r} more than once")
    return concepts


def shipped_vocabularies() -> list[str]:
    """Names of the vocabularies inside the package."""
    return sorted(entry.name.removesuffix(".txt") for entry in _SHIPPED.iterdir())
