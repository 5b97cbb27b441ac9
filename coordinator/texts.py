"""Texts that stand for vectors: which model they are for, and their embedding, in queries and writes.

    write ── texts? ──▶ vectors of the given model ──▶ a second generation? vectors of the other, too

The second is best effort: what cannot be embedded now is left out, and the background copy of the
migration (coordinator/migration.py) brings it. Only the generation that the vector's name means may
not be missing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordinator.binding import check_declared, check_text
from coordinator.catalog import Collection
from coordinator.generations import (
    Pair,
    Stored,
    check_searchable,
    for_text,
    others_declared,
    texts_for_second,
)
from coordinator.parse import PendingText, PointsWrite
from shoal.batch import DenseBlock, PointBatch
from shoal.encoder_api import DEFAULT_MODEL, Embedding, Encoder, ModelInfo, wrong_weights
from shoal.errors import BadRequest, NotSupported, ShoalError, Unavailable
from shoal.ids import format_id
from shoal.limits import SECOND_TEXTS_MAX, SECOND_WAIT_PER_TEXT_S, SECOND_WAIT_S
from shoal.metadata.schema import BoundModel
from shoal.telemetry import logger
from shoal.vectors import prepare_rows

__all__ = ["Texts", "Truncated", "count_truncated", "second_block"]

_log = logger("texts")


@dataclass(slots=True)
class Truncated:
    """How many texts of a request were longer than their model reads."""

    count: int = 0


# Of the request at hand; the tasks that it starts count into the same.
_truncated: ContextVar[Truncated | None] = ContextVar("truncated", default=None)


def count_truncated() -> Truncated:
    """Count anew from here on, in this task and those that it starts."""
    counted = Truncated()
    _truncated.set(counted)
    return counted


class Texts:
    """The encoder, as requests to collections use it.

    first_seen  told a collection, a vector and the fingerprint of the first weights that made one;
                answers with what the vector is bound to by then.
    """

    def __init__(
        self,
        encoder: Encoder | None,
        first_seen: Callable[[str, str, str], Awaitable[BoundModel | None]],
    ) -> None:
        self._encoder = encoder
        self._first_seen = first_seen

    def models(self) -> list[ModelInfo]:
        return [] if self._encoder is None else self._encoder.models()

    async def encode(
        self, texts: Sequence[str], model: str, fingerprint: str | None = None
    ) -> Embedding:
        """(n, dim) vectors of length 1, and what was read of each text. fingerprint: of the only
        weights to use. Raises NotSupported when there is no encoder."""
        embedded = await self._there().encode(texts, model, fingerprint)
        if (counted := _truncated.get()) is not None:
            counted.count += int(embedded.truncated.sum())
        return embedded

    async def prepare(self, model: str, fingerprint: str | None = None) -> ModelInfo:
        """Load the model, if need be, and say what it is. Errors as of `encode`."""
        return await self._there().prepare(model, fingerprint)

    def _there(self) -> Encoder:
        if self._encoder is None:
            raise NotSupported(
                "Wrong input: this server has no encoder, so texts cannot become vectors: send "
                "vectors, or start it with the encoder"
            )
        return self._encoder

    # -- numbers that say whose they are ----------------------------------------------------------
    def numbers_of(self, collection: Collection, declared: str | None) -> Collection:
        """As a request sees it whose vectors are of the model `declared`, a name or a fingerprint: a
        vector that is of two models at the moment means that one."""
        if not declared or not collection.pairs:
            return collection
        others = others_declared(collection.pairs, declared, self.models())
        return collection.with_others(others)

    def check_numbers(
        self,
        seen: Collection,
        declared: str | None,
        vectors: Iterable[str],
        *,
        reading: bool = False,
    ) -> None:
        """seen: by `numbers_of`. Raises BadRequest for a vector that is bound to another model, and one
        that may not be read yet."""
        if not declared or not seen.record.models:
            return
        bound = {name: model for name in vectors if (model := seen.model_of(name)) is not None}
        check_declared(bound, bound, declared, self.models())
        if reading:
            for name in bound:
                check_searchable(seen.pairs.get(name), name)

    # -- queries ----------------------------------------------------------------------------------
    def seen_by(self, collection: Collection, vector: str, model: str) -> Collection:
        """The collection in which `vector` means the generation that a query text for `model` asks
        for. Raises BadRequest when the vector is of another model."""
        pair = collection.pairs.get(vector)
        if pair is not None:
            second = for_text(pair, vector, model, self.models(), reading=True)
            return collection.with_others([vector] if second else [])
        if model:
            check_text(collection.record.models.get(vector), vector, model, self.models())
        return collection

    async def query_vector(
        self, collection: Collection, vector: str, text: str, model: str
    ) -> NDArray[np.float32]:
        """(dim,) to search with, of the model that `seen_by` decided on."""
        embedded: NDArray[np.float32] = (await self._embed(collection, vector, [text], model))[0]
        return embedded

    async def _embed(
        self, collection: Collection, vector: str, texts: Sequence[str], model: str
    ) -> NDArray[np.float32]:
        """By the model that the vector is bound to; if it is not by `model`, or the default one."""
        bound = collection.model_of(vector)
        if bound is None:
            return (await self.encode(texts, model or DEFAULT_MODEL)).vectors
        embedded = await self.encode(texts, bound.model, bound.fingerprint)
        if bound.fingerprint is None and embedded.fingerprint is not None:
            known = await self._first_seen(collection.name, vector, embedded.fingerprint)
            first = None if known is None or known.model != bound.model else known.fingerprint
            if first not in (None, embedded.fingerprint):  # another coordinator's, of other weights
                raise wrong_weights(bound.model, str(first), embedded.fingerprint)
        return embedded.vectors

    # -- writes -----------------------------------------------------------------------------------
    async def fill(self, collection: Collection, write: PointsWrite) -> None:
        """Put vectors into the rows that wait for a text, one call per model and vector. Raises
        BadRequest for a text of a model that the vector is not of."""
        for model, name in sorted({(text.model, text.name) for text in write.texts}):
            waiting = [text for text in write.texts if (text.model, text.name) == (model, name)]
            pair = collection.pairs.get(name)
            if pair is None:
                self.seen_by(collection, name, model)
            else:
                for_text(pair, name, model, self.models(), reading=False)
            given = [text.text for text in waiting]
            try:
                vectors = await self._embed(collection, name, given, model)
            except ShoalError as error:
                if (
                    pair is None
                    or pair.given.number == pair.current
                    or isinstance(error, BadRequest)
                ):
                    raise
                _left_out(collection, pair.given, error.message)
                _take_out(write.points.dense[name], [text.row for text in waiting])
                continue
            _put(write.points.dense[name], collection, waiting, vectors)

    async def add_second(self, collection: Collection, write: PointsWrite) -> None:
        """Give the blocks of migrated vectors their stored names and add those of the second
        generations."""
        points = write.points
        for name, pair in collection.pairs.items():
            if name not in points.dense:
                continue
            second = pair.second
            added = None if second is None else await self._second(collection, write, name, pair)
            points.dense[pair.given.name] = points.dense.pop(name)
            if second is not None and added is not None:
                points.dense[second.name] = added

    async def _second(
        self, collection: Collection, write: PointsWrite, name: str, pair: Pair
    ) -> DenseBlock | None:
        second = pair.second
        assert second is not None
        points, needed = write.points, second.number == pair.current
        limit = len(points) if needed else SECOND_TEXTS_MAX
        chosen = texts_for_second(points, name, pair, write.texts, limit=limit)
        if needed:
            _check_all(points, name, pair, chosen)
        if not chosen:
            return None
        texts = list(chosen.values())
        patience_s = SECOND_WAIT_S + SECOND_WAIT_PER_TEXT_S * len(texts)
        try:
            async with asyncio.timeout(None if needed else patience_s):
                embedded = await self.encode(texts, second.model.model, second.model.fingerprint)
            return second_block(len(points), list(chosen), embedded.vectors, second)
        except TimeoutError:
            why = f"{second.model.model} has not answered within {patience_s:.1f} s"
            _left_out(collection, second, why)
        except ShoalError as error:
            if needed:
                raise
            _left_out(collection, second, error.message)
        return None


def second_block(
    count: int, rows: Sequence[int], vectors: NDArray[np.float32], to: Stored
) -> DenseBlock:
    """Vectors of a model, in the stored form, as those of some rows of a batch of `count`. Raises
    Unavailable when they are none."""
    values = np.zeros((count, to.field.dim), np.float32)
    values[rows] = vectors
    if prepare_rows(values, to.field) is not None:
        raise Unavailable(f"the model {to.model.model} made a vector with NaN or infinity")
    present = np.zeros(count, np.bool_)
    present[rows] = True
    return DenseBlock(values, None if present.all() else present)


def _put(
    block: DenseBlock,
    collection: Collection,
    waiting: Sequence[PendingText],
    vectors: NDArray[np.float32],
) -> None:
    to = collection.fields.dense[waiting[0].name]
    for text, vector in zip(waiting, vectors, strict=True):
        if len(vector) != to.dim:
            raise BadRequest(
                f"Wrong input: Vector dimension error: expected dim: {to.dim}, got {len(vector)}: the "
                f"model {text.model or DEFAULT_MODEL} does not fit the vector '{text.name}'"
            )
        block.values[text.row] = vector


def _take_out(block: DenseBlock, rows: Sequence[int]) -> None:
    present = (
        np.ones(len(block.values), np.bool_) if block.present is None else block.present.copy()
    )
    present[list(rows)] = False
    block.present = present


def _check_all(points: PointBatch, name: str, pair: Pair, chosen: dict[int, str]) -> None:
    """Raises BadRequest for a point that would be left without the vector that is searched."""
    block, second = points.dense[name], pair.second
    assert second is not None
    for row in range(len(points)):
        if row in chosen or not (block.present is None or block.present[row]):
            continue
        if points.payload_offsets is None:
            raise BadRequest(
                f"Wrong input: the vector '{name}' is searched with the model "
                f"{second.model.model}, and an update of vectors brings no payload of whose text one "
                f"could be made: send one of {second.model.model}, or a text, or the whole point"
            )
        raise BadRequest(
            f"Wrong input: the vector '{name}' is of the model {second.model.model} by now, and this "
            f"one is of {pair.given.model.model}; it could be made of the text at "
            f"`{pair.text_field}`, but there is none: send a vector of {second.model.model} (point "
            f"{row}, id {format_id(points.ids.key(row))})"
        )


def _left_out(collection: Collection, generation: Stored, why: str) -> None:
    _log.warning(
        "second_vector_left_out",
        collection=collection.name,
        model=generation.model.model,
        why=why,
    )
