"""Clients under which a cluster is broken: they write and read without a pause, keep a ledger of what
was acknowledged, and measure for how long nothing was answered.

Built on the ledger of the crash tests. What is new: an operation may fail and have happened all the
same, now or later. Its points are then left alone for good; at the end they may have either content.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from ledger import DIM_A, DIM_B, Change, Content, Ledger

__all__ = ["COLLECTION", "Gaps", "Reader", "Writer", "create_collection", "verify"]

COLLECTION = "faults"
IDS_PER_WRITER = 4_000
TYPED = {408, 429, 503, 507}  # what a client may be told while something is broken
REQUEST_S_MAX = 60.0


def create_collection(http: httpx.Client, *, shards: int = 3, replicas: int = 3) -> None:
    body = {
        "vectors": {
            "a": {"size": DIM_A, "distance": "Dot"},
            "b": {"size": DIM_B, "distance": "Euclid"},
        },
        "shard_number": shards,
        "replication_factor": replicas,
        "write_consistency_factor": min(2, replicas),
        "hnsw_config": {"m": 8, "ef_construct": 40, "full_scan_threshold": 10},
    }
    http.put(f"/collections/{COLLECTION}", json=body).raise_for_status()


@dataclass
class Gaps:
    """When something last succeeded, and the longest time in which nothing did."""

    last: float = field(default_factory=time.monotonic)
    longest_s: float = 0.0

    def success(self) -> None:
        now = time.monotonic()
        self.longest_s, self.last = max(self.longest_s, now - self.last), now

    def close(self) -> float:
        """The longest gap, the one that is still open included; counts anew from here."""
        self.success()
        longest, self.longest_s = self.longest_s, 0.0
        return longest


class FaultLedger(Ledger):
    """A ledger whose operations may end unknown."""

    def __init__(self) -> None:
        super().__init__()
        self.doubtful: dict[int, set[Content | None]] = {}

    def refused(self) -> None:
        """The operation in flight did not happen."""
        self.pending = {}

    def unknown(self) -> None:
        """The operation in flight may have happened, or may still."""
        for id_, content in self.pending.items():
            self.doubtful[id_] = {self.acknowledged.pop(id_, None), content}
        self.pending = {}

    def check(self, points: Mapping[int, Mapping[str, Any]]) -> list[str]:
        """Of the points in doubt each must be one of the two, whole."""
        assert not self.pending
        wrong = []
        for id_, contents in self.doubtful.items():
            found = points.get(id_)
            trial = [Ledger({id_: c} if c is not None else {}) for c in contents]
            here = {id_: found} if found is not None else {}
            complaints = [ledger.check(here) for ledger in trial]
            if all(complaints):
                wrong += complaints[0]
        rest = {id_: point for id_, point in points.items() if id_ not in self.doubtful}
        return wrong + super().check(rest)


class _Client:
    """A thread that works until `stop`. urls: the coordinators; after an error the next one is asked."""

    def __init__(self, name: str, urls: Sequence[str]) -> None:
        self.name, self._urls = name, list(urls)
        self.gaps = Gaps()
        self.failure: str | None = None
        self.errors: dict[str, int] = {}  # what clients were told, and how often
        self._stop = threading.Event()
        self._thread = threading.Thread()

    def start(self) -> None:
        """May be called again after `stop`."""
        self._stop.clear()
        self.gaps = Gaps()
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._thread.start()

    def give_up(self) -> None:
        """Begin to stop; nobody waits."""
        self._stop.set()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(REQUEST_S_MAX + 30)
        assert not self._thread.is_alive(), f"{self.name} hangs: a request got no answer and no end"
        assert self.failure is None, f"{self.name}: {self.failure}"

    def _run(self) -> None:
        number = 0
        while not self._stop.is_set() and self.failure is None:
            with httpx.Client(
                base_url=self._urls[number % len(self._urls)],
                timeout=REQUEST_S_MAX,
                trust_env=False,
                verify=False,  # plain HTTP: the certificates need not be read for each client
            ) as http:
                while not self._stop.is_set() and self.failure is None:
                    if not self._once(http):
                        self._stop.wait(0.02)
                        break
            number += 1

    def _once(self, http: httpx.Client) -> bool:
        """One operation; False: ask another coordinator next."""
        raise NotImplementedError

    def _told(self, what: str) -> None:
        self.errors[what] = self.errors.get(what, 0) + 1


class Writer(_Client):
    """Owns the ids number * IDS_PER_WRITER … and writes them alone, one operation at a time."""

    def __init__(self, number: int, seed: int, urls: Sequence[str]) -> None:
        super().__init__(
            f"writer {number}", urls[number % len(urls) :] + urls[: number % len(urls)]
        )
        self.rng = random.Random(f"{seed}/{number}")
        self.ids = range(number * IDS_PER_WRITER, (number + 1) * IDS_PER_WRITER)
        self.ledger = FaultLedger()
        self.version = 0

    def _once(self, http: httpx.Client) -> bool:
        path, method, body, change = self._operation()
        self.ledger.sent(change)
        try:
            answer = http.request(
                method, f"/collections/{COLLECTION}{path}", params={"wait": "true"}, json=body
            )
        except httpx.ConnectError as error:
            self.ledger.refused()
            self._told(type(error).__name__)
            return False
        except httpx.TransportError as error:
            self.ledger.unknown()
            self._told(type(error).__name__)
            return False
        if answer.status_code == 200:
            self.ledger.answered()
            self.gaps.success()
            return True
        self._told(str(answer.status_code))
        if answer.status_code not in TYPED:
            self.failure = f"{method} {path}: {answer.status_code} {answer.text[:500]}"
        if answer.headers.get("shoal-maybe-applied") == "false":
            self.ledger.refused()
        else:
            self.ledger.unknown()
        return False

    def _operation(self) -> tuple[str, str, Any, Change]:
        self.version += 1
        mine = sorted(self.ledger.acknowledged)
        if self.rng.random() < 0.2 and len(mine) >= 50:
            some = self.rng.sample(mine, self.rng.randint(1, 8))
            return "/points/delete", "POST", {"points": some}, dict.fromkeys(some)
        free = [id_ for id_ in self.rng.sample(self.ids, 24) if id_ not in self.ledger.doubtful]
        ids = free[: self.rng.choice([1, 4, 16])]
        change = {id_: Content(self.version, self.version) for id_ in ids}
        points = [content.point_json(id_) for id_, content in change.items()]
        return "/points", "PUT", {"points": points}, change


class Reader(_Client):
    """Searches and counts; every answer must be one that can be true."""

    def __init__(self, urls: Sequence[str], seed: int) -> None:
        super().__init__("reader", urls)
        self.rng = random.Random(f"{seed}/reader")

    def _once(self, http: httpx.Client) -> bool:
        body = {"query": [self.rng.random() * 30 for _ in range(DIM_B)], "using": "b", "limit": 5}
        try:
            answer = http.post(f"/collections/{COLLECTION}/points/query", json=body)
        except httpx.TransportError as error:
            self._told(type(error).__name__)
            return False
        if answer.status_code == 200:
            self.gaps.success()
            return True
        self._told(str(answer.status_code))
        if answer.status_code not in TYPED:
            self.failure = f"search: {answer.status_code} {answer.text[:500]}"
        return False


def verify(http: httpx.Client, writers: Sequence[Writer], story: str) -> int:
    """Everything that was acknowledged is there, nothing that was deleted, nothing else; the number
    of points. Asks the primaries (consistency=all)."""
    points: dict[int, Any] = {}
    offset: Any = None
    while True:
        body = {"limit": 1000, "offset": offset, "with_payload": True, "with_vector": True}
        answer = http.post(
            f"/collections/{COLLECTION}/points/scroll", params={"consistency": "all"}, json=body
        )
        assert answer.status_code == 200, f"{story}: {answer.status_code} {answer.text[:500]}"
        page = answer.json()["result"]
        points |= {point["id"]: point for point in page["points"]}
        if (offset := page["next_page_offset"]) is None:
            break
    for writer in writers:
        own = {id_: point for id_, point in points.items() if id_ in writer.ids}
        wrong = writer.ledger.check(own)
        assert not wrong, f"{story}: {len(wrong)} points are wrong:\n" + "\n".join(wrong[:10])
    strangers = [id_ for id_ in points if not any(id_ in writer.ids for writer in writers)]
    assert not strangers, f"{story}: points that nobody wrote: {strangers[:10]}"
    return len(points)
