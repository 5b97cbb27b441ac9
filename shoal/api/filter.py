"""The filter language: the HTTP schema and, once parsed, the tree that storage nodes evaluate.

A filter is a tree of immutable models. Every clause is a tuple, ids are keys (shoal.ids), datetimes
are aware, paths are known to be valid: whoever holds a `Filter` need not check it again. What is
not known here is refused with a sentence that names the place, because a condition that is dropped
in silence shows points that should stay hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from shoal import limits
from shoal.api.operands import (
    TAG_OF_OPERAND,
    U64_MAX,
    AnyRange,
    DatetimeRange,
    GeoBoundingBox,
    GeoLine,
    GeoPoint,
    GeoPolygon,
    GeoRadius,
    Match,
    MatchAny,
    MatchExcept,
    MatchPhrase,
    MatchPrefix,
    MatchSubstring,
    MatchText,
    MatchTextAny,
    MatchValue,
    Node,
    PathText,
    Range,
    ValuesCount,
    wrong,
)
from shoal.errors import BadRequest
from shoal.ids import format_id, parse_id

__all__ = [
    "Condition",
    "DatetimeRange",
    "FieldCondition",
    "Filter",
    "FilterField",
    "GeoBoundingBox",
    "GeoLine",
    "GeoPoint",
    "GeoPolygon",
    "GeoRadius",
    "HasIdCondition",
    "HasVectorCondition",
    "IsEmptyCondition",
    "IsNullCondition",
    "Match",
    "MatchAny",
    "MatchExcept",
    "MatchPhrase",
    "MatchPrefix",
    "MatchSubstring",
    "MatchText",
    "MatchTextAny",
    "MatchValue",
    "MinShould",
    "Nested",
    "NestedCondition",
    "PayloadField",
    "Range",
    "Slice",
    "SliceCondition",
    "ValuesCount",
    "condition_key",
    "parse_filter",
]

_CLAUSES = ("must", "should", "must_not", "min_should")
_CONDITION_TAGS = ("has_id", "has_vector", "is_empty", "is_null", "nested", "slice")


# -- conditions -----------------------------------------------------------------------------------
_OPERATORS = (
    "match",
    "range",
    "geo_bounding_box",
    "geo_radius",
    "geo_polygon",
    "values_count",
    "is_empty",
    "is_null",
)


class FieldCondition(Node):
    """One operator on the values under `key`; true if any value of an array satisfies it."""

    key: PathText
    match: Match | None = None
    range: AnyRange | None = None
    geo_bounding_box: GeoBoundingBox | None = None
    geo_radius: GeoRadius | None = None
    geo_polygon: GeoPolygon | None = None
    values_count: ValuesCount | None = None
    is_empty: bool | None = None
    is_null: bool | None = None

    @model_validator(mode="after")
    def _one_operator(self) -> FieldCondition:
        if sum(getattr(self, name) is not None for name in _OPERATORS) != 1:
            raise wrong(
                "operator",
                f"the condition on key {self.key!r} needs exactly one of: {', '.join(_OPERATORS)}; "
                "put several as conditions of their own into must",
            )
        return self

    @cached_property
    def operator(self) -> str:
        """The name of the one operator that is set."""
        return next(name for name in _OPERATORS if getattr(self, name) is not None)


class PayloadField(Node):
    key: PathText


class IsEmptyCondition(Node):
    """The value is missing, null or []."""

    is_empty: PayloadField


class IsNullCondition(Node):
    """The value is null, or an array that holds a null."""

    is_null: PayloadField


def _keys(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return value
    if len(value) > limits.IDS_MAX:
        raise wrong("ids", f"at most {limits.IDS_MAX} ids in one has_id; send several requests")
    try:
        return tuple(map(parse_id, value))
    except BadRequest as error:
        raise wrong("id", error.message.removeprefix("Wrong input: ")) from None


class HasIdCondition(Node):
    """The point's id is one of these. Held as keys (shoal.ids)."""

    has_id: Annotated[
        tuple[int, ...],
        BeforeValidator(_keys, json_schema_input_type=list[int | str]),
        PlainSerializer(lambda keys: [format_id(key) for key in keys], list[int | str]),
    ]


class HasVectorCondition(Node):
    """The point has a vector of this name; "" is the unnamed one."""

    has_vector: str


