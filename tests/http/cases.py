"""Malformed requests, one line each: what is wrong, the request, the status, words of the answer.

Bodies are Python values, or bytes where the text itself is the point. `{plain}` is a collection with
one unnamed vector of 4 dimensions, `{named}` one with the vectors `a` (3), `b` (2), a multivector `m`
(2) and a sparse vector `s`.
"""

# One case a line is a table that can be read down.
# ruff: noqa: E501

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["CASES", "FILTER_CASES", "Case", "nested_filter"]

GOOD = {"id": 9, "vector": [1.0, 0.0, 0.0, 0.0]}
ANY_4XX = (400, 422)


@dataclass(frozen=True)
class Case:
    """status: what it may be answered with. says: words that the error must have."""

    what: str
    method: str
    path: str
    body: Any
    status: tuple[int, ...] = (400,)
    says: str = ""

    def __str__(self) -> str:
        return self.what.replace(" ", "-")


def _upsert(what: str, point: Any, *, status: tuple[int, ...] = (400,), says: str = "") -> Case:
    """A good point comes first: it must not be written either."""
    body = {"points": [GOOD, point]}
    return Case(what, "PUT", "/collections/{plain}/points?wait=true", body, status, says)


def _named(what: str, vector: Any, *, status: tuple[int, ...] = (400,), says: str = "") -> Case:
    body = {"points": [{"id": 9, "vector": {"a": [1.0, 2.0, 3.0]}}, {"id": 10, "vector": vector}]}
    return Case(what, "PUT", "/collections/{named}/points?wait=true", body, status, says)


def _raw(what: str, text: bytes, *, status: tuple[int, ...] = (400,), says: str = "") -> Case:
    return Case(what, "PUT", "/collections/{plain}/points?wait=true", text, status, says)


def _query(what: str, body: Any, *, status: tuple[int, ...] = (400,), says: str = "") -> Case:
    return Case(what, "POST", "/collections/{plain}/points/query", body, status, says)


def _to(what: str, path: str, body: Any, *, method: str = "POST", **more: Any) -> Case:
    return Case(what, method, "/collections/" + path, body, **more)


def _vector(text: bytes) -> bytes:
    return b'{"points": [{"id": 9, "vector": [1, 0, 0, ' + text + b"]}]}"


def nested_filter(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"must": [{"key": "n", "match": {"value": 1}}]}
    for _ in range(depth):
        inner = {"must": [inner]}
    return inner


_DEEP_PAYLOAD: dict[str, Any] = {"n": 1}
for _ in range(100):
    _DEEP_PAYLOAD = {"n": _DEEP_PAYLOAD}

VECTOR_CASES = [
    _upsert("wrong dimension", {"id": 1, "vector": [1.0, 2.0]}, says="expected dim: 4, got 2"),
    _upsert("empty vector", {"id": 1, "vector": []}),
    _upsert("text in a vector", {"id": 1, "vector": [1, 2, 3, "4"]}, status=ANY_4XX),
    _upsert("null in a vector", {"id": 1, "vector": [1, 2, 3, None]}, status=ANY_4XX),
    _upsert("bool in a vector", {"id": 1, "vector": [1, 2, 3, True]}, status=ANY_4XX),
    _upsert("list of lists for a single vector", {"id": 1, "vector": [[1.0, 2, 3, 4]]}),
    _upsert("no vector at all", {"id": 1}, status=ANY_4XX, says="vector"),
    _upsert("vector is a number", {"id": 1, "vector": 7}, status=ANY_4XX),
    _upsert("unknown vector name", {"id": 1, "vector": {"x": [1.0, 2, 3, 4]}}, says="x"),
    _raw("NaN", _vector(b"NaN")),
    _raw("Infinity", _vector(b"Infinity")),
    _raw("minus infinity", _vector(b"-Infinity")),
    _raw("a number beyond float64", _vector(b"1e999")),
    _raw("a number beyond float32", _vector(b"1e39")),
    _named("unnamed vector for named ones", [1.0, 2.0, 3.0]),
    _named("unknown name", {"zzz": [1.0]}, says="Not existing vector name error: zzz"),
    _named("wrong dimension of a named one", {"b": [1.0]}, says="expected dim: 2, got 1"),
    _named("sparse for dense", {"a": {"indices": [1], "values": [1.0]}}),
    _named("dense for sparse", {"s": [1.0, 2.0]}),
    _named("sparse index twice", {"s": {"indices": [1, 1], "values": [1.0, 2.0]}}, status=ANY_4XX),
    _named("sparse lengths", {"s": {"indices": [1, 2], "values": [1.0]}}, status=ANY_4XX),
    _named("sparse negative", {"s": {"indices": [-1], "values": [1.0]}}, status=ANY_4XX),
    _named("sparse too large", {"s": {"indices": [2**32], "values": [1.0]}}, status=ANY_4XX),
    _named("ragged multivector", {"m": [[1.0, 2.0], [1.0]]}),
    _named("empty multivector", {"m": []}),
    _named("empty row in a multivector", {"m": [[]]}),
]

