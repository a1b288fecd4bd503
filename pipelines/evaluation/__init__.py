"""Evaluate methods: grids of trials, on Ray."""
