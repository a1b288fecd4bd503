"""WebDataset shards: a strict tar reader and a byte-faithful tar writer.

``tarfile`` reads a shard that was cut between two members, or that has one garbled header, as a
shorter shard, without an error. Here both are a `ShardError`: a shard is whole only when its
end-of-archive blocks have been read and nothing but zeros follows.

Members that are copied keep their header blocks and their payload byte for byte, whatever dialect
of tar wrote them. Names are data: nothing is extracted, nothing is unpickled.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self

from one4all.corpus.container import Container, Opener, OutputObject, UnitWriter
from one4all.corpus.samples import DEFAULT_MAX_SAMPLE_BYTES, Member, Sample
from one4all.corpus.units import Unit
from one4all.errors import ShardError
from one4all.storage import ObjectInfo, Storage, Writer

SUFFIX = ".tar"
BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(BLOCK)
_EXTENSION_TYPES = (b"x", b"L", b"K")  # headers that describe the member after them
_MEMBER_TYPES = frozenset(tarfile.SUPPORTED_TYPES) - {tarfile.GNUTYPE_SPARSE}
MAX_SAMPLE_MEMBERS = 256  # a sample is held in memory, with its decoded images
_MAX_EXTENSION_HEADERS = 8  # before one member; tar writes three at most
_MAX_HEADER_PAYLOAD = 1 << 20  # bytes; a PAX or long-name payload beyond this is an attack


class Readable(Protocol):
    """What the reader needs of a source: bytes in order, ``b""`` at the end; may be short."""

    def read(self, size: int, /) -> bytes: ...


class Writable(Protocol):
    """What the writer needs of a sink."""

    def write(self, data: bytes, /) -> object: ...


@dataclass(frozen=True, kw_only=True)
class TarMember(Member):
    """A member of a shard; its envelope is its header blocks, extension headers included."""

    info: tarfile.TarInfo = field(repr=False)

    @classmethod
    def of(cls, info: tarfile.TarInfo, header: bytes, payload: bytes) -> TarMember:
        """From a parsed header, the blocks it stands in, and the content."""
        return cls(
            name=info.name, payload=payload, envelope=header, is_file=info.isreg(), info=info
        )

    @property
    def stored_bytes(self) -> int:
        """See the base class: header and content fill whole blocks."""
        return len(self.envelope) + _padded(len(self.payload))


class TarContainer(Container):
    """A corpus of WebDataset shards: every ``.tar`` object is a unit."""

    name = "tar"
    unit_name = ".tar shard"

    def scan(self, source: Storage) -> Iterator[Unit | ObjectInfo]:
        """See the base class."""
        for info in source.list_data():
            yield Unit.of_object(info, self.name) if info.key.endswith(SUFFIX) else info

    def read(
        self, store: Opener, unit: Unit, *, max_sample_bytes: int = DEFAULT_MAX_SAMPLE_BYTES
    ) -> Generator[Sample]:
        """See the base class."""
        (shard,) = unit.objects
        with closing(store.open(shard.key, etag=shard.etag or None)) as reader:
            yield from read_tar(reader, max_sample_bytes=max_sample_bytes)

    def write(self, destination: Storage, unit: Unit) -> TarUnitWriter:
        """See the base class."""
        (shard,) = unit.objects
        return TarUnitWriter(destination.writer(shard.key), shard.key)


class TarUnitWriter(UnitWriter):
    """The copy of a shard, written to a store.

    Args:
        sink: Object being written.
        key: Key of that object.
    """

    def __init__(self, sink: Writer, key: str) -> None:
        self._sink, self._key = sink, key
        self._tar = TarWriter(sink)

    def __enter__(self) -> Self:
        self._sink.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._sink.__exit__(*exception)

    def copy(self, member: Member) -> None:
        """See the base class."""
        self._tar.copy(member)

    def replace(self, member: Member, *, name: str, payload: bytes) -> None:
        """See the base class."""
        self._tar.replace(member, name=name, payload=payload)

    def commit(self) -> tuple[OutputObject, ...]:
        """See the base class."""
        self._tar.close()
        etag = self._sink.commit()
        sha256 = self._sink.sha256.hexdigest()
        return (OutputObject(self._key, self._sink.num_bytes, etag, sha256),)


def read_tar(
    stream: Readable, *, max_sample_bytes: int = DEFAULT_MAX_SAMPLE_BYTES
) -> Iterator[Sample]:
    """Samples of a shard, in order; the end is reached only if the shard is whole.

    Raises:
        ShardError: As `read_members`; or a key comes back after another sample, so that readers
            would disagree about which members belong together.
    """
    seen: set[str] = set()
    group: list[TarMember] = []

    def close() -> Sample:
        key = group[0].key
        if group[0].is_file:
            if key in seen:
                raise ShardError(
                    f"key {key!r} appears twice; members of a sample must be consecutive"
                )
            seen.add(key)
        return Sample(key, tuple(group))

    for member in read_members(stream, max_sample_bytes=max_sample_bytes):
        if group and not (member.is_file and group[0].is_file and member.key == group[0].key):
            yield close()
            group = []
        if any(member.name == other.name for other in group):
            raise ShardError(f"member {member.name!r} appears twice")
        group.append(member)
        if len(group) > MAX_SAMPLE_MEMBERS or sum(len(m.payload) for m in group) > max_sample_bytes:
            raise ShardError(
                f"sample {member.key!r} has over {MAX_SAMPLE_MEMBERS} members or "
                f"{max_sample_bytes:,} bytes; a key ends at the first dot of a name, so names like "
                "frame.0001.jpg all belong to one sample"
            )
    if group:
        yield close()


def read_members(
    stream: Readable, *, max_sample_bytes: int = DEFAULT_MAX_SAMPLE_BYTES
) -> Iterator[TarMember]:
    """Members of a shard, in order.

    Args:
        stream: The shard, from its first byte.
        max_sample_bytes: Refuse a member that declares more; it would have to fit in memory.

    Raises:
        ShardError: Truncated, garbled, compressed, sparse, or followed by anything but zeros.
    """
    blocks = _Blocks(stream)
    while True:
        header, position, num_extensions = b"", blocks.position, 0
        while True:
            block = blocks.take(BLOCK, "a header" if header else "the end-of-archive blocks")
            if block == _ZEROS:
                break
            info = _parse_header(block, position)
            header += block
            if info.type not in (*_EXTENSION_TYPES, tarfile.XGLTYPE):
                break
            num_extensions += 1
            if info.size > _MAX_HEADER_PAYLOAD or num_extensions > _MAX_EXTENSION_HEADERS:
                raise ShardError(f"too many or too large extension headers at byte {position:,}")
            header += blocks.take(_padded(info.size), "an extension header")
            if info.type == tarfile.XGLTYPE:
                break
        if block == _ZEROS:
            if header:
                raise ShardError(f"extension header without a member at byte {position:,}")
            blocks.expect_end()
            return
        if info.type == tarfile.XGLTYPE:
            if b" size=" in header or b" path=" in header:
                raise ShardError(f"global header at byte {position:,} overrides names or sizes")
            yield TarMember.of(info, header, b"")
            continue
        if len(header) > BLOCK:
            info = _parse_extended(header, position)
        if info.issparse() or info.type not in _MEMBER_TYPES:
            raise ShardError(f"member {info.name!r} has the unsupported type {info.type!r}")
        size = info.size if info.isreg() else 0
        if not 0 <= size <= max_sample_bytes:
            raise ShardError(f"member {info.name!r} declares {size:,} bytes, over the limit")
        payload = blocks.take(_padded(size), f"member {info.name!r}")
        yield TarMember.of(info, header, payload[:size])


class TarWriter:
    """Writes members to a sink; `close` adds the end-of-archive blocks."""

    def __init__(self, sink: Writable) -> None:
        self._sink = sink
        self._position = 0

    def copy(self, member: Member) -> None:
        """Write ``member`` exactly as it was read."""
        self._write(member.envelope, member.payload)

    def replace(self, member: Member, *, name: str, payload: bytes) -> None:
        """Write ``member`` with another payload and perhaps another name, else as it was."""
        assert isinstance(member, TarMember)  # what `read_members` gave
        info = tarfile.TarInfo(name)
        original = member.info
        info.size = len(payload)
        info.mtime, info.mode, info.type = original.mtime, original.mode, tarfile.REGTYPE
        info.uid, info.gid = original.uid, original.gid
        info.uname, info.gname = original.uname, original.gname
        info.pax_headers = {
            key: value
            for key, value in original.pax_headers.items()
            if key not in ("path", "size")  # tobuf writes these again where they are needed
        }
        header = info.tobuf(_dialect(member), "utf-8", "surrogateescape")
        self._write(header, payload)

    def close(self) -> None:
        """Write the end of the archive, padded to a record as tar does."""
        end = 2 * BLOCK
        end += -(self._position + end) % tarfile.RECORDSIZE
        self._sink.write(bytes(end))

    def _write(self, header: bytes, payload: bytes) -> None:
        padding = _padded(len(payload)) - len(payload)
        self._sink.write(header)
        self._sink.write(payload)
        if padding:
            self._sink.write(bytes(padding))
        self._position += len(header) + len(payload) + padding


def write_shard(sink: Writable, files: Iterable[tuple[str, bytes]], *, mtime: int = 0) -> None:
    """Write a new shard of regular files.

    Args:
        sink: Receives the bytes.
        files: (name, content) in the order wanted.
        mtime: Modification time of every member, seconds since the epoch; fixed, so that the same
            files make the same bytes.
    """
    writer = TarWriter(sink)
    for name, payload in files:
        info = tarfile.TarInfo(name)
        info.mtime, info.mode, info.size = mtime, 0o644, len(payload)
        header = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
        writer.copy(TarMember.of(info, header, payload))
    writer.close()


class _Blocks:
    """Exact reads from a stream, with the position for error messages."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self.position = 0

    def take(self, size: int, what: str) -> bytes:
        parts, missing = [], size
        while missing:
            part = self._stream.read(missing)
            if not part:
                raise ShardError(
                    f"truncated: the shard ends at byte {self.position + size - missing:,}, "
                    f"inside {what}"
                )
            parts.append(part)
            missing -= len(part)
        self.position += size
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def expect_end(self) -> None:
        """Called after the first zero block: one more, then only zeros."""
        if self.take(BLOCK, "the end-of-archive blocks") != _ZEROS:
            raise ShardError(f"data after a single zero block at byte {self.position - BLOCK:,}")
        while part := self._stream.read(1 << 20):
            if part.count(0) != len(part):
                raise ShardError(f"garbage after the end of the archive at byte {self.position:,}")
            self.position += len(part)


def _parse_header(block: bytes, position: int) -> tarfile.TarInfo:
    if block[:2] == b"\x1f\x8b" and position == 0:
        raise ShardError(
            "gzip-compressed; only plain tar shards are supported, decompress it first"
        )
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise ShardError(f"garbled header at byte {position:,}: {error}") from error


def _parse_extended(header: bytes, position: int) -> tarfile.TarInfo:
    """Parse a member header that has PAX or GNU extension headers before it."""
    try:
        with tarfile.open(
            fileobj=io.BytesIO(header + bytes(2 * BLOCK)),
            mode="r:",
            encoding="utf-8",
            errors="surrogateescape",
        ) as archive:
            info = archive.next()
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise ShardError(f"garbled extension header at byte {position:,}: {error}") from error
    if info is None:
        raise ShardError(f"garbled extension header at byte {position:,}")
    return info


def _dialect(member: TarMember) -> Literal[1, 2]:
    """The tar dialect to write a replaced member in: the one it was written in."""
    if member.envelope[257:265] == b"ustar  \0":
        return tarfile.GNU_FORMAT
    return tarfile.PAX_FORMAT


def _padded(size: int) -> int:
    return size + -size % BLOCK
