"""The filter language, slow and obvious: our own oracle.

Works on the JSON of a filter and on decoded payloads, and shares no code with the product. It prefers
one line per rule over speed. Slices are left to the tests: a hash has nothing obvious about it.
"""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

Json = Any


def split_path(path: str) -> list[str | int | None]:
    """Keys, indexes, and None for `[]`. The path is valid."""
    parts: list[str | int | None] = []
    for quoted, plain, index, every in re.findall(r'"([^"]*)"|([\w-]+)|\[(\d+)\]|(\[\])', path):
        if every:
            parts.append(None)
        elif index:
            parts.append(int(index))
        else:
            parts.append(plain or quoted)
    return parts


def select(value: Json, parts: list[str | int | None]) -> list[Json]:
    if not parts:
        return [value]
    part, rest = parts[0], parts[1:]
    if isinstance(part, str):
        return select(value[part], rest) if isinstance(value, dict) and part in value else []
    if not isinstance(value, list):
        return []
    if part is None:
        return [found for element in value for found in select(element, rest)]
    return select(value[part], rest) if part < len(value) else []


def unwrapped(values: list[Json]) -> list[Json]:
    out: list[Json] = []
    for value in values:
        out += value if isinstance(value, list) else [value]
    return out


def holds(filter: Json, payload: Json, point_id: Json, vectors: set[str]) -> bool:
    def each(clause: Json) -> list[bool]:
        conditions = clause if isinstance(clause, list) else [] if clause is None else [clause]
        return [condition_holds(c, payload, point_id, vectors) for c in conditions]

    if not all(each(filter.get("must"))):
        return False
    if any(each(filter.get("must_not"))):
        return False
    should = each(filter.get("should"))
    if should and not any(should):
        return False
    some = filter.get("min_should")
    return some is None or sum(each(some["conditions"])) >= some["min_count"]


def condition_holds(c: Json, payload: Json, point_id: Json, vectors: set[str]) -> bool:
    if "key" in c:
        return field_holds(c, payload)
    if "is_empty" in c:
        return is_empty(select(payload, split_path(c["is_empty"]["key"])))
    if "is_null" in c:
        return is_null(select(payload, split_path(c["is_null"]["key"])))
    if "has_id" in c:
        return point_id is not None and point_id in c["has_id"]
    if "has_vector" in c:
        return c["has_vector"] in vectors
    if "nested" in c:
        path = split_path(c["nested"]["key"])
        if path[-1] is None:
            path.pop()
        arrays = [v for v in select(payload, path) if isinstance(v, list)]
        elements = [e for array in arrays for e in array if isinstance(e, dict)]
        return any(holds(c["nested"]["filter"], e, None, set()) for e in elements)
    return holds(c, payload, point_id, vectors)


def field_holds(c: Json, payload: Json) -> bool:
    found = select(payload, split_path(c["key"]))
    if c.get("is_empty") is not None:
        return is_empty(found) == c["is_empty"]
    if c.get("is_null") is not None:
        return is_null(found) == c["is_null"]
    if c.get("values_count") is not None:
        counts = [len(v) if isinstance(v, list) else int(v is not None) for v in found] or [0]
        return any(in_range(c["values_count"], count) for count in counts)
    return any(value_holds(c, value) for value in unwrapped(found))


def is_empty(found: list[Json]) -> bool:
    return all(value is None or value == [] for value in found)


def is_null(found: list[Json]) -> bool:
    return any(value is None or (isinstance(value, list) and None in value) for value in found)


def value_holds(c: Json, value: Json) -> bool:
    if "match" in c:
        return match_holds(c["match"], value)
    if "range" in c:
        if any(isinstance(bound, str) for bound in c["range"].values()):
            moment = to_datetime(value) if isinstance(value, str) else None
            bounds = {op: to_datetime(bound) for op, bound in c["range"].items()}
            return moment is not None and in_range(bounds, moment)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and in_range(c["range"], value)
    if not is_geo(value):
        return False
    at = (value["lon"], value["lat"])
    if "geo_bounding_box" in c:
        return in_box(c["geo_bounding_box"], *at)
    if "geo_radius" in c:
        return metres(c["geo_radius"]["center"], *at) < c["geo_radius"]["radius"]
    polygon = c["geo_polygon"]
    return in_ring(polygon["exterior"]["points"], *at, edge=False) and not any(
        in_ring(hole["points"], *at, edge=True) for hole in polygon.get("interiors") or ()
    )


