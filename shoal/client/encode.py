"""Values of the client -> messages of proto/shoal/v1. Pure. What cannot be sent raises BadRequest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from shoal.batch import DenseBlock, MultiBlock, PointBatch, SparseBlock, pack_bits
from shoal.client.values import (
    Batch,
    Dense,
    Exclude,
    Hnsw,
    Ids,
    Include,
    Multi,
    PointId,
    Sparse,
    SparseVector,
    Texts,
    VectorParams,
    Vectors,
    WithPayload,
)
from shoal.errors import BadRequest
from shoal.ids import PointIds, parse_id
from shoal.v1 import collections_pb2, common_pb2, points_pb2
from shoal.wire import ops_pb2 as wire

__all__ = [
    "Filter",
    "collection_config",
    "filter_bytes",
    "json_bytes",
    "payload_selector",
    "point_id",
    "points_of",
    "selector",
    "split",
    "vector_bytes",
    "vector_selector",
    "wire_ids",
]

# A filter as the HTTP API has it: {"must": [...]}, or its JSON text.
Filter = Mapping[str, Any] | str | bytes

_DISTANCES = {
    "Cosine": collections_pb2.DISTANCE_COSINE,
    "Dot": collections_pb2.DISTANCE_DOT,
    "Euclid": collections_pb2.DISTANCE_EUCLID,
    "Manhattan": collections_pb2.DISTANCE_MANHATTAN,
}
_DATATYPES = {
    "float32": collections_pb2.DATATYPE_FLOAT32,
    "float16": collections_pb2.DATATYPE_FLOAT16,
    "uint8": collections_pb2.DATATYPE_UINT8,
}
T = TypeVar("T")


# -- small values ---------------------------------------------------------------------------------
def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy as JSON knows them."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} has no JSON form")


_encoder = msgspec.json.Encoder(enc_hook=_plain)


def json_bytes(value: Any, what: str) -> bytes:
    try:
        return _encoder.encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRequest(f"Wrong input: {what}: {error}") from None


def filter_bytes(filter: Filter | None) -> bytes:
    """b"" for none."""
    if filter is None:
        return b""
    if isinstance(filter, bytes | str):
        return filter if isinstance(filter, bytes) else filter.encode()
    return json_bytes(filter, "filter")


def wire_ids(ids: Ids) -> wire.PointIds:
    return _point_ids(ids).to_wire()


def _point_ids(ids: Ids) -> PointIds:
    if isinstance(ids, np.ndarray):
        if ids.ndim != 1 or ids.dtype.kind not in "ui":
            raise BadRequest(
                f"Wrong input: ids as an array must be (n,) whole numbers, not {ids.shape} of "
                f"{ids.dtype}"
            )
        if ids.dtype.kind == "i" and len(ids) and int(ids.min()) < 0:
            raise BadRequest(
                f"Wrong input: {int(ids.min())} is not a valid point ID: it is negative"
            )
        return PointIds(ids.astype(np.uint64))
    return PointIds.from_keys([parse_id(_id_value(value)) for value in ids])


def _id_value(value: Any) -> Any:
    """What `parse_id` knows: int and str."""
    if isinstance(value, np.integer):
        return int(value)
    return value if isinstance(value, int | str) else str(value)


def point_id(value: PointId) -> common_pb2.PointId:
    plain = _id_value(value)
    if isinstance(plain, int):
        parse_id(plain)
        return common_pb2.PointId(number=plain)
    return common_pb2.PointId(uuid=plain)


def selector(ids: Ids | None, filter: Filter | None) -> points_pb2.PointSelector:
    if (ids is None) == (filter is None):
        raise BadRequest("Wrong input: give either ids or a filter")
    if ids is not None:
        return points_pb2.PointSelector(ids=wire_ids(ids))
    return points_pb2.PointSelector(filter=filter_bytes(filter))


def payload_selector(wanted: WithPayload) -> common_pb2.PayloadSelector:
    match wanted:
        case bool():
            return common_pb2.PayloadSelector(all=wanted)
        case Exclude(paths):
            return common_pb2.PayloadSelector(exclude=common_pb2.PayloadSelector.Paths(paths=paths))
        case Include(paths) | paths:
            return common_pb2.PayloadSelector(
                include=common_pb2.PayloadSelector.Paths(paths=_names(paths, "with_payload"))
            )


def vector_selector(wanted: bool | Sequence[str]) -> common_pb2.VectorSelector:
    if isinstance(wanted, bool):
        return common_pb2.VectorSelector(all=wanted)
    return common_pb2.VectorSelector(names=_names(wanted, "with_vectors"))


def _names(names: Any, what: str) -> Sequence[str]:
    if isinstance(names, str):
        raise BadRequest(f"Wrong input: {what}: give a list of names, not the text {names!r}")
    return list(names)


def vector_bytes(vector: ArrayLike) -> bytes:
    """(dim,) of real numbers -> packed float32."""
    values = _floats(vector, "the query vector")
    if values.ndim != 1:
        raise BadRequest(
            f"Wrong input: the query vector must be (dim,), not {values.shape}: search_batch takes "
            "several"
        )
    return values.tobytes()


def _floats(values: ArrayLike, what: str) -> NDArray[np.float32]:
    try:
        return np.ascontiguousarray(values, dtype="<f4")
    except (TypeError, ValueError) as error:
        raise BadRequest(f"Wrong input: {what}: {error}") from None


# -- points ---------------------------------------------------------------------------------------
def points_of(batch: Batch) -> tuple[wire.PointBatch, list[points_pb2.TextColumn]]:
    """Points as columns, and the texts that become vectors. Copies each vector once."""
    points = PointBatch(_point_ids(batch.ids))
    count = len(points)
    texts: list[points_pb2.TextColumn] = []
    for name, column in _columns(batch.vectors):
        match column:
            case Texts():
                texts.append(_text_column(name, column, count))
            case Sparse():
                points.sparse[name] = _sparse(name, column, count)
            case Multi():
                points.multi[name] = _multi(name, column, count)
            case Dense():
                points.dense[name] = _dense(name, column, count)
            case _:
                points.dense[name] = _dense(name, Dense(column), count)
    if batch.payloads is not None:
        _check_length("payloads", len(batch.payloads), count)
        points.set_payloads([_payload(payload) for payload in batch.payloads])
    return points.to_wire(), texts


def _columns(vectors: Vectors | None) -> list[tuple[str, Any]]:
    if vectors is None:
        return []
    return list(vectors.items()) if isinstance(vectors, Mapping) else [("", vectors)]


def _payload(payload: Any) -> bytes:
    if payload is None:
        return b""
    if not isinstance(payload, Mapping):
        raise BadRequest(f"Wrong input: a payload must be a dict, not {type(payload).__name__}")
    return json_bytes(payload, "payload") if payload else b""


def _check_length(what: str, length: int, count: int) -> None:
    if length != count:
        raise BadRequest(
            f"Wrong input: number of ids and {what} must be equal ({count} != {length})"
        )


def _dense(name: str, column: Dense, count: int) -> DenseBlock:
    values = _floats(column.values, f"vector '{name}'")
    if values.ndim != 2:
        raise BadRequest(
            f"Wrong input: vector '{name}' must be (n, dim), one row a point, not {values.shape}"
        )
    _check_length(f"rows of vector '{name}'", len(values), count)
    if column.present is None:
        return DenseBlock(values)
    present = np.asarray(column.present, np.bool_)
    _check_length(f"entries of present of vector '{name}'", len(present), count)
    return DenseBlock(values, present)


def _text_column(name: str, column: Texts, count: int) -> points_pb2.TextColumn:
    _check_length(f"texts of vector '{name}'", len(column.texts), count)
    present = _present(column.texts)
    return points_pb2.TextColumn(
        name=name,
        model=column.model,
        texts=[text or "" for text in column.texts],
        present=b"" if present is None else pack_bits(present).tobytes(),
    )


def _sparse(name: str, column: Sparse, count: int) -> SparseBlock:
    _check_length(f"rows of vector '{name}'", len(column.rows), count)
    indices, values = [], []
    for row in column.rows:
        if row is None:
            continue
        given = (row.indices, row.values) if isinstance(row, SparseVector) else row
        at, value = np.asarray(given[0], np.uint32), _floats(given[1], f"vector '{name}'")
        if at.shape != value.shape or at.ndim != 1:
            raise BadRequest(
                f"Wrong input: sparse vector '{name}': {at.shape} indices and {value.shape} values"
            )
        order = np.argsort(at)
        indices.append(at[order])
        values.append(value[order])
    lengths = iter([len(part) for part in indices])
    return SparseBlock(
        _indptr([0 if row is None else next(lengths) for row in column.rows]),
        np.concatenate(indices) if indices else np.empty(0, np.uint32),
        np.concatenate(values) if values else np.empty(0, np.float32),
        _present(column.rows),
    )


def _multi(name: str, column: Multi, count: int) -> MultiBlock:
    _check_length(f"rows of vector '{name}'", len(column.rows), count)
    rows = [None if row is None else _floats(row, f"vector '{name}'") for row in column.rows]
    there = [row for row in rows if row is not None]
    if not there or any(row.ndim != 2 or row.shape[1] != there[0].shape[1] for row in there):
        raise BadRequest(f"Wrong input: the rows of multivector '{name}' must be (t, dim) each")
    return MultiBlock(
        _indptr([0 if row is None else len(row) for row in rows]),
        np.concatenate(there),
        _present(rows),
    )


def _indptr(lengths: Sequence[int]) -> NDArray[np.uint32]:
    indptr = np.zeros(len(lengths) + 1, np.uint32)
    np.cumsum(lengths, out=indptr[1:])
    return indptr


def _present(rows: Sequence[object | None]) -> NDArray[np.bool_] | None:
    mask = np.array([row is not None for row in rows], np.bool_)
    return None if mask.all() else mask


# -- parts of large batches -----------------------------------------------------------------------
def split(batch: Batch, points_max: int, bytes_max: int) -> list[Batch]:
    """A batch as parts of at most so many points, and of about so many bytes of vectors."""
    count = len(batch.ids)
    columns = _columns(batch.vectors)
    row_bytes = sum(_row_bytes(column) for _, column in columns)
    rows = max(1, min(points_max, bytes_max // max(1, row_bytes)))
    if count <= rows:
        return [batch]
    named = isinstance(batch.vectors, Mapping)
    parts = []
    for first in range(0, count, rows):
        part = slice(first, first + rows)
        vectors: Any = {name: _sliced(column, part) for name, column in columns}
        if not named:
            vectors = vectors.get("")
        payloads = None if batch.payloads is None else batch.payloads[part]
        parts.append(Batch(batch.ids[part], vectors, payloads))
    return parts


def _row_bytes(column: Any) -> int:
    match column:
        case Dense(values, _):
            return _row_bytes(values)
        case Texts() | Sparse():
            return 1_024  # a guess; texts and indices differ
        case Multi(rows):
            return max((np.size(row) * 4 for row in rows if row is not None), default=0)
        case np.ndarray():
            return int(column.shape[-1]) * 4 if column.ndim == 2 else 4
        case _:
            return len(column[0]) * 4 if len(column) and hasattr(column[0], "__len__") else 4


def _sliced(column: Any, part: slice) -> Any:
    match column:
        case Dense(values, present):
            return Dense(values[part], None if present is None else np.asarray(present)[part])  # type: ignore[index]
        case Texts(texts, model):
            return Texts(texts[part], model)
        case Sparse(rows):
            return Sparse(rows[part])
        case Multi(rows):
            return Multi(rows[part])
        case _:
            return column[part]


# -- collections ----------------------------------------------------------------------------------
def collection_config(
    vectors: VectorParams | Mapping[str, VectorParams],
    *,
    sparse_vectors: Sequence[str],
    shard_number: int | None,
    replication_factor: int | None,
    write_consistency_factor: int | None,
    hnsw: Hnsw | None,
    metadata: Mapping[str, Any] | None,
) -> collections_pb2.CollectionConfig:
    named = {"": vectors} if isinstance(vectors, VectorParams) else vectors
    for name, params in named.items():
        if params.distance not in _DISTANCES or params.datatype not in _DATATYPES:
            raise BadRequest(
                f"Wrong input: vector '{name}': distance is one of {', '.join(_DISTANCES)}, "
                f"datatype one of {', '.join(_DATATYPES)}"
            )
    try:
        return collections_pb2.CollectionConfig(
            vectors=[
                collections_pb2.VectorConfig(
                    name=name,
                    size=params.size,
                    distance=_DISTANCES[params.distance],
                    datatype=_DATATYPES[params.datatype],
                    multivector=params.multivector,
                    hnsw=_hnsw(params.hnsw),
                )
                for name, params in named.items()
            ],
            sparse_vectors=_names(sparse_vectors, "sparse_vectors"),
            shard_number=shard_number or 0,
            replication_factor=replication_factor or 0,
            write_consistency_factor=write_consistency_factor or 0,
            hnsw=_hnsw(hnsw),
            metadata=b"" if metadata is None else json_bytes(metadata, "metadata"),
        )
    except (TypeError, ValueError) as error:
        raise BadRequest(f"Wrong input: the collection's configuration: {error}") from None


def _hnsw(hnsw: Hnsw | None) -> collections_pb2.HnswConfig | None:
    if hnsw is None:
        return None
    return collections_pb2.HnswConfig(
        m=hnsw.m,
        ef_construct=hnsw.ef_construct,
        full_scan_threshold_kib=hnsw.full_scan_threshold_kib,
    )
