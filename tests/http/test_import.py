"""`shoal import` into a real server: all formats, resume after an interruption, errors."""

from __future__ import annotations

import json
import random
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import Server, run_shoal
from qdrant_client import models

from shoal import cli, importing
from shoal.importing import ImportFailed, import_file, open_source
from shoal.importing.chunks import Chunk, Columns

COLUMNS = Columns("id", False, {"vector": ""}, False, None)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Notes of interrupted imports, of this test only."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("SHOAL_API_KEY", "SHOAL_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache" / "shoal" / "imports"


def shoal_import(server: Server, *arguments: object) -> int:
    return cli.main(["import", *map(str, arguments), "--url", server.url])


def rows(count: int, dim: int = 4, seed: int = 5) -> list[dict]:
    dice = random.Random(seed)
    return [
        {
            "id": i,
            "vector": [dice.uniform(-1, 1) for _ in range(dim)],
            "payload": {"n": i, "words": f"word {i % 7}"},
        }
        for i in range(count)
    ]


def write_jsonl(path: Path, points: list[dict]) -> Path:
    path.write_text("".join(json.dumps(point) + "\n" for point in points))
    return path


def flat(points: list[dict]) -> list[dict]:
    return [{"id": p["id"], "vector": p["vector"], **p["payload"]} for p in points]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "flat.jsonl", "csv"])
def test_every_format_arrives(server, client, collection, tmp_path, capsys, kind):
    points = rows(250)
    path = tmp_path / f"file.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(flat(points)), path, row_group_size=64)
    elif kind == "jsonl":
        write_jsonl(path, points)
    elif kind == "flat.jsonl":
        write_jsonl(path, flat(points))
    else:
        lines = [
            f'{p["id"]},"{p["vector"]}",{p["payload"]["n"]},{p["payload"]["words"]}\n'
            for p in points
        ]
        path.write_text("id,vector,n,words\n" + "".join(lines))
    arguments = (path, "--collection", collection, "--batch", 40, "--distance", "Dot")
    assert shoal_import(server, *arguments) == 0
    assert "250 points" in capsys.readouterr().out
    assert client.count(collection).count == 250
    assert client.get_collection(collection).config.params.vectors.distance == models.Distance.DOT
    found = client.retrieve(collection, list(range(250)), with_vectors=True)
    for record, point in zip(found, points, strict=True):
        assert record.payload == point["payload"]
        assert np.allclose(record.vector, point["vector"], atol=1e-6)


def test_npy_arrives(server, client, collection, tmp_path):
    array = np.random.default_rng(3).normal(size=(300, 5)).astype(np.float32)
    np.save(tmp_path / "a.npy", array)
    assert shoal_import(server, tmp_path / "a.npy", "--collection", collection) == 0
    record = client.retrieve(collection, [299], with_vectors=True)[0]
    assert np.allclose(record.vector, array[299] / np.linalg.norm(array[299]), atol=1e-6)


