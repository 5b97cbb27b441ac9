"""The client against servers that fail as they are told to: what is sent again, where, and when not."""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

from shoal.api.grpc_status import DETAILS_KEY, code_of, detail_of, pack_details
from shoal.client import (
    AsyncClient,
    AsyncMigration,
    Batch,
    Client,
    MigratedModel,
    Migration,
    MigrationStatus,
    RetryPolicy,
)
from shoal.errors import (
    BadRequest,
    BodyTooLarge,
    Busy,
    NotFound,
    ShoalError,
    TimedOut,
    Unavailable,
)
from shoal.v1 import migrations_pb2, points_pb2

QUICK = RetryPolicy(pause_s=0.001, pause_s_max=0.002)
HANG, CUT = object(), object()  # never answer; end the connection without a word of ours


def in_doubt(error: ShoalError) -> ShoalError:
    error.maybe_applied = True
    return error


class Scripted:
    """A server that answers calls by a script: an error, HANG, CUT, or None for a good answer.
    When the script is over everything is good."""

    def __init__(self, script: list[Any]) -> None:
        self.script = list(script)
        self.calls: list[str] = []
        self.requests: list[Any] = []
        self.metadata: list[Any] = []
        self.heard = asyncio.Event()  # a request
        self.server: Any = None
        self.address = ""

    async def start(self) -> None:
        self.server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        kinds = {
            "Upsert": (points_pb2.UpsertRequest, points_pb2.WriteResult(token="1.0:5")),
            "Delete": (points_pb2.DeletePointsRequest, points_pb2.WriteResult(token="1.0:6")),
            "Count": (points_pb2.CountRequest, points_pb2.CountResponse(count=7)),
        }

        def unary(kinds: dict[str, Any]) -> dict[str, Any]:
            return {
                name: grpc.unary_unary_rpc_method_handler(
                    self._unary(name, answer),
                    kind.FromString,
                    lambda message: message.SerializeToString(),
                )
                for name, (kind, answer) in kinds.items()
            }

        handlers = unary(kinds)
        handlers["SearchStream"] = grpc.stream_stream_rpc_method_handler(
            self._searches,
            points_pb2.SearchStreamRequest.FromString,
            points_pb2.SearchStreamResponse.SerializeToString,
        )
        handlers["UpsertStream"] = grpc.stream_stream_rpc_method_handler(
            self._upserts,
            points_pb2.UpsertStreamRequest.FromString,
            points_pb2.UpsertStreamResponse.SerializeToString,
        )
        status = migrations_pb2.MigrationStatus(
            phase=migrations_pb2.MIGRATION_PHASE_COPYING, started_at="2026-01-01T00:00:00+00:00"
        )
        migrations = {
            "Start": (migrations_pb2.StartMigrationRequest, status),
            "Status": (migrations_pb2.MigrationStatusRequest, status),
            "Compare": (migrations_pb2.CompareModelsRequest, migrations_pb2.ComparedModels()),
            "Switch": (migrations_pb2.SwitchModelRequest, status),
            "Rollback": (migrations_pb2.RollbackModelRequest, status),
            "Drop": (migrations_pb2.DropModelRequest, status),
        }
        self.server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler("shoal.v1.Points", handlers),
                grpc.method_handlers_generic_handler("shoal.v1.Migrations", unary(migrations)),
            )
        )
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        await self.server.start()

    def _next(self) -> Any:
        return self.script.pop(0) if self.script else None

    def _unary(self, name: str, answer: Any) -> Callable[[Any, Any], Awaitable[Any]]:
        async def call(request: Any, context: Any) -> Any:
            self.calls.append(name)
            self.requests.append(request)
            self.heard.set()
            self.metadata.append(dict(context.invocation_metadata()))
            await _play(self._next(), context)
            return answer

        return call

    async def _searches(self, requests: Any, context: Any) -> None:
        self.calls.append("SearchStream")
        self.metadata.append(dict(context.invocation_metadata()))
        await context.send_initial_metadata(())
        async for message in requests:
            self.requests.append(message)
            self.heard.set()
            for item in message.items:
                step = self._next()
                reply = points_pb2.SearchStreamResponse.Item(tag=item.tag)
                if isinstance(step, ShoalError) and not isinstance(step, EndOfStream):
                    reply.error.CopyFrom(detail_of(step))
                elif step is not None:
                    await _play(step, context)
                else:
                    reply.result.points.count = 0
                await context.write(points_pb2.SearchStreamResponse(items=[reply]))

    async def _upserts(self, requests: Any, context: Any) -> None:
        self.calls.append("UpsertStream")
        await context.send_initial_metadata(())
        async for message in requests:
            self.requests.append(message)
            self.heard.set()
            await _play(self._next(), context)
            result = points_pb2.WriteResult(token="1.0:9")
            await context.write(points_pb2.UpsertStreamResponse(tag=message.tag, result=result))


