"""Train a generator with Ray Train: job, worker, plan."""
