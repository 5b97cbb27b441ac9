"""Filters: columns of sealed and growing segments, single points, our row oracle and the client
library's in-process mode must all say the same of random payloads and filters."""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
import oracle_filter
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from qdrant_client import models
from qdrant_client.local.payload_filters import check_filter
from qdrant_client.local.siphash import point_id_slice

from shoal import limits, payload
from shoal.api.filter import FieldCondition, Filter, parse_filter
from shoal.ids import format_id, parse_id
from storage_node import bits as bitmaps
from storage_node.bitmap_cache import BitmapCache
from storage_node.columns import Columns, GrowingColumns, SealedColumns, build_columns
from storage_node.filtering import allowed, matches
from storage_node.raw_hint import hint_of
from storage_node.row_filter import value_test
from storage_node.siphash import hash_keys

TEXTS = [
    "red",
    "Red",
    "red fox",
    "The quick red fox, again the fox",
    "",
    "été Straße ÉTÉ",
    "İstanbul_x",
    "2024-02-29",
    "2024-02-29T12:00:00+02:00",
    "2024-02-29T10:00:00.000001Z",
    "2024-03-01 00:00:00",
    "1999-12-31T23:59:59-11:00",
    "long red " * 40,
    "Long KELVIN K\u212aIN\n/" * 40,
    "long blue " * 40,
]
NUMBERS = [0, 1, 2, -1, 7, 2**53, 2**53 + 1, -(2**63), 2**63 - 1, 2**63, 2**64 - 1, 2**70]
FLOATS = [0.0, -0.0, 1.0, 1.5, 2.0, -1.0, 7.25, 9007199254740992.0, 1e22, 1e300]
PLACES = [
    {"lon": 0.0, "lat": 0.0},
    {"lon": 5, "lat": 5},
    {"lon": 10.0, "lat": 10.0},
    {"lon": 13.4, "lat": 52.5},
    {"lon": 179.5, "lat": -10.0},
    {"lon": -179.5, "lat": -10.0},
    {"lon": 2.5, "lat": 7.5, "name": "x"},
    {"lon": True, "lat": 1.0},
    {"lon": "1", "lat": 1.0},
    {"lon": 1.0},
]
PATHS = ["a", "b", "a.b", "a.c.b", "c", '"x.y"', '"x.y".b', "a[]", "a[].b", "a[0]", "c[1].a", "é"]
PLAIN = ["a", "b", "c", "a.b", "é"]
VECTORS = ["", "image"]


# -- random payloads and filters ------------------------------------------------------------------
def random_scalar(dice: random.Random) -> Any:
    pool = dice.choice([TEXTS, TEXTS, NUMBERS, NUMBERS, FLOATS, [True, False], [None], PLACES])
    return dice.choice(pool)


def random_value(dice: random.Random, depth: int) -> Any:
    kind = dice.randrange(10)
    if kind < 6 or depth == 0:
        return random_scalar(dice)
    if kind < 8:
        return [random_value(dice, depth - 1) for _ in range(dice.randrange(4))]
    return random_payload(dice, depth - 1)


def random_payload(dice: random.Random, depth: int = 3) -> dict[str, Any]:
    keys = dice.sample(["a", "b", "c", "x.y", "é", "d"], dice.randrange(5))
    return {key: random_value(dice, depth) for key in keys}


def random_bounds(dice: random.Random, pool: list[Any]) -> dict[str, Any]:
    names = dice.sample(["lt", "lte", "gt", "gte"], dice.randrange(1, 3))
    return {name: dice.choice(pool) for name in names}


def ring(dice: random.Random, low: float, high: float) -> dict[str, Any]:
    corners = [(low, low), (high, low), (high, high), (low, high)]
    if dice.random() < 0.3:
        corners[2] = ((low + high) / 2, (low + high) / 2)
    points = [{"lon": lon, "lat": lat} for lon, lat in corners]
    return {"points": [*points, points[0]]}


