"""Connections that can be cut: a small proxy in front of every server of a cluster on one machine.

    s2 ──▶ front of s1 ──▶ s1        cut("s2", "s1"): bytes stop, both ways, nothing is closed

As behind a cable that was pulled: what is being sent waits, new connections are taken and stay silent,
and after `heal` everything that waited goes on, late. Who has connected is found out from the system
(/proc: whose socket is it), so this needs Linux and no rights.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

__all__ = ["Links"]

_CHUNK = 65_536


class Links:
    """processes   name -> pid, of those whose connections are told apart; asked at each connection."""

    def __init__(self, names: Iterable[str], processes: Callable[[], Mapping[str, int]]) -> None:
        self._processes = processes
        self._cut: set[tuple[str, str]] = set()  # directions in which no byte moves
        self._joined: set[tuple[str, str]] = set()  # (who, to whom) has ever connected
        self._upstream: dict[str, int] = {}
        self.ports: dict[str, int] = {}
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="links", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(list(names)), self._loop).result(10)

    def lead_to(self, name: str, port: int) -> None:
        self._upstream[name] = port

    def cut(self, one: str, other: str, *, one_way: bool = False) -> None:
        """Between two processes. one_way: only what `one` says to `other` is lost."""
        self._set(self._cut | {(one, other)} | (set() if one_way else {(other, one)}))

    def knows(self, one: str, other: str) -> bool:
        """Whether either has ever connected to the other: a test that cuts nothing proves nothing."""
        return bool({(one, other), (other, one)} & self._joined)

    def heal(self) -> None:
        self._set(set())

    def _set(self, cut: set[tuple[str, str]]) -> None:
        def change() -> None:
            self._cut = cut
            self._changed.set()
            self._changed = asyncio.Event()

        self._loop.call_soon_threadsafe(change)

    def close(self) -> None:
        async def end() -> None:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    # -- in the thread ----------------------------------------------------------------------------
    async def _listen(self, names: list[str]) -> None:
        for name in names:
            ready = self._loop.create_future()
            self._spawn(self._front(name, ready))
            self.ports[name] = await ready

    async def _front(self, name: str, ready: asyncio.Future[int]) -> None:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._spawn(self._join(name, reader, writer))

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        ready.set_result(server.sockets[0].getsockname()[1])
        async with server:
            await self._loop.create_future()

    def _spawn(self, work: object) -> None:
        task: asyncio.Task[None] = self._loop.create_task(work)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _join(
        self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        source = _who(writer.get_extra_info("peername")[1], self._processes())
        self._joined.add((source, name))
        try:
            await self._passable(source, name)
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._upstream[name])
        except OSError:
            writer.transport.abort()  # as the server itself would: nobody listens
            return
        except asyncio.CancelledError:
            writer.transport.abort()
            raise
        pumps = [
            asyncio.ensure_future(self._pump(reader, up_writer, source, name)),
            asyncio.ensure_future(self._pump(up_reader, writer, name, source)),
        ]
        try:
            await asyncio.wait(pumps)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for end in (writer, up_writer):
                end.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, source: str, target: str
    ) -> None:
        try:
            while data := await reader.read(_CHUNK):
                await self._passable(source, target)
                writer.write(data)
                await writer.drain()
            await self._passable(source, target)
            writer.write_eof()
        except OSError:
            await self._passable(source, target)
            writer.transport.abort()

    async def _passable(self, source: str, target: str) -> None:
        while (source, target) in self._cut:
            await self._changed.wait()


def _who(port: int, processes: Mapping[str, int]) -> str:
    """The name of the process that has connected from this local port; "" for anybody else."""
    socket = next(_sockets(port), None)
    if socket is None:
        return ""
    for name, pid in processes.items():
        with contextlib.suppress(OSError):
            for number in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{pid}/fd/{number}") == socket:
                        return name
    return ""


def _sockets(port: int) -> Iterator[str]:
    """Those whose own end is this port of 127.0.0.1, as /proc/<pid>/fd names them."""
    for table, host in (("tcp", "0100007F"), ("tcp6", "0000000000000000FFFF00000100007F")):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1] == f"{host}:{port:04X}":
                yield f"socket:[{fields[9]}]"
