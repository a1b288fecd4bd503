"""One unit protected again, to see that what stands is what the protector writes.

`audit` finds that an image differs from its source and stays within the budget, but any noise does
that, and so does encoding a JPEG once more. Whether it is *protected* only the protector can say.
"""

from __future__ import annotations

import tempfile
from contextlib import closing
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np

from one4all.corpus import (
    DEFAULT_MAX_SAMPLE_BYTES,
    Member,
    ReadOptions,
    Unit,
    is_protectable,
    printable,
    read_samples,
)
from one4all.errors import BadImageError, One4AllError
from one4all.images import decode
from one4all.ledger.records import Binding, Manifest
from one4all.rewrite import RewriteConfig, rewrite_unit
from one4all.storage import Storage, open_storage

if TYPE_CHECKING:
    from one4all.protectors.protector import Protector

_TOLERANCE = 0.5  # levels, mean over an image: other hardware rounds a pixel here and there
_MAX_PROBLEMS = 20


def recompute_unit(
    unit: Unit,
    manifest: Manifest,
    source: Storage,
    destination: Storage,
    protector: Protector,
    binding: Binding,
    *,
    max_sample_bytes: int = DEFAULT_MAX_SAMPLE_BYTES,
) -> list[str]:
    """Protect a unit again into a temporary folder, and compare each image with what stands.

    Args:
        unit: The unit, in the version that was protected.
        manifest: What was written.
        source, destination: Its two sides.
        protector: What the destination is bound to.
        binding: Settings that determine the bytes.
        max_sample_bytes: Larger samples make a bad unit.

    Returns:
        Images that are not what the protector writes, at most 20; a damaged unit is a finding too.
    """
    config = RewriteConfig.of_binding(binding, max_sample_bytes=max_sample_bytes)
    with tempfile.TemporaryDirectory(prefix="one4all-recompute-") as folder:
        again = open_storage(folder)
        try:
            expected = rewrite_unit(unit, source, again, protector, config)
            if _digests(expected) == _digests(manifest):
                return []
            return _differences(expected, again, manifest, destination, config)
        except (One4AllError, OSError) as error:
            return [str(error)]


def _digests(manifest: Manifest) -> list[tuple[str, str]]:
    return [(output.key, output.sha256) for output in manifest.outputs]


def _differences(
    expected: Manifest,
    again: Storage,
    manifest: Manifest,
    destination: Storage,
    config: RewriteConfig,
) -> list[str]:
    problems: list[str] = []
    # Protected images may be larger than clean ones; see `rewrite_unit`.
    grown = 2 * max(config.max_sample_bytes, DEFAULT_MAX_SAMPLE_BYTES)
    options = ReadOptions(grown, config.image_columns)
    with (
        closing(read_samples(again, expected.output_unit, options)) as right,
        closing(read_samples(destination, manifest.output_unit.latest, options)) as written,
    ):
        for wanted, found in zip_longest(right, written):
            if wanted is None or found is None or wanted.key != found.key:
                return [*problems, "holds other samples than the protector writes"]
            for one, other in zip(wanted.members, found.members, strict=False):
                if one.payload == other.payload or not is_protectable(one, config.sidecar_patterns):
                    continue  # what is copied is compared with the source, by `audit`
                if (problem := _compare(one, other, config.max_image_pixels)) and len(
                    problems
                ) < _MAX_PROBLEMS:
                    problems.append(f"{printable(one.name)}: {problem}")
    return problems


def _compare(right: Member, found: Member, max_pixels: int) -> str:
    """What is wrong with an image, or ""."""
    try:
        wanted, seen = (decode(m.payload, max_pixels=max_pixels).pixels for m in (right, found))
    except BadImageError as error:
        return str(error)
    if wanted.shape != seen.shape:
        return f"has the shape {seen.shape}, not {wanted.shape}"
    distance = float(np.abs(wanted.astype(np.int16) - seen).mean())
    if distance <= _TOLERANCE:
        return ""
    return (
        f"is not what the protector writes: {distance:.1f} levels from it on average, "
        f"{_TOLERANCE} are allowed"
    )
