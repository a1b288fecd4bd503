"""The training step of configs/train, with an encoder of the right size and random weights."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
import torch.nn.functional as F
import yaml
from gpu.record import Figures, Record, free_memory, peak_memory
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from one4all.encoders.base import Encoder
from one4all.training import trainer as training
from one4all.training.trainer import GeneratorTrainer, TrainerConfig

ROOT = Path(__file__).parents[2]
CONFIGS = ("imagenet", "paper")
_SECONDS = 8.0  # of each measurement
_LEAST_STEPS, _WARM_UP_STEPS = 5, 3


class RandomEncoder(Encoder):
    """A ViT-B/32 with the embedding of CLIP's, and no training: as much arithmetic, no weights.

    Args:
        tiny: One narrow block, for images of 32 pixels.
    """

    templates = ("a photo of a {}.",)

    def __init__(self, *, tiny: bool) -> None:
        super().__init__(mean=(0.481, 0.458, 0.408), std=(0.269, 0.261, 0.276))
        self.input_size, self.embedding_dim = (32, 16) if tiny else (224, 512)
        small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
        self._tower: nn.Module = timm.create_model(
            "vit_base_patch32_224",
            pretrained=False,
            num_classes=self.embedding_dim,
            **(small if tiny else {}),
        )
        self.freeze()

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """See the base class: a random direction for each."""
        random = torch.Generator().manual_seed(0)
        return F.normalize(torch.randn(len(texts), self.embedding_dim, generator=random), dim=1)

    def content_hash(self) -> str:
        return self._digest(self._tower)

    def _embed_image(self, normalised_BCHW: Tensor) -> Tensor:
        result: Tensor = self._tower(normalised_BCHW)
        return result


def measure_training(
    record: Record, corpus: str, device: torch.device, threads: int, *, tiny: bool, compiler: str
) -> None:
    """Rows of each configuration: a step alone, behind the loader, and data-parallel.

    Args:
        record: Where they go.
        corpus: Corpus that is learnt from.
        device: Where.
        threads: Threads of the loader.
        tiny: Two images of 32 pixels a step.
        compiler: Backend of torch.compile for the generator: then only the first configuration, a
            step alone. "" compiles nothing.
    """

    def row(config: str, name: str, **options: Any) -> None:
        record.measure(
            "training step",
            f"{config}.yaml, {name}",
            lambda: _measure(config, corpus, device, threads, tiny=tiny, **options),
        )

    if compiler:
        row(CONFIGS[0], "step alone, compiled", compiler=compiler)
        return
    for config in CONFIGS:
        row(config, "step alone")
        row(config, "with the loader", with_loader=True)
        row(config, f"DDP of one rank, {_ddp_backend(device)}", ddp=True)


def _measure(
    name: str,
    corpus: str,
    device: torch.device,
    threads: int,
    *,
    tiny: bool,
    with_loader: bool = False,
    ddp: bool = False,
    compiler: str = "",
) -> Figures:
    """Images/s and memory of a configuration; with half of a batch if the whole does not fit."""
    batch_size = 2 if tiny else 0
    while True:
        config = _config(name, corpus, batch_size, tiny=tiny)
        try:
            with _one_rank(device) if ddp else _alone() as wrap:
                trainer = _trainer(config, device, threads, wrap, tiny=tiny)
                if compiler:
                    trainer.generator.compile(backend=compiler)
                return _timed(trainer, device, with_loader=with_loader, tiny=tiny)
        except torch.OutOfMemoryError:
            if config.batch_size < 8:
                raise
        # Outside of the handler, whose error holds on to the memory.
        trainer = None  # type: ignore[assignment]
        gc.collect()
        free_memory()
        batch_size = config.batch_size // 2


def _config(name: str, corpus: str, batch_size: int, *, tiny: bool) -> TrainerConfig:
    """What a file of configs/train says of the training itself, on this corpus."""
    text = (ROOT / "configs" / "train" / f"{name}.yaml").read_text("utf-8")
    known = {k: v for k, v in yaml.safe_load(text).items() if k in TrainerConfig.model_fields}
    known |= {"source": corpus}
    if batch_size:
        known |= {"batch_size": batch_size}
    config = TrainerConfig.model_validate(known)
    if tiny:
        narrow = config.generator.model_copy(update={"width": 8, "num_blocks": 1})
        config = config.model_copy(update={"working_size": 32, "generator": narrow})
    return config


def _trainer(
    config: TrainerConfig,
    device: torch.device,
    threads: int,
    wrap: Callable[[nn.Module], nn.Module],
    *,
    tiny: bool,
) -> GeneratorTrainer:
    """A trainer whose encoder is the stand-in: its own cannot be loaded on a bare machine."""
    with patch.object(training, "load_encoder", lambda config: RandomEncoder(tiny=tiny)):
        return GeneratorTrainer(config, device=device, num_threads=threads, wrap=wrap)


def _timed(
    trainer: GeneratorTrainer, device: torch.device, *, with_loader: bool, tiny: bool
) -> Figures:
    num_images = trainer.config.images_per_step
    steps = trainer.steps() if with_loader else _steps(trainer, num_images)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(1 if tiny else _WARM_UP_STEPS):
        next(steps)
    _wait(device)
    warm_up = time.perf_counter() - start
    count, start = 0, time.perf_counter()
    while count < (1 if tiny else _LEAST_STEPS) or (
        not tiny and time.perf_counter() - start < _SECONDS
    ):
        next(steps)
        count += 1
    _wait(device)
    seconds = (time.perf_counter() - start) / count
    loss = trainer.metrics()["loss"]
    if not math.isfinite(loss):
        raise ArithmeticError(f"the loss is {loss} after {count} steps")
    return {
        "images/s": round(num_images / seconds, 2),
        "ms a step": round(1000 * seconds, 1),
        "batch": num_images,
        "steps": count,
        "warm-up, s": round(warm_up, 1),
        "generator, M weights": sum(p.numel() for p in trainer.generator.parameters()) / 1e6,
        **peak_memory(),
    }


def _steps(trainer: GeneratorTrainer, num_images: int) -> Iterator[None]:
    """Steps on one batch of noise, which lies ready."""
    size = trainer.working_size
    random = torch.Generator().manual_seed(0)
    shape = (num_images, size, size, 3)
    image_BHWC = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
    while True:
        trainer.step(image_BHWC)
        yield


def _wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def _ddp_backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


@contextmanager
def _alone() -> Iterator[Callable[[nn.Module], nn.Module]]:
    yield lambda module: module


@contextmanager
def _one_rank(device: torch.device) -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Within it, a function that makes a module data-parallel, over one rank."""
    if device.type == "cuda":
        torch.cuda.set_device(0)
    # In this process alone: no port, no file.
    torch.distributed.init_process_group(
        _ddp_backend(device), store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    devices = [0] if device.type == "cuda" else None
    try:
        yield lambda module: DistributedDataParallel(module, device_ids=devices)
    finally:
        torch.distributed.destroy_process_group()
