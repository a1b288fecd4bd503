"""The jobs: everything that knows Ray."""
