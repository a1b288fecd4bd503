"""Run configurations: one frozen model per job, loaded from defaults, YAML and ``--set``."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from one4all.codebook import DEFAULT_CODEBOOK, DEFAULT_ENCODER, CodebookConfig
from one4all.encoders import EncoderConfig
from one4all.errors import ConfigError
from one4all.images import DEFAULT_MAX_PIXELS, OutputFormat
from one4all.perturbation import DEFAULT_EPSILON_LEVELS
from one4all.protector import DEFAULT_PROTECTOR
from one4all.trainer import TrainerConfig


class JobConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Config = TypeVar("Config", bound=JobConfig)


class RayConfig(JobConfig):
    """How to reach Ray.

    Attributes:
        address: "" starts Ray in this process, unless RAY_ADDRESS says otherwise; "auto" or a
            cluster address connects.
        num_cpus: CPUs of a local Ray; 0 asks the machine.
        object_store_bytes: Object store of a local Ray. Only status rows travel through it.
    """

    address: str = ""
    num_cpus: Annotated[int, Field(ge=0)] = 0
    object_store_bytes: Annotated[int, Field(ge=80_000_000)] = 200_000_000


_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def since_seconds(text: str, *, now: float) -> float:
    """A time as POSIX seconds: ``2026-11-01T00:00Z``, ``2026-11-01``, or ``36h`` before ``now``.

    A time without a zone is UTC: a schedule must not depend on where the driver runs.

    Raises:
        ValueError: Neither a time nor a duration.
    """
    if match := _DURATION.fullmatch(text):
        return now - float(match[1]) * _UNIT_SECONDS[match[2]]
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"{text!r} is neither a time such as 2026-11-01T00:00Z nor a duration such as 36h "
            "(s, m, h, d, w)"
        ) from None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _since(value: object) -> object:
    """Check at loading; a duration counts from the start of the run."""
    if isinstance(value, date):  # YAML makes one of 2026-11-01, and of a time
        value = value.isoformat()
    if isinstance(value, str) and value:
        since_seconds(value, now=0)
    return value


class ProtectConfig(JobConfig):
    """`one4all protect`.

    Attributes:
        protector: Name, folder or URI.
        output_format: "match" keeps file formats (a JPEG is encoded again, so what a reader decodes
            is not within the budget bit for bit); "lossless" turns JPEG into PNG.
        on_bad_image: For an image that cannot be protected: "drop" its sample, "passthrough" it
            unprotected, or "fail" the shard. Always recorded.
        sidecar_patterns: Members copied although they are images, such as ``*.seg.png``; matched
            against the last component of the name.
        max_image_pixels: Larger images are bad images; refused before they are decoded.
        max_sample_bytes: Larger samples make a bad shard; a sample has to fit in memory.
        batch_size: Images in one forward pass. Another size may round a pixel here
            and there to its other neighbour.
        batch_pixels: Pixels of decoded images in one batch; bounds memory: three are in flight.
        since: Only shards written since then are planned: a time such as 2026-11-01T00:00Z, or a
            duration before the start of the run such as 36h. Leave a margin: S3 dates a multipart
            upload from when it was begun. Empty means all.
        log_json: Log one JSON line for each shard and attempt to the logger ``one4all.shards``.
        num_workers: Actors; 0 means one for each GPU, or else as many as the CPUs allow.
        cpus_per_worker: CPUs of an actor, and its codec threads; 0 means all of a node without
            GPU, or the node's CPUs divided by its GPUs.
        gpus_per_worker: GPUs of an actor; below 0 means 1 if the cluster has any, else 0.
        wave_shards: Shards handed to Ray at once; a wave starts its own actors.
        lease_seconds: Life of the lease that keeps a second run off the destination; renewed four
            times in it. 0 takes none: two runs at once are wasteful, but harmless.
        allow_unsafe_store: Write to a store that does not keep the promise of conditional writes.
            Two runs at once may then both declare a shard done.
    """

    protector: str = DEFAULT_PROTECTOR
    output_format: OutputFormat = "match"
    on_bad_image: Literal["drop", "fail", "passthrough"] = "drop"
    sidecar_patterns: tuple[str, ...] = ()
    max_image_pixels: Annotated[int, Field(ge=1, le=178_000_000)] = DEFAULT_MAX_PIXELS
    max_sample_bytes: Annotated[int, Field(ge=1)] = 1 << 30
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 8
    batch_pixels: Annotated[int, Field(ge=1)] = 24_000_000
    since: Annotated[str, BeforeValidator(_since)] = ""
    log_json: bool = False
    num_workers: Annotated[int, Field(ge=0)] = 0
    cpus_per_worker: Annotated[int, Field(ge=0)] = 0
    gpus_per_worker: float = -1
    wave_shards: Annotated[int, Field(ge=1)] = 5000
    lease_seconds: Annotated[float, Field(ge=0, le=3600)] = 60.0
    allow_unsafe_store: bool = False
    ray: RayConfig = RayConfig()


class VerifyConfig(JobConfig):
    """`one4all verify`.

    Attributes:
        num_workers: Tasks at once; 0 means as many as the CPUs allow.
        wave_shards: Shards handed to Ray at once.
    """

    num_workers: Annotated[int, Field(ge=0)] = 0
    wave_shards: Annotated[int, Field(ge=1)] = 5000
    ray: RayConfig = RayConfig()


def _workers(value: object) -> object:
    """A number of workers, or a range of two."""
    least, most = value if isinstance(value, list | tuple) and len(value) == 2 else (value, value)
    # Not isinstance, to which True is a number.
    if type(least) is not int or type(most) is not int or not 1 <= least <= most:
        raise ValueError("write a number of workers such as 4, or the least and most as [2, 8]")
    return value


class TrainConfig(TrainerConfig, JobConfig):
    """`one4all train`: what `TrainerConfig` says of the training itself, and how it is run.

    Attributes:
        output: Protector folder or URI to write.
        run_folder: Checkpoints, metrics.jsonl, TensorBoard files and curves; s3:// for several
            nodes. The same folder resumes.
        log_every, checkpoint_every: Steps.
        num_workers: Ray Train workers: a number, or the range [least, most], within which Ray takes
            as many as fit, when it starts and after each lost node. Each takes ``gpus_per_worker``
            GPUs (below 0: 1 if there is any) and ``cpus_per_worker`` CPUs.
        resize_seconds: How often a group of a range looks whether more workers fit. Growing costs a
            restart, and the steps since the last checkpoint.
        max_failures: Restarts after a lost worker; of nodes whose end was announced, any number.
        lease_seconds: Life of the lease that keeps a second run off the run folder; renewed four
            times in it.
    """

    output: str = "protector"
    run_folder: str = "runs/train"
    log_every: Annotated[int, Field(ge=1)] = 10
    checkpoint_every: Annotated[int, Field(ge=1)] = 100
    num_workers: Annotated[int | tuple[int, int], BeforeValidator(_workers)] = 1
    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    gpus_per_worker: float = -1
    resize_seconds: Annotated[float, Field(ge=1)] = 60.0
    max_failures: Annotated[int, Field(ge=0)] = 3
    lease_seconds: Annotated[float, Field(ge=1, le=3600)] = 60.0
    ray: RayConfig = RayConfig()

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


class FitConfig(JobConfig):
    """`one4all fit`.

    Attributes:
        source: Corpus of WebDataset shards, folder or s3://; or several, separated by commas; or
            ``vocabulary:NAME``, for a codebook that sees no image.
        output: Protector folder or s3:// prefix to write.
        encoder: Whose embeddings are clustered; RESULTS.md was measured at 224 pixels.
        codebook: Number of patterns, and their shape.
        epsilon_levels: Budget.
        num_images: About so many images are looked at, evenly over the shards.
        images_per_shard: At most so many of one shard, drawn evenly from it; bounds memory.
        max_image_pixels: Larger images are left out.
        seed: Of the drawn images, the clusters and the patterns.
        num_workers: Tasks at once; 0 means as many as CPUs or GPUs allow.
        cpus_per_worker, gpus_per_worker: Of a task; below 0 GPUs means 1 if there is any.
    """

    source: str = ""
    output: str = "protector"
    encoder: EncoderConfig = DEFAULT_ENCODER
    codebook: CodebookConfig = DEFAULT_CODEBOOK
    epsilon_levels: Annotated[int, Field(ge=1, le=255)] = DEFAULT_EPSILON_LEVELS
    num_images: Annotated[int, Field(ge=2)] = 20_000
    images_per_shard: Annotated[int, Field(ge=1, le=10_000)] = 1000
    max_image_pixels: Annotated[int, Field(ge=1)] = DEFAULT_MAX_PIXELS
    seed: int = 0
    num_workers: Annotated[int, Field(ge=0)] = 0
    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    gpus_per_worker: float = -1
    ray: RayConfig = RayConfig()


def absolute_path(path: str) -> str:
    """For workers, which run in another folder: a path that exists here, in full; else as it is."""
    return str(Path(path).absolute()) if path and Path(path).exists() else path


def absolute_weights(encoder: EncoderConfig) -> EncoderConfig:
    """The same encoder, its weights under an absolute path if they are a file here."""
    return encoder.model_copy(update={"pretrained": absolute_path(encoder.pretrained)})


def load_config(
    model: type[Config],
    path: Path | None = None,
    overrides: list[str] | None = None,
    **arguments: object,
) -> Config:
    """Compose a configuration: defaults, then the YAML file, then ``--set``, then arguments.

    Args:
        model: The job's configuration class.
        path: YAML file holding only what differs.
        overrides: ``key.path=value``; the value is read as YAML.
        arguments: Named options of the command line; None means not given.

    Raises:
        ConfigError: All mistakes at once, each with its path and what is allowed.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read configuration {path}: {error}") from error
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(f"configuration {path} must be a mapping of keys to values")
        values = loaded or {}
    for override in overrides or []:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {override!r}: write key.path=value")
        try:
            _assign(values, key.split("."), yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override!r}: the value is not YAML") from error
    values |= {key: value for key, value in arguments.items() if value is not None}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, model)) from error


def _assign(values: dict[str, Any], path: list[str], value: object) -> None:
    for key in path[:-1]:
        inner = values.get(key)
        values[key] = dict(inner) if isinstance(inner, dict) else {}
        values = values[key]
    values[path[-1]] = value


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    lines = []
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown key {path!r}; known keys: {', '.join(model.model_fields)}")
        else:
            lines.append(f"{path}: {problem['msg']} (given: {problem['input']!r})")
    return "configuration: " + "; ".join(lines)
