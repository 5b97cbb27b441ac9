"""What a request means for a vector whose model is being changed, or was. Pure.

Such a vector has two generations for a while: the vectors of one model and those of another, of the
same points, stored side by side under names that only coordinators know. The vector's own name means
one of them, and a switch changes which. `Pair` is one such vector as one request sees it:

    given    what is searched, and what numbers in a write are
    second   what else is kept: every write brings it, too, or takes it away so that it is made anew

A request that names the other model sees them exchanged. Whoever heard of a switch late still reads
and writes one model only, because stored names never change their meaning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from coordinator.binding import check_text, means
from coordinator.parse import PendingText
from shoal.api.filter import Condition, Filter, HasVectorCondition, MinShould
from shoal.batch import PointBatch
from shoal.encoder_api import ModelInfo
from shoal.errors import BadRequest
from shoal.json_path import parse_path, values_at
from shoal.limits import TEXT_BYTES_MAX
from shoal.metadata.schema import (
    BoundModel,
    CollectionRecord,
    Generation,
    Migration,
    MigrationPhase,
    stored_name,
)
from shoal.payload import decode
from shoal.storage_api import (
    AlterVectors,
    ClearPayload,
    Delete,
    DeletePayload,
    DeleteVectors,
    OverwritePayload,
    SetPayload,
    UpdateVectors,
    Upsert,
    Write,
)
from shoal.vectors import VectorField, VectorFields

__all__ = [
    "Pair",
    "Stored",
    "check_searchable",
    "exchanged",
    "for_text",
    "others_declared",
    "pair_of",
    "pairs_of",
    "public_points",
    "renewed",
    "stored_filter",
    "stored_names",
    "stored_write",
    "text_of",
    "texts_for_second",
    "updates_of",
]


@dataclass(frozen=True, slots=True)
class Stored:
    """One generation. name: under which shards hold it."""

    number: int
    name: str
    field: VectorField
    model: BoundModel


@dataclass(frozen=True, slots=True)
class Pair:
    """current: number of the generation that the vector's name means; no write may lack it.
    complete: the other one may be searched, too."""

    given: Stored
    second: Stored | None = None
    current: int = 0
    text_field: str = ""
    complete: bool = False

    def exchanged(self) -> Pair:
        return self if self.second is None else replace(self, given=self.second, second=self.given)

    def not_current(self) -> Stored | None:
        """What the vector's name does not mean."""
        if self.second is None or self.second.number != self.current:
            return self.second
        return self.given

    def stored(self) -> tuple[str, ...]:
        return (self.given.name,) if self.second is None else (self.given.name, self.second.name)


Pairs = Mapping[str, Pair]


def pairs_of(record: CollectionRecord, fields: VectorFields) -> dict[str, Pair]:
    """fields: with the dimensions that the current generations have."""
    pairs = {}
    for name, vector in record.migrated.items():
        given = _stored(name, vector.current, fields.dense[name])
        under_way = vector.migration
        if under_way is None or under_way.phase is not MigrationPhase.COPYING:
            pairs[name] = Pair(given, current=vector.current.number)
        else:
            pairs[name] = pair_of(name, vector.current, under_way, fields.dense[name])
    return pairs


def pair_of(vector: str, current: Generation, under_way: Migration, field: VectorField) -> Pair:
    """Both generations, whatever the phase. field: as the current one has it."""
    return Pair(
        _stored(vector, current, field),
        _stored(vector, under_way.other, field),
        current.number,
        under_way.text_field,
        under_way.complete,
    )


def _stored(vector: str, generation: Generation, field: VectorField) -> Stored:
    return Stored(
        generation.number,
        stored_name(vector, generation.number),
        replace(field, dim=generation.size),
        generation.model,
    )


def exchanged(
    fields: VectorFields, pairs: Pairs, names: Iterable[str]
) -> tuple[VectorFields, dict[str, Pair]]:
    """The same collection with the other generation of these vectors as the given one."""
    turned = {name: pairs[name].exchanged() for name in names}
    dense = {**fields.dense} | {name: pair.given.field for name, pair in turned.items()}
    return replace(fields, dense=dense), {**pairs} | turned


# -- which of the two is meant --------------------------------------------------------------------
def for_text(
    pair: Pair, vector: str, model: str, known: Sequence[ModelInfo], *, reading: bool
) -> bool:
    """Whether a text for `model` means the second one. "": whatever is current. Raises BadRequest."""
    if not model or means(pair.given.model, model, known):
        return False
    if pair.second is not None and means(pair.second.model, model, known):
        if reading:
            check_searchable(pair.exchanged(), vector)
        return True
    check_text(pair.given.model, vector, model, known)
    return False


def others_declared(pairs: Pairs, declared: str, known: Sequence[ModelInfo]) -> list[str]:
    """Vectors that mean their second generation when `declared` says whose the numbers are."""
    return [
        name
        for name, pair in pairs.items()
        if pair.second is not None
        and not means(pair.given.model, declared, known)
        and means(pair.second.model, declared, known)
    ]


