"""Audit of one protected unit against its source: every promise, checked from the bytes.

Nothing is taken from the manifest that can be measured; the manifest is then held against what was
measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import zip_longest
from typing import Any

from one4all.corpus import (
    CONTAINERS,
    DEFAULT_MAX_SAMPLE_BYTES,
    Container,
    Member,
    ReadOptions,
    Sample,
    Unit,
    is_exempt,
    is_protectable,
    printable,
    read_samples,
)
from one4all.distances import max_difference, psnr_db, ssim
from one4all.errors import BadImageError, One4AllError
from one4all.gray_images import in_colour
from one4all.images import (
    DecodedImage,
    decode,
    extension_for,
    is_exact,
    pillow_format,
    pillow_orientation,
)
from one4all.ledger.records import Binding, Manifest
from one4all.storage import Attributes, Reader, Storage
from one4all.visibility import Visibility, visibility

_MAX_PROBLEMS = 20  # of a unit, in the report; the count is always complete


@dataclass(frozen=True)
class ImageDistances:
    """Distances of one decoded image from its clean original; visibility if it was measured."""

    member: str
    max_levels: int
    psnr_db: float
    ssim: float
    visibility: Visibility | None = None

    def figures(self) -> dict[str, Any]:
        """All of it by name; what was not measured is left out."""
        figures = asdict(self)
        seen = figures.pop("visibility")
        return figures | (seen or {})


@dataclass
class UnitAudit:
    """What the audit of one unit found.

    Attributes:
        problems: Broken promises, each with its place; empty means all hold.
        num_problems: All of them; ``problems`` lists the first few.
        num_sidecars: Members compared byte for byte.
        images: One entry for each protected image.
        recomputed: Whether the unit was protected again, too, and compared.
    """

    name: str
    problems: list[str] = field(default_factory=list)
    num_problems: int = 0
    num_samples: int = 0
    num_sidecars: int = 0
    num_dropped: int = 0
    num_passed_through: int = 0
    images: list[ImageDistances] = field(default_factory=list)
    recomputed: bool = False

    def report(self, problem: str) -> None:
        problem = printable(problem)
        self.num_problems += 1
        if len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(problem)


def audit_unit(
    unit: Unit,
    manifest: Manifest,
    source: Storage,
    destination: Storage,
    binding: Binding,
    *,
    max_sample_bytes: int = DEFAULT_MAX_SAMPLE_BYTES,
    measure_visibility: bool = False,
) -> UnitAudit:
    """Read both sides of one unit and compare.

    Checked: keys and their order, member names, every sidecar's bytes and envelope, that Pillow
    reads none of them as an image (but those of ``sidecar_patterns``), size and layout
    of every image, the budget on what a reader decodes (wherever the output is lossless), dropped
    and passed-through samples against the manifest, size and sha256 of every output. The
    visibility of every image is measured if asked for, which takes longer than all of this.

    A damaged unit is a finding, never an exception.
    """
    audit = UnitAudit(unit.name)
    written = _Measured(destination)
    reading = ReadOptions(max_sample_bytes, binding.image_columns, binding.others)
    # A protected image may be larger than the clean one; see `rewrite_unit`.
    grown = 2 * max(max_sample_bytes, DEFAULT_MAX_SAMPLE_BYTES)
    comparison = _Comparison(
        audit, manifest, binding, CONTAINERS[unit.container], measure_visibility
    )
    again = replace(reading, max_sample_bytes=grown, dropped=comparison.dropped)
    try:
        with (
            closing(read_samples(source, unit, reading)) as clean,
            closing(read_samples(written, manifest.output_unit.latest, again)) as protected,
        ):
            comparison.run(clean, protected)
            found = written.read_to_end()
        for output in manifest.outputs:
            size, sha256 = found.get(output.key, (0, ""))
            if sha256 != output.sha256:
                audit.report(f"sha256 of {output.key} is not the one in its manifest")
            if size != output.size:
                audit.report(f"{output.key} has {size} bytes, its manifest says {output.size}")
    except (One4AllError, OSError) as error:
        audit.report(str(error))
    return audit


class _Measured:
    """A store whose objects are measured while they are read."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._readers: dict[str, _HashingReader] = {}
        self._read_in_parts: set[str] = set()

    def open(self, key: str, *, etag: str | None = None) -> Reader:
        self._readers[key] = _HashingReader(self._storage.open(key, etag=etag))
        return self._readers[key]

    def read_range(self, key: str, start: int, size: int, *, etag: str | None = None) -> bytes:
        self._read_in_parts.add(key)
        return self._storage.read_range(key, start, size, etag=etag)

    def read_to_end(self) -> dict[str, tuple[int, str]]:
        """Size and sha256 of every object that was read, by key."""
        for key in self._read_in_parts:
            with closing(self.open(key)) as reader:
                while reader.read(1 << 20):
                    pass
        return {key: reader.read_to_end() for key, reader in self._readers.items()}


