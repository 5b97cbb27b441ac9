"""The same 100k real embeddings in Shoal, Qdrant's engine, Chroma and LanceDB, side by side.

Each system at its own defaults, in its own process, with the same points, payloads and queries, k = 10
with payload. The three others run inside the process that asks; Shoal is a server asked over HTTP,
and its CPU is that of the server (the client would be the user's own program). Load is the time
until the last point is searchable by index: Shoal from columnar batches, the others in batches of
1,000 by their own Python API. Shoal's writes are fsynced; what the others promise is theirs to say.
CPU per query counts all threads: a system that uses two cores for one query shows less latency than
CPU. Rounds are interleaved over the systems. They are installed into a virtual environment of their
own, under the benchmark cache, by pip.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks import adapters, data
from benchmarks.harness import (
    BenchmarkFailed,
    Report,
    Server,
    drive,
    hit_ids,
    load_points,
    method,
    mid,
    options,
    percentile_ms,
    pin_threads,
    recall,
    search_request,
)

pin_threads()

K = 10
NAME = "glosses"
OTHERS = {"qdrant-edge-py": "0.9.0", "chromadb": "1.5.9", "lancedb": "0.40.0"}
CASES = ("", "10 % correlated", "1 % correlated")


class Contender(Protocol):
    """load and search answer with wall_s and cpu_s; search also with hits and latency_ns."""

    def load(self) -> dict[str, Any]: ...
    def search(self, first: int, count: int, case: str) -> dict[str, Any]: ...
    def usage(self) -> dict[str, Any]: ...


class Shoal:
    def __init__(self, server: Server, corpus: data.Corpus) -> None:
        self._server, self._corpus = server, corpus
        filters = {case.name: case.body for case in data.FILTERS}
        self._requests = {
            case: [
                search_request(NAME, q, K, query_filter=filters.get(case)) for q in corpus.queries
            ]
            for case in CASES
        }

    def load(self) -> dict[str, Any]:
        before = self._server.cpu_seconds(children=True)
        self._server.create(NAME, data.DIM)
        wall = load_points(self._server, NAME, self._corpus.vectors, self._corpus.payloads)
        wall += self._server.settle(NAME)
        return {"wall_s": wall, "cpu_s": self._server.cpu_seconds(children=True) - before}

    def search(self, first: int, count: int, case: str) -> dict[str, Any]:
        before = self._server.cpu_seconds(children=True)
        done = drive(self._server.port, self._requests[case], count=count, first=first, keep=True)
        return {
            "wall_s": done.wall_s,
            "cpu_s": self._server.cpu_seconds(children=True) - before,
            "latency_ns": done.latency_ns,
            "hits": [hit_ids(body) for body in done.bodies],
        }

    def usage(self) -> dict[str, Any]:
        return {
            "resident": self._server.memory_bytes()["rss"],
            "disk": self._server.disk_bytes(),
        }


class Other:
    """A child process running benchmarks/adapters.py."""

    def __init__(self, python: Path, name: str, inputs: Path, folder: Path) -> None:
        environment = {**os.environ, "RUST_LOG": "error", "LANCE_LOG": "error"}
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            environment.pop(variable, None)
        self._name = name
        self._process = subprocess.Popen(
            [str(python), adapters.__file__, name, str(inputs), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def _do(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise BenchmarkFailed(f"{self._name} ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def load(self) -> dict[str, Any]:
        return self._do(do="load")

    def search(self, first: int, count: int, case: str) -> dict[str, Any]:
        return self._do(do="search", first=first, count=count, filter=case)

    def usage(self) -> dict[str, Any]:
        return self._do(do="usage")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main() -> None:
    quick = options(__doc__).quick
    count, rounds, searches, filtered = (5_000, 2, 50, 20) if quick else (100_000, 7, 500, 100)
    python = environment_python()
    corpus = data.load(count)
    truth = {
        case: data.exact_top_k(corpus.vectors, corpus.queries, K, mask)
        for case, mask in (("", None), *((c.name, c.mask(corpus)) for c in data.FILTERS))
        if case in CASES
    }
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shoal-bench-")))
        write_inputs(folder, corpus)
        contenders: dict[str, Contender] = {"shoal": Shoal(stack.enter_context(Server()), corpus)}
        for name in OTHERS:
            other = Other(python, name, folder, folder / name)
            stack.callback(other.close)
            contenders[name] = other
        loads = {name: c.load() for name, c in contenders.items()}
        runs: dict[str, dict[str, list[dict[str, Any]]]] = {
            n: {c: [] for c in CASES} for n in contenders
        }
        for number, name in turns(list(contenders), rounds):
            for case in CASES:
                size = filtered if case else searches
                done = contenders[name].search(number * size, size, case)
                which = np.arange(number * size, number * size + size) % len(corpus.queries)
                done["recall"] = recall(done.pop("hits"), truth[case][which])
                done["latency_ns"] = np.asarray(done["latency_ns"], np.int64)
                runs[name][case].append(done)
        usage = {name: c.usage() for name, c in contenders.items()}
    table(quick, corpus, rounds, loads, runs, usage)


def turns(names: list[str], rounds: int) -> Iterator[tuple[int, str]]:
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            yield number, name


def table(
    quick: bool,
    corpus: data.Corpus,
    rounds: int,
    loads: dict[str, dict[str, Any]],
    runs: dict[str, dict[str, list[dict[str, Any]]]],
    usage: dict[str, dict[str, Any]],
) -> None:
    report = Report(
        "compare",
        f"Shoal beside others: {len(corpus.vectors):,} x {data.DIM} real embeddings, k = {K}",
        method(__doc__, f"{rounds} rounds; medians."),
        quick=quick,
        columns=[
            "system",
            "load s (CPU s)",
            "recall@10",
            "p50 / p99 ms",
            "searches/s, 1 client",
            "CPU ms a search",
            "10 % filter: recall, p50 ms, CPU ms",
            "1 % filter: recall, p50 ms, CPU ms",
            "resident MB",
            "disk MB",
        ],
    )

    def cpu_ms(done: dict[str, Any]) -> float:
        return float(done["cpu_s"] / len(done["latency_ns"]) * 1e3)

    def filtered(name: str, case: str) -> str:
        some = runs[name][case]
        latency = np.concatenate([d["latency_ns"] for d in some])
        return (
            f"{np.mean([d['recall'] for d in some]):.3f}, {percentile_ms(latency, 50):.2f}, "
            f"{mid([cpu_ms(d) for d in some]):.2f}"
        )

    labels = {name: f"{name} {version}" for name, version in OTHERS.items()}
    labels["shoal"] = "Shoal, over HTTP"
    for name, load in loads.items():
        plain = runs[name][""]
        latency: NDArray[np.int64] = np.concatenate([d["latency_ns"] for d in plain])
        report.rows.append(
            [
                labels[name],
                f"{load['wall_s']:,.0f} ({load['cpu_s']:,.0f})",
                f"{np.mean([d['recall'] for d in plain]):.3f}",
                f"{percentile_ms(latency, 50):.2f} / {percentile_ms(latency, 99):.2f}",
                f"{mid([len(d['latency_ns']) / d['wall_s'] for d in plain]):,.0f}",
                f"{mid([cpu_ms(d) for d in plain]):.2f}",
                filtered(name, CASES[1]),
                filtered(name, CASES[2]),
                f"{usage[name]['resident'] / 1e6:,.0f}",
                f"{usage[name]['disk'] / 1e6:,.0f}",
            ]
        )
    report.raw = {
        "load": loads,
        "usage": usage,
        "rounds": {
            name: {
                case or "unfiltered": [
                    {
                        "recall": d["recall"],
                        "cpu_ms": cpu_ms(d),
                        "wall_s": d["wall_s"],
                        "p50_ms": percentile_ms(d["latency_ns"], 50),
                        "p99_ms": percentile_ms(d["latency_ns"], 99),
                    }
                    for d in some
                ]
                for case, some in cases.items()
            }
            for name, cases in runs.items()
        },
    }
    report.write()


def write_inputs(folder: Path, corpus: data.Corpus) -> None:
    np.save(folder / "vectors.npy", corpus.vectors)
    np.save(folder / "queries.npy", corpus.queries)
    (folder / "payloads.jsonl").write_bytes(b"\n".join(corpus.payloads) + b"\n")
    conditions = {
        case.name: {"any": list(case.domains)} if case.domains else {"lt": case.draw_below}
        for case in data.FILTERS
    }
    (folder / "filters.json").write_text(json.dumps(conditions))


def environment_python() -> Path:
    """The interpreter of a virtual environment that has the others; made and filled when missing."""
    folder = data.cache_dir() / "venv"
    python = folder / "bin" / "python"
    wanted = [f"{name}=={version}" for name, version in OTHERS.items()]
    if not python.exists():
        venv.create(folder, with_pip=True)
    have = (
        subprocess.run(
            [str(python), "-m", "pip", "freeze"], capture_output=True, text=True, check=True
        )
        .stdout.lower()
        .split()
    )
    if not all(w in have for w in wanted):
        print(f"installing {', '.join(wanted)} into {folder}", file=sys.stderr)
        subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", "numpy", "pyarrow", *wanted],
            check=True,
        )
    return python


if __name__ == "__main__":
    main()
