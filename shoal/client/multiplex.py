"""Many requests at once over one gRPC stream: the client's side of coordinator/grpc_stream.py.

    ask ──▶ waiting ──▶ sender: all that waits in one message ──▶ server
     ▲                                                              │
     └── the answer with its tag ◀────────── receiver ◀─────────────┘

A stream that breaks takes what was asked with it: each caller gets an error that says whether its
request can have happened. What was never sent has not. What was sent has not either when the server
itself said why it ended the stream, because it answers what it has begun first.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import grpc
import grpc.aio

from shoal.api.grpc_status import DETAILS_KEY, error_of, error_of_status, unpack_details
from shoal.errors import ShoalError, TimedOut, Unavailable

__all__ = ["Multiplex", "error_of_call"]

Answer = TypeVar("Answer")
# A reply: tag, and the answer or what is wrong.
Reply = tuple[int, Any]


def error_of_call(error: grpc.aio.AioRpcError, *, may_have_happened: bool) -> ShoalError:
    """What a call that failed raises here."""
    raw = next(
        (value for key, value in error.trailing_metadata() or () if key == DETAILS_KEY), None
    )
    detail = (
        None if raw is None else unpack_details(raw if isinstance(raw, bytes) else raw.encode())
    )
    return error_of_status(
        error.code(), error.details() or "", detail, may_have_happened=may_have_happened
    )


class Multiplex(Generic[Answer]):
    """One stream, open until it breaks or is closed. Use it on one event loop.

    call      the gRPC stream, just opened.
    pack      (tag, request, timeout in ms) of each request that waits -> messages.
    replies   a message -> (tag, answer, None) or (tag, None, detail) of each item in it.
    """

    def __init__(
        self,
        call: grpc.aio.StreamStreamCall[Any, Any],
        pack: Callable[[Sequence[tuple[int, Any, int]]], Iterable[Any]],
        replies: Callable[[Any], Iterable[tuple[int, Answer | None, Any]]],
        *,
        writes: bool,
    ) -> None:
        self._call, self._pack, self._replies, self._writes = call, pack, replies, writes
        self._next_tag = 1
        self._waiting: list[tuple[int, Any, int]] = []  # not sent yet
        self._asked: dict[int, asyncio.Future[Answer]] = {}
        self._wake = asyncio.Event()
        self._broken: ShoalError | None = None
        self._sender = asyncio.create_task(self._send(), name="shoal stream out")
        self._receiver = asyncio.create_task(self._receive(), name="shoal stream in")

    @property
    def usable(self) -> bool:
        return self._broken is None

    async def ask(self, request: Any, timeout_s: float) -> Answer:
        """Raises the error of the request, Unavailable when the stream breaks, TimedOut."""
        if self._broken is not None:
            raise Unavailable(self._broken.message)
        tag, self._next_tag = self._next_tag, self._next_tag + 1
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._asked[tag] = future
        self._waiting.append((tag, request, max(1, int(timeout_s * 1_000))))
        self._wake.set()
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            error = TimedOut(f"Timeout: no answer within {timeout_s:g} s")
            error.maybe_applied = self._writes and not self._is_waiting(tag)
            raise error from None
        finally:
            del self._asked[tag]

    async def close(self) -> None:
        self._break(Unavailable("the client was closed"), happened=self._writes)
        self._call.cancel()
        self._receiver.cancel()
        await asyncio.gather(self._sender, self._receiver, return_exceptions=True)

    # -- inside -----------------------------------------------------------------------------------
    def _is_waiting(self, tag: int) -> bool:
        return any(waiting[0] == tag for waiting in self._waiting)

    async def _send(self) -> None:
        # the stream has ended when a write fails: the receiver learns why
        with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
            # A write into a stream that the server has refused hides the reason (grpc.aio makes it
            # INTERNAL). The server sends its metadata as soon as it has let us in.
            await self._call.initial_metadata()
            while not self._call.done():
                if not self._waiting:
                    self._wake.clear()
                    await self._wake.wait()
                # who gave up meanwhile need not be asked for
                batch = [item for item in self._waiting if item[0] in self._asked]
                self._waiting = []
                for message in self._pack(batch):
                    await self._call.write(message)

    async def _receive(self) -> None:
        happened = self._writes
        error: ShoalError = Unavailable("the server ended the stream")
        try:
            async for message in self._call:
                for tag, answer, detail in self._replies(message):
                    future = self._asked.get(tag)
                    if future is None or future.done():
                        continue  # its caller has given up
                    if detail is None:
                        future.set_result(answer)  # type: ignore[arg-type]
                    else:
                        future.set_exception(error_of(detail))
        except grpc.aio.AioRpcError as failed:
            error = error_of_call(failed, may_have_happened=self._writes)
            happened = error.maybe_applied
        finally:
            self._break(error, happened=happened)

    def _break(self, error: ShoalError, *, happened: bool) -> None:
        if self._broken is not None:
            return
        self._broken = error
        self._sender.cancel()
        unsent = {tag for tag, _, _ in self._waiting}
        for tag, future in self._asked.items():
            if not future.done():
                own = type(error)(error.message)
                own.maybe_applied = happened and tag not in unsent
                future.set_exception(own)
