"""Changes of collections that meet others, or a metadata store that fails in between."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import pytest
from fakes.clock import run_virtual
from fakes.metadata import FakeStore
from fakes.nodes import FakeNode, FakeNodes

from coordinator.catalog import CREATING_S_MAX, Catalog
from coordinator.router import Router
from shoal.api.models import CreateCollection
from shoal.errors import AlreadyExists, Busy, ShoalError
from shoal.metadata.contract import Compare, KeyValue, TxnResult
from shoal.metadata.schema import (
    CollectionRecord,
    CollectionState,
    NodeRecord,
    NodeRole,
    ShardRecord,
)
from shoal.settings import CoordinatorSettings


def request(size: int = 2, **more: Any) -> CreateCollection:
    body = {"vectors": {"size": size, "distance": "Dot"}, "shard_number": 1, **more}
    return CreateCollection.model_validate(body, strict=False)


class Store(FakeStore):
    """Whose answers are on their way for a moment.

    down_after_txns  so many transactions are still answered; then it is down.
    after_get        called when a read is done and its answer is on its way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.down_after_txns: int | None = None
        self.after_get: Callable[[str], Awaitable[None]] | None = None

    async def get(self, key: str) -> KeyValue | None:
        found = await super().get(key)
        if self.after_get is not None:
            after, self.after_get = self.after_get, None
            await after(key)
        await asyncio.sleep(0.001)
        return found

    async def txn(
        self,
        compares: Sequence[Compare],
        puts: Mapping[str, bytes],
        deletes: Sequence[str] = (),
        *,
        lease: int | None = None,
    ) -> TxnResult:
        await asyncio.sleep(0.001)
        try:
            return await super().txn(compares, puts, deletes, lease=lease)
        finally:
            if self.down_after_txns is not None:
                self.down_after_txns -= 1
                self.down = self.down_after_txns <= 0


class World:
    """Catalogs c1 and c2 of two coordinators over one store and two storage nodes."""

    def __init__(self) -> None:
        self.store = Store()
        self.all = [FakeNode(name, leads=True) for name in ("s1", "s2")]
        self.routers = [Router(self.store, FakeNodes(self.all)) for _ in range(2)]
        settings = CoordinatorSettings(default_replication_factor=2)
        self.c1, self.c2 = (Catalog(self.store, each, settings, None) for each in self.routers)

    async def start(self) -> None:
        for node in self.all:
            record = NodeRecord(id=node.id, role=NodeRole.STORAGE, incarnation="1", grpc="s:1")
            await self.store.txn([], {record.key: record.to_bytes()})
        for router, catalog in zip(self.routers, (self.c1, self.c2), strict=True):
            await router.start()
            await catalog.load()

    async def close(self) -> None:
        for router, catalog in zip(self.routers, (self.c1, self.c2), strict=True):
            await catalog.close()
            await router.close()


