"""Payloads as JSON bytes: checking, merging, deleting and selecting parts.

A payload is the UTF-8 text of one JSON object; b"" is a point without payload and means {}. Bytes
go in and come out, so that a payload which nobody changes is never parsed at all. What is changed
keeps the rest exactly: integers of any size, 1 apart from 1.0, -0.0, nulls, the order of keys.
msgspec does this (Python's json writes 1e22 as 1e+22 and lets NaN, infinity and lone surrogates
through; orjson loses integers above 64 bits). Of a repeated key the last one counts, as everywhere.

A path (`shoal.json_path`) that selects nothing is never an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import msgspec

from shoal import limits
from shoal.errors import BadRequest, BodyTooLarge
from shoal.json_path import JsonPath, Part, parse_path, values_at

__all__ = [
    "JsonPath",
    "check_payload",
    "decode",
    "delete_keys",
    "encode",
    "merge_payload",
    "parse_path",
    "select",
    "values_at",
]

Object = dict[str, Any]
# A selector: what to take of each part; True takes everything below.
_Tree = dict[Part, Any]

_decoder: msgspec.json.Decoder[Object] = msgspec.json.Decoder(Object)
_encoder = msgspec.json.Encoder()


def decode(payload: bytes) -> Object:
    """The object of a stored payload; b"" is {}."""
    return _decoder.decode(payload) if payload else {}


def encode(payload: Object) -> bytes:
    """The stored form of an object; {} is b""."""
    return _encoder.encode(payload) if payload else b""


def check_payload(payload: bytes) -> None:
    """Raise BadRequest unless `payload` is b"" or one JSON object within the limits.

    What it lets through, every other function here can read. Cost: one parse.
    """
    if len(payload) > limits.PAYLOAD_BYTES_MAX:
        raise BodyTooLarge(
            f"Wrong input: a payload of {len(payload)} bytes is larger than "
            f"{limits.PAYLOAD_BYTES_MAX}; store large values elsewhere and keep a reference"
        )
    try:
        value = decode(payload)
    except msgspec.ValidationError as error:
        raise BadRequest(f"Wrong input: payload: {error}; it must be a JSON object") from None
    except msgspec.DecodeError as error:
        raise BadRequest(f"Format error in JSON body: payload: {error}") from None
    except RecursionError:
        raise _too_deep() from None
    # Without as many brackets it cannot be too deep: nearly every payload ends here.
    if payload.count(b"{") + payload.count(b"[") > limits.PAYLOAD_DEPTH_MAX:
        _check_depth(value)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(limits.PAYLOAD_DEPTH_MAX):
        level = [child for node in level for child in _containers(node)]
        if not level:
            return
    raise _too_deep()


def _containers(node: Any) -> list[Any]:
    children = node.values() if isinstance(node, dict) else node
    return [child for child in children if isinstance(child, dict | list)]


def _too_deep() -> BadRequest:
    return BadRequest(
        f"Wrong input: a payload is nested deeper than {limits.PAYLOAD_DEPTH_MAX} levels; "
        "flatten it"
    )


# -- changing -------------------------------------------------------------------------------------
def merge_payload(old: bytes, patch: bytes, key: str | None = None) -> bytes:
    """`old` with the top-level keys of `patch` set; a null in `patch` removes its key.

    key: a path: merge there instead of at the top. Objects on the way are made, and values that are
    no objects are replaced by them; but array elements are never added: an array that is missing
    becomes [], an index past the end changes nothing. `[]` merges into every element.
    """
    path = () if key is None else parse_path(key).parts
    return encode(_merged_at(decode(old), path, decode(patch)))


def _merged_at(node: Any, path: Sequence[Part], patch: Object) -> Any:
    if not path:
        return _merged(node, patch)
    part, rest = path[0], path[1:]
    if isinstance(part, str):
        target: Object = node if isinstance(node, dict) else {}
        target[part] = _merged_at(target.get(part, {}), rest, patch)
        return target
    if not isinstance(node, list):
        return []
    if part is None:
        return [_merged_at(element, rest, patch) for element in node]
    if part < len(node):
        node[part] = _merged_at(node[part], rest, patch)
    return node


def _merged(node: Any, patch: Object) -> Object:
    target: Object = dict(node) if isinstance(node, dict) else {}
    for name, value in patch.items():
        if value is None:
            target.pop(name, None)
        else:
            target[name] = value
    return target


def delete_keys(payload: bytes, keys: Sequence[str]) -> bytes:
    """Without the values at `keys` (paths). A final `[]` empties the array; a final `[0]` changes
    nothing, because doing it twice would delete two elements."""
    paths = [parse_path(key).parts for key in keys]
    value = decode(payload)
    for path in paths:
        _delete(value, path)
    return encode(value)


def _delete(node: Any, path: Sequence[Part]) -> None:
    part, rest = path[0], path[1:]
    if isinstance(part, str):
        if isinstance(node, dict) and part in node:
            if rest:
                _delete(node[part], rest)
            else:
                del node[part]
    elif isinstance(node, list):
        if part is None and not rest:
            node.clear()
        elif part is None:
            for element in node:
                _delete(element, rest)
        elif rest and part < len(node):
            _delete(node[part], rest)


# -- selecting ------------------------------------------------------------------------------------
def select(
    payload: bytes, *, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> bytes:
    """Only the parts at the paths `include`, or all but those at `exclude`; give one of the two.

    Inside arrays only `[]` selects; an index such as `[0]` selects nothing, in both directions.
    A value on the way that is neither object nor array is kept.
    """
    if include is not None:
        return encode(_included(decode(payload), _tree(tuple(include))))
    if exclude:
        return encode(_excluded(decode(payload), _tree(tuple(exclude))))
    return payload


@lru_cache(maxsize=256)
def _tree(keys: tuple[str, ...]) -> _Tree:
    """Paths -> {part: subtree or True}, a shorter path winning over those that go on from it."""
    root: _Tree = {}
    for key in keys:
        *above, last = parse_path(key).parts
        node = root
        for part in above:
            node = node.setdefault(part, {})
            if node is True:
                break
        else:
            node[last] = True
    return root


def _included(value: Any, tree: Any) -> Any:
    if tree is True:
        return value
    if isinstance(value, dict):
        return {k: _included(v, tree[k]) for k, v in value.items() if k in tree}
    if isinstance(value, list):
        return [_included(element, tree[None]) for element in value] if None in tree else []
    return value


def _excluded(value: Any, tree: _Tree) -> Any:
    if isinstance(value, dict):
        return {
            k: _excluded(v, tree[k]) if k in tree else v
            for k, v in value.items()
            if tree.get(k) is not True
        }
    if isinstance(value, list) and None in tree:
        below = tree[None]
        return [] if below is True else [_excluded(element, below) for element in value]
    return value
