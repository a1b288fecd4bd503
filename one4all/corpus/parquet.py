"""Parquet files: tables of which some columns hold images.

A file is read row group by row group, in batches of rows, and written likewise. Each row is a
sample: one member stands for all cells that hold no bytes, and one for each value of bytes. All
that pyarrow can say about the layout of a file travels ahead of the rows, in a member that is no
file, because the copy is opened before the source is read.

What cannot be given back as it was is refused before a byte is written: the schema that would be
written is compared with that of the source.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, pairwise
from typing import Any, Self

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
from one4all.errors import One4AllError, ShardError
from one4all.extras import require
from one4all.image_kinds import has_image_name, image_kind
from one4all.storage import ObjectInfo, Storage, Writer
from one4all.storage.ranges import RangeFile
from one4all.wrapped_images import why_wrapped

SUFFIX = ".parquet"
_BATCH_BYTES = 16 << 20  # of a table, uncompressed, as its file states it
_MAX_BATCH_ROWS = 1024
_MAX_ROW_VALUES = 16_384  # each takes about 1 KB beside its bytes
_MIN_IMAGE = 65  # bytes; a shorter value that begins as an image does is a digest
_ARROW_SCHEMA = b"ARROW:schema"
_HUGGING_FACE = b"huggingface"
# What a schema may say or not: that a number is one, and in which of two words a type is said.
_SAID_TWICE = re.compile(
    r" \(Int\(bitWidth=(?:32|64), isSigned=true\)\)"
    r"|, is_from_converted_type=\w+, force_set_converted_type=\w+"
)
_PATH = ":"  # between a column and the base name of the path that stands beside the bytes


class ParquetContainer(FileContainer):
    """A corpus of Parquet files: every ``.parquet`` object is a unit."""

    name = "parquet"
    unit_name = "Parquet file"
    noun = "file"
    suffix = SUFFIX

    def renamed(self, name: str, converted: str) -> str:
        """See the base class: a column keeps its name, and a path gets the other extension."""
        column, mark, base = name.rpartition("/")[2].partition(_PATH)
        if not mark:
            return name
        extension = converted.rpartition(".")[2]
        row = name.removesuffix(column + mark + base)
        return f"{row}{column}{mark}{base.rpartition('.')[0] or base}.{extension}"

    def read(
        self, store: Opener, unit: Unit, options: ReadOptions = DEFAULT_READ
    ) -> Generator[Sample]:
        """See the base class."""
        require("pyarrow", "parquet")
        (part,) = unit.objects
        source = _Source(store, ObjectInfo(part.key, part.size, part.etag))
        if not part.etag and len(store.read_range(part.key, max(0, part.size - 1), 2)) != 1:
            raise ShardError(f"{part.key} has not the {part.size:,} bytes that were listed")
        with _refusing(source):
            table = _Table(source, options)
        yield Sample(table.layout.name, (table.layout,))
        # A number of the source is also that of the copy, which lacks the rows that were dropped.
        numbers = (str(number) for number in count() if str(number) not in options.dropped)
        for group in range(len(table.layout.group_rows)):
            batches = table.batches(group)
            while True:
                with _refusing(source):
                    batch = next(batches, None)
                    if batch is None:
                        break
                    samples = batch.samples(numbers)
                yield from samples

    def write(self, destination: Storage, unit: Unit) -> ParquetUnitWriter:
        """See the base class."""
        require("pyarrow", "parquet")
        (part,) = unit.objects
        return ParquetUnitWriter(destination.writer(part.key), part.key)


# What a column is made of, as far as bytes are in it.


@dataclass(frozen=True)
class _Bytes:
    """A place in the schema where bytes stand that can be replaced.

    Attributes:
        number: Place among all of them.
        label: Name of its column, of fields inside of that, and no other's name.
        is_image: Whether the file says that all values are images, or the user does.
        has_path: Whether a path stands beside the bytes, as in Hugging Face's Image.
    """

    number: int
    label: str
    is_image: bool
    has_path: bool


@dataclass(frozen=True)
class _Path:
    """The path beside such a place."""

    number: int


@dataclass(frozen=True)
class _Struct:
    fields: tuple[_Shape, ...]


@dataclass(frozen=True)
class _List:
    values: _Shape


@dataclass(frozen=True)
class _Opaque:
    """Bytes inside of something that cannot be taken apart and put together again."""

    label: str


_Shape = _Bytes | _Path | _Struct | _List | _Opaque | None  # None: nothing to be seen to
_Spot = tuple[int, str] | None  # row in a batch, and places in lists; None: below a null


class _Columns:
    """Finds out of a schema where bytes and images are.

    Attributes:
        shapes: One for each column.
        places: Every place of bytes.
    """

    def __init__(self, schema: Any, options: ReadOptions) -> None:
        self.places: list[_Bytes] = []
        self._labels: set[str] = set()
        names = list(schema.names)
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ShardError(
                f"two columns have the name {twice[0]!r}; give them names of their own"
            )
        for name in options.image_columns:
            if name not in names:
                raise ShardError(f"no column {name!r}; its columns are {', '.join(names)}")
        features = _features(schema.metadata or {})
        self.shapes = []
        for column in schema:
            feature = features.get(column.name)
            if column.name in options.image_columns:
                feature = {"_type": "Image"}
            before = len(self.places)
            shape = self._shape(column.type, _escaped(column.name), feature)
            self.shapes.append(shape)
            if _is_image(feature) and len(self.places) == before:
                raise ShardError(_no_bytes(column.name, column.type))

    def _shape(self, type: Any, label: str, feature: Any) -> _Shape:
        import pyarrow.types as types

        if types.is_binary(type) or types.is_large_binary(type):
            return self._place(label, _is_image(feature), has_path=False)
        if types.is_struct(type):
            return self._struct(type, label, feature)
        if types.is_list(type) or types.is_large_list(type) or types.is_fixed_size_list(type):
            values = self._shape(type.value_type, label, _feature_of_values(feature))
            return _List(values) if values else None
        return _Opaque(label) if _may_hold_bytes(type) else None

    def _struct(self, type: Any, label: str, feature: Any) -> _Shape:
        import pyarrow.types as types

        kinds = {part.name: part.type for part in type}
        path = kinds.get("path")
        if (
            "bytes" in kinds
            and (types.is_binary(kinds["bytes"]) or types.is_large_binary(kinds["bytes"]))
            and path is not None
            and (types.is_string(path) or types.is_large_string(path))
        ):
            place = self._place(label, _is_image(feature), has_path=True)
            named: dict[str, _Shape] = {"bytes": place, "path": _Path(place.number)}
        else:
            named = {}
        shapes = tuple(
            named.get(part.name)
            or self._shape(
                part.type, f"{label}.{_escaped(part.name)}", _feature_of_field(feature, part.name)
            )
            for part in type
        )
        return _Struct(shapes) if any(shapes) else None

    def _place(self, label: str, is_image: bool, *, has_path: bool) -> _Bytes:
        while label in self._labels:
            label += "'"
        self._labels.add(label)
        self.places.append(_Bytes(len(self.places), label, is_image, has_path))
        return self.places[-1]


def _features(metadata: Mapping[bytes, bytes]) -> dict[str, Any]:
    """What the `datasets` library wrote about each column; nothing, if that cannot be read."""
    try:
        features = json.loads(metadata[_HUGGING_FACE])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def _is_image(feature: Any) -> bool:
    return isinstance(feature, dict) and feature.get("_type") == "Image"


def _feature_of_values(feature: Any) -> Any:
    """Of a list; a sequence of several columns is written as several lists."""
    if isinstance(feature, list) and len(feature) == 1:
        return feature[0]
    return feature.get("feature", feature) if isinstance(feature, dict) else None


def _feature_of_field(feature: Any, name: str) -> Any:
    if isinstance(feature, dict) and isinstance(inner := feature.get("feature"), dict):
        feature = inner
    if _is_image(feature):
        return feature
    return feature.get(name) if isinstance(feature, dict) else None


def _escaped(name: str) -> str:
    """A name without what stands between the parts of a member's name."""
    return name.replace("%", "%25").replace("/", "%2F").replace(_PATH, "%3A")


