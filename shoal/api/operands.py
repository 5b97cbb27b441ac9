"""What conditions compare values with: the operands of the filter language (shoal.api.filter).

Every union is told apart by the keys that are present, so that a wrong operand gets one sentence
and not one for each member of the union.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    StrictBool,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from shoal import limits
from shoal.datetimes import midnight, parse_datetime
from shoal.errors import BadRequest
from shoal.json_path import parse_path

__all__ = [
    "TAG_OF_OPERAND",
    "U64_MAX",
    "AnyRange",
    "DatetimeRange",
    "GeoBoundingBox",
    "GeoLine",
    "GeoPoint",
    "GeoPolygon",
    "GeoRadius",
    "Match",
    "MatchAny",
    "MatchExcept",
    "MatchPhrase",
    "MatchPrefix",
    "MatchSubstring",
    "MatchText",
    "MatchTextAny",
    "MatchValue",
    "Node",
    "PathText",
    "Range",
    "ValuesCount",
    "wrong",
]

_MATCHES = ("value", "any", "except", "text", "text_any", "phrase", "prefix", "substring")
_I64_MIN, U64_MAX = -(1 << 63), (1 << 64) - 1


class Node(BaseModel):
    """Strict: a number never turns into text or truth, nor a float into an integer."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, populate_by_name=True, allow_inf_nan=False
    )


def wrong(kind: str, sentence: str) -> PydanticCustomError:
    # Braces would be read as a template.
    return PydanticCustomError("filter_" + kind, "{sentence}", {"sentence": sentence})


def _path(text: str) -> str:
    try:
        parse_path(text)
    except BadRequest as error:
        raise wrong("path", error.message.removeprefix("Wrong input: ")) from None
    return text


PathText = Annotated[
    str,
    AfterValidator(_path),
    Field(description='JSON path of a payload value: `a.b`, `a[].b`, `a[0]`, `"quoted.key"`'),
]
Integer = Annotated[int, Field(ge=_I64_MIN, le=U64_MAX)]
Number = int | float


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# -- match ----------------------------------------------------------------------------------------
def _scalar_kind(value: Any) -> str | None:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int"
    return "str" if isinstance(value, str) else None


Scalar = Annotated[
    Annotated[StrictBool, Tag("bool")]
    | Annotated[Integer, Tag("int")]
    | Annotated[str, Tag("str")],
    Discriminator(
        _scalar_kind,
        custom_error_type="filter_match_value",
        custom_error_message="match value must be a string, an integer or a boolean "
        "(use range for floats)",
    ),
]


def _list_kind(value: Any) -> str | None:
    if not isinstance(value, list | tuple):
        return None
    return "strs" if not value or isinstance(value[0], str) else "ints"


Scalars = Annotated[
    Annotated[
        tuple[str, ...],
        BeforeValidator(_as_tuple, json_schema_input_type=list[str]),
        Field(max_length=limits.MATCH_VALUES_MAX),
        Tag("strs"),
    ]
    | Annotated[
        tuple[Integer, ...],
        BeforeValidator(_as_tuple, json_schema_input_type=list[int]),
        Field(max_length=limits.MATCH_VALUES_MAX),
        Tag("ints"),
    ],
    Discriminator(
        _list_kind,
        custom_error_type="filter_match_list",
        custom_error_message="must be a list of strings or a list of integers",
    ),
]


class MatchValue(Node):
    """Equal to the value, in type too: true is not 1, and 1 is not 1.0."""

    value: Scalar


class MatchAny(Node):
    """Equal to one of the values."""

    any: Scalars


class MatchExcept(Node):
    """Holds at least one value that is not null and not in the list."""

    except_: Scalars = Field(alias="except")


class MatchText(Node):
    """Contains every word of the text, in any order, ignoring case."""

    text: str


class MatchTextAny(Node):
    """Contains at least one word of the text, ignoring case."""

    text_any: str


class MatchPhrase(Node):
    """Contains the words of the phrase one after the other, ignoring case."""

    phrase: str


class MatchPrefix(Node):
    """A string that starts with the prefix, byte by byte."""

    prefix: str


class MatchSubstring(Node):
    """A string that contains the substring, byte by byte."""

    substring: str


def _match_kind(value: Any) -> str | None:
    if isinstance(value, Mapping):
        given = [key for key, operand in value.items() if operand is not None]
        return given[0] if len(given) == 1 and given[0] in _MATCHES else None
    return TAG_OF_OPERAND.get(type(value))


