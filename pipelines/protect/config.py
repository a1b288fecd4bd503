"""Settings of `one4all protect`."""

from __future__ import annotations

from datetime import date
from typing import Annotated

from pydantic import BeforeValidator, Field

from one4all.encoders.config import BackendName
from one4all.protectors.config import STRENGTHS, no_strength
from one4all.rewrite import RewriteConfig
from pipelines.settings import JobConfig, RayConfig, RunnerName, since_seconds

DEFAULT_STRENGTH = "discreet"


def _strength(value: object) -> object:
    if value and value not in STRENGTHS:
        raise ValueError(no_strength(value))
    return value


def _since(value: object) -> object:
    """Check at loading; a duration counts from the start of the run."""
    if isinstance(value, date):  # YAML makes one of 2026-11-01, and of a time
        value = value.isoformat()
    if isinstance(value, str) and value:
        since_seconds(value, now=0)
    return value


class ProtectConfig(RewriteConfig, JobConfig):
    """`one4all protect`: what `RewriteConfig` says of the bytes, and how the job is run.

    Attributes:
        protector: Name, folder or URI. Empty: one of the destination's own, which its first run
            fits to a sample of the corpus and keeps below it.
        encoder_backend: What computes embeddings. "auto" is OpenVINO on CPUs where it is installed,
            and PyTorch elsewhere; "torch" and "openvino" are that one, in float32. All three make
            the same patterns; on CPUs with AMX or AVX512_BF16 "auto" computes in bfloat16 first,
            and in float32 where that may make another one. "openvino-bfloat16" is bfloat16 alone;
            it and "torch-bfloat16", for GPUs, make patterns of their own, which a destination is
            bound to.
        strength: Look of that one: discreet (hardly seen, the default), balanced, strong
            (tiles), or gray-proof (stripes, which a gray copy keeps).
        fit_images: About so many images are looked at to fit it; 0 takes the shipped one.
        container: What the corpus is made of: tar, parquet or images; empty for what most of its
            bytes are. A destination is bound to it.
        only: A file, local or on S3, that names what to do: the path below the source, or the whole
            URI, of a shard or file in each line. The rest is left out.
        since: Only shards written since then are planned: a time such as 2026-11-01T00:00Z, or a
            duration before the start of the run such as 36h. Leave a margin: S3 dates a multipart
            upload from when it was begun. Empty means all.
        log_json: Log one JSON line for each shard and attempt to the logger ``one4all.shards``.
        runner: "local" runs the workers on this machine; "ray" on a Ray cluster, or a Ray that is
            started here; "auto" is Ray if a cluster is named by ``ray.address`` or RAY_ADDRESS, as
            in a job of one, or if Ray runs in this process; and local otherwise.
        num_workers: Processes that protect; 0 means one for each GPU, or else as many as the CPUs
            allow, and on a cluster more as nodes join.
        cpus_per_worker: CPUs of a worker, and its codec threads; 0 means one on a node without GPU,
            or more if there are fewer shards than CPUs, or less than 1.5 GB of memory for each;
            else the node's CPUs divided by its GPUs, or by ``num_workers`` on this machine; where
            nodes differ, see `worker_layout`.
        gpus_per_worker: GPUs of a worker, whole ones or a part of one; below 0 means 1 if there
            are any, else 0.
        wave_shards: Shards handed to workers at once; on a cluster a wave starts its own.
        max_step_cpu_seconds: CPU time that a worker may spend on one step, a batch of images; the
            worker of a file that takes longer is ended, and the attempt counts. 0 means no limit.
        prune: Remove outputs of this program whose source is gone. The listing of the source must
            be complete: a folder that is not mounted looks like one whose shards were deleted.
        retry_quarantined: Try shards again that were given up: their failed attempts are forgotten.
        moved_from: The source that the destination is bound to, if the same corpus lies elsewhere
            now: it is bound to the new place, after a comparison of names and sizes.
        lease_seconds: Life of the lease that keeps a second run off the destination; renewed four
            times in it. 0 takes none: two runs at once are wasteful, but harmless.
        stalled_seconds: Time without a shard done after which a run that holds the lease is said to
            be stuck: the next one then ends with 1, an error, instead of 75.
        allow_unsafe_store: Write to a store that does not keep the promise of conditional writes.
            Two runs at once may then both declare a shard done.
    """

    protector: str = ""
    encoder_backend: BackendName = "auto"
    strength: Annotated[str, BeforeValidator(_strength)] = ""
    fit_images: Annotated[int, Field(ge=0)] = 6000
    container: str = ""
    only: str = ""
    since: Annotated[str, BeforeValidator(_since)] = ""
    log_json: bool = False
    runner: RunnerName = "auto"
    num_workers: Annotated[int, Field(ge=0)] = 0
    cpus_per_worker: Annotated[int, Field(ge=0)] = 0
    gpus_per_worker: float = -1
    wave_shards: Annotated[int, Field(ge=1)] = 5000
    max_step_cpu_seconds: Annotated[int, Field(ge=0)] = 900
    prune: bool = False
    retry_quarantined: bool = False
    moved_from: str = ""
    lease_seconds: Annotated[float, Field(ge=0, le=3600)] = 60.0
    stalled_seconds: Annotated[float, Field(gt=0)] = 4 * 3600.0
    allow_unsafe_store: bool = False
    ray: RayConfig = RayConfig()
