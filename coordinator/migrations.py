"""Changing the model of a vector of a live collection: what is asked for, and how far it is.

    start     record: preparing   the copier (coordinator/copier.py) tells the shards, then: copying
    copying   every write brings vectors of both models; the copier makes those that are missing
    compare   both answer the same queries: overlap, and nDCG where judgments are given
    switch    record: the vector's name means the other one. One transaction; so is rollback
    drop      record: dropping    the copier tells the shards, then the record forgets it

All state is in the collection's record, hence every coordinator knows it and any may be asked.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from coordinator.binding import means
from coordinator.catalog import Catalog, Collection
from coordinator.copier import missing
from coordinator.generations import Pair
from coordinator.requests import Query, Text
from coordinator.texts import Texts
from shoal.api.filter import Filter, parse_filter
from shoal.api.migration import (
    Compared,
    CompareQuery,
    CompareRequest,
    DifferentAnswers,
    DropRequest,
    MigrateRequest,
    MigrationStatus,
    RankingQuality,
    SwitchRequest,
)
from shoal.encoder_api import ModelInfo
from shoal.errors import BadRequest, Busy, NotFound, ShoalError
from shoal.ids import format_id, parse_id
from shoal.json_path import parse_path
from shoal.limits import RECORDED_QUERIES_MAX, RECORDED_QUERY_BYTES_MAX
from shoal.metadata.contract import MetadataStore
from shoal.metadata.schema import (
    BoundModel,
    CollectionRecord,
    Generation,
    MigratedVector,
    Migration,
    MigrationPhase,
    MigrationProgress,
    migration_key,
)
from shoal.ranking import Interval, bootstrap_mean, ndcg, overlap
from shoal.storage_api import Hits, Read, ShardInfo
from shoal.vectors import Datatype

__all__ = ["UNNAMED", "Migrations", "advanced", "migration_of"]

UNNAMED = "-"  # in paths, for the vector without a name
_STRONG = Read(strong=True)
_SHOWN_MAX = 10  # queries whose answers differ most
_SEARCHES_AT_ONCE = 8
_SEED = 1  # of the bootstrap: the same answers give the same interval

Search = Callable[[Collection, Query, Read], Awaitable[Hits]]
Infos = Callable[[Collection], Awaitable[list[ShardInfo]]]
Count = Callable[[Collection, Filter | None, Read], Awaitable[int]]


class Migrations:
    """Of the collections of one catalog.

    search, count, infos  as the coordinator does them.
    """

    def __init__(
        self,
        catalog: Catalog,
        store: MetadataStore,
        texts: Texts,
        search: Search,
        count: Count,
        infos: Infos,
    ) -> None:
        self._catalog, self._store, self._texts = catalog, store, texts
        self._search, self._count, self._infos = search, count, infos
        self._recorded: dict[tuple[int, str], OrderedDict[str, Filter | None]] = {}
        self._comparing = False

    # -- changes ----------------------------------------------------------------------------------
    async def start(
        self, collection: Collection, vector: str, request: MigrateRequest
    ) -> MigrationStatus:
        """Begin one. Of one that is under way, to or from that model: change its rate, and nothing
        else. Raises BadRequest for what cannot be migrated."""
        parse_path(request.text_field)
        found = collection.record.migrated.get(vector)
        if found is not None and found.migration is not None:
            return await self._continue(collection, vector, found, request)
        current = await self._current(collection, vector, request)
        info = await self._served(request.model, request.fingerprint)
        if (info.name, info.fingerprint) == (current.model, current.fingerprint):
            raise BadRequest(
                f"Wrong input: the vector '{vector}' is of the model {current.model} with these "
                "weights already: name another one"
            )
        await self._check_texts(collection, request.text_field)
        wanted = BoundModel(model=info.name, fingerprint=info.fingerprint)

        def change(record: CollectionRecord) -> CollectionRecord:
            return _begun(record, collection, vector, request, current, wanted, info.dim)

        return await self._changed(collection, vector, change)

    async def _continue(
        self,
        collection: Collection,
        vector: str,
        found: MigratedVector,
        request: MigrateRequest,
    ) -> MigrationStatus:
        """No model has to answer: a copy that waits for one must be stopped, too."""
        under_way, known = migration_of(collection, vector), self._texts.models()
        both = (found.current.model, under_way.other.model)
        wanted = {bound.fingerprint for bound in both if means(bound, request.model, known)}
        if wanted and request.fingerprint not in (None, *wanted):
            raise BadRequest(
                f"Wrong input: the fingerprint of {request.model} is {' or '.join(map(str, wanted))} in "
                f"the change that is under way, and not {request.fingerprint}"
            )
        if not wanted:
            raise BadRequest(
                f"Wrong input: the vector '{vector}' is being changed already (between "
                f"{both[0].model} and {both[1].model}, {under_way.phase}): end that with `drop` first"
            )
        if request.text_field != under_way.text_field:
            raise BadRequest(
                f"Wrong input: vectors are being made of the texts at `{under_way.text_field}`: to take "
                f"them from `{request.text_field}`, end that with `drop` and begin anew"
            )
        if "points_per_second" not in request.model_fields_set:
            return self._told(collection, vector)
        rate = {"points_per_second": request.points_per_second}

        def change(record: CollectionRecord) -> CollectionRecord:
            now = _under_way(record, collection, vector)
            assert now.migration is not None
            changed = now.migration.model_copy(update=rate)
            return _with(record, vector, now.current, now.last, changed)

        return await self._changed(collection, vector, change)

    async def _changed(
        self,
        collection: Collection,
        vector: str,
        change: Callable[[CollectionRecord], CollectionRecord | None],
    ) -> MigrationStatus:
        """Nothing is counted afterwards: that could fail, and the change has been made."""
        return self._told(await self._catalog.change(collection.name, change), vector)

    async def _current(
        self, collection: Collection, vector: str, request: MigrateRequest
    ) -> BoundModel:
        """The model whose vectors are there, with its fingerprint."""
        to = collection.fields.dense.get(vector)
        if to is None or to.multi:
            raise BadRequest(
                f"Wrong input: '{vector}' is no dense vector of this collection, and only those "
                "can change their model"
            )
        if to.datatype is Datatype.UINT8:
            raise BadRequest(
                f"Wrong input: the vector '{vector}' holds numbers from 0 to 255, and models make "
                "numbers from -1 to 1: make a new collection with float32"
            )
        bound = collection.record.models.get(vector)
        name = request.current_model if bound is None else bound.model
        if name is None:
            raise BadRequest(
                f"Wrong input: nobody has said which model the vector '{vector}' is of: say it in "
                "`current_model`"
            )
        if (
            bound is not None
            and request.current_model is not None
            and not means(bound, request.current_model, self._texts.models())
        ):
            raise BadRequest(
                f"Wrong input: the vector '{vector}' is of the model {bound.model}, and not of "
                f"{request.current_model}: leave `current_model` out"
            )
        known = await self._served(name, None if bound is None else bound.fingerprint)
        if known.dim != to.dim:
            raise BadRequest(
                f"Wrong input: the vector '{vector}' has {to.dim} dimensions and the model "
                f"{known.name} makes {known.dim}: it cannot be of that model"
            )
        return BoundModel(model=known.name, fingerprint=known.fingerprint)

    async def _served(self, model: str, fingerprint: str | None) -> ModelInfo:
        """A model that can be asked now, loaded. Both must be: writes are embedded by both."""
        info = await self._texts.prepare(model, fingerprint)
        if info.fingerprint is None:
            raise BadRequest(f"Wrong input: the model {model} has no fingerprint yet: try again")
        return info

    async def _check_texts(self, collection: Collection, field: str) -> None:
        points = await self._count(collection, None, _STRONG)
        filled = parse_filter({"must_not": [{"is_empty": {"key": field}}]})
        if points and not await self._count(collection, filled, _STRONG):
            raise BadRequest(
                f"Wrong input: no point of this collection has anything at `{field}`, so no vector can "
                "be made anew: name the payload field that holds the text"
            )

    async def switch(
        self, collection: Collection, vector: str, request: SwitchRequest
    ) -> MigrationStatus:
        """From now on the vector's name means the other model."""
        under_way, pair = migration_of(collection, vector), collection.pairs.get(vector)
        if under_way.switched:
            raise BadRequest(
                f"Wrong input: the vector '{vector}' is of {pair_model(collection, vector)} already: "
                "`rollback` goes back, `drop` ends it"
            )
        if pair is None or pair.second is None:
            raise _not_ready(under_way.phase)
        if not request.allow_missing:
            left = await self._count_stored(collection, missing(pair.given, pair.second))
            if left:
                raise BadRequest(
                    f"Wrong input: {left} points have no vector of {pair.second.model.model} yet, and "
                    "would not be found: wait until `left` is 0, or, if they have no text, send "
                    "`allow_missing`"
                )
        return await self._exchange(
            collection, vector, await self._floor(collection), switched=True
        )

    async def rollback(self, collection: Collection, vector: str) -> MigrationStatus:
        """The vector's name means the model that it had before the switch."""
        under_way = migration_of(collection, vector)
        if not under_way.switched:
            raise BadRequest(
                f"Wrong input: the vector '{vector}' has not been switched: there is nothing to roll back"
            )
        if under_way.phase is not MigrationPhase.COPYING:
            raise _not_ready(under_way.phase)
        return await self._exchange(collection, vector, (), switched=False)

    async def _floor(self, collection: Collection) -> tuple[int, ...]:
        return tuple([info.applied for info in await self._infos(collection)])

    async def _exchange(
        self, collection: Collection, vector: str, floor: tuple[int, ...], *, switched: bool
    ) -> MigrationStatus:
        def change(record: CollectionRecord) -> CollectionRecord | None:
            found = _under_way(record, collection, vector)
            assert found.migration is not None
            if found.migration.switched == switched:
                return None
            if found.migration.phase is not MigrationPhase.COPYING:
                raise _not_ready(found.migration.phase)
            turned = found.migration.model_copy(
                update={"other": found.current, "switched": switched, "complete": True}
            )
            return _with(record, vector, found.migration.other, found.last, turned, new_epoch=True)

        return await self._changed(collection, vector, change)

    async def drop(
        self, collection: Collection, vector: str, request: DropRequest
    ) -> MigrationStatus:
        """End it: forget the vectors of the model that is not in use, which must be named."""
        under_way, known = migration_of(collection, vector), self._texts.models()
        current = collection.record.migrated[vector].current.model
        _check_named(under_way.other.model, current, request.model, known)
        pair = collection.pairs[vector]
        if pair.second is not None and not request.allow_missing:
            left = await self._count_stored(collection, missing(pair.second, pair.given))
            if left:
                raise BadRequest(
                    f"Wrong input: {left} points have a vector of {under_way.other.model.model} only, "
                    "and would keep none: wait until `only_other` is 0, or, if they have no text, send "
                    "`allow_missing`"
                )

        def change(record: CollectionRecord) -> CollectionRecord:
            now = _under_way(record, collection, vector)
            assert now.migration is not None
            _check_named(now.migration.other.model, now.current.model, request.model, known)
            return advanced(record, collection, vector, MigrationPhase.DROPPING)

        return await self._changed(collection, vector, change)

    # -- how far it is ----------------------------------------------------------------------------
    async def status(self, collection: Collection, vector: str) -> MigrationStatus:
        """Counted now; rate and errors as the coordinator that copies has said last."""
        under_way, pair = migration_of(collection, vector), collection.pairs[vector]
        entry = await self._store.get(migration_key(collection.record.id, vector))
        said = None if entry is None else MigrationProgress.from_bytes(entry.key, entry.value)
        having = parse_filter({"must": [{"has_vector": pair.given.name}]})
        points = await self._count_stored(collection, having)
        left, only_other = points, 0
        if pair.second is not None:
            left = await self._count_stored(collection, missing(pair.given, pair.second))
            only_other = await self._count_stored(collection, missing(pair.second, pair.given))
        counts: dict[str, Any] = {
            "points": points,
            "done": points - left,
            "left": left,
            "only_other": only_other,
            "seconds_left": _seconds_left(left, said, under_way.points_per_second),
        }
        if said is not None:
            counts |= {
                "without_text": said.without_text,
                "points_per_second": said.points_per_second,
                "copied_by": said.node,
                "error": said.error or None,
            }
        return self._told(collection, vector).model_copy(update=counts)

    def _told(self, collection: Collection, vector: str) -> MigrationStatus:
        """What the record says."""
        under_way = migration_of(collection, vector)
        given = collection.pairs[vector].given
        return MigrationStatus(
            vector=vector,
            phase=under_way.phase.value,
            switched=under_way.switched,
            complete=under_way.complete,
            current=_model(given.model, given.field.dim),
            other=_model(under_way.other.model, under_way.other.size),
            text_field=under_way.text_field,
            points_per_second_max=under_way.points_per_second,
            started_at=under_way.started_at.isoformat(timespec="seconds"),
            recorded_queries=len(self._recorded.get((collection.record.id, vector), ())),
        )

    async def _count_stored(self, collection: Collection, filter: Filter) -> int:
        """The filter has stored names."""
        return await self._count(_plain(collection), filter, _STRONG)

    # -- comparing --------------------------------------------------------------------------------
    def record(self, collection: Collection, vector: str, text: str, filter: Filter | None) -> None:
        """Remember a query for a comparison: the last RECORDED_QUERIES_MAX of each vector under
        migration, in memory only, and until it ends."""
        pair = collection.pairs.get(vector)
        if pair is None or pair.second is None or not text:
            return
        size = len(text.encode()) + (0 if filter is None else len(filter.model_dump_json()))
        if size > RECORDED_QUERY_BYTES_MAX:
            return
        queries = self._recorded.setdefault((collection.record.id, vector), OrderedDict())
        queries[text] = filter
        queries.move_to_end(text)
        if len(queries) > RECORDED_QUERIES_MAX:
            queries.popitem(last=False)

    def forget_ended(self) -> None:
        """Those of vectors that are not being changed any more."""
        if not self._recorded:
            return
        going_on = {
            (collection.record.id, vector)
            for collection in self._catalog.collections()
            for vector, pair in collection.pairs.items()
            if pair.second is not None
        }
        self._recorded = {key: texts for key, texts in self._recorded.items() if key in going_on}

    async def compare(
        self, collection: Collection, vector: str, request: CompareRequest
    ) -> Compared:
        """Ask both the same. Cost: two embeddings and two searches a query. One at a time: Busy."""
        if self._comparing:
            raise Busy("a comparison is under way on this coordinator: try again when it has ended")
        self._comparing = True
        try:
            return await self._compare(collection, vector, request)
        finally:
            self._comparing = False

    async def _compare(
        self, collection: Collection, vector: str, request: CompareRequest
    ) -> Compared:
        under_way, pair = migration_of(collection, vector), collection.pairs[vector]
        if pair.second is None:
            raise _not_ready(under_way.phase)
        queries = request.queries
        if queries is None:
            seen = self._recorded.get((collection.record.id, vector), OrderedDict())
            queries = [CompareQuery(text=text, filter=only) for text, only in seen.items()]
        if not queries:
            raise BadRequest(
                "Wrong input: no queries to compare with: this coordinator has seen no text queries "
                "for this vector since the migration began; send some in `queries`"
            )
        other = collection.with_others([vector])
        room = asyncio.Semaphore(_SEARCHES_AT_ONCE)
        tasks: list[asyncio.Task[tuple[list[int], list[int]]]] = []
        try:
            async with asyncio.TaskGroup() as group:  # the first error ends the others
                tasks += [
                    group.create_task(self._both(collection, other, vector, query, request, room))
                    for query in queries
                ]
        except* ShoalError as failed:
            raise failed.exceptions[0] from None
        answers = [task.result() for task in tasks]
        left = await self._count_stored(collection, missing(pair.given, pair.second))
        return await asyncio.to_thread(
            _compared, queries, answers, request, pair, left, given=request.queries is not None
        )

    async def _both(
        self,
        collection: Collection,
        other: Collection,
        vector: str,
        query: CompareQuery,
        request: CompareRequest,
        room: asyncio.Semaphore,
    ) -> tuple[list[int], list[int]]:
        async with room:
            found = []
            for seen in (collection, other):
                wanted = Query(
                    text=Text(query.text, ""),
                    using=vector,
                    filter=query.filter,
                    limit=request.limit,
                    exact=request.exact,
                )
                found.append((await self._search(seen, wanted, Read())).points.ids.keys())
            return found[0], found[1]


