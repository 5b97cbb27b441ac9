"""Readers beside writers: whatever is being sealed, merged or indexed, an answer is never wrong.

An update is a deletion and an insertion inside; no reader may see the moment between the two.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from harness import MakeServer, Server

POINTS = 400
DIM = 16
NAME = "busy"
ROUNDS = 60  # updates of each writer; each touches 40 points, so segments are sealed all the time


class Workers:
    """Threads that run until told to stop; the first failure is what the test reports."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.failures: list[BaseException] = []
        self._threads: list[threading.Thread] = []

    def add(self, server: Server, work: Callable[[httpx.Client], None]) -> threading.Thread:
        def run() -> None:
            try:
                with server.http() as http:
                    work(http)
            except BaseException as error:
                self.failures.append(error)
                self.stop.set()

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def join(self) -> None:
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a request hangs"
        if self.failures:
            raise self.failures[0]


def point(id_: int, version: int, rng: random.Random) -> dict[str, Any]:
    return {
        "id": id_,
        "vector": [rng.uniform(-1, 1) for _ in range(DIM)],
        "payload": {"tag": "all", "odd": id_ % 2, "version": version, "pad": "~" * 100},
    }


def post(http: httpx.Client, path: str, body: Any, method: str = "POST") -> Any:
    answer = http.request(method, f"/collections/{NAME}/points{path}", json=body)
    assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text[:300]}"
    return answer.json()["result"]


def tagged(key: str, value: Any) -> dict[str, Any]:
    return {"must": [{"key": key, "match": {"value": value}}]}


@pytest.mark.parametrize("shards", [1, 3])
def test_readers_never_see_half_an_update(make_server: MakeServer, shards: int) -> None:
    server: Server = make_server(seal_bytes=65_536)
    rng = random.Random(1)
    with server.http() as http:
        body = {
            "vectors": {"size": DIM, "distance": "Cosine"},
            "shard_number": shards,
            "hnsw_config": {"full_scan_threshold": 5},
        }
        http.put(f"/collections/{NAME}", json=body).raise_for_status()
        points = [point(id_, 0, rng) for id_ in range(POINTS)]
        post(http, "?wait=true", {"points": points}, "PUT")
    workers = Workers()

    def update(http: httpx.Client, own: range, seed: int) -> None:
        rng = random.Random(seed)
        for version in range(1, ROUNDS + 1):
            some = rng.sample(own, 40)
            post(http, "?wait=true", {"points": [point(i, version, rng) for i in some]}, "PUT")
            body = {"payload": {"seen": version}, "points": rng.sample(own, 5)}
            post(http, "/payload?wait=true", body)
            if workers.stop.is_set():
                return

    def count(http: httpx.Client) -> None:
        while not workers.stop.is_set():
            assert post(http, "/count", {"filter": tagged("tag", "all")})["count"] == POINTS
            assert post(http, "/count", {"filter": tagged("odd", 1)})["count"] == POINTS // 2

    def search(http: httpx.Client) -> None:
        rng = random.Random(2)
        while not workers.stop.is_set():
            body = {
                "query": [rng.uniform(-1, 1) for _ in range(DIM)],
                "limit": 50,
                "filter": tagged("odd", 0) if rng.random() < 0.5 else None,
                "with_payload": True,
            }
            hits = post(http, "/query", body)["points"]
            assert len({hit["id"] for hit in hits}) == 50, "never fewer than k, none twice"
            scores = [hit["score"] for hit in hits]
            assert scores == sorted(scores, reverse=True)

    def scroll(http: httpx.Client) -> None:
        while not workers.stop.is_set():
            found = post(http, "/scroll", {"limit": POINTS})["points"]
            assert [p["id"] for p in found] == list(range(POINTS))
            retrieved = post(http, "", {"ids": [3, 1, 399]})
            assert [p["id"] for p in retrieved] == [3, 1, 399]

    def own_writes(http: httpx.Client) -> None:
        """What was acknowledged is visible to the very next read."""
        rng = random.Random(3)
        version = 1_000_000
        while not workers.stop.is_set():
            version += 1
            # of the ids that no other writer touches
            post(http, "?wait=true", {"points": [point(POINTS - 1, version, rng)]}, "PUT")
            [found] = post(http, "", {"ids": [POINTS - 1]})
            assert found["payload"]["version"] == version
            body = {"filter": tagged("version", version)}
            assert post(http, "/count", body)["count"] == 1

    half = POINTS // 2
    writers = [
        workers.add(server, lambda http: update(http, range(half), 11)),
        workers.add(server, lambda http: update(http, range(half, POINTS - 1), 12)),
    ]
    for reader in (count, search, scroll, own_writes):
        workers.add(server, reader)
    for writer in writers:
        writer.join(120)
    workers.stop.set()
    workers.join()
    with server.http() as http:
        info = http.get(f"/collections/{NAME}").json()["result"]
    assert info["points_count"] == POINTS
    assert " sealed " in server.log(), "the run was too short to seal anything"


@pytest.mark.one_machine("it looks into the folder of one server")
def test_a_collection_made_again_is_empty(make_server: MakeServer) -> None:
    """The name is the same, the data is not: not in memory, and not after a restart."""
    server: Server = make_server(seal_bytes=65_536)
    rng = random.Random(4)
    body = {"vectors": {"size": DIM, "distance": "Dot"}}
    with server.http() as http:
        for _ in range(3):
            http.put(f"/collections/{NAME}", json=body).raise_for_status()
            points = [point(id_, 0, rng) for id_ in range(600)]
            post(http, "?wait=true", {"points": points}, "PUT")
            assert http.delete(f"/collections/{NAME}").json()["result"] is True
            assert http.get(f"/collections/{NAME}").status_code == 404
        http.put(f"/collections/{NAME}", json=body).raise_for_status()
        assert post(http, "/count", {})["count"] == 0
    assert len(list(server.data_dir.glob("shards/*"))) == 1, "the old shards are gone from the disk"
    server.restart(kill=True)
    with server.http() as http:
        assert post(http, "/count", {})["count"] == 0
        post(http, "?wait=true", {"points": [point(1, 1, rng)]}, "PUT")
        assert post(http, "/count", {})["count"] == 1


def test_many_clients_at_once(make_server: MakeServer) -> None:
    """Each writes to a collection of its own while the others come and go."""
    server: Server = make_server(seal_bytes=65_536)
    workers = Workers()

    def live(http: httpx.Client, number: int) -> None:
        for turn in range(5):
            name = f"own-{number}"
            body = {"vectors": {"size": 2, "distance": "Euclid"}}
            http.put(f"/collections/{name}", json=body).raise_for_status()
            points = [{"id": n, "vector": [float(n), float(turn)]} for n in range(50)]
            path = f"/collections/{name}/points"
            http.put(f"{path}?wait=true", json={"points": points}).raise_for_status()
            query = {"query": [7.0, float(turn)], "limit": 1}
            hits = http.post(f"{path}/query", json=query).json()["result"]["points"]
            assert [(hit["id"], hit["score"]) for hit in hits] == [(7, 0.0)]
            assert http.delete(f"/collections/{name}").json()["result"] is True

    for number in range(12):
        workers.add(server, lambda http, number=number: live(http, number))
    workers.join()
    with server.http() as http:
        assert http.get("/collections").json()["result"]["collections"] == []
