"""The application as a whole, driven in this process: real catalog and metadata, storage in memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fakes.storage import FakeStorage

from coordinator.app import create_app
from coordinator.service import Coordinator
from shoal.api.models import CreateCollection
from shoal.encoder_api import Embedding, ModelInfo
from shoal.errors import BadRequest, Busy, ShardStopped, StorageFull
from shoal.health import Health, HealthReport
from shoal.limits import BODY_BYTES_MAX
from shoal.metadata.embedded import EmbeddedStore
from shoal.metadata.schema import CollectionRecord, CollectionState, collection_key
from shoal.settings import CoordinatorSettings
from shoal.storage_api import Scroll, ShardInfo

READY = HealthReport(Health.GREEN, True, True, (), (), None, 0.0)
C = "/collections/c"


class LengthEncoder:
    """An encoder whose vector of a text is its length: no model, no waiting."""

    async def encode(
        self, texts: list[str], model: str, fingerprint: str | None = None
    ) -> Embedding:
        if model != "lengths":
            raise BadRequest(f"Wrong input: unknown model {model}; known: lengths")
        vectors = np.array([[len(t), 1, 0, 0] for t in texts], np.float32)
        lengths = np.array([len(t) for t in texts], np.int32)
        return Embedding(vectors, np.minimum(lengths, 8), lengths > 8, "f" * 64)

    async def describe(self) -> list[dict[str, Any]]:
        return []

    def models(self) -> list[ModelInfo]:
        return [ModelInfo("lengths", 4, 8, None)]


class World:
    """One server's parts, and an HTTP client on its application."""

    def __init__(self, store: EmbeddedStore, storage: FakeStorage, **keys: str | None) -> None:
        self.store, self.storage = store, storage
        self.coordinator = Coordinator(
            store=store,
            storage=storage,
            encoder=LengthEncoder(),  # type: ignore[arg-type]
            settings=CoordinatorSettings(),
        )
        app = create_app(
            self.coordinator,
            health=lambda: READY,
            api_key=keys.get("api_key"),
            read_only_api_key=keys.get("read_only_api_key"),
        )
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(app),  # type: ignore[arg-type]
            base_url="http://shoal",
        )

    async def ask(self, method: str, path: str, body: Any = None, status: int = 200) -> Any:
        content = body if isinstance(body, bytes) else None if body is None else json.dumps(body)
        answer = await self.http.request(method, path, content=content)
        assert answer.status_code == status, answer.text
        said = answer.json()
        if status == 200:
            assert said["status"] == "ok"
            return said["result"]
        assert answer.text.startswith('{"status":{"error":"')
        assert said["result"] is None
        return said["status"]["error"]

    async def with_points(self, shards: int = 1, count: int = 6) -> None:
        vectors = {"size": 4, "distance": "Dot"}
        await self.ask("PUT", C, {"vectors": vectors, "shard_number": shards})
        points = [
            {"id": n, "vector": [n, 1, 0, 0], "payload": {"n": n, "s": {"t": [n]}}}
            for n in range(count)
        ]
        await self.ask("PUT", f"{C}/points?wait=true", {"points": points})


Test = Callable[[World], Awaitable[None]]


def run(tmp_path: Path, test: Test, **keys: str | None) -> None:
    async def main() -> None:
        store = await EmbeddedStore.open(tmp_path / "metadata.sqlite")
        try:
            world = World(store, FakeStorage(), **keys)
            await world.coordinator.start()
            async with world.http:
                await test(world)
        finally:
            await store.close()

    asyncio.run(main())


