"""Our codebook among the compared methods: fitted on a labelled corpus whose labels it never reads.

It makes the protector that `one4all fit` would make of the same images, with one difference: the
encoder sees them at their own size, and not at its input size, to which it resizes them itself.
For photos of 224 pixels, which is the default, both are the same.

Source: ours (docs/method.md, "Codebooks").
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from one4all.concepts import ConceptBank
from one4all.encoders import EncoderConfig, load_encoder
from one4all.evaluation.label_clusters import cluster_purity
from one4all.evaluation.labelled import LabelledImages
from one4all.evaluation.methods.base import OnFitProgress, check_epsilon, silent
from one4all.evaluation.methods.embeddings import encode_corpus
from one4all.evaluation.methods.protectors import SMALLEST_WORKING_SIZE, FittedProtector
from one4all.perturbation import DEFAULT_EPSILON_LEVELS
from one4all.protectors.codebook import fit_codebook, name_codebook
from one4all.protectors.config import DEFAULT_CODEBOOK, DEFAULT_ENCODER, CodebookConfig
from one4all.protectors.protector import Protector


class CodebookMethodConfig(BaseModel):
    """Settings of a codebook, as for `one4all fit`.

    Attributes:
        encoder: Encoder whose embeddings are clustered.
        codebook: Number of patterns, and their shape.
        vocabulary: Name or path: the codebook is of its names and sees no image. "" fits it to the
            images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder: EncoderConfig = DEFAULT_ENCODER
    codebook: CodebookConfig = DEFAULT_CODEBOOK
    vocabulary: str = ""


PRESETS: dict[str, CodebookMethodConfig] = {
    "default": CodebookMethodConfig(),
    "names": CodebookMethodConfig(vocabulary="imagenet1k"),  # what ships as "default"
    # For pictures of 32 to 64 pixels, of which a larger input shows no more.
    "small": CodebookMethodConfig(encoder=DEFAULT_ENCODER.model_copy(update={"input_size": 128})),
}


def fit(
    images: LabelledImages,
    config: CodebookMethodConfig,
    *,
    epsilon_levels: int = DEFAULT_EPSILON_LEVELS,
    seed: int,
    on_progress: OnFitProgress = silent,
    device: str = "cpu",
) -> FittedProtector:
    """Fit a codebook.

    Args:
        images: Clean images; their labels only measure the purity in the card.
        config: Concepts and patterns.
        epsilon_levels: Budget.
        seed: Seed of clusters and patterns.
        on_progress: See `OnFitProgress`.
        device: PyTorch device on which images are encoded.

    Raises:
        UsageError: More concepts than images, or than names; or the budget is out of range.
        ConfigError: No such vocabulary.
    """
    check_epsilon(epsilon_levels)
    encoder = load_encoder(config.encoder)
    features = encode_corpus(
        encoder,
        images,
        torch.device(device),
        on_share=lambda share: on_progress(0.9 * share, "encoding"),
    )
    bank = ConceptBank.build(config.vocabulary, encoder) if config.vocabulary else None
    if bank:
        codebook = name_codebook(bank.embeddings, config.codebook, seed=seed)
    else:
        codebook, _ = fit_codebook(features, config.codebook, seed=seed)
    concepts = codebook.concepts(features).numpy().astype(np.int32)
    purity = cluster_purity(concepts, images.labels_N)
    on_progress(1.0, f"{codebook.config.num_concepts} concepts, purity {purity:.2f}")
    protector = Protector.assemble(
        config.encoder,
        encoder,
        codebook,
        name="codebook",
        working_size=max(images.size, SMALLEST_WORKING_SIZE),
        config=codebook.config,
        epsilon_levels=epsilon_levels,
        bank=bank,
        training={"num_images": len(images), "seed": seed, "purity": purity},
    )
    return FittedProtector(protector)
