"""LocalEncoder: text models in this process, behind one thread of their own.

    embed() ──▶ WaitingTexts ──▶ the thread: tokenize, plan, forward ──▶ the caller's future
               (bounded: Busy)   interactive texts go first between any two passes

The thread starts, and a model is loaded, at the first text. torch must be told its number of
threads in the thread that computes (OpenMP keeps it per thread), so everything of torch happens
there. While the libraries are imported, for a few seconds, other threads of the process are slow.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from encoder.batching import Lane, Slice, WaitingTexts, plan_batches
from encoder.model import (
    INSTALL_HINT,
    ModelFolder,
    TextModel,
    TokenizedText,
    bundled_model_path,
    find_model,
)
from shoal.encoder_api import (
    DEFAULT_MODEL,
    Embedding,
    ModelInfo,
    check_texts,
    resolve_model,
    wrong_weights,
)
from shoal.errors import (
    Busy,
    InvariantError,
    NotSupported,
    SettingsError,
    Unavailable,
)
from shoal.limits import MIB, TEXTS_PER_REQUEST_MAX
from shoal.settings import EncoderSettings
from shoal.telemetry import logger

__all__ = ["LocalEncoder"]

BATCH_TOKENS_MAX = 1_024
BATCH_ROWS_MAX = 128
WINDOW_TEXTS_MAX = 256  # tokenized and sorted by length together
QUEUE_TEXTS_MAX = 4 * TEXTS_PER_REQUEST_MAX
QUEUE_BYTES_MAX = 64 * MIB
RETRY_AFTER_S_MAX = 60.0

_T = TypeVar("_T")

_log = logger("encoder")


@dataclass(slots=True)
class _Entry:
    """A model that can be asked for. Only the thread writes, except for `folder`'s first value."""

    folder: ModelFolder
    aliases: tuple[str, ...]
    loaded: TextModel | None = None
    fingerprint: str | None = None
    texts_total: int = 0
    truncated_total: int = 0
    busy_s_total: float = 0.0


@dataclass(slots=True)
class _Request:
    """Texts on their way; the arrays fill up in any order."""

    texts: Sequence[str]
    future: Future[Embedding]
    vectors: NDArray[np.float32]
    tokens: NDArray[np.int32]
    truncated: NDArray[np.bool_]
    remaining: int = field(init=False)

    def __post_init__(self) -> None:
        self.remaining = len(self.texts)


@dataclass(frozen=True, slots=True)
class _Row:
    request_id: int
    position: int
    text: TokenizedText


@dataclass(frozen=True, slots=True)
class _Batch:
    model: str
    rows: list[_Row]


