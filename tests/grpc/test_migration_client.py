"""A live collection changes its model, and all of it is asked for by Shoal's own client. The end of a
drop, which is some seconds away, is waited for in tests/http/test_migration_live.py."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from harness import Server
from migration_load import APART_MAX, DIMS, TwoModels, some_text

from shoal.client import AsyncClient, Client, CompareQuery, MigratedModel, Texts, VectorParams
from shoal.errors import BadRequest, Forbidden, InvalidField, NotFound, ShoalError, TimedOut
from shoal.ranking import bootstrap_mean, ndcg, overlap

SEED = 1
A_UUID = "0b6a1c58-6d0e-4f8b-9a53-3f1a5a1d9c11"
IDS: list[int | str] = [*range(1, 60), A_UUID]
K = 5


@pytest.fixture(scope="module")
def meant(tmp_path_factory: pytest.TempPathFactory) -> TwoModels:
    return TwoModels(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def shared_server(meant: TwoModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One with two models and two keys, in place of the one that all tests share."""
    keys = {"api_key": "gold", "read_only_api_key": "silver"}
    server = Server(
        tmp_path_factory.mktemp("models") / "data",
        settings={"seal_bytes": 65_536, **keys, **meant.settings},
    )
    try:
        yield server.start()
        assert server.stop() == 0, server.log_tail()
    finally:
        server.kill9()


@pytest.fixture
def texts() -> list[str]:
    print("seed", SEED)
    dice = random.Random(SEED)
    return [some_text(dice) for _ in IDS]


@pytest.fixture
def gold(server: Server) -> Iterator[Client]:
    with Client(server.grpc, api_key="gold") as client:
        yield client


@pytest.fixture
def notes(gold: Client, collection: str, texts: list[str]) -> str:
    """Points with numbers of the old model, and without a word whose they are."""
    gold.create_collection(collection, VectorParams(DIMS["old"], "Dot"), shard_number=2)
    payloads = [{"text": text, "row": row} for row, text in enumerate(texts)]
    gold.upsert(collection, IDS, Texts(texts, "old"), payloads)
    return collection


def best(meant: TwoModels, model: str, texts: list[str], query: str) -> list[int | str]:
    """Ids of the K best, exactly."""
    scores = np.stack([meant.vector(model, text) for text in texts]) @ meant.vector(model, query)
    return [IDS[row] for row in np.argsort(-scores)[:K]]


def is_of(meant: TwoModels, model: str, client: Client, collection: str, query: str) -> bool:
    hits = client.search(collection, text=query, limit=1, with_vectors=True, with_payload=True)
    vector = meant.vector(model, (hits[0].payload or {})["text"])
    return (
        hits.vectors.shape[1] == len(vector) and np.abs(hits.vectors[0] - vector).max() < APART_MAX
    )


def test_a_whole_change_of_model(
    gold: Client, notes: str, texts: list[str], meant: TwoModels
) -> None:
    change = gold.migration(notes)
    begun = change.start("new", "text", current_model="old", points_per_second=0)
    assert (begun.phase, begun.switched, begun.complete) == ("preparing", False, False)
    assert (begun.current.model, begun.other.model) == ("old", "new")
    assert (begun.current.size, begun.other.size) == (DIMS["old"], DIMS["new"])
    assert begun.text_field == "text"
    assert begun.points_per_second_max == 0
    assert begun.started_at.tzinfo is not None
    assert (begun.points, begun.left, begun.error, begun.copied) == (None, None, None, False)
    with pytest.raises(TimedOut, match=f"{len(IDS)} points of `{notes}` still lack"):
        change.wait(timeout_s=0.3)
    assert change.start("new", "text", points_per_second=1_000).points_per_second_max == 1_000
    assert change.start("new", "text").points_per_second_max == 1_000
    assert change.start("new", "text", points_per_second=float("inf")).points_per_second_max is None
    status = change.wait(timeout_s=60)
    assert (status.points, status.done, status.left, status.only_other) == (60, 60, 0, 0)
    assert not status.without_text
    assert status.copied

    compare(gold, notes, texts, meant)
    assert is_of(meant, "old", gold, notes, "word1 word2")
    switched = change.switch()
    assert (switched.switched, switched.complete) == (True, True)
    assert switched.current == MigratedModel("new", begun.other.fingerprint, DIMS["new"])
    assert is_of(meant, "new", gold, notes, "word1 word2")
    assert gold.search(notes, text=texts[7], model="old").ids[0] == IDS[7]
    assert change.rollback().current.model == "old"
    assert is_of(meant, "old", gold, notes, "word1 word2")
    change.switch()
    change.wait(timeout_s=60)
    dropping = change.drop(begun.current.fingerprint or "")
    assert (dropping.phase, dropping.copied) == ("dropping", False)  # for ten seconds and more
    with pytest.raises(BadRequest, match="its vectors are being removed"):
        change.rollback()
    assert is_of(meant, "new", gold, notes, "word1 word2")
    assert gold.get_collection(notes).vectors[""].size == DIMS["new"]


