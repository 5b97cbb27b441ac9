"""The first process of a rank group between its callers and the model: a queue and one thread.

    submit ──▶ TokenQueue ──▶ the thread: pad, forward over all ranks ──▶ the caller's future
              (bounded: Busy)      out of memory: the batch in two halves, each on its own

Everything of torch happens in that thread, collectives above all: their order must be one.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from encoder.batching import Lane, Row, TokenQueue, halves
from shoal.errors import Busy, InvariantError, ShoalError
from shoal.telemetry import logger

__all__ = ["Engine", "Forward", "OutOfMemory"]

BATCH_ROWS_MAX = 128
IDLE_S = 2.0  # between heartbeats to processes that wait for work
RETRY_AFTER_S_MAX = 60.0
TELLING_TOKENS_MIN = 256  # a smaller batch says little of what a token costs
WAIT_S_MAX = (
    30.0  # what is expected to wait longer is refused: its caller would not wait for the answer
)

_log = logger("encoder")


class OutOfMemory(Exception):
    """A batch did not fit. Every process of the group knows, and all are ready for the next one."""


class Forward(Protocol):
    """The model, over however many processes. Called by one thread."""

    def forward(self, token_ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """(n, dim) float32 of length 1. Raises OutOfMemory."""
        ...

    def idle(self) -> None:
        """Nothing was asked for IDLE_S."""
        ...


@dataclass(slots=True)
class _Request:
    future: Future[NDArray[np.float32]]
    vectors: NDArray[np.float32]
    remaining: int = field(init=False)

    def __post_init__(self) -> None:
        self.remaining = len(self.vectors)


class Engine:
    """Starts its thread at once. `broken` is called, in the thread, with what ended it."""

    def __init__(
        self,
        model: Forward,
        *,
        dim: int,
        batch_tokens_max: int,
        queue_tokens_max: int,
        broken: Callable[[Exception], None],
    ) -> None:
        self._model, self._dim, self._broken = model, dim, broken
        self._batch_tokens_max = batch_tokens_max
        self._wake = threading.Condition()  # guards the four below
        self._queue = TokenQueue(tokens_max=queue_tokens_max)
        self._requests: dict[int, _Request] = {}
        self._closing = False
        self._failure: ShoalError | None = None
        self._ids = itertools.count(1)
        self._seconds_per_token = 0.0003  # smoothed
        self.texts_total = self.batches_total = self.splits_total = 0
        self.busy_s_total = 0.0
        self._thread = threading.Thread(target=self._run, name="encoder-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> tuple[int, int]:
        """Texts and tokens that wait."""
        return len(self._queue), self._queue.tokens

    def submit(
        self, token_ids: Sequence[Sequence[int]], lane: Lane
    ) -> tuple[int, Future[NDArray[np.float32]]]:
        """At least one text. The number names the request for `forget`. Raises Busy, and Unavailable
        once the group is broken."""
        number = next(self._ids)
        vectors = np.empty((len(token_ids), self._dim), np.float32)
        request = _Request(Future(), vectors)
        rows = [Row(number, place, ids) for place, ids in enumerate(token_ids)]
        with self._wake:
            self._check_open()
            if self._is_late(lane) or not self._queue.offer(rows, lane):
                raise self._busy()
            self._requests[number] = request
            self._wake.notify()
        return number, request.future

    def check_room(self, tokens: int, lane: Lane) -> None:
        """Raises what `submit` would for so many tokens, before they are cut out of texts."""
        with self._wake:
            self._check_open()
            if self._is_late(lane) or not self._queue.has_room(tokens, lane):
                raise self._busy()

    def _check_open(self) -> None:
        if self._failure is not None:
            raise type(self._failure)(self._failure.message)

    def _is_late(self, lane: Lane) -> bool:
        """Queries take turns with imports, so that an import waits for both."""
        tokens = self._queue.tokens_in(lane) * (2 if lane is Lane.INTERACTIVE else 1)
        if lane is Lane.BULK:
            tokens += self._queue.tokens_in(Lane.INTERACTIVE)
        return tokens * self._seconds_per_token > WAIT_S_MAX

    def _busy(self) -> Busy:
        texts, tokens = self.waiting
        return Busy(
            f"{texts} texts with {tokens} tokens already wait for this encoder; send these again in "
            "a moment",
            retry_after_s=min(RETRY_AFTER_S_MAX, max(1.0, tokens * self._seconds_per_token)),
        )

    def forget(self, number: int) -> None:
        """Nobody waits for it any more."""
        with self._wake:
            self._queue.forget(number)
            self._requests.pop(number, None)

    def fail(self, error: ShoalError) -> None:
        """The group is over: whoever waits gets `error`, and whoever comes later. Any thread."""
        with self._wake:
            if self._failure is not None:
                return
            self._failure = error
            futures = [request.future for request in self._requests.values()]
            self._requests.clear()
            self._queue.clear()
            self._closing = True
            self._wake.notify()
        for future in futures:
            if future.set_running_or_notify_cancel():
                future.set_exception(type(error)(error.message))

    def close(self, error: ShoalError) -> None:
        """As `fail`, and wait for the thread."""
        self.fail(error)
        self._thread.join()

    # -- the thread -------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            while (rows := self._next()) is not None:
                if rows:
                    self._compute(rows)
                else:
                    self._model.idle()
        except Exception as error:
            _log.error("engine_failed", error=error)
            self._broken(error)

    def _next(self) -> list[Row] | None:
        """The next batch; [] when nothing came for IDLE_S; None at the end."""
        with self._wake:
            if not (self._closing or len(self._queue)):
                self._wake.wait(IDLE_S)
            if self._closing:
                return None
            return self._queue.take(tokens_max=self._batch_tokens_max, rows_max=BATCH_ROWS_MAX)

    def _compute(self, rows: list[Row]) -> None:
        started = time.perf_counter()
        try:
            vectors = self._model.forward([row.token_ids for row in rows])
        except OutOfMemory as error:
            self._split(rows, error)
            return
        took = time.perf_counter() - started
        tokens = sum(len(row.token_ids) for row in rows)
        if tokens >= TELLING_TOKENS_MIN:
            self._seconds_per_token += 0.1 * (took / tokens - self._seconds_per_token)
        self.busy_s_total += took
        self.batches_total += 1
        self.texts_total += len(rows)
        with self._wake:
            done = [self._fill(row, vector) for row, vector in zip(rows, vectors, strict=True)]
        for request in done:
            if request is not None and request.future.set_running_or_notify_cancel():
                request.future.set_result(request.vectors)

    def _split(self, rows: list[Row], error: OutOfMemory) -> None:
        self.splits_total += 1
        tokens = len(rows) * max(len(row.token_ids) for row in rows)
        _log.warning("batch_split", texts=len(rows), tokens=tokens)
        if len(rows) == 1:
            self._fail_one(rows[0].request_id, tokens, error)
            return
        # What was too much now will be so again: later batches are smaller from the start.
        self._batch_tokens_max = max(256, min(self._batch_tokens_max, tokens // 2))
        for half in halves(rows):
            self._compute(half)

    def _fail_one(self, request_id: int, tokens: int, error: OutOfMemory) -> None:
        with self._wake:
            self._queue.forget(request_id)
            request = self._requests.pop(request_id, None)
        if request is not None and request.future.set_running_or_notify_cancel():
            wrapped = InvariantError(
                f"A single text of {tokens} tokens does not fit in the memory of this encoder: "
                "serve the model with a larger --tp"
            )
            wrapped.__cause__ = error
            request.future.set_exception(wrapped)

    def _fill(self, row: Row, vector: NDArray[np.float32]) -> _Request | None:
        """The request, when this was its last text."""
        request = self._requests.get(row.request_id)
        if request is None:
            return None
        request.vectors[row.position] = vector
        request.remaining -= 1
        if request.remaining:
            return None
        return self._requests.pop(row.request_id)