ID_CASES = [
    _upsert(f"id {wrong!r}", {"id": wrong, "vector": GOOD["vector"]}, status=ANY_4XX)
    for wrong in (-1, 1.5, "abc", 2**64, True, None, [1], "123", "", {"num": 1})
] + [
    _to("bad id in retrieve", "{plain}/points", {"ids": ["abc"]}, status=ANY_4XX),
    _to("bad id in delete", "{plain}/points/delete", {"points": [1, -3]}, status=ANY_4XX),
    _to("bad id as scroll offset", "{plain}/points/scroll", {"offset": "abc"}, status=ANY_4XX),
    _to("bad id in the path", "{plain}/points/abc", None, method="GET", status=(400, 404)),
]

BODY_CASES = [
    _raw("empty body", b""),
    _raw("not JSON", b"hello"),
    _raw("cut JSON", b'{"points": [{"id": 1, "vector": [1, 2'),
    _raw("two JSON values", b'{"points": []} {"points": []}'),
    _raw("bytes that are no UTF-8", b'{"points": [{"id": 9, "vector": [1,0,0,0], "payload": {"a": "\xff\xfe"}}]}'),
    _raw("a lone surrogate as an id", b'{"points": [{"id": "\\ud800", "vector": [1,0,0,0]}]}', status=ANY_4XX),
    _raw("nesting without end", b"[" * 100_000),
    _raw("object nesting without end", b'{"a":' * 50_000),
    _raw("payload nested without end", b'{"points":[{"id":9,"vector":[1,0,0,0],"payload":{"a":' + b"[" * 50_000),
    _raw("a list", b"[]", status=ANY_4XX),
    _raw("a number", b"7", status=ANY_4XX),
    _raw("null", b"null", status=ANY_4XX),
    _raw("points is null", b'{"points": null}', status=ANY_4XX),
    _raw("no points", b"{}", status=ANY_4XX),
    _raw("an empty list of points", b'{"points": []}', status=ANY_4XX),
    _raw("a point that is a number", b'{"points": [3]}', status=ANY_4XX),
    _raw("unknown field", b'{"points": [{"id": 9, "vector": [1,0,0,0]}], "colour": 1}', status=ANY_4XX, says="colour"),
    _upsert("unknown field of a point", {**GOOD, "id": 1, "score": 1}, status=ANY_4XX, says="score"),
    _upsert("payload is a list", {**GOOD, "id": 1, "payload": [1]}, status=ANY_4XX),
    _upsert("payload is a text", {**GOOD, "id": 1, "payload": "x"}, status=ANY_4XX),
    _upsert("payload too deep", {**GOOD, "id": 1, "payload": _DEEP_PAYLOAD}),
    _raw("NaN in a payload", b'{"points": [{"id": 9, "vector": [1,0,0,0], "payload": {"a": NaN}}]}'),
    _raw("unknown update mode", b'{"points": [{"id": 9, "vector": [1,0,0,0]}], "update_mode": "perhaps"}', status=ANY_4XX),
    _raw("batch of unequal lengths", b'{"batch": {"ids": [9, 10], "vectors": [[1,0,0,0]]}}'),
    _raw("batch with payloads missing", b'{"batch": {"ids": [9], "vectors": [[1,0,0,0]], "payloads": []}}'),
    _raw("points and batch", b'{"points": [], "batch": {"ids": [], "vectors": []}}', status=ANY_4XX),
    _to("wait is no bool", "{plain}/points?wait=maybe", {"points": [GOOD]}, method="PUT", status=ANY_4XX),
    _to("unknown ordering", "{plain}/points?ordering=odd", {"points": [GOOD]}, method="PUT", status=ANY_4XX),
    _to("timeout is no number", "{plain}/points?timeout=soon", {"points": [GOOD]}, method="PUT", status=ANY_4XX),
    _to("timeout below one", "{plain}/points/scroll?timeout=0", {}, status=ANY_4XX),
    _to("unknown consistency", "{plain}/points/scroll?consistency=odd", {}, status=ANY_4XX),
]  # fmt: skip