class EndOfStream(Unavailable):
    """Ends a stream as a stopping server does: everything begun is answered."""


async def _play(step: Any, context: Any) -> None:
    if step is HANG:
        await asyncio.Event().wait()
    elif step is CUT:
        await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
    elif step is not None:
        detail = detail_of(step)
        detail.name = detail.name.replace("EndOfStream", "Unavailable")
        packed = ((DETAILS_KEY, pack_details(code_of(step), detail)),)
        await context.abort(code_of(step), detail.message, trailing_metadata=packed)


Test = Callable[[AsyncClient, Any], Awaitable[None]]


def run(*scripts: list[Any], test: Test, dead: int = 0, **settings: Any) -> None:
    """test(client, servers): one server per script. dead: addresses in front where nobody is."""

    async def main() -> None:
        servers = [Scripted(script) for script in scripts]
        for server in servers:
            await server.start()
        addresses = [f"127.0.0.1:{port}" for port in range(1, 1 + dead)]
        addresses += [server.address for server in servers]
        settings.setdefault("retry", QUICK)
        try:
            async with AsyncClient(addresses, dice=random.Random(3), **settings) as client:
                await test(client, servers if len(servers) != 1 else servers[0])
        finally:
            for server in servers:
                await server.server.stop(None)

    asyncio.run(main())


def test_reads_are_repeated():
    async def test(client: AsyncClient, server: Scripted) -> None:
        assert await client.count("c") == 7
        assert server.calls == ["Count"] * 4

    run([Unavailable("x"), CUT, Busy("x", retry_after_s=0.001)], test=test)


def test_a_refusal_is_not_repeated():
    async def test(client: AsyncClient, server: Scripted) -> None:
        with pytest.raises(NotFound, match="no such collection"):
            await client.count("c")
        assert server.calls == ["Count"]

    run([NotFound("no such collection")], test=test)


@pytest.mark.parametrize("trouble", [in_doubt(Unavailable("x")), CUT], ids=["said", "cut"])
def test_a_write_in_doubt_is_not_repeated(trouble):
    async def test(client: AsyncClient, server: Scripted) -> None:
        with pytest.raises(Unavailable) as caught:
            await client.upsert("c", [1], np.ones((1, 2)))
        assert caught.value.maybe_applied
        assert server.calls == ["Upsert"]
        with pytest.raises(Unavailable):
            await client.delete("c", [1])
        await client.upsert("c", [1], np.ones((1, 2)), idempotent=True)
        assert server.calls == ["Upsert", "Delete", "Upsert", "Upsert"]

    run([trouble, trouble, trouble], test=test)


def test_a_write_that_did_not_happen_is_repeated():
    async def test(client: AsyncClient, server: Scripted) -> None:
        await client.upsert("c", [1], np.ones((1, 2)))
        assert server.calls == ["Upsert"] * 3

    run([Unavailable("x"), Busy("x", retry_after_s=0.001)], test=test)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("Start", lambda migration: migration.start("new", "text")),
        ("Switch", lambda migration: migration.switch()),
        ("Rollback", lambda migration: migration.rollback()),
        ("Drop", lambda migration: migration.drop("old")),
    ],
)
def test_a_change_of_model_in_doubt_is_not_repeated(name, change):
    async def test(client: AsyncClient, server: Scripted) -> None:
        migration = client.migration("c", "v")
        with pytest.raises(Unavailable) as caught:
            await change(migration)
        assert caught.value.maybe_applied
        await change(migration)
        assert server.calls == [name] * 3
        assert {(request.collection, request.vector) for request in server.requests} == {("c", "v")}

    run([CUT, Unavailable("it has certainly not happened")], test=test)


