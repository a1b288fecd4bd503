"""Our codebook among the compared methods: fitted on a labelled corpus whose labels it never reads.

What `one4all fit` writes, in the shape of the other methods, so that the same grids judge it. It
protects new images as it does its own, which is also its transfer rule.

Source: ours (docs/method.md, "Codebooks").

Shape suffixes: as in one4all/codebook.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from one4all.concepts import ConceptBank
from one4all.encoders import Encoder, EncoderConfig, load_encoder
from one4all.evaluation.label_clusters import cluster_purity
from one4all.evaluation.labelled import LabelledImages
from one4all.evaluation.methods.base import (
    Arrays,
    FittedCard,
    Progress,
    check_epsilon,
    make_card,
    silent,
)
from one4all.evaluation.methods.clusters import EncoderWise, encode_corpus
from one4all.perturbation import DEFAULT_EPSILON_LEVELS, Levels
from one4all.protectors.codebook import (
    DEFAULT_CODEBOOK,
    DEFAULT_ENCODER,
    Codebook,
    CodebookConfig,
    fit_codebook,
    name_codebook,
)


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
    "small": CodebookMethodConfig(encoder=DEFAULT_ENCODER.model_copy(update={"input_size": 128})),
}


class CodebookWise(EncoderWise):
    """A codebook's patterns. Labels are not read, and nothing is drawn.

    Args:
        card: Description; its config is a `CodebookMethodConfig`.
        codebook: The patterns, and who gets which.
        own_LN: `Codebook.vote` of the images of the fit, so that they are not encoded again.
        encoder: The one of the fit; loaded when first needed unless given.
    """

    def __init__(
        self, card: FittedCard, codebook: Codebook, own_LN: Tensor, encoder: Encoder | None = None
    ) -> None:
        super().__init__(card, encoder)
        self.codebook = codebook
        self.own_LN = own_LN

    def perturb(self, images: LabelledImages, *, own: bool, seed: int) -> Iterator[Levels]:
        """See the base class; ``seed`` does not matter."""
        if own:
            self.check_own(images)
        groups_LN = self.own_LN if own else self.vote(images)
        return (self._pattern(group_L[:, None]) for group_L in groups_LN.unbind(1))

    def vote(self, images: LabelledImages) -> Tensor:
        """`Codebook.vote` of any images."""
        return self.codebook.vote(encode_corpus(self.encoder, images, torch.device("cpu")))

    def _pattern(self, groups_L1: Tensor) -> Levels:
        levels = self.card.epsilon_levels * self.codebook.patterns(groups_L1)[0]
        result: Levels = levels.permute(1, 2, 0).numpy()
        return result

    def arrays(self) -> Arrays:
        tensors = self.codebook.state_dict() | {"own": self.own_LN}
        return {name: tensor.numpy() for name, tensor in tensors.items()}

    @classmethod
    def from_arrays(cls, card: FittedCard, arrays: Arrays) -> Self:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        own_LN = tensors.pop("own")
        num_concepts, embedding_dim = tensors["centres_KD"].shape
        config = CodebookMethodConfig.model_validate(card.config).codebook
        codebook = Codebook(config.model_copy(update={"num_concepts": num_concepts}), embedding_dim)
        codebook.load_state_dict(tensors)
        return cls(card, codebook, own_LN)


def fit(
    images: LabelledImages,
    config: CodebookMethodConfig,
    *,
    epsilon_levels: int = DEFAULT_EPSILON_LEVELS,
    seed: int,
    on_progress: Progress = silent,
    device: str = "cpu",
    encoder: Encoder | None = None,
) -> CodebookWise:
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
    concepts = codebook.concepts(features).numpy().astype(np.int32)
    card = make_card(
        CodebookWise,
        "codebook",
        images,
        config,
        epsilon_levels=epsilon_levels,
        seed=seed,
        record={"purity": cluster_purity(concepts, images.labels_N)},
        encoder_hash=encoder.content_hash(),
    )
    num_concepts = codebook.config.num_concepts
    on_progress(1.0, f"{num_concepts} concepts, purity {card.record['purity']:.2f}")
    return CodebookWise(card, codebook, codebook.vote(features), encoder)
