"""Parquet files: what is read out of them, and that all but the images is given back."""

import io
import json
import random
from dataclasses import replace
from datetime import datetime
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.builders import make_binding, make_image

from one4all.audit import audit_unit
from one4all.corpus import ReadOptions, find_container, list_units, read_samples, write_unit
from one4all.corpus.parquet import ParquetContainer
from one4all.errors import ShardError, SourceChangedError
from one4all.images import decode
from one4all.recompute import recompute_unit
from one4all.rewrite import BadImagePolicyError, RewriteConfig, rewrite_unit
from one4all.storage import INTERNAL, open_storage

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FEATURES = {"image": {"_type": "Image"}, "views": {"_type": "List", "feature": {"_type": "Image"}}}
NOISE = random.Random(0).randbytes(200)


def hugging_face(table, features=FEATURES):
    about = json.dumps({"info": {"features": features}})
    return table.replace_schema_metadata({"huggingface": about, "note": "ü"})


def make_table(num_rows=7):
    """A column of each kind, with nulls, and numbers that do not equal themselves."""
    rows = range(num_rows)
    one = [{"bytes": make_image(seed=n), "path": f"a/b.{n}.jpg"} if n != 3 else None for n in rows]
    views = [
        [{"bytes": make_image(seed=10 * n + k), "path": ("", None)[k]} for k in range(n % 3)]
        if n != 4
        else None
        for n in rows
    ]
    plain = [make_image("PNG", seed=50 + n) if n != 2 else None for n in rows]
    columns = {
        "image": pa.array(one, IMAGE),
        "views": pa.array(views, pa.list_(IMAGE)),
        "photo/png": pa.array(plain, pa.large_binary()),
        "label": pa.array(rows, pa.int16()),
        "score": pa.array([float("nan"), None] * num_rows, pa.float64())[:num_rows],
        "when": pa.array(rows, pa.timestamp("us", "UTC")),
        "kind": pa.array(["cat", "dog"] * num_rows)[:num_rows].dictionary_encode(),
        "vector": pa.array([NOISE] * num_rows, pa.binary()),
        "more": pa.array([[("k", n)] for n in rows], pa.map_(pa.string(), pa.int64())),
    }
    return hugging_face(pa.table(columns))


def to_bytes(table, **options):
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


@pytest.fixture
def corpus(tmp_path):
    return open_storage(str(tmp_path / "in"))


@pytest.fixture
def protect(corpus, protector, tmp_path):
    """Protects one file, audits it and gives (manifest, pyarrow file, problems)."""
    destination = open_storage(str(tmp_path / "out"))

    def run(data, **settings):
        corpus.write_bytes("x/a.parquet", data if isinstance(data, bytes) else to_bytes(data))
        (unit,) = list_units(corpus)
        config = RewriteConfig(**settings)
        manifest = rewrite_unit(unit, corpus, destination, protector, config)
        bind = partial(make_binding, corpus.uri, protector_sha256=protector.card.content_hash)
        binding = bind(**config.bound)
        audit = audit_unit(unit, manifest, corpus, destination, binding)
        again = recompute_unit(unit, manifest, corpus, destination, protector, binding)
        assert len(audit.images) == manifest.num_protected
        written = pq.ParquetFile(io.BytesIO(destination.read_bytes("x/a.parquet")))
        return manifest, written, [*audit.problems, *again]

    run.destination = destination
    return run


def others(table):
    return table.drop_columns(["image", "views", "photo/png"])


@pytest.mark.parametrize("output_format", ["match", "lossless"])
def test_all_but_the_images_is_given_back(protect, output_format):
    table = make_table()
    codecs = {"label": "gzip", "image.bytes": "none", "photo/png": "zstd"}
    data = to_bytes(
        table,
        row_group_size=3,
        compression=codecs,
        use_dictionary=["label"],
        write_statistics=["label"],
        write_page_index=True,
        sorting_columns=[pq.SortingColumn(3)],
    )
    manifest, written, problems = protect(data, output_format=output_format)
    assert problems == []
    assert (manifest.num_samples, manifest.num_protected) == (7, 6 + 5 + 6)
    source, again = pq.ParquetFile(io.BytesIO(data)), written.read()
    assert written.schema_arrow.remove_metadata() == source.schema_arrow.remove_metadata()
    assert list(written.metadata.metadata) == list(source.metadata.metadata)
    assert written.schema_arrow.metadata == source.schema_arrow.metadata
    for group in range(3):
        before, after = (file.metadata.row_group(group) for file in (source, written))
        assert (before.num_rows, before.sorting_columns) == (after.num_rows, after.sorting_columns)
        for place in range(before.num_columns):
            one, other = before.column(place), after.column(place)
            for name in ("compression", "has_dictionary_page", "is_stats_set", "has_column_index"):
                assert getattr(one, name) == getattr(other, name), (one.path_in_schema, name)
    assert repr(others(again).to_pylist()) == repr(others(table).to_pylist())
    extension = "png" if output_format == "lossless" else "jpg"
    paths = [row and row["path"] for row in again["image"].to_pylist()]
    assert paths == [f"a/b.{n}.{extension}" if n != 3 else None for n in range(7)]
    views = again["views"].to_pylist()
    assert [None if row is None else [v["path"] for v in row] for row in views] == [
        [], [""], ["", None], [], None, ["", None], []
    ]  # fmt: skip
    for before, after in zip(
        table["photo/png"].to_pylist(), again["photo/png"].to_pylist(), strict=True
    ):
        assert (before is None) == (after is None)
        assert (
            before is None
            or 0 < abs(decode(before).pixels.astype(int) - decode(after).pixels).max() <= 8
        )


