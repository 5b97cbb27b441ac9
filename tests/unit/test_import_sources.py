"""Files become chunks: every row once, the right numbers, and errors that name the place."""

from __future__ import annotations

import datetime
import json
import random
import uuid

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shoal.batch import PointBatch
from shoal.ids import format_id
from shoal.importing import open_source
from shoal.importing.chunks import Columns, ImportFailed, Schema, Text
from shoal.importing.resume import Progress, fingerprint
from shoal.wire import ops_pb2 as wire


def columns(
    *, id: str | None = "id", id_given: bool = False, vectors=None, text: Text | None = None
) -> Columns:
    return Columns(id, id_given, vectors or {"vector": ""}, vectors is not None, text)


def read(source, first_row: int = 0) -> list[dict]:
    """All points of a source as the HTTP API would show them; checks the chunks' bookkeeping."""
    points, row, position = [], first_row, 0
    for chunk in source.chunks(first_row):
        assert chunk.first_row == row
        assert position <= chunk.position <= source.total
        row, position = row + chunk.row_count, chunk.position
        if chunk.is_json:
            got = json.loads(chunk.body)["points"]
        else:
            message = wire.PointBatch()
            message.ParseFromString(chunk.body)
            got = [as_point(PointBatch.from_wire(message), r) for r in range(message.count)]
        assert len(got) == chunk.row_count
        points += got
    if points:
        assert position == source.total
    return points


def read_all(path, chosen: Columns) -> None:
    source = open_source(path, chosen, 10)
    source.schema()
    read(source)


def as_point(batch: PointBatch, row: int) -> dict:
    payload = batch.payload_of(row)
    vectors = {
        name: block.values[row].tolist()
        for name, block in batch.dense.items()
        if block.present is None or block.present[row]
    }
    return {
        "id": format_id(batch.ids.key(row)),
        "vector": vectors.get("", vectors),
        "payload": json.loads(payload) if payload else None,
    }


def write_parquet(path, table, **options):
    pq.write_table(pa.table(table), path, **options)
    return path


def write_text(path, text: str):
    path.write_text(text, encoding="utf-8")
    return path


# -- parquet --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fixed32", "list32", "large64", "half", "int8"])
def test_parquet_vectors_of_every_type(tmp_path, kind):
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    types = {
        "fixed32": pa.list_(pa.float32(), 3),
        "list32": pa.list_(pa.float32()),
        "large64": pa.large_list(pa.float64()),
        "half": pa.list_(pa.float16()),
        "int8": pa.list_(pa.int8()),
    }
    values = list(rows.astype(np.float16)) if kind == "half" else rows.astype(int).tolist()
    path = write_parquet(tmp_path / "a.parquet", {"vector": pa.array(values, types[kind])})
    source = open_source(path, columns(), 3)
    assert source.schema() == Schema(dense={"": 3})
    points = read(source)
    assert [p["vector"] for p in points] == rows.tolist()
    assert [p["id"] for p in points] == [0, 1, 2, 3]
    assert points[0]["payload"] is None


def test_parquet_payload_of_every_type(tmp_path):
    zone = datetime.UTC
    table = {
        "id": pa.array([5, 2**63, 7], pa.uint64()),
        "vector": [[1.0], [2.0], [3.0]],
        "text": ["a", None, 'q"\n\u2028€\U0001f600'],
        "whole": pa.array([2**63 - 1, None, -1], pa.int64()),
        "big": pa.array([2**64 - 1, 0, None], pa.uint64()),
        "real": [0.1, float("nan"), None],
        "flag": [True, False, None],
        "tags": [["x", "y"], [], None],
        "nested": [{"a": 1, "b": None}, None, {"a": 2, "b": "z"}],
        "time": pa.array([datetime.datetime(2020, 1, 2, 3, 4, 5, 6, zone)] * 3),
        "nano": pa.array([1, 2, None], pa.timestamp("ns")),
        "day": [datetime.date(2020, 1, 2)] * 3,
    }
    path = write_parquet(tmp_path / "a.parquet", table)
    points = read(open_source(path, columns(), 2))
    assert [p["id"] for p in points] == [5, 2**63, 7]
    assert points[0]["payload"] == {
        "text": "a",
        "whole": 2**63 - 1,
        "big": 2**64 - 1,
        "real": 0.1,
        "flag": True,
        "tags": ["x", "y"],
        "nested": {"a": 1, "b": None},
        "time": "2020-01-02T03:04:05.000006Z",
        "nano": "1970-01-01T00:00:00",
        "day": "2020-01-02",
    }
    assert points[1]["payload"]["real"] is None
    assert "text" not in points[1]["payload"]
    assert points[2]["payload"]["text"] == 'q"\n\u2028€\U0001f600'


