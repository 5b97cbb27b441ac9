"""Messages of the public gRPC API: read as the same requests that HTTP bodies are read into."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
import uuid
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import Message

from coordinator import grpc_parse as parse
from coordinator import requests
from coordinator.json_body import validate
from coordinator.parse import parse_upsert
from shoal.api import migration
from shoal.errors import BadRequest, InvalidField
from shoal.ids import PointIds, parse_id
from shoal.storage_api import Distance, ShardKey
from shoal.v1 import collections_pb2, common_pb2, migrations_pb2, points_pb2
from shoal.vectors import VectorField, VectorFields
from shoal.wire import ops_pb2 as wire

FIELDS = VectorFields(
    {
        "": VectorField(3, Distance.COSINE),
        "t": VectorField(2, Distance.DOT),
        "m": VectorField(2, Distance.DOT, multi=True),
    },
    frozenset({"s"}),
)
FILTER = {"must": [{"key": "a", "match": {"value": 1}}]}
UUID = "0b6a1c58-6d0e-4f8b-9a53-3f1a5a1d9c11"


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def ids(*keys: int) -> wire.PointIds:
    return PointIds.from_keys(list(keys)).to_wire()


def compared(*queries: dict[str, Any]) -> migrations_pb2.CompareModelsRequest.Queries:
    query = migrations_pb2.CompareModelsRequest.Query
    return migrations_pb2.CompareModelsRequest.Queries(queries=[query(**q) for q in queries])


def plain(value: object) -> object:
    if not dataclasses.is_dataclass(value):
        return value
    return {
        f.name: (v.tolist() if isinstance(v := getattr(value, f.name), np.ndarray) else v)
        for f in dataclasses.fields(value)
    }


# -- the same meaning as over HTTP ----------------------------------------------------------------
SEARCHES = [
    (points_pb2.SearchRequest(vector=floats(1, 2, 3)), {"query": [1, 2, 3]}),
    (points_pb2.SearchRequest(), {}),
    (
        points_pb2.SearchRequest(
            vector=floats(0.5, 0, 0),
            using="t",
            limit=7,
            offset=2,
            filter=json.dumps(FILTER).encode(),
            score_threshold=0.0,
            exact=True,
            ef=64,
            with_payload=common_pb2.PayloadSelector(all=True),
            with_vectors=common_pb2.VectorSelector(names=["t", "x"]),
        ),
        {
            "query": [0.5, 0, 0],
            "using": "t",
            "limit": 7,
            "offset": 2,
            "filter": FILTER,
            "score_threshold": 0.0,
            "params": {"exact": True, "hnsw_ef": 64},
            "with_payload": True,
            "with_vector": ["t", "x"],
        },
    ),
    (points_pb2.SearchRequest(point=common_pb2.PointId(number=9)), {"query": 9}),
    (points_pb2.SearchRequest(point=common_pb2.PointId(uuid=UUID.upper())), {"query": UUID}),
    (
        points_pb2.SearchRequest(text=points_pb2.Text(text="a", model="b")),
        {"query": {"text": "a", "model": "b"}},
    ),
    (
        points_pb2.SearchRequest(
            with_payload=common_pb2.PayloadSelector(
                include=common_pb2.PayloadSelector.Paths(paths=["a.b"])
            ),
            with_vectors=common_pb2.VectorSelector(all=True),
        ),
        {"with_payload": ["a.b"], "with_vector": True},
    ),
    (
        points_pb2.SearchRequest(
            with_payload=common_pb2.PayloadSelector(
                exclude=common_pb2.PayloadSelector.Paths(paths=["a"])
            )
        ),
        {"with_payload": {"exclude": ["a"]}},
    ),
]


@pytest.mark.parametrize(("message", "body"), SEARCHES)
def test_a_search_means_what_it_means_over_http(message, body):
    over_grpc = parse.query_of(message)
    over_http = requests.parse_query(json.dumps(body).encode())
    assert plain(over_grpc) == plain(over_http)


@pytest.mark.parametrize(
    ("message", "body"),
    [
        (points_pb2.ScrollRequest(), {}),
        (
            points_pb2.ScrollRequest(
                start=common_pb2.PointId(uuid=UUID), limit=3, filter=json.dumps(FILTER).encode()
            ),
            {"offset": UUID, "limit": 3, "filter": FILTER},
        ),
        (
            points_pb2.ScrollRequest(with_payload=common_pb2.PayloadSelector(all=False)),
            {"with_payload": False},
        ),
    ],
)
def test_a_scroll_means_what_it_means_over_http(message, body):
    assert parse.scroll_of(message) == requests.parse_scroll(json.dumps(body).encode())


def test_points_are_the_points_that_http_sends():
    body = {
        "points": [
            {"id": 1, "vector": {"": [1, 2, 3], "t": [1, 1]}, "payload": {"a": [1]}},
            {"id": UUID, "vector": [4, 5, 6]},
        ],
        "update_filter": FILTER,
        "update_mode": "insert_only",
    }
    over_http = parse_upsert(json.dumps(body).encode(), FIELDS)
    message = points_pb2.UpsertRequest(
        points=over_http.points.to_wire(),
        update_filter=json.dumps(FILTER).encode(),
        update_mode=points_pb2.UPDATE_MODE_INSERT_ONLY,
    )
    over_grpc = parse.upsert(message, FIELDS)
    assert over_grpc.points.to_wire() == over_http.points.to_wire()
    assert (over_grpc.update_filter, over_grpc.mode) == (over_http.update_filter, over_http.mode)
    assert over_grpc.points.dense[""].values.flags.writeable, "it is normalised in place"


def test_texts_make_room_for_their_vectors():
    batch = wire.PointBatch(count=3, ids=ids(1, 2, 3))
    column = points_pb2.TextColumn(name="t", model="m", texts=["a", "", "c"], present=b"\x05")
    write = parse.upsert(points_pb2.UpsertRequest(points=batch, texts=[column]), FIELDS)
    assert [(text.row, text.text, text.model) for text in write.texts] == [
        (0, "a", "m"),
        (2, "c", "m"),
    ]
    assert write.points.dense["t"].values.shape == (3, 2)
    assert write.points.dense["t"].present.tolist() == [True, False, True]


def test_an_update_of_vectors_keeps_payloads():
    batch = wire.PointBatch(count=1, ids=ids(1))
    batch.dense.add(name="t", dim=2, values=floats(1, 2))
    write = parse.update_vectors(points_pb2.UpdateVectorsRequest(points=batch), FIELDS)
    assert write.vectors_only
    assert write.points.payload_offsets is None
    batch.payload_offsets = struct.pack("<2I", 0, 0)
    with pytest.raises(BadRequest, match="no payloads"):
        parse.update_vectors(points_pb2.UpdateVectorsRequest(points=batch), FIELDS)


def test_selections():
    where = points_pb2.PointSelector(ids=ids(3, parse_id(UUID)))
    delete = parse.delete_points(points_pb2.DeletePointsRequest(where=where), FIELDS)
    assert delete.where.ids.keys() == [3, parse_id(UUID)]
    everything = points_pb2.PointSelector(filter=b"{}")
    clear = parse.clear_payload(points_pb2.ClearPayloadRequest(where=everything), FIELDS)
    assert clear.where.filter is not None
    change = points_pb2.SetPayloadRequest(where=where, payload=b'{"a": 1e22}', key="b.c")
    assert parse.set_payload(change, FIELDS).payload == b'{"a": 1e22}'
    change = points_pb2.OverwritePayloadRequest(where=where, payload=b" {} ")
    assert parse.overwrite_payload(change, FIELDS).payload == b""


def test_how_fresh_a_read_must_be():
    assert parse.read_of(common_pb2.ReadOptions()).strong is False
    strong = common_pb2.ReadOptions(consistency=common_pb2.CONSISTENCY_STRONG, token="1.0:7")
    read = parse.read_of(strong)
    assert read.strong
    assert read.token == {ShardKey(1, 0): 7}
    with pytest.raises(BadRequest, match="token"):
        parse.read_of(common_pb2.ReadOptions(token="moon"))


@pytest.mark.parametrize(
    ("read", "message", "model", "body"),
    [
        (
            parse.migration_of,
            migrations_pb2.StartMigrationRequest(model="new", text_field="a.b"),
            migration.MigrateRequest,
            {"model": "new", "text_field": "a.b"},
        ),
        (
            parse.migration_of,
            migrations_pb2.StartMigrationRequest(
                model="new",
                text_field="t",
                fingerprint="f",
                current_model="old",
                points_per_second=0,
            ),
            migration.MigrateRequest,
            {
                "model": "new",
                "text_field": "t",
                "fingerprint": "f",
                "current_model": "old",
                "points_per_second": 0,
            },
        ),
        (
            parse.migration_of,
            migrations_pb2.StartMigrationRequest(
                model="new", text_field="t", points_per_second=math.inf
            ),
            migration.MigrateRequest,
            {"model": "new", "text_field": "t", "points_per_second": None},
        ),
        (
            parse.comparison_of,
            migrations_pb2.CompareModelsRequest(),
            migration.CompareRequest,
            {"limit": 10, "exact": False},
        ),
        (
            parse.comparison_of,
            migrations_pb2.CompareModelsRequest(
                given=compared(
                    {"text": "a"},
                    {
                        "text": "b",
                        "filter": json.dumps(FILTER).encode(),
                        "relevant": ids(7, parse_id(UUID)),
                        "gains": [1, 0.5],
                    },
                ),
                limit=3,
                exact=True,
            ),
            migration.CompareRequest,
            {
                "queries": [
                    {"text": "a", "relevant": {}},
                    {"text": "b", "filter": FILTER, "relevant": {"7": 1, UUID: 0.5}},
                ],
                "limit": 3,
                "exact": True,
            },
        ),
        (
            parse.switch_of,
            migrations_pb2.SwitchModelRequest(allow_missing=True),
            migration.SwitchRequest,
            {"allow_missing": True},
        ),
        (
            parse.drop_of,
            migrations_pb2.DropModelRequest(model="old"),
            migration.DropRequest,
            {"model": "old", "allow_missing": False},
        ),
    ],
)
def test_a_change_of_model_is_what_http_makes(read, message, model, body):
    over_http = validate(model, json.dumps(body).encode())
    over_grpc = read(message)
    assert over_grpc == over_http
    assert over_grpc.model_fields_set == over_http.model_fields_set


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({"model": ""}, "model: string should have at least 1 character"),
        ({"model": "x" * 1_025}, "model: string should have at most 1024"),
        ({"model": "new", "fingerprint": ""}, "fingerprint: string should have at least 1"),
        ({"model": "new"}, "text_field: string should have at least 1"),
        ({"points_per_second": 1e7}, "less than or equal to 1000000"),
        ({"points_per_second": -1}, "greater than or equal to 0"),
        ({"points_per_second": -math.inf}, "greater than or equal to 0"),
        ({"points_per_second": math.nan}, "greater than or equal to 0"),
    ],
)
def test_changes_of_model_that_are_refused(request_, sentence):
    fields = request_ if "model" in request_ else {"model": "new", "text_field": "t"} | request_
    with pytest.raises(InvalidField, match=sentence):
        parse.migration_of(migrations_pb2.StartMigrationRequest(**fields))


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ({"text": ""}, r"queries\.0\.text: string should have at least 1"),
        ({"text": "a", "gains": [1]}, "0 != 1"),
        ({"text": "a", "relevant": ids(1, 1), "gains": [1, 2]}, "judged twice"),
        ({"text": "a", "relevant": ids(1), "gains": [-1]}, r"relevant\.1: input should be greater"),
        ({"text": "a", "relevant": ids(1), "gains": [math.nan]}, "valid number"),
        ({"text": "a", "relevant": wire.PointIds(ints=b"12")}, "no packed ids"),
        ({"text": "a", "filter": b"{"}, "Format error"),
        ({"text": "a", "filter": b'{"mist": []}'}, "mist"),
    ],
)
def test_comparisons_that_are_refused(query, sentence):
    with pytest.raises(BadRequest, match=sentence):
        parse.comparison_of(migrations_pb2.CompareModelsRequest(given=compared(query)))


def test_how_much_is_compared():
    for message, sentence in (
        (migrations_pb2.CompareModelsRequest(given=compared()), "at least 1 item"),
        (migrations_pb2.CompareModelsRequest(given=compared(*[{"text": "a"}] * 1_001)), "1000"),
        (migrations_pb2.CompareModelsRequest(limit=1_001), "limit: input should be less"),
    ):
        with pytest.raises(InvalidField, match=sentence):
            parse.comparison_of(message)


def test_a_collection_is_what_http_makes():
    config = collections_pb2.CollectionConfig(
        sparse_vectors=["s"],
        shard_number=2,
        replication_factor=3,
        hnsw=collections_pb2.HnswConfig(m=0),
        metadata=b'{"a":1}',
    )
    config.vectors.add(name="size", size=4, distance=collections_pb2.DISTANCE_EUCLID)
    request = parse.collection_config(config)
    assert request.vectors["size"].size == 4
    assert (request.shard_number, request.replication_factor) == (2, 3)
    assert request.hnsw_config.m == 0
    assert request.hnsw_config.ef_construct is None
    assert request.metadata == {"a": 1}
    config.vectors[0].name = ""
    assert parse.collection_config(config).vectors.distance is Distance.EUCLID


# -- refused --------------------------------------------------------------------------------------
POINT = points_pb2.SearchRequest(vector=floats(1, 2, 3))
BATCH = wire.PointBatch(
    count=1, ids=ids(1), payload=b"{}", payload_offsets=struct.pack("<2I", 0, 2)
)
TWICE = wire.PointBatch(count=1, ids=ids(1))
TWICE.dense.add(name="t", dim=2, values=floats(1, 2))
TWICE.dense.add(name="t", dim=2, values=floats(3, 4))


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (points_pb2.SearchRequest(vector=b"abc"), "3 bytes"),
        (points_pb2.SearchRequest(vector=b""), "0 bytes"),
        (points_pb2.SearchRequest(point=common_pb2.PointId()), "neither a number nor a UUID"),
        (points_pb2.SearchRequest(point=common_pb2.PointId(uuid="x")), "not a valid point ID"),
        (points_pb2.SearchRequest(limit=10_001), "at most 10000"),
        (points_pb2.SearchRequest(limit=9_999, offset=2), "at most 10000"),
        (points_pb2.SearchRequest(ef=10_001), "ef must be"),
        (points_pb2.SearchRequest(score_threshold=1.0), "A query is needed"),
        (points_pb2.SearchRequest(vector=floats(1), score_threshold=float("nan")), "not a number"),
        (points_pb2.SearchRequest(filter=b"{"), "Format error"),
        (points_pb2.SearchRequest(filter=b"[]"), "filter"),
        (points_pb2.SearchRequest(filter=b'{"mist": []}'), "mist"),
        (points_pb2.SearchRequest(filter=b"[" * 100_000), "Format error"),
        (points_pb2.SearchRequest(filter=b'"\xff"'), "Format error"),
        (
            points_pb2.SearchRequest(with_vectors=common_pb2.VectorSelector(all=True, names=["a"])),
            "leave one out",
        ),
    ],
)
def test_searches_that_are_refused(message, sentence):
    with pytest.raises(BadRequest, match=sentence):
        parse.query_of(message)


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (points_pb2.UpsertRequest(), "1 to 65536"),
        (points_pb2.UpsertRequest(points=wire.PointBatch(count=2, ids=ids(1))), "has 1 ids"),
        (points_pb2.UpsertRequest(points=TWICE), "two columns"),
        (points_pb2.UpsertRequest(points=BATCH, update_mode=7), "update_mode has the value 7"),
        (
            points_pb2.UpsertRequest(
                points=BATCH, texts=[points_pb2.TextColumn(name="t", texts=["a", "b"])]
            ),
            r"1 != 2",
        ),
        (
            points_pb2.UpsertRequest(
                points=BATCH, texts=[points_pb2.TextColumn(name="m", texts=["a"])]
            ),
            "multivector",
        ),
        (
            points_pb2.UpsertRequest(
                points=BATCH, texts=[points_pb2.TextColumn(name="zz", texts=["a"])]
            ),
            "Not existing vector name",
        ),
        (
            points_pb2.UpsertRequest(
                points=BATCH,
                texts=[points_pb2.TextColumn(name="t", texts=["a"])] * 2,
            ),
            "both as numbers and as texts",
        ),
    ],
)
def test_points_that_are_refused(message, sentence):
    with pytest.raises(BadRequest, match=sentence):
        parse.upsert(message, FIELDS)


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        (points_pb2.PointSelector(), "give one of the two"),
        (points_pb2.PointSelector(ids=wire.PointIds()), "there are no ids"),
        (points_pb2.PointSelector(filter=b""), "send {}"),
        (points_pb2.PointSelector(ids=wire.PointIds(ints=b"123")), "no packed ids"),
        (points_pb2.PointSelector(ids=wire.PointIds(uuids=bytes(16), kinds=b"\1\1")), "no packed"),
        (points_pb2.PointSelector(ids=wire.PointIds(ints=bytes(8 * 65_537))), "the most is"),
    ],
)
def test_selections_that_are_refused(where, sentence):
    with pytest.raises(BadRequest, match=sentence):
        parse.delete_points(points_pb2.DeletePointsRequest(where=where), FIELDS)


@pytest.mark.parametrize("payload", [b"", b"1", b"{", b"[]", b'{"a": NaN}'])
def test_payloads_that_are_refused(payload):
    where = points_pb2.PointSelector(ids=ids(1))
    with pytest.raises(BadRequest):
        parse.set_payload(points_pb2.SetPayloadRequest(where=where, payload=payload), FIELDS)


def test_collections_that_are_refused():
    def refused(*vectors: collections_pb2.VectorConfig, **more: object) -> str:
        config = collections_pb2.CollectionConfig(vectors=vectors, **more)  # type: ignore[arg-type]
        with pytest.raises((BadRequest, InvalidField)) as caught:
            parse.collection_config(config)
        return caught.value.message

    dot = collections_pb2.DISTANCE_DOT
    vector = collections_pb2.VectorConfig
    assert "distance must be" in refused(vector(size=4))
    assert "size" in refused(vector(distance=dot))
    assert "same name" in refused(vector(size=4, distance=dot), vector(size=5, distance=dot))
    assert "datatype has the value 9" in refused(vector(size=4, distance=dot, datatype=9))
    assert "shard_number" in refused(vector(size=4, distance=dot), shard_number=65)
    assert "JSON" in refused(vector(size=4, distance=dot), metadata=b"{")
    assert "bytes" in refused(
        vector(size=4, distance=dot), metadata=b'{"a":"%b"}' % (b"x" * 600_000)
    )


# -- what is not known ----------------------------------------------------------------------------
def tagged(number: int, payload: bytes) -> bytes:
    """A length-delimited field."""
    key = number << 3 | 2
    head = b""
    while key > 127:
        head += bytes([key & 127 | 128])
        key >>= 7
    assert len(payload) < 128
    return head + bytes([key, len(payload)]) + payload


UNKNOWN = tagged(900, b"?")


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (points_pb2.SearchRequest, UNKNOWN),
        (points_pb2.SearchRequest, POINT.SerializeToString() + UNKNOWN),
        (points_pb2.SearchRequest, tagged(12, UNKNOWN)),
        (points_pb2.SearchRequest, tagged(12, tagged(2, UNKNOWN))),
        (points_pb2.SearchRequest, tagged(14, UNKNOWN)),
        (points_pb2.SearchBatchRequest, tagged(1, UNKNOWN)),
        (points_pb2.UpsertRequest, tagged(2, tagged(3, UNKNOWN))),
        (points_pb2.UpsertRequest, tagged(2, tagged(2, UNKNOWN))),
        (points_pb2.DeletePointsRequest, tagged(2, UNKNOWN)),
        (collections_pb2.CreateCollectionRequest, tagged(2, tagged(1, tagged(6, UNKNOWN)))),
    ],
)
def test_a_field_that_is_not_known_is_refused_wherever_it_is(kind: type[Message], body: bytes):
    with pytest.raises(BadRequest, match="unknown field 900"):
        parse.decode(kind, body)


def test_what_is_known_is_not_refused():
    for message, _ in SEARCHES:
        assert parse.decode(points_pb2.SearchRequest, message.SerializeToString()) == message


def test_what_is_no_message():
    with pytest.raises(BadRequest, match="is no SearchRequest"):
        parse.decode(points_pb2.SearchRequest, b"\x0a\xff")


def test_a_uuid_is_the_same_id_in_every_spelling():
    for text in (UUID, UUID.upper(), uuid.UUID(UUID).hex, f"urn:uuid:{UUID}"):
        query = parse.query_of(points_pb2.SearchRequest(point=common_pb2.PointId(uuid=text)))
        assert query.point == parse_id(UUID)