class LocalEncoder:
    """Implements `shoal.encoder_api.Encoder`.

    settings          encoder_model names the bundled all-MiniLM-L6-v2 or a folder on disk, whose
                      name (in lower case) is then the model's. The bundled one is always offered
                      when its package is installed; if it is not, requests get NotSupported.
    batch_tokens_max  padded tokens of one forward pass, and so how long a query may wait behind
                      bulk work: about 0.1 s. Larger passes were no faster.
    queue_texts_max   texts that wait before new requests are answered with Busy.
    Raises            SettingsError when that folder holds no model that can be used.
    """

    def __init__(
        self,
        settings: EncoderSettings,
        *,
        batch_tokens_max: int = BATCH_TOKENS_MAX,
        queue_texts_max: int = QUEUE_TEXTS_MAX,
    ) -> None:
        self._settings = settings
        self._batch_tokens_max = batch_tokens_max
        self._entries = _find_models(settings.encoder_model)
        self._wake = threading.Condition()  # guards the five below
        self._waiting = WaitingTexts(texts_max=queue_texts_max, bytes_max=QUEUE_BYTES_MAX)
        self._requests: dict[int, _Request] = {}
        self._loads: deque[tuple[str, Future[ModelInfo]]] = deque()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._ids = itertools.count(1)
        self._bulk: deque[_Batch] = deque()  # tokenized, not yet computed; the thread's own
        self._seconds_per_text = 0.005  # smoothed; for retry_after_s

    # -- the Encoder contract ---------------------------------------------------------------------

    async def embed(self, texts: Sequence[str], model: str) -> NDArray[np.float32]:
        return (await self.encode(texts, model)).vectors

    async def encode(
        self, texts: Sequence[str], model: str, fingerprint: str | None = None
    ) -> Embedding:
        name = self._resolve(model)
        if fingerprint is not None:
            own = self._entries[name].fingerprint or (await self.prepare(name)).fingerprint
            if own != fingerprint:
                raise wrong_weights(name, fingerprint, own)
        byte_count = check_texts(texts)
        dim, n = self._entries[name].folder.dim, len(texts)
        request = _Request(
            texts=texts,
            future=Future(),
            vectors=np.empty((n, dim), np.float32),
            tokens=np.empty(n, np.int32),
            truncated=np.empty(n, np.bool_),
        )
        if n == 0:
            return self._embedding(name, request)
        request_id = next(self._ids)
        with self._wake:
            self._check_open()
            if not self._waiting.offer(request_id, name, n, byte_count):
                raise self._busy()
            self._requests[request_id] = request
            self._start_thread()
            self._wake.notify()
        try:
            return await asyncio.wrap_future(request.future)
        except asyncio.CancelledError:
            self._abandon(request_id)
            raise

    async def prepare(self, model: str) -> ModelInfo:
        name = self._resolve(model)
        future: Future[ModelInfo] = Future()
        with self._wake:
            self._check_open()
            self._loads.append((name, future))
            self._start_thread()
            self._wake.notify()
        return await asyncio.wrap_future(future)

    def models(self) -> list[ModelInfo]:
        return [self._info(name) for name in sorted(self._entries)]

    async def describe(self) -> list[dict[str, Any]]:
        return []

    async def close(self) -> None:
        with self._wake:
            self._closing = True
            thread, self._thread = self._thread, None
            self._wake.notify()
        if thread is not None:
            await asyncio.to_thread(thread.join)

    # -- the caller's side ------------------------------------------------------------------------

    def _resolve(self, model: str) -> str:
        if not self._entries:
            raise NotSupported(
                "Texts cannot be embedded here: no model is installed; " + INSTALL_HINT
            )
        return resolve_model(model, {name: e.aliases for name, e in self._entries.items()})

    def _check_open(self) -> None:
        if self._closing:
            raise Unavailable("The encoder is closing; send the request again in a moment.")

    def _start_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="shoal-encoder", daemon=True)
            self._thread.start()

    def _busy(self) -> Busy:
        waiting = self._waiting.text_count
        return Busy(
            f"{waiting} texts already wait to be embedded; send these again in a moment",
            retry_after_s=min(RETRY_AFTER_S_MAX, max(1.0, waiting * self._seconds_per_text)),
        )

    def _abandon(self, request_id: int) -> None:
        with self._wake:
            self._waiting.forget(request_id)
            self._requests.pop(request_id, None)

    def _info(self, name: str) -> ModelInfo:
        entry = self._entries[name]
        return ModelInfo(
            name=name,
            dim=entry.folder.dim,
            max_tokens=entry.folder.max_tokens,
            fingerprint=entry.fingerprint,
            aliases=entry.aliases,
            loaded=entry.loaded is not None,
            precision=entry.loaded.precision if entry.loaded else None,
            texts_total=entry.texts_total,
            truncated_total=entry.truncated_total,
            busy_s_total=entry.busy_s_total,
        )

    # -- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._wait_for_work():
            self._answer_loads()
            # In turns, so that neither lane can keep the other waiting for more than one pass.
            if (window := self._take(Lane.INTERACTIVE)) is not None:
                for batch in self._plan(*window):
                    self._compute(batch)
            if not self._bulk and (window := self._take(Lane.BULK)) is not None:
                self._bulk.extend(self._plan(*window))
            if self._bulk:
                self._compute(self._bulk.popleft())
        self._refuse_the_rest()

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False when the encoder closes."""
        with self._wake:
            while not (self._closing or self._loads or len(self._waiting) or self._bulk):
                self._wake.wait()
            return not self._closing

    def _answer_loads(self) -> None:
        while self._loads:
            name, future = self._loads.popleft()
            try:
                self._loaded(name)
            except Exception as error:
                _fail(future, error)
            else:
                _answer(future, self._info(name))

    def _take(self, lane: Lane) -> tuple[str, list[tuple[Slice, _Request]]] | None:
        with self._wake:
            taken = self._waiting.take(lane, WINDOW_TEXTS_MAX)
            if taken is None:
                return None
            model, slices = taken
            return model, [(part, self._requests[part.request_id]) for part in slices]

    def _plan(self, model: str, parts: list[tuple[Slice, _Request]]) -> list[_Batch]:
        """Tokenize a window and cut it into forward passes. A failure fails its requests."""
        try:
            loaded = self._loaded(model)
            started = time.perf_counter()
            tokenized = loaded.tokenize(
                [text for part, request in parts for text in request.texts[part.start : part.stop]]
            )
            self._entries[model].busy_s_total += time.perf_counter() - started
        except Exception as error:
            self._fail_requests({part.request_id for part, _ in parts}, error)
            return []
        places = ((p.request_id, at) for p, _ in parts for at in range(p.start, p.stop))
        rows = [_Row(*place, text) for place, text in zip(places, tokenized, strict=True)]
        return [
            _Batch(model, [rows[position] for position in batch])
            for batch in plan_batches(
                [len(row.text.token_ids) for row in rows],
                tokens_max=self._batch_tokens_max,
                rows_max=BATCH_ROWS_MAX,
            )
        ]

    def _compute(self, batch: _Batch) -> None:
        with self._wake:  # somebody may have gone away since this was planned
            rows = [row for row in batch.rows if row.request_id in self._requests]
        if not rows:
            return
        started = time.perf_counter()
        try:
            vectors = self._loaded(batch.model).forward([row.text.token_ids for row in rows])
        except Exception as error:
            self._fail_requests({row.request_id for row in rows}, error)
            return
        took = time.perf_counter() - started
        self._seconds_per_text += 0.1 * (took / len(rows) - self._seconds_per_text)
        entry = self._entries[batch.model]
        entry.busy_s_total += took
        entry.texts_total += len(rows)
        entry.truncated_total += sum(row.text.truncated for row in rows)
        for row, vector in zip(rows, vectors, strict=True):
            self._fill(row, vector, batch.model)

    def _fill(self, row: _Row, vector: NDArray[np.float32], model: str) -> None:
        request = self._requests.get(row.request_id)
        if request is None:
            return
        request.vectors[row.position] = vector
        request.tokens[row.position] = len(row.text.token_ids)
        request.truncated[row.position] = row.text.truncated
        request.remaining -= 1
        if request.remaining == 0:
            with self._wake:
                self._requests.pop(row.request_id, None)
            _answer(request.future, self._embedding(model, request))

    def _embedding(self, model: str, request: _Request) -> Embedding:
        return Embedding(
            request.vectors, request.tokens, request.truncated, self._entries[model].fingerprint
        )

    def _loaded(self, name: str) -> TextModel:
        entry = self._entries[name]
        if entry.loaded is None:
            started = time.perf_counter()
            try:
                entry.loaded = TextModel.load(
                    entry.folder,
                    precision=self._settings.encoder_precision,
                    threads=self._settings.encoder_threads,
                )
                entry.fingerprint = entry.folder.fingerprint()
            except SettingsError as error:  # found too late to stop the start
                raise NotSupported(error.message) from error
            _log.info(
                "model_loaded",
                model=name,
                precision=entry.loaded.precision,
                threads=self._settings.encoder_threads,
                took_s=time.perf_counter() - started,
            )
        return entry.loaded

    def _fail_requests(self, request_ids: set[int], error: Exception) -> None:
        if not isinstance(error, NotSupported):
            _log.error("embedding_failed", error=error)
            wrapped = InvariantError(f"The text encoder failed: {error}")
            wrapped.__cause__ = error
            error = wrapped
        for request_id in sorted(request_ids):
            with self._wake:
                self._waiting.forget(request_id)
                request = self._requests.pop(request_id, None)
            if request is not None:
                _fail(request.future, error)

    def _refuse_the_rest(self) -> None:
        with self._wake:
            self._waiting.drain()
            self._bulk.clear()
            futures: list[Future[Embedding] | Future[ModelInfo]] = [
                request.future for request in self._requests.values()
            ]
            futures.extend(future for _, future in self._loads)
            self._requests.clear()
            self._loads.clear()
        for future in futures:
            _fail(future, Unavailable("The encoder closed before these texts were embedded."))


def _find_models(wanted: str) -> dict[str, _Entry]:
    """The bundled model, if its package is installed, and the one of the setting encoder_model."""
    short_name = DEFAULT_MODEL.rpartition("/")[2]
    entries: dict[str, _Entry] = {}
    bundled = bundled_model_path()
    if bundled is not None:
        entries[DEFAULT_MODEL] = _Entry(ModelFolder.read(bundled), (short_name,))
    if wanted.strip().lower() in (DEFAULT_MODEL, short_name):
        return entries
    name, aliases, folder = find_model(wanted)
    entries[name] = _Entry(ModelFolder.read(folder), aliases)
    return entries


def _answer(future: Future[_T], value: _T) -> None:
    if future.set_running_or_notify_cancel():
        future.set_result(value)


def _fail(future: Future[Embedding] | Future[ModelInfo], error: Exception) -> None:
    if future.set_running_or_notify_cancel():
        future.set_exception(error)
