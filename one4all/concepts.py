"""Concept vocabularies, and the bank of their text embeddings.

A vocabulary is a text file, one concept a line; ``#`` starts a comment, blank lines are skipped.
Shipped: ``imagenet1k`` (1,000 names) and ``broad`` (a few dozen everyday concepts).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from one4all.encoders.base import Encoder
from one4all.errors import ConfigError
from one4all.vocabularies import load_vocabulary

_METADATA = "concepts"  # key in the file


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
        cls,
        vocabulary: str,
        encoder: Encoder,
        *,
        templates: tuple[str, ...] = (),
        known: ConceptBank | None = None,
    ) -> ConceptBank:
        """Embed a vocabulary.

        Args:
            vocabulary: Name of a shipped vocabulary, or path of a text file.
            encoder: Frozen encoder.
            templates: Prompts with one ``{}``; empty means the encoder's own.
            known: A bank from before, which is taken if it is the same: embedding a thousand
                prompts takes a large encoder a minute and more.

        Raises:
            ConfigError: Unknown vocabulary, or a template without ``{}``.
        """
        templates = templates or encoder.templates
        for template in templates:
            if template.count("{}") != 1:
                raise ConfigError(f"prompt template {template!r} must contain {{}} exactly once")
        concepts = load_vocabulary(vocabulary)
        identity = json.dumps([concepts, templates, encoder.content_hash()])
        digest = hashlib.sha256(identity.encode()).hexdigest()
        if known is not None and known.hash == digest:
            return replace(known, vocabulary=vocabulary)
        with torch.no_grad():
            embeddings = torch.stack(
                [encoder.encode_text([t.format(c) for c in concepts]) for t in templates]
            ).mean(dim=0)
        return cls(
            vocabulary=vocabulary,
            concepts=concepts,
            templates=templates,
            embeddings=F.normalize(embeddings, dim=1),
            hash=digest,
        )

    def to_bytes(self) -> bytes:
        """The bank as a safetensors file."""
        told = [self.vocabulary, self.concepts, self.templates, self.hash]
        embeddings = self.embeddings.detach().cpu().contiguous()
        return save({"embeddings": embeddings}, {_METADATA: json.dumps(told)})

    @classmethod
    def from_bytes(cls, data: bytes) -> ConceptBank:
        """The inverse of `to_bytes`.

        Raises:
            ConfigError: It is no such file.
        """
        try:
            length = int.from_bytes(data[:8], "little")
            told = json.loads(data[8 : 8 + length])["__metadata__"][_METADATA]
            vocabulary, concepts, templates, digest = json.loads(told)
            embeddings = load(data)["embeddings"]
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"no bank of concepts: {error}") from error
        return cls(vocabulary, tuple(concepts), tuple(templates), embeddings, digest)
