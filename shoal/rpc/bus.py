"""`Bus`: messages between replicas on different nodes. Fire and forget.

    send("s2", …) ──▶ queue of s2 ──▶ one Replicate call to s2

Messages to one node arrive in the order in which they were sent, for as long as its connection
lives; whatever waits when it ends is dropped, and so is what does not fit. Replicas number what they
say and say it again when no answer comes, so a lost message costs time and nothing else. Replies
come over the other node's bus.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable

import grpc
import grpc.aio

from shoal import limits
from shoal.node.v1.replication_pb2 import ReplicaMessage
from shoal.rpc.channel import RpcSettings, is_taken, node_metadata, open_channel
from shoal.rpc.codec import join_frames
from shoal.rpc.faults import from_rpc_error
from shoal.telemetry import logger

__all__ = ["Bus"]

METHOD = "/shoal.node.v1.StorageNode/Replicate"
_BACKOFF_S_MIN = 0.05

_log = logger("rpc")
Call = grpc.aio.StreamUnaryCall[bytes, bytes]


class Bus:
    """One outgoing call for each peer, opened by the first message to it. Belongs to one event loop.

    addresses   node id -> "host:port" as far as it is known; asked before each connection
    own_id      of this node; a message to itself is refused, it needs no bus
    """

    def __init__(
        self,
        addresses: Callable[[str], str | None],
        *,
        own_id: str,
        settings: RpcSettings | None = None,
    ) -> None:
        self._addresses, self._own_id = addresses, own_id
        self._settings = settings if settings is not None else RpcSettings()
        self._peers: dict[str, _Peer] = {}
        self._closed = False

    def send(self, to: str, message: ReplicaMessage, size: int) -> bool:
        """Put a message on its way. False: it was dropped, now or as good as now.

        size   about how many bytes it has, for the bound on what waits for one peer
        """
        if self._closed or to == self._own_id:
            return False
        peer = self._peers.get(to)
        if peer is None:
            peer = self._peers[to] = _Peer(to, self._addresses, self._settings)
        return peer.send(message, size)

    def connected(self, to: str) -> bool:
        """Whether there is a connection, as far as this end can tell."""
        peer = self._peers.get(to)
        return peer is not None and peer.connected

    async def close(self) -> None:
        """What waits is dropped. May be called twice."""
        self._closed = True
        peers, self._peers = list(self._peers.values()), {}
        await asyncio.gather(*(peer.close() for peer in peers))


class _Peer:
    """The queue of one peer and the task that empties it. While the peer cannot be reached, and until
    the pause after that is over, nothing is taken."""

    def __init__(
        self, node_id: str, addresses: Callable[[str], str | None], settings: RpcSettings
    ) -> None:
        self._node_id, self._addresses, self._settings = node_id, addresses, settings
        self._queue: deque[ReplicaMessage] = deque()
        self._sizes: deque[int] = deque()
        self._bytes = 0
        self._wake = asyncio.Event()  # for the task
        self._task: asyncio.Task[None] | None = None
        self._blocked_until = 0.0
        self._failures = 0
        self.connected = False

    def send(self, message: ReplicaMessage, size: int) -> bool:
        loop = asyncio.get_running_loop()
        if self._task is None and loop.time() < self._blocked_until:
            return False
        if (
            len(self._queue) >= limits.BUS_QUEUE_MESSAGES_MAX
            # One message of any size may wait: else a large one could never be sent.
            or (self._queue and self._bytes + size > limits.BUS_QUEUE_BYTES_MAX)
        ):
            return False
        self._queue.append(message)
        self._sizes.append(size)
        self._bytes += size
        self._wake.set()
        if self._task is None:
            self._task = loop.create_task(self._run(), name=f"bus to {self._node_id}")
        return True

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        """One connection. It ends with it; the next message after the pause makes another."""
        loop = asyncio.get_running_loop()
        why = "its address is not known"
        had_connection = False
        try:
            address = self._addresses(self._node_id)
            if address is not None:
                why = await self._converse(address)
        except Exception as error:  # ours; the bus to this peer must not stay silent for ever
            _log.error("bus_failed", peer=self._node_id, error=error)
            why = repr(error)
        finally:
            had_connection, self.connected = self.connected, False
            self._task = None
            self._queue.clear()
            self._sizes.clear()
            self._bytes = 0
            self._failures = 0 if had_connection else min(self._failures + 1, 16)
            pause = min(self._settings.reconnect_s_max, _BACKOFF_S_MIN * 2**self._failures)
            self._blocked_until = loop.time() + pause
        if had_connection or self._failures == 1:
            _log.warning("bus_disconnected", peer=self._node_id, why=why)

    async def _converse(self, address: str) -> str:
        """Send until the connection ends; says why it did."""
        peer = f"storage node {self._node_id} at {address}"
        channel = open_channel(address, self._settings)
        try:
            call: Call = channel.stream_unary(METHOD)(metadata=node_metadata(self._node_id))
            async with asyncio.timeout(self._settings.connect_timeout_s):
                taken = await is_taken(call)
            if taken:
                self.connected, self._failures = True, 0
                _log.debug("bus_connected", peer=self._node_id, address=address)
                await self._pump(call)
            await call
            return f"{peer} ended the connection"
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error, peer, write=False).message
        except TimeoutError:
            return f"{peer} cannot be reached: no connection in time"
        finally:
            await channel.close()

    async def _pump(self, call: Call) -> None:
        """Returns when the call is over."""
        call.add_done_callback(lambda _: self._wake.set())
        while not call.done():
            if not self._queue:
                self._wake.clear()
                await self._wake.wait()
                continue
            try:
                await call.write(join_frames(requests=self._take()))
            except asyncio.InvalidStateError:
                return

    def _take(self) -> list[bytes]:
        """What travels in the next message: field 1 of ReplicaMessages, as it is in Frames."""
        batch: list[bytes] = []
        size = 0
        while self._queue:
            if batch and size + self._sizes[0] > limits.RPC_FRAMES_BYTES:
                break
            size += self._sizes[0]
            self._bytes -= self._sizes.popleft()
            batch.append(self._queue.popleft().SerializeToString())
        return batch
