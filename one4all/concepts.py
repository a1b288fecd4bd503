"""Concept vocabularies, and the bank of their text embeddings.

A vocabulary is a text file, one concept a line; ``#`` starts a comment, blank lines are skipped.
Shipped: ``imagenet1k`` (1,000 names) and ``broad`` (a few dozen everyday concepts).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from one4all.encoders import Encoder
from one4all.errors import ConfigError
from one4all.vocabularies import load_vocabulary


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
