"""mem0's Qdrant store, unmodified, against a real server.

The store alone: mem0's `Memory` on top of it needs a language model. Its keyword search is sparse
search (level L2) and needs fastembed besides; without fastembed mem0 leaves it out by itself. Its
batch search asks for `query/batch` and falls back to single queries where that is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from harness import Server
from words import DIM, TEXTS, embed

IDS = list(TEXTS)


@pytest.fixture
def store(server: Server, collection: str) -> Iterator[Any]:
    module = pytest.importorskip("mem0.vector_stores.qdrant")
    store = module.Qdrant(collection_name=collection, embedding_model_dims=DIM, url=server.url)
    store.insert(
        vectors=[embed(text) for text, _ in TEXTS.values()],
        payloads=[
            {
                "data": text,
                "user_id": source,
                "rank": rank,
                "created_at": f"2024-06-1{rank}T08:00:00Z",
            }
            for rank, (text, source) in enumerate(TEXTS.values())
        ],
        ids=IDS,
    )
    yield store
    store.delete_col()
    store.client.close()


def test_search(store: Any) -> None:
    question = "who stole a million in cash from the bank?"
    found = store.search(query=question, vectors=embed(question), top_k=2)
    assert found[0].id == IDS[2]
    assert found[0].payload["data"].startswith("Robbers")
    own = store.search(query=question, vectors=embed(question), filters={"user_id": "tweet"})
    assert {hit.payload["user_id"] for hit in own} == {"tweet"}


def test_filters(store: Any) -> None:
    def ranks(filters: dict[str, Any]) -> list[int]:
        points, _ = store.list(filters=filters)
        return sorted(point.payload["rank"] for point in points)

    assert ranks({"rank": {"gte": 1, "lte": 2}}) == [1, 2]
    assert ranks({"user_id": {"in": ["news", "nobody"]}}) == [1, 2]
    assert ranks({"user_id": {"nin": ["news"]}}) == [0, 3]
    assert ranks({"user_id": {"ne": "news"}}) == [0, 3]
    assert ranks({"data": {"contains": "movie"}}) == [3]
    assert ranks({"created_at": {"gt": "2024-06-11T00:00:00Z"}}) == [1, 2, 3]
    assert ranks({"OR": [{"rank": 0}, {"rank": 3}]}) == [0, 3]


def test_get_update_delete(store: Any) -> None:
    assert store.get(IDS[0]).payload["rank"] == 0
    store.update(IDS[0], payload={"rank": 7})
    assert store.get(IDS[0]).payload["rank"] == 7
    assert store.get(IDS[0]).payload["user_id"] == "tweet"
    store.update(IDS[0], vector=embed("a bank"), payload={"data": "all new"})
    assert store.get(IDS[0]).payload == {"data": "all new"}
    store.delete(IDS[0])
    assert store.get(IDS[0]) is None


def test_batch_search(store: Any) -> None:
    questions = ["bank and cash", "weather tomorrow"]
    found = store.search_batch(questions, [embed(q) for q in questions], top_k=1)
    assert [hits[0].id for hits in found] == [IDS[2], IDS[1]]


def test_collections(store: Any, server: Server) -> None:
    assert store.collection_name in [c.name for c in store.list_cols().collections]
    assert store.col_info().config.params.vectors.size == DIM
    assert "bm25" in store.col_info().config.params.sparse_vectors
    assert set(store.col_info().payload_schema) == {"user_id", "agent_id", "run_id", "actor_id"}
    module = pytest.importorskip("mem0.vector_stores.qdrant")
    again = module.Qdrant(
        collection_name=store.collection_name, embedding_model_dims=DIM, url=server.url
    )
    assert len(again.list()[0]) == len(TEXTS)
    again.client.close()
    store.reset()
    assert store.list()[0] == []
