"""One load test: a target, a plan, what is sent, the runs, and what is written about them."""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import numpy as np
from figure import draw
from openloop import Outcomes, Row, markdown, poisson, summary
from traffic import Flow, Grpc, Http, Way, play

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.harness import http_request, machine  # noqa: E402
from shoal.batch import DenseBlock, PointBatch  # noqa: E402
from shoal.ids import PointIds  # noqa: E402
from shoal.local_cluster import LocalCluster  # noqa: E402
from shoal.v1 import points_pb2 as pb  # noqa: E402

__all__ = [
    "ALONE",
    "DURING",
    "QUICK",
    "Found",
    "Plan",
    "Target",
    "local_target",
    "measure",
    "write",
]

COLLECTION = "load-test"
DIM, LIMIT, BATCH, QUERIES = 128, 10, 100, 256
LAYOUT = {"etcd": 1, "coordinator": 1, "storage-node": 3, "monitor": 1}
ALONE, DURING = "searches alone", "searches during inserts"
SETTLE_S_MAX = 60.0

Found = dict[str, dict[str, list[Row]]]  # way in -> sort of load, or "inserts" -> rows by rate


@dataclass(frozen=True)
class Plan:
    """rates      searches a second, ascending
    insert_rate  batches of BATCH points a second, during inserts
    run_s        how long arrivals go on, for each run; drain_s: how long answers may take after it
    points       in the collection
    budget_s     of all runs together: those that would begin later are left out, and that is said
    """

    rates: tuple[float, ...] = (50, 100, 200, 400, 800)
    insert_rate: float = 5.0
    run_s: float = 8.0
    drain_s: float = 4.0
    points: int = 10_000
    budget_s: float = 255.0
    seed: int = 1


QUICK = Plan(rates=(20, 80), run_s=2.0, drain_s=2.0, points=1_000, budget_s=25.0)


@dataclass(frozen=True)
class Target:
    """http, grpc: host and port; grpc may be missing. about: for the report."""

    http: tuple[str, int]
    grpc: tuple[str, int] | None
    about: str
    key: str = ""


# -- what is asked ---------------------------------------------------------------------------------
def some_vectors(count: int, dice: np.random.Generator) -> np.ndarray:
    """(count, DIM) float32 around a hundred centres: neither noise nor all the same."""
    centres = np.random.default_rng(0).standard_normal((100, DIM))
    drawn = centres[dice.integers(0, 100, count)] + 0.5 * dice.standard_normal((count, DIM))
    return drawn.astype(np.float32)


def payload(number: int) -> dict[str, Any]:
    return {"title": f"the point with number {number}", "group": number % 10, "draw": number % 997}


def batch_of(ids: np.ndarray, dice: np.random.Generator) -> PointBatch:
    points = PointBatch(PointIds(ids.astype(np.uint64)))
    points.dense[""] = DenseBlock(some_vectors(len(ids), dice))
    points.set_payloads([json.dumps(payload(int(number))).encode() for number in ids])
    return points


def prepare(target: Target, plan: Plan, dice: np.random.Generator) -> None:
    """The collection anew, with all its points, settled. Raises httpx.HTTPError."""
    host, port = target.http
    headers = {"api-key": target.key} if target.key else {}
    with httpx.Client(
        base_url=f"http://{host}:{port}", headers=headers, timeout=60.0, trust_env=False
    ) as http:
        nodes = len(http.get("/cluster").json()["result"].get("peers", {})) or 1
        http.delete(f"/collections/{COLLECTION}").raise_for_status()
        body = {
            "vectors": {"size": DIM, "distance": "Cosine"},
            "shard_number": 3,
            "replication_factor": min(3, max(1, nodes)),
        }
        answer = http.put(f"/collections/{COLLECTION}", json=body)
        if answer.status_code != 200:
            raise SystemExit(f"the collection cannot be made: {answer.text}")
        for start in range(0, plan.points, 1_000):
            ids = np.arange(start, min(start + 1_000, plan.points))
            http.put(
                f"/shoal/v1/collections/{COLLECTION}/batches",
                content=batch_of(ids, dice).to_wire().SerializeToString(),
                headers={"content-type": "application/x-protobuf"},
            ).raise_for_status()
        deadline = time.monotonic() + SETTLE_S_MAX
        pause = threading.Event()
        while time.monotonic() < deadline:
            info = http.get(f"/collections/{COLLECTION}").json()["result"]
            if info["status"] == "green":
                break
            pause.wait(0.2)