def random_operator(dice: random.Random) -> dict[str, Any]:
    small_ints = [n for n in NUMBERS if n < 2**64]
    word = dice.choice(
        ["red", "fox", "the fox", "red fox", "FOX red", "été", "i̇stanbul", "", "lo", "kkin"]
    )
    place = dice.choice(PLACES[:6])
    match dice.randrange(16):
        case 0:
            return {"match": {"value": dice.choice([*TEXTS, *small_ints, True, False])}}
        case 1:
            return {"match": {"any": dice.sample(dice.choice([TEXTS, small_ints]), 3)}}
        case 2:
            return {"match": {"except": dice.sample(dice.choice([TEXTS, small_ints]), 3)}}
        case 3:
            return {"match": dice.choice([{"except": []}, {"any": []}])}
        case 4:
            return {"match": {"text": word}}
        case 5:
            return {"match": {"text_any": word}}
        case 6:
            return {"match": {"phrase": word}}
        case 7:
            return {
                "match": {"prefix": dice.choice(["", "r", "red ", "long", "é", "2024", "Long K"])}
            }
        case 8:
            return {
                "match": {
                    "substring": dice.choice(["", "ed", "fox", "É", "blue", "n/L", "/", "\n"])
                }
            }
        case 9:
            return {"range": random_bounds(dice, [n for n in NUMBERS if n < 2**64] + FLOATS)}
        case 10:
            return {"range": random_bounds(dice, TEXTS[7:12])}
        case 11:
            west, east = dice.choice([(-1, 6), (179, -179), (0, 10), (-180, 180)])
            north, south = dice.choice([(6, -1), (90, -90), (10, 0)])
            corners = ({"lon": west, "lat": north}, {"lon": east, "lat": south})
            return {
                "geo_bounding_box": dict(zip(("top_left", "bottom_right"), corners, strict=True))
            }
        case 12:
            radius = dice.choice([0.0, 1.0, 100_000.0, 786_000.0, 1.0e6, 2.1e7])
            return {
                "geo_radius": {"center": {**place, "lat": float(place["lat"])}, "radius": radius}
            }
        case 13:
            polygon: dict[str, Any] = {"exterior": ring(dice, 0, 10)}
            if dice.random() < 0.5:
                polygon["interiors"] = [ring(dice, 4, 6), ring(dice, 2, 3)][: dice.randrange(3)]
            return {"geo_polygon": polygon}
        case 14:
            return {"values_count": random_bounds(dice, [0, 1, 2, 3, -1])}
        case _:
            return {dice.choice(["is_empty", "is_null"]): dice.random() < 0.5}


def random_condition(dice: random.Random, depth: int, ids: Sequence[Any]) -> dict[str, Any]:
    kind = dice.randrange(14 if depth else 11)
    if kind < 8:
        return {
            "key": dice.choice(PLAIN if dice.random() < 0.6 else PATHS),
            **random_operator(dice),
        }
    if kind == 8:
        return {dice.choice(["is_empty", "is_null"]): {"key": dice.choice(PATHS)}}
    if kind == 9:
        return {"has_id": dice.sample(list(ids), min(len(ids), 5))}
    if kind == 10:
        return {"has_vector": dice.choice([*VECTORS, "missing"])}
    if kind < 13:
        return random_filter(dice, depth - 1, ids)
    key = dice.choice(["a", "a[]", "c", "d", "a[].b", '"x.y"'])
    return {"nested": {"key": key, "filter": random_filter(dice, depth - 1, ids)}}