def test_parquet_missing_vectors_and_several_columns(tmp_path):
    table = {
        "a": pa.array([[1.0, 2.0], None, [3.0, 4.0]], pa.list_(pa.float32())),
        "b": pa.array([None, [5.0], None], pa.list_(pa.float32(), 1)),
    }
    path = write_parquet(tmp_path / "a.parquet", table)
    source = open_source(path, columns(vectors={"a": "left", "b": "b"}), 10)
    assert source.schema() == Schema(dense={"left": 2, "b": 1})
    assert [p["vector"] for p in read(source)] == [
        {"left": [1.0, 2.0]},
        {"b": [5.0]},
        {"left": [3.0, 4.0]},
    ]


def test_parquet_uuids(tmp_path):
    ids = [str(uuid.UUID(int=n)) for n in (1, 2**127)]
    path = write_parquet(tmp_path / "a.parquet", {"key": ids, "vector": [[1.0], [2.0]]})
    points = read(open_source(path, columns(id="key"), 10))
    assert [p["id"] for p in points] == ids
    raw = pa.array([uuid.UUID(i).bytes for i in ids], pa.binary(16))
    path = write_parquet(tmp_path / "b.parquet", {"key": raw, "vector": [[1.0], [2.0]]})
    assert [p["id"] for p in read(open_source(path, columns(id="key"), 10))] == ids


@pytest.mark.parametrize("rows_per_group", [1, 3, 100])
def test_parquet_goes_on_from_any_row(tmp_path, rows_per_group):
    table = {"vector": [[float(i)] for i in range(10)], "n": list(range(10))}
    path = write_parquet(tmp_path / "a.parquet", table, row_group_size=rows_per_group)
    for first_row in range(11):
        points = read(open_source(path, columns(), 4), first_row)
        assert [p["payload"]["n"] for p in points] == list(range(first_row, 10))
        assert [p["id"] for p in points] == list(range(first_row, 10))


def test_parquet_text(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"id": [1, 2], "words": ["hi", None]})
    source = open_source(path, columns(text=Text("words", "mini")), 10)
    assert source.schema() == Schema(text={"": "mini"})
    assert read(source) == [
        {"id": 1, "vector": {"text": "hi", "model": "mini"}, "payload": {"words": "hi"}},
        {"id": 2, "vector": {}, "payload": {}},
    ]


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"v": [[1.0]], "t": ["x"]}, ["no column vector", "v, t", "Columns with vectors: v"]),
        ({"vector": ["x"], "t": ["y"]}, ["column vector holds string", "--text-column"]),
        ({"vector": [[1.0], [1.0, 2.0]]}, ["row 1, column vector", "2 numbers among vectors of 1"]),
        ({"vector": [[1.0], [None]]}, ["row 1, column vector", "empty element"]),
        ({"vector": [[1.0], [float("nan")]]}, ["row 1, column vector", "NaN"]),
        ({"vector": [[1.0], [1e300]]}, ["row 1, column vector", "too large"]),
        ({"vector": [[1.0], [2.0]], "id": [1, -2]}, ["row 1, column id", "-2 is no id"]),
        ({"vector": [[1.0], [2.0]], "id": [1, None]}, ["row 1, column id", "None is no id"]),
        ({"vector": [[1.0], [2.0]], "id": ["x", "y"]}, ["row 0, column id", "'x' is no id"]),
        ({"vector": [[1.0]], "id": [1.5]}, ["row 0, column id", "1.5 is no id"]),
        ({"vector": pa.array([None], pa.list_(pa.float32()))}, ["holds no vector at all"]),
        ({"vector": pa.array([], pa.list_(pa.float32()))}, ["has no rows"]),
    ],
)
def test_parquet_errors_name_the_place(tmp_path, table, told):
    path = write_parquet(tmp_path / "a.parquet", table)
    with pytest.raises(ImportFailed) as caught:
        read(open_source(path, columns(), 10))
    for part in [str(path), *told]:
        assert part in caught.value.message


