"""Sends requests when their moment has come, whatever became of the ones before.

    pacer (a thread) ──at each moment──▶ event loop ──▶ Http or Grpc ──▶ server
                                              ◀────── answer: `done`, or what the client was told

A timer of an event loop is good to a millisecond, which is much beside a search that takes one;
therefore a thread waits for the moments. It only wakes the loop: all that is due by then is begun,
and how late that was is kept (`Outcomes.begun`).

Nothing here waits for an answer before it sends. Over HTTP/1.1 a connection carries one request at a
time, so there are as many as requests under way, CONNECTIONS_MAX at most; what is due beyond waits
for one, on the clock that runs since it was due.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import grpc
import grpc.aio
from openloop import Outcomes

from shoal.v1 import points_pb2 as pb

__all__ = ["CONNECTIONS_MAX", "Flow", "Grpc", "Http", "Way", "play"]

CONNECTIONS_MAX = 512
_OPENED_AT_ONCE = 16  # connections that are there before the first arrival
_MESSAGE_BYTES_MAX = 1 << 20  # of searches that travel together

Done = Callable[[str | None], None]  # None: answered well; else what the client was told


class Way(Protocol):
    """A way into the server. `begin` never waits; it calls `done` once, or never."""

    async def open(self) -> None: ...
    def begin(self, number: int, done: Done) -> None:
        """Send request `number`."""
        ...

    async def close(self) -> None: ...


@dataclass
class Flow:
    """Arrivals of one sort, and where they go."""

    way: Way
    outcomes: Outcomes


async def play(flows: Sequence[Flow], *, drain_s: float) -> None:
    """Let everything arrive that is scheduled, and fill in the outcomes. Returns when all is answered,
    `drain_s` after the last arrival at the latest."""
    loop = asyncio.get_running_loop()
    for flow in flows:
        await flow.way.open()
    arrivals = sorted(
        (float(at), number, index)
        for number, flow in enumerate(flows)
        for index, at in enumerate(flow.outcomes.scheduled)
    )
    settled = asyncio.Event()
    began = time.perf_counter() + 0.05
    left = len(arrivals)
    next_one = 0

    def begin(flow: Flow, index: int) -> None:
        outcomes, over = flow.outcomes, False

        def done(error: str | None) -> None:
            nonlocal left, over
            if over or closed:
                return
            over = True
            if error is None:
                outcomes.done[index] = time.perf_counter() - began
            else:
                outcomes.errors[error] += 1
            left -= 1
            if not left:
                settled.set()

        outcomes.begun[index] = time.perf_counter() - began
        flow.way.begin(index, done)

    def due() -> None:
        nonlocal next_one
        while next_one < len(arrivals):
            at, number, index = arrivals[next_one]
            if at > time.perf_counter() - began:
                return
            next_one += 1
            begin(flows[number], index)

    closed = False
    pacer = _Pacer([at for at, _, _ in arrivals], began, lambda: loop.call_soon_threadsafe(due))
    pacer.start()
    try:
        async with asyncio.timeout(arrivals[-1][0] + drain_s):
            await settled.wait()
    except TimeoutError:
        pass  # what is not answered by now is in no outcome, and counts as such
    finally:
        closed = True
        pacer.stop()
        await asyncio.gather(*(flow.way.close() for flow in flows))


class _Pacer(threading.Thread):
    """Calls `wake` at each moment; once for those that passed while it slept."""

    def __init__(self, moments: Sequence[float], began: float, wake: Callable[[], object]) -> None:
        super().__init__(name="pacer", daemon=True)
        self._moments, self._began, self._wake = moments, began, wake
        self._over = threading.Event()

    def run(self) -> None:
        woken = -1.0
        for moment in self._moments:
            if moment <= woken:
                continue
            left = self._began + moment - time.perf_counter()
            if left > 0 and self._over.wait(left):
                return
            woken = time.perf_counter() - self._began
            self._wake()

    def stop(self) -> None:
        self._over.set()
        self.join()


# -- HTTP ------------------------------------------------------------------------------------------
class Http:
    """requests: whole HTTP requests, sent in turns from number `first` on."""

    def __init__(self, host: str, port: int, requests: Sequence[bytes], first: int = 0) -> None:
        self._host, self._port, self._requests, self._first = host, port, requests, first
        self._all: set[_Connection] = set()
        self._free: list[_Connection] = []
        self._opening: set[asyncio.Task[None]] = set()
        self._waiting: deque[tuple[bytes, Done]] = deque()

    async def open(self) -> None:
        for _ in range(_OPENED_AT_ONCE):
            await self._connect()

    def begin(self, number: int, done: Done) -> None:
        request = self._requests[(self._first + number) % len(self._requests)]
        if self._free:
            self._free.pop().send(request, done)
            return
        self._waiting.append((request, done))
        if len(self._all) + len(self._opening) < CONNECTIONS_MAX:
            task = asyncio.get_running_loop().create_task(self._connect())
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _connect(self) -> None:
        try:
            await asyncio.get_running_loop().create_connection(
                lambda: _Connection(self), self._host, self._port
            )
        except OSError as error:
            if self._waiting and not self._all:
                self._waiting.popleft()[1](f"connecting: {type(error).__name__}")

    def added(self, connection: _Connection) -> None:
        self._all.add(connection)
        self.freed(connection)

    def freed(self, connection: _Connection) -> None:
        if self._waiting:
            connection.send(*self._waiting.popleft())
        else:
            self._free.append(connection)

    def lost(self, connection: _Connection) -> None:
        self._all.discard(connection)
        if connection in self._free:
            self._free.remove(connection)

    async def close(self) -> None:
        for task in self._opening:
            task.cancel()
        for connection in list(self._all):
            connection.transport.abort()


class _Connection(asyncio.Protocol):
    """One request at a time. Parses what a load test must: the status, and where the answer ends."""

    transport: asyncio.Transport

    def __init__(self, way: Http) -> None:
        self._way = way
        self._received = bytearray()
        self._done: Done | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._way.added(self)

    def send(self, request: bytes, done: Done) -> None:
        self._done = done
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head = self._received.find(b"\r\n\r\n")
        if head < 0:
            return
        lower = bytes(self._received[:head]).lower()
        _, _, length = lower.partition(b"content-length:")
        if len(self._received) < head + 4 + int(length.split(b"\r\n", 1)[0] or 0):
            return
        self._received.clear()
        done, self._done = self._done, None
        status = lower[9:12]
        if done is not None:
            done(None if status == b"200" else status.decode())
        if b"connection: close" in lower:
            self.transport.close()
        else:
            self._way.freed(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._way.lost(self)
        if self._done is not None:
            self._done("connection lost")


# -- gRPC ------------------------------------------------------------------------------------------
class Grpc:
    """One stream of the public API, SearchStream or UpsertStream, by the type of the requests."""

    def __init__(
        self, channel: grpc.aio.Channel, requests: Sequence[Any], first: int = 0, key: str = ""
    ) -> None:
        self._requests, self._first = requests, first
        self._searches = isinstance(requests[0], pb.SearchRequest)
        name = "SearchStream" if self._searches else "UpsertStream"
        reply: Any = pb.SearchStreamResponse if self._searches else pb.UpsertStreamResponse
        self._make = channel.stream_stream(
            f"/shoal.v1.Points/{name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=reply.FromString,
        )
        self._metadata = (("api-key", key),) if key else ()
        self._call: Any = None
        self._tasks: list[asyncio.Task[None]] = []
        self._outbox: deque[tuple[int, int]] = deque()
        self._asked: dict[int, Done] = {}
        self._wake = asyncio.Event()
        self._tag = 0

    async def open(self) -> None:
        self._call = self._make(metadata=self._metadata)
        await self._call.initial_metadata()
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._write()), loop.create_task(self._read())]

    def begin(self, number: int, done: Done) -> None:
        if self._call.done():
            done("the stream has ended")
            return
        self._tag += 1
        self._asked[self._tag] = done
        self._outbox.append((self._tag, (self._first + number) % len(self._requests)))
        self._wake.set()

    async def _write(self) -> None:
        while True:
            if not self._outbox:
                self._wake.clear()
                await self._wake.wait()
                continue
            try:
                await self._call.write(self._next_message())
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return  # `_read` learns why

    def _next_message(self) -> Any:
        """All searches that wait; upserts travel alone."""
        if not self._searches:
            tag, number = self._outbox.popleft()
            return pb.UpsertStreamRequest(tag=tag, upsert=self._requests[number])
        message, size = pb.SearchStreamRequest(), 0
        while self._outbox and size < _MESSAGE_BYTES_MAX:
            tag, number = self._outbox.popleft()
            search = self._requests[number]
            message.items.add(tag=tag, search=search)
            size += len(search.vector)
        return message

    async def _read(self) -> None:
        told = "the stream has ended"
        try:
            while (reply := await self._call.read()) is not grpc.aio.EOF:
                for item in reply.items if self._searches else (reply,):
                    done = self._asked.pop(item.tag, None)
                    if done is not None:
                        done(item.error.name if item.HasField("error") else None)
        except grpc.aio.AioRpcError as error:
            told = error.code().name
        for done in self._asked.values():
            done(told)
        self._asked.clear()

    async def close(self) -> None:
        self._call.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
