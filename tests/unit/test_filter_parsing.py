"""The filter language as text: what is accepted survives a round trip, and what is refused gets a
sentence that names the place."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import BaseModel
from qdrant_client.local.datetime_utils import parse as client_parse

from shoal import limits
from shoal.api.filter import (
    FieldCondition,
    Filter,
    FilterField,
    HasIdCondition,
    MatchValue,
    condition_key,
    parse_filter,
)
from shoal.datetimes import microseconds, parse_datetime
from shoal.errors import BadRequest
from shoal.ids import parse_id

UUID = "550e8400-e29b-41d4-a716-446655440000"
RING = {
    "points": [{"lon": x, "lat": y} for x, y in ((0, 0), (1, 0), (1, 1), (0, 0))],
}
ORIGIN = {"lon": 0, "lat": 0}

GOOD: list[Any] = [
    {},
    {"must": None, "should": [], "min_should": None},
    {"must": {"key": "a", "match": {"value": True}}},
    {"must": [{"key": "a", "match": {"value": -(2**63)}}, {"key": "a", "match": {"value": ""}}]},
    {
        "must": [
            {"key": "a", "match": {"any": []}},
            {"key": "a", "match": {"except": [1, 2**64 - 1]}},
        ]
    },
    {"must": [{"key": "a", "match": {op: "x"}} for op in ("text", "text_any", "phrase", "prefix")]},
    {"must": {"key": 'a.b[].c[0]."x.y"', "range": {"gt": 1, "lte": 2.5, "lt": None}}},
    {"must": {"key": "a", "range": {"gt": "2024-01-01", "lt": "2024-01-01T00:00:00.5+02:00"}}},
    {"must": {"key": "a", "range": {}}},
    {"should": [{"has_id": [1, UUID]}, {"has_vector": ""}, {"slice": {"total": 3, "index": 2}}]},
    {"must_not": [{"is_empty": {"key": "a"}}, {"is_null": {"key": "a"}}]},
    {"must": [{"key": "a", "is_empty": False}, {"key": "a", "is_null": True}]},
    {"must": {"nested": {"key": "a[]", "filter": {"should": {"key": "b", "is_null": True}}}}},
    {"min_should": {"conditions": [{"must": {"key": "z", "is_null": False}}, {}], "min_count": 1}},
    {"must": {"key": "g", "geo_polygon": {"exterior": RING, "interiors": [RING]}}},
    {"must": {"key": "g", "geo_radius": {"center": ORIGIN, "radius": 5}}},
    {"must": {"key": "g", "geo_bounding_box": {"top_left": ORIGIN, "bottom_right": ORIGIN}}},
    {"must": {"key": "g", "values_count": {"gt": 1, "lte": 3}}},
]


@pytest.mark.parametrize("raw", GOOD, ids=json.dumps)
def test_round_trip(raw: Any) -> None:
    parsed = parse_filter(raw)
    dumped = parsed.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert parse_filter(json.loads(json.dumps(dumped))) == parsed
    assert parse_filter(parsed) is parsed
    hash(parsed)


def field(**operator: Any) -> dict[str, Any]:
    return {"must": [{"key": "a", **operator}]}


BAD: list[tuple[Any, str]] = [
    (None, "filter must be an object with must, should, must_not, min_should, not null"),
    ([], "not a list"),
    ({"foo": 1}, "unknown key 'foo' in filter; known keys: must, should, must_not, min_should"),
    ({"must": [{"foo": 1}]}, "filter.must[0]: not a known condition"),
    ({"must": [3]}, "filter.must[0]: not a known condition"),
    ({"must": [{"has_id": [1], "must": []}]}, "unknown key 'must' in filter.must[0]"),
    (field(), "filter.must[0]: the condition on key 'a' needs exactly one of: match, range"),
    (
        field(match={"value": 1}, range={"gt": 1}),
        "put several as conditions of their own into must",
    ),
    (
        field(matches={"value": 1}),
        "unknown key 'matches' in filter.must[0]; known keys: key, match",
    ),
    (field(match={"value": 1.5}), "filter.must[0].match.value: match value must be a string"),
    (field(match={"value": {}}), "filter.must[0].match.value: match value must be a string"),
    (field(match={"value": 2**64}), "filter.must[0].match.value must be less than or equal to"),
    (field(match={"regex": "x"}), "filter.must[0].match: match takes exactly one of: value, any"),
    (field(match={"value": 1, "any": [1]}), "filter.must[0].match: match takes exactly one of"),
    (field(match={}), "filter.must[0].match: match takes exactly one of"),
    (field(match={"any": [1, "a"]}), "filter.must[0].match.any[1] must be a valid integer"),
    (field(match={"any": ["a", 1]}), "filter.must[0].match.any[1] must be a valid string"),
    (field(match={"any": [True]}), "filter.must[0].match.any[0] must be a valid integer"),
    (field(match={"any": 1}), "filter.must[0].match.any: must be a list of strings or"),
    (field(match={"text": 5}), "filter.must[0].match.text must be a valid string"),
    (field(range=5), "filter.must[0].range: range must be an object with bounds"),
    (field(range={"gtt": 1}), "unknown key 'gtt' in filter.must[0].range; known keys: lt, lte"),
    (field(range={"gt": True}), "filter.must[0].range.gt must be a finite number"),
    (field(range={"gt": float("inf")}), "filter.must[0].range.gt must be a finite number"),
    (field(range={"gt": float("nan")}), "filter.must[0].range.gt must be a finite number"),
    (field(range={"gt": "yesterday"}), "filter.must[0].range.gt: 'yesterday' is not a datetime"),
    (field(range={"gt": "{x}"}), "'{x}' is not a datetime"),
    (
        field(range={"gt": 1, "lt": "2024-01-01"}),
        "filter.must[0].range.gt must be a valid datetime",
    ),
    (field(values_count={"gt": 1.5}), "filter.must[0].values_count.gt must be a valid integer"),
    (field(is_null=1), "filter.must[0].is_null must be a valid boolean"),
    ({"must": {"key": "a[", "is_null": True}}, "filter.must[0].key: invalid JSON path 'a['"),
    ({"must": {"key": "", "is_null": True}}, "filter.must[0].key: invalid JSON path ''"),
    ({"must": {"key": 5, "is_null": True}}, "filter.must[0].key must be a valid string"),
    ({"must": {"is_null": {"key": "a", "b": 1}}}, "unknown key 'b' in filter.must[0].is_null"),
    ({"must": {"has_id": [-1]}}, "filter.must[0].has_id: -1 is not a valid point ID"),
    ({"must": {"has_id": 5}}, "filter.must[0].has_id must be a valid list"),
    ({"must": {"has_vector": None}}, "filter.must[0].has_vector must be a valid string"),
    ({"must": {"slice": {"total": 0, "index": 0}}}, "filter.must[0].slice.total must be greater"),
    ({"must": {"slice": {"total": 2, "index": 2}}}, "filter.must[0].slice: index must be in 0..1"),
    (
        {"min_should": {"conditions": [], "min_count": 0}},
        "filter.min_should.min_count must be greater",
    ),
    ({"min_should": {"conditions": []}}, "filter.min_should.min_count is required"),
    (
        {"must": {"nested": {"key": "a", "filter": {"must": [{"key": "b", "mach": {}}]}}}},
        "unknown key 'mach' in filter.must[0].nested.filter.must[0]",
    ),
    ({"must": {"nested": {"key": "a"}}}, "filter.must[0].nested.filter is required"),
    (field(geo_radius={"center": {"lon": 200, "lat": 0}, "radius": 1}), "center.lon must be less"),
    (field(geo_radius={"center": {"lon": 1, "lat": 0, "z": 1}, "radius": 1}), "unknown key 'z' in"),
    (field(geo_polygon={"exterior": {"points": []}}), "exterior: a ring needs at least 4 points"),
    (field(geo_polygon={"exterior": {"points": [{"lon": 1}]}}), "points[0].lat is required"),
]


@pytest.mark.parametrize(("raw", "sentence"), BAD, ids=[sentence[:60] for _, sentence in BAD])
def test_refused(raw: Any, sentence: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_filter(raw)
    assert caught.value.status_code == 400
    assert caught.value.message.startswith("Wrong input: ")
    assert sentence in caught.value.message


def test_the_place_of_the_filter_is_named() -> None:
    with pytest.raises(BadRequest, match=r"Wrong input: prefetch\[0\]\.filter\.must\[0\]\.match: "):
        parse_filter(field(match={}), "prefetch[0].filter")


def nest(levels: int, wrap: Any) -> Any:
    raw: Any = {}
    for _ in range(levels - 1):
        raw = wrap(raw)
    return raw


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: {"must": [inner]},
        lambda inner: {"should": inner},
        lambda inner: {"min_should": {"conditions": [inner], "min_count": 1}},
    ],
    ids=["must", "should", "min_should"],
)
def test_depth_is_bounded(wrap: Any) -> None:
    parse_filter(nest(limits.FILTER_DEPTH_MAX, wrap))
    for levels in (limits.FILTER_DEPTH_MAX + 1, 100_000):
        with pytest.raises(BadRequest, match="nested deeper than"):
            parse_filter(nest(levels, wrap))


def test_nested_conditions_count_as_depth() -> None:
    with pytest.raises(BadRequest, match="nested deeper than"):
        parse_filter(nest(5000, lambda raw: {"must": {"nested": {"key": "a", "filter": raw}}}))


def test_sizes_are_bounded() -> None:
    condition = {"key": "a", "is_null": True}
    parse_filter({"must": [condition] * limits.FILTER_CONDITIONS_MAX})
    with pytest.raises(BadRequest, match="conditions; use match any"):
        parse_filter({"must": [condition] * (limits.FILTER_CONDITIONS_MAX + 1)})
    with pytest.raises(BadRequest, match="ids in one has_id"):
        parse_filter({"must": {"has_id": list(range(limits.IDS_MAX + 1))}})
    with pytest.raises(BadRequest, match="at most"):
        parse_filter(field(match={"any": list(range(limits.MATCH_VALUES_MAX + 1))}))
    points = [ORIGIN] * (limits.POLYGON_POINTS_MAX + 1)
    with pytest.raises(BadRequest, match="a polygon has at most"):
        parse_filter(field(geo_polygon={"exterior": {"points": points}}))
    long_path = ".".join("a" * (limits.JSON_PATH_PARTS_MAX + 1))
    with pytest.raises(BadRequest, match="parts"):
        parse_filter({"must": {"key": long_path, "is_null": True}})


def test_values_are_normalised() -> None:
    spellings = [UUID, UUID.upper(), UUID.replace("-", ""), f"urn:uuid:{UUID}", f"{{{UUID}}}"]
    for spelling in spellings:
        parsed = parse_filter({"must": {"has_id": [spelling, 7]}})
        assert parsed.must == (HasIdCondition(has_id=[UUID, 7]),)
        assert isinstance(parsed.must[0], HasIdCondition)
        assert parsed.must[0].has_id == (parse_id(UUID), 7)
    bound = parse_filter(field(range={"gt": "2024-01-01 12:00"})).must
    assert bound is not None
    assert isinstance(bound[0], FieldCondition)
    assert bound[0].range is not None
    assert bound[0].range.gt == datetime(2024, 1, 1, 12, tzinfo=UTC)


def test_models_can_be_built_in_python() -> None:
    built = Filter(must=[FieldCondition(key="a", match=MatchValue(value=1))])
    assert built == parse_filter(field(match={"value": 1}))


def test_condition_keys_tell_types_apart() -> None:
    parsed = [parse_filter(field(match={"value": value})).must for value in (True, 1, "1")]
    assert len({condition_key(must[0]) for must in parsed if must}) == 3


class Request(BaseModel):
    filter: FilterField | None = None


def test_inside_a_request_model() -> None:
    assert Request.model_validate({"filter": {}}).filter == Filter()
    with pytest.raises(BadRequest, match="unknown key 'foo' in filter"):
        Request.model_validate({"filter": {"foo": 1}})
    schema = Request.model_json_schema()
    assert {"Filter", "FieldCondition", "NestedCondition", "GeoPolygon"} <= schema["$defs"].keys()


@pytest.mark.parametrize("seed", range(3))
def test_datetimes_equal_the_client(seed: int) -> None:
    print(f"seed {seed}")
    dice = random.Random(seed)
    forms = [
        "2024-02-29T12:30:00Z",
        "2024-02-29 12:30:00.123456+01:00",
        "2024-02-29T12:30:00-01",
        "2024-02-29T12:30:00.5 +0130",
        "2024-02-29 12:30:00 UTC",
        "2024-02-29T12:30",
        " 2024-02-29",
        "2024-02-29 12:30:00.123456789-10:30:15",
        "2024-2-9t1:3:5z",
    ]
    for _ in range(1500):
        text = list(dice.choice(forms))
        for _ in range(dice.randrange(4)):
            at = dice.randrange(len(text) + 1)
            text[at : at + dice.randrange(2)] = dice.choice(["", *"0123456789-:+.TZtzU C9"])
        ours, theirs = parse_datetime("".join(text)), client_parse("".join(text))
        assert ours == theirs, "".join(text)


def test_microseconds_reach_over_all_years() -> None:
    for text in ("0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59.999999-23:59"):
        moment = parse_datetime(text)
        assert moment is not None
        assert -(2**62) < microseconds(moment) < 2**62
    assert parse_datetime("2024-01-01" + " " * 200) is None
