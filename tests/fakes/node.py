"""What tests of the transport between nodes share: a storage node in memory, as one node of a cluster
is asked, and a wire that can go silent."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fakes.storage import FakeStorage

from shoal.storage_api import (
    FreshRead,
    Guard,
    ReplicaStatus,
    ShardInfo,
    ShardKey,
    Write,
    WriteResult,
)

__all__ = ["FakeNode", "Wire", "in_loop", "until"]

T = TypeVar("T")


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """An async test, in a loop of its own, for 30 s at most."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 30))

    return run


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110, the conditions are of many kinds
        await asyncio.sleep(0.002)


class FakeNode:
    """Implements storage_api.Node over a FakeStorage.

    gate       while it is clear, reads and writes of shards wait for it
    began      names of the operations that began; `ended` those that ended, `cancelled` the others
    guards     of all reads
    """

    def __init__(self, name: str = "s1") -> None:
        self.name, self.storage = name, FakeStorage()
        self.gate = asyncio.Event()
        self.gate.set()
        self.began: list[str] = []
        self.ended: list[str] = []
        self.cancelled: list[str] = []
        self.guards: list[Guard] = []

    async def _do(self, name: str, work: Callable[[], Awaitable[T]]) -> T:
        self.began.append(name)
        try:
            await self.gate.wait()
            result = await work()
        except asyncio.CancelledError:
            self.cancelled.append(name)
            raise
        self.ended.append(name)
        return result

    async def _read(
        self, name: str, shard: ShardKey, guard: Guard, work: Callable[[], Awaitable[T]]
    ) -> FreshRead[T]:
        self.guards.append(guard)
        value = await self._do(name, work)
        return FreshRead(value, self.storage.shards[shard].sequence)

    async def write(self, shard: ShardKey, op: Write) -> WriteResult:
        return await self._do("write", lambda: self.storage.write(shard, op))

    async def search(self, shard: ShardKey, query: Any, guard: Guard) -> Any:
        return await self._read("search", shard, guard, lambda: self.storage.search(shard, query))

    async def retrieve(
        self, shard: ShardKey, ids: Any, with_payload: Any, with_vectors: Any, guard: Guard
    ) -> Any:
        def work() -> Any:
            return self.storage.retrieve(shard, ids, with_payload, with_vectors)

        return await self._read("retrieve", shard, guard, work)

    async def scroll(self, shard: ShardKey, query: Any, guard: Guard) -> Any:
        return await self._read("scroll", shard, guard, lambda: self.storage.scroll(shard, query))

    async def count(self, shard: ShardKey, filter: Any, guard: Guard) -> Any:
        return await self._read("count", shard, guard, lambda: self.storage.count(shard, filter))

    async def info(self, shard: ShardKey) -> ShardInfo:
        return await self._do("info", lambda: self.storage.info(shard))

    async def status(self) -> list[ReplicaStatus]:
        return [
            ReplicaStatus(self.name, "primary", 1, one.sequence, 0, True, key, ShardInfo(), 0.5)
            for key, one in self.storage.shards.items()
        ]

    async def create_shard(self, spec: Any) -> None:
        await self.storage.create_shard(spec)

    async def drop_shard(self, shard: ShardKey) -> None:
        await self.storage.drop_shard(shard)


class Wire:
    """A TCP connection to `port` that goes through here: a frozen peer is a wire that stays silent."""

    def __init__(self) -> None:
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.port = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def to(cls, port: int) -> Wire:
        wire = cls()

        async def connected(reader: Any, writer: Any) -> None:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
            wire._spawn(wire._pump(reader, far_writer))
            wire._spawn(wire._pump(far_reader, writer))

        wire._server = await asyncio.start_server(connected, "127.0.0.1", 0)
        wire.port = wire._server.sockets[0].getsockname()[1]
        return wire

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(ConnectionError):
                while data := await reader.read(65_536):
                    await self.flowing.wait()
                    writer.write(data)
                    await writer.drain()
        finally:
            writer.close()

    async def cut(self) -> None:
        """Both ends see the connection close."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        await self.cut()