def test_questions_about_a_change_of_model_are_repeated():
    async def test(client: AsyncClient, server: Scripted) -> None:
        migration = client.migration("c")
        assert (await migration.status()).phase == "copying"
        assert (await migration.compare(["a"])).ndcg is None
        assert server.calls == ["Status"] * 3 + ["Compare"] * 2

    run([CUT, Unavailable("x"), None, Busy("x", retry_after_s=0.001)], test=test)


def test_to_wait_for_a_copy_ends():
    async def test(client: AsyncClient, server: Scripted) -> None:
        with pytest.raises(TimedOut, match=r"0 points of `c` still lack.*copying") as caught:
            await client.migration("c").wait(timeout_s=0.2)  # no answer ever has a count
        assert not caught.value.maybe_applied
        assert 2 <= len(server.calls) <= 4
        server.script.append(NotFound("it is over"))
        with pytest.raises(NotFound, match="over"):
            await client.migration("c").wait(timeout_s=20)

    run([], test=test)


@pytest.mark.parametrize(
    ("status", "copied"),
    [
        ({"left": 0}, True),
        ({"left": 3}, False),
        ({"left": 3, "without_text": 3}, True),
        ({"left": 0, "only_other": 2}, True),
        ({"left": 0, "only_other": 2, "complete": True}, False),
        ({"left": 1, "only_other": 2, "complete": True, "without_text": 3}, True),
        ({"left": 0, "phase": "preparing"}, False),
        ({"left": 0, "phase": "dropping"}, False),
        ({}, False),
    ],
)
def test_when_everything_is_copied(status, copied):
    one = MigratedModel("one", None, 2)
    plain = {"phase": "copying", "complete": False} | status
    began = datetime(2026, 1, 1, tzinfo=UTC)
    about = {"current": one, "other": one, "text_field": "t", "started_at": began}
    assert (
        MigrationStatus(vector="", switched=False, recorded_queries=0, **about, **plain).copied
        is copied
    )


def test_a_deadline_of_a_write_leaves_it_in_doubt():
    async def test(client: AsyncClient, server: Scripted) -> None:
        with pytest.raises(TimedOut) as caught:
            await client.upsert("c", [1], np.ones((1, 2)), timeout_s=0.1, idempotent=True)
        assert caught.value.maybe_applied
        with pytest.raises(TimedOut) as caught:
            await client.search("c", [1, 2], timeout_s=0.1)
        assert not caught.value.maybe_applied
        assert server.calls == ["Upsert", "SearchStream"]

    run([HANG, HANG], test=test)


def test_an_address_where_nobody_is():
    async def test(client: AsyncClient, server: Scripted) -> None:
        assert await client.count("c") == 7
        await client.upsert("c", [1], np.ones((1, 2)))

    run([], test=test, dead=2)


def test_nobody_anywhere():
    async def main() -> None:
        async with AsyncClient("127.0.0.1:1", connect_timeout_s=0.1, retry=QUICK) as client:
            with pytest.raises(Unavailable, match=r"no server answers at 127\.0\.0\.1:1") as caught:
                await client.upsert("c", [1], np.ones((1, 2)), timeout_s=1)
            assert not caught.value.maybe_applied

    asyncio.run(main())


def test_the_next_server_is_asked_when_one_is_lost():
    async def test(client: AsyncClient, servers: list[Scripted]) -> None:
        first, second = servers
        assert await client.count("c") == 7
        assert (first.calls, second.calls) == (["Count"], [])
        await client.upsert("c", [1], np.ones((1, 2)))
        assert (len(first.calls), second.calls) == (2, ["Upsert"])
        assert await client.count("c") == 7
        assert (len(first.calls), second.calls) == (2, ["Upsert", "Count"]), "it stays there"

    run([None, Unavailable("stopping")], [], test=test)


def test_a_server_that_went_away_and_another():
    async def test(client: AsyncClient, servers: list[Scripted]) -> None:
        assert await client.search("c", [1, 2]) is not None
        await servers[0].server.stop(None)
        assert await client.search("c", [1, 2]) is not None
        assert await client.count("c") == 7

    run([], [], test=test)


def test_reads_carry_what_was_written():
    async def test(client: AsyncClient, server: Scripted) -> None:
        await client.count("c")
        await client.upsert("c", [1], np.ones((1, 2)))
        await client.delete("c", [1])
        await client.count("c")
        await client.count("other")
        await client.remember("other", "2.0:3,2.1:4")
        await client.count("other", consistency="strong")
        counts = [r for r in server.requests if isinstance(r, points_pb2.CountRequest)]
        assert [r.read.token for r in counts] == ["", "1.0:6", "", "2.0:3,2.1:4"]
        assert counts[-1].read.consistency == 1
        with pytest.raises(BadRequest, match="no token"):
            await client.remember("c", "moon")

    run([], test=test)


