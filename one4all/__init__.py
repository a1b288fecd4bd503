"""one4all: protect images against training without consent.

    protector = one4all.load("default")
    protected = protector.protect_image(PIL.Image.open("photo.jpg"))

The method and its data plane, as a library that knows no Ray and no command line. The jobs that
run it at scale are in `pipelines`; what protects, and what does not, is measured in
`one4all.evaluation`. Start here:

* `load`, `Protector`: images in, protected images out, within the budget; `fit` makes one for your
  images.
* `open_storage`, `list_units`, `rewrite_unit`, `audit_unit`: a corpus on folders or S3, unit by
  unit, in a program of your own.
* `Ledger`: what is done.
* `One4AllError` and below: whatever is raised on purpose.

Each name is loaded when it is first asked for: who only lists shards does not wait for PyTorch.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from one4all.audit import UnitAudit, audit_unit
    from one4all.concepts import ConceptBank
    from one4all.corpus import Member, Sample, Unit, list_units, read_samples
    from one4all.encoders import EncoderConfig, load_encoder
    from one4all.encoders.base import Encoder
    from one4all.errors import (
        AccessError,
        BadImageError,
        BindingError,
        BudgetError,
        ConfigError,
        ConflictError,
        LeaseHeldError,
        NotFoundError,
        One4AllError,
        PerturbationError,
        ProtectorError,
        ShardError,
        SourceChangedError,
        StorageError,
        UsageError,
    )
    from one4all.fitting import fit
    from one4all.images import decode, encode
    from one4all.ledger import Binding, Ledger, Manifest
    from one4all.perturbation import apply_perturbation
    from one4all.protectors.card import ProtectorCard
    from one4all.protectors.codebook import Codebook
    from one4all.protectors.config import CodebookConfig, GeneratorConfig
    from one4all.protectors.generator import Generator
    from one4all.protectors.model import PerturbationModel
    from one4all.protectors.protector import Protector, load
    from one4all.rewrite import RewriteConfig, rewrite_unit
    from one4all.storage import Storage, open_storage

__all__ = [
    "AccessError",
    "BadImageError",
    "Binding",
    "BindingError",
    "BudgetError",
    "Codebook",
    "CodebookConfig",
    "ConceptBank",
    "ConfigError",
    "ConflictError",
    "Encoder",
    "EncoderConfig",
    "Generator",
    "GeneratorConfig",
    "LeaseHeldError",
    "Ledger",
    "Manifest",
    "Member",
    "NotFoundError",
    "One4AllError",
    "PerturbationError",
    "PerturbationModel",
    "Protector",
    "ProtectorCard",
    "ProtectorError",
    "RewriteConfig",
    "Sample",
    "ShardError",
    "SourceChangedError",
    "Storage",
    "StorageError",
    "Unit",
    "UnitAudit",
    "UsageError",
    "__version__",
    "apply_perturbation",
    "audit_unit",
    "decode",
    "encode",
    "fit",
    "list_units",
    "load",
    "load_encoder",
    "open_storage",
    "read_samples",
    "rewrite_unit",
]

_MODULES = {
    "audit": "UnitAudit audit_unit",
    "concepts": "ConceptBank",
    "corpus": "Member Sample Unit list_units read_samples",
    "encoders": "EncoderConfig load_encoder",
    "encoders.base": "Encoder",
    "errors": (
        "AccessError BadImageError BindingError BudgetError ConfigError ConflictError "
        "LeaseHeldError NotFoundError One4AllError PerturbationError ProtectorError ShardError "
        "SourceChangedError StorageError UsageError"
    ),
    "fitting": "fit",
    "images": "decode encode",
    "ledger": "Binding Ledger Manifest",
    "perturbation": "apply_perturbation",
    "protectors.card": "ProtectorCard",
    "protectors.codebook": "Codebook",
    "protectors.config": "CodebookConfig GeneratorConfig",
    "protectors.generator": "Generator",
    "protectors.model": "PerturbationModel",
    "protectors.protector": "Protector load",
    "rewrite": "RewriteConfig rewrite_unit",
    "storage": "Storage open_storage",
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}

__version__ = version("one4all")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
