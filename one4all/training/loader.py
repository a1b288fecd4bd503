"""Training images from the units of corpora: split by rank, shuffled, resumable at a position.

An epoch is split into as many shares as there are ranks. The stream of a share is a function of
(seed, epoch, index, count) and the corpus alone: the order of units, the shuffle and every random
crop are drawn from generators seeded with them. A position is a number of images within a share;
starting there decodes nothing that came before.

When training goes on with another number of ranks, what is left of the shares of a begun epoch is
dealt to the new ranks, each of which then begins the next epoch with a share of the new size. So
every image counts once an epoch however often the number changes, and nobody waits for anybody.

A unit that is damaged, or is gone, ends where its damage begins, in every epoch anew; what comes
after it in the stream is what would come after a shorter unit. So positions hold as long as the
damage stays the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from one4all.corpus import Sample, Unit, images_of, open_corpora, read_samples
from one4all.errors import BadImageError, NotFoundError, ShardError, UsageError
from one4all.images import DEFAULT_MAX_PIXELS, Pixels, colour, decode, working_copy
from one4all.storage import open_storage

MIN_CROP_AREA = 0.4  # share of the image; paper-like RandomResizedCrop (docs/method.md, 19)
SHUFFLE_BYTES = 256 << 20  # encoded images held to draw from, at most
EMPTY_EPOCHS = 20  # in a row, in which damage left a rank less than a batch: then too much is lost


@dataclass(frozen=True, order=True)
class Share:
    """What is left of one rank's part of an epoch.

    Attributes:
        epoch: Number of the epoch, from 0.
        index: Number of the part, from 0.
        count: Number of parts that the epoch was split into.
        position: Images of the part that are done with.
    """

    epoch: int
    index: int
    count: int
    position: int = 0


Shares = tuple[Share, ...]  # of one rank, in the order of work


def deal(of_ranks: Sequence[Shares], world_size: int) -> list[Shares]:
    """What each rank works on when training goes on, perhaps with another number of ranks.

    Args:
        of_ranks: What each rank was at, by rank; none for a new run.
        world_size: Number of ranks from now on.

    Returns:
        Shares of each rank. The same as before if the number of ranks is; otherwise what is left of
        all epochs that were begun, and then a share of the next one.
    """
    if len(of_ranks) == world_size:
        return list(of_ranks)
    last = max((shares[-1].epoch for shares in of_ranks), default=-1)
    left = list(chain(*of_ranks))
    for shares in of_ranks:  # a rank that is behind had these still to come
        own = shares[-1]
        left += [Share(epoch, own.index, own.count) for epoch in range(own.epoch + 1, last + 1)]
    if left and not any(share.position for share in left if share.epoch == last):
        left = [share for share in left if share.epoch < last]  # nobody had begun the last one
        last -= 1
    left.sort()
    return [
        (*left[rank::world_size], Share(last + 1, rank, world_size)) for rank in range(world_size)
    ]


class ImageStream:
    """Random crops of the images of one or more corpora, for one rank.

    Args:
        uris: Folders or s3:// prefixes of corpora.
        size: Side of the crops in pixels.
        seed: Seed of everything random here.
        shuffle_buffer: Encoded images held to draw from.
        sidecar_patterns: Images that are no photos, such as ``*.seg.png``, and are not learnt
            from; matched against the last component of the name.
        num_threads: Threads that decode.

    Attributes:
        damaged: Why a unit could not be read to its end, by its URI; of all that were met so far.
            Its images before the damage are used, the others are left out.

    Raises:
        UsageError: There is no unit in them.
    """

    damaged: dict[str, str]

    def __init__(
        self,
        uris: Sequence[str],
        *,
        size: int,
        seed: int = 0,
        shuffle_buffer: int = 2000,
        sidecar_patterns: Sequence[str] = (),
        num_threads: int = 1,
    ) -> None:
        self._units: Sequence[tuple[str, Unit]] = open_corpora(uris)
        self._size, self._seed = size, seed
        self._shuffle_buffer = shuffle_buffer
        self._sidecar_patterns = tuple(sidecar_patterns)
        self._pool = ThreadPoolExecutor(num_threads, "loader")
        self.damaged = {}

    def batches(self, batch_size: int, shares: Shares) -> Iterator[tuple[Shares, Pixels]]:
        """Batches without end: of these shares, then of the last one's epoch after epoch.

        With fewer units than shares, each share reads all units and keeps its part of the images.
        Images that are left at the end of a share and fill no batch are left out.

        Yields:
            ``(shares, image_BHWC)`` with images uint8 (batch_size, size, size, 3); the shares are
            what is left *after* the batch, to be given again to resume.

        Raises:
            UsageError: A share holds less than one batch; or damaged units have left less than that
                for `EMPTY_EPOCHS` epochs.
        """
        # One batch is prepared while the caller works on the one before.
        with ThreadPoolExecutor(1, "batches") as ahead:
            batches = self._batches(batch_size, shares)
            upcoming = ahead.submit(next, batches)
            while True:
                batch = upcoming.result()
                upcoming = ahead.submit(next, batches)
                yield batch

    def _batches(self, batch_size: int, shares: Shares) -> Iterator[tuple[Shares, Pixels]]:
        num_empty = 0  # shares in a row
        while True:
            share, later = shares[0], shares[1:]
            chunk: list[tuple[int, bytes]] = []
            count, yielded = 0, False
            images: list[Pixels] = []
            for index, payload in enumerate(self._shuffled(share)):
                count = index + 1
                if index < share.position:
                    continue
                chunk.append((index, payload))
                if len(chunk) < batch_size - len(images):
                    continue
                crops = self._pool.map(partial(self._crop, share), *zip(*chunk, strict=True))
                images += [crop for crop in crops if crop is not None]
                chunk = []
                if len(images) == batch_size:
                    yielded = True
                    yield (replace(share, position=count), *later), np.stack(images)
                    images = []
            if not yielded and share.position == 0:
                num_empty += 1
                if not self.damaged or num_empty == EMPTY_EPOCHS:
                    raise UsageError(
                        f"rank {share.index} finds {count} images, not enough that can be read for "
                        f"one batch of {batch_size}; use more images, fewer workers or a smaller "
                        f"batch{self._losses()}"
                    )
            elif yielded:
                num_empty = 0
            shares = later or (replace(share, epoch=share.epoch + 1, position=0),)

    def _losses(self) -> str:
        """What the damaged units do to a message."""
        if not self.damaged:
            return ""
        uri, reason = next(iter(self.damaged.items()))
        others = f", and {len(self.damaged) - 1} more" if len(self.damaged) > 1 else ""
        return f"; damaged: {uri} ({reason}){others}"

    def _shuffled(self, share: Share) -> Iterator[bytes]:
        """Encoded images of a share in its random order."""
        random = np.random.default_rng((self._seed, share.epoch, share.index))
        buffer: list[bytes] = []
        num_bytes = 0
        for payload in self._payloads(share):
            buffer.append(payload)
            num_bytes += len(payload)
            while len(buffer) > self._shuffle_buffer or num_bytes > SHUFFLE_BYTES:
                drawn = _draw(buffer, random)
                num_bytes -= len(drawn)
                yield drawn
        while buffer:
            yield _draw(buffer, random)

    def _payloads(self, share: Share) -> Iterator[bytes]:
        order = np.random.default_rng((self._seed, share.epoch)).permutation(len(self._units))
        by_unit = len(order) >= share.count
        index = 0
        for position in order[share.index :: share.count] if by_unit else order:
            for sample in self._samples(*self._units[position]):
                for member in images_of(sample, self._sidecar_patterns):
                    index += 1
                    if by_unit or index % share.count == share.index:
                        yield member.payload

    def _samples(self, uri: str, unit: Unit) -> Iterator[Sample]:
        """Samples of a unit, up to its end or its damage."""
        try:
            # A training run lasts longer than some corpora stay as they were listed.
            yield from read_samples(open_storage(uri), unit.latest)
        except (ShardError, NotFoundError) as damage:
            self.damaged.setdefault(f"{uri}/{unit.name}", str(damage))

    def _crop(self, share: Share, index: int, payload: bytes) -> Pixels | None:
        """A random crop, resized, mirrored half of the time; None for an unreadable image."""
        try:
            pixels = colour(decode(payload, max_pixels=DEFAULT_MAX_PIXELS).pixels)
        except BadImageError:
            return None
        random = np.random.default_rng((self._seed, share.epoch, share.index, index))
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