class Requests:
    """Everything that is sent, made beforehand: the generator only writes bytes."""

    def __init__(self, target: Target, plan: Plan, dice: np.random.Generator) -> None:
        queries = some_vectors(QUERIES, dice)
        key = f"api-key: {target.key}\r\n".encode() if target.key else b""
        self._key = target.key
        self.http_search = [
            _with_key(
                http_request(
                    "POST",
                    f"/collections/{COLLECTION}/points/query",
                    {"query": query.tolist(), "limit": LIMIT, "with_payload": True},
                ),
                key,
            )
            for query in queries
        ]
        self.grpc_search = []
        for query in queries:
            search = pb.SearchRequest(
                collection=COLLECTION, vector=query.astype("<f4").tobytes(), limit=LIMIT
            )
            search.with_payload.all = True
            self.grpc_search.append(search)
        self.http_insert, self.grpc_insert = [], []
        for _ in range(32):
            ids = np.sort(dice.choice(plan.points, min(BATCH, plan.points), replace=False))
            points = batch_of(ids, dice)
            rows = points.dense[""].values.tolist()
            listed = [
                {"id": int(number), "vector": rows[row], "payload": payload(int(number))}
                for row, number in enumerate(ids)
            ]
            path = f"/collections/{COLLECTION}/points?wait=true"
            self.http_insert.append(_with_key(http_request("PUT", path, {"points": listed}), key))
            upsert = pb.UpsertRequest(collection=COLLECTION, wait=True)
            points.fill(upsert.points)
            self.grpc_insert.append(upsert)


def _with_key(request: bytes, key: bytes) -> bytes:
    return request.replace(b"\r\n\r\n", b"\r\n" + key + b"\r\n", 1) if key else request


# -- runs ------------------------------------------------------------------------------------------
async def measure(target: Target, plan: Plan, say: Callable[[str], None] = print) -> Found:
    """way in -> sort of load -> rows, searches and for the second sort inserts, by rate."""
    dice = np.random.default_rng(plan.seed)
    prepare(target, plan, dice)
    requests = Requests(target, plan, dice)
    began = time.monotonic()
    ways = ["HTTP"] + (["gRPC"] if target.grpc else [])
    found: Found = {}
    for way in ways:
        found[way] = {ALONE: [], DURING: [], "inserts": []}
        await _run(target, way, requests, plan.rates[0], 0.0, 1.0, plan, dice)  # warm; not counted
        for rate in plan.rates:
            for load in (ALONE, DURING):
                if time.monotonic() - began + plan.run_s + plan.drain_s > plan.budget_s:
                    say(f"{way}, {rate:g}/s, {load}: left out, the time is up")
                    continue
                inserts = plan.insert_rate if load is DURING else 0.0
                rows = await _run(target, way, requests, rate, inserts, plan.run_s, plan, dice)
                found[way][load].append(rows[0])
                found[way]["inserts"] += rows[1:]
                p50, p99 = rows[0].percentiles[0], rows[0].percentiles[2]
                say(f"{way}, {rate:g}/s, {load}: p50 {p50:.1f} ms, p99 {p99:.1f} ms")
    return found