def test_the_key_is_shown():
    async def test(client: AsyncClient, server: Scripted) -> None:
        await client.count("c")
        await client.search("c", [1, 2])
        assert [seen["api-key"] for seen in server.metadata] == ["gold", "gold"]

    run([], test=test, api_key="gold")


# -- the stream -----------------------------------------------------------------------------------
def test_searches_share_a_stream_and_its_messages():
    async def test(client: AsyncClient, server: Scripted) -> None:
        await client.search("c", [0, 0])
        found = await asyncio.gather(*(client.search("c", [n, 1]) for n in range(100)))
        assert len(found) == 100
        assert server.calls == ["SearchStream"]
        assert sum(len(message.items) for message in server.requests) == 101
        assert len(server.requests) < 60

    run([], test=test)


def test_an_error_is_of_one_search_only():
    async def test(client: AsyncClient, server: Scripted) -> None:
        outcomes = await asyncio.gather(
            *(client.search("c", [n, 1]) for n in range(3)), return_exceptions=True
        )
        kinds = sorted(type(outcome).__name__ for outcome in outcomes)
        assert kinds == ["Hits", "Hits", "NotFound"]
        assert server.calls == ["SearchStream"]

    run([None, NotFound("x")], test=test)


@pytest.mark.parametrize("trouble", [CUT, EndOfStream("the server is stopping")])
def test_a_stream_that_breaks_is_opened_again_for_searches(trouble):
    async def test(client: AsyncClient, server: Scripted) -> None:
        await asyncio.gather(*(client.search("c", [n, 1]) for n in range(5)))
        assert server.calls == ["SearchStream"] * 2

    run([None, None, trouble], test=test)


def test_a_caller_that_gives_up_does_not_disturb_the_others():
    async def test(client: AsyncClient, server: Scripted) -> None:
        impatient = asyncio.create_task(client.search("c", [1, 1]))
        await server.heard.wait()
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        await client.search("c", [1, 1])
        assert server.calls == ["SearchStream"]

    run([], test=test)


def batch(count: int) -> Batch:
    return Batch(np.arange(count), np.ones((count, 2)))


def test_an_upload_carries_on_after_what_is_harmless():
    async def test(client: AsyncClient, server: Scripted) -> None:
        done = await client.upload("c", batch(10), batch_points=2, in_flight=1)
        assert (done.points, done.batches) == (10, 5)
        assert server.calls == ["UpsertStream"] * 3
        assert len(server.requests) == 7

    run([None, CUT, EndOfStream("stopping")], test=test)


def test_an_upload_that_may_not_be_repeated_stops_and_says_how_far_it_came():
    async def test(client: AsyncClient, server: Scripted) -> None:
        with pytest.raises(Unavailable) as caught:
            await client.upload("c", batch(10), batch_points=2, in_flight=1, idempotent=False)
        assert caught.value.maybe_applied
        assert caught.value.__notes__ == ["4 points of this upload, in 2 batches, are written."]
        # what a server that stops did not answer did not happen: that is repeated
        done = await client.upload("c", batch(2), idempotent=False)
        assert done.points == 2

    run([None, None, CUT, EndOfStream("stopping")], test=test)


def test_an_upload_takes_any_source_and_tells_its_progress():
    async def test(client: AsyncClient, server: Scripted) -> None:
        seen: list[int] = []
        parts = (batch(3) for _ in range(4))
        done = await client.upload("c", parts, on_progress=lambda p: seen.append(p.points))
        assert done.points == 12
        assert seen == [3, 6, 9, 12]

        async def source() -> Any:
            for _ in range(3):
                yield batch(5)

        assert (await client.upload("c", source(), batch_points=2)).batches == 9
        assert (await client.upload("c", [])).points == 0

        def broken() -> Any:
            yield batch(1)
            raise LookupError("the file ends in the middle")

        with pytest.raises(LookupError, match="in the middle"):
            await client.upload("c", broken())

    run([], test=test)


