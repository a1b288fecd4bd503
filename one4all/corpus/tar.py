"""WebDataset shards: a strict tar reader and a byte-faithful tar writer.

``tarfile`` reads a shard that was cut between two members, or that has one garbled header, as a
shorter shard, without an error. Here both are a `ShardError`: a shard is whole only when the end of
the archive has been read, a block of zeros, and nothing but zeros follows.

Members that are copied keep their header blocks and their payload byte for byte, whatever dialect
of tar wrote them. Names are data: nothing is extracted, nothing is unpickled.

Headers are read strictly, extension headers by code of our own: ``tarfile`` takes a time that grows
with the square of a record, and numbers that no writer writes. Where readers of tar would disagree
about what a member holds or where it ends, the shard is refused: what we copy as a text must not be
an image to somebody else.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self

from one4all.corpus.container import (
    DEFAULT_READ,
    FileContainer,
    Opener,
    OutputObject,
    ReadOptions,
    UnitWriter,
)
from one4all.corpus.samples import DEFAULT_MAX_SAMPLE_BYTES, Member, Sample
from one4all.corpus.units import Unit
from one4all.errors import ShardError
from one4all.storage import Storage, Writer

SUFFIX = ".tar"
BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(BLOCK)
_PAX, _LONG_NAME, _LONG_LINK = b"x", b"L", b"K"  # headers that describe the member after them
_VOLUME_LABEL = b"V"  # of GNU tar; no file, and no content
_MEMBER_TYPES = frozenset(tarfile.SUPPORTED_TYPES) - {
    tarfile.GNUTYPE_SPARSE,
    _LONG_NAME,
    _LONG_LINK,
} | {_VOLUME_LABEL}
_SPARSE = "a sparse file, of which readers find other content; write the shard without --sparse"
_REFUSED_TYPES = {  # what GNU tar writes under options that make no shard
    tarfile.GNUTYPE_SPARSE: _SPARSE,
    b"M": "a part of a file of another volume; write the shard without --multi-volume",
    b"D": "a list of a folder; write the shard without --incremental",
}
MAX_SAMPLE_MEMBERS = 256  # a sample is held in memory
MAX_NAME = 4096  # characters; no file system holds a longer path
_MAX_HEADER_PAYLOAD = 1 << 20  # bytes; a PAX or long-name payload beyond this is an attack
_MAX_PAX_RECORDS = 1000  # tar writes about ten

_NO_TARS = {  # what files that are called .tar begin with, if they are something else
    b"\x1f\x8b": "gzip-compressed",
    b"\xfd7zXZ\0": "xz-compressed",
    b"\x28\xb5\x2f\xfd": "zstd-compressed",
    b"BZh": "bzip2-compressed",
    b"\x04\x22\x4d\x18": "lz4-compressed",
    b"PK\3\4": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a rar archive",
}

# Where the number fields of a header stand, and how they are written: octal, or base 256.
_NUMBERS = {"mode": (100, 108), "uid": (108, 116), "gid": (116, 124), "size": (124, 136)}
_NUMBERS |= {"mtime": (136, 148), "checksum": (148, 156)}
_OCTAL = re.compile(rb" *[0-7]*[ \0]*")
_USUAL_NUMBERS = re.compile(rb"([0-7]{6}[0-7 ][ \0]){3}([0-7]{11}[ \0]){2}[0-7]{6}\0 ")
_PAX_LENGTH = re.compile(rb"(\d{1,7}) ")
_PAX_NUMBERS = {
    "size": re.compile(r"\d{1,19}"),
    "uid": re.compile(r"-?\d{1,15}"),
    "gid": re.compile(r"-?\d{1,15}"),
    "mtime": re.compile(r"-?\d{1,15}(\.\d*)?"),
}
_PAX_TEXTS = {"path": "name", "linkpath": "linkname", "uname": "uname", "gname": "gname"}
# By these, readers find other content than we copy, or none: sparse files, parts of a file.
_PAX_OTHER_CONTENT = ("GNU.sparse.", "GNU.volume.", "SCHILY.realsize", "SUN.holesdata")


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
            name=info.name,
            payload=payload,
            envelope=header,
            is_file=info.isreg(),
            link_target=info.linkname if info.islnk() or info.issym() else "",
            info=info,
        )

    @property
    def stored_bytes(self) -> int:
        """See the base class: header and content fill whole blocks."""
        return len(self.envelope) + _padded(len(self.payload))


class TarContainer(FileContainer):
    """A corpus of WebDataset shards: every ``.tar`` object is a unit."""

    name = "tar"
    unit_name = ".tar shard"
    noun = "shard"
    suffix = SUFFIX

    def read(
        self, store: Opener, unit: Unit, options: ReadOptions = DEFAULT_READ
    ) -> Generator[Sample]:
        """See the base class."""
        (shard,) = unit.objects
        with closing(store.open(shard.key, etag=shard.etag or None)) as reader:
            yield from read_tar(reader, max_sample_bytes=options.max_sample_bytes)

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
        self._num_protected = 0

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
        self._num_protected += 1

    def commit(self) -> tuple[OutputObject, ...]:
        """See the base class."""
        self._tar.close()
        etag = self._sink.commit()
        sha256 = self._sink.sha256.hexdigest()
        size = self._sink.num_bytes
        return (OutputObject(self._key, size, etag, sha256, self._num_protected),)


def read_tar(
    stream: Readable, *, max_sample_bytes: int = DEFAULT_MAX_SAMPLE_BYTES
) -> Iterator[Sample]:
    """Samples of a shard, in order; the end is reached only if the shard is whole.

    WebDataset passes over a file whose name starts with a dot, such as the companions that macOS
    puts beside files. It stands alone; but between two members of one sample it belongs to it.

    Raises:
        ShardError: As `read_members`; or a key comes back after another sample, so that readers
            would disagree about which members belong together.
    """
    seen: set[bytes] = set()  # digests: a key may be long, and a shard may hold millions
    group: list[TarMember] = []
    waiting: list[TarMember] = []  # names with a dot behind the group, which may go on after them

    def close() -> Iterator[Sample]:
        alone = [(member,) for member in waiting]
        for members in [tuple(group), *alone] if group else alone:
            key = members[0].key
            if members[0].is_file:
                digest = hashlib.blake2b(
                    key.encode("utf-8", "surrogateescape"), digest_size=16
                ).digest()
                if digest in seen:
                    raise ShardError(
                        f"key {key!r} appears twice; members of a sample must be consecutive: "
                        "make the shard again in the order of names, such as by tar --sort=name"
                    )
                seen.add(digest)
            yield Sample(key, members)

    for member in read_members(stream, max_sample_bytes=max_sample_bytes):
        if group and member.is_file and member.key == group[0].key:
            group += [*waiting, member]
            waiting = []
            _check_sample(group, max_sample_bytes)
        elif (
            group
            and member.is_file
            and not member.has_key
            and _fit([*group, *waiting, member], max_sample_bytes)
        ):
            waiting.append(member)
        else:
            yield from close()
            group, waiting = [member], []
            _check_sample(group, max_sample_bytes)
            if not member.is_file or member.is_dot_file:
                yield from close()
                group = []
    yield from close()


def _check_sample(members: Sequence[TarMember], max_sample_bytes: int) -> None:
    """Raises: ShardError if members are no sample."""
    name = members[-1].name
    if any(member.name == name for member in members[:-1]):
        raise ShardError(f"member {name!r} appears twice")
    if not _fit(members, max_sample_bytes):
        raise ShardError(
            f"sample {members[-1].key!r} has over {MAX_SAMPLE_MEMBERS} members or "
            f"{max_sample_bytes:,} bytes; a key ends at the first dot of a name, so names like "
            "frame.0001.jpg all belong to one sample"
        )


def _fit(members: Sequence[TarMember], max_sample_bytes: int) -> bool:
    """Whether members are not too many for one sample, which is held in memory."""
    num_bytes = sum(len(member.payload) + len(member.envelope) - BLOCK for member in members)
    return len(members) <= MAX_SAMPLE_MEMBERS and num_bytes <= max_sample_bytes


def read_members(
    stream: Readable, *, max_sample_bytes: int = DEFAULT_MAX_SAMPLE_BYTES
) -> Iterator[TarMember]:
    """Members of a shard, in order.

    Blocks of zeros end it. Two are written; one is enough if the file ends with it, since all
    members stand before it.

    Args:
        stream: The shard, from its first byte.
        max_sample_bytes: Refuse a member that declares more; it would have to fit in memory.

    Raises:
        ShardError: Truncated, garbled, compressed, sparse, or followed by anything but zeros.
    """
    blocks = _Blocks(stream)
    while True:
        position = blocks.position
        info, header = _read_headers(blocks)
        if info is None:
            blocks.expect_end()
            return
        name = info.name
        if len(name) > MAX_NAME or len(info.linkname) > MAX_NAME:
            raise ShardError(f"a name of over {MAX_NAME:,} characters at byte {position:,}")
        if info.type == tarfile.XGLTYPE:
            yield TarMember.of(info, header, b"")
            continue
        if info.type not in _MEMBER_TYPES:
            reason = _REFUSED_TYPES.get(info.type, f"of the unsupported type {info.type!r}")
            raise ShardError(f"member {name!r} is {reason}")
        if info.size and not info.isreg():
            raise ShardError(
                f"member {name!r} is no file and declares {info.size:,} bytes; readers disagree "
                "about where the next one begins"
            )
        if info.size > max_sample_bytes:
            raise ShardError(f"member {name!r} declares {info.size:,} bytes, over the limit")
        payload = blocks.take(_padded(info.size), f"member {name!r}")
        yield TarMember.of(info, header, payload[: info.size])


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
        """Called after the first zero block: the end, or one more and then only zeros."""
        first = self._stream.read(1)
        if not first:
            return
        if first + self.take(BLOCK - 1, "the end-of-archive blocks") != _ZEROS:
            raise ShardError(f"data after a single zero block at byte {self.position - BLOCK:,}")
        while part := self._stream.read(1 << 20):
            if part.count(0) != len(part):
                raise ShardError(f"garbage after the end of the archive at byte {self.position:,}")
            self.position += len(part)


def _read_headers(blocks: _Blocks) -> tuple[tarfile.TarInfo | None, bytes]:
    """One member's header, as its extension headers have it, and all blocks of these.

    A global header counts as a member. None stands for the first block of the archive's end.
    """
    position = blocks.position
    header = blocks.take(BLOCK, "the end-of-archive blocks")
    if header == _ZEROS:
        return None, b""
    info = _parse_header(header, position)
    extensions: dict[bytes, bytes] = {}
    while info.type in (_PAX, _LONG_NAME, _LONG_LINK, tarfile.XGLTYPE):
        mixed = extensions and _PAX in (info.type, *extensions)
        if info.size > _MAX_HEADER_PAYLOAD or info.type in extensions or mixed:
            raise ShardError(f"too many or too large extension headers at byte {position:,}")
        payload = blocks.take(_padded(info.size), "an extension header")
        header += payload
        if info.type == tarfile.XGLTYPE:
            if extensions:
                raise ShardError(f"global header inside of another at byte {position:,}")
            _check_global(_pax_records(payload[: info.size], position), position)
            return info, header
        extensions[info.type] = payload[: info.size]
        block = blocks.take(BLOCK, "a header")
        if block == _ZEROS:
            raise ShardError(f"extension header without a member at byte {position:,}")
        info = _parse_header(block, position)
        header += block
    for kind, payload in extensions.items():
        if kind == _PAX:
            _apply_pax(info, _pax_records(payload, position), position)
        elif kind == _LONG_NAME:
            info.name = _long_name(payload, position)
        else:
            info.linkname = _long_name(payload, position)
    if info.isdir():
        info.name = info.name.rstrip("/")
    return info, header


def _parse_header(block: bytes, position: int) -> tarfile.TarInfo:
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        for signature, what in _NO_TARS.items():
            if position == 0 and block.startswith(signature):
                raise ShardError(
                    f"{what}, not a tar; only plain tar shards are supported: unpack it first"
                ) from error
        raise ShardError(f"garbled header at byte {position:,}: {error}") from error
    if _USUAL_NUMBERS.match(block, 100):
        return info
    for name, (start, end) in _NUMBERS.items():
        number = block[start:end]
        if number[0] not in (0x80, 0xFF) and not _OCTAL.fullmatch(number):
            raise ShardError(f"garbled header at byte {position:,}: its {name} is {number!r}")
    if info.size < 0:
        raise ShardError(f"garbled header at byte {position:,}: its size is {info.size:,}")
    return info


def _pax_records(payload: bytes, position: int) -> dict[str, str]:
    """Records ``LENGTH KEYWORD=VALUE\\n`` of a PAX header.

    The character set comes first, if it is named, as ``tarfile`` has it.
    """
    records: dict[str, str] = {}
    start, length = 0, len(payload.rstrip(b"\0"))
    while start < length:
        found = _PAX_LENGTH.match(payload, start)
        end = start + int(found[1]) if found else 0
        equals = payload.find(b"=", found.end(), end) if found else -1
        if not found or equals <= found.end() or not equals < end <= len(payload):
            raise ShardError(f"garbled extension header at byte {position:,}")
        if payload[end - 1 : end] != b"\n" or len(records) >= _MAX_PAX_RECORDS:
            raise ShardError(f"garbled extension header at byte {position:,}")
        try:
            keyword = payload[found.end() : equals].decode("utf-8")
        except UnicodeDecodeError as error:
            raise ShardError(f"garbled extension header at byte {position:,}: {error}") from error
        records[keyword] = payload[equals + 1 : end - 1].decode("utf-8", "surrogateescape")
        start = end
    if charset := records.get("hdrcharset"):
        return {"hdrcharset": charset} | records
    return records


def _check_global(records: dict[str, str], position: int) -> None:
    _refuse_other_content(records, "global header", position)
    if set(records) & {"size", "path", "linkpath"}:
        raise ShardError(f"global header at byte {position:,} overrides names or sizes")


def _refuse_other_content(records: dict[str, str], whose: str, position: int) -> None:
    if found := [keyword for keyword in records if keyword.startswith(_PAX_OTHER_CONTENT)]:
        raise ShardError(f"{whose} at byte {position:,} is {_SPARSE} ({found[0]})")


def _apply_pax(info: tarfile.TarInfo, records: dict[str, str], position: int) -> None:
    """Let the records of a PAX header override the fields of a header."""
    name = records.get("GNU.sparse.name") or records.get("path") or info.name
    _refuse_other_content(records, f"member {name[:MAX_NAME]!r}", position)
    for keyword, value in records.items():
        if attribute := _PAX_TEXTS.get(keyword):
            text = value.rstrip("/") if keyword == "path" else value
            if "\0" in text or (keyword in ("path", "linkpath") and not text):
                raise ShardError(f"garbled extension header at byte {position:,}: {keyword}")
            setattr(info, attribute, text)
        elif pattern := _PAX_NUMBERS.get(keyword):
            if not pattern.fullmatch(value):
                raise ShardError(
                    f"garbled extension header at byte {position:,}: its {keyword} is {value!r}"
                )
            setattr(info, keyword, float(value) if keyword == "mtime" else int(value))
    info.pax_headers = records


def _long_name(payload: bytes, position: int) -> str:
    """The content of a long-name header of GNU tar."""
    name, _, rest = payload.partition(b"\0")
    if not name or rest.strip(b"\0"):
        raise ShardError(f"garbled extension header at byte {position:,}")
    return name.decode("utf-8", "surrogateescape")


def _dialect(member: TarMember) -> Literal[1, 2]:
    """The tar dialect to write a replaced member in: the one it was written in."""
    if member.envelope[257:265] == b"ustar  \0":
        return tarfile.GNU_FORMAT
    return tarfile.PAX_FORMAT


def _padded(size: int) -> int:
    return size + -size % BLOCK
