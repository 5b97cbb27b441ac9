"""Every malformed request: the right status, the error shape, a sentence that helps, no change.

Raw HTTP, because a client library would refuse most of these before they were sent.
"""

from __future__ import annotations

import json
import socket
import threading
import uuid
import warnings
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from cases import CASES, FILTER_CASES, Case, nested_filter
from harness import MakeServer, Server

from shoal.limits import BODY_BYTES_MAX, FILTER_DEPTH_MAX


@pytest.fixture(scope="module")
def names(shared_server: Server) -> Iterator[dict[str, str]]:
    """Two small collections with known points. Refused requests leave them as they are."""
    with shared_server.http() as http:
        yield from _make_collections(http)


def _make_collections(http: httpx.Client) -> Iterator[dict[str, str]]:
    made = {key: f"{key}-{uuid.uuid4().hex[:8]}" for key in ("plain", "named")}
    plain = {"vectors": {"size": 4, "distance": "Cosine"}}
    named = {
        "vectors": {
            "a": {"size": 3, "distance": "Dot"},
            "b": {"size": 2, "distance": "Euclid"},
            "m": {
                "size": 2,
                "distance": "Dot",
                "multivector_config": {"comparator": "max_sim"},
            },
        },
        "sparse_vectors": {"s": {}},
    }
    for body, name in ((plain, made["plain"]), (named, made["named"])):
        http.put(f"/collections/{name}", json=body).raise_for_status()
    points: dict[str, list[dict[str, Any]]] = {
        "plain": [
            {"id": n, "vector": [1.0, 0.0, 0.0, float(n)], "payload": {"n": n}} for n in range(5)
        ],
        "named": [
            {"id": n, "vector": {"a": [1.0, 2.0, 3.0]}, "payload": {"n": n}} for n in range(5)
        ],
    }
    for key, name in made.items():
        path = f"/collections/{name}/points?wait=true"
        http.put(path, json={"points": points[key]}).raise_for_status()
    yield made
    for name in made.values():
        http.delete(f"/collections/{name}").raise_for_status()


def send(http: httpx.Client, case: Case, names: dict[str, str]) -> httpx.Response:
    path = case.path
    for key, name in names.items():
        path = path.replace("{" + key + "}", name)
    if isinstance(case.body, bytes):
        content: bytes | None = case.body
    else:
        content = None if case.body is None else json.dumps(case.body).encode()
    headers = {"Content-Type": "application/json"} if content is not None else {}
    return http.request(case.method, path, content=content, headers=headers)


def assert_error(answer: httpx.Response, status: tuple[int, ...], says: str = "") -> None:
    """The shape of every error: {"status": {"error": sentence}, "time": s}, status first."""
    assert answer.status_code in status, f"{answer.status_code} {answer.text[:500]}"
    assert answer.headers["content-type"].startswith("application/json")
    body = answer.json()
    assert body.get("result") is None
    assert isinstance(body["time"], float)
    error = body["status"]["error"]
    assert len(error) >= 10, "a sentence"
    assert " " in error
    assert says in error, error
    assert "Traceback" not in error
    assert "pydantic" not in error.lower(), error
    assert answer.text.startswith('{"status":'), "clients keep only the first bytes of an error"


def snapshot(http: httpx.Client, names: dict[str, str]) -> list[Any]:
    taken = []
    for name in names.values():
        body = {"limit": 1000, "with_payload": True, "with_vector": True}
        taken.append(http.post(f"/collections/{name}/points/scroll", json=body).json()["result"])
        config = http.get(f"/collections/{name}").json()["result"]
        taken.append([config["points_count"], config["payload_schema"], config["config"]])
    return taken


@pytest.mark.parametrize("case", CASES, ids=str)
def test_malformed_request_is_refused_and_changes_nothing(
    case: Case, http: httpx.Client, names: dict[str, str]
) -> None:
    before = snapshot(http, names)
    assert_error(send(http, case, names), case.status, case.says)
    assert snapshot(http, names) == before


