"""Messages of proto/shoal/v1 -> the same requests that the HTTP API is read into. Pure.

    bytes ──▶ message, no field unknown ──▶ Query, ScrollQuery, Retrieve, PointsWrite, Delete, ...

What can be wrong in the same way over HTTP is checked by the same code: filters, batches of points,
payloads, paths, the configuration of a collection. A message has no place for what HTTP refuses by
name, so a field that is not known is all that is left to refuse: `decode` looks for them in every
part of a message (0.1 µs each; a search has one to four parts).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, TypeVar

import msgspec
import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet
from pydantic import BaseModel

from coordinator.freshness import ANY_READ, parse_token
from coordinator.json_body import validate
from coordinator.parse import PendingText, PointsWrite, check_batch, unknown_vector
from coordinator.requests import (
    LIMIT_DEFAULT,
    PayloadSelection,
    Query,
    Retrieve,
    ScrollQuery,
    Text,
)
from shoal.api import migration, models
from shoal.api.filter import Filter, parse_filter
from shoal.batch import DenseBlock, PointBatch, unpack_bits
from shoal.errors import BadRequest, InvalidField
from shoal.ids import PointIds, format_id, parse_id
from shoal.json_path import parse_path
from shoal.limits import (
    CONFIG_BYTES_MAX,
    HNSW_EF_MAX,
    IDS_MAX,
    SCROLL_LIMIT_MAX,
    SEARCH_LIMIT_MAX,
    TEXTS_PER_REQUEST_MAX,
)
from shoal.payload import check_payload
from shoal.storage_api import (
    ClearPayload,
    Delete,
    DeletePayload,
    DeleteVectors,
    OverwritePayload,
    Read,
    Selector,
    SetPayload,
    UpdateMode,
)
from shoal.v1 import collections_pb2, common_pb2, migrations_pb2, points_pb2
from shoal.vectors import VectorFields
from shoal.wire import ops_pb2 as wire

__all__ = [
    "clear_payload",
    "collection_config",
    "comparison_of",
    "decode",
    "delete_payload",
    "delete_points",
    "delete_vectors",
    "drop_of",
    "filter_of",
    "migration_of",
    "overwrite_payload",
    "query_of",
    "read_of",
    "refuse_unknown",
    "retrieve_of",
    "scroll_of",
    "set_payload",
    "switch_of",
    "update_vectors",
    "upsert",
]

M = TypeVar("M", bound=Message)
R = TypeVar("R", bound=BaseModel)

_FILTERS_CACHED = 1_024
_FILTER_BYTES_CACHED = 1_024  # longer ones hold lists of ids or values, which differ each time
_TOKENS_CACHED = 256
_MODES = {
    points_pb2.UPDATE_MODE_UPSERT: UpdateMode.UPSERT,
    points_pb2.UPDATE_MODE_INSERT_ONLY: UpdateMode.INSERT_ONLY,
    points_pb2.UPDATE_MODE_UPDATE_ONLY: UpdateMode.UPDATE_ONLY,
}
_DISTANCES = {
    collections_pb2.DISTANCE_COSINE: "Cosine",
    collections_pb2.DISTANCE_DOT: "Dot",
    collections_pb2.DISTANCE_EUCLID: "Euclid",
    collections_pb2.DISTANCE_MANHATTAN: "Manhattan",
}
_DATATYPES = {
    collections_pb2.DATATYPE_DEFAULT: None,
    collections_pb2.DATATYPE_FLOAT32: "float32",
    collections_pb2.DATATYPE_FLOAT16: "float16",
    collections_pb2.DATATYPE_UINT8: "uint8",
}


# -- messages -------------------------------------------------------------------------------------
def decode(kind: type[M], body: bytes, *, deep: bool = True) -> M:
    """A message with nothing in it that we do not know. Raises BadRequest.
    deep=False leaves the messages inside it to the caller."""
    try:
        message = kind.FromString(body)
    except DecodeError:
        raise BadRequest(f"Wrong input: the request is no {kind.__name__}") from None
    refuse_unknown(message, deep=deep)
    return message


def refuse_unknown(message: Message, *, deep: bool = True) -> None:
    """Raise BadRequest when a field of the message, or of one inside it, is not in our proto."""
    unknown = UnknownFieldSet(message)
    if len(unknown):
        raise BadRequest(
            f"Wrong input: unknown field {unknown[0].field_number} in "
            f"{message.DESCRIPTOR.name}: the client is newer than this server; leave the field out, "
            "or update the server"
        )
    if deep:
        for part in _parts(message):
            refuse_unknown(part)


def _parts(message: Message) -> Iterator[Message]:
    for name, repeated in _inner(message.DESCRIPTOR):
        if repeated:
            yield from getattr(message, name)
        elif message.HasField(name):
            yield getattr(message, name)


@lru_cache(maxsize=None)  # noqa: UP033 - as many entries as the protos have messages
def _inner(descriptor: Any) -> tuple[tuple[str, bool], ...]:
    """The fields of a message that are messages themselves, and whether each is a list."""
    return tuple(
        (field.name, field.is_repeated)
        for field in descriptor.fields
        if field.type == FieldDescriptor.TYPE_MESSAGE
    )


def read_of(options: common_pb2.ReadOptions) -> Read:
    """Raises BadRequest for a consistency that we do not know, or a token that is none."""
    consistency = options.consistency
    if consistency not in (
        common_pb2.CONSISTENCY_DEFAULT,
        common_pb2.CONSISTENCY_STRONG,
    ):
        raise _unknown_value("consistency", consistency)
    if not consistency and not options.token:
        return ANY_READ
    return _read(consistency == common_pb2.CONSISTENCY_STRONG, options.token)


@lru_cache(maxsize=_TOKENS_CACHED)  # a client sends the same token until it writes again
def _read(strong: bool, token: str) -> Read:
    return Read(strong=strong, token=parse_token(token) if token else {})


def filter_of(raw: bytes) -> Filter | None:
    """A filter as JSON text, None for an empty text. Raises BadRequest."""
    if not raw:
        return None
    return _small_filter(raw) if len(raw) <= _FILTER_BYTES_CACHED else _filter(raw)


def _filter(raw: bytes) -> Filter:
    try:
        node = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"Format error in JSON body: filter: {error}") from None
    return parse_filter(node)


# Filters are few and come again and again; one that is known costs nothing. They are immutable.
_small_filter = lru_cache(maxsize=_FILTERS_CACHED)(_filter)


# -- reads ----------------------------------------------------------------------------------------
def query_of(request: points_pb2.SearchRequest) -> Query:
    """Raises BadRequest. The length of the vector is checked later, against the collection."""
    limit, offset = request.limit or LIMIT_DEFAULT, request.offset
    if limit + offset > SEARCH_LIMIT_MAX:
        raise InvalidField(
            f"Wrong input: limit + offset must be at most {SEARCH_LIMIT_MAX}; to read everything, "
            "scroll"
        )
    if request.ef > HNSW_EF_MAX:
        raise InvalidField(f"Wrong input: ef must be at most {HNSW_EF_MAX}")
    query = Query(
        using=request.using,
        filter=filter_of(request.filter),
        limit=limit,
        offset=offset,
        exact=request.exact,
        ef=request.ef or None,
    )
    kind = request.WhichOneof("query")
    if kind == "vector":
        raw = request.vector
        if len(raw) % 4 or not raw:
            raise BadRequest(
                f"Wrong input: the query vector has {len(raw)} bytes, which are no float32 numbers"
            )
        query.vector = np.frombuffer(raw, "<f4").astype(np.float64)
    elif kind == "point":
        query.point = _key(request.point, "point")
    elif kind == "text":
        query.text = Text(request.text.text, request.text.model)
    if request.HasField("score_threshold"):
        if kind is None:
            raise BadRequest("Wrong input: A query is needed to use the score_threshold")
        query.score_threshold = request.score_threshold
        if query.score_threshold != query.score_threshold:
            raise BadRequest("Wrong input: score_threshold is not a number")
    if request.HasField("with_payload"):
        query.with_payload = _payload_selection(request.with_payload, default=False)
    if request.HasField("with_vectors"):
        query.with_vectors = _vector_selection(request.with_vectors)
    return query


def scroll_of(request: points_pb2.ScrollRequest) -> ScrollQuery:
    if request.limit > SCROLL_LIMIT_MAX:
        raise InvalidField(
            f"Wrong input: limit must be at most {SCROLL_LIMIT_MAX}; go on with `next` as the start"
        )
    return ScrollQuery(
        start=_key(request.start, "start") if request.HasField("start") else None,
        limit=request.limit or LIMIT_DEFAULT,
        filter=filter_of(request.filter),
        with_payload=_payload_selection(request.with_payload, default=True),
        with_vectors=_vector_selection(request.with_vectors),
    )


def retrieve_of(request: points_pb2.RetrieveRequest) -> Retrieve:
    return Retrieve(
        _ids(request.ids),
        _payload_selection(request.with_payload, default=True),
        _vector_selection(request.with_vectors),
    )


def _key(given: common_pb2.PointId, where: str) -> int:
    kind = given.WhichOneof("id")
    if kind is None:
        raise BadRequest(f"Wrong input: {where}: the id is neither a number nor a UUID")
    return parse_id(given.number if kind == "number" else given.uuid)


def _ids(given: wire.PointIds) -> PointIds:
    try:
        ids = PointIds.from_wire(given)
    except ValueError as error:
        raise BadRequest(f"Wrong input: these are no packed ids: {error}") from None
    if len(ids) > IDS_MAX:
        raise BadRequest(
            f"Wrong input: {len(ids)} ids in one request, the most is {IDS_MAX}: send several"
        )
    return ids


def _payload_selection(
    given: common_pb2.PayloadSelector, *, default: bool
) -> bool | PayloadSelection:
    match given.WhichOneof("which"):
        case "all":
            return given.all
        case "include":
            return PayloadSelection(include=tuple(given.include.paths))
        case "exclude":
            return PayloadSelection(exclude=tuple(given.exclude.paths))
        case _:
            return default


def _vector_selection(given: common_pb2.VectorSelector) -> bool | tuple[str, ...]:
    if given.all and given.names:
        raise BadRequest("Wrong input: with_vectors has both `all` and `names`: leave one out")
    return given.all or tuple(given.names) or False


# -- writes of points -----------------------------------------------------------------------------
def upsert(request: points_pb2.UpsertRequest, fields: VectorFields) -> PointsWrite:
    """Raises BadRequest, and says which point or vector is wrong."""
    write = _points(request.points, request.texts, fields)
    write.update_filter = filter_of(request.update_filter)
    mode = _MODES.get(request.update_mode)
    if mode is None:
        raise _unknown_value("update_mode", request.update_mode)
    write.mode = mode
    return write


def update_vectors(request: points_pb2.UpdateVectorsRequest, fields: VectorFields) -> PointsWrite:
    if request.points.payload_offsets:
        raise BadRequest("Wrong input: an update of vectors has no payloads: set them apart")
    write = _points(request.points, request.texts, fields)
    write.points.payload_offsets = None  # what is not sent is kept
    write.update_filter = filter_of(request.update_filter)
    write.vectors_only = True
    return write


def _points(message: wire.PointBatch, texts: Any, fields: VectorFields) -> PointsWrite:
    try:
        points = PointBatch.from_wire(message)
    except ValueError as error:
        raise BadRequest(f"Wrong input: the points are no proper PointBatch: {error}") from None
    columns = (len(message.dense), len(message.sparse), len(message.multi))
    if columns != (len(points.dense), len(points.sparse), len(points.multi)):
        raise BadRequest("Wrong input: the points have two columns of one vector")
    write = PointsWrite(check_batch(points, fields))
    for column in texts:
        _add_texts(write, column, fields)
    if len(write.texts) > TEXTS_PER_REQUEST_MAX:
        raise BadRequest(
            f"Wrong input: {len(write.texts)} texts to embed in one request, the most is "
            f"{TEXTS_PER_REQUEST_MAX}: send several"
        )
    return write


def _add_texts(write: PointsWrite, column: points_pb2.TextColumn, fields: VectorFields) -> None:
    """Make room for the vectors of a column of texts; the service fills it in."""
    points, name, count = write.points, column.name, len(write.points)
    to = fields.dense.get(name)
    if to is None and name not in fields.sparse:
        raise unknown_vector(name, fields)
    if to is None or to.multi:
        raise BadRequest(
            f"Wrong input: a text cannot become the vector '{name}', which is sparse or a "
            "multivector: send numbers"
        )
    if name in points.dense:
        raise BadRequest(f"Wrong input: the vector '{name}' is sent both as numbers and as texts")
    if len(column.texts) != count:
        raise BadRequest(
            f"Wrong input: number of ids and texts must be equal ({count} != {len(column.texts)})"
        )
    if column.present and len(column.present) != (count + 7) // 8:
        raise BadRequest(f"Wrong input: `present` of the texts does not fit {count} points")
    present = unpack_bits(column.present, count) if column.present else None
    points.dense[name] = DenseBlock(np.zeros((count, to.dim), np.float32), present)
    rows = range(count) if present is None else np.flatnonzero(present).tolist()
    texts = list(column.texts)
    write.texts += [PendingText(name, row, texts[row], column.model) for row in rows]


# -- writes of what is selected -------------------------------------------------------------------
def _where(given: points_pb2.PointSelector) -> Selector:
    match given.WhichOneof("which"):
        case "ids":
            ids = _ids(given.ids)
            if not len(ids):
                raise BadRequest("Wrong input: Empty update request: there are no ids")
            return Selector(ids=ids)
        case "filter":
            if not given.filter:
                raise BadRequest("Wrong input: an empty filter: send {} to select every point")
            return Selector(filter=filter_of(given.filter))
        case _:
            raise BadRequest("Wrong input: No filter or points provided: give one of the two")


def delete_points(request: points_pb2.DeletePointsRequest, fields: VectorFields) -> Delete:
    return Delete(_where(request.where))


def clear_payload(request: points_pb2.ClearPayloadRequest, fields: VectorFields) -> ClearPayload:
    return ClearPayload(_where(request.where))


def delete_vectors(request: points_pb2.DeleteVectorsRequest, fields: VectorFields) -> DeleteVectors:
    if not request.names:
        raise BadRequest("Wrong input: no names of vectors to delete")
    for name in request.names:
        if name not in fields:
            raise unknown_vector(name, fields)
    return DeleteVectors(_where(request.where), tuple(request.names))


def set_payload(request: points_pb2.SetPayloadRequest, fields: VectorFields) -> SetPayload:
    key = request.key if request.HasField("key") else None
    if key is not None:
        parse_path(key)
    return SetPayload(_where(request.where), _payload(request.payload), key)


def overwrite_payload(
    request: points_pb2.OverwritePayloadRequest, fields: VectorFields
) -> OverwritePayload:
    return OverwritePayload(_where(request.where), _payload(request.payload))


def delete_payload(request: points_pb2.DeletePayloadRequest, fields: VectorFields) -> DeletePayload:
    for key in request.keys:
        parse_path(key)
    return DeletePayload(_where(request.where), tuple(request.keys))


def _payload(raw: bytes) -> bytes:
    if not raw:
        raise BadRequest("Wrong input: no payload: send a JSON object, {} for an empty one")
    check_payload(raw)
    return b"" if raw.strip() == b"{}" else raw


# -- collections ----------------------------------------------------------------------------------
def collection_config(config: collections_pb2.CollectionConfig) -> models.CreateCollection:
    """Through the model of the HTTP API, which checks it. Raises BadRequest, InvalidField."""
    if config.ByteSize() > CONFIG_BYTES_MAX:
        raise BadRequest(
            f"Wrong input: a collection's configuration may have {CONFIG_BYTES_MAX} bytes"
        )
    plain: dict[str, Any] = {}
    names = [vector.name for vector in config.vectors]
    if len(set(names)) != len(names):
        raise BadRequest("Wrong input: two vectors of the collection have the same name")
    vectors = {vector.name: _vector(vector) for vector in config.vectors}
    if vectors:
        plain["vectors"] = vectors[""] if list(vectors) == [""] else vectors
    if config.sparse_vectors:
        plain["sparse_vectors"] = {name: {} for name in config.sparse_vectors}
    for name in ("shard_number", "replication_factor", "write_consistency_factor"):
        if value := getattr(config, name):
            plain[name] = value
    if config.HasField("hnsw"):
        plain["hnsw_config"] = _hnsw(config.hnsw)
    if config.metadata:
        check_payload(config.metadata)
        plain["metadata"] = msgspec.json.decode(config.metadata)
    return validate(models.CreateCollection, msgspec.json.encode(plain))


def _vector(given: collections_pb2.VectorConfig) -> dict[str, Any]:
    distance = _DISTANCES.get(given.distance)
    if distance is None:
        raise BadRequest(
            f"Wrong input: vector '{given.name}': distance must be one of "
            f"{', '.join(_DISTANCES.values())}"
        )
    if given.datatype not in _DATATYPES:
        raise _unknown_value("datatype", given.datatype)
    plain: dict[str, Any] = {"size": given.size, "distance": distance}
    if datatype := _DATATYPES[given.datatype]:
        plain["datatype"] = datatype
    if given.multivector:
        plain["multivector_config"] = {"comparator": "max_sim"}
    if given.HasField("hnsw"):
        plain["hnsw_config"] = _hnsw(given.hnsw)
    return plain


_HNSW: dict[str, str] = {
    "m": "m",
    "ef_construct": "ef_construct",
    "full_scan_threshold_kib": "full_scan_threshold",
}


def _hnsw(given: collections_pb2.HnswConfig) -> dict[str, int]:
    return {ours: getattr(given, name) for name, ours in _HNSW.items() if given.HasField(name)}


# -- changing the model of a vector ---------------------------------------------------------------
# Through the models of the HTTP API, so that bounds and messages are the same.
def migration_of(request: migrations_pb2.StartMigrationRequest) -> migration.MigrateRequest:
    """Raises BadRequest, InvalidField; so do the others."""
    plain: dict[str, Any] = {"model": request.model, "text_field": request.text_field}
    for name in ("fingerprint", "current_model"):
        if request.HasField(name):
            plain[name] = getattr(request, name)
    if request.HasField("points_per_second"):
        rate = request.points_per_second
        if not rate >= 0:  # JSON has no NaN: it would become null, which is no bound
            raise InvalidField(
                "Validation error in JSON body: [points_per_second: input should be greater than or "
                "equal to 0]"
            )
        plain["points_per_second"] = None if rate == math.inf else rate
    return _validated(migration.MigrateRequest, plain)


def comparison_of(request: migrations_pb2.CompareModelsRequest) -> migration.CompareRequest:
    plain: dict[str, Any] = {"limit": request.limit or LIMIT_DEFAULT, "exact": request.exact}
    given = request.given.queries
    if request.HasField("given"):
        plain["queries"] = [{"text": query.text, "relevant": _gains(query)} for query in given]
    comparison = _validated(migration.CompareRequest, plain)
    for query, sent in zip(comparison.queries or (), given, strict=True):
        query.filter = filter_of(sent.filter)
    return comparison


def _gains(query: migrations_pb2.CompareModelsRequest.Query) -> dict[str, float]:
    keys, gains = _ids(query.relevant).keys(), query.gains
    if len(keys) != len(gains):
        raise BadRequest(
            f"Wrong input: number of relevant points and gains must be equal ({len(keys)} != "
            f"{len(gains)})"
        )
    if len(set(keys)) != len(keys):
        raise BadRequest("Wrong input: relevant: a point is judged twice")
    return {str(format_id(key)): gain for key, gain in zip(keys, gains, strict=True)}


def switch_of(request: migrations_pb2.SwitchModelRequest) -> migration.SwitchRequest:
    return _validated(migration.SwitchRequest, {"allow_missing": request.allow_missing})


def drop_of(request: migrations_pb2.DropModelRequest) -> migration.DropRequest:
    plain = {"model": request.model, "allow_missing": request.allow_missing}
    return _validated(migration.DropRequest, plain)


def _validated(model: type[R], plain: dict[str, Any]) -> R:
    return validate(model, msgspec.json.encode(plain))


def _unknown_value(name: str, value: int) -> BadRequest:
    return BadRequest(
        f"Wrong input: {name} has the value {value}, which this server does not know: the client is "
        "newer; update the server"
    )
