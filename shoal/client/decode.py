"""Messages of proto/shoal/v1 -> values of the client. Pure."""

from __future__ import annotations

import itertools
from typing import Any, Literal, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from shoal.batch import PointBatch
from shoal.client.values import (
    CollectionInfo,
    Datatype,
    Distance,
    Hits,
    Hnsw,
    Page,
    Payload,
    PointId,
    Points,
    SparseVector,
    VectorParams,
    WriteResult,
)
from shoal.ids import format_id
from shoal.v1 import collections_pb2, points_pb2
from shoal.wire import ops_pb2 as wire

__all__ = ["collection_info", "hits", "page", "points", "write_result"]

_STATUSES: dict[int, Literal["green", "yellow", "red"]] = {
    collections_pb2.COLLECTION_STATUS_GREEN: "green",
    collections_pb2.COLLECTION_STATUS_YELLOW: "yellow",
    collections_pb2.COLLECTION_STATUS_RED: "red",
}
_DISTANCES: dict[int, Distance] = {
    collections_pb2.DISTANCE_COSINE: "Cosine",
    collections_pb2.DISTANCE_DOT: "Dot",
    collections_pb2.DISTANCE_EUCLID: "Euclid",
    collections_pb2.DISTANCE_MANHATTAN: "Manhattan",
}
_DATATYPES: dict[int, Datatype] = {
    collections_pb2.DATATYPE_FLOAT16: "float16",
    collections_pb2.DATATYPE_UINT8: "uint8",
}

_decoder: msgspec.json.Decoder[Payload] = msgspec.json.Decoder(dict[str, Any])


def hits(message: points_pb2.SearchResponse) -> Hits:
    return Hits(
        *_columns(message.points),
        scores=np.frombuffer(message.scores, "<f4"),
        truncated_texts=message.truncated_texts,
    )


def points(message: wire.PointBatch) -> Points:
    return Points(*_columns(message))


def page(message: points_pb2.ScrollResponse) -> Page:
    following: PointId | None = None
    match message.next.WhichOneof("id"):
        case "number":
            following = message.next.number
        case "uuid":
            following = message.next.uuid
    return Page(points(message.points), following)


def write_result(message: points_pb2.WriteResult) -> WriteResult:
    return WriteResult(message.operation_id, message.token, message.truncated_texts)


_Columns = tuple[
    list[PointId],
    list[Payload] | None,
    dict[str, NDArray[np.float32]],
    dict[str, list[SparseVector | None]],
    dict[str, list[NDArray[np.float32] | None]],
]


def _columns(message: wire.PointBatch) -> _Columns:
    batch = PointBatch.from_wire(message)
    keys = batch.ids.keys()
    ids: list[PointId] = keys if batch.ids.is_uuid is None else [format_id(key) for key in keys]  # type: ignore[assignment]
    payloads: list[Payload] | None = None
    if batch.payload_offsets is not None:
        ends = batch.payload_offsets.tolist()
        payloads = [
            _decoder.decode(batch.payload[start:end]) if end > start else {}
            for start, end in itertools.pairwise(ends)
        ]
    return ids, payloads, _dense(batch), _sparse(batch), _multi(batch)


def _dense(batch: PointBatch) -> dict[str, NDArray[np.float32]]:
    found = {}
    for name, block in batch.dense.items():
        values = block.values
        if block.present is not None:
            values = values.copy()
            values[~block.present] = np.nan
        found[name] = values
    return found


def _sparse(batch: PointBatch) -> dict[str, list[SparseVector | None]]:
    found: dict[str, list[SparseVector | None]] = {}
    for name, block in batch.sparse.items():
        ends = block.indptr.tolist()
        found[name] = [
            SparseVector(block.indices[start:end], block.values[start:end])
            if block.present is None or block.present[row]
            else None
            for row, (start, end) in enumerate(itertools.pairwise(ends))
        ]
    return found


def _multi(batch: PointBatch) -> dict[str, list[NDArray[np.float32] | None]]:
    found: dict[str, list[NDArray[np.float32] | None]] = {}
    for name, block in batch.multi.items():
        ends = block.indptr.tolist()
        found[name] = [
            block.values[start:end] if block.present is None or block.present[row] else None
            for row, (start, end) in enumerate(itertools.pairwise(ends))
        ]
    return found


def collection_info(message: collections_pb2.CollectionInfo) -> CollectionInfo:
    config = message.config
    return CollectionInfo(
        name=message.name,
        status=_STATUSES.get(message.status, "red"),
        why=message.why,
        points_count=message.points_count,
        indexed_vectors_count=message.indexed_vectors_count,
        segments_count=message.segments_count,
        vectors={
            vector.name: VectorParams(
                size=vector.size,
                distance=_DISTANCES[vector.distance],
                datatype=_DATATYPES.get(vector.datatype, "float32"),
                multivector=vector.multivector,
                hnsw=_hnsw(vector.hnsw) if vector.HasField("hnsw") else None,
            )
            for vector in config.vectors
        },
        sparse_vectors=list(config.sparse_vectors),
        shard_number=config.shard_number,
        replication_factor=config.replication_factor,
        write_consistency_factor=config.write_consistency_factor,
        metadata=_decoder.decode(config.metadata) if config.metadata else None,
    )


def _hnsw(config: collections_pb2.HnswConfig) -> Hnsw:
    fields = ("m", "ef_construct", "full_scan_threshold_kib")
    given = {name: getattr(config, name) for name in fields if config.HasField(cast(Any, name))}
    return Hnsw(**given)