def _may_hold_bytes(type: Any) -> bool:
    """Whether bytes are in a type that is no plain place of bytes, struct or list."""
    import pyarrow as pa
    import pyarrow.types as types

    if isinstance(type, pa.BaseExtensionType):
        return _may_hold_bytes(type.storage_type)
    if types.is_dictionary(type):
        return _may_hold_bytes(type.value_type)
    if types.is_fixed_size_binary(type):
        return bool(type.byte_width >= _MIN_IMAGE)
    if types.is_binary(type) or types.is_large_binary(type) or types.is_binary_view(type):
        return True
    return any(_may_hold_bytes(type.field(place).type) for place in range(type.num_fields))


def _no_bytes(name: str, type: Any) -> str:
    """The sentence about a column that should hold images."""
    import pyarrow.types as types

    if types.is_string(type) or types.is_large_string(type):
        return _not_embedded(name, "texts, such as paths or URLs,")
    return (
        f"column {name!r} should hold images and is of the type {type}, in which they cannot be "
        "replaced; write it as binary"
    )


def _not_embedded(name: str, what: str) -> str:
    return (
        f"column {name!r} holds {what} in place of images; embed them first, URLs by img2dataset, "
        "paths by the map of datasets with datasets.table.embed_table_storage"
    )


# Reading.


