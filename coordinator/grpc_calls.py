"""What each RPC of proto/shoal/v1 does: a coordinator and a message in, a message out.

The streams are not here, only what one item of theirs asks for; see coordinator/grpc_api.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, TypeVar

from google.protobuf.message import Message

from coordinator import grpc_parse as parse
from coordinator.catalog import Collection
from coordinator.describe import describe_collection
from coordinator.grpc_render import (
    render_collection,
    render_comparison,
    render_hits,
    render_migration,
    render_retrieved,
    render_scroll,
)
from coordinator.migrations import Migrations
from coordinator.parse import PointsWrite
from coordinator.requests import AnyWrite
from coordinator.routing import ShardGone
from coordinator.service import Coordinator
from coordinator.texts import count_truncated
from shoal.api.migration import MigrationStatus
from shoal.errors import BadRequest, InvariantError, NotFound, VectorsChanged
from shoal.limits import (
    BODY_BYTES_MAX,
    CONFIG_BYTES_MAX,
    GRPC_STREAM_SEARCHES_MAX,
    MIB,
    VECTORS_CHANGED_ATTEMPTS,
)
from shoal.v1 import collections_pb2, migrations_pb2, points_pb2
from shoal.vectors import VectorFields

__all__ = ["CALLS", "UnaryCall", "search", "upsert"]

# As for HTTP: larger batches are read in another thread, so that searches get a turn in between.
_PARSE_INLINE_BYTES_MAX = 4 * MIB


Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)
Function = Callable[[Coordinator, Q], Awaitable[A]]


def _of_collection(function: Function[Q, A]) -> Function[Q, A]:
    """Once more when the collection was another one by the time that its shards were asked, or its
    vectors were."""

    @wraps(function)
    async def call(coordinator: Coordinator, request: Q) -> A:
        for last in (*[False] * (VECTORS_CHANGED_ATTEMPTS - 1), True):
            name = getattr(request, "collection", None) or request.name  # type: ignore[attr-defined]
            try:
                return await function(coordinator, request)
            except ShardGone as gone:
                if last or not await coordinator.catalog.replaced(name, gone):
                    raise
            except VectorsChanged as changed:
                if last or changed.maybe_applied:
                    raise
                await coordinator.catalog.reread(name)
        raise InvariantError("the last attempt returns or raises")

    return call


# -- collections ----------------------------------------------------------------------------------
async def _create(
    coordinator: Coordinator, request: collections_pb2.CreateCollectionRequest
) -> collections_pb2.CreateCollectionResponse:
    await coordinator.catalog.create(request.name, parse.collection_config(request.config))
    return collections_pb2.CreateCollectionResponse()


@_of_collection
async def _get(
    coordinator: Coordinator, request: collections_pb2.GetCollectionRequest
) -> collections_pb2.CollectionInfo:
    collection = await coordinator.catalog.find(request.name)
    infos = await coordinator.infos(collection)
    return render_collection(collection, describe_collection(collection, infos, {}))


async def _list(
    coordinator: Coordinator, request: collections_pb2.ListCollectionsRequest
) -> collections_pb2.ListCollectionsResponse:
    return collections_pb2.ListCollectionsResponse(names=coordinator.catalog.names())


async def _delete_collection(
    coordinator: Coordinator, request: collections_pb2.DeleteCollectionRequest
) -> collections_pb2.DeleteCollectionResponse:
    deleted = await coordinator.catalog.delete(request.name)
    return collections_pb2.DeleteCollectionResponse(deleted=deleted)


async def _exists(
    coordinator: Coordinator, request: collections_pb2.CollectionExistsRequest
) -> collections_pb2.CollectionExistsResponse:
    try:
        await coordinator.catalog.find(request.name)
    except NotFound:
        return collections_pb2.CollectionExistsResponse(exists=False)
    return collections_pb2.CollectionExistsResponse(exists=True)


# -- points: reads --------------------------------------------------------------------------------
@_of_collection
async def search(
    coordinator: Coordinator, request: points_pb2.SearchRequest
) -> points_pb2.SearchResponse:
    truncated = count_truncated()
    collection = await coordinator.catalog.find(request.collection)
    query, read = parse.query_of(request), parse.read_of(request.read)
    if request.model:
        collection = coordinator.texts.numbers_of(collection, request.model)
        coordinator.texts.check_numbers(collection, request.model, (query.using,), reading=True)
    answer = render_hits(await coordinator.query(collection, query, read))
    answer.truncated_texts = truncated.count
    return answer


async def _search_batch(
    coordinator: Coordinator, request: points_pb2.SearchBatchRequest
) -> points_pb2.SearchBatchResponse:
    if len(request.searches) > GRPC_STREAM_SEARCHES_MAX:
        raise BadRequest(
            f"Wrong input: {len(request.searches)} searches in one request, the most is "
            f"{GRPC_STREAM_SEARCHES_MAX}: send several, or use SearchStream"
        )
    outcomes = await asyncio.gather(
        *(search(coordinator, one) for one in request.searches), return_exceptions=True
    )
    answer = points_pb2.SearchBatchResponse()
    for outcome in outcomes:  # all have ended by now
        if isinstance(outcome, BaseException):
            raise outcome
        answer.results.append(outcome)
    return answer


@_of_collection
async def _scroll(
    coordinator: Coordinator, request: points_pb2.ScrollRequest
) -> points_pb2.ScrollResponse:
    collection = await coordinator.catalog.find(request.collection)
    query, read = parse.scroll_of(request), parse.read_of(request.read)
    return render_scroll(*await coordinator.scroll(collection, query, read))


@_of_collection
async def _retrieve(
    coordinator: Coordinator, request: points_pb2.RetrieveRequest
) -> points_pb2.RetrieveResponse:
    collection = await coordinator.catalog.find(request.collection)
    wanted, read = parse.retrieve_of(request), parse.read_of(request.read)
    return render_retrieved(await coordinator.retrieve(collection, wanted, read))


@_of_collection
async def _count(
    coordinator: Coordinator, request: points_pb2.CountRequest
) -> points_pb2.CountResponse:
    collection = await coordinator.catalog.find(request.collection)
    wanted, read = parse.filter_of(request.filter), parse.read_of(request.read)
    return points_pb2.CountResponse(count=await coordinator.count(collection, wanted, read))


# -- points: writes -------------------------------------------------------------------------------
async def _write(
    read: Callable[[Any, VectorFields], AnyWrite], coordinator: Coordinator, request: Any
) -> points_pb2.WriteResult:
    truncated = count_truncated()
    collection = await coordinator.catalog.find(request.collection)
    declared = getattr(request, "model", "")  # of writes that bring vectors
    if declared:
        collection = coordinator.texts.numbers_of(collection, declared)
    if request.ByteSize() > _PARSE_INLINE_BYTES_MAX:
        write = await asyncio.to_thread(read, request, collection.fields)
    else:
        write = read(request, collection.fields)
    if declared and isinstance(write, PointsWrite):
        coordinator.texts.check_numbers(collection, declared, write.points.dense)
    written = await coordinator.write(collection, write)
    return points_pb2.WriteResult(
        operation_id=written.operation,
        status=(
            points_pb2.UPDATE_STATUS_COMPLETED
            if request.wait
            else points_pb2.UPDATE_STATUS_ACKNOWLEDGED
        ),
        token=written.token,
        truncated_texts=truncated.count,
    )


upsert = _of_collection(partial(_write, parse.upsert))


# -- changing the model of a vector ---------------------------------------------------------------
async def _migrate(
    ask: Callable[[Migrations, Collection, Any], Awaitable[MigrationStatus]],
    coordinator: Coordinator,
    request: Any,
) -> migrations_pb2.MigrationStatus:
    collection = await coordinator.catalog.find(request.collection)
    return render_migration(await ask(coordinator.migrations, collection, request))


@_of_collection
async def _compare(
    coordinator: Coordinator, request: migrations_pb2.CompareModelsRequest
) -> migrations_pb2.ComparedModels:
    collection = await coordinator.catalog.find(request.collection)
    wanted = parse.comparison_of(request)
    return render_comparison(
        await coordinator.migrations.compare(collection, request.vector, wanted)
    )


# -- the table ------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class UnaryCall:
    """writes: refused to the read-only key. bytes_max: of the request; larger ones are not even read."""

    request: type[Message]
    function: Callable[[Coordinator, Any], Awaitable[Message]]
    writes: bool = False
    bytes_max: int = BODY_BYTES_MAX


def _writes(request: type[Message], read: Callable[[Any, VectorFields], AnyWrite]) -> UnaryCall:
    return UnaryCall(request, _of_collection(partial(_write, read)), writes=True)


def _migrates(
    request: type[Message],
    ask: Callable[[Migrations, Collection, Any], Awaitable[MigrationStatus]],
) -> UnaryCall:
    function = _of_collection(partial(_migrate, ask))
    return UnaryCall(request, function, writes=True, bytes_max=CONFIG_BYTES_MAX)


CALLS: dict[str, UnaryCall] = {
    "shoal.v1.Collections/Create": UnaryCall(
        collections_pb2.CreateCollectionRequest, _create, writes=True
    ),
    "shoal.v1.Collections/Get": UnaryCall(collections_pb2.GetCollectionRequest, _get),
    "shoal.v1.Collections/List": UnaryCall(collections_pb2.ListCollectionsRequest, _list),
    "shoal.v1.Collections/Delete": UnaryCall(
        collections_pb2.DeleteCollectionRequest, _delete_collection, writes=True
    ),
    "shoal.v1.Collections/Exists": UnaryCall(collections_pb2.CollectionExistsRequest, _exists),
    "shoal.v1.Migrations/Start": _migrates(
        migrations_pb2.StartMigrationRequest,
        lambda migrations, of, asked: migrations.start(of, asked.vector, parse.migration_of(asked)),
    ),
    "shoal.v1.Migrations/Status": UnaryCall(
        migrations_pb2.MigrationStatusRequest,
        _of_collection(
            partial(_migrate, lambda migrations, of, asked: migrations.status(of, asked.vector))
        ),
    ),
    # It changes nothing; it shows what others have asked.
    "shoal.v1.Migrations/Compare": UnaryCall(
        migrations_pb2.CompareModelsRequest, _compare, writes=True, bytes_max=CONFIG_BYTES_MAX
    ),
    "shoal.v1.Migrations/Switch": _migrates(
        migrations_pb2.SwitchModelRequest,
        lambda migrations, of, asked: migrations.switch(of, asked.vector, parse.switch_of(asked)),
    ),
    "shoal.v1.Migrations/Rollback": _migrates(
        migrations_pb2.RollbackModelRequest,
        lambda migrations, of, asked: migrations.rollback(of, asked.vector),
    ),
    "shoal.v1.Migrations/Drop": _migrates(
        migrations_pb2.DropModelRequest,
        lambda migrations, of, asked: migrations.drop(of, asked.vector, parse.drop_of(asked)),
    ),
    "shoal.v1.Points/Search": UnaryCall(points_pb2.SearchRequest, search),
    "shoal.v1.Points/SearchBatch": UnaryCall(points_pb2.SearchBatchRequest, _search_batch),
    "shoal.v1.Points/Scroll": UnaryCall(points_pb2.ScrollRequest, _scroll),
    "shoal.v1.Points/Retrieve": UnaryCall(points_pb2.RetrieveRequest, _retrieve),
    "shoal.v1.Points/Count": UnaryCall(points_pb2.CountRequest, _count),
    "shoal.v1.Points/Upsert": UnaryCall(points_pb2.UpsertRequest, upsert, writes=True),
    "shoal.v1.Points/UpdateVectors": _writes(points_pb2.UpdateVectorsRequest, parse.update_vectors),
    "shoal.v1.Points/Delete": _writes(points_pb2.DeletePointsRequest, parse.delete_points),
    "shoal.v1.Points/DeleteVectors": _writes(points_pb2.DeleteVectorsRequest, parse.delete_vectors),
    "shoal.v1.Points/SetPayload": _writes(points_pb2.SetPayloadRequest, parse.set_payload),
    "shoal.v1.Points/OverwritePayload": _writes(
        points_pb2.OverwritePayloadRequest, parse.overwrite_payload
    ),
    "shoal.v1.Points/DeletePayload": _writes(points_pb2.DeletePayloadRequest, parse.delete_payload),
    "shoal.v1.Points/ClearPayload": _writes(points_pb2.ClearPayloadRequest, parse.clear_payload),
}
