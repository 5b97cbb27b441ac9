"""Payload bytes: exact round trips, and changes as in the client library's in-process mode."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest
from qdrant_client.local import payload_value_extractor as oracle_get
from qdrant_client.local import payload_value_setter as oracle_set
from qdrant_client.local.json_path_parser import JsonPathItemType, parse_json_path

from shoal import limits, payload
from shoal.errors import BadRequest, BodyTooLarge

KEYS = ["a", "b", "c", "é", "x.y"]
PATHS = [
    "a",
    "b",
    "a.b",
    "a.b.c",
    "a[]",
    "a[0]",
    "a[1]",
    "a[].b",
    "a[0].b",
    "a[][]",
    "a[].b[].c",
    "a[7].b",
    '"x.y"',
    '"x.y".a',
    "é",
    "b.é[].a",
    "a[0][1]",
    "c[]",
]


def random_value(dice: random.Random, depth: int = 3) -> Any:
    kind = dice.randrange(9 if depth else 6)
    if kind < 6:
        return dice.choice([None, True, False, 0, 1, -1, 1.0, 2**64, "", "t", "é\n", 1e22, -0.0])
    if kind == 6:
        return [random_value(dice, depth - 1) for _ in range(dice.randrange(4))]
    return random_object(dice, depth - 1)


def random_object(dice: random.Random, depth: int = 3) -> dict[str, Any]:
    return {dice.choice(KEYS): random_value(dice, depth) for _ in range(dice.randrange(4))}


def same(ours: bytes, theirs: Any) -> bool:
    """Compared as text: 1 is not 1.0 and the order of keys counts."""
    return json.dumps(payload.decode(ours)) == json.dumps(theirs)


@pytest.mark.parametrize(
    "number",
    [
        *("1", "1.0", "1e22", "-0.0", "0.1", "5e-324", "1.7976931348623157e308"),
        *("9007199254740993", "18446744073709551615", "-9223372036854775808"),
        *("1180591620717411303424", "123456789012345678901234567890"),
    ],
)
def test_numbers_survive_a_change_next_to_them(number: str) -> None:
    changed = payload.merge_payload(b'{"n":%s,"x":1}' % number.encode(), b'{"x":2}')
    assert changed == b'{"n":%s,"x":2}' % number.encode()


def test_text_survives() -> None:
    text = '{"t":"é\\u0000\\n\\"\\\\😀","n":null,"l":[[],{},null]}'
    assert payload.merge_payload(text.encode(), b'{"z":1}') == text[:-1].encode() + b',"z":1}'


def test_the_empty_object_is_no_payload() -> None:
    assert payload.merge_payload(b'{"a":1}', b'{"a":null}') == b""
    assert payload.merge_payload(b"", b'{"a":1}') == b'{"a":1}'
    assert payload.delete_keys(b'{"a":1}', ["a"]) == b""
    assert payload.decode(b"") == {}


@pytest.mark.parametrize("seed", range(4))
def test_changes_equal_the_oracle(seed: int) -> None:
    print(f"seed {seed}")
    dice = random.Random(seed)
    for _ in range(2500):
        old, patch = random_object(dice), random_object(dice)
        raw, raw_patch = payload.encode(old), payload.encode(patch)
        keys = dice.sample(PATHS, dice.randrange(1, 4))

        theirs = oracle_set.merge_payload(copy.deepcopy(old), copy.deepcopy(patch))
        assert same(payload.merge_payload(raw, raw_patch), theirs), (old, patch)

        theirs = copy.deepcopy(old)
        oracle_set.set_value_by_key(theirs, parse_json_path(keys[0]), copy.deepcopy(patch))
        assert same(payload.merge_payload(raw, raw_patch, keys[0]), theirs), (old, patch, keys[0])

        theirs = copy.deepcopy(old)
        for key in keys:
            oracle_set.delete_value_by_key(theirs, parse_json_path(key))
        assert same(payload.delete_keys(raw, keys), theirs), (old, keys)

        assert same(payload.select(raw, include=keys), oracle_get.include_payload(old, keys))
        assert same(payload.select(raw, exclude=keys), oracle_get.exclude_payload(old, keys))
        for flat in (True, False):
            found = payload.values_at(old, payload.parse_path(keys[0]), flat=flat)
            assert found == (oracle_get.value_by_key(old, keys[0], flat=flat) or [])


def test_selecting_nothing_and_everything() -> None:
    assert payload.select(b'{"a":1}', include=[]) == b""
    assert payload.select(b'{"a":1}', exclude=[]) == b'{"a":1}'


@pytest.mark.parametrize("seed", range(3))
def test_paths_equal_the_oracle(seed: int) -> None:
    print(f"seed {seed}")
    dice = random.Random(seed)
    part = {JsonPathItemType.KEY: "key", JsonPathItemType.INDEX: "index"}
    for _ in range(3000):
        text = list(dice.choice([*PATHS, "a-b_c.é[12]"]))
        for _ in range(dice.randrange(4)):
            at = dice.randrange(len(text) + 1)
            text[at : at + dice.randrange(2)] = dice.choice('ab.[]"0 é-_1²')
        path = "".join(text)
        try:
            theirs = tuple(
                getattr(item, part[item.item_type]) if item.item_type in part else None
                for item in parse_json_path(path)
            )
        except ValueError:
            with pytest.raises(BadRequest, match="invalid JSON path"):
                payload.parse_path(path)
        else:
            assert payload.parse_path(path).parts == theirs, path


def test_path_bounds() -> None:
    deepest = ".".join("a" * limits.JSON_PATH_PARTS_MAX)
    assert len(payload.parse_path(deepest).parts) == limits.JSON_PATH_PARTS_MAX
    with pytest.raises(BadRequest, match="more than"):
        payload.parse_path(deepest + ".a")
    with pytest.raises(BadRequest, match="invalid JSON path"):
        payload.parse_path(f"a[{2**64}]")


def test_payload_checks() -> None:
    deepest = b'{"a":' * limits.PAYLOAD_DEPTH_MAX + b"1" + b"}" * limits.PAYLOAD_DEPTH_MAX
    for good in (b"", b"{}", b'{"a":[1,{"b":null}]}', deepest, b'{"a":[%s{}]}' % (b"{}," * 100)):
        payload.check_payload(good)
    for bad in (b"[]", b"1", b"null", b"{", b'{"a":NaN}', b'{"a":1e999}', b'{"a":"\\ud800"}'):
        with pytest.raises(BadRequest):
            payload.check_payload(bad)
    for depth in (limits.PAYLOAD_DEPTH_MAX + 1, 100_000):
        with pytest.raises(BadRequest, match="deeper"):
            payload.check_payload(b'{"a":' * depth + b"1" + b"}" * depth)
    with pytest.raises(BodyTooLarge):
        payload.check_payload(b'{"a":"%s"}' % (b"x" * limits.PAYLOAD_BYTES_MAX))
