"""Everything of storage_api goes over the wire and comes back the same."""

from __future__ import annotations

import dataclasses
import uuid
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shoal.api.filter import Filter, condition_key, parse_filter
from shoal.batch import DenseBlock, MultiBlock, PointBatch, SparseBlock
from shoal.errors import BadRequest, Busy, NotSupported, ShoalError, Unavailable
from shoal.files_api import FileChunk, FileSnapshot, SnapshotFile
from shoal.ids import UUID_BIT, PointIds
from shoal.node.v1 import node_pb2 as pb
from shoal.rpc import codec, faults
from shoal.storage_api import (
    AlterVectors,
    ClearPayload,
    Delete,
    DeletePayload,
    DeleteVectors,
    Distance,
    Guard,
    Hits,
    OverwritePayload,
    ReplicaStatus,
    Scroll,
    Search,
    Selector,
    SetPayload,
    ShardInfo,
    ShardKey,
    ShardSpec,
    UpdateMode,
    UpdateVectors,
    Upsert,
    VectorSpec,
    WriteResult,
)
from shoal.wire import ops_pb2 as wire

KEY = ShardKey(2**40, 7)
A_UUID = UUID_BIT | uuid.UUID("d8d7b3c2-0000-4000-8000-00000000000a").int
FILTER = parse_filter({"must": [{"key": "a", "match": {"value": 1}}]})


def same(left: Any, right: Any) -> bool:
    """Equal all the way down, with types, arrays and filters."""
    if type(left) is not type(right):
        return False
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right)
    if isinstance(left, PointIds):
        return left.keys() == right.keys()
    if isinstance(left, Filter):
        return left == right and condition_key(left) == condition_key(right)
    if dataclasses.is_dataclass(left):
        return all(
            same(getattr(left, f.name), getattr(right, f.name)) for f in dataclasses.fields(left)
        )
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    return bool(left == right)


def request_of(data: bytes) -> pb.Request:
    """As a node gets it: out of a message with others."""
    frames = pb.Frames.FromString(codec.join_frames(requests=[data, data], cancelled=[1, 300]))
    assert list(frames.cancelled) == [1, 300]
    assert frames.requests[0] == frames.requests[1]
    return frames.requests[0]


def answer_of(data: bytes) -> pb.Answer:
    return pb.Frames.FromString(codec.join_frames(answers=[data])).answers[0]


# -- filters --------------------------------------------------------------------------------------
TEXT = st.text(max_size=8)
PATH = st.sampled_from(["a", "a.b", "a[].b", "a[0]", '"q u.o"', "ü"])
INTEGER = st.integers(-(2**63), 2**64 - 1)
NUMBER = st.one_of(
    st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.just(10**400), st.just(-0.0)
)
MOMENT = st.one_of(
    st.datetimes().map(lambda at: at.isoformat()),
    st.datetimes(timezones=st.timezones()).map(lambda at: at.isoformat()),
    st.dates().map(str),
)
POINT = st.fixed_dictionaries(
    {"lon": st.floats(-180, 180), "lat": st.one_of(st.floats(-90, 90), st.integers(-90, 90))}
)
RING = st.lists(POINT, min_size=3, max_size=5).map(lambda points: {"points": [*points, points[0]]})
MATCH = st.one_of(
    st.fixed_dictionaries({"value": st.one_of(TEXT, INTEGER, st.booleans())}),
    st.fixed_dictionaries({"any": st.one_of(st.lists(TEXT), st.lists(INTEGER))}),
    st.fixed_dictionaries({"except": st.one_of(st.lists(TEXT), st.lists(INTEGER))}),
    *(
        st.fixed_dictionaries({name: TEXT})
        for name in ("text", "text_any", "phrase", "prefix", "substring")
    ),
)


def bounds(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(["lt", "lte", "gt", "gte"]), values)


