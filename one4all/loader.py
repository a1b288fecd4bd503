"""Training images from WebDataset shards: split by rank, shuffled, resumable at a position.

The stream of a rank is a function of (seed, epoch, rank, world size) and the corpus alone: the
order of shards, the shuffle and every random crop are drawn from generators seeded with them. A
position is a number of images within an epoch; starting there decodes nothing that came before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np

from one4all.errors import BadImageError, UsageError
from one4all.images import DEFAULT_MAX_PIXELS, Pixels, colour, decode, working_copy
from one4all.ledger import list_shards
from one4all.shards import is_protectable, read_samples
from one4all.storage import open_storage

MIN_CROP_AREA = 0.4  # share of the image; paper-like RandomResizedCrop (docs/method.md, 19)
_SHUFFLE_BYTES = 256 << 20


class ImageStream:
    """Random crops of the images of one or more corpora, for one rank.

    Args:
        uris: Folders or s3:// prefixes of shards.
        size: Side of the crops in pixels.
        rank, world_size: This worker, and how many there are. With fewer shards than workers every
            rank reads all shards and keeps its share of the images.
        seed: Of everything random here.
        shuffle_buffer: Encoded images held to draw from.
        num_threads: For decoding.

    Raises:
        UsageError: No shards.
    """

    def __init__(
        self,
        uris: Sequence[str],
        *,
        size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle_buffer: int = 2000,
        num_threads: int = 1,
    ) -> None:
        self._shards = [(uri, s.name) for uri in uris for s in list_shards(open_storage(uri))]
        if not self._shards:
            raise UsageError(f"no .tar shard in {', '.join(uris)}; one4all pack makes some")
        self._size, self._seed = size, seed
        self._rank, self._world_size = rank, world_size
        self._shuffle_buffer = shuffle_buffer
        self._pool = ThreadPoolExecutor(num_threads, "loader")

    def batches(
        self, batch_size: int, *, epoch: int = 0, position: int = 0
    ) -> Iterator[tuple[int, int, Pixels]]:
        """Batches without end, from a position on.

        Yields:
            ``(epoch, position, image_BHWC)`` with images uint8 (batch_size, size, size, 3); epoch
            and position are those *after* the batch, to be given again to resume.

        Raises:
            UsageError: An epoch holds less than one batch for this rank.
        """
        # One batch is prepared while the caller works on the one before.
        with ThreadPoolExecutor(1, "batches") as ahead:
            batches = self._batches(batch_size, epoch, position)
            upcoming = ahead.submit(next, batches)
            while True:
                batch = upcoming.result()
                upcoming = ahead.submit(next, batches)
                yield batch

    def _batches(
        self, batch_size: int, epoch: int, position: int
    ) -> Iterator[tuple[int, int, Pixels]]:
        while True:
            chunk: list[tuple[int, bytes]] = []
            count, started, yielded = 0, position, False
            images: list[Pixels] = []
            for index, payload in enumerate(self._shuffled(epoch)):
                count = index + 1
                if index < position:
                    continue
                chunk.append((index, payload))
                if len(chunk) < batch_size - len(images):
                    continue
                crops = self._pool.map(partial(self._crop, epoch), *zip(*chunk, strict=True))
                images += [crop for crop in crops if crop is not None]
                chunk = []
                if len(images) == batch_size:
                    yielded = True
                    yield epoch, count, np.stack(images)
                    images = []
            if not yielded and started == 0:
                raise UsageError(
                    f"rank {self._rank} finds {count} images, not enough that can be read for one "
                    f"batch of {batch_size}; use more images, fewer workers or a smaller batch"
                )
            epoch, position = epoch + 1, 0

    def _shuffled(self, epoch: int) -> Iterator[bytes]:
        """Encoded images of this rank in the epoch's random order."""
        random = np.random.default_rng((self._seed, epoch, self._rank))
        buffer: list[bytes] = []
        num_bytes = 0
        for payload in self._payloads(epoch):
            buffer.append(payload)
            num_bytes += len(payload)
            while len(buffer) > self._shuffle_buffer or num_bytes > _SHUFFLE_BYTES:
                drawn = _draw(buffer, random)
                num_bytes -= len(drawn)
                yield drawn
        while buffer:
            yield _draw(buffer, random)

    def _payloads(self, epoch: int) -> Iterator[bytes]:
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._shards))
        by_shard = len(order) >= self._world_size
        index = 0
        for shard in order[self._rank :: self._world_size] if by_shard else order:
            uri, name = self._shards[shard]
            with closing(open_storage(uri).open(name)) as reader:
                for sample in read_samples(reader):
                    for member in sample.members:
                        if is_protectable(member, ()):
                            index += 1
                            if by_shard or index % self._world_size == self._rank:
                                yield member.payload

    def _crop(self, epoch: int, index: int, payload: bytes) -> Pixels | None:
        """A random crop, resized, mirrored half of the time; None for an unreadable image."""
        try:
            pixels = colour(decode(payload, max_pixels=DEFAULT_MAX_PIXELS).pixels)
        except BadImageError:
            return None
        random = np.random.default_rng((self._seed, epoch, self._rank, index))
        height, width = pixels.shape[:2]
        area, ratio = random.uniform(MIN_CROP_AREA, 1), np.exp(random.uniform(-0.28, 0.28))
        crop_height = max(1, min(height, round(height * float(np.sqrt(area / ratio)))))
        crop_width = max(1, min(width, round(width * float(np.sqrt(area * ratio)))))
        top = int(random.integers(height - crop_height + 1))
        left = int(random.integers(width - crop_width + 1))
        crop = working_copy(pixels[top : top + crop_height, left : left + crop_width], self._size)
        return crop[:, ::-1] if random.random() < 0.5 else crop


def _draw(buffer: list[Any], random: np.random.Generator) -> Any:
    """Remove and return a random element, in constant time."""
    index = int(random.integers(len(buffer)))
    buffer[index], buffer[-1] = buffer[-1], buffer[index]
    return buffer.pop()
