"""What it costs to ask a storage node in another process. Goal: at most 40 µs of CPU on the asking side
for each shard asked, with 16 requests in flight.

The node answers each search at once with the same ten hits and their payload, so this is the price of
the transport alone: codec, gRPC, event loop. The asking side stands for a coordinator; both sides run
uvloop. "4 shards" is one search that asks four shards of the node at the same time; its figures are
for each shard.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import uvloop

from benchmarks.harness import ROOT, Report, method, mid, options, spread
from shoal.batch import DenseBlock, PointBatch
from shoal.ids import PointIds
from shoal.rpc.client import NodeClient
from shoal.storage_api import (
    FreshRead,
    Guard,
    Hits,
    Search,
    ShardKey,
    Upsert,
    Write,
    WriteResult,
)
from storage_node.service import serve_node

DIM = 384
K = 10
GOAL_US = 40.0
GOAL_IN_FLIGHT = 16
PAYLOAD = b'{"text":"a gloss of the usual length, some eighty bytes of it or so","draw":1234}'
SHARDS = [ShardKey(1, shard) for shard in range(4)]
ANY = Guard(min_applied=1)


class Canned:
    """Answers at once, and always the same."""

    def __init__(self) -> None:
        points = PointBatch(PointIds.from_keys(list(range(K))))
        points.set_payloads([PAYLOAD] * K)
        points.versions = np.arange(K, dtype=np.uint64)
        self._hits = FreshRead(Hits(points, np.linspace(1, 0, K, dtype=np.float32)), 7)

    async def search(self, shard: ShardKey, query: Search, guard: Guard) -> FreshRead[Hits]:
        return self._hits

    async def write(self, shard: ShardKey, op: Write) -> WriteResult:
        return WriteResult(8)


async def _serve() -> None:
    """In a process of its own until its standard input ends."""
    server = await serve_node(Canned(), "127.0.0.1", 0, node_id="s1")  # type: ignore[arg-type]
    print(server.port, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.close()


@contextmanager
def _node() -> Iterator[tuple[int, Callable[[], float]]]:
    """The port of a node in another process, and how many seconds of CPU that has used."""
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.rpc", "--serve"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        port = int(child.stdout.readline())
        yield port, lambda: time.clock_gettime((~child.pid << 3) | 2)  # its CPU clock
    finally:
        child.stdin.close()
        child.stdout.close()
        child.wait(30)


def _variants(quick: bool) -> dict[str, tuple[int, int, int, Callable[[NodeClient], object]]]:
    """name -> in flight, how often in a round, shards asked at once, what."""
    query = Search("", np.random.default_rng(7).random(DIM, np.float32), K, with_payload=True)
    batch = PointBatch(PointIds.from_keys(list(range(100))))
    batch.dense[""] = DenseBlock(np.ones((100, DIM), np.float32))
    batch.set_payloads([PAYLOAD] * 100)

    def search(client: NodeClient) -> object:
        return client.search(SHARDS[0], query, ANY)

    def scatter(client: NodeClient) -> object:
        return asyncio.gather(*(client.search(shard, query, ANY) for shard in SHARDS))

    def write(client: NodeClient) -> object:
        return client.write(SHARDS[0], Upsert(batch))

    n = 300 if quick else 4_000
    out: dict[str, tuple[int, int, int, Callable[[NodeClient], object]]] = {
        f"search, {in_flight} in flight": (in_flight, n, 1, search) for in_flight in (1, 4, 16, 64)
    }
    out["search of 4 shards, 1 in flight"] = (1, n // 4, 4, scatter)
    out["search of 4 shards, 16 in flight"] = (16, n // 4, 4, scatter)
    out["upsert of 100 points, 4 in flight"] = (4, n // 20, 1, write)
    return out


async def _measure(
    port: int, node_cpu_s: Callable[[], float], quick: bool, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """CPU µs for each shard asked, one figure a round: of the client and of the node."""
    variants = _variants(quick)
    asking: dict[str, list[float]] = {name: [] for name in variants}
    node: dict[str, list[float]] = {name: [] for name in variants}
    client = NodeClient(f"127.0.0.1:{port}", node_id="s1")
    try:
        for number in range(rounds + 1):  # the first is not counted
            names = list(variants)
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                in_flight, count, shards, ask = variants[name]
                each = max(1, count // in_flight)

                async def work(each: int = each, ask: Callable[[NodeClient], object] = ask) -> None:
                    for _ in range(each):
                        await ask(client)  # type: ignore[misc]

                before, node_before = time.process_time(), node_cpu_s()
                await asyncio.gather(*(work() for _ in range(in_flight)))
                total = each * in_flight * shards
                if number:
                    asking[name].append((time.process_time() - before) / total * 1e6)
                    node[name].append((node_cpu_s() - node_before) / total * 1e6)
    finally:
        await client.close()
    return asking, node


def main() -> None:
    if "--serve" in sys.argv:
        uvloop.run(_serve())
        return
    quick = options(__doc__).quick
    rounds = 2 if quick else 7
    report = Report(
        "rpc",
        "Asking a storage node over gRPC",
        method(__doc__, f"{rounds} interleaved rounds; median (smallest to largest)."),
        quick=quick,
        columns=["what", "asking side, CPU µs a shard", "node, CPU µs a shard"],
    )
    with _node() as (port, node_cpu_s):
        asking, node = uvloop.run(_measure(port, node_cpu_s, quick, rounds))
    for name, figures in asking.items():
        report.rows.append([name, spread(figures), spread(node[name])])
    report.claim(
        f"asking one shard, {GOAL_IN_FLIGHT} in flight",
        mid(asking[f"search, {GOAL_IN_FLIGHT} in flight"]),
        "<=",
        GOAL_US,
        "µs",
    )
    report.raw = {"asking_us": asking, "node_us": node}
    report.write()


if __name__ == "__main__":
    main()