def run(test: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World()
        await world.start()
        try:
            await test(world)
        finally:
            await world.close()

    run_virtual(main())


def test_of_two_who_create_one_name_at_once_one_succeeds() -> None:
    async def test(world: World) -> None:
        outcomes = await asyncio.gather(
            world.c1.create("c", request(2)),
            world.c2.create("c", request(3)),
            return_exceptions=True,
        )
        refused = [type(outcome) for outcome in outcomes if outcome is not None]
        assert refused == [AlreadyExists]
        winner, size = (world.c1, 2) if outcomes[0] is None else (world.c2, 3)
        assert winner.get("c").fields.dense[""].dim == size
        entries, _ = await world.store.range("collections/")
        record = CollectionRecord.from_bytes(entries[0].key, entries[0].value)
        assert record.state is CollectionState.ACTIVE
        assert record.config["vectors"]["size"] == size  # type: ignore[index, call-overload]

    run(test)


def test_a_name_that_was_freed_elsewhere_just_now_can_be_taken() -> None:
    async def test(world: World) -> None:
        await world.c1.create("c", request(2))
        await world.c2.find("c")
        world.store.deaf = True
        assert await world.c1.delete("c")
        await world.c2.create("c", request(3))
        assert world.c2.get("c").fields.dense[""].dim == 3

    run(test)


def test_an_index_goes_to_the_collection_that_has_the_name_now() -> None:
    async def test(world: World) -> None:
        await world.c1.create("c", request())
        await world.c2.find("c")
        world.store.deaf = True
        assert await world.c1.delete("c")
        await world.c1.create("c", request())
        await world.c2.set_index("c", "year", {"type": "integer"})
        assert list(world.c2.get("c").record.payload_schema) == ["year"]

    run(test)


def test_an_answer_that_is_older_than_the_news_does_not_hide_them() -> None:
    async def test(world: World) -> None:
        async def made(key: str) -> None:
            await world.c1.create("c", request())
            await asyncio.sleep(0.1)  # the watches have told of it

        world.store.after_get = made
        await world.c2.find("c")
        assert world.c2.names() == ["c"]

    run(test)


def test_a_change_whose_outcome_cannot_be_asked_for_may_have_happened() -> None:
    async def test(world: World) -> None:
        for node in world.all:
            node.plan("create_shard", 0.5)
        creating = asyncio.create_task(world.c1.create("c", request()))
        await asyncio.sleep(0.2)
        world.store.uncertain, world.store.down_after_txns = [True], 1  # the activation
        with pytest.raises(ShoalError) as told:
            await creating
        assert told.value.maybe_applied
        world.store.down, world.store.down_after_txns = False, None
        assert (await world.c2.find("c")).record.state is CollectionState.ACTIVE

        world.store.uncertain, world.store.down_after_txns = [True], 1
        with pytest.raises(ShoalError) as told:
            await world.c2.delete("c")
        assert told.value.maybe_applied
        world.store.down, world.store.down_after_txns = False, None
        assert not (await world.store.range("collections/"))[0]

    run(test)


def test_a_deletion_that_landed_late_was_a_deletion() -> None:
    """etcd may carry out a transaction after we have looked whether it did."""

    async def test(world: World) -> None:
        await world.c1.create("c", request())
        world.store.uncertain = [False]

        async def looks(key: str) -> None:
            world.store.after_get = lands

        async def lands(key: str) -> None:
            await world.c2.delete("c")

        world.store.after_get = looks
        assert await world.c1.delete("c")

    run(test)


def test_a_half_made_collection_goes_also_when_the_store_was_away_at_its_time() -> None:
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
        await asyncio.sleep(CREATING_S_MAX - 5)
        world.store.down = True
        await asyncio.sleep(10)
        world.store.down = False
        await asyncio.sleep(CREATING_S_MAX + 10)
        assert await world.store.get(half.key) is None
        await world.c1.create("half", request())

    run(test)


def test_a_deletion_is_done_when_the_records_are_gone() -> None:
    async def test(world: World) -> None:
        await world.c1.create("c", request(shard_number=4))
        for node in world.all:
            node.plan("drop_shard", Busy("much to do"), *[2.0] * 3)
        began = asyncio.get_running_loop().time()
        assert await world.c1.delete("c")
        assert asyncio.get_running_loop().time() - began < 4  # side by side

    run(test)


def test_a_record_that_cannot_be_read_hides_no_other() -> None:
    async def test(world: World) -> None:
        await world.c1.create("b", request())
        damaged = {"collections/a": b'{"version": 9}', "shards/0/0": b"{}", "collections/A": b"{}"}
        await world.store.txn([], damaged)
        settings = CoordinatorSettings()
        router = Router(world.store, FakeNodes(world.all))
        catalog = Catalog(world.store, router, settings, None)
        await router.start()
        await catalog.load()
        assert catalog.names() == ["b"]
        assert [record.collection_id for record in router.records()] == [1]
        await catalog.close()
        await router.close()

    run(test)


def test_an_activation_keeps_what_others_have_changed_since() -> None:
    """The store did not say that it happened, and somebody else made an index before we looked."""

    async def test(world: World) -> None:
        for node in world.all:
            node.plan("create_shard", 0.5)
        creating = asyncio.create_task(world.c1.create("c", request()))
        await asyncio.sleep(0.2)
        world.store.uncertain = [True]

        async def index(_: Any) -> None:
            await world.c2.set_index("c", "year", {"type": "integer"})

        original = world.store.get

        async def get(key: str) -> KeyValue | None:
            world.store.get = original  # type: ignore[method-assign]
            await index(key)
            return await original(key)

        world.store.get = get  # type: ignore[method-assign]
        await creating
        assert list((await world.c2.find("c")).record.payload_schema) == ["year"]
        assert list((await world.c1.find("c")).record.payload_schema) == ["year"]

    run(test)
