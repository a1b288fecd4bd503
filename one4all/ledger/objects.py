"""Records of objects that are worked on in groups: a line for each, in Parquet files.

    _one4all/objects/<digest>.parquet     what became of some objects, in the order of their keys

A worker writes one *part* for each group that is done. A line says: this version of this object was
written as that version of that output. Nothing that happens later makes a line untrue, so parts
need no order among themselves: any number of them may stand, overlap and say the same twice, and
whoever merges parts writes the merged one first and then removes what is in it. Two programs that
merge at once only do it twice.

Parts are merged as they grow, those of like size together, so that there are always few, and a line
is written again a few times only. Reading them all takes a bounded memory: small parts are sorted
into temporary files, and then all are walked side by side.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

from one4all.corpus import ObjectVersion, OutputObject, printable
from one4all.corpus.loose import names_of_output
from one4all.errors import ConflictError, NotFoundError, ShardError
from one4all.extras import require
from one4all.ledger.records import BadImage, Manifest, UnitDistances
from one4all.ledger.walk import Walk
from one4all.storage import INTERNAL, ObjectInfo, Storage
from one4all.storage.ranges import RangeFile

if TYPE_CHECKING:
    import pyarrow as pa

_OBJECTS = f"{INTERNAL}objects/"
_SUFFIX = ".parquet"
_SMALL = 4 << 20  # bytes of a part that is read in one piece
_ROWS_IN_MEMORY = 200_000
_ROW_GROUP = 50_000
_BATCH = 8192
_READERS = 16
_LIKE = 4  # parts are merged with one that is at most so many times as large as they are together
_FEWEST = 8  # parts that it is worth while to merge


class ObjectRow(NamedTuple):
    """What became of one version of one object.

    Attributes:
        key, size, etag: The version that was read.
        output, output_size, output_etag, output_sha256: What was written; "" if nothing was.
        num_protected: Images in it that were protected: 0 or 1.
        bad: Why it could not be protected; "" if it could, or is no image.
        max_before_encoding, max_decoded, mean_psnr_db: See `UnitDistances`; of its group.
        run_id: Run that wrote it.
    """

    key: str
    size: int
    etag: str
    output: str
    output_size: int
    output_etag: str
    output_sha256: str
    num_protected: int
    bad: str
    max_before_encoding: int
    max_decoded: int
    mean_psnr_db: float
    run_id: str

    def is_of(self, source: ObjectInfo) -> bool:
        """Whether it is about this version of an object."""
        return self.size == source.size and _bare(self.etag) == _bare(source.etag)

    def describes(self, standing: Sequence[ObjectInfo]) -> bool:
        """Whether its output is what stands under that key, if anything; True if it has none."""
        return not self.output or any(
            info.size == self.output_size and _bare(info.etag) == _bare(self.output_etag)
            for info in standing
        )


@dataclass(frozen=True)
class Merge:
    """What a merge of parts did: their number, and the lines of the new one."""

    num_parts: int = 0
    num_rows: int = 0


class ObjectRecords:
    """The records of the objects of one destination."""

    def __init__(self, storage: Storage) -> None:
        require("pyarrow", "jobs")
        self._storage = storage

    def add(self, manifest: Manifest) -> None:
        """Record what became of a group."""
        self._publish(sorted(rows_of(manifest), key=itemgetter(0)))

    def rows(self) -> Iterator[ObjectRow]:
        """All lines, in the order of keys; several of one key come one after the other.

        Raises:
            NotFoundError: Another program has merged a part meanwhile; begin again.
        """
        return self._merged(list(self._storage.list(_OBJECTS)))

    def merge(self, standing: Callable[[], Iterator[ObjectInfo]]) -> Merge:
        """Merge parts of like size, if there are many; lines whose output is gone are left out.

        If another program merges at the same time, and is ahead, this is left to it.

        Args:
            standing: Lists what stands at the destination, in the order of keys.
        """
        parts = _to_merge(list(self._storage.list(_OBJECTS)))
        if not parts:
            return Merge()
        rows = _without_lost(self._merged(parts), standing())
        with tempfile.TemporaryFile(prefix="one4all-objects-") as merged:
            digest = hashlib.sha256()
            try:
                num_rows = write_rows(rows, merged)
            except NotFoundError:
                return Merge()
            merged.seek(0)
            while block := merged.read(1 << 20):
                digest.update(block)
            key = f"{_OBJECTS}{digest.hexdigest()[:32]}{_SUFFIX}"
            with self._storage.writer(key, guarded=False) as sink:
                merged.seek(0)
                while block := merged.read(1 << 20):
                    sink.write(block)
                sink.commit()
        with ThreadPoolExecutor(_READERS, "parts") as pool:
            list(pool.map(self._storage.delete, (p.key for p in parts if p.key != key)))
        return Merge(len(parts), num_rows)

    def _publish(self, rows: list[ObjectRow]) -> None:
        if not rows:
            return
        part = io.BytesIO()
        write_rows(iter(rows), part)
        digest = hashlib.sha256(part.getvalue()).hexdigest()[:32]
        with suppress(ConflictError):  # the same lines are there already
            self._storage.create(f"{_OBJECTS}{digest}{_SUFFIX}", part.getvalue())

    def _merged(self, parts: list[ObjectInfo]) -> Iterator[ObjectRow]:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="one4all-parts-")))
            small = [part for part in parts if part.size < _SMALL]
            streams = [self._stream(part) for part in parts if part.size >= _SMALL]
            streams += [_rows_of_file(path) for path in self._sorted(small, folder)]
            yield from heapq.merge(*streams, key=itemgetter(0))

    def _sorted(self, parts: list[ObjectInfo], folder: Path) -> list[Path]:
        """Files of the lines of small parts; the lines of each are in the order of keys."""
        paths: list[Path] = []
        rows: list[ObjectRow] = []

        def spill() -> None:
            rows.sort(key=itemgetter(0))
            paths.append(folder / str(len(paths)))
            with paths[-1].open("wb") as file:
                write_rows(iter(rows), file)
            rows.clear()

        with ThreadPoolExecutor(_READERS, "parts") as pool:
            rest = iter(parts)
            while window := list(islice(rest, 4 * _READERS)):
                for data in pool.map(self._storage.read_bytes, (part.key for part in window)):
                    rows += _rows_of_file(io.BytesIO(data))
                    if len(rows) >= _ROWS_IN_MEMORY:
                        spill()
        if rows:
            spill()
        return paths

    def _stream(self, part: ObjectInfo) -> Iterator[ObjectRow]:
        return _rows_of_file(RangeFile(self._storage, part))


def rows_of(manifest: Manifest) -> Iterator[ObjectRow]:
    """A line for each object of a group."""
    outputs = {output.key: output for output in manifest.outputs}
    reasons = {bad.key: bad.reason for bad in manifest.bad_images}
    distances = manifest.distances
    for part in manifest.source:
        found = (outputs[name] for name in names_of_output(part.key) if name in outputs)
        output = next(found, None) or OutputObject("", 0, "", "", 0)
        yield ObjectRow(
            part.key,
            part.size,
            part.etag,
            output.key,
            output.size,
            output.etag,
            output.sha256,
            output.num_protected or 0,
            reasons.get(printable(part.key), ""),
            distances.max_before_encoding,
            distances.max_decoded,
            distances.mean_psnr_db,
            manifest.run_id,
        )


def manifest_of(rows: list[ObjectRow]) -> Manifest:
    """The manifest that says what some lines say."""
    written = [row for row in rows if row.output]
    protected = [row for row in rows if row.num_protected]
    bad = [row for row in rows if row.bad]
    distances = UnitDistances(
        max_before_encoding=max((row.max_before_encoding for row in protected), default=0),
        max_decoded=max((row.max_decoded for row in protected), default=0),
        mean_psnr_db=sum(row.mean_psnr_db for row in protected) / max(len(protected), 1),
    )
    return Manifest(
        name=rows[0].key,
        container="images",
        source=tuple(ObjectVersion(row.key, row.size, row.etag) for row in rows),
        outputs=tuple(
            OutputObject(
                row.output, row.output_size, row.output_etag, row.output_sha256, row.num_protected
            )
            for row in written
        ),
        num_samples=len(written) + sum(not row.output for row in bad),
        num_images=len(protected) + len(bad),
        num_protected=len(protected),
        num_members=len(written),
        bad_images=tuple(
            BadImage(
                key=printable(row.key),
                member=printable(row.key),
                reason=row.bad,
                action="passed through" if row.output else "dropped",
            )
            for row in bad
        ),
        distances=distances,
        run_id=rows[0].run_id,
    )


def _to_merge(parts: list[ObjectInfo]) -> list[ObjectInfo]:
    """Parts to merge: the smallest, and with them each that is not much larger than they are."""
    chosen: list[ObjectInfo] = []
    total = 0
    for part in sorted(parts, key=lambda info: (info.size, info.key)):
        if part.size >= _SMALL and part.size > _LIKE * total:
            break
        chosen.append(part)
        total += part.size
    return chosen if len(chosen) >= _FEWEST else []


def _without_lost(rows: Iterable[ObjectRow], standing: Iterator[ObjectInfo]) -> Iterator[ObjectRow]:
    """Lines of which the output stands, or that have none, each once."""
    outputs = Walk((info.key, info.key, info) for info in standing)
    for key, lines in groupby(rows, key=itemgetter(0)):
        outputs.forget_passed(key)
        distinct = dict.fromkeys(lines)
        found = {name: outputs.take(name, name) for name in {row.output for row in distinct}}
        yield from (row for row in distinct if row.describes(found[row.output]))


_TEXTS = ("key", "output")  # may hold bytes that are no UTF-8


def _schema() -> pa.Schema:
    import pyarrow as pa

    types = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    fields = get_type_hints(ObjectRow)
    return pa.schema(
        [(name, pa.binary() if name in _TEXTS else types[kind]) for name, kind in fields.items()]
    )


def write_rows(rows: Iterator[ObjectRow], sink: Any) -> int:
    """Write lines, in the order of keys, to a Parquet file; returns how many."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    schema, count = _schema(), 0
    with parquet.ParquetWriter(sink, schema, compression="zstd") as writer:
        while chunk := list(islice(rows, _ROW_GROUP)):
            columns = [list(column) for column in zip(*chunk, strict=True)]
            for name in _TEXTS:
                place = ObjectRow._fields.index(name)
                # In this encoding bytes are in the order of the characters, strange ones as well.
                columns[place] = [key.encode("utf-8", "surrogatepass") for key in columns[place]]
            arrays = [pa.array(c, type=f.type) for c, f in zip(columns, schema, strict=True)]
            writer.write_table(pa.table(arrays, schema=schema))
            count += len(chunk)
    return count


def _rows_of_file(source: Any) -> Iterator[ObjectRow]:
    """Lines of a Parquet file, in its order."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(source) as file:
            for batch in file.iter_batches(_BATCH):
                columns = [column.to_pylist() for column in batch.select(ObjectRow._fields)]
                for name in _TEXTS:
                    place = ObjectRow._fields.index(name)
                    columns[place] = [k.decode("utf-8", "surrogatepass") for k in columns[place]]
                yield from map(ObjectRow._make, zip(*columns, strict=True))
    except (pa.ArrowInvalid, pa.ArrowKeyError, KeyError, UnicodeDecodeError) as error:
        raise ShardError(f"the records below {_OBJECTS} cannot be read: {error}") from error


def _bare(etag: str) -> str:
    """An ETag without its quotes, about which Ceph's listings and answers do not agree."""
    return etag.strip('"')
