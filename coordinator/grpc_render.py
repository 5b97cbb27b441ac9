"""Answers as messages of proto/shoal/v1: columns as they came from storage. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from coordinator.catalog import Collection
from shoal.api import migration, models
from shoal.batch import PointBatch
from shoal.ids import PointIds, format_id, parse_id
from shoal.metadata.schema import named_vectors
from shoal.storage_api import Distance, Hits
from shoal.v1 import collections_pb2, common_pb2, migrations_pb2, points_pb2
from shoal.vectors import Datatype
from shoal.wire import ops_pb2 as wire

__all__ = [
    "render_collection",
    "render_comparison",
    "render_hits",
    "render_migration",
    "render_retrieved",
    "render_scroll",
]

_DISTANCES = {
    Distance.COSINE: collections_pb2.DISTANCE_COSINE,
    Distance.DOT: collections_pb2.DISTANCE_DOT,
    Distance.EUCLID: collections_pb2.DISTANCE_EUCLID,
    Distance.MANHATTAN: collections_pb2.DISTANCE_MANHATTAN,
}
_DATATYPES = {
    None: collections_pb2.DATATYPE_DEFAULT,
    Datatype.FLOAT32: collections_pb2.DATATYPE_FLOAT32,
    Datatype.FLOAT16: collections_pb2.DATATYPE_FLOAT16,
    Datatype.UINT8: collections_pb2.DATATYPE_UINT8,
}
_STATUSES = {
    "green": collections_pb2.COLLECTION_STATUS_GREEN,
    "yellow": collections_pb2.COLLECTION_STATUS_YELLOW,
    "red": collections_pb2.COLLECTION_STATUS_RED,
}
_PHASES = {
    "preparing": migrations_pb2.MIGRATION_PHASE_PREPARING,
    "copying": migrations_pb2.MIGRATION_PHASE_COPYING,
    "dropping": migrations_pb2.MIGRATION_PHASE_DROPPING,
}
_SOURCES = {
    "given": migrations_pb2.QUERY_SOURCE_GIVEN,
    "recorded": migrations_pb2.QUERY_SOURCE_RECORDED,
}


def render_hits(hits: Hits) -> points_pb2.SearchResponse:
    return points_pb2.SearchResponse(
        points=hits.points.to_wire(), scores=hits.scores.astype("<f4", copy=False).tobytes()
    )


def render_scroll(points: PointBatch, following: int | None) -> points_pb2.ScrollResponse:
    return points_pb2.ScrollResponse(
        points=points.to_wire(), next=None if following is None else _id(following)
    )


def render_retrieved(points: PointBatch) -> points_pb2.RetrieveResponse:
    return points_pb2.RetrieveResponse(points=points.to_wire())


def _id(key: int) -> common_pb2.PointId:
    value = format_id(key)
    if isinstance(value, int):
        return common_pb2.PointId(number=value)
    return common_pb2.PointId(uuid=value)


def render_collection(
    collection: Collection, about: models.CollectionInfo
) -> collections_pb2.CollectionInfo:
    """about: what the HTTP API says of it (coordinator/describe.py)."""
    request = collection.request
    config = collections_pb2.CollectionConfig(
        sparse_vectors=sorted(request.sparse_vectors or ()),
        shard_number=collection.record.shard_number,
        replication_factor=request.replication_factor or 1,
        write_consistency_factor=request.write_consistency_factor or 1,
        hnsw=_hnsw(request.hnsw_config),
        metadata=b"" if request.metadata is None else msgspec.json.encode(request.metadata),
    )
    for name, vector in named_vectors(request).items():
        config.vectors.add(
            name=name,
            size=vector.size,
            distance=_DISTANCES[vector.distance],
            datatype=_DATATYPES[vector.datatype],
            multivector=vector.multivector_config is not None,
            hnsw=_hnsw(vector.hnsw_config),
        )
    status: str | Mapping[str, str] = about.optimizer_status
    return collections_pb2.CollectionInfo(
        name=collection.name,
        status=_STATUSES[about.status],
        why="" if isinstance(status, str) else status.get("error", ""),
        points_count=about.points_count,
        indexed_vectors_count=about.indexed_vectors_count,
        segments_count=about.segments_count,
        config=config,
    )


def _hnsw(config: models.HnswConfig | None) -> collections_pb2.HnswConfig | None:
    if config is None:
        return None
    given: dict[str, Any] = {
        "m": config.m,
        "ef_construct": config.ef_construct,
        "full_scan_threshold_kib": config.full_scan_threshold,
    }
    return collections_pb2.HnswConfig(**{k: v for k, v in given.items() if v is not None})


# -- changing the model of a vector ---------------------------------------------------------------
def render_migration(status: migration.MigrationStatus) -> migrations_pb2.MigrationStatus:
    current: Any = status.current
    other: Any = status.other
    return migrations_pb2.MigrationStatus(
        phase=_PHASES[status.phase],
        current=migrations_pb2.MigratedModel(**current),
        other=migrations_pb2.MigratedModel(**other),
        **status.model_dump(exclude={"phase", "current", "other"}),  # None: not set
    )


def render_comparison(compared: migration.Compared) -> migrations_pb2.ComparedModels:
    answer = migrations_pb2.ComparedModels(
        current=compared.current,
        other=compared.other,
        limit=compared.limit,
        queries=compared.queries,
        source=_SOURCES[compared.source],
        left=compared.left,
        overlap=migrations_pb2.Interval(**compared.overlap),
    )
    if (quality := compared.ndcg) is not None:
        answer.ndcg.queries = quality.queries
        for name in ("current", "other", "gain"):
            interval = migrations_pb2.Interval(**getattr(quality, name))
            getattr(answer.ndcg, name).CopyFrom(interval)
    for answers in compared.most_different:
        answer.most_different.add(
            text=answers.text,
            overlap=answers.overlap,
            current=_ids(answers.current),
            other=_ids(answers.other),
        )
    return answer


def _ids(ids: Sequence[int | str]) -> wire.PointIds:
    return PointIds.from_keys([parse_id(id_) for id_ in ids]).to_wire()
