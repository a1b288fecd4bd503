"""Our codebook among the compared methods: fitted on a labelled corpus whose labels it never reads.

What `one4all fit` writes, in the shape of the other methods, so that the same grids judge it. New
images go to the nearest concept, which is also its transfer rule.

Source: ours (docs/method.md, "Codebooks").
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from one4all.baselines.base import Progress, check_epsilon, make_card, silent
from one4all.baselines.clusters import ClusterWise, encode_corpus
from one4all.clustering import cluster_purity
from one4all.codebook import (
    DEFAULT_CODEBOOK,
    DEFAULT_ENCODER,
    CodebookConfig,
    fit_codebook,
    name_codebook,
)
from one4all.concepts import ConceptBank
from one4all.encoders import Encoder, EncoderConfig, load_encoder
from one4all.labelled import LabelledImages
from one4all.perturbation import DEFAULT_EPSILON_LEVELS


class CodebookMethodConfig(BaseModel):
    """As for `one4all fit`.

    Attributes:
        encoder: Whose embeddings are clustered.
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
    "small": CodebookMethodConfig(encoder=EncoderConfig(input_size=128)),
}


def fit(
    images: LabelledImages,
    config: CodebookMethodConfig,
    *,
    epsilon_levels: int = DEFAULT_EPSILON_LEVELS,
    seed: int,
    on_progress: Progress = silent,
    device: str = "cpu",
    encoder: Encoder | None = None,
) -> ClusterWise:
    """Fit a codebook.

    Args:
        images: Clean images; their labels only measure the purity in the record.
        config: Concepts and patterns.
        epsilon_levels: Budget.
        seed: Of clusters and patterns.
        on_progress: See `Progress`.
        device: PyTorch device.
        encoder: The one that ``config.encoder`` names, if it is loaded already.

    Raises:
        UsageError: More concepts than images, or than names.
        ConfigError: No such vocabulary.
    """
    check_epsilon(epsilon_levels)
    encoder = encoder or load_encoder(config.encoder)
    features = encode_corpus(encoder, images, torch.device(device))
    on_progress(0.9, "encoded")
    if config.vocabulary:
        bank = ConceptBank.build(config.vocabulary, encoder)
        codebook = name_codebook(bank.embeddings, config.codebook, seed=seed)
    else:
        codebook, _ = fit_codebook(features, config.codebook, seed=seed)
    own = codebook.concepts(features).numpy().astype(np.int32)
    patterns = epsilon_levels * codebook.patterns().permute(0, 2, 3, 1).numpy()
    card = make_card(
        ClusterWise,
        "codebook",
        images,
        config,
        epsilon_levels=epsilon_levels,
        seed=seed,
        record={"purity": cluster_purity(own, images.labels_N)},
        encoder_hash=encoder.content_hash(),
    )
    on_progress(1.0, f"{len(patterns)} concepts, purity {card.record['purity']:.2f}")
    return ClusterWise(card, patterns, codebook.centres_KD.numpy(), own, encoder)
