"""Points in JSON -> `PointBatch`: the write path's one reading of a request. Pure.

    body ──simdjson──▶ views ──▶ ids, one float32 block per vector, payload text as it came
                                  │
                     texts to embed (filled in by the service)
                                  │
                     prepare_points: finite, datatype, length 1 under Cosine

No Python object is made per number: a vector is copied from the parser's tape into its row of the
block. Measured (384 dimensions, three payload keys, batches of 256): 15 µs of CPU a point with the
preparing, of which simdjson's own pass is 9.

All of a request is checked before anything is written. An error names the point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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
    unsigned,
)
from shoal.api.filter import Filter, parse_filter
from shoal.batch import DenseBlock, MultiBlock, PointBatch, SparseBlock
from shoal.errors import BadRequest, ShoalError
from shoal.ids import PointIds, format_id, parse_id
from shoal.limits import BATCH_POINTS_MAX, MULTIVECTOR_ROWS_MAX, SPARSE_NONZERO_MAX
from shoal.payload import check_payload
from shoal.storage_api import UpdateMode
from shoal.vectors import VectorField, VectorFields, prepare_rows

__all__ = [
    "PendingText",
    "PointsWrite",
    "check_batch",
    "parse_points_node",
    "parse_update_vectors",
    "parse_upsert",
    "prepare_points",
    "unsupported",
]


@dataclass(frozen=True, slots=True)
class PendingText:
    """A text that stands for the vector `name` of row `row`, until it is embedded."""

    name: str
    row: int
    text: str
    model: str


@dataclass(slots=True)
class PointsWrite:
    """An upsert, or with `vectors_only` an update of vectors, before embedding and preparing."""

    points: PointBatch
    texts: list[PendingText] = field(default_factory=list)
    update_filter: Filter | None = None
    mode: UpdateMode = UpdateMode.UPSERT
    vectors_only: bool = False


def parse_upsert(body: bytes, fields: VectorFields) -> PointsWrite:
    """{"points": […]} or {"batch": {"ids", "vectors", "payloads"}}, with update_filter and
    update_mode. Raises BadRequest; the same id twice is fine, the later row wins."""
    return _parse_body(body, fields, vectors_only=False)


def parse_update_vectors(body: bytes, fields: VectorFields) -> PointsWrite:
    """{"points": [{"id", "vector"}]} with update_filter."""
    return _parse_body(body, fields, vectors_only=True)


def _parse_body(body: bytes, fields: VectorFields, *, vectors_only: bool) -> PointsWrite:
    for strict in (False, True):
        node = parse_json(body)
        try:
            reader = _Reader(fields, strict=strict, vectors_only=vectors_only)
            write = reader.read(node)
        finally:
            del node
        # Every `[` of the request is one that was read as what it is; else arrays hide in arrays.
        if strict or reader.brackets == brackets_in(body):
            break
    return write


def parse_points_node(node: Any, fields: VectorFields, *, vectors_only: bool) -> PointsWrite:
    """As parse_upsert and parse_update_vectors, from a value inside a larger document."""
    return _Reader(fields, strict=True, vectors_only=vectors_only).read(node)


def unsupported(name: str, hint: str) -> BadRequest:
    return BadRequest(f"Wrong input: `{name}` is not supported by this version of Shoal: {hint}")


class _Dense:
    __slots__ = ("present", "values")

    def __init__(self, count: int, dim: int) -> None:
        self.values = np.zeros((count, dim), np.float32)
        self.present = bytearray(count)


class _Reader:
    """Reads one request. Columns are made when a row first has the vector."""

    def __init__(self, fields: VectorFields, *, strict: bool, vectors_only: bool) -> None:
        self._fields = fields
        self._strict = strict
        self._vectors_only = vectors_only
        self.brackets = 0  # arrays that were read as arrays
        self._count = 0
        self._keys: list[int] = []
        self._payloads: list[bytes] = []
        self._texts: list[PendingText] = []
        self._dense: dict[str, _Dense] = {}
        self._sparse: dict[str, list[tuple[NDArray[Any], NDArray[Any]] | None]] = {}
        self._multi: dict[str, list[NDArray[np.float64] | None]] = {}

    def read(self, node: Any) -> PointsWrite:
        if type(node) not in OBJECTS:
            raise BadRequest("Format error in JSON body: it must be an object")
        write = PointsWrite(PointBatch(PointIds.from_keys([])), vectors_only=self._vectors_only)
        points = batch = None
        for key in node:
            value = node[key]
            if key == "points":
                points = value
            elif key == "batch" and not self._vectors_only:
                batch = value
            elif value is None:
                continue
            elif key == "update_filter":
                write.update_filter = self._filter(value)
            elif key == "update_mode" and not self._vectors_only:
                write.mode = _update_mode(value)
            elif key == "shard_key":
                raise unsupported("shard_key", "leave it out, points are spread by their id")
            else:
                raise _unknown(key, "the request")
        if (points is None) == (batch is None):
            wanted = "`points`" if self._vectors_only else "either `points` or `batch`"
            raise BadRequest(f"Format error in JSON body: it must have {wanted}")
        with np.errstate(over="ignore"):  # what becomes infinite is refused by prepare_points
            if batch is None:
                self._read_points(points)
            else:
                self._read_batch(batch)
        write.points, write.texts = self._finish(), self._texts
        return write

    def _filter(self, node: Any) -> Filter:
        if type(node) is dict:
            return parse_filter(node, "update_filter")
        self.brackets += raw_json(node).count(b"[") if type(node) in OBJECTS else 0
        plain = node.as_dict() if type(node) in OBJECTS else node
        return parse_filter(plain, "update_filter")

    # -- {"points": [...]} ------------------------------------------------------------------------
    def _read_points(self, nodes: Any) -> None:
        self._start(nodes, "points")
        for row, node in enumerate(nodes):
            try:
                self._point(row, node)
            except ShoalError as error:
                raise self._blame(error, row, node) from None

    def _point(self, row: int, node: Any) -> None:
        if type(node) not in OBJECTS:
            raise BadRequest("Format error in JSON body: a point must be an object")
        try:
            self._keys.append(parse_id(node["id"]))
            vector = node["vector"]
        except KeyError:
            missing = "vector" if "id" in list(node) else "id"
            raise BadRequest(f"Format error in JSON body: missing field `{missing}`") from None
        fields = len(node)
        if fields != 2:
            if fields != 3 or self._vectors_only or "payload" not in list(node):
                known = ("id", "vector") if self._vectors_only else ("id", "vector", "payload")
                raise _unknown(next((k for k in node if k not in known), known[0]), "a point")
            self._payload(node["payload"])
        elif not self._vectors_only:
            self._payloads.append(b"")
        self._vectors(row, vector)

    def _payload(self, node: Any) -> None:
        raw = payload_bytes(node)
        if b"[" in raw:
            self.brackets += raw.count(b"[")
        self._payloads.append(raw)

    def _vectors(self, row: int, node: Any) -> None:
        if type(node) in ARRAYS:
            self._vector(row, "", node)
        elif type(node) not in OBJECTS:
            raise BadRequest("Format error in JSON body: vector must be a list or an object")
        elif _is_document(node):
            self._text(row, "", node)
        else:
            for name in node:
                self._vector(row, name, node[name])

    # -- {"batch": {...}} -------------------------------------------------------------------------
    def _read_batch(self, batch: Any) -> None:
        if type(batch) not in OBJECTS:
            raise BadRequest("Format error in JSON body: batch must be an object")
        for key in batch:
            if key not in ("ids", "vectors", "payloads"):
                raise _unknown(key, "batch")
        columns = list(batch)
        for key in ("ids", "vectors"):
            if key not in columns:
                raise BadRequest(f"Format error in JSON body: missing field `batch.{key}`")
        ids = batch["ids"]
        self._start(ids, "batch.ids")
        for row, value in enumerate(ids):
            try:
                self._keys.append(parse_id(value))
            except ShoalError as error:
                raise self._blame(error, row, None) from None
        payloads = batch["payloads"] if "payloads" in columns else None
        if payloads is None:
            self._payloads = [b""] * self._count
        else:
            self._column(payloads, "payloads", lambda row, node: self._payload(node))
        vectors = batch["vectors"]
        if type(vectors) in ARRAYS:
            self._column(vectors, "vectors", self._vectors)
        elif type(vectors) in OBJECTS:
            for name in vectors:
                self._column(
                    vectors[name],
                    "vectors",
                    lambda row, node, name=name: self._vector(row, name, node),
                )
        else:
            raise BadRequest("Format error in JSON body: batch.vectors must be a list or an object")

    def _column(self, nodes: Any, what: str, put: Any) -> None:
        if type(nodes) not in ARRAYS:
            raise BadRequest(f"Format error in JSON body: batch.{what} must hold lists")
        self.brackets += 1
        if len(nodes) != self._count:
            raise BadRequest(
                f"Wrong input: number of ids and {what} must be equal "
                f"({self._count} != {len(nodes)})"
            )
        for row, node in enumerate(nodes):
            try:
                put(row, node)
            except ShoalError as error:
                raise self._blame(error, row, None) from None

    # -- one vector -------------------------------------------------------------------------------
    def _vector(self, row: int, name: str, node: Any) -> None:
        to = self._fields.dense.get(name)
        kind = type(node)
        if to is None:
            if name not in self._fields.sparse:
                raise unknown_vector(name, self._fields)
            if kind not in OBJECTS or _is_document(node):
                raise _wrong_kind(name, "a sparse vector: send indices and values")
            self._sparse_vector(row, name, node)
        elif kind in ARRAYS:
            if to.multi:
                self._multivector(row, name, node, to)
            else:
                self._dense_vector(row, name, node, to)
        elif kind in OBJECTS and _is_document(node):
            self._text(row, name, node)
        elif kind in OBJECTS:
            raise _wrong_kind(name, "not sparse: send a list of numbers")
        else:
            raise BadRequest(f"Format error in JSON body: vector '{name}' must be a list")

    def _dense_vector(self, row: int, name: str, node: Any, to: VectorField) -> None:
        self.brackets += 1
        values = flat_floats(node, strict=self._strict)
        if values is None:
            raise BadRequest(
                f"Format error in JSON body: vector '{name}' must be a list of numbers"
            )
        if len(values) != to.dim:
            raise wrong_dimension(to.dim, len(values))
        column = self._dense.get(name)
        if column is None:
            column = self._dense[name] = _Dense(self._count, to.dim)
        column.values[row] = values
        column.present[row] = 1

    def _text(self, row: int, name: str, node: Any) -> None:
        to = self._fields.dense.get(name)
        if to is None and name not in self._fields.sparse:
            raise unknown_vector(name, self._fields)
        if to is None or to.multi:
            raise BadRequest(
                f"Wrong input: a text cannot become the vector '{name}', which is sparse or a "
                "multivector: send numbers"
            )
        text, model = document(node)
        self.brackets += raw_json(node).count(b"[")
        column = self._dense.get(name)
        if column is None:
            column = self._dense[name] = _Dense(self._count, to.dim)
        column.present[row] = 1
        self._texts.append(PendingText(name, row, text, model))

    def _multivector(self, row: int, name: str, node: Any, to: VectorField) -> None:
        parts = []
        for part in node:
            if type(part) not in ARRAYS:
                raise _wrong_kind(name, "a multivector: send a list of vectors")
            values = flat_floats(part, strict=True)
            if values is None:
                raise BadRequest(
                    f"Format error in JSON body: vector '{name}' must hold lists of numbers"
                )
            if len(values) != to.dim:
                raise wrong_dimension(to.dim, len(values))
            parts.append(values)
        if not parts or len(parts) > MULTIVECTOR_ROWS_MAX:
            raise BadRequest(
                f"Wrong input: multivector '{name}' must hold 1 to {MULTIVECTOR_ROWS_MAX} vectors"
            )
        self.brackets += 1 + len(parts)
        rows = self._multi.setdefault(name, [None] * self._count)
        rows[row] = np.stack(parts)

    def _sparse_vector(self, row: int, name: str, node: Any) -> None:
        if sorted(node) != ["indices", "values"]:
            raise _wrong_kind(name, "a sparse vector: send exactly indices and values")
        indices, values = unsigned(node["indices"]), flat_floats(node["values"], strict=True)
        self.brackets += 2
        if indices is None or values is None or (len(indices) and indices.max() > 2**32 - 1):
            raise BadRequest(
                f"Format error in JSON body: sparse vector '{name}' must have indices from 0 to "
                "4294967295 and values that are numbers"
            )
        check_sparse(name, indices, values)
        order = np.argsort(indices)
        rows = self._sparse.setdefault(name, [None] * self._count)
        rows[row] = (indices[order].astype(np.uint32), values[order].astype(np.float32))

    # -- the whole --------------------------------------------------------------------------------
    def _start(self, nodes: Any, what: str) -> None:
        if type(nodes) not in ARRAYS:
            raise BadRequest(f"Format error in JSON body: {what} must be a list")
        self.brackets += 1
        self._count = len(nodes)
        if self._count == 0:
            raise BadRequest(f"Wrong input: Empty update request: {what} is an empty list")
        if self._count > BATCH_POINTS_MAX:
            raise BadRequest(
                f"Wrong input: {self._count} points in one request, the most is "
                f"{BATCH_POINTS_MAX}: send several requests"
            )

    def _finish(self) -> PointBatch:
        batch = PointBatch(PointIds.from_keys(self._keys))
        for name, dense in self._dense.items():
            batch.dense[name] = DenseBlock(dense.values, _mask(dense.present))
        for name, sparse in self._sparse.items():
            batch.sparse[name] = _csr(sparse)
        for name, multi in self._multi.items():
            batch.multi[name] = _stacked(multi, self._fields.dense[name].dim)
        if not self._vectors_only:
            batch.set_payloads(self._payloads)
        return batch

    def _blame(self, error: ShoalError, row: int, node: Any) -> ShoalError:
        """The error with the point in its message: position in the request, and id if it has one."""
        if len(self._keys) > row:
            who = f"point {row}, id {format_id(self._keys[row])}"
        else:
            who = f"point {row}"
        return type(error)(f"{error.message} ({who})")


# -- before it is written -------------------------------------------------------------------------
def prepare_points(points: PointBatch, fields: VectorFields) -> None:
    """Bring every vector into its stored form, in place. Blocks must be writable.
    Raises BadRequest that names the point whose vector is not finite."""
    for name, dense in points.dense.items():
        bad = prepare_rows(dense.values, fields.dense[name])
        if bad is not None:
            raise _not_finite(points, name, bad)
    for name, multi in points.multi.items():
        bad = prepare_rows(multi.values, fields.dense[name])
        if bad is not None:
            row = int(np.searchsorted(multi.indptr, bad, side="right")) - 1
            raise _not_finite(points, name, row)
    for name, sparse in points.sparse.items():
        finite = np.isfinite(sparse.values)
        if not finite.all():
            at = int(np.argmin(finite))
            row = int(np.searchsorted(sparse.indptr, at, side="right")) - 1
            raise _not_finite(points, name, row)


def check_batch(points: PointBatch, fields: VectorFields) -> PointBatch:
    """A PointBatch that came as bytes, checked as a JSON request is: names, dimensions, sparse
    order, payloads. Returns one whose blocks may be written (they came as read-only views)."""
    if not 0 < len(points) <= BATCH_POINTS_MAX:
        raise BadRequest(
            f"Wrong input: a batch must hold 1 to {BATCH_POINTS_MAX} points, not {len(points)}"
        )
    for name in (*points.dense, *points.multi, *points.sparse):
        if name not in fields:
            raise unknown_vector(name, fields)
    for name, dense in points.dense.items():
        to = fields.dense.get(name)
        if to is None or to.multi:
            raise _wrong_kind(name, "not dense")
        if dense.values.shape[1] != to.dim:
            raise wrong_dimension(to.dim, dense.values.shape[1])
        dense.values = dense.values.astype(np.float32)
        if dense.present is not None:
            dense.values[~dense.present] = 0.0
    for name, multi in points.multi.items():
        to = fields.dense.get(name)
        if to is None or not to.multi:
            raise _wrong_kind(name, "not a multivector")
        if multi.values.shape[1] != to.dim:
            raise wrong_dimension(to.dim, multi.values.shape[1])
        multi.values = multi.values.astype(np.float32)
    for name, sparse in points.sparse.items():
        if name not in fields.sparse:
            raise _wrong_kind(name, "not sparse")
        for row in range(len(points)):
            part = slice(sparse.indptr[row], sparse.indptr[row + 1])
            check_sparse(name, sparse.indices[part], sparse.values[part])
            if (np.diff(sparse.indices[part].astype(np.int64)) <= 0).any():
                raise BadRequest(f"Wrong input: indices of sparse vector '{name}' must ascend")
    points.versions = None
    if points.payload_offsets is None:
        points.set_payloads([b""] * len(points))
    for row in range(len(points)):
        check_payload(points.payload_of(row))
    return points


def check_sparse(name: str, indices: NDArray[Any], values: NDArray[Any]) -> None:
    if len(indices) != len(values):
        raise BadRequest(
            f"Wrong input: indices and values of sparse vector '{name}' must have the same length "
            f"({len(indices)} != {len(values)})"
        )
    if len(indices) > SPARSE_NONZERO_MAX:
        raise BadRequest(
            f"Wrong input: sparse vector '{name}' has {len(indices)} values, the most is "
            f"{SPARSE_NONZERO_MAX}"
        )
    if len(np.unique(indices)) != len(indices):
        raise BadRequest(f"Wrong input: indices of sparse vector '{name}' must be unique")


# -- small parts ----------------------------------------------------------------------------------
def document(node: Any) -> tuple[str, str]:
    """{"text", "model"?, "options"?} -> text, model; "": what the vector is bound to."""
    for key in node:
        if key not in ("text", "model", "options"):
            raise _unknown(key, "a text to embed")
    keys = list(node)
    text = node["text"] if "text" in keys else None
    model = node["model"] if "model" in keys else ""
    if not isinstance(text, str) or not isinstance(model, str):
        raise BadRequest(
            'Format error in JSON body: a text to embed is {"text": "…", "model": "…"}'
        )
    return text, model


def _is_document(node: Any) -> bool:
    """A text to embed, not a map of named vectors: no vector is a string."""
    keys = list(node)
    for key in ("image", "object"):
        if key in keys and "model" in keys:
            raise unsupported(key, "send a vector, or a text")
    return ("text" in keys and isinstance(node["text"], str)) or (
        "model" in keys and isinstance(node["model"], str)
    )


def _update_mode(value: Any) -> UpdateMode:
    try:
        return UpdateMode(value)
    except ValueError:
        raise BadRequest(
            "Format error in JSON body: update_mode must be upsert, insert_only or update_only"
        ) from None


def _mask(present: bytearray) -> NDArray[np.bool_] | None:
    mask = np.frombuffer(present, np.bool_)
    return None if mask.all() else mask


def _csr(rows: Sequence[tuple[NDArray[Any], NDArray[Any]] | None]) -> SparseBlock:
    there = [row for row in rows if row is not None]
    return SparseBlock(
        _indptr([0 if row is None else len(row[0]) for row in rows]),
        np.concatenate([indices for indices, _ in there]),
        np.concatenate([values for _, values in there]),
        _presence(rows),
    )


def _stacked(rows: Sequence[NDArray[np.float64] | None], dim: int) -> MultiBlock:
    there = [row for row in rows if row is not None]
    with np.errstate(over="ignore"):
        values = np.concatenate(there).astype(np.float32).reshape(-1, dim)
    return MultiBlock(
        _indptr([0 if row is None else len(row) for row in rows]), values, _presence(rows)
    )


def _indptr(lengths: Sequence[int]) -> NDArray[np.uint32]:
    indptr = np.zeros(len(lengths) + 1, np.uint32)
    np.cumsum(lengths, out=indptr[1:])
    return indptr


def _presence(rows: Sequence[object | None]) -> NDArray[np.bool_] | None:
    mask = np.array([row is not None for row in rows])
    return None if mask.all() else mask


def _unknown(key: str, where: str) -> BadRequest:
    return BadRequest(
        f"Format error in JSON body: unknown field `{key}` in {where}: leave it out or check its "
        "spelling"
    )


def unknown_vector(name: str, fields: VectorFields) -> BadRequest:
    known = ", ".join(sorted({*fields.dense, *fields.sparse} - {""}))
    hint = f"; this collection has: {known}" if known else ""
    if not name:
        hint = f"this collection has no unnamed vector{hint}"
    return BadRequest(f"Wrong input: Not existing vector name error: {name}{hint}")


def wrong_dimension(expected: int, got: int) -> BadRequest:
    return BadRequest(f"Wrong input: Vector dimension error: expected dim: {expected}, got {got}")


def _wrong_kind(name: str, what: str) -> BadRequest:
    return BadRequest(
        "Wrong input: Conversion between sparse, regular and multi vectors failed: vector "
        f"'{name}' is {what}"
    )


def _not_finite(points: PointBatch, name: str, row: int) -> BadRequest:
    return BadRequest(
        f"Wrong input: Vector '{name}' contains NaN, infinity or a number that is too large "
        f"(point {row}, id {format_id(points.ids.key(row))})"
    )
