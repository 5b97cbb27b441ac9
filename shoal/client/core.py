"""How a client reaches its servers: which one, how often, for how long. `AsyncClient` says what."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from google.protobuf.message import Message

from shoal.client.connection import Connection
from shoal.client.retry import Retries, RetryPolicy
from shoal.errors import BadRequest, ShoalError, TimedOut, Unavailable

__all__ = ["DEFAULT_PORT", "Core", "parse_addresses"]

T = TypeVar("T")
A = TypeVar("A", bound=Message)
DEFAULT_PORT = 6334
_ROUND_PAUSE_S = 0.1  # between looking at all addresses and looking at all of them again


def parse_addresses(given: str | Sequence[str]) -> list[str]:
    """ "host", "host:port", "[::1]:port", or several, also with commas between -> "host:port" each."""
    texts = given.split(",") if isinstance(given, str) else list(given)
    addresses = []
    for text in map(str.strip, texts):
        if "://" in text:
            raise BadRequest(
                f"Wrong input: {text} is no address for gRPC: give host:port, such as "
                f"localhost:{DEFAULT_PORT}"
            )
        bare = text.count(":") == 0 or text.endswith("]")
        addresses.append(f"{text}:{DEFAULT_PORT}" if bare else text)
    if not all(address.rpartition(":")[0] for address in addresses) or not addresses:
        raise BadRequest("Wrong input: no address of a server: give host:port, or several")
    return addresses


class Core:
    """Connections to any number of coordinators, and calls that survive the loss of one.

    The first address is used until it fails, then the next, and so on round.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        api_key: str | None,
        tls: bool,
        timeout_s: float,
        connect_timeout_s: float,
        retry: RetryPolicy,
        in_flight_max: int,
        dice: random.Random,
    ) -> None:
        self._addresses = list(addresses)
        self._metadata = () if api_key is None else (("api-key", api_key),)
        self._tls = tls
        self.timeout_s = timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._retries = Retries(retry, dice)
        self._room = asyncio.Semaphore(in_flight_max)
        self._connections: dict[str, Connection] = {}
        self._current = 0
        self._closed = False
        self.retried = 0  # attempts that were not the first of their call

    async def run(
        self,
        attempt: Callable[[Connection, float], Awaitable[T]],
        *,
        writes: bool = False,
        idempotent: bool = False,
        timeout_s: float | None = None,
    ) -> T:
        """attempt(connection, seconds left), again while shoal/client/retry.py says so."""
        if self._closed:
            raise Unavailable("this client is closed")
        clock = asyncio.get_running_loop().time
        seconds = self.timeout_s if timeout_s is None else timeout_s
        deadline = clock() + seconds
        self._retries.earn()
        try:
            async with asyncio.timeout(seconds):
                await self._room.acquire()
        except TimeoutError:
            error = TimedOut(f"Timeout: {seconds:g} s over while earlier calls were waited for")
            error.maybe_applied = False
            raise error from None
        try:
            failed = 0
            while True:
                connection: Connection | None = None
                try:
                    left = max(0.001, deadline - clock())
                    connection = await self._connected(min(left, self._connect_timeout_s))
                    return await attempt(connection, max(0.001, deadline - clock()))
                except ShoalError as error:
                    failed += 1
                    if isinstance(error, Unavailable) and connection is not None:
                        self._move_on(connection)
                    pause_s = self._retries.pause_s(
                        error, failed, writes=writes, idempotent=idempotent
                    )
                    if pause_s is None or self._closed or clock() + pause_s >= deadline:
                        raise
                self.retried += 1
                await asyncio.sleep(pause_s)
        finally:
            self._room.release()

    async def ask(
        self, method: str, request: Message, answer: type[A], timeout_s: float | None
    ) -> A:
        """One unary call that reads."""
        return await self.run(
            lambda connection, left: connection.call(
                method, request, answer, timeout_s=left, writes=False
            ),
            timeout_s=timeout_s,
        )

    async def change(
        self,
        method: str,
        request: Message,
        answer: type[A],
        timeout_s: float | None,
        *,
        idempotent: bool = False,
    ) -> A:
        """One unary call that writes."""
        return await self.run(
            lambda connection, left: connection.call(
                method, request, answer, timeout_s=left, writes=True
            ),
            writes=True,
            idempotent=idempotent,
            timeout_s=timeout_s,
        )

    async def _connected(self, within_s: float) -> Connection:
        """A connection that stands. Raises Unavailable: nothing was sent."""
        if self._closed:  # while it paused
            raise Unavailable("this client is closed")
        clock = asyncio.get_running_loop().time
        deadline = clock() + within_s
        alone = len(self._addresses) == 1
        while True:
            for _ in self._addresses:
                connection = self._connection()
                try:
                    left = max(0.0, deadline - clock())
                    share = left if alone else min(left, max(1.0, within_s / len(self._addresses)))
                    await connection.ready(share, patient=alone)
                    return connection
                except Unavailable:
                    self._move_on(connection)
            if clock() + _ROUND_PAUSE_S >= deadline:
                raise Unavailable(
                    f"no server answers at {', '.join(self._addresses)} (asked for {within_s:.1f} "
                    "s): is one running there, with --grpc-port?"
                )
            await asyncio.sleep(_ROUND_PAUSE_S)

    def _connection(self) -> Connection:
        address = self._addresses[self._current]
        found = self._connections.get(address)
        if found is None:
            found = Connection(address, metadata=self._metadata, tls=self._tls)
            self._connections[address] = found
        return found

    def _move_on(self, from_: Connection) -> None:
        """To the next address, unless another call has moved on already."""
        if self._addresses[self._current] == from_.address:
            self._current = (self._current + 1) % len(self._addresses)

    async def close(self) -> None:
        self._closed = True
        connections, self._connections = self._connections, {}
        for connection in connections.values():
            await connection.close()