# -- the record, pure -----------------------------------------------------------------------------
def migration_of(collection: Collection, vector: str) -> Migration:
    """Raises NotFound when none is under way."""
    found = collection.record.migrated.get(vector)
    if found is None or found.migration is None:
        raise _none_under_way(vector)
    return found.migration


def advanced(
    record: CollectionRecord, collection: Collection, vector: str, phase: MigrationPhase | None
) -> CollectionRecord:
    """The record with the migration in that phase; None: it is over. As it is, when it cannot go there
    from where it is by now. Raises NotFound when there is none any more."""
    found = _under_way(record, collection, vector)
    assert found.migration is not None
    comes_after: dict[MigrationPhase | None, tuple[MigrationPhase, ...]] = {
        MigrationPhase.COPYING: (MigrationPhase.PREPARING,),
        MigrationPhase.DROPPING: (MigrationPhase.PREPARING, MigrationPhase.COPYING),
        None: (MigrationPhase.DROPPING,),
    }
    if found.migration.phase not in comes_after[phase]:
        return record
    changed = None if phase is None else found.migration.model_copy(update={"phase": phase})
    return _with(record, vector, found.current, found.last, changed, new_epoch=phase is not None)


def _under_way(record: CollectionRecord, collection: Collection, vector: str) -> MigratedVector:
    """As the record has it now. Raises NotFound when it is not the one that `collection` knew."""
    found, known = record.migrated.get(vector), collection.record.migrated.get(vector)
    if (
        record.id != collection.record.id
        or found is None
        or found.migration is None
        or known is None
        or known.last != found.last
    ):
        raise _none_under_way(vector)
    return found


