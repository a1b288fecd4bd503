"""Pack loose images of a folder or bucket into shards, on all workers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from one4all.corpus.loose_packing import pack_loose_shard, plan_loose_pack
from one4all.corpus.units import Unit
from one4all.errors import UsageError
from one4all.storage import LocalStorage, open_storage
from pipelines.ray_session import ray_session, worker_layout
from pipelines.settings import RayConfig

_WAVE = 1000  # shards handed to Ray at once


def is_loose(source: str) -> bool:
    """Whether a source is packed as loose images: a bucket, or a folder with files at its root."""
    if source.startswith("s3://"):
        return True
    folder = Path(source)
    if not folder.is_dir():
        return False
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    return any(entry.is_file() for entry in entries) or not entries


def pack_loose(
    source_uri: str,
    destination_uri: str,
    *,
    prefix: str = "train",
    labels: bool = False,
    shuffle: bool = True,
    seed: int = 0,
    images_per_shard: int = 1000,
    ray_config: RayConfig,
    on_plan: Callable[[int], None] = lambda num_shards: None,
    on_shard: Callable[[], None] = lambda: None,
) -> tuple[int, int]:
    """Write shards ``<prefix>-000000.tar`` ... of all images below a place, in Ray tasks.

    Args:
        source_uri, destination_uri: Folders or s3:// prefixes.
        prefix: Start of the shard names.
        labels, shuffle, seed: See `plan_loose_pack`.
        images_per_shard: Images in each shard but the last.
        ray_config: Session or cluster.
        on_plan: Called once with the number of shards.
        on_shard: Called as each is written.

    Returns:
        Numbers of shards and images.

    Raises:
        UsageError: No images, or shards of that name exist already.
        SourceChangedError: An image is gone, or was replaced since it was listed.
    """
    source, destination = open_storage(source_uri), open_storage(destination_uri)
    source.check(writable=False)
    destination.check(writable=True)
    existing = next(destination.list(f"{prefix}-"), None)
    if existing is not None:
        raise UsageError(f"{destination.uri} already holds {existing.key}; choose another place")
    if isinstance(source, LocalStorage) and f"{destination.uri}/".startswith(f"{source.uri}/"):
        raise UsageError(f"{destination.uri} lies in {source.uri}; choose another place")
    plan = plan_loose_pack(source, labels=labels, shuffle=shuffle, seed=seed)
    num_shards = -(-len(plan.order_N) // images_per_shard)
    on_plan(num_shards)
    source_uri, destination_uri, classes = source.uri, destination.uri, plan.classes

    def write(batch: dict[str, Any]) -> dict[str, Any]:
        first = int(batch["first"][0])
        pack_loose_shard(
            open_storage(source_uri),
            open_storage(destination_uri),
            f"{prefix}-{first // images_per_shard:06d}.tar",
            Unit.from_json(str(batch["images"][0])).objects,
            first=first,
            classes=classes,
        )
        return {"first": [first]}

    shards = plan.shards(images_per_shard)
    with ray_session(ray_config):
        import ray
        from ray.data import TaskPoolStrategy
        from ray.exceptions import RayTaskError

        workers, _, _ = worker_layout(0, 1, 0)
        while wave := list(islice(shards, _WAVE)):
            rows = [
                {"first": first, "images": Unit("", tuple(images), "images").to_json()}
                for first, images in wave
            ]
            dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                write, batch_size=1, num_cpus=1, compute=TaskPoolStrategy(min(workers, len(rows)))
            )
            try:
                for _ in dataset.iter_rows():
                    on_shard()
            except RayTaskError as error:
                raise error.cause from None
    return num_shards, len(plan.order_N)
