"""one4all: protect images against training without consent.

The method and its data plane, as a library that knows no Ray and no command line. The jobs that
run it at scale are in `pipelines`. Start here:

* `Protector`: images in, protected images out, within the budget.
* `open_storage`, `read_samples`, `ShardWriter`: shards on folders and S3.
* `Ledger`: what is done.
* `GeneratorConfig`, `ObjectiveConfig`: the method's choices; docs/method.md explains them.

Each name is loaded when it is first asked for: who only lists shards does not wait for PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from one4all.concepts import ConceptBank
    from one4all.corpus.tar import ShardWriter, read_members, read_samples
    from one4all.encoders import Encoder, EncoderConfig, load_encoder
    from one4all.errors import One4AllError, UsageError
    from one4all.images import decode, encode
    from one4all.ledger.ledger import Ledger
    from one4all.ledger.records import Manifest
    from one4all.perturbation import apply_perturbation
    from one4all.protectors.card import ProtectorCard
    from one4all.protectors.generator import Generator, GeneratorConfig
    from one4all.protectors.protector import Protector
    from one4all.storage import Storage, open_storage
    from one4all.training.objectives.concept import ObjectiveConfig, concept_objective

__all__ = [
    "ConceptBank",
    "Encoder",
    "EncoderConfig",
    "Generator",
    "GeneratorConfig",
    "Ledger",
    "Manifest",
    "ObjectiveConfig",
    "One4AllError",
    "Protector",
    "ProtectorCard",
    "ShardWriter",
    "Storage",
    "UsageError",
    "apply_perturbation",
    "concept_objective",
    "decode",
    "encode",
    "load_encoder",
    "open_storage",
    "read_members",
    "read_samples",
]

_HOMES = {
    "ConceptBank": "concepts",
    "Encoder": "encoders",
    "EncoderConfig": "encoders",
    "load_encoder": "encoders",
    "One4AllError": "errors",
    "UsageError": "errors",
    "Generator": "protectors.generator",
    "GeneratorConfig": "protectors.generator",
    "decode": "images",
    "encode": "images",
    "Ledger": "ledger.ledger",
    "Manifest": "ledger.records",
    "ObjectiveConfig": "training.objectives.concept",
    "concept_objective": "training.objectives.concept",
    "apply_perturbation": "perturbation",
    "Protector": "protectors.protector",
    "ProtectorCard": "protectors.card",
    "ShardWriter": "corpus.tar",
    "read_members": "corpus.tar",
    "read_samples": "corpus.tar",
    "Storage": "storage",
    "open_storage": "storage",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
