"""Changing the model of a vector: one coordinator, real shards, two small models.

A vector says whose it is: the first number of every vector of the old model is 1, of the new one -1.
So a vector of one model among those of the other is seen at once.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from coordinator.app import create_app
from coordinator.grpc_calls import CALLS
from coordinator.router import LocalNodes, Router
from coordinator.service import Coordinator
from shoal import limits
from shoal.batch import PointBatch
from shoal.encoder_api import Embedding, ModelInfo, resolve_model, wrong_weights
from shoal.errors import Busy, ShoalError, Unavailable
from shoal.health import Health, HealthReport
from shoal.ids import PointIds
from shoal.metadata.embedded import EmbeddedStore
from shoal.metadata.schema import LOCAL_NODE
from shoal.settings import CoordinatorSettings, StorageSettings
from shoal.storage_api import Read
from shoal.v1 import migrations_pb2
from storage_node.node import StorageNode

READY = HealthReport(Health.GREEN, True, True, (), (), None, 0.0)
C = "/collections/c"
M = f"{C}/vectors/v/migrate"
DIMS = {"org/old": 4, "org/new": 6}
MARKS = {"org/old": 1.0, "org/new": -1.0}
PRINTS = {"org/old": "a" * 64, "org/new": "b" * 64}


def vector_of(model: str, text: str) -> list[float]:
    """A vector of that model, as float32: its mark, then numbers that depend on the text."""
    dice = random.Random(f"{model}/{text}")
    values = [MARKS[model], *(dice.uniform(-1, 1) for _ in range(DIMS[model] - 1))]
    return np.array(values, np.float32).tolist()


class TwoModels:
    """fails: raised for texts of that model. slowness: up to so many ms pass until an answer, so that
    points change while a copy of them is embedded."""

    def __init__(self) -> None:
        self.fails: dict[str, ShoalError] = {}
        self.slowness = 0.0
        self.before: Callable[[], Awaitable[None]] | None = None  # an answer for the new model
        self._dice = random.Random(1)

    def models(self) -> list[ModelInfo]:
        return [ModelInfo(n, DIMS[n], 8, PRINTS[n], (n.removeprefix("org/"),)) for n in DIMS]

    async def prepare(self, model: str, fingerprint: str | None = None) -> ModelInfo:
        name = self._name(model, fingerprint)
        return next(info for info in self.models() if info.name == name)

    def _name(self, model: str, fingerprint: str | None) -> str:
        name = resolve_model(model, {info.name: info.aliases for info in self.models()})
        if fingerprint not in (None, PRINTS[name]):
            raise wrong_weights(name, str(fingerprint), PRINTS[name])
        return name

    async def encode(
        self, texts: list[str], model: str, fingerprint: str | None = None
    ) -> Embedding:
        name = self._name(model, fingerprint)
        await asyncio.sleep(self._dice.uniform(0, self.slowness) / 1000)
        if name in self.fails:
            raise self.fails[name]
        before, self.before = (self.before, None) if name == "org/new" else (None, self.before)
        if before is not None:
            await before()
        vectors = np.array([vector_of(name, t) for t in texts], np.float32)
        tokens = np.ones(len(texts), np.int32)
        return Embedding(
            vectors.reshape(-1, DIMS[name]), tokens, np.zeros(len(texts), bool), PRINTS[name]
        )


class World:
    def __init__(
        self, coordinator: Coordinator, encoder: TwoModels, http: httpx.AsyncClient
    ) -> None:
        self.coordinator, self.encoder, self.http = coordinator, encoder, http

    async def ask(
        self, method: str, path: str, body: Any = None, status: int = 200, model: str = ""
    ) -> Any:
        answer = await self.http.request(
            method,
            path,
            content=b"" if body is None else json.dumps(body),
            headers={"shoal-model": model} if model else {},
        )
        assert answer.status_code == status, answer.text
        said = answer.json()
        return said["result"] if status == 200 else said["status"]["error"]

    async def create(self, bound: str | None = "old", **settings: Any) -> None:
        vectors = {
            "v": {"size": 4, "distance": "Dot"} | ({"shoal_model": bound} if bound else {}),
            "w": {"size": 2, "distance": "Dot"},
        }
        await self.ask("PUT", C, {"vectors": vectors, "shard_number": 2} | settings)

    async def put(self, *points: dict[str, Any], model: str = "", status: int = 200) -> Any:
        body = {"points": list(points)}
        return await self.ask("PUT", f"{C}/points?wait=true", body, status, model)

    async def query(self, query: Any, limit: int = 5, model: str = "", status: int = 200) -> Any:
        body = {"query": query, "using": "v", "limit": limit, "with_vector": True}
        found = await self.ask("POST", f"{C}/points/query", body, status, model)
        return found["points"] if status == 200 else found

    async def until(self, done: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        async with asyncio.timeout(20):
            while True:
                status = await self.ask("GET", M)
                if done(status):
                    return dict(status)
                await asyncio.sleep(0.005)

    async def copied(self, without_text: int = 0) -> dict[str, Any]:
        return await self.until(lambda s: s["phase"] == "copying" and s["left"] == without_text)

    async def over(self) -> None:
        async with asyncio.timeout(20):
            while True:
                if (await self.http.get(M)).status_code == 404:
                    return
                await asyncio.sleep(0.005)

    async def stored(self) -> dict[int, dict[str, list[float]]]:
        """Every point with its dense vectors, under the names that shards have."""
        found: dict[int, dict[str, list[float]]] = {}
        storage = self.coordinator._storage
        for shard in self.coordinator.catalog.get("c").shards:
            ids = PointIds.from_keys(range(200))
            points: PointBatch = await storage.retrieve(shard, ids, True, True, Read(strong=True))
            for row, key in enumerate(points.ids.keys()):
                found[key] = {
                    name: block.values[row].tolist()
                    for name, block in points.dense.items()
                    if block.present is None or block.present[row]
                }
        return found


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "COPY_PAUSE_S_MIN", 0.005)
    monkeypatch.setattr(limits, "COPY_PAUSE_S_MAX", 0.01)
    monkeypatch.setattr(limits, "PROGRESS_S", 0.0)
    monkeypatch.setattr(limits, "DROP_GRACE_S", 0.01)
    monkeypatch.setattr(limits, "COPY_POINTS", 7)


def run(tmp_path: Path, test: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        store = await EmbeddedStore.open(tmp_path / "metadata.sqlite")
        storage = StorageNode(tmp_path / "shards", builder=None, settings=StorageSettings())
        router = Router(store, LocalNodes(LOCAL_NODE, storage), local=LOCAL_NODE)
        encoder = TwoModels()
        await router.start()
        coordinator = Coordinator(
            store=store,
            storage=router,
            encoder=encoder,  # type: ignore[arg-type]
            settings=CoordinatorSettings(),
        )
        try:
            await coordinator.start()
            await storage.start(coordinator.shard_specs())
            app = create_app(
                coordinator, health=lambda: READY, api_key=None, read_only_api_key=None
            )
            transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
            async with httpx.AsyncClient(transport=transport, base_url="http://shoal") as http:
                await test(World(coordinator, encoder, http))
        finally:
            await coordinator.close()
            await router.close()
            await storage.close()
            await store.close()

    asyncio.run(main())


def doc(text: str, model: str = "") -> dict[str, str]:
    return {"text": text, "model": model} if model else {"text": text}


def point(key: int, vector: Any, **payload: Any) -> dict[str, Any]:
    return {"id": key, "vector": {"v": vector}, "payload": payload}


START = {"model": "new", "text_field": "text"}


# -- the life of one ------------------------------------------------------------------------------
def test_from_one_model_to_another_and_back(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.create()
        await world.put(*(point(k, doc(f"t{k}", "old"), text=f"t{k}") for k in range(30)))
        await world.put(
            *(point(k, vector_of("org/old", f"raw{k}"), text=f"t{k}") for k in (40, 41))
        )
        started = await world.ask("POST", M, START)
        assert (started["phase"], started["other"]["size"]) == ("preparing", 6)
        status = await world.copied()
        assert (status["points"], status["done"], status["without_text"]) == (32, 32, 0)

        found = await world.query(doc("t3"))
        assert found[0]["id"] == 3 or found[0]["score"] >= 0
        assert all(len(p["vector"]["v"]) == 4 for p in found)
        assert "until the switch" in await world.query(doc("t3", "new"), status=400)
        assert (await world.stored())[40]["v\x1f1"] == vector_of("org/new", "t40")

        after = await world.ask("POST", f"{M}/switch", {})
        assert (after["switched"], after["current"]["model"]) == (True, "org/new")
        for query, size in ((doc("t3"), 6), (doc("t3", "new"), 6), (doc("t3", "old"), 4)):
            found = await world.query(query, 100)
            assert len(found) == 32
            assert {len(p["vector"]["v"]) for p in found} == {size}
            assert all(set(p["vector"]) == {"v"} for p in found)
        model = {4: "old", 6: "new"}
        for size, name in model.items():
            numbers = vector_of(f"org/{name}", "t3")
            found = await world.query(numbers, 100, model=name)
            assert {len(p["vector"]["v"]) for p in found} == {size}
        assert "expected dim: 6, got 4" in await world.query(vector_of("org/old", "x"), status=400)
        info = await world.ask("GET", C)
        assert info["config"]["params"]["vectors"]["v"]["size"] == 6
        assert info["config"]["params"]["vectors"]["v"]["shoal_model"] == "org/new"

        back = await world.ask("POST", f"{M}/rollback")
        assert (back["switched"], back["current"]["model"]) == (False, "org/old")
        assert {len(p["vector"]["v"]) for p in await world.query(doc("t3"))} == {4}
        assert "nothing to roll back" in await world.ask("POST", f"{M}/rollback", status=400)

        await world.ask("POST", f"{M}/switch", {})
        refused = await world.ask("POST", f"{M}/drop", {"model": "new"}, 400)
        assert "those of org/old" in refused
        dropping = await world.ask("POST", f"{M}/drop", {"model": "old"})
        assert dropping["phase"] == "dropping"
        await world.over()
        assert "bound to the model org/new" in await world.query(doc("t3", "old"), status=400)
        assert {len(p["vector"]["v"]) for p in await world.query(doc("t3"))} == {6}
        assert all(set(vectors) <= {"v\x1f1", "w"} for vectors in (await world.stored()).values())

    run(tmp_path, test)


def test_over_grpc_a_collection_that_was_made_anew_meanwhile(tmp_path: Path) -> None:
    """The shards that a late coordinator knows are gone: it reads the record, and asks again."""

    async def test(world: World) -> None:
        await world.create()
        await world.put(point(1, doc("one"), text="one"), point(2, doc("two"), text="two"))
        await world.ask("POST", M, START | {"points_per_second": 0})
        catalog = world.coordinator.catalog
        old = catalog.get("c")
        await world.ask("DELETE", C)
        await world.create()
        await world.put(point(1, doc("one"), text="one"))
        await world.ask("POST", M, START | {"points_per_second": 0})
        catalog._collections["c"] = old
        asked = migrations_pb2.MigrationStatusRequest(collection="c", vector="v")
        call = CALLS["shoal.v1.Migrations/Status"]
        said = await call.function(world.coordinator, asked)
        assert isinstance(said, migrations_pb2.MigrationStatus)
        assert said.points == 1
        assert catalog.get("c").record.id != old.record.id

    run(tmp_path, test)


def test_a_second_change_gets_a_name_of_its_own(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.create()
        await world.put(point(1, doc("one"), text="one"))
        for number, model in ((1, "new"), (2, "old"), (3, "new")):
            await world.ask("POST", M, START | {"model": model})
            await world.copied()
            assert f"v\x1f{number}" in (await world.stored())[1]
            await world.ask("POST", f"{M}/switch", {})
            other = (await world.ask("GET", M))["other"]["model"]
            await world.ask("POST", f"{M}/drop", {"model": other})
            await world.over()
        assert (await world.stored())[1] == {"v\x1f3": vector_of("org/new", "one")}

    run(tmp_path, test)


def test_it_can_be_given_up_before_the_switch(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.create()
        await world.put(point(1, doc("one"), text="one"))
        await world.ask("POST", M, START | {"points_per_second": 0})
        await world.ask("POST", f"{M}/drop", {"model": "new"})
        await world.over()
        assert (await world.stored())[1] == {"v": vector_of("org/old", "one")}
        assert len(await world.query(doc("one", "old"))) == 1

    run(tmp_path, test)


# -- what is refused ------------------------------------------------------------------------------
def test_what_cannot_be_migrated_is_said(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.create(bound=None)
        await world.put({"id": 1, "vector": {"v": [1, 2, 3, 4]}, "payload": {"text": "one"}})
        for path, body, said in (
            (M, START, "say it in `current_model`"),
            (M, START | {"current_model": "new"}, "cannot be of that model"),
            (M, START | {"current_model": "old", "model": "newest"}, "is not known here"),
            (M, START | {"current_model": "old", "model": "old"}, "already"),
            (M, START | {"current_model": "old", "text_field": "words"}, "no point"),
            (M, START | {"current_model": "old", "text_field": "a..b"}, "invalid JSON path"),
            (M, START | {"current_model": "old", "speed": 3}, "speed"),
            (f"{C}/vectors/x/migrate", START, "is no dense vector"),
            (f"{C}/vectors/-/migrate", START, "is no dense vector"),
        ):
            assert said in await world.ask("POST", path, body, 400), body
        for action, body in (("switch", {}), ("rollback", None), ("drop", {"model": "x"})):
            assert "not being changed" in await world.ask("POST", f"{M}/{action}", body, 404)
        assert "not being changed" in await world.ask("GET", M, status=404)
        await world.ask("POST", M, START | {"current_model": "old"})
        assert await world.copied()
        assert "bound to the model org/old" in await world.query(doc("one", "newer"), status=400)

    run(tmp_path, test)


def test_the_switch_waits_for_every_point_or_for_a_word(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.create()
        await world.put(point(1, doc("one"), text="one"), point(2, doc("two"), text=["t", "wo"]))
        await world.put(point(3, vector_of("org/old", "three")))
        await world.ask("POST", M, START)
        await world.until(lambda s: s["left"] == 2 and s["without_text"] == 2)
        refused = await world.ask("POST", f"{M}/switch", {}, 400)
        assert "2 points have no vector of org/new" in refused
        await world.ask("POST", f"{M}/switch", {"allow_missing": True})
        assert [p["id"] for p in await world.query(doc("one"), 10)] == [1]
        # written from now on, a text that came in place of a vector makes both
        await world.put(point(2, doc("two"), text=["t", "wo"]))
        assert (await world.stored())[2] == {
            "v": vector_of("org/old", "two"),
            "v\x1f1": vector_of("org/new", "two"),
        }

    run(tmp_path, test)


# -- writes meanwhile -----------------------------------------------------------------------------
def test_writes_bring_both_or_leave_the_other_to_the_copy(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.create()
        await world.put(point(1, doc("one"), text="one"))
        await world.ask("POST", M, START)
        await world.copied()
        await world.ask("POST", M, START | {"points_per_second": 0})  # from here on by writes alone
        old, new = "v", "v\x1f1"

        await world.put(point(2, doc("a text", "new"), text="its payload"))
        assert (await world.stored())[2] == {
            old: vector_of("org/old", "a text"),
            new: vector_of("org/new", "a text"),
        }
        numbers = vector_of("org/old", "numbers")
        await world.put(point(3, numbers, text="three"))
        assert (await world.stored())[3] == {old: numbers, new: vector_of("org/new", "three")}
        await world.put(point(4, numbers))
        assert (await world.stored())[4] == {old: numbers}

        # numbers alone: what the other was made of may be out of date, so it is made anew
        update = {
            "points": [{"id": 2, "vector": {"v": numbers}}, {"id": 3, "vector": {"w": [1, 2]}}]
        }
        await world.ask("PUT", f"{C}/points/vectors", update)
        assert (await world.stored())[2] == {old: numbers}
        assert set((await world.stored())[3]) == {old, new, "w"}
        update = {"points": [{"id": 2, "vector": {"v": doc("again")}}]}
        await world.ask("PUT", f"{C}/points/vectors", update)
        assert (await world.stored())[2] == {
            old: vector_of("org/old", "again"),
            new: vector_of("org/new", "again"),
        }

        # so is it when the text in the payload changes
        change = {"payload": {"other": 1}, "points": [1]}
        await world.ask("POST", f"{C}/points/payload", change)
        assert new in (await world.stored())[1]
        change = {"payload": {"text": "uno"}, "points": [1]}
        await world.ask("POST", f"{C}/points/payload", change)
        assert (await world.stored())[1] == {old: vector_of("org/old", "one")}
        await world.ask("POST", M, START)  # says nothing of the rate
        assert (await world.ask("GET", M))["points_per_second_max"] == 0
        await world.ask("POST", M, START | {"points_per_second": None})
        await world.until(lambda s: s["left"] == 1)
        assert (await world.stored())[1][new] == vector_of("org/new", "uno")
        assert (await world.stored())[2][new] == vector_of("org/new", "again")

        await world.ask("POST", f"{C}/points/vectors/delete", {"points": [1], "vector": ["v"]})
        assert (await world.stored())[1] == {}
        has = {"filter": {"must": [{"has_vector": "v"}]}, "exact": True}
        assert (await world.ask("POST", f"{C}/points/count", has))["count"] == 3

    run(tmp_path, test)


def test_after_the_switch_numbers_of_the_old_model_need_a_text(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.create()
        await world.put(point(1, doc("one"), text="one"))
        await world.ask("POST", M, START)
        await world.copied()
        await world.ask("POST", f"{M}/switch", {})
        numbers = vector_of("org/old", "numbers")
        await world.put(point(2, numbers, text="two"), model="old")
        assert (await world.stored())[2] == {"v": numbers, "v\x1f1": vector_of("org/new", "two")}
        assert "there is none" in await world.put(point(3, numbers), model="old", status=400)
        refused = await world.put(point(3, [0] * 6), model="a third", status=400)
        assert "bound to the model org/new" in refused

    run(tmp_path, test)


def test_a_model_that_is_away_holds_up_the_copy_and_not_the_writes(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.create()
        await world.ask("POST", M, START)
        await world.until(lambda s: s["phase"] == "copying")
        world.encoder.fails["org/new"] = Busy("too much to do", retry_after_s=0.01)
        await world.put(point(1, doc("one"), text="one"))
        assert (await world.stored())[1] == {"v": vector_of("org/old", "one")}
        status = await world.until(lambda s: s.get("error") is not None)
        assert status["error"] == "too much to do"
        world.encoder.fails.clear()
        await world.copied()
        await world.until(lambda s: s.get("error") is None)
        await world.ask("POST", f"{M}/switch", {})
        world.encoder.fails["org/new"] = Unavailable("gone")
        await world.put(point(2, doc("two", "old"), text="two"), status=503)
        assert set(await world.stored()) == {1}

    run(tmp_path, test)


def test_a_point_that_changes_while_it_is_copied_is_copied_again(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.create()
        numbers = vector_of("org/old", "numbers")
        await world.put(*(point(k, numbers, text=f"t{k}") for k in range(4)))

        async def change() -> None:
            change = {"payload": {"text": "changed"}, "points": [0]}
            await world.ask("POST", f"{C}/points/payload", change)
            await world.ask("POST", f"{C}/points/delete", {"points": [1]})
            await world.ask("POST", f"{C}/points/delete", {"points": [2]})
            await world.put(point(2, doc("anew"), text="anew"))

        world.encoder.before = change
        await world.ask("POST", M, START)
        await world.copied()
        new = {key: vectors.get("v\x1f1") for key, vectors in (await world.stored()).items()}
        assert new == {
            0: vector_of("org/new", "changed"),
            2: vector_of("org/new", "anew"),
            3: vector_of("org/new", "t3"),
        }

    run(tmp_path, test)


# -- comparing ------------------------------------------------------------------------------------
def test_both_models_are_compared_on_the_same_queries(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.create()
        await world.put(*(point(k, doc(f"t{k}"), text=f"t{k}", n=k % 2) for k in range(40)))
        await world.ask("POST", M, START)
        await world.copied()
        assert "no queries" in await world.ask("POST", f"{M}/compare", {}, 400)
        for k in range(5):
            await world.query(doc(f"t{k}"))
        seen = await world.ask("POST", f"{M}/compare", {"limit": 3})
        assert (seen["source"], seen["queries"], seen.get("ndcg")) == ("recorded", 5, None)
        assert (
            0 <= seen["overlap"]["low"] <= seen["overlap"]["mean"] <= seen["overlap"]["high"] <= 1
        )
        assert (await world.ask("GET", M))["recorded_queries"] == 5

        best = {  # by hand: the ten best of each model
            name: sorted(
                range(40),
                key=lambda k: (-np.dot(vector_of(name, f"t{k}"), vector_of(name, "t7")), k),
            )
            for name in DIMS
        }
        asked = {"queries": [{"text": "t7", "relevant": {str(best["org/new"][0]): 1}}], "limit": 10}
        said = await world.ask("POST", f"{M}/compare", asked)
        both = len(set(best["org/old"][:10]) & set(best["org/new"][:10])) / 10
        assert said["overlap"]["mean"] == pytest.approx(both)
        assert said["ndcg"]["other"]["mean"] == pytest.approx(1.0)
        assert said["most_different"][0]["current"] == best["org/old"][:10]
        assert said["most_different"][0]["other"] == best["org/new"][:10]
        rank = best["org/old"].index(best["org/new"][0])
        gain = 1 / np.log2(rank + 2) if rank < 10 else 0.0
        assert said["ndcg"]["current"]["mean"] == pytest.approx(gain)
        filtered = {
            "queries": [{"text": "x", "filter": {"must": [{"key": "n", "match": {"value": 1}}]}}]
        }
        said = await world.ask("POST", f"{M}/compare", filtered)
        assert all(key % 2 for key in said["most_different"][0]["other"])

    run(tmp_path, test)


# -- at random ------------------------------------------------------------------------------------
class Expected:
    """What a point's two generations should hold once the copy has nothing to do: a list of numbers,
    or DYNAMIC, made of the payload's text."""

    DYNAMIC = "made of the payload"

    def __init__(self, given: str, other: str) -> None:
        self.points: dict[int, dict[str, Any]] = {}
        self.current, self.other = given, other  # full names of models

    def vector(self, key: int, model: str) -> list[float] | None:
        held = self.points[key].get(model)
        if held == self.DYNAMIC:
            text = self.points[key].get("text")
            return None if text is None else vector_of(model, text)
        return held  # type: ignore[no-any-return]


