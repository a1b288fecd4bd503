"""Protectors: the artefact that protects images, and its kinds."""
