"""Shoal from Python: `Client` and `AsyncClient`, over the public gRPC API (proto/shoal/v1).

    from shoal import Client

    with Client("localhost:6334") as client:
        ...

Needs numpy, grpcio, protobuf and msgspec, and no part of the server. `blocking.py` and `aio.py` are
what to read, and `migration.py` for changes of a model; below them `core.py` reaches servers, `retry.py`
decides about repetition, `connection.py` and `multiplex.py` speak gRPC, `encode.py` and `decode.py`
translate.
"""

from __future__ import annotations

from shoal.client.aio import AsyncClient
from shoal.client.blocking import Client, Migration
from shoal.client.migration import (
    AsyncMigration,
    Compared,
    CompareQuery,
    DifferentAnswers,
    Interval,
    MigratedModel,
    MigrationStatus,
    RankingQuality,
)
from shoal.client.retry import RetryPolicy
from shoal.client.values import (
    Batch,
    CollectionInfo,
    Dense,
    Exclude,
    Hit,
    Hits,
    Hnsw,
    Include,
    Multi,
    Page,
    Point,
    Points,
    Sparse,
    SparseVector,
    Texts,
    UploadProgress,
    VectorParams,
    WriteResult,
)

__all__ = [
    "AsyncClient",
    "AsyncMigration",
    "Batch",
    "Client",
    "CollectionInfo",
    "CompareQuery",
    "Compared",
    "Dense",
    "DifferentAnswers",
    "Exclude",
    "Hit",
    "Hits",
    "Hnsw",
    "Include",
    "Interval",
    "MigratedModel",
    "Migration",
    "MigrationStatus",
    "Multi",
    "Page",
    "Point",
    "Points",
    "RankingQuality",
    "RetryPolicy",
    "Sparse",
    "SparseVector",
    "Texts",
    "UploadProgress",
    "VectorParams",
    "WriteResult",
]
