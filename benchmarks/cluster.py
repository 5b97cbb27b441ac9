"""What a cluster costs beyond one server, in CPU by process.

Goals: a coordinator spends at most 60 µs on a search and 40 µs more for each shard that it asks, and
at most 150 µs on a search over gRPC's SearchStream; inserts that three replicas hold reach a third of
the rate of `shoal serve` for each CPU second.

CPU is user and system time of whole processes, all threads, from their CPU clocks: HTTP server, JSON,
routing, gRPC in both directions, merging and system calls are in a coordinator's figure; the search
itself, log and segments are in the storage nodes'. The client and etcd are counted nowhere; etcd
has a row where it matters. Clusters are plain processes on this machine: 1 etcd, 1 coordinator, and
1 or 3 storage nodes. All on the same cores: only CPU time is compared, no wall time.

Searches: random held-out queries, k = 10 with payload, from one client over HTTP (JSON as Qdrant's
client writes it, kept connections) and over gRPC (shoal.AsyncClient, one stream). One replica for each
shard, three shards on three nodes, so that each search asks three processes. Inserts: 256 points a
request, JSON with wait=true, 4 in flight, into one shard; figures until half a second after the last
answer, so that followers have applied all. Index builders run in processes of their own, at low
priority, once for each replica while there is no index node, and are not counted, neither here nor in
`insert`.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import uvloop

from benchmarks import data
from benchmarks.harness import (
    BenchmarkFailed,
    Front,
    Report,
    Server,
    cpu_clock_s,
    drive,
    http_request,
    interleave,
    load_points,
    method,
    mid,
    options,
    search_request,
    spread,
)
from benchmarks.insert import BATCH
from shoal import AsyncClient
from shoal.local_cluster import LocalCluster

K = 10
IN_FLIGHT = (1, 16)
INSERTS_IN_FLIGHT = 4
CALM_S = 0.5  # after the last insert, for what followers still have to do
INSERTED = "inserted"

Cpu = dict[str, float]  # process -> CPU seconds


class Cluster(Front):
    """A cluster of processes on this machine, removed at the end."""

    def __init__(self, storage_nodes: int) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory(prefix="shoal-bench-")
        self._cluster = LocalCluster(
            Path(self._folder.name) / "cluster",
            layout={"etcd": 1, "coordinator": 1, "storage-node": storage_nodes},
            settings={"coordinator": {"encoder_model": "none"}},
        )
        self.port, self.grpc_port = self._cluster["c1"].plan.ports

    def __enter__(self) -> Self:
        try:
            self._cluster.start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.disconnect()
        try:
            self._cluster.stop()
        finally:
            self._end()

    def _end(self) -> None:
        self._cluster.kill9()
        self._folder.cleanup()

    def cpu(self) -> Cpu:
        return {
            name: cpu_clock_s(process.pid or 0) for name, process in self._cluster.processes.items()
        }

    def log_tail(self) -> str:
        return "\n".join(
            f"-- {p.name}\n{p.log_tail(10)}"
            for p in self._cluster.processes.values()
            if p.plan.role != "etcd"
        )


class Alone(Server):
    """`shoal serve`, with the face of Cluster."""

    def cpu(self) -> Cpu:
        return {"serve": self.cpu_seconds()}


@dataclass(frozen=True)
class Case:
    """One way to search: where, what, through which door, how many at once."""

    where: str
    collection: str
    shards: int
    door: str
    in_flight: int

    def __str__(self) -> str:
        shards = f"{self.shards} shard{'s' * (self.shards > 1)}"
        return f"{self.where}, {shards}, {self.door}, {self.in_flight} in flight"


def main() -> None:
    quick = options(__doc__).quick
    points, searches, rounds = (3_000, 200, 2) if quick else (10_000, 1_000, 5)
    corpus = data.load(points)
    report = Report(
        "cluster",
        "A cluster against one server: CPU by process",
        method(
            __doc__,
            f"{points:,} points of {data.DIM} dimensions; {rounds} interleaved rounds of {searches:,} "
            f"searches (a quarter of that at 1 in flight), and of {batches_of(quick) * BATCH:,} "
            "inserted points; medians, (smallest to largest).",
        ),
        quick=quick,
        columns=[
            "what",
            "coordinator, CPU µs",
            "storage nodes together, CPU µs",
            "of these the busiest",
        ],
    )
    with ExitStack() as stack:
        fronts: dict[str, Cluster | Alone] = {
            "shoal serve": stack.enter_context(Alone()),
            "one node": stack.enter_context(Cluster(1)),
            "three nodes": stack.enter_context(Cluster(3)),
        }
        search_rows(report, fronts, corpus, searches, rounds)
        insert_rows(report, fronts, corpus, batches_of(quick), rounds)
    report.write()


def batches_of(quick: bool) -> int:
    return 4 if quick else 40


def spent(front: Cluster | Alone, work: Callable[[], object], calm_s: float = 0.0) -> Cpu:
    """CPU seconds of each process while `work` ran."""
    before = front.cpu()
    work()
    if calm_s:
        time.sleep(calm_s)
    return {name: now - before[name] for name, now in front.cpu().items()}


# -- searches --------------------------------------------------------------------------------------
def search_rows(
    report: Report,
    fronts: Mapping[str, Cluster | Alone],
    corpus: data.Corpus,
    searches: int,
    rounds: int,
) -> None:
    cases = prepare(fronts, corpus)
    found: dict[str, list[Cpu]] = {str(case): [] for case in cases}

    def variant(case: Case) -> Callable[[int], float]:
        def once(number: int) -> float:
            front = fronts[case.where]
            count = searches if case.in_flight > 1 else searches // 4
            cpu = spent(front, lambda: search(front, case, corpus.queries, count, number))
            found[str(case)].append({k: v / count * 1e6 for k, v in cpu.items()})
            return 0.0

        return once

    warm = max(50, searches // 10)
    for case in cases:
        search(fronts[case.where], case, corpus.queries, warm, 0)
    interleave({str(case): variant(case) for case in cases}, rounds)
    report.raw["search_us"] = found
    for case in cases:
        report.rows.append(row(f"search, {case}", found[str(case)]))
    claims(report, cases, found)


def prepare(fronts: Mapping[str, Cluster | Alone], corpus: data.Corpus) -> list[Case]:
    """The collections, loaded and settled, and what is asked of them."""
    cases = []
    for where, front in fronts.items():
        for shards in (1,) if where != "three nodes" else (1, 3):
            name = f"s{shards}"
            front.create(name, data.DIM, shard_number=shards, replication_factor=1)
            load_points(front, name, corpus.vectors, corpus.payloads)
            cases += [
                Case(where, name, shards, door, n) for door in ("HTTP", "gRPC") for n in IN_FLIGHT
            ]
        for name in {case.collection for case in cases if case.where == where}:
            front.settle(name)
    return cases


def search(
    front: Cluster | Alone, case: Case, queries: np.ndarray, count: int, number: int
) -> None:
    first = number * count % len(queries)
    if case.door == "HTTP":
        requests = [search_request(case.collection, query, K) for query in queries]
        drive(front.port, requests, count=count, connections=case.in_flight, first=first)
        return
    _loop().run_until_complete(_stream(front.grpc_port, case, queries, count, first))


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """One for all runs: gRPC goes on telling each loop that it ever saw."""
    return uvloop.new_event_loop()


async def _stream(port: int, case: Case, queries: np.ndarray, count: int, first: int) -> None:
    left = iter(range(first, first + count))

    async def ask(client: AsyncClient) -> None:
        for number in left:
            vector = queries[number % len(queries)]
            hits = await client.search(case.collection, vector, limit=K, with_payload=True)
            if len(hits) != K:
                raise BenchmarkFailed(f"{case}: {len(hits)} hits")

    async with AsyncClient(f"127.0.0.1:{port}") as client:
        await asyncio.gather(*(ask(client) for _ in range(case.in_flight)))


def row(what: str, found: list[Cpu]) -> list[str]:
    """coordinator, all storage nodes, the busiest one; `shoal serve` is both in one."""
    if "serve" in found[0]:
        return [what, "(in one process)", spread([cpu["serve"] for cpu in found]), ""]
    nodes = [[v for k, v in cpu.items() if k.startswith("s")] for cpu in found]
    return [
        what,
        spread([cpu["c1"] for cpu in found]),
        spread([sum(each) for each in nodes]),
        spread([max(each) for each in nodes]) if len(nodes[0]) > 1 else "",
    ]


def claims(report: Report, cases: list[Case], found: dict[str, list[Cpu]]) -> None:
    at: dict[tuple[str, int, int], float] = {}
    for case in cases:
        if case.where != "three nodes":
            continue
        cost = mid([cpu["c1"] for cpu in found[str(case)]])
        at[case.door, case.shards, case.in_flight] = cost
        goal = 60 + 40 * case.shards if case.door == "HTTP" else 150
        if case.door == "HTTP" or case.shards == 1:
            report.claim(
                f"coordinator's CPU for a search of {case.shards} shard"
                f"{'s' if case.shards > 1 else ''}, {case.door}, {case.in_flight} in flight",
                cost,
                "<=",
                goal,
                "µs",
            )
    for door in ("HTTP", "gRPC"):
        each = [
            f"{(at[door, 3, n] - at[door, 1, n]) / 2:,.0f} µs at {n} in flight" for n in IN_FLIGHT
        ]
        report.notes.append(
            f"Each further shard costs the coordinator, over {door}: " + ", ".join(each) + "."
        )


# -- inserts ---------------------------------------------------------------------------------------
def insert_rows(
    report: Report,
    fronts: Mapping[str, Cluster | Alone],
    corpus: data.Corpus,
    batches: int,
    rounds: int,
) -> None:
    count = batches * BATCH
    vectors = np.resize(corpus.vectors, (count, data.DIM))
    requests = insert_requests(vectors, corpus.payloads)
    found: dict[str, list[Cpu]] = {where: [] for where in fronts}

    def variant(where: str) -> Callable[[int], float]:
        def once(number: int) -> float:
            front = fronts[where]
            front.disconnect()  # it was quiet for long, and servers close what is
            front.create(
                INSERTED,
                data.DIM,
                shard_number=1,
                replication_factor=3 if where == "three nodes" else 1,
            )
            cpu = spent(
                front,
                lambda: drive(front.port, requests, connections=INSERTS_IN_FLIGHT),
                CALM_S,
            )
            counted = front.call("POST", f"/collections/{INSERTED}/points/count", {})["count"]
            if counted != count:
                raise BenchmarkFailed(f"{counted} of {count} points arrived")
            front.call("DELETE", f"/collections/{INSERTED}")
            found[where].append({k: v / count * 1e6 for k, v in cpu.items()})
            return 0.0

        return once

    interleave({where: variant(where) for where in fronts}, rounds)
    report.raw["insert_us"] = found
    rates = {where: [1e6 / ours(cpu) for cpu in some] for where, some in found.items()}
    for where, some in found.items():
        replicas = "3 replicas" if where == "three nodes" else "1 replica"
        what = f"a point inserted, {where}, {replicas}: {spread(rates[where])} per CPU second"
        report.rows.append(row(what, some))
    ratio = [a / b for a, b in zip(rates["three nodes"], rates["shoal serve"], strict=True)]
    report.claim(
        "inserts with 3 replicas per CPU second of coordinator and storage nodes together, as a "
        "share of shoal serve's",
        mid(ratio),
        ">=",
        1 / 3,
        "",
    )
    three = found["three nodes"]
    node = [sum(v for k, v in cpu.items() if k.startswith("s")) / 3 for cpu in three]
    report.notes.append(
        f"Inserts: {mid([1e6 / us for us in node]):,.0f} points with 3 replicas per CPU second of one "
        f"storage node, against {mid(rates['shoal serve']):,.0f} of shoal serve, which also reads "
        f"the JSON. etcd: {mid([cpu['etcd1'] for cpu in three]):,.1f} µs a point."
    )


def ours(cpu: Cpu) -> float:
    """All processes of Shoal together."""
    return sum(value for name, value in cpu.items() if not name.startswith("etcd"))


def insert_requests(vectors: np.ndarray, payloads: list[bytes]) -> list[bytes]:
    """Whole HTTP requests, one per BATCH points."""

    out = []
    for start in range(0, len(vectors), BATCH):
        listed = [
            {
                "id": number,
                "vector": vectors[number].tolist(),
                "payload": json.loads(payloads[number % len(payloads)]),
            }
            for number in range(start, min(start + BATCH, len(vectors)))
        ]
        path = f"/collections/{INSERTED}/points?wait=true"
        out.append(http_request("PUT", path, {"points": listed}))
    return out


if __name__ == "__main__":
    main()
