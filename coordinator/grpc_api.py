"""The public gRPC API (proto/shoal/v1) of one coordinator, with health service and reflection.

    call ──▶ key, load ──▶ message, no field unknown ──▶ coordinator ──▶ message ──▶ answer
                  └──────────────── an error of shoal.errors ─────────▶ status with a detail

Requests mean what the same requests over HTTP mean (coordinator/grpc_parse.py). A deadline of the
client cancels the work here; a write that was cancelled may happen.

CPU of grpc.aio alone, measured with nothing behind it: 190 µs a unary call, 98 µs a message of a
stream. That is why SearchStream exists and why its messages carry several items.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from time import perf_counter
from typing import Any, NoReturn

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from coordinator.auth import ApiKeys, given_key
from coordinator.grpc_calls import CALLS, UnaryCall, search, upsert
from coordinator.grpc_parse import decode
from coordinator.grpc_stream import Context, Stream, StreamKind
from coordinator.metrics import Metrics
from coordinator.service import Coordinator
from shoal.api.grpc_status import DETAILS_KEY, code_of, detail_of, pack_details
from shoal.errors import BodyTooLarge, Busy, ShoalError, StartupError, Unavailable
from shoal.limits import (
    BODY_BYTES_MAX,
    GRPC_BODY_BYTES_MAX,
    GRPC_CALLS_MAX,
    GRPC_MESSAGE_BYTES_TARGET,
    GRPC_STREAM_SEARCHES_MAX,
    GRPC_STREAM_UPSERTS_MAX,
    PENDING_REQUESTS_MAX,
)
from shoal.telemetry import logger
from shoal.v1 import collections_pb2, common_pb2, migrations_pb2, points_pb2

__all__ = ["GrpcApi"]

_log = logger("grpc")

_SERVICES = (
    collections_pb2.DESCRIPTOR.services_by_name["Collections"],
    migrations_pb2.DESCRIPTOR.services_by_name["Migrations"],
    points_pb2.DESCRIPTOR.services_by_name["Points"],
)
_OPTIONS = (
    # Two servers on one port would share its connections without anybody noticing.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", BODY_BYTES_MAX),
    ("grpc.max_send_message_length", -1),  # SEARCH_LIMIT_MAX and the like bound an answer
    # Clients ask every 10 s whether we are still there, also between calls.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)
_BUG = common_pb2.ErrorDetail(
    name="InternalError",
    message="Service internal error: a bug in Shoal, written to its log; the request may have "
    "happened",
    maybe_applied=True,
)


class GrpcApi:
    """Serves one coordinator over gRPC. Make and use it on one event loop.

    api_key, read_only_api_key  as for HTTP: in the metadata `api-key`, or `authorization: Bearer`.
    Health and reflection need none.
    metrics                     shared with HTTP: requests at work are bounded for both together.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        *,
        api_key: str | None = None,
        read_only_api_key: str | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._coordinator = coordinator
        self._metrics = metrics or Metrics()
        self._keys = ApiKeys(api_key, read_only_api_key)
        self._server: grpc.aio.Server | None = None
        self._health: Any = None
        self._streams: set[Stream[Any]] = set()
        self._stopping = False
        self._closing: set[asyncio.Task[None]] = set()
        self._body_bytes = 0  # of the requests in flight

    # -- life -------------------------------------------------------------------------------------
    async def start(self, host: str, port: int) -> int:
        """Listen and serve; the port that is bound (port 0 picks a free one). Raises StartupError."""
        server = grpc.aio.server(options=_OPTIONS, maximum_concurrent_rpcs=GRPC_CALLS_MAX)
        names = [service.full_name for service in _SERVICES]
        server.add_generic_rpc_handlers(
            tuple(
                grpc.method_handlers_generic_handler(
                    service.full_name, dict(self._methods(service))
                )
                for service in _SERVICES
            )
        )
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(
            [*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server
        )
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            bound = server.add_insecure_port(address)
        except RuntimeError:
            await server.stop(None)
            raise StartupError(
                f"Cannot listen on {host}, port {port}, for gRPC: another program has it, or it is "
                "no address of this machine. Stop that program, or give another --grpc-port (0 "
                "picks a free one)."
            ) from None
        await server.start()
        self._server = server
        for name in ("", *names):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return bound

    async def close(self, grace_s: float) -> None:
        """Refuse new calls, let those in flight finish for `grace_s` seconds, then cut them. A
        second call while the first waits gives up what is in flight after its own `grace_s`."""
        if self._server is None:
            return
        self._stopping = True
        await self._health.enter_graceful_shutdown()
        for stream in list(self._streams):
            stream.stop(_server_stops())
        await self._server.stop(grace_s)

    def begin_close(self, grace_s: float) -> None:
        """As `close`, without waiting for it."""
        task = asyncio.create_task(self.close(grace_s), name="close gRPC")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    # -- calls ------------------------------------------------------------------------------------
    def _methods(self, service: Any) -> Iterator[tuple[str, Any]]:
        """Name and handler of each RPC. Bytes go in and out: a body that is no message gets an
        error of ours."""
        for method in service.methods:
            name = f"{service.full_name}/{method.name}"
            if method.client_streaming:
                yield (
                    method.name,
                    grpc.stream_stream_rpc_method_handler(self._stream(_STREAMS[name])),
                )
            else:
                yield (
                    method.name,
                    grpc.unary_unary_rpc_method_handler(self._unary(name, CALLS[name])),
                )

    def _unary(self, name: str, call: UnaryCall) -> Callable[[bytes, Context], Awaitable[bytes]]:
        operation = name.removeprefix("shoal.v1.")

        async def answer(body: bytes, context: Context) -> bytes:
            started = perf_counter()
            code = grpc.StatusCode.CANCELLED  # unless something else becomes of it
            try:
                self._authorize(context, writes=call.writes)
                if len(body) > call.bytes_max:
                    raise BodyTooLarge(
                        f"Payload too large: a request of {operation} may have {call.bytes_max} bytes"
                    )
                self.admit(len(body))
                try:
                    request = decode(call.request, body)
                    found = await call.function(self._coordinator, request)
                finally:
                    self.done(len(body))
                code = grpc.StatusCode.OK
                return found.SerializeToString()
            except ShoalError as error:
                code, detail = code_of(error), detail_of(error)
            except Exception as error:
                code, detail = grpc.StatusCode.INTERNAL, self.bug(name, error)
            finally:
                self._metrics.observe(operation, code.name, perf_counter() - started)
            return await _abort(context, code, detail)

        return answer

    def _stream(self, kind: StreamKind[Any]) -> Callable[[Any, Context], Awaitable[None]]:
        async def serve(_: Any, context: Context) -> None:
            why: ShoalError | None = None
            try:
                self._authorize(context, writes=kind.writes)
                if self._stopping:
                    raise _server_stops()
            except ShoalError as error:
                why = error
            else:
                stream = Stream(kind, self._coordinator, self, context)
                self._streams.add(stream)
                try:
                    why = await stream.serve()
                finally:
                    self._streams.discard(stream)
            if why is not None:
                await _abort(context, code_of(why), detail_of(why))

        return serve

    def _authorize(self, context: Context, *, writes: bool) -> None:
        if self._keys.required:
            metadata = context.invocation_metadata() or ()
            headers = ((_bytes(name), _bytes(value)) for name, value in metadata)
            self._keys.check(given_key(headers), writes=writes)

    # -- load -------------------------------------------------------------------------------------
    def admit(self, body_bytes: int) -> None:
        """Count a request in. Raises Busy at the bound; every other outcome needs `done`."""
        if self._metrics.in_flight >= PENDING_REQUESTS_MAX:
            raise Busy(
                f"Too many requests: {PENDING_REQUESTS_MAX} are being answered: wait a second and "
                "send again"
            )
        if self._body_bytes + body_bytes > GRPC_BODY_BYTES_MAX:
            raise Busy(
                f"Too many requests: those being answered have {self._body_bytes} bytes together: "
                "wait a second and send again"
            )
        self._metrics.in_flight += 1
        self._body_bytes += body_bytes

    def done(self, body_bytes: int) -> None:
        self._metrics.in_flight -= 1
        self._body_bytes -= body_bytes

    def answered(self, operation: str, code: grpc.StatusCode, seconds: float) -> None:
        self._metrics.observe(operation, code.name, seconds)

    def bug(self, what: str, error: Exception) -> common_pb2.ErrorDetail:
        """Log what nobody may expect; what the client is told."""
        _log.error("request_failed", operation=what, error=error)
        return _BUG


def _server_stops() -> Unavailable:
    return Unavailable("the server is stopping: ask another one, or this one when it is back")


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


async def _abort(
    context: Context, code: grpc.StatusCode, detail: common_pb2.ErrorDetail
) -> NoReturn:
    trailing = ((DETAILS_KEY, pack_details(code, detail)),)
    await context.abort(code, detail.message, trailing_metadata=trailing)


# -- streams --------------------------------------------------------------------------------------
def _search_items(body: bytes) -> Sequence[points_pb2.SearchStreamRequest.Item]:
    return decode(points_pb2.SearchStreamRequest, body, deep=False).items


async def _search_item(
    coordinator: Coordinator, item: points_pb2.SearchStreamRequest.Item
) -> points_pb2.SearchStreamResponse.Item:
    found = await search(coordinator, item.search)
    return points_pb2.SearchStreamResponse.Item(tag=item.tag, result=found)


def _search_refused(
    item: points_pb2.SearchStreamRequest.Item, detail: common_pb2.ErrorDetail
) -> points_pb2.SearchStreamResponse.Item:
    return points_pb2.SearchStreamResponse.Item(tag=item.tag, error=detail)


def _search_bodies(replies: Sequence[points_pb2.SearchStreamResponse.Item]) -> Sequence[bytes]:
    """One message; several when the answers are large, so that none is beyond what clients take."""
    if len(replies) == 1:
        return [points_pb2.SearchStreamResponse(items=replies).SerializeToString()]
    bodies: list[bytes] = []
    message, size = points_pb2.SearchStreamResponse(), 0
    for reply in replies:
        if size > GRPC_MESSAGE_BYTES_TARGET:
            bodies.append(message.SerializeToString())
            message, size = points_pb2.SearchStreamResponse(), 0
        message.items.append(reply)
        size += len(reply.result.points.payload) + reply.result.points.count * 8
    return [*bodies, message.SerializeToString()]


def _upsert_items(body: bytes) -> Sequence[points_pb2.UpsertStreamRequest]:
    return [decode(points_pb2.UpsertStreamRequest, body, deep=False)]


async def _upsert_item(
    coordinator: Coordinator, item: points_pb2.UpsertStreamRequest
) -> points_pb2.UpsertStreamResponse:
    return points_pb2.UpsertStreamResponse(
        tag=item.tag, result=await upsert(coordinator, item.upsert)
    )


def _upsert_refused(
    item: points_pb2.UpsertStreamRequest, detail: common_pb2.ErrorDetail
) -> points_pb2.UpsertStreamResponse:
    return points_pb2.UpsertStreamResponse(tag=item.tag, error=detail)


def _upsert_bodies(replies: Sequence[points_pb2.UpsertStreamResponse]) -> Sequence[bytes]:
    return [reply.SerializeToString() for reply in replies]


_STREAMS: dict[str, StreamKind[Any]] = {
    "shoal.v1.Points/SearchStream": StreamKind(
        name="Points/SearchStream",
        writes=False,
        at_work_max=GRPC_STREAM_SEARCHES_MAX,
        items=_search_items,
        answer=_search_item,
        refuse=_search_refused,
        pack=_search_bodies,
    ),
    "shoal.v1.Points/UpsertStream": StreamKind(
        name="Points/UpsertStream",
        writes=True,
        at_work_max=GRPC_STREAM_UPSERTS_MAX,
        items=_upsert_items,
        answer=_upsert_item,
        refuse=_upsert_refused,
        pack=_upsert_bodies,
    ),
}
