"""The models an unauthorised trainer would fit; `attacks` are what they try first.

* `train_adversary`: one recipe on one copy of a corpus, tested on clean images.
* `AdversaryConfig`, `PRESETS`, `find_preset`: recipes; `Augmentation`: what is done to images.
* `build_network`: the architectures; `NETWORKS` their names.
"""

from one4all.evaluation.adversaries.augmentation import Augmentation
from one4all.evaluation.adversaries.networks import NETWORKS, build_network
from one4all.evaluation.adversaries.training import (
    PRESETS,
    AdversaryConfig,
    AdversaryResult,
    find_preset,
    train_adversary,
)

__all__ = [
    "NETWORKS",
    "PRESETS",
    "AdversaryConfig",
    "AdversaryResult",
    "Augmentation",
    "build_network",
    "find_preset",
    "train_adversary",
]
