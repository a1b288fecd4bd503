"""Cluster code: one random block pattern per k-means cluster of an encoder's features. No labels.

The simplest label-free shortcut, and the first with an effect on this bench (Caltech-101, 100
clusters: 61.7 to 51.8 %). A label-free generator has to beat it.

Source: ours (docs/method.md); clusters as in Unlearnable Clusters, patterns as the class-wise
oracle's.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from one4all.baselines.base import Progress, check_epsilon, make_card, silent
from one4all.baselines.clusters import ClusterWise, encode_corpus
from one4all.baselines.controls import class_patterns
from one4all.clustering import cluster_purity, k_means
from one4all.encoders import Encoder, EncoderConfig, load_encoder
from one4all.labelled import LabelledImages
from one4all.perturbation import DEFAULT_EPSILON_LEVELS


class ClusterCodeConfig(BaseModel):
    """Clusters and patterns.

    Attributes:
        encoder: Whose features are clustered.
        num_clusters: k. More clusters are purer, but are more patterns for a class.
        block: Side of a block in pixels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder: EncoderConfig = EncoderConfig(input_size=128)
    num_clusters: Annotated[int, Field(ge=2)] = 50
    block: Annotated[int, Field(ge=1)] = 8


PRESETS: dict[str, ClusterCodeConfig] = {
    "default": ClusterCodeConfig(),
    "fine": ClusterCodeConfig(num_clusters=100, block=16),
}


def fit(
    images: LabelledImages,
    config: ClusterCodeConfig,
    *,
    epsilon_levels: int = DEFAULT_EPSILON_LEVELS,
    seed: int,
    on_progress: Progress = silent,
    device: str = "cpu",
    encoder: Encoder | None = None,
) -> ClusterWise:
    """Cluster the images and draw one pattern per cluster.

    Args:
        images: Clean images; their labels only measure the purity in the record.
        config: Clusters and patterns.
        epsilon_levels: Budget.
        seed: Of clusters and patterns.
        on_progress: See `Progress`.
        device: PyTorch device.
        encoder: The one that ``config.encoder`` names, if it is loaded already.

    Raises:
        UsageError: More clusters than images.
    """
    check_epsilon(epsilon_levels)
    encoder = encoder or load_encoder(config.encoder)
    features = encode_corpus(encoder, images, torch.device(device))
    on_progress(0.9, "encoded")
    centres, assignment = k_means(features, config.num_clusters, seed=seed)
    own = assignment.numpy().astype(np.int32)
    patterns = class_patterns(
        config.num_clusters,
        images.size,
        epsilon_levels=epsilon_levels,
        seed=seed,
        block=config.block,
    )
    card = make_card(
        ClusterWise,
        "cluster_code",
        images,
        config,
        epsilon_levels=epsilon_levels,
        seed=seed,
        record={"purity": cluster_purity(own, images.labels_N)},
        encoder_hash=encoder.content_hash(),
    )
    on_progress(1.0, f"{config.num_clusters} clusters, purity {card.record['purity']:.2f}")
    return ClusterWise(card, patterns, centres.numpy(), own, encoder)
