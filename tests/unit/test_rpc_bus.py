"""The bus between replicas, and the directory of nodes, over real gRPC on the loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from fakes.node import FakeNode, Wire, in_loop, until

from shoal import limits
from shoal.errors import BadRequest, ShoalError, Unavailable
from shoal.metadata.contract import Event
from shoal.metadata.embedded import EmbeddedStore
from shoal.metadata.schema import NodeRecord, NodeRole
from shoal.metadata.watched import Watched
from shoal.node.v1.replication_pb2 import ReplicaMessage
from shoal.rpc.bus import Bus
from shoal.rpc.channel import RpcSettings
from shoal.rpc.client import NodeClient
from shoal.rpc.directory import Nodes
from shoal.storage_api import ShardKey
from storage_node import service
from storage_node.service import NodeServer, serve_node
from storage_node.unread import Complaints

HOST = "127.0.0.1"
QUICK = RpcSettings(keepalive_s=0.3, connect_timeout_s=1.0, reconnect_s_max=0.05)


class Peer:
    """A node that notes what it is told."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.heard: list[ReplicaMessage] = []
        self.server: NodeServer | None = None

    async def start(self, port: int = 0) -> int:
        self.server = await serve_node(
            FakeNode(self.name), HOST, port, node_id=self.name, deliver=self.heard.append
        )
        return self.server.port

    async def stop(self) -> None:
        assert self.server is not None
        await self.server.close(grace_s=0)

    def numbers(self) -> list[int]:
        return [message.shard for message in self.heard]


def message(number: int, size: int = 10) -> ReplicaMessage:
    return ReplicaMessage(sender="s1", to="s2", collection_id=7, shard=number, body=b"x" * size)


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[Bus, Peer, dict[str, str]]]:
    """The bus of s1, and s2, whose address it can look up."""
    peer = Peer("s2")
    addresses = {"s2": f"{HOST}:{await peer.start()}"}
    bus = Bus(addresses.get, own_id="s1", settings=QUICK)
    try:
        yield bus, peer, addresses
    finally:
        await bus.close()
        await peer.stop()


async def send_until_heard(bus: Bus, peer: Peer, number: int) -> None:
    """As a replica does: say it again until there is an answer."""
    while number not in peer.numbers():
        bus.send("s2", message(number), 10)
        await asyncio.sleep(0.01)


@in_loop
async def test_messages_arrive_whole_and_in_order():
    async with pair() as (bus, peer, _):
        sizes = [number * 37 % 5_000 for number in range(500)]
        for number, size in enumerate(sizes):
            assert bus.send("s2", message(number, size), size)
        await until(lambda: len(peer.heard) == 500)
        assert [m.shard for m in peer.heard] == list(range(500))
        assert [len(m.body) for m in peer.heard] == sizes
        assert {(m.sender, m.to, m.collection_id) for m in peer.heard} == {("s1", "s2", 7)}
        assert bus.connected("s2")
        await asyncio.sleep(0)
        assert bus.send("s2", message(500, 3_000_000), 3_000_000)
        await until(lambda: len(peer.heard) == 501)


@in_loop
async def test_nobody_waits_for_a_peer_that_is_not_there():
    async with pair() as (bus, peer, addresses):
        assert not bus.send("s1", message(0), 10)  # itself
        assert bus.send("s3", message(0), 10)  # nobody knows where that is
        await until(lambda: not bus.send("s3", message(0), 10))
        await peer.stop()
        bus.send("s2", message(1), 10)
        await until(lambda: not bus.send("s2", message(2), 10))
        assert not bus.connected("s2")
        addresses["s2"] = f"{HOST}:{await peer.start()}"  # it came back, elsewhere
        await send_until_heard(bus, peer, 3)
        assert set(peer.numbers()) == {3}


