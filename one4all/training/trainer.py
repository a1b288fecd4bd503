"""Training a generator: the state of one rank, a step at a time, savable and loadable.

Knows no Ray: `pipelines.train.job` runs one of these in every worker.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import Tensor, nn

from one4all.concepts import ConceptBank
from one4all.encoders import EncoderConfig, load_encoder
from one4all.errors import ConfigError
from one4all.perturbation import DEFAULT_EPSILON_LEVELS, resize_perturbation
from one4all.protectors.card import ProtectorCard
from one4all.protectors.generator import PRESETS as GENERATORS
from one4all.protectors.generator import Generator, GeneratorConfig
from one4all.protectors.protector import Protector, golden_embedding
from one4all.training.loader import ImageStream, Share, Shares, deal
from one4all.training.objectives.concept import PRESETS as OBJECTIVES
from one4all.training.objectives.concept import (
    ObjectiveConfig,
    ObjectiveTerms,
    concept_objective,
    normalised_entropy,
)

_STATE_FILE = "state.pt"


def _preset(presets: dict[str, Any]) -> BeforeValidator:
    """Let a field be given as the name of a preset."""

    def look_up(value: object) -> object:
        if isinstance(value, str):
            if value not in presets:
                raise ValueError(f"no preset {value!r}, only {', '.join(sorted(presets))}")
            return presets[value]
        return value

    return BeforeValidator(look_up)


class TrainerConfig(BaseModel):
    """What a generator learns from, and how.

    Attributes:
        source: Corpus of WebDataset shards, folder or s3://; or several, separated by commas.
        vocabulary: Shipped vocabulary or text file.
        templates: Prompt templates; empty means the encoder's own.
        encoder, generator, objective: See there; generator and objective also take a preset name.
        epsilon_levels: Budget, in levels of 8 bits.
        working_size: Side in pixels; 0 means the encoder's input size.
        steps: Optimiser steps.
        batch_size: Images of a worker that are computed at once.
        accumulate_batches: Batches of a worker that make one step; their gradients are averaged, as
            those of workers are. Like them, each has its own "ratio" weight and batch statistics.
        learning_rate, weight_decay: Of Adam; warm-up over 1 % of the steps, then cosine to 0.
        shuffle_buffer: Encoded images that a rank holds to draw from.
        seed: Seed of the first weights and of the order of the images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = ""
    vocabulary: str = "imagenet1k"
    templates: tuple[str, ...] = ()
    encoder: EncoderConfig = EncoderConfig()
    generator: Annotated[GeneratorConfig, _preset(GENERATORS)] = GeneratorConfig()
    objective: Annotated[ObjectiveConfig, _preset(OBJECTIVES)] = ObjectiveConfig()
    epsilon_levels: Annotated[int, Field(ge=1, le=255)] = DEFAULT_EPSILON_LEVELS
    working_size: Annotated[int, Field(ge=0, le=1024)] = 0
    steps: Annotated[int, Field(ge=1)] = 1000
    batch_size: Annotated[int, Field(ge=1)] = 8
    accumulate_batches: Annotated[int, Field(ge=1)] = 1
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 5e-4
    shuffle_buffer: Annotated[int, Field(ge=1)] = 2000
    seed: int = 0

    @property
    def images_per_step(self) -> int:
        """Of one worker."""
        return self.batch_size * self.accumulate_batches


