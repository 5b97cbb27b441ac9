"""The gRPC face of a storage node: proto/shoal/node/v1 over any `storage_api.Node`.

Requests of an Exchange run side by side, each in a task of its own, and are answered when they are
ready; answers that are ready together leave together. A request that its caller no longer waits for
is called off, a write as long as it is not in the log. When a whole caller goes away its reads are
given up; its writes take their course.

Bounds: a caller that does not take its answers is read no further, and beyond
limits.RPC_SERVER_IN_FLIGHT_MAX requests of all callers the answer is Busy.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health
from grpc_reflection.v1alpha import reflection

from shoal import limits
from shoal.errors import (
    BadRequest,
    Busy,
    NotSupported,
    ShoalError,
    StartupError,
    Unavailable,
)
from shoal.files_api import FileSource
from shoal.node.v1 import node_pb2 as pb
from shoal.node.v1.replication_pb2 import ReplicaMessage
from shoal.rpc import codec
from shoal.rpc.channel import (
    NODE_HEADER,
    NodeTls,
    node_metadata,
    server_credentials,
    server_options,
)
from shoal.rpc.faults import rpc_code, to_trailer
from shoal.storage_api import Guard, Node, ShardKey
from shoal.telemetry import logger
from storage_node.unread import Complaints

__all__ = ["NodeServer", "serve_node"]

SERVICE = "shoal.node.v1.StorageNode"
_STOP_S = 2.0  # for answers to be taken by their callers

_log = logger("storage")
Context = grpc.aio.ServicerContext[Any, Any]


async def serve_node(
    node: Node,
    host: str,
    port: int,
    *,
    node_id: str,
    deliver: Callable[[ReplicaMessage], None] | None = None,
    files: FileSource | None = None,
    tls: NodeTls | None = None,
) -> NodeServer:
    """A started server on host:port; 0 picks a free port, see `NodeServer.port`.

    node_id   calls that are meant for another node are refused, and nothing happens
    deliver   takes messages of other replicas, in the order in which each node sent them
    files     None: this node gives no files away
    tls       None: anybody who reaches the port may do everything
    Raises    StartupError when the port cannot be had.
    """
    server = NodeServer(node, node_id=node_id, deliver=deliver, files=files)
    await server.start(host, port, tls)
    return server


class NodeServer:
    """Made by `serve_node`. port: the one that it listens on."""

    def __init__(
        self,
        node: Node,
        *,
        node_id: str,
        deliver: Callable[[ReplicaMessage], None] | None,
        files: FileSource | None,
    ) -> None:
        self._node, self._node_id, self._deliver, self._files = node, node_id, deliver, files
        self._server = grpc.aio.server(options=server_options())
        self._health = health.HealthServicer()
        self._sessions: set[_Session] = set()
        self._closing = False
        self._hearing: set[asyncio.Task[None]] = set()  # calls of other replicas' buses
        self._complaints = Complaints()  # about messages of other replicas
        self.work: set[asyncio.Task[None]] = set()  # requests being answered
        self.port = 0

    async def start(self, host: str, port: int, tls: NodeTls | None) -> None:
        methods: dict[str, grpc.RpcMethodHandler] = {  # type: ignore[type-arg]
            "Exchange": grpc.stream_stream_rpc_method_handler(self._exchange),
            "CreateShard": self._unary(pb.CreateShardRequest, self._create_shard),
            "DropShard": self._unary(pb.DropShardRequest, self._drop_shard),
            "Status": self._unary(pb.StatusRequest, self._status),
            "Replicate": grpc.stream_unary_rpc_method_handler(
                self._replicate, pb.ReplicaMessages.FromString, _serialize
            ),
            "Snapshot": self._unary(pb.SnapshotRequest, self._snapshot),
            "Fetch": grpc.unary_stream_rpc_method_handler(
                self._fetch, pb.FetchRequest.FromString, _serialize
            ),
            "Release": self._unary(pb.ReleaseRequest, self._release),
        }
        server = self._server
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
        reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if tls is None:
                self.port = server.add_insecure_port(address)
            else:
                self.port = server.add_secure_port(address, server_credentials(tls))
        except RuntimeError as error:
            raise StartupError(
                f"Cannot listen on {address} for other nodes: {error}. Is the port taken, or is "
                "the host no address of this machine?"
            ) from None
        await server.start()
        await self.set_serving(True)
        _log.info("node_listens", node=self._node_id, address=f"{host}:{self.port}")

    async def set_serving(self, serving: bool) -> None:
        """What the standard health service says from now on."""
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if serving
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in ("", SERVICE):
            await self._health.set(name, status)

    async def close(self, grace_s: float = 5.0) -> None:
        """New requests are refused (nothing happened); those at work have `grace_s` to be answered."""
        if self._closing:
            return
        self._closing = True
        await self._health.enter_graceful_shutdown()
        if self.work:
            await asyncio.wait(self.work, timeout=grace_s)
        for task in self.work:
            task.cancel()
        await asyncio.gather(*self.work, return_exceptions=True)
        for session in self._sessions:
            session.end()
        for hearing in self._hearing:
            hearing.cancel()
        await self._server.stop(_STOP_S)

    def refusal(self) -> ShoalError | None:
        """Why no more requests are taken at the moment."""
        if self._closing:
            return Unavailable(f"storage node {self._node_id} is shutting down")
        if len(self.work) >= limits.RPC_SERVER_IN_FLIGHT_MAX:
            return Busy(
                f"storage node {self._node_id} has {len(self.work)} requests at work: try again "
                "shortly"
            )
        return None

    # -- Exchange ---------------------------------------------------------------------------------
    async def _exchange(self, _: object, context: Context) -> None:
        await self._check_meant(context)
        await context.send_initial_metadata(node_metadata(self._node_id))
        session = _Session(self, context)
        self._sessions.add(session)
        try:
            await session.run()
        finally:
            self._sessions.discard(session)

    async def answer(self, request: pb.Request) -> bytes:
        """The serialised Answer to one request; an error is an answer too."""
        number = request.id
        try:
            answer = await self._perform(request)
        except ShoalError as error:
            return codec.error_answer(number, error)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            return codec.error_answer(number, self._bug(error))
        if len(answer) > limits.RPC_MESSAGE_BYTES_MAX:
            return codec.error_answer(
                number,
                BadRequest(
                    f"Bad request: the answer has {len(answer)} bytes, "
                    f"{limits.RPC_MESSAGE_BYTES_MAX} are allowed: ask for fewer points, or without "
                    "vectors or payload"
                ),
            )
        return answer

    async def _perform(self, request: pb.Request) -> bytes:
        number, node = request.id, self._node
        shard = ShardKey(request.collection_id, request.shard)
        match request.WhichOneof("op"):
            case "search":
                query = codec.decode_search(request.search)
                hits = await node.search(shard, query, _guard(request))
                return codec.hits_answer(number, hits.value, hits.applied)
            case "write":
                result = await node.write(shard, codec.decode_write(request.write))
                return codec.result_answer(number, result)
            case "retrieve":
                wanted = codec.decode_retrieve(request.retrieve)
                points = await node.retrieve(shard, *wanted, _guard(request))
                return codec.points_answer(number, points.value, points.applied)
            case "scroll":
                page = await node.scroll(
                    shard, codec.decode_scroll(request.scroll), _guard(request)
                )
                return codec.points_answer(number, page.value, page.applied)
            case "count":
                where = codec.decode_filter(request.count.filter)
                count = await node.count(shard, where, _guard(request))
                return codec.count_answer(number, count.value, count.applied)
            case "info":
                return codec.info_answer(number, await node.info(shard))
            case _:
                raise NotSupported(
                    f"storage node {self._node_id} does not know this request: it runs an older "
                    "version"
                )

    def _bug(self, error: Exception) -> ShoalError:
        """Ours: the log has all of it, the caller learns where to look."""
        _log.error("request_failed", node=self._node_id, error=error)
        told = ShoalError(
            f"storage node {self._node_id} failed with {type(error).__name__}; its log says more"
        )
        told.maybe_applied = True
        return told

    # -- the other calls --------------------------------------------------------------------------
    def _unary(self, request: type[Message], perform: Callable[[Any], Awaitable[Message]]) -> Any:
        async def handle(message: Message, context: Context) -> Message:
            await self._check_meant(context)
            if self._closing:
                await _abort(context, Unavailable(f"{self._node_id} is shutting down"))
            try:
                return await perform(message)
            except ShoalError as error:
                await _abort(context, error)
            except Exception as error:
                await _abort(context, self._bug(error))

        return grpc.unary_unary_rpc_method_handler(handle, request.FromString, _serialize)

    async def _create_shard(self, request: pb.CreateShardRequest) -> Message:
        await self._node.create_shard(codec.decode_spec(request.spec))
        return pb.CreateShardReply()

    async def _drop_shard(self, request: pb.DropShardRequest) -> Message:
        await self._node.drop_shard(codec.decode_key(request.key))
        return pb.DropShardReply()

    async def _status(self, _: pb.StatusRequest) -> Message:
        return codec.encode_status(await self._node.status())

    async def _snapshot(self, request: pb.SnapshotRequest) -> Message:
        snapshot = await self._source().snapshot(codec.decode_key(request.key))
        return codec.encode_snapshot(snapshot)

    async def _release(self, request: pb.ReleaseRequest) -> Message:
        await self._source().release(request.snapshot_id)
        return pb.ReleaseReply()

    async def _fetch(self, request: pb.FetchRequest, context: Context) -> AsyncIterator[Message]:
        await self._check_meant(context)
        try:
            chunks = self._source().fetch(request.snapshot_id, request.path, request.offset)
            async for chunk in chunks:
                yield codec.encode_chunk(chunk)
        except ShoalError as error:
            await _abort(context, error)

    def _source(self) -> FileSource:
        if self._files is None:
            raise NotSupported(f"storage node {self._node_id} gives no files away")
        return self._files

    async def _replicate(
        self, batches: AsyncIterator[pb.ReplicaMessages], context: Context
    ) -> Message:
        await self._check_meant(context)
        deliver = self._deliver
        if deliver is None:
            await _abort(context, NotSupported(f"storage node {self._node_id} has no replicas"))
        await context.send_initial_metadata(node_metadata(self._node_id))
        hearing = asyncio.ensure_future(self._hear(batches, deliver))
        self._hearing.add(hearing)
        try:
            await asyncio.wait([hearing])  # it is cancelled when this node stops
        finally:
            self._hearing.discard(hearing)
            hearing.cancel()
            # How the call broke is the sender's business, who makes a new one.
            await asyncio.gather(hearing, return_exceptions=True)
        return pb.ReplicateReply()

    async def _hear(
        self,
        batches: AsyncIterator[pb.ReplicaMessages],
        deliver: Callable[[ReplicaMessage], None],
    ) -> None:
        async for batch in batches:
            for message in batch.messages:
                try:
                    deliver(message)
                except Exception as error:  # as if lost on the way: no other shard is to suffer
                    self._drop(message, error)

    def _drop(self, message: ReplicaMessage, error: Exception) -> None:
        count = self._complaints.dropped(message.sender, time.monotonic())
        if count is None:
            return
        about = {
            "node": self._node_id,
            "sender": message.sender,
            "shard": f"{message.collection_id}/{message.shard}",
            "dropped": count,
        }
        if isinstance(error, BadRequest):  # it may run another version
            _log.warning("message_not_read", why=error.message, **about)
        else:  # ours
            _log.error("message_failed", error=error, **about)

    async def _check_meant(self, context: Context) -> None:
        for name, value in context.invocation_metadata() or ():
            if name == NODE_HEADER and value != self._node_id:
                await _abort(
                    context,
                    Unavailable(
                        f"this is storage node {self._node_id} and not {value!r}, which had this "
                        "address before"
                    ),
                )


class _Session:
    """One Exchange call: a reader, a writer, and a task for each request at work."""

    def __init__(self, server: NodeServer, context: Context) -> None:
        self._server, self._context = server, context
        self._loop = asyncio.get_running_loop()
        self._reads: dict[int, asyncio.Task[None]] = {}
        self._writes: dict[int, asyncio.Task[None]] = {}
        self._open = 0  # requests without an answer
        self._outbox: list[bytes] = []
        self._outbox_bytes = 0
        self._wake = asyncio.Event()  # for the writer
        self._drained = asyncio.Event()
        self._ended = False

    async def run(self) -> None:
        reader = self._loop.create_task(self._read())
        writer = self._loop.create_task(self._write())
        try:
            await asyncio.wait((reader, writer), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (reader, writer, *self._reads.values()):
                task.cancel()
            outcomes = await asyncio.gather(reader, writer, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, DecodeError):
                error = BadRequest("Bad request: this is no message of shoal.node.v1")
                await _abort(self._context, error)

    def end(self) -> None:
        """Answer what is at work, then end the call."""
        self._ended = True
        self._wake.set()

    async def _read(self) -> None:
        context = self._context
        while True:
            data = await context.read()
            if data is grpc.aio.EOF:
                return
            frames = pb.Frames.FromString(cast(bytes, data))
            for number in frames.cancelled:
                # A write that is in the log takes its course all the same.
                task = self._reads.get(number) or self._writes.get(number)
                if task is not None:
                    task.cancel()
            for request in frames.requests:
                self._begin(request)
            while self._outbox_bytes > limits.RPC_SERVER_ANSWER_BYTES_MAX:
                self._drained.clear()
                await self._drained.wait()

    def _begin(self, request: pb.Request) -> None:
        refusal = self._server.refusal()
        if refusal is not None:
            self._send(codec.error_answer(request.id, refusal))
            return
        work = self._server.work
        task = self._loop.create_task(self._answer(request))
        work.add(task)
        task.add_done_callback(work.discard)
        (self._writes if request.HasField("write") else self._reads)[request.id] = task
        self._open += 1

    async def _answer(self, request: pb.Request) -> None:
        try:
            self._send(await self._server.answer(request))
        finally:
            self._open -= 1
            self._reads.pop(request.id, None)
            self._writes.pop(request.id, None)

    def _send(self, answer: bytes) -> None:
        self._outbox.append(answer)
        self._outbox_bytes += len(answer)
        self._wake.set()

    async def _write(self) -> None:
        context = self._context
        while True:
            if not self._outbox:
                if self._ended and not self._open:
                    return
                self._wake.clear()
                await self._wake.wait()
                continue
            answers, size = self._take()
            await context.write(codec.join_frames(answers=answers))
            self._outbox_bytes -= size
            if self._outbox_bytes <= limits.RPC_SERVER_ANSWER_BYTES_MAX:
                self._drained.set()

    def _take(self) -> tuple[list[bytes], int]:
        """Answers for one message, and their bytes."""
        size = count = 0
        for answer in self._outbox:
            if count and size + len(answer) > limits.RPC_FRAMES_BYTES:
                break
            size, count = size + len(answer), count + 1
        taken, self._outbox = self._outbox[:count], self._outbox[count:]
        return taken, size


def _guard(request: pb.Request) -> Guard:
    return Guard(request.min_applied, request.strong)


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


async def _abort(context: Context, error: ShoalError) -> NoReturn:
    text = error.message[: limits.ERROR_TEXT_BYTES_MAX // 4]
    await context.abort(rpc_code(error), text, to_trailer(error))
    raise AssertionError("abort raises")
