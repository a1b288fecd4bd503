"""UC, "LaUE" in the paper's tables: unlearnable clusters (Zhang et al., CVPR 2023). No labels.

Images are clustered by an encoder's features. For each cluster a fresh generator turns one fixed
noise image into one perturbation, which moves the features of *all* images towards the next
cluster's centre:

    min over G_c of KL( softmax(centre) || softmax(feature(x + epsilon * tanh(G_c(z_c)))) )

Departures: tanh bounds the perturbation; the released code clamps a tanh at the budget, which
stops the gradient wherever it clips. The budget is an argument (published: 16 levels). The encoder
is the package's own, frozen; its features are L2-normalised, so ``feature_scale`` gives softmax the
range that it has on raw ones. The generator is this package's, with a constant in place of the
embedding: the published network has two downsamplings and six blocks too. It works at the corpus'
size and the encoder enlarges x + delta itself.

Shape suffixes: N images, K clusters, B batch, D features, C channels, S side.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from one4all.clustering import k_means
from one4all.encoders import EncoderConfig, load_encoder
from one4all.encoders.base import Encoder
from one4all.evaluation.label_clusters import cluster_purity
from one4all.evaluation.labelled import LabelledImages
from one4all.evaluation.methods.base import OnFitProgress, check_epsilon, make_card, seeded, silent
from one4all.evaluation.methods.clusters import ClusterWise
from one4all.evaluation.methods.embeddings import encode_corpus
from one4all.evaluation.methods.surrogate import batches, flip_and_shift, to_levels
from one4all.perturbation import DEFAULT_EPSILON_LEVELS, Levels
from one4all.protectors.config import GeneratorConfig
from one4all.protectors.generator import Generator

_NUM_MEASURED = 256  # images on which the record's cosines are means


class UnlearnableClustersConfig(BaseModel):
    """Clusters, generator and schedule.

    Attributes:
        encoder: The surrogate.
        num_clusters: p.
        target_offset: Cluster c moves to the centre of cluster c + offset, mod p.
        generator: One such network per cluster.
        feature_scale: Features are multiplied by it before softmax; 0 means sqrt(D).
        steps: Optimiser steps for each cluster, with a cosine schedule.
        batch_size: Images of a step, drawn from all clusters.
        learning_rate, weight_decay: Settings of Adam.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder: EncoderConfig = EncoderConfig(input_size=64)
    num_clusters: Annotated[int, Field(ge=2)] = 10
    target_offset: Annotated[int, Field(ge=1)] = 1
    generator: GeneratorConfig = GeneratorConfig(
        width=16, stem_stride=1, num_downsamplings=2, num_blocks=2, norm="batch"
    )
    feature_scale: Annotated[float, Field(ge=0)] = 0.0
    steps: Annotated[int, Field(ge=1)] = 150
    batch_size: Annotated[int, Field(ge=1)] = 16
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4


PRESETS: dict[str, UnlearnableClustersConfig] = {
    "default": UnlearnableClustersConfig(),
    # 50 epochs of a corpus of 50,000 images.
    "published": UnlearnableClustersConfig(
        encoder=EncoderConfig(),
        generator=GeneratorConfig(
            width=64, stem_stride=1, num_downsamplings=2, num_blocks=6, norm="batch"
        ),
        steps=50 * 196,
        batch_size=256,
        learning_rate=1e-4,
    ),
}


