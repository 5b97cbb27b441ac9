"""llama-index-vector-stores-qdrant's quick-start, unmodified, against a real server.

Left out: hybrid search, which asks for sparse search and query batches (level L2).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from qdrant_client import QdrantClient
from words import TEXTS, embed


@pytest.fixture
def embed_model() -> Any:
    base = pytest.importorskip("llama_index.core.embeddings").BaseEmbedding

    class Words(base):  # type: ignore[misc]
        def _get_text_embedding(self, text: str) -> list[float]:
            return embed(text)

        def _get_query_embedding(self, query: str) -> list[float]:
            return embed(query)

        async def _aget_query_embedding(self, query: str) -> list[float]:
            return embed(query)

    return Words()


@pytest.fixture
def store(client: QdrantClient, collection: str) -> Iterator[Any]:
    package = pytest.importorskip("llama_index.vector_stores.qdrant")
    yield package.QdrantVectorStore(client=client, collection_name=collection)
    client.delete_collection(collection)


@pytest.fixture
def index(store: Any, embed_model: Any) -> Any:
    core = pytest.importorskip("llama_index.core")
    documents = [
        core.Document(text=text, doc_id=id_, metadata={"source": source})
        for id_, (text, source) in TEXTS.items()
    ]
    context = core.StorageContext.from_defaults(vector_store=store)
    return core.VectorStoreIndex.from_documents(
        documents, storage_context=context, embed_model=embed_model
    )


def test_retrieve(index: Any) -> None:
    found = index.as_retriever(similarity_top_k=2).retrieve(
        "who stole a million in cash from the bank?"
    )
    assert len(found) == 2
    assert found[0].node.text.startswith("Robbers")
    assert found[0].score > found[1].score


def test_metadata_filters(index: Any) -> None:
    types = pytest.importorskip("llama_index.core.vector_stores")
    filters = types.MetadataFilters(filters=[types.MetadataFilter(key="source", value="tweet")])
    found = index.as_retriever(similarity_top_k=4, filters=filters).retrieve("bank in cash")
    assert {node.node.metadata["source"] for node in found} == {"tweet"}
    assert len(found) == 2
    filters = types.MetadataFilters(
        filters=[
            types.MetadataFilter(key="source", value=["tweet"], operator=types.FilterOperator.NIN)
        ]
    )
    found = index.as_retriever(similarity_top_k=4, filters=filters).retrieve("bank in cash")
    assert {node.node.metadata["source"] for node in found} == {"news"}


def test_nodes_and_deletion(index: Any, store: Any, client: QdrantClient, collection: str) -> None:
    first = next(iter(TEXTS))
    assert len(store.get_nodes(limit=10)) == len(TEXTS)
    index.delete_ref_doc(first)
    assert client.count(collection).count == len(TEXTS) - 1
    found = index.as_retriever(similarity_top_k=4).retrieve("pancakes and eggs")
    assert all("pancakes" not in node.node.text for node in found)


def test_an_existing_collection_is_used_again(
    index: Any, client: QdrantClient, collection: str, embed_model: Any
) -> None:
    core = pytest.importorskip("llama_index.core")
    package = pytest.importorskip("llama_index.vector_stores.qdrant")
    again = package.QdrantVectorStore(client=client, collection_name=collection)
    opened = core.VectorStoreIndex.from_vector_store(again, embed_model=embed_model)
    found = opened.as_retriever(similarity_top_k=1).retrieve("weather forecast for tomorrow")
    assert "weather" in found[0].node.text