class Slice(Node):
    """One of `total` disjoint parts of all ids: SipHash-2-4 of the id, modulo total, is `index`."""

    total: int = Field(ge=1, le=U64_MAX)
    index: int = Field(ge=0)

    @model_validator(mode="after")
    def _inside(self) -> Slice:
        if self.index >= self.total:
            raise wrong("slice", f"index must be in 0..{self.total - 1}, not {self.index}")
        return self


class SliceCondition(Node):
    slice: Slice


class Nested(Node):
    """`filter` holds for one object in the array at `key`; `a` and `a[]` are the same."""

    key: PathText
    filter: Filter


class NestedCondition(Node):
    nested: Nested


def _condition_kind(value: Any) -> str | None:
    if isinstance(value, Mapping):
        if "key" in value:
            return "field"
        for tag in _CONDITION_TAGS:
            if tag in value:
                return tag
        return "filter" if not value or any(clause in value for clause in _CLAUSES) else None
    return _TAG_OF_MODEL.get(type(value))


Condition = Annotated[
    Annotated[FieldCondition, Tag("field")]
    | Annotated[IsEmptyCondition, Tag("is_empty")]
    | Annotated[IsNullCondition, Tag("is_null")]
    | Annotated[HasIdCondition, Tag("has_id")]
    | Annotated[HasVectorCondition, Tag("has_vector")]
    | Annotated[NestedCondition, Tag("nested")]
    | Annotated[SliceCondition, Tag("slice")]
    | Annotated["Filter", Tag("filter")],
    Discriminator(
        _condition_kind,
        custom_error_type="filter_condition",
        custom_error_message="not a known condition; it must be an object with key, "
        + ", ".join(_CONDITION_TAGS)
        + ", or a filter with "
        + ", ".join(_CLAUSES),
    ),
]