class _HashingReader:
    """Digest and size of what passes through."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._sha256 = hashlib.sha256()
        self._num_bytes, self._ended = 0, False

    @property
    def attributes(self) -> Attributes:
        return self._reader.attributes

    def read(self, size: int, /) -> bytes:
        data = self._reader.read(size)
        self._sha256.update(data)
        self._num_bytes += len(data)
        self._ended = not data
        return data

    def close(self) -> None:
        self._reader.close()

    def read_to_end(self) -> tuple[int, str]:
        while not self._ended:
            self.read(1 << 20)
        return self._num_bytes, self._sha256.hexdigest()


class _Comparison:
    """Walks both sides of a unit in step."""

    def __init__(
        self,
        audit: UnitAudit,
        manifest: Manifest,
        binding: Binding,
        container: Container,
        measure_visibility: bool,
    ) -> None:
        self._audit, self._container = audit, container
        self._measure_visibility = measure_visibility
        self._manifest = manifest
        self._binding = binding
        self._bad = {entry.member: entry.action for entry in manifest.bad_images}
        self.dropped = {e.key for e in manifest.bad_images if e.action == "dropped"}

    def run(self, clean: Iterator[Sample], written: Iterator[Sample]) -> None:
        audit, manifest = self._audit, self._manifest
        for before, after in zip_longest(self._without_dropped(clean), written):
            if before is None or after is None or not self._container.meet(before, after):
                audit.report(
                    f"sample {before.key if before else None!r} of the source meets "
                    f"{after.key if after else None!r} in the output"
                )
                return  # out of step: from here on everything would differ
            self._compare_sample(before, after)
        counted = (audit.num_samples, len(audit.images))
        stated = (manifest.num_samples, manifest.num_protected)
        if counted != stated:
            audit.report(
                f"{counted[0]} samples and {counted[1]} protected images found, the manifest "
                f"states {stated[0]} and {stated[1]}"
            )

    def _without_dropped(self, clean: Iterator[Sample]) -> Iterator[Sample]:
        for sample in clean:
            if not sample.members:
                continue
            self._audit.num_samples += any(member.is_file for member in sample.members)
            if sample.members[0].is_file and printable(sample.key) in self.dropped:
                self._audit.num_dropped += 1
            else:
                yield sample

    def _compare_sample(self, before: Sample, after: Sample) -> None:
        if len(before.members) != len(after.members):
            self._audit.report(
                f"sample {before.key!r} has {len(after.members)} members, the source has "
                f"{len(before.members)}"
            )
            return
        for clean, written in zip(before.members, after.members, strict=True):
            if not is_protectable(clean, self._binding.sidecar_patterns):
                self._audit.num_sidecars += 1
                self._expect_identical(clean, written)
                if not is_exempt(written, self._binding.sidecar_patterns):
                    self._expect_no_image(written)
            elif self._bad.get(printable(clean.name)) == "passed through":
                self._audit.num_passed_through += 1
                self._expect_identical(clean, written)
            else:
                self._compare_image(clean, written)

    def _expect_identical(self, clean: Member, written: Member) -> None:
        for change in clean.changes(written):
            self._audit.report(f"{clean.name}: {change}")

    def _expect_no_image(self, sidecar: Member) -> None:
        """Ask another library than the one that decided what is an image."""
        if found := pillow_format(sidecar.payload):
            self._audit.report(f"{sidecar.name}: was copied, and is a {found} image")

    def _compare_image(self, clean: Member, written: Member) -> None:
        limit = self._binding.max_image_pixels
        try:
            before, after = (decode(m.payload, max_pixels=limit) for m in (clean, written))
        except BadImageError as error:
            self._audit.report(f"{clean.name}: {error}")
            return
        if self._binding.tint_gray:
            before = in_colour(before)
        output_format = self._binding.output_format
        expected = extension_for(clean.name, before, output_format)
        if expected != clean.name:
            expected = self._container.renamed(clean.name, expected)
        if written.name != expected:
            self._audit.report(f"{clean.name}: written as {written.name!r}, not {expected!r}")
        if before.pixels.shape != after.pixels.shape:
            self._audit.report(
                f"{clean.name}: {before.pixels.shape} pixels became {after.pixels.shape}"
            )
            return
        for change in clean.changes_beside(written, replaced=True):
            self._audit.report(f"{clean.name}: {change}")
        self._compare_descriptions(clean, written, before, after)
        levels = max_difference(before.pixels, after.pixels)
        if is_exact(before, output_format) and levels > self._binding.epsilon_levels:
            self._audit.report(
                f"{clean.name}: differs by {levels} levels, the budget is "
                f"{self._binding.epsilon_levels}"
            )
        if levels == 0:
            self._audit.report(f"{clean.name}: is not protected: every pixel is the source's")
        self._audit.images.append(
            ImageDistances(
                printable(clean.name),
                levels,
                psnr_db(before.pixels, after.pixels),
                ssim(before.pixels, after.pixels),
                visibility(before.pixels, after.pixels) if self._measure_visibility else None,
            )
        )

    def _compare_descriptions(
        self, clean: Member, written: Member, before: DecodedImage, after: DecodedImage
    ) -> None:
        """What a picture says about itself; its orientation also as another reader sees it."""
        expected = before.description
        if self._binding.mark_no_ai_training and before.format != "BMP":
            expected = expected.with_data_mining_prohibited()
        for part in fields(expected):
            wanted, found = (getattr(d, part.name) for d in (expected, after.description))
            if part.name == "comment":  # a PNG holds no zero bytes
                wanted, found = (text.replace(b"\0", b"") for text in (wanted, found))
            if wanted != found:
                self._audit.report(f"{clean.name}: its {_PARTS[part.name]} not the source's")
        if before.icc_profile != after.icc_profile and before.format != "BMP":
            self._audit.report(f"{clean.name}: its colour profile is not the source's")
        turned = [pillow_orientation(member.payload) for member in (clean, written)]
        if before.format != "TIFF" and turned[0] not in (0, turned[1]):
            self._audit.report(
                f"{clean.name}: lies on another side: orientation {turned[0]} became {turned[1]}"
            )


_PARTS = {
    "exif": "EXIF is",
    "xmp": "XMP is",
    "iptc": "IPTC records are",
    "comment": "comment is",
    "tiff": "TIFF tags are",
}