def random_filter(dice: random.Random, depth: int, ids: Sequence[Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for clause in dice.sample(["must", "should", "must_not", "min_should"], dice.randrange(1, 3)):
        conditions = [random_condition(dice, depth, ids) for _ in range(dice.randrange(3))]
        if clause == "min_should":
            out[clause] = {"conditions": conditions, "min_count": dice.randrange(1, 3)}
        elif len(conditions) == 1 and dice.random() < 0.5:
            out[clause] = conditions[0]
        else:
            out[clause] = conditions
    return out


# -- a segment for tests --------------------------------------------------------------------------
class FakeSegment:
    """Rows in memory: the contract of storage_node.filtering.Rows and no more."""

    def __init__(
        self, payloads: list[bytes], ids: list[Any], vectors: list[set[str]], columns: Columns
    ) -> None:
        self.payloads, self.ids, self.vectors = payloads, ids, vectors
        self.keys = [parse_id(point_id) for point_id in ids]
        self.columns = columns
        self.row_count = len(payloads)
        self.reads = 0

    def payload_bytes(self, row: int) -> bytes:
        assert row < self.row_count
        self.reads += 1
        return self.payloads[row]

    def rows_with_keys(self, keys: Sequence[int]) -> NDArray[np.uint32]:
        wanted = set(keys)
        return np.array([r for r, key in enumerate(self.keys) if key in wanted], np.uint32)

    def keys_of(self, rows: NDArray[np.integer]) -> list[int]:
        return [self.keys[row] for row in rows]

    def present_bits(self, name: str) -> NDArray[np.uint8] | None:
        if name not in VECTORS:
            raise KeyError(name)
        mask = np.array([name in has for has in self.vectors[: self.row_count]], np.bool_)
        return None if mask.all() else np.packbits(mask, bitorder="little")


def sealed(payloads: list[bytes], cache: BitmapCache | None = None) -> SealedColumns:
    """Through read-only copies and JSON, as from files."""
    arrays, meta = build_columns(iter(payloads), len(payloads))
    again, meta_again = build_columns(iter(payloads), len(payloads))
    assert meta == meta_again
    assert {k: v.tobytes() for k, v in arrays.items()} == {k: v.tobytes() for k, v in again.items()}
    for array in arrays.values():
        array.flags.writeable = False
    return SealedColumns(arrays, json.loads(json.dumps(meta)), cache)


def random_ids(dice: random.Random, count: int) -> list[Any]:
    numbers = dice.sample(range(2**64 - 1000, 2**64), count)
    return [str(uuid.UUID(int=dice.getrandbits(128))) if n % 3 == 0 else n for n in numbers]


def random_rows(dice: random.Random, count: int) -> tuple[list[Any], list[bytes], FakeSegment]:
    objects = [random_payload(dice) for _ in range(count)]
    # Half as Shoal writes JSON, half as others may: everything beyond ASCII escaped.
    raw = [
        payload.encode(value) if dice.random() < 0.5 else json.dumps(value).encode()
        for value in objects
    ]
    ids = random_ids(dice, count)
    vectors = [{name for name in VECTORS if dice.random() < 0.7} for _ in range(count)]
    return objects, raw, FakeSegment(raw, ids, vectors, sealed(raw, BitmapCache(1 << 20)))


def rows_of(parsed: Filter, segment: FakeSegment) -> list[int]:
    bits = allowed(parsed, segment)
    assert bits.dtype == np.uint8
    assert bits.shape == ((segment.row_count + 7) // 8,)
    rows = np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist()
    assert all(row < segment.row_count for row in rows), "bits past the last row"
    return rows


def client_says(raw: dict[str, Any], value: Any, point_id: Any, vectors: set[str]) -> bool:
    parsed = models.Filter.model_validate(raw)
    return check_filter(parsed, value, point_id, dict.fromkeys(vectors, True))


def beyond_floats(raw: Any) -> bool:
    """Whether the client would round a bound: its ranges are floats, ours are exact."""
    return any(str(n) in json.dumps(raw) for n in (2**53 + 1, 2**63 - 1, 2**64 - 1))


# -- everything agrees ----------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(12))
def test_all_evaluators_agree(seed: int) -> None:
    print(f"seed {seed}")
    dice = random.Random(seed)
    objects, raw_rows, segment = random_rows(dice, dice.choice([1, 8, 41, 120]))
    growing = FakeSegment(raw_rows, segment.ids, segment.vectors, GrowingColumns())
    count = len(raw_rows)
    compared = 0
    for turn in range(160):
        raw = random_filter(dice, 2, segment.ids)
        parsed = parse_filter(raw)
        assert (
            parse_filter(parsed.model_dump(mode="json", by_alias=True, exclude_none=True)) == parsed
        )
        wanted = [
            row
            for row in range(count)
            if oracle_filter.holds(raw, objects[row], segment.ids[row], segment.vectors[row])
        ]
        assert rows_of(parsed, segment) == wanted, raw
        assert rows_of(parsed, segment) == wanted, ("cached", raw)
        # A reader may be behind the columns: another one has brought them further.
        newest = min(count, 1 + turn * count // 60)
        growing.row_count = newest if turn % 3 else dice.randrange(newest + 1)
        assert rows_of(parsed, growing) == [r for r in wanted if r < growing.row_count], raw
        for row in dice.sample(range(count), min(count, 12)):
            has = segment.vectors[row]
            one = matches(parsed, raw_rows[row], segment.keys[row], has.__contains__)
            assert one == (row in wanted), (raw, objects[row])
            if not beyond_floats(raw):
                theirs = client_says(raw, objects[row], segment.ids[row], has)
                assert theirs == one, (raw, objects[row])
                compared += 1
    assert compared > 100


@pytest.mark.parametrize("seed", range(6))
def test_every_operator_alone(seed: int) -> None:
    """One condition on one plain path, over rows that hold unusual values there."""
    print(f"seed {seed}")
    dice = random.Random(1000 + seed)
    values = [
        *TEXTS,
        *NUMBERS,
        *FLOATS,
        *PLACES,
        True,
        False,
        None,
        [],
        {},
        [None],
        [[]],
        [[1], "red"],
    ]
    objects: list[Any] = [{"a": value} for value in values] + [{}, {"b": 1}]
    objects += [{"a": [random_scalar(dice) for _ in range(dice.randrange(5))]} for _ in range(60)]
    raw_rows = [json.dumps(value, ensure_ascii=dice.random() < 0.5).encode() for value in objects]
    ids = list(range(len(objects)))
    nothing: list[set[str]] = [set() for _ in ids]
    segment = FakeSegment(raw_rows, ids, nothing, sealed(raw_rows))
    growing = FakeSegment(raw_rows, ids, nothing, GrowingColumns())
    for _ in range(150):
        raw = {"must": [{"key": "a", **random_operator(dice)}]}
        parsed = parse_filter(raw)
        wanted = [row for row in ids if oracle_filter.holds(raw, objects[row], row, set())]
        assert rows_of(parsed, segment) == wanted, raw
        assert rows_of(parsed, growing) == wanted, raw
        if not beyond_floats(raw):
            assert [r for r in ids if client_says(raw, objects[r], r, set())] == wanted, raw


EDGES: list[int | float] = [0, 0.5, 1, 1.5, 2, 2.5, 3, -0.5, -1, -1.5, -2, -0.0]
EDGES += [2**53 - 1, 2**53, 2**53 + 1, 2**53 + 2, 2.0**53, 2.0**53 + 2, 2**62 + 1, 2.0**62]
EDGES += [-(2**63), -(2.0**63), 2**63 - 1, 2**63, 2.0**63, 2**64 - 1, 2.0**64, 2**70, 1e300, -1e300]


@pytest.mark.parametrize("op", ["lt", "lte", "gt", "gte"])
def test_ranges_are_exact_at_the_edges(op: str) -> None:
    """Python compares integers and floats exactly; columns must do the same."""
    raw_rows = [payload.encode({"n": number}) for number in EDGES]
    ids, nothing = list(range(len(EDGES))), [set() for _ in EDGES]
    segments = [
        FakeSegment(raw_rows, ids, nothing, c) for c in (sealed(raw_rows), GrowingColumns())
    ]
    for bound in [*EDGES, 10**400, -(10**400)]:
        parsed = parse_filter({"must": {"key": "n", "range": {op: bound}}})
        wanted = [i for i, n in enumerate(EDGES) if oracle_filter.in_range({op: bound}, n)]
        for segment in segments:
            assert rows_of(parsed, segment) == wanted, bound
        both = parse_filter({"must": {"key": "n", "range": {op: bound, "gte": 2**53 + 1}}})
        if op != "gte":
            wanted = [i for i in wanted if EDGES[i] >= 2**53 + 1]
            assert rows_of(both, segments[0]) == wanted, bound


NUMBER = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False)
)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(NUMBER, min_size=1, max_size=20), NUMBER, st.sampled_from(["lt", "lte", "gt", "gte"])
)
def test_ranges_are_exact(numbers: list[int | float], bound: int | float, op: str) -> None:
    raw_rows = [payload.encode({"n": number}) for number in numbers]
    nothing: list[set[str]] = [set() for _ in numbers]
    parsed = parse_filter({"must": {"key": "n", "range": {op: bound}}})
    wanted = [i for i, n in enumerate(numbers) if oracle_filter.in_range({op: bound}, n)]
    for columns in (sealed(raw_rows), GrowingColumns()):
        segment = FakeSegment(raw_rows, list(range(len(numbers))), nothing, columns)
        assert rows_of(parsed, segment) == wanted
        assert segment.reads in (0, len(numbers)), "numbers need no payload after catching up"


def test_geo_radius_next_to_the_antipode() -> None:
    """There the formula is ill-conditioned: the vector form must ask the exact one."""
    dice = random.Random(11)
    for _ in range(40):
        lon, lat = dice.uniform(-1, 1), dice.uniform(-1, 1)
        places = [
            (180 + lon + dice.gauss(0, 1e-7) - (360 if lon > 0 else 0), -lat + dice.gauss(0, 1e-7))
            for _ in range(20)
        ]
        raw_rows = [payload.encode({"g": {"lon": x, "lat": y}}) for x, y in places]
        ids, nothing = list(range(20)), [set() for _ in places]
        segment = FakeSegment(raw_rows, ids, nothing, sealed(raw_rows))
        for x, y in places:
            center = {"lon": lon, "lat": lat}
            circle = {"center": center, "radius": oracle_filter.metres(center, x, y)}
            parsed = parse_filter({"must": {"key": "g", "geo_radius": circle}})
            wanted = [r for r in ids if matches(parsed, raw_rows[r], r, lambda _: False)]
            assert rows_of(parsed, segment) == wanted


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-180, 180), st.floats(-90, 90)), min_size=1, max_size=20),
    st.floats(-180, 180),
    st.floats(-90, 90),
    st.floats(0, 2.1e7),
)
def test_geo_radius_columns_equal_single_points(
    places: list[tuple[float, float]], lon: float, lat: float, radius: float
) -> None:
    # One point at the radius itself, to the last bit.
    radius = oracle_filter.metres({"lon": lon, "lat": lat}, *places[0]) if radius < 1e6 else radius
    raw_rows = [payload.encode({"g": {"lon": x, "lat": y}}) for x, y in places]
    circle = {"center": {"lon": lon, "lat": lat}, "radius": radius}
    parsed = parse_filter({"must": {"key": "g", "geo_radius": circle}})
    nothing: list[set[str]] = [set() for _ in places]
    segment = FakeSegment(raw_rows, list(range(len(places))), nothing, sealed(raw_rows))
    one_by_one = [r for r, raw in enumerate(raw_rows) if matches(parsed, raw, r, lambda _: False)]
    assert rows_of(parsed, segment) == one_by_one


