"""Loose images: every object of a folder or bucket is a sample of its own, whatever lies around it.

Neighbours in the listing are worked on together, so that a batch is full and a store that answers
slowly is asked for many things at once; each object becomes visible by itself, whole. What is no
image is copied, with whatever the store keeps beside the bytes.

An image that is written in another file format gets one more extension, ``photo.jpg.png``:
``photo.png`` may be there already, or come later.
"""

from __future__ import annotations

import hashlib
import mimetypes
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Self

from one4all.corpus.container import (
    DEFAULT_READ,
    Container,
    Opener,
    OutputObject,
    ReadOptions,
    UnitWriter,
)
from one4all.corpus.samples import Member, Sample, is_protectable
from one4all.corpus.units import ObjectVersion, Unit
from one4all.errors import NotFoundError, ShardError, SourceChangedError
from one4all.image_kinds import has_image_name, is_image
from one4all.storage import Attributes, ObjectInfo, Storage
from one4all.wrapped_images import is_archive

GROUP_OBJECTS = 256
FIRST_GROUP_OBJECTS = 32  # so that a small corpus is work for more than one
_FIRST_GROUPS = 64
GROUP_BYTES = 256 << 20
LARGE_BYTES = 64 << 20  # what is no image and larger is never held in memory
_AT_ONCE = 16  # requests
_MAX_AHEAD = 64 << 20  # bytes that are read, or wait to be written
_HEAD = 1 << 16  # bytes that tell what an object is
_PART = 1 << 20
_CONVERTED = ".png"


@dataclass(frozen=True, kw_only=True)
class LooseMember(Member):
    """An object; its envelope is what its store keeps beside the bytes.

    Attributes:
        attributes: The envelope.
    """

    attributes: Attributes

    def changes_beside(self, written: Member, *, replaced: bool) -> Iterator[str]:
        """See the base class; a folder cannot keep what S3 does, nor S3 what a folder does."""
        assert isinstance(written, LooseMember)
        before, after = self.attributes, written.attributes
        if before.is_of_file != after.is_of_file:
            return
        if before.mode != after.mode:
            yield "its permissions are not the source's"
        if before.modified_ns != after.modified_ns:
            yield "its time of modification is not the source's"
        for name, value in before.headers.items():
            is_converted = name == "ContentType" and written.name != self.name
            if after.headers.get(name) != value and not is_converted:
                yield f"its {name} is not the source's"
        if before.metadata != after.metadata:
            yield "its user metadata are not the source's"
        if before.tags != after.tags:
            yield "its tags are not the source's"


@dataclass(frozen=True, kw_only=True)
class LargeObject(LooseMember):
    """An object that is no image and too large to be held; its bytes are read when they are needed.

    Attributes:
        store: Where it is.
        version: Its version.
    """

    store: Opener = field(repr=False)
    version: ObjectVersion

    def parts(self) -> Iterator[bytes]:
        """Its bytes."""
        with closing(self.store.open(self.version.key, etag=self.version.etag or None)) as reader:
            while part := reader.read(_PART):
                yield part

    def changes(self, written: Member) -> Iterator[str]:
        """See the base class."""
        yield from self.changes_beside(written, replaced=False)
        same = isinstance(written, LargeObject) and self._digest() == written._digest()
        if not same:
            yield "its bytes are not the source's"

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for part in self.parts():
            digest.update(part)
        return digest.hexdigest()


class LooseImages(Container):
    """A corpus of loose images; a unit is a group of neighbours."""

    name = "images"
    unit_name = "image"
    noun = "file"
    has_units = False

    def scan(self, source: Storage) -> Iterator[Unit | ObjectInfo]:
        """See the base class."""
        groups = Grouping()
        for info in source.list_data():
            yield from groups.add(info)
        yield from groups.rest()

    def may_belong(self, key: str) -> bool:
        """See the base class; what is no image by its name may be one by its content."""
        return has_image_name(key)

    def renamed(self, name: str, converted: str) -> str:
        """See the base class."""
        return f"{name}.{converted.rpartition('.')[2]}"

    def meet(self, before: Sample, after: Sample) -> bool:
        """See the base class."""
        return after.key in names_of_output(before.key)

    def read(
        self, store: Opener, unit: Unit, options: ReadOptions = DEFAULT_READ
    ) -> Generator[Sample]:
        """See the base class; an object that is gone or was replaced is left to the next listing.

        Raises:
            ShardError: An image, or an archive that may hold some, is larger than a sample may be.
        """
        with ThreadPoolExecutor(_AT_ONCE, "fetch") as pool:
            ahead: deque[tuple[int, Future[Sample | None]]] = deque()
            try:
                for part in unit.objects:
                    size = min(part.size, LARGE_BYTES)
                    while ahead and (
                        len(ahead) == _AT_ONCE or sum(s for s, _ in ahead) + size > _MAX_AHEAD
                    ):
                        if (sample := ahead.popleft()[1].result()) is not None:
                            yield sample
                    ahead.append((size, pool.submit(_fetch, store, part, options)))
                while ahead:
                    if (sample := ahead.popleft()[1].result()) is not None:
                        yield sample
            finally:
                for _, future in ahead:
                    future.cancel()

    def write(self, destination: Storage, unit: Unit) -> LooseWriter:
        """See the base class."""
        return LooseWriter(destination, unit)


