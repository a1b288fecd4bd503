"""What a protector is compared with: one file per method, one registry.

* `METHODS`, `find_method`: by name; `Method.fit` gives a `FittedMethod`.
* `protect_images`: a corpus through a fitted method, within the budget.
* `load_fitted`: what `FittedMethod.save` wrote.
"""

from one4all.evaluation.methods.base import FittedMethod, protect_images
from one4all.evaluation.methods.registry import METHODS, Method, find_method, load_fitted

__all__ = ["METHODS", "FittedMethod", "Method", "find_method", "load_fitted", "protect_images"]