def test_the_same_file_gives_the_same_bytes(protect):
    first, _, _ = protect(make_table(2))
    second, _, _ = protect(make_table(2))
    assert first.outputs[0].sha256 == second.outputs[0].sha256


def test_names_say_row_column_place_and_file(corpus):
    corpus.write_bytes("a.parquet", to_bytes(make_table(3)))
    corpus.write_bytes("._a.parquet", b"\0\5\x16\7\0\2\0\0" + bytes(60))
    assert find_container(corpus).name == "parquet"
    (unit,) = list_units(corpus)
    layout, *rows = read_samples(corpus, unit)
    assert [sample.key for sample in rows] == ["0", "1", "2"]
    assert [[member.name for member in row.members] for row in (layout, *rows[1:])] == [
        ["layout"],
        ["1", "1/image:b.1.jpg", "1/views.0", "1/photo%2Fpng", "1/vector"],
        ["2", "2/image:b.2.jpg", "2/views.0", "2/views.1", "2/vector"],
    ]
    declared = [member.is_declared_image for member in rows[1].members]
    assert declared == [False, True, True, True, False]
    # A value that two numbers of the source would fit is counted as if those in front were there.
    rows = list(read_samples(corpus, unit, ReadOptions(dropped={"0", "2"})))[1:]
    assert [sample.key for sample in rows] == ["1", "3", "4"]


@pytest.mark.parametrize(
    ("name", "converted", "expected"),
    [
        ("1/a:b.c.jpg", "1/a:b.c.png", "1/a:b.c.png"),
        ("1/a.0:b", "1/a.png", "1/a.0:b.png"),
        ("1/a:.jpg", "1/a:.png", "1/a:.jpg.png"),
        ("1/a.jpg", "1/a.png", "1/a.jpg"),
    ],
)
def test_only_a_path_takes_another_extension(name, converted, expected):
    assert ParquetContainer().renamed(name, converted) == expected


def test_policies_for_a_bad_image(protect):
    """Dropped is the row, as it is the sample of a tar; the numbers of the others stay."""
    table = make_table(6)
    values = table["image"].to_pylist()
    values[2] = {"bytes": b"no image", "path": None}  # in a column of images: a bad one
    values[5] = {"bytes": NOISE, "path": "x.jpg"}
    table = table.set_column(0, "image", pa.array(values, IMAGE))
    data = to_bytes(table, row_group_size=2)
    manifest, written, problems = protect(data)
    assert problems == []
    assert [(bad.key, bad.action) for bad in manifest.bad_images] == [
        ("2", "dropped"),
        ("5", "dropped"),
    ]
    assert written.read()["label"].to_pylist() == [0, 1, 3, 4]
    assert [written.metadata.row_group(n).num_rows for n in range(3)] == [2, 1, 1]
    manifest, written, problems = protect(data, on_bad_image="passthrough")
    assert problems == []
    assert written.read()["image"].to_pylist()[5] == values[5]
    with pytest.raises(BadImagePolicyError, match="2/image"):
        protect(data, on_bad_image="fail")
    manifest, written, problems = protect(data, sidecar_patterns=("image*",))
    assert (problems, written.read()["image"].to_pylist()) == ([], values)