def match_holds(match: Json, value: Json) -> bool:
    (op, operand), *_ = match.items()
    if op == "value":
        return same(value, operand)
    if op == "any":
        return any(same(value, other) for other in operand)
    if op == "except":
        return value is not None and not any(same(value, other) for other in operand)
    if not isinstance(value, str):
        return False
    if op == "prefix":
        return value[: len(operand)] == operand
    if op == "substring":
        return operand in value
    have, want = words(value), words(operand)
    if op == "text":
        return want != [] and all(word in have for word in want)
    if op == "text_any":
        return any(word in have for word in want)
    at = range(len(have) - len(want) + 1)
    return want != [] and any(have[i : i + len(want)] == want for i in at)


def same(value: Json, other: Json) -> bool:
    return type(value) is type(other) and value == other


def words(text: str) -> list[str]:
    out, word = [], ""
    for letter in text + " ":
        if letter.isalnum():
            word += letter
        elif word:
            out.append(word.lower())
            word = ""
    return out


def in_range(bounds: Json, value: Any) -> bool:
    return (
        (bounds.get("lt") is None or value < bounds["lt"])
        and (bounds.get("lte") is None or value <= bounds["lte"])
        and (bounds.get("gt") is None or value > bounds["gt"])
        and (bounds.get("gte") is None or value >= bounds["gte"])
    )


def to_datetime(text: str) -> datetime | None:
    """Only the forms that the tests generate."""
    for form in ("%Y-%m-%dT%H:%M:%S.%f%z", "%Y-%m-%dT%H:%M:%S%z", "%Y-%m-%d %H:%M:%S", "%Y-%m-%d"):
        try:
            moment = datetime.strptime(text, form)
        except ValueError:
            continue
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return None


def is_geo(value: Json) -> bool:
    return isinstance(value, dict) and all(
        type(value.get(axis)) in (int, float) and math.isfinite(value[axis])
        for axis in ("lon", "lat")
    )


def in_box(box: Json, lon: float, lat: float) -> bool:
    west, east = box["top_left"]["lon"], box["bottom_right"]["lon"]
    between = lon > west or lon < east if west > east else west < lon < east
    return between and box["bottom_right"]["lat"] < lat < box["top_left"]["lat"]


def metres(centre: Json, lon: float, lat: float) -> float:
    lon1, lat1, lon2, lat2 = map(math.radians, (centre["lon"], centre["lat"], lon, lat))
    a = math.sin((lat1 - lat2) / 2) ** 2
    a += math.cos(lat1) * math.cos(lat2) * math.sin((lon1 - lon2) / 2) ** 2
    return 2 * 6371008.8 * math.asin(min(1.0, math.sqrt(a)))


def in_ring(points: Json, lon: float, lat: float, *, edge: bool) -> bool:
    inside = False
    for a, b in pairwise(points):
        cross = (b["lon"] - a["lon"]) * (lat - a["lat"]) - (b["lat"] - a["lat"]) * (lon - a["lon"])
        within_lon = min(a["lon"], b["lon"]) <= lon <= max(a["lon"], b["lon"])
        within_lat = min(a["lat"], b["lat"]) <= lat <= max(a["lat"], b["lat"])
        if cross == 0 and within_lon and within_lat:
            return edge
        if (a["lon"] > lon) != (b["lon"] > lon):
            slope = (b["lat"] - a["lat"]) / (b["lon"] - a["lon"])
            if lat < a["lat"] + slope * (lon - a["lon"]):
                inside = not inside
    return inside
