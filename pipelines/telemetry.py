"""What a run measures of itself, for Prometheus through Ray; docs/operations.md lists it.

Ray exports a counter ``one4all_images`` as ``ray_one4all_images_total``, from the process that set
it, with the tags below and Ray's own. Outside Ray, as in tests of a plain worker, nothing happens.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)


@dataclass(frozen=True)
class Metric:
    """One metric; a histogram is of seconds."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    tags: tuple[str, ...] = ()

    @property
    def exported_names(self) -> tuple[str, ...]:
        """Under which names Prometheus finds it."""
        suffixes = {
            "counter": ("_total",),
            "gauge": ("",),
            "histogram": ("_bucket", "_sum", "_count"),
        }
        return tuple(f"ray_{self.name}{suffix}" for suffix in suffixes[self.kind])


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "one4all_shards",
            "counter",
            "Attempts at shards by outcome: done, failed, refused, quarantined.",
            ("status",),
        ),
        Metric("one4all_images", "counter", "Images protected, in shards that are done."),
        Metric("one4all_bad_images", "counter", "Images dropped or passed through."),
        Metric("one4all_bytes_read", "counter", "Bytes of the source shards that are done."),
        Metric("one4all_bytes_written", "counter", "Bytes of protected shards."),
        Metric("one4all_failures", "counter", "Failed attempts by kind of error.", ("kind",)),
        Metric(
            "one4all_stage_seconds",
            "histogram",
            "Time that a shard kept each stage waiting: read, decode, device, encode, write.",
            ("stage",),
        ),
        Metric("one4all_batch_seconds", "histogram", "Time of one batch on the device."),
        Metric("one4all_pending_shards", "gauge", "Shards that this run has still to do."),
        Metric("one4all_trained_images", "counter", "Images that a generator was trained on."),
        Metric("one4all_step_seconds", "histogram", "Time of one optimiser step."),
        Metric("one4all_training_step", "gauge", "Optimiser steps that are done."),
        Metric("one4all_training_workers", "gauge", "Workers that train."),
    )
}


def count(name: str, amount: float = 1, **tags: str) -> None:
    """Add to a counter."""
    if (metric := _metric(name)) is not None and amount > 0:
        metric.inc(amount, tags)


def observe(name: str, seconds: float, **tags: str) -> None:
    """Add one observation to a histogram."""
    if (metric := _metric(name)) is not None:
        metric.observe(seconds, tags)


def show(name: str, value: float, **tags: str) -> None:
    """Set a gauge."""
    if (metric := _metric(name)) is not None:
        metric.set(value, tags)


def _metric(name: str) -> Any:
    """Ray's counterpart of a metric; None outside Ray, which is not imported for this."""
    metric = METRICS[name]  # a misspelt name fails everywhere
    ray = sys.modules.get("ray")
    if ray is None or not hasattr(ray, "is_initialized") or not ray.is_initialized():
        return None
    return _ray_metric(metric)


@cache
def _ray_metric(metric: Metric) -> Any:
    from ray.util import metrics as ray_metrics

    if metric.kind == "histogram":
        return ray_metrics.Histogram(
            metric.name, metric.description, boundaries=list(_SECONDS), tag_keys=metric.tags
        )
    kind = ray_metrics.Counter if metric.kind == "counter" else ray_metrics.Gauge
    return kind(metric.name, metric.description, tag_keys=metric.tags)
