"""The coordinator: requests in, storage nodes asked, answers out. Knows nothing of HTTP.

    Query ── vector of a point or a text? ──▶ one Search per shard ──▶ merge ──▶ parts of payloads
    points ── texts? embed ── normalise ──▶ split by shard ──▶ write ──▶ first missing id, if any

A collection of one shard is asked directly: no tasks, no merging, no copying. Where a shard is, and
which replica answers, is the business of `Storage`; how fresh an answer must be, see
`coordinator/freshness.py`. `wait=false` has nothing to win: the answer always comes after the log is
on the disks. A request that goes to several shards is applied per shard; it is not one transaction.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from coordinator import gather
from coordinator.catalog import Catalog, Collection
from coordinator.cluster import (
    ClusterState,
    describe_cluster,
    describe_collection_cluster,
    describe_peers,
)
from coordinator.copier import Copier, Progress
from coordinator.freshness import ANY_READ, format_token
from coordinator.generations import (
    public_points,
    renewed,
    stored_filter,
    stored_names,
    stored_write,
    updates_of,
)
from coordinator.migrations import Migrations, advanced
from coordinator.parse import (
    PointsWrite,
    prepare_points,
    unknown_vector,
    wrong_dimension,
)
from coordinator.requests import AnyWrite, PayloadSelection, Query, Retrieve, ScrollQuery
from coordinator.routing import ShardGone
from coordinator.texts import Texts
from shoal.api.filter import Filter
from shoal.batch import PointBatch
from shoal.encoder_api import Embedding, Encoder, ModelInfo
from shoal.errors import BadRequest, NotFound, ShoalError, VectorsChanged, must
from shoal.ids import PointIds, format_id
from shoal.limits import VECTORS_CHANGED_ATTEMPTS
from shoal.metadata.contract import MetadataStore
from shoal.metadata.leadership import Leadership
from shoal.metadata.schema import (
    ACTIONS_KEY,
    LEADER_KEY,
    LOCAL_NODE,
    NODES_PREFIX,
    SHARDS_PREFIX,
    ActionsRecord,
    LeaderRecord,
    NodeRecord,
    NodeRole,
    ShardRecord,
)
from shoal.payload import select
from shoal.settings import CoordinatorSettings
from shoal.storage_api import (
    AlterVectors,
    ClearPayload,
    Delete,
    DeletePayload,
    DeleteVectors,
    Hits,
    OverwritePayload,
    Read,
    Scroll,
    Search,
    SetPayload,
    ShardInfo,
    ShardKey,
    ShardSpec,
    Storage,
    UpdateVectors,
    Upsert,
    Write,
    WriteResult,
)
from shoal.vectors import VectorField, VectorFields, prepare_query

__all__ = ["Coordinator", "Written"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Written:
    """What was applied: shard -> log position. Durable and visible."""

    sequences: Mapping[ShardKey, int]

    @property
    def operation(self) -> int:
        """The largest sequence number: what clients know as the operation id."""
        return max(self.sequences.values(), default=0)

    @property
    def token(self) -> str:
        """A read that shows it, at whichever coordinator, sees this write."""
        return format_token(self.sequences)


class Coordinator:
    """One of any number of coordinators. Safe to call from many tasks of one event loop.

    storage     all shards: coordinator/router.py.
    node_id     its own name in the cluster.
    local_node  the one storage node of a one-machine server, which needs no record; None in a
                cluster, where collections are placed on the nodes that have registered.
    leadership  among the coordinators of a cluster: one of them copies for all; see copier.py.
    """

    def __init__(
        self,
        *,
        store: MetadataStore,
        storage: Storage,
        encoder: Encoder | None,
        settings: CoordinatorSettings,
        node_id: str = LOCAL_NODE,
        local_node: str | None = LOCAL_NODE,
        leadership: Leadership | None = None,
    ) -> None:
        self._store, self._storage = store, storage
        self._node_id, self._local_node = node_id, local_node
        self._encoder = encoder
        self.catalog = Catalog(store, storage, settings, local_node)
        self.texts = Texts(encoder, self.catalog.set_fingerprint)
        self.catalog.models = self.models
        self.migrations = Migrations(
            self.catalog, store, self.texts, self.search, self.count, self.infos
        )
        self._copier = Copier(
            self.catalog,
            store,
            storage,
            self.texts,
            node_id=node_id,
            advance=advanced,
            leadership=leadership,
        )
        self.catalog.on_change = self._changed

    async def start(self) -> None:
        """Read the catalog and follow it. The storage node may be started after this."""
        await self.catalog.load()
        self._copier.start()

    def _changed(self) -> None:
        self._copier.wake()
        self.migrations.forget_ended()

    async def close(self) -> None:
        """Wait for changes of collections that are under way, and follow the catalog no more."""
        await self._copier.close()
        await self.catalog.close()

    def shard_specs(self) -> list[ShardSpec]:
        return self.catalog.shard_specs()

    # -- reads ------------------------------------------------------------------------------------
    async def query(self, collection: Collection, query: Query, read: Read = ANY_READ) -> Hits:
        """The best points, or without a query the first by id (score 0). Raises BadRequest for an
        unknown vector or a wrong dimension, NotFound for a point to start from that is not there."""
        hits = await self.search(collection, query, read)
        if query.text is not None:
            self.migrations.record(collection, query.using, query.text.text, query.filter)
        return hits

    async def search(self, collection: Collection, query: Query, read: Read) -> Hits:
        """As `query`, and nobody remembers it."""
        if query.vector is None and query.point is None and query.text is None:
            return await self._first_points(collection, query, read)
        to = _searched(collection.fields, query.using)
        if query.text is not None:
            collection = self.texts.seen_by(collection, query.using, query.text.model)
            to = collection.fields.dense[query.using]
        pairs = collection.pairs
        if pairs:
            read = _at_least(read, collection)
        search = Search(
            using=pairs[query.using].given.name if query.using in pairs else query.using,
            vector=await self._query_vector(collection, query, to, read),
            limit=query.limit + query.offset,
            filter=stored_filter(query.filter, pairs) if pairs else query.filter,
            exclude=() if query.point is None else (query.point,),
            score_threshold=query.score_threshold,
            exact=query.exact,
            ef=query.ef,
            with_payload=query.with_payload is not False,
            with_vectors=_known(query.with_vectors, collection),
        )
        shards = collection.shards
        if len(shards) == 1:
            hits = await self._storage.search(shards[0], search, read)
        else:
            hits = gather.merge_hits(
                await _all([self._storage.search(shard, search, read) for shard in shards]),
                search.limit,
                larger_is_better=to.distance.larger_is_better,
            )
        if query.offset:
            rows = np.arange(query.offset, max(query.offset, len(hits.scores)))
            hits = Hits(hits.points.take(rows), hits.scores[rows])
        if pairs:
            public_points(hits.points, pairs)
        if isinstance(query.with_payload, PayloadSelection):
            _select(hits.points, query.with_payload)
        return hits

    async def _first_points(self, collection: Collection, query: Query, read: Read) -> Hits:
        if query.using and query.using not in collection.fields:
            raise unknown_vector(query.using, collection.fields)
        points = await self._scroll(
            collection,
            Scroll(
                limit=query.limit + query.offset,
                filter=query.filter,
                with_payload=query.with_payload is not False,
                with_vectors=_known(query.with_vectors, collection),
            ),
            read,
        )
        points = points.take(np.arange(query.offset, max(query.offset, len(points))))
        if isinstance(query.with_payload, PayloadSelection):
            _select(points, query.with_payload)
        return Hits(points, np.zeros(len(points), np.float32))

    async def _query_vector(
        self, collection: Collection, query: Query, to: VectorField, read: Read
    ) -> NDArray[np.float32]:
        if query.vector is not None:
            raw = query.vector
        elif query.text is not None:
            embedded = await self.texts.query_vector(
                collection, query.using, query.text.text, query.text.model
            )
            raw = embedded.astype(np.float64)
        else:
            must(query.point is not None, "a search without vector, text and point")
            return await self._vector_of(collection, cast(int, query.point), query.using, to, read)
        if len(raw) != to.dim:
            raise wrong_dimension(to.dim, len(raw))
        vector = prepare_query(raw, to)
        if vector is None:
            raise BadRequest(
                "Wrong input: the query vector contains NaN, infinity or a number that is too large"
            )
        return vector

    async def _vector_of(
        self, collection: Collection, key: int, name: str, to: VectorField, read: Read
    ) -> NDArray[np.float32]:
        found = await self.retrieve(
            collection, Retrieve(PointIds.from_keys([key]), False, (name,)), read
        )
        if not len(found):
            raise NotFound(f"Not found: No point with id {format_id(key)} found")
        block = found.dense.get(name)
        if block is None or (block.present is not None and not block.present[0]):
            raise BadRequest(
                f"Wrong input: Point {format_id(key)} has no vector '{name}' to search with"
            )
        must(block.values.shape == (1, to.dim), "a stored vector has another dimension")
        vector: NDArray[np.float32] = block.values[0]
        return vector

    async def retrieve(
        self, collection: Collection, request: Retrieve, read: Read = ANY_READ
    ) -> PointBatch:
        """The points that exist, in the order asked."""
        with_payload = request.with_payload is not False
        with_vectors = _known(request.with_vectors, collection)
        shards = collection.shards
        if len(shards) == 1:
            points = await self._storage.retrieve(
                shards[0], request.ids, with_payload, with_vectors, read
            )
        else:
            parts = await _all(
                [
                    self._storage.retrieve(
                        shard, request.ids.take(rows), with_payload, with_vectors, read
                    )
                    for shard, rows in _split(request.ids, shards)
                ]
            )
            points = gather.in_request_order(parts, request.ids) if parts else _no_points()
        public_points(points, collection.pairs)
        if isinstance(request.with_payload, PayloadSelection):
            _select(points, request.with_payload)
        return points

    async def scroll(
        self, collection: Collection, request: ScrollQuery, read: Read = ANY_READ
    ) -> tuple[PointBatch, int | None]:
        """Points by ascending id, and the key of the next one, None at the end."""
        points = await self._scroll(
            collection,
            Scroll(
                limit=request.limit + 1,
                start=request.start,
                filter=request.filter,
                with_payload=request.with_payload is not False,
                with_vectors=_known(request.with_vectors, collection),
            ),
            read,
        )
        following = None
        if len(points) > request.limit:
            following = points.ids.key(request.limit)
            points = points.take(np.arange(request.limit))
        if isinstance(request.with_payload, PayloadSelection):
            _select(points, request.with_payload)
        return points, following

    async def _scroll(self, collection: Collection, scroll: Scroll, read: Read) -> PointBatch:
        shards = collection.shards
        scroll.filter = stored_filter(scroll.filter, collection.pairs)
        if len(shards) == 1:
            points = await self._storage.scroll(shards[0], scroll, read)
        else:
            parts = await _all([self._storage.scroll(shard, scroll, read) for shard in shards])
            points = gather.first_by_id(parts, scroll.limit)
        return public_points(points, collection.pairs)

    async def count(
        self, collection: Collection, filter: Filter | None, read: Read = ANY_READ
    ) -> int:
        shards, wanted = collection.shards, stored_filter(filter, collection.pairs)
        return sum(await _all([self._storage.count(shard, wanted, read) for shard in shards]))

    async def infos(self, collection: Collection) -> list[ShardInfo]:
        return await _all([self._storage.info(shard) for shard in collection.shards])

    # -- writes -----------------------------------------------------------------------------------
    async def write(self, collection: Collection, request: AnyWrite) -> Written:
        """Apply one write; durable and visible when this returns. Raises NotFound when a selected
        point does not exist, after everything else was applied."""
        return (await self.write_all(collection, [request]))[0]

    async def write_all(
        self, collection: Collection, requests: Sequence[AnyWrite]
    ) -> list[Written]:
        """Apply writes in order. All are prepared before the first is applied. The error of a later
        one says that earlier ones have happened."""
        prepared = [await self.prepare(collection, request) for request in requests]
        done: list[Written] = []
        for writes in prepared:
            applied: dict[ShardKey, int] = {}
            missing: NotFound | None = None
            try:
                for write in writes:
                    try:
                        applied |= (await self.apply(collection, write)).sequences
                    except NotFound as error:  # everything else is applied first
                        missing = missing or error
                if missing is not None:
                    raise missing
            except ShoalError as error:
                if done or applied:
                    error.maybe_applied = True
                    error.message += (
                        f" {len(done)} of {len(prepared)} operations have been applied."
                    )
                raise
            done.append(Written(applied))
        return done

    async def prepare(self, collection: Collection, request: AnyWrite) -> list[Write]:
        """Embed texts and normalise vectors: after this nothing of the request can be wrong. Nearly
        always one write; see coordinator/generations.py, `updates_of`."""
        writes, epoch = await self._prepare(collection, request), collection.record.epoch
        return [replace(write, epoch=epoch) for write in writes] if epoch else writes

    async def _prepare(self, collection: Collection, request: AnyWrite) -> list[Write]:
        pairs = collection.pairs
        if not isinstance(request, PointsWrite):
            return [stored_write(request, pairs) if pairs else request]
        if request.texts:
            await self.texts.fill(collection, request)
        prepare_points(request.points, collection.fields)
        if pairs:
            await self.texts.add_second(collection, request)
            request.update_filter = stored_filter(request.update_filter, pairs)
        if not request.vectors_only:
            return [Upsert(request.points, request.update_filter, request.mode)]
        update = UpdateVectors(request.points, request.update_filter)
        return [*updates_of(update, pairs)] if pairs else [update]

    async def apply(self, collection: Collection, write: Write) -> Written:
        parts = _split_write(write, collection.shards)
        if len(parts) == 1:
            results = [await self._apply_part(collection, *parts[0])]
        else:
            results = await _all_written([self._apply_part(collection, *part) for part in parts])
        missing = _first_missing(write, results)
        if missing is not None:
            error = NotFound(f"Not found: No point with id {format_id(missing)} found")
            error.maybe_applied = len(_named(write)) > 1  # to the others
            raise error
        return Written(
            {shard: result.sequence for (shard, _), result in zip(parts, results, strict=True)}
        )

    async def _apply_part(
        self, collection: Collection, shard: ShardKey, write: Write
    ) -> WriteResult:
        """Of one shard. When the collection's vectors have changed since the write was prepared, it is
        made anew for this shard: others may have applied their parts, and must not do so twice."""
        try:
            return await self._storage.write(shard, write)
        except VectorsChanged as error:
            changed = error
        for _ in range(VECTORS_CHANGED_ATTEMPTS):
            await self.catalog.reread(collection.name)
            now = self.catalog.get(collection.name)
            if now.record.id != collection.record.id:
                raise ShardGone(shard)
            anew = renewed(write, now.record, now.pairs)
            if anew is None:
                break
            results: list[WriteResult] = []
            try:
                for part in anew:
                    results.append(await self._storage.write(shard, part))
            except VectorsChanged as error:
                changed = error
                if results:
                    error.maybe_applied = True
                    break
            else:
                missing = (result.missing for result in results if result.missing is not None)
                return WriteResult(results[-1].sequence, next(missing, None))
        raise changed

    def copying(self) -> dict[tuple[str, str], Progress]:
        """Migrations that this coordinator does, by the names of collection and vector."""
        return self._copier.progress()

    def extra_requests(self) -> dict[str, int]:
        """As `Storage` counts them."""
        return self._storage.extra_requests()

    # -- the cluster ------------------------------------------------------------------------------
    async def cluster_state(self) -> ClusterState:
        """Who there is and who holds what, as the metadata store says now."""
        alone = self._local_node is not None
        nodes, _ = await self._store.range(NODES_PREFIX)
        shards, _ = await self._store.range(SHARDS_PREFIX)
        leader = await self._store.get(LEADER_KEY)
        actions = await self._store.get(ACTIONS_KEY)
        known = [NodeRecord.from_bytes(entry.key, entry.value) for entry in nodes]
        if alone and not known:
            known = [NodeRecord(id=self._node_id, role=NodeRole.STORAGE, incarnation="")]
        records = [ShardRecord.from_bytes(entry.key, entry.value) for entry in shards]
        return ClusterState(
            node=self._node_id,
            alone=alone,
            nodes={node.id: node for node in known},
            shards={ShardKey(record.collection_id, record.shard): record for record in records},
            leader=None
            if leader is None
            else LeaderRecord.from_bytes(leader.key, leader.value).node,
            actions=()
            if actions is None
            else ActionsRecord.from_bytes(actions.key, actions.value).actions,
        )

    async def describe_cluster(self) -> dict[str, Any]:
        """Everything about it, with what the storage nodes say of themselves."""
        state, said, groups = await asyncio.gather(
            self.cluster_state(), self._storage.statuses(), self._encoder_groups()
        )
        return {"encoders": groups} | describe_cluster(state, self.catalog.collections(), said)

    async def _encoder_groups(self) -> list[dict[str, Any]]:
        return [] if self._encoder is None else await self._encoder.describe()

    async def describe_peers(self) -> dict[str, Any]:
        return describe_peers(await self.cluster_state())

    async def describe_replicas(self, collection: Collection) -> dict[str, Any]:
        """Where those of one collection are."""
        state = await self.cluster_state()
        here = [
            key
            for key in collection.shards
            if key in state.shards and self._node_id in state.shards[key].members()
        ]
        infos = await _all([self._storage.info(key) for key in here])
        return describe_collection_cluster(collection, state, dict(zip(here, infos, strict=True)))

    # -- texts ------------------------------------------------------------------------------------
    async def encode(
        self, texts: Sequence[str], model: str, fingerprint: str | None = None
    ) -> Embedding:
        """Texts of no collection. Raises NotSupported when there is no encoder."""
        return await self.texts.encode(texts, model, fingerprint)

    def models(self) -> list[ModelInfo]:
        return self.texts.models()


def _searched(fields: VectorFields, using: str) -> VectorField:
    """The dense vector to search. Raises BadRequest for one that is not there or not searchable."""
    to = fields.dense.get(using)
    if to is None and using in fields.sparse:
        raise BadRequest(
            f"Wrong input: searching the sparse vector '{using}' is not supported by this version "
            "of Shoal"
        )
    if to is None:
        raise unknown_vector(using, fields)
    if to.multi:
        raise BadRequest(
            f"Wrong input: searching the multivector '{using}' is not supported by this version of "
            "Shoal"
        )
    return to


def _at_least(read: Read, collection: Collection) -> Read:
    """A replica may not have the last vectors that a migration has made yet; the switch waited for
    them."""
    floors = [vector.floor for vector in collection.record.migrated.values() if vector.floor]
    if not floors:
        return read
    seen = {
        shard: max(read.token.get(shard, 0), *(floor[shard.shard] for floor in floors))
        for shard in collection.shards
    }
    return replace(read, token={**read.token, **seen})


def _known(wanted: bool | tuple[str, ...], collection: Collection) -> bool | tuple[str, ...]:
    """As shards know them. Names that the collection does not have select nothing."""
    if not isinstance(wanted, bool):
        wanted = tuple(name for name in wanted if name in collection.fields) or False
    return stored_names(wanted, collection.fields, collection.pairs) if collection.pairs else wanted


def _select(points: PointBatch, selection: PayloadSelection) -> None:
    points.set_payloads(
        [
            select(points.payload_of(row), include=selection.include, exclude=selection.exclude)
            for row in range(len(points))
        ]
    )


def _no_points() -> PointBatch:
    return PointBatch(PointIds.from_keys([]))


# -- spreading over shards ------------------------------------------------------------------------
def _split(ids: PointIds, shards: Sequence[ShardKey]) -> list[tuple[ShardKey, NDArray[np.intp]]]:
    """The rows that belong to each shard, in order; shards without any are left out."""
    owners = ids.shards(len(shards))
    return [
        (shard, rows)
        for number, shard in enumerate(shards)
        if len(rows := np.flatnonzero(owners == number))
    ]


def _split_write(write: Write, shards: Sequence[ShardKey]) -> list[tuple[ShardKey, Write]]:
    if len(shards) == 1:
        return [(shards[0], write)]
    match write:
        case AlterVectors():
            return [(shard, write) for shard in shards]
        case UpdateVectors(if_versions=versions) if versions is not None:
            return [
                (shard, replace(write, points=write.points.take(rows), if_versions=versions[rows]))
                for shard, rows in _split(write.points.ids, shards)
            ]
        case Upsert() | UpdateVectors():
            return [
                (shard, replace(write, points=write.points.take(rows)))
                for shard, rows in _split(write.points.ids, shards)
            ]
        case (
            Delete()
            | DeleteVectors()
            | SetPayload()
            | OverwritePayload()
            | DeletePayload()
            | ClearPayload()
        ):
            ids = write.where.ids
            if ids is None:
                return [(shard, write) for shard in shards]
            return [
                (shard, replace(write, where=replace(write.where, ids=ids.take(rows))))
                for shard, rows in _split(ids, shards)
            ]


def _first_missing(write: Write, results: Sequence[WriteResult]) -> int | None:
    """Of the first missing ids of all shards, the one that stands first in the request."""
    missing = {result.missing for result in results} - {None}
    if len(missing) <= 1:
        return next(iter(missing), None)
    return next(key for key in _named(write).keys() if key in missing)  # noqa: SIM118


def _named(write: Write) -> PointIds:
    """The ids that a write has missed one of."""
    assert not isinstance(write, AlterVectors)  # it names no points
    ids = write.points.ids if isinstance(write, Upsert | UpdateVectors) else write.where.ids
    must(ids is not None, "a write by filter cannot miss a point")
    return cast(PointIds, ids)


async def _all_written(calls: Sequence[Coroutine[Any, Any, WriteResult]]) -> list[WriteResult]:
    """Like `_all`; an error says so when other shards have applied their part."""
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    failed = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    if not failed:
        return [outcome for outcome in outcomes if isinstance(outcome, WriteResult)]
    error = failed[0]
    if not isinstance(error, ShoalError):
        raise error
    if any(not isinstance(other, ShoalError) or other.maybe_applied for other in failed):
        error.maybe_applied = True
    if len(failed) < len(outcomes):
        error.maybe_applied = True
        error.message += (
            f" {len(outcomes) - len(failed)} of {len(outcomes)} shards have applied their part: "
            "send the whole request again."
        )
    raise error


async def _all(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Answers of all calls, in order. All have ended when this returns or raises the first error."""
    if len(calls) == 1:
        return [await calls[0]]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    answers: list[T] = []
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        answers.append(outcome)
    return answers