def test_columns_of_images_are_found_by_content_and_by_name(protect):
    column = [make_image(seed=n) for n in range(3)] + [NOISE]
    table = pa.table({"data": column, "digest": [b"\xff\xd8\xff" + bytes(29)] + [bytes(32)] * 3})
    manifest, _, problems = protect(table, sidecar_patterns=("digest",))
    assert (problems, manifest.num_protected) == ([], 3)
    assert [bad.member for bad in manifest.bad_images] == ["3/data"]
    few = pa.table({"data": [make_image(), NOISE, NOISE]})  # the others are no images there
    manifest, _, problems = protect(few)
    assert (problems, manifest.num_protected, manifest.bad_images) == ([], 1, ())
    manifest, written, problems = protect(few, image_columns=("data",))
    assert (problems, len(manifest.bad_images), written.metadata.num_rows) == ([], 2, 1)


def test_a_file_without_rows_or_images_is_copied(protect):
    empty = make_table(1).slice(0, 0)
    _, written, problems = protect(empty)
    assert (problems, written.read().equals(empty)) == ([], True)
    plain = pa.table({"text": ["a.jpg or so", None], "n": [1, 2]})
    _, written, problems = protect(plain)
    assert (problems, written.read().equals(plain)) == ([], True)
    everything_is_bad = pa.table({"jpg": [NOISE]})
    _, written, problems = protect(everything_is_bad)
    assert (problems, written.metadata.num_rows) == ([], 0)


@pytest.mark.parametrize(
    ("table", "settings", "message"),
    [
        ({"a": [b"x"]}, {"image_columns": ("b",)}, "no column 'b'; its columns are a"),
        ({"a": ["x"]}, {"image_columns": ("a",)}, "holds texts, such as paths or URLs"),
        ({"a": [1]}, {"image_columns": ("a",)}, "of the type int64"),
        ({"url": ["http://x/a.JPG?w=1", None]}, {}, "names such as 'http://x/a.JPG"),
        ({"image": pa.array([{"bytes": None, "path": "b.jpg"}], IMAGE)}, {}, "the path 'b.jpg'"),
        (
            {"a": pa.array([[("k", make_image())]], pa.map_(pa.string(), pa.binary()))},
            {},
            "'a' holds images and is of the type map",
        ),
        ({"a": pa.array([make_image()]).dictionary_encode()}, {}, "'a' holds images and is of"),
        (
            {"a": pa.array([make_image().ljust(5000)], pa.binary(5000))},
            {},
            "'a' holds images and is of the type fixed_size_binary",
        ),
        ({"a": [bytes(2000)]}, {"max_sample_bytes": 1000}, "smaller row groups"),
    ],
)
def test_what_cannot_be_protected_is_refused(protect, table, settings, message):
    with pytest.raises(ShardError, match=message):
        protect(hugging_face(pa.table(table), {"image": {"_type": "Image"}}), **settings)
    assert list(protect.destination.list_data()) == []


def test_a_schema_that_pyarrow_writes_otherwise_is_refused(protect, monkeypatch):
    data = to_bytes(pa.table({"n": pa.array([1], pa.uint32())}))
    monkeypatch.setattr(pq, "ParquetWriter", partial(pq.ParquetWriter))
    write = pq.ParquetWriter
    monkeypatch.setattr(
        pq, "ParquetWriter", lambda *args, **options: write(*args, **options | {"version": "1.0"})
    )
    with pytest.raises(ShardError, match="would write another schema"):
        protect(data)


def with_column(name, change):
    """A change of a table that maps all values of a column."""

    def changed(table):
        place = table.schema.get_field_index(name)
        values = [change(value) for value in table[name].to_pylist()]
        field = table.schema.field(place)
        return table.set_column(place, field, pa.array(values, field.type))

    return changed


def test_old_times_come_back_or_are_refused(protect):
    """Spark writes INT96; read as nanoseconds, the year 9999 would become 1816."""
    options = {"use_deprecated_int96_timestamps": True, "store_schema": False}

    def times(*years):
        values = [datetime(year, 1, 1, 0, 0, 1, 500_000) for year in years]
        return pa.table({"n": [1] * len(years), "t": pa.array(values, pa.timestamp("us"))})

    _, written, problems = protect(to_bytes(times(1950, 2020), **options))
    assert (problems, written.schema.column(1).physical_type) == ([], "INT96")
    assert written.read()["t"].to_pylist()[0].year == 1950
    with pytest.raises(ShardError, match="1677 and 2262"):
        protect(to_bytes(times(2020, 9999), **options))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (with_column("label", lambda n: n + n // 2), "2: its column 'label' is not"),
        (with_column("image", lambda v: {**v, "path": "z/" + v["path"]}), "its path is not"),
        (with_column("vector", lambda v: v[1:]), "2/vector: its bytes are not"),
        (lambda table: table.replace_schema_metadata({"note": "x"}), "layout: its metadata is not"),
        (lambda table: table.take([0, 2, 1]), "1: its column 'label' is not"),
        (lambda table: table.slice(0, 2), "sample '2' of the source meets None"),
        (
            lambda table: table.cast(table.schema.set(3, pa.field("label", pa.int32()))),
            "its schema",
        ),
    ],
)
def test_audit_names_what_is_not_the_sources(protect, corpus, change, problem):
    manifest, written, _ = protect(make_table(3))
    spoilt = to_bytes(change(written.read()))
    protect.destination.write_bytes("x/a.parquet", spoilt)
    (unit,) = list_units(corpus)
    binding = make_binding(corpus.uri, **RewriteConfig().bound)
    outputs = (replace(manifest.outputs[0], size=len(spoilt)),)
    manifest = manifest.model_copy(update={"outputs": outputs})
    problems = audit_unit(unit, manifest, corpus, protect.destination, binding).problems
    assert any(problem in text for text in problems), problems


