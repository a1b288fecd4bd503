"""Training a generator: objective, images, one rank's state."""
