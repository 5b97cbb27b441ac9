"""`EncoderClient`: the encoders of a cluster behind `shoal.encoder_api.Encoder`.

    embed ──▶ groups that serve the weights, least work first ──▶ one Embed call each, many requests
                │ a group that is lost, busy or too late: the next one, each once
                └ nothing here changes anything, so asking twice harms nobody

Weights are a model's name and fingerprint: groups of one name with different fingerprints are replicas
of nothing, and never stand in for each other.

Who there is comes from the records under `nodes/`. How much waits for a group is known from its last
answer and from what this process has sent since; a group that was not heard of for a while is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import grpc
import grpc.aio
import numpy as np
from numpy.typing import NDArray

from shoal.encoder.v1 import encoder_pb2 as pb
from shoal.encoder_api import (
    Embedding,
    ModelInfo,
    check_texts,
    resolve_model,
    several_weights,
    wrong_weights,
)
from shoal.errors import (
    BadRequest,
    Busy,
    FormatTooNew,
    NotSupported,
    ShoalError,
    TimedOut,
    Unavailable,
)
from shoal.limits import ENCODER_QUERY_TEXTS_MAX, RPC_IN_FLIGHT_MAX
from shoal.metadata.contract import KeyValue
from shoal.metadata.schema import NODES_PREFIX, EncoderFacts, NodeRecord, NodeRole
from shoal.rpc.channel import RpcSettings, is_taken, node_metadata, open_channel
from shoal.rpc.codec import decode_error
from shoal.rpc.faults import from_rpc_error, lost
from shoal.telemetry import logger

__all__ = ["EncoderClient", "GroupStatus"]

_SERVICE = "/shoal.encoder.v1.Encoder/"
STATUS_TIMEOUT_S = 2.0
CONNECT_TIMEOUT_S = 0.8
_BACKOFF_S_MIN, BACKOFF_S_MAX = 0.05, 0.5
POLL_S = 1.0  # between questions for the depth of queues, while there is more than one group
AVOID_S = 1.0  # a group that was lost is asked last for so long
RETURN_S = (
    300.0  # weights whose groups are gone may come back: a machine may have to start for that
)
CHUNK_TEXTS = 256  # of one request to a group; more are asked for in parts
CHUNKS_AT_ONCE = 4
IMPORTS_IN_FLIGHT_MAX = RPC_IN_FLIGHT_MAX * 7 // 8  # they leave room for queries
_BYTES_PER_TOKEN = 4.0  # of texts not yet cut into tokens; only to compare groups with

_log = logger("rpc")

EmbedCall = grpc.aio.StreamStreamCall[pb.EmbedRequest, pb.EmbedReply]


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """One group as it says itself; `error` when it does not answer."""

    node: str
    address: str
    facts: EncoderFacts
    reply: pb.StatusReply | None = None
    error: str | None = None


class EncoderClient:
    """Implements `shoal.encoder_api.Encoder`. Belongs to one event loop.

    entries  the records of nodes, kept up to date by somebody else (shoal.metadata.watched).

    Besides the errors of the contract: Unavailable and TimedOut when every group that serves the model
    was lost or late; both may be retried.
    """

    def __init__(
        self, entries: Mapping[str, KeyValue], *, settings: RpcSettings | None = None
    ) -> None:
        self._entries = entries
        given = settings if settings is not None else RpcSettings()
        # A group that does not take a call is passed over sooner than a storage node.
        self._settings = replace(given, connect_timeout_s=CONNECT_TIMEOUT_S)
        self._seen: dict[_Weights, _Seen] = {}  # served once, whether they are now or not
        self._totals: dict[_Weights, _Totals] = {}
        self._read: dict[str, tuple[KeyValue, NodeRecord | None]] = {}
        self._groups: dict[str, _Group] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._poller: asyncio.Task[None] | None = None
        self._closed = False

    # -- the Encoder contract ---------------------------------------------------------------------
    async def embed(self, texts: Sequence[str], model: str) -> NDArray[np.float32]:
        return (await self.encode(texts, model)).vectors

    async def encode(
        self, texts: Sequence[str], model: str, fingerprint: str | None = None
    ) -> Embedding:
        size = check_texts(texts)
        facts = self._facts(model, fingerprint)
        if not texts:
            return _empty(facts)
        started_s = time.monotonic()
        if len(texts) <= CHUNK_TEXTS:
            answer = await self._ask(facts, texts, size, pb.LANE_BY_SIZE)
        else:
            answer = await self._ask_in_parts(facts, texts)
        totals = self._totals.setdefault(_weights(facts), _Totals())
        totals.add(answer, time.monotonic() - started_s)
        return answer

    async def _ask_in_parts(self, facts: EncoderFacts, texts: Sequence[str]) -> Embedding:
        """Parts go to whichever group has the least to do, each with its own bound of time. One that
        finds no room waits until another one is answered, so that a request is never in its own way."""
        room = asyncio.Semaphore(CHUNKS_AT_ONCE)
        at_work = answered = 0
        ended = asyncio.Event()  # one of them, whichever way

        async def ask(start: int) -> Embedding:
            nonlocal at_work, answered, ended
            part = texts[start : start + CHUNK_TEXTS]
            async with room:
                while True:
                    before = answered
                    at_work += 1
                    try:
                        answer = await self._ask(facts, part, sum(map(len, part)), pb.LANE_BULK)
                    except Busy as error:
                        refusal = error
                    else:
                        answered += 1
                        return answer
                    finally:
                        at_work -= 1
                        ended.set()
                        ended = asyncio.Event()
                    while answered == before:
                        if not at_work:
                            raise refusal
                        await ended.wait()

        asked = [asyncio.ensure_future(ask(n)) for n in range(0, len(texts), CHUNK_TEXTS)]
        try:
            parts = await asyncio.gather(*asked)
        finally:
            for task in asked:
                task.cancel()
        return Embedding(
            np.concatenate([part.vectors for part in parts]),
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.truncated for part in parts]),
            facts.fingerprint,
        )

    async def _ask(
        self, facts: EncoderFacts, texts: Sequence[str], size: int, lane: pb.Lane
    ) -> Embedding:
        """One request, of the groups that serve these weights one after the other."""
        request = pb.EmbedRequest(
            model=facts.model, fingerprint=facts.fingerprint, texts=texts, lane=lane
        )
        tokens = int(size / _BYTES_PER_TOKEN) + len(texts)
        failure: ShoalError | None = None
        tried: set[_Group] = set()
        # Looked up anew each time: a group that was started again has another address.
        while (group := self._next(facts, tried)) is not None:
            tried.add(group)
            try:
                return _embedding(await group.ask(request, tokens), len(texts), facts.dim)
            except (Unavailable, TimedOut, Busy) as error:
                failure = _worse(failure, error)
            except BadRequest as error:  # it serves something else than its record says
                failure = _worse(failure, Unavailable(f"encoder {group.node}: {error.message}"))
        raise failure if failure is not None else _nobody(facts.model)

    async def prepare(self, model: str, fingerprint: str | None = None) -> ModelInfo:
        return self._info(self._facts(model, fingerprint))

    def models(self) -> list[ModelInfo]:
        served = {_weights(facts): facts for _, facts in reversed(self._serving())}
        return [self._info(served[weights]) for weights in sorted(served)]

    def fingerprints(self, model: str) -> set[str]:
        """Of a model, by its full name: those that groups serve, and those that are missing for the
        moment."""
        return self._expected(model, self._serving())

    async def describe(self) -> list[dict[str, Any]]:
        return [_described(status) for status in await self.statuses()]

    async def close(self) -> None:
        self._closed = True
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.wait([self._poller])
        groups, self._groups = list(self._groups.values()), {}
        await asyncio.gather(*(group.close() for group in groups), *self._closing)

    # -- groups -----------------------------------------------------------------------------------
    async def statuses(self) -> list[GroupStatus]:
        """Every group that has registered, as it says itself."""
        serving = self._serving()
        return await asyncio.gather(
            *(self._group(record).status(facts) for record, facts in serving)
        )

    def _serving(self) -> list[tuple[NodeRecord, EncoderFacts]]:
        """Of all registered groups, by node id; and remember what they serve."""
        found = []
        now_s = time.monotonic()
        for key in sorted(self._entries):
            record = self._record(key)
            if (
                record is not None
                and record.role is NodeRole.ENCODER
                and record.encoder is not None
            ):
                found.append((record, record.encoder))
                weights = _weights(record.encoder)
                self._seen.setdefault(weights, _Seen(record.encoder)).by(record.id, now_s)
        return found

    def _record(self, key: str) -> NodeRecord | None:
        entry = self._entries.get(key)
        if entry is None or not key.startswith(NODES_PREFIX):
            return None
        known = self._read.get(key)
        if known is not None and known[0] is entry:
            return known[1]
        try:
            record = NodeRecord.from_bytes(key, entry.value)
        except FormatTooNew as error:
            _log.warning("node_record_too_new", key=key, why=error.message)
            record = None
        self._read[key] = (entry, record)
        return record

    def _facts(self, model: str, fingerprint: str | None) -> EncoderFacts:
        """What is to be asked for. Raises NotSupported where there never was an encoder, Unavailable
        while the groups of a model are gone, BadRequest for an unknown model or other weights."""
        if self._closed:
            raise Unavailable("this process is shutting down")
        serving = self._serving()
        if len(serving) > 1 and self._poller is None:
            self._poller = asyncio.create_task(self._poll(), name="encoder-depths")
        name = self._full_name(model, fingerprint)
        served = {f.fingerprint: f for _, f in reversed(serving) if f.model == name}
        expected = self._expected(name, serving)
        if (
            fingerprint is None and len(expected) > 1
        ):  # also when all but one are lost at the moment
            raise several_weights(name, expected)
        chosen = next(iter(served), None) if fingerprint is None else fingerprint
        if chosen in served:
            return served[chosen]
        if fingerprint is not None and served and fingerprint not in expected:
            raise wrong_weights(name, fingerprint, *served)
        raise _nobody(name, fingerprint)

    def _full_name(self, model: str, fingerprint: str | None) -> str:
        """Raises NotSupported and BadRequest. Who knows a fingerprint knows of weights that were served,
        if only before this process began."""
        aliases: dict[str, list[str]] = {}
        for seen in self._seen.values():
            aliases.setdefault(seen.facts.model, []).extend(seen.facts.aliases)
        try:
            if aliases or fingerprint is not None:
                return resolve_model(model, aliases)
        except BadRequest:
            if fingerprint is None:
                raise
            raise _nobody(model, fingerprint) from None
        raise NotSupported(
            "Texts cannot be embedded here: this cluster has no encoder; start one with `shoal encoder "
            "serve`, or send vectors"
        )

    def _expected(self, model: str, serving: Sequence[tuple[NodeRecord, EncoderFacts]]) -> set[str]:
        """Fingerprints of a model that are served, or were until a moment ago, as before a crash: not
        those whose nodes now serve others."""
        now_s = time.monotonic()
        serves = {record.id: _weights(facts) for record, facts in serving}
        return {
            weights[1]
            for weights, seen in self._seen.items()
            if weights[0] == model
            and any(
                serves.get(node, weights) == weights and now_s - at_s < RETURN_S
                for node, at_s in seen.at_s.items()
            )
        }

    def _info(self, facts: EncoderFacts) -> ModelInfo:
        totals = self._totals.get(_weights(facts), _Totals())
        return ModelInfo(
            name=facts.model,
            dim=facts.dim,
            max_tokens=facts.max_tokens,
            fingerprint=facts.fingerprint,
            aliases=tuple(facts.aliases),
            loaded=True,
            precision=facts.precision,
            texts_total=totals.texts,
            truncated_total=totals.truncated,
            busy_s_total=totals.waited_s,
        )

    def _next(self, wanted: EncoderFacts, tried: set[_Group]) -> _Group | None:
        """Of the groups that serve these weights and were not tried, the one with the least to do."""
        groups = [
            self._group(record)
            for record, facts in self._serving()
            if _weights(facts) == _weights(wanted) and not record.draining
        ]
        now_s = asyncio.get_running_loop().time()
        groups.sort(key=lambda group: (now_s < group.avoid_until_s, group.depth))
        return next((group for group in groups if group not in tried), None)

    def _group(self, record: NodeRecord) -> _Group:
        group = self._groups.get(record.id)
        if group is not None and group.address == record.grpc:
            return group
        if group is not None:
            self._drop(group)
        registered = {record.id for record, _ in self._serving()}
        for old in [g for g in self._groups.values() if g.node not in registered and g.is_idle]:
            self._drop(old)  # ids may be made anew at each start
        group = self._groups[record.id] = _Group(record.id, record.grpc, self._settings)
        return group

    def _drop(self, group: _Group) -> None:
        del self._groups[group.node]
        task = asyncio.get_running_loop().create_task(group.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _poll(self) -> None:
        """The depth of queues that other processes fill, too."""
        while True:
            await asyncio.sleep(POLL_S)
            for status in await self.statuses():
                group = self._groups.get(status.node)
                if group is not None and status.reply is not None:
                    group.waiting_tokens = status.reply.waiting_tokens


_Weights = tuple[str, str]  # a model's full name, and the fingerprint
_Futures = dict[int, asyncio.Future[pb.EmbedReply]]  # by the number of the request
_CLOSED = "this process closed the connection"


def _weights(facts: EncoderFacts) -> _Weights:
    return facts.model, facts.fingerprint


@dataclass(frozen=True, slots=True)
class _Seen:
    """Weights that were served, by which nodes, and when each was last seen to."""

    facts: EncoderFacts
    at_s: dict[str, float] = field(default_factory=dict)

    def by(self, node: str, now_s: float) -> None:
        if node not in self.at_s:  # ids may be made anew at each start: forget those of long ago
            for old in [n for n, at_s in self.at_s.items() if now_s - at_s > RETURN_S]:
                del self.at_s[old]
        self.at_s[node] = now_s


@dataclass(slots=True)
class _Totals:
    """What this process has had embedded by a model."""

    texts: int = 0
    truncated: int = 0
    waited_s: float = 0.0

    def add(self, answer: Embedding, took_s: float) -> None:
        self.texts += len(answer.tokens)
        self.truncated += int(answer.truncated.sum())
        self.waited_s += took_s


class _Group:
    """One group: its connection, and the requests that wait there.

    waiting_tokens  that it said last; sent_tokens: of our own requests that it has not answered.
    """

    def __init__(self, node: str, address: str, settings: RpcSettings) -> None:
        self.node, self.address = node, address
        self.avoid_until_s = 0.0
        self._blocked_until_s, self._failures = 0.0, 0  # connections in a row that were not made
        self._blocked_by = ""
        self.waiting_tokens = self._sent_tokens = 0
        self._settings = settings
        self._peer = f"encoder {node} at {address}"
        self._metadata = node_metadata(node)
        self._channel = open_channel(address, settings)
        self._ids = itertools.count(1)
        self._waiting: _Futures = {}  # for the call that is open
        self._call: EmbedCall | None = None
        self._opening: asyncio.Task[EmbedCall] | None = None
        self._outbox: asyncio.Queue[pb.EmbedRequest] = asyncio.Queue()
        self._pump: asyncio.Task[None] | None = None

    @property
    def depth(self) -> int:
        return self.waiting_tokens + self._sent_tokens

    @property
    def is_idle(self) -> bool:
        return not self._waiting and self._opening is None

    async def ask(self, request: pb.EmbedRequest, tokens: int) -> pb.EmbedReply:
        """Raises what the group answered, Unavailable and TimedOut."""
        is_query = request.lane != pb.LANE_BULK and len(request.texts) <= ENCODER_QUERY_TEXTS_MAX
        if len(self._waiting) >= (RPC_IN_FLIGHT_MAX if is_query else IMPORTS_IN_FLIGHT_MAX):
            raise Busy(f"{self._peer} has {len(self._waiting)} requests of this process waiting")
        self._sent_tokens += tokens
        try:
            return await self._asked(request)
        except (Unavailable, TimedOut):
            self.avoid_until_s = asyncio.get_running_loop().time() + AVOID_S
            raise
        finally:
            self._sent_tokens -= tokens

    async def _asked(self, request: pb.EmbedRequest) -> pb.EmbedReply:
        number = next(self._ids)
        own = pb.EmbedRequest()
        own.CopyFrom(request)
        own.id = number
        future: asyncio.Future[pb.EmbedReply] = asyncio.get_running_loop().create_future()
        call = await self._opened()
        if call.done():  # it began and ended before we had our turn: nobody would fail us
            raise lost(self._peer, "it ended the connection", maybe_applied=False)
        waiting, outbox = self._waiting, self._outbox
        waiting[number] = future
        outbox.put_nowait(own)
        try:
            async with asyncio.timeout(self._settings.read_timeout_s):
                reply = await future
        except TimeoutError:
            outbox.put_nowait(_gave_up(number))
            raise TimedOut(f"{self._peer} did not answer in time") from None
        except asyncio.CancelledError:
            outbox.put_nowait(_gave_up(number))
            raise
        finally:
            waiting.pop(number, None)
        self.waiting_tokens = reply.waiting_tokens
        if reply.HasField("error"):
            raise decode_error(reply.error)
        return reply

    async def _opened(self) -> EmbedCall:
        """The call that is open, or a new one; several who ask share it."""
        if self._call is not None and not self._call.done():
            return self._call
        if self._opening is None:
            if asyncio.get_running_loop().time() < self._blocked_until_s:
                raise Unavailable(self._blocked_by)
            self._opening = asyncio.create_task(self._open())
            self._opening.add_done_callback(self._opening_ended)
        try:
            return await asyncio.shield(self._opening)
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            raise lost(self._peer, _CLOSED, maybe_applied=False) from None  # see `close`

    def _opening_ended(self, task: asyncio.Task[EmbedCall]) -> None:
        self._opening = None
        error = None if task.cancelled() else task.exception()  # whoever waited has it
        if error is None:
            self._failures = 0
            return
        pause_s = min(BACKOFF_S_MAX, _BACKOFF_S_MIN * 2**self._failures)
        self._failures = min(self._failures + 1, 8)
        self._blocked_until_s = asyncio.get_running_loop().time() + pause_s
        self._blocked_by = str(error)

    async def _open(self) -> EmbedCall:
        open_call = self._channel.stream_stream(
            _SERVICE + "Embed",
            request_serializer=pb.EmbedRequest.SerializeToString,
            response_deserializer=pb.EmbedReply.FromString,
        )
        call = cast(EmbedCall, open_call(metadata=self._metadata))
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                if not await is_taken(call):
                    await call.read()  # raises why
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, self._peer, write=False) from None
        except TimeoutError:
            call.cancel()
            raise lost(self._peer, "no connection in time", maybe_applied=False) from None
        self._call = call
        # The call before may have to tell those who wait for it that it is over.
        self._outbox, self._waiting = asyncio.Queue(), {}
        self._pump = asyncio.create_task(self._exchange(call, self._outbox, self._waiting))
        return call

    async def _exchange(
        self, call: EmbedCall, outbox: asyncio.Queue[pb.EmbedRequest], waiting: _Futures
    ) -> None:
        """One call, until it ends; whoever waits for it then fails."""
        writer = asyncio.create_task(self._write(call, outbox))
        try:
            why = await self._read(call, waiting)
        finally:
            writer.cancel()
            await asyncio.wait([writer])
            call.cancel()
        for future in waiting.values():
            if not future.done():
                future.set_exception(lost(self._peer, why, maybe_applied=False))

    async def _write(self, call: EmbedCall, outbox: asyncio.Queue[pb.EmbedRequest]) -> None:
        """One message after the other: gRPC takes no second one while the first is on its way."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await call.write(await outbox.get())

    async def _read(self, call: EmbedCall, waiting: _Futures) -> str:
        """Why the call ended."""
        try:
            while (said := await call.read()) is not grpc.aio.EOF:
                reply = cast(pb.EmbedReply, said)
                future = waiting.get(reply.id)
                if future is not None and not future.done():
                    future.set_result(reply)
        except grpc.aio.AioRpcError as error:
            return error.details() or error.code().name
        except asyncio.InvalidStateError:
            return "the connection was closed"
        return "it ended the connection"

    async def status(self, facts: EncoderFacts) -> GroupStatus:
        call = self._channel.unary_unary(
            _SERVICE + "Status",
            request_serializer=pb.StatusRequest.SerializeToString,
            response_deserializer=pb.StatusReply.FromString,
        )
        try:
            reply = await call(
                pb.StatusRequest(), timeout=STATUS_TIMEOUT_S, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            why = from_rpc_error(error, self._peer, write=False).message
            return GroupStatus(self.node, self.address, facts, error=why)
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            return GroupStatus(self.node, self.address, facts, error=_CLOSED)  # see `close`
        return GroupStatus(self.node, self.address, facts, reply=reply)

    async def close(self) -> None:
        """Also while it is being asked, where the group has another address by now."""
        for task in (self._opening, self._pump):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(lost(self._peer, _CLOSED, maybe_applied=False))
        await self._channel.close()


def _is_cancelled() -> bool:
    """Whether it is the task at hand that is to end, and not only a call that it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _gave_up(number: int) -> pb.EmbedRequest:
    return pb.EmbedRequest(id=number, cancelled=True)


def _worse(known: ShoalError | None, error: ShoalError) -> ShoalError:
    """What to tell when all groups failed: that one is busy means that one lives."""
    return known if isinstance(known, Busy) else error


def _described(status: GroupStatus) -> dict[str, Any]:
    facts = status.facts
    known: dict[str, Any] = {
        "id": status.node,
        "grpc": status.address,
        "state": "lost" if status.reply is None else "up",
        "model": facts.model,
        "fingerprint": facts.fingerprint,
        "precision": facts.precision,
        "tp": facts.tp,
        "pp": facts.pp,
    }
    if status.reply is None:
        return known | {"error": status.error}
    names = (
        *("attempt", "waiting_texts", "waiting_tokens", "texts_total", "truncated_total"),
        *("batches_total", "splits_total", "busy_s_total"),
    )
    said = {name: getattr(status.reply, name) for name in names}
    of_rank = (
        "rank",
        "tp",
        "pp",
        "pid",
        "parameters",
        "parameter_bytes",
        "resident_bytes",
        "device",
    )
    ranks = [{name: getattr(rank, name) for name in of_rank} for rank in status.reply.ranks]
    return known | said | {"ranks": ranks}


def _nobody(model: str, fingerprint: str | None = None) -> Unavailable:
    which = "" if fingerprint is None else f" with the fingerprint {fingerprint}"
    return Unavailable(
        f"No encoder serves {model}{which} at the moment; send the request again in a few seconds."
    )


def _empty(facts: EncoderFacts) -> Embedding:
    vectors = np.empty((0, facts.dim), np.float32)
    return Embedding(vectors, np.empty(0, np.int32), np.empty(0, np.bool_), facts.fingerprint)


def _embedding(reply: pb.EmbedReply, count: int, dim: int) -> Embedding:
    """Raises Unavailable for an answer that does not fit the question."""
    vectors = np.frombuffer(reply.vectors, "<f4")
    tokens = np.frombuffer(reply.tokens, "<i4")
    if (
        len(vectors) != count * dim
        or len(tokens) != count
        or max(reply.truncated, default=0) >= count
    ):
        raise Unavailable("an encoder's answer does not fit the question: do versions differ?")
    truncated = np.zeros(count, np.bool_)
    truncated[list(reply.truncated)] = True
    return Embedding(
        vectors.reshape(count, dim).astype(np.float32),
        tokens.astype(np.int32),
        truncated,
        reply.fingerprint or None,
    )