LETTERS = st.text(st.sampled_from('aKk\u212aİiéΣσς1_ \n\t"\\/.'), max_size=12)


@settings(max_examples=1500, deadline=None)
@given(
    LETTERS,
    LETTERS,
    st.sampled_from(["value", "prefix", "substring", "text", "text_any", "phrase"]),
)
def test_raw_hints_never_refuse_a_match(text: str, wanted: str, op: str) -> None:
    wanted = wanted if op != "value" or len(wanted) % 2 else text
    condition = FieldCondition.model_validate({"key": "a", "match": {op: wanted}})
    hint = hint_of(condition)
    if hint is not None and value_test(condition)(text):
        spelled = json.dumps({"a": text})
        escaped_slash = payload.encode({"a": text}).replace(b"/", b"\\/")
        escaped = ("".join(f"\\u{ord(letter):04x}" for letter in text)).join(('{"a":"', '"}'))
        raw_forms = (payload.encode({"a": text}), spelled.encode(), escaped_slash, escaped.encode())
        assert all(map(hint, raw_forms))


# -- what the random tests reach too rarely -------------------------------------------------------
def test_many_paths_overflow_to_reading_rows() -> None:
    wide = [{f"k{i}": i % 3} for i in range(limits.COLUMN_PATHS_MAX + 20)]
    raw_rows = [payload.encode(value) for value in wide]
    ids, nothing = list(range(len(wide))), [set() for _ in wide]
    for columns in (sealed(raw_rows), GrowingColumns()):
        segment = FakeSegment(raw_rows, ids, nothing, columns)
        last = len(wide) - 1
        for key, row in (("k0", 0), (f"k{last}", last)):
            equal = {"must": {"key": key, "match": {"value": row % 3}}}
            assert rows_of(parse_filter(equal), segment) == [row]
            absent = {"must": {"is_empty": {"key": key}}}
            assert rows_of(parse_filter(absent), segment) == [r for r in ids if r != row]
        assert rows_of(parse_filter({"must": {"key": "zz", "is_empty": False}}), segment) == []


