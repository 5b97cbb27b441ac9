"""What was stored comes back: the same JSON value, digit for digit, through every way to ask."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from harness import Server
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

NAME = "round-trip"

VALUES: dict[str, Any] = {
    "unicode": 'Zürich, 東京, 🐟, עברית, \u0000, \u2028, \\, ", /',
    "combining": "e\u0301 is not \u00e9",
    "largest": 2**63 - 1,
    "smallest": -(2**63),
    "unsigned": 2**64 - 1,
    "beyond double": 2**53 + 1,
    "float": 0.1,
    "tiny": 5e-324,
    "huge": 1.7976931348623157e308,
    "whole float": 1.0,
    "minus zero": -0.0,
    "null": None,
    "booleans": [True, False],
    "numbers": [1, 1.0, True],
    "empty": {"list": [], "object": {}, "text": ""},
    "nested": {"a": [{"b": [[], [None, {"c": {"d": [1, "1"]}}]]}]},
    "": "an empty key",
    'key with. dot[0] "quote"': 1,
    "ключ": "значение",
}


@pytest.fixture(scope="module")
def http(shared_server: Server) -> Iterator[httpx.Client]:
    with shared_server.http() as client:
        body = {"vectors": {"size": 1, "distance": "Dot"}}
        client.put(f"/collections/{NAME}", json=body).raise_for_status()
        yield client
        client.delete(f"/collections/{NAME}").raise_for_status()


def same(a: Any, b: Any) -> bool:
    """Equal as JSON: 1, 1.0 and true differ, and so do 0.0 and -0.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return a == b and math.copysign(1, a) == math.copysign(1, b)
    return bool(a == b)


def store(http: httpx.Client, payload: Any, *, escaped: bool = False) -> None:
    text = json.dumps(
        {"points": [{"id": 1, "vector": [1.0], "payload": payload}]}, ensure_ascii=escaped
    )
    answer = http.put(
        f"/collections/{NAME}/points?wait=true",
        content=text.encode(),
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == 200, answer.text


def every_way(http: httpx.Client) -> dict[str, Any]:
    path = f"/collections/{NAME}/points"
    one = http.get(f"{path}/1").json()["result"]
    retrieved = http.post(path, json={"ids": [1]}).json()["result"][0]
    scrolled = http.post(f"{path}/scroll", json={}).json()["result"]["points"][0]
    query = {"query": [1.0], "with_payload": True}
    queried = http.post(f"{path}/query", json=query).json()["result"]["points"][0]
    ways = {"get": one, "retrieve": retrieved, "scroll": scrolled, "query": queried}
    return {way: point["payload"] for way, point in ways.items()}


@pytest.mark.parametrize("escaped", [False, True], ids=["utf-8", "escaped"])
def test_every_kind_of_value(http: httpx.Client, escaped: bool) -> None:
    store(http, VALUES, escaped=escaped)
    for way, payload in every_way(http).items():
        assert same(payload, VALUES), way


def test_a_change_of_one_key_leaves_the_others_alone(http: httpx.Client) -> None:
    """set_payload and delete_payload rewrite the object: numbers next to it must survive."""
    store(http, VALUES)
    path = f"/collections/{NAME}/points/payload"
    body: dict[str, Any] = {"payload": {"new": 2**63 + 7}, "points": [1]}
    http.post(f"{path}?wait=true", json=body).raise_for_status()
    body = {"keys": ["booleans"], "points": [1]}
    http.post(f"{path}/delete?wait=true", json=body).raise_for_status()
    expected = {key: value for key, value in VALUES.items() if key != "booleans"}
    expected["new"] = 2**63 + 7
    for way, payload in every_way(http).items():
        assert same(payload, expected), way


def test_values_survive_the_real_client(http: httpx.Client, shared_server: Server) -> None:
    store(http, VALUES)
    client = shared_server.client()
    try:
        payload = client.retrieve(NAME, [1])[0].payload
        assert same(payload, VALUES)
    finally:
        client.close()


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=10), inner, max_size=4
        )
    ),
    max_leaves=20,
)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(payload=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), JSON, max_size=5))
def test_any_payload(http: httpx.Client, payload: dict[str, Any]) -> None:
    store(http, payload)
    for way, found in every_way(http).items():
        assert same(found, payload), way
