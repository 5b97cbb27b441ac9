"""Claims: 1M x 128 with HNSW takes at most 1.4 x raw + 200 MB resident, and is ready 3 s after a restart.

Points without payload, loaded in columnar batches. Resident memory is VmRSS of the server and its
children, mapped pages counted, after loading has settled, and again after a restart; what the claim is
about is read after 5,000 random searches and some exact ones, which map in all that searches need.
While an index is built, its builder holds a copy of the vectors besides: the highest total is in the
notes. Ready: from starting the process until /readyz answers, checksums verified as by default; the
page cache is warm. Raw is 4 bytes x 128 x points.
"""

from __future__ import annotations

from benchmarks import data
from benchmarks.harness import (
    Report,
    Server,
    drive,
    load_points,
    method,
    mid,
    options,
    pin_threads,
    search_request,
    spread,
)

pin_threads()

NAME = "big"
DIM = 128
MB = 1e6


def main() -> None:
    quick = options(__doc__).quick
    count, searches, restarts = (50_000, 500, 2) if quick else (1_000_000, 5_000, 5)
    vectors, queries = data.synthetic(count, DIM)
    raw = vectors.nbytes
    report = Report(
        "memory",
        f"Memory and restart: {count:,} x {DIM}, HNSW",
        method(__doc__),
        quick=quick,
        columns=["when", "resident MB", "of it anonymous MB", "mapped files MB", "times raw"],
    )

    def note(when: str, server: Server) -> int:
        used = server.memory_bytes()
        report.raw[when] = used
        sizes = [f"{used[k] / MB:,.0f}" for k in ("rss", "anonymous", "file")]
        report.rows.append([when, *sizes, f"{used['rss'] / raw:.2f}"])
        return used["rss"]

    requests = [search_request(NAME, q, 10) for q in queries]
    scans = [search_request(NAME, q, 10, params={"exact": True}) for q in queries[:5]]
    with Server() as server:
        note("empty", server)
        server.create(NAME, DIM, "Euclid")
        loaded_s = load_points(server, NAME, vectors, batch=8_192)
        del vectors
        settled_s = server.settle(NAME)
        note("loaded and settled", server)
        info = server.call("GET", f"/collections/{NAME}")
        drive(server.port, requests, count=searches)
        drive(server.port, scans)
        after_load = note("after searches", server)
        building = server.cpu_seconds(children=True) - server.cpu_seconds()
        ready = []
        for _ in range(restarts):
            server.stop()
            ready.append(server.start())
        note("restarted", server)
        drive(server.port, requests, count=searches)
        drive(server.port, scans)
        after_restart = note("restarted, after searches", server)
        disk = server.disk_bytes()

    goal = 1.4 * raw + 200 * MB
    report.claim("resident after loading, warm", after_load / MB, "<=", round(goal / MB), "MB")
    report.claim("resident after restart, warm", after_restart / MB, "<=", round(goal / MB), "MB")
    report.claim("ready after restart", mid(ready), "<=", 3, "s")
    report.raw["ready_s"] = ready
    report.raw["load_s"], report.raw["settle_s"] = loaded_s, settled_s
    report.notes += [
        f"raw vectors {raw / MB:,.0f} MB; on disk {disk / MB:,.0f} MB; "
        f"{info['segments_count']} segments, {info['indexed_vectors_count']:,} vectors indexed",
        f"loaded in {loaded_s:,.0f} s, settled {settled_s:,.0f} s later; "
        f"{building:,.0f} CPU s of index builders",
        f"at most {server.peak_bytes / MB:,.0f} MB together with index builders while settling",
        f"ready after {spread(ready, 2)} s over {restarts} restarts",
    ]
    report.write()


if __name__ == "__main__":
    main()
