"""What an adversary does against a protection before giving up on the images.

Two kinds. A `Purifier` changes the training images once, before training; test images stay clean.
A `TrainingAttack` changes each batch and the loss. Both are deterministic given a seed.

`ATTACKS` holds all, `find_attack` finds one by name. Early stopping needs no attack: it is
``AdversaryResult.peak``. A published model (fine-tuned, probed) is an adversary, not an attack.
"""

from __future__ import annotations

from one4all.errors import ConfigError
from one4all.evaluation.attacks.projection import PROJECTIONS
from one4all.evaluation.attacks.purification import PURIFIERS, Purifier
from one4all.evaluation.attacks.training import TRAINING_ATTACKS, Loss, TrainingAttack

Attack = Purifier | TrainingAttack

_ALL: tuple[Attack, ...] = (*PURIFIERS, *PROJECTIONS, *TRAINING_ATTACKS)
ATTACKS: dict[str, Attack] = {attack.name: attack for attack in _ALL}


def find_attack(name: str) -> Attack:
    """The attack of a name.

    Raises:
        ConfigError: No such attack; the message lists all.
    """
    if name not in ATTACKS:
        raise ConfigError(f"no attack {name!r}; there are {', '.join(ATTACKS)}")
    return ATTACKS[name]


__all__ = [
    "ATTACKS",
    "Attack",
    "Loss",
    "Purifier",
    "TrainingAttack",
    "find_attack",
]
