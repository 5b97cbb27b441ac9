"""What shards cost on one machine: CPU per search and insert with 1, 2 and 4 shards. For the record
docs/decisions/0002: how many shards a collection should get by default.

The same 100k real embeddings in collections that differ in `shard_number` only, in one server, over
HTTP with 1 and 8 connections, rounds interleaved. More shards mean more, smaller indexes to search
for each query, and more cores that can work on one.
"""

from __future__ import annotations

import numpy as np

from benchmarks import data
from benchmarks.harness import (
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

pin_threads()

K = 10
SHARDS = (1, 2, 4)


def main() -> None:
    quick = options(__doc__).quick
    count, rounds, searches = (20_000, 2, 200) if quick else (100_000, 7, 1_000)
    corpus = data.load(count)
    truth = data.exact_top_k(corpus.vectors, corpus.queries, K)
    report = Report(
        "shards",
        f"Shards on one machine: {count:,} x {data.DIM}, k = {K}",
        method(
            __doc__, f"{rounds} rounds of {searches:,} searches; medians, (smallest to largest)."
        ),
        quick=quick,
        columns=[
            "shards",
            "segments",
            "load s (CPU s with index builders)",
            "recall@10",
            "CPU µs a search, 1 connection",
            "CPU µs a search, 8 connections",
            "p50 ms, 1 connection",
            "searches/s, 8 connections",
        ],
    )
    with Server() as server:
        about: dict[int, list[str]] = {}
        for shards in SHARDS:
            before = server.cpu_seconds(children=True)
            name = f"glosses{shards}"
            server.create(name, data.DIM, shard_number=shards)
            wall = load_points(server, name, corpus.vectors, corpus.payloads) + server.settle(name)
            cpu = server.cpu_seconds(children=True) - before
            requests = [search_request(name, q, K) for q in corpus.queries]
            found = drive(server.port, requests, keep=True)
            about[shards] = [
                f"{server.segments(name)}",
                f"{wall:,.0f} ({cpu:,.0f})",
                f"{recall([hit_ids(b) for b in found.bodies], truth):.3f}",
            ]
        runs: dict[tuple[int, int], list[tuple[float, float]]] = {}

        def variant(shards: int, connections: int):
            requests = [search_request(f"glosses{shards}", q, K) for q in corpus.queries]

            def measure(number: int) -> float:
                before = server.cpu_seconds()
                done = drive(
                    server.port,
                    requests,
                    count=searches,
                    connections=connections,
                    first=number * searches,
                )
                p50 = percentile_ms(np.sort(done.latency_ns), 50)
                runs.setdefault((shards, connections), []).append((p50, done.per_s))
                return (server.cpu_seconds() - before) / searches * 1e6

            return measure

        figures = interleave(
            {f"{s} {c}": variant(s, c) for s in SHARDS for c in (1, 8)},
            rounds,
        )
    for shards in SHARDS:
        report.rows.append(
            [
                str(shards),
                *about[shards],
                spread(figures[f"{shards} 1"]),
                spread(figures[f"{shards} 8"]),
                f"{mid([p for p, _ in runs[shards, 1]]):.2f}",
                f"{mid([r for _, r in runs[shards, 8]]):,.0f}",
            ]
        )
    report.raw["cpu_us"] = figures
    report.write()


if __name__ == "__main__":
    main()