def test_parquet_row_numbers_count_from_the_files_beginning(tmp_path):
    table = {"vector": [[float("inf") if i == 777 else 1.0] for i in range(1000)]}
    path = write_parquet(tmp_path / "a.parquet", table)
    with pytest.raises(ImportFailed, match="row 777"):
        read(open_source(path, columns(), 100))


# -- npy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["<f4", "<f8", "<f2", ">f4", "u1"])
def test_npy(tmp_path, dtype):
    rows = np.arange(20, dtype=dtype).reshape(10, 2)
    np.save(tmp_path / "a.npy", rows)
    source = open_source(tmp_path / "a.npy", columns(), 3)
    assert source.schema() == Schema(dense={"": 2})
    points = read(source, 4)
    assert [p["id"] for p in points] == list(range(4, 10))
    assert [p["vector"] for p in points] == rows[4:].astype(float).tolist()


def test_npy_in_fortran_order(tmp_path):
    rows = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(3, 2))
    np.save(tmp_path / "a.npy", rows)
    points = read(open_source(tmp_path / "a.npy", columns(), 2))
    assert [p["vector"] for p in points] == rows.tolist()


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (np.zeros(3, np.float32), "rows x dimension"),
        (np.zeros((2, 2, 2)), "rows x dimension"),
        (np.array([["a"]]), "rows x dimension"),
        (np.zeros((0, 3)), "no vectors"),
        (np.array([[1.0], [np.inf]]), "row 1"),
    ],
)
def test_npy_errors(tmp_path, array, told):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ImportFailed, match=told):
        read(open_source(tmp_path / "a.npy", columns(), 10))


def test_npy_with_objects_is_not_unpickled(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[object()]]), allow_pickle=True)
    with pytest.raises(ImportFailed, match="can be read"):
        open_source(tmp_path / "a.npy", columns(), 10)


def test_large_vectors_make_small_batches(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((300, 20_000), np.float32))
    chunks = list(open_source(tmp_path / "a.npy", columns(), 1000).chunks(0))
    assert len(chunks) > 1
    assert all(len(chunk.body) < 9 * 2**20 for chunk in chunks)


# -- jsonl ----------------------------------------------------------------------------------------


def test_jsonl_points_go_through_unparsed(tmp_path):
    lines = [
        '{"id": 18446744073709551615, "vector": [0.1, 2], "payload": {"n": 1e400, "k": null}}',
        "",
        '{"vector": {"": [1, 2], "words": {"indices": [3, 9], "values": [1, 0.5]}}}',
        '  {"id": "00000000-0000-0000-0000-000000000001"}  ',
    ]
    path = write_text(tmp_path / "a.jsonl", "\n".join(lines))
    source = open_source(path, columns(), 2)
    assert source.schema() == Schema(dense={"": 2}, sparse=("words",))
    points = read(source)
    assert points[0]["id"] == 2**64 - 1
    assert b"1e400" in next(iter(source.chunks(0))).body
    assert points[1]["id"] == 1
    assert points[1]["vector"]["words"] == {"indices": [3, 9], "values": [1, 0.5]}
    assert points[2] == {
        "id": "00000000-0000-0000-0000-000000000001",
        "vector": {},
        "payload": None,
    }
    assert [p["id"] for p in read(source, 1)] == [1, "00000000-0000-0000-0000-000000000001"]


