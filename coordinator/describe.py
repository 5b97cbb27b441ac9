"""A collection and the server as answers describe them: settings in force, counts, state. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from coordinator.catalog import Collection
from shoal.api import models
from shoal.health import HealthReport
from shoal.limits import INDEX_FLOATS_MIN, KIB
from shoal.storage_api import ShardInfo, VectorSpec

__all__ = ["describe_collection", "describe_status"]

_INDEX_KIB_DEFAULT = INDEX_FLOATS_MIN * 4 // KIB
_HNSW_DEFAULTS = {
    "m": VectorSpec.__dataclass_fields__["hnsw_m"].default,
    "ef_construct": VectorSpec.__dataclass_fields__["hnsw_ef_construct"].default,
    "full_scan_threshold": _INDEX_KIB_DEFAULT,
}
# Segments are as many as it takes, and every write is on disk before it is answered.
_OPTIMIZER_DEFAULTS = {
    "default_segment_number": 0,
    "flush_interval_sec": 0,
    "indexing_threshold": _INDEX_KIB_DEFAULT,
}


def describe_collection(
    collection: Collection, infos: Sequence[ShardInfo], points_by_index: Mapping[str, int]
) -> models.CollectionInfo:
    """points_by_index: payload index -> points that have a value there."""
    stopped = [info.stopped for info in infos if info.stopped is not None]
    return models.CollectionInfo(
        status=_status(infos),
        optimizer_status={"error": stopped[0]} if stopped else "ok",
        points_count=sum(info.points for info in infos),
        indexed_vectors_count=sum(info.indexed_vectors for info in infos),
        segments_count=sum(info.segments for info in infos),
        config=_config(collection),
        payload_schema={
            field: _index_info(params, points_by_index.get(field, 0))
            for field, params in collection.record.payload_schema.items()
        },
    )


def _status(infos: Sequence[ShardInfo]) -> Literal["green", "yellow", "red"]:
    if any(info.stopped is not None for info in infos):
        return "red"
    return "yellow" if any(info.pending for info in infos) else "green"


def _config(collection: Collection) -> models.CollectionConfig:
    sent: Mapping[str, Any] = collection.record.config
    request = collection.request
    plain = request.model_dump(
        mode="json",
        exclude_none=True,
        include={"vectors", "sparse_vectors", "hnsw_config", "optimizers_config", "wal_config"},
    )
    params: dict[str, Any] = {
        "shard_number": collection.record.shard_number,
        "replication_factor": request.replication_factor or 1,
        "write_consistency_factor": request.write_consistency_factor or 1,
        "on_disk_payload": True if request.on_disk_payload is None else request.on_disk_payload,
    }
    for name in ("vectors", "sparse_vectors"):
        if name in plain:
            params[name] = plain[name]
    known = models.CreateCollection.model_fields
    params |= {name: value for name, value in sent.items() if name not in known}
    return models.CollectionConfig(
        params=params,
        hnsw_config=_HNSW_DEFAULTS | plain.get("hnsw_config", {}),
        optimizer_config=_OPTIMIZER_DEFAULTS | plain.get("optimizers_config", {}),
        wal_config=plain.get("wal_config"),
        quantization_config=sent.get("quantization_config"),
        strict_mode_config=sent.get("strict_mode_config"),
        metadata=request.metadata,
    )


def _index_info(params: Mapping[str, Any], points: int) -> models.PayloadIndexInfo:
    return models.PayloadIndexInfo(
        data_type=params["type"], params=dict(params) if len(params) > 1 else None, points=points
    )


def describe_status(
    report: HealthReport,
    collections: Sequence[Collection],
    version: str,
    models_known: Sequence[Any],
) -> dict[str, Any]:
    """Everything that the dashboard shows, from the monitor's last look."""
    infos: dict[str, list[ShardInfo]] = {}
    for shard in report.shards:
        if shard.info is not None:
            infos.setdefault(shard.collection, []).append(shard.info)
    return {
        "version": version,
        "state": report.state,
        "ready": report.ready,
        "writable": report.writable,
        "reasons": list(report.reasons),
        "age_s": report.age_s,
        "disk": None
        if report.disk is None
        else {"free_bytes": report.disk.free_bytes, "total_bytes": report.disk.total_bytes},
        "collections": [
            _collection_status(collection, infos.get(collection.name, []), report)
            for collection in collections
        ],
        "models": [
            {
                "name": model.name,
                "dim": model.dim,
                "max_tokens": model.max_tokens,
                "loaded": model.loaded,
                "precision": model.precision,
                "texts_total": model.texts_total,
                "truncated_total": model.truncated_total,
                "busy_s_total": model.busy_s_total,
                "fingerprint": model.fingerprint,
            }
            for model in models_known
        ],
    }


def _collection_status(
    collection: Collection, infos: Sequence[ShardInfo], report: HealthReport
) -> dict[str, Any]:
    return {
        "name": collection.name,
        "status": report.of_collection(collection.name),
        "points": sum(info.points for info in infos),
        "indexed_vectors": sum(info.indexed_vectors for info in infos),
        "segments": sum(info.segments for info in infos),
        "pending": sum(info.pending for info in infos),
        "bytes_on_disk": sum(info.bytes_on_disk for info in infos),
        "shards": len(collection.shards),
        "vectors": {
            name: {
                "size": to.dim,
                "distance": to.distance,
                "multivector": to.multi,
                "model": None if (bound := collection.model_of(name)) is None else bound.model,
                "migration": _migration(collection, name),
            }
            for name, to in collection.fields.dense.items()
        },
        "sparse_vectors": sorted(collection.fields.sparse),
    }


def _migration(collection: Collection, vector: str) -> dict[str, Any] | None:
    """What is under way, without counting anything."""
    found = collection.record.migrated.get(vector)
    if found is None or found.migration is None:
        return None
    migration = found.migration
    return {
        "phase": migration.phase,
        "switched": migration.switched,
        "complete": migration.complete,
        "other": migration.other.model.model,
    }
