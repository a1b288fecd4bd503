"""The records of a ledger: what a destination is bound to, and the proof that a unit is done."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from one4all.corpus import ObjectVersion, OutputObject, Unit
from one4all.images import OutputFormat


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Binding(_Record):
    """What a destination prefix is bound to: all that determines the bytes written to it.

    ``transform_version`` stands for the code: another one writes other bytes. ``container`` says
    what the corpus is made of; should a tar file come to lie among loose images, they stay images.
    ``encoder_precision`` is float32 for every backend and device that computes in it: they make the
    same patterns. In bfloat16 each makes others, and is named.
    """

    format: Literal[1] = 1
    source_uri: str
    container: str = "tar"
    protector: str
    protector_sha256: str
    encoder_precision: Literal["float32", "torch-bfloat16", "openvino-bfloat16"] = "float32"
    epsilon_levels: int
    output_format: OutputFormat
    on_bad_image: Literal["drop", "fail", "passthrough"]
    max_image_pixels: int
    sidecar_patterns: tuple[str, ...]
    mark_no_ai_training: bool = False
    tint_gray: bool = False
    image_columns: tuple[str, ...] = ()
    others: Literal["copy", "skip"] = "copy"
    transform_version: int


class BadImage(_Record):
    """An image that was not protected, and what became of it."""

    key: str
    member: str
    reason: str
    action: Literal["dropped", "passed through"]


class UnitDistances(_Record):
    """Distances between clean and protected images of one unit; levels are 8-bit steps.

    Attributes:
        max_before_encoding: Largest |difference| before the output codec; never above the budget.
        max_decoded: Largest |difference| of what a reader decodes; the codec's share included. Of
            JPEGs the first one of the unit and about one in 16 count, which are decoded again; 0 if
            none of them could be protected.
        mean_psnr_db: Mean of the PSNR of what a reader decodes, over the same images; 0 likewise.
    """

    max_before_encoding: int = 0
    max_decoded: int = 0
    mean_psnr_db: float = 0.0


class Manifest(_Record):
    """The proof that one version of one unit was protected.

    Attributes:
        name, container: Name and container of the unit.
        source: Objects of the unit, in the version that was read.
        outputs: Objects that were written.
        num_samples, num_images, num_protected, num_members: What the unit held, and of its images
            how many were protected; members are those that were written.
        num_gray: Protected images that are gray, and so hold hardly any of a pattern in colour; 0
            if the pattern is in no colour.
        bad_images: Images that could not be protected.
        converted: Number of images by what had to be changed to protect them.
        seconds: Time of each stage.
        run_id: Run that wrote it.
    """

    format: Literal[2] = 2
    name: str
    container: str = "tar"
    source: tuple[ObjectVersion, ...]
    outputs: tuple[OutputObject, ...]
    num_samples: int
    num_images: int
    num_protected: int
    num_members: int
    num_gray: int = 0
    bad_images: tuple[BadImage, ...] = ()
    converted: dict[str, int] = Field(default_factory=dict)
    distances: UnitDistances
    seconds: dict[str, float] = Field(default_factory=dict)
    run_id: str = ""

    @model_validator(mode="before")
    @classmethod
    def _of_one_object(cls, values: Any) -> Any:
        """Format 1 knew units of one object, a tar shard, only."""
        if not isinstance(values, dict) or values.get("format") != 1:
            return values
        values = dict(values)
        shard = values.pop("source")
        output = {name: values.pop(f"output_{name}") for name in ("size", "etag", "sha256")}
        return values | {
            "format": 2,
            "name": shard["name"],
            "source": [{"key": shard["name"], "size": shard["size"], "etag": shard["etag"]}],
            "outputs": [{"key": shard["name"]} | output],
        }

    @property
    def unit(self) -> Unit:
        """The unit that was protected."""
        return Unit(self.name, self.source, self.container)

    @property
    def output_unit(self) -> Unit:
        """What was written, as a unit that can be read."""
        written = (ObjectVersion(o.key, o.size, o.etag) for o in self.outputs)
        return Unit(self.name, tuple(written), self.container)

    @property
    def output_size(self) -> int:
        """Bytes written."""
        return sum(output.size for output in self.outputs)
