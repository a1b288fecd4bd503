"""Concept vocabularies: a text file, one concept a line.

``#`` starts a comment, blank lines are skipped. Shipped: ``imagenet1k`` (1,000 names) and ``broad``
(a few dozen everyday concepts).
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from one4all.errors import ConfigError

_SHIPPED = files("one4all") / "assets" / "vocabularies"


def load_vocabulary(vocabulary: str) -> tuple[str, ...]:
    """The concepts of a shipped vocabulary or of a text file, in order.

    Raises:
        ConfigError: Unknown, empty, or with a concept listed twice.
    """
    shipped = _SHIPPED / f"{vocabulary}.txt"
    path = Path(vocabulary)
    if "/" not in vocabulary and shipped.is_file():
        text = shipped.read_text("utf-8")
    elif path.is_file():
        text = path.read_text("utf-8")
    else:
        raise ConfigError(
            f"no vocabulary {vocabulary!r}: give a text file or one of "
            f"{', '.join(shipped_vocabularies())}"
        )
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    concepts = tuple(line for line in lines if line)
    if not concepts:
        raise ConfigError(f"vocabulary {vocabulary!r} lists no concept")
    doubled = sorted({concept for concept in concepts if concepts.count(concept) > 1})
    if doubled:
        raise ConfigError(f"vocabulary {vocabulary!r} lists {doubled[0]!r} more than once")
    return concepts


def shipped_vocabularies() -> list[str]:
    """Names of the vocabularies inside the package."""
    return sorted(entry.name.removesuffix(".txt") for entry in _SHIPPED.iterdir())
