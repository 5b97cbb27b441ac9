"""One coordinator as a client sees it: a channel, its calls, and two shared streams."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from shoal.client.multiplex import Multiplex, error_of_call
from shoal.errors import BodyTooLarge, Unavailable
from shoal.limits import BODY_BYTES_MAX, GRPC_MESSAGE_BYTES_TARGET
from shoal.v1 import points_pb2

__all__ = ["Connection"]

A = TypeVar("A", bound=Message)
Metadata = tuple[tuple[str, str], ...]

_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", -1),  # what was asked for bounds it
    ("grpc.max_send_message_length", BODY_BYTES_MAX),
    # gRPC's own pauses between attempts to connect grow to two minutes: a server that was
    # restarted would be found that late.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # A machine that froze or went away sends no sign of it: ask, and give it up after 15 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.bdp_probe", 0),  # while such a probe is unanswered, no ping leaves
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Own connections: two clients of one process do not share a broken one.
    ("grpc.use_local_subchannel_pool", 1),
)
_STREAM_ITEMS_MAX = 64  # searches that travel in one message
_ENVELOPE_BYTES_MAX = 64  # tag and timeout of an item


class Connection:
    """Use it on one event loop. Connects when it is first asked for something."""

    def __init__(self, address: str, *, metadata: Metadata, tls: bool) -> None:
        self.address = address
        self._metadata = metadata
        if tls:
            credentials = grpc.ssl_channel_credentials()
            self._channel = grpc.aio.secure_channel(address, credentials, options=_OPTIONS)
        else:
            self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._calls: dict[str, Any] = {}
        self._closed = False
        self._searches: Multiplex[points_pb2.SearchResponse] | None = None
        self._upserts: Multiplex[points_pb2.WriteResult] | None = None

    async def ready(self, within_s: float, *, patient: bool) -> None:
        """Wait until it is connected; without `patient` only until the first attempt has failed.
        Raises Unavailable: nothing was sent then."""
        state = self._channel.get_state(try_to_connect=True)
        if state is grpc.ChannelConnectivity.READY:
            return
        try:
            async with asyncio.timeout(within_s):
                while state is not grpc.ChannelConnectivity.READY:
                    if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE and not patient:
                        raise Unavailable(f"no server answers at {self.address}")
                    await self._channel.wait_for_state_change(state)
                    state = self._channel.get_state(try_to_connect=True)
        except TimeoutError:
            raise Unavailable(
                f"no server answers at {self.address} within {within_s:.1f} s"
            ) from None

    async def call(
        self, method: str, request: Message, answer: type[A], *, timeout_s: float, writes: bool
    ) -> A:
        """One unary call. method: "Points/Count". Raises the errors of shoal.errors."""
        stub = self._calls.get(method)
        if stub is None:
            stub = self._calls[method] = self._channel.unary_unary(
                f"/shoal.v1.{method}",
                request_serializer=_serialized,
                response_deserializer=answer.FromString,
            )
        try:
            found: A = await stub(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise error_of_call(error, may_have_happened=writes) from None
        except (asyncio.CancelledError, grpc.aio.UsageError):
            # Closing a channel looks to its callers as if somebody had cancelled them.
            task = asyncio.current_task()
            if not self._closed or (task is not None and task.cancelling()):
                raise
            closed = Unavailable("the client was closed")
            closed.maybe_applied = writes
            raise closed from None
        return found

    async def search(
        self, request: points_pb2.SearchRequest, timeout_s: float
    ) -> points_pb2.SearchResponse:
        """Over the shared stream."""
        stream = self._searches
        if stream is None or not stream.usable:
            call = self._channel.stream_stream(
                "/shoal.v1.Points/SearchStream",
                request_serializer=_serialized,
                response_deserializer=points_pb2.SearchStreamResponse.FromString,
            )(metadata=self._metadata)
            stream = Multiplex(call, _pack_searches, _search_replies, writes=False)
            self._searches = stream
        return await stream.ask(request, timeout_s)

    async def upsert(
        self, request: points_pb2.UpsertRequest, timeout_s: float
    ) -> points_pb2.WriteResult:
        """Over the shared stream: for many of them. Raises BodyTooLarge before it is sent: a
        message beyond the bound would end the stream for all."""
        if (size := request.ByteSize()) > BODY_BYTES_MAX - _ENVELOPE_BYTES_MAX:
            raise BodyTooLarge(
                f"Payload too large: a batch of {size} bytes: the most is {BODY_BYTES_MAX}, send "
                "fewer points at once"
            )
        stream = self._upserts
        if stream is None or not stream.usable:
            call = self._channel.stream_stream(
                "/shoal.v1.Points/UpsertStream",
                request_serializer=_serialized,
                response_deserializer=points_pb2.UpsertStreamResponse.FromString,
            )(metadata=self._metadata)
            stream = Multiplex(call, _pack_upserts, _upsert_replies, writes=True)
            self._upserts = stream
        return await stream.ask(request, timeout_s)

    async def close(self) -> None:
        self._closed = True
        for stream in (self._searches, self._upserts):
            if stream is not None:
                await stream.close()
        await self._channel.close()


def _serialized(message: Message) -> bytes:
    return message.SerializeToString()


def _pack_searches(
    waiting: Sequence[tuple[int, points_pb2.SearchRequest, int]],
) -> Iterable[points_pb2.SearchStreamRequest]:
    message, size = points_pb2.SearchStreamRequest(), 0
    for tag, request, timeout_ms in waiting:
        if size > GRPC_MESSAGE_BYTES_TARGET or len(message.items) == _STREAM_ITEMS_MAX:
            yield message
            message, size = points_pb2.SearchStreamRequest(), 0
        message.items.add(tag=tag, search=request, timeout_ms=timeout_ms)
        size += len(request.vector) + len(request.filter)
    if message.items:
        yield message


def _search_replies(
    message: points_pb2.SearchStreamResponse,
) -> Iterable[tuple[int, points_pb2.SearchResponse | None, Any]]:
    for item in message.items:
        failed = item.WhichOneof("outcome") == "error"
        yield item.tag, item.result, item.error if failed else None


def _pack_upserts(
    waiting: Sequence[tuple[int, points_pb2.UpsertRequest, int]],
) -> Iterable[points_pb2.UpsertStreamRequest]:
    for tag, request, timeout_ms in waiting:
        yield points_pb2.UpsertStreamRequest(tag=tag, upsert=request, timeout_ms=timeout_ms)


def _upsert_replies(
    message: points_pb2.UpsertStreamResponse,
) -> Iterable[tuple[int, points_pb2.WriteResult | None, Any]]:
    failed = message.WhichOneof("outcome") == "error"
    yield message.tag, message.result, message.error if failed else None
