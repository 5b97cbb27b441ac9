"""langchain-qdrant's quick-start, unmodified, against a real server.

Left out, because they need searches of level L2: sparse and hybrid retrieval, maximal marginal
relevance. Asking for them must say so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from harness import Server
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import UnexpectedResponse
from words import DIM, TEXTS, embed


@pytest.fixture
def embeddings() -> Any:
    base = pytest.importorskip("langchain_core.embeddings").Embeddings

    class Words(base):  # type: ignore[misc]
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return [embed(text) for text in texts]

        def embed_query(self, text: str) -> list[float]:
            return embed(text)

    return Words()


@pytest.fixture
def documents() -> list[Any]:
    document = pytest.importorskip("langchain_core.documents").Document
    return [document(page_content=text, metadata={"source": s}) for text, s in TEXTS.values()]


@pytest.fixture
def store(client: QdrantClient, collection: str, embeddings: Any, documents: Any) -> Iterator[Any]:
    langchain_qdrant = pytest.importorskip("langchain_qdrant")
    client.create_collection(
        collection_name=collection,
        vectors_config=models.VectorParams(size=DIM, distance=models.Distance.COSINE),
    )
    store = langchain_qdrant.QdrantVectorStore(
        client=client, collection_name=collection, embedding=embeddings
    )
    assert store.add_documents(documents=documents, ids=list(TEXTS)) == list(TEXTS)
    yield store
    client.delete_collection(collection)


def test_search(store: Any) -> None:
    found = store.similarity_search("who stole a million in cash from the bank?", k=2)
    assert found[0].page_content.startswith("Robbers")
    assert found[0].metadata["source"] == "news"
    (best, score), *_ = store.similarity_search_with_score("what weather tomorrow", k=1)
    assert "weather" in best.page_content
    assert 0.1 < score <= 1.0


def test_filtered_search(store: Any) -> None:
    source = models.FieldCondition(key="metadata.source", match=models.MatchValue(value="tweet"))
    found = store.similarity_search(
        "who stole a million in cash from the bank?", k=4, filter=models.Filter(must=[source])
    )
    assert len(found) == 2
    assert {document.metadata["source"] for document in found} == {"tweet"}


def test_retriever(store: Any) -> None:
    retriever = store.as_retriever(
        search_type="similarity_score_threshold", search_kwargs={"k": 1, "score_threshold": 0.2}
    )
    found = retriever.invoke("amazing movie, see it again")
    assert "movie" in found[0].page_content


def test_get_and_delete(store: Any) -> None:
    first, second, *_ = TEXTS
    assert [d.page_content for d in store.get_by_ids([second, first])] == [
        TEXTS[second][0],
        TEXTS[first][0],
    ]
    assert store.delete(ids=[first]) is True  # it looks for the status `completed`
    assert store.get_by_ids([first]) == []


def test_from_documents_and_from_existing(
    server: Server, collection: str, embeddings: Any, documents: Any
) -> None:
    """It makes the collection itself, and checks the configuration of one that is there."""
    langchain_qdrant = pytest.importorskip("langchain_qdrant")
    made = langchain_qdrant.QdrantVectorStore.from_documents(
        documents, embeddings, url=server.url, collection_name=collection
    )
    opened = langchain_qdrant.QdrantVectorStore.from_existing_collection(
        embedding=embeddings, collection_name=collection, url=server.url
    )
    found = opened.similarity_search("pancakes and eggs for breakfast", k=1)
    assert "pancakes" in found[0].page_content
    made.client.delete_collection(collection)
    for used in (made, opened):
        used.client.close()


def test_what_is_not_there_yet_is_refused_clearly(store: Any) -> None:
    with pytest.raises(UnexpectedResponse, match=r"mmr.*not supported"):
        store.max_marginal_relevance_search("news", k=2)