def _with(
    record: CollectionRecord,
    vector: str,
    current: Generation,
    last: int,
    migration: Migration | None,
    floor: tuple[int, ...] | None = None,
    *,
    new_epoch: bool = False,
) -> CollectionRecord:
    """floor: None leaves it. new_epoch: from here on writes must bring, or leave, other vectors."""
    if floor is None:
        floor = record.migrated[vector].floor if vector in record.migrated else ()
    migrated = MigratedVector(current=current, last=last, floor=floor, migration=migration)
    return record.model_copy(
        update={
            "version": 3,
            "migrated": {**record.migrated, vector: migrated},
            "models": {**record.models, vector: current.model},
            "epoch": record.epoch + new_epoch,
        }
    )


def _begun(
    record: CollectionRecord,
    collection: Collection,
    vector: str,
    request: MigrateRequest,
    current: BoundModel,
    wanted: BoundModel,
    dim: int,
) -> CollectionRecord:
    if record.id != collection.record.id:
        raise NotFound(f"Not found: Collection `{record.name}` was made anew meanwhile!")
    found = record.migrated.get(vector)
    if found is None:
        size = collection.fields.dense[vector].dim
        found = MigratedVector(current=Generation(number=0, size=size, model=current), last=0)
    if found.migration is not None:  # of somebody who was faster
        raise Busy(
            f"the vector '{vector}' is being changed since a moment ago: look how, then decide"
        )
    number = found.last + 1
    migration = Migration(
        phase=MigrationPhase.PREPARING,
        other=Generation(number=number, size=dim, model=wanted),
        text_field=request.text_field,
        points_per_second=request.points_per_second,
        started_at=datetime.now(UTC),
    )
    return _with(record, vector, found.current, number, migration)