def test_must_reads_only_rows_that_cheap_conditions_left() -> None:
    raw_rows = [payload.encode({"kind": r % 100, "list": [{"x": r}]}) for r in range(1000)]
    nothing: list[set[str]] = [set() for _ in raw_rows]
    columns = sealed(raw_rows, BitmapCache(1 << 20))
    segment = FakeSegment(raw_rows, list(range(1000)), nothing, columns)
    slow = {"key": "list[].x", "range": {"gte": 500}}
    cheap = {"key": "kind", "match": {"value": 7}}
    found = rows_of(parse_filter({"must": [slow, cheap]}), segment)
    assert found == [507, 607, 707, 807, 907]
    assert segment.reads == 10
    segment.reads = 0
    assert rows_of(parse_filter({"must": [slow]}), segment) == list(range(500, 1000)), "not cached"
    segment.reads = 0
    assert rows_of(parse_filter({"must": [slow]}), segment) == list(range(500, 1000)), "cached"
    assert segment.reads == 0
    absent = {"must": [{"key": "nothing[].x", "match": {"value": 1}}]}
    assert rows_of(parse_filter(absent), segment) == []
    assert segment.reads == 0


def test_low_and_high_cardinality_dictionaries() -> None:
    raw_rows = [payload.encode({"low": f"v{r % 3}", "high": f"id-{r:05}"}) for r in range(3000)]
    nothing: list[set[str]] = [set() for _ in raw_rows]
    segment = FakeSegment(raw_rows, list(range(3000)), nothing, sealed(raw_rows))
    for raw, wanted in [
        ({"key": "low", "match": {"value": "v1"}}, list(range(1, 3000, 3))),
        ({"key": "high", "match": {"value": "id-00042"}}, [42]),
        ({"key": "high", "match": {"any": ["id-00042", "id-02999", "none"]}}, [42, 2999]),
        ({"key": "high", "match": {"any": [f"id-{r:05}" for r in range(0, 3000, 2)]}}, None),
        ({"key": "high", "match": {"prefix": "id-029"}}, list(range(2900, 3000))),
        ({"key": "low", "match": {"except": ["v0", "v2"]}}, list(range(1, 3000, 3))),
        ({"key": "high", "match": {"except": ["id-00000"]}}, list(range(1, 3000))),
        ({"key": "low", "match": {"substring": "2"}}, list(range(2, 3000, 3))),
        ({"key": "high", "match": {"text": "00007"}}, [7]),
    ]:
        expected = list(range(0, 3000, 2)) if wanted is None else wanted
        assert rows_of(parse_filter({"must": [raw]}), segment) == expected, raw
    assert segment.reads == 0


