"""Random collections, points, filters and operations, all from one `random.Random`.

Values come from small vocabularies so that filters match some points and miss others, ties and
duplicates happen, and every kind of JSON value turns up under every kind of key. An operation is a
`Call`: the name of a QdrantClient method and its arguments; the same call goes to both sides.
"""

from __future__ import annotations

import random
import struct
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from qdrant_client import models as m

__all__ = ["SHAPES", "Call", "Shape", "World"]


@dataclass(frozen=True)
class Shape:
    """A kind of collection. dense: name -> (dim, distance), "" = the unnamed vector.
    indexed: its segments get a graph as early as possible, so searches may be approximate."""

    name: str
    dense: dict[str, tuple[int, m.Distance]]
    multi: dict[str, tuple[int, m.Distance]] = field(default_factory=dict)
    sparse: tuple[str, ...] = ()
    shard_number: int = 1
    indexed: bool = False

    @property
    def vector_names(self) -> list[str]:
        return [*self.dense, *self.multi, *self.sparse]

    def create_arguments(self) -> dict[str, Any]:
        params: dict[str, m.VectorParams] = {
            name: m.VectorParams(size=dim, distance=distance)
            for name, (dim, distance) in self.dense.items()
        }
        for name, (dim, distance) in self.multi.items():
            params[name] = m.VectorParams(
                size=dim,
                distance=distance,
                multivector_config=m.MultiVectorConfig(comparator=m.MultiVectorComparator.MAX_SIM),
            )
        arguments: dict[str, Any] = {
            "vectors_config": params[""] if list(params) == [""] else params,
            "shard_number": self.shard_number,
        }
        if self.sparse:
            arguments["sparse_vectors_config"] = {n: m.SparseVectorParams() for n in self.sparse}
        if self.indexed:
            arguments["hnsw_config"] = m.HnswConfigDiff(
                m=16, ef_construct=128, full_scan_threshold=10
            )
        return arguments


_COSINE, _DOT = m.Distance.COSINE, m.Distance.DOT
_EUCLID, _MANHATTAN = m.Distance.EUCLID, m.Distance.MANHATTAN

SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in [
        Shape("cosine", {"": (24, _COSINE)}),
        Shape("dot", {"": (16, _DOT)}, shard_number=2),
        Shape("euclid", {"": (16, _EUCLID)}),
        Shape("manhattan", {"": (12, _MANHATTAN)}),
        Shape(
            "named",
            {
                "title": (8, _COSINE),
                "body": (24, _EUCLID),
                "taxi": (6, _MANHATTAN),
                "raw": (10, _DOT),
            },
            shard_number=3,
        ),
        Shape(
            "everything",
            {"dense": (16, _DOT)},
            multi={"many": (6, _COSINE), "tokens": (4, _DOT)},
            sparse=("words", "bytes"),
            shard_number=2,
        ),
        Shape("unnamed-sparse", {"": (12, _COSINE)}, sparse=("words",)),
        Shape("unnamed-multi", {}, multi={"": (8, _COSINE)}),
        Shape("indexed", {"": (32, _COSINE)}, indexed=True),
        Shape("indexed-euclid", {"a": (32, _EUCLID), "b": (16, _DOT)}, indexed=True),
    ]
}


@dataclass(frozen=True)
class Call:
    """`client.<method>(collection, **arguments)`. writes: it may change the collection."""

    method: str
    arguments: dict[str, Any]
    writes: bool = False

    def __str__(self) -> str:
        return (
            f"client.{self.method}(name, "
            + ", ".join(f"{key}={value!r}" for key, value in self.arguments.items())
            + ")"
        )


CITIES = ["Berlin", "Zürich", "東京", "São Paulo", "berlin", ""]
WORDS = ["shoal", "Fish", "net", "harbour", "tide", "Möwe", "ship7", "old"]
TAGS = ["red", "green", "blue", "grün", "🐟"]
INTEGERS = [0, 1, 2, 3, 7, -1, -5, 10, 2**53 + 1, 2**63 - 1, -(2**63)]
FLOATS = [0.0, 1.0, 1.5, -2.25, 3.0, 1e-9, 1e18, 7.0]
DATES = [
    "2024-06-15T12:30:00Z",
    "2024-06-15",
    "2024-06-15 12:30:00.123456+02:00",
    "2024-01-01T00:00:00",
    "2025-03-03 10:00",
    "2024-06-15T12:30:00.5z",
    "not a date",
    "2024-13-45",
]
UUIDS = [str(uuid.UUID(int=(0xABCDEF << 96) + n * 7919)) for n in range(8)]
PATHS = [
    "city", "n", "x", "flag", "when", "loc", "tags", "text", "uid", "items", "deep", "mixed",
    "deep.a", "deep.b", "deep.list", "items[].k", "items[0].v", "items[].tags", "items[1]",
    "tags[]", "tags[0]", '"odd key"', '"dot.ted"', "deep.a.b", "missing", "missing.deep",
]  # fmt: skip


