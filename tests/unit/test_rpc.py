"""A storage node over real gRPC on the loopback: what comes through, and what a caller is told when
something does not."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from fakes.node import FakeNode, Wire, in_loop, until
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from shoal import limits
from shoal.api.filter import parse_filter
from shoal.batch import DenseBlock, PointBatch
from shoal.errors import (
    BadRequest,
    BodyTooLarge,
    Busy,
    NotFound,
    NotPrimary,
    NotSupported,
    ShoalError,
    Stale,
    StartupError,
    StorageFull,
    TimedOut,
    Unavailable,
)
from shoal.files_api import FileChunk, FileSnapshot, SnapshotFile
from shoal.ids import PointIds
from shoal.node.v1 import node_pb2 as pb
from shoal.rpc import codec
from shoal.rpc.channel import NodeTls, RpcSettings, node_metadata, server_options
from shoal.rpc.client import NodeClient
from shoal.rpc.traffic import traffic_lines
from shoal.storage_api import (
    Delete,
    Distance,
    Guard,
    Scroll,
    Search,
    Selector,
    ShardKey,
    ShardSpec,
    Upsert,
    VectorSpec,
    WriteResult,
)
from storage_node.service import NodeServer, serve_node

KEY = ShardKey(1, 0)
DIM = 4
QUICK = RpcSettings(connect_timeout_s=5, read_timeout_s=5, write_timeout_s=5, admin_timeout_s=5)
HOST = "127.0.0.1"


@asynccontextmanager
async def served(
    node: FakeNode, *, settings: RpcSettings = QUICK, **kwargs: Any
) -> AsyncIterator[tuple[NodeServer, NodeClient]]:
    server = await serve_node(node, HOST, 0, node_id=node.name, **kwargs)
    client = NodeClient(f"{HOST}:{server.port}", node_id=node.name, settings=settings)
    try:
        yield server, client
    finally:
        await client.close()
        await server.close(grace_s=0)


Script = Callable[[Any], Awaitable[None]]


@asynccontextmanager
async def scripted(script: Script, settings: RpcSettings = QUICK) -> AsyncIterator[NodeClient]:
    """A client of something that is no storage node and does as `script` says with each Exchange."""

    async def exchange(_: Any, context: Any) -> None:
        await context.send_initial_metadata(node_metadata("s1"))
        await script(context)

    server = grpc.aio.server(options=server_options())
    handlers = {"Exchange": grpc.stream_stream_rpc_method_handler(exchange)}
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("shoal.node.v1.StorageNode", handlers),)
    )
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    client = NodeClient(f"{HOST}:{port}", settings=settings)
    try:
        yield client
    finally:
        await client.close()
        await server.stop(None)


def channel_to(server: NodeServer) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(f"{HOST}:{server.port}")


def spec(key: ShardKey = KEY) -> ShardSpec:
    return ShardSpec(key, "films", {"": VectorSpec(DIM, Distance.DOT)})


def points(keys: list[int]) -> PointBatch:
    batch = PointBatch(PointIds.from_keys(keys))
    values = np.zeros((len(keys), DIM), np.float32)
    values[:, 0] = keys
    batch.dense[""] = DenseBlock(values)
    batch.set_payloads([b'{"n":%d}' % key for key in keys])
    return batch


def search(limit: int = 2, **kwargs: Any) -> Search:
    return Search("", np.ones(DIM, np.float32), limit, **kwargs)


# -- what comes through ---------------------------------------------------------------------------
@in_loop
async def test_everything_a_node_can_do():
    node = FakeNode()
    async with served(node) as (_, client):
        await client.create_shard(spec())
        assert await client.write(KEY, Upsert(points([1, 2, 3]))) == WriteResult(1)
        gone = Delete(Selector(filter=parse_filter({"must": {"has_id": [1]}})))
        assert await client.write(KEY, gone) == WriteResult(2)

        hits = await client.search(KEY, search(with_payload=True), Guard(2, strong=True))
        assert (hits.applied, hits.value.points.ids.keys()) == (2, [3, 2])
        assert hits.value.scores.tolist() == [3.0, 2.0]
        assert hits.value.points.payload_of(0) == b'{"n":3}'
        two = await client.retrieve(KEY, PointIds.from_keys([2, 9]), True, True, Guard())
        assert (two.applied, two.value.ids.keys()) == (2, [2])
        assert two.value.dense[""].values.tolist() == [[2, 0, 0, 0]]
        page = await client.scroll(KEY, Scroll(10, start=3), Guard(1))
        assert page.value.ids.keys() == [3]
        count = await client.count(KEY, parse_filter({"must_not": {"has_id": [3]}}), Guard())
        assert (count.value, count.applied) == (1, 2)
        assert node.guards == [Guard(2, strong=True), Guard(), Guard(1), Guard()]

        assert (await client.info(KEY)).points == 2
        (status,) = await client.status()
        assert (status.key, status.durable, status.metadata_lost_s) == (KEY, 2, 0.5)
        await client.drop_shard(KEY)
        assert await client.status() == []


@in_loop
async def test_a_large_batch_and_many_requests_at_once():
    async with served(FakeNode()) as (_, client):
        await client.create_shard(spec())
        batch = points(list(range(100)))
        batch.set_payloads([b'{"text":"%s"}' % (b"x" * 100_000)] * 100)  # 10 MB
        await client.write(KEY, Upsert(batch))
        large = client.scroll(KEY, Scroll(100, with_vectors=True), Guard())
        small = [client.search(KEY, search(k), Guard()) for k in range(1, 60)]
        back, *found = await asyncio.gather(large, *small)
        assert back.value.payload == batch.payload
        assert np.array_equal(back.value.dense[""].values, batch.dense[""].values)
        assert [len(hits.value.scores) for hits in found] == list(range(1, 60))


@in_loop
async def test_what_waits_travels_together():
    sizes = []

    async def script(context):
        while (data := await context.read()) is not grpc.aio.EOF:
            requests = pb.Frames.FromString(data).requests
            sizes.append(len(requests))
            answers = [codec.count_answer(r.id, r.id, 0) for r in requests]
            await context.write(codec.join_frames(answers=answers))

    async with scripted(script) as client:
        await client.count(KEY, None, Guard())
        counts = await asyncio.gather(*(client.count(KEY, None, Guard()) for _ in range(100)))
    assert sizes == [1, 100]
    assert len({count.value for count in counts}) == 100


@in_loop
async def test_a_large_message_is_not_made_of_many(monkeypatch):
    monkeypatch.setattr(limits, "RPC_FRAMES_BYTES", 2_000)
    node = FakeNode()
    async with served(node) as (_, client):
        await client.create_shard(spec())
        writes = [client.write(KEY, Upsert(points([n, n + 1]))) for n in range(200)]
        assert len(await asyncio.gather(*writes)) == 200
        reads = [client.scroll(KEY, Scroll(50), Guard()) for _ in range(50)]
        assert {len(page.value) for page in await asyncio.gather(*reads)} == {50}


# -- errors of the node ---------------------------------------------------------------------------
@in_loop
async def test_the_nodes_own_errors():
    node = FakeNode()
    async with served(node) as (_, client):
        with pytest.raises(NotFound, match="not here") as raised:
            await client.write(KEY, Upsert(points([1])))
        assert not raised.value.maybe_applied
        for error in (
            NotPrimary("another one leads"),
            Stale("behind"),
            Busy("full", retry_after_s=0.25),
            StorageFull("no space"),
            TimedOut("too slow"),
        ):
            node.storage.error = error
            for call in (client.count(KEY, None, Guard()), client.create_shard(spec())):
                with pytest.raises(type(error), match=error.message) as raised:
                    await call
                assert raised.value.maybe_applied == error.maybe_applied
                assert getattr(raised.value, "retry_after_s", 0) == getattr(
                    error, "retry_after_s", 0
                )


@in_loop
async def test_a_bug_in_the_node_is_named_and_logged(caplog):
    node = FakeNode()
    async with served(node) as (_, client):
        node.storage.error = KeyError("secret")
        for call in (
            client.write(KEY, Delete(Selector(ids=PointIds.from_keys([1])))),
            client.create_shard(spec()),
        ):
            with pytest.raises(ShoalError, match="s1 failed with KeyError; its log") as raised:
                await call
            assert (raised.value.status_code, raised.value.maybe_applied) == (500, True)
            assert "secret" not in raised.value.message
    assert caplog.text.count("request_failed") == 2


@in_loop
async def test_an_answer_that_is_too_large_says_so(monkeypatch):
    async with served(FakeNode()) as (_, client):
        await client.create_shard(spec())
        await client.write(KEY, Upsert(points(list(range(1_000)))))
        monkeypatch.setattr(limits, "RPC_MESSAGE_BYTES_MAX", 5_000)
        with pytest.raises(BadRequest, match="ask for fewer points"):
            await client.scroll(KEY, Scroll(1_000), Guard())
        with pytest.raises(BodyTooLarge, match="send fewer points"):
            await client.write(KEY, Upsert(points(list(range(1_000)))))
        assert len((await client.scroll(KEY, Scroll(10), Guard())).value) == 10


@in_loop
async def test_a_request_from_a_newer_version_is_refused():
    async def ask(context):
        data = await context.read()
        number = pb.Frames.FromString(data).requests[0].id
        await context.write(codec.join_frames(answers=[await server.answer(pb.Request(id=number))]))
        await context.read()

    node = FakeNode()
    async with served(node) as (server, _), scripted(ask) as client:
        with pytest.raises(NotSupported, match="older version"):
            await client.count(KEY, None, Guard())


@in_loop
async def test_a_message_that_is_none_ends_the_call():
    async with served(FakeNode()) as (server, _), channel_to(server) as channel:
        call = channel.stream_stream("/shoal.node.v1.StorageNode/Exchange")()
        await call.write(b"\xff\xff\xff")
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            assert await call.read() is not grpc.aio.EOF
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


# -- bounds ---------------------------------------------------------------------------------------
@in_loop
async def test_too_much_waiting_is_busy(monkeypatch):
    node = FakeNode()
    async with served(node) as (_, client):
        await client.create_shard(spec())
        node.gate.clear()
        monkeypatch.setattr(limits, "RPC_IN_FLIGHT_MAX", 3)
        waiting = [asyncio.ensure_future(client.count(KEY, None, Guard())) for _ in range(3)]
        await until(lambda: len(node.began) == 3)
        with pytest.raises(Busy, match="3 requests of this process"):
            await client.count(KEY, None, Guard())
        monkeypatch.setattr(limits, "RPC_QUEUE_BYTES_MAX", 100)
        with pytest.raises(Busy):
            await client.write(KEY, Upsert(points([1, 2, 3])))
        node.gate.set()
        assert [fresh.value for fresh in await asyncio.gather(*waiting)] == [0, 0, 0]


@in_loop
async def test_a_node_with_too_much_work_is_busy(monkeypatch):
    monkeypatch.setattr(limits, "RPC_SERVER_IN_FLIGHT_MAX", 2)
    node = FakeNode()
    async with served(node) as (_, client):
        await client.create_shard(spec())
        node.gate.clear()
        calls = [asyncio.ensure_future(client.count(KEY, None, Guard())) for _ in range(5)]
        await until(lambda: sum(call.done() for call in calls) == 3)
        node.gate.set()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes[2:]] == [Busy, Busy, Busy]
        assert [fresh.value for fresh in outcomes[:2]] == [0, 0]


@in_loop
async def test_deadlines(monkeypatch):
    node = FakeNode()
    short = RpcSettings(read_timeout_s=0.15, write_timeout_s=0.15)
    async with served(node, settings=short) as (_, client):
        await client.create_shard(spec())
        node.gate.clear()
        with pytest.raises(TimedOut, match="did not answer in time") as raised:
            await client.count(KEY, None, Guard())
        assert not raised.value.maybe_applied
        await until(lambda: node.cancelled == ["count"])  # the node does not go on with it
        with pytest.raises(TimedOut) as raised:
            await client.write(KEY, Upsert(points([1])))
        assert raised.value.maybe_applied
        node.gate.set()
        await until(lambda: node.ended == ["write"])  # and it did happen
        assert client.in_flight == 0


@in_loop
async def test_a_caller_who_gives_up():
    node = FakeNode()
    async with served(node) as (_, client):
        await client.create_shard(spec())
        node.gate.clear()
        read = asyncio.ensure_future(client.search(KEY, search(), Guard()))
        write = asyncio.ensure_future(client.write(KEY, Upsert(points([1]))))
        await until(lambda: sorted(node.began) == ["search", "write"])
        read.cancel()
        write.cancel()
        await until(lambda: sorted(node.cancelled) == ["search", "write"])
        unsent = asyncio.ensure_future(client.write(KEY, Upsert(points([2]))))
        await asyncio.sleep(0)
        unsent.cancel()  # before it was sent: then it never is
        node.gate.set()
        assert (await client.count(KEY, None, Guard())).value == 0
        assert node.ended == ["count"]
        assert client.in_flight == 0


@in_loop
async def test_what_goes_to_a_node_is_counted(monkeypatch):
    node = FakeNode()
    async with served(node) as (_, client):
        await client.create_shard(spec())
        await client.write(KEY, Upsert(points([1, 2])))
        node.gate.clear()
        late = asyncio.ensure_future(client.count(KEY, None, Guard()))
        await until(lambda: len(node.began) == 2)
        monkeypatch.setattr(limits, "RPC_IN_FLIGHT_MAX", 1)
        with pytest.raises(Busy):
            await client.count(KEY, None, Guard())
        traffic = client.traffic
        assert (traffic.requests, traffic.busy, traffic.late, traffic.lost) == (2, 1, 0, 0)
        assert 10 < traffic.sent_bytes < 10_000
        before = traffic.received_bytes
        assert before > 0
        assert (client.in_flight, client.queued_bytes) == (1, 0)
        node.gate.set()
        await late
        assert traffic.received_bytes > before
        lines = list(traffic_lines({"s1": traffic}))
        assert 'shoal_node_requests_total{node="s1"} 2' in lines
        assert 'shoal_node_busy_total{node="s1"} 1' in lines


# -- lost connections -----------------------------------------------------------------------------
@in_loop
async def test_nobody_there():
    async with served(FakeNode()) as (server, client):
        await server.close()
        for call in (
            client.count(KEY, None, Guard()),
            client.write(KEY, Upsert(points([1]))),
            client.status(),
            client.write(KEY, Upsert(points([1]))),  # at once: nobody was there a moment ago
        ):
            with pytest.raises(Unavailable, match="node s1 at 127") as raised:
                await call
            assert raised.value.retryable
            assert not raised.value.maybe_applied


@in_loop
async def test_a_node_that_comes_back_is_found():
    node = FakeNode()
    async with served(node) as (server, client):
        await client.create_shard(spec())
        assert (await client.count(KEY, None, Guard())).value == 0
        await server.close()
        again = await serve_node(node, HOST, server.port, node_id="s1")
        try:
            while True:
                try:
                    assert (await client.count(KEY, None, Guard())).value == 0
                    break
                except Unavailable:
                    await asyncio.sleep(0.02)
        finally:
            await again.close()


@in_loop
async def test_what_a_lost_connection_means():
    """The connections end after the first request: the read is asked again, the write is not."""
    asked: list[str] = []

    async def script(context):
        while (data := await context.read()) is not grpc.aio.EOF:
            (request,) = pb.Frames.FromString(data).requests
            asked.append(request.WhichOneof("op"))
            if asked.count("count") < 2:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "going away")
            await context.write(codec.join_frames(answers=[codec.count_answer(request.id, 5, 0)]))

    async with scripted(script) as client:
        with pytest.raises(Unavailable, match="may have happened") as raised:
            await client.write(KEY, Upsert(points([1])))
        assert raised.value.maybe_applied
        assert (await client.count(KEY, None, Guard())).value == 5
    assert asked == ["write", "count", "count"]


@in_loop
async def test_a_request_is_asked_twice_at_most():
    calls = 0

    async def script(context):
        nonlocal calls
        calls += 1
        await context.read()

    async with scripted(script) as client:
        with pytest.raises(Unavailable, match="ended the connection") as raised:
            await client.count(KEY, None, Guard())
        assert not raised.value.maybe_applied
        assert calls == 2


@in_loop
async def test_second_attempts_have_a_budget():
    calls = 0

    async def script(context):
        nonlocal calls
        calls += 1
        await context.read()

    async with scripted(script) as client:
        for _ in range(50):
            with pytest.raises(Unavailable):
                await client.count(KEY, None, Guard())
        assert calls == 50 + 32


@in_loop
async def test_a_silent_peer_is_found_by_pings():
    node = FakeNode()
    settings = RpcSettings(keepalive_s=0.3, connect_timeout_s=0.5)
    async with served(node) as (server, _):
        wire = await Wire.to(server.port)
        client = NodeClient(f"{HOST}:{wire.port}", node_id="s1", settings=settings)
        await client.create_shard(spec())
        await client.write(KEY, Upsert(points([1])))
        wire.flowing.clear()
        began = asyncio.get_running_loop().time()
        with pytest.raises(Unavailable) as raised:
            await client.write(KEY, Upsert(points([1])))
        assert raised.value.maybe_applied
        with pytest.raises(Unavailable) as raised:
            await client.write(KEY, Upsert(points([1])))
        assert not raised.value.maybe_applied  # there was no connection to send it over
        assert asyncio.get_running_loop().time() - began < 5
        await client.close()
        await wire.close()


@in_loop
async def test_a_cut_wire():
    node = FakeNode()
    async with served(node) as (server, _):
        wire = await Wire.to(server.port)
        client = NodeClient(f"{HOST}:{wire.port}", node_id="s1", settings=QUICK)
        await client.create_shard(spec())
        node.gate.clear()
        read = asyncio.ensure_future(client.count(KEY, None, Guard()))
        write = asyncio.ensure_future(client.write(KEY, Upsert(points([1]))))
        await until(lambda: len(node.began) == 2)
        await wire.cut()
        with pytest.raises(Unavailable) as raised:
            await write
        assert raised.value.maybe_applied
        await until(lambda: node.cancelled == ["count"])  # its caller is gone
        node.gate.set()
        assert (await read).value == 1  # asked again; the write took its course
        await client.close()
        await wire.close()


@in_loop
async def test_another_node_at_the_address():
    node = FakeNode("s2")
    async with served(node) as (server, _):
        client = NodeClient(f"{HOST}:{server.port}", node_id="s1", settings=QUICK)
        for call in (
            client.write(KEY, Upsert(points([1]))),
            client.create_shard(spec()),
            client.count(KEY, None, Guard()),
        ):
            with pytest.raises(Unavailable, match="this is storage node s2 and not 's1'") as raised:
                await call
            assert not raised.value.maybe_applied
        await client.close()
    assert (node.began, node.storage.shards) == ([], {})


# -- the end --------------------------------------------------------------------------------------
@in_loop
async def test_calls_under_way_fail_when_a_client_is_closed():
    """As it is when its node has another address by now: its callers were not cancelled."""
    node, began = FakeNode(), asyncio.Event()

    async def hangs(_: Any) -> None:
        began.set()
        await asyncio.Event().wait()

    node.create_shard = hangs
    async with served(node) as (_, client):
        creating = asyncio.create_task(client.create_shard(spec()))
        await began.wait()
        await client.close()
        with pytest.raises(Unavailable, match="this process closed it") as raised:
            await creating
        assert raised.value.maybe_applied
        with pytest.raises(Unavailable, match="this process closed it"):
            await client.status()


@in_loop
async def test_closing_a_server_answers_what_is_at_work():
    node = FakeNode()
    async with served(node) as (server, client):
        await client.create_shard(spec())
        node.gate.clear()
        write = asyncio.ensure_future(client.write(KEY, Upsert(points([1]))))
        await until(lambda: node.began)
        closing = asyncio.ensure_future(server.close(grace_s=10))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="shutting down") as raised:
            await client.write(KEY, Upsert(points([2])))
        assert not raised.value.maybe_applied
        node.gate.set()
        assert await write == WriteResult(1)
        await closing
    assert node.ended == ["write"]


@in_loop
async def test_closing_a_server_ends_what_does_not():
    node = FakeNode()
    async with served(node) as (server, client):
        await client.create_shard(spec())
        node.gate.clear()
        write = asyncio.ensure_future(client.write(KEY, Upsert(points([1]))))
        await until(lambda: node.began)
        await server.close(grace_s=0.05)
        with pytest.raises(Unavailable) as raised:
            await write
        assert raised.value.maybe_applied
        assert node.cancelled == ["write"]


@in_loop
async def test_closing_a_client_fails_what_waits():
    node = FakeNode()
    async with served(node) as (_, client):
        await client.create_shard(spec())
        node.gate.clear()
        calls = [
            asyncio.ensure_future(client.count(KEY, None, Guard())),
            asyncio.ensure_future(client.write(KEY, Upsert(points([1])))),
        ]
        await until(lambda: len(node.began) == 2)
        await client.close()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [Unavailable, Unavailable]
        assert [outcome.maybe_applied for outcome in outcomes] == [False, True]
        with pytest.raises(Unavailable, match="closed"):
            await client.count(KEY, None, Guard())
        await client.close()


# -- files ----------------------------------------------------------------------------------------
class Files:
    """One file of 10 bytes in pieces of 4."""

    def __init__(self) -> None:
        self.released: list[str] = []

    async def snapshot(self, shard: ShardKey) -> FileSnapshot:
        if shard != KEY:
            raise NotFound("no such replica")
        return FileSnapshot("x", b"{}", (SnapshotFile("1/ids", 10, 99),))

    async def fetch(self, snapshot_id: str, path: str, offset: int) -> AsyncIterator[FileChunk]:
        if (snapshot_id, path) != ("x", "1/ids"):
            raise NotFound(f"no file {path}")
        for at in range(offset, 10, 4):
            yield FileChunk(at, b"0123456789"[at : at + 4], at)

    async def release(self, snapshot_id: str) -> None:
        self.released.append(snapshot_id)


@in_loop
async def test_files():
    files = Files()
    async with served(FakeNode(), files=files) as (_, client):
        snapshot = await client.snapshot(KEY)
        assert snapshot == await files.snapshot(KEY)
        chunks = [chunk async for chunk in client.fetch("x", "1/ids", 3)]
        assert chunks == [FileChunk(3, b"3456", 3), FileChunk(7, b"789", 7)]
        assert [chunk async for chunk in client.fetch("x", "1/ids", 10)] == []
        async for chunk in client.fetch("x", "1/ids", 0):
            assert chunk.data == b"0123"
            break  # the rest is called off
        await client.release("x")
        assert files.released == ["x"]
        with pytest.raises(NotFound, match="no such replica"):
            await client.snapshot(ShardKey(9, 9))
        with pytest.raises(NotFound, match="no file 2/ids"):
            await anext(client.fetch("x", "2/ids", 0))
    async with served(FakeNode()) as (_, client):
        with pytest.raises(NotSupported, match="no files"):
            await client.snapshot(KEY)


# -- for tools and operators ----------------------------------------------------------------------
@in_loop
async def test_health_and_reflection():
    async with served(FakeNode()) as (server, _), channel_to(server) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "shoal.node.v1.StorageNode"):
            request = health_pb2.HealthCheckRequest(service=name)
            assert (await health.Check(request)).status == 1
            await server.set_serving(False)
            assert (await health.Check(request)).status == 2
            await server.set_serving(True)
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        async for reply in stub.ServerReflectionInfo(iter([ask])):
            names = {service.name for service in reply.list_services_response.service}
            assert "shoal.node.v1.StorageNode" in names


@in_loop
async def test_a_port_that_is_taken():
    async with served(FakeNode()) as (server, _):
        with pytest.raises(StartupError, match=f"{server.port}.*Is the port taken"):
            await serve_node(FakeNode(), HOST, server.port, node_id="s2")


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.pem, and node.pem and other.pem with their keys: the second is signed by somebody else."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*args: str) -> None:
        subprocess.run(["openssl", *args], cwd=folder, check=True, capture_output=True, timeout=30)

    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    san = "subjectAltName=DNS:shoal-node"
    for ca, name in (("ca", "node"), ("stranger", "other")):
        openssl("req", "-x509", *new_key, *f"-keyout {ca}.key -out {ca}.pem -subj /CN={ca}".split())
        made = f"-keyout {name}.key -out {name}.csr -subj /CN=shoal-node -addext {san}"
        openssl("req", *new_key, *made.split())
        signed = f"-in {name}.csr -CA {ca}.pem -CAkey {ca}.key -CAcreateserial -out {name}.pem"
        openssl("x509", "-req", *signed.split(), "-days", "2", "-copy_extensions", "copy")
    return folder


@in_loop
async def test_nodes_know_each_other_by_certificates(certificates):
    def tls(name: str) -> NodeTls:
        return NodeTls(
            certificates / "ca.pem", certificates / f"{name}.pem", certificates / f"{name}.key",
            "shoal-node",
        )  # fmt: skip

    with_tls = RpcSettings(tls=tls("node"), connect_timeout_s=5)
    async with served(FakeNode(), settings=with_tls, tls=tls("node")) as (server, client):
        await client.create_shard(spec())
        assert (await client.count(KEY, None, Guard())).value == 0
        for settings in (QUICK, RpcSettings(tls=tls("other"), connect_timeout_s=5)):
            stranger = NodeClient(f"{HOST}:{server.port}", settings=settings)
            with pytest.raises(Unavailable):
                await stranger.count(KEY, None, Guard())
            with pytest.raises(Unavailable):
                await stranger.status()
            await stranger.close()


def test_a_certificate_that_is_not_there(tmp_path):
    from shoal.errors import SettingsError
    from shoal.rpc.channel import server_credentials

    with pytest.raises(SettingsError, match="cannot be read"):
        server_credentials(NodeTls(*(tmp_path / name for name in ("a", "b", "c"))))
