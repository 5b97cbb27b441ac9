"""The public gRPC API in this process: a real server and real calls, storage in memory."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from fakes.storage import FakeStorage
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from coordinator import grpc_api
from coordinator.grpc_api import GrpcApi
from coordinator.grpc_calls import CALLS
from coordinator.routing import ShardGone
from coordinator.service import Coordinator
from shoal.api.grpc_status import DETAILS_KEY, unpack_details
from shoal.encoder_api import Embedding, ModelInfo
from shoal.errors import StartupError, StorageFull
from shoal.health import Health, HealthReport
from shoal.ids import PointIds
from shoal.metadata.embedded import EmbeddedStore
from shoal.settings import CoordinatorSettings
from shoal.storage_api import Hits, Search, ShardKey
from shoal.v1 import collections_pb2, common_pb2, migrations_pb2, points_pb2
from shoal.wire import ops_pb2 as wire

Search_ = points_pb2.SearchRequest
Reply = points_pb2.SearchStreamResponse


class SlowStorage(FakeStorage):
    """Searches for k = 7 wait until they are let go; k = 13 is a bug."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.gone: set[ShardKey] = set()
        self.waiting = 0
        self.cancelled = 0

    def _shard(self, key: ShardKey) -> Any:
        if key in self.gone:
            raise ShardGone(key)
        return super()._shard(key)

    async def search(self, shard: ShardKey, query: Search, *more: Any) -> Hits:
        if query.limit == 13:
            raise ZeroDivisionError("a bug")
        if query.limit == 7:
            self.waiting += 1
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            finally:
                self.waiting -= 1
        return await super().search(shard, query, *more)


class World:
    """A server, and a channel to it."""

    def __init__(self, api: GrpcApi, storage: SlowStorage, port: int) -> None:
        self.api, self.storage = api, storage
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")

    async def call(
        self, method: str, request: Message | bytes, answer: Any = None, **more: Any
    ) -> Any:
        body = request if isinstance(request, bytes) else request.SerializeToString()
        found = await self.channel.unary_unary(f"/shoal.v1.{method}")(
            body, timeout=more.pop("timeout", 20), **more
        )
        return answer.FromString(found) if answer else found

    async def refused(self, method: str, request: Message | bytes, **more: Any) -> Refused:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.call(method, request, **more)
        return Refused(caught.value)

    def stream(self) -> Any:
        return self.channel.stream_stream(
            "/shoal.v1.Points/SearchStream",
            request_serializer=points_pb2.SearchStreamRequest.SerializeToString,
            response_deserializer=Reply.FromString,
        )(timeout=30)

    async def with_points(self) -> None:
        config = collections_pb2.CollectionConfig()
        config.vectors.add(size=2, distance=collections_pb2.DISTANCE_DOT)
        request = collections_pb2.CreateCollectionRequest(name="c", config=config)
        await self.call("Collections/Create", request)
        await self.call("Points/Upsert", upsert(1, 2, 3))