class Grouping:
    """Makes units of neighbours in a listing: small ones first, then larger ones.

    They are bounded in number and bytes of objects; one object may be larger.
    """

    def __init__(self) -> None:
        self._group: list[ObjectInfo] = []
        self._num_bytes = self._num_groups = 0

    def add(self, info: ObjectInfo) -> Iterator[Unit]:
        """Add the next object; yields the group before it, if that is full."""
        limit = FIRST_GROUP_OBJECTS if self._num_groups < _FIRST_GROUPS else GROUP_OBJECTS
        if len(self._group) == limit or self._num_bytes + info.size > GROUP_BYTES:
            yield from self.rest()
        self._group.append(info)
        self._num_bytes += info.size

    def rest(self) -> Iterator[Unit]:
        """The last group, if there is any."""
        group, self._group, self._num_bytes = self._group, [], 0
        if group:
            self._num_groups += 1
            yield unit_of(group)


def unit_of(objects: Sequence[ObjectInfo]) -> Unit:
    """A unit of loose objects."""
    parts = tuple(ObjectVersion(info.key, info.size, info.etag) for info in objects)
    times = [info.modified for info in objects if info.modified is not None]
    return Unit(parts[0].key, parts, LooseImages.name, max(times, default=None))


def names_of_output(key: str) -> tuple[str, str]:
    """Keys under which the copy of an object may stand."""
    return key, key + _CONVERTED


class LooseWriter(UnitWriter):
    """Copies of loose objects; each is visible, whole, as soon as it is written.

    Args:
        destination: Where they go.
        unit: Objects that are copied.
    """

    def __init__(self, destination: Storage, unit: Unit) -> None:
        self._destination = destination
        self._pool = ThreadPoolExecutor(_AT_ONCE, "store")
        self._outputs: list[Future[OutputObject]] = []
        self._in_flight: deque[tuple[int, Future[OutputObject]]] = deque()
        # Asked before an object is read: what is written of a newer version of it, while we work
        # on this one, must not be replaced.
        keys = [key for part in unit.objects for key in _candidates(part.key)]
        found = self._pool.map(destination.standing, keys)
        self._standing = dict(zip(keys, found, strict=True))
        self._written: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._pool.shutdown(cancel_futures=True)

    def copy(self, member: Member) -> None:
        """See the base class."""
        assert isinstance(member, LooseMember)
        content = member.parts() if isinstance(member, LargeObject) else iter((member.payload,))
        self._put(member.name, content, len(member.payload), member.attributes, 0)

    def replace(self, member: Member, *, name: str, payload: bytes) -> None:
        """See the base class."""
        assert isinstance(member, LooseMember)
        attributes = member.attributes
        if name != member.name and "ContentType" in attributes.headers:
            kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
            attributes = replace(attributes, headers={**attributes.headers, "ContentType": kind})
        self._put(name, iter((payload,)), len(payload), attributes, 1)

    def commit(self) -> tuple[OutputObject, ...]:
        """See the base class."""
        return tuple(output.result() for output in self._outputs)

    def _put(
        self,
        key: str,
        content: Iterator[bytes],
        num_bytes: int,
        attributes: Attributes,
        num_protected: int,
    ) -> None:
        if key in self._written:
            raise ShardError(f"{key} would be written for two objects; rename one of them")
        self._written.add(key)
        while self._in_flight and sum(n for n, _ in self._in_flight) + num_bytes > _MAX_AHEAD:
            self._in_flight.popleft()[1].result()
        output = self._pool.submit(self._store, key, content, attributes, num_protected)
        self._in_flight.append((num_bytes, output))
        self._outputs.append(output)

    def _store(
        self, key: str, content: Iterator[bytes], attributes: Attributes, num_protected: int
    ) -> OutputObject:
        standing = self._standing.get(key)
        with self._destination.writer(key, replaces=standing, attributes=attributes) as sink:
            for part in content:
                sink.write(part)
            etag = sink.commit()
        return OutputObject(key, sink.num_bytes, etag, sink.sha256.hexdigest(), num_protected)


def _candidates(key: str) -> tuple[str, ...]:
    """Keys that the copy of an object may get, as far as its name says."""
    may_convert = has_image_name(key) and not key.lower().endswith(_CONVERTED)
    return names_of_output(key) if may_convert else (key,)


def _fetch(store: Opener, part: ObjectVersion, options: ReadOptions) -> Sample | None:
    """The sample of an object; None if it is gone, or was replaced."""
    try:
        with closing(store.open(part.key, etag=part.etag or None)) as reader:
            beside = reader.attributes
            member = LooseMember(
                name=part.key, payload=b"", envelope=beside.to_bytes(), attributes=beside
            )
            payload = reader.read(_HEAD)
            while len(payload) < min(_HEAD, part.size) and (more := reader.read(_HEAD)):
                payload += more
            may_hold_images = is_image(part.key, payload) or is_archive(payload)
            if part.size > options.max_sample_bytes and may_hold_images:
                raise ShardError(
                    f"{part.key} has {part.size:,} bytes, too many to be held in memory; raise "
                    "max_sample_bytes"
                )
            if part.size > LARGE_BYTES and not may_hold_images:
                if options.others == "skip":
                    return Sample(part.key, ())
                large = LargeObject(
                    name=part.key,
                    payload=b"",
                    envelope=member.envelope,
                    attributes=beside,
                    store=store,
                    version=part,
                )
                return Sample(part.key, (large,))
            payload = b"".join([payload, *iter(lambda: reader.read(_PART), b"")])
    except (NotFoundError, SourceChangedError):
        return None
    member = replace(member, payload=payload)
    if options.others == "skip" and not is_protectable(member):
        return Sample(part.key, ())
    return Sample(part.key, (member,))