def test_has_id_slice_and_vectors() -> None:
    dice = random.Random(3)
    ids = [*random_ids(dice, 200), 0, 1, 2**64 - 1]
    raw_rows = [b""] * len(ids)
    vectors = [{""} if r % 2 else set() for r in range(len(ids))]
    segment = FakeSegment(raw_rows, ids, vectors, sealed(raw_rows, BitmapCache(1 << 20)))
    keys = [parse_id(point_id) for point_id in ids]
    for total in (1, 2, 7, 2**40):
        hashes = [int(h) % total for h in hash_keys(keys)]
        assert hashes == [point_id_slice(format_id(key), total) for key in keys]
        index = hashes[0]
        parsed = parse_filter({"must": {"slice": {"total": total, "index": index}}})
        assert rows_of(parsed, segment) == [r for r, h in enumerate(hashes) if h == index]
    upper = str(uuid.UUID(next(i for i in ids if isinstance(i, str)))).upper()
    parsed = parse_filter({"must": {"has_id": [upper, 1, 5]}})
    assert [str(ids[r]) for r in rows_of(parsed, segment)] == [upper.lower(), "1"]
    odd = list(range(1, len(ids), 2))
    assert rows_of(parse_filter({"must": {"has_vector": ""}}), segment) == odd
    assert rows_of(parse_filter({"must": {"has_vector": "unknown"}}), segment) == []
    inside = {"nested": {"key": "a", "filter": {"must": [{"has_vector": ""}]}}}
    assert rows_of(parse_filter({"must": [inside]}), segment) == []


