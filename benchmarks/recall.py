"""Claim: recall@10 is at least 0.95 by default settings on 100k real embeddings, filtered or not.

Held-out queries over HTTP with default settings, against exact search by brute force in numpy. The
filters let about 50, 10, 1 and 0.1 % of the points through, by the WordNet domain (correlated with
the vectors: most queries point away from what is allowed) and by a random number (not correlated).
Every answer must hold all min(k, matching) results, only matching points, each once, best first.
"""

from __future__ import annotations

import json

import numpy as np

from benchmarks import data
from benchmarks.harness import (
    BenchmarkFailed,
    Report,
    Server,
    drive,
    load_points,
    method,
    options,
    percentile_ms,
    pin_threads,
    recall,
    search_request,
)

pin_threads()

K = 10
NAME = "glosses"


def main() -> None:
    quick = options(__doc__).quick
    count, searches = (20_000, 200) if quick else (100_000, 1_000)
    corpus = data.load(count)
    queries = corpus.queries[:searches]
    cases: list[data.FilterCase | None] = [None, *data.FILTERS]
    report = Report(
        "recall",
        f"Recall@{K}: {count:,} x {data.DIM} real embeddings, default settings",
        method(__doc__, f"{searches:,} queries a row, 1 connection."),
        quick=quick,
        columns=[
            "filter",
            "points that match",
            "recall@10",
            "worst query",
            "p50 / p99 ms",
            "CPU ms a search",
        ],
    )
    with Server() as server:
        server.create(NAME, data.DIM)
        load_points(server, NAME, corpus.vectors, corpus.payloads)
        server.settle(NAME)
        report.notes.append(f"{server.segments(NAME)} segments")
        for case in cases:
            mask = np.ones(count, bool) if case is None else case.mask(corpus)
            truth = data.exact_top_k(corpus.vectors, queries, K, mask)
            requests = [
                search_request(NAME, q, K, query_filter=None if case is None else case.body)
                for q in queries
            ]
            before = server.cpu_seconds()
            done = drive(server.port, requests, keep=True)
            cpu_ms = (server.cpu_seconds() - before) / searches * 1e3
            found = [checked(body, mask, min(K, int(mask.sum()))) for body in done.bodies]
            figure = recall(found, truth)
            worst = min(recall([f], [t]) for f, t in zip(found, truth, strict=True))
            name = "none" if case is None else case.name
            report.rows.append(
                [
                    name,
                    f"{int(mask.sum()):,} ({100 * mask.mean():.2g} %)",
                    f"{figure:.4f}",
                    f"{worst:.1f}",
                    " / ".join(f"{percentile_ms(done.latency_ns, p):.2f}" for p in (50, 99)),
                    f"{cpu_ms:.2f}",
                ]
            )
            report.raw[name] = {"recall": figure, "worst": worst, "cpu_ms": cpu_ms}
            report.claim(f"recall@{K}, filter: {name}", figure, ">=", 0.95, "")
    report.write()


def checked(body: bytes, mask: np.ndarray, expected: int) -> list[int]:
    """The ids of an answer, which must be complete, allowed, distinct and in order."""
    points = json.loads(body)["result"]["points"]
    ids = [p["id"] for p in points]
    scores = [p["score"] for p in points]
    if len(set(ids)) != expected or len(ids) != expected:
        raise BenchmarkFailed(f"{len(ids)} results ({len(set(ids))} distinct), {expected} exist")
    if not mask[ids].all():
        raise BenchmarkFailed(f"a result does not match the filter: {ids}")
    if scores != sorted(scores, reverse=True):
        raise BenchmarkFailed(f"results are not in order: {scores}")
    return ids


if __name__ == "__main__":
    main()
