"""`shoal.Client` and `shoal.AsyncClient` against a real `shoal serve`."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from uuid import UUID

import numpy as np
import pytest
from harness import Server

import shoal
from shoal.client import (
    AsyncClient,
    Batch,
    Client,
    Dense,
    Exclude,
    Hnsw,
    Multi,
    Sparse,
    SparseVector,
    Texts,
    VectorParams,
)
from shoal.errors import (
    AlreadyExists,
    BadRequest,
    Forbidden,
    InvalidField,
    NotFound,
    NotSupported,
    Unauthorized,
)

A_UUID = "0b6a1c58-6d0e-4f8b-9a53-3f1a5a1d9c11"


@pytest.fixture
def shoal_client(server: Server) -> Iterator[Client]:
    with Client(server.grpc) as client:
        yield client


@pytest.fixture
def films(shoal_client: Client, collection: str) -> str:
    shoal_client.create_collection(collection, VectorParams(4))
    shoal_client.upsert(
        collection,
        [1, 2, A_UUID],
        [[0.9, 0.1, 0.1, 0], [0.8, 0.3, 0.1, 0], [0, 0.2, 0.9, 0.3]],
        [{"title": "Alien", "year": 1979}, {"title": "Aliens", "year": 1986}, None],
    )
    return collection


# -- importing ------------------------------------------------------------------------------------
def test_the_client_needs_no_server_and_shoal_needs_no_client():
    program = """