def _one_or_many(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return value if value is None or isinstance(value, tuple) else (value,)


Clause = Annotated[
    tuple[Condition, ...] | None,
    BeforeValidator(_one_or_many, json_schema_input_type=list[Condition] | Condition | None),
]
_Conditions = Annotated[
    tuple[Condition, ...],
    BeforeValidator(_one_or_many, json_schema_input_type=list[Condition] | Condition),
]


class MinShould(Node):
    """At least `min_count` of the conditions hold."""

    conditions: _Conditions
    min_count: int = Field(ge=1)


class Filter(Node):
    """All of `must`, none of `must_not`, one of `should` (if any is given), and `min_should`.
    The empty filter matches every point."""

    must: Clause = None
    should: Clause = None
    must_not: Clause = None
    min_should: MinShould | None = None


_TAG_OF_MODEL: dict[type, str] = {
    FieldCondition: "field",
    IsEmptyCondition: "is_empty",
    IsNullCondition: "is_null",
    HasIdCondition: "has_id",
    HasVectorCondition: "has_vector",
    NestedCondition: "nested",
    SliceCondition: "slice",
    Filter: "filter",
    **TAG_OF_OPERAND,
}
for _model in (Nested, NestedCondition, MinShould, Filter):
    _model.model_rebuild()


# -- parsing --------------------------------------------------------------------------------------
def parse_filter(obj: object, where: str = "filter") -> Filter:
    """Decoded JSON -> Filter. `where` is the path of the filter in the request, for messages.

    Raises BadRequest: unknown operators and keys, wrong types, wrong paths, and a filter that is
    deeper or larger than shoal.limits allows (found before anything recurses).
    """
    if isinstance(obj, Filter):
        return obj
    if not isinstance(obj, dict):
        raise BadRequest(
            f"Wrong input: {where} must be an object with {', '.join(_CLAUSES)}, "
            f"not {_json_type(obj)}"
        )
    _check_size(obj, where)
    try:
        return Filter.model_validate(obj)
    except ValidationError as error:
        raise BadRequest(_sentence(error.errors(include_url=False)[0], where)) from None


FilterField = Annotated[Filter, BeforeValidator(parse_filter)]
"""For request models: validates through `parse_filter`, so that errors and bounds are the same."""


def _check_size(root: dict[str, Any], where: str) -> None:
    count = 0
    waiting: list[tuple[dict[str, Any], int]] = [(root, 1)]
    while waiting:
        node, depth = waiting.pop()
        if depth > limits.FILTER_DEPTH_MAX:
            raise BadRequest(
                f"Wrong input: {where} is nested deeper than {limits.FILTER_DEPTH_MAX} levels; "
                "flatten it"
            )
        for child in _children(node):
            count += 1
            if count > limits.FILTER_CONDITIONS_MAX:
                raise BadRequest(
                    f"Wrong input: {where} has more than {limits.FILTER_CONDITIONS_MAX} "
                    "conditions; use match any for long lists of values"
                )
            if isinstance(child, dict):
                waiting.append((child, depth + 1))


def _children(node: dict[str, Any]) -> Iterator[Any]:
    for clause in ("must", "should", "must_not"):
        yield from _listed(node.get(clause))
    if isinstance(min_should := node.get("min_should"), dict):
        yield from _listed(min_should.get("conditions"))
    if isinstance(nested := node.get("nested"), dict) and "filter" in nested:
        yield nested["filter"]


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


# -- messages -------------------------------------------------------------------------------------
_TAGS = frozenset(_TAG_OF_MODEL.values()) | {"bool", "int", "str", "strs", "ints", "float"}
_MODEL_OF_TAG = {tag: model for model, tag in _TAG_OF_MODEL.items()}
_MODEL_OF_FIELD: dict[str, type[BaseModel]] = {
    "min_should": MinShould,
    "values_count": ValuesCount,
    "top_left": GeoPoint,
    "bottom_right": GeoPoint,
    "center": GeoPoint,
    "points": GeoPoint,
    "exterior": GeoLine,
    "interiors": GeoLine,
    "geo_bounding_box": GeoBoundingBox,
    "geo_radius": GeoRadius,
    "geo_polygon": GeoPolygon,
}
_MODEL_OF_INNER_FIELD: dict[str, type[BaseModel]] = {
    "is_empty": PayloadField,
    "is_null": PayloadField,
    "nested": Nested,
    "slice": Slice,
}


def _sentence(error: ErrorDetails, where: str) -> str:
    """One pydantic error as a sentence: where, what, what would be right."""
    place, model = _place(error["loc"], where)
    kind = error["type"]
    if kind == "extra_forbidden":
        name = error["loc"][-1]
        known = [field.alias or n for n, field in model.model_fields.items()]
        parent = place.removesuffix(f".{name}")
        return f"Wrong input: unknown key {name!r} in {parent}; known keys: {', '.join(known)}"
    if kind == "missing":
        return f"Wrong input: {place} is required"
    if kind.startswith("filter_"):
        return f"Wrong input: {place}: {error['msg']}"
    if model is Range:
        return f"Wrong input: {place} must be a finite number"
    what = error["msg"].removeprefix("Input ").replace("should", "must").replace("tuple", "list")
    return f"Wrong input: {place} {what[:1].lower()}{what[1:]}"


def _place(loc: tuple[int | str, ...], where: str) -> tuple[str, type[BaseModel]]:
    """The location as people write it, and the model that the last part belongs to.

    Pydantic puts the tag of each union into the location, after the part that holds the union.
    """
    text = where
    model: type[BaseModel] = Filter
    parent: type[BaseModel] = Filter
    after_union = False
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
            after_union = True
            continue
        if after_union and part in _TAGS:
            parent = _MODEL_OF_TAG.get(part, parent)
            after_union = False
            continue
        text += f".{part}"
        model = parent
        if part in _MODEL_OF_FIELD:
            parent = _MODEL_OF_FIELD[part]
        elif part in _MODEL_OF_INNER_FIELD and parent is not FieldCondition:
            parent = _MODEL_OF_INNER_FIELD[part]
        elif part == "filter":
            parent = Filter
        after_union = part in ("match", "range", "value", "any", "except", "lt", "lte", "gt", "gte")
    return text, model


def _json_type(value: object) -> Literal["null", "a boolean", "a number", "a string", "a list"]:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    return "a string" if isinstance(value, str) else "a list"


def condition_key(condition: BaseModel) -> bytes:
    """Equal for conditions that mean the same by their text, whatever objects they are. Unlike `==`
    of the models it tells true from 1."""
    return condition.model_dump_json(by_alias=True, exclude_none=True).encode()
