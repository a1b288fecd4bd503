"""The perturbation generator: delta = epsilon * tanh(G(e, x)).

Shape suffixes: B batch, C channels, H W image, h w perturbation grid, D embedding width.

An encoder-decoder, fully convolutional, with the CLIP embedding of the image joined at the
bottleneck (paper Figure 2). Two presets of one class:

* ``paper``: 3 downsamplings, 24 residual blocks, BatchNorm, width 64: 99 G multiply-adds at 224.
* ``compact``: starts at half resolution, 2 downsamplings, 4 blocks, GroupNorm, width 32. Its
  perturbation grid is half as fine as its input, which makes the pattern smooth; smooth patterns
  survive resizing and JPEG, white noise does not (docs/method.md).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from one4all.errors import ConfigError
from one4all.protectors.config import GeneratorConfig
from one4all.protectors.model import PerturbationModel


class Generator(PerturbationModel):
    """G(e, x) with its bound: embeddings and images in, perturbations within +-1 out.

    Args:
        config: Architecture.
        embedding_dim: Width D of the encoder's embedding.
    """

    def __init__(self, config: GeneratorConfig, embedding_dim: int) -> None:
        super().__init__(config, embedding_dim)
        self.config = config
        width, bottleneck = config.width, config.width * 2**config.num_downsamplings
        joined = config.embedding_channels or embedding_dim
        # A unit-norm embedding has an RMS of 1/sqrt(D) a channel, invisible beside normalised
        # activations of order 1: unscaled, e -> -e moved the released network's output by 2.7 %.
        self.embedding_scale = embedding_dim**0.5
        self.project: nn.Module = (
            nn.Linear(embedding_dim, joined) if config.embedding_channels else nn.Identity()
        )
        self.stem = self._conv(3, width, kernel=7, stride=config.stem_stride)
        self.down = nn.Sequential(
            *(
                self._conv(width * 2**i, width * 2 ** (i + 1), stride=2)
                for i in range(config.num_downsamplings)
            )
        )
        self.join = self._conv(bottleneck + joined, bottleneck)
        self.blocks = nn.Sequential(
            *(_ResidualBlock(bottleneck, config.norm) for _ in range(config.num_blocks))
        )
        self.up = nn.Sequential(
            *(
                self._up(width * 2 ** (i + 1), width * 2**i)
                for i in reversed(range(config.num_downsamplings))
            )
        )
        self.head = nn.Conv2d(width, 3, 7, padding=3, padding_mode="reflect")

    def forward(self, embedding_BD: Tensor, image_BCHW: Tensor) -> Tensor:
        """Perturbations on the scale of the budget.

        Args:
            embedding_BD: L2-normalised image embeddings, float (B, D).
            image_BCHW: Clean images, float (B, 3, H, W) in [0, 1]; H and W multiples of
                ``config.total_stride``.

        Returns:
            tanh(G(e, x)), float (B, 3, H / stem_stride, W / stem_stride), in [-1, 1]; multiply by
            epsilon. The paper's bound is strict and smooth this way (docs/method.md, 13).
        """
        height, width = image_BCHW.shape[-2:]
        if height % self.config.total_stride or width % self.config.total_stride:
            raise ConfigError(
                f"working size {height}x{width} is not a multiple of {self.config.total_stride}, "
                "which this generator needs"
            )
        hidden = self.down(self.stem(image_BCHW * 2 - 1))
        embedding = self.project(embedding_BD * self.embedding_scale)[:, :, None, None]
        embedding = embedding.to(hidden.dtype).expand(-1, -1, *hidden.shape[-2:])
        hidden = self.blocks(self.join(torch.cat([hidden, embedding], dim=1)))
        result: Tensor = torch.tanh(self.head(self.up(hidden)))
        return result

    def _conv(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(
                inputs, outputs, kernel, stride, kernel // 2, padding_mode="reflect", bias=False
            ),
            _norm(self.config.norm, outputs),
            nn.ReLU(inplace=True),
        )

    def _up(self, inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.ConvTranspose2d(inputs, outputs, 3, 2, 1, output_padding=1, bias=False),
            _norm(self.config.norm, outputs),
            nn.ReLU(inplace=True),
        )


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for activation in (nn.ReLU(inplace=True), nn.Identity()):
            conv = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect", bias=False)
            layers += [conv, _norm(norm, channels), activation]
        self.layers = nn.Sequential(*layers)

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = hidden + self.layers(hidden)
        return result


def _norm(kind: str, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(8, channels)


def count_multiply_adds(generator: Generator, *, embedding_dim: int, size: int) -> int:
    """Multiply-adds for one image of ``size`` x ``size`` pixels."""
    from torch.utils.flop_counter import FlopCounterMode  # it brings triton

    with torch.device("meta"):
        shadow = Generator(generator.config, embedding_dim).eval()
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            shadow(torch.empty(1, embedding_dim), torch.empty(1, 3, size, size))
    return counter.get_total_flops() // 2
