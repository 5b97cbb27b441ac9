"""Points and queries out of JSON: what comes in, what is refused, and that two readings agree."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest

from coordinator import requests
from coordinator.json_body import parse_json, validate
from coordinator.parse import (
    PointsWrite,
    check_batch,
    parse_update_vectors,
    parse_upsert,
    prepare_points,
)
from shoal.api import models
from shoal.batch import PointBatch
from shoal.errors import BadRequest, InvalidField, ShoalError
from shoal.ids import UUID_BIT
from shoal.storage_api import Distance, UpdateMode
from shoal.vectors import Datatype, VectorField, VectorFields
from shoal.wire import ops_pb2 as wire

PLAIN = VectorFields({"": VectorField(4, Distance.COSINE)})
NAMED = VectorFields(
    {
        "a": VectorField(3, Distance.DOT),
        "b": VectorField(2, Distance.EUCLID, Datatype.UINT8),
        "m": VectorField(2, Distance.DOT, multi=True),
    },
    frozenset({"s"}),
)


def upsert(body: Any, fields: VectorFields = PLAIN) -> PointsWrite:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    write = parse_upsert(raw, fields)
    prepare_points(write.points, fields)
    return write


def refused(body: Any, fields: VectorFields = PLAIN) -> str:
    with pytest.raises(ShoalError) as caught:
        upsert(body, fields)
    assert caught.value.status_code in (400, 413, 422)
    return caught.value.message


# -- points ---------------------------------------------------------------------------------------
def test_list_and_batch_forms_give_the_same_columns() -> None:
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((5, 4)).tolist()
    payloads = [{"n": n, "tags": ["[", "é\u2028"]} if n else None for n in range(5)]
    listed = upsert(
        {"points": [{"id": n, "vector": vectors[n], "payload": payloads[n]} for n in range(5)]}
    ).points
    batch = upsert(
        {"batch": {"ids": [0, 1, 2, 3, 4], "vectors": vectors, "payloads": payloads}}
    ).points
    assert listed.to_wire() == batch.to_wire()
    np.testing.assert_allclose(np.linalg.norm(listed.dense[""].values, axis=1), 1, atol=1e-6)
    assert json.loads(listed.payload_of(1)) == payloads[1]
    assert listed.payload_of(0) == b""


def test_named_sparse_and_multivectors() -> None:
    points = upsert(
        {
            "points": [
                {"id": 1, "vector": {"a": [1, 2, 3], "b": [1.9, 300]}},
                {"id": 2, "vector": {"s": {"indices": [7, 2], "values": [0.5, 1]}}},
                {"id": 3, "vector": {"m": [[1, 2], [3, 4]], "s": {"indices": [], "values": []}}},
                {"id": 4, "vector": {}},
            ]
        },
        NAMED,
    ).points
    assert points.dense["a"].present is not None
    assert points.dense["a"].present.tolist() == [True, False, False, False]
    assert points.dense["b"].values[0].tolist() == [1.0, 255.0]
    assert points.sparse["s"].indptr.tolist() == [0, 0, 2, 2, 2]
    assert points.sparse["s"].indices.tolist() == [2, 7]
    assert points.sparse["s"].values.tolist() == [1.0, 0.5]
    assert points.multi["m"].values.tolist() == [[1, 2], [3, 4]]
    assert points.multi["m"].indptr.tolist() == [0, 0, 0, 2, 2]


def test_ids_of_both_kinds() -> None:
    text = "6BA7B810-9DAD-11D1-80B4-00C04FD430C8"
    points = [{"id": i, "vector": {}} for i in (0, 2**64 - 1, text)]
    keys = upsert({"points": points}, NAMED).points.ids.keys()
    assert keys[:2] == [0, 2**64 - 1]
    assert keys[2] & UUID_BIT


def test_numbers_beyond_64_bits_survive_in_payloads() -> None:
    body = (
        b'{"points":[{"id":1,"vector":[1,2,3,4],"payload":{"big":123456789012345678901234567890}}]}'
    )
    points = upsert(body).points
    assert points.payload_of(0) == b'{"big":123456789012345678901234567890}'
    assert points.dense[""].values.shape == (1, 4)


def test_texts_wait_for_their_vectors() -> None:
    write = upsert(
        {
            "points": [
                {"id": 1, "vector": {"text": "a [b]", "model": "m"}},
                {"id": 2, "vector": [1, 0, 0, 0]},
            ]
        }
    )
    assert [(t.name, t.row, t.text, t.model) for t in write.texts] == [("", 0, "a [b]", "m")]
    assert write.points.dense[""].present is None


def test_update_mode_filter_and_vectors_only() -> None:
    body = {
        "points": [{"id": 1, "vector": [1, 2, 3, 4]}],
        "update_mode": "insert_only",
        "update_filter": {"must": [{"key": "a", "match": {"any": ["x", "["]}}]},
        "shard_key": None,
    }
    write = upsert(body)
    assert write.mode is UpdateMode.INSERT_ONLY
    assert write.update_filter is not None
    updated = parse_update_vectors(b'{"points":[{"id":1,"vector":[1,2,3,4]}]}', PLAIN)
    assert updated.vectors_only
    assert updated.points.payload_offsets is None


@pytest.mark.parametrize(
    ("point", "says"),
    [
        ({"vector": [1, 2]}, "Vector dimension error: expected dim: 4, got 2"),
        ({"vector": {"x": [1]}}, "Not existing vector name error: x"),
        ({"vector": [1, 2, 3, "4"]}, "list of numbers"),
        ({"vector": [[1], [2], [3], [4]]}, "list of numbers"),
        ({"vector": [1, [2], 3, 4]}, "list of numbers"),
        ({"vector": [[], 1, 2, 3, 4]}, "list of numbers"),
        ({"vector": [1, 2, 3, 1e39]}, "too large"),
        ({"vector": [1, 2, 3, True]}, "list of numbers"),
        ({"vector": 3}, "list or an object"),
        ({}, "missing field `vector`"),
        ({"vector": [1, 2, 3, 4], "payload": [1]}, "payload must be an object"),
        ({"vector": [1, 2, 3, 4], "color": 1}, "unknown field `color`"),
        ({"vector": {"image": "x", "model": "m"}}, "`image` is not supported"),
        ({"vector": {"text": "x", "model": 1}}, '{"text": "…", "model": "…"}'),
    ],
)
def test_a_wrong_point_is_refused_by_name(point: dict[str, Any], says: str) -> None:
    good = {"id": 5, "vector": [1, 2, 3, 4], "payload": {"a": ["b"]}}
    message = refused({"points": [good, {"id": 77, **point}]})
    assert says in message
    assert "point 1, id 77" in message


@pytest.mark.parametrize(
    ("vector", "says"),
    [
        ({"a": {"indices": [1], "values": [1]}}, "Conversion between sparse"),
        ({"s": [1, 2]}, "Conversion between sparse"),
        ({"s": {"indices": [1, 1], "values": [1, 2]}}, "must be unique"),
        ({"s": {"indices": [1], "values": []}}, "same length"),
        ({"s": {"indices": [-1], "values": [1]}}, "0 to 4294967295"),
        ({"s": {"indices": [2**32], "values": [1]}}, "0 to 4294967295"),
        ({"s": {"indices": [1], "values": [1e39]}}, "too large"),
        ({"m": [1, 2]}, "list of vectors"),
        ({"m": [[1, 2], [3]]}, "expected dim: 2, got 1"),
        ({"m": []}, "1 to"),
        ({"m": [[1, 2], [3, 1e39]]}, "too large"),
        ({"m": {"text": "x", "model": "m"}}, "cannot become the vector 'm'"),
        ([1, 2, 3], "no unnamed vector"),
    ],
)
def test_a_wrong_named_vector_is_refused(vector: Any, says: str) -> None:
    assert says in refused({"points": [{"id": 1, "vector": vector}]}, NAMED)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "truncated"),
        (b"{", "truncated"),
        (b'{"points":[]}', "Empty update request"),
        (b'{"points":[NaN]}', "Format error in JSON body"),
        (b'{"points":[{"id":1,"vector":[1e999,1,1,1]}]}', "Format error in JSON body"),
        (b'{"points":[{"id":1,"vector":[1,1,1,1],"payload":{"a":"\xff"}}]}', "UTF-8"),
        (b"[]", "must be an object"),
        (b"{}", "either `points` or `batch`"),
        (b'{"points":[{"id":1,"vector":[1,1,1,1]}],"shard_key":"a"}', "shard_key"),
        (b'{"points":[{"id":1,"vector":[1,1,1,1]}],"update_mode":"no"}', "update_mode"),
        (b'{"batch":{"ids":[1,2],"vectors":[[1,1,1,1]]}}', "(2 != 1)"),
        (b'{"batch":{"ids":[1],"vectors":[[1,1,1,1]],"payloads":[]}}', "(1 != 0)"),
        (b'{"batch":{"ids":[1]}}', "batch.vectors"),
        (b'{"points":[{"id":1,"vector":[1,1,1,1],"payload":' + b'{"a":' * 80 + b"1" + b"}" * 81
         + b"]}", "nested deeper"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_refused(body: bytes, says: str) -> None:
    assert says in refused(body)


def test_a_parser_that_was_left_in_an_error_is_usable_again() -> None:
    with pytest.raises(BadRequest, match="expected dim") as held:
        upsert({"points": [{"id": 1, "vector": [1, 2]}]})
    assert held.tb is not None  # and it holds views of the document
    assert upsert({"points": [{"id": 1, "vector": [1, 2, 3, 4]}]}).points.ids.keys() == [1]


def test_a_serialized_batch_is_checked_like_json() -> None:
    points = upsert(
        {
            "points": [
                {"id": 1, "vector": {"a": [1, 2, 3], "m": [[1, 2]]}, "payload": {"n": 1}},
                {"id": 2, "vector": {"s": {"indices": [3], "values": [1]}}},
            ]
        },
        NAMED,
    ).points
    sent = points.to_wire().SerializeToString()

    def received() -> PointBatch:
        return PointBatch.from_wire(wire.PointBatch.FromString(sent))

    checked = check_batch(received(), NAMED)
    prepare_points(checked, NAMED)
    assert checked.to_wire() == points.to_wire()
    with pytest.raises(BadRequest, match="Not existing vector name"):
        check_batch(received(), PLAIN)
    broken = received()
    broken.set_payloads([b"[]", b""])
    with pytest.raises(BadRequest, match="payload"):
        check_batch(broken, NAMED)


# -- queries --------------------------------------------------------------------------------------
def by_model(body: bytes) -> requests.Query:
    return requests._query_of(validate(models.QueryRequest, body))


def same(one: requests.Query, other: requests.Query) -> bool:
    names = [name for name in requests.Query.__slots__ if name != "vector"]
    if any(getattr(one, name) != getattr(other, name) for name in names):
        return False
    if one.vector is None or other.vector is None:
        return one.vector is other.vector
    return np.array_equal(one.vector, other.vector)


def test_the_fast_reading_of_a_query_agrees_with_the_model() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    choices: dict[str, list[Any]] = {
        "query": [[1, 2.5, 3], [], {"nearest": [1.0, 2.0]}, {"nearest": 5}, 7, None, "x", True,
                  [[1, 2]], [1, [2]], [1, "2"], {"nearest": [1], "mmr": None}, {"fusion": "rrf"},
                  "6ba7b810-9dad-11d1-80b4-00c04fd430c8", {"text": "a", "model": "b"}],
        "limit": [1, 10, 0, -1, None, "3", 2.0, 10_000, True],
        "offset": [0, 3, -1, None, 9_999, "1"],
        "with_payload": [True, False, None, ["a"], {"include": ["a"]}, {"exclude": []}, 3, [1]],
        "with_vector": [True, False, None, ["a"], "a"],
        "using": ["", "a", None, 3],
        "filter": [None, {}, {"must": [{"key": "a", "match": {"any": [1, 2]}}]}, {"must": 3}, []],
        "params": [None, {}, {"exact": True, "hnsw_ef": 50}, {"hnsw_ef": 0}, {"exact": 1},
                   {"quantization": {"rescore": True}}, {"indexed_only": True}, {"speed": 1}],
        "score_threshold": [None, 0.5, 1, "x"],
        "prefetch": [None, [], [{}]],
        "colour": [None, 1],
    }  # fmt: skip
    agreed = 0
    for _ in range(3000):
        names = rng.sample(list(choices), rng.randint(0, 4))
        body = json.dumps({name: rng.choice(choices[name]) for name in names}).encode()
        fast = slow = None
        error_fast = error_slow = ""
        try:
            fast = requests.parse_query(body)
        except ShoalError as error:
            error_fast = error.message
        try:
            slow = by_model(body)
        except ShoalError as error:
            error_slow = error.message
        assert (fast is None) == (slow is None), (body, error_fast, error_slow)
        if fast is not None and slow is not None:
            assert same(fast, slow), body
            agreed += 1
    assert agreed > 300


@pytest.mark.parametrize(
    ("body", "error", "says"),
    [
        ({"limit": 0}, InvalidField, "limit"),
        ({"limit": 9_000, "offset": 9_000}, InvalidField, "scroll"),
        ({"colour": 1}, BadRequest, "colour"),
        ({"query": {"recommend": {}}}, BadRequest, "`recommend`"),
        ({"query": [1], "lookup_from": {"collection": "x"}}, BadRequest, "`lookup_from`"),
        ({"query": {"indices": [1], "values": [1]}}, BadRequest, "sparse"),
        ({"score_threshold": 0.5}, BadRequest, "A query is needed"),
    ],
)
def test_queries_that_are_refused(body: Any, error: type[ShoalError], says: str) -> None:
    with pytest.raises(error, match=says):
        requests.parse_query(json.dumps(body).encode())


def test_operations_are_read_in_order_and_errors_name_them() -> None:
    body = {
        "operations": [
            {"delete": {"points": [1]}},
            {"upsert": {"points": [{"id": 1, "vector": [1, 2, 3, 4]}]}},
            {"set_payload": {"payload": {"a": 2**70}, "points": [1]}},
            {"clear_payload": {"filter": {}}},
        ]
    }
    writes = requests.parse_operations(json.dumps(body).encode(), PLAIN)
    kinds = [type(write).__name__ for write in writes]
    assert kinds == ["Delete", "PointsWrite", "SetPayload", "ClearPayload"]
    assert writes[2].payload == b'{"a":1180591620717411303424}'  # type: ignore[union-attr]
    body["operations"].append({"upsert": {"points": [{"id": 1, "vector": [1]}]}})
    with pytest.raises(BadRequest, match=r"operations\[4\]"):
        requests.parse_operations(json.dumps(body).encode(), PLAIN)


def test_a_selection_needs_exactly_one_of_points_and_filter() -> None:
    for body in ({}, {"points": []}, {"points": [1], "filter": {}}):
        with pytest.raises(BadRequest):
            requests.delete_points(json.dumps(body).encode(), PLAIN)


def test_json_views_have_what_the_readers_use() -> None:
    for body in (b'{"a":[1,2],"b":{"c":null}}', b'{"a":[1,2],"b":{"c":null},"z":1e2}'):
        node = parse_json(body)
        assert [*node][:2] == ["a", "b"]
        assert len(node["a"]) == 2
        del node