def test_jsonl_multivectors(tmp_path):
    path = write_text(tmp_path / "a.jsonl", '{"id":1,"vector":{"m":[[1,2],[3,4]],"d":[1]}}')
    assert open_source(path, columns(), 2).schema() == Schema(dense={"d": 1}, multi={"m": 2})


def test_jsonl_flat_objects(tmp_path):
    lines = [
        '{"key": 7, "vector": [0.5, 2], "title": "a", "big": 18446744073709551616}',
        '{"key": 8, "vector": null, "nested": {"vector": [1]}}',
    ]
    path = write_text(tmp_path / "a.jsonl", "\n".join(lines) + "\n")
    source = open_source(path, columns(id="key"), 10)
    assert source.schema() == Schema(dense={"": 2})
    assert read(source) == [
        {"id": 7, "vector": [0.5, 2], "payload": {"title": "a", "big": 2**64}},
        {"id": 8, "vector": {}, "payload": {"nested": {"vector": [1]}}},
    ]


def test_jsonl_several_vector_columns_and_text(tmp_path):
    path = write_text(tmp_path / "a.jsonl", '{"a": [1], "b": [2, 3], "words": "w\\u00e4"}')
    source = open_source(path, columns(vectors={"a": "x", "b": "b"}), 10)
    assert source.schema() == Schema(dense={"x": 1, "b": 2})
    assert read(source)[0]["vector"] == {"x": [1], "b": [2, 3]}
    source = open_source(path, columns(text=Text("words", "mini")), 10)
    assert read(source) == [
        {
            "id": 0,
            "vector": {"text": "wä", "model": "mini"},
            "payload": {"a": [1], "b": [2, 3], "words": "wä"},
        }
    ]


@pytest.mark.parametrize(
    ("lines", "options", "told"),
    [
        (["{"], {}, ["line 1", "no JSON object"]),
        (['{"id":1,"vector":[1]}', "", "[1]"], {}, ["line 3", "no JSON object"]),
        (['{"id":1,"vector":[1]}', '{"id":2,"title":"x"}'], {}, ["line 2", "title"]),
        (['{"id":1,"vector":"x"}'], {}, ["line 1", '"x" is no vector']),
        (['{"id":1,"payload":{}}'], {}, ["no vectors in its first rows"]),
        (['{"a":1,"b":2}'], {}, ["no column vector", "a, b", "--text-column"]),
        (['{"a":[1]}'], {"id": "key", "id_given": True}, ["no column key", "--id-column"]),
        (
            ['{"key":1,"vector":[1],"x":1}', '{"vector":[1],"x":1}'],
            {"id": "key"},
            ["line 2", "no key"],
        ),
        (['{"w": 5}'], {"text": Text("w", "m")}, ["line 1", "column w", "no text: 5"]),
        (['{"w": "x"}'], {"text": Text("t", "m")}, ["no column t"]),
        ([], {}, ["no rows"]),
        (["", "  "], {}, ["no rows"]),
    ],
)
def test_jsonl_errors_name_the_line(tmp_path, lines, options, told):
    path = write_text(tmp_path / "a.jsonl", "\n".join(lines))
    with pytest.raises(ImportFailed) as caught:
        read_all(path, columns(**options))
    for part in [str(path), *told]:
        assert part in caught.value.message


