"""From pixels to logits: normalisation, resizing, a body and a head, whatever the network.

Pixels are float *levels*, 0..255, so that attacks state their budget in the unit of the bench.

Shape suffixes: B batch, C channels, H W image, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from one4all.errors import ConfigError, UsageError
from one4all.evaluation.adversaries.networks import build_network
from one4all.extras import require

HALF = (0.5, 0.5, 0.5)


class Classifier(nn.Module):
    """A network that takes pixels.

    Args:
        body: Normalised images to features (B, D), or to logits when ``head`` is the identity.
        head: Features to logits.
        mean, std: Normalisation per channel, on the scale of 0..1.
        input_size: Side to which images are resized, bilinear and antialiased; 0 leaves them.
        frozen: The body is neither trained nor ever in training mode: a linear probe.
    """

    def __init__(
        self,
        body: nn.Module,
        head: nn.Module | None = None,
        *,
        mean: Sequence[float] = HALF,
        std: Sequence[float] = HALF,
        input_size: int = 0,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.body = body
        self.head = head or nn.Identity()
        self.frozen = frozen
        self._input_size = input_size
        mean_C, std_C = torch.tensor(mean), torch.tensor(std)
        self.register_buffer("_scale", (255 * std_C).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_shift", (mean_C / std_C).view(1, 3, 1, 1), persistent=False)
        self._scale: Tensor
        self._shift: Tensor
        if frozen:
            body.requires_grad_(False)

    def train(self, mode: bool = True) -> Classifier:
        """See torch; a frozen body stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.body.eval()
        return self

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits, (B, num_classes), of images in float levels 0..255."""
        logits: Tensor = self.head(self.embed(image_BCHW))
        return logits

    def embed(self, image_BCHW: Tensor) -> Tensor:
        """What the body makes of images in float levels 0..255: (B, D)."""
        size = self._input_size
        if size and image_BCHW.shape[-2:] != (size, size):
            image_BCHW = F.interpolate(image_BCHW, (size, size), mode="bilinear", antialias=True)
        features: Tensor = self.body(image_BCHW.div(self._scale).sub(self._shift))
        return features


def build_classifier(
    name: str,
    num_classes: int,
    *,
    image_size: int,
    initial: str,
    width: int,
    stem_stride: int,
    weights: str = "",
    input_size: int = 0,
) -> Classifier:
    """Build what an adversary trains; random draws come from torch's global generator.

    Args:
        name: A network of `build_network`; "efficientnet_lite0", whose ImageNet weights come with
            a package; ``timm:NAME`` or ``open_clip:NAME`` for any model of theirs.
        num_classes: Width of the logits.
        image_size: Side of the images in pixels.
        initial: "scratch"; "fine_tune": published weights and a new linear head, all trained;
            "linear_probe": only the head is trained, on standardised features (batch norm without
            weights, as He et al. 2022 probe), so that one learning rate suits every body.
        width, stem_stride: Arguments of `build_network`; published models have one size.
        weights: Published weights: a tag, or the path of a local file. "" is the model's own tag
            for timm; open_clip needs one.
        input_size: Side to which images are resized for a published model; 0 is its own.

    Raises:
        ConfigError: No such network, or it has no published weights.
        UsageError: The weights cannot be loaded here.
    """
    if not is_published(name):
        if initial != "scratch":
            raise ConfigError(
                f"{name} has no published weights here; initial must be 'scratch', or the network "
                "'efficientnet_lite0', 'timm:NAME' or 'open_clip:NAME'"
            )
        network = build_network(
            name, num_classes, image_size=image_size, width=width, stem_stride=stem_stride
        )
        return Classifier(network)
    body, mean, std, own_size = _load_body(name, weights, pretrained=initial != "scratch")
    size = input_size or own_size
    with torch.no_grad():
        dim = body.eval()(torch.zeros(1, 3, size, size)).shape[1]
    head: nn.Module = nn.Linear(dim, num_classes)
    if initial == "linear_probe":
        head = nn.Sequential(nn.BatchNorm1d(dim, affine=False), head)
    return Classifier(
        body, head, mean=mean, std=std, input_size=size, frozen=initial == "linear_probe"
    )


def is_published(name: str) -> bool:
    """Whether a network comes from elsewhere, with published weights."""
    return name == "efficientnet_lite0" or name.startswith(("timm:", "open_clip:"))


def _load_body(
    name: str, weights: str, *, pretrained: bool
) -> tuple[nn.Module, Sequence[float], Sequence[float], int]:
    """Body, mean, std and input size of a published model."""
    if name == "efficientnet_lite0" and pretrained:
        from one4all.encoders.embedded import load_efficientnet_lite

        tower = load_efficientnet_lite()
        tower.reset_classifier(0)
        return tower, HALF, HALF, 224
    if name.startswith("open_clip:"):
        return _load_open_clip(name.removeprefix("open_clip:"), weights, pretrained=pretrained)
    own_name = "tf_efficientnet_lite0" if name == "efficientnet_lite0" else name[len("timm:") :]
    return _load_timm(own_name, weights, pretrained=pretrained)


def _load_timm(
    name: str, weights: str, *, pretrained: bool
) -> tuple[nn.Module, Sequence[float], Sequence[float], int]:
    import timm
    from timm.data import resolve_model_data_config

    overlay = {"file": weights} if weights else None
    try:
        body = timm.create_model(
            name, pretrained=pretrained, num_classes=0, pretrained_cfg_overlay=overlay
        )
    except Exception as error:  # unknown names, hubs, files and checkpoints, of every kind
        raise _cannot_load(f"timm:{name}", error) from error
    data = resolve_model_data_config(body)
    return body, data["mean"], data["std"], int(data["input_size"][-1])


def _load_open_clip(
    name: str, weights: str, *, pretrained: bool
) -> tuple[nn.Module, Sequence[float], Sequence[float], int]:
    """The image tower. With weights, an encoder's checks of the activation apply to it, too."""
    require("open_clip", "clip")
    import open_clip

    from one4all.encoders import EncoderConfig
    from one4all.encoders.open_clip import OpenClipEncoder

    try:
        if pretrained:
            config = EncoderConfig(kind="open_clip", model_name=name, pretrained=weights)
            encoder = OpenClipEncoder(config)
            return encoder.visual, encoder.mean, encoder.std, encoder.input_size
        model = open_clip.create_model(name)
    except ConfigError:  # says what to do
        raise
    except Exception as error:  # hub, file and checkpoint errors of every kind
        raise _cannot_load(f"open_clip:{name}", error) from error
    preprocess = open_clip.get_model_preprocess_cfg(model)
    size = preprocess["size"]
    side = int(size[0] if isinstance(size, (tuple, list)) else size)
    return model.visual, preprocess["mean"], preprocess["std"], side


def _cannot_load(name: str, error: Exception) -> UsageError:
    reason = str(error).strip().partition("\n")[0]
    return UsageError(
        f"{name} cannot be loaded: {reason}; say its weights as a local file, or use "
        "efficientnet_lite0, whose weights are installed"
    )
