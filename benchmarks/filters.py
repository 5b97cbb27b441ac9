"""What a filtered search costs, by selectivity and by how the filter is written. No goal, a table.

Over HTTP, one connection, k = 10 with payload, CPU of the server. "first" is the first search with a
filter that was not asked before (it must be evaluated), "again" a filter already seen with other
query vectors. Each "first" search carries its own filter: the random number is compared with a bound
that differs a little.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks import data
from benchmarks.harness import (
    Report,
    Server,
    drive,
    interleave,
    load_points,
    method,
    options,
    percentile_ms,
    pin_threads,
    search_request,
    spread,
)

pin_threads()

K = 10
NAME = "glosses"


def main() -> None:
    quick = options(__doc__).quick
    count, rounds, searches = (20_000, 2, 100) if quick else (100_000, 5, 500)
    corpus = data.load(count)
    report = Report(
        "filters",
        f"Filtered searches: {count:,} x {data.DIM}",
        method(__doc__, f"{rounds} interleaved rounds of {searches} searches."),
        quick=quick,
        columns=["filter", "CPU µs a search", "p50 ms"],
    )
    with Server() as server:
        server.create(NAME, data.DIM)
        load_points(server, NAME, corpus.vectors, corpus.payloads)
        server.settle(NAME)
        latency: dict[str, list[np.ndarray]] = {}

        def variant(name: str, filters: list[dict[str, Any] | None]) -> Any:
            requests = [
                search_request(NAME, q, K, query_filter=filters[i % len(filters)])
                for i, q in enumerate(corpus.queries)
            ]

            def measure(number: int) -> float:
                before = server.cpu_seconds()
                done = drive(server.port, requests, count=searches, first=number * searches)
                latency.setdefault(name, []).append(done.latency_ns)
                return (server.cpu_seconds() - before) / searches * 1e6

            return measure

        variants = {name: variant(name, filters) for name, filters in cases(len(corpus.queries))}
        figures = interleave(variants, rounds)
        report.notes.append(f"{server.segments(NAME)} segments")
    for name, values in figures.items():
        p50 = percentile_ms(np.concatenate(latency[name]), 50)
        report.rows.append([name, spread(values), f"{p50:.2f}"])
    report.raw["cpu_us"] = figures
    report.write()


def cases(count: int) -> list[tuple[str, list[dict[str, Any] | None]]]:
    """name -> filters to cycle through."""
    out: list[tuple[str, list[dict[str, Any] | None]]] = [("none", [None])]
    out += [(f"{case.name}, again", [case.body]) for case in data.FILTERS]
    for percent in (50, 10, 1):
        base = data.DRAWS * percent // 100
        spread_of = max(1, base // 10)
        bounds = [base + spread_of * i / count for i in range(count)]
        out.append(
            (
                f"{percent} % random, first",
                [{"must": [{"key": "draw", "range": {"lt": b}}]} for b in bounds],
            )
        )
    mixed = {
        "must": [{"key": "domain", "match": {"any": ["noun.artifact", "noun.plant", "noun.food"]}}],
        "must_not": [{"key": "draw", "range": {"gte": 5_000}}],
    }
    return [*out, ("domain any of 3, draw not ≥ half, again", [mixed])]


if __name__ == "__main__":
    main()