class GeneratorTrainer:
    """One rank's training state: a step at a time, savable and loadable.

    Args:
        config: See there.
        rank, world_size: This worker.
        device: Where it computes.
        num_threads: For decoding images.
        wrap: Makes the model data-parallel.
    """

    def __init__(
        self,
        config: TrainerConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        num_threads: int = 1,
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.encoder = load_encoder(config.encoder)
        self.bank = ConceptBank.build(config.vocabulary, self.encoder, templates=config.templates)
        self.encoder.to(self.device)
        self._concepts_ND = self.bank.embeddings.to(self.device)
        torch.manual_seed(config.seed)  # the same start on every rank
        self.generator = Generator(config.generator, self.encoder.embedding_dim).to(self.device)
        self._model = wrap(self.generator)
        self.optimizer = torch.optim.Adam(
            self.generator.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate_at)
        self._stream = ImageStream(
            config.source.split(","),
            size=self.working_size,
            seed=config.seed,
            shuffle_buffer=config.shuffle_buffer,
            num_threads=num_threads,
        )
        self._rank, self._world_size = rank, world_size
        self.step_number = 0
        self.shares = deal([], world_size)[rank]
        self._opposites_N = torch.zeros(len(self.bank.concepts))

    @property
    def working_size(self) -> int:
        return self.config.working_size or self.encoder.input_size

    @torch.no_grad()
    def check(self) -> None:
        """One image through generator and objective, so that a misfit shows before Ray starts.

        Raises:
            ConfigError: Working size, vocabulary and objective do not fit together.
        """
        size = self.working_size
        clean = torch.zeros(1, 3, size, size, device=self.device)
        embedding = self.encoder.encode_image(clean)
        self.generator.eval()(embedding, clean)
        concept_objective(embedding, embedding, self._concepts_ND, self.config.objective)

    def steps(self) -> Iterator[tuple[int, ObjectiveTerms]]:
        """Train to the end, yielding ``(step, terms)`` after each step."""
        self._model.train()
        batches = self._stream.batches(self.config.images_per_step, self.shares)
        while self.step_number < self.config.steps:
            self.shares, image_BHWC = next(batches)
            terms = self.step(torch.from_numpy(image_BHWC))
            self.step_number += 1
            yield self.step_number, terms

    def step(self, image_BHWC: Tensor) -> ObjectiveTerms:
        """One optimiser step on clean images, uint8 (B, S, S, 3), ``batch_size`` at once.

        Returns:
            The terms of the last batch.
        """
        self.optimizer.zero_grad(set_to_none=True)
        batches = torch.split(image_BHWC, self.config.batch_size)
        for batch_BHWC in batches[:-1]:
            with self._without_exchange():
                self._backward(batch_BHWC, 1 / len(batches))
        terms = self._backward(batches[-1], 1 / len(batches))
        self.optimizer.step()
        self._schedule.step()
        return terms

    def _without_exchange(self) -> AbstractContextManager[None]:
        """Workers exchange gradients once a step, with its last batch."""
        no_sync = getattr(self._model, "no_sync", nullcontext)
        context: AbstractContextManager[None] = no_sync()
        return context

    def _backward(self, image_BHWC: Tensor, weight: float) -> ObjectiveTerms:
        """Add the gradients of one batch of clean images, uint8 (B, S, S, 3)."""
        # Collated with channels last, permuted here: that is the fast memory layout.
        clean = image_BHWC.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float() / 255
        epsilon = self.config.epsilon_levels / 255
        gpu = self.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if gpu else nullcontext():
            with torch.no_grad():
                clean_BD = self.encoder.encode_image(clean)
            delta = epsilon * self._model(clean_BD, clean).float()
            height, width = clean.shape[-2:]
            protected = (clean + resize_perturbation(delta, (height, width))).clamp(0, 1)
            protected_BD = self.encoder.encode_image(protected)
        terms = concept_objective(clean_BD, protected_BD, self._concepts_ND, self.config.objective)
        (weight * terms.loss).backward()  # type: ignore[no-untyped-call]
        self._opposites_N += torch.bincount(
            terms.targets.opposite.cpu(), minlength=len(self._opposites_N)
        )
        return terms

    def metrics(self, terms: ObjectiveTerms) -> dict[str, float]:
        """Loggable figures of the last step; resets the histogram of opposites."""
        entropy = normalised_entropy(self._opposites_N)
        self._opposites_N.zero_()
        return {
            "step": self.step_number,
            "epoch": self.shares[0].epoch,
            "loss": terms.loss.item(),
            "l1": float(terms.l1),
            "l2": float(terms.l2),
            "lambda": float(terms.lambda_),
            "cosine_own": float(terms.cosine_own),
            "cosine_opposite": float(terms.cosine_opposite),
            "opposite_entropy": entropy,
            "learning_rate": float(self._schedule.get_last_lr()[0]),
        }

    def save(self, folder: Path, of_ranks: Sequence[Shares] = ()) -> None:
        """Write all that resuming needs; a file of tensors and numbers only.

        Args:
            folder: Where.
            of_ranks: The ``shares`` of every rank, by rank; of this one, if it is alone.
        """
        state = {
            "generator": self.generator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "step": self.step_number,
            "shares": [list(map(astuple, shares)) for shares in of_ranks or [self.shares]],
        }
        torch.save(state, folder / _STATE_FILE)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote, perhaps with another number of ranks (`loader.deal`)."""
        state = torch.load(folder / _STATE_FILE, map_location=self.device, weights_only=True)
        if "shares" not in state:
            raise ConfigError(
                "the checkpoint was written by an older version of one4all; choose another run "
                "folder, or delete it to start again"
            )
        self.generator.load_state_dict(state["generator"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self.step_number = state["step"]
        of_ranks = [tuple(Share(*share) for share in shares) for shares in state["shares"]]
        self.shares = deal(of_ranks, self._world_size)[self._rank]

    def protector(self, name: str, training: dict[str, Any]) -> Protector:
        """The trained protector, with its card."""
        config = self.config
        card = ProtectorCard(
            name=name,
            encoder=config.encoder,
            encoder_hash=self.encoder.content_hash(),
            golden_embedding=golden_embedding(self.encoder.cpu()),
            vocabulary=config.vocabulary,
            concept_bank_hash=self.bank.hash,
            generator=config.generator,
            working_size=self.working_size,
            epsilon_levels=config.epsilon_levels,
            training=training,
        )
        return Protector(card, self.encoder, self.generator)

    def _rate_at(self, step: int) -> float:
        """Warm-up over 1 % of the steps, then cosine to 0."""
        warm_up = max(1, self.config.steps // 100)
        progress = max(0, step - warm_up) / max(1, self.config.steps - warm_up)
        return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
