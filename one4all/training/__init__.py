"""Training a protector: what it is trained for, on which images, and one rank's state.

* `objectives`: what a generator is trained for.
* `loader`: the stream of training images, split by rank and resumable.
* `trainer`: the state of one rank, a step at a time.
* `cost`: what training costs for one image, from shapes alone.
"""

VALIDATION = "validation_"
"""How names of figures of the validation images begin; no scalar of an objective may."""