def test_a_file_that_is_damaged_or_changes_leaves_nothing(protect, corpus, protector):
    data = to_bytes(make_table(4), row_group_size=2, write_page_checksum=True)
    for broken in (b"", b"PAR1", data[:-9], data[: len(data) // 2], b"PAR1" + data[50:]):
        with pytest.raises(ShardError):
            protect(broken)
    corpus.write_bytes("x/a.parquet", data)
    (unit,) = list_units(corpus)
    longer = replace(unit.objects[0], size=len(data) + 1, etag="")
    with pytest.raises(ShardError, match="bytes that were listed"):
        next(read_samples(corpus, replace(unit, objects=(longer,))))
    with write_unit(protect.destination, unit) as output:
        samples = read_samples(corpus, unit)
        for _ in range(3):
            for member in next(samples).members:
                output.copy(member)
        corpus.write_bytes("x/a.parquet", to_bytes(make_table(4)))
        with pytest.raises(SourceChangedError):
            list(samples)
    assert list(protect.destination.list()) == []


def test_flipped_bytes_never_do_more_than_refuse(corpus):
    """pyarrow ends the process over a codec or a statistic in the footer that it does not know."""
    data = to_bytes(make_table(4), row_group_size=2)
    footer = int.from_bytes(data[-8:-4], "little")
    choose = random.Random(5)
    outcomes = set()
    for _ in range(400):
        broken = bytearray(data)
        for _ in range(choose.choice((1, 2, 8))):
            in_footer = len(data) - 8 - choose.randrange(footer)
            place = in_footer if choose.random() < 0.7 else choose.randrange(len(data))
            broken[place] = choose.choice((choose.randrange(256), 0, 255, 0x80))
        corpus.write_bytes("a.parquet", bytes(broken))
        try:
            list(read_samples(corpus, next(list_units(corpus))))
            outcomes.add("read")
        except ShardError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_memory_is_bounded_by_a_row_group(corpus, tmp_path):
    noise = [random.Random(n).randbytes(100_000) for n in range(20)]
    data = to_bytes(pa.table({"a": noise * 40}), row_group_size=20, use_dictionary=False)
    corpus.write_bytes("a.parquet", data)
    (unit,) = list_units(corpus)
    before, most = pa.total_allocated_bytes(), 0
    with write_unit(open_storage(str(tmp_path / "out")), unit) as output:
        for sample in read_samples(corpus, unit):
            for member in sample.members:
                output.copy(member)
            most = max(most, pa.total_allocated_bytes() - before)
        output.commit()
    assert len(data) > 80_000_000
    assert most < 16_000_000  # a row group has 2 MB


def test_s3_is_read_by_ranges_of_one_version(s3_uri, protector, tmp_path, monkeypatch):
    store, destination = open_storage(f"{s3_uri}/in"), open_storage(f"{s3_uri}/out")
    data = to_bytes(make_table(4), row_group_size=2)
    store.write_bytes("a.parquet", data)
    (unit,) = list_units(store)
    asked = []
    read_range = store.read_range

    def recorded(key, start, size, *, etag=None):
        asked.append((size, etag))
        return read_range(key, start, size, etag=etag)

    monkeypatch.setattr(store, "read_range", recorded)
    manifest = rewrite_unit(unit, store, destination, protector)
    assert manifest.num_protected == 3 + 3 + 3
    assert {etag for _, etag in asked} == {unit.objects[0].etag}
    assert len(asked) > 3
    assert {info.key for info in destination.list() if not info.key.startswith(INTERNAL)} == {
        "a.parquet"
    }
    store.write_bytes("a.parquet", to_bytes(make_table(3)))
    with pytest.raises(SourceChangedError):
        list(read_samples(store, unit))
