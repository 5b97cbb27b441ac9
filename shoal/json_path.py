"""JSON paths: how the API names a value inside a payload.

    a.b            key b of the object at key a
    a[].b          key b of every element of the array at a
    a[0]           the first element of the array at a
    "a.b".c        key c of the object at key `a.b`: quotes keep the dot

A path is parsed once and cached; an invalid one raises BadRequest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Any

from shoal import limits
from shoal.errors import BadRequest

__all__ = ["JsonPath", "Part", "parse_path", "values_at"]

# A key, an array index, or None for "every element" (`[]`).
Part = str | int | None

_KEY = re.compile(r'"([^"]*)"|([\w-]+)')
_BRACKET = re.compile(r"\[([0-9]*)\]")
_U64_MAX = (1 << 64) - 1
_SHOWN_MAX = 100  # characters of a wrong path that an error repeats


@dataclass(frozen=True, slots=True)
class JsonPath:
    """parts   keys (str), array indexes (int) and None for every element of an array
    plain   `parts` when all are keys: the path selects at most one value; else None
    prefix  the leading keys: where they select nothing, the path does not either"""

    parts: tuple[Part, ...]
    plain: tuple[str, ...] | None
    prefix: tuple[str, ...]


@lru_cache(maxsize=4096)
def parse_path(text: str) -> JsonPath:
    """A path -> its parts. Raises BadRequest that shows the path and what a right one is."""
    parts: list[Part] = []
    at = 0
    while True:
        key = _KEY.match(text, at)
        if key is None:
            raise _invalid(text)
        parts.append(key[2] if key[1] is None else key[1])
        at = key.end()
        while bracket := _BRACKET.match(text, at):
            index = int(bracket[1]) if len(bracket[1]) <= 20 and bracket[1] else None
            if bracket[1] and (index is None or index > _U64_MAX):
                raise _invalid(text)
            parts.append(index)
            at = bracket.end()
        if len(parts) > limits.JSON_PATH_PARTS_MAX:
            raise BadRequest(
                f"Wrong input: JSON path {_shown(text)} has more than "
                f"{limits.JSON_PATH_PARTS_MAX} parts; name a value that lies less deep"
            )
        if at == len(text):
            break
        if text[at] != ".":
            raise _invalid(text)
        at += 1
    prefix = tuple(part for part in takewhile(_is_key, parts) if isinstance(part, str))
    return JsonPath(tuple(parts), prefix if len(prefix) == len(parts) else None, prefix)


def values_at(payload: Any, path: JsonPath, *, flat: bool) -> list[Any]:
    """Every value that `path` selects in a decoded payload, in document order; [] if none.

    flat: an array that the whole path selects is unwrapped, one level: what conditions on single
    values look at. Without it the array itself is the value: what counting and emptiness look at.
    """
    found = [payload]
    for part in path.parts:
        found = list(_step(found, part))
        if not found:
            return found
    if flat and any(isinstance(value, list) for value in found):
        return [e for value in found for e in (value if isinstance(value, list) else (value,))]
    return found


def _step(found: list[Any], part: Part) -> Iterable[Any]:
    if isinstance(part, str):
        return [v[part] for v in found if isinstance(v, dict) and part in v]
    if part is None:
        return [e for v in found if isinstance(v, list) for e in v]
    return [v[part] for v in found if isinstance(v, list) and part < len(v)]


def _is_key(part: Part) -> bool:
    return isinstance(part, str)


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_MAX else text[:_SHOWN_MAX] + "…")


def _invalid(text: str) -> BadRequest:
    return BadRequest(
        f"Wrong input: invalid JSON path {_shown(text)}; write keys joined by dots, `[]` or `[0]` "
        "after a key for array elements, and put a key with other characters in quotes, as in "
        'a."b c"[].d'
    )
