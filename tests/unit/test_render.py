"""Answers as bytes: what a client reads back, number by number."""

from __future__ import annotations

import json

import numpy as np

from coordinator.render import (
    render_error,
    render_hits,
    render_points,
    render_record,
    render_result,
    render_scroll,
)
from shoal.batch import DenseBlock, MultiBlock, PointBatch, SparseBlock
from shoal.ids import UUID_BIT, PointIds
from shoal.storage_api import Hits


def batch(keys: list[int], payloads: list[bytes] | None = None) -> PointBatch:
    points = PointBatch(PointIds.from_keys(keys))
    if payloads is not None:
        points.set_payloads(payloads)
    return points


def test_envelope_and_error_are_json_with_status_first_in_errors() -> None:
    assert json.loads(render_result(b"true", 0.25)) == {
        "result": True,
        "status": "ok",
        "time": 0.25,
    }
    raw = render_error('say "no"\né\ud800', 1e-7)
    assert raw.startswith(b'{"status":{"error":"say')
    error = json.loads(raw)
    assert error["result"] is None
    assert isinstance(error["time"], float)


def test_hits_have_whole_ids_and_fractional_scores() -> None:
    points = batch([2**64 - 1, UUID_BIT | 5, 1], [b'{"a":1}', b"", b'{"b":"\xc3\xa9"}'])
    points.versions = np.array([7, 8, 9], np.uint64)
    raw = render_hits(Hits(points, np.array([1.0, 0.5, -3.0], np.float32)), with_vectors=False)
    assert b'"score":1.0' in raw
    found = json.loads(raw)["points"]
    assert [p["id"] for p in found] == [2**64 - 1, "00000000-0000-0000-0000-000000000005", 1]
    assert [p["version"] for p in found] == [7, 8, 9]
    assert [p["payload"] for p in found] == [{"a": 1}, {}, {"b": "é"}]
    assert "vector" not in found[0]


def test_scores_that_overflowed_are_still_numbers() -> None:
    scores = np.array([np.inf, 1.0, -np.inf], np.float32)
    found = json.loads(render_hits(Hits(batch([1, 2, 3]), scores), with_vectors=False))["points"]
    assert [p["score"] for p in found] == [
        float(np.finfo(np.float32).max),
        1.0,
        -float(np.finfo(np.float32).max),
    ]
    assert "payload" not in found[0]


def test_payload_bytes_go_out_as_they_are() -> None:
    payload = b'{"z":18446744073709551616,"f":1.0,"e":1e-7,"n":null}'
    assert b'"payload":' + payload + b"}" in render_points(
        batch([1], [payload]), with_vectors=False
    )


def test_vectors_alone_when_unnamed_else_by_name() -> None:
    alone = batch([1, 2])
    alone.dense[""] = DenseBlock(np.array([[1, 2], [0, 0]], np.float32), np.array([True, False]))
    raw = render_points(alone, with_vectors=True)
    assert b'"vector":[1.0,2.0]' in raw
    assert [p["vector"] for p in json.loads(raw)] == [[1.0, 2.0], {}]

    named = batch([1])
    named.dense["a"] = DenseBlock(np.array([[0.1]], np.float32))
    named.sparse["s"] = SparseBlock(
        np.array([0, 1], np.uint32), np.array([4], np.uint32), np.array([2], np.float32)
    )
    named.multi["m"] = MultiBlock(np.array([0, 2], np.uint32), np.ones((2, 1), np.float32))
    record = json.loads(render_record(named))
    assert np.float32(record["vector"]["a"][0]) == np.float32(0.1)
    assert record["vector"]["s"] == {"indices": [4], "values": [2.0]}
    assert record["vector"]["m"] == [[1.0], [1.0]]


def test_scroll_says_where_to_go_on() -> None:
    page = json.loads(render_scroll(batch([1], [b""]), UUID_BIT, with_vectors=False))
    assert page["next_page_offset"] == "00000000-0000-0000-0000-000000000000"
    assert json.loads(render_scroll(batch([], []), None, with_vectors=False)) == {
        "points": [],
        "next_page_offset": None,
    }
