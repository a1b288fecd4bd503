"""Does a store keep what conditional writes promise? Asked before anything relies on it.

Some servers that speak S3 accept the conditions and ignore them, or check them without a lock, so
that several of many concurrent writers "win". On such a store two runs may both declare a shard
done; see docs/pipeline.md for servers that were tried.
"""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor

from one4all.errors import AccessError, ConflictError, StorageError
from one4all.storage.base import INTERNAL, Storage

NUM_WRITERS = 8  # of one race; sequential requests do not show a missing lock


def conditional_write_defects(storage: Storage) -> list[str]:
    """Race writers for one small object, and try to replace a version that never was.

    Leaves nothing behind. About a dozen small requests.

    Args:
        storage: Where records are going to be written.

    Returns:
        What the store does wrong, in words; empty if it keeps its promises.

    Raises:
        AccessError: Writing is denied.
    """
    key = f"{INTERNAL}probe/{uuid.uuid4().hex}"
    defects = []
    try:
        with ThreadPoolExecutor(NUM_WRITERS, "probe") as pool:
            tags = list(pool.map(lambda n: _create(storage, key, n), range(NUM_WRITERS)))
        winners = [etag for etag in tags if etag]
        # A winner whose answer was lost counts as a loser: none is no defect.
        if len(winners) > 1:
            defects.append(
                f"{len(winners)} of {NUM_WRITERS} concurrent writers created the same object "
                "(If-None-Match is ignored or races)"
            )
        current = storage.head(key).etag
        try:
            storage.replace(key, b"replaced", etag=f'"{uuid.uuid4().hex}"')
            defects.append("an object was replaced under the ETag of another (If-Match is ignored)")
        except ConflictError:
            try:
                storage.replace(key, b"replaced", etag=current)
            except ConflictError:
                if storage.read_bytes(key) != b"replaced":  # else our first try's answer was lost
                    defects.append("an object is not replaced under its own ETag")
    except AccessError:
        raise
    except StorageError as error:
        defects.append(f"a conditional write failed: {error}")
    finally:
        storage.delete(key)
    return defects


def _create(storage: Storage, key: str, writer: int) -> str:
    """The ETag that a writer got; empty for a loser."""
    try:
        return storage.create(key, f"writer {writer}".encode())
    except ConflictError:
        return ""
