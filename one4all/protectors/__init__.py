"""Protectors: the artefact that protects images, and its kinds.

* `protector`, `card`: the artefact: load it, protect with it, save it.
* `kinds`: the kinds there are: `generator`, a trained network; `codebook`, one pattern for each
  concept. `model` is what every kind has to be, `config` has the settings of each.
"""
