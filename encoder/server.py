"""The gRPC face of a rank group, in its first process: proto/shoal/encoder/v1 over an `Engine`.

Requests of one Embed call run side by side and are answered when they are ready. When a caller goes
away its requests are given up.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import grpc.aio
import numpy as np

from encoder.batching import Lane
from encoder.engine import Engine
from encoder.model import TextTokenizer, TokenizedText
from shoal.encoder.v1 import encoder_pb2 as pb
from shoal.encoder_api import ModelInfo, check_texts, closing, resolve_model, wrong_weights
from shoal.errors import InvariantError, ShoalError
from shoal.limits import RPC_IN_FLIGHT_MAX
from shoal.rpc.channel import NODE_HEADER, node_metadata
from shoal.rpc.codec import encode_error
from shoal.telemetry import logger

__all__ = ["EncoderServer"]

SERVICE = "shoal.encoder.v1.Encoder"
INLINE_BYTES_MAX = 4_096  # of texts that are cut into tokens in the event loop: about 50 µs
BYTES_PER_TOKEN_MAX = 8  # texts have about four
# Of one call that are being answered; then it is read no further. Callers stop before: a query that is
# not read would wait for all imports before it.
STREAM_REQUESTS_MAX = 2 * RPC_IN_FLIGHT_MAX

Context = grpc.aio.ServicerContext[Any, Any]
_LANES = {pb.LANE_INTERACTIVE: Lane.INTERACTIVE, pb.LANE_BULK: Lane.BULK}

_log = logger("encoder")


class EncoderServer:
    """Handlers for a gRPC server; belongs to one event loop.

    describe  fills in what Status says of the group.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: TextTokenizer,
        info: ModelInfo,
        *,
        node_id: str,
        describe: Callable[[pb.StatusReply], None],
    ) -> None:
        self._engine, self._tokenizer, self._info = engine, tokenizer, info
        self._node_id, self._describe = node_id, describe
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._pool.submit(int)  # the thread is there before memory may be short
        self._in_flight = 0
        self._idle = asyncio.Event()  # nothing is in flight, or nobody is to wait for it
        self._idle.set()
        self._hurried = self._finished = False
        self.truncated_total = 0

    def handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Embed": grpc.stream_stream_rpc_method_handler(
                    self._embed, pb.EmbedRequest.FromString, pb.EmbedReply.SerializeToString
                ),
                "Status": grpc.unary_unary_rpc_method_handler(
                    self._status, pb.StatusRequest.FromString, pb.StatusReply.SerializeToString
                ),
            },
        )

    async def finish(self, within_s: float) -> None:
        """Wait until nothing is being answered, at most so long, or until `hurry`."""
        try:
            async with asyncio.timeout(within_s):
                while self._in_flight and not self._hurried:
                    await self._idle.wait()
        except TimeoutError:
            pass  # told below
        if self._in_flight:
            _log.warning("requests_given_up", count=self._in_flight)
        self._finished = True  # calls that are open may bring requests for another moment
        self._pool.shutdown(wait=False, cancel_futures=True)

    def hurry(self) -> None:
        """Give up what is still in flight."""
        self._hurried = True
        self._idle.set()

    # -- Embed ------------------------------------------------------------------------------------
    async def _embed(
        self, requests: AsyncIterator[pb.EmbedRequest], context: Context
    ) -> AsyncIterator[pb.EmbedReply]:
        await self._check_node(context)
        await context.send_initial_metadata(node_metadata(self._node_id))
        call = _Call(self._answer)
        reader = asyncio.ensure_future(call.read(requests))
        try:
            while (reply := await call.replies.get()) is not None:
                yield reply
                call.sent()
        finally:
            reader.cancel()
            call.give_up()

    async def _answer(self, request: pb.EmbedRequest) -> pb.EmbedReply:
        self._in_flight += 1
        self._idle.clear()
        try:
            return await self._embedded(request)
        except ShoalError as error:
            return pb.EmbedReply(id=request.id, error=encode_error(error))
        except InvariantError as error:
            failed = ShoalError(str(error))
            return pb.EmbedReply(id=request.id, error=encode_error(failed))
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def _embedded(self, request: pb.EmbedRequest) -> pb.EmbedReply:
        info = self._info
        if self._finished:
            raise closing()
        resolve_model(request.model, {info.name: info.aliases})
        if request.fingerprint not in ("", info.fingerprint):
            raise wrong_weights(info.name, request.fingerprint, info.fingerprint)
        texts = list(request.texts)
        size = check_texts(texts)
        if not texts:
            return self._reply(request.id, np.empty((0, info.dim), np.float32), [])
        lane = _LANES.get(request.lane) or Lane.of(len(texts))
        few = min(size // BYTES_PER_TOKEN_MAX, len(texts) * info.max_tokens)
        self._engine.check_room(few, lane)  # a queue that is full costs no tokenizing
        tokenized = await self._tokenized(texts, size)
        number, future = self._engine.submit([text.token_ids for text in tokenized], lane)
        try:
            vectors = await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            self._engine.forget(number)
            raise
        return self._reply(request.id, vectors, tokenized)

    async def _tokenized(self, texts: list[str], size: int) -> Sequence[TokenizedText]:
        if size <= INLINE_BYTES_MAX:
            return self._tokenizer.tokenize(texts)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self._tokenizer.tokenize, texts)

    def _reply(
        self, number: int, vectors: np.ndarray[Any, Any], tokenized: Sequence[TokenizedText]
    ) -> pb.EmbedReply:
        truncated = [place for place, text in enumerate(tokenized) if text.truncated]
        self.truncated_total += len(truncated)
        tokens = np.fromiter((len(text.token_ids) for text in tokenized), "<i4", len(tokenized))
        return pb.EmbedReply(
            id=number,
            vectors=vectors.astype("<f4", copy=False).tobytes(),
            tokens=tokens.tobytes(),
            truncated=truncated,
            fingerprint=self._info.fingerprint or "",
            waiting_tokens=self._engine.waiting[1],
        )

    # -- Status -----------------------------------------------------------------------------------
    async def _status(self, request: pb.StatusRequest, context: Context) -> pb.StatusReply:
        await self._check_node(context)
        info, engine = self._info, self._engine
        texts, tokens = engine.waiting
        reply = pb.StatusReply(
            model=info.name,
            aliases=info.aliases,
            fingerprint=info.fingerprint or "",
            dim=info.dim,
            max_tokens=info.max_tokens,
            precision=info.precision or "",
            waiting_texts=texts,
            waiting_tokens=tokens,
            texts_total=engine.texts_total,
            truncated_total=self.truncated_total,
            batches_total=engine.batches_total,
            splits_total=engine.splits_total,
            busy_s_total=engine.busy_s_total,
        )
        self._describe(reply)
        return reply

    async def _check_node(self, context: Context) -> None:
        meant = [
            value for name, value in context.invocation_metadata() or () if name == NODE_HEADER
        ]
        if meant and meant[0] != self._node_id:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, f"this is {self._node_id}, not {meant[0]!r}"
            )