def check_searchable(pair: Pair | None, vector: str) -> None:
    """Raises BadRequest when the given generation may not be searched yet."""
    if pair is None or pair.complete or pair.second is None or pair.given.number == pair.current:
        return
    raise BadRequest(
        f"Wrong input: the vector '{vector}' is being changed to the model {pair.given.model.model}, "
        f"which answers from the switch on: search with {pair.second.model.model} until the switch"
    )


# -- reading --------------------------------------------------------------------------------------
def stored_names(
    wanted: bool | tuple[str, ...], fields: VectorFields, pairs: Pairs
) -> bool | tuple[str, ...]:
    """Vectors to return, as shards know them."""
    if isinstance(wanted, bool):
        if not wanted:
            return False
        wanted = (*fields.dense, *sorted(fields.sparse))
    return tuple(pairs[name].given.name if name in pairs else name for name in wanted)


def public_points(points: PointBatch, pairs: Pairs) -> PointBatch:
    """The points of an answer with the names that clients know; changed in place."""
    for name, pair in pairs.items():
        if pair.given.name != name and pair.given.name in points.dense:
            points.dense[name] = points.dense.pop(pair.given.name)
    return points


def stored_filter(filter: Filter | None, pairs: Pairs) -> Filter | None:
    """The filter with `has_vector` of the given generations. The same object when there is none."""
    if filter is None:
        return None
    some = filter.min_should
    changed: dict[str, tuple[Condition, ...] | MinShould] = {}
    for clause in ("must", "should", "must_not"):
        conditions: Sequence[Condition] | None = getattr(filter, clause)
        if conditions and (turned := _turned(conditions, pairs)) is not None:
            changed[clause] = turned
    if some is not None and (turned := _turned(some.conditions, pairs)) is not None:
        changed["min_should"] = some.model_copy(update={"conditions": turned})
    return filter.model_copy(update=changed) if changed else filter


def _turned(conditions: Sequence[Condition], pairs: Pairs) -> tuple[Condition, ...] | None:
    """None when nothing has to change. Conditions on nested objects have no vectors."""
    turned = tuple(_condition(condition, pairs) for condition in conditions)
    return turned if any(a is not b for a, b in zip(turned, conditions, strict=True)) else None


def _condition(condition: Condition, pairs: Pairs) -> Condition:
    if isinstance(condition, Filter):
        return stored_filter(condition, pairs) or condition
    if isinstance(condition, HasVectorCondition) and condition.has_vector in pairs:
        return HasVectorCondition(has_vector=pairs[condition.has_vector].given.name)
    return condition