OPERATOR = st.one_of(
    st.fixed_dictionaries({"match": MATCH}),
    st.fixed_dictionaries({"range": st.one_of(bounds(NUMBER), bounds(MOMENT))}),
    st.fixed_dictionaries({"values_count": bounds(st.integers(0, 2**70))}),
    st.fixed_dictionaries({"is_empty": st.booleans()}),
    st.fixed_dictionaries({"is_null": st.booleans()}),
    st.fixed_dictionaries(
        {"geo_bounding_box": st.fixed_dictionaries({"top_left": POINT, "bottom_right": POINT})}
    ),
    st.fixed_dictionaries(
        {
            "geo_radius": st.fixed_dictionaries(
                {"center": POINT, "radius": st.floats(0, 1e9, allow_nan=False)}
            )
        }
    ),
    st.fixed_dictionaries(
        {
            "geo_polygon": st.fixed_dictionaries(
                {"exterior": RING}, optional={"interiors": st.lists(RING, max_size=2)}
            )
        }
    ),
)
ID = st.one_of(st.integers(0, 2**64 - 1), st.uuids().map(str))
LEAF = st.one_of(
    st.tuples(PATH, OPERATOR).map(lambda pair: {"key": pair[0], **pair[1]}),
    st.fixed_dictionaries({"has_id": st.lists(ID, max_size=3)}),
    st.fixed_dictionaries({"has_vector": TEXT}),
    st.fixed_dictionaries({"is_empty": st.fixed_dictionaries({"key": PATH})}),
    st.fixed_dictionaries({"is_null": st.fixed_dictionaries({"key": PATH})}),
    st.integers(1, 2**64 - 1).map(lambda total: {"slice": {"total": total, "index": total - 1}}),
)