def test_jsonl_that_is_no_utf8(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id":1,"vector":[1],"payload":{}}\n{"id":2,"payload":{"a":"\xff"}}\n')
    with pytest.raises(ImportFailed, match="line 2"):
        read_all(path, columns())


# -- csv ------------------------------------------------------------------------------------------


def test_csv(tmp_path):
    text = (
        "\ufeffid,vector,name,zip,year,ratio,flag,empty\n"
        '1,"[0.5, 2]","Smith, ""J""\nsecond line",00501,1999,-1.5e3,true,\n'
        "\n"
        "2,0.25 4,True,1_000,+5,.5,nan,\n"
    )
    source = open_source(write_text(tmp_path / "a.csv", text), columns(), 10)
    assert source.schema() == Schema(dense={"": 2})
    assert read(source) == [
        {
            "id": 1,
            "vector": [0.5, 2],
            "payload": {
                "name": 'Smith, "J"\nsecond line',
                "zip": "00501",
                "year": 1999,
                "ratio": -1500.0,
                "flag": True,
            },
        },
        {
            "id": 2,
            "vector": [0.25, 4],
            "payload": {"name": "True", "zip": "1_000", "year": "+5", "ratio": ".5", "flag": "nan"},
        },
    ]
    assert [p["id"] for p in read(source, 1)] == [2]


def test_csv_text_and_row_numbers(tmp_path):
    path = write_text(tmp_path / "a.csv", "words\nhello\nworld\n")
    points = read(open_source(path, columns(text=Text("words", "mini")), 10))
    assert points[1] == {
        "id": 1,
        "vector": {"text": "world", "model": "mini"},
        "payload": {"words": "world"},
    }


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", ["no rows"]),
        ("id,vector\n", ["no rows"]),
        ("a,a\n1,2\n", ["two columns of one name"]),
        ("id,v\n1,[1]\n", ["no column vector", "id, v"]),
        ("id,vector\n1,[1]\n2\n", ["line 3", "1 cells", "2 columns"]),
        ('id,vector\n1,"[1]\n', ["no CSV"]),
        ("id,vector\n,[1]\n", ["line 2", "column id is empty"]),
        ("id,vector\n1,[1\n", ["line 2", "column vector"]),
        ("id,vector\n1,{}x\n", ["line 2", "column vector"]),
    ],
)
def test_csv_errors_name_the_line(tmp_path, text, told):
    path = write_text(tmp_path / "a.csv", text)
    with pytest.raises(ImportFailed) as caught:
        read_all(path, columns())
    for part in [str(path), *told]:
        assert part in caught.value.message


# -- all ------------------------------------------------------------------------------------------


def test_unknown_and_missing_files(tmp_path):
    with pytest.raises(ImportFailed, match="no file"):
        open_source(tmp_path / "no.csv", columns(), 10)
    with pytest.raises(ImportFailed, match=r"\.xlsx are not known"):
        open_source(write_text(tmp_path / "a.xlsx", ""), columns(), 10)
    with pytest.raises(ImportFailed, match="without a suffix"):
        open_source(write_text(tmp_path / "a", ""), columns(), 10)


def test_every_reader_gives_the_same_points_whatever_the_batch(tmp_path):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    rows = [
        {
            "id": i * 3,
            "vector": [round(dice.uniform(-1, 1), 3) for _ in range(4)],
            "n": dice.choice([None, i]),
        }
        for i in range(dice.randrange(1, 60))
    ]
    write_text(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in rows))
    write_text(
        tmp_path / "a.csv",
        "id,vector,n\n"
        + "".join(f'{r["id"]},"{r["vector"]}",{"" if r["n"] is None else r["n"]}\n' for r in rows),
    )
    write_parquet(tmp_path / "a.parquet", pa.Table.from_pylist(rows), row_group_size=7)
    for suffix in ("jsonl", "csv", "parquet"):
        first_row = dice.randrange(len(rows))
        source = open_source(tmp_path / f"a.{suffix}", columns(), dice.randrange(1, 20))
        points = read(source, first_row)
        assert [p["id"] for p in points] == [r["id"] for r in rows[first_row:]], suffix
        for point, row in zip(points, rows[first_row:], strict=True):
            assert np.allclose(point["vector"], row["vector"], atol=1e-6), suffix
            assert (point["payload"] or {}).get("n") == row["n"], suffix


def test_the_note_of_an_interrupted_import(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = write_text(tmp_path / "a.jsonl", "x" * 100)

    def note(options: str = "", collection: str = "c") -> Progress:
        return Progress(file, "http://h", collection, fingerprint(file, options))

    assert note().load() == 0
    note().save(17)
    assert note().load() == 17
    assert note(options="other column").load() == 0
    assert note(collection="d").load() == 0
    file.write_text("y" * 100)
    assert note().load() == 0
    note().save(3)
    note().path.write_text("{")
    assert note().load() == 0
    note().clear()
    note().clear()
    assert note().load() == 0