# -- writing --------------------------------------------------------------------------------------
def text_of(payload: bytes, field: str) -> str | None:
    """The text at that path, None where there is no string (or several). Its beginning if it is
    longer than an encoder takes: no model reads so far."""
    values = values_at(decode(payload), parse_path(field), flat=False)
    if len(values) != 1 or not isinstance(values[0], str) or not values[0].strip():
        return None
    text: str = values[0][: TEXT_BYTES_MAX // 4]
    try:
        text.encode()
    except UnicodeEncodeError:
        return None
    return text


def texts_for_second(
    points: PointBatch, vector: str, pair: Pair, texts: Sequence[PendingText], *, limit: int
) -> dict[int, str]:
    """Row -> the text that the second vector of that row is made of: the one that came for the first,
    else that of the payload. When more than `limit` would be read from payloads, none is: the
    background copy has a rate, requests have not."""
    found = {text.row: text.text for text in texts if text.name == vector}
    block = points.dense.get(vector)
    if block is None or points.payload_offsets is None:
        return found
    rows = [
        row
        for row in range(len(points))
        if row not in found and (block.present is None or block.present[row])
    ]
    if len(rows) > limit:
        return found
    for row in rows:
        text = text_of(points.payload_of(row), pair.text_field)
        if text is not None:
            found[row] = text
    return found


def updates_of(update: UpdateVectors, pairs: Pairs) -> list[UpdateVectors]:
    """The update, its blocks under stored names, such that a point of which one generation is replaced
    loses the other, unless it is replaced, too. Mostly one; more where some rows bring a vector and
    others do not, each with the rows that follow each other and are alike."""
    points = update.points
    families = [pair.stored() for pair in pairs.values() if pair.second is not None]
    families = [names for names in families if not points.dense.keys().isdisjoint(names)]
    if not families:
        return [update]
    brings = np.zeros((len(points), len(families)), np.bool_)
    for column, names in enumerate(families):
        for name in names:
            if (block := points.dense.get(name)) is not None:
                brings[:, column] |= True if block.present is None else block.present
        _only_last(points, names, brings[:, column])
    ends = np.flatnonzero((brings[1:] != brings[:-1]).any(axis=1)) + 1
    parts = []
    for rows in np.split(np.arange(len(points)), ends):
        having = brings[rows[0]]
        forget = [
            name for names, has in zip(families, having, strict=True) if has for name in names
        ]
        part = points if len(rows) == len(points) else points.take(rows)
        parts.append(replace(update, points=part, forget=tuple(forget)))
    return parts


def _only_last(points: PointBatch, names: Sequence[str], brings: NDArray[np.bool_]) -> None:
    """Of rows of one id that bring any of these vectors the last decides about all of them: the blocks,
    and `brings`, lose the earlier ones."""
    keys = points.ids.keys()
    if len(set(keys)) == len(keys):
        return
    seen: set[int] = set()
    for row in range(len(keys) - 1, -1, -1):
        if brings[row] and keys[row] in seen:
            brings[row] = False
            for name in names:
                if (block := points.dense.get(name)) is not None:
                    present = (
                        np.ones(len(keys), np.bool_) if block.present is None else block.present
                    )
                    block.present = present.copy()
                    block.present[row] = False
        elif brings[row]:
            seen.add(keys[row])


def stored_write(write: Write, pairs: Pairs) -> Write:
    """A write with stored names. One that changes the text that a second vector is made of takes that
    vector away in the same step: the background copy makes it of the new text."""
    match write:
        case Upsert() | UpdateVectors():
            return replace(write, update_filter=stored_filter(write.update_filter, pairs))
        case DeleteVectors():
            names: dict[str, None] = {}
            for name in write.names:
                names |= dict.fromkeys(pairs[name].stored() if name in pairs else (name,))
            write = replace(write, names=tuple(names))
        case SetPayload() | OverwritePayload() | DeletePayload() | ClearPayload():
            write = replace(write, forget=_stale(write, pairs))
        case Delete() | AlterVectors():
            pass
        case _:
            assert_never(write)
    if isinstance(write, AlterVectors) or write.where.filter is None:
        return write
    where = replace(write.where, filter=stored_filter(write.where.filter, pairs))
    return replace(write, where=where)


def renewed(write: Write, record: CollectionRecord, pairs: Pairs) -> list[Write] | None:
    """A write that a shard has refused because it was prepared under an earlier record, for this one:
    the same vectors, as far as they are kept, and what goes with them taken away anew. What it does
    not bring the background copy makes, as for a write that came a moment earlier. None when a point
    would be left without any of its vectors: then the request must be read again."""
    match write:
        case Upsert() | UpdateVectors():
            points = _kept(write.points, record, pairs)
            if points is None:
                return None
            write = replace(write, points=points, epoch=record.epoch)
            return [write] if isinstance(write, Upsert) else [*updates_of(write, pairs)]
        case DeleteVectors():
            names = dict.fromkeys(write.names)
            for vector, pair in pairs.items():
                if not names.keys().isdisjoint(_ever(vector, record)):
                    names |= dict.fromkeys(pair.stored())
            write = replace(write, names=tuple(names))
        case SetPayload() | OverwritePayload() | DeletePayload() | ClearPayload():
            write = replace(write, forget=_stale(write, pairs))
        case Delete() | AlterVectors():
            pass
        case _:
            assert_never(write)
    return [replace(write, epoch=record.epoch)]


def _ever(vector: str, record: CollectionRecord) -> list[str]:
    """Every name that its generations were ever stored under."""
    return [stored_name(vector, number) for number in range(record.migrated[vector].last + 1)]


def _kept(points: PointBatch, record: CollectionRecord, pairs: Pairs) -> PointBatch | None:
    """Without the vectors of generations that are gone. None when a row would keep none of those that
    it brings of one family."""
    dense = dict(points.dense)
    for vector, pair in pairs.items():
        had, has = np.zeros(len(points), np.bool_), np.zeros(len(points), np.bool_)
        for name in _ever(vector, record):
            if (block := dense.get(name)) is None:
                continue
            present = True if block.present is None else block.present
            had |= present
            if name in pair.stored():
                has |= present
            else:
                del dense[name]
        if (had & ~has).any():
            return None
    return points if len(dense) == len(points.dense) else replace(points, dense=dense)


def _stale(
    write: SetPayload | OverwritePayload | DeletePayload | ClearPayload, pairs: Pairs
) -> tuple[str, ...]:
    """Vectors beside the current ones whose text the write may change."""
    return tuple(
        kept.name
        for pair in pairs.values()
        if (kept := pair.not_current()) is not None
        and _touches(write, parse_path(pair.text_field).parts[0])
    )


def _touches(
    write: SetPayload | OverwritePayload | DeletePayload | ClearPayload, root: str | int | None
) -> bool:
    match write:
        case SetPayload(payload=payload, key=None):
            return root in decode(payload)
        case SetPayload(key=key):
            return key is not None and parse_path(key).parts[0] == root
        case DeletePayload(keys=keys):
            return any(parse_path(key).parts[0] == root for key in keys)
        case _:
            return True