class _Source(RangeFile):
    """Remembers the error of a store, which pyarrow may wrap into one of its own.

    Attributes:
        is_blank: Whether zeros are read, and the store is not asked.
    """

    error: Exception | None = None
    is_blank = False

    def read(self, size: int | None = -1, /) -> bytes:
        if self.is_blank:
            left = max(0, self.size() - self.tell())
            return bytes(left if size is None or size < 0 else min(size, left))
        try:
            return super().read(size)
        except Exception as error:
            self.error = error
            raise


@contextmanager
def _refusing(file: _Source | _Sink) -> Iterator[None]:
    """Whatever pyarrow raises is a `ShardError`, unless the store under a file raised it."""
    try:
        yield
    except One4AllError:
        raise
    except Exception as error:  # pyarrow's errors have no root of their own
        if file.error:
            raise file.error from error
        sentence = " ".join(str(error).split())[:300]
        raise ShardError(
            f"damaged, encrypted or not a Parquet file that pyarrow can read and write: {sentence}"
        ) from error


class _Table:
    """A Parquet file being read.

    Attributes:
        layout: The member that comes ahead of the rows.
    """

    def __init__(self, source: _Source, options: ReadOptions) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        def opened(**options: Any) -> Any:
            file = pa.PythonFile(source, "r")
            return pq.ParquetFile(
                file, pre_buffer=False, page_checksum_verification=True, **options
            )

        self._file = opened()
        leaves = (self._file.schema.column(n) for n in range(len(self._file.schema.names)))
        self._int96 = sorted({c.path.split(".")[0] for c in leaves if c.physical_type == "INT96"})
        self._coarse = opened(coerce_int96_timestamp_unit="us") if self._int96 else None
        self._limit = options.max_sample_bytes
        self._refuse_broken_columns(source)
        self.layout = LayoutMember.of(self._file, options)
        columns = _Columns(self.layout.schema, options)
        self._shapes = tuple(columns.shapes)
        self._has_bytes = any(columns.shapes)
        self._images = {place.number for place in columns.places if place.is_image}

    def batches(self, group: int) -> Iterator[_Batch]:
        """Rows of a row group."""
        about = self._file.metadata.row_group(group)
        size = about.total_byte_size
        self._refuse_size(group, size)
        self._refuse_far_times(group)
        # The second bound: a dictionary may hold one large value, and every row refer to it.
        fitting = _BATCH_BYTES * max(1, about.num_rows) // max(1, size)
        rows = min(fitting, DEFAULT_MAX_SAMPLE_BYTES // max(1, size), _MAX_BATCH_ROWS)
        num_rows = num_bytes = 0
        for found in self._file.iter_batches(max(1, rows), row_groups=[group], use_threads=False):
            if not self._has_bytes and not num_rows:
                _refuse_links(found)
            num_rows, num_bytes = num_rows + found.num_rows, num_bytes + found.nbytes
            # In memory it may be twice that: texts that a file holds once are in every row there.
            self._refuse_size(group, num_bytes // 2)
            batch = _Batch(found, group, self._shapes)
            # For good: what a later batch holds in such a column is an image, whatever it looks.
            self._images |= batch.columns_of_images(self._images)
            batch.images = frozenset(self._images)
            yield batch
        if num_rows != about.num_rows:
            raise ShardError(f"row group {group} has {num_rows} rows, not {about.num_rows}")

    def _refuse_size(self, group: int, size: int) -> None:
        if size > self._limit:
            raise ShardError(
                f"row group {group} has {size:,} bytes, {self._limit:,} are allowed; write the "
                "file with smaller row groups, or raise max_sample_bytes"
            )

    def _refuse_broken_columns(self, source: _Source) -> None:
        """What the file says about columns that are damaged, or encrypted, one by one.

        pyarrow ends the process when it is asked for what is wrong there, and raises an error when
        it begins to read such a column. So it begins, and finds no page among the zeros.
        """
        if not self._file.num_row_groups:
            return
        schema = self._file.schema
        source.is_blank = True
        for path in sorted({schema.column(place).path for place in range(len(schema.names))}):
            try:
                next(self._file.iter_batches(1, [0], columns=[path], use_threads=False), None)
            except Exception as error:
                if "page header" not in str(error):
                    raise
        source.is_blank = False

    def _refuse_far_times(self, group: int) -> None:
        """INT96 holds every day, and pyarrow reads those after 2262 as others, without an error."""
        if not self._coarse:
            return
        fine, coarse = (
            file.read_row_group(group, columns=self._int96, use_threads=False)
            for file in (self._file, self._coarse)
        )
        if not fine.cast(coarse.schema, safe=False).equals(coarse):
            raise ShardError(
                f"row group {group} holds times as INT96 that are not between 1677 and 2262, or "
                "have nanoseconds before 1970; write them as TIMESTAMP_MICROS"
            )


def _refuse_links(batch: Any) -> None:
    """A table without bytes may name its images, and then none of them would be protected."""
    import pyarrow.types as types

    for column, values in zip(batch.schema, batch.columns, strict=True):
        if types.is_string(column.type) or types.is_large_string(column.type):
            texts = [text for text in values.to_pylist() if text]
            if texts and all(has_image_name(re.split(r"[?#]", text)[0]) for text in texts):
                raise ShardError(_not_embedded(column.name, f"names such as {texts[0][:80]!r}"))


class _Batch:
    """Some rows of a row group.

    Attributes:
        columns: Columns as they were read.
        group: Number of the row group.
        shapes: Where bytes are in each column.
        images: Numbers of the places of which all values are images.
    """

    def __init__(self, batch: Any, group: int, shapes: Sequence[_Shape]) -> None:
        self.names, self.columns = batch.schema.names, batch.columns
        self.group, self.shapes = group, shapes
        self.num_rows = batch.num_rows
        self.images: frozenset[int] = frozenset()
        self._bytes: dict[int, tuple[_Bytes, Any, list[_Spot]]] = {}
        self._paths: dict[int, Any] = {}
        for column, shape in zip(self.columns, shapes, strict=True):
            self._look(column, shape, [(row, "") for row in range(batch.num_rows)])

    def _look(self, array: Any, shape: _Shape, spots: list[_Spot]) -> None:
        """Find the bytes of a column, and the spot of each."""
        match shape:
            case _Bytes():
                self._bytes[shape.number] = (shape, array, spots)
            case _Path():
                self._paths[shape.number] = array
            case _Struct():
                valid = array.is_valid().to_pylist()
                inside = [spot if ok else None for spot, ok in zip(spots, valid, strict=True)]
                for place, part in enumerate(shape.fields):
                    if part:
                        self._look(array.field(place), part, inside)
            case _List():
                array = _at_start(array)
                inside = [None] * len(array.values)
                for spot, (start, end), value in zip(spots, _ranges(array), array, strict=True):
                    if spot and value.is_valid:
                        row, indices = spot
                        for index in range(end - start):
                            inside[start + index] = (row, f"{indices}.{index}")
                self._look(array.values, shape.values, inside)
            case _Opaque():
                if any(_is_image_by_content(value) for value in _hidden_values(array)):
                    raise ShardError(
                        f"column {shape.label!r} holds images and is of the type {array.type}, in "
                        "which they cannot be replaced; write it as binary"
                    )

    def columns_of_images(self, known: Collection[int]) -> set[int]:
        """Further places at which at least half of the values are images by their content."""
        found = set()
        for place, array, _ in self._bytes.values():
            if place.number not in known:
                looks = [_is_image_by_content(value.as_py()) for value in array if value.is_valid]
                if looks and 2 * sum(looks) >= len(looks):
                    found.add(place.number)
        return found

    def samples(self, numbers: Iterator[str]) -> list[Sample]:
        """Every row with the next number; values of bytes are copied out of it later."""
        keys = [next(numbers) for _ in range(self.num_rows)]
        members: list[list[Member]] = [
            [RowMember(name=key, payload=b"", batch=self, row=row)] for row, key in enumerate(keys)
        ]
        for place, array, spots in self._bytes.values():
            is_image = place.number in self.images
            paths = self._paths.get(place.number)
            for index, spot in enumerate(spots):
                if spot is None:
                    continue
                row, indices = spot
                path = paths[index].as_py() if paths is not None else None
                value = array[index]
                if not value.is_valid:
                    if path and is_image:
                        raise ShardError(_not_embedded(place.label, f"the path {path[:80]!r}"))
                    continue
                if len(members[row]) > _MAX_ROW_VALUES:
                    raise ShardError(
                        f"row {keys[row]} holds over {_MAX_ROW_VALUES:,} values of bytes; write "
                        "fewer into one row"
                    )
                base = re.split(r"[/\\]", path)[-1] if path else ""
                members[row].append(
                    BytesMember(
                        name=f"{keys[row]}/{place.label}{indices}" + (base and _PATH + base),
                        payload=value.as_py(),
                        is_declared_image=is_image,
                        path=path,
                        address=(place.number, index),
                    )
                )
        return [Sample(key, tuple(row)) for key, row in zip(keys, members, strict=True)]

    @cached_property
    def others(self) -> list[Any]:
        """Columns without their bytes, of which nothing is left but which are null."""
        return [
            _rebuilt(column, shape, lambda _, array: array.is_valid())
            for column, shape in zip(self.columns, self.shapes, strict=True)
        ]

    def replaced(
        self,
        payloads: Mapping[tuple[int, int], bytes],
        paths: Mapping[tuple[int, int], str],
        schema: Any,
        kept: Sequence[int],
    ) -> Any:
        """The rows that are kept, with other bytes and paths at some addresses."""
        import pyarrow as pa

        changed = {number for number, _ in payloads}

        def change(shape: _Bytes | _Path, array: Any) -> Any:
            news = payloads if isinstance(shape, _Bytes) else paths
            if shape.number not in changed or not news:
                return array
            values = array.to_pylist()
            for (number, index), new in news.items():
                if number == shape.number:
                    values[index] = new
            again = pa.array(values, array.type)
            if isinstance(again, pa.ChunkedArray):
                raise ShardError(
                    f"{self.num_rows} rows of row group {self.group} would hold over 2 GB of bytes "
                    "once they are protected; use output_format match"
                )
            return again

        columns = [
            _rebuilt(column, shape, change)
            for column, shape in zip(self.columns, self.shapes, strict=True)
        ]
        batch = pa.RecordBatch.from_arrays(columns, schema=schema)
        return batch if len(kept) == self.num_rows else batch.take(pa.array(kept, pa.int64()))


def _is_image_by_content(value: bytes) -> bool:
    return len(value) >= _MIN_IMAGE and bool(image_kind(value) or why_wrapped(value))


def _hidden_values(array: Any) -> Iterator[bytes]:
    """All bytes in an array of any type."""
    import pyarrow as pa
    import pyarrow.types as types

    type = array.type
    if isinstance(type, pa.BaseExtensionType):
        yield from _hidden_values(array.storage)
    elif types.is_dictionary(type):
        yield from _hidden_values(array.dictionary)
    elif types.is_map(type):
        yield from _hidden_values(array.keys)
        yield from _hidden_values(array.items)
    elif types.is_struct(type):
        for place in range(type.num_fields):
            yield from _hidden_values(array.field(place))
    elif type.num_fields == 1:
        yield from _hidden_values(array.values)
    elif (
        types.is_binary(type)
        or types.is_large_binary(type)
        or types.is_binary_view(type)
        or types.is_fixed_size_binary(type)
    ):
        yield from (value.as_py() for value in array if value.is_valid)
    elif type.num_fields:
        raise ShardError(f"cannot tell whether images are in a column of the type {type}")


def _at_start(array: Any) -> Any:
    """The same values in buffers that begin with them."""
    import pyarrow as pa

    return array.take(pa.array(range(len(array)), pa.int64())) if array.offset else array


def _ranges(array: Any) -> list[tuple[int, int]]:
    """Where the values of each list begin and end."""
    import pyarrow.types as types

    if types.is_fixed_size_list(array.type):
        size = array.type.list_size
        return [(row * size, (row + 1) * size) for row in range(len(array))]
    offsets = array.offsets.to_pylist()
    return list(pairwise(offsets))


def _rebuilt(array: Any, shape: _Shape, change: Callable[[_Bytes | _Path, Any], Any]) -> Any:
    """A column with what `change` makes of its bytes and paths; all else is shared with it."""
    import pyarrow as pa
    import pyarrow.types as types

    if shape is None or isinstance(shape, _Opaque):
        return array
    if isinstance(shape, _Bytes | _Path):
        return change(shape, array)
    array = _at_start(array)
    type = array.type
    if isinstance(shape, _Struct):
        children = [
            _rebuilt(array.field(place), part, change) for place, part in enumerate(shape.fields)
        ]
        parts = [part.with_type(new.type) for part, new in zip(type, children, strict=True)]
        again, num_buffers = pa.struct(parts), 1
    else:
        children = [_rebuilt(array.values, shape.values, change)]
        values = type.value_field.with_type(children[0].type)
        num_buffers = 2
        if types.is_fixed_size_list(type):
            again, num_buffers = pa.list_(values, type.list_size), 1
        elif types.is_large_list(type):
            again = pa.large_list(values)
        else:
            again = pa.list_(values)
    own = array.buffers()[:num_buffers]
    return pa.Array.from_buffers(again, len(array), own, array.null_count, 0, children)


# Members.


@dataclass(frozen=True, kw_only=True)
class LayoutMember(Member):
    """How a file is laid out: no file, and the first member.

    Attributes:
        schema: Columns, with the metadata of the file.
        description: What must be the same in a copy, by its name for people.
        group_rows: Rows of each row group.
        options: Options of pyarrow's `ParquetWriter` that write such a file.
        max_bytes: Bytes of images that a row group may hold once it is protected.
        dropped: Rows of the source that are not there.
    """

    schema: Any = field(repr=False)
    description: Mapping[str, Any] = field(repr=False)
    group_rows: tuple[int, ...]
    options: Mapping[str, Any] = field(repr=False)
    max_bytes: int
    dropped: Collection[str] = field(repr=False)

    @classmethod
    def of(cls, file: Any, options: ReadOptions) -> LayoutMember:
        """The layout of an open file.

        Raises:
            ShardError: pyarrow cannot write such a file.
        """
        about = file.metadata
        metadata = dict(about.metadata or {})
        stores_schema = metadata.pop(_ARROW_SCHEMA, None) is not None
        # Only the schema has the keys in the order of the file.
        order = file.schema_arrow.metadata or {}
        metadata = {key: metadata[key] for key in order if key in metadata} | metadata
        schema = file.schema_arrow.with_metadata(metadata or None)
        groups = [about.row_group(place) for place in range(about.num_row_groups)]
        first = groups[0] if groups else None
        columns = [first.column(place) for place in range(first.num_columns)] if first else []
        codecs = {part.path_in_schema: _codec(part.compression) for part in columns}
        sorting = first.sorting_columns if first else ()
        physical = [about.schema.column(place) for place in range(len(about.schema.names))]
        decimals = [c.physical_type for c in physical if c.logical_type.type == "DECIMAL"]
        writing = {
            "version": "1.0" if about.format_version == "1.0" else "2.6",
            "compression": codecs or "snappy",
            "use_dictionary": [
                part.path_in_schema
                for part in columns
                if {"PLAIN_DICTIONARY", "RLE_DICTIONARY"} & set(part.encodings)
            ],
            "write_statistics": [part.path_in_schema for part in columns if part.is_stats_set],
            "write_page_index": any(part.has_column_index for part in columns),
            "use_deprecated_int96_timestamps": any(c.physical_type == "INT96" for c in physical),
            "use_compliant_nested_type": not any(".list.item" in c.path for c in physical),
            "store_decimal_as_integer": any(kind.startswith("INT") for kind in decimals),
            "store_schema": stores_schema,
            "sorting_columns": list(sorting) or None,
        }
        text = _schema_text(file.schema)
        _refuse_other_schema(text, schema, writing)
        description = {
            "schema": text,
            "metadata": metadata,
            "Arrow schema": stores_schema and schema.remove_metadata().serialize().to_pybytes(),
            "compression": codecs,
            "format version": about.format_version,
            "sort order": [str(part) for part in sorting],
        }
        return cls(
            name="layout",
            payload=b"",
            is_file=False,
            schema=schema,
            description=description,
            group_rows=tuple(group.num_rows for group in groups),
            options=writing,
            max_bytes=max(options.max_sample_bytes, DEFAULT_MAX_SAMPLE_BYTES),
            dropped=options.dropped,
        )

    def changes_beside(self, written: Member, *, replaced: bool) -> Iterator[str]:
        """See the base class."""
        if not isinstance(written, LayoutMember):
            yield "its layout is missing"
            return
        expected, start = [], 0
        dropped = sorted(int(key) for key in written.dropped if key.isdecimal())
        for rows in self.group_rows:
            gone = sum(start <= number < start + rows for number in dropped)
            expected.append(rows - gone)
            start += rows
        if [rows for rows in expected if rows] != [rows for rows in written.group_rows if rows]:
            yield "its row groups are not the source's"
        for what, value in self.description.items():
            # A file without row groups says nothing about these.
            unsaid = what in ("compression", "sort order") and not any(expected)
            if value != written.description[what] and not unsaid:
                yield f"its {what} is not the source's"


def _codec(name: str) -> str:
    return "NONE" if name == "UNCOMPRESSED" else name


def _schema_text(schema: Any) -> str:
    """A schema of Parquet, without the name of its root and what need not be said."""
    _, _, columns = str(schema).partition("{")
    return _SAID_TWICE.sub("", columns)


def _refuse_other_schema(text: str, schema: Any, options: Mapping[str, Any]) -> None:
    """Raises: ShardError if a file without rows, written with these options, has another schema."""
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, schema, **options):
        pass
    again = _schema_text(pq.ParquetFile(buffer).schema).splitlines()
    for before, after in zip(text.splitlines(), again, strict=False):
        if before != after:
            raise ShardError(
                f"pyarrow would write another schema, {after.strip()!r} for {before.strip()!r}; "
                "write the file again by pyarrow first"
            )
    if len(text.splitlines()) != len(again):
        raise ShardError(
            "pyarrow would write another schema; write the file again by pyarrow first"
        )


@dataclass(frozen=True, kw_only=True)
class RowMember(Member):
    """All cells of a row but its bytes; without content of its own.

    Attributes:
        batch: Rows that it is one of.
        row: Its place among them.
    """

    batch: _Batch = field(repr=False)
    row: int

    def changes_beside(self, written: Member, *, replaced: bool) -> Iterator[str]:
        """See the base class: the columns of which the value is another one."""
        if not isinstance(written, RowMember):
            yield "its row is missing"
            return
        ours, theirs = self.batch, written.batch
        if ours.names != theirs.names:
            yield "its columns are not the source's"
            return
        for name, one, other in zip(ours.names, ours.others, theirs.others, strict=True):
            before, after = one.slice(self.row, 1), other.slice(written.row, 1)
            # No number equals itself if it is none, so that the texts of both decide.
            if not before.equals(after) and (
                before.type != after.type or repr(before.to_pylist()) != repr(after.to_pylist())
            ):
                yield f"its column {name!r} is not the source's"


@dataclass(frozen=True, kw_only=True)
class BytesMember(Member):
    """One value of bytes.

    Attributes:
        path: Path that stands beside it, if there is one.
        address: Number of its place in the schema, and its index in the values there.
    """

    path: str | None = None
    address: tuple[int, int]

    def changes_beside(self, written: Member, *, replaced: bool) -> Iterator[str]:
        """See the base class: the base name of a path is part of the name."""
        paths = [self.path, written.path if isinstance(written, BytesMember) else None]
        if replaced:
            paths = [path and re.sub(r"[^/\\]*$", "", path) for path in paths]
        if paths[0] != paths[1]:
            yield "its path is not the source's"


# Writing.


class _Sink(io.RawIOBase):
    """A writer as a file; once it is let go of, it takes nothing."""

    error: Exception | None = None  # of the store, which pyarrow may wrap into one of its own

    def __init__(self, sink: Writer) -> None:
        super().__init__()
        self._sink: Writer | None = sink
        self._position = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: Any, /) -> int:
        size = memoryview(data).nbytes
        if self._sink is not None:
            try:
                self._sink.write(bytes(data))
            except Exception as error:
                self.error = error
                raise
        self._position += size
        return size

    def let_go(self) -> None:
        self._sink = None


