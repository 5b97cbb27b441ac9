"""LocalEncoder: text models in this process, behind one thread of their own.

    embed() ──▶ WaitingTexts ──▶ the thread: tokenize, plan, forward ──▶ the caller's future
               (bounded: Busy)   interactive texts go first between any two passes
                  └ the first text for a model ──▶ a second thread loads it; texts for others go on

The threads start, and a model is loaded, at the first text for it. It stays in memory then. While the
libraries are imported, for a few seconds, other threads of the process are slow.
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
    use_threads,
)
from shoal.encoder_api import (
    DEFAULT_MODEL,
    Embedding,
    ModelInfo,
    check_texts,
    closing,
    resolve_model,
    wrong_weights,
)
from shoal.errors import (
    Busy,
    InvariantError,
    NotSupported,
    SettingsError,
    ShoalError,
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
    """A model that can be asked for. The thread that loads writes what it is, the one that computes
    counts."""

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

    settings          encoder_model names models as `find_model` understands them. The bundled one is
                      always offered when its package is installed; without any, requests get
                      NotSupported.
    batch_tokens_max  padded tokens of one forward pass, and so how long a query may wait behind
                      bulk work: about 0.1 s. Larger passes were no faster.
    queue_texts_max   texts that wait before new requests are answered with Busy.
    Raises            SettingsError when a folder holds no model that can be used, and when two models
                      would have the same name.
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
        self._wake = threading.Condition()  # guards the eight below
        self._waiting = WaitingTexts(texts_max=queue_texts_max, bytes_max=QUEUE_BYTES_MAX)
        self._requests: dict[int, _Request] = {}
        self._prepares: list[tuple[str, Future[ModelInfo]]] = []
        self._to_load: deque[str] = deque()  # the first one is being loaded
        self._ready: set[str] = set()  # models that are loaded
        self._thread: threading.Thread | None = None
        self._loader: threading.Thread | None = None
        self._closing = False
        self._hashing = threading.Lock()  # a fingerprint is computed once
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
        await self._check_weights(name, fingerprint)
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
            self._load(name)
            self._start_thread()
            self._wake.notify()
        try:
            return await asyncio.wrap_future(request.future)
        except asyncio.CancelledError:
            self._abandon(request_id)
            raise

    async def prepare(self, model: str, fingerprint: str | None = None) -> ModelInfo:
        name = self._resolve(model)
        await self._check_weights(name, fingerprint)
        future: Future[ModelInfo] = Future()
        with self._wake:
            self._check_open()
            if self._entries[name].loaded is not None:
                return self._info(name)
            self._prepares.append((name, future))
            self._load(name)
        return await asyncio.wrap_future(future)

    async def fingerprint(self, model: str) -> str:
        """Of a model by its full name; reads its files the first time, and does not load it.
        Raises Unavailable when they are not there any more."""
        entry = self._entries[model]
        if entry.fingerprint is None:
            return await asyncio.to_thread(self._fingerprint, model)
        return entry.fingerprint

    def models(self) -> list[ModelInfo]:
        return [self._info(name) for name in sorted(self._entries)]

    async def describe(self) -> list[dict[str, Any]]:
        return []

    async def close(self) -> None:
        with self._wake:
            self._closing = True
            threads = [self._thread, self._loader]
            self._wake.notify()
        self._refuse_the_rest()
        for thread in threads:
            if thread is not None:
                await asyncio.to_thread(thread.join)

    # -- the caller's side ------------------------------------------------------------------------

    def _resolve(self, model: str) -> str:
        if not self._entries:
            raise NotSupported(
                "Texts cannot be embedded here: no model is installed; " + INSTALL_HINT
            )
        return resolve_model(model, {name: e.aliases for name, e in self._entries.items()})

    async def _check_weights(self, name: str, wanted: str | None) -> None:
        if wanted is not None and (own := await self.fingerprint(name)) != wanted:
            raise wrong_weights(name, wanted, own)

    def _fingerprint(self, name: str) -> str:
        """Of the files as they are; once the model is loaded, as they were."""
        entry = self._entries[name]
        with self._hashing:
            if entry.loaded is None and entry.folder.changed():
                entry.fingerprint = None
                entry.folder = _folder(entry)
            if entry.fingerprint is None:
                try:
                    entry.fingerprint = entry.folder.fingerprint()
                except OSError as error:
                    raise _gone(entry) from error
            return entry.fingerprint

    def _check_open(self) -> None:
        if self._closing:
            raise closing()

    def _load(self, name: str) -> None:
        """See to it that it is loaded, soon."""
        if self._entries[name].loaded is None and name not in self._to_load:
            self._to_load.append(name)
            if self._loader is None:
                self._loader = threading.Thread(
                    target=self._load_all, name="shoal-encoder-load", daemon=True
                )
                self._loader.start()

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
            # In turns, so that neither lane can keep the other waiting for more than one pass.
            if (window := self._take(Lane.INTERACTIVE)) is not None:
                for batch in self._plan(*window):
                    self._compute(batch)
            if not self._bulk and (window := self._take(Lane.BULK)) is not None:
                self._bulk.extend(self._plan(*window))
            if self._bulk:
                self._compute(self._bulk.popleft())

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False when the encoder closes."""
        with self._wake:
            while not (self._closing or self._bulk or self._waiting.any_for(self._ready)):
                self._wake.wait()
            return not self._closing

    def _take(self, lane: Lane) -> tuple[str, list[tuple[Slice, _Request]]] | None:
        with self._wake:
            taken = self._waiting.take(lane, WINDOW_TEXTS_MAX, self._ready)
            if taken is None:
                return None
            model, slices = taken
            return model, [(part, self._requests[part.request_id]) for part in slices]

    def _plan(self, model: str, parts: list[tuple[Slice, _Request]]) -> list[_Batch]:
        """Tokenize a window and cut it into forward passes. A failure fails its requests."""
        try:
            loaded = self._loaded(model)
            use_threads(self._settings.encoder_threads)
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
        loaded = self._entries[name].loaded
        if loaded is None:
            raise InvariantError(f"texts were taken for {name}, which is not loaded")
        return loaded

    # -- the thread that loads --------------------------------------------------------------------

    def _load_all(self) -> None:
        while True:
            with self._wake:
                if not self._to_load or self._closing:
                    self._loader = None
                    return
                name = self._to_load[0]
            failure: Exception | None = None
            try:
                self._load_one(name)
            except Exception as error:
                failure = error
            with self._wake:
                self._to_load.popleft()
                if failure is None:
                    self._ready.add(name)
                prepared = [future for model, future in self._prepares if model == name]
                self._prepares = [(m, future) for m, future in self._prepares if m != name]
                waiting = set(self._waiting.of(name)) if failure is not None else set()
                self._wake.notify()
            for future in prepared:
                if failure is None:
                    _answer(future, self._info(name))
                else:
                    _fail(future, failure)
            if failure is not None:
                self._fail_requests(waiting, failure)

    def _load_one(self, name: str) -> None:
        entry, started = self._entries[name], time.perf_counter()
        meant = (entry.fingerprint, entry.folder.dim)  # by requests that wait; None: whatever it is
        found = (self._fingerprint(name), entry.folder.dim)
        if meant not in (found, (None, found[1])):
            raise _replaced(name, entry)
        try:
            loaded = TextModel.load(
                entry.folder,
                precision=self._settings.encoder_precision,
                threads=self._settings.encoder_threads,
            )
        except SettingsError as error:  # found too late to stop the start
            raise NotSupported(error.message) from error
        if entry.folder.changed():
            raise _replaced(name, entry)
        entry.loaded = loaded
        _log.info(
            "model_loaded",
            model=name,
            precision=loaded.precision,
            threads=self._settings.encoder_threads,
            took_s=time.perf_counter() - started,
        )

    def _fail_requests(self, request_ids: set[int], error: Exception) -> None:
        if not isinstance(error, ShoalError):
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

    # -- the end ----------------------------------------------------------------------------------

    def _refuse_the_rest(self) -> None:
        with self._wake:
            self._waiting.drain()
            futures: list[Future[Embedding] | Future[ModelInfo]] = [
                request.future for request in self._requests.values()
            ]
            futures.extend(future for _, future in self._prepares)
            self._requests.clear()
            self._prepares.clear()
        for future in futures:
            _fail(future, Unavailable("The encoder closed before these texts were embedded."))