def pair_model(collection: Collection, vector: str) -> str:
    return collection.pairs[vector].given.model.model


def _check_named(
    other: BoundModel, current: BoundModel, model: str, known: Sequence[ModelInfo]
) -> None:
    """Raises BadRequest unless `model` certainly is the one that is not in use."""
    by_name = means(other, model, known) and not means(current, model, known)
    if model != other.fingerprint and not by_name:
        raise BadRequest(
            f"Wrong input: the vectors that can be dropped are those of {other.model} "
            f"({other.fingerprint}), and the request names {model}"
        )


def _none_under_way(vector: str) -> NotFound:
    return NotFound(f"Not found: the model of the vector '{vector}' is not being changed")


def _not_ready(phase: MigrationPhase) -> BadRequest:
    return BadRequest(
        f"Wrong input: the migration is {phase}: "
        + (
            "its vectors are being removed; wait for the end and start another one"
            if phase is MigrationPhase.DROPPING
            else "try again in a moment"
        )
    )


# -- answers, pure --------------------------------------------------------------------------------
def _plain(collection: Collection) -> Collection:
    """In which names mean what shards call so."""
    return Collection(
        collection.record,
        collection.revision,
        collection.request,
        collection.fields,
        collection.shards,
        {},
    )


def _model(bound: BoundModel, dim: int) -> dict[str, str | int | None]:
    return {"model": bound.model, "fingerprint": bound.fingerprint, "size": dim}