class ParquetUnitWriter(UnitWriter):
    """The copy of a Parquet file, written to a store; holds the images of one row group.

    Args:
        sink: Object being written.
        key: Key of that object.
    """

    def __init__(self, sink: Writer, key: str) -> None:
        self._sink, self._key = sink, key
        self._file = _Sink(sink)
        self._layout: LayoutMember | None = None
        self._writer: Any = None
        self._num_protected = 0
        self._group, self._rows = -1, list[Any]()  # its number, and batches that are finished
        self._num_bytes = 0  # of protected images in the row group
        self._batch: _Batch | None = None
        self._kept: list[int] = []
        self._payloads: dict[tuple[int, int], bytes] = {}
        self._paths: dict[tuple[int, int], str] = {}

    def __enter__(self) -> Self:
        self._sink.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._file.let_go()  # pyarrow ends a file when it forgets it
        self._writer = None
        self._sink.__exit__(*exception)

    def copy(self, member: Member) -> None:
        """See the base class."""
        import pyarrow.parquet as pq

        if isinstance(member, LayoutMember):
            self._layout = member
            with _refusing(self._file):
                self._writer = pq.ParquetWriter(self._file, member.schema, **member.options)
        elif isinstance(member, RowMember):
            if member.batch is not self._batch:
                self._finish_batch()
                if member.batch.group != self._group:
                    self._finish_group()
                self._batch, self._group = member.batch, member.batch.group
            self._kept.append(member.row)

    def replace(self, member: Member, *, name: str, payload: bytes) -> None:
        """See the base class."""
        assert isinstance(member, BytesMember)  # what `ParquetContainer.read` gave
        assert self._layout
        self._payloads[member.address] = payload
        if name != member.name and member.path:
            folder = re.sub(r"[^/\\]*$", "", member.path)
            self._paths[member.address] = folder + name.rpartition("/")[2].partition(_PATH)[2]
        self._num_protected += 1
        self._num_bytes += len(payload)
        if self._num_bytes > self._layout.max_bytes:
            raise ShardError(
                f"row group {self._group} would take over {self._layout.max_bytes:,} bytes once it "
                "is protected; write the file with smaller row groups, or raise max_sample_bytes"
            )

    def commit(self) -> tuple[OutputObject, ...]:
        """See the base class."""
        self._finish_batch()
        self._finish_group()
        with _refusing(self._file):
            self._writer.close()
        etag = self._sink.commit()
        sha256 = self._sink.sha256.hexdigest()
        size = self._sink.num_bytes
        return (OutputObject(self._key, size, etag, sha256, self._num_protected),)

    def _finish_batch(self) -> None:
        if self._batch is None:
            return
        assert self._layout
        with _refusing(self._file):
            self._rows.append(
                self._batch.replaced(self._payloads, self._paths, self._layout.schema, self._kept)
            )
        self._batch, self._kept, self._payloads, self._paths = None, [], {}, {}

    def _finish_group(self) -> None:
        import pyarrow as pa

        if self._rows:
            assert self._layout
            with _refusing(self._file):
                table = pa.Table.from_batches(self._rows, schema=self._layout.schema)
                self._writer.write_table(table, row_group_size=table.num_rows)
        self._rows, self._num_bytes = [], 0
