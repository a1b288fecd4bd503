"""What a run measures of itself, for Prometheus through Ray; docs/operations.md lists it.

Ray exports a counter ``one4all_images`` as ``ray_one4all_images_total``, from the process that set
it, with the tags below and Ray's own. Outside Ray, as in tests of a plain worker, nothing happens.

What can be counted by the driver of a run is, and not by its workers: a process is a series of its
own, and what a series counts before Prometheus first sees it is lost. Sums are counters, since the
sum of a histogram is not true as Ray exports it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

# Bounds of a histogram. Fine ones: Ray exports the middle of a bucket in place of each value in it.
_SECONDS = tuple(
    round(digit * 10.0**power, 3) for power in range(-2, 4) for digit in (1, 1.5, 2, 3, 5, 7)
)


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


_KEEP_SECONDS = 1.0  # Ray looks at what was set every 10 s, or as often as it is told to
_shown: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
_RUN = ("run", "destination")  # of protect
_TRAINING = ("destination",)
METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "one4all_shards",
            "counter",
            "Attempts at shards by outcome: done, restated, failed, refused, quarantined.",
            (*_RUN, "status"),
        ),
        Metric("one4all_images", "counter", "Images protected, in shards that are done.", _RUN),
        Metric("one4all_bad_images", "counter", "Images dropped or passed through.", _RUN),
        Metric("one4all_bytes_read", "counter", "Bytes of the source shards that are done.", _RUN),
        Metric("one4all_bytes_written", "counter", "Bytes of protected shards.", _RUN),
        Metric(
            "one4all_failures",
            "counter",
            "Failed attempts by kind of error.",
            (*_RUN, "kind"),
        ),
        Metric(
            "one4all_stage_seconds",
            "counter",
            "Seconds that shards kept each stage waiting: read, decode, device, encode, write.",
            (*_RUN, "stage"),
        ),
        Metric("one4all_batches", "counter", "Batches that the device has done.", _RUN),
        Metric(
            "one4all_shard_seconds",
            "histogram",
            "Seconds that one shard kept each stage waiting.",
            (*_RUN, "stage"),
        ),
        Metric("one4all_pending_shards", "gauge", "Shards that this run has still to do.", _RUN),
        Metric(
            "one4all_oldest_pending_timestamp_seconds",
            "gauge",
            "When the oldest shard that is not done yet was written, POSIX; now, if none is.",
            ("destination",),
        ),
        Metric(
            "one4all_last_success_timestamp_seconds",
            "gauge",
            "When a run last left nothing to do, as this one finds it, POSIX; absent if none has.",
            ("destination",),
        ),
        Metric(
            "one4all_trained_images",
            "counter",
            "Images that a generator was trained on.",
            _TRAINING,
        ),
        Metric("one4all_trained_steps", "counter", "Optimiser steps.", _TRAINING),
        Metric("one4all_trained_seconds", "counter", "Seconds of optimiser steps.", _TRAINING),
        Metric("one4all_step_seconds", "histogram", "Time of one optimiser step.", _TRAINING),
        Metric("one4all_training_step", "gauge", "Optimiser steps that are done.", _TRAINING),
        Metric("one4all_training_workers", "gauge", "Workers that train.", _TRAINING),
    )
}


def begin(name: str, /, **tags: str) -> None:
    """Show a counter as 0, before it counts.

    Prometheus sees how much a counter has grown between two looks. One that appears with a value
    has not grown: what it counted until then is in no rate.
    """
    if (metric := _metric(name)) is not None:
        metric._record(0, tags)  # its public method refuses 0


def count(name: str, amount: float = 1, /, **tags: str) -> None:
    """Add to a counter."""
    if (metric := _metric(name)) is not None and amount > 0:
        metric.inc(amount, tags)


def observe(name: str, seconds: float, /, **tags: str) -> None:
    """Add one observation to a histogram."""
    if (metric := _metric(name)) is not None:
        metric.observe(seconds, tags)


def show(name: str, value: float, /, **tags: str) -> None:
    """Set a gauge; it is kept within `gauges_kept`."""
    if (metric := _metric(name)) is not None:
        _shown[name, tuple(sorted(tags.items()))] = value
        metric.set(value, tags)


@contextmanager
def gauges_kept() -> Iterator[None]:
    """Set gauges again and again, within the block, to what they were last set to.

    Ray drops one that is not set for 20 s, and a shard may take minutes.
    """
    stop = threading.Event()

    def keep() -> None:
        while not stop.wait(_KEEP_SECONDS):
            for (name, tags), value in list(_shown.items()):
                if (metric := _metric(name)) is not None:
                    metric.set(value, dict(tags))

    keeper = threading.Thread(target=keep, name="gauges", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        stop.set()
        keeper.join(timeout=10)
        _shown.clear()


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
