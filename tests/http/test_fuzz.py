"""Random requests made from /openapi.json: whatever comes, never a 500.

Half of the bodies follow the schema, half have a few places replaced by something odd. The seed is
printed; a failure prints the request as a curl line.
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from harness import MakeServer, Server

ROUND_REQUESTS = 150
QUERY_LENGTH_MAX = 1_000  # the client itself refuses URLs beyond some length
QUICK_ROUNDS = 4
SLOW_ROUNDS = 150
ALLOWED_5XX = {501}  # "this version cannot do it" is an answer
NAMES = ["plain", "named", "nowhere", "a b", "東京", "..", "%", "x" * 300]
ODD: list[Any] = [
    None, True, -1, 0, 1.5, 2**63, 2**64, -(2**70), 1e308, "", "x", "\u0000", "a.b[]", "a..b", [], {},
    [[]], [None], {"": None}, {"a": {"b": []}}, ["x"] * 50, "é" * 300, [1.0, 2.0, 3.0, 4.0],
    {"indices": [1], "values": [1.0]}, {"text": "a", "model": "none-such"}, {"must": [{}]},
    "6ba7b810-9dad-11d1-80b4-00c04fd430c8", [[1.0, 2.0], [3.0]], {"key": "n", "range": {"gt": 1}},
]  # fmt: skip


class Generator:
    """JSON values of an OpenAPI schema."""

    def __init__(self, document: dict[str, Any], rng: random.Random) -> None:
        self.document, self.rng = document, rng

    def resolve(self, schema: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in schema:
            node: Any = self.document
            for part in schema["$ref"].removeprefix("#/").split("/"):
                node = node[part]
            schema = node
        return schema

    def value(self, schema: dict[str, Any] | bool, depth: int = 0) -> Any:
        if isinstance(schema, bool):
            return self.rng.choice(ODD)
        schema = self.resolve(schema)
        for key in ("anyOf", "oneOf", "allOf"):
            if key in schema:
                branches = schema[key]
                if depth > 6:  # the shallow ways out of a recursive schema come first
                    branches = sorted(branches, key=lambda b: len(json.dumps(self.resolve(b))))[:1]
                return self.value(self.rng.choice(branches), depth + 1)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return self.rng.choice(schema["enum"])
        kind = schema.get("type")
        if isinstance(kind, list):
            kind = self.rng.choice(kind)
        return self._of_kind(kind, schema, depth)

    def _of_kind(self, kind: str | None, schema: dict[str, Any], depth: int) -> Any:
        if kind == "object":
            return self._object(schema, depth)
        if kind == "array":
            count = max(
                schema.get("minItems", 0), self.rng.choice([0, 1, 2, 4]) if depth < 8 else 0
            )
            items = schema.get("items", True)
            return [self.value(items, depth + 1) for _ in range(min(count, 8))]
        if kind == "integer":
            low = schema.get("minimum", 0)
            return self.rng.choice([low, low + 1, 3, 10, schema.get("maximum", 100)])
        if kind == "number":
            return self.rng.choice([0.0, 1.0, -1.5, 3, 1e-3])
        if kind == "boolean":
            return self.rng.random() < 0.5
        if kind == "null":
            return None
        if kind == "string":
            return self.rng.choice(
                ["n", "a", "b", "city", "a.b", "items[].x", "", "all-minilm-l6-v2"]
            )
        return self.rng.choice(ODD)

    def _object(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        made = {}
        required = set(schema.get("required", []))
        for key, inner in schema.get("properties", {}).items():
            if key in required or (depth < 8 and self.rng.random() < 0.4):
                made[key] = self.value(inner, depth + 1)
        extra = schema.get("additionalProperties")
        if extra and depth < 8:
            for key in self.rng.sample(["a", "b", "", "n", "s"], self.rng.randint(0, 2)):
                made[key] = self.value(extra, depth + 1)
        return made

    def mutated(self, value: Any) -> Any:
        """With one to three places replaced by something odd."""
        root = [copy.deepcopy(value)]
        for _ in range(self.rng.randint(1, 3)):
            places = list(_places(root))
            holder, key = self.rng.choice(places)
            if self.rng.random() < 0.2 and isinstance(holder, dict):
                holder["surprise"] = self.rng.choice(ODD)
            else:
                holder[key] = copy.deepcopy(self.rng.choice(ODD))
        return root[0]


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    pairs = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in list(pairs):
        yield node, key
        if isinstance(value, dict | list):
            yield from _places(value)


class Fuzzer:
    def __init__(self, http: httpx.Client, seed: int) -> None:
        print(f"fuzz: seed {seed} (SHOAL_FUZZ_SEED)")
        self.http, self.rng = http, random.Random(seed)
        self.document = http.get("/openapi.json").json()
        self.generator = Generator(self.document, self.rng)
        self.operations = [
            (method.upper(), path, operation)
            for path, methods in sorted(self.document["paths"].items())
            for method, operation in sorted(methods.items())
            if method in ("get", "put", "post", "patch", "delete")
        ]
        self.statuses: dict[int, int] = {}

    def one(self) -> None:
        method, path, operation = self.rng.choice(self.operations)
        url = self._path(path)
        query = self._query(operation)
        body = self._body(operation)
        headers = {} if body is None else {"Content-Type": "application/json"}
        answer = self.http.request(method, url, params=query, content=body, headers=headers)
        self.statuses[answer.status_code] = self.statuses.get(answer.status_code, 0) + 1
        text = "" if body is None else body.decode(errors="replace")[:2000]
        shown = f" -d '{text}'" if text else ""
        curl = f"curl -X {method} '{answer.request.url}'{shown}"
        fine = answer.status_code < 500 or answer.status_code in ALLOWED_5XX
        assert fine, f"{answer.status_code} {answer.text[:500]}\n{curl}"
        if answer.status_code >= 400:
            told = answer.json()
            openai = path.startswith("/v1/")  # clients of that API read errors in its shape
            error = told["error"]["message"] if openai else told["status"]["error"]
            assert isinstance(error, str), curl
            assert error, curl

    def _path(self, path: str) -> str:
        while "{" in path:
            start, end = path.index("{"), path.index("}")
            name = path[start + 1 : end]
            if "collection" in name or name == "name":
                value = self.rng.choice(NAMES[:2] if self.rng.random() < 0.8 else NAMES)
            else:
                value = self.rng.choice(["1", "2", "abc", "-1", "n", "a.b[]", "é"])
            path = path[:start] + quote(value, safe="") + path[end + 1 :]
        return path

    def _query(self, operation: dict[str, Any]) -> dict[str, str]:
        made = {}
        for parameter in operation.get("parameters", []):
            parameter = self.generator.resolve(parameter)
            if parameter["in"] != "query" or self.rng.random() < 0.6:
                continue
            if self.rng.random() < 0.7:
                value = self.generator.value(parameter.get("schema", True))
            else:
                value = self.rng.choice(ODD)
            text = value if isinstance(value, str) else json.dumps(value)
            made[parameter["name"]] = text[:QUERY_LENGTH_MAX]
        return made

    def _body(self, operation: dict[str, Any]) -> bytes | None:
        if "requestBody" not in operation:
            return None
        content = self.generator.resolve(operation["requestBody"])["content"]
        if "application/json" not in content:
            return self.rng.randbytes(self.rng.choice([0, 1, 30]))
        value = self.generator.value(content["application/json"].get("schema", True))
        if self.rng.random() < 0.5:
            value = self.generator.mutated(value)
        text = json.dumps(value)
        return text[: len(text) // 2].encode() if self.rng.random() < 0.02 else text.encode()


def make_collections(http: httpx.Client) -> None:
    """Requests delete and change collections; each round begins with the same two."""
    for name in NAMES[:2]:
        http.delete(f"/collections/{name}").raise_for_status()
    plain = {"vectors": {"size": 4, "distance": "Cosine"}}
    named = {
        "vectors": {"a": {"size": 3, "distance": "Dot"}, "b": {"size": 2, "distance": "Euclid"}},
        "sparse_vectors": {"s": {}},
        "shard_number": 2,
    }
    http.put("/collections/plain", json=plain).raise_for_status()
    http.put("/collections/named", json=named).raise_for_status()
    points = [{"id": n, "vector": [1.0, 2.0, 3.0, n], "payload": {"n": n}} for n in range(5)]
    http.put("/collections/plain/points?wait=true", json={"points": points}).raise_for_status()


def fuzz(server: Server, seeds: range) -> None:
    with server.http() as http:
        for seed in seeds:
            make_collections(http)
            fuzzer = Fuzzer(http, seed)
            for _ in range(ROUND_REQUESTS):
                fuzzer.one()
            print(f"statuses: {dict(sorted(fuzzer.statuses.items()))}")
            for name in [
                c["name"] for c in http.get("/collections").json()["result"]["collections"]
            ]:
                http.delete(f"/collections/{quote(name, safe='')}").raise_for_status()
        assert http.get("/healthz").status_code == 200
    assert "Traceback" not in server.log(), server.log_tail()


def seeds(count: int) -> range:
    first = int(os.environ.get("SHOAL_FUZZ_SEED", 1))
    return range(first, first + (1 if "SHOAL_FUZZ_SEED" in os.environ else count))


def test_no_request_gets_a_500(make_server: MakeServer) -> None:
    fuzz(make_server(encoder_model="none"), seeds(QUICK_ROUNDS))


@pytest.mark.slow
def test_no_request_gets_a_500_for_long(make_server: MakeServer) -> None:
    fuzz(make_server(encoder_model="none"), seeds(SLOW_ROUNDS))