async def _run(
    target: Target,
    way: str,
    requests: Requests,
    rate: float,
    insert_rate: float,
    seconds: float,
    plan: Plan,
    dice: np.random.Generator,
) -> list[Row]:
    """Searches, and inserts where there are any."""
    searches, inserts = poisson(rate, seconds, dice), np.empty(0)
    if insert_rate:
        inserts = poisson(insert_rate, seconds, dice)
    while not len(searches) or (insert_rate and not len(inserts)):  # a short run of a low rate
        searches = poisson(rate, seconds, dice)
        inserts = poisson(insert_rate, seconds, dice) if insert_rate else inserts
    first = int(dice.integers(0, QUERIES))
    async with _channel(target if way == "gRPC" else None) as channel:
        flows = [Flow(_way(target, channel, requests, first, insert=False), Outcomes(searches))]
        if insert_rate:
            flows.append(
                Flow(_way(target, channel, requests, first, insert=True), Outcomes(inserts))
            )
        await play(flows, drain_s=plan.drain_s)
    rows = [summary(f"{way}, {DURING if insert_rate else ALONE}", rate, flows[0].outcomes)]
    if insert_rate:
        name = f"{way}, inserts beside {rate:g} searches/s"
        rows.append(summary(name, insert_rate, flows[1].outcomes))
    return rows


def _channel(target: Target | None) -> Any:
    if target is None or target.grpc is None:
        return nullcontext()
    return grpc.aio.insecure_channel(f"{target.grpc[0]}:{target.grpc[1]}")


def _way(target: Target, channel: Any, requests: Requests, first: int, *, insert: bool) -> Way:
    if channel is None:
        return Http(*target.http, requests.http_insert if insert else requests.http_search, first)
    chosen: list[Any] = requests.grpc_insert if insert else requests.grpc_search
    return Grpc(channel, chosen, first, target.key)


# -- where -----------------------------------------------------------------------------------------
@contextmanager
def local_target() -> Iterator[Target]:
    """A cluster of processes on this machine, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="shoal-load-") as folder:
        cluster = LocalCluster(
            Path(folder) / "cluster",
            layout=LAYOUT,
            settings={"coordinator": {"encoder_model": "none"}},
        )
        try:
            cluster.start()
            http, grpc_port = cluster["c1"].plan.ports
            yield Target(
                ("127.0.0.1", http),
                ("127.0.0.1", grpc_port),
                "1 coordinator, 3 storage nodes, 1 etcd and 1 monitor, all on this machine, and the "
                "generator beside them",
            )
            cluster.stop()
        finally:
            cluster.kill9()


# -- the report ------------------------------------------------------------------------------------
def write(folder: Path, target: Target, plan: Plan, found: dict[str, dict[str, list[Row]]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    about = machine()
    rows = [row for loads in found.values() for some in loads.values() for row in some]
    where = (
        f"{about['date']}, commit {about['commit']}, {about['cpu']}, {about['cores']} cores, load "
        f"{about['load_1m']:.1f} at the end"
    )
    text = [
        "# Latency against offered rate",
        "",
        "![latency against offered rate](load.png)",
        "",
        markdown(rows),
        f"How: open loop. Arrivals are a Poisson process that was drawn beforehand (seed {plan.seed}), "
        f"{plan.run_s:g} s for each row; a latency begins at the moment of arrival, whether or not the "
        "generator was in time, and an arrival without a good answer within "
        f"{plan.drain_s:g} s of the last counts as infinitely late (∞). Where the generator's own lag "
        "is marked *, it fell behind and latencies are an upper bound. "
        f"{plan.points:,} points of {DIM} dimensions, 3 shards with up to 3 replicas; a search asks "
        f"for {LIMIT} points with payload; inserts replace {BATCH} points at a time, durable on all "
        f"replicas when answered. Over HTTP JSON on kept connections, over gRPC one SearchStream and "
        f"one UpsertStream. Asked: {target.about}.",
        "",
        where + ".",
        "",
    ]
    (folder / "load.md").write_text("\n".join(text))
    raw = {"about": about, "plan": asdict(plan), "rows": [asdict(row) for row in rows]}
    (folder / "load.json").write_text(json.dumps(raw, indent=1) + "\n")
    panels = {
        way: {load: some for load, some in loads.items() if load != "inserts" and some}
        for way, loads in found.items()
    }
    draw(panels, where, folder / "load.png")
    print("\n".join(text))
    print(f"Written to {folder}")
