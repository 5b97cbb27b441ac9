"""`AsyncClient`: Shoal from Python, over gRPC, on an event loop. `Client` is the same without one."""

from __future__ import annotations

import random
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
from google.protobuf.message import Message
from numpy.typing import ArrayLike

from shoal.client import decode, encode
from shoal.client.core import DEFAULT_PORT, Core, parse_addresses
from shoal.client.encode import Filter
from shoal.client.migration import AsyncMigration
from shoal.client.retry import RetryPolicy
from shoal.client.seen import Seen
from shoal.client.upload import upload_batches
from shoal.client.values import (
    Batch,
    CollectionInfo,
    Consistency,
    Hits,
    Hnsw,
    Ids,
    Page,
    Point,
    PointId,
    Points,
    UpdateMode,
    UploadProgress,
    VectorParams,
    Vectors,
    WithPayload,
    WriteResult,
)
from shoal.errors import BadRequest
from shoal.limits import GRPC_STREAM_SEARCHES_MAX
from shoal.v1 import collections_pb2, common_pb2, points_pb2

__all__ = ["AsyncClient"]

_MODES = {
    "upsert": points_pb2.UPDATE_MODE_UPSERT,
    "insert_only": points_pb2.UPDATE_MODE_INSERT_ONLY,
    "update_only": points_pb2.UPDATE_MODE_UPDATE_ONLY,
}
_CONSISTENCIES = {
    "default": common_pb2.CONSISTENCY_DEFAULT,
    "strong": common_pb2.CONSISTENCY_STRONG,
}


