"""A change of models where things go wrong: bad input, unlucky moments, strange collections, and a
coordinator that dies between any two of its steps. World and models are those of test_migration.py."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from test_migration import (
    READY,
    START,
    C,
    M,
    TwoModels,
    World,
    _fast,  # noqa: F401
    doc,
    point,
    run,
    vector_of,
)

from coordinator import copier
from coordinator.app import create_app
from coordinator.copier import following
from coordinator.router import LocalNodes, Router
from coordinator.service import Coordinator
from shoal.errors import Busy
from shoal.ids import UUID_BIT, PointIds, parse_id
from shoal.metadata.embedded import EmbeddedStore
from shoal.metadata.schema import LOCAL_NODE
from shoal.settings import CoordinatorSettings, StorageSettings
from shoal.storage_api import Read
from storage_node.node import StorageNode

PROGRESS = "migrations/"  # keys in the metadata store
LAST = "ffffffff-ffff-ffff-ffff-ffffffffffff"


async def eventually(done: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while True:
            if await done():
                return
            await asyncio.sleep(0.005)


# -- the rate -------------------------------------------------------------------------------------
def test_another_rate_counts_at_once(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.create()
        await world.put(*(point(k, vector_of("org/old", "x"), text=f"t{k}") for k in range(30)))
        await world.ask("POST", M, START | {"points_per_second": 1e-6})
        await world.until(lambda s: s["done"] > 0)
        status = await world.ask("GET", M)
        assert status["left"] > 0
        await world.ask("POST", M, START | {"points_per_second": 1e5})
        await world.copied()

    run(tmp_path, test)


def test_a_rate_that_changes_at_the_last_moment_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the copy has looked at it, and before it begins to wait."""

    async def test(world: World) -> None:
        await world.create()
        await world.put(*(point(k, vector_of("org/old", "x"), text=f"t{k}") for k in range(30)))
        tell, calls = copier._Carrying.tell, 0

        async def telling(self: Any, error: str | None = None) -> None:
            nonlocal calls
            await tell(self, error)
            calls += self.progress.copied > 0
            if calls == 2:  # the first is after a page, the second before the wait for the next
                await world.ask("POST", M, START | {"points_per_second": None})

        monkeypatch.setattr(copier._Carrying, "tell", telling)
        await world.ask("POST", M, START | {"points_per_second": 1e-6})
        await world.copied()
        assert calls >= 2

    run(tmp_path, test)