@in_loop
async def test_a_message_that_cannot_be_read_costs_itself_alone(caplog):
    """A node of another version says what this one does not know: the connection, the other messages
    and the other shards are none the worse, and the log says so once."""
    async with pair() as (bus, peer, _):

        def deliver(heard: ReplicaMessage) -> None:
            if heard.shard % 3 == 1:
                raise BadRequest("Bad request: replicas of this version do not say that")
            if heard.shard == 5:
                raise RuntimeError("a bug")
            peer.heard.append(heard)

        assert peer.server is not None
        peer.server._deliver = deliver
        for number in range(12):
            assert bus.send("s2", message(number), 10)
        await until(lambda: len(peer.heard) == 7)
        assert peer.numbers() == [0, 2, 3, 6, 8, 9, 11]
        assert bus.connected("s2")
        told = [r for r in caplog.records if "message_not_read" in r.getMessage()]
        assert len(told) == 1, told
        fields = told[0].fields
        assert (fields["sender"], fields["shard"], fields["dropped"]) == ("s1", "7/1", 1)


def test_complaints_are_counted_and_told_once_a_minute(monkeypatch):
    complaints = Complaints()
    told = [complaints.dropped("s1", at_s) for at_s in (0.0, 1.0, 59.0, 60.0, 61.0, 120.0)]
    assert told == [1, None, None, 4, None, 6]
    assert complaints.dropped("s2", 61.0) == 1
    assert complaints.total == 7
    monkeypatch.setattr(limits, "COMPLAINT_PEERS_MAX", 2)
    assert [complaints.dropped(f"x{n}", 61.0) for n in range(3)] == [1, 1, 1]
    assert complaints.total == 10


@in_loop
async def test_a_node_that_stops_waits_for_no_bus(monkeypatch):
    """Buses of others stay open for ever."""
    monkeypatch.setattr(service, "_STOP_S", 600.0)
    async with pair() as (bus, peer, _):
        await send_until_heard(bus, peer, 1)
        async with asyncio.timeout(30):
            await peer.stop()
            await until(lambda: not bus.connected("s2"))


@in_loop
async def test_the_wrong_node_hears_nothing():
    async with pair() as (bus, peer, addresses):
        other = Peer("s9")
        right, addresses["s2"] = addresses["s2"], f"{HOST}:{await other.start()}"
        bus.send("s2", message(1), 10)
        await until(lambda: not bus.send("s2", message(1), 10))
        addresses["s2"] = right
        await send_until_heard(bus, peer, 2)
        assert other.heard == []
        await other.stop()


@in_loop
async def test_a_cut_connection_is_made_again():
    async with pair() as (bus, peer, addresses):
        wire = await Wire.to(int(addresses["s2"].rpartition(":")[2]))
        addresses["s2"] = f"{HOST}:{wire.port}"
        await send_until_heard(bus, peer, 1)
        await wire.cut()
        await send_until_heard(bus, peer, 2)
        wire.flowing.clear()  # it freezes
        await until(lambda: bus.send("s2", message(9), 10) and not bus.connected("s2"))
        wire.flowing.set()
        await send_until_heard(bus, peer, 3)
        await bus.close()
        await wire.close()


@in_loop
async def test_what_does_not_fit_is_dropped(monkeypatch):
    async with pair() as (bus, peer, _):
        monkeypatch.setattr(limits, "BUS_QUEUE_MESSAGES_MAX", 3)
        sent = [bus.send("s2", message(number), 10) for number in range(5)]
        assert sent == [True, True, True, False, False]
        await until(lambda: len(peer.heard) == 3)
        monkeypatch.setattr(limits, "BUS_QUEUE_BYTES_MAX", 100)
        # One that is larger than the bound goes when nothing else waits.
        assert [bus.send("s2", message(n), 101) for n in (5, 6)] == [True, False]
        await until(lambda: peer.numbers() == [0, 1, 2, 5])


@in_loop
async def test_a_closed_bus():
    async with pair() as (bus, peer, _):
        await send_until_heard(bus, peer, 1)
        await bus.close()
        assert not bus.send("s2", message(2), 10)
        await bus.close()


