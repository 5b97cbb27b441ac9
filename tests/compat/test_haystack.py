"""qdrant-haystack's quick-start, unmodified, against a real server.

Left out: sparse and hybrid retrieval and grouping, which are searches of level L2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from harness import Server
from words import DIM, TEXTS, embed


@pytest.fixture
def store(server: Server, collection: str) -> Iterator[Any]:
    package = pytest.importorskip("haystack_integrations.document_stores.qdrant")
    haystack = pytest.importorskip("haystack")
    store = package.QdrantDocumentStore(
        url=server.url,
        index=collection,
        embedding_dim=DIM,
        recreate_index=True,
        return_embedding=True,
        wait_result_from_api=True,
        payload_fields_to_index=[{"field_name": "meta.source", "field_schema": "keyword"}],
    )
    documents = [
        haystack.Document(
            id=id_, content=text, meta={"source": source, "words": len(text.split())},
            embedding=embed(text),
        )
        for id_, (text, source) in TEXTS.items()
    ]  # fmt: skip
    assert store.write_documents(documents) == len(TEXTS)
    yield store
    store.close()


def test_documents(store: Any) -> None:
    assert store.count_documents() == len(TEXTS)
    found = store.filter_documents()
    assert {document.content for document in found} == {text for text, _ in TEXTS.values()}
    first = next(iter(TEXTS))
    [document] = store.get_documents_by_id([first])
    assert document.id == first
    assert document.embedding == pytest.approx(embed(TEXTS[first][0]), abs=1e-6)


def test_retriever(store: Any) -> None:
    package = pytest.importorskip("haystack_integrations.components.retrievers.qdrant")
    retriever = package.QdrantEmbeddingRetriever(document_store=store, top_k=2)
    found = retriever.run(query_embedding=embed("who stole a million in cash from the bank?"))[
        "documents"
    ]
    assert found[0].content.startswith("Robbers")
    assert len(found) == 2


def test_filters(store: Any) -> None:
    news = {"field": "meta.source", "operator": "==", "value": "news"}
    long = {"field": "meta.words", "operator": ">", "value": 12}
    assert len(store.filter_documents(filters=news)) == 2
    both = {"operator": "AND", "conditions": [news, long]}
    assert [d.meta["words"] for d in store.filter_documents(filters=both)] == [15]
    without = {"operator": "NOT", "conditions": [news]}
    assert {d.meta["source"] for d in store.filter_documents(filters=without)} == {"tweet"}
    assert store.count_documents_by_filter(filters=news) == 2


def test_duplicates_updates_and_deletion(store: Any) -> None:
    haystack = pytest.importorskip("haystack")
    types = pytest.importorskip("haystack.document_stores.types")
    errors = pytest.importorskip("haystack.document_stores.errors")
    first = next(iter(TEXTS))
    again = haystack.Document(id=first, content="new words", embedding=embed("new words"))
    with pytest.raises(errors.DuplicateDocumentError):
        store.write_documents([again], policy=types.DuplicatePolicy.FAIL)
    store.write_documents([again], policy=types.DuplicatePolicy.OVERWRITE)
    assert store.get_documents_by_id([first])[0].content == "new words"
    news = {"field": "meta.source", "operator": "==", "value": "news"}
    assert store.update_by_filter(filters=news, meta={"seen": True}) == 2
    seen = {"field": "meta.seen", "operator": "==", "value": True}
    assert store.count_documents_by_filter(filters=seen) == 2
    assert store.delete_by_filter(filters=news) == 2
    store.delete_documents([first])
    assert store.count_documents() == 1
