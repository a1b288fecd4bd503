"""What training costs for one image, from the shapes alone: no weights, no images, no device.

Shape suffixes: B batch, C channels, H W image, D embedding width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from one4all.encoders import EncoderConfig, load_encoder
from one4all.errors import ConfigError
from one4all.extras import require
from one4all.protectors.kinds import build_model
from one4all.training.trainer import TrainerConfig

_FLOAT = 4  # bytes


@dataclass(frozen=True)
class ImageCost:
    """Memory and arithmetic of one image in one step.

    The objective is taken for one that encodes the protected image, as Eq. 4 does, which costs most
    by far; networks of its own are not counted.

    Attributes:
        working_size: Side of the image in pixels.
        encoder_bytes: Weights of the encoder, its text side included, in float32.
        generator_bytes: Weights of the generator, their gradients, and Adam's two moments.
        activation_bytes: Tensors kept from the forward for the backward pass, in float32.
        flops: Floating-point operations of both passes; a multiply-add is two.
    """

    working_size: int
    encoder_bytes: int
    generator_bytes: int
    activation_bytes: int
    flops: int


def cost_of_an_image(config: TrainerConfig) -> ImageCost:
    """Trace one step of one image on PyTorch's meta device.

    Raises:
        ConfigError: No such model, or a working size that does not fit the generator.
    """
    encode, tower, encoder_size, encoder_bytes = _image_side(config.encoder)
    size = config.working_size or encoder_size
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.device("meta"):
        clean_BCHW = torch.empty(1, 3, size, size)
        counter = FlopCounterMode(display=False)
        with counter:
            with torch.no_grad():
                embedding_BD = encode(_resized(clean_BCHW, encoder_size))
            generator = build_model(config.generator, embedding_dim=embedding_BD.shape[1])
            weights = {p.untyped_storage()._cdata for p in _tensors(generator, tower)}
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                delta_BCHW = _resized(generator(embedding_BD, clean_BCHW), size)
                protected_BCHW = (clean_BCHW + delta_BCHW).clamp(0, 1)
                result = encode(_resized(protected_BCHW, encoder_size)).sum()
            result.backward()  # type: ignore[no-untyped-call]
    return ImageCost(
        working_size=size,
        encoder_bytes=encoder_bytes,
        generator_bytes=4 * _FLOAT * sum(p.numel() for p in generator.parameters()),
        activation_bytes=sum(count for key, count in saved.items() if key not in weights),
        flops=counter.get_total_flops(),
    )


def _image_side(
    config: EncoderConfig,
) -> tuple[Callable[[Tensor], Tensor], nn.Module, int, int]:
    """How images are encoded, by which module on the meta device, at which size; and its bytes."""
    if config.kind == "embedded":
        encoder = load_encoder(config)
        num_bytes = _num_bytes(encoder)
        encoder.to("meta")
        return encoder.encode_image, encoder, encoder.input_size, num_bytes
    require("open_clip", "clip")
    import open_clip

    if config.model_name not in open_clip.list_models():
        raise ConfigError(
            f"encoder.model_name: open_clip has no model {config.model_name!r}; "
            "open_clip.list_models() lists them"
        )
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # that no weights are loaded, which is the point
    try:
        model = open_clip.create_model(config.model_name, load_weights=False)
    finally:
        logging.disable(before)
    model.requires_grad_(False).eval()
    size = model.visual.image_size
    num_bytes = _num_bytes(model)
    size = int(size[0] if isinstance(size, tuple | list) else size)
    tower = model.visual.to("meta")
    return tower, tower, size, num_bytes


def _resized(image_BCHW: Tensor, size: int) -> Tensor:
    if image_BCHW.shape[-1] == size:
        return image_BCHW
    return F.interpolate(image_BCHW, (size, size), mode="bilinear", antialias=True)


def _tensors(*modules: nn.Module) -> list[Tensor]:
    return [t for m in modules for t in (*m.parameters(), *m.buffers())]


def _num_bytes(module: nn.Module) -> int:
    return sum(p.numel() * _FLOAT for p in module.parameters())