@pytest.mark.parametrize("seed", range(6))
def test_random_writes_meet_a_migration(tmp_path: Path, seed: int) -> None:
    print("seed", seed)
    dice = random.Random(seed)

    async def test(world: World) -> None:
        await world.create()
        world.encoder.slowness = dice.choice([0.0, 5.0, 20.0])
        expected = Expected("org/old", "org/new")
        await world.ask("POST", M, START)
        await world.until(lambda s: s["phase"] == "copying")
        for number in range(150):
            await random_write(world, expected, dice, f"text {number}")
            if dice.random() < 0.1:
                await asyncio.sleep(0.002)  # the copy gets a turn
            if dice.random() < 0.04:
                await exchange(world, expected)
        await settled(world, expected)

    run(tmp_path, test)


async def settled(world: World, expected: Expected) -> None:
    async with asyncio.timeout(20):
        while True:
            if await world.stored() == wanted_vectors(expected):
                return
            await asyncio.sleep(0.01)


STORED = {"org/old": "v", "org/new": "v\x1f1"}


def wanted_vectors(expected: Expected) -> dict[int, dict[str, list[float]]]:
    wanted: dict[int, dict[str, list[float]]] = {}
    for key in expected.points:
        here = {STORED[m]: expected.vector(key, m) for m in STORED}
        wanted[key] = {name: vector for name, vector in here.items() if vector is not None}
    return wanted