@pytest.mark.parametrize("where", ["query", "scroll", "count", "delete", "payload", "upsert"])
@pytest.mark.parametrize("what", FILTER_CASES, ids=lambda what: what.replace(" ", "-"))
def test_malformed_filter_is_refused_everywhere(
    what: str, where: str, http: httpx.Client, names: dict[str, str]
) -> None:
    """A filter that was dropped in silence would return, or delete, other people's points."""
    bodies: dict[str, tuple[str, str, dict[str, Any]]] = {
        "query": ("POST", "/query", {"query": [1.0, 0, 0, 0]}),
        "scroll": ("POST", "/scroll", {}),
        "count": ("POST", "/count", {}),
        "delete": ("POST", "/delete?wait=true", {}),
        "payload": ("POST", "/payload?wait=true", {"payload": {"changed": True}}),
        "upsert": ("PUT", "?wait=true", {"points": [{"id": 1, "vector": [0.0, 1.0, 0.0, 0.0]}]}),
    }
    method, path, body = bodies[where]
    field = "update_filter" if where == "upsert" else "filter"
    before = snapshot(http, names)
    answer = http.request(
        method,
        f"/collections/{names['plain']}/points{path}",
        json={**body, field: FILTER_CASES[what]},
    )
    assert_error(answer, (400, 422))
    assert snapshot(http, names) == before


def test_the_deepest_filter_allowed_works(http: httpx.Client, names: dict[str, str]) -> None:
    body = {"filter": nested_filter(FILTER_DEPTH_MAX - 2)}
    answer = http.post(f"/collections/{names['plain']}/points/count", json=body)
    assert answer.json()["result"]["count"] == 1


def test_same_id_twice_in_one_batch_last_wins(http: httpx.Client, names: dict[str, str]) -> None:
    points = [{"id": 7, "vector": [1.0, 0, 0, 0], "payload": {"turn": n}} for n in range(3)]
    path = f"/collections/{names['plain']}/points"
    http.put(f"{path}?wait=true", json={"points": points}).raise_for_status()
    assert http.get(f"{path}/7").json()["result"]["payload"] == {"turn": 2}
    http.post(f"{path}/delete?wait=true", json={"points": [7]}).raise_for_status()


# -- the body as a whole --------------------------------------------------------------------------
def exchange(server: Server, head: str, body: bytes) -> bytes:
    """Send raw bytes, and return what comes back until the server closes or has answered."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode())
        try:
            connection.sendall(body)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it had seen enough; its answer is still there to be read
        answer = b""
        while b"\r\n\r\n" not in answer or b'"time"' not in answer:
            part = connection.recv(65_536)
            if not part:
                break
            answer += part
        return answer


def test_announced_body_beyond_the_limit_gets_413(
    server: Server, http: httpx.Client, names: dict[str, str]
) -> None:
    """Refused by its length alone, before it is sent."""
    head = (
        f"PUT /collections/{names['plain']}/points HTTP/1.1\nHost: x\n"
        f"Content-Type: application/json\nContent-Length: {BODY_BYTES_MAX + 1}\n\n"
    )
    answer = exchange(server, head, b'{"points": [')
    assert answer.startswith(b"HTTP/1.1 413"), answer[:300]
    assert b'{"status":{"error":' in answer
    assert http.get("/healthz").status_code == 200


def test_chunked_body_beyond_the_limit_gets_413(
    server: Server, http: httpx.Client, names: dict[str, str]
) -> None:
    head = (
        f"PUT /collections/{names['plain']}/points HTTP/1.1\nHost: x\n"
        "Content-Type: application/json\nTransfer-Encoding: chunked\n\n"
    )
    chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    answer = exchange(server, head, chunk * (BODY_BYTES_MAX // 0x100000 + 2) + b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413"), answer[:300]
    assert http.get("/healthz").status_code == 200


# -- routes ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/collections/x/points/1/2/3", 404),
        ("POST", "/collectionsx", 404),
        ("PATCH", "/collections", 405),
        ("DELETE", "/collections", 405),
        ("GET", "/collections/x/points/query", 405),
        ("POST", "/healthz", 405),
    ],
)
def test_unknown_routes_and_methods(
    http: httpx.Client, method: str, path: str, status: int
) -> None:
    answer = http.request(method, path)
    # `GET …/points/query` may also be read as a point whose id is "query"
    allowed = (status, 400, 404) if path.endswith("query") else (status,)
    assert_error(answer, allowed)


def test_root_and_health(http: httpx.Client) -> None:
    root = http.get("/").json()
    assert [int(part) for part in root["version"].split(".")][:2] == [1, 19]
    assert "qdrant" not in root["title"].lower()
    for path in ("/healthz", "/livez", "/readyz", "/openapi.json", "/dashboard"):
        assert http.get(path).status_code == 200, path
    assert http.head("/healthz").status_code in (200, 405)


def test_clients_greet_it_without_a_warning(server: Server) -> None:
    """A client asks for the version from a thread when it is made, and warns of a mismatch."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = set(threading.enumerate())
        client = server.client(check_compatibility=True)
        for thread in set(threading.enumerate()) - before:
            thread.join(30)
        client.close()
    assert [str(warning.message) for warning in caught] == []


