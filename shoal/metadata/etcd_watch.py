"""One watch over an etcd cluster that outlives its members.

    etcd       ─── events ──── events ───────────────────── (frozen: the connection stays open)
    we         ───────────────────────── "progress?" ─ "progress?" ─ next member, from `after`
                                idle 1.5 s           1.5 s          1.5 s

A frozen member never closes a connection, so silence is questioned. An answer proves only that the
member lives: before etcd 3.5.8 it could overtake events, so it never moves `after`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress

import grpc
import grpc.aio

from shoal.errors import ShoalError
from shoal.metadata import etcd_pb2 as pb
from shoal.metadata.contract import Compacted, Event, StoreRefused
from shoal.metadata.etcd_members import ATTEMPT_S, WATCH, Members, NoAnswer
from shoal.telemetry import logger

__all__ = ["watch_forever"]

IDLE_S = 1.5  # of silence before a progress request, and between one and the next
UNANSWERED_MAX = 2
_PAUSE_S_MIN, _PAUSE_S_MAX = 0.05, 1.0
_REFUSALS_MAX = 2  # a token that has just run out looks like a missing permission

_log = logger("metadata")

Call = grpc.aio.StreamStreamCall[pb.WatchRequest, pb.WatchResponse]


async def watch_forever(
    members: Members,
    key: bytes,
    range_end: bytes,
    after: int,
    closed: asyncio.Event,
    to_event: Callable[[pb.Event], Event],
) -> AsyncIterator[list[Event]]:
    """Whole revisions later than `after`, in order, none twice; goes on at another member whenever
    one fails. Ends when `closed` is set. Raises Compacted, StoreRefused."""
    cluster_id = members.cluster_id
    pause_s, refusals = _PAUSE_S_MIN, 0
    while not closed.is_set():
        index = members.current
        try:
            answers = _one_member(members, index, key, range_end, after + 1, closed)
            async with aclosing(answers):
                async for answer in answers:
                    pause_s, refusals = _PAUSE_S_MIN, 0
                    if answer.header.cluster_id != cluster_id:
                        members.cluster_id = answer.header.cluster_id
                        raise Compacted("etcd was restored from a backup. Read anew, then watch.")
                    events = [to_event(e) for e in answer.events if e.kv.mod_revision > after]
                    if events:
                        after = events[-1].revision
                        yield events
        except NoAnswer as failure:
            if closed.is_set():
                return
            _log.info("watch_moves_on", key=key.decode(), after=after, why=failure.why)
        except StoreRefused:
            refusals += 1
            if refusals >= _REFUSALS_MAX or not members.log_in_again():
                raise
        with suppress(TimeoutError):
            await asyncio.wait_for(closed.wait(), pause_s)
        pause_s = min(2 * pause_s, _PAUSE_S_MAX)


async def _one_member(
    members: Members, index: int, key: bytes, range_end: bytes, first: int, closed: asyncio.Event
) -> AsyncGenerator[pb.WatchResponse, None]:
    """Answers, with fragments put together. Ends when `closed` is set. Raises NoAnswer (another
    member is the current one then), Compacted, StoreRefused."""
    call: Call = await members.open_stream(index, WATCH)
    token = members.token
    create = pb.WatchCreateRequest(
        key=key, range_end=range_end, start_revision=first, fragment=True
    )
    parts: list[pb.Event] = []
    try:
        await _send(call, pb.WatchRequest(create_request=create))
        answers = _answers(call, closed)
        async with aclosing(answers):
            async for answer in answers:
                if answer.canceled:
                    raise _cancelled(answer)
                parts.extend(answer.events)
                if not answer.fragment:
                    whole = pb.WatchResponse(header=answer.header, events=parts)
                    parts = []
                    yield whole
    except grpc.aio.AioRpcError as error:
        raise members.failure(index, error, token) from error
    except NoAnswer:
        members.leave(index)
        raise
    except (asyncio.CancelledError, grpc.aio.UsageError):
        if not closed.is_set():
            raise
    finally:
        call.cancel()


async def _answers(call: Call, closed: asyncio.Event) -> AsyncGenerator[pb.WatchResponse, None]:
    """What the member says, with a question after each time of silence."""
    unanswered = 0
    closing = asyncio.ensure_future(closed.wait())
    reading = asyncio.ensure_future(_read(call))
    try:
        while True:
            await asyncio.wait(
                [reading, closing], timeout=IDLE_S, return_when=asyncio.FIRST_COMPLETED
            )
            if closing.done():
                return
            if reading.done():
                answer, unanswered = reading.result(), 0
                yield answer
                reading = asyncio.ensure_future(_read(call))
            elif unanswered < UNANSWERED_MAX:
                unanswered += 1
                await _send(call, pb.WatchRequest(progress_request=pb.WatchProgressRequest()))
            else:
                raise NoAnswer(f"silent for {(unanswered + 1) * IDLE_S} s", maybe=False)
    finally:
        closing.cancel()
        reading.cancel()
        await asyncio.wait([closing, reading])


async def _read(call: Call) -> pb.WatchResponse:
    answer = await call.read()
    if isinstance(answer, pb.WatchResponse):
        return answer
    raise NoAnswer("the member ended the watch", maybe=False)


async def _send(call: Call, request: pb.WatchRequest) -> None:
    try:
        async with asyncio.timeout(ATTEMPT_S):
            await call.write(request)
    except TimeoutError:
        raise NoAnswer("the member takes no requests", maybe=False) from None
    except asyncio.InvalidStateError as error:  # the call has ended meanwhile
        raise NoAnswer(f"the watch has ended: {error}", maybe=False) from None


def _cancelled(answer: pb.WatchResponse) -> ShoalError | NoAnswer:
    if answer.compact_revision:
        return Compacted(
            f"etcd keeps changes after revision {answer.compact_revision} only. Read anew, then "
            "watch from there."
        )
    if "permission denied" in answer.cancel_reason:
        return StoreRefused("etcd does not let this user watch the prefix. Grant it `readwrite`.")
    return NoAnswer(f"the watch was cancelled: {answer.cancel_reason or 'no reason'}", maybe=False)