@in_loop
async def test_a_message_that_the_node_chokes_on(caplog):
    """A bug there ends the call there; the bus makes a new one."""
    async with pair() as (bus, peer, _):
        assert peer.server is not None
        hear = peer.heard.append

        def choke(message: ReplicaMessage) -> None:
            if message.shard == 1:
                raise ValueError("bug")
            hear(message)

        peer.server._deliver = choke
        bus.send("s2", message(1), 10)
        await send_until_heard(bus, peer, 2)
        assert "message_failed" in caplog.text


# -- the directory --------------------------------------------------------------------------------
def record(node_id: str, address: str) -> NodeRecord:
    return NodeRecord(id=node_id, role=NodeRole.STORAGE, incarnation="i", grpc=address)


@asynccontextmanager
async def directory(folder: Path, **kwargs: object) -> AsyncIterator[tuple[EmbeddedStore, Nodes]]:
    store = await EmbeddedStore.open(folder / "metadata.sqlite")
    known: list[Nodes] = []

    def on_change(events: list[Event]) -> None:
        if known:
            known[0].on_change(events)

    watched = Watched(store, ["nodes/"], on_change=on_change)
    await watched.start()
    nodes = Nodes(watched, settings=QUICK, **kwargs)
    known.append(nodes)
    try:
        yield store, nodes
    finally:
        await nodes.close()
        await watched.close()
        await store.close()


@in_loop
async def test_addresses_come_and_stay(tmp_path):
    async with directory(tmp_path) as (store, nodes):
        with pytest.raises(Unavailable, match="s1 is not known"):
            nodes.get("s1")
        assert nodes.address("s1") is None
        s1 = record("s1", "10.0.0.1:7001")
        await store.txn([], {s1.key: s1.to_bytes()})
        await until(lambda: nodes.address("s1"))
        client = nodes.client("s1")
        assert (client.address, client.node_id) == ("10.0.0.1:7001", "s1")
        assert nodes.get("s1") is client
        # The lease is lost, and the record with it: the node may well be alive.
        s2 = record("s2", "10.0.0.2:7001")
        await store.txn([], {s2.key: s2.to_bytes()})
        gone = await store.txn([], {}, [s1.key, s2.key])
        await until(lambda: nodes._entries == {} and gone.ok)
        assert nodes.get("s1") is client
        assert nodes.address("s2") == "10.0.0.2:7001"  # nobody had asked for it
        moved = record("s1", "10.0.0.1:7009")
        await store.txn([], {moved.key: moved.to_bytes()})
        await until(lambda: nodes.address("s1") == "10.0.0.1:7009")
        assert nodes.client("s1") is not client


@in_loop
async def test_a_record_of_a_newer_version_is_passed_over(tmp_path):
    async with directory(tmp_path) as (store, nodes):
        await store.txn([], {"nodes/s1": record("s1", "10.0.0.1:7001").to_bytes()})
        await until(lambda: nodes.address("s1"))
        newer = await store.txn([], {"nodes/s1": b'{"version": 99, "grpc": {"host": "x"}}'})
        await until(lambda: nodes._entries["nodes/s1"].revision == newer.revision)
        assert nodes.address("s1") == "10.0.0.1:7001"


@in_loop
async def test_clients_of_the_directory_work_and_close(tmp_path):
    peer, here = Peer("s1"), FakeNode("s0")
    address = f"{HOST}:{await peer.start()}"
    async with directory(tmp_path, local={"s0": here}) as (store, nodes):
        assert nodes.get("s0") is here
        await store.txn([], {"nodes/s1": record("s1", address).to_bytes()})
        await until(lambda: nodes.address("s1"))
        client = nodes.get("s1")
        assert isinstance(client, NodeClient)
        assert await client.status() == []
        with pytest.raises(ShoalError):
            await client.info(ShardKey(1, 0))
        assert nodes.traffic()["s1"].requests == 1  # reads and writes of shards
        await nodes.close()
        with pytest.raises(Unavailable, match="shutting down"):
            nodes.get("s1")
    await peer.stop()