import sys
import shoal
assert not {"numpy", "grpc"} & set(sys.modules)
shoal.Client, shoal.AsyncClient
assert not {"coordinator", "storage_node", "faiss", "fastapi", "pydantic"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    with pytest.raises(AttributeError):
        shoal.Clint  # type: ignore[attr-defined]  # noqa: B018


# -- collections ----------------------------------------------------------------------------------
def test_a_collection_comes_and_goes(shoal_client, collection):
    assert not shoal_client.collection_exists(collection)
    vectors = {
        "a": VectorParams(3, "Euclid", datatype="float16", hnsw=Hnsw(m=8)),
        "m": VectorParams(2, "Dot", multivector=True),
    }
    shoal_client.create_collection(
        collection, vectors, sparse_vectors=["s"], shard_number=2, metadata={"owner": "me"}
    )
    with pytest.raises(AlreadyExists, match="already exists"):
        shoal_client.create_collection(collection, vectors)
    info = shoal_client.get_collection(collection)
    assert dict(info.vectors) == vectors
    assert (info.name, info.status, info.points_count) == (collection, "green", 0)
    assert (info.sparse_vectors, info.shard_number, info.metadata) == (["s"], 2, {"owner": "me"})
    assert shoal_client.collection_exists(collection)
    assert collection in shoal_client.list_collections()
    assert shoal_client.delete_collection(collection)
    assert not shoal_client.delete_collection(collection)
    with pytest.raises(NotFound):
        shoal_client.get_collection(collection)


def test_what_a_collection_cannot_be(shoal_client, collection):
    for vectors in (VectorParams(0), VectorParams(70_000)):
        with pytest.raises(InvalidField, match="size"):
            shoal_client.create_collection(collection, vectors)
    with pytest.raises(BadRequest, match="distance"):
        shoal_client.create_collection(collection, VectorParams(4, "Cosin"))
    with pytest.raises(InvalidField):
        shoal_client.create_collection("a/b", VectorParams(4))


# -- searching ------------------------------------------------------------------------------------
def test_search(shoal_client, films):
    hits = shoal_client.search(films, np.array([1, 0.2, 0, 0]), limit=2, with_payload=True)
    assert hits.ids == [1, 2]
    assert hits.scores.dtype == np.float32
    assert hits.scores[0] > hits.scores[1]
    assert (hits[0].payload, hits[0].score) == ({"title": "Alien", "year": 1979}, hits.scores[0])
    assert [hit.id for hit in hits] == [hit.id for hit in hits[:]]
    old = {"must": [{"key": "year", "range": {"lt": 1985}}]}
    assert shoal_client.search(films, [1, 0.2, 0, 0], filter=old).ids == [1]
    assert shoal_client.search(films, [1, 0.2, 0, 0], filter='{"must": []}').ids[0] == 1
    assert shoal_client.search(films, [1, 0.2, 0, 0], offset=1).ids == [2, A_UUID]
    assert shoal_client.search(films, [1, 0.2, 0, 0], score_threshold=0.9).ids == [1, 2]
    assert shoal_client.search(films, [1, 0.2, 0, 0], exact=True, ef=50).ids[0] == 1
    assert shoal_client.search(films, point=1).ids == [2, A_UUID]
    assert shoal_client.search(films, point=UUID(A_UUID).urn, limit=1).ids == [2]
    assert shoal_client.search(films).ids == [1, 2, A_UUID]
    assert shoal_client.search(films, [1, 0, 0, 0], consistency="strong").ids[0] == 1


def test_what_comes_back_with_a_hit(shoal_client, films):
    def payloads(with_payload):
        return shoal_client.search(films, [1, 0, 0, 0], with_payload=with_payload).payloads

    assert payloads(False) is None
    assert payloads(["title"]) == [{"title": "Alien"}, {"title": "Aliens"}, {}]
    assert payloads(Exclude(["title"])) == [{"year": 1979}, {"year": 1986}, {}]
    hits = shoal_client.search(films, [1, 0, 0, 0], with_vectors=True)
    assert hits.vectors.shape == (3, 4)
    assert np.allclose(np.linalg.norm(hits.vectors, axis=1), 1)
    assert np.array_equal(hits[1].vector, hits.vectors[1])
    with pytest.raises(KeyError):
        shoal_client.search(films, [1, 0, 0, 0]).vectors  # noqa: B018


def test_a_batch_of_searches(shoal_client, films):
    queries = np.random.default_rng(5).normal(size=(300, 4))
    found = shoal_client.search_batch(films, queries, limit=2)
    assert len(found) == 300
    for query, hits in zip(queries[:20], found[:20], strict=True):
        assert shoal_client.search(films, query, limit=2).ids == hits.ids


def test_many_searches_at_once(server, films):
    async def main() -> None:
        async with AsyncClient(server.grpc) as client:
            queries = np.random.default_rng(5).normal(size=(500, 4))
            found = await asyncio.gather(*(client.search(films, query) for query in queries))
            assert all(len(hits) == 3 for hits in found)

    asyncio.run(main())


def test_searches_that_are_refused(shoal_client, films, collection):
    with pytest.raises(BadRequest, match="expected dim: 4, got 2"):
        shoal_client.search(films, [1, 2])
    with pytest.raises(BadRequest, match="Not existing vector name"):
        shoal_client.search(films, [1, 2], using="x")
    with pytest.raises(BadRequest, match="NaN"):
        shoal_client.search(films, [1, 2, 3, float("nan")])
    with pytest.raises(BadRequest, match="mist"):
        shoal_client.search(films, [1, 2, 3, 4], filter={"mist": []})
    with pytest.raises(BadRequest, match="one of vector, text and point"):
        shoal_client.search(films, [1, 2, 3, 4], point=1)
    with pytest.raises(BadRequest, match="limit"):
        shoal_client.search(films, [1, 2, 3, 4], limit=0)
    with pytest.raises(InvalidField, match="10000"):
        shoal_client.search(films, [1, 2, 3, 4], limit=20_000)
    with pytest.raises(BadRequest, match="query vector"):
        shoal_client.search(films, ["a", "b"])
    with pytest.raises(BadRequest, match="consistency"):
        shoal_client.search(films, [1, 2, 3, 4], consistency="most")
    with pytest.raises(NotFound, match="No point with id 99"):
        shoal_client.search(films, point=99)
    with pytest.raises(NotFound, match="moon"):
        shoal_client.search("moon", [1])


def test_texts(shoal_client, collection):
    notes = ["the boiler needs a new valve", "grandma's birthday is in May", None]
    shoal_client.create_collection(collection, VectorParams(384))
    payloads = [{"note": note} for note in notes]
    shoal_client.upsert(collection, range(3), Texts(notes), payloads, timeout_s=120)
    hits = shoal_client.search(
        collection, text="repair the heating", limit=1, with_payload=True, timeout_s=120
    )
    assert hits[0].payload == {"note": notes[0]}
    assert (hits.truncated_texts, len(shoal_client.search(collection, text="anything"))) == (0, 2)
    long = "word " * 1_000
    assert shoal_client.upsert(collection, [3, 4], Texts([long, "short"])).truncated_texts == 1
    sent = shoal_client.upload(collection, Batch([5, 6], Texts([long, long])))
    assert sent.truncated_texts == 2
    assert shoal_client.search(collection, text=long).truncated_texts == 1
    with pytest.raises(BadRequest, match="model"):
        shoal_client.search(collection, text="x", model="no such model")


def test_a_server_without_an_encoder(make_server, collection):
    server = make_server(encoder_model="none")
    with Client(server.grpc) as client:
        client.create_collection(collection, VectorParams(384))
        with pytest.raises(NotSupported, match="no encoder"):
            client.search(collection, text="x")
        with pytest.raises(NotSupported, match="no encoder"):
            client.upsert(collection, [1], Texts(["x"]))


# -- reading --------------------------------------------------------------------------------------
def test_reading(shoal_client, films):
    points = shoal_client.retrieve(films, [A_UUID, 7, 1], with_vectors=True)
    assert points.ids == [A_UUID, 1]
    assert [point.payload for point in points] == [{}, {"title": "Alien", "year": 1979}]
    assert points[1].vector.shape == (4,)
    page = shoal_client.scroll(films, limit=2, with_payload=False)
    assert (page.points.ids, page.points.payloads, page.next) == ([1, 2], None, A_UUID)
    assert shoal_client.scroll(films, start=page.next).next is None
    assert [point.id for point in shoal_client.iterate(films, page_points=1)] == [1, 2, A_UUID]
    assert shoal_client.count(films) == 3
    assert shoal_client.count(films, {"must": [{"key": "year", "match": {"value": 1979}}]}) == 1


# -- writing --------------------------------------------------------------------------------------
def test_every_kind_of_vector(shoal_client, collection):
    shoal_client.create_collection(
        collection,
        {"d": VectorParams(2, "Dot"), "m": VectorParams(2, "Dot", multivector=True)},
        sparse_vectors=["s"],
    )
    shoal_client.upsert(
        collection,
        np.array([1, 2, 3]),
        {
            "d": Dense([[1, 2], [0, 0], [5, 6]], present=[True, False, True]),
            "m": Multi([[[1, 2], [3, 4]], None, np.ones((3, 2))]),
            "s": Sparse(
                [
                    ([7, 3], [0.5, 1.5]),
                    SparseVector(np.array([1], np.uint32), np.ones(1, np.float32)),
                    None,
                ]
            ),
        },
    )
    points = shoal_client.retrieve(collection, [1, 2, 3], with_vectors=True)
    assert np.array_equal(points.dense["d"], [[1, 2], [np.nan] * 2, [5, 6]], equal_nan=True)
    assert sorted(points[0].vectors) == ["d", "m", "s"]
    assert sorted(points[1].vectors) == ["s"]
    assert points[0].vectors["m"].tolist() == [[1, 2], [3, 4]]
    assert points[2].vectors["m"].shape == (3, 2)
    assert points[0].vectors["s"].indices.tolist() == [3, 7]
    assert points[0].vectors["s"].values.tolist() == [1.5, 0.5]
    shoal_client.update_vectors(collection, [2], {"d": np.array([[8, 9]])})
    shoal_client.delete_vectors(collection, ["m"], [1])
    points = shoal_client.retrieve(collection, [1, 2], with_vectors=["d", "m", "x"])
    assert sorted(points[0].vectors) == ["d"]
    assert points[1].vectors["d"].tolist() == [8, 9]
    with pytest.raises(NotFound, match="No point with id 77"):
        shoal_client.update_vectors(collection, [77], {"d": np.array([[8, 9]])})


def test_payloads(shoal_client, films):
    def payload(key):
        return shoal_client.retrieve(films, [key])[0].payload

    shoal_client.set_payload(films, {"seen": True, "score": np.float32(0.5)}, [1, 2])
    assert payload(1) == {"title": "Alien", "year": 1979, "seen": True, "score": 0.5}
    shoal_client.set_payload(films, {"who": "Ripley"}, [1], key="cast.lead")
    assert payload(1)["cast"] == {"lead": {"who": "Ripley"}}
    shoal_client.delete_payload(films, ["cast", "score"], [1])
    shoal_client.overwrite_payload(films, {}, [2])
    assert payload(2) == {}
    shoal_client.clear_payload(films, filter={})
    assert payload(1) == {}
    with pytest.raises(NotFound):
        shoal_client.set_payload(films, {"a": 1}, [77])
    with pytest.raises(BadRequest, match="either ids or a filter"):
        shoal_client.clear_payload(films)
    with pytest.raises(BadRequest, match="payload"):
        shoal_client.set_payload(films, {"a": object()}, [1])


def test_deleting(shoal_client, films):
    shoal_client.delete(films, [1, 99])
    assert shoal_client.count(films) == 2
    shoal_client.delete(films, filter={"must": [{"key": "year", "match": {"value": 1986}}]})
    assert shoal_client.scroll(films).points.ids == [A_UUID]


def test_points_that_are_refused(shoal_client, films):
    cases = [
        (([1], [[1, 2]]), "expected dim: 4, got 2"),
        (([1, 2], [[1, 2, 3, 4]]), "2 != 1"),
        (([1], [[1, 2, 3, 4]], [{}, {}]), "1 != 2"),
        (([1], [1, 2, 3, 4]), "one row a point"),
        (([-1], [[1, 2, 3, 4]]), "not a valid point ID"),
        ((np.array([-1]), [[1, 2, 3, 4]]), "negative"),
        ((np.array([0.5]), [[1, 2, 3, 4]]), "whole numbers"),
        ((["x"], [[1, 2, 3, 4]]), "not a valid point ID"),
        (([1], [[1, 2, 3, float("nan")]]), "NaN"),
        (([1], {"x": [[1, 2, 3, 4]]}), "Not existing vector name"),
        (([1], [["a", "b"]]), "could not convert"),
        (([1], [[1, 2, 3, 4]], ["text"]), "must be a dict"),
        (([], []), "one row a point"),
    ]
    for arguments, sentence in cases:
        with pytest.raises(BadRequest, match=sentence) as caught:
            shoal_client.upsert(films, *arguments)
        assert not caught.value.maybe_applied
    with pytest.raises(BadRequest, match="update_mode"):
        shoal_client.upsert(films, [1], [[1, 2, 3, 4]], update_mode="never")
    assert shoal_client.count(films) == 3


def test_update_modes_and_filters(shoal_client, films):
    vectors = [[1, 0, 0, 0], [1, 0, 0, 0]]
    shoal_client.upsert(films, [2, 4], vectors, [{"n": 2}, {"n": 4}], update_mode="insert_only")
    assert shoal_client.retrieve(films, [2, 4]).payloads == [
        {"title": "Aliens", "year": 1986},
        {"n": 4},
    ]
    shoal_client.upsert(films, [4, 5], vectors, [{"n": 5}, {}], update_mode="update_only")
    assert shoal_client.retrieve(films, [4, 5]).payloads == [{"n": 5}]
    old = {"must": [{"key": "year", "range": {"lt": 1980}}]}
    shoal_client.upsert(films, [1, 2], vectors, update_filter=old)
    assert shoal_client.retrieve(films, [1, 2]).payloads == [{}, {"title": "Aliens", "year": 1986}]


# -- a large upload -------------------------------------------------------------------------------
def test_a_large_upload(shoal_client, collection):
    count, dim = 30_000, 64
    dice = np.random.default_rng(11)
    vectors = dice.normal(size=(count, dim)).astype(np.float32)
    shoal_client.create_collection(collection, VectorParams(dim, "Dot"), shard_number=3)
    seen: list[int] = []
    done = shoal_client.upload(
        collection,
        Batch(np.arange(count), vectors, [{"n": n} for n in range(count)]),
        on_progress=lambda progress: seen.append(progress.points),
    )
    assert (done.points, done.batches) == (count, 30)
    assert seen == sorted(seen)
    assert seen[-1] == count == shoal_client.count(collection)
    found = shoal_client.retrieve(collection, np.arange(0, count, 997), with_vectors=True)
    assert np.array_equal(found.vectors, vectors[::997])
    assert [payload["n"] for payload in found.payloads or []] == list(range(0, count, 997))
    everything = shoal_client.iterate(collection, page_points=10_000, with_payload=False)
    assert [point.id for point in everything] == list(range(count))
    answer = shoal_client.scroll(collection, limit=10_000, with_vectors=True)
    assert answer.points.vectors.nbytes > 2_000_000


# -- keys, time, threads --------------------------------------------------------------------------
def test_keys(make_server):
    server = make_server(api_key="gold", read_only_api_key="silver", encoder_model="none")
    with Client(server.grpc, api_key="gold") as client:
        client.create_collection("c", VectorParams(2))
    with Client(server.grpc, api_key="silver") as client:
        assert client.list_collections() == ["c"]
        assert client.search("c", [1, 2]).ids == []
        with pytest.raises(Forbidden):
            client.upsert("c", [1], [[1, 2]])
        with pytest.raises(Forbidden):
            client.upload("c", Batch([1], [[1, 2]]))
    for key in (None, "wrong"):
        with Client(server.grpc, api_key=key) as client:
            with pytest.raises(Unauthorized):
                client.list_collections()
            with pytest.raises(Unauthorized):
                client.search("c", [1, 2])


def test_one_client_in_many_threads(shoal_client, films):
    found: list[int] = []

    def work() -> None:
        for _ in range(20):
            found.append(len(shoal_client.search(films, [1, 0, 0, 0])))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [3] * 160


def test_a_callback_that_calls_its_own_client_is_told(shoal_client, films):
    def progress(_: object) -> None:
        shoal_client.count(films)

    with pytest.raises(RuntimeError, match="wait for itself"):
        shoal_client.upload(films, Batch([9], [[1, 2, 3, 4]]), on_progress=progress)


def test_a_program_that_closes_nothing_ends(server):
    program = f"""
import shoal
client = shoal.Client({server.grpc!r})
print(len(client.list_collections()) >= 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, timeout=60, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("True\n", "")