def compare(client: Client, notes: str, texts: list[str], meant: TwoModels) -> None:
    """What both models answer, against what they must answer."""
    asked = [*texts[:12], texts[-1]]
    queries = [
        CompareQuery(text, relevant={IDS[row]: 1.5, 99: 1}) for row, text in enumerate(texts)
    ]
    given = [*queries[:12], queries[-1]]
    found = client.migration(notes).compare(given, limit=K, exact=True)
    old, new = ([best(meant, model, texts, text) for text in asked] for model in DIMS)
    shared = [overlap(_keys(one), _keys(other)) for one, other in zip(old, new, strict=True)]
    assert (found.current, found.other, found.source) == ("old", "new", "given")
    assert (found.limit, found.queries, found.left) == (K, 13, 0)
    assert found.overlap == bootstrap_mean(np.array(shared), SEED)
    gains = [{hash(id_): gain for id_, gain in (q.relevant or {}).items()} for q in given]
    then, now = (
        np.array([ndcg(_keys(ids), gain, K) for ids, gain in zip(answers, gains, strict=True)])
        for answers in (new, old)
    )
    assert found.ndcg is not None
    assert found.ndcg.queries == 13
    assert found.ndcg.current == bootstrap_mean(now, SEED)
    assert found.ndcg.other == bootstrap_mean(then, SEED)
    assert found.ndcg.gain == bootstrap_mean(then - now, SEED)
    assert len(found.most_different) == 10
    assert [one.overlap for one in found.most_different] == sorted(shared)[:10]
    for one in found.most_different:
        assert one.current == best(meant, "old", texts, one.text)
        assert one.other == best(meant, "new", texts, one.text)

    only = {"must": [{"key": "row", "range": {"lt": 3}}]}
    found = client.migration(notes).compare(["word1", CompareQuery("word2", filter=only)])
    assert (found.limit, found.queries, found.ndcg) == (10, 2, None)
    filtered = next(one for one in found.most_different if one.text == "word2")
    assert sorted(map(str, filtered.current)) == sorted(map(str, filtered.other)) == ["1", "2", "3"]


def _keys(ids: list[int | str]) -> list[int]:
    return [hash(id_) for id_ in ids]


def test_on_an_event_loop_given_up(server: Server, notes: str) -> None:
    async def main() -> None:
        async with AsyncClient(server.grpc, api_key="gold") as client:
            change = client.migration(notes)
            await change.start("new", "text", current_model="old")
            assert (await change.wait(timeout_s=60)).recorded_queries == 0
            with pytest.raises(BadRequest, match="has seen no text queries"):
                await change.compare()
            with pytest.raises(InvalidField, match="at least 1 item"):
                await change.compare([])  # others' queries are not what was asked for
            await client.search(notes, text="word1 word2")
            compared = await change.compare(limit=3)
            assert (compared.source, compared.queries) == ("recorded", 1)
            assert (await change.status()).recorded_queries == 1
            assert (await change.drop("new")).phase == "dropping"

    asyncio.run(main())


def test_a_point_without_a_text(gold: Client, notes: str) -> None:
    gold.upsert(notes, [77], Texts(["word1"], "old"))
    change = gold.migration(notes)
    change.start("new", "text", current_model="old")
    status = change.wait(timeout_s=60)
    assert (status.points, status.left, status.without_text) == (61, 1, 1)
    assert status.copied_by
    with pytest.raises(BadRequest, match="1 points have no vector of new"):
        change.switch()
    assert change.switch(allow_missing=True).current.model == "new"
    assert change.wait(timeout_s=60).only_other == 1
    with pytest.raises(BadRequest, match="1 points have a vector of old only"):
        change.drop("old")
    assert change.drop("old", allow_missing=True).phase == "dropping"


def test_what_is_refused_is_refused_as_over_http(server: Server, gold: Client, notes: str) -> None:
    headers = {"api-key": "gold"}
    with server.http(headers=headers) as http:

        def over_http(action: str, body: Any, vector: str = "-") -> tuple[int, str]:
            path = f"/collections/{notes}/vectors/{vector}/migrate{action}"
            answer = http.post(path, json=body)
            return answer.status_code, answer.json()["status"]["error"]

        change, other = gold.migration(notes), gold.migration(notes, "x")
        begin = {"model": "new", "text_field": "text"}
        for call, (status, message) in (
            (lambda: change.start("new", "text"), over_http("", begin)),
            (
                lambda: change.start("best", "text", current_model="old"),
                over_http("", begin | {"model": "best", "current_model": "old"}),
            ),
            (
                lambda: change.start("new", "text", points_per_second=-1),
                over_http("", begin | {"points_per_second": -1}),
            ),
            (lambda: change.start("new", "a..b"), over_http("", begin | {"text_field": "a..b"})),
            (lambda: change.start("", "text"), over_http("", begin | {"model": ""})),
            (lambda: other.start("new", "text"), over_http("", begin, vector="x")),
            (change.switch, over_http("/switch", {})),
            (change.rollback, over_http("/rollback", {})),
            (lambda: change.drop("x" * 2_000), over_http("/drop", {"model": "x" * 2_000})),
            (lambda: change.compare(["a"]), over_http("/compare", {"queries": [{"text": "a"}]})),
            (lambda: change.compare([""]), over_http("/compare", {"queries": [{"text": ""}]})),
            (lambda: change.compare(["a"], limit=2_000), over_http("/compare", {"limit": 2_000})),
        ):
            with pytest.raises(ShoalError) as caught:
                call()
            assert (caught.value.status_code, caught.value.message) == (status, message)
    with pytest.raises(BadRequest, match="limit must be at least 1"):
        change.compare(["a"], limit=0)
    for call in (
        lambda: gold.migration("moon").start("new", "text"),
        lambda: gold.migration("moon").status(),
    ):
        with pytest.raises(NotFound, match="`moon` doesn't exist"):
            call()


def test_the_key_that_may_only_read(server: Server, gold: Client, notes: str) -> None:
    gold.migration(notes).start("new", "text", current_model="old", points_per_second=0)
    with Client(server.grpc, api_key="silver") as client:
        change = client.migration(notes)
        assert change.status().points == len(IDS)
        for call in (
            lambda: change.start("new", "text"),
            lambda: change.compare(["a"]),
            change.switch,
            change.rollback,
            lambda: change.drop("new"),
        ):
            with pytest.raises(Forbidden, match="may only read"):
                call()