def test_deleting_a_missing_collection_is_no_error(http: httpx.Client) -> None:
    answer = http.delete("/collections/nowhere")
    assert answer.status_code == 200
    assert answer.json()["result"] is False


@pytest.mark.parametrize(
    "name", ["東京", "a b", "ünï-cödé", "50%", "a+b", "x" * 80, "q?&=#", "a.b"]
)
def test_collection_names_are_percent_encoded(http: httpx.Client, name: str) -> None:
    path = f"/collections/{quote(name, safe='')}"
    body = {"vectors": {"size": 2, "distance": "Dot"}}
    http.put(path, json=body).raise_for_status()
    try:
        point = {"id": 1, "vector": [1.0, 2.0], "payload": {"name": name}}
        http.put(f"{path}/points?wait=true", json={"points": [point]}).raise_for_status()
        answer = http.post(f"{path}/points/query", json={"query": [1.0, 1.0], "with_payload": True})
        assert answer.json()["result"]["points"][0]["payload"] == {"name": name}
        listed = http.get("/collections").json()["result"]["collections"]
        assert {"name": name} in listed
        assert http.get(f"{path}/exists").json()["result"] == {"exists": True}
    finally:
        assert http.delete(path).json()["result"] is True


def test_index_names_are_percent_encoded(http: httpx.Client, names: dict[str, str]) -> None:
    path = f"/collections/{names['plain']}"
    body = {"field_name": "a.b[]", "field_schema": "keyword"}
    http.put(f"{path}/index?wait=true", json=body).raise_for_status()
    assert "a.b[]" in http.get(path).json()["result"]["payload_schema"]
    encoded = quote("a.b[]", safe="")
    http.delete(f"{path}/index/{encoded}?wait=true").raise_for_status()
    assert http.get(path).json()["result"]["payload_schema"] == {}


# -- who may do what ------------------------------------------------------------------------------
def test_api_keys(make_server: MakeServer) -> None:
    server: Server = make_server(api_key="write-secret", read_only_api_key="read-secret")
    write, read = {"api-key": "write-secret"}, {"Authorization": "Bearer read-secret"}
    body = {"vectors": {"size": 2, "distance": "Dot"}}
    points = {"points": [{"id": 1, "vector": [1.0, 2.0]}]}
    with server.http() as http:
        for headers in ({}, {"api-key": "wrong"}, {"Authorization": "Bearer wrong"}):
            assert_error(http.get("/collections", headers=headers), (401,))
            assert_error(http.put("/collections/c", json=body, headers=headers), (401,))
        assert_error(http.put("/collections/c", json=body, headers=read), (403,))
        assert http.put("/collections/c", json=body, headers=write).status_code == 200
        assert_error(http.put("/collections/c/points", json=points, headers=read), (403,))
        put = http.put("/collections/c/points?wait=true", json=points, headers=write)
        assert put.status_code == 200
        delete = http.post("/collections/c/points/delete", json={"points": [1]}, headers=read)
        assert_error(delete, (403,))
        assert_error(http.delete("/collections/c", headers=read), (403,))
        # the paths that read, POST or GET, are open to the reading key
        query = http.post("/collections/c/points/query", json={"query": [1.0, 1.0]}, headers=read)
        assert len(query.json()["result"]["points"]) == 1
        scroll = http.post("/collections/c/points/scroll", json={}, headers=read)
        assert len(scroll.json()["result"]["points"]) == 1
        assert http.get("/collections/c", headers=read).status_code == 200
        for path in ("/healthz", "/livez", "/readyz"):
            assert http.get(path).status_code == 200, "a probe has no key"
    with pytest.warns(UserWarning, match="insecure connection"):
        with_key = server.client(api_key="read-secret")
    assert with_key.count("c").count == 1
    with_key.close()
    assert "secret" not in server.log()