class World:
    """Everything random about one run."""

    def __init__(self, rng: random.Random, shape: Shape, *, id_count: int = 240) -> None:
        self.rng, self.shape = rng, shape
        ints = [*range(id_count // 2), 2**31, 2**53 + 1, 2**63 + 5, 2**64 - 1]
        uuids = [str(uuid.UUID(int=rng.getrandbits(128))) for _ in range(id_count // 2)]
        self.ids: list[int | str] = [*ints, *uuids]

    # -- values -----------------------------------------------------------------------------------
    def id(self) -> int | str:
        """Any id of the pool; a UUID in one of the spellings that mean the same."""
        chosen = self.rng.choice(self.ids)
        if isinstance(chosen, str) and self.rng.random() < 0.2:
            plain = uuid.UUID(chosen)
            return self.rng.choice([plain.hex, plain.urn, "{" + chosen + "}", chosen.upper()])
        return chosen

    def some_ids(self, most: int = 8) -> list[int | str]:
        return [self.id() for _ in range(self.rng.randint(1, most))]

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def floats(self, dim: int) -> list[float]:
        """float32 values; sometimes zeros, sometimes one of few vectors, so that scores tie."""
        kind = self.rng.random()
        if kind < 0.02:
            return [0.0] * dim
        if kind < 0.12:
            return [float((i * 7 + self.rng.randint(0, 2)) % 5 - 2) for i in range(dim)]
        return [_f32(self.rng.gauss(0.0, 1.0)) for _ in range(dim)]

    def sparse_vector(self) -> m.SparseVector:
        count = self.rng.randint(0, 6)
        indices = self.rng.sample([*range(30), 2**20, 2**32 - 1], count)  # not in order
        return m.SparseVector(indices=indices, values=[_f32(self.rng.gauss(0, 1)) for _ in indices])

    def vector_of(self, name: str) -> Any:
        if name in self.shape.dense:
            return self.floats(self.shape.dense[name][0])
        if name in self.shape.multi:
            dim = self.shape.multi[name][0]
            return [
                [_f32(self.rng.gauss(0, 1)) for _ in range(dim)]
                for _ in range(self.rng.randint(1, 4))
            ]
        return self.sparse_vector()

    def vectors(self, *, all_of_them: bool = False) -> Any:
        """What goes into `vector` of a point: often some of the vectors are missing."""
        names = self.shape.vector_names
        if names == [""] and self.chance(0.9):
            return self.vector_of("")
        chosen = [n for n in names if all_of_them or self.chance(0.8)]
        return {name: self.vector_of(name) for name in chosen}

    def payload(self) -> dict[str, Any] | None:
        if self.chance(0.05):
            return None
        makers: dict[str, Callable[[], Any]] = {
            "city": lambda: self.rng.choice(CITIES),
            "n": lambda: self.rng.choice(INTEGERS),
            "x": lambda: self.rng.choice([*FLOATS, self.rng.uniform(-5, 5)]),
            "flag": lambda: self.chance(0.5),
            "when": lambda: self.rng.choice(DATES),
            "loc": self.location,
            "tags": lambda: self.rng.sample(TAGS, self.rng.randint(0, 3)),
            "text": self.text,
            "uid": lambda: self.rng.choice(UUIDS),
            "items": lambda: [self.item() for _ in range(self.rng.randint(0, 3))],
            "deep": self.deep,
            "mixed": self.anything,
            "odd key": lambda: self.rng.choice(CITIES),
            "dot.ted": lambda: self.rng.choice(INTEGERS),
        }
        payload = {key: make() for key, make in makers.items() if self.chance(0.6)}
        if self.chance(0.1) and payload:  # a value of an unusual type under a usual key
            payload[self.rng.choice(sorted(payload))] = self.anything()
        if self.chance(0.5):
            payload["filler"] = "~" * self.rng.randint(0, 400)  # so that segments are sealed
        return payload

    def location(self) -> Any:
        if self.chance(0.1):
            return self.rng.choice([None, {"lat": 1.0}, {"lat": "1", "lon": 2}, 7, []])
        place = {"lat": self.rng.uniform(-80, 80), "lon": self.rng.uniform(-180, 180)}
        return [place, {"lat": 52.5, "lon": 13.4}] if self.chance(0.2) else place

    def item(self) -> Any:
        if self.chance(0.1):
            return self.rng.choice([None, 3, "plain", []])
        return {
            "k": self.rng.choice(CITIES),
            "v": self.rng.choice(INTEGERS[:8]),
            "tags": self.rng.sample(TAGS, 2),
        }

    def deep(self) -> Any:
        return {
            "a": self.rng.choice([*INTEGERS[:6], {"b": self.rng.choice(CITIES)}, None]),
            "b": self.rng.choice(FLOATS),
            "list": [self.rng.choice(INTEGERS[:8]) for _ in range(self.rng.randint(0, 3))],
        }

    def text(self) -> str:
        return self.rng.choice([" ", ", ", "-"]).join(self.rng.choices(WORDS, k=4))

    def anything(self) -> Any:
        return self.rng.choice(
            [None, True, False, 1, 1.0, 0, "1", "", [], {}, [None], [1, "1", True, None], 2.5,
             [[1, 2], [3]], {"a": {"a": []}}, "Berlin", 2**64 - 1, [1.5, 2], "true"]
        )  # fmt: skip

    def point(self, *, all_vectors: bool = False) -> m.PointStruct:
        return m.PointStruct(
            id=self.id(), vector=self.vectors(all_of_them=all_vectors), payload=self.payload()
        )

    # -- filters ----------------------------------------------------------------------------------
    def maybe_filter(self, probability: float = 0.6) -> m.Filter | None:
        return self.filter() if self.chance(probability) else None

    def filter(self, depth: int = 2) -> m.Filter:
        clauses: dict[str, Any] = {}
        for clause, probability in (("must", 0.55), ("should", 0.4), ("must_not", 0.3)):
            if self.chance(probability):
                conditions = [self.condition(depth) for _ in range(self.rng.choice([0, 1, 1, 2]))]
                single = len(conditions) == 1 and self.chance(0.2)
                clauses[clause] = conditions[0] if single else conditions
        if self.chance(0.1):
            conditions = [self.condition(depth) for _ in range(self.rng.randint(0, 4))]
            clauses["min_should"] = m.MinShould(
                conditions=conditions, min_count=self.rng.randint(1, 3)
            )
        return m.Filter(**clauses)

    def condition(self, depth: int) -> Any:
        special = self.rng.random()
        if depth > 0 and special < 0.10:
            return self.filter(depth - 1)
        if depth > 0 and special < 0.18:
            return m.NestedCondition(
                nested=m.Nested(
                    key=self.rng.choice(["items", "items[]", "deep", "tags", "missing"]),
                    filter=self.nested_filter(),
                )
            )
        if special < 0.24:
            return m.HasIdCondition(has_id=self.some_ids(30))
        if special < 0.28:
            return m.HasVectorCondition(has_vector=self.rng.choice(self.shape.vector_names))
        if special < 0.32:
            total = self.rng.randint(1, 4)
            return m.SliceCondition(slice=m.Slice(total=total, index=self.rng.randrange(total)))
        if special < 0.38:
            return m.IsEmptyCondition(is_empty=m.PayloadField(key=self.rng.choice(PATHS)))
        if special < 0.44:
            return m.IsNullCondition(is_null=m.PayloadField(key=self.rng.choice(PATHS)))
        return self.field_condition()

    def nested_filter(self) -> m.Filter:
        must = [
            m.FieldCondition(key="k", match=m.MatchAny(any=self.rng.sample(CITIES, 3))),
            m.FieldCondition(key="v", range=m.Range(gte=0)),
            m.FieldCondition(key="tags", match=m.MatchValue(value=self.rng.choice(TAGS))),
            m.IsNullCondition(is_null=m.PayloadField(key="k")),
        ]
        clause = self.rng.choice(["must", "should", "must_not"])
        return m.Filter(**{clause: self.rng.sample(must, self.rng.randint(1, 2))})

    def field_condition(self) -> m.FieldCondition:
        """Mostly a sensible pair of key and operator; sometimes any key with any operator."""
        pairs: list[tuple[list[str], Callable[[], dict[str, Any]]]] = [
            (["city", '"odd key"', "items[].k", "tags", "tags[]", "deep.a.b"], self.match_keyword),
            (["n", '"dot.ted"', "items[].v", "deep.list", "deep.a"], self.match_integer),
            (["flag", "mixed"], lambda: {"match": m.MatchValue(value=self.chance(0.5))}),
            (["uid"], self.match_uuid),
            (["text", "city"], self.match_text),
            (["n", "x", "deep.b", "deep.list", "items[].v", "items[0].v"], self.number_range),
            (["when"], self.date_range),
            (["loc"], self.geo),
            (PATHS, self.values_count),
            (PATHS, lambda: {"is_empty": self.chance(0.5)}),
            (PATHS, lambda: {"is_null": self.chance(0.5)}),
        ]
        keys, make = self.rng.choice(pairs)
        key = self.rng.choice(PATHS if self.chance(0.15) else keys)
        return m.FieldCondition(key=key, **make())

    def match_keyword(self) -> dict[str, Any]:
        some = self.rng.sample([*CITIES, *TAGS], 3)
        return {
            "match": self.rng.choice(
                [
                    m.MatchValue(value=some[0]),
                    m.MatchAny(any=some),
                    m.MatchExcept(**{"except": some}),
                    m.MatchPrefix(prefix=some[0][:2]),
                    m.MatchSubstring(substring=some[0][1:3]),
                ]
            )
        }

    def match_integer(self) -> dict[str, Any]:
        some = self.rng.sample(INTEGERS, 3)
        return {
            "match": self.rng.choice(
                [
                    m.MatchValue(value=some[0]),
                    m.MatchAny(any=some),
                    m.MatchExcept(**{"except": some}),
                ]
            )
        }

    def match_uuid(self) -> dict[str, Any]:
        some = self.rng.sample(UUIDS, 2)
        return {"match": self.rng.choice([m.MatchValue(value=some[0]), m.MatchAny(any=some)])}

    def match_text(self) -> dict[str, Any]:
        words = " ".join(self.rng.sample([*WORDS, "FISH", "tid", "zürich"], self.rng.randint(1, 2)))
        return {
            "match": self.rng.choice(
                [
                    m.MatchText(text=words),
                    m.MatchTextAny(text_any=words),
                    m.MatchPhrase(phrase=words),
                    m.MatchSubstring(substring=words[:3]),
                ]
            )
        }

    def number_range(self) -> dict[str, Any]:
        low = self.rng.choice([-5.0, 0.0, 1.0, 1.5])
        bounds = {self.rng.choice(["gt", "gte"]): low}
        if self.chance(0.6):
            bounds[self.rng.choice(["lt", "lte"])] = low + self.rng.choice([0.0, 2.0, 10.0])
        return {"range": m.Range(**bounds)}

    def date_range(self) -> dict[str, Any]:
        start = datetime(2024, 6, 15, 10, 30, 0, 123456, tzinfo=UTC)
        low = start + timedelta(days=self.rng.choice([-400, -1, 0, 0, 1]))
        bounds = {self.rng.choice(["gt", "gte"]): low}
        if self.chance(0.5):
            bounds[self.rng.choice(["lt", "lte"])] = low + timedelta(
                hours=self.rng.choice([2, 300])
            )
        return {"range": m.DatetimeRange(**bounds)}

    def geo(self) -> dict[str, Any]:
        lat, lon = self.rng.uniform(-60, 60), self.rng.uniform(-179, 179)
        kind = self.rng.randrange(3)
        if kind == 0:
            west, east = self.rng.choice([(-170.0, 20.0), (100.0, -100.0), (-10.0, 60.0)])
            return {
                "geo_bounding_box": m.GeoBoundingBox(
                    top_left=m.GeoPoint(lat=lat + 20, lon=west),
                    bottom_right=m.GeoPoint(lat=lat - 20, lon=east),
                )
            }
        if kind == 1:
            center = self.rng.choice([m.GeoPoint(lat=lat, lon=lon), m.GeoPoint(lat=52.5, lon=13.4)])
            return {
                "geo_radius": m.GeoRadius(
                    center=center, radius=self.rng.choice([1.0, 1e5, 5e6, 1.2e7])
                )
            }
        return {"geo_polygon": self.polygon()}

    def polygon(self) -> m.GeoPolygon:
        def ring(size: float) -> m.GeoLineString:
            corners = [(-size, -size), (-size, size), (size, size), (size, -size), (-size, -size)]
            return m.GeoLineString(
                points=[m.GeoPoint(lat=a * 0.5 + 11, lon=b + 7) for a, b in corners]
            )

        return m.GeoPolygon(
            exterior=ring(100.0), interiors=[ring(40.0)] if self.chance(0.5) else None
        )

    def values_count(self) -> dict[str, Any]:
        bounds = {self.rng.choice(["gt", "gte", "lt", "lte"]): self.rng.randint(0, 3)}
        if self.chance(0.3):
            bounds[self.rng.choice(["gte", "lte"])] = self.rng.randint(0, 3)
        return {"values_count": m.ValuesCount(**bounds)}


def _f32(value: float) -> float:
    """The nearest float32, so that both sides start from the same bits."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])