class AsyncClient:
    """A client of one server or of any coordinators of a cluster. For one event loop.

        async with AsyncClient("localhost:6334") as client:
            hits = await client.search("films", [0.1, 0.7, 0.2, 0.0], limit=3)

    addresses          "host:port", several with commas between or as a list. The first is used until
                       it fails, then the next.
    api_key            as the server was given it.
    tls                the server is behind something that speaks TLS.
    timeout_s          of one call with all its retries, unless the call says otherwise.
    connect_timeout_s  how long a server may be unreachable before an attempt counts as failed.
    retry              when and how often a call is repeated (shoal/client/retry.py).
    in_flight_max      calls at work; more wait for one of these to end, within their timeout.

    Every read sees every write that this client was told of, on whichever coordinator it ends up:
    the tokens that make it so are kept here.

    **Errors** are the classes of `shoal.errors`: what you asked for is wrong (`BadRequest`,
    `NotFound`, ...), or the servers could not (`Unavailable`, `Busy`, `TimedOut`, ...). Of a write
    that failed, `error.maybe_applied` says whether it may have happened all the same.

    **Retries.** Reads are repeated when a server is busy or lost. A write is repeated only when it
    has certainly not happened, or when you say that repeating it is harmless (`idempotent=True`).
    """

    def __init__(
        self,
        addresses: str | Sequence[str] = f"localhost:{DEFAULT_PORT}",
        *,
        api_key: str | None = None,
        tls: bool = False,
        timeout_s: float = 30.0,
        connect_timeout_s: float = 10.0,
        retry: RetryPolicy | None = None,
        in_flight_max: int = 256,
        dice: random.Random | None = None,
    ) -> None:
        self._core = Core(
            parse_addresses(addresses),
            api_key=api_key,
            tls=tls,
            timeout_s=timeout_s,
            connect_timeout_s=connect_timeout_s,
            retry=retry or RetryPolicy(),
            in_flight_max=in_flight_max,
            dice=dice or random.Random(),
        )
        self._seen = Seen()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Let go of the connections. Calls under way fail."""
        await self._core.close()

    async def remember(self, collection: str, token: str) -> None:
        """Let reads of `collection` see the write of another client, by the token of its result."""
        try:
            self._seen.remember(collection, token)
        except ValueError as error:
            raise BadRequest(f"Wrong input: {error}") from None

    # -- collections ------------------------------------------------------------------------------
    async def create_collection(
        self,
        name: str,
        vectors: VectorParams | Mapping[str, VectorParams],
        *,
        sparse_vectors: Sequence[str] = (),
        shard_number: int | None = None,
        replication_factor: int | None = None,
        write_consistency_factor: int | None = None,
        hnsw: Hnsw | None = None,
        metadata: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """vectors: the unnamed one, or several by name. None: the server's default.
        Raises AlreadyExists."""
        config = encode.collection_config(
            vectors,
            sparse_vectors=sparse_vectors,
            shard_number=shard_number,
            replication_factor=replication_factor,
            write_consistency_factor=write_consistency_factor,
            hnsw=hnsw,
            metadata=metadata,
        )
        self._seen.forget(name)
        request = collections_pb2.CreateCollectionRequest(name=name, config=config)
        answer = collections_pb2.CreateCollectionResponse
        await self._core.change("Collections/Create", request, answer, timeout_s)

    async def get_collection(self, name: str, *, timeout_s: float | None = None) -> CollectionInfo:
        """Raises NotFound."""
        request = collections_pb2.GetCollectionRequest(name=name)
        answer = collections_pb2.CollectionInfo
        return decode.collection_info(
            await self._core.ask("Collections/Get", request, answer, timeout_s)
        )

    async def list_collections(self, *, timeout_s: float | None = None) -> list[str]:
        """Names, in order."""
        request = collections_pb2.ListCollectionsRequest()
        answer = collections_pb2.ListCollectionsResponse
        return list((await self._core.ask("Collections/List", request, answer, timeout_s)).names)

    async def collection_exists(self, name: str, *, timeout_s: float | None = None) -> bool:
        request = collections_pb2.CollectionExistsRequest(name=name)
        answer = collections_pb2.CollectionExistsResponse
        return (await self._core.ask("Collections/Exists", request, answer, timeout_s)).exists

    async def delete_collection(self, name: str, *, timeout_s: float | None = None) -> bool:
        """False: there was none."""
        request = collections_pb2.DeleteCollectionRequest(name=name)
        answer = collections_pb2.DeleteCollectionResponse
        deleted = (
            await self._core.change("Collections/Delete", request, answer, timeout_s)
        ).deleted
        self._seen.forget(name)
        return deleted

    # -- finding ----------------------------------------------------------------------------------
    async def search(
        self,
        collection: str,
        vector: ArrayLike | None = None,
        *,
        text: str | None = None,
        model: str = "",
        point: PointId | None = None,
        using: str = "",
        limit: int = 10,
        offset: int = 0,
        filter: Filter | None = None,
        score_threshold: float | None = None,
        exact: bool = False,
        ef: int | None = None,
        with_payload: WithPayload = False,
        with_vectors: bool | Sequence[str] = False,
        consistency: Consistency = "default",
        timeout_s: float | None = None,
    ) -> Hits:
        """The `limit` best points; all of them whenever so many match the filter.

        vector  (dim,) numbers. Or `text`, of which the server makes the vector; or `point`, whose own
                vector is searched with, and which is left out itself. Without any of them: points by
                ascending id, score 0.
        model   of the text ("": see `Texts`), or whose numbers `vector` is: refused if the vector that
                is searched is of another; "" does not say.
        using   name of the vector to search.
        offset  leave out so many of the best.
        filter  as the HTTP API has it: {"must": [{"key": "year", "range": {"lt": 1985}}]}.
        score_threshold  only better scores.
        exact   do not use the index. ef: its beam width.
        """
        request = self._search_request(
            collection,
            text=text,
            model=model,
            point=point,
            using=using,
            limit=limit,
            offset=offset,
            filter=filter,
            score_threshold=score_threshold,
            exact=exact,
            ef=ef,
            with_payload=with_payload,
            with_vectors=with_vectors,
            consistency=consistency,
        )
        if vector is not None:
            if request.WhichOneof("query") is not None:
                raise BadRequest("Wrong input: give one of vector, text and point")
            request.vector = encode.vector_bytes(vector)
            request.model = model
        found = await self._core.run(
            lambda connection, left: connection.search(request, left), timeout_s=timeout_s
        )
        return decode.hits(found)

    async def search_batch(
        self,
        collection: str,
        vectors: ArrayLike,
        *,
        model: str = "",
        using: str = "",
        limit: int = 10,
        offset: int = 0,
        filter: Filter | None = None,
        score_threshold: float | None = None,
        exact: bool = False,
        ef: int | None = None,
        with_payload: WithPayload = False,
        with_vectors: bool | Sequence[str] = False,
        consistency: Consistency = "default",
        timeout_s: float | None = None,
    ) -> list[Hits]:
        """One search for each row of `vectors`, (n, dim), in order. All of them, or an error. model:
        see `search`."""
        request = self._search_request(
            collection,
            using=using,
            limit=limit,
            offset=offset,
            filter=filter,
            score_threshold=score_threshold,
            exact=exact,
            ef=ef,
            with_payload=with_payload,
            with_vectors=with_vectors,
            consistency=consistency,
        )
        rows = np.asarray(vectors)
        if rows.ndim != 2:
            raise BadRequest(f"Wrong input: vectors must be (n, dim), not {rows.shape}")
        found: list[Hits] = []
        for first in range(0, len(rows), GRPC_STREAM_SEARCHES_MAX):
            batch = points_pb2.SearchBatchRequest()
            for row in rows[first : first + GRPC_STREAM_SEARCHES_MAX]:
                search = batch.searches.add()
                search.CopyFrom(request)
                search.vector = encode.vector_bytes(row)
                search.model = model
            answer = await self._core.ask(
                "Points/SearchBatch", batch, points_pb2.SearchBatchResponse, timeout_s
            )
            found += map(decode.hits, answer.results)
        return found

    def _search_request(
        self,
        collection: str,
        *,
        text: str | None = None,
        model: str = "",
        point: PointId | None = None,
        using: str,
        limit: int,
        offset: int,
        filter: Filter | None,
        score_threshold: float | None,
        exact: bool,
        ef: int | None,
        with_payload: WithPayload,
        with_vectors: bool | Sequence[str],
        consistency: Consistency,
    ) -> points_pb2.SearchRequest:
        if text is not None and point is not None:
            raise BadRequest("Wrong input: give one of vector, text and point")
        if limit < 1 or offset < 0 or (ef is not None and ef < 1):
            raise BadRequest("Wrong input: limit and ef must be at least 1, offset at least 0")
        return points_pb2.SearchRequest(
            collection=collection,
            point=None if point is None else encode.point_id(point),
            text=None if text is None else points_pb2.Text(text=text, model=model),
            using=using,
            limit=limit,
            offset=offset,
            filter=encode.filter_bytes(filter),
            score_threshold=score_threshold,
            exact=exact,
            ef=ef or 0,
            with_payload=encode.payload_selector(with_payload) if with_payload else None,
            with_vectors=encode.vector_selector(with_vectors) if with_vectors else None,
            read=self._read(collection, consistency),
        )

    def _read(self, collection: str, consistency: Consistency) -> common_pb2.ReadOptions | None:
        wanted = _CONSISTENCIES.get(consistency)
        if wanted is None:
            raise BadRequest(f"Wrong input: consistency is one of {', '.join(_CONSISTENCIES)}")
        token = self._seen.token(collection)
        if not wanted and not token:
            return None
        return common_pb2.ReadOptions(consistency=wanted, token=token)

    # -- reading ----------------------------------------------------------------------------------
    async def retrieve(
        self,
        collection: str,
        ids: Ids,
        *,
        with_payload: WithPayload = True,
        with_vectors: bool | Sequence[str] = False,
        consistency: Consistency = "default",
        timeout_s: float | None = None,
    ) -> Points:
        """The points with these ids, in their order; those that do not exist are left out."""
        request = points_pb2.RetrieveRequest(
            collection=collection,
            ids=encode.wire_ids(ids),
            with_payload=encode.payload_selector(with_payload),
            with_vectors=encode.vector_selector(with_vectors),
            read=self._read(collection, consistency),
        )
        answer = points_pb2.RetrieveResponse
        return decode.points(
            (await self._core.ask("Points/Retrieve", request, answer, timeout_s)).points
        )

    async def scroll(
        self,
        collection: str,
        *,
        start: PointId | None = None,
        limit: int = 10,
        filter: Filter | None = None,
        with_payload: WithPayload = True,
        with_vectors: bool | Sequence[str] = False,
        consistency: Consistency = "default",
        timeout_s: float | None = None,
    ) -> Page:
        """Points by ascending id, from `start` (inclusive) on."""
        if limit < 1:
            raise BadRequest("Wrong input: limit must be at least 1")
        request = points_pb2.ScrollRequest(
            collection=collection,
            start=None if start is None else encode.point_id(start),
            limit=limit,
            filter=encode.filter_bytes(filter),
            with_payload=encode.payload_selector(with_payload),
            with_vectors=encode.vector_selector(with_vectors),
            read=self._read(collection, consistency),
        )
        answer = points_pb2.ScrollResponse
        return decode.page(await self._core.ask("Points/Scroll", request, answer, timeout_s))

    async def iterate(
        self,
        collection: str,
        *,
        filter: Filter | None = None,
        page_points: int = 1_000,
        with_payload: WithPayload = True,
        with_vectors: bool | Sequence[str] = False,
        consistency: Consistency = "default",
    ) -> AsyncIterator[Point]:
        """Every point that matches, by ascending id, `page_points` a call."""
        start: PointId | None = None
        while True:
            page = await self.scroll(
                collection,
                start=start,
                limit=page_points,
                filter=filter,
                with_payload=with_payload,
                with_vectors=with_vectors,
                consistency=consistency,
            )
            for point in page.points:
                yield point
            if (start := page.next) is None:
                return

    async def count(
        self,
        collection: str,
        filter: Filter | None = None,
        *,
        consistency: Consistency = "default",
        timeout_s: float | None = None,
    ) -> int:
        """Exact."""
        request = points_pb2.CountRequest(
            collection=collection,
            filter=encode.filter_bytes(filter),
            read=self._read(collection, consistency),
        )
        answer = points_pb2.CountResponse
        return (await self._core.ask("Points/Count", request, answer, timeout_s)).count

    # -- writing points ---------------------------------------------------------------------------
    async def upsert(
        self,
        collection: str,
        ids: Ids,
        vectors: Vectors | None = None,
        payloads: Sequence[Mapping[str, Any] | None] | None = None,
        *,
        model: str = "",
        update_filter: Filter | None = None,
        update_mode: UpdateMode = "upsert",
        idempotent: bool = False,
        timeout_s: float | None = None,
    ) -> WriteResult:
        """Write whole points: durable and visible when this returns. For many, see `upload`.

        ids       n numbers or UUIDs. Of one that comes twice the later row wins.
        vectors   (n, dim) for the unnamed vector, or name -> column: an array, `Dense`, `Texts`,
                  `Sparse`, `Multi`.
        payloads  n dicts; None: none.
        model     whose the numbers are: refused if a vector is of another; "" does not say.
        update_filter  points that exist are replaced only if they match.
        idempotent     nobody else writes these ids now, so the write may be sent again when it is
                       not known whether it happened.
        """
        request = self._upsert_request(
            collection, Batch(ids, vectors, payloads), update_filter, update_mode, model
        )
        return await self._write("Points/Upsert", collection, request, idempotent, timeout_s)

    def _upsert_request(
        self,
        collection: str,
        batch: Batch,
        update_filter: Filter | None = None,
        update_mode: UpdateMode = "upsert",
        model: str = "",
    ) -> points_pb2.UpsertRequest:
        mode = _MODES.get(update_mode)
        if mode is None:
            raise BadRequest(f"Wrong input: update_mode is one of {', '.join(_MODES)}")
        points, texts = encode.points_of(batch)
        return points_pb2.UpsertRequest(
            collection=collection,
            points=points,
            texts=texts,
            update_filter=encode.filter_bytes(update_filter),
            update_mode=mode,
            wait=True,
            model=model,
        )

    async def upload(
        self,
        collection: str,
        points: Batch | Iterable[Batch] | AsyncIterable[Batch],
        *,
        batch_points: int = 1_000,
        in_flight: int = 4,
        on_progress: Callable[[UploadProgress], None] | None = None,
        model: str = "",
        idempotent: bool = True,
        timeout_s: float = 120.0,
    ) -> UploadProgress:
        """Write many points: in batches, several at a time over one stream.

        points       one large `Batch`, which is cut up, or any number of them: a list, a generator,
                     an async generator. It is read a few batches ahead of the server, in a thread
                     unless it is async, so memory stays bounded and reading may block.
        in_flight    batches on their way. With more than one, batches may be applied in any order:
                     of an id that is in two of them either may win.
        on_progress  is told after each batch that is durable.
        model        see `upsert`
        idempotent   True here: a batch of which it is not known whether it happened is sent again.
                     Say False when others write the same ids meanwhile.
        timeout_s    of one batch, with its retries: what a restart of the server may take.
        Returns      what was written. An error says how much was, in a note; that stays written.
        """

        async def send(batch: Batch) -> WriteResult:
            request = self._upsert_request(collection, batch, model=model)
            written = await self._core.run(
                lambda connection, left: connection.upsert(request, left),
                writes=True,
                idempotent=idempotent,
                timeout_s=timeout_s,
            )
            self._seen.remember(collection, written.token)
            return decode.write_result(written)

        return await upload_batches(
            points, send, batch_points=batch_points, in_flight=in_flight, on_progress=on_progress
        )

    async def update_vectors(
        self,
        collection: str,
        ids: Ids,
        vectors: Vectors,
        *,
        model: str = "",
        update_filter: Filter | None = None,
        idempotent: bool = False,
        timeout_s: float | None = None,
    ) -> WriteResult:
        """Replace these vectors and keep the rest of each point. Raises NotFound when one of the
        points does not exist, after the others were changed. model: see `upsert`."""
        points, texts = encode.points_of(Batch(ids, vectors))
        request = points_pb2.UpdateVectorsRequest(
            model=model,
            collection=collection,
            points=points,
            texts=texts,
            update_filter=encode.filter_bytes(update_filter),
            wait=True,
        )
        return await self._write("Points/UpdateVectors", collection, request, idempotent, timeout_s)

    # -- writing what is selected: by ids, or by a filter -----------------------------------------
    async def delete(
        self,
        collection: str,
        ids: Ids | None = None,
        *,
        filter: Filter | None = None,
        idempotent: bool = False,
        timeout_s: float | None = None,
    ) -> WriteResult:
        """Delete points. Ids that do not exist are fine; the filter {} means all points."""
        request = points_pb2.DeletePointsRequest(
            collection=collection, where=encode.selector(ids, filter), wait=True
        )
        return await self._write("Points/Delete", collection, request, idempotent, timeout_s)

    async def delete_vectors(
        self,
        collection: str,
        names: Sequence[str],
        ids: Ids | None = None,
        *,
        filter: Filter | None = None,
        idempotent: bool = False,
        timeout_s: float | None = None,
    ) -> WriteResult:
        request = points_pb2.DeleteVectorsRequest(
            collection=collection, where=encode.selector(ids, filter), names=names, wait=True
        )
        return await self._write("Points/DeleteVectors", collection, request, idempotent, timeout_s)

    async def set_payload(
        self,
        collection: str,
        payload: Mapping[str, Any],
        ids: Ids | None = None,
        *,
        filter: Filter | None = None,
        key: str | None = None,
        idempotent: bool = False,
        timeout_s: float | None = None,
    ) -> WriteResult:
        """Merge `payload` into each payload, at the top or at the JSON path `key`."""
        request = points_pb2.SetPayloadRequest(
            collection=collection,
            where=encode.selector(ids, filter),
            payload=encode.json_bytes(payload, "payload"),
            key=key,
            wait=True,
        )
        return await self._write("Points/SetPayload", collection, request, idempotent, timeout_s)

    async def overwrite_payload(
        self,
        collection: str,
        payload: Mapping[str, Any],
        ids: Ids | None = None,
        *,
        filter: Filter | None = None,
        idempotent: bool = False,
        timeout_s: float | None = None,
    ) -> WriteResult:
        """Replace each payload as a whole."""
        request = points_pb2.OverwritePayloadRequest(
            collection=collection,
            where=encode.selector(ids, filter),
            payload=encode.json_bytes(payload, "payload"),
            wait=True,
        )
        return await self._write(
            "Points/OverwritePayload", collection, request, idempotent, timeout_s
        )

    async def delete_payload(
        self,
        collection: str,
        keys: Sequence[str],
        ids: Ids | None = None,
        *,
        filter: Filter | None = None,
        idempotent: bool = False,
        timeout_s: float | None = None,
    ) -> WriteResult:
        """Take the values at these JSON paths out of each payload."""
        request = points_pb2.DeletePayloadRequest(
            collection=collection, where=encode.selector(ids, filter), keys=keys, wait=True
        )
        return await self._write("Points/DeletePayload", collection, request, idempotent, timeout_s)

    async def clear_payload(
        self,
        collection: str,
        ids: Ids | None = None,
        *,
        filter: Filter | None = None,
        idempotent: bool = False,
        timeout_s: float | None = None,
    ) -> WriteResult:
        request = points_pb2.ClearPayloadRequest(
            collection=collection, where=encode.selector(ids, filter), wait=True
        )
        return await self._write("Points/ClearPayload", collection, request, idempotent, timeout_s)

    async def _write(
        self,
        method: str,
        collection: str,
        request: Message,
        idempotent: bool,
        timeout_s: float | None,
    ) -> WriteResult:
        answer = points_pb2.WriteResult
        written = await self._core.change(method, request, answer, timeout_s, idempotent=idempotent)
        self._seen.remember(collection, written.token)
        return decode.write_result(written)

    # -- changing the model of a vector -----------------------------------------------------------
    def migration(self, collection: str, vector: str = "") -> AsyncMigration:
        """The change of the model of a vector, to begin or under way. Asks nobody yet."""
        return AsyncMigration(self._core, collection, vector)
