"""Claim: a search over a gRPC stream costs at most 150 µs of server CPU more than Faiss's own search.

Faiss: one HNSW index over the same vectors in this process, same M and efConstruction. Each round
runs the same random held-out queries (k = 10 with payload) through Faiss at the server's default beam
width, and through the server: over HTTP as benchmarks/search_http.py does, over unary gRPC calls, and
over one stream as `shoal.AsyncClient` does, each by 1 and by 16 callers that wait for their answer
before they ask again. Only the server's CPU is counted, not this client's. Searches of a stream that
wait at the same moment travel in one message, so 16 callers cost less each than one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import grpc.aio
import numpy as np
from numpy.typing import NDArray

from benchmarks import data
from benchmarks.harness import (
    Report,
    Server,
    drive,
    interleave,
    load_points,
    method,
    mid,
    options,
    percentile_ms,
    pin_threads,
    recall,
    search_request,
    spread,
)
from shoal.client import AsyncClient
from shoal.ids import PointIds
from shoal.storage_api import VectorSpec
from shoal.v1 import common_pb2, points_pb2
from storage_node import planner

pin_threads()

K = 10
NAME = "glosses"
CALLERS = (1, 16)
GOAL_US = 150

Ask = Callable[[int], Awaitable[list[int]]]


class Callers:
    """So many callers on an event loop of their own; keeps how long each search took, and what the
    first ones found."""

    def __init__(self, runner: asyncio.Runner, ask: Ask, queries: int) -> None:
        self._runner, self._ask, self._queries = runner, ask, queries
        self.latency_ns: list[int] = []
        self.found: dict[int, list[int]] = {}
        self.seconds: list[float] = []
        self.count = 0

    def run(self, count: int, callers: int, first: int) -> None:
        self._runner.run(self._run(count, callers, first))

    async def _run(self, count: int, callers: int, first: int) -> None:
        left = iter(range(first, first + count))

        async def caller() -> None:
            for number in left:
                row = number % self._queries
                began = time.perf_counter_ns()
                found = await self._ask(row)
                self.latency_ns.append(time.perf_counter_ns() - began)
                self.found.setdefault(row, found)

        began = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(callers)))
        self.seconds.append(time.perf_counter() - began)
        self.count += count


def requests_of(queries: NDArray[np.float32]) -> list[points_pb2.SearchRequest]:
    return [
        points_pb2.SearchRequest(
            collection=NAME,
            vector=query.astype("<f4").tobytes(),
            limit=K,
            with_payload=common_pb2.PayloadSelector(all=True),
        )
        for query in queries
    ]


def main() -> None:
    quick = options(__doc__).quick
    count, rounds, searches = (20_000, 3, 400) if quick else (100_000, 9, 3_000)
    import faiss

    faiss.omp_set_num_threads(1)
    corpus = data.load(count)
    spec = VectorSpec(data.DIM, "Cosine")  # type: ignore[arg-type]
    index = faiss.IndexHNSWFlat(data.DIM, spec.hnsw_m, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = spec.hnsw_ef_construct
    index.add(np.ascontiguousarray(corpus.vectors))
    parameters = faiss.SearchParametersHNSW(efSearch=planner.DEFAULT_EF)
    queries = np.ascontiguousarray(corpus.queries)
    truth = data.exact_top_k(corpus.vectors, queries, K)

    with Server() as server, asyncio.Runner() as runner:
        server.create(NAME, data.DIM)
        load_points(server, NAME, corpus.vectors, corpus.payloads)
        server.settle(NAME)
        about = server.call("GET", f"/collections/{NAME}")
        over_http = [search_request(NAME, query, K) for query in queries]
        over_grpc = requests_of(queries)
        address = f"127.0.0.1:{server.grpc_port}"

        async def opened() -> tuple[grpc.aio.Channel, AsyncClient]:
            return grpc.aio.insecure_channel(address), AsyncClient(address)

        channel, client = runner.run(opened())
        search = channel.unary_unary(
            "/shoal.v1.Points/Search",
            request_serializer=points_pb2.SearchRequest.SerializeToString,
            response_deserializer=points_pb2.SearchResponse.FromString,
        )

        async def unary(row: int) -> list[int]:
            answer = await search(over_grpc[row])
            return PointIds.from_wire(answer.points.ids).keys()

        async def stream(row: int) -> list[int]:
            hits = await client.search(NAME, queries[row], limit=K, with_payload=True)
            return list(map(int, hits.ids))

        driven = {
            f"{way}, {callers}": Callers(runner, ask, len(queries))
            for way, ask in (("unary", unary), ("stream", stream))
            for callers in CALLERS
        }

        def in_process(number: int) -> float:
            began = time.process_time()
            for i in range(searches):
                row = (number * searches + i) % len(queries)
                index.search(queries[row : row + 1], K, params=parameters)
            return (time.process_time() - began) / searches * 1e6

        http_latency: dict[int, list[NDArray[np.int64]]] = {callers: [] for callers in CALLERS}
        http_per_s: dict[int, list[float]] = {callers: [] for callers in CALLERS}

        def http(callers: int, number: int) -> float:
            before = server.cpu_seconds()
            done = drive(
                server.port,
                over_http,
                count=searches,
                connections=callers,
                first=number * searches,
            )
            http_latency[callers].append(done.latency_ns)
            http_per_s[callers].append(done.per_s)
            return (server.cpu_seconds() - before) / searches * 1e6

        def grpc_way(way: str, callers: int, number: int) -> float:
            before = server.cpu_seconds()
            driven[f"{way}, {callers}"].run(searches, callers, number * searches)
            return (server.cpu_seconds() - before) / searches * 1e6

        variants: dict[str, Callable[[int], float]] = {"faiss": in_process}
        for callers in CALLERS:
            variants[f"http, {callers}"] = lambda n, c=callers: http(c, n)  # type: ignore[misc]
            for way in ("unary", "stream"):
                variants[f"{way}, {callers}"] = lambda n, w=way, c=callers: grpc_way(w, c, n)  # type: ignore[misc]
        figures = interleave(variants, rounds)

        async def close() -> None:
            await client.close()
            await channel.close()

        runner.run(close())

    report = Report(
        "search_grpc",
        f"Search over gRPC: {count:,} x {data.DIM}, k = {K}, with payload",
        method(
            __doc__,
            f"{rounds} rounds of {searches:,} searches; medians, (smallest to largest).",
        ),
        quick=quick,
        raw={"cpu_us": figures, "collection": about},
        columns=[
            "way",
            "callers",
            "CPU µs per search",
            "above Faiss, µs",
            "searches/s on the wall",
            "p50 ms",
            "p99 ms",
            "recall@10",
        ],
    )
    report.rows.append(["Faiss in process", "1", spread(figures["faiss"]), "", "", "", "", ""])
    for way, title in (("http", "HTTP"), ("unary", "gRPC, unary"), ("stream", "gRPC, stream")):
        for callers in CALLERS:
            name = f"{way}, {callers}"
            above = [a - b for a, b in zip(figures[name], figures["faiss"], strict=True)]
            share = ""
            if way == "http":
                latency = np.concatenate(http_latency[callers])
                per_s = mid(http_per_s[callers])
            else:
                calls = driven[name]
                latency = np.array(calls.latency_ns)
                per_s = calls.count / sum(calls.seconds)
                asked = sorted(calls.found)
                found = [calls.found[row] for row in asked]
                share = f"{recall(found, truth[asked]):.3f}"
            report.rows.append(
                [
                    title,
                    str(callers),
                    spread(figures[name]),
                    spread(above),
                    f"{per_s:,.0f}",
                    f"{percentile_ms(latency, 50):.2f}",
                    f"{percentile_ms(latency, 99):.2f}",
                    share,
                ]
            )
            if way == "stream":
                report.claim(
                    f"CPU per streamed search above Faiss's own, {callers} caller(s)",
                    mid(above),
                    "<=",
                    GOAL_US,
                    "µs",
                )
    report.notes.append(
        "This client is Python and shares the machine with the server: searches per second are what "
        "both manage together."
    )
    report.write()


if __name__ == "__main__":
    main()
