"""What a protector is compared with: one file per method, one registry.

* `METHODS`, `find_method`: by name; `Method.fit` gives a `FittedMethod`, which protects a corpus.
* What is fitted is `Savable`; `Method.load` reads it.
"""

from one4all.evaluation.methods.base import FittedMethod, Savable
from one4all.evaluation.methods.registry import METHODS, Method, find_method

__all__ = ["METHODS", "FittedMethod", "Method", "Savable", "find_method"]