QUERY_CASES = [
    _query("limit 0", {"query": [1.0, 0, 0, 0], "limit": 0}, status=(422,), says="limit"),
    _query("limit below 0", {"query": [1.0, 0, 0, 0], "limit": -1}, status=ANY_4XX),
    _query("limit is a text", {"query": [1.0, 0, 0, 0], "limit": "x"}, status=ANY_4XX),
    _query("limit is a fraction", {"query": [1.0, 0, 0, 0], "limit": 1.5}, status=ANY_4XX),
    _query("limit too large", {"query": [1.0, 0, 0, 0], "limit": 10**9}, status=ANY_4XX),
    _query("offset too large", {"query": [1.0, 0, 0, 0], "offset": 10**9}, status=ANY_4XX),
    _query("offset below 0", {"query": [1.0, 0, 0, 0], "offset": -1}, status=ANY_4XX),
    _query("query of a wrong dimension", {"query": [1.0]}, says="expected dim: 4, got 1"),
    _query("empty query", {"query": []}, status=ANY_4XX),
    _query("query in an unknown vector", {"query": [1.0, 0, 0, 0], "using": "x"}, says="x"),
    _query("query by an id that is not there", {"query": 987654}, status=(404,), says="987654"),
    _query("query by a bad id", {"query": "abc"}, status=ANY_4XX),
    _query("unknown kind of query", {"query": {"guess": 1}}, status=ANY_4XX),
    _query("unknown field of a query", {"query": [1.0, 0, 0, 0], "colour": 1}, says="colour"),
    _query("misspelt filter", {"query": [1.0, 0, 0, 0], "filters": {}}, says="filters"),
    _query("threshold is a text", {"query": [1.0, 0, 0, 0], "score_threshold": "x"}, status=ANY_4XX),
    _query("unknown search param", {"query": [1.0, 0, 0, 0], "params": {"speed": 1}}, status=ANY_4XX),
    _query("ef is a text", {"query": [1.0, 0, 0, 0], "params": {"hnsw_ef": "x"}}, status=ANY_4XX),
    _query("with_payload is a number", {"query": [1.0, 0, 0, 0], "with_payload": 7}, status=ANY_4XX),
    Case("NaN in a query", "POST", "/collections/{plain}/points/query", b'{"query": [NaN, 0, 0, 0]}'),
    Case("1e999 in a query", "POST", "/collections/{plain}/points/query", b'{"query": [1e999, 0, 0, 0]}'),
    _to("dense query without a name", "{named}/points/query", {"query": [1.0, 2.0, 3.0]}),
    _to("scroll limit 0", "{plain}/points/scroll", {"limit": 0}, status=(422,), says="limit"),
    _to("scroll with an unknown field", "{plain}/points/scroll", {"page": 1}, says="page"),
    _to("scroll payload path", "{plain}/points/scroll", {"with_payload": ["a..b"]}),
    _to("count with an unknown field", "{plain}/points/count", {"exactly": True}, says="exactly"),
    _to("retrieve without ids", "{plain}/points", {}, status=ANY_4XX, says="ids"),
    _to("point that is not there", "{plain}/points/987654", None, method="GET", status=(404,), says="987654"),
]  # fmt: skip