async def exchange(world: World, expected: Expected) -> None:
    """From here on nobody touches what the other model's vectors are made of."""
    lacking = [k for k in expected.points if expected.vector(k, expected.other) is None]
    if lacking:
        await world.ask("POST", f"{C}/points/delete", {"points": lacking})
    for key in lacking:
        del expected.points[key]
    await settled(world, expected)
    status = await world.ask("GET", M)
    for key, held in expected.points.items():
        held[expected.other] = expected.vector(key, expected.other)
    if status["switched"]:
        await world.ask("POST", f"{M}/rollback")
    else:
        await world.ask("POST", f"{M}/switch", {})
    expected.current, expected.other = expected.other, expected.current


async def random_write(world: World, expected: Expected, dice: random.Random, text: str) -> None:
    key, points = dice.randrange(12), expected.points
    now, then = expected.current, expected.other
    kind = dice.choice(
        ["text", "numbers", "numbers", "vectors", "text vectors", "payload", "clear"]
    )
    if kind == "text":
        await world.put(point(key, doc(text, dice.choice(["", "old", "new"])), text=f"p {text}"))
        points[key] = {"text": f"p {text}"} | {m: vector_of(m, text) for m in DIMS}
    elif kind == "numbers":
        numbers = vector_of(now, f"numbers {text}")
        payload = {"text": f"p {text}"} if dice.random() < 0.8 else {}
        await world.put(point(key, numbers, **payload))
        points[key] = {now: numbers, then: Expected.DYNAMIC, **payload}
    elif key not in points:
        return
    elif kind == "vectors":
        numbers = vector_of(now, f"update {text}")
        body = {"points": [{"id": key, "vector": {"v": numbers}}]}
        await world.ask("PUT", f"{C}/points/vectors", body)
        points[key] |= {now: numbers, then: Expected.DYNAMIC}
    elif kind == "text vectors":
        body = {"points": [{"id": key, "vector": {"v": doc(text)}}]}
        await world.ask("PUT", f"{C}/points/vectors", body)
        points[key] |= {m: vector_of(m, text) for m in DIMS}
    elif kind == "payload":
        body = {"payload": {"text": f"set {text}"}, "points": [key]}
        await world.ask("POST", f"{C}/points/payload", body)
        points[key] |= {"text": f"set {text}", then: Expected.DYNAMIC}
    else:
        await world.ask("POST", f"{C}/points/payload/clear", {"points": [key]})
        points[key].pop("text", None)
        points[key] |= {then: Expected.DYNAMIC}
