"""The codes that a codebook gives to photos, as a file: the photos are protected without encoders.

The encoders' weights and a set of photos are too large to travel together. A code is a few bits,
and is all that a codebook takes from an image's embedding.

Shape suffixes: N images, b bits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from one4all.evaluation.labelled import LabelledImages
from one4all.perturbation import apply_perturbation
from one4all.protectors.codebook import Codebook
from one4all.protectors.config import CodebookConfig, PatternConfig

FILE = "codes.json"


@dataclass(frozen=True)
class Codes:
    """What a protector of kind codebook does to a set of images.

    Attributes:
        pattern: Look of a code.
        epsilon_levels: Budget.
        bits_Nb: Code of each image, int8 +-1.
    """

    pattern: PatternConfig
    epsilon_levels: int
    bits_Nb: Tensor

    def protect(self, images: LabelledImages) -> LabelledImages:
        """The protected copy: what the protector itself makes of them."""
        codebook = Codebook(CodebookConfig(num_concepts=1, pattern=self.pattern), embedding_dim=1)
        deltas = self.epsilon_levels * codebook.paint(self.bits_Nb).permute(0, 2, 3, 1).numpy()
        protected = np.empty_like(images.images_NHWC)
        for index, (clean, delta) in enumerate(zip(images.images_NHWC, deltas, strict=True)):
            protected[index] = apply_perturbation(
                clean, codebook.place(delta, clean), epsilon_levels=self.epsilon_levels
            )
        return replace(images, images_NHWC=protected)

    def to_json(self) -> dict[str, Any]:
        """As JSON: a line of + and - for each image."""
        return {
            "pattern": self.pattern.model_dump(),
            "epsilon_levels": self.epsilon_levels,
            "codes": ["".join("-+"[bit > 0] for bit in code) for code in self.bits_Nb.tolist()],
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Codes:
        """The inverse of `to_json`."""
        bits = [[1 if sign == "+" else -1 for sign in code] for code in content["codes"]]
        return cls(
            PatternConfig(**content["pattern"]),
            content["epsilon_levels"],
            torch.tensor(bits, dtype=torch.int8),
        )


def write_codes(folder: Path, codes: dict[str, Codes]) -> None:
    """Write the codes of a photo set, by condition."""
    content = {name: entry.to_json() for name, entry in codes.items()}
    (folder / FILE).write_text(json.dumps(content) + "\n", "utf-8")


def read_codes(folder: Path) -> dict[str, Codes]:
    """The inverse of `write_codes`."""
    content = json.loads((folder / FILE).read_text("utf-8"))
    return {name: Codes.from_json(entry) for name, entry in content.items()}