def test_a_pause_says_no_time(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.create()
        await world.put(*(point(k, vector_of("org/old", "x"), text=f"t{k}") for k in range(30)))
        await world.ask("POST", M, START | {"points_per_second": 300})
        await world.until(lambda s: (s.get("points_per_second") or 0) > 0 and s["left"] > 0)
        paused = await world.ask("POST", M, START | {"points_per_second": 0})
        assert paused.get("seconds_left") is None

    run(tmp_path, test)


# -- what was said is true ------------------------------------------------------------------------
def test_an_error_is_forgotten_as_soon_as_the_copy_goes_on(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.create()
        await world.put(*(point(k, vector_of("org/old", "x"), text=f"t{k}") for k in range(30)))
        world.encoder.fails["org/new"] = Busy("gone", retry_after_s=0.01)
        await world.ask("POST", M, START | {"points_per_second": 100})
        await world.until(lambda s: s.get("error") == "gone")
        world.encoder.fails.clear()
        status = await world.until(lambda s: s.get("error") is None)
        assert status["left"] > 0  # in the middle of its first look

    run(tmp_path, test)


def test_every_switch_asks_whether_points_are_missing(tmp_path: Path) -> None:
    """Also the second one: what was written in between may lack the newer vector."""

    async def test(world: World) -> None:
        await world.create()
        await world.put(point(1, doc("one"), text="one"))
        await world.ask("POST", M, START)
        await world.copied()
        await world.ask("POST", f"{M}/switch", {})
        await world.ask("POST", f"{M}/rollback")
        await world.put(point(2, vector_of("org/old", "two")))
        refused = await world.ask("POST", f"{M}/switch", {}, 400)
        assert "1 points have no vector of org/new" in refused
        await world.ask("POST", f"{M}/switch", {"allow_missing": True})

    run(tmp_path, test)


BAD = [
    ("", {"text_field": "text"}, 400, "model"),
    ("", {"model": "new"}, 400, "text_field"),
    ("", {"model": "", "text_field": "text"}, 422, "model"),
    ("", {"model": "new", "text_field": ""}, 422, "text_field"),
    ("", {"model": 7, "text_field": "text"}, 400, "model"),
    ("", START | {"fingerprint": "0" * 64}, 400, "fingerprint"),
    ("", START | {"points_per_second": -1}, 422, "points_per_second"),
    ("", START | {"points_per_second": "fast"}, 400, "points_per_second"),
    ("", START | {"points_per_second": 1e9}, 422, "points_per_second"),
    ("", [], 400, "object"),
    ("switch", {"allow_missing": "yes"}, 400, "allow_missing"),
    ("switch", {"force": True}, 400, "force"),
    ("rollback", {"to": "old"}, 400, "to"),
    ("drop", {}, 400, "model"),
    ("drop", {"model": "b" * 63}, 400, "names"),
    ("compare", {"queries": []}, 422, "queries"),
    ("compare", {"queries": [{"text": ""}]}, 422, "text"),
    ("compare", {"queries": [{"text": "a"}] * 1_001}, 422, "queries"),
    ("compare", {"queries": [{"text": "a", "relevant": {"x": 1}}]}, 400, "point ID"),
    ("compare", {"queries": [{"text": "a", "relevant": {"1": -1}}]}, 422, "relevant"),
    ("compare", {"queries": [{"text": "a", "relevant": {"1": 1e999}}]}, 422, "relevant"),
    ("compare", {"queries": [{"text": "a", "filter": {"mist": []}}]}, 400, "filter"),
    ("compare", {"queries": [{"text": "a"}], "limit": 0}, 422, "limit"),
    ("compare", {"queries": [{"text": "a"}], "limit": 1_001}, 422, "limit"),
]


def test_bad_input_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.create()
        await world.put(point(1, doc("one"), text="one"))
        await world.ask("POST", M, START)
        await world.copied()
        before = world.coordinator.catalog.get("c").record
        for action, body, status, said in BAD:
            path = f"{M}/{action}" if action else M
            content = json.dumps(body).replace("Infinity", "1e999")
            answer = await world.http.post(path, content=content)
            assert (answer.status_code, said in answer.text) == (status, True), (body, answer.text)
            assert world.coordinator.catalog.get("c").record == before

    run(tmp_path, test)


# -- writes beside a switch -----------------------------------------------------------------------
class Ledger:
    """Of one writer, which writes its points one request at a time. texts: what the vectors of a point
    may be made of: its payload's, or the text that came last."""

    def __init__(self, world: World, first: int, dice: random.Random) -> None:
        self.world, self.ids, self.dice = world, range(first, first + 12), dice
        self.texts: dict[int, tuple[str, str]] = {}
        self.number = 0

    async def write(self) -> None:
        """Points of all shards at once, as one operation or as several."""
        self.number += 1
        kind = self.dice.choice(["put", "batch", "note", "vectors", "delete"])
        some = self.dice.sample(self.ids, 6)
        text = f"{self.ids[0]}/{self.number}"
        upsert = {"points": [point(k, doc(text), text=text) for k in some]}
        note = {"payload": {"note": self.number}, "points": some}
        if kind == "put" or len(self.texts) < len(self.ids):
            await self.world.ask("PUT", f"{C}/points?wait=true", upsert)
            self.texts |= dict.fromkeys(some, (text, text))
        elif kind == "batch":
            operations = [{"upsert": upsert}, {"set_payload": note}]
            await self.world.ask("POST", f"{C}/points/batch", {"operations": operations})
            self.texts |= dict.fromkeys(some, (text, text))
        elif kind == "note":
            await self.world.ask("POST", f"{C}/points/payload", note)
        elif kind == "vectors":
            body = {"points": [{"id": k, "vector": {"v": doc(text + "!")}} for k in some]}
            await self.world.ask("PUT", f"{C}/points/vectors", body)
            for k in some:
                self.texts[k] = (self.texts[k][0], text + "!")
        else:
            await self.world.ask("POST", f"{C}/points/delete", {"points": some})
            for k in some:
                del self.texts[k]


@pytest.mark.parametrize("shards", [1, 4])
def test_no_write_fails_beside_a_switch(tmp_path: Path, shards: int) -> None:
    """Also one whose parts are on several shards, of which some have heard of the switch."""

    async def test(world: World) -> None:
        await world.create(shard_number=shards)
        world.encoder.slowness = 5
        ledgers = [Ledger(world, 100 + 12 * n, random.Random(f"{shards}/{n}")) for n in range(6)]
        ended = asyncio.Event()

        async def work(ledger: Ledger) -> None:
            while not ended.is_set():
                await ledger.write()

        async with asyncio.TaskGroup() as group:
            for ledger in ledgers:
                group.create_task(work(ledger))
            await world.ask("POST", M, START)
            await world.until(lambda s: s["phase"] == "copying")
            for _ in range(8):
                await world.ask("POST", f"{M}/switch", {"allow_missing": True})
                await asyncio.sleep(0.02)
                await world.ask("POST", f"{M}/rollback")
                await asyncio.sleep(0.02)
            ended.set()
        await world.until(lambda s: s["left"] == 0 and s["only_other"] == 0)
        texts = {k: texts for ledger in ledgers for k, texts in ledger.texts.items()}
        stored = await world.stored()
        assert stored.keys() == texts.keys()
        for k, vectors in stored.items():
            for name, model in (("v", "org/old"), ("v\x1f1", "org/new")):
                assert vectors[name] in [vector_of(model, text) for text in texts[k]], (k, name)

    run(tmp_path, test)


# -- strange collections --------------------------------------------------------------------------
@pytest.mark.parametrize("shards", [1, 8])
@pytest.mark.parametrize("points", [0, 1, 9])
def test_small_collections(tmp_path: Path, shards: int, points: int) -> None:
    async def test(world: World) -> None:
        await world.create(shard_number=shards)
        for k in range(points):
            await world.put(point(k, doc(f"t{k}"), text=f"t{k}"))
        await world.ask("POST", M, START)
        status = await world.copied()
        assert (status["points"], status["done"]) == (points, points)
        await world.ask("POST", f"{M}/switch", {})
        assert len(await world.query(doc("x"), 20)) == points
        await world.ask("POST", f"{M}/drop", {"model": "old"})
        await world.over()
        wanted = {k: {"v\x1f1": vector_of("org/new", f"t{k}")} for k in range(points)}
        assert await world.stored() == wanted
        await world.put(point(50, doc("later"), text="later"))
        assert (await world.query(doc("later"), 1))[0]["id"] == 50

    run(tmp_path, test)


def test_the_unnamed_vector(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        vectors = {"size": 4, "distance": "Dot", "shoal_model": "old"}
        await world.ask("PUT", C, {"vectors": vectors})
        points = [{"id": k, "vector": doc(f"t{k}"), "payload": {"text": f"t{k}"}} for k in (1, 2)]
        await world.ask("PUT", f"{C}/points?wait=true", {"points": points})
        path = f"{C}/vectors/-/migrate"
        assert (await world.ask("POST", path, START))["vector"] == ""

        async def copied() -> bool:
            status = await world.ask("GET", path)
            return bool(status["phase"] == "copying" and status["left"] == 0)

        await eventually(copied)
        await world.ask("POST", f"{path}/switch", {})
        body = {"query": doc("t2"), "with_vector": True}
        found = (await world.ask("POST", f"{C}/points/query", body))["points"]
        assert [len(hit["vector"]) for hit in found] == [6, 6]
        info = await world.ask("GET", C)
        assert info["config"]["params"]["vectors"]["size"] == 6
        await world.ask("POST", f"{path}/drop", {"model": "old"})

        async def over() -> bool:
            return (await world.http.get(path)).status_code == 404

        await eventually(over)
        assert (await world.stored())[1] == {"\x1f1": vector_of("org/new", "t1")}

    run(tmp_path, test)


def test_two_vectors_at_once(tmp_path: Path) -> None:
    """Their copies write the same points, so each keeps the other's condition from being met."""

    async def test(world: World) -> None:
        one = {"size": 4, "distance": "Dot", "shoal_model": "old"}
        two = {"size": 6, "distance": "Dot", "shoal_model": "new"}
        await world.ask("PUT", C, {"vectors": {"v": one, "w": two}, "shard_number": 2})
        world.encoder.slowness = 5
        for k in range(40):
            vector = {"v": doc(f"v{k}"), "w": doc(f"w{k}")}
            await world.put({"id": k, "vector": vector, "payload": {"a": f"v{k}", "b": f"w{k}"}})
        other = f"{C}/vectors/w/migrate"
        await world.ask("POST", M, {"model": "new", "text_field": "a"})
        await world.ask("POST", other, {"model": "old", "text_field": "b"})
        for k in range(10):  # both second vectors go, and come back
            change = {"payload": {"a": f"v{k}!", "b": f"w{k}!"}, "points": [k]}
            await world.ask("POST", f"{C}/points/payload", change)

        async def copied() -> bool:
            statuses = [await world.ask("GET", path) for path in (M, other)]
            return all(s["phase"] == "copying" and s["left"] == 0 for s in statuses)

        await eventually(copied)
        for path in (M, other):
            await world.ask("POST", f"{path}/switch", {})
        for path, model in ((M, "old"), (other, "new")):
            await world.ask("POST", f"{path}/drop", {"model": model})
        for path in (M, other):
            await eventually(lambda path=path: _gone(world, path))
        for k, vectors in (await world.stored()).items():
            mark = "!" if k < 10 else ""
            assert vectors == {
                "v\x1f1": vector_of("org/new", f"v{k}{mark}"),
                "w\x1f1": vector_of("org/old", f"w{k}{mark}"),
            }

    run(tmp_path, test)


async def _gone(world: World, path: str) -> bool:
    return (await world.http.get(path)).status_code == 404


@pytest.mark.parametrize("with_text", [True, False])
@pytest.mark.parametrize("sealed", [True, False])
def test_the_largest_ids(tmp_path: Path, sealed: bool, with_text: bool) -> None:
    """After each page the copy goes on behind its last point; behind these there is none."""
    ids = [1, 2**64 - 1, "00000000-0000-0000-0000-000000000000", LAST]
    payload = {"text" if with_text else "other": "t", "long": "~" * 30_000 if sealed else ""}

    async def test() -> None:
        async with life(tmp_path, seal_bytes=65_536) as world:
            await world.create(shard_number=1)
            shard = world.coordinator.catalog.get("c").shards[0]
            storage = world.coordinator._storage
            numbers = {"v": vector_of("org/old", "t")}
            for id_ in ids:
                await world.put({"id": id_, "vector": numbers, "payload": payload})
            await world.put(point(3, numbers["v"], text="three"))

            async def is_sealed() -> bool:
                info = await storage.info(shard)
                return info.segments > 1 and info.pending == 0

            if sealed:
                await eventually(is_sealed)
            await world.ask("POST", M, START)
            left = 0 if with_text else 4
            status = await world.until(
                lambda s: s["left"] == left and s.get("without_text") == left
            )
            assert status.get("error") is None
            keys = PointIds.from_keys([parse_id(id_) for id_ in ids])
            found = await storage.retrieve(shard, keys, True, ("v\x1f1",), Read(strong=True))
            block = found.dense.get("v\x1f1")
            if with_text:
                assert block is not None
                assert np.allclose(block.values, vector_of("org/new", "t"))
            else:
                assert block is None or (block.present is not None and not block.present.any())

    asyncio.run(test())


def test_what_follows_a_key() -> None:
    assert following(7) == 8
    assert following(2**64 - 1) == UUID_BIT
    assert following(UUID_BIT) == UUID_BIT + 1
    assert following(parse_id(LAST)) is None


# -- a collection that goes -----------------------------------------------------------------------
@pytest.mark.parametrize("moment", ["paused", "embedding", "switched", "dropping"])
def test_a_collection_that_is_deleted_and_made_again_begins_anew(
    tmp_path: Path, moment: str
) -> None:
    async def test(world: World) -> None:
        await world.create()
        points = [point(k, vector_of("org/old", f"t{k}"), text=f"t{k}") for k in range(30)]
        await world.put(*points)

        made_anew = asyncio.Event()

        async def anew() -> None:
            await world.ask("DELETE", C)
            await world.create()
            await world.put(*points[:3])
            made_anew.set()

        if moment == "embedding":
            world.encoder.before = anew
        rate = {"points_per_second": 0} if moment == "paused" else {}
        await world.ask("POST", M, START | rate)
        if moment == "paused":
            await world.until(lambda s: s["phase"] == "copying")
            await anew()
        elif moment != "embedding":
            await world.copied()
            await world.ask("POST", f"{M}/switch", {})
            if moment == "dropping":
                await world.ask("POST", f"{M}/drop", {"model": "old"})
            await anew()
        await made_anew.wait()
        assert "not being changed" in await world.ask("GET", M, status=404)
        assert {len(hit["vector"]["v"]) for hit in await world.query(doc("t1", "old"))} == {4}
        store = world.coordinator._store

        async def quiet() -> bool:  # whatever was still under way has found out
            return not world.coordinator._copier._carrying

        if moment != "paused":
            await eventually(quiet)
        assert (await store.range(PROGRESS))[0] == []
        wanted = {k: {"v": vector_of("org/old", f"t{k}")} for k in range(3)}
        assert await world.stored() == wanted
        await world.ask("POST", M, START)
        await world.copied()
        assert all("v\x1f1" in vectors for vectors in (await world.stored()).values())

    run(tmp_path, test)


# -- a coordinator that dies ----------------------------------------------------------------------
class Mortal:
    """In front of a metadata store or storage: of all changes together, `number` is the last one. It
    is made or not, and nothing is answered any more."""

    def __init__(self, number: int, *, made: bool) -> None:
        self.left, self.made = number, made
        self.dead = asyncio.Event()

    def around(self, real: Any, *names: str) -> Any:
        class Front:
            def __getattr__(self, name: str) -> Any:
                return getattr(real, name)

        front = Front()
        for name in names:
            setattr(front, name, self._limited(getattr(real, name)))
        return front

    def _limited(self, call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def limited(*given: Any, **named: Any) -> Any:
            self.left -= 1
            if self.left > 0:
                return await call(*given, **named)
            if self.left == 0 and self.made:
                await call(*given, **named)
            self.dead.set()
            return await asyncio.Event().wait()

        return limited


@asynccontextmanager
async def life(
    tmp_path: Path, mortal: Mortal | None = None, **settings: Any
) -> AsyncIterator[World]:
    """One coordinator on what an earlier one has left. settings: of the storage."""
    store = await EmbeddedStore.open(tmp_path / "metadata.sqlite")
    storage = StorageNode(tmp_path / "shards", builder=None, settings=StorageSettings(**settings))
    router = Router(store, LocalNodes(LOCAL_NODE, storage), local=LOCAL_NODE)
    await router.start()
    others = asyncio.all_tasks()
    coordinator = Coordinator(
        store=mortal.around(store, "txn") if mortal else store,
        storage=mortal.around(router, "write") if mortal else router,
        encoder=(encoder := TwoModels()),  # type: ignore[arg-type]
        settings=CoordinatorSettings(),
    )
    try:
        await coordinator.start()
        ours = asyncio.all_tasks() - others
        await storage.start(coordinator.shard_specs())
        app = create_app(coordinator, health=lambda: READY, api_key=None, read_only_api_key=None)
        transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://shoal") as http:
            yield World(coordinator, encoder, http)
        if mortal is None:
            await coordinator.close()
    finally:
        ours |= coordinator.catalog._changes | set(coordinator._copier._under_way.values())
        for task in ours:
            task.cancel()
        await asyncio.gather(*ours, return_exceptions=True)
        await router.close()
        await storage.close()
        await store.close()


async def through_all_of_it(world: World) -> None:
    """From wherever it is to the end: with the new model, and without the old one."""
    while True:
        record = world.coordinator.catalog.get("c").record
        found = record.migrated.get("v")
        if found is None:
            await world.ask("POST", M, START)
        elif found.migration is None:
            return
        elif found.migration.phase == "dropping":
            await world.over()
        elif not found.migration.switched:
            await world.copied()
            await world.ask("POST", f"{M}/switch", {})
        else:
            await world.ask("POST", f"{M}/drop", {"model": "old"})


@pytest.mark.parametrize("made", [False, True], ids=["before", "after"])
def test_a_coordinator_may_die_between_any_two_steps(
    tmp_path: Path, made: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copier, "_BACKOFF_S_MIN", 0.005)  # until the shards are open

    async def one(folder: Path, number: int) -> bool:
        """Die at that change. False when there were fewer."""
        mortal = Mortal(number, made=made)
        async with life(folder, mortal) as world:
            work = asyncio.ensure_future(through_all_of_it(world))
            death = asyncio.ensure_future(mortal.dead.wait())
            await asyncio.wait([work, death], return_when=asyncio.FIRST_COMPLETED)
            died = death.done()
            for task in (work, death):
                task.cancel()
            await asyncio.gather(work, death, return_exceptions=True)
        async with life(folder) as world:
            assert len(await world.query(doc("t1"), 20)) == 9
            await through_all_of_it(world)
            wanted = {k: {"v\x1f1": vector_of("org/new", f"t{k}")} for k in range(9)}
            assert await world.stored() == wanted
            assert (await world.coordinator._store.range(PROGRESS))[0] == []
        return died

    begin = tmp_path / "begin"
    begin.mkdir()

    def folder(number: int) -> Path:
        return Path(shutil.copytree(begin, tmp_path / str(number)))

    async def all_of_them() -> None:
        async with life(begin) as world:
            await world.create()
            await world.put(*(point(k, vector_of("org/old", "x"), text=f"t{k}") for k in range(9)))
        number = 1
        while await one(folder(number), number):
            number += 1
        assert number > 12, number
        print(f"died at each of {number} changes")

    asyncio.run(all_of_them())