def fit(
    images: LabelledImages,
    config: UnlearnableClustersConfig,
    *,
    epsilon_levels: int = DEFAULT_EPSILON_LEVELS,
    seed: int,
    on_progress: OnFitProgress = silent,
    device: str = "cpu",
    encoder: Encoder | None = None,
) -> ClusterWise:
    """One perturbation per cluster; generators are thrown away.

    Args:
        images: Clean images; their labels only measure the purity in the record.
        config: Schedule.
        epsilon_levels: Budget; the method's own is 16.
        seed: Seed of clusters, noise, networks and batches.
        on_progress: See `OnFitProgress`.
        device: PyTorch device.
        encoder: The one that ``config.encoder`` names, if it is loaded already.

    Raises:
        UsageError: More clusters than images.
        ConfigError: The corpus' size does not suit the generator.
    """
    check_epsilon(epsilon_levels)
    on = torch.device(device)
    encoder = encoder or load_encoder(config.encoder)
    features = encode_corpus(encoder, images, on)
    encoder.to(on)
    centres, assignment = k_means(features, config.num_clusters, seed=seed)
    scale = config.feature_scale or features.shape[1] ** 0.5
    patterns, similarities = [], []
    with seeded(seed):
        for cluster in range(config.num_clusters):
            target = centres[(cluster + config.target_offset) % config.num_clusters].to(on)
            pattern, similarity = _fit_cluster(
                images, encoder, target, scale, config, float(epsilon_levels), seed + cluster, on
            )
            patterns.append(pattern)
            similarities.append(similarity)
            on_progress(
                (cluster + 1) / config.num_clusters,
                f"cluster {cluster}: cosine to the next centre {similarity:.3f}",
            )
    clean_cosines = features[:_NUM_MEASURED] @ F.normalize(centres, dim=1).T
    own = assignment.numpy().astype(np.int32)
    card = make_card(
        ClusterWise,
        "unlearnable_clusters",
        images,
        config,
        epsilon_levels=epsilon_levels,
        seed=seed,
        record={
            "purity": cluster_purity(own, images.labels_N),
            "clean_cosine": float(clean_cosines.mean()),
            "cosine_to_target": float(np.mean(similarities)),
        },
        encoder_hash=encoder.content_hash(),
    )
    return ClusterWise(card, np.stack(patterns), centres.numpy(), own, encoder)


def cluster_loss(feature_BD: Tensor, centre_D: Tensor, *, scale: float) -> Tensor:
    """Divergence of the features' softmax from the centre's, batch mean.

    Args:
        feature_BD: L2-normalised features.
        centre_D: Mean of such.
        scale: Multiplies both before softmax.

    Source: Zhang et al. 2023, KL with the centre as the target distribution.
    """
    target = F.softmax(scale * centre_D, dim=0).expand_as(feature_BD)
    return F.kl_div(F.log_softmax(scale * feature_BD, dim=1), target, reduction="batchmean")


def _fit_cluster(
    images: LabelledImages,
    encoder: Encoder,
    target_D: Tensor,
    scale: float,
    config: UnlearnableClustersConfig,
    epsilon: float,
    seed: int,
    device: torch.device,
) -> tuple[Levels, float]:
    """The perturbation of one cluster (S, S, 3), and the cosine of features to its target."""
    generator = Generator(config.generator, embedding_dim=1).to(device).train()
    noise = torch.rand(1, 3, images.size, images.size).to(device)
    constant = torch.ones(1, 1, device=device)
    optimizer = torch.optim.Adam(
        generator.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps, eta_min=1e-6)
    order = batches(len(images), config.batch_size, np.random.default_rng(seed))
    for _ in range(config.steps):
        clean = flip_and_shift(to_levels(images.images_NHWC[next(order)], device))
        delta = _bounded(generator, constant, noise, epsilon, images.size)
        feature = encoder.encode_image((clean + delta).clamp(0, 255) / 255)
        loss = cluster_loss(feature, target_D, scale=scale)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    # Batch statistics of the one noise image are part of the perturbation: no evaluation mode.
    with torch.no_grad():
        delta = _bounded(generator, constant, noise, epsilon, images.size)
        clean = to_levels(images.images_NHWC[:_NUM_MEASURED], device)
        feature = encoder.encode_image((clean + delta).clamp(0, 255) / 255)
        similarity = float(F.cosine_similarity(feature, target_D[None]).mean())
    return delta[0].permute(1, 2, 0).cpu().contiguous().numpy(), similarity


def _bounded(
    generator: Generator, constant: Tensor, noise: Tensor, epsilon: float, size: int
) -> Tensor:
    """epsilon * tanh(G(z)), (1, 3, S, S) in levels."""
    delta = epsilon * generator(constant, noise)
    return F.interpolate(delta, (size, size), mode="bilinear", antialias=True)
