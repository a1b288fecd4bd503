"""Build the two pictures of the README, in docs/pictures/, with the shipped protector.

    python tools/build_readme_picture.py

clean-and-protected.jpg: an embedded photo beside its protected copy, pixel for pixel.
perturbation.jpg: what was added, amplified.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from one4all.protectors.protector import Protector

ROOT = Path(__file__).parents[1]
PHOTO = ROOT / "one4all/assets/photos/chelsea.jpg"
PICTURES = ROOT / "docs/pictures"
GAP = 6  # pixels of white between the panels


def main() -> None:
    clean = np.asarray(Image.open(PHOTO).convert("RGB"))
    protector = Protector.load("default")
    protected = protector.protect([clean])[0]
    gap = np.full((len(clean), GAP, 3), 255, np.uint8)
    save(np.hstack([clean, gap, protected]), "clean-and-protected.jpg")

    amplification = 127 // protector.card.epsilon_levels
    amplified = 128 + amplification * (protected.astype(int) - clean)
    save(amplified.clip(0, 255).astype(np.uint8), "perturbation.jpg")


def save(pixels: np.ndarray, name: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(PICTURES / name, quality=90, subsampling=0, optimize=True)


if __name__ == "__main__":
    main()
