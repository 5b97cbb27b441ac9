"""Filters on one decoded payload: the meaning of every condition, a value at a time.

Columns (storage_node.columns) answer most conditions for a whole segment at once; this answers the
rest (paths through arrays, nested filters, unusual values) and single points. A condition is compiled
to a closure once and then called for each row.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, assert_never

from shoal.api.filter import (
    Condition,
    DatetimeRange,
    FieldCondition,
    Filter,
    HasIdCondition,
    HasVectorCondition,
    IsEmptyCondition,
    IsNullCondition,
    Match,
    MatchAny,
    MatchExcept,
    MatchPhrase,
    MatchPrefix,
    MatchSubstring,
    MatchText,
    MatchTextAny,
    MatchValue,
    Nested,
    NestedCondition,
    Range,
    SliceCondition,
    ValuesCount,
)
from shoal.datetimes import microseconds, parse_datetime
from shoal.errors import InvariantError
from shoal.json_path import JsonPath, parse_path, values_at
from storage_node.geo import Area, Box, Circle, Polygon, geo_point
from storage_node.siphash import hash_keys

__all__ = [
    "Point",
    "area_of",
    "compile_condition",
    "compile_filter",
    "count_test",
    "datetime_bounds",
    "tokens",
    "value_test",
]

Payload = dict[str, Any]
ValueTest = Callable[[Any], bool]

_WORD = re.compile(r"[^\W_]+")
_MICROSECONDS_MIN, _MICROSECONDS_MAX = -(1 << 62), 1 << 62


@dataclass(frozen=True, slots=True)
class Point:
    """What conditions that do not look at the payload need to know."""

    key: int
    has_vector: Callable[[str], bool]


# A test of one row. The point is None inside a nested filter: an array element has no id and no
# vectors, so has_id, has_vector and slice are false of it.
RowTest = Callable[[Payload, Point | None], bool]


# -- values ---------------------------------------------------------------------------------------
def tokens(text: str) -> list[str]:
    """The words of a text in order, in lower case: runs of letters and digits."""
    if text.isascii():
        return _WORD.findall(text.lower())
    # Lower-casing first could split words: "İ" becomes an i and a combining dot.
    return [word.lower() for word in _WORD.findall(text)]


def datetime_bounds(bounds: DatetimeRange) -> tuple[int, int]:
    """Bounds -> (first, last) allowed microsecond; first > last allows none."""
    first, last = _MICROSECONDS_MIN, _MICROSECONDS_MAX
    if bounds.gt is not None:
        first = microseconds(bounds.gt) + 1
    if bounds.gte is not None:
        first = max(first, microseconds(bounds.gte))
    if bounds.lt is not None:
        last = microseconds(bounds.lt) - 1
    if bounds.lte is not None:
        last = min(last, microseconds(bounds.lte))
    return first, last


def count_test(bounds: ValuesCount) -> Callable[[int], bool]:
    lt, lte, gt, gte = bounds.lt, bounds.lte, bounds.gt, bounds.gte

    def test(count: int) -> bool:
        return (
            (lt is None or count < lt)
            and (lte is None or count <= lte)
            and (gt is None or count > gt)
            and (gte is None or count >= gte)
        )

    return test


def area_of(condition: FieldCondition) -> Area | None:
    """The area of a geographic condition; None if it is none."""
    if condition.geo_bounding_box is not None:
        return Box(condition.geo_bounding_box)
    if condition.geo_radius is not None:
        return Circle(condition.geo_radius)
    if condition.geo_polygon is not None:
        return Polygon(condition.geo_polygon)
    return None


def value_test(condition: FieldCondition) -> ValueTest:
    """The test of one value for match, range and geographic conditions."""
    if condition.match is not None:
        return _match_test(condition.match)
    if isinstance(condition.range, Range):
        return _range_test(condition.range)
    if condition.range is not None:
        return _datetime_test(condition.range)
    area = area_of(condition)
    if area is None:
        raise InvariantError(f"no test of single values for {condition.operator}")
    return _area_test(area)


def _match_test(match: Match) -> ValueTest:
    match match:
        case MatchValue():
            wanted, kind = match.value, type(match.value)
            return lambda value: type(value) is kind and value == wanted
        case MatchAny():
            listed = _listed(match.any)
            return lambda value: (type(value), value) in listed if _hashable(value) else False
        case MatchExcept():
            banned = _listed(match.except_)
            return lambda value: (
                value is not None and not (_hashable(value) and (type(value), value) in banned)
            )
        case MatchPrefix():
            prefix = match.prefix
            return lambda value: isinstance(value, str) and value.startswith(prefix)
        case MatchSubstring():
            substring = match.substring
            return lambda value: isinstance(value, str) and substring in value
        case MatchText() | MatchTextAny() | MatchPhrase():
            return _text_test(match)
        case _:
            assert_never(match)


def _listed(values: tuple[str, ...] | tuple[int, ...]) -> frozenset[tuple[type, str | int]]:
    # With the type, because 1 == True == 1.0 in Python and not here.
    return frozenset((type(value), value) for value in values)


def _hashable(value: Any) -> bool:
    return not isinstance(value, list | dict)


def _text_test(match: MatchText | MatchTextAny | MatchPhrase) -> ValueTest:
    if isinstance(match, MatchTextAny):
        some = frozenset(tokens(match.text_any))
        return lambda value: isinstance(value, str) and not some.isdisjoint(tokens(value))
    if isinstance(match, MatchText):
        every = frozenset(tokens(match.text))
        return lambda value: (
            isinstance(value, str) and bool(every) and every.issubset(tokens(value))
        )
    phrase = tokens(match.phrase)
    return lambda value: isinstance(value, str) and holds_phrase(tokens(value), phrase)


def holds_phrase(words: list[str], phrase: list[str]) -> bool:
    """Whether `phrase` stands in `words` in one piece; an empty phrase never does."""
    size = len(phrase)
    return size > 0 and any(words[at : at + size] == phrase for at in range(len(words) - size + 1))


def _range_test(bounds: Range) -> ValueTest:
    lt, lte, gt, gte = bounds.lt, bounds.lte, bounds.gt, bounds.gte

    def test(value: Any) -> bool:
        return (
            type(value) in (int, float)
            and (lt is None or value < lt)
            and (lte is None or value <= lte)
            and (gt is None or value > gt)
            and (gte is None or value >= gte)
        )

    return test


def _datetime_test(bounds: DatetimeRange) -> ValueTest:
    first, last = datetime_bounds(bounds)

    def test(value: Any) -> bool:
        moment = parse_datetime(value) if isinstance(value, str) else None
        return moment is not None and first <= microseconds(moment) <= last

    return test


def _area_test(area: Area) -> ValueTest:
    def test(value: Any) -> bool:
        point = geo_point(value)
        return point is not None and area.holds(*point)

    return test


# -- conditions -----------------------------------------------------------------------------------
def compile_condition(condition: Condition) -> RowTest:
    """One condition -> a test of (payload, point)."""
    match condition:
        case FieldCondition():
            return _field_test(condition)
        case IsEmptyCondition():
            return _empty_test(parse_path(condition.is_empty.key), True)
        case IsNullCondition():
            return _null_test(parse_path(condition.is_null.key), True)
        case HasIdCondition():
            keys = frozenset(condition.has_id)
            return lambda _, point: point is not None and point.key in keys
        case HasVectorCondition():
            name = condition.has_vector
            return lambda _, point: point is not None and point.has_vector(name)
        case SliceCondition():
            total, index = condition.slice.total, condition.slice.index
            return lambda _, point: (
                point is not None and int(hash_keys([point.key])[0]) % total == index
            )
        case NestedCondition():
            return _nested_test(condition.nested)
        case Filter():
            return compile_filter(condition)
        case _:
            assert_never(condition)


def _field_test(condition: FieldCondition) -> RowTest:
    path = parse_path(condition.key)
    if condition.values_count is not None:
        return _values_count_test(path, condition.values_count)
    if condition.is_empty is not None:
        return _empty_test(path, condition.is_empty)
    if condition.is_null is not None:
        return _null_test(path, condition.is_null)
    test = value_test(condition)
    return lambda payload, _: any(map(test, values_at(payload, path, flat=True)))


def _empty_test(path: JsonPath, wanted: bool) -> RowTest:
    def test(payload: Payload, _: Point | None) -> bool:
        found = values_at(payload, path, flat=False)
        return all(value is None or value == [] for value in found) == wanted

    return test


def _null_test(path: JsonPath, wanted: bool) -> RowTest:
    def test(payload: Payload, _: Point | None) -> bool:
        found = values_at(payload, path, flat=False)
        return any(map(_is_null, found)) == wanted

    return test


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, list) and any(e is None for e in value))


def _values_count_test(path: JsonPath, bounds: ValuesCount) -> RowTest:
    test = count_test(bounds)

    def row_test(payload: Payload, _: Point | None) -> bool:
        found = values_at(payload, path, flat=False)
        return any(map(test, map(_value_count, found))) if found else test(0)

    return row_test


def _value_count(value: Any) -> int:
    if isinstance(value, list):
        return len(value)
    return 0 if value is None else 1


def _nested_test(nested: Nested) -> RowTest:
    path = parse_path(nested.key)
    if path.parts[-1] is None:  # `a[]` means the array itself, as `a` does
        path = JsonPath(path.parts[:-1], None, path.prefix)
    test = compile_filter(nested.filter)

    def row_test(payload: Payload, _: Point | None) -> bool:
        return any(
            isinstance(element, dict) and test(element, None)
            for value in values_at(payload, path, flat=False)
            if isinstance(value, list)
            for element in value
        )

    return row_test


def compile_filter(filter: Filter) -> RowTest:
    """A whole filter -> a test of (payload, point)."""
    must = [compile_condition(c) for c in filter.must or ()]
    must_not = [compile_condition(c) for c in filter.must_not or ()]
    should = [compile_condition(c) for c in filter.should or ()]
    some: list[RowTest] = []
    some_min = 0
    if filter.min_should is not None:
        some = [compile_condition(c) for c in filter.min_should.conditions]
        some_min = filter.min_should.min_count

    def test(payload: Payload, point: Point | None) -> bool:
        return (
            all(t(payload, point) for t in must)
            and not any(t(payload, point) for t in must_not)
            and (not should or any(t(payload, point) for t in should))
            and (some_min == 0 or sum(t(payload, point) for t in some) >= some_min)
        )

    return test
