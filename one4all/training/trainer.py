"""Training a generator: the state of one rank, a step at a time, savable and loadable.

Knows no Ray: `pipelines.train.job` runs one of these in every worker.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationInfo,
    field_validator,
    model_validator,
)
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from one4all.concepts import ConceptBank
from one4all.encoders import EncoderConfig, load_encoder
from one4all.errors import ConfigError, NotFiniteError
from one4all.perturbation import DEFAULT_EPSILON_LEVELS, resize_perturbation
from one4all.protectors.config import GeneratorConfig
from one4all.protectors.kinds import KINDS, build_model, parse_config
from one4all.protectors.protector import Protector
from one4all.training import VALIDATION
from one4all.training.loader import OPEN_SHARDS, ImageStream, Share, Shares, deal
from one4all.training.objectives import (
    DEFAULT_OBJECTIVE,
    RESERVED_SCALARS,
    AnyObjectiveConfig,
    Objective,
    ObjectiveContext,
    Scalars,
    TrainingBatch,
    build_objective,
)

_STATE_FILE = "state.pt"
_FUSED_DEVICES = ("cuda", "cpu")  # on which PyTorch has Adam as one kernel


class TrainerConfig(BaseModel):
    """What a generator learns from, and how.

    Attributes:
        source: Corpus of WebDataset shards, folder or s3://; or several, separated by commas.
        vocabulary: Shipped vocabulary or text file, for objectives that have concepts.
        templates: Prompt templates; empty means the encoder's own.
        encoder: Frozen encoder that says what an image is of.
        kind: Kind of protector that is trained; see `one4all.protectors.kinds`.
        generator: Configuration of that kind, or the name of one of its presets.
        objective: What it is trained for: settings, or the name of an objective or a preset; see
            `one4all.training.objectives`.
        epsilon_levels: Budget of the perturbation, in 8-bit levels.
        working_size: Side in pixels of the images in training; 0 means the encoder's input size.
        steps: Number of optimiser steps.
        batch_size: Images of a worker that are computed at once.
        accumulate_batches: Batches of a worker that make one step; their gradients are averaged, as
            those of workers are. Like them, each has its own "ratio" weight and batch statistics.
        learning_rate: Highest step size of Adam: warm-up over 1 % of the steps, then cosine to 0.
        weight_decay: Weight of Adam's L2 penalty.
        shuffle_buffer: Encoded images that a rank shuffles with each other; as many more are read
            ahead. Fewer, if they are larger than 128 MB together.
        open_shards: Shards that a rank reads at once, an image of each in turn. Of a Parquet file a
            row group is in memory.
        validation_source: Corpus, or several, of images that are only looked at: see
            ``validate_every``. Empty for none.
        validation_share: Share of the shards of the source that is taken for it instead, and not
            learnt from; drawn by the seed, and at least one.
        validation_images: Number of those images, at most: the same, in the same crops, every time.
        validate_every: Steps from one look at them to the next: the loss and the scalars of the
            objective, as ``validation_loss`` and so on.
        compile: Compile generator and encoder with torch.compile, which costs minutes at the start.
            Where there is no compiler for the device, training goes on without it.
        sidecar_patterns: Images that are no photos, such as masks and depth maps, and are not
            learnt from: ``*.seg.png``; matched against the last component of the name.
        seed: Seed of everything random: weights at the start, order of images, crops, and what the
            objective draws.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = ""
    vocabulary: str = "imagenet1k"
    templates: tuple[str, ...] = ()
    encoder: EncoderConfig = EncoderConfig()
    kind: str = "generator"
    generator: SerializeAsAny[BaseModel] = GeneratorConfig()
    objective: AnyObjectiveConfig = DEFAULT_OBJECTIVE
    epsilon_levels: Annotated[int, Field(ge=1, le=255)] = DEFAULT_EPSILON_LEVELS
    working_size: Annotated[int, Field(ge=0, le=1024)] = 0
    steps: Annotated[int, Field(ge=1)] = 1000
    batch_size: Annotated[int, Field(ge=1)] = 8
    accumulate_batches: Annotated[int, Field(ge=1)] = 1
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 5e-4
    shuffle_buffer: Annotated[int, Field(ge=1)] = 2000
    open_shards: Annotated[int, Field(ge=1, le=64)] = OPEN_SHARDS
    validation_source: str = ""
    validation_share: Annotated[float, Field(ge=0, le=0.5)] = 0
    validation_images: Annotated[int, Field(ge=1, le=4096)] = 256
    validate_every: Annotated[int, Field(ge=1)] = 100
    compile: bool = False
    sidecar_patterns: tuple[str, ...] = ()
    seed: int = 0

    @model_validator(mode="after")
    def _one_set_for_validation(self) -> Self:
        if self.validation_source and self.validation_share:
            raise ValueError(
                "validation_source and validation_share are two ways to say what validation is "
                "for; choose one of them"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _default_of_that_kind(cls, values: Any) -> Any:
        """Who names a kind and no configuration means the default of that kind."""
        if isinstance(values, dict) and "kind" in values:
            return {"generator": {}, **values}
        return values

    @field_validator("generator", mode="wrap")
    @classmethod
    def _of_that_kind(cls, value: Any, _handler: Any, info: ValidationInfo) -> BaseModel:
        kind = info.data.get("kind", "")
        if isinstance(value, str) and kind in KINDS:
            presets = KINDS[kind].presets
            if value not in presets:
                raise ValueError(f"no preset {value!r}, only {', '.join(sorted(presets))}")
            value = presets[value]
        return parse_config(kind, value)

    @property
    def images_per_step(self) -> int:
        """Images of one worker in one optimiser step."""
        return self.batch_size * self.accumulate_batches


class _Pass(nn.Module):
    """From clean images to the loss: everything that is trained, for data parallelism to wrap."""

    def __init__(self, generator: nn.Module, objective: Objective, epsilon: float) -> None:
        super().__init__()
        self.generator, self.objective = generator, objective
        self._epsilon = epsilon

    def forward(self, clean_BCHW: Tensor, embedding_BD: Tensor) -> tuple[Tensor, Scalars]:
        delta_BChw = self._epsilon * self.generator(embedding_BD, clean_BCHW).float()
        height, width = clean_BCHW.shape[-2:]
        protected_BCHW = (clean_BCHW + resize_perturbation(delta_BChw, (height, width))).clamp(0, 1)
        result: tuple[Tensor, Scalars] = self.objective(
            TrainingBatch(clean_BCHW, embedding_BD, delta_BChw, protected_BCHW)
        )
        return result


class GeneratorTrainer:
    """One rank's training state: a step at a time, savable and loadable.

    Args:
        config: What is learnt from, and how.
        rank: Number of this worker, from 0.
        world_size: Number of workers.
        device: Device that it computes on.
        num_threads: Threads that decode images.
        bank: Concepts that were embedded before; taken if they are what would be embedded here.
        wrap: Makes a module data-parallel, on the device.

    Attributes:
        stream: Where its images come from.

    Raises:
        ConfigError: A vocabulary that cannot be embedded, or a kind of protector without weights.
        UsageError: A source without images.
        ProtectorError: The encoder's weights cannot be loaded here.
    """

    def __init__(
        self,
        config: TrainerConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        num_threads: int = 1,
        bank: ConceptBank | None = None,
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.encoder = load_encoder(config.encoder)
        self._encode = self.encoder.encode_image
        torch.manual_seed(config.seed)  # the same start on every rank
        self.generator = build_model(config.generator, self.encoder.embedding_dim)
        if not any(parameter.requires_grad for parameter in self.generator.parameters()):
            raise ConfigError(
                f"a protector of kind {config.kind!r} has nothing to train; one4all fit makes some "
                "that are not trained"
            )
        self.objective = build_objective(config.objective, self._context(bank))
        # Images come with channels last; convolutions are fastest if weights have them there, too.
        self.encoder.to(self.device).to(memory_format=torch.channels_last)
        self._pass = _Pass(self.generator, self.objective, config.epsilon_levels / 255)
        self._model = wrap(self._pass.to(self.device).to(memory_format=torch.channels_last))
        self._weights = [weight for weight in self._pass.parameters() if weight.requires_grad]
        self._fused = self.device.type in _FUSED_DEVICES
        self.optimizer = torch.optim.Adam(
            self._weights,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=self._fused,
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate_at)
        open_stream = partial(
            ImageStream,
            size=self.working_size,
            seed=config.seed,
            open_shards=config.open_shards,
            sidecar_patterns=config.sidecar_patterns,
            num_threads=num_threads,
        )
        source, share = config.source.split(","), config.validation_share
        self.stream = open_stream(
            source,
            shuffle_buffer=config.shuffle_buffer,
            part=(share, 1),
            pin_memory=self.device.type == "cuda",
        )
        self._validation: ImageStream | None = None
        if (share or config.validation_source) and rank == 0:
            self._validation = open_stream(
                source if share else config.validation_source.split(","),
                shuffle_buffer=config.validation_images,
                part=(0, share or 1),
            )
        self._validation_BHWC: Tensor | None = None
        self._rank, self._world_size = rank, world_size
        self.step_number = 0
        self.shares = deal([], world_size)[rank]
        self._loss: Tensor | float = math.nan  # of the last batch
        self._scalars: Scalars = {}

    @property
    def damaged(self) -> Mapping[str, str]:
        """Why units could not be read to their end, by URI: those that this rank has met so far."""
        return self.stream.damaged | (self._validation.damaged if self._validation else {})

    @property
    def working_size(self) -> int:
        """Side in pixels of the images in training."""
        return self.config.working_size or self.encoder.input_size

    @torch.no_grad()
    def check(self) -> None:
        """One image through generator and objective, so that a misfit shows before Ray starts.

        Raises:
            ConfigError: Working size, vocabulary and objective do not fit together.
        """
        self.objective.check()
        size = self.working_size
        clean = torch.zeros(1, 3, size, size, device=self.device)
        _, scalars = self._model.eval()(clean, self.encoder.encode_image(clean))
        if taken := {
            name for name in scalars if name in RESERVED_SCALARS or name.startswith(VALIDATION)
        }:
            raise ConfigError(
                f"objective {self.config.objective.name!r} names a scalar {min(taken)!r}, as "
                "something that is logged for every objective; give it another name"
            )

    def steps(self) -> Iterator[int]:
        """Train to the end, yielding the number of each step when it is done, from 1.

        Raises:
            NotFiniteError: See `step`.
        """
        self._model.train()
        batches = self.stream.batches(self.config.images_per_step, self.shares)
        with closing(batches):
            while self.step_number < self.config.steps:
                batch = next(batches)
                self.step(batch.image_BHWC, batch.names)
                self.shares = batch.shares
                self.step_number += 1
                yield self.step_number

    def step(self, image_BHWC: Tensor, names: Sequence[tuple[str, str]] = ()) -> None:
        """One optimiser step on clean images.

        Args:
            image_BHWC: uint8 (N, S, S, 3), computed ``batch_size`` at once.
            names: Unit and key of each image, for an error to name.

        Raises:
            NotFiniteError: A loss or a gradient is NaN or infinite, of whichever rank: all of them
                raise it at the same step. No weight was changed.
        """
        # What is random in a step depends on nothing that came before: resumed is uninterrupted.
        torch.manual_seed(self._seed_of_step())
        self.optimizer.zero_grad(set_to_none=True)
        batches = torch.split(image_BHWC, self.config.batch_size)
        losses: list[Tensor] = []
        for number, batch_BHWC in enumerate(batches, 1):
            with nullcontext() if number == len(batches) else self._without_exchange():
                losses.append(self._backward(batch_BHWC, 1 / len(batches)))
        self._loss = losses[-1]
        # The only question to the device in a step: here it has little left to do.
        gradients = [weight.grad for weight in self._weights if weight.grad is not None]
        if not math.isfinite(get_total_norm(gradients)):
            raise self._not_finite(losses, names)
        self.optimizer.step()
        self._schedule.step()

    def _not_finite(
        self, losses: Sequence[Tensor], names: Sequence[tuple[str, str]]
    ) -> NotFiniteError:
        """What to say of a step with these losses, of its batches in order."""
        size, values = self.config.batch_size, [float(loss) for loss in losses]
        place = f"step {self.step_number + 1}, rank {self._rank}"
        for number, value in enumerate(values):
            if not math.isfinite(value):
                batch = list(names[number * size :][:size])
                return NotFiniteError(
                    f"{place}: the loss of a batch is {value}", batch, is_loss=True
                )
        return NotFiniteError(
            f"{place}: a gradient is not finite, of losses of {max(values):.3g} at most",
            list(names),
            is_loss=False,
        )

    def _without_exchange(self) -> AbstractContextManager[None]:
        """Workers exchange gradients once a step, with its last batch."""
        no_sync = getattr(self._model, "no_sync", nullcontext)
        context: AbstractContextManager[None] = no_sync()
        return context

    def _backward(self, image_BHWC: Tensor, weight: float) -> Tensor:
        """Add the gradients of one batch of clean images, uint8 (B, S, S, 3); its loss."""
        loss, self._scalars = self._forward(self._model, image_BHWC)
        # A loss that is not finite must leave no gradient that is: so every rank sees it.
        weight_ = torch.where(loss.detach().isfinite(), weight, math.nan).to(loss.dtype)
        torch.autograd.backward(loss, weight_)
        return loss.detach()

    def _forward(self, model: nn.Module, image_BHWC: Tensor) -> tuple[Tensor, Scalars]:
        """Loss and scalars of clean images, uint8 (B, S, S, 3)."""
        # Collated with channels last, permuted here: that is the fast memory layout.
        clean = image_BHWC.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float() / 255
        gpu = self.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if gpu else nullcontext():
            with torch.no_grad():
                clean_BD = self._encode_image(clean)
            result: tuple[Tensor, Scalars] = model(clean, clean_BD)
        return result

    def _encode_image(self, image_BCHW: Tensor) -> Tensor:
        return self._encode(image_BCHW)

    def compile(self) -> str:
        """Have generator and encoder compiled when they are first called, if that works here.

        Returns:
            Why it does not, in a sentence; "" if it does.
        """
        if problem := _compiler_problem(self.device):
            return f"training goes on without torch.compile, which fails here: {problem}"
        self.generator.compile()
        self._encode = torch.compile(self.encoder.encode_image)
        return ""

    @property
    def validates(self) -> bool:
        """Whether the step that was done last is one after which to `validate`, on this rank."""
        config = self.config
        due = self.step_number % config.validate_every == 0 or self.step_number == config.steps
        return due and self._validation is not None

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Means of loss and scalars over the validation images, their names with `VALIDATION`.

        Only rank 0 has any; others wait for it in their next step. So figures are the same with any
        number of ranks.

        Raises:
            UsageError: None of the images can be read.
        """
        if self._validation is None:
            return {}
        if self._validation_BHWC is None:
            self._validation_BHWC = self._validation.first(self.config.validation_images)
        torch.manual_seed(self.config.seed)  # the next step seeds anew
        self._pass.eval()
        sums: dict[str, Tensor | float] = {}
        for batch_BHWC in torch.split(self._validation_BHWC, self.config.batch_size):
            loss, scalars = self._forward(self._pass, batch_BHWC)
            for name, value in {"loss": loss, **scalars}.items():
                sums[name] = sums.get(name, 0.0) + len(batch_BHWC) * value
        self._pass.train()
        count = len(self._validation_BHWC)
        return {VALIDATION + name: float(value) / count for name, value in sums.items()}

    def metrics(self) -> dict[str, float]:
        """Figures of the last step: of its last batch, the loss and the objective's scalars."""
        return {
            "step": self.step_number,
            "epoch": self.shares[0].epoch,
            "loss": float(self._loss),
            **{name: float(value) for name, value in self._scalars.items()},
            "learning_rate": float(self._schedule.get_last_lr()[0]),
        }

    def save(self, folder: Path, of_ranks: Sequence[Shares] = ()) -> None:
        """Write all that resuming needs; a file of tensors and numbers only.

        Args:
            folder: Folder to write to.
            of_ranks: The ``shares`` of every rank, by rank; of this one, if it is alone.
        """
        state = {
            "generator": self.generator.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "step": self.step_number,
            "shares": [
                [share.to_list() for share in shares] for shares in of_ranks or [self.shares]
            ],
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
        # Before there was a choice of objectives, there was one, which has no state.
        self.objective.load_state_dict(state.get("objective", {}))
        for group in state["optimizer"]["param_groups"]:
            group["fused"] = self._fused  # it may have been saved on another device
        self.optimizer.load_state_dict(state["optimizer"])
        for weight, moments in self.optimizer.state.items():
            for name, value in moments.items():
                if value.shape == weight.shape and value.stride() != weight.stride():
                    moments[name] = torch.empty_like(weight).copy_(value)
        self._schedule.load_state_dict(state["schedule"])
        self.step_number = state["step"]
        of_ranks = [tuple(map(Share.from_list, shares)) for shares in state["shares"]]
        self.shares = deal(of_ranks, self._world_size)[self._rank]

    def protector(self, name: str, training: dict[str, Any]) -> Protector:
        """The trained protector, with its card."""
        config = self.config
        self.generator.to(memory_format=torch.contiguous_format)
        return Protector.assemble(
            config.encoder,
            self.encoder.cpu(),
            self.generator,
            name=name,
            working_size=self.working_size,
            config=config.generator,
            epsilon_levels=config.epsilon_levels,
            bank=self.objective.bank,
            training=training,
        )

    def _context(self, known: ConceptBank | None) -> ObjectiveContext:
        config, encoder = self.config, self.encoder
        return ObjectiveContext(
            encode_image=self._encode_image,
            embedding_dim=encoder.embedding_dim,
            concept_bank=partial(
                ConceptBank.build,
                config.vocabulary,
                encoder,
                templates=config.templates,
                known=known,
            ),
            working_size=self.working_size,
            epsilon_levels=config.epsilon_levels,
        )

    def _seed_of_step(self) -> int:
        words = np.random.SeedSequence((self.config.seed, self._rank, self.step_number))
        return int(words.generate_state(1, np.uint64)[0] >> 1)

    def _rate_at(self, step: int) -> float:
        """Warm-up over 1 % of the steps, then cosine to 0."""
        warm_up = max(1, self.config.steps // 100)
        progress = max(0, step - warm_up) / max(1, self.config.steps - warm_up)
        return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _compiler_problem(device: torch.device) -> str:
    """Why torch.compile does not work here; "" if it does."""
    try:
        torch.compile(_probe)(torch.ones(8, device=device))
    except Exception as error:  # of many kinds, by what is missing
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ""


def _probe(values: Tensor) -> Tensor:
    return values.sin() + values
