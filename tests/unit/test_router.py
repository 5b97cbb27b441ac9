"""The router over scripted nodes, on a virtual clock: hedging, floors, failover, what is sent again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from fakes.clock import run_virtual
from fakes.metadata import FakeStore
from fakes.nodes import FakeNode, FakeNodes

from coordinator.router import Router, RouterSettings
from coordinator.routing import HEDGE_DELAY_S_MIN, HEDGE_DELAY_UNKNOWN_S, ShardGone
from shoal.errors import (
    BadRequest,
    Busy,
    NotFound,
    NotPrimary,
    ShardStopped,
    StorageFull,
    TimedOut,
    Unavailable,
)
from shoal.ids import PointIds
from shoal.metadata.contract import Compare
from shoal.metadata.schema import ShardRecord
from shoal.storage_api import Delete, Read, Scroll, Search, Selector, ShardKey, ShardSpec

KEY = ShardKey(7, 0)
QUERY = Search("", np.zeros(2, np.float32), 3)
WRITE = Delete(Selector(ids=PointIds.from_keys([1])))


class World:
    """Three nodes that hold one shard; s1 leads."""

    def __init__(self, store: FakeStore, **settings: float) -> None:
        self.store = store
        self.s1, self.s2, self.s3 = FakeNode("s1", leads=True), FakeNode("s2"), FakeNode("s3")
        self.all = [self.s1, self.s2, self.s3]
        self.nodes = FakeNodes(self.all)
        self.router = Router(store, self.nodes, settings=RouterSettings(**settings))

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def record(self, primary: str = "s1", in_sync: str = "s1 s2 s3", term: int = 1) -> None:
        record = ShardRecord(
            collection_id=7, shard=0, term=term, primary=primary, in_sync=in_sync.split()
        )
        await self.store.txn([], {record.key: record.to_bytes()})

    async def promote(self, node: FakeNode, in_sync: str) -> None:
        for other in self.all:
            other.leads = other is node
        await self.record(node.id, in_sync, term=2)

    async def search(self, read: Read | None = None) -> str:
        if read is None:
            return await self.router.search(KEY, QUERY)  # type: ignore[return-value]
        return await self.router.search(KEY, QUERY, read)  # type: ignore[return-value]

    def searched(self) -> list[int]:
        return [node.called("search") for node in self.all]


Test = Callable[[World], Awaitable[None]]


def run(test: Test, *, in_sync: str = "s1 s2 s3", **settings: float) -> None:
    async def main() -> None:
        world = World(FakeStore(), **settings)
        await world.record(in_sync=in_sync)
        await world.router.start()
        try:
            await test(world)
            left = [task for task in asyncio.all_tasks() if task.get_name().startswith("refresh")]
            assert not left
            assert all(target.outstanding == 0 for target in world.router._targets.values())
        finally:
            await world.router.close()

    run_virtual(main())


# -- reads: who is asked --------------------------------------------------------------------------
def test_reads_spread_over_all_replicas_in_sync() -> None:
    async def test(world: World) -> None:
        for _ in range(9):
            await world.search()
        assert world.searched() == [3, 3, 3]
        assert world.now == 0.0

    run(test)


def test_the_replica_with_the_fewest_requests_under_way_is_asked() -> None:
    async def test(world: World) -> None:
        held = asyncio.Event()
        for node in world.all:
            node.plan("search", held)
        waiting = [asyncio.create_task(world.search()) for _ in range(2)]
        for _ in range(3):
            await asyncio.sleep(0)  # until both have asked
        (free,) = [node for node in world.all if not node.called("search")]
        free.script.clear()
        for _ in range(4):
            assert await world.search() == free.id
        held.set()
        await asyncio.gather(*waiting)

    run(test)


def test_a_late_replica_is_overtaken_by_a_second_one_and_then_asked_last() -> None:
    async def test(world: World) -> None:
        never = asyncio.Event()
        for node in world.all:
            node.plan("search", never)  # whoever is first hangs, and whoever is second as well
        answer = asyncio.create_task(world.search())
        await asyncio.sleep(HEDGE_DELAY_UNKNOWN_S * 2.5)
        assert sum(world.searched()) == 3
        assert not answer.done()
        for node in world.all:
            node.script["search"].clear()
        answer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answer
        await asyncio.sleep(0)
        assert [node.cancelled for node in world.all] == [1, 1, 1]

    run(test)


def test_the_first_answer_counts_and_the_caller_is_not_cancelled() -> None:
    async def test(world: World) -> None:
        never = asyncio.Event()
        started = world.now
        first = world.router._turn + 1
        slow = world.all[first % 3]
        slow.plan("search", never)
        task = asyncio.current_task()
        assert task is not None
        answered = await world.search()
        assert answered != slow.id
        assert world.now - started == pytest.approx(HEDGE_DELAY_UNKNOWN_S)
        assert task.cancelling() == 0
        await asyncio.sleep(0)
        assert slow.cancelled == 1
        before = slow.called("search")
        for _ in range(6):  # it was slow: the others are asked for a while
            await world.search()
        assert slow.called("search") == before
        await asyncio.sleep(3.0)
        for _ in range(3):
            await world.search()
        assert slow.called("search") > before

    run(test)


def test_the_delay_follows_the_p95_and_is_never_below_5_ms() -> None:
    async def test(world: World) -> None:
        for _ in range(48):
            for node in world.all:
                node.script["search"].clear()
                node.plan("search", 0.02)
            await world.search()
        never = asyncio.Event()
        slow = world.all[(world.router._turn + 1) % 3]
        for node in world.all:
            node.script["search"].clear()
        slow.plan("search", never)
        started = world.now
        await world.search()
        assert world.now - started == pytest.approx(0.02, abs=0.001)
        for _ in range(200):
            await world.search()
        slow = world.all[(world.router._turn + 1) % 3]
        slow.plan("search", never)
        started = world.now
        await world.search()
        assert world.now - started == pytest.approx(HEDGE_DELAY_S_MIN)

    run(test)


def test_hedges_have_a_budget() -> None:
    async def test(world: World) -> None:
        for node in world.all:
            node.plan("search", *[HEDGE_DELAY_UNKNOWN_S * 1.5] * 2000)
        await asyncio.gather(*(world.search() for _ in range(1000)))
        hedged = sum(world.searched()) - 1000
        assert 100 <= hedged <= 205  # 100 saved, a tenth of the requests, ten a second
        assert world.now == pytest.approx(HEDGE_DELAY_UNKNOWN_S * 1.5)

    run(test)


def test_the_next_replica_answers_when_one_fails_whatever_the_reason() -> None:
    async def test(world: World) -> None:
        for trouble in (
            Unavailable("gone"),
            NotPrimary("not me"),
            TimedOut("too long"),
            ShardStopped("damaged"),
            NotFound("not here"),
            Busy("full"),
        ):
            for node in world.all:
                node.calls.clear()
                node.script.clear()
            world.s1.plan("search", trouble)
            world.s2.plan("search", trouble)
            assert await world.search() == "s3" or sum(world.searched()) == 1
            await asyncio.sleep(5)
        world.nodes.lost = {"s1", "s2"}
        assert await world.search() == "s3"

    run(test)


def test_a_wrong_request_is_asked_once() -> None:
    async def test(world: World) -> None:
        for node in world.all:
            node.plan("search", BadRequest("Wrong input: no"))
        with pytest.raises(BadRequest):
            await world.search()
        assert sum(world.searched()) == 1

    run(test)


def test_damage_everywhere_is_told_and_not_waited_for() -> None:
    async def test(world: World) -> None:
        world.s1.plan("search", ShardStopped("segment 3 is damaged"))
        with pytest.raises(ShardStopped, match="segment 3"):
            await world.search()
        assert world.now == 0.0

    run(test, in_sync="s1")


# -- floors and freshness -------------------------------------------------------------------------
def test_reads_see_own_writes_and_never_go_back() -> None:
    async def test(world: World) -> None:
        assert (await world.router.write(KEY, WRITE)).sequence == 1
        for _ in range(6):
            assert await world.search() == "s1"  # the others have not applied it
        world.s2.applied = 5
        await asyncio.sleep(3)
        while await world.search() != "s2":
            pass
        guards = [guard for node in world.all for _, guard in node.calls if guard is not None]
        assert {guard.min_applied for guard in guards} == {1}
        world.s3.applied = 4
        for _ in range(6):  # 5 was read: nobody may answer with less
            assert await world.search() == "s2"

    run(test)


def test_a_token_is_heeded_and_does_not_stay() -> None:
    async def test(world: World) -> None:
        world.s3.applied = 9
        assert await world.search(Read(token={KEY: 9, ShardKey(8, 0): 50})) == "s3"
        world.s3.applied = 9
        with pytest.raises(Unavailable, match="no replica in sync") as refused:
            await world.search(Read(token={KEY: 1000}))
        assert world.now == pytest.approx(2.0, abs=0.2)
        assert not refused.value.maybe_applied
        await world.search()
        guard = [g for node in world.all for _, g in node.calls][-1]
        assert guard is not None
        assert guard.min_applied == 9

    run(test, read_wait_s=2.0)


def test_strong_reads_go_to_the_primary_and_wait_for_a_new_one() -> None:
    async def test(world: World) -> None:
        for _ in range(3):
            assert await world.search(Read(strong=True)) == "s1"
        assert all(guard.strong for _, guard in world.s1.calls if guard is not None)
        world.nodes.lost = {"s1"}
        asyncio.get_running_loop().call_later(
            4.0, lambda: asyncio.ensure_future(world.promote(world.s2, "s2 s3"))
        )
        assert await world.search(Read(strong=True)) == "s2"
        assert 4.0 <= world.now < 4.1

    run(test)


def test_a_strong_read_leaves_a_primary_that_hangs_when_there_is_another() -> None:
    async def test(world: World) -> None:
        world.s1.plan("search", asyncio.Event())
        asyncio.get_running_loop().call_later(
            2.0, lambda: asyncio.ensure_future(world.promote(world.s3, "s2 s3"))
        )
        assert await world.search(Read(strong=True)) == "s3"
        assert world.now < 2.5

    run(test)


def test_reads_wait_out_a_moment_without_any_replica() -> None:
    async def test(world: World) -> None:
        world.nodes.lost = {"s1", "s2", "s3"}
        asyncio.get_running_loop().call_later(0.7, world.nodes.lost.clear)
        await world.search()
        assert 0.7 <= world.now < 2.0
        world.nodes.lost = {"s1", "s2", "s3"}
        started = world.now
        with pytest.raises(Unavailable, match="no replica in sync"):
            await world.search()
        assert world.now - started == pytest.approx(5.0, abs=0.1)

    run(test)


def test_a_read_that_nobody_answers_ends() -> None:
    async def test(world: World) -> None:
        for node in world.all:
            node.plan("search", *[asyncio.Event() for _ in range(5)])
        with pytest.raises(TimedOut) as refused:
            await world.search()
        assert not refused.value.maybe_applied
        assert 3.0 <= world.now < 4.0

    run(test, read_timeout_s=3.0, read_wait_s=1.0)


# -- writes ---------------------------------------------------------------------------------------
def test_a_write_follows_the_primary() -> None:
    async def test(world: World) -> None:
        await world.router.write(KEY, WRITE)
        world.store.deaf = True
        await world.promote(world.s2, "s1 s2 s3")  # and the watch does not tell
        world.s2.applied = 1
        assert (await world.router.write(KEY, WRITE)).sequence == 2
        assert world.s1.called("write") == 2
        assert world.now == 0.0

    run(test)


@pytest.mark.parametrize("lost", [True, False])
def test_a_write_waits_out_a_failover(lost: bool) -> None:
    async def test(world: World) -> None:
        if lost:
            world.nodes.lost = {"s1"}
        else:
            world.s1.plan("write", *[Unavailable("cannot connect")] * 1000)
        asyncio.get_running_loop().call_later(
            12.0, lambda: asyncio.ensure_future(world.promote(world.s2, "s2 s3"))
        )
        writes = [asyncio.create_task(world.router.write(KEY, WRITE)) for _ in range(5)]
        done = await asyncio.gather(*writes)
        assert sorted(result.sequence for result in done) == [1, 2, 3, 4, 5]
        assert 12.0 <= world.now < 12.1

    run(test)


def test_a_write_without_a_primary_ends_and_says_that_it_did_not_happen() -> None:
    async def test(world: World) -> None:
        world.nodes.lost = {"s1"}
        with pytest.raises(Unavailable, match="did not happen") as refused:
            await world.router.write(KEY, WRITE)
        assert not refused.value.maybe_applied
        assert refused.value.retryable
        assert world.now == pytest.approx(15.0, abs=0.1)

    run(test)


def test_retries_have_a_budget() -> None:
    async def test(world: World) -> None:
        world.s1.plan("write", *[Unavailable("cannot connect")] * 100_000)
        writes = [asyncio.create_task(world.router.write(KEY, WRITE)) for _ in range(500)]
        done = await asyncio.gather(*writes, return_exceptions=True)
        assert all(isinstance(one, Unavailable) for one in done)
        # each once; then 100 saved, 10 a second, and a tenth of the requests
        assert world.s1.called("write") <= 500 + 100 + 150 + 50
        assert world.store.reads < 1000

    run(test)


@pytest.mark.parametrize("timed_out", [True, False])
def test_a_write_that_may_have_happened_is_not_sent_again(timed_out: bool) -> None:
    async def test(world: World) -> None:
        error = TimedOut("no answer") if timed_out else Unavailable("the connection broke")
        error.maybe_applied = True
        world.s1.plan("write", error)
        with pytest.raises((TimedOut, Unavailable)) as refused:
            await world.router.write(KEY, WRITE)
        assert "may have happened" in refused.value.message
        assert refused.value.maybe_applied
        assert world.s1.called("write") == 1

    run(test)


def test_a_write_that_hangs_ends_and_may_have_happened() -> None:
    async def test(world: World) -> None:
        world.s1.plan("write", asyncio.Event())
        with pytest.raises(TimedOut) as refused:
            await world.router.write(KEY, WRITE)
        assert "may have happened" in refused.value.message
        assert refused.value.maybe_applied
        assert world.now == pytest.approx(60.0)

    run(test)


@pytest.mark.parametrize("error", [Busy("full"), StorageFull("full"), BadRequest("no")])
def test_what_the_primary_refuses_is_told(error: Exception) -> None:
    async def test(world: World) -> None:
        world.s1.plan("write", error)
        with pytest.raises(type(error)):
            await world.router.write(KEY, WRITE)
        assert world.s1.called("write") == 1
        assert world.now == 0.0

    run(test)


def test_without_a_metadata_store_the_known_record_has_to_do() -> None:
    async def test(world: World) -> None:
        world.store.down = True
        await world.search()
        await world.router.write(KEY, WRITE)
        world.s1.plan("write", Unavailable("cannot connect"), Unavailable("cannot connect"))
        await world.router.write(KEY, WRITE)
        assert world.s1.called("write") == 4

    run(test)


# -- shards come and go ---------------------------------------------------------------------------
def test_a_shard_that_the_watch_has_not_told_of_is_found() -> None:
    async def test(world: World) -> None:
        world.store.deaf = True
        other = ShardRecord(collection_id=9, shard=2, primary="s2", in_sync=["s2"])
        await world.store.txn([], {other.key: other.to_bytes()})
        assert await world.router.search(ShardKey(9, 2), QUERY) == "s2"
        with pytest.raises(ShardGone, match="deleted"):
            await world.router.search(ShardKey(9, 3), QUERY)

    run(test)


def test_a_collection_deleted_elsewhere_is_gone_at_the_next_request() -> None:
    async def test(world: World) -> None:
        world.store.deaf = True
        await world.store.txn([], {}, ["shards/7/0"])
        for node in world.all:
            node.plan("search", NotFound("not on this node"))
            node.plan("write", NotFound("not on this node"))
        with pytest.raises(ShardGone):
            await world.search()
        with pytest.raises(ShardGone):
            await world.router.write(KEY, WRITE)
        assert world.router.records() == []

    run(test)


def test_shards_are_made_on_all_nodes_and_dropped_from_them() -> None:
    async def test(world: World) -> None:
        spec = ShardSpec(KEY, "c", {})
        world.s2.plan("create_shard", Unavailable("cannot connect"))
        await world.router.create_shard(spec)
        assert all(node.shards == {KEY} for node in world.all)
        assert world.s2.called("create_shard") == 2
        said = await world.router.statuses()
        assert list(said) == ["s1", "s2", "s3"]
        world.s3.plan("status", asyncio.Event())
        said = await world.router.statuses()
        assert isinstance(said["s3"], TimedOut)
        await world.store.txn([], {}, ["shards/7/0"])
        await asyncio.sleep(0.01)
        world.nodes.lost = {"s3"}
        await world.router.drop_shard(KEY)
        assert [bool(node.shards) for node in world.all] == [False, False, True]
        world.s1.plan("create_shard", *[Unavailable("cannot connect")] * 3)
        await world.record()
        with pytest.raises(Unavailable, match="storage node s"):
            await world.router.create_shard(spec)

    run(test)


def test_other_reads_take_the_same_way() -> None:
    async def test(world: World) -> None:
        ids = PointIds.from_keys([1, 2])
        assert len(await world.router.retrieve(KEY, ids, True, False)) == 2
        assert len(await world.router.scroll(KEY, Scroll(3))) == 0
        assert await world.router.count(KEY, None) == 1
        assert (await world.router.info(KEY)).points == 7
        assert world.s1.called("info") == 1
        world.s1.plan("info", Unavailable("gone"))
        assert (await world.router.info(KEY)).points == 7

    run(test)


def test_the_only_replica_in_this_process_is_asked_directly() -> None:
    async def main() -> None:
        store = FakeStore()
        record = ShardRecord(collection_id=7, shard=0, primary="s1", in_sync=["s1"])
        await store.txn([Compare(record.key, 0)], {record.key: record.to_bytes()})
        node = FakeNode("s1", leads=True)
        router = Router(store, FakeNodes([node]), local="s1")
        await router.start()
        assert await router.search(KEY, QUERY) == "s1"
        assert (await router.write(KEY, WRITE)).sequence == 1
        assert await router.count(KEY, None) == 1
        node.plan("search", NotPrimary("not yet"))
        assert await router.search(KEY, QUERY) == "s1"
        node.plan("write", NotPrimary("not yet"))
        assert (await router.write(KEY, WRITE)).sequence == 2
        assert "s1" in router._targets
        assert not any(latencies._at for latencies in router._shards[KEY].latencies[1:])
        await router.close()

    run_virtual(main())