def test_no_rows_and_no_payloads() -> None:
    for count in (0, 9):
        nothing: list[set[str]] = [set() for _ in range(count)]
        for columns in (sealed([b""] * count), GrowingColumns()):
            segment = FakeSegment([b""] * count, list(range(count)), nothing, columns)
            assert rows_of(Filter(), segment) == list(range(count))
            empty = parse_filter({"must": {"is_empty": {"key": "a[].b"}}})
            assert rows_of(empty, segment) == list(range(count))
            assert (
                rows_of(parse_filter({"must": {"key": "a", "match": {"value": 1}}}), segment) == []
            )


def test_cache_is_bounded_and_forgets() -> None:
    cache = BitmapCache(10_000)
    raw_rows = [payload.encode({"n": r}) for r in range(800)]
    nothing: list[set[str]] = [set() for _ in raw_rows]
    segment = FakeSegment(raw_rows, list(range(800)), nothing, sealed(raw_rows, cache))
    for n in range(200):
        assert rows_of(parse_filter({"must": {"key": "n", "match": {"value": n}}}), segment) == [n]
        assert cache.byte_count <= cache.bytes_max
    assert cache.byte_count > 5_000
    true, one = ({"must": {"key": "n", "match": {"value": v}}} for v in (True, 1))
    assert rows_of(parse_filter(one), segment) == [1]
    assert rows_of(parse_filter(true), segment) == []
    cached = allowed(parse_filter(one), segment)
    with pytest.raises(ValueError, match="read-only"):
        cached[0] = 1
    held = cache.byte_count
    del segment
    cache.put(("another", b""), np.zeros(1, np.uint8))
    assert cache.byte_count < held / 10, "a dropped segment gives its bytes back"


def test_bits() -> None:
    dice = random.Random(1)
    for n in (0, 1, 7, 8, 9, 1000, 5000):
        for share in (0.001, 0.5):
            rows = np.array([r for r in range(n) if dice.random() < share], np.uint32)
            shuffled = np.random.default_rng(1).permutation(np.concatenate([rows, rows]))
            bits = bitmaps.of_rows(shuffled, n)
            assert bitmaps.to_rows(bits, n).tolist() == rows.tolist()
            assert bitmaps.count(bits) == len(rows)
            assert bitmaps.count(bitmaps.inverted(bits, n)) == n - len(rows)
            assert bitmaps.count(bitmaps.full(n)) == n
