"""Protectors: the artefact that protects images, and its kinds.

* `protector`, `card`: the artefact: load it, protect with it, save it.
* `kinds`: the kinds there are: `generator`, a trained network; `codebook`, one pattern for each
  concept. `model` is what every kind has to be.
"""

from one4all.encoders.backends import BackendName
from one4all.protectors.card import DEFAULT_PROTECTOR, ProtectorCard, load_card, locate
from one4all.protectors.codebook import Codebook, CodebookConfig
from one4all.protectors.generator import Generator, GeneratorConfig
from one4all.protectors.model import PerturbationModel
from one4all.protectors.protector import Protector, check_protector

__all__ = [
    "DEFAULT_PROTECTOR",
    "Codebook",
    "CodebookConfig",
    "Generator",
    "GeneratorConfig",
    "PerturbationModel",
    "Protector",
    "ProtectorCard",
    "check_protector",
    "load",
    "load_card",
    "locate",
]


def load(protector: str = DEFAULT_PROTECTOR, *, encoder_backend: BackendName = "auto") -> Protector:
    """Load a protector by name, path or URI; see `Protector.load`.

    Args:
        protector: Name of a shipped one (``default``, ``14a``), a folder, or ``s3://bucket/prefix``.
        encoder_backend: What computes embeddings: "auto", "torch", "openvino", or one of these in
            bfloat16.
    """
    return Protector.load(protector, encoder_backend=encoder_backend)
