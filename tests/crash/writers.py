"""Writers of known points: threads that send operations until the server dies or they are told to
stop, and keep a ledger of what was acknowledged."""

from __future__ import annotations

import random
import threading
from typing import Any

import httpx
from harness import Server
from ledger import DIM_A, DIM_B, Change, Content, Ledger

__all__ = ["COLLECTION", "Writer", "create_collection", "read_all", "verify"]

COLLECTION = "crash"
IDS_PER_WRITER = 1_000
SHARDS = 2


def create_collection(server: Server, name: str = COLLECTION, *, shards: int = SHARDS) -> None:
    """Two vectors, and a graph for every segment that can have one."""
    body = {
        "vectors": {
            "a": {"size": DIM_A, "distance": "Dot"},
            "b": {"size": DIM_B, "distance": "Euclid"},
        },
        "shard_number": shards,
        "hnsw_config": {"m": 8, "ef_construct": 40, "full_scan_threshold": 10},
    }
    with server.http() as http:
        http.put(f"/collections/{name}", json=body).raise_for_status()


class Writer:
    """Owns the ids number * IDS_PER_WRITER … and works on them alone, one operation at a time."""

    def __init__(self, number: int, seed: int) -> None:
        self.rng = random.Random(f"{seed}/{number}")
        self.ids = range(number * IDS_PER_WRITER, (number + 1) * IDS_PER_WRITER)
        self.ledger = Ledger()
        self.version = 0
        self.failure: str | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, server: Server) -> None:
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, args=(server.http(),), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Wait until it has noticed that the server is gone, or finished what it was doing."""
        assert self._thread is not None
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "a writer hangs: a request got neither answer nor end"
        assert self.failure is None, self.failure

    def _run(self, http: httpx.Client) -> None:
        with http:
            while not self._stop.is_set():
                method, path, body, change = self._operation()
                self.ledger.sent(change)
                try:
                    answer = http.request(
                        method,
                        f"/collections/{COLLECTION}{path}",
                        params={"wait": "true"},
                        json=body,
                    )
                except httpx.TransportError:
                    return  # the server died; the operation stays pending
                if answer.status_code != 200:
                    self.failure = f"{method} {path}: {answer.status_code} {answer.text[:500]}"
                    return
                self.ledger.answered()

    # -- operations -------------------------------------------------------------------------------
    def _operation(self) -> tuple[str, str, Any, Change]:
        self.version += 1
        kind = self.rng.random()
        existing = sorted(self.ledger.acknowledged)
        if kind < 0.55 or len(existing) < 50:
            return self._upsert()
        some = self.rng.sample(existing, self.rng.randint(1, 12))
        if kind < 0.70:
            return "POST", "/points/delete", {"points": some}, dict.fromkeys(some)
        if kind < 0.76:
            return self._delete_by_filter(existing)
        if kind < 0.90:
            return self._set_payload(some)
        return self._update_vectors(some)

    def _upsert(self) -> tuple[str, str, Any, Change]:
        ids = self.rng.sample(self.ids, self.rng.choice([1, 5, 20, 40]))
        change = {id_: Content(self.version, self.version) for id_ in ids}
        points = [content.point_json(id_) for id_, content in change.items()]
        return "PUT", "/points", {"points": points}, change

    def _delete_by_filter(self, existing: list[int]) -> tuple[str, str, Any, Change]:
        start = self.rng.choice(existing)
        end = start + self.rng.randint(1, 15)
        own = min(end, self.ids.stop)
        where = {"must": [{"key": "id", "range": {"gte": start, "lt": own}}]}
        gone = [id_ for id_ in existing if start <= id_ < own]
        return "POST", "/points/delete", {"filter": where}, dict.fromkeys(gone)

    def _set_payload(self, ids: list[int]) -> tuple[str, str, Any, Change]:
        """Each point's payload has its id in it, so one operation changes one point."""
        id_ = ids[0]
        content = Content(self.ledger.acknowledged[id_].vectors, self.version)
        body = {"payload": content.payload_json(id_), "points": [id_]}
        return "POST", "/points/payload", body, {id_: content}

    def _update_vectors(self, ids: list[int]) -> tuple[str, str, Any, Change]:
        change = {id_: Content(self.version, self.ledger.acknowledged[id_].payload) for id_ in ids}
        points = [{"id": id_, "vector": c.vectors_json(id_)} for id_, c in change.items()]
        return "PUT", "/points/vectors", {"points": points}, change


def verify(server: Server, writers: list[Writer], story: str) -> None:
    """Everything that was acknowledged is there, nothing else is, and all ways to ask agree."""
    with server.http() as http:
        points = read_all(http)
        total = _post(http, "/points/count", {"exact": True})["count"]
        odd = {"must": [{"key": "odd", "match": {"value": True}}]}
        odd_total = _post(http, "/points/count", {"filter": odd, "exact": True})["count"]
        for writer in writers:
            own = {id_: point for id_, point in points.items() if id_ in writer.ids}
            wrong = writer.ledger.check(own)
            assert not wrong, f"{story}: {len(wrong)} points are wrong:\n" + "\n".join(wrong[:10])
        strangers = [id_ for id_ in points if not any(id_ in writer.ids for writer in writers)]
        assert not strangers, f"{story}: points that nobody wrote: {strangers[:10]}"
        assert total == len(points), f"{story}: count says {total}, a scroll has {len(points)}"
        assert odd_total == sum(id_ % 2 for id_ in points), f"{story}: filtered count {odd_total}"
        for writer in writers:
            _verify_search(http, writer, story)


def _verify_search(http: httpx.Client, writer: Writer, story: str) -> None:
    """A few points are found by their own vectors, with and without an index."""
    existing = sorted(writer.ledger.acknowledged)
    for id_ in writer.rng.sample(existing, min(3, len(existing))):
        vector = writer.ledger.acknowledged[id_].vectors_json(id_)["b"]
        for exact in (True, False):
            body = {
                "query": vector,
                "using": "b",
                "limit": 1,
                "params": {"exact": exact},
                "filter": {"must": [{"has_id": [id_]}]},
            }
            hits = _post(http, "/points/query", body)["points"]
            assert [hit["id"] for hit in hits] == [id_], f"{story}: searched {id_}, found {hits}"
            assert abs(hits[0]["score"]) < 1e-3, f"{story}: {id_} is not at its own vector: {hits}"


def read_all(http: httpx.Client, name: str = COLLECTION) -> dict[int, Any]:
    points: dict[int, Any] = {}
    offset: Any = None
    while True:
        body = {"limit": 1000, "offset": offset, "with_payload": True, "with_vector": True}
        page = _post(http, "/points/scroll", body, name)
        for point in page["points"]:
            assert point["id"] not in points, f"point {point['id']} twice in one scroll"
            points[point["id"]] = point
        if (offset := page["next_page_offset"]) is None:
            return points


def _post(http: httpx.Client, path: str, body: Any, name: str = COLLECTION) -> Any:
    answer = http.post(f"/collections/{name}{path}", json=body)
    assert answer.status_code == 200, f"POST {path}: {answer.status_code} {answer.text[:500]}"
    return answer.json()["result"]
