"""Protect a corpus: job, worker, plan."""