# -- collections ----------------------------------------------------------------------------------
def test_a_collection_comes_shows_its_settings_and_goes(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        request = {
            "vectors": {"a": {"size": 3, "distance": "Cosine", "hnsw_config": {"m": 8}}},
            "sparse_vectors": {"s": {"modifier": "idf"}},
            "hnsw_config": {"ef_construct": 77, "new_knob": 1},
            "quantization_config": {"scalar": {"type": "int8"}},
            "metadata": {"owner": None},
            "shard_number": 2,
        }
        assert await world.ask("PUT", C, request) is True
        assert "already exists" in await world.ask("PUT", C, request, 409)
        shown = await world.ask("GET", C)
        params = shown["config"]["params"]
        assert params["vectors"] == request["vectors"]
        assert params["sparse_vectors"] == request["sparse_vectors"]
        assert params["shard_number"] == 2
        assert shown["config"]["hnsw_config"]["ef_construct"] == 77
        assert shown["config"]["hnsw_config"]["new_knob"] == 1
        assert shown["config"]["hnsw_config"]["m"] > 0
        assert shown["config"]["quantization_config"] == request["quantization_config"]
        assert shown["config"]["metadata"] == {"owner": None}
        specs = world.coordinator.shard_specs()
        assert [spec.dense["a"].hnsw_m for spec in specs] == [8, 8]
        assert specs[0].dense["a"].hnsw_ef_construct == 77
        assert await world.ask("GET", "/collections") == {"collections": [{"name": "c"}]}
        assert await world.ask("GET", f"{C}/exists") == {"exists": True}
        assert await world.ask("DELETE", C) is True
        assert await world.ask("DELETE", C) is False
        assert not world.storage.shards
        assert await world.ask("GET", f"{C}/exists") == {"exists": False}
        assert "doesn't exist!" in await world.ask("GET", C, status=404)

    run(tmp_path, test)


def test_collections_survive_a_restart_and_ids_are_not_used_twice(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.with_points(shards=2)
        await world.ask("PUT", f"{C}/index", {"field_name": "n", "field_schema": "integer"})
        again = World(world.store, world.storage)
        await again.coordinator.start()
        async with again.http:
            assert again.coordinator.shard_specs() == world.coordinator.shard_specs()
            shown = await again.ask("GET", C)
            assert shown["payload_schema"] == {"n": {"data_type": "integer", "points": 6}}
            await again.ask("DELETE", f"{C}/index/n")
            assert (await again.ask("GET", C))["payload_schema"] == {}
            ids = {spec.key.collection_id for spec in again.coordinator.shard_specs()}
            await again.ask("DELETE", C)
            await again.ask("PUT", C, {"vectors": {"size": 2, "distance": "Dot"}})
            assert not ids & {spec.key.collection_id for spec in again.coordinator.shard_specs()}

    run(tmp_path, test)


def test_a_creation_that_fails_or_never_ended_leaves_nothing(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        request = {"vectors": {"size": 2, "distance": "Dot"}}
        world.storage.error = StorageFull("the disk is full")
        assert "disk is full" in await world.ask("PUT", C, request, 507)
        world.storage.error = None
        entries, _ = await world.store.range("collections/")
        assert entries == []
        half = CollectionRecord(
            id=99, name="half", state=CollectionState.CREATING, shard_number=1, config=request
        )
        await world.store.txn([], {collection_key("half"): half.to_bytes()})
        again = World(world.store, world.storage)
        await again.coordinator.start()
        await again.http.aclose()
        assert again.coordinator.shard_specs() == []
        assert await world.store.get(collection_key("half")) is None
        await world.ask("PUT", C, request)

    run(tmp_path, test)


def test_state_follows_the_shards(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.with_points(shards=2)
        assert (await world.ask("GET", C))["status"] == "green"
        one = world.coordinator.shard_specs()[1].key
        world.storage.info_overrides[one] = ShardInfo(points=3, pending=2)
        assert (await world.ask("GET", C))["status"] == "yellow"
        world.storage.info_overrides[one] = ShardInfo(stopped="log 3 is damaged at 17")
        shown = await world.ask("GET", C)
        assert shown["status"] == "red"
        assert shown["optimizer_status"] == {"error": "log 3 is damaged at 17"}

    run(tmp_path, test)


def test_a_write_that_one_shard_refuses_says_that_others_applied_it(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.with_points(shards=2, count=1)
        points = [{"id": n, "vector": [n, 1, 0, 0]} for n in range(40)]
        world.storage.full = {1}
        said = await world.ask("PUT", f"{C}/points?wait=true", {"points": points}, 507)
        assert "1 of 2 shards have applied their part: send the whole request again" in said
        world.storage.full = {0, 1}
        said = await world.ask("PUT", f"{C}/points?wait=true", {"points": points}, 507)
        assert "applied their part" not in said
        world.storage.full = set()
        await world.ask("PUT", f"{C}/points?wait=true", {"points": points})
        assert (await world.ask("POST", f"{C}/points/count", {}))["count"] == 40

    run(tmp_path, test)


def test_a_change_of_the_catalog_ends_also_when_its_caller_gives_up(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        catalog = world.coordinator.catalog
        request = CreateCollection.model_validate_json('{"vectors":{"size":4,"distance":"Dot"}}')

        async def give_up(change: Coroutine[Any, Any, Any]) -> None:
            task = asyncio.create_task(change)
            await asyncio.sleep(0)  # it has begun
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await world.coordinator.close()

        await give_up(catalog.create("kept", request))
        assert catalog.exists("kept")
        await give_up(catalog.set_index("kept", "f", {"type": "keyword"}))
        assert list(catalog.get("kept").record.payload_schema) == ["f"]
        await give_up(catalog.delete("kept"))
        assert not catalog.exists("kept")
        await world.ask("PUT", "/collections/kept", {"vectors": {"size": 4, "distance": "Dot"}})

    run(tmp_path, test)


# -- points ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("shards", [1, 3])
def test_reads(tmp_path: Path, shards: int) -> None:
    async def test(world: World) -> None:
        await world.with_points(shards)
        body = {"query": [1, 0, 0, 0], "limit": 2, "offset": 1, "with_payload": ["s.t"]}
        found = (await world.ask("POST", f"{C}/points/query", body))["points"]
        assert [(p["id"], p["score"]) for p in found] == [(4, 4.0), (3, 3.0)]
        assert found[0]["payload"] == {"s": {"t": [4]}}
        near = {"query": 5, "limit": 1, "with_vector": True}
        found = (await world.ask("POST", f"{C}/points/query", near))["points"]
        assert (found[0]["id"], found[0]["vector"]) == (4, [4.0, 1.0, 0.0, 0.0])
        few = {"query": {"nearest": [1, 0, 0, 0]}, "score_threshold": 3.5}
        assert len((await world.ask("POST", f"{C}/points/query", few))["points"]) == 2
        few["score_threshold"] = 4.0  # only better scores
        assert len((await world.ask("POST", f"{C}/points/query", few))["points"]) == 1
        endless = b'{"query":[1,0,0,0],"score_threshold":1' + b"0" * 400 + b"}"
        assert "score_threshold" in await world.ask("POST", f"{C}/points/query", endless, 422)
        await world.ask("POST", f"{C}/points/query", {"using": "nope"}, 400)
        text = {"query": {"text": "abc", "model": "lengths"}, "limit": 1}
        assert (await world.ask("POST", f"{C}/points/query", text))["points"][0]["score"] == 16.0
        none = {"limit": 2, "offset": 3, "with_payload": {"exclude": ["s"]}}
        found = (await world.ask("POST", f"{C}/points/query", none))["points"]
        assert [(p["id"], p["payload"]) for p in found] == [(3, {"n": 3}), (4, {"n": 4})]

        seen: list[int] = []
        at: int | None = 0
        while at is not None:
            page = await world.ask("POST", f"{C}/points/scroll", {"limit": 4, "offset": at})
            seen += [p["id"] for p in page["points"]]
            at = page["next_page_offset"]
        assert seen == [0, 1, 2, 3, 4, 5]
        found = await world.ask("POST", f"{C}/points", {"ids": [4, 9, 0, 4], "with_payload": False})
        assert found == [{"id": 4}, {"id": 0}, {"id": 4}]
        point = await world.ask("GET", f"{C}/points/2")
        assert point == {"id": 2, "payload": {"n": 2, "s": {"t": [2]}}, "vector": [2, 1, 0, 0]}
        assert "id 77 found" in await world.ask("GET", f"{C}/points/77", status=404)
        some = {"filter": {"must": [{"key": "n", "range": {"gte": 4}}]}, "exact": False}
        assert await world.ask("POST", f"{C}/points/count", some) == {"count": 2}

    run(tmp_path, test)


@pytest.mark.parametrize("shards", [1, 3])
def test_writes(tmp_path: Path, shards: int) -> None:
    async def test(world: World) -> None:
        await world.with_points(shards)
        path = f"{C}/points"
        said = await world.ask("POST", f"{path}/payload", {"payload": {"x": 1}, "points": [1]})
        assert said["status"] == "acknowledged"
        missing = {"payload": {"x": 2}, "points": [8, 0, 7, 5]}
        assert "No point with id 8" in await world.ask(
            "POST", f"{path}/payload?wait=true", missing, 404
        )
        found = await world.ask("POST", path, {"ids": [0, 1, 5], "with_payload": ["x"]})
        assert [p["payload"] for p in found] == [{"x": 2}, {"x": 1}, {"x": 2}]
        await world.ask("PUT", f"{path}/payload", {"payload": {"y": 1}, "points": [0]})
        by_filter = {"keys": ["x"], "filter": {"must": [{"key": "x", "match": {"value": 1}}]}}
        await world.ask("POST", f"{path}/payload/delete", by_filter)
        await world.ask("POST", f"{path}/payload/clear", {"points": [5]})
        found = await world.ask("POST", path, {"ids": [0, 1, 5]})
        assert [p["payload"] for p in found] == [{"y": 1}, {"n": 1, "s": {"t": [1]}}, {}]
        await world.ask("PUT", f"{path}/vectors", {"points": [{"id": 2, "vector": [9, 9, 9, 9]}]})
        await world.ask("POST", f"{path}/vectors/delete", {"points": [3], "vector": [""]})
        found = await world.ask("POST", path, {"ids": [2, 3], "with_vector": True})
        assert [p["vector"] for p in found] == [[9, 9, 9, 9], {}]
        await world.ask("POST", f"{path}/delete", {"points": [1, 99]})
        only_new = {
            "points": [{"id": n, "vector": [0, 0, 0, n]} for n in (0, 50)],
            "update_mode": "insert_only",
        }
        await world.ask("PUT", path, only_new)
        assert (await world.ask("GET", f"{path}/0"))["payload"] == {"y": 1}
        assert await world.ask("POST", f"{path}/count", {}) == {"count": 6}
        text = {"points": [{"id": 60, "vector": {"text": "four", "model": "lengths"}}]}
        await world.ask("PUT", path, text)
        assert (await world.ask("GET", f"{path}/60"))["vector"] == [4, 1, 0, 0]

    run(tmp_path, test)


def test_a_batch_with_one_wrong_operation_changes_nothing(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.with_points()
        good = {"delete": {"points": [1]}}
        bad = {"upsert": {"points": [{"id": 1, "vector": {"text": "a", "model": "unknown"}}]}}
        path = f"{C}/points/batch?wait=true"
        assert "unknown model" in await world.ask("POST", path, {"operations": [good, bad]}, 400)
        assert await world.ask("POST", f"{C}/points/count", {}) == {"count": 6}
        said = await world.ask("POST", path, {"operations": [good, good]})
        assert [one["status"] for one in said] == ["completed", "completed"]

    run(tmp_path, test)


def test_serialized_batches_and_embedding(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.with_points(shards=2)
        key = world.coordinator.shard_specs()[0].key
        points = await world.storage.scroll(key, Scroll(limit=10, with_vectors=True))
        body = points.to_wire().SerializeToString()
        path = "/shoal/v1/collections/c/batches?wait=true"
        said = await world.ask("PUT", path, body)
        assert said["points"] == len(points)
        assert said["status"] == "completed"
        assert "PointBatch" in await world.ask("PUT", path, b"\xff\xff", 400)
        embedded = await world.ask("POST", "/shoal/v1/embed", {"texts": ["ab"], "model": "lengths"})
        assert embedded["vectors"] == [[2.0, 1.0, 0.0, 0.0]]
        status = await world.ask("GET", "/shoal/v1/status")
        assert status["collections"][0]["name"] == "c"
        assert status["models"][0]["name"] == "lengths"

    run(tmp_path, test)


# -- the way in -----------------------------------------------------------------------------------
def test_keys(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.ask("GET", "/collections", status=401)
        world.http.headers["api-key"] = "wrong"
        await world.ask("POST", f"{C}/points/query", {}, status=401)
        assert (await world.http.get("/healthz")).status_code == 200
        assert (await world.http.get("/")).json()["version"] == "1.19.0"
        world.http.headers["api-key"] = "reader"
        await world.ask("GET", "/collections")
        await world.ask("PUT", f"{C}/points", {}, status=403)
        await world.ask("POST", f"{C}/points/query", {}, status=404)
        del world.http.headers["api-key"]
        world.http.headers["authorization"] = "Bearer writer"
        await world.ask("PUT", C, {"vectors": {"size": 2, "distance": "Dot"}})

    run(tmp_path, test, api_key="writer", read_only_api_key="reader")


def test_errors_have_one_shape(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.with_points()
        await world.ask("GET", "/nowhere", status=404)
        await world.ask("DELETE", f"{C}/points/query", status=405)
        assert "not supported" in (await world.ask("POST", f"{C}/facet", {}, 501)).lower()
        await world.ask("POST", f"{C}/points/query", b"{", status=400)
        await world.ask("POST", f"{C}/points/query", {"limit": 0}, status=422)
        await world.ask("POST", f"{C}/points/query?timeout=0", {}, status=400)
        await world.ask("PUT", f"{C}/points?wait=perhaps", {}, status=400)
        await world.ask("PUT", f"{C}/points", b" " * (BODY_BYTES_MAX + 1), status=413)
        world.storage.error = Busy("the log is full: wait", retry_after_s=2.5)
        answer = await world.http.post(f"{C}/points/count", json={})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
        world.storage.error = ShardStopped("segment 3 is damaged")
        await world.ask("POST", f"{C}/points/query", {"query": [1, 2, 3, 4]}, status=503)
        world.storage.error = RuntimeError("secret detail")
        said = await world.ask("POST", f"{C}/points/scroll", {}, status=500)
        assert "secret detail" not in said

    run(tmp_path, test)


def test_a_request_that_takes_too_long_gets_408(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.with_points()

        async def never(*_: object) -> int:
            await asyncio.Event().wait()
            return 0

        world.storage.count = never  # type: ignore[method-assign]
        said = await world.ask("POST", f"{C}/points/count?timeout=1", {}, status=408)
        assert "longer than 1 s" in said

    run(tmp_path, test)


def test_names_are_percent_encoded(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        body = {"vectors": {"size": 2, "distance": "Dot"}}
        await world.ask("PUT", "/collections/a%20b%25", body)
        assert await world.ask("POST", "/collections/a%20b%25/points/count", {}) == {"count": 0}
        assert await world.ask("POST", "/collections/a%20b%25/points/scroll", {}) == {
            "points": [],
            "next_page_offset": None,
        }
        await world.ask("PUT", "/collections/a%2Fb", body, status=404)
        await world.ask("POST", "/collections/a%2Fb/points/query", {}, status=404)
        field = {"field_name": "a.b[]", "field_schema": {"type": "keyword", "is_tenant": True}}
        await world.ask("PUT", "/collections/a%20b%25/index", field)
        assert "a.b[]" in (await world.ask("GET", "/collections/a%20b%25"))["payload_schema"]
        await world.ask("DELETE", "/collections/a%20b%25/index/a.b%5B%5D")
        assert (await world.ask("GET", "/collections/a%20b%25"))["payload_schema"] == {}

    run(tmp_path, test)


def test_the_document_describes_every_route_and_resolves(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        document = (await world.http.get("/openapi.json")).json()
        names = {op["operationId"] for path in document["paths"].values() for op in path.values()}
        assert {"query_points", "upsert_points", "create_collection", "put_batch"} <= names

        def references(node: Any) -> set[str]:
            if isinstance(node, dict):
                own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
                return own.union(*map(references, node.values()))
            return set().union(*map(references, node)) if isinstance(node, list) else set()

        for reference in references(document):
            assert (
                reference.removeprefix("#/components/schemas/") in document["components"]["schemas"]
            )
        metrics = (await world.http.get("/metrics")).text
        assert "shoal_requests_total" in metrics
        assert (await world.http.get("/readyz")).status_code == 200

    run(tmp_path, test)
