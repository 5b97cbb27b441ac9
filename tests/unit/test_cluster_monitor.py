"""The monitor of a cluster over a real metadata store, with nodes that answer as told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from monitor.cluster import SWITCH_KEY, ClusterMonitor
from monitor.failover import AddJoining, FailoverRules, Leave, Promote
from shoal import limits
from shoal.errors import FormatTooNew, InvariantError, Unavailable
from shoal.health import Health
from shoal.metadata.contract import Compare, KeyValue, TxnResult, Uncertain
from shoal.metadata.embedded import EmbeddedStore
from shoal.metadata.leadership import Leadership
from shoal.metadata.schema import (
    ACTIONS_KEY,
    LEADER_KEY,
    ActionsRecord,
    CollectionRecord,
    CollectionState,
    LeaderRecord,
    NodeRecord,
    NodeRole,
    ShardRecord,
    collection_key,
    node_key,
    shard_key,
)
from shoal.storage_api import ReplicaStatus, ShardInfo, ShardKey

KEY = ShardKey(7, 0)
RULES = FailoverRules(ask_timeout_s=0.05)


class FakeReplicas:
    """A storage node that only says what it holds. down: it does not answer; hung: never."""

    def __init__(self, name: str, *keys: ShardKey) -> None:
        self.name, self.answers_as = name, name
        self.durable = dict.fromkeys(keys, 10)
        self.down = self.hung = self.full = False
        self.lost_s = 0.0
        self.asked = 0

    async def status(self) -> list[ReplicaStatus]:
        self.asked += 1
        if self.down:
            raise Unavailable(f"{self.name} is unreachable")
        if self.hung:
            await asyncio.Event().wait()
        return [
            ReplicaStatus(
                self.answers_as,
                "secondary",
                1,
                at,
                at,
                not self.full,
                key,
                ShardInfo(),
                self.lost_s,
            )
            for key, at in self.durable.items()
        ]


class Cluster:
    """A store, storage nodes with a lease each, and monitors on one clock that stands still."""

    def __init__(self, store: EmbeddedStore) -> None:
        self.store = store
        self.now_s = 0.0
        self.nodes: dict[str, FakeReplicas] = {}
        self.leases: dict[str, int] = {}
        self.monitors: list[ClusterMonitor] = []
        self.unknown: set[str] = set()  # nobody knows their address

    def get(self, name: str) -> FakeReplicas:
        if name in self.unknown:
            raise Unavailable(f"{name} is not known")
        return self.nodes[name]

    async def put(self, key: str, value: bytes, lease: int | None = None) -> None:
        result = await self.store.txn([], {key: value}, lease=lease)
        await self.seen(result.revision)

    async def seen(self, revision: int) -> None:
        """Until every monitor has seen this change."""
        async with asyncio.timeout(20):
            while any(monitor._watched.revision < revision for monitor in self.monitors):  # noqa: ASYNC110, that is another task's to reach
                await asyncio.sleep(0)

    async def add_node(self, name: str, *keys: ShardKey) -> FakeReplicas:
        self.nodes[name] = FakeReplicas(name, *keys)
        await self.register(name)
        return self.nodes[name]

    async def register(self, name: str) -> None:
        self.leases[name] = lease = (await self.store.lease_grant(3_600)).id
        record = NodeRecord(id=name, role=NodeRole.STORAGE, incarnation="i", grpc=f"{name}:1")
        await self.put(node_key(name), record.to_bytes(), lease)

    async def lose_lease(self, name: str) -> None:
        await self.store.lease_revoke(self.leases.pop(name))
        _, revision = await self.store.range("")
        await self.seen(revision)

    async def add_collection(
        self, *in_sync: str, shards: int = 1, state: CollectionState = CollectionState.ACTIVE
    ) -> None:
        record = CollectionRecord(
            id=7,
            name="films",
            state=state,
            shard_number=shards,
            config={"vectors": {"size": 4, "distance": "Dot"}, "replication_factor": 3},
        )
        await self.put(record.key, record.to_bytes())
        for number in range(shards):
            key = ShardKey(7, number)
            for name in in_sync:
                self.nodes[name].durable[key] = 10
            shard = ShardRecord(
                collection_id=7, shard=number, primary=in_sync[0], in_sync=list(in_sync)
            )
            await self.put(shard.key, shard.to_bytes())

    async def monitor(self, name: str = "m1") -> ClusterMonitor:
        lease = (await self.store.lease_grant(3_600)).id
        self.leases[name] = lease
        monitor = ClusterMonitor(
            self.store,
            self,
            node_id=name,
            settings=RULES,
            lease=lambda: self.leases.get(name),
            clock=lambda: self.now_s,
        )
        await monitor._watched.start()  # as start() does, without the loop that looks by itself
        self.monitors.append(monitor)
        return monitor

    async def record(self, key: ShardKey = KEY) -> ShardRecord:
        found = await self.store.get(shard_key(key.collection_id, key.shard))
        assert found is not None
        return ShardRecord.from_bytes(found.key, found.value)

    async def after(self, seconds: float, monitor: ClusterMonitor) -> None:
        """A look, some time, a look; then everybody has seen what came of it."""
        await monitor.look()
        self.now_s += seconds
        await monitor.look()
        _, revision = await self.store.range("")
        await self.seen(revision)


def run(tmp_path: Path, story: Callable[[Cluster], Awaitable[None]]) -> None:
    async def whole() -> None:
        store = await EmbeddedStore.open(tmp_path / "metadata.sqlite")
        cluster = Cluster(store)
        try:
            for name in ("s1", "s2", "s3"):
                await cluster.add_node(name)
            await story(cluster)
        finally:
            for monitor in cluster.monitors:
                await monitor.close()
            await store.close()

    asyncio.run(whole())


def deeds(monitor: ClusterMonitor) -> list[tuple[type, str]]:
    return [(type(deed.action), deed.outcome) for deed in monitor.status().story]


# -- acting ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["down", "hung"])
def test_a_dead_primary_is_replaced(tmp_path: Path, how: str):
    async def story(cluster: Cluster) -> None:
        await cluster.add_collection("s1", "s2", "s3")
        monitor = await cluster.monitor()
        await cluster.after(10, monitor)
        assert deeds(monitor) == []
        setattr(cluster.nodes["s1"], how, True)
        await cluster.after(10, monitor)
        assert deeds(monitor) == [], "it holds its lease"
        await cluster.lose_lease("s1")
        await cluster.after(2.9, monitor)
        assert deeds(monitor) == [], "within the grace period"
        await cluster.after(0.2, monitor)
        assert deeds(monitor) == [(Promote, "done")]
        record = await cluster.record()
        assert (record.term, record.primary, record.in_sync) == (2, "s2", ["s2", "s3"])
        assert b'{kind="promote",outcome="done"} 1' in monitor.metrics()
        assert b"shoal_monitor_leading 1" in monitor.metrics()
        told = await cluster.store.get(ACTIONS_KEY)
        assert told is not None
        (action,) = ActionsRecord.from_bytes(told.key, told.value).actions
        assert (action.action, action.node, action.outcome) == ("promote", "s2", "done")
        assert "s1 lost its lease" in action.reason

    run(tmp_path, story)


def test_a_node_that_lost_its_lease_and_answers_is_left_alone(tmp_path: Path):
    async def story(cluster: Cluster) -> None:
        await cluster.add_collection("s1", "s2", "s3")
        monitor = await cluster.monitor()
        await cluster.lose_lease("s1")
        cluster.nodes["s1"].lost_s = 5
        await cluster.after(100, monitor)
        assert deeds(monitor) == []
        await cluster.register("s1")
        await cluster.after(1, monitor)
        assert monitor.status().findings == ()
        await cluster.lose_lease("s1")
        cluster.nodes["s1"].lost_s = 20.5
        await cluster.after(0, monitor)
        assert deeds(monitor) == [(Promote, "done")]

    run(tmp_path, story)


def test_a_stranger_at_the_address_is_no_answer(tmp_path: Path):
    async def story(cluster: Cluster) -> None:
        await cluster.add_collection("s1", "s2", "s3")
        monitor = await cluster.monitor()
        cluster.nodes["s1"].answers_as = "s9"
        await cluster.lose_lease("s1")
        await cluster.after(4, monitor)
        assert deeds(monitor) == [(Promote, "done")]

    run(tmp_path, story)


def test_a_node_that_cannot_be_asked_gets_more_time(tmp_path: Path):
    """A monitor that began after the node had left does not know where it was."""

    async def story(cluster: Cluster) -> None:
        await cluster.add_collection("s1", "s2", "s3")
        await cluster.lose_lease("s1")
        cluster.unknown.add("s1")
        monitor = await cluster.monitor()
        await cluster.after(19, monitor)
        assert deeds(monitor) == []
        await cluster.after(2, monitor)
        assert deeds(monitor) == [(Promote, "done")]

    run(tmp_path, story)


def test_a_lost_copy_is_made_anew_elsewhere_and_the_old_one_goes(tmp_path: Path):
    async def story(cluster: Cluster) -> None:
        await cluster.add_collection("s1", "s2", "s3")
        monitor = await cluster.monitor()
        await cluster.add_node("s4")
        cluster.nodes["s3"].down = True
        await cluster.lose_lease("s3")
        record = (await cluster.record()).model_copy(update={"in_sync": ["s1", "s2"]})
        await cluster.put(record.key, record.to_bytes())
        await cluster.after(59, monitor)
        assert deeds(monitor) == []
        await cluster.after(2, monitor)
        assert (await cluster.record()).joining == ["s4"]
        cluster.nodes["s4"].durable[KEY] = 10
        record = record.model_copy(update={"in_sync": ["s1", "s2", "s4"]})
        await cluster.put(record.key, record.to_bytes())
        cluster.nodes["s3"].down = False
        await cluster.register("s3")
        await cluster.after(0, monitor)
        assert (await cluster.record()).leaving == ["s3"]
        assert deeds(monitor) == [(AddJoining, "done"), (Leave, "done")]

    run(tmp_path, story)


def test_a_disk_that_is_full_while_it_copies_is_tried_ever_less_often(tmp_path: Path):
    """Giving up empties it: without a pause it would be joined again at once, for ever."""

    async def story(cluster: Cluster) -> None:
        await cluster.add_collection("s1", "s2")
        monitor = await cluster.monitor()
        s3 = cluster.nodes["s3"]
        for _ in range(3_600):
            joining = "s3" in (await cluster.record()).joining
            s3.durable = {KEY: 0}
            s3.full = joining
            await cluster.after(1, monitor)
        joined = [deed for deed in monitor.status().story if isinstance(deed.action, AddJoining)]
        assert 5 <= len(joined) <= 9
        await cluster.add_node("s4")
        await cluster.after(1, monitor)
        assert (await cluster.record()).joining == ["s4"]

    run(tmp_path, story)


def test_what_a_node_that_stops_leads_is_led_by_another_at_once(tmp_path: Path):
    async def story(cluster: Cluster) -> None:
        await cluster.add_collection("s1", "s2", "s3", shards=3)
        monitor = await cluster.monitor()
        monitor._wake.clear()
        record = NodeRecord(
            id="s1", role=NodeRole.STORAGE, incarnation="i", grpc="s1:1", draining=True
        )
        await cluster.put(record.key, record.to_bytes(), cluster.leases["s1"])
        assert monitor._wake.is_set()
        await cluster.after(0, monitor)
        assert deeds(monitor) == [(Promote, "done")] * 3
        for number in range(3):
            shard = await cluster.record(ShardKey(7, number))
            assert shard.primary != "s1"
            assert shard.in_sync == [shard.primary, *({"s2", "s3"} - {shard.primary})]

    run(tmp_path, story)


def test_many_shards_are_handed_over_in_one_round(tmp_path: Path):
    async def story(cluster: Cluster) -> None:
        await cluster.add_collection("s1", "s2", "s3", shards=40)
        monitor = await cluster.monitor()
        cluster.nodes["s1"].down = True
        await cluster.lose_lease("s1")
        await cluster.after(4, monitor)
        assert deeds(monitor) == [(Promote, "done")] * 40
        primaries = [(await cluster.record(ShardKey(7, n))).primary for n in range(40)]
        assert primaries.count("s2") == primaries.count("s3") == 20

    run(tmp_path, story)


def test_a_collection_that_is_being_made_is_nobody_s_business(tmp_path: Path):
    async def story(cluster: Cluster) -> None:
        await cluster.add_collection("s1", "s2", state=CollectionState.CREATING)
        monitor = await cluster.monitor()
        cluster.nodes["s1"].down = True
        await cluster.lose_lease("s1")
        await cluster.after(100, monitor)
        assert deeds(monitor) == []

    run(tmp_path, story)


def test_all_in_sync_gone_is_said_and_nothing_is_done(tmp_path: Path):
    async def story(cluster: Cluster) -> None:
        await cluster.add_collection("s1", "s2")
        monitor = await cluster.monitor()
        cluster.nodes["s3"].durable[KEY] = 3
        for name in ("s1", "s2"):
            cluster.nodes[name].down = True
            await cluster.lose_lease(name)
        await cluster.after(100, monitor)
        status = monitor.status()
        assert deeds(monitor) == []
        assert status.state is Health.RED
        assert "Start one of these nodes again with its data folder: s1, s2" in str(status.findings)

    run(tmp_path, story)


@pytest.mark.parametrize(
    ("value", "paused"), [(b'{"paused": true}', True), (b"{}", False), (b"yes", True)]
)
def test_the_switch(tmp_path: Path, value: bytes, paused: bool):
    async def story(cluster: Cluster) -> None:
        await cluster.add_collection("s1", "s2", "s3")
        monitor = await cluster.monitor()
        await cluster.put(SWITCH_KEY, value)
        cluster.nodes["s1"].down = True
        await cluster.lose_lease("s1")
        await cluster.after(100, monitor)
        assert monitor.status().paused == paused
        assert bool(deeds(monitor)) != paused
        if paused:
            assert any(SWITCH_KEY in found.reason for found in monitor.status().findings)
            await cluster.put(SWITCH_KEY, b'{"paused": false}')
            await cluster.after(0, monitor)
            assert deeds(monitor) == [(Promote, "done")]

    run(tmp_path, story)


def test_one_damaged_record_does_not_stop_the_rest(tmp_path: Path):
    async def story(cluster: Cluster) -> None:
        await cluster.add_collection("s1", "s2", "s3", shards=2)
        monitor = await cluster.monitor()
        await cluster.put(shard_key(7, 0), b'{"version": 1, "what": 3}')
        await cluster.put(collection_key("new"), b'{"version": 99}')
        cluster.nodes["s1"].down = True
        await cluster.lose_lease("s1")
        await cluster.after(100, monitor)
        assert deeds(monitor) == [(Promote, "done")]
        reasons = " ".join(found.reason for found in monitor.status().findings)
        assert "shards/7/0" in reasons
        assert "version 99" in reasons

    run(tmp_path, story)


def test_the_story_is_bounded(tmp_path: Path):
    async def story(cluster: Cluster) -> None:
        await cluster.add_collection("s1", "s2", "s3", shards=60)
        monitor = await cluster.monitor()
        cluster.nodes["s1"].down = True
        await cluster.lose_lease("s1")

        async def refuse(*_: object, **__: object) -> TxnResult:
            raise Unavailable("the store is away")

        await monitor.look()
        refusing = {"txn": staticmethod(refuse), "get": staticmethod(refuse)}
        monitor._store = type("Refusing", (), refusing)()  # type: ignore[assignment]
        for _ in range(5):
            await cluster.after(4, monitor)
        assert len(monitor.status().story) == limits.STORY_ACTIONS_MAX
        assert monitor.status().story[0].outcome == "failed: the store is away"

    run(tmp_path, story)


# -- changes that come in between -----------------------------------------------------------------
class Between:
    """A store that lets something happen right before a transaction of the monitor."""

    def __init__(self, store: EmbeddedStore, then: Callable[[], Awaitable[None]]) -> None:
        self._store, self._then = store, then
        self.uncertain = False

    async def get(self, key: str) -> KeyValue | None:
        return await self._store.get(key)

    async def txn(self, *arguments: Any, **options: object) -> TxnResult:
        if ACTIONS_KEY in arguments[1]:
            return await self._store.txn(*arguments)
        await self._then()
        result = await self._store.txn(*arguments, **options)  # type: ignore[arg-type]
        if self.uncertain:
            raise Uncertain("no answer")
        return result


def test_a_change_of_the_record_outruns_the_monitor(tmp_path: Path):
    async def story(cluster: Cluster) -> None:
        await cluster.add_collection("s1", "s2", "s3")
        monitor = await cluster.monitor()
        cluster.nodes["s1"].down = True
        await cluster.lose_lease("s1")
        await monitor.look()

        async def primary_came_first() -> None:
            record = (await cluster.record()).model_copy(update={"in_sync": ["s1", "s3"]})
            await cluster.put(record.key, record.to_bytes())

        monitor._store = Between(cluster.store, primary_came_first)  # type: ignore[assignment]
        await cluster.after(4, monitor)
        assert deeds(monitor) == [(Promote, "outrun")]
        record = await cluster.record()
        assert (record.term, record.primary) == (1, "s1")

    run(tmp_path, story)


def test_who_lost_the_lead_changes_nothing(tmp_path: Path):
    """The leader decides, is stopped for a minute, loses its place, and comes back to finish."""

    async def story(cluster: Cluster) -> None:
        await cluster.add_collection("s1", "s2", "s3")
        monitor, other = await cluster.monitor(), await cluster.monitor("m2")
        cluster.nodes["s1"].down = True
        await cluster.lose_lease("s1")
        await monitor.look()

        async def overthrown() -> None:
            await cluster.lose_lease("m1")
            assert await other._leadership.campaign()  # and has not done anything yet

        monitor._store = Between(cluster.store, overthrown)  # type: ignore[assignment]
        await cluster.after(4, monitor)
        assert deeds(monitor) == [(Promote, "outrun")]
        assert (await cluster.record()).term == 1
        status = await monitor.look()
        assert (status.leading, status.leader) == (False, "m2")

    run(tmp_path, story)


def test_an_uncertain_change_is_read_and_not_repeated(tmp_path: Path):
    async def story(cluster: Cluster) -> None:
        await cluster.add_collection("s1", "s2", "s3")
        monitor = await cluster.monitor()
        cluster.nodes["s1"].down = True
        await cluster.lose_lease("s1")
        await monitor.look()

        async def nothing() -> None:
            pass

        between = Between(cluster.store, nothing)
        between.uncertain = True
        monitor._store = between  # type: ignore[assignment]
        await cluster.after(4, monitor)
        between.uncertain = False
        await cluster.after(4, monitor)
        assert deeds(monitor) == [(Promote, "uncertain")]
        assert (await cluster.record()).term == 2

    run(tmp_path, story)


def test_its_own_change_is_not_done_again_before_it_is_seen(tmp_path: Path):
    async def story(cluster: Cluster) -> None:
        await cluster.add_collection("s1", "s2", "s3")
        monitor = await cluster.monitor()
        cluster.nodes["s1"].down = True
        await cluster.lose_lease("s1")
        await monitor.look()
        cluster.now_s += 4
        frozen = dict(monitor._watched.entries)
        await monitor.look()
        _, revision = await cluster.store.range("")
        await cluster.seen(revision)
        monitor._watched.entries = monitor._records._entries = frozen
        await monitor.look()
        await monitor.look()
        assert deeds(monitor) == [(Promote, "done")]

    run(tmp_path, story)


# -- who leads ------------------------------------------------------------------------------------
def test_one_leads_and_the_other_takes_over_with_what_it_saw(tmp_path: Path):
    async def story(cluster: Cluster) -> None:
        await cluster.add_collection("s1", "s2", "s3")
        first, second = await cluster.monitor("m1"), await cluster.monitor("m2")
        assert (await first.look()).leading
        assert (await second.look()).leader == "m1"
        assert not second.status().leading
        cluster.nodes["s1"].down = True
        await cluster.lose_lease("s1")
        asked = cluster.nodes["s2"].asked
        await second.look()
        assert cluster.nodes["s2"].asked == asked, "a follower asks nobody"
        cluster.now_s += 4
        await first.close()
        assert (await second.look()).leading
        assert deeds(second) == [(Promote, "done")], "it knew since when the node was away"

    run(tmp_path, story)


def test_a_monitor_without_a_lease_does_not_lead(tmp_path: Path):
    async def story(cluster: Cluster) -> None:
        monitor = await cluster.monitor()
        await cluster.lose_lease("m1")
        assert not (await monitor.look()).leading
        cluster.leases["m1"] = 12_345  # ended, and nobody has noticed yet
        assert not (await monitor.look()).leading
        cluster.leases["m1"] = (await cluster.store.lease_grant(3_600)).id
        assert (await monitor.look()).leading

    run(tmp_path, story)


def test_leadership_alone(tmp_path: Path):
    async def story() -> None:
        store = await EmbeddedStore.open(tmp_path / "metadata.sqlite")
        lease = (await store.lease_grant(3_600)).id

        def candidate(incarnation: str) -> Leadership:
            return Leadership(
                store, LEADER_KEY, node_id="m1", incarnation=incarnation, lease=lambda: lease
            )

        first, reborn = candidate("a"), candidate("b")
        with pytest.raises(InvariantError):
            first.fence()
        assert await first.campaign()
        fence = first.fence()
        assert await first.campaign()
        assert first.fence() == fence, "the record stays as it is while it leads"
        assert not await reborn.campaign(), "the record of an earlier life is not its own"
        assert (await store.txn([fence], {"x": b"1"})).ok
        await first.resign()
        await first.resign()
        assert not first.leading
        assert not (await store.txn([fence], {"x": b"2"})).ok
        assert await reborn.campaign()
        assert not (await store.txn([fence], {"x": b"2"})).ok
        newer = LeaderRecord(node="m1", incarnation="c").model_copy(update={"version": 2})
        await store.txn([], {LEADER_KEY: newer.to_bytes()})
        with pytest.raises(FormatTooNew):
            await reborn.campaign()
        assert not reborn.leading
        await store.close()
        with pytest.raises(Unavailable):
            await first.campaign()

    asyncio.run(story())


def test_of_two_that_see_a_free_place_one_gets_it(tmp_path: Path):
    async def story() -> None:
        store = await EmbeddedStore.open(tmp_path / "metadata.sqlite")
        lease = (await store.lease_grant(3_600)).id
        first = Leadership(store, LEADER_KEY, node_id="m1", incarnation="a", lease=lambda: lease)

        async def first_is_faster() -> None:
            assert await first.campaign()

        between = Between(store, first_is_faster)
        between.get = store.get  # type: ignore[attr-defined]
        second = Leadership(
            between,  # type: ignore[arg-type]
            LEADER_KEY,
            node_id="m2",
            incarnation="b",
            lease=lambda: lease,
        )
        assert not await second.campaign()
        assert await first.campaign()
        await store.close()

    asyncio.run(story())


def test_an_uncertain_candidacy_is_settled_by_the_next_look(tmp_path: Path):
    async def story() -> None:
        store = await EmbeddedStore.open(tmp_path / "metadata.sqlite")
        lease = (await store.lease_grant(3_600)).id

        async def nothing() -> None:
            pass

        between = Between(store, nothing)
        between.uncertain = True
        between.get = store.get  # type: ignore[attr-defined]
        leadership = Leadership(
            between,  # type: ignore[arg-type]
            LEADER_KEY,
            node_id="m1",
            incarnation="a",
            lease=lambda: lease,
        )
        assert not await leadership.campaign()
        assert await leadership.campaign()
        found = await store.get(LEADER_KEY)
        assert found is not None
        assert leadership.fence() == Compare(LEADER_KEY, found.revision)
        await store.close()

    asyncio.run(story())


# -- the loop -------------------------------------------------------------------------------------
def test_it_looks_by_itself_until_it_is_closed(tmp_path: Path):
    async def story(cluster: Cluster) -> None:
        monitor = ClusterMonitor(
            cluster.store,
            cluster,
            node_id="m1",
            settings=FailoverRules(interval_s=0.0),
            lease=lambda: cluster.leases["s1"],
        )
        looks = 0
        three = asyncio.Event()
        look = monitor.look

        async def counted() -> object:
            nonlocal looks
            looks += 1
            if looks == 1:
                raise RuntimeError("a bug")
            if looks == 3:
                three.set()
            return await look()

        monitor.look = counted  # type: ignore[method-assign, assignment]
        await monitor.start()
        async with asyncio.timeout(20):
            await three.wait()
        await monitor.close()
        await monitor.close()
        assert await cluster.store.get(LEADER_KEY) is None
        seen = looks
        await asyncio.sleep(0)
        assert looks == seen

    run(tmp_path, story)


def test_a_lost_lease_wakes_it_and_counts_from_then(tmp_path: Path):
    async def story(cluster: Cluster) -> None:
        await cluster.add_collection("s1", "s2", "s3")
        monitor = await cluster.monitor()
        await monitor.close()
        monitor = ClusterMonitor(
            cluster.store,
            cluster,
            node_id="m2",
            settings=FailoverRules(interval_s=3_600.0, grace_s=0.0),
            lease=lambda: cluster.leases["s2"],
        )
        await monitor.start()
        cluster.nodes["s1"].down = True
        await cluster.store.lease_revoke(cluster.leases.pop("s1"))
        watch = cluster.store.watch(shard_key(7, 0), 0)
        async with asyncio.timeout(20):
            async for events in watch:
                if b'"term":2' in (events[-1].value or b""):
                    break
        await monitor.close()

    run(tmp_path, story)


def test_a_lease_that_comes_and_goes_counts_anew(tmp_path: Path):
    async def story(cluster: Cluster) -> None:
        await cluster.add_collection("s1", "s2", "s3")
        monitor = await cluster.monitor()
        cluster.nodes["s1"].down = True
        await monitor.look()
        await cluster.lose_lease("s1")
        cluster.now_s += 2.9
        await cluster.register("s1")
        await cluster.lose_lease("s1")
        cluster.now_s += 2.9
        await monitor.look()
        assert deeds(monitor) == []
        cluster.now_s += 0.2
        await monitor.look()
        assert deeds(monitor) == [(Promote, "done")]

    run(tmp_path, story)


def test_a_store_that_is_away_is_a_finding(tmp_path: Path):
    async def story(cluster: Cluster) -> None:
        await cluster.add_collection("s1", "s2", "s3")
        monitor = await cluster.monitor()
        await monitor.look()
        await cluster.store.close()
        status = await monitor.look()
        assert not status.leading
        assert status.state is Health.YELLOW
        assert status.findings[0].reason.startswith("Metadata: ")

    run(tmp_path, story)