Match = Annotated[
    Annotated[MatchValue, Tag("value")]
    | Annotated[MatchAny, Tag("any")]
    | Annotated[MatchExcept, Tag("except")]
    | Annotated[MatchText, Tag("text")]
    | Annotated[MatchTextAny, Tag("text_any")]
    | Annotated[MatchPhrase, Tag("phrase")]
    | Annotated[MatchPrefix, Tag("prefix")]
    | Annotated[MatchSubstring, Tag("substring")],
    Discriminator(
        _match_kind,
        custom_error_type="filter_match",
        custom_error_message="match takes exactly one of: " + ", ".join(_MATCHES),
    ),
]


# -- ranges ---------------------------------------------------------------------------------------
class Range(Node):
    """A number (not a boolean) within all bounds. Integers are compared exactly."""

    lt: Number | None = None
    lte: Number | None = None
    gt: Number | None = None
    gte: Number | None = None


def _aware(value: Any) -> Any:
    if isinstance(value, str):
        parsed = parse_datetime(value)
        if parsed is None:
            raise wrong(
                "datetime",
                f"{value[:64]!r} is not a datetime; write it like 2024-02-29T12:30:00Z",
            )
        return parsed
    if isinstance(value, datetime):
        return value if value.tzinfo is not None else parse_datetime(value.isoformat())
    return midnight(value) if isinstance(value, date) else value


Moment = Annotated[
    datetime,
    BeforeValidator(_aware, json_schema_input_type=str),
    # Pydantic's own way of writing it drops the seconds of an offset, and so names another moment.
    PlainSerializer(datetime.isoformat, str, when_used="json"),
]


class DatetimeRange(Node):
    """A string that reads as a datetime within all bounds; without an offset it is UTC."""

    lt: Moment | None = None
    lte: Moment | None = None
    gt: Moment | None = None
    gte: Moment | None = None


def _range_kind(value: Any) -> str | None:
    if isinstance(value, Mapping):
        return (
            "datetimes"
            if any(isinstance(bound, str | date) for bound in value.values())
            else "numbers"
        )
    return TAG_OF_OPERAND.get(type(value))


AnyRange = Annotated[
    Annotated[Range, Tag("numbers")] | Annotated[DatetimeRange, Tag("datetimes")],
    Discriminator(
        _range_kind,
        custom_error_type="filter_range",
        custom_error_message="range must be an object with bounds lt, lte, gt or gte",
    ),
]


class ValuesCount(Node):
    """The number of values under the key: 0 for missing, null and []; 1 for a single value."""

    lt: int | None = None
    lte: int | None = None
    gt: int | None = None
    gte: int | None = None


# -- geography ------------------------------------------------------------------------------------
class GeoPoint(Node):
    """Degrees."""

    lon: float = Field(ge=-180, le=180)
    lat: float = Field(ge=-90, le=90)


class GeoBoundingBox(Node):
    """Strictly inside the box. With top_left.lon > bottom_right.lon it crosses the antimeridian."""

    top_left: GeoPoint
    bottom_right: GeoPoint


class GeoRadius(Node):
    """Nearer to the centre than `radius` metres on a sphere."""

    center: GeoPoint
    radius: float


class GeoLine(Node):
    """A closed ring: at least 4 points, the last equal to the first."""

    points: Annotated[
        tuple[GeoPoint, ...], BeforeValidator(_as_tuple, json_schema_input_type=list[GeoPoint])
    ]

    @model_validator(mode="after")
    def _closed(self) -> GeoLine:
        if len(self.points) < 4 or self.points[0] != self.points[-1]:
            raise wrong("ring", "a ring needs at least 4 points, and its last must equal its first")
        return self


class GeoPolygon(Node):
    """Inside the outer ring and in no hole; a point on the outer ring is outside."""

    exterior: GeoLine
    interiors: (
        Annotated[
            tuple[GeoLine, ...], BeforeValidator(_as_tuple, json_schema_input_type=list[GeoLine])
        ]
        | None
    ) = None

    @model_validator(mode="after")
    def _bounded(self) -> GeoPolygon:
        rings = (self.exterior, *(self.interiors or ()))
        if sum(len(ring.points) for ring in rings) > limits.POLYGON_POINTS_MAX:
            raise wrong("polygon", f"a polygon has at most {limits.POLYGON_POINTS_MAX} points")
        return self


TAG_OF_OPERAND: dict[type, str] = {
    MatchValue: "value",
    MatchAny: "any",
    MatchExcept: "except",
    MatchText: "text",
    MatchTextAny: "text_any",
    MatchPhrase: "phrase",
    MatchPrefix: "prefix",
    MatchSubstring: "substring",
    Range: "numbers",
    DatetimeRange: "datetimes",
}