def _find_models(wanted: Sequence[str]) -> dict[str, _Entry]:
    """The bundled model, if its package is installed, and those of the setting encoder_model."""
    short_name = DEFAULT_MODEL.rpartition("/")[2]
    found: dict[str, _Entry] = {}
    bundled = bundled_model_path()
    if bundled is not None:
        found[DEFAULT_MODEL] = _Entry(ModelFolder.read(bundled), (short_name,))
    for one in wanted:
        if one.strip().lower() in (DEFAULT_MODEL, short_name):
            continue
        name, aliases, folder = find_model(one)
        names = {name, *aliases}
        for other, entry in found.items():
            if both := names & {other, *entry.aliases}:
                raise SettingsError(
                    f"encoder_model has two models of the name {min(both)}: in {entry.folder.path} and "
                    f"in {folder}. Give one of them another name, as in {folder.name}-2={folder}."
                )
        found[name] = _Entry(ModelFolder.read(folder), aliases)
    return found


def _folder(entry: _Entry) -> ModelFolder:
    """Its files, read anew."""
    try:
        return ModelFolder.read(entry.folder.path)
    except SettingsError as error:
        raise _gone(entry) from error


def _replaced(name: str, entry: _Entry) -> Unavailable:
    return Unavailable(
        f"The files of {name} in {entry.folder.path} were replaced just now; send the request again."
    )


def _gone(entry: _Entry) -> Unavailable:
    return Unavailable(
        f"The model in {entry.folder.path} is not there any more, or not in full: put it back, and send "
        "the request again."
    )


def _answer(future: Future[_T], value: _T) -> None:
    if future.set_running_or_notify_cancel():
        future.set_result(value)


def _fail(future: Future[Embedding] | Future[ModelInfo], error: Exception) -> None:
    if future.set_running_or_notify_cancel():
        future.set_exception(error)
