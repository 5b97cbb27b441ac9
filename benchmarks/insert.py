"""Claims: at least 15,000 durable points a second and core as JSON, 40,000 imported from Parquet.

JSON: batches of 256 points x 384 dimensions with payload, written with wait=true as Qdrant's Python
client writes them (floats in full: about 2 MB a request), one request in flight on 1 connection and
on 4. An answer means that the batch is fsynced and visible. The figure is points per second of CPU of
the server process until the last answer: log, growing segment, and what of sealing and merging fell
into that time. Indexes are built in processes of their own at low priority; what they cost until the
collection has settled is measured in the first round and has a column. Import: `shoal import` of one
Parquet file, CPU of client and server together.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import data
from benchmarks.harness import (
    ROOT,
    BenchmarkFailed,
    Report,
    Server,
    drive,
    http_request,
    method,
    mid,
    options,
    percentile_ms,
    spread,
)

NAME = "glosses"
BATCH = 256


def main() -> None:
    quick = options(__doc__).quick
    count, rounds = (5_120, 2) if quick else (49_920, 5)
    corpus = data.load(2 * count)
    report = Report(
        "insert",
        f"Durable inserts: {data.DIM} dimensions, with payload",
        method(
            __doc__,
            f"{rounds} rounds into fresh collections, {count:,} points as JSON and {2 * count:,} "
            "imported; medians, (smallest to largest).",
        ),
        quick=quick,
        columns=[
            "way in",
            "points per CPU second of the server",
            "points/s on the wall",
            "p50 / p99 ms a batch",
            "CPU µs a point until settled",
        ],
    )
    json_rows(report, corpus.head(count), rounds)
    import_rows(report, corpus, rounds)
    report.write()


def json_rows(report: Report, corpus: data.Corpus, rounds: int) -> None:
    bodies = batches(corpus)
    count = len(corpus.vectors)
    figures: dict[int, dict[str, list[float]]] = {}
    with Server() as server:
        for number in range(rounds):
            for connections in (1, 4) if number % 2 == 0 else (4, 1):
                server.create(NAME, data.DIM)
                before, before_all = server.cpu_seconds(), server.cpu_seconds(children=True)
                done = drive(server.port, bodies, connections=connections)
                cpu = server.cpu_seconds() - before
                counted = server.call("POST", f"/collections/{NAME}/points/count", {})["count"]
                if counted != count:
                    raise BenchmarkFailed(f"{counted} of {count} points arrived")
                row = figures.setdefault(connections, {})
                if number == 0:  # what comes later in the background, once: it takes long
                    server.settle(NAME)
                    settled = server.cpu_seconds() - before
                    building = server.cpu_seconds(children=True) - before_all - settled
                    row["settled_us"] = [settled / count * 1e6]
                    row["building_us"] = [building / count * 1e6]
                server.call("DELETE", f"/collections/{NAME}")
                for key, value in (
                    ("per_cpu_s", count / cpu),
                    ("per_s", count / done.wall_s),
                    ("p50", percentile_ms(done.latency_ns, 50)),
                    ("p99", percentile_ms(done.latency_ns, 99)),
                ):
                    row.setdefault(key, []).append(value)
    report.raw["json"] = figures
    for connections, row in figures.items():
        report.rows.append(
            [
                f"JSON, {connections} in flight",
                spread(row["per_cpu_s"]),
                spread(row["per_s"]),
                f"{mid(row['p50']):.1f} / {mid(row['p99']):.1f}",
                f"server {mid(row['settled_us']):,.0f}, index builders {mid(row['building_us']):,.0f}",
            ]
        )
    best = max(figures, key=lambda c: mid(figures[c]["per_cpu_s"]))
    worst = min(figures, key=lambda c: mid(figures[c]["per_cpu_s"]))
    for connections in sorted({best, worst}):
        report.claim(
            f"durable JSON inserts per CPU second, {connections} in flight",
            mid(figures[connections]["per_cpu_s"]),
            ">=",
            15_000,
            "points",
        )


def batches(corpus: data.Corpus) -> list[bytes]:
    """Whole HTTP requests, one per BATCH points."""
    out = []
    for start in range(0, len(corpus.vectors), BATCH):
        rows = range(start, min(start + BATCH, len(corpus.vectors)))
        points = [
            {
                "id": row,
                "vector": corpus.vectors[row].tolist(),
                "payload": json.loads(corpus.payloads[row]),
            }
            for row in rows
        ]
        out.append(http_request("PUT", f"/collections/{NAME}/points?wait=true", {"points": points}))
    return out


def import_rows(report: Report, corpus: data.Corpus, rounds: int) -> None:
    count = len(corpus.vectors)
    figures: dict[str, list[float]] = {
        "per_cpu_s": [],
        "per_s": [],
        "client_us": [],
        "server_us": [],
    }
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder, Server() as server:
        path = Path(folder) / "glosses.parquet"
        write_parquet(path, corpus)
        for _ in range(rounds):
            server.create(NAME, data.DIM)
            server_before = server.cpu_seconds()
            client_before = resource.getrusage(resource.RUSAGE_CHILDREN)
            began = time.monotonic()
            command = [sys.executable, "-m", "shoal", "import", str(path), "--collection", NAME]
            command += ["--url", f"http://127.0.0.1:{server.port}"]
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ
            )
            wall = time.monotonic() - began
            if done.returncode != 0:
                raise BenchmarkFailed(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            client = sum(
                getattr(after, f) - getattr(client_before, f) for f in ("ru_utime", "ru_stime")
            )
            cpu = server.cpu_seconds() - server_before
            counted = server.call("POST", f"/collections/{NAME}/points/count", {})["count"]
            if counted != count:
                raise BenchmarkFailed(f"{counted} of {count} points were imported")
            server.call("DELETE", f"/collections/{NAME}")
            figures["per_cpu_s"].append(count / (client + cpu))
            figures["per_s"].append(count / wall)
            figures["client_us"].append(client / count * 1e6)
            figures["server_us"].append(cpu / count * 1e6)
    report.raw["import"] = figures
    report.rows.append(
        [
            "shoal import of Parquet",
            f"{spread([1e6 / us for us in figures['server_us']])}; with the client "
            f"{spread(figures['per_cpu_s'])}",
            spread(figures["per_s"]),
            "",
            f"not awaited; while importing: server {mid(figures['server_us']):,.0f}, "
            f"client {mid(figures['client_us']):,.0f}",
        ]
    )
    report.claim(
        "imported points per CPU second, client and server",
        mid(figures["per_cpu_s"]),
        ">=",
        40_000,
        "points",
    )
    report.notes.append("The client's CPU includes starting Python (part of `shoal import`).")


def write_parquet(path: Path, corpus: data.Corpus) -> None:
    """Columns id, vector (fixed-size list of float32) and one per payload key."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = pa.array(np.ascontiguousarray(corpus.vectors).ravel())
    payloads = [json.loads(p) for p in corpus.payloads]
    table = pa.table(
        {
            "id": pa.array(np.arange(len(corpus.vectors), dtype=np.int64)),
            "vector": pa.FixedSizeListArray.from_arrays(flat, data.DIM),
            **{key: pa.array([p[key] for p in payloads]) for key in payloads[0]},
        }
    )
    pq.write_table(table, path, row_group_size=8_192)


if __name__ == "__main__":
    main()
