"""Run configurations: one frozen model per job, loaded from defaults, YAML and ``--set``."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from one4all.encoders import EncoderConfig
from one4all.errors import ConfigError


class JobConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Config = TypeVar("Config", bound=JobConfig)


RunnerName = Literal["auto", "local", "ray"]
"""Where a job is run: "local" in processes of this machine, "ray" by Ray, which is started if no
cluster is named; "auto" by Ray on a cluster, and here otherwise."""


class RayConfig(JobConfig):
    """How to reach Ray.

    Attributes:
        address: "" is no cluster, unless RAY_ADDRESS says otherwise: what needs Ray starts one
            here. "auto" or a cluster address connects.
        num_cpus: CPUs of a local Ray, or of the processes in its place; 0 asks the machine.
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


def _keys_beside(location: tuple[int | str, ...], model: Any) -> str:
    """The keys that there are where an unknown one was given; "" if types do not tell."""
    for part in location[:-1]:
        field = model.model_fields.get(part)
        if field is None or not hasattr(field.annotation, "model_fields"):
            return ""
        model = field.annotation
    return ", ".join(model.model_fields)


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    lines = []
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = _keys_beside(problem["loc"], model)
            lines.append(f"unknown key {path!r}" + (f"; known keys: {known}" if known else ""))
        else:
            lines.append(f"{path}: {problem['msg']} (given: {problem['input']!r})")
    return "configuration: " + "; ".join(lines)
