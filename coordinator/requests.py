"""What a request asks for, out of its JSON: queries, scrolls, selectors and their writes. Pure.

The query of the common shape is read by hand (`_common_query`, about 11 µs for 384 dimensions, of
which simdjson takes 6); everything else goes through the pydantic model of the same request. What
the fast reading accepts, the model accepts with the same meaning: tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from coordinator.json_body import (
    ARRAYS,
    OBJECTS,
    brackets_in,
    flat_floats,
    parse_json,
    payload_bytes,
    raw_json,
    validate,
)
from coordinator.parse import PointsWrite, parse_points_node
from shoal.api import models
from shoal.api.filter import Filter, parse_filter
from shoal.errors import BadRequest
from shoal.ids import PointIds, parse_id
from shoal.json_path import parse_path
from shoal.limits import BATCH_OPERATIONS_MAX, HNSW_EF_MAX, SEARCH_LIMIT_MAX
from shoal.storage_api import (
    ClearPayload,
    Delete,
    DeletePayload,
    DeleteVectors,
    OverwritePayload,
    Selector,
    SetPayload,
    Write,
)
from shoal.vectors import VectorFields

__all__ = [
    "AnyWrite",
    "PayloadSelection",
    "Query",
    "Retrieve",
    "ScrollQuery",
    "Text",
    "clear_payload",
    "delete_payload",
    "delete_points",
    "delete_vectors",
    "overwrite_payload",
    "parse_operations",
    "parse_query",
    "parse_retrieve",
    "parse_scroll",
    "set_payload",
]

LIMIT_DEFAULT = 10
_FILTERS_CACHED = 1024
_FILTER_BYTES_CACHED = 1024  # longer ones hold lists of ids or values, which differ each time

AnyWrite = PointsWrite | Write


@dataclass(frozen=True, slots=True)
class PayloadSelection:
    """Parts of a payload, by JSON paths: only `include`, or all but `exclude`."""

    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for path in (*(self.include or ()), *(self.exclude or ())):
            parse_path(path)


@dataclass(frozen=True, slots=True)
class Text:
    text: str
    model: str


@dataclass(slots=True)
class Query:
    """One `points/query`. At most one of vector, point and text is set; none: points by id.

    vector  (dim,) float64 as it was sent, its length not yet checked. point: a key.
    """

    vector: NDArray[np.float64] | None = None
    point: int | None = None
    text: Text | None = None
    using: str = ""
    filter: Filter | None = None
    limit: int = LIMIT_DEFAULT
    offset: int = 0
    score_threshold: float | None = None
    exact: bool = False
    ef: int | None = None
    with_payload: bool | PayloadSelection = False
    with_vectors: bool | tuple[str, ...] = False


@dataclass(frozen=True, slots=True)
class ScrollQuery:
    """start: key of the first point, inclusive."""

    start: int | None
    limit: int
    filter: Filter | None
    with_payload: bool | PayloadSelection
    with_vectors: bool | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Retrieve:
    ids: PointIds
    with_payload: bool | PayloadSelection
    with_vectors: bool | tuple[str, ...]


# -- reads ----------------------------------------------------------------------------------------
def parse_query(body: bytes) -> Query:
    node = parse_json(body)
    try:
        query = _common_query(node, body)
    finally:
        del node
    return query or _query_of(validate(models.QueryRequest, body))


def _common_query(node: Any, body: bytes) -> Query | None:
    """The query when its shape is common; None when the model has to look, also at what is wrong."""
    if type(node) not in OBJECTS:
        return None
    query = Query()
    brackets = 0
    nearest: Any = None
    for key in node:
        value = node[key]
        kind = type(value)
        if key == "query":
            nearest = value
            if kind in OBJECTS:
                if list(value) != ["nearest"]:
                    return None
                nearest = value["nearest"]
        elif key == "limit" and kind is int and value >= 1:
            query.limit = value
        elif key == "with_payload" and kind is bool:
            query.with_payload = value
        elif key == "with_vector" and kind is bool:
            query.with_vectors = value
        elif key == "filter" and kind in OBJECTS:
            raw = raw_json(value)
            brackets += raw.count(b"[")
            query.filter = _small_filter(raw) if len(raw) <= _FILTER_BYTES_CACHED else _filter(raw)
        elif key == "params" and kind in OBJECTS:
            if not _common_params(value, query):
                return None
        elif key == "offset" and kind is int and value >= 0:
            query.offset = value
        elif key == "using" and kind is str:
            query.using = value
        elif key == "score_threshold" and (kind is float or (kind is int and abs(value) < 2**64)):
            query.score_threshold = float(value)
        elif value is not None or key not in models.QueryRequest.model_fields:
            return None
    if query.limit + query.offset > SEARCH_LIMIT_MAX:
        return None
    if type(nearest) in ARRAYS:
        # every `[` is accounted for: then no array hides inside the vector
        strict = brackets + 1 != brackets_in(body)
        query.vector = flat_floats(nearest, strict=strict)
        return query if query.vector is not None else None
    if type(nearest) is int or type(nearest) is str:
        query.point = parse_id(nearest)
        return query
    return query if nearest is None and query.score_threshold is None else None


def _filter(raw: bytes) -> Filter:
    return parse_filter(msgspec.json.decode(raw))


# Filters are few and come again and again; one that is known costs nothing. They are immutable.
_small_filter = lru_cache(maxsize=_FILTERS_CACHED)(_filter)


def _common_params(node: Any, query: Query) -> bool:
    for key in node:
        value = node[key]
        if key == "exact" and type(value) is bool:
            query.exact = value
        elif key == "hnsw_ef" and type(value) is int and 1 <= value <= HNSW_EF_MAX:
            query.ef = value
        elif value is not None:
            return False
    return True


def _query_of(request: models.QueryRequest) -> Query:
    query = Query(
        using=request.using or "",
        filter=request.filter,
        limit=request.limit or LIMIT_DEFAULT,
        offset=request.offset or 0,
        score_threshold=request.score_threshold,
        with_payload=_payload_selection(request.with_payload, default=False),
        with_vectors=_vector_selection(request.with_vector),
    )
    if request.params is not None:
        query.exact = bool(request.params.exact)
        query.ef = request.params.hnsw_ef
    nearest = request.query
    if isinstance(nearest, models.NearestQuery):
        nearest = nearest.nearest
    if isinstance(nearest, list):
        query.vector = np.array(nearest, np.float64)
    elif isinstance(nearest, models.Document):
        query.text = Text(nearest.text, nearest.model)
    elif nearest is not None:
        query.point = parse_id(nearest)
    return query


def parse_scroll(body: bytes) -> ScrollQuery:
    request = validate(models.ScrollRequest, body)
    return ScrollQuery(
        start=None if request.offset is None else parse_id(request.offset),
        limit=request.limit or LIMIT_DEFAULT,
        filter=request.filter,
        with_payload=_payload_selection(request.with_payload, default=True),
        with_vectors=_vector_selection(request.with_vector),
    )


def parse_retrieve(body: bytes) -> Retrieve:
    request = validate(models.PointRequest, body)
    return Retrieve(
        _ids(request.ids),
        _payload_selection(request.with_payload, default=True),
        _vector_selection(request.with_vector),
    )


def _payload_selection(
    value: models.WithPayload | None, *, default: bool
) -> bool | PayloadSelection:
    match value:
        case None:
            return default
        case bool():
            return value
        case list():
            return PayloadSelection(include=tuple(value))
        case models.PayloadInclude():
            return PayloadSelection(include=tuple(value.include))
        case models.PayloadExclude():
            return PayloadSelection(exclude=tuple(value.exclude))


def _vector_selection(value: models.WithVector | None) -> bool | tuple[str, ...]:
    if value is None:
        return False
    return value if isinstance(value, bool) else tuple(value)


# -- writes ---------------------------------------------------------------------------------------
def _ids(values: list[int | str]) -> PointIds:
    return PointIds.from_keys([parse_id(value) for value in values])


def _where(selection: models.Selection) -> Selector:
    if selection.points is not None:
        return Selector(ids=_ids(selection.points))
    return Selector(filter=selection.filter)


def delete_points(body: bytes, fields: VectorFields) -> Delete:
    return Delete(_where(validate(models.PointsSelector, body)))


def clear_payload(body: bytes, fields: VectorFields) -> ClearPayload:
    return ClearPayload(_where(validate(models.PointsSelector, body)))


def delete_vectors(body: bytes, fields: VectorFields) -> DeleteVectors:
    request = validate(models.DeleteVectors, body)
    for name in request.vector:
        if name not in fields:
            raise BadRequest(f"Wrong input: Not existing vector name error: {name}")
    return DeleteVectors(_where(request), tuple(request.vector))


def set_payload(body: bytes, fields: VectorFields) -> SetPayload:
    request = validate(models.SetPayload, body)
    if request.key is not None:
        parse_path(request.key)
    return SetPayload(_where(request), _payload_in(body), request.key)


def overwrite_payload(body: bytes, fields: VectorFields) -> OverwritePayload:
    request = validate(models.SetPayload, body)
    if request.key is not None:
        raise BadRequest(
            "Wrong input: `key` is for setting a part of a payload (POST), not for replacing the "
            "whole (PUT): leave it out"
        )
    return OverwritePayload(_where(request), _payload_in(body))


def _payload_in(body: bytes) -> bytes:
    """The `payload` of a validated request as it was written, so that every number stays itself."""
    node = parse_json(body)
    try:
        return payload_bytes(node["payload"])
    finally:
        del node


def delete_payload(body: bytes, fields: VectorFields) -> DeletePayload:
    request = validate(models.DeletePayload, body)
    for key in request.keys:
        parse_path(key)
    return DeletePayload(_where(request), tuple(request.keys))


_OPERATIONS: dict[str, Callable[[bytes, VectorFields], Write]] = {
    "delete": delete_points,
    "set_payload": set_payload,
    "overwrite_payload": overwrite_payload,
    "delete_payload": delete_payload,
    "clear_payload": clear_payload,
    "delete_vectors": delete_vectors,
}


def parse_operations(body: bytes, fields: VectorFields) -> list[AnyWrite]:
    """`points/batch`: all operations, each checked; an error names the operation."""
    node = parse_json(body)
    try:
        if type(node) not in OBJECTS or list(node) != ["operations"]:
            raise BadRequest("Format error in JSON body: it must have exactly `operations`")
        operations = node["operations"]
        if type(operations) not in ARRAYS:
            raise BadRequest("Format error in JSON body: operations must be a list")
        if len(operations) > BATCH_OPERATIONS_MAX:
            raise BadRequest(
                f"Wrong input: {len(operations)} operations in one request, the most is "
                f"{BATCH_OPERATIONS_MAX}: send several requests"
            )
        steps = [_step(*_operation(at, i), i, fields) for i, at in enumerate(operations)]
    finally:
        node = operations = None
    return [
        step if isinstance(step, PointsWrite) else _named(i, _OPERATIONS[step[0]], step[1], fields)
        for i, step in enumerate(steps)
    ]


def _step(
    name: str, node: Any, position: int, fields: VectorFields
) -> PointsWrite | tuple[str, bytes]:
    """Points are read here and now; other operations give their text, to be read when the document
    is let go."""
    if name in _OPERATIONS:
        return name, raw_json(node)
    write: PointsWrite = _named(
        position, parse_points_node, node, fields, vectors_only=name == "update_vectors"
    )
    return write


def _operation(node: Any, position: int) -> tuple[str, Any]:
    names = list(node) if type(node) in OBJECTS else []
    known = ("upsert", "update_vectors", *_OPERATIONS)
    if len(names) != 1 or names[0] not in known or type(node[names[0]]) not in OBJECTS:
        raise BadRequest(
            f"Format error in JSON body: operations[{position}] must have exactly one of "
            f"{', '.join(known)}, an object"
        )
    return names[0], node[names[0]]


def _named(position: int, parse: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return parse(*args, **kwargs)
    except BadRequest as error:
        raise type(error)(f"{error.message} (operations[{position}])") from None