def test_named_sparse_and_multivectors_arrive(server, client, collection, tmp_path):
    points = [
        {
            "id": "00000000-0000-0000-0000-000000000001",
            "vector": {
                "dense": [1.0, 2.0],
                "words": {"indices": [9, 3], "values": [0.5, 1.0]},
                "many": [[1.0, 0.0], [0.0, 1.0]],
            },
            "payload": {"deep": {"n": [1, None, "x"]}},
        },
        {"id": 2, "vector": {"dense": [0.0, 1.0]}},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", points)
    assert shoal_import(server, path, "--collection", collection, "--distance", "Euclid") == 0
    first, second = client.retrieve(
        collection, [points[0]["id"], 2], with_payload=True, with_vectors=True
    )
    assert first.vector["dense"] == [1.0, 2.0]
    assert first.vector["words"].indices == [3, 9]
    assert first.vector["many"] == [[1.0, 0.0], [0.0, 1.0]]
    assert first.payload == points[0]["payload"]
    assert set(second.vector) == {"dense"}


def test_into_a_collection_that_is_there(server, client, collection, tmp_path, capsys):
    client.create_collection(
        collection,
        {
            "left": models.VectorParams(size=2, distance=models.Distance.DOT),
            "right": models.VectorParams(size=3, distance=models.Distance.DOT),
        },
    )
    pq.write_table(pa.table({"a": [[1.0, 2.0]], "b": [[3.0, 4.0, 5.0]]}), tmp_path / "a.parquet")
    arguments = (tmp_path / "a.parquet", "--collection", collection, "--vector-column")
    assert shoal_import(server, *arguments, "a") == 1
    assert "has no unnamed vector; it has 'left', 'right'" in capsys.readouterr().err
    assert shoal_import(server, *arguments, "b=left") == 1
    assert "has 2 dimensions, and the file's has 3" in capsys.readouterr().err
    assert shoal_import(server, *arguments, "a=left", "--vector-column", "b=right") == 0
    record = client.retrieve(collection, [0], with_vectors=True)[0]
    assert record.vector == {"left": [1.0, 2.0], "right": [3.0, 4.0, 5.0]}


class Interrupted(Exception):
    pass


def test_an_interrupted_import_goes_on(
    server, client, collection, tmp_path, cache, capsys, monkeypatch
):
    points = rows(500)
    path = write_jsonl(tmp_path / "a.jsonl", points)
    source = open_source(path, COLUMNS, 20)

    def stop(rows: int, position: int, total: int) -> None:
        assert 0 < position <= total
        if rows >= 200:
            raise Interrupted

    with pytest.raises(Interrupted):
        import_file(source, collection, url=server.url, options=str(COLUMNS), watcher=stop)
    noted = json.loads(next(cache.iterdir()).read_text())["rows"]
    assert 200 <= noted < 500
    assert client.count(collection).count >= noted

    sent: list[int] = []
    put = importing.Server.put

    def remember(self: importing.Server, name: str, chunk: Chunk) -> None:
        sent.append(chunk.first_row)
        put(self, name, chunk)

    monkeypatch.setattr(importing.Server, "put", remember)
    assert shoal_import(server, path, "--collection", collection, "--batch", 20) == 0
    assert min(sent) == noted
    assert f"{noted} were there from before" in capsys.readouterr().out
    assert client.count(collection).count == 500
    assert list(cache.iterdir()) == []

    sent.clear()  # done is done: the same command begins anew
    assert shoal_import(server, path, "--collection", collection) == 0
    assert min(sent) == 0


def test_restart_and_a_new_collection_begin_at_the_first_row(
    server, client, collection, tmp_path, cache
):
    path = write_jsonl(tmp_path / "a.jsonl", rows(100))

    def interrupt() -> None:
        def stop(rows: int, position: int, total: int) -> None:
            if rows >= 60:
                raise Interrupted

        source = open_source(path, COLUMNS, 10)
        with pytest.raises(Interrupted):
            import_file(source, collection, url=server.url, options=str(COLUMNS), watcher=stop)

    interrupt()
    client.delete(collection, points_selector=[3])
    assert shoal_import(server, path, "--collection", collection, "--restart") == 0
    assert client.count(collection).count == 100
    interrupt()
    client.delete_collection(collection)
    assert shoal_import(server, path, "--collection", collection) == 0
    assert client.count(collection).count == 100


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_texts_become_vectors(server, client, collection, tmp_path, kind):
    texts = ["a cat sat on the mat", "the stock market fell sharply", "kittens drink milk"]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write_jsonl(path, [{"id": i, "text": text} for i, text in enumerate(texts)])
    elif kind == "parquet":
        pq.write_table(pa.table({"id": [0, 1, 2], "text": texts}), path)
    else:
        path.write_text("id,text\n" + "".join(f"{i},{t}\n" for i, t in enumerate(texts)))
    arguments = (path, "--collection", collection, "--text-column", "text")
    assert shoal_import(server, *arguments) == 0
    query = {"text": "shares lost value", "model": importing.DEFAULT_MODEL}
    answer = httpx.post(
        f"{server.url}/collections/{collection}/points/query",
        json={"query": query, "limit": 1, "with_payload": True},
        timeout=60,
    )
    assert answer.json()["result"]["points"][0]["payload"] == {"text": texts[1]}


def test_what_the_server_refuses_names_the_rows(server, collection, tmp_path, capsys):
    points = rows(50)
    points[33]["vector"] = [1.0]
    path = write_jsonl(tmp_path / "a.jsonl", points)
    arguments = (path, "--collection", collection, "--batch", 10)
    assert shoal_import(server, *arguments) == 1
    error = capsys.readouterr().err
    assert f"{path}, rows 30 to 39: the server refused them: Wrong input" in error
    points[33]["vector"] = [1.0, 2.0, 3.0, 4.0]
    write_jsonl(path, points)
    assert shoal_import(server, *arguments) == 0


def test_a_key_is_asked_for(make_server, tmp_path, capsys, monkeypatch):
    server = make_server(api_key="right")
    path = write_jsonl(tmp_path / "a.jsonl", rows(3))
    assert shoal_import(server, path, "--collection", "c") == 1
    assert "--api-key" in capsys.readouterr().err
    monkeypatch.setenv("SHOAL_API_KEY", "right")
    assert shoal_import(server, path, "--collection", "c") == 0


def test_a_server_that_restarts_in_between_is_waited_for(make_server, tmp_path):
    """Every connection is cut half way; the import only takes longer."""
    server = make_server()
    path = write_jsonl(tmp_path / "a.jsonl", rows(300))
    port = server.url.rpartition(":")[2]
    restarts = 0

    def restart_once(rows: int, position: int, total: int) -> None:
        nonlocal restarts
        if restarts == 0 and rows >= 100:
            restarts += 1
            server.kill9()
            server.settings["http_port"] = port
            server.start()

    source = open_source(path, COLUMNS, 10)
    report = import_file(source, "c", url=server.url, watcher=restart_once)
    assert (report.rows, restarts) == (300, 1)
    answer = httpx.post(f"{server.url}/collections/c/points/count", json={"exact": True})
    assert answer.json()["result"]["count"] == 300


def test_nobody_there(tmp_path, monkeypatch):
    monkeypatch.setattr("shoal.importing.sender.RETRY_S_MAX", 0.2)
    source = open_source(write_jsonl(tmp_path / "a.jsonl", rows(3)), COLUMNS, 10)
    with pytest.raises(ImportFailed, match="could not be reached"):
        import_file(source, "c", url="http://127.0.0.1:9")


def test_the_command_says_what_is_wrong(tmp_path):
    missing = run_shoal(["import", str(tmp_path / "no.csv"), "--collection", "c"])
    assert (missing.returncode, missing.stderr.count("\n")) == (1, 1)
    assert "There is no file" in missing.stderr
    wrong = run_shoal(["import", "x.csv", "--colection", "c"])
    assert wrong.returncode == 2
