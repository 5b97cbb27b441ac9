"""One watch over an etcd cluster that outlives its members.

    etcd       ─── events ──── events ───────────────────── (frozen: the connection stays open)
    we         ───────────────────────── "progress?" ─ "progress?" ─ next member, from `after`
                                idle 1.5 s           1.5 s          1.5 s

A frozen member never closes a connection, so silence is questioned. An answer proves only that the
member lives: before etcd 3.5.8 it could overtake events, so it never moves `after`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import grpc
import grpc.aio

from shoal.errors import InvariantError, ShoalError
from shoal.metadata import etcd_pb2 as pb
from shoal.metadata.contract import Compacted, Event, StoreRefused, StoreWentBack
from shoal.metadata.etcd_members import ATTEMPT_S, WATCH, Members, NoAnswer
from shoal.telemetry import logger

__all__ = ["watch_forever"]

IDLE_S = 1.5  # of silence before a progress request, and between one and the next
UNANSWERED_MAX = 2
_PAUSE_S_MIN, _PAUSE_S_MAX = 0.05, 1.0
_REFUSALS_MAX = 2  # a token that has just run out looks like a missing permission

T = TypeVar("T")

_log = logger("metadata")

Call = grpc.aio.StreamStreamCall[pb.WatchRequest, pb.WatchResponse]


async def watch_forever(
    members: Members,
    keys: tuple[bytes, bytes],
    after: int,
    closed: asyncio.Event,
    to_event: Callable[[pb.Event], Event],
    known: Callable[[], int],
) -> AsyncIterator[list[Event]]:
    """Whole revisions later than `after`, in order, none twice; goes on at another member whenever
    one fails. Ends when `closed` is set. Raises Compacted, StoreRefused, StoreWentBack.

    keys   the first, and the one after the last
    known  the latest revision that anybody here was told of"""
    cluster_id = members.cluster_id
    pause_s, refusals, moving = _PAUSE_S_MIN, 0, False
    while not closed.is_set():
        stream = _Stream(members, members.current, closed)
        floor = max(after, known())
        try:
            await stream.open(*keys, after + 1)
            while (answer := await stream.next()) is not None:
                pause_s, refusals = _PAUSE_S_MIN, 0
                if moving:
                    _log.info("watch_goes_on", key=keys[0].decode(), after=after)
                    moving = False
                if answer.header.cluster_id != cluster_id:
                    raise StoreWentBack.because("etcd has another cluster id than before")
                if answer.header.revision < floor:
                    # A store that was wiped and set up again has the same cluster id. (Or this
                    # member lags behind: then reading anew, which waits for it, costs little.)
                    raise Compacted(f"etcd is at a revision earlier than {floor}. Read anew.")
                events = [to_event(e) for e in answer.events if e.kv.mod_revision > after]
                if events:
                    after = events[-1].revision
                    yield events
        except NoAnswer as failure:
            if closed.is_set():
                return
            moving = True
            _log.info("watch_moves_on", key=keys[0].decode(), after=after, why=failure.why)
        except StoreRefused:
            refusals += 1
            if refusals >= _REFUSALS_MAX or not members.log_in_again():
                raise
        finally:
            await stream.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await closed.wait()
        pause_s = min(2 * pause_s, _PAUSE_S_MAX)


class _Stream:
    """A watch at one member. Its methods raise NoAnswer (another member is the current one then),
    Compacted, StoreRefused."""

    def __init__(self, members: Members, index: int, closed: asyncio.Event) -> None:
        self._members = members
        self._index = index
        self._closing = asyncio.ensure_future(closed.wait())
        self._reading: asyncio.Future[pb.WatchResponse] | None = None
        self._call: Call | None = None
        self._token: str | None = None

    async def open(self, key: bytes, range_end: bytes, first: int) -> None:
        self._call = await self._members.open_stream(self._index, WATCH)
        self._token = self._members.token
        create = pb.WatchCreateRequest(
            key=key, range_end=range_end, start_revision=first, fragment=True
        )
        await self._guard(self._send(pb.WatchRequest(create_request=create)))

    async def next(self) -> pb.WatchResponse | None:
        """The next answer, its fragments put together. None: `closed` was set."""
        parts: list[pb.Event] = []
        while (answer := await self._guard(self._answer())) is not None:
            if answer.canceled:
                raise self._cancelled(answer)
            parts.extend(answer.events)
            if not answer.fragment:
                return pb.WatchResponse(header=answer.header, events=parts)
        return None

    async def close(self) -> None:
        waiting: list[asyncio.Future[Any]] = [self._closing]
        if self._reading is not None:
            waiting.append(self._reading)
        for task in waiting:
            task.cancel()
        if self._call is not None:
            self._call.cancel()
        await asyncio.wait(waiting)

    async def _guard(self, work: Coroutine[None, None, T]) -> T | None:
        """Failures in our own terms; the end of the whole store is no failure."""
        try:
            return await work
        except grpc.aio.AioRpcError as error:
            raise self._members.failure(self._index, error, self._token) from error
        except NoAnswer:
            self._members.leave(self._index)
            raise
        except (asyncio.CancelledError, grpc.aio.UsageError):
            if not self._closing.done():
                raise
            return None

    async def _answer(self) -> pb.WatchResponse | None:
        """What the member says, with a question after each time of silence."""
        for unanswered in range(UNANSWERED_MAX + 1):
            if self._reading is None:
                self._reading = asyncio.ensure_future(self._read())
            either: list[asyncio.Future[Any]] = [self._reading, self._closing]
            await asyncio.wait(either, timeout=IDLE_S, return_when=asyncio.FIRST_COMPLETED)
            if self._closing.done():
                return None
            if self._reading.done():
                reading, self._reading = self._reading, None
                return reading.result()
            if unanswered < UNANSWERED_MAX:
                await self._send(pb.WatchRequest(progress_request=pb.WatchProgressRequest()))
        raise NoAnswer(f"silent for {(UNANSWERED_MAX + 1) * IDLE_S} s", maybe=False)

    def _open_call(self) -> Call:
        if self._call is None:
            raise InvariantError("a watch is opened before it is read")
        return self._call

    async def _read(self) -> pb.WatchResponse:
        answer = await self._open_call().read()
        if isinstance(answer, pb.WatchResponse):
            return answer
        raise NoAnswer("the member ended the watch", maybe=False)

    async def _send(self, request: pb.WatchRequest) -> None:
        try:
            async with asyncio.timeout(ATTEMPT_S):
                await self._open_call().write(request)
        except TimeoutError:
            raise NoAnswer("the member takes no requests", maybe=False) from None
        except asyncio.InvalidStateError as error:  # the call has ended meanwhile
            raise NoAnswer(f"the watch has ended: {error}", maybe=False) from None

    @staticmethod
    def _cancelled(answer: pb.WatchResponse) -> ShoalError | NoAnswer:
        if answer.compact_revision:
            return Compacted(
                f"etcd keeps changes after revision {answer.compact_revision} only. Read anew, "
                "then watch from there."
            )
        if "permission denied" in answer.cancel_reason:
            return StoreRefused(
                "etcd does not let this user watch the prefix. Grant it `readwrite` on it."
            )
        why = answer.cancel_reason or "no reason"
        return NoAnswer(f"the watch was cancelled: {why}", maybe=False)
