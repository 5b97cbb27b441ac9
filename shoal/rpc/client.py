"""`NodeClient`: a storage node in another process, behind the same interface as one in this.

reads   one Exchange call: search, count, info, and the points of a few ids
bulk    another one: writes, scrolls, the points of many ids; a large answer is not in the way of a
        small one
calls   create, drop, status, files: one gRPC call each
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from shoal.api.filter import Filter
from shoal.batch import PointBatch
from shoal.files_api import FileChunk, FileSnapshot
from shoal.ids import PointIds
from shoal.node.v1 import node_pb2 as pb
from shoal.rpc import codec
from shoal.rpc.channel import RpcSettings, node_metadata, open_channel
from shoal.rpc.exchange import Exchange
from shoal.rpc.faults import from_rpc_error, lost, timed_out
from shoal.rpc.traffic import Traffic
from shoal.storage_api import (
    FreshRead,
    Guard,
    Hits,
    ReplicaStatus,
    Scroll,
    Search,
    ShardInfo,
    ShardKey,
    ShardSpec,
    Write,
    WriteResult,
)

__all__ = ["NodeClient"]

_SERVICE = "/shoal.node.v1.StorageNode/"
_IDS_OF_A_SMALL_READ = 1_000

R = TypeVar("R", bound=Message)
R_co = TypeVar("R_co", bound=Message, covariant=True)


class _Reply(Protocol[R_co]):
    """The part of a message class that is needed here."""

    def FromString(self, data: bytes, /) -> R_co: ...  # noqa: N802


class NodeClient:
    """Implements storage_api.Node and files_api.FileSource. Belongs to the event loop it is made in.

    address   "host:port". Nothing is connected before the first call.
    node_id   whom it must be: another node at that address refuses. None: whoever answers.
    traffic   counts reads and writes, with earlier clients of the same node.

    Besides the node's own errors every method raises Busy (too much waits for this node), Unavailable
    and TimedOut; their `maybe_applied` is True only for a write that left this process.
    """

    def __init__(
        self,
        address: str,
        *,
        settings: RpcSettings | None = None,
        node_id: str | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        self.address, self.node_id = address, node_id
        self._settings = settings if settings is not None else RpcSettings()
        self._peer = f"storage node {node_id or ''} at {address}".replace("  ", " ")
        self._metadata = node_metadata(node_id)
        self.traffic = traffic if traffic is not None else Traffic()
        self._channel = open_channel(address, self._settings)
        self._reads, self._bulk = self._exchange(), self._exchange()
        self._closed = False

    def _exchange(self) -> Exchange:
        return Exchange(
            self._channel,
            peer=self._peer,
            metadata=self._metadata,
            settings=self._settings,
            traffic=self.traffic,
        )

    @property
    def in_flight(self) -> int:
        """Reads and writes that wait for their answer."""
        return self._reads.in_flight + self._bulk.in_flight

    @property
    def queued_bytes(self) -> int:
        """Of requests that are not yet sent."""
        return self._reads.queued_bytes + self._bulk.queued_bytes

    async def close(self) -> None:
        """Whatever still waits fails. May be called twice."""
        self._closed = True
        await asyncio.gather(self._reads.close(), self._bulk.close())
        await self._channel.close()

    # -- reads and writes -------------------------------------------------------------------------
    async def write(self, shard: ShardKey, op: Write) -> WriteResult:
        number = self._bulk.new_id()
        answer = await self._bulk.ask(number, codec.write_request(number, shard, op), write=True)
        return codec.decode_result(answer.written)

    async def search(self, shard: ShardKey, query: Search, guard: Guard) -> FreshRead[Hits]:
        number = self._reads.new_id()
        data = codec.search_request(number, shard, query, guard)
        answer = await self._reads.ask(number, data, write=False)
        return FreshRead(codec.decode_hits(answer.hits), answer.applied)

    async def retrieve(
        self,
        shard: ShardKey,
        ids: PointIds,
        with_payload: bool,
        with_vectors: bool | tuple[str, ...],
        guard: Guard,
    ) -> FreshRead[PointBatch]:
        exchange = self._reads if len(ids) <= _IDS_OF_A_SMALL_READ else self._bulk
        number = exchange.new_id()
        data = codec.retrieve_request(number, shard, ids, with_payload, with_vectors, guard)
        answer = await exchange.ask(number, data, write=False)
        return FreshRead(codec.decode_batch(answer.points), answer.applied)

    async def scroll(self, shard: ShardKey, query: Scroll, guard: Guard) -> FreshRead[PointBatch]:
        number = self._bulk.new_id()
        data = codec.scroll_request(number, shard, query, guard)
        answer = await self._bulk.ask(number, data, write=False)
        return FreshRead(codec.decode_batch(answer.points), answer.applied)

    async def count(self, shard: ShardKey, filter: Filter | None, guard: Guard) -> FreshRead[int]:
        number = self._reads.new_id()
        data = codec.count_request(number, shard, filter, guard)
        answer = await self._reads.ask(number, data, write=False)
        return FreshRead(answer.count, answer.applied)

    async def info(self, shard: ShardKey) -> ShardInfo:
        number = self._reads.new_id()
        answer = await self._reads.ask(number, codec.info_request(number, shard), write=False)
        return codec.decode_info(answer.info)

    # -- shards -----------------------------------------------------------------------------------
    async def create_shard(self, spec: ShardSpec) -> None:
        request = pb.CreateShardRequest(spec=codec.encode_spec(spec))
        await self._call("CreateShard", request, pb.CreateShardReply, write=True)

    async def drop_shard(self, shard: ShardKey) -> None:
        request = pb.DropShardRequest(key=codec.encode_key(shard))
        await self._call("DropShard", request, pb.DropShardReply, write=True)

    async def status(self) -> list[ReplicaStatus]:
        reply = await self._call("Status", pb.StatusRequest(), pb.StatusReply, write=False)
        return codec.decode_status(reply)

    # -- files ------------------------------------------------------------------------------------
    async def snapshot(self, shard: ShardKey) -> FileSnapshot:
        request = pb.SnapshotRequest(key=codec.encode_key(shard))
        reply = await self._call("Snapshot", request, pb.SnapshotReply, write=False)
        return codec.decode_snapshot(reply)

    async def fetch(self, snapshot_id: str, path: str, offset: int) -> AsyncIterator[FileChunk]:
        """See FileSource. Each chunk has `admin_timeout_s` to come."""
        request = pb.FetchRequest(snapshot_id=snapshot_id, path=path, offset=offset)
        call = self._channel.unary_stream(
            _SERVICE + "Fetch",
            request_serializer=_serialize,
            response_deserializer=pb.FileChunk.FromString,
        )(request, metadata=self._metadata)
        try:
            while True:
                async with asyncio.timeout(self._settings.admin_timeout_s):
                    message: Any = await call.read()
                if message is grpc.aio.EOF:
                    return
                yield codec.decode_chunk(message)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, self._peer, write=False) from None
        except TimeoutError:
            raise timed_out(self._peer, write=False) from None
        except (asyncio.CancelledError, grpc.aio.UsageError):
            self._unless_closed(write=False)
            raise
        finally:
            call.cancel()

    async def release(self, snapshot_id: str) -> None:
        request = pb.ReleaseRequest(snapshot_id=snapshot_id)
        await self._call("Release", request, pb.ReleaseReply, write=False)

    async def _call(self, method: str, request: Message, reply: _Reply[R], *, write: bool) -> R:
        """`write`: it changes something, so after a lost connection it may have happened."""
        call = self._channel.unary_unary(
            _SERVICE + method, request_serializer=_serialize, response_deserializer=reply.FromString
        )
        try:
            answer: R = await call(
                request, timeout=self._settings.admin_timeout_s, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, self._peer, write=write) from None
        except (asyncio.CancelledError, grpc.aio.UsageError):
            self._unless_closed(write=write)
            raise
        return answer

    def _unless_closed(self, *, write: bool) -> None:
        """Closing a channel looks to its callers as if somebody had cancelled them: raises
        Unavailable if it was that."""
        task = asyncio.current_task()
        if self._closed and (task is None or not task.cancelling()):
            raise lost(self._peer, "this process closed it", maybe_applied=write) from None


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()