class _Call:
    """One Embed call: its requests as tasks, its replies in a queue; None is the end."""

    def __init__(self, answer: Callable[[pb.EmbedRequest], Any]) -> None:
        self._answer = answer
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._room = asyncio.Semaphore(STREAM_REQUESTS_MAX)
        self.replies: asyncio.Queue[pb.EmbedReply | None] = asyncio.Queue()

    async def read(self, requests: AsyncIterator[pb.EmbedRequest]) -> None:
        try:
            async for request in requests:
                if request.cancelled:
                    if (task := self._tasks.get(request.id)) is not None:
                        task.cancel()
                    continue
                await self._room.acquire()
                self._tasks[request.id] = asyncio.create_task(self._one(request))
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        finally:
            self.replies.put_nowait(None)

    async def _one(self, request: pb.EmbedRequest) -> None:
        try:
            reply = await self._answer(request)
        except asyncio.CancelledError:
            self._room.release()  # no reply
            raise
        except Exception as error:
            _log.error("embedding_failed", error=error)
            failed = ShoalError("a bug in Shoal's encoder, written to its log")
            reply = pb.EmbedReply(id=request.id, error=encode_error(failed))
        finally:
            self._tasks.pop(request.id, None)
        self.replies.put_nowait(reply)

    def sent(self) -> None:
        """One reply has left: a caller that reads none is not read either."""
        self._room.release()

    def give_up(self) -> None:
        for task in self._tasks.values():
            task.cancel()