def trees(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    clause = st.one_of(st.none(), children, st.lists(children, max_size=3))
    some = st.fixed_dictionaries(
        {"conditions": st.lists(children, max_size=3), "min_count": st.integers(1, 2**70)}
    )
    filters = st.fixed_dictionaries(
        {}, optional={"must": clause, "should": clause, "must_not": clause, "min_should": some}
    )
    nested = st.tuples(PATH, filters).map(lambda p: {"nested": {"key": p[0], "filter": p[1]}})
    return st.one_of(filters, nested)


FILTERS = st.recursive(LEAF, trees, max_leaves=8).map(
    lambda tree: (
        tree if tree.keys() <= {"must", "should", "must_not", "min_should"} else {"must": tree}
    )
)


@settings(max_examples=300, deadline=None)
@given(FILTERS)
@example({})
@example({"must": []})
@example({"must": [{}]})
@example({"must": {"key": "t", "range": {"gt": "1913-01-01T00:00:00-00:30:20"}}})
@example({"must": {"key": "t", "range": {"gt": "0001-01-01T00:00:00+23:59"}}})
def test_a_filter_comes_back_the_same(tree):
    meant = parse_filter(tree)
    data = codec.encode_filter(meant)
    for again in (codec.decode_filter(data), Filter.model_validate_json(data)):
        assert again is not None
        assert same(meant, again)
        assert repr(meant) == repr(again)  # tells 1 from 1.0, -0.0 from 0.0


def test_no_filter_is_not_the_empty_filter():
    assert codec.encode_filter(None) == b""
    assert codec.decode_filter(b"") is None
    assert same(codec.decode_filter(codec.encode_filter(Filter())), Filter())


def test_a_filter_that_was_changed_in_place_of_another_is_encoded_anew():
    first, second = (parse_filter({"must": {"has_id": [number]}}) for number in (1, 2))
    assert codec.encode_filter(first) != codec.encode_filter(second)
    assert codec.encode_filter(first) == codec.encode_filter(first)


def test_a_filter_that_cannot_be_read_is_the_callers_fault():
    for data in (b"{", b'{"must": 3}', b'{"perhaps": []}', b"\xff"):
        with pytest.raises(BadRequest, match="same version"):
            codec.decode_filter(data)
    lone = Filter.model_construct(must=({"key": "\ud800"},))
    with pytest.raises(BadRequest, match="Unicode"):
        codec.encode_filter(lone)


# -- points ---------------------------------------------------------------------------------------
def f32(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def u32(*values: int) -> np.ndarray:
    return np.array(values, np.uint32)


def batch(keys: tuple[int, ...] = (1, 2**64 - 1, A_UUID)) -> PointBatch:
    points = PointBatch(PointIds.from_keys(keys))
    mask = np.array([True, False, True])
    points.dense = {"": DenseBlock(f32(3, 4)), "d": DenseBlock(f32(3, 2), mask)}
    points.sparse = {"s": SparseBlock(u32(0, 1, 1, 3), u32(5, 0, 9), f32(3), mask)}
    points.multi = {"m": MultiBlock(u32(0, 2, 2, 3), f32(3, 2))}
    points.set_payloads([b'{"a":1}', b"", b"{}"])
    return points


def answer_batch(keys: tuple[int, ...]) -> PointBatch:
    points = PointBatch(PointIds.from_keys(keys))
    points.versions = np.arange(len(keys), dtype=np.uint64)
    return points


SEARCHES = [
    Search("", f32(3), 10),
    Search(
        "name",
        f32(1),
        10_000,
        filter=FILTER,
        exclude=(0, A_UUID),
        score_threshold=0.1,
        exact=True,
        ef=64,
        with_payload=True,
        with_vectors=True,
    ),
    Search("", f32(3), 1, score_threshold=0.0, with_vectors=("", "b")),
    Search("", f32(3), 1, with_vectors=()),
]


@pytest.mark.parametrize("query", SEARCHES, ids=lambda q: str(q.limit))
def test_search(query):
    data = codec.search_request(9, KEY, query, Guard(2**50, strong=True))
    request = request_of(data)
    assert (request.id, request.min_applied, request.strong) == (9, 2**50, True)
    assert ShardKey(request.collection_id, request.shard) == KEY
    assert same(codec.decode_search(request.search), query)


def test_scroll_retrieve_count_info():
    for query in (
        Scroll(10),
        Scroll(1, 0, FILTER, with_payload=False, with_vectors=("a",)),
        Scroll(7, A_UUID, with_vectors=True),
    ):
        request = request_of(codec.scroll_request(1, KEY, query, Guard()))
        assert same(codec.decode_scroll(request.scroll), query)
    for keys in ((), (3, 1, 3), (A_UUID, 4)):
        wanted = (PointIds.from_keys(keys), True, ("b",))
        request = request_of(codec.retrieve_request(1, KEY, *wanted, Guard(4)))
        ids, *rest = codec.decode_retrieve(request.retrieve)
        assert (ids.keys(), *rest) == (list(keys), True, ("b",))
    for meant in (None, FILTER, Filter()):
        request = request_of(codec.count_request(1, KEY, meant, Guard()))
        assert request.WhichOneof("op") == "count"
        assert same(codec.decode_filter(request.count.filter), meant)
    assert request_of(codec.info_request(1, KEY)).WhichOneof("op") == "info"


IDS = Selector(ids=PointIds.from_keys((5, A_UUID)))
WRITES = [
    Upsert(batch()),
    Upsert(batch(), FILTER, UpdateMode.UPDATE_ONLY),
    Upsert(PointBatch(PointIds.from_keys([1])), mode=UpdateMode.INSERT_ONLY),
    UpdateVectors(batch((1, 2, 3)), Filter()),
    Delete(IDS),
    Delete(Selector(ids=PointIds.from_keys([]))),
    Delete(Selector(filter=Filter())),
    DeleteVectors(Selector(filter=FILTER), ("", "a")),
    SetPayload(IDS, b'{"x": 1}', None),
    SetPayload(IDS, b"{}", ""),
    OverwritePayload(IDS, b""),
    DeletePayload(IDS, ("a", "b")),
    ClearPayload(IDS),
    UpdateVectors(batch(), FILTER, np.array([3, 2**64 - 1, 0], np.uint64), ("d", "")),
    UpdateVectors(PointBatch(PointIds.from_keys([])), None, np.empty(0, np.uint64)),
    SetPayload(IDS, b"{}", None, ("a", "v\x1f1")),
    OverwritePayload(IDS, b"{}", ("a",)),
    DeletePayload(IDS, ("a",), ("b", "c")),
    ClearPayload(IDS, ("",)),
    AlterVectors(),
    AlterVectors(
        {
            "v\x1f2": VectorSpec(3, Distance.DOT, index_bytes_min=0),
            "": VectorSpec(65_535, Distance.COSINE, hnsw_m=4, hnsw_ef_construct=5),
        },
        ("v", "v\x1f1"),
    ),
]


@pytest.mark.parametrize("op", WRITES, ids=lambda op: type(op).__name__)
def test_write(op):
    request = request_of(codec.write_request(3, KEY, op))
    assert same(codec.decode_write(request.write), op)


def test_a_write_that_says_nothing_is_refused():
    """A selector that got lost on the way must not mean all points."""
    for write in (
        pb.Write(),
        pb.Write(delete=pb.Delete()),
        pb.Write(delete=pb.Delete(where=pb.Selector(filter=b""))),
        pb.Write(upsert=pb.Upsert(mode=99)),
    ):
        with pytest.raises(NotSupported):
            codec.decode_write(write)


def test_points_that_do_not_fit_are_refused():
    message = pb.Write()
    batch().fill(message.upsert.points)
    for damage in (
        lambda points: points.__setattr__("count", 4),
        lambda points: points.dense[0].__setattr__("dim", 5),
        lambda points: points.__setattr__("payload_offsets", b"\0" * 16),
        lambda points: points.ids.__setattr__("ints", b"123"),
        lambda points: points.sparse[0].__setattr__("indptr", b"\0" * 4),
    ):
        broken = pb.Write()
        broken.CopyFrom(message)
        damage(broken.upsert.points)
        with pytest.raises(BadRequest, match="does not fit"):
            codec.decode_write(broken)
    with pytest.raises(BadRequest, match="does not fit"):
        codec.decode_search(pb.Search(vector=b"12345"))
    update = pb.Write()
    batch().fill(update.update_vectors.points)
    update.update_vectors.if_versions = b"\0" * 16
    with pytest.raises(BadRequest, match="3 points came with 2 versions"):
        codec.decode_write(update)
    with pytest.raises(BadRequest, match="one point id"):
        codec.decode_scroll(pb.Scroll(start=PointIds.from_keys([1, 2]).to_wire()))


# -- answers --------------------------------------------------------------------------------------
@pytest.mark.parametrize("keys", [(), (1, 2, 3), (4, A_UUID)], ids=len)
def test_hits_and_points(keys):
    points = answer_batch(keys)
    answer = answer_of(codec.hits_answer(8, Hits(points, f32(len(keys))), 77))
    assert (answer.id, answer.applied) == (8, 77)
    assert same(codec.decode_hits(answer.hits), Hits(points, f32(len(keys))))
    points.set_payloads([b"{}"] * len(keys))
    answer = answer_of(codec.points_answer(8, points, 77))
    assert same(codec.decode_batch(answer.points), points)


def test_as_many_scores_as_hits():
    answer = answer_of(codec.hits_answer(8, Hits(answer_batch((1, 2)), f32(3)), 77))
    with pytest.raises(BadRequest, match="2 hits came with 3 scores"):
        codec.decode_hits(answer.hits)


def test_small_answers():
    assert answer_of(codec.count_answer(1, 2**40, 5)).count == 2**40
    assert answer_of(codec.count_answer(1, 0, 5)).WhichOneof("result") == "count"
    for result in (WriteResult(5), WriteResult(6, 0), WriteResult(7, A_UUID)):
        assert codec.decode_result(answer_of(codec.result_answer(1, result)).written) == result
    for info in (ShardInfo(), ShardInfo(1, 2, {"": 3, "b": 0}, 4, 5, 6, 7, "torn")):
        assert codec.decode_info(answer_of(codec.info_answer(1, info)).info) == info


def test_shards_and_files():
    spec = ShardSpec(
        KEY,
        "films",
        {
            "": VectorSpec(384, Distance.COSINE),
            "m": VectorSpec(8, Distance.MANHATTAN, True, 4, 5, 2**62),
            "z": VectorSpec(8, Distance.DOT, index_bytes_min=0),
        },
        ("s", "t"),
    )
    assert codec.decode_spec(codec.encode_spec(spec)) == spec
    info = ShardInfo(stopped="")
    statuses = [
        ReplicaStatus("s1", "primary", 3, 4, 5, True, KEY, info, 1.5, "s2"),
        ReplicaStatus("s1", "stopped", 0, 0, 0, False, ShardKey(1, 0), ShardInfo()),
    ]
    assert codec.decode_status(codec.encode_status(statuses)) == statuses
    snapshot = FileSnapshot("x", b"{}", (SnapshotFile("1/ids", 2**40, 2**32 - 1),))
    assert codec.decode_snapshot(codec.encode_snapshot(snapshot)) == snapshot
    chunk = FileChunk(2**40, b"data", 7)
    assert codec.decode_chunk(codec.encode_chunk(chunk)) == chunk
    newer = pb.ShardSpec(dense=[wire.VectorSpec(distance="Hamming")])
    with pytest.raises(NotSupported, match="Hamming"):
        codec.decode_spec(newer)


# -- errors ---------------------------------------------------------------------------------------
def test_every_error_is_known():
    names = set(codec.ERROR_TYPES)
    assert {"ShoalError", "Busy", "NotPrimary", "Stale", "TimedOut", "Uncertain"} <= names
    assert len(names) >= 20


@pytest.mark.parametrize("name", sorted(codec.ERROR_TYPES))
def test_every_error_comes_back_the_same(name):
    plain, changed = (codec.ERROR_TYPES[name]("Größe: zu viel") for _ in range(2))
    changed.retryable = not plain.retryable
    changed.maybe_applied = not plain.maybe_applied
    changed.message += " Send less."
    if isinstance(changed, Busy):
        changed.retry_after_s = 2.5
    for error in (plain, changed):
        in_exchange = codec.decode_error(answer_of(codec.error_answer(1, error)).error)
        trailer = faults.to_trailer(error)[0][1]
        in_trailer = codec.decode_error(pb.Error.FromString(trailer))
        for again in (in_exchange, in_trailer):
            assert type(again) is type(error)
            for field in ("message", "status_code", "retryable", "maybe_applied"):
                assert getattr(again, field) == getattr(error, field)
            assert getattr(again, "retry_after_s", None) == getattr(error, "retry_after_s", None)


def test_an_error_of_a_newer_version_keeps_its_meaning():
    told = codec.decode_error(pb.Error(type="Quarantined", message="m", status=503, retryable=True))
    assert type(told) is Unavailable
    odd = codec.decode_error(pb.Error(type="Odd", message="m", status=418, maybe_applied=True))
    assert type(odd) is ShoalError
    assert (odd.status_code, odd.retryable, odd.maybe_applied) == (418, False, True)


def test_a_long_error_fits_into_metadata():
    trailer = faults.to_trailer(BadRequest("ü" * 10_000))[0][1]
    assert len(trailer) < 4_096
    assert codec.decode_error(pb.Error.FromString(trailer)).message.endswith("ü…")


def test_lengths_of_all_sizes():
    for size in (0, 1, 127, 128, 16_383, 16_384, 3_000_000):
        data = pb.Answer(id=1, error=pb.Error(message="x" * size)).SerializeToString()
        assert len(answer_of(data).error.message) == size
