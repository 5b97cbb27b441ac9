"""Several coordinators over one metadata store, and the read options over HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from fakes.clock import run_virtual
from fakes.metadata import FakeStore
from fakes.nodes import FakeNode, FakeNodes
from fakes.storage import FakeStorage

from coordinator.app import create_app
from coordinator.catalog import CREATING_S_MAX
from coordinator.cluster import peer_id
from coordinator.freshness import TOKEN_BYTES_MAX, format_token, parse_token, read_wanted
from coordinator.router import Router
from coordinator.service import Coordinator
from shoal.api.models import CreateCollection
from shoal.errors import AlreadyExists, BadRequest, NotFound, Unavailable
from shoal.health import Health, HealthReport
from shoal.metadata.schema import (
    ACTIONS_KEY,
    ActionsRecord,
    CollectionRecord,
    CollectionState,
    NodeRecord,
    NodeRole,
    ShardRecord,
    TakenAction,
)
from shoal.settings import CoordinatorSettings
from shoal.storage_api import ShardKey

C = "/collections/c"
READY = HealthReport(Health.GREEN, True, True, (), (), None, 0.0)


def request(**more: Any) -> CreateCollection:
    body = {"vectors": {"size": 2, "distance": "Dot"}, **more}
    return CreateCollection.model_validate(body, strict=False)


class Front:
    """A coordinator with its HTTP application."""

    def __init__(self, store: FakeStore, nodes: FakeNodes, name: str) -> None:
        self.router = Router(store, nodes)
        self.coordinator = Coordinator(
            store=store,
            storage=self.router,
            encoder=None,
            settings=CoordinatorSettings(default_replication_factor=2),
            node_id=name,
            local_node=None,
        )
        self.catalog = self.coordinator.catalog
        app = create_app(
            self.coordinator, health=lambda: READY, api_key=None, read_only_api_key=None
        )
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(app),  # type: ignore[arg-type]
            base_url="http://shoal",
        )

    async def start(self) -> Front:
        await self.router.start()
        await self.coordinator.start()
        return self

    async def close(self) -> None:
        await self.http.aclose()
        await self.coordinator.close()
        await self.router.close()


class World:
    """Two coordinators c1 and c2, three storage nodes."""

    def __init__(self) -> None:
        self.store = FakeStore()
        self.all = [FakeNode(name, leads=True) for name in ("s1", "s2", "s3")]
        self.nodes = FakeNodes(self.all)

    async def start(self) -> None:
        for name in ("s1", "s2", "s3"):
            record = NodeRecord(id=name, role=NodeRole.STORAGE, incarnation="1", grpc=f"{name}:1")
            await self.store.txn([], {record.key: record.to_bytes()})
        self.c1 = await Front(self.store, self.nodes, "c1").start()
        self.c2 = await Front(self.store, self.nodes, "c2").start()


def run(test: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World()
        await world.start()
        try:
            await test(world)
        finally:
            await world.c1.close()
            await world.c2.close()

    run_virtual(main())


async def record_of(store: FakeStore, shard: int = 0, collection: int = 1) -> ShardRecord:
    entry = await store.get(f"shards/{collection}/{shard}")
    assert entry is not None
    return ShardRecord.from_bytes(entry.key, entry.value)


# -- collections ----------------------------------------------------------------------------------
def test_a_collection_is_placed_made_everywhere_and_seen_by_all_coordinators() -> None:
    async def test(world: World) -> None:
        world.store.deaf = True
        await world.c1.catalog.create("c", request(replication_factor=3, shard_number=2))
        assert not world.c2.catalog.exists("c")
        found = await world.c2.catalog.find("c")  # at once, without the watch
        assert found.replication_factor == 3
        record = await record_of(world.store)
        assert sorted(record.in_sync) == ["s1", "s2", "s3"]
        assert record.primary == record.in_sync[0]
        assert (await record_of(world.store, 1)).primary != record.primary
        assert all(len(node.shards) == 2 for node in world.all)
        with pytest.raises(AlreadyExists):
            await world.c2.catalog.create("c", request())
        with pytest.raises(NotFound):
            await world.c2.catalog.find("d")

    run(test)


def test_defaults_follow_the_number_of_nodes_and_are_written_down() -> None:
    async def test(world: World) -> None:
        await world.c1.catalog.create("c", request())
        found = world.c1.catalog.get("c")
        assert found.replication_factor == 2
        assert len(found.shards) == 3
        await world.store.txn([], {}, ["nodes/s2", "nodes/s3"])
        await world.c1.catalog.create("d", request())
        assert world.c1.catalog.get("d").replication_factor == 1

    run(test)


def test_factors_that_cannot_be_met_are_refused() -> None:
    async def test(world: World) -> None:
        with pytest.raises(BadRequest, match=r"replication_factor 4 .* there are 3"):
            await world.c1.catalog.create("c", request(replication_factor=4))
        with pytest.raises(BadRequest, match="write_consistency_factor` 3 is more than"):
            await world.c1.catalog.create(
                "c", request(replication_factor=2, write_consistency_factor=3)
            )
        await world.c1.catalog.create(
            "c", request(replication_factor=2, write_consistency_factor=2)
        )

    run(test)


def test_a_creation_that_a_node_refuses_leaves_nothing() -> None:
    async def test(world: World) -> None:
        world.all[1].plan("create_shard", *[Unavailable("cannot connect")] * 99)
        with pytest.raises(Unavailable, match="storage node s2"):
            await world.c1.catalog.create("c", request(replication_factor=3))
        assert (await world.store.range("collections/"))[0] == []
        assert (await world.store.range("shards/"))[0] == []
        assert not any(node.shards for node in world.all)
        world.all[1].script.clear()
        await world.c2.catalog.create("c", request())

    run(test)


def test_a_creator_that_hangs_gives_up() -> None:
    async def test(world: World) -> None:
        world.all[0].plan("create_shard", asyncio.Event())
        with pytest.raises(Unavailable, match="within 30 s"):
            await world.c1.catalog.create("c", request(replication_factor=3, shard_number=1))
        await world.c1.catalog.create("c", request())

    run(test)


def test_a_creation_that_died_half_way_is_removed_after_a_while_and_not_at_once() -> None:
    async def test(world: World) -> None:
        half = CollectionRecord(
            id=9,
            name="half",
            state=CollectionState.CREATING,
            shard_number=1,
            config=request().model_dump(mode="json", exclude_unset=True),
        )
        shard = ShardRecord(collection_id=9, shard=0, primary="s1", in_sync=["s1"])
        await world.store.txn([], {half.key: half.to_bytes(), shard.key: shard.to_bytes()})
        world.all[0].shards.add(ShardKey(9, 0))
        later = await Front(world.store, world.nodes, "c3").start()
        await asyncio.sleep(CREATING_S_MAX - 1)
        assert await world.store.get(half.key) is not None
        with pytest.raises(NotFound):
            await world.c1.catalog.find("half")
        await asyncio.sleep(2)
        assert await world.store.get(half.key) is None
        assert await world.store.get(shard.key) is None
        assert not world.all[0].shards
        await later.close()

    run(test)


def test_coordinators_that_change_one_collection_do_not_undo_each_other() -> None:
    async def test(world: World) -> None:
        await world.c1.catalog.create("c", request())
        await world.c2.catalog.find("c")
        world.store.deaf = True
        keyword: dict[str, Any] = {"type": "keyword"}
        await asyncio.gather(
            *(front.catalog.set_index("c", name, keyword)
              for front, name in ((world.c1, "a"), (world.c2, "b"), (world.c1, "d")))
        )  # fmt: skip
        await world.c2.catalog.set_index("c", "e", keyword)
        assert sorted(world.c2.catalog.get("c").record.payload_schema) == ["a", "b", "d", "e"]
        assert await world.c1.catalog.delete("c")
        assert not await world.c2.catalog.delete("c")
        with pytest.raises(NotFound):
            await world.c2.catalog.set_index("c", "x", keyword)

    run(test)


@pytest.mark.parametrize("happened", [True, False])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_change_that_may_have_happened_is_settled(happened: bool, at: int) -> None:
    async def test(world: World) -> None:
        await world.c1.catalog.create("other", request())
        world.store.uncertain = [happened] if at < 2 else [None, happened]
        if at:
            await world.c1.catalog.create("c", request())
        else:
            await world.c1.catalog.delete("other")
            assert not (await world.store.range("collections/other"))[0]
            return
        assert (await world.c2.catalog.find("c")).record.state is CollectionState.ACTIVE
        burnt = at == 1 and happened  # an id that may be taken is left alone
        assert (await world.c2.catalog.find("c")).record.id == 2 + burnt

    run(test)


def test_an_activation_that_may_have_happened_is_settled() -> None:
    async def test(world: World) -> None:
        for happened in (True, False):
            world.all[0].plan("create_shard", 0.5)
            world.all[1].plan("create_shard", 0.5)
            world.all[2].plan("create_shard", 0.5)
            name = f"c{happened}"
            creating = asyncio.create_task(world.c1.catalog.create(name, request()))
            await asyncio.sleep(0.1)
            world.store.uncertain = [happened]
            await creating
            assert (await world.c2.catalog.find(name)).record.state is CollectionState.ACTIVE

    run(test)


def test_a_collection_made_anew_elsewhere_is_written_to() -> None:
    async def test(world: World) -> None:
        body = {"vectors": {"size": 2, "distance": "Dot"}, "shard_number": 1}
        assert (await world.c1.http.put(C, json=body)).status_code == 200
        assert (await world.c2.http.post(f"{C}/points/count", json={})).status_code == 200
        world.store.deaf = True
        assert (await world.c1.http.delete(C)).status_code == 200
        assert (await world.c1.http.put(C, json=body)).status_code == 200
        old = ShardKey(1, 0)
        for node in world.all:
            node.plan("write", NotFound(f"{old} is not on this node"))
        points = {"points": [{"id": 1, "vector": [1, 2]}]}
        answer = await world.c2.http.put(f"{C}/points", json=points)
        assert answer.status_code == 200, answer.text
        assert answer.headers["shoal-token"].startswith("2.0:")
        assert (await world.c1.http.delete(C)).status_code == 200
        for node in world.all:
            node.script.clear()
            node.plan("write", *[NotFound("not on this node")] * 3)
        answer = await world.c2.http.put(f"{C}/points", json=points)
        assert answer.status_code == 404
        assert "doesn't exist" in answer.text

    run(test)


def test_what_the_monitor_did_is_shown() -> None:
    async def test(world: World) -> None:
        await world.c1.catalog.create("c", request(shard_number=1))
        done = TakenAction(
            at=datetime(2026, 1, 2, tzinfo=UTC),
            action="promote",
            collection_id=1,
            shard=0,
            node="s2",
            outcome="done",
            reason="The primary s1 lost its lease.",
        )
        record = ActionsRecord(actions=[done, done.model_copy(update={"collection_id": 9})])
        await world.store.txn([], {ACTIONS_KEY: record.to_bytes()})
        report = (await world.c2.http.get("/shoal/v1/cluster")).json()["result"]
        assert [action["collection"] for action in report["actions"]] == [None, "c"]
        assert report["actions"][1]["reason"] == "The primary s1 lost its lease."
        assert report["actions"][1]["at"] == "2026-01-02T00:00:00.000+00:00"

    run(test)


# -- read options ---------------------------------------------------------------------------------
def test_tokens() -> None:
    seen = {ShardKey(7, 0): 12, ShardKey(7, 3): 2**53}
    assert parse_token(format_token(seen)) == seen
    assert parse_token("1.0:5, 1.0:9,1.0:7") == {ShardKey(1, 0): 9}
    for wrong in ("", "x", "1.0", "1.0:", "1.0:5;1.1:2", "1.0:-1", "1.0:" + "9" * 30, "1.0:٣"):
        with pytest.raises(BadRequest, match="shoal-token"):
            parse_token(wrong)
    with pytest.raises(BadRequest, match="may have"):
        parse_token("1.0:1," * TOKEN_BYTES_MAX)


@pytest.mark.parametrize(
    ("consistency", "strong"),
    [(None, False), ("1", False), ("2", True), ("majority", True), ("quorum", True), ("all", True)],
)
def test_consistency(consistency: str | None, strong: bool) -> None:
    assert read_wanted(consistency, None, 2).strong is strong


def test_a_consistency_above_the_replication_factor_is_refused() -> None:
    with pytest.raises(BadRequest, match="consistency 3 is more than the replication factor 2"):
        read_wanted("3", None, 2)


def test_options_and_tokens_over_http() -> None:
    async def main() -> None:
        store, storage = FakeStore(), FakeStorage()
        coordinator = Coordinator(
            store=store, storage=storage, encoder=None, settings=CoordinatorSettings()
        )
        await coordinator.start()
        app = create_app(coordinator, health=lambda: READY, api_key=None, read_only_api_key=None)
        transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://shoal") as http:
            body = {
                "vectors": {"size": 2, "distance": "Dot"},
                "shard_number": 2,
                "replication_factor": 2,  # on one machine: taken, and shown as not met
            }
            assert (await http.put(C, json=body)).status_code == 200
            points = [{"id": n, "vector": [n, 1]} for n in range(20)]
            answer = await http.put(f"{C}/points?ordering=strong", json={"points": points})
            token = answer.headers["shoal-token"]
            assert parse_token(token) == {ShardKey(1, 0): 1, ShardKey(1, 1): 1}
            await http.post(f"{C}/points/query", json={"query": [1, 1]})
            assert not storage.reads[-1].strong
            headers = {"shoal-token": token}
            for path, sent in (
                ("query", {"query": [1, 1]}),
                ("query", {}),
                ("query", {"query": 3}),
                ("scroll", {}),
                ("count", {}),
                ("", {"ids": [1, 2]}),
            ):
                storage.reads.clear()
                path = f"{C}/points/{path}".removesuffix("/")
                answer = await http.post(f"{path}?consistency=majority", json=sent, headers=headers)
                assert answer.status_code == 200, answer.text
                assert storage.reads
                assert all(read.strong and len(read.token) == 2 for read in storage.reads)
            answer = await http.get(f"{C}/points/3?consistency=2", headers=headers)
            assert answer.status_code == 200
            answer = await http.get(f"{C}/points/3?consistency=3")
            assert answer.status_code == 400
            assert "replication factor 2" in answer.text
            answer = await http.get(f"{C}/points/3", headers={"shoal-token": "nonsense"})
            assert answer.status_code == 400
            operations = {"operations": [{"delete": {"points": [n]}} for n in range(6)]}
            answer = await http.post(f"{C}/points/batch", json=operations)
            assert set(parse_token(answer.headers["shoal-token"])) == set(parse_token(token))
            storage.error = Unavailable("the connection broke")
            storage.error.maybe_applied = True
            answer = await http.post(f"{C}/points/delete", json={"points": [1]})
            assert (answer.status_code, answer.headers["shoal-maybe-applied"]) == (503, "true")
            storage.error = None
            answer = await http.post(f"{C}/points/delete", json={"points": "x"})
            assert answer.headers["shoal-maybe-applied"] == "false"

            answer = await http.get("/cluster")
            assert answer.json()["result"] == {"status": "disabled"}
            shown = (await http.get(f"{C}/cluster")).json()["result"]
            assert [shard["state"] for shard in shown["local_shards"]] == ["Active", "Active"]
            assert sum(shard["points_count"] for shard in shown["local_shards"]) == 14
            assert shown["remote_shards"] == []
            assert shown["under_replicated_shards"] == 2
            shown = (await http.get("/shoal/v1/cluster")).json()["result"]
            assert shown["mode"] == "one machine"
            assert [s["state"] for s in shown["collections"][0]["shards"]] == [
                "under-replicated"
            ] * 2
        await coordinator.close()

    asyncio.run(main())


# -- how the cluster looks ------------------------------------------------------------------------
def test_the_cluster_is_described() -> None:
    async def test(world: World) -> None:
        await world.c1.catalog.create("c", request(replication_factor=3, shard_number=1))
        key = ShardKey(1, 0)
        record = await record_of(world.store)
        changed = record.model_copy(
            update={
                "primary": "s1",
                "in_sync": ["s2", "s1"],
                "joining": ["s3"],
                "leaving": ["s9"],
                "term": 4,
            }
        )
        await world.store.txn([], {record.key: changed.to_bytes()})
        await world.store.txn([], {}, ["nodes/s2"])
        await asyncio.sleep(0.01)  # for the watches
        world.nodes.lost = {"s9"}
        shown = (await world.c2.http.get("/shoal/v1/cluster")).json()["result"]
        assert shown["node"] == "c2"
        by_id = {node["id"]: node for node in shown["nodes"]}
        assert by_id["s1"]["primaries"] == 1
        assert not by_id["s2"]["registered"]
        assert "nobody knows" in by_id["s9"]["unreachable"]
        (shard,) = shown["collections"][0]["shards"]
        assert shard["term"] == 4
        assert shard["state"] == "under-replicated"
        assert [(r["node"], r["part"], r["lost"]) for r in shard["replicas"]] == [
            ("s1", "in_sync", False),
            ("s2", "in_sync", True),
            ("s3", "joining", False),
            ("s9", "leaving", True),
        ]
        assert shard["replicas"][0]["role"] == "primary"

        shown = (await world.c2.http.get(f"{C}/cluster")).json()["result"]
        states = {one["peer_id"]: one["state"] for one in shown["remote_shards"]}
        assert states == {
            peer_id("s1"): "Active",
            peer_id("s2"): "Dead",
            peer_id("s3"): "Partial",
            peer_id("s9"): "Dead",
        }
        assert shown["local_shards"] == []
        peers = (await world.c1.http.get("/cluster")).json()["result"]
        assert peers["status"] == "enabled"
        assert peers["peers"][str(peer_id("s1"))] == {"uri": "http://s1:1/"}
        await world.store.txn([], {}, ["nodes/s1"])
        shown = (await world.c2.http.get("/shoal/v1/cluster")).json()["result"]
        assert shown["collections"][0]["shards"][0]["state"] == "unavailable"
        assert key in world.all[0].shards
        assert json.dumps(shown)

    run(test)


def test_clients_can_read_it() -> None:
    from qdrant_client.http import models

    async def test(world: World) -> None:
        await world.c1.catalog.create("c", request(replication_factor=2, shard_number=2))
        shown = (await world.c1.http.get(f"{C}/cluster")).json()["result"]
        assert len(models.CollectionClusterInfo.model_validate(shown).remote_shards) == 4
        shown = (await world.c1.http.get("/cluster")).json()["result"]
        models.ClusterStatusOneOf1.model_validate(shown)

    run(test)
