"""Answers as JSON bytes. Pure.

Payloads are stored as JSON and go out as the same bytes. Only the fields that clients need are
written: their models take what is absent for null. An error puts `status` first, because clients
show only the first 200 bytes and integrations search those.

Numbers: ids as JSON integers (whole, up to 2**64-1) or text; scores and vector elements always with
a fraction or an exponent, because typed clients tell 1 from 1.0. JSON has no infinity: a score that
overflowed float32 is written as the largest float32.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from pydantic import BaseModel

from shoal.batch import PointBatch
from shoal.ids import UUID_BIT
from shoal.storage_api import Hits

__all__ = [
    "json_id",
    "render_error",
    "render_hits",
    "render_model",
    "render_points",
    "render_record",
    "render_result",
    "render_scroll",
]

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_encode = msgspec.json.Encoder().encode


def render_result(result: bytes, seconds: float) -> bytes:
    """The envelope of every success."""
    return b'{"result":%b,"status":"ok","time":%b}' % (result, _seconds(seconds))


def render_error(message: str, seconds: float) -> bytes:
    text = json.dumps(message, ensure_ascii=False).encode("utf-8", "replace")
    return b'{"status":{"error":%b},"time":%b,"result":null}' % (text, _seconds(seconds))


def render_model(model: BaseModel) -> bytes:
    return model.model_dump_json(exclude_none=True).encode()


def render_hits(hits: Hits, *, with_vectors: bool) -> bytes:
    """Result of a query: {"points": [...]}. Versions are 0 where storage gave none."""
    points = hits.points
    scores: list[float] = hits.scores.tolist()
    if not math.isfinite(sum(scores)):
        scores = [max(-_FLOAT32_MAX, min(_FLOAT32_MAX, score)) for score in scores]
    versions = [0] * len(scores) if points.versions is None else points.versions.tolist()
    tails = _tails(points, with_vectors=with_vectors)
    rows = [
        f'{{"id":{key if key < UUID_BIT else _quoted(key)},"version":{version},"score":{score!r}'
        for key, version, score in zip(points.ids.keys(), versions, scores, strict=True)
    ]
    return b'{"points":[%b]}' % _joined(rows, tails)


def render_points(points: PointBatch, *, with_vectors: bool) -> bytes:
    """Result of a retrieve: a list of records."""
    rows = [
        f'{{"id":{key if key < UUID_BIT else _quoted(key)}'
        for key in points.ids.keys()  # noqa: SIM118
    ]
    return b"[%b]" % _joined(rows, _tails(points, with_vectors=with_vectors))


def render_scroll(points: PointBatch, next_key: int | None, *, with_vectors: bool) -> bytes:
    """Result of a scroll: the records and the id to go on from, or null."""
    following = b"null" if next_key is None else json_id(next_key)
    return b'{"points":%b,"next_page_offset":%b}' % (
        render_points(points, with_vectors=with_vectors),
        following,
    )


def render_record(points: PointBatch) -> bytes:
    """Result of getting one point, with everything it has."""
    return render_points(points, with_vectors=True)[1:-1]


def json_id(key: int) -> bytes:
    return b"%d" % key if key < UUID_BIT else _quoted(key).encode()


def _quoted(key: int) -> str:
    return f'"{uuid.UUID(int=key ^ UUID_BIT)}"'


def _seconds(seconds: float) -> bytes:
    return b"%.9f" % seconds


def _joined(heads: Sequence[str], tails: Sequence[bytes]) -> bytes:
    return b",".join([head.encode() + tail for head, tail in zip(heads, tails, strict=True)])


def _tails(points: PointBatch, *, with_vectors: bool) -> list[bytes]:
    """What follows the fixed part of each point: payload, vectors, and the closing brace."""
    count = len(points)
    if points.payload_offsets is None:
        tails = [b""] * count
    else:
        payload, ends = points.payload, points.payload_offsets.tolist()
        tails = [
            b',"payload":' + (payload[ends[row] : ends[row + 1]] or b"{}") for row in range(count)
        ]
    if with_vectors:
        vectors = _vectors(points)
        return [tails[row] + b',"vector":' + _encode(vectors[row]) + b"}" for row in range(count)]
    return [tail + b"}" for tail in tails]


def _vectors(points: PointBatch) -> list[Any]:
    """Per row: the list alone when all it has is the unnamed vector, else a map by name."""
    rows: list[dict[str, Any]] = [{} for _ in range(len(points))]
    for name, dense in points.dense.items():
        lists = dense.values.tolist()
        for row in _present(dense.present, len(rows)):
            rows[row][name] = lists[row]
    for name, sparse in points.sparse.items():
        for row in _present(sparse.present, len(rows)):
            part = slice(sparse.indptr[row], sparse.indptr[row + 1])
            rows[row][name] = {
                "indices": sparse.indices[part].tolist(),
                "values": sparse.values[part].tolist(),
            }
    for name, multi in points.multi.items():
        for row in _present(multi.present, len(rows)):
            rows[row][name] = multi.values[multi.indptr[row] : multi.indptr[row + 1]].tolist()
    return [row[""] if len(row) == 1 and "" in row else row for row in rows]


def _present(mask: Any, count: int) -> Sequence[int]:
    return range(count) if mask is None else np.flatnonzero(mask).tolist()