def _seconds_left(left: int, said: MigrationProgress | None, bound: float | None) -> float | None:
    """bound: the most points per second, by now. None: nobody knows."""
    if said is None or said.points_per_second <= 0 or bound == 0:
        return None
    return max(0, left - said.without_text) / min(said.points_per_second, bound or math.inf)


def _compared(
    queries: Sequence[CompareQuery],
    answers: Sequence[tuple[list[int], list[int]]],
    request: CompareRequest,
    pair: Pair,
    left: int,
    *,
    given: bool,
) -> Compared:
    k = request.limit
    assert pair.second is not None
    shared = np.array([overlap(now, then) for now, then in answers])
    judged = [
        (
            position,
            {
                parse_id(_as_id(key)): gain
                for key, gain in (query.relevant or {}).items()
                if gain > 0
            },
        )
        for position, query in enumerate(queries)
    ]
    judged = [(position, gains) for position, gains in judged if gains]
    quality = None
    if judged:
        now = np.array([ndcg(answers[position][0], gains, k) for position, gains in judged])
        then = np.array([ndcg(answers[position][1], gains, k) for position, gains in judged])
        quality = RankingQuality(
            queries=len(judged),
            current=_interval(bootstrap_mean(now, _SEED)),
            other=_interval(bootstrap_mean(then, _SEED)),
            gain=_interval(bootstrap_mean(then - now, _SEED)),
        )
    return Compared(
        current=pair.given.model.model,
        other=pair.second.model.model,
        limit=k,
        queries=len(queries),
        source="given" if given else "recorded",
        left=left,
        overlap=_interval(bootstrap_mean(shared, _SEED)),
        ndcg=quality,
        most_different=[
            DifferentAnswers(
                text=queries[position].text,
                overlap=float(shared[position]),
                current=[format_id(key) for key in answers[position][0]],
                other=[format_id(key) for key in answers[position][1]],
            )
            for position in np.argsort(shared, kind="stable")[:_SHOWN_MAX].tolist()
        ],
    )


def _as_id(text: str) -> int | str:
    """A key of a JSON object: numbers are ids that are numbers."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 20 else text


def _interval(interval: Interval) -> dict[str, float]:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}
