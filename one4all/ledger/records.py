"""The records of a ledger: what a destination is bound to, and the proof that a shard is done."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from one4all.corpus.units import SourceShard
from one4all.images import OutputFormat


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Binding(_Record):
    """What a destination prefix is bound to: all that determines the bytes written to it.

    ``transform_version`` stands for the code: another one writes other bytes.
    """

    format: Literal[1] = 1
    source_uri: str
    protector: str
    protector_sha256: str
    epsilon_levels: int
    output_format: OutputFormat
    on_bad_image: Literal["drop", "fail", "passthrough"]
    max_image_pixels: int
    sidecar_patterns: tuple[str, ...]
    transform_version: int


class BadImage(_Record):
    """An image that was not protected, and what became of it."""

    key: str
    member: str
    reason: str
    action: Literal["dropped", "passed through"]


class Distances(_Record):
    """Distances between clean and protected images of one shard; levels are 8-bit steps.

    Attributes:
        max_before_encoding: Largest |difference| before the output codec; never above the budget.
        max_decoded: Largest |difference| of what a reader decodes; the codec's share included.
        mean_psnr_db: Mean over images of the PSNR of what a reader decodes.
    """

    max_before_encoding: int = 0
    max_decoded: int = 0
    mean_psnr_db: float = 0.0


class Manifest(_Record):
    """The proof that one version of one shard was protected."""

    format: Literal[1] = 1
    source: SourceShard
    output_etag: str
    output_size: int
    output_sha256: str
    num_samples: int
    num_images: int
    num_protected: int
    num_members: int
    bad_images: tuple[BadImage, ...] = ()
    converted: dict[str, int] = Field(default_factory=dict)
    distances: Distances
    seconds: dict[str, float] = Field(default_factory=dict)
    run_id: str = ""