def test_an_upload_reads_only_a_little_ahead():
    async def test(client: AsyncClient, server: Scripted) -> None:
        read = 0

        def source() -> Any:
            nonlocal read
            for _ in range(100):
                read += 1
                yield batch(1)

        upload = asyncio.create_task(client.upload("c", source(), in_flight=3, timeout_s=20))
        await server.heard.wait()
        for _ in range(5):
            await client.count("c")  # a round trip: time enough to read on
        assert read <= 4
        upload.cancel()
        with pytest.raises(asyncio.CancelledError):
            await upload

    run([HANG], test=test)


def test_a_batch_beyond_the_bound_is_not_sent():
    async def test(client: AsyncClient, server: Scripted) -> None:
        payloads = [{"a": "x" * 1_000_000}] * 40
        with pytest.raises(BodyTooLarge):
            await client.upload("c", Batch(range(40), np.ones((40, 2)), payloads))
        with pytest.raises(BodyTooLarge):
            await client.upsert("c", range(40), np.ones((40, 2)), payloads)
        assert server.calls == []

    run([], test=test)


# -- load -----------------------------------------------------------------------------------------
def test_calls_beyond_the_bound_wait_and_their_wait_counts():
    async def test(client: AsyncClient, server: Scripted) -> None:
        first = asyncio.create_task(client.count("c", timeout_s=20))
        await server.heard.wait()
        with pytest.raises(TimedOut, match="earlier calls") as caught:
            await client.upsert("c", [1], np.ones((1, 2)), timeout_s=0.05)
        assert not caught.value.maybe_applied
        assert server.calls == ["Count"]
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await client.upsert("c", [1], np.ones((1, 2)))

    run([HANG], test=test, in_flight_max=1)


def test_a_closed_client_says_so():
    async def main() -> None:
        client = AsyncClient("127.0.0.1:1")
        await client.close()
        with pytest.raises(Unavailable, match="closed"):
            await client.count("c")

    asyncio.run(main())


def test_what_was_sent_before_the_client_was_closed_may_have_happened():
    async def test(client: AsyncClient, server: Scripted) -> None:
        batch = Batch([1], np.ones((1, 2), np.float32))
        uploading = asyncio.create_task(client.upload("c", batch, idempotent=False))
        await server.heard.wait()
        await client.close()
        with pytest.raises(Unavailable, match="closed") as told:
            await uploading
        assert told.value.maybe_applied
        assert len(server.requests) == 1

    run([HANG], test=test)


def test_calls_under_way_fail_when_the_client_is_closed():
    async def test(client: AsyncClient, server: Scripted) -> None:
        deleting = asyncio.create_task(client.delete("c", [1], idempotent=True))
        await server.heard.wait()
        await client.close()
        with pytest.raises(Unavailable, match="closed") as told:
            await deleting
        assert told.value.maybe_applied
        assert server.calls == ["Delete"]  # and nothing more is sent

    run([HANG], test=test, retry=RetryPolicy(pause_s=0.2))


def test_a_client_that_is_closed_during_a_pause_sends_nothing_more():
    async def test(client: AsyncClient, server: Scripted) -> None:
        retries, failed = client._core._retries, asyncio.Event()
        asked = retries.pause_s

        def pause_s(*args: Any, **options: Any) -> float | None:
            failed.set()
            return asked(*args, **options)

        retries.pause_s = pause_s
        counting = asyncio.create_task(client.count("c"))
        await failed.wait()
        await client.close()
        with pytest.raises(Unavailable, match="closed"):
            await counting
        assert server.calls == ["Count"]

    run([Unavailable("not now")], test=test, retry=RetryPolicy(pause_s=0.2))


@pytest.mark.parametrize(
    ("asynchronous", "blocking"), [(AsyncClient, Client), (AsyncMigration, Migration)]
)
def test_the_blocking_face_has_everything(asynchronous, blocking):
    def public(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert public(blocking) == public(asynchronous)
    for name in public(blocking):
        one, other = getattr(asynchronous, name), getattr(blocking, name)
        assert inspect.signature(one).parameters == inspect.signature(other).parameters, name
        assert other.__doc__ or not one.__doc__, name
        assert not inspect.iscoroutinefunction(other)


def test_a_closed_blocking_client_says_so():
    client = Client("127.0.0.1:1")
    client.close()
    with pytest.raises(Unavailable, match="this client is closed"):
        client.count("c")
    with pytest.raises(Unavailable, match="this client is closed"):
        client.migration("c").status()