class Refused:
    """A status, and the detail in it."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code, self.message = error.code(), error.details()
        raw = dict(error.trailing_metadata() or ()).get(DETAILS_KEY)
        self.detail = None if raw is None else unpack_details(raw)  # type: ignore[arg-type]


def upsert(*keys: int) -> points_pb2.UpsertRequest:
    batch = wire.PointBatch(count=len(keys), ids=PointIds.from_keys(list(keys)).to_wire())
    values = b"".join(struct.pack("<2f", key, 1) for key in keys)
    batch.dense.add(dim=2, values=values)
    return points_pb2.UpsertRequest(collection="c", points=batch)


def search(limit: int = 3, **more: Any) -> points_pb2.SearchRequest:
    vector = struct.pack("<2f", 1, 0)
    return points_pb2.SearchRequest(collection="c", vector=vector, limit=limit, **more)


def items(*searches: tuple[int, points_pb2.SearchRequest]) -> points_pb2.SearchStreamRequest:
    item = points_pb2.SearchStreamRequest.Item
    return points_pb2.SearchStreamRequest(items=[item(tag=t, search=s) for t, s in searches])


def ids_of(response: points_pb2.SearchResponse) -> list[int]:
    return PointIds.from_wire(response.points.ids).keys()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - of the server's state, which no event tells
            await asyncio.sleep(0)


def run(
    tmp_path: Path, test: Callable[[World], Awaitable[None]], encoder: Any = None, **keys: str
) -> None:
    async def main() -> None:
        store = await EmbeddedStore.open(tmp_path / "metadata.sqlite")
        storage = SlowStorage()
        coordinator = Coordinator(
            store=store, storage=storage, encoder=encoder, settings=CoordinatorSettings()
        )
        await coordinator.start()
        api = GrpcApi(coordinator, **keys)
        world = World(api, storage, await api.start("127.0.0.1", 0))
        try:
            await test(world)
        finally:
            await world.channel.close()
            await api.close(0)
            await coordinator.close()
            await store.close()

    asyncio.run(main())


class CutsAll:
    """An encoder whose model reads nothing to the end."""

    async def encode(
        self, texts: list[str], model: str, fingerprint: str | None = None
    ) -> Embedding:
        count = len(texts)
        vectors = np.tile(np.array([[1, 0]], np.float32), (count, 1))
        return Embedding(vectors, np.full(count, 8, np.int32), np.full(count, True))

    def models(self) -> list[ModelInfo]:
        return []

    async def close(self) -> None: ...


def test_texts_that_were_cut_are_told(tmp_path):
    async def test(world: World) -> None:
        await world.with_points()
        one = points_pb2.SearchRequest(collection="c", text=points_pb2.Text(text="long"))
        many = points_pb2.SearchBatchRequest(searches=[one, search(), one])
        answer = await world.channel.unary_unary("/shoal.v1.Points/SearchBatch")(
            many.SerializeToString()
        )
        told = points_pb2.SearchBatchResponse.FromString(answer).results
        assert [result.truncated_texts for result in told] == [1, 0, 1]
        stream = world.stream()
        await stream.write(items((1, one), (2, search()), (3, one)))
        await stream.done_writing()
        replies = [item async for message in stream for item in message.items]
        assert {r.tag: r.result.truncated_texts for r in replies} == {1: 1, 2: 0, 3: 1}

    run(tmp_path, test, encoder=CutsAll())


# -- the surface ----------------------------------------------------------------------------------
def test_every_rpc_of_the_proto_has_a_handler():
    declared = {
        f"{service.full_name}/{method.name}": method
        for service in (
            collections_pb2.DESCRIPTOR.services_by_name["Collections"],
            migrations_pb2.DESCRIPTOR.services_by_name["Migrations"],
            points_pb2.DESCRIPTOR.services_by_name["Points"],
        )
        for method in service.methods
    }
    streams = {name for name, method in declared.items() if method.client_streaming}
    assert streams == set(grpc_api._STREAMS)
    assert set(declared) - streams == set(CALLS)
    for name, call in CALLS.items():
        assert declared[name].input_type.full_name == call.request.DESCRIPTOR.full_name
    writes = {name.partition("/")[2] for name, call in CALLS.items() if call.writes}
    reads = {"Get", "List", "Exists", "Status"}
    reads |= {"Search", "SearchBatch", "Scroll", "Retrieve", "Count"}
    assert writes.isdisjoint(reads)
    assert len(writes) + len(reads) == len({name.partition("/")[2] for name in CALLS}), "Delete: 2"


def test_health_and_reflection_need_no_key(tmp_path):
    async def test(world: World) -> None:
        check = world.channel.unary_unary("/grpc.health.v1.Health/Check")
        for service in ("", "shoal.v1.Points", "shoal.v1.Migrations"):
            asked = health_pb2.HealthCheckRequest(service=service).SerializeToString()
            said = health_pb2.HealthCheckResponse.FromString(await check(asked, timeout=20))
            assert said.status == health_pb2.HealthCheckResponse.SERVING
        path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        call = world.channel.stream_stream(path)(timeout=20)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        await call.write(request.SerializeToString())
        listed = reflection_pb2.ServerReflectionResponse.FromString(await call.read())
        names = {service.name for service in listed.list_services_response.service}
        ours = {f"shoal.v1.{name}" for name in ("Points", "Collections", "Migrations")}
        assert ours | {"grpc.health.v1.Health"} <= names
        call.cancel()

    run(tmp_path, test, api_key="gold")


def test_a_port_that_is_taken(tmp_path):
    async def test(world: World) -> None:
        other = GrpcApi(world.api._coordinator)
        port = world.api._server and await other.start("127.0.0.1", 0)
        third = GrpcApi(world.api._coordinator)
        with pytest.raises(StartupError, match=f"port {port}, for gRPC"):
            await third.start("127.0.0.1", int(port or 0))
        await other.close(0)
        await third.close(0)

    run(tmp_path, test)


# -- keys -----------------------------------------------------------------------------------------
def test_keys(tmp_path):
    async def test(world: World) -> None:
        count = points_pb2.CountRequest(collection="c")
        cases = [
            ((), grpc.StatusCode.UNAUTHENTICATED, "Unauthorized"),
            ((("api-key", "wrong"),), grpc.StatusCode.UNAUTHENTICATED, "Unauthorized"),
            ((("api-key", "silver"),), grpc.StatusCode.NOT_FOUND, "NotFound"),
            ((("authorization", "Bearer gold"),), grpc.StatusCode.NOT_FOUND, "NotFound"),
        ]
        for metadata, code, name in cases:
            refused = await world.refused("Points/Count", count, metadata=metadata)
            assert (refused.code, refused.detail.name) == (code, name)
        silver = (("api-key", "silver"),)
        refused = await world.refused("Points/Upsert", upsert(1), metadata=silver)
        assert refused.code is grpc.StatusCode.PERMISSION_DENIED
        for stream, code in (
            ("SearchStream", None),
            ("UpsertStream", grpc.StatusCode.PERMISSION_DENIED),
        ):
            call = world.channel.stream_stream(f"/shoal.v1.Points/{stream}")(metadata=silver)
            if code is None:
                await call.write(items((1, search())).SerializeToString())
                assert Reply.FromString(await call.read()).items[0].error.name == "NotFound"
                call.cancel()
            else:
                assert await call.code() is code

    run(tmp_path, test, api_key="gold", read_only_api_key="silver")


# -- errors ---------------------------------------------------------------------------------------
def test_an_error_has_a_status_and_a_detail(tmp_path):
    async def test(world: World) -> None:
        await world.with_points()
        refused = await world.refused("Points/Search", b"\xff\xff")
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
        assert refused.detail.name == "BadRequest"
        world.storage.error = StorageFull("the disk is full")
        refused = await world.refused("Points/Upsert", upsert(9))
        assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (refused.detail.name, refused.detail.retryable) == ("StorageFull", True)
        world.storage.error = None
        refused = await world.refused("Points/Search", search(limit=13))
        assert refused.code is grpc.StatusCode.INTERNAL
        assert (refused.detail.name, refused.detail.maybe_applied) == ("InternalError", True)
        assert "ZeroDivision" not in refused.message

    run(tmp_path, test)


def test_a_request_about_a_model_is_small(tmp_path):
    """Larger ones are refused before they are read: that would hold everybody else."""

    async def test(world: World) -> None:
        text = "x" * 300_000
        request = migrations_pb2.CompareModelsRequest(collection="c")
        request.given.queries.add(text=text)
        refused = await world.refused("Migrations/Compare", request)
        assert (refused.code, refused.detail.name) == (grpc.StatusCode.NOT_FOUND, "NotFound")
        request.given.queries.add(text=text)
        for body in (request, b"\xff" * 600_000):
            refused = await world.refused("Migrations/Compare", body)
            assert refused.detail.name == "BodyTooLarge"
            assert "Migrations/Compare may have 524288 bytes" in refused.message
        assert world.api._metrics.in_flight == world.api._body_bytes == 0

    run(tmp_path, test)


def test_a_deadline_cancels_the_work(tmp_path):
    async def test(world: World) -> None:
        await world.with_points()
        refused = await world.refused("Points/Search", search(limit=7), timeout=0.2)
        assert refused.code is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: world.storage.cancelled == 1)
        assert world.api._metrics.in_flight == world.api._body_bytes == 0

    run(tmp_path, test)


@pytest.mark.parametrize("bound", ["PENDING_REQUESTS_MAX", "GRPC_BODY_BYTES_MAX"])
def test_too_much_at_once_is_refused(tmp_path, monkeypatch, bound):
    async def test(world: World) -> None:
        await world.with_points()
        size = len(search(limit=7).SerializeToString())
        monkeypatch.setattr(grpc_api, bound, 2 if bound.startswith("PENDING") else 2 * size)
        waiting = [
            asyncio.create_task(world.call("Points/Search", search(limit=7))) for _ in range(2)
        ]
        await until(lambda: world.storage.waiting == 2)
        refused = await world.refused("Points/Search", search())
        assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (refused.detail.name, refused.detail.retry_after_s) == ("Busy", 1.0)
        stream = world.stream()
        await stream.write(items((1, search())))
        assert (await stream.read()).items[0].error.name == "Busy"
        world.storage.gate.set()
        await asyncio.gather(*waiting)
        await stream.write(items((2, search())))
        assert ids_of((await stream.read()).items[0].result) == [3, 2, 1]
        stream.cancel()

    run(tmp_path, test)


def test_a_collection_that_was_made_anew_meanwhile(tmp_path):
    """By another coordinator: this one hears of it when the shards that it knows are gone."""

    async def test(world: World) -> None:
        await world.with_points()
        catalog = world.api._coordinator.catalog
        old = catalog.get("c")
        await catalog.delete("c")
        await world.with_points()
        new = catalog.get("c")
        assert old.record.id != new.record.id
        for method, request in (
            ("Collections/Get", collections_pb2.GetCollectionRequest(name="c")),
            ("Points/Search", search()),
            ("Points/Upsert", upsert(9)),
            ("Points/Count", points_pb2.CountRequest(collection="c")),
        ):
            catalog._collections["c"] = old
            world.storage.gone = {old.shards[0]}
            await world.call(method, request)
        catalog._collections["c"] = old
        stream = world.stream()
        await stream.write(items((1, search())))
        assert ids_of((await stream.read()).items[0].result) == [9, 3, 2]
        stream.cancel()
        await catalog.delete("c")
        catalog._collections["c"] = old
        refused = await world.refused("Points/Search", search())
        assert (refused.code, refused.detail.name) == (grpc.StatusCode.NOT_FOUND, "NotFound")

    run(tmp_path, test)


# -- streams --------------------------------------------------------------------------------------
def test_answers_of_a_stream_come_when_they_are_ready(tmp_path):
    async def test(world: World) -> None:
        await world.with_points()
        stream = world.stream()
        wrong = search(filter=b"{")
        await stream.write(items((1, search(limit=7)), (2, search()), (3, wrong), (4, search(13))))
        found = {}
        while len(found) < 3:
            found |= {item.tag: item for item in (await stream.read()).items}
        assert ids_of(found[2].result) == [3, 2, 1]
        assert found[3].error.name == "BadRequest"
        assert found[4].error.name == "InternalError"
        world.storage.gate.set()
        await stream.done_writing()
        assert [item.tag for item in (await stream.read()).items] == [1]
        assert await stream.read() is grpc.aio.EOF
        assert await stream.code() is grpc.StatusCode.OK

    run(tmp_path, test)


def test_an_item_with_an_unknown_field_is_refused_and_no_other(tmp_path):
    async def test(world: World) -> None:
        await world.with_points()
        unknown = points_pb2.SearchRequest.FromString(
            search().SerializeToString() + b"\xa2\x38\x01?"
        )
        stream = world.stream()
        await stream.write(items((1, unknown), (2, search())))
        found: dict[int, Any] = {}
        while len(found) < 2:
            found |= {item.tag: item for item in (await stream.read()).items}
        assert "unknown field 900" in found[1].error.message
        assert ids_of(found[2].result) == [3, 2, 1]
        stream.cancel()

    run(tmp_path, test)


def test_an_item_has_a_time_of_its_own(tmp_path):
    async def test(world: World) -> None:
        await world.with_points()
        stream = world.stream()
        request = items((1, search(limit=7)), (2, search()))
        request.items[0].timeout_ms = 50
        await stream.write(request)
        found: dict[int, Any] = {}
        while len(found) < 2:
            found |= {item.tag: item for item in (await stream.read()).items}
        error = found[1].error
        assert (error.name, error.retryable, error.maybe_applied) == ("TimedOut", True, False)
        stream.cancel()

    run(tmp_path, test)


def test_a_stream_is_read_no_further_than_it_can_work(tmp_path, monkeypatch):
    kind = grpc_api._STREAMS["shoal.v1.Points/SearchStream"]
    narrow = type(kind)(
        **{name: getattr(kind, name) for name in kind.__slots__} | {"at_work_max": 3}
    )
    monkeypatch.setitem(grpc_api._STREAMS, "shoal.v1.Points/SearchStream", narrow)

    async def test(world: World) -> None:
        await world.with_points()
        stream = world.stream()
        for tag in range(10):
            await stream.write(items((tag, search(limit=7))))
        await until(lambda: world.storage.waiting == 3)
        await world.call("Points/Search", search())  # a round trip: nothing more was begun
        assert world.storage.waiting == 3
        world.storage.gate.set()
        await stream.done_writing()
        tags = [item.tag async for message in stream for item in message.items]
        assert sorted(tags) == list(range(10))

    run(tmp_path, test)


def test_what_is_no_message_ends_a_stream_after_what_was_begun(tmp_path):
    async def test(world: World) -> None:
        await world.with_points()
        call = world.channel.stream_stream("/shoal.v1.Points/SearchStream")(timeout=20)
        await call.write(items((1, search(limit=7))).SerializeToString())
        await call.write(b"\xff\xff")
        await until(lambda: world.storage.waiting == 1)
        world.storage.gate.set()
        assert Reply.FromString(await call.read()).items[0].tag == 1
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT

    run(tmp_path, test)


def test_a_client_that_goes_away_takes_its_work_with_it(tmp_path):
    async def test(world: World) -> None:
        await world.with_points()
        stream = world.stream()
        await stream.write(items((1, search(limit=7)), (2, search(limit=7))))
        await until(lambda: world.storage.waiting == 2)
        stream.cancel()
        await until(lambda: world.storage.cancelled == 2)
        await until(lambda: not world.api._streams)
        assert world.api._metrics.in_flight == 0

    run(tmp_path, test)


def test_a_server_that_stops_answers_what_it_has_begun(tmp_path):
    async def test(world: World) -> None:
        await world.with_points()
        stream = world.stream()
        idle = world.stream()
        await idle.write(items((1, search())))
        await idle.read()
        await stream.write(items((1, search(limit=7))))
        unary = asyncio.create_task(
            world.call("Points/Search", search(limit=7), points_pb2.SearchResponse)
        )
        await until(lambda: world.storage.waiting == 2)
        world.api.begin_close(20)
        assert await idle.code() is grpc.StatusCode.UNAVAILABLE, "an idle stream ends at once"
        await stream.write(items((2, search())))  # too late: it is not begun
        world.storage.gate.set()
        assert [item.tag for item in (await stream.read()).items] == [1]
        assert await stream.code() is grpc.StatusCode.UNAVAILABLE
        raw = dict(await stream.trailing_metadata())[DETAILS_KEY]
        detail = unpack_details(raw)
        assert detail is not None
        assert (detail.name, detail.maybe_applied) == ("Unavailable", False)
        assert ids_of(await unary) == [3, 2, 1]
        await world.api.close(20)

    run(tmp_path, test)


def test_upserts_over_a_stream(tmp_path):
    async def test(world: World) -> None:
        await world.with_points()
        call = world.channel.stream_stream(
            "/shoal.v1.Points/UpsertStream",
            request_serializer=points_pb2.UpsertStreamRequest.SerializeToString,
            response_deserializer=points_pb2.UpsertStreamResponse.FromString,
        )(timeout=20)
        for tag in range(20):
            request = upsert(tag) if tag != 5 else upsert()
            await call.write(points_pb2.UpsertStreamRequest(tag=tag, upsert=request))
        await call.done_writing()
        replies = {reply.tag: reply async for reply in call}
        assert sorted(replies) == list(range(20))
        assert replies[5].error.name == "BadRequest"
        assert all(replies[tag].result.operation_id for tag in replies if tag != 5)
        assert replies[7].result.token
        answer = await world.call(
            "Points/Count", points_pb2.CountRequest(collection="c"), points_pb2.CountResponse
        )
        assert answer.count == 19

    run(tmp_path, test)


def test_a_batch_of_searches(tmp_path):
    async def test(world: World) -> None:
        await world.with_points()
        batch = points_pb2.SearchBatchRequest(searches=[search(1), search(2)])
        answer = await world.call("Points/SearchBatch", batch, points_pb2.SearchBatchResponse)
        assert [ids_of(result) for result in answer.results] == [[3], [3, 2]]
        batch.searches.append(points_pb2.SearchRequest(collection="moon"))
        refused = await world.refused("Points/SearchBatch", batch)
        assert refused.code is grpc.StatusCode.NOT_FOUND
        many = points_pb2.SearchBatchRequest(searches=[search()] * 129)
        refused = await world.refused("Points/SearchBatch", many)
        assert "the most is 128" in refused.message

    run(tmp_path, test)


def test_a_read_may_ask_for_a_write_by_its_token(tmp_path):
    async def test(world: World) -> None:
        await world.with_points()
        written = await world.call("Points/Upsert", upsert(8), points_pb2.WriteResult)
        assert written.status == points_pb2.UPDATE_STATUS_ACKNOWLEDGED
        read = common_pb2.ReadOptions(
            consistency=common_pb2.CONSISTENCY_STRONG, token=written.token
        )
        answer = await world.call(
            "Points/Count",
            points_pb2.CountRequest(collection="c", read=read),
            points_pb2.CountResponse,
        )
        assert answer.count == 4
        asked = world.storage.reads[-1]
        assert asked.strong
        assert set(asked.token.values()) == {written.operation_id}
        read.consistency = 9  # type: ignore[assignment]
        refused = await world.refused("Points/Search", search(read=read))
        assert "consistency has the value 9" in refused.message

    run(tmp_path, test)


# -- metrics --------------------------------------------------------------------------------------
def test_both_apis_are_counted(tmp_path):
    async def test(world: World) -> None:
        await world.with_points()
        await world.refused("Points/Search", search(filter=b"{"))
        stream = world.stream()
        await stream.write(items((1, search()), (2, search(filter=b"{"))))
        await stream.done_writing()
        assert len([reply async for reply in stream]) >= 1
        report = HealthReport(Health.GREEN, True, True, (), (), None, 0.0)
        text = world.api._metrics.render(report, {"hedge": 3}, {}).decode()
        assert 'shoal_requests_total{operation="Collections/Create",status="OK"} 1' in text
        for count in (
            '{operation="Points/Search",status="INVALID_ARGUMENT"} 1',
            '{operation="Points/SearchStream",status="OK"} 1',
            '{operation="Points/SearchStream",status="INVALID_ARGUMENT"} 1',
        ):
            assert f"shoal_requests_total{count}" in text
        assert "shoal_requests_in_flight 0" in text
        assert 'shoal_extra_requests_total{kind="hedge"} 3' in text

    run(tmp_path, test)
