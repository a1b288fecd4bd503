"""Any open_clip model, by name and pretrained tag, or from a local checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from one4all.encoders.base import Encoder
from one4all.encoders.config import EncoderConfig
from one4all.errors import ConfigError, ProtectorError
from one4all.extras import require


class OpenClipEncoder(Encoder):
    """Any open_clip model.

    The activation is checked after loading: OpenAI's weights need QuickGELU, which the plain model
    names do not have, and nothing fails when it is missing (docs/method.md).
    """

    templates = ("a photo of a {}.",)

    def __init__(self, config: EncoderConfig) -> None:
        require("open_clip", "clip")
        import open_clip

        if not config.model_name or not config.pretrained:
            raise ConfigError("an open_clip encoder needs model_name and pretrained")
        quick_gelu = _required_activation(config)
        try:
            model = open_clip.create_model(
                config.model_name,
                pretrained=config.pretrained,
                force_quick_gelu=quick_gelu,
                require_pretrained=True,
            )
            tokenizer = open_clip.get_tokenizer(config.model_name)
        except Exception as error:  # hub, file and checkpoint errors of every kind
            reason = str(error).strip().partition("\n")[0]
            raise ProtectorError(
                f"open_clip cannot load {config.model_name!r} with weights "
                f"{config.pretrained!r}: {reason}"
            ) from error
        has_quick_gelu = any(type(m).__name__ == "QuickGELU" for m in model.modules())
        if has_quick_gelu != quick_gelu:
            raise ConfigError(
                f"{config.model_name!r} was loaded with quick_gelu={has_quick_gelu}, but weights "
                f"{config.pretrained!r} need {quick_gelu}; choose "
                f"{_other_activation(config.model_name)!r}"
            )
        preprocess = open_clip.get_model_preprocess_cfg(model)
        super().__init__(mean=preprocess["mean"], std=preprocess["std"])
        size = preprocess["size"]
        self.input_size = int(size[0] if isinstance(size, (tuple, list)) else size)
        if config.input_size not in (0, self.input_size):
            raise ConfigError(
                f"{config.model_name!r} encodes at {self.input_size} pixels, not "
                f"{config.input_size}; leave input_size at 0"
            )
        self._model = model
        self._tokenizer = tokenizer
        with torch.no_grad():
            blank = torch.zeros(1, 3, self.input_size, self.input_size)
            self.embedding_dim = model.encode_image(blank).shape[1]

    @property
    def visual(self) -> nn.Module:
        """The image tower: normalised images to features before L2 normalisation."""
        tower: nn.Module = self._model.visual
        return tower

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        batches = []
        for start in range(0, len(texts), 256):
            tokens = self._tokenizer(list(texts[start : start + 256]))
            batches.append(self._model.encode_text(tokens.to(self._mean.device)).float())
        return F.normalize(torch.cat(batches), dim=1)

    def content_hash(self) -> str:
        return self._digest(self._model.visual)

    def _embed_image(self, normalised_BCHW: Tensor) -> Tensor:
        result: Tensor = self._model.encode_image(normalised_BCHW)
        return result


def _required_activation(config: EncoderConfig) -> bool:
    """Whether these weights need QuickGELU: known for a tag, to be stated for a file."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    base = config.model_name.removesuffix("-quickgelu")
    tag = get_pretrained_cfg(base, config.pretrained) or get_pretrained_cfg(
        config.model_name, config.pretrained
    )
    if tag:
        needed = bool(tag.get("quick_gelu", False))
        if config.quick_gelu not in (None, needed):
            raise ConfigError(
                f"weights {config.pretrained!r} were trained with quick_gelu={needed}; remove "
                "quick_gelu from the configuration"
            )
        return needed
    if config.quick_gelu is not None:
        return config.quick_gelu
    ambiguous = f"{base}-quickgelu" in open_clip.list_models()
    if ambiguous and Path(config.pretrained).exists():
        raise ConfigError(
            f"{config.pretrained!r} may have been trained with either activation of {base!r}; say "
            "encoder.quick_gelu: true (OpenAI's weights, and DFN's) or false (most others)"
        )
    return config.model_name.endswith("-quickgelu")


def _other_activation(model_name: str) -> str:
    suffix = "-quickgelu"
    return model_name.removesuffix(suffix) if model_name.endswith(suffix) else model_name + suffix