WRITE_CASES = [
    _to("delete with nothing selected", "{plain}/points/delete", {}, status=ANY_4XX),
    _to("delete an empty list", "{plain}/points/delete", {"points": []}),
    _to("delete with an unknown field", "{plain}/points/delete", {"ids": [1]}, status=ANY_4XX),
    _to("set payload without one", "{plain}/points/payload", {"points": [1]}, status=ANY_4XX),
    _to("set payload without points", "{plain}/points/payload", {"payload": {"a": 1}}, status=ANY_4XX),
    _to("set payload at a bad path", "{plain}/points/payload", {"payload": {}, "points": [1], "key": "a..b"}),
    _to("set payload of no object", "{plain}/points/payload", {"payload": 3, "points": [1]}, status=ANY_4XX),
    _to("delete payload of no keys field", "{plain}/points/payload/delete", {"points": [1]}, status=ANY_4XX),
    _to("delete payload at a bad path", "{plain}/points/payload/delete", {"keys": ["a["], "points": [1]}),
    _to("clear payload of nothing", "{plain}/points/payload/clear", {}, status=ANY_4XX),
    _to("delete an unknown vector", "{named}/points/vectors/delete", {"points": [1], "vector": ["zzz"]}, says="zzz"),
    _to("delete no vectors", "{named}/points/vectors/delete", {"points": [1], "vector": []}, status=ANY_4XX),
    _to("update vectors of none", "{plain}/points/vectors", {"points": []}, method="PUT", status=ANY_4XX),
    _to("update a vector's dimension", "{plain}/points/vectors", {"points": [{"id": 1, "vector": [1.0]}]}, method="PUT"),
    _to("batch with an unknown operation", "{plain}/points/batch", {"operations": [{"explode": {}}]}, status=ANY_4XX),
    _to("batch whose second operation is wrong", "{plain}/points/batch", {"operations": [
        {"delete": {"points": [1]}}, {"upsert": {"points": [{"id": 3, "vector": [1.0]}]}}]}),
    _to("batch of no operations field", "{plain}/points/batch", {}, status=ANY_4XX),
]  # fmt: skip

COLLECTION_CASES = [
    _to("size 0", "new", {"vectors": {"size": 0, "distance": "Dot"}}, method="PUT", status=ANY_4XX),
    _to("size too large", "new", {"vectors": {"size": 10**6, "distance": "Dot"}}, method="PUT", status=ANY_4XX),
    _to("size is a text", "new", {"vectors": {"size": "4", "distance": "Dot"}}, method="PUT", status=ANY_4XX),
    _to("unknown distance", "new", {"vectors": {"size": 4, "distance": "Far"}}, method="PUT", status=ANY_4XX),
    _to("no distance", "new", {"vectors": {"size": 4}}, method="PUT", status=ANY_4XX),
    _to("no shards", "new", {"vectors": {"size": 4, "distance": "Dot"}, "shard_number": 0}, method="PUT", status=ANY_4XX),
    _to("too many shards", "new", {"vectors": {"size": 4, "distance": "Dot"}, "shard_number": 10**6}, method="PUT", status=ANY_4XX),
    _to("name too long", "n" * 256, {"vectors": {"size": 4, "distance": "Dot"}}, method="PUT", status=ANY_4XX),
    _to("name that climbs", "%2e%2e", {"vectors": {"size": 4, "distance": "Dot"}}, method="PUT", status=(400, 404, 422)),
    _to("name with a slash", "a%2Fb", {"vectors": {"size": 4, "distance": "Dot"}}, method="PUT", status=(400, 404, 422)),
    _to("name with a null byte", "a%00b", {"vectors": {"size": 4, "distance": "Dot"}}, method="PUT", status=(400, 404, 422)),
    _to("exists already", "{plain}", {"vectors": {"size": 4, "distance": "Dot"}}, method="PUT", status=(409,), says="already exists"),
    _to("cut JSON for a collection", "new", b'{"vectors": {', method="PUT"),
    _to("get what is not there", "nowhere", None, method="GET", status=(404,), says="Not found: Collection `nowhere` doesn't exist!"),
    _to("upsert into nowhere", "nowhere/points", {"points": [GOOD]}, method="PUT", status=(404,), says="Not found: Collection"),
    _to("scroll nowhere", "nowhere/points/scroll", {}, status=(404,), says="Not found: Collection"),
    _to("query nowhere", "nowhere/points/query", {"query": [1.0]}, status=(404,), says="Not found: Collection"),
    _to("count nowhere", "nowhere/points/count", {}, status=(404,), says="Not found: Collection"),
    _to("index of an unknown type", "{plain}/index", {"field_name": "n", "field_schema": "tree"}, method="PUT", status=ANY_4XX),
    _to("index without a name", "{plain}/index", {"field_schema": "keyword"}, method="PUT", status=ANY_4XX),
    _to("index on a bad path", "{plain}/index", {"field_name": "a..b", "field_schema": "keyword"}, method="PUT"),
    Case("embed without texts", "POST", "/shoal/v1/embed", {"model": "all-minilm-l6-v2"}, ANY_4XX),
    Case("embed with an unknown model", "POST", "/shoal/v1/embed", {"texts": ["a"], "model": "none-such"}, (400,), "all-minilm-l6-v2"),
]  # fmt: skip

