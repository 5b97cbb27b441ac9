"""Claim: a search over HTTP costs at most 100 µs of server CPU more than Faiss's own search.

Faiss: one HNSW index over the same vectors in this process, same M and efConstruction. Each round
runs the same random held-out queries through Faiss at the server's default beam width, then through
the server over 1 and over 16 kept connections (k = 10 with payload, floats written in full, as Qdrant's
Python client does). Only the server's CPU is counted, not this client's.
"""

from __future__ import annotations

import time

import numpy as np

from benchmarks import data
from benchmarks.harness import (
    Driven,
    Report,
    Server,
    drive,
    hit_ids,
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
from shoal.storage_api import VectorSpec
from storage_node import planner

pin_threads()

K = 10
NAME = "glosses"


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

    with Server() as server:
        server.create(NAME, data.DIM)
        load_points(server, NAME, corpus.vectors, corpus.payloads)
        server.settle(NAME)
        about = server.call("GET", f"/collections/{NAME}")
        requests = [search_request(NAME, q, K) for q in queries]
        found = drive(server.port, requests, keep=True)
        server_recall = recall([hit_ids(b) for b in found.bodies], truth)
        faiss_recall = recall(index.search(queries, K, params=parameters)[1], truth)
        runs: dict[str, list[Driven]] = {"1": [], "16": []}

        def in_process(number: int) -> float:
            began = time.process_time()
            for i in range(searches):
                row = (number * searches + i) % len(queries)
                index.search(queries[row : row + 1], K, params=parameters)
            return (time.process_time() - began) / searches * 1e6

        def over_http(connections: int, number: int) -> float:
            before = server.cpu_seconds()
            done = drive(
                server.port,
                requests,
                count=searches,
                connections=connections,
                first=number * searches,
            )
            runs[str(connections)].append(done)
            return (server.cpu_seconds() - before) / searches * 1e6

        figures = interleave(
            {
                "faiss": in_process,
                "1": lambda number: over_http(1, number),
                "16": lambda number: over_http(16, number),
            },
            rounds,
        )

    report = Report(
        "search_http",
        f"Search over HTTP: {count:,} x {data.DIM}, k = {K}, with payload",
        method(
            __doc__,
            f"{rounds} rounds of {searches:,} searches; medians, (smallest to largest).",
        ),
        quick=quick,
        raw={"cpu_us": figures, "collection": about, "recall": [faiss_recall, server_recall]},
        columns=[
            "system",
            "CPU µs per search",
            "above Faiss, µs",
            "searches/s on the wall",
            "p50 ms",
            "p99 ms",
            "recall@10",
        ],
    )
    report.rows.append(
        ["Faiss in process", spread(figures["faiss"]), "", "", "", "", f"{faiss_recall:.3f}"]
    )
    for connections in ("1", "16"):
        above = [a - b for a, b in zip(figures[connections], figures["faiss"], strict=True)]
        latency = np.concatenate([r.latency_ns for r in runs[connections]])
        report.rows.append(
            [
                f"Shoal, {connections} connection{'s' if connections != '1' else ''}",
                spread(figures[connections]),
                spread(above),
                f"{mid([r.per_s for r in runs[connections]]):,.0f}",
                f"{percentile_ms(latency, 50):.2f}",
                f"{percentile_ms(latency, 99):.2f}",
                f"{server_recall:.3f}",
            ]
        )
        report.claim(
            f"CPU per search above Faiss's own, {connections} connection(s)",
            mid(above),
            "<=",
            100,
            "µs",
        )
    report.notes.append(
        f"Shoal: {about['segments_count']} segments, {about['indexed_vectors_count']:,} of {count:,} "
        "vectors in an index, the rest scanned exactly. Faiss: one index of all."
    )
    report.write()


if __name__ == "__main__":
    main()
