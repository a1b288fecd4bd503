"""Training images from the units of corpora: split by rank, shuffled, resumable at a position.

An epoch is split into as many shares as there are ranks. The stream of a share is a function of
(seed, epoch, index, count) and the corpus alone: the order of units, the shuffle and every random
crop are drawn from generators seeded with them, whatever threads do when.

Some units of a share are open at once and take turns, an image each. What is read so is cut into
blocks; a block is shuffled, and the next one is read meanwhile. A block has a mark: what was open
there, and how much of it was taken. So a position needs no unit that was finished before its block,
and decodes nothing that came before.

When training goes on with another number of ranks, what is left of the shares of a begun epoch is
dealt to the new ranks, each of which then begins the next epoch with a share of the new size. So
every image counts once an epoch however often the number changes, and nobody waits for anybody.

A unit that is damaged, or is gone, ends where its damage begins, in every epoch anew; what comes
after it in the stream is what would come after a shorter unit. So positions hold as long as the
damage stays the same.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from one4all.corpus import Sample, Unit, images_of, open_corpora, read_samples
from one4all.errors import BadImageError, NotFoundError, ShardError, UsageError
from one4all.images import DEFAULT_MAX_PIXELS, Pixels, colour, decode, working_copy
from one4all.storage import open_storage

MIN_CROP_AREA = 0.4  # share of the image; paper-like RandomResizedCrop (docs/method.md, 19)
SHUFFLE_BYTES = 256 << 20  # encoded images held at most: a block, and the next one
OPEN_SHARDS = 4
EMPTY_EPOCHS = 20  # in a row, in which damage left a rank less than a batch: then too much is lost

_T = TypeVar("_T")


@dataclass(frozen=True, order=True)
class Mark:
    """Where the reading of a share can begin: at the start of a block.

    Attributes:
        position: Images of the share that come before.
        num_opened: Units of the share that were opened before.
        num_read: Images that were read before, those of other shares included.
        open_units: Units that are open, in the order of their turns: number of each in the share,
            and images that were taken of it.
    """

    position: int = 0
    num_opened: int = 0
    num_read: int = 0
    open_units: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, order=True)
class Share:
    """What is left of one rank's part of an epoch.

    Attributes:
        epoch: Number of the epoch, from 0.
        index: Number of the part, from 0.
        count: Number of parts that the epoch was split into.
        position: Images of the part that are done with.
        mark: Start of the block that the position is in.
    """

    epoch: int
    index: int
    count: int
    position: int = 0
    mark: Mark = Mark()

    @property
    def next_epoch(self) -> Share:
        """The same part of the epoch after."""
        return Share(self.epoch + 1, self.index, self.count)

    def to_list(self) -> list[object]:
        """Numbers and lists of them, for a checkpoint."""
        mark = self.mark
        units = [list(pair) for pair in mark.open_units]
        return [
            *(self.epoch, self.index, self.count, self.position),
            [mark.position, mark.num_opened, mark.num_read, units],
        ]

    @classmethod
    def from_list(cls, values: Sequence[Any]) -> Self:
        """The inverse of `to_list`; also of one without a mark, as older checkpoints have it."""
        epoch, index, count, position, *marks = values
        if not marks:
            return cls(epoch, index, count, position)
        before, num_opened, num_read, units = marks[0]
        open_units = tuple((place, taken) for place, taken in units)
        return cls(epoch, index, count, position, Mark(before, num_opened, num_read, open_units))


Shares = tuple[Share, ...]  # of one rank, in the order of work


class EncodedImage(NamedTuple):
    """One image as it was read: its file, the URI of its unit, and the key of its sample."""

    payload: bytes
    unit: str
    key: str


class Batch(NamedTuple):
    """Crops for one step.

    Attributes:
        shares: What is left *after* the batch, to be given again to resume.
        image_BHWC: uint8 (B, S, S, 3).
        names: URI of the unit and key of the sample of each image.
    """

    shares: Shares
    image_BHWC: Tensor
    names: list[tuple[str, str]]


class _Block(NamedTuple):
    """Images that are shuffled with each other, and whether they are the last of their share."""

    mark: Mark
    images: list[EncodedImage]
    is_last: bool


@dataclass
class _OpenUnit:
    """A unit that is being read: its number in the share, images taken of it, and the others."""

    place: int
    taken: int
    images: Iterator[EncodedImage]


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
        shuffle_buffer: Encoded images that are shuffled with each other; as many more are read
            ahead. Fewer, if they are large: see `SHUFFLE_BYTES`.
        open_shards: Units that are read at once.
        part: Part of the units that is read, of a random order that the seed draws: (0, 0.1) is a
            tenth of them, at least one, and (0.1, 1) are the others, at least one too.
        sidecar_patterns: Images that are no photos, such as ``*.seg.png``, and are not learnt
            from; matched against the last component of the name.
        num_threads: Threads that decode.
        pin_memory: Whether batches are in page-locked memory, from which copies to a GPU overlap
            with its work.

    Attributes:
        damaged: Why a unit could not be read to its end, by its URI; of all that were met so far.
            Its images before the damage are used, the others are left out.

    Raises:
        UsageError: There is no unit in them, or only one for two parts.
    """

    damaged: dict[str, str]

    def __init__(
        self,
        uris: Sequence[str],
        *,
        size: int,
        seed: int = 0,
        shuffle_buffer: int = 2000,
        open_shards: int = OPEN_SHARDS,
        part: tuple[float, float] = (0, 1),
        sidecar_patterns: Sequence[str] = (),
        num_threads: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self._units: Sequence[tuple[str, Unit]] = open_corpora(uris)
        self._places = _part(len(self._units), part, seed)
        self._size, self._seed = size, seed
        self._shuffle_buffer, self._open_shards = shuffle_buffer, open_shards
        self._sidecar_patterns = tuple(sidecar_patterns)
        self._pool = ThreadPoolExecutor(num_threads, "decoder")
        self._pin_memory = pin_memory
        self.damaged = {}

    def encoded(self, share: Share) -> Iterator[EncodedImage]:
        """Images of a share in its random order, from the block on that its position is in."""
        return chain.from_iterable(block.images for block in self._blocks_of(share))

    def first(self, count: int) -> Tensor:
        """Crops of the first images of an epoch that can be read: the same every time.

        Returns:
            uint8 (N, S, S, 3); N is ``count``, or less if there are not so many.

        Raises:
            UsageError: There is none.
        """
        share = Share(0, 0, 1)
        ready: list[tuple[Pixels, EncodedImage]] = []
        for block in self._blocks_of(share):
            if block.images:
                chunk = list(enumerate(block.images, block.mark.position))
                ready += self.crops(share, chunk[: count - len(ready)])
            if len(ready) == count:
                break
        if not ready:
            raise UsageError(f"no image among those for validation can be read{self._losses()}")
        return self._batch((share,), ready).image_BHWC

    def crops(
        self, share: Share, chunk: Sequence[tuple[int, EncodedImage]]
    ) -> Iterator[tuple[Pixels, EncodedImage]]:
        """Crops of numbered images of a share, decoded at once; without those that cannot be read.

        Yields:
            ``(crop_HWC, image)`` with crops uint8 (size, size, 3), in order.
        """
        indices, images = zip(*chunk, strict=True)
        payloads = [image.payload for image in images]
        crops = self._pool.map(partial(self._crop, share), indices, payloads)
        for crop, image in zip(crops, images, strict=True):
            if crop is not None:
                yield crop, image

    def batches(self, batch_size: int, shares: Shares) -> Generator[Batch]:
        """Batches without end: of these shares, then of the last one's epoch after epoch.

        With fewer units than shares, each share reads all units and keeps its part of the images.
        Images that are left at the end of a share and fill no batch are left out. Reading,
        decoding and what the caller does with a batch overlap.

        Raises:
            UsageError: A share holds less than one batch; or damaged units have left less than that
                for `EMPTY_EPOCHS` epochs.
        """
        stop = threading.Event()
        return _ahead(self._batches(batch_size, shares, stop), "batches", stop)

    def _batches(self, batch_size: int, shares: Shares, stop: threading.Event) -> Generator[Batch]:
        with closing(_ahead(self._blocks(shares, stop), "reader", stop)) as blocks:
            num_empty = 0  # shares in a row
            while True:
                share, later = shares[0], shares[1:]
                chunk: list[tuple[int, EncodedImage]] = []
                ready: list[tuple[Pixels, EncodedImage]] = []
                count, yielded, is_last = 0, False, False
                while not is_last:
                    mark, images, is_last = next(blocks)
                    count = mark.position + len(images)
                    for index, image in enumerate(images, mark.position):
                        if index < share.position:
                            continue
                        chunk.append((index, image))
                        if len(chunk) < batch_size - len(ready):
                            continue
                        ready += self.crops(share, chunk)
                        chunk = []
                        if len(ready) == batch_size:
                            yielded = True
                            done = replace(share, position=index + 1, mark=mark)
                            yield self._batch((done, *later), ready)
                            ready = []
                if not yielded and share.position == 0:
                    num_empty += 1
                    if not self.damaged or num_empty == EMPTY_EPOCHS:
                        raise UsageError(
                            f"rank {share.index} finds {count} images, not enough that can be read "
                            f"for one batch of {batch_size}; use more images, fewer workers or a "
                            f"smaller batch{self._losses()}"
                        )
                elif yielded:
                    num_empty = 0
                shares = later or (share.next_epoch,)

    def _batch(self, shares: Shares, ready: list[tuple[Pixels, EncodedImage]]) -> Batch:
        shape = (len(ready), self._size, self._size, 3)
        image_BHWC = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin_memory)
        np.stack([crop for crop, _ in ready], out=image_BHWC.numpy())
        return Batch(shares, image_BHWC, [(image.unit, image.key) for _, image in ready])

    def _losses(self) -> str:
        """What the damaged units do to a message."""
        if not self.damaged:
            return ""
        uri, reason = next(iter(self.damaged.items()))
        others = f", and {len(self.damaged) - 1} more" if len(self.damaged) > 1 else ""
        return f"; damaged: {uri} ({reason}){others}"

    def _blocks(self, shares: Shares, stop: threading.Event) -> Generator[_Block]:
        """Blocks without end: of these shares, then of the last one's epoch after epoch."""
        while True:
            yield from self._blocks_of(shares[0], stop)
            shares = shares[1:] or (shares[0].next_epoch,)

    def _blocks_of(self, share: Share, stop: threading.Event | None = None) -> Generator[_Block]:
        """Shuffled blocks of a share from its mark on; the last one may be empty.

        Raises:
            _StoppedError: ``stop`` was set.
        """
        order = np.random.default_rng((self._seed, share.epoch)).permutation(self._places)
        by_unit = len(order) >= share.count
        if by_unit:
            order = order[share.index :: share.count]
        mark = share.mark
        num_opened, num_read = mark.num_opened, mark.num_read

        def open_unit(place: int, taken: int) -> _OpenUnit:
            uri, unit = self._units[order[place]]
            return _OpenUnit(place, taken, islice(self._images(uri, unit), taken, None))

        # A corpus may have become smaller since the mark was set.
        turns = deque(open_unit(place, n) for place, n in mark.open_units if place < len(order))
        images: list[EncodedImage] = []
        num_bytes = 0
        while True:
            while len(turns) < self._open_shards and num_opened < len(order):
                turns.append(open_unit(num_opened, 0))
                num_opened += 1
            if not turns:
                break
            if stop is not None and stop.is_set():
                raise _StoppedError
            turn = turns.popleft()
            image = next(turn.images, None)
            if image is None:
                continue
            turn.taken += 1
            turns.append(turn)
            num_read += 1
            if not by_unit and num_read % share.count != share.index:
                continue
            images.append(image)
            num_bytes += len(image.payload)
            if len(images) >= self._shuffle_buffer or num_bytes >= SHUFFLE_BYTES // 2:
                yield self._shuffled(share, mark, images, is_last=False)
                open_units = tuple((turn.place, turn.taken) for turn in turns)
                mark = Mark(mark.position + len(images), num_opened, num_read, open_units)
                images, num_bytes = [], 0
        yield self._shuffled(share, mark, images, is_last=True)

    def _shuffled(
        self, share: Share, mark: Mark, images: list[EncodedImage], *, is_last: bool
    ) -> _Block:
        seed = (self._seed, share.epoch, share.index, mark.position)
        order = np.random.default_rng(seed).permutation(len(images))
        return _Block(mark, [images[index] for index in order], is_last)

    def _images(self, uri: str, unit: Unit) -> Iterator[EncodedImage]:
        """Images of a unit, in their order."""
        for sample in self._samples(uri, unit):
            for member in images_of(sample, self._sidecar_patterns):
                yield EncodedImage(member.payload, f"{uri}/{unit.name}", sample.key)

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


def _part(num_units: int, part: tuple[float, float], seed: int) -> NDArray[np.int64]:
    """Numbers of the units of a part; see `ImageStream`."""
    if part == (0, 1):
        return np.arange(num_units)
    if num_units < 2:
        raise UsageError(
            "one shard cannot be split into one to learn from and one to validate on; pack smaller "
            "shards, or name images of their own in validation_source"
        )
    first, last = (
        min(max(round(edge * num_units), 1), num_units - 1) if 0 < edge < 1 else edge * num_units
        for edge in part
    )
    return np.random.default_rng(seed).permutation(num_units)[int(first) : int(last)]


class _StoppedError(Exception):
    """Nobody wants what is being read ahead; never seen outside."""


def _ahead(items: Generator[_T], name: str, stop: threading.Event) -> Generator[_T]:
    """The same items without end, each made by a thread while the caller works on the last one.

    Args:
        items: What is made; it must look at ``stop`` now and then.
        name: Name of the thread.
        stop: Set when no more is wanted.
    """
    with closing(items), ThreadPoolExecutor(1, name) as maker:
        try:
            upcoming = maker.submit(next, items)
            while True:
                item = upcoming.result()
                upcoming = maker.submit(next, items)
                yield item
        finally:
            stop.set()