CASES = [
    *VECTOR_CASES, *ID_CASES, *BODY_CASES, *QUERY_CASES, *WRITE_CASES, *COLLECTION_CASES,
]  # fmt: skip

_KEY = {"key": "n"}
FILTER_CASES: dict[str, Any] = {
    "unknown operator": {"must": [{**_KEY, "match": {"regex": "x"}}]},
    "unknown condition": {"must": [{**_KEY, "like": "x"}]},
    "unknown clause": {"musty": [{**_KEY, "match": {"value": 1}}]},
    "unknown field beside a good one": {"must": [{**_KEY, "match": {"value": 1}, "boost": 2}]},
    "unknown field of a match": {"must": [{**_KEY, "match": {"value": 1, "fuzzy": True}}]},
    "condition without an operator": {"must": [_KEY]},
    "operator without a key": {"must": [{"match": {"value": 1}}]},
    "match of nothing": {"must": [{**_KEY, "match": {}}]},
    "match of a fraction": {"must": [{**_KEY, "match": {"value": 1.5}}]},
    "match of an object": {"must": [{**_KEY, "match": {"value": {}}}]},
    "any of a text": {"must": [{**_KEY, "match": {"any": "red"}}]},
    "any of objects": {"must": [{**_KEY, "match": {"any": [{}]}}]},
    "range over a word": {"must": [{**_KEY, "range": {"gt": "soon"}}]},
    "unknown bound": {"must": [{**_KEY, "range": {"above": 3}}]},
    "box without a corner": {"must": [{**_KEY, "geo_bounding_box": {"top_left": {"lat": 1, "lon": 1}}}]},
    "circle without a radius": {"must": [{**_KEY, "geo_radius": {"center": {"lat": 1, "lon": 1}}}]},
    "ring of two corners": {"must": [{**_KEY, "geo_polygon": {"exterior": {"points": [
        {"lat": 1, "lon": 1}, {"lat": 2, "lon": 2}]}}}]},
    "min_should of zero": {"min_should": {"conditions": [], "min_count": 0}},
    "min_should without a count": {"min_should": {"conditions": []}},
    "bad path": {"must": [{"key": "a..b", "match": {"value": 1}}]},
    "path that does not end": {"must": [{"key": "a[", "match": {"value": 1}}]},
    "empty key": {"must": [{"key": "", "match": {"value": 1}}]},
    "bad id": {"must": [{"has_id": ["abc"]}]},
    "nested without a key": {"must": [{"nested": {"filter": {}}}]},
    "slice of none": {"must": [{"slice": {"total": 0, "index": 0}}]},
    "slice beyond the end": {"must": [{"slice": {"total": 2, "index": 2}}]},
    "a list": [],
    "a text": "n = 1",
    "clause of texts": {"must": ["n = 1"]},
    "too deep": nested_filter(100),
    "too many conditions": {"should": [{**_KEY, "match": {"value": n}} for n in range(10_000)]},
}  # fmt: skip
