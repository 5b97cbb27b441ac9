"""Many requests of one client over one call: read, work, answer, each at its own pace.

    reader ──items──▶ a task each ──replies──▶ writer: all that is ready in one message

At most `at_work_max` items are at work; beyond that the stream is not read, so that HTTP/2's flow
control makes the client's sends wait. Replies gather while a message is being written, so the more
a stream has to do, the less each of its items costs.

A stream ends when the client has closed its side and everything is answered, or by our hand: the
server stops, or what was read is no message. In the second case too, everything that was begun is
answered first. What a client was not answered when it reads our status did not happen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Generic, Protocol, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from coordinator.grpc_parse import refuse_unknown
from coordinator.service import Coordinator
from shoal.api.grpc_status import code_of, detail_of
from shoal.errors import BadRequest, ShoalError, TimedOut
from shoal.limits import REQUEST_TIMEOUT_S_MAX
from shoal.v1 import common_pb2

__all__ = ["Gate", "Stream", "StreamKind"]

Context = grpc.aio.ServicerContext[bytes, bytes]
Reply = TypeVar("Reply", bound=Message)


class Gate(Protocol):
    """Who counts the requests of the whole process in and out."""

    def admit(self, body_bytes: int) -> None:
        """Raises Busy at the bound; every other outcome needs `done`."""
        ...

    def done(self, body_bytes: int) -> None: ...

    def answered(self, operation: str, code: grpc.StatusCode, seconds: float) -> None:
        """Count it, refused or not."""
        ...

    def bug(self, what: str, error: Exception) -> common_pb2.ErrorDetail:
        """Log what nobody may expect; what the client is told."""
        ...


@dataclass(frozen=True, slots=True)
class StreamKind(Generic[Reply]):
    """What differs between the streams.

    items    the body of a message -> its items, which have `tag` and `timeout_ms`. Raises BadRequest.
    answer   does what one item asks for and makes its reply.
    refuse   the reply to an item that failed.
    pack     replies -> bodies of messages.
    """

    name: str
    writes: bool
    at_work_max: int
    items: Callable[[bytes], Sequence[Any]]
    answer: Callable[[Coordinator, Any], Awaitable[Reply]]
    refuse: Callable[[Any, common_pb2.ErrorDetail], Reply]
    pack: Callable[[Sequence[Reply]], Sequence[bytes]]


class Stream(Generic[Reply]):
    """One call. `serve` runs it; `stop` ends it early."""

    def __init__(
        self, kind: StreamKind[Reply], coordinator: Coordinator, gate: Gate, context: Context
    ) -> None:
        self._kind, self._coordinator, self._gate, self._context = kind, coordinator, gate, context
        self._ended: asyncio.Future[ShoalError | None] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        self._room = asyncio.Event()  # fewer than at_work_max are at work
        self._replies: list[Reply] = []
        self._to_write = asyncio.Event()

    def stop(self, why: ShoalError) -> None:
        """Begin nothing more. `serve` returns `why` when what was begun is answered."""
        if not self._ended.done():
            self._ended.set_result(why)

    async def serve(self) -> ShoalError | None:
        """Until the client is done: None. Else why we ended it."""
        reader = asyncio.create_task(self._read())
        writer = asyncio.create_task(self._write())
        try:
            first: list[asyncio.Future[Any]] = [self._ended, writer]
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                writer.result()  # writing fails only when the client is gone
            while self._tasks:
                await asyncio.wait(self._tasks)
            self._to_write.set()
            await writer
            return self._ended.result()
        finally:
            for task in (reader, writer, *self._tasks):
                task.cancel()

    # -- in ---------------------------------------------------------------------------------------
    async def _read(self) -> None:
        # Nobody cancels a read that is under way, except with the call: gRPC would go on reading.
        try:
            await self._context.send_initial_metadata(())  # the client may begin: it is let in
            while True:
                body: Any = await self._context.read()
                if body is grpc.aio.EOF:
                    break
                items = self._kind.items(body)
                share = len(body) // max(1, len(items))
                for item in items:
                    while len(self._tasks) >= self._kind.at_work_max:
                        self._room.clear()
                        await self._room.wait()
                    if self._ended.done():
                        return
                    task = asyncio.create_task(self._work(item, share))
                    self._tasks.add(task)
                    task.add_done_callback(self._worked)
        except ShoalError as error:
            self.stop(error)
        except Exception as error:
            # a read that fails is a client that is gone; then the call is cancelled anyway
            self.stop(BadRequest(f"the stream could not be read: {error}"))
        else:
            if not self._ended.done():
                self._ended.set_result(None)

    def _worked(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._room.set()

    async def _work(self, item: Any, body_bytes: int) -> None:
        kind = self._kind
        started, code = perf_counter(), grpc.StatusCode.OK
        try:
            refuse_unknown(item)
            self._gate.admit(body_bytes)
            try:
                if item.timeout_ms:
                    reply = await _within(item.timeout_ms / 1_000, self._answer(item), kind.writes)
                else:
                    reply = await self._answer(item)
            finally:
                self._gate.done(body_bytes)
        except ShoalError as error:
            code = code_of(error)
            reply = kind.refuse(item, detail_of(error))
        except Exception as error:
            code = grpc.StatusCode.INTERNAL
            reply = kind.refuse(item, self._gate.bug(kind.name, error))
        self._gate.answered(kind.name, code, perf_counter() - started)
        self._replies.append(reply)
        self._to_write.set()

    async def _answer(self, item: Any) -> Reply:
        return await self._kind.answer(self._coordinator, item)

    # -- out --------------------------------------------------------------------------------------
    async def _write(self) -> None:
        while True:
            if not self._replies:
                if self._ended.done() and not self._tasks:
                    return
                self._to_write.clear()
                await self._to_write.wait()
                continue
            replies, self._replies = self._replies, []
            for body in self._kind.pack(replies):
                await self._context.write(body)


T = TypeVar("T")


async def _within(seconds: float, work: Awaitable[T], writes: bool) -> T:
    try:
        async with asyncio.timeout(min(seconds, REQUEST_TIMEOUT_S_MAX)):
            return await work
    except TimeoutError:
        error = TimedOut(f"Timeout: the request took longer than {seconds:g} s")
        error.maybe_applied = writes
        raise error from None
