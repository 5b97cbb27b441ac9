"""The calling end of StorageNode.Exchange: many requests over one call, each with its answer.

    ask ──▶ waiting ──▶ outbox ──▶ one message ──▶ … ──▶ answers ──▶ futures

A message costs gRPC about 90 µs of CPU, a request in it a few. Therefore nothing is sent where it is
asked: what was asked in one turn of the event loop, or while the last message was on its way, leaves
together. There is no task and no timer per request; one task writes, one reads, one timer looks for
requests whose time has passed.

What a caller may rely on when the connection ends:
  * a request that never left is sent again over the next connection, once, or fails as not happened
  * a read that left is asked again, once; that harms nobody
  * a write that left fails with `maybe_applied`
Second attempts are paid from a budget, so that a node in trouble is not asked twice as much.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from shoal import limits
from shoal.errors import BodyTooLarge, Busy, ShoalError, Unavailable
from shoal.node.v1 import node_pb2 as pb
from shoal.rpc.channel import RpcSettings, is_taken
from shoal.rpc.codec import decode_error, join_frames
from shoal.rpc.faults import from_rpc_error, lost, timed_out
from shoal.rpc.traffic import Traffic
from shoal.telemetry import logger

__all__ = ["Exchange"]

_log = logger("rpc")
METHOD = "/shoal.node.v1.StorageNode/Exchange"
_SWEEP_S = 0.1  # deadlines are kept to this
_BACKOFF_S_MIN = 0.05
_RETRY_BUDGET_MAX = 32.0
_RETRY_PER_ANSWER = 0.05  # at most one request in twenty is sent twice

Call = grpc.aio.StreamStreamCall[bytes, bytes]


class _Waiting:
    """A request between `ask` and its answer. sent: handed to gRPC, so it may have arrived."""

    __slots__ = ("data", "deadline", "future", "retried", "sent", "write")

    def __init__(
        self, future: asyncio.Future[pb.Answer], data: bytes, deadline: float, write: bool
    ) -> None:
        self.future, self.data, self.deadline, self.write = future, data, deadline, write
        self.sent = self.retried = False


class Exchange:
    """One call of Exchange at a time, opened when it is needed. Belongs to one event loop.

    peer     for messages: "storage node s1 at 10.0.0.7:7001"
    traffic  counts what goes over it, with others to the same node
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        peer: str,
        metadata: tuple[tuple[str, str], ...],
        settings: RpcSettings,
        traffic: Traffic | None = None,
    ) -> None:
        self._traffic = traffic if traffic is not None else Traffic()
        self._open: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(METHOD)
        self._peer, self._metadata, self._settings = peer, metadata, settings
        self._next_id = 0
        self._waiting: dict[int, _Waiting] = {}
        self._outbox: deque[tuple[int, _Waiting]] = deque()
        self._outbox_bytes = 0
        self._cancelled: list[int] = []
        self._wake = asyncio.Event()  # for the writer
        self._runner: asyncio.Task[None] | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._budget = _RETRY_BUDGET_MAX
        self._failures = 0  # connections in a row that could not be made
        self._blocked_until = 0.0
        self._blocked_by: ShoalError | None = None
        self._closed = False

    @property
    def in_flight(self) -> int:
        return len(self._waiting)

    @property
    def queued_bytes(self) -> int:
        """Of requests that are not yet sent."""
        return self._outbox_bytes

    def new_id(self) -> int:
        self._next_id += 1
        return self._next_id

    async def ask(self, number: int, data: bytes, *, write: bool) -> pb.Answer:
        """The answer to the request `data`, which carries `number` (from `new_id`).

        Raises  the error that the node answered; Busy when too many wait; Unavailable and TimedOut
                with `maybe_applied` as the head of this file says.
        """
        loop = asyncio.get_running_loop()
        self._check(len(data), loop.time())
        timeout = self._settings.write_timeout_s if write else self._settings.read_timeout_s
        future: asyncio.Future[pb.Answer] = loop.create_future()
        waiting = _Waiting(future, data, loop.time() + timeout, write)
        self._waiting[number] = waiting
        self._outbox.append((number, waiting))
        self._outbox_bytes += len(data)
        self._traffic.requests += 1
        self._rouse(loop)
        try:
            answer = await future
        except asyncio.CancelledError:
            self._forget(number, waiting)
            raise
        if answer.HasField("error"):
            raise decode_error(answer.error)
        return answer

    def _check(self, size: int, now: float) -> None:
        if self._closed:
            raise Unavailable(f"the connection to {self._peer} was closed")
        if now < self._blocked_until and self._blocked_by is not None:
            raise _as_seen(self._blocked_by, maybe_applied=False)
        if size > limits.RPC_MESSAGE_BYTES_MAX:
            raise BodyTooLarge(
                f"Bad request: {size} bytes for one shard, {limits.RPC_MESSAGE_BYTES_MAX} are "
                "allowed: send fewer points at once"
            )
        if (
            len(self._waiting) >= limits.RPC_IN_FLIGHT_MAX
            or self._outbox_bytes + size > limits.RPC_QUEUE_BYTES_MAX
        ):
            self._traffic.busy += 1
            raise Busy(
                f"{self._peer} has {len(self._waiting)} requests of this process waiting: send "
                "less at once, or try again shortly"
            )

    def _rouse(self, loop: asyncio.AbstractEventLoop) -> None:
        self._wake.set()
        if self._runner is None:
            self._runner = loop.create_task(self._run(), name=f"exchange with {self._peer}")
        if self._sweeper is None:
            self._sweeper = loop.call_later(_SWEEP_S, self._sweep)

    def _forget(self, number: int, waiting: _Waiting) -> None:
        """Nobody waits any more. A read is called off, and a write that still waits for its turn; one
        that is in the log takes its course."""
        if self._waiting.pop(number, None) is not None and waiting.sent:
            self._cancelled.append(number)
            self._wake.set()

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for number, waiting in list(self._waiting.items()):
            if now >= waiting.deadline and not waiting.future.done():
                self._traffic.late += 1
                waiting.future.set_exception(
                    timed_out(self._peer, write=waiting.write and waiting.sent)
                )
                self._forget(number, waiting)
        self._sweeper = loop.call_later(_SWEEP_S, self._sweep) if self._waiting else None

    # -- one connection after the other -----------------------------------------------------------
    async def _run(self) -> None:
        """Until the connection ends, and again while there is something to send once more."""
        loop = asyncio.get_running_loop()
        lived = False
        try:
            while True:
                try:
                    connected, why = await self._one_call()
                except Exception as error:  # ours; whoever waits must not wait for ever
                    _log.error("exchange_failed", peer=self._peer, error=error)
                    connected, why = False, lost(self._peer, repr(error), maybe_applied=False)
                # Right after a connection died gRPC may hand out what is left of it once more: that
                # says nothing about the node, and nothing was sent.
                remnant = lived and not connected
                self._traffic.lost += connected
                self._settle(why, again=connected, unsent=remnant)
                if connected:
                    self._failures = 0
                elif not remnant:
                    pause = min(self._settings.reconnect_s_max, _BACKOFF_S_MIN * 2**self._failures)
                    self._failures = min(self._failures + 1, 16)
                    self._blocked_until, self._blocked_by = loop.time() + pause, why
                if not self._outbox or self._closed:
                    return
                if remnant:
                    await asyncio.sleep(_BACKOFF_S_MIN)
                lived = connected
        finally:
            self._runner = None

    async def _one_call(self) -> tuple[bool, ShoalError]:
        """Whether there was a connection, and how it ended."""
        call = self._open(metadata=self._metadata)
        try:
            try:
                async with asyncio.timeout(self._settings.connect_timeout_s):
                    if not await is_taken(call):
                        await call.read()  # raises why
            except grpc.aio.AioRpcError as error:
                return False, from_rpc_error(error, self._peer, write=False)
            except TimeoutError:
                return False, lost(self._peer, "no connection in time", maybe_applied=False)
            return True, await self._serve(call)
        finally:
            call.cancel()

    async def _serve(self, call: Call) -> ShoalError:
        loop = asyncio.get_running_loop()
        reader, writer = loop.create_task(self._read(call)), loop.create_task(self._write(call))
        try:
            await asyncio.wait((reader, writer), return_when=asyncio.FIRST_COMPLETED)
        finally:
            call.cancel()
            for task in (reader, writer):
                task.cancel()
            outcomes = await asyncio.gather(reader, writer, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, grpc.aio.AioRpcError):
                if outcome.code() is not grpc.StatusCode.CANCELLED:
                    return from_rpc_error(outcome, self._peer, write=False)
            elif isinstance(outcome, DecodeError):
                return lost(self._peer, "its answer cannot be read", maybe_applied=False)
            elif isinstance(outcome, Exception) and not isinstance(
                outcome, asyncio.InvalidStateError
            ):
                raise outcome
        return lost(self._peer, "it ended the connection", maybe_applied=False)

    async def _read(self, call: Call) -> None:
        waiting = self._waiting
        while True:
            data = await call.read()
            if data is grpc.aio.EOF:
                return
            self._traffic.received_bytes += len(cast(bytes, data))
            for answer in pb.Frames.FromString(cast(bytes, data)).answers:
                asked = waiting.pop(answer.id, None)
                if asked is not None and not asked.future.done():
                    asked.future.set_result(answer)
                    if self._budget < _RETRY_BUDGET_MAX:
                        self._budget += _RETRY_PER_ANSWER

    async def _write(self, call: Call) -> None:
        while True:
            if not self._outbox and not self._cancelled:
                self._wake.clear()
                await self._wake.wait()
            if call.done():
                return  # what was not taken has not left
            batch, cancelled = self._take(), self._cancelled
            if batch or cancelled:
                self._cancelled = []
                await call.write(join_frames(requests=batch, cancelled=cancelled))

    def _take(self) -> list[bytes]:
        """The requests of the next message; from now on they may have arrived."""
        batch: list[bytes] = []
        size = 0
        while self._outbox:
            _, waiting = self._outbox[0]
            if batch and size + len(waiting.data) > limits.RPC_FRAMES_BYTES:
                break
            self._outbox.popleft()
            self._outbox_bytes -= len(waiting.data)
            if not waiting.future.done():
                waiting.sent = True
                batch.append(waiting.data)
                size += len(waiting.data)
                self._traffic.sent_bytes += len(waiting.data)
                if waiting.write:
                    waiting.data = b""  # never sent twice
        return batch

    def _settle(self, why: ShoalError, *, again: bool, unsent: bool = False) -> None:
        """The connection is gone: what can be asked again goes back into the outbox, the rest fails.

        again    each request may have one more attempt, if the budget allows it
        unsent   what did not leave stays, as if nothing had been tried
        """
        self._outbox.clear()
        self._outbox_bytes = 0
        self._cancelled.clear()
        for number, waiting in list(self._waiting.items()):
            maybe = waiting.write and waiting.sent
            once_more = again and not maybe and not waiting.retried and self._budget >= 1
            if once_more:
                self._budget -= 1
                self._traffic.again += 1
                waiting.retried, waiting.sent = True, False
            if once_more or (unsent and not waiting.sent):
                self._outbox.append((number, waiting))
                self._outbox_bytes += len(waiting.data)
                continue
            del self._waiting[number]
            if not waiting.future.done():
                waiting.future.set_exception(_as_seen(why, maybe_applied=maybe))

    async def close(self) -> None:
        """Whatever still waits fails."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        if self._runner is not None:
            self._runner.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._runner
        self._settle(lost(self._peer, "this process closed it", maybe_applied=False), again=False)


def _as_seen(why: ShoalError, *, maybe_applied: bool) -> ShoalError:
    """A new error for each caller: one that is raised twice would collect both tracebacks."""
    error = type(why)(why.message + (". The write may have happened" if maybe_applied else ""))
    error.maybe_applied = maybe_applied
    error.retryable = why.retryable
    return error
