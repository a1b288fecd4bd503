"""What a perturbation is, measured without training an adversary.

Functions compare a clean corpus with its protected copy (else `UsageError`), whatever the method,
and are deterministic. They explain an adversary's result and do not replace it: perturbations of
the 14A objective were 90 % separable by class, and protected nothing on small pictures.

Shape suffixes: N images, B batch, C channels, H W image, D feature width, K clusters
or classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from one4all.clustering import k_means
from one4all.concepts import ConceptBank
from one4all.distances import max_difference, psnr_db, ssim
from one4all.encoders.base import Encoder
from one4all.errors import UsageError
from one4all.evaluation.attacks import Purifier, find_attack
from one4all.evaluation.feature_distance import feature_distance
from one4all.evaluation.label_clusters import cluster_purity
from one4all.evaluation.labelled import LabelledImages, Labels
from one4all.images import DecodedImage, decode, encode
from one4all.perturbation import Levels
from one4all.training.objectives.concept import (
    ConceptObjectiveConfig,
    concept_objective,
    normalised_entropy,
    select_targets,
)

WRITTEN_JPEG = "jpeg-95-444"  # what `protect` writes; the other codecs are purifiers' names
CODECS = (WRITTEN_JPEG, "jpeg-90", "jpeg-75", "jpeg-50", "webp-75", "resize-0.5", "blur-1")
PURITY_KS = (10, 50, 150)
LOSS_KS = tuple(range(1, 11))

_BATCH = 16  # larger ones leave the cache: half the speed
_POOLED_SIDE = 16
_NUM_SHUFFLES = 5


@dataclass(frozen=True)
class Separability:
    """Held-out accuracy of a probe, and of always naming the largest class."""

    accuracy: float
    majority: float


@dataclass(frozen=True)
class ClassDistances:
    """Euclidean distances of perturbations, in levels: within a class, between the means of two,
    and between / within."""

    within: float
    between: float
    ratio: float
    shuffled_ratio: float


@dataclass(frozen=True)
class Purity:
    """Purity by number of clusters, also with shuffled labels; and a linear probe."""

    purity: dict[int, float]
    shuffled: dict[int, float]
    probe: Separability


@dataclass(frozen=True)
class ConceptCosines:
    """Mean cosines before and after; share of images whose nearest text changed."""

    own_before: float
    own_after: float
    opposite_before: float
    opposite_after: float
    changed: float
    opposite_entropy: float


@dataclass(frozen=True)
class LossAtK:
    """Terms of Eq. 4 with k similar concepts, and ln(l1 / l2)."""

    k: int
    l1: float
    l2: float
    log_ratio: float


@dataclass(frozen=True)
class Distortion:
    """Visible change: mean and worst image, and differences in levels."""

    psnr_db: float
    worst_psnr_db: float
    ssim: float
    worst_ssim: float
    max_levels: int
    mean_levels: float
    feature_distance: float


@dataclass(frozen=True)
class Survival:
    """What a codec leaves: ``kept`` 1 and ``error_levels`` 0 mean all of it."""

    codec: str
    kept: float
    error_levels: float


@dataclass(frozen=True)
class Diagnosis:
    """All of them."""

    num_images: int
    separability: Separability
    distances: ClassDistances
    purity: Purity
    cosines: ConceptCosines
    losses: tuple[LossAtK, ...]
    distortion: Distortion
    survival: tuple[Survival, ...]


def diagnose(
    clean: LabelledImages,
    protected: LabelledImages,
    encoder: Encoder,
    bank: ConceptBank,
    *,
    seed: int = 0,
    max_images: int = 512,
    centre: bool = True,
) -> Diagnosis:
    """Every measure, on at most ``max_images`` images spread evenly over the classes.

    A k that images or vocabulary are too few for is left out. ``centre`` as in `concept_cosines`.
    """
    _require_pairs(clean, protected)
    # In order of class, so that a period in the labels cannot meet the stride.
    spread = np.linspace(0, len(clean) - 1, min(max_images, len(clean))).round().astype(int)
    chosen = np.sort(np.argsort(clean.labels_N, kind="stable")[spread])
    clean, protected = (
        LabelledImages(both.images_NHWC[chosen], both.labels_N[chosen])
        for both in (clean, protected)
    )
    clean_ND, protected_ND = _embed(clean, encoder), _embed(protected, encoder)
    similar = [k for k in LOSS_KS if k < len(bank.concepts)]
    clusters = [k for k in PURITY_KS if k <= len(clean)]
    return Diagnosis(
        num_images=len(clean),
        separability=delta_separability(clean, protected, seed=seed),
        distances=delta_distances(clean, protected, seed=seed),
        purity=_purity(clean_ND, clean.labels_N, clusters, seed),
        cosines=_cosines(clean_ND, protected_ND, bank, centre),
        losses=_losses(clean_ND, protected_ND, bank, similar, centre),
        distortion=distortion(clean, protected),
        survival=codec_survival(clean, protected),
    )


# --- the perturbation alone ---------------------------------------------------------------------


def delta_separability(
    clean: LabelledImages, protected: LabelledImages, *, seed: int = 0
) -> Separability:
    """Class from the perturbation alone, pooled to 16x16 at most, by a linear probe.

    At chance, the perturbation cannot be a shortcut that is linear and smooth, the kind that
    survives resizing; autoregressive noise, which is neither, protects all the same. A separable
    one may never be learned. Where 0 or 255 clips a perturbation, the picture shows in it.
    """
    _require_pairs(clean, protected)
    side = min(_POOLED_SIDE, clean.size)
    pooled = [
        F.adaptive_avg_pool2d(torch.from_numpy(delta).permute(0, 3, 1, 2), side).flatten(1)
        for delta in _deltas(clean, protected, _BATCH)
    ]
    return _probe(torch.cat(pooled), clean.labels_N, seed)


def delta_distances(
    clean: LabelledImages, protected: LabelledImages, *, seed: int = 0
) -> ClassDistances:
    """Mean distance to the class mean, mean distance between class means, between / within.

    Means of few images differ by chance: ``shuffled_ratio``, of shuffled labels, is the baseline.

    Source: the quantities of TUE's CSD (Ren et al. 2023), which takes them within a batch.
    """
    _require_pairs(clean, protected)
    within, between, ratio = _spread(clean, protected, clean.labels_N)
    shuffled = np.random.default_rng(seed).permutation(clean.labels_N)
    return ClassDistances(within, between, ratio, _spread(clean, protected, shuffled)[2])


def _spread(
    clean: LabelledImages, protected: LabelledImages, labels: Labels
) -> tuple[float, float, float]:
    means, within = [], []
    for label in np.unique(labels):  # one class in memory at a time
        chosen = labels == label
        delta = protected.images_NHWC[chosen].astype(np.float32) - clean.images_NHWC[chosen]
        means.append(delta.mean(axis=0))
        within.append(np.linalg.norm((delta - means[-1]).reshape(len(delta), -1), axis=1).mean())
    gaps = [float(np.linalg.norm(first - second)) for first, second in combinations(means, 2)]
    between = float(np.mean(gaps)) if gaps else 0.0
    return float(np.mean(within)), between, between / (float(np.mean(within)) + 1e-5)


def distortion(clean: LabelledImages, protected: LabelledImages) -> Distortion:
    """How visible the perturbation is; ``feature_distance`` is *not* the published LPIPS."""
    _require_pairs(clean, protected)
    pairs = list(zip(clean.images_NHWC, protected.images_NHWC, strict=True))
    noise, structure = [psnr_db(*pair) for pair in pairs], [ssim(*pair) for pair in pairs]
    return Distortion(
        psnr_db=float(np.mean(noise)),
        worst_psnr_db=min(noise),
        ssim=float(np.mean(structure)),
        worst_ssim=min(structure),
        max_levels=max(max_difference(*pair) for pair in pairs),
        mean_levels=float(np.mean([np.abs(d).mean() for d in _deltas(clean, protected, 1)])),
        feature_distance=float(np.mean([feature_distance(*pair) for pair in pairs])),
    )


def codec_survival(
    clean: LabelledImages, protected: LabelledImages, *, codecs: Sequence[str] = CODECS
) -> tuple[Survival, ...]:
    """What is left of the perturbation when both copies pass through a codec.

    With rest = codec(protected) - codec(clean): ``kept`` is <rest, delta> / <delta, delta>, a mean
    over the images with a perturbation (0 without any); ``error_levels`` is mean |rest - delta|.
    """
    _require_pairs(clean, protected)
    return tuple(_survival(clean, protected, codec) for codec in codecs)


def _survival(clean: LabelledImages, protected: LabelledImages, codec: str) -> Survival:
    kept, errors = [], []
    rests = _deltas(_through(codec, clean), _through(codec, protected), 1)
    for delta, rest in zip(_deltas(clean, protected, 1), rests, strict=True):
        errors.append(np.abs(rest - delta).mean())
        if delta.any():
            kept.append(np.vdot(rest, delta) / np.vdot(delta, delta))
    return Survival(codec, float(np.mean(kept)) if kept else 0.0, float(np.mean(errors)))


def _through(codec: str, images: LabelledImages) -> LabelledImages:
    if codec == WRITTEN_JPEG:
        files = (encode(DecodedImage(pixels, "JPEG"), "match") for pixels in images.images_NHWC)
        return LabelledImages(np.stack([decode(file).pixels for file in files]), images.labels_N)
    attack = find_attack(codec)
    if not isinstance(attack, Purifier):
        raise UsageError(f"{codec!r} changes the training and not the images; name a purifier")
    return attack.purify(images, seed=0)


# --- through an encoder -------------------------------------------------------------------------


def encoder_purity(
    images: LabelledImages, encoder: Encoder, *, ks: Sequence[int] = PURITY_KS, seed: int = 0
) -> Purity:
    """Whether the encoder's features know the classes: what a label-free protector can build on.

    Purity is the share of images in the largest class of their cluster. It rises with k by itself
    (to 1 at k = N), so compare with shuffled labels. `UsageError` for a k outside 1..N.
    """
    return _purity(_embed(images, encoder), images.labels_N, ks, seed)


def _purity(features_ND: Tensor, labels: Labels, ks: Sequence[int], seed: int) -> Purity:
    random, purity, shuffled = np.random.default_rng(seed), {}, {}
    for k in ks:
        clusters = k_means(features_ND, k, seed=seed)[1].numpy()
        purity[k] = cluster_purity(clusters, labels)
        draws = [cluster_purity(clusters, random.permutation(labels)) for _ in range(_NUM_SHUFFLES)]
        shuffled[k] = float(np.mean(draws))
    return Purity(purity, shuffled, _probe(features_ND, labels, seed))


def concept_cosines(
    clean: LabelledImages,
    protected: LabelledImages,
    encoder: Encoder,
    bank: ConceptBank,
    *,
    centre: bool = True,
) -> ConceptCosines:
    """Cosine to an image's own concept and to its opposite, before and after.

    Own is the text nearest to the clean image, opposite what the objective chooses for it (with
    ``centre`` as there). ``opposite_entropy``: 1 spread evenly, 0 one concept takes all.

    Source: Figure 4b of the paper.
    """
    _require_pairs(clean, protected)
    return _cosines(_embed(clean, encoder), _embed(protected, encoder), bank, centre)


def _cosines(
    clean_ND: Tensor, protected_ND: Tensor, bank: ConceptBank, centre: bool
) -> ConceptCosines:
    texts = bank.embeddings.cpu()
    opposite = select_targets(clean_ND, texts, num_similar=1, centre=centre).opposite
    before, after = clean_ND @ texts.T, protected_ND @ texts.T
    rows, own = torch.arange(len(before)), before.argmax(dim=1)
    return ConceptCosines(
        own_before=float(before[rows, own].mean()),
        own_after=float(after[rows, own].mean()),
        opposite_before=float(before[rows, opposite].mean()),
        opposite_after=float(after[rows, opposite].mean()),
        changed=float((after.argmax(dim=1) != own).double().mean()),
        opposite_entropy=float(normalised_entropy(torch.bincount(opposite, minlength=len(texts)))),
    )


def loss_by_k(
    clean: LabelledImages,
    protected: LabelledImages,
    encoder: Encoder,
    bank: ConceptBank,
    *,
    ks: Sequence[int] = LOSS_KS,
    centre: bool = True,
) -> tuple[LossAtK, ...]:
    """Terms of Eq. 4 by number of similar concepts; targets chosen by the clean images.

    Source: Figure 4a of the paper.
    """
    _require_pairs(clean, protected)
    return _losses(_embed(clean, encoder), _embed(protected, encoder), bank, ks, centre)


def _losses(
    clean_ND: Tensor, protected_ND: Tensor, bank: ConceptBank, ks: Sequence[int], centre: bool
) -> tuple[LossAtK, ...]:
    losses = []
    for k in ks:
        config = ConceptObjectiveConfig(num_similar=k, centre_concepts=centre)
        terms = concept_objective(clean_ND, protected_ND, bank.embeddings.cpu(), config)
        l1, l2 = float(terms.l1), float(terms.l2)
        losses.append(LossAtK(k, l1, l2, float(np.log(max(l1, 1e-6) / max(l2, 1e-6)))))
    return tuple(losses)


@torch.no_grad()
def _embed(images: LabelledImages, encoder: Encoder) -> Tensor:
    device = next(encoder.buffers()).device
    return torch.cat([encoder.encode_image(b.to(device)).cpu() for b in _batches(images)])


# --- parts --------------------------------------------------------------------------------------


def _require_pairs(clean: LabelledImages, protected: LabelledImages) -> None:
    shapes = clean.images_NHWC.shape, protected.images_NHWC.shape
    if shapes[0] != shapes[1] or not np.array_equal(clean.labels_N, protected.labels_N):
        raise UsageError(
            f"clean images are {shapes[0]}, protected ones {shapes[1]}; they must be copies of one "
            "corpus: same size, order and labels"
        )


def _deltas(clean: LabelledImages, protected: LabelledImages, batch: int) -> Iterator[Levels]:
    for start in range(0, len(clean), batch):
        part = slice(start, start + batch)
        yield protected.images_NHWC[part].astype(np.float32) - clean.images_NHWC[part]


def _batches(images: LabelledImages) -> Iterator[Tensor]:
    """(B, 3, H, W) uint8, channels last in memory: up to twice the speed on a CPU."""
    for start in range(0, len(images), _BATCH):
        yield torch.tensor(images.images_NHWC[start : start + _BATCH]).permute(0, 3, 1, 2)


def _probe(features_ND: Tensor, labels: Labels, seed: int) -> Separability:
    """Ridge regression onto the classes, fitted on half of each class, tested on the other.

    The ridge is the mean squared norm: within 4 points of the best of 0.001 to 10 times it, on
    weak patterns in noise and on features of pictures; 0.01 times it lost up to 32.
    """
    _, dense, counts = np.unique(labels, return_inverse=True, return_counts=True)
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    order = torch.from_numpy(shuffled[np.argsort(dense[shuffled], kind="stable")])
    fitted, held_out = order[::2], order[1::2]
    if not len(held_out):
        raise UsageError("one image cannot be divided into two halves; give more")
    target_NK = F.one_hot(torch.from_numpy(dense)).double()
    centre_D, prior_K = features_ND[fitted].double().mean(dim=0), target_NK[fitted].mean(dim=0)
    centred_ND = features_ND.double() - centre_D
    x, y = centred_ND[fitted], target_NK[fitted] - prior_K
    ridge = (x.square().sum() / len(x)).clamp_min(1e-9) * torch.eye(x.shape[1]).double()
    answer = (centred_ND[held_out] @ torch.linalg.solve(x.T @ x + ridge, x.T @ y) + prior_K).argmax(
        1
    )
    right = answer == target_NK[held_out].argmax(dim=1)
    return Separability(float(right.double().mean()), float(counts.max() / len(labels)))
