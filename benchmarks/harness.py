"""What the benchmarks share: a server of their own, its CPU time and memory, a cheap HTTP client that
runs in another process than the server, and result files.

CPU time is user and system time of the server process, all threads, from its CPU clock (what utime +
stime of /proc/<pid>/stat count in ticks of 10 ms, in nanoseconds); `children` adds the processes that
it started (index builders). CPU time, not wall time, is compared: it depends less on what else the
machine does.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from shoal.batch import DenseBlock, PointBatch
from shoal.ids import PointIds

__all__ = [
    "BenchmarkFailed",
    "Driven",
    "Front",
    "Report",
    "Server",
    "cpu_clock_s",
    "drive",
    "hit_ids",
    "http_request",
    "interleave",
    "load_points",
    "machine",
    "method",
    "mid",
    "options",
    "percentile_ms",
    "pin_threads",
    "recall",
    "search_request",
    "spread",
]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
START_S_MAX = 120.0
STOP_S_MAX = 60.0
SETTLE_S_MAX = 1_800.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class BenchmarkFailed(RuntimeError):
    """The thing measured did not do what it should; the message carries what it said."""


def pin_threads() -> None:
    """One OpenMP and BLAS thread here, so that CPU per search means one core. Call before faiss."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


# -- the server -----------------------------------------------------------------------------------
class Front:
    """Something that answers HTTP on `port` of this machine: a server, or a coordinator."""

    port = 0

    def __init__(self) -> None:
        self._connection: http.client.HTTPConnection | None = None

    def disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def log_tail(self) -> str:
        """What the processes behind it said last, for messages about failures."""
        raise NotImplementedError

    def observe(self) -> None:
        """Called while `settle` waits."""

    def call(
        self, method: str, path: str, body: Any = None, content_type: str = "application/json"
    ) -> Any:
        """One request on a kept connection; `result` of the answer. bytes go as they are."""
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body)
        if self._connection is None:
            self._connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            self._connection.request(method, path, data, {"Content-Type": content_type})
            response = self._connection.getresponse()
            text = response.read()
        except (http.client.HTTPException, OSError) as e:
            raise BenchmarkFailed(f"{method} {path}: {e!r}\n{self.log_tail()}") from e
        if response.status != 200:
            raise BenchmarkFailed(f"{method} {path}: {response.status} {text[:2_000]!r}")
        try:
            answer = json.loads(text)
        except json.JSONDecodeError:
            return text
        return answer.get("result") if isinstance(answer, dict) else answer

    def create(
        self,
        name: str,
        dim: int,
        distance: str = "Cosine",
        **more: Any,
    ) -> None:
        self.call(
            "PUT", f"/collections/{name}", {"vectors": {"size": dim, "distance": distance}, **more}
        )

    def settle(self, name: str) -> float:
        """Wait until nothing waits for a merge or an index. Seconds waited."""
        began = time.monotonic()
        calm = 0
        while time.monotonic() - began < SETTLE_S_MAX:
            info = self.call("GET", f"/collections/{name}")
            self.observe()
            calm = calm + 1 if info["status"] == "green" else 0
            if calm == 4:  # a seal may follow a merge: green must last
                return time.monotonic() - began
            time.sleep(0.25)
        raise BenchmarkFailed(f"{name} did not settle: {info}\n{self.log_tail()}")

    def segments(self, name: str) -> int:
        return int(self.call("GET", f"/collections/{name}")["segments_count"])


class Server(Front):
    """`shoal serve` on a free port with a data directory of its own, stopped and removed at the end.

    environment: settings (SHOAL_...) on top of the defaults, which are what the claims are about.
    """

    def __init__(self, *, environment: dict[str, str] | None = None) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory(prefix="shoal-bench-")
        self.data_dir = Path(self._folder.name) / "data"
        self._log_path = Path(self._folder.name) / "server.log"
        ours = ("SHOAL_", "OMP_", "OPENBLAS_", "MKL_")  # of this process, not the server's
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        self._environment = {**inherited, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self.grpc_port = 0
        self.peak_bytes = 0  # the most seen by `settle`, with children

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self._folder.cleanup()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.stop()
        finally:
            self._folder.cleanup()

    @property
    def pid(self) -> int:
        if self._process is None:
            raise BenchmarkFailed("the server is not running")
        return self._process.pid

    def start(self) -> float:
        """Start and wait until it is ready. Seconds from process start to the first good answer."""
        began = time.monotonic()
        command = [sys.executable, "-m", "shoal", "serve", "--data-dir", str(self.data_dir)]
        command += ["--http-host", "127.0.0.1", "--http-port", "0"]
        command += ["--grpc-port", "0"]
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=self._environment, stdout=log, stderr=log
            )
        note = self.data_dir / "server.json"
        while time.monotonic() - began < START_S_MAX:
            if self._process.poll() is not None:
                raise BenchmarkFailed(f"the server ended at start:\n{self.log_tail()}")
            try:
                found = json.loads(note.read_bytes())
            except (FileNotFoundError, json.JSONDecodeError):
                found = {}
            if found.get("pid") == self._process.pid:
                self.port = int(found["http_port"])
                self.grpc_port = int(found["grpc_port"])
                self.call("GET", "/readyz")
                return time.monotonic() - began
            time.sleep(0.002)
        self.stop()
        raise BenchmarkFailed(f"not ready after {START_S_MAX:.0f} s:\n{self.log_tail()}")

    def stop(self) -> None:
        """SIGTERM, and after a minute SIGKILL, to this server's process only."""
        self.disconnect()
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def log_tail(self) -> str:
        return self._log_path.read_text(errors="replace")[-3_000:]

    def observe(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self.memory_bytes()["rss"])

    # -- what it costs --
    def cpu_seconds(self, *, children: bool = False) -> float:
        """User and system CPU seconds so far; with `children`, of ended and live ones too."""
        total = cpu_clock_s(self.pid)
        if children:
            total += _ended_children_s(self.pid)
            total += sum(cpu_clock_s(p) + _ended_children_s(p) for p in _descendants(self.pid))
        return total

    def memory_bytes(self) -> dict[str, int]:
        """Resident bytes of the server and its children: all, anonymous, and mapped files."""
        out = {"rss": 0, "anonymous": 0, "file": 0}
        for pid in [self.pid, *_descendants(self.pid)]:
            try:
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            except (FileNotFoundError, ProcessLookupError):
                continue
            kib = {
                line.split(":")[0]: line.split()[1]
                for line in lines
                if line.startswith(("VmRSS", "RssAnon", "RssFile"))
            }
            for key, name in (("rss", "VmRSS"), ("anonymous", "RssAnon"), ("file", "RssFile")):
                out[key] += int(kib.get(name, 0)) * 1024
        return out

    def disk_bytes(self) -> int:
        """Blocks in use under the data directory."""
        return sum(p.stat().st_blocks * 512 for p in self.data_dir.rglob("*") if p.is_file())


def cpu_clock_s(pid: int) -> float:
    """The CPU clock of another process, all its threads (clock_getcpuclockid(3)); 0 when it ended."""
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0


def _ended_children_s(pid: int) -> float:
    """CPU of children that ended and were waited for: cutime and cstime, in ticks of 10 ms."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[13]) + int(fields[14])) / TICKS_PER_S


def _descendants(pid: int) -> list[int]:
    out: list[int] = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                out += [int(child), *_descendants(int(child))]
    except (FileNotFoundError, ProcessLookupError):
        pass
    return out


def load_points(
    server: Front,
    collection: str,
    vectors: NDArray[np.float32],
    payloads: Sequence[bytes] | None = None,
    *,
    first_id: int = 0,
    batch: int = 4_096,
) -> float:
    """Upsert rows as columnar batches, ids first_id + row, the quickest way in. Seconds taken."""
    began = time.monotonic()
    for start in range(0, len(vectors), batch):
        rows = np.ascontiguousarray(vectors[start : start + batch])
        ids = PointIds(np.arange(first_id + start, first_id + start + len(rows), dtype=np.uint64))
        points = PointBatch(ids, dense={"": DenseBlock(rows)})
        points.set_payloads(
            [b""] * len(rows) if payloads is None else payloads[start : start + batch]
        )
        server.call(
            "PUT",
            f"/shoal/v1/collections/{collection}/batches?wait=true",
            points.to_wire().SerializeToString(),
            "application/x-protobuf",
        )
    return time.monotonic() - began


# -- the client -----------------------------------------------------------------------------------
def search_request(
    collection: str,
    vector: NDArray[np.float32],
    limit: int,
    *,
    query_filter: dict[str, Any] | None = None,
    params: dict[str, Any] | None = None,
    with_payload: bool = True,
) -> bytes:
    """The whole HTTP request of one search, as Qdrant's Python client writes it: floats in full."""
    body: dict[str, Any] = {"query": vector.tolist(), "limit": limit, "with_payload": with_payload}
    if query_filter is not None:
        body["filter"] = query_filter
    if params is not None:
        body["params"] = params
    return http_request("POST", f"/collections/{collection}/points/query", body)


def http_request(method: str, path: str, body: Any) -> bytes:
    data = json.dumps(body, separators=(",", ":")).encode()
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


class _Connection(asyncio.Protocol):
    """Sends one request after another over a kept connection. Parses no more than a benchmark must:
    the status line, Content-Length, and where the body ends."""

    def __init__(self, drive: _Drive) -> None:
        self._drive = drive
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None
        self._current = 0
        self._sent_ns = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._send_next()

    def _send_next(self) -> None:
        assert self._transport is not None
        number = self._drive.take()
        if number is None:
            self._transport.close()
            return
        self._current = number
        self._sent_ns = time.perf_counter_ns()
        self._transport.write(self._drive.requests[number % len(self._drive.requests)])

    def data_received(self, data: bytes) -> None:
        self._received += data
        head = self._received.find(b"\r\n\r\n")
        if head < 0:
            return
        lower = bytes(self._received[:head]).lower()
        at = lower.find(b"content-length:")
        if at < 0:
            self._drive.fail(f"an answer without Content-Length: {lower!r}")
            return
        length = int(lower[at + 15 :].split(b"\r\n", 1)[0])
        if len(self._received) < head + 4 + length:
            return
        took = time.perf_counter_ns() - self._sent_ns
        body = bytes(self._received[head + 4 : head + 4 + length])
        if lower[9:12] != b"200":
            self._drive.fail(f"{lower[:60]!r} {body[:500]!r}")
            return
        self._received.clear()
        self._drive.done(self._current, took, body)
        self._send_next()

    def connection_lost(self, error: Exception | None) -> None:
        self._drive.lost(error)


class _Drive:
    def __init__(self, requests: Sequence[bytes], count: int, first: int, keep: bool) -> None:
        self.requests = requests
        self.latency_ns = np.zeros(count, np.int64)
        self.bodies: list[bytes] = [b""] * count if keep else []
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._count, self._first = count, first
        self._taken = self._completed = 0

    def take(self) -> int | None:
        if self._taken == self._count or self.finished.done():
            return None
        self._taken += 1
        return self._first + self._taken - 1

    def done(self, number: int, took_ns: int, body: bytes) -> None:
        self.latency_ns[number - self._first] = took_ns
        if self.bodies:
            self.bodies[number - self._first] = body
        self._completed += 1
        if self._completed == self._count and not self.finished.done():
            self.finished.set_result(None)

    def fail(self, message: str) -> None:
        if not self.finished.done():
            self.finished.set_exception(BenchmarkFailed(message))

    def lost(self, error: Exception | None) -> None:
        if self._completed < self._count and self._taken < self._count:
            self.fail(f"the server closed the connection: {error}")


@dataclass(slots=True)
class Driven:
    """One run of requests. latency_ns (n,) int64 in request order; bodies only when asked for."""

    latency_ns: NDArray[np.int64]
    wall_s: float
    bodies: list[bytes]

    @property
    def per_s(self) -> float:
        return len(self.latency_ns) / self.wall_s


def drive(
    port: int,
    requests: Sequence[bytes],
    *,
    count: int | None = None,
    connections: int = 1,
    first: int = 0,
    keep: bool = False,
) -> Driven:
    """Send `count` requests, cycling through `requests` from number `first`, over `connections`
    kept connections, each with one request in flight. An answer other than 200 ends the run."""

    async def run() -> Driven:
        loop = asyncio.get_running_loop()
        work = _Drive(requests, count or len(requests), first, keep)
        began = time.perf_counter()
        transports = [
            (await loop.create_connection(lambda: _Connection(work), "127.0.0.1", port))[0]
            for _ in range(connections)
        ]
        try:
            await work.finished
        finally:
            for transport in transports:
                transport.close()
        return Driven(work.latency_ns, time.perf_counter() - began, work.bodies)

    with asyncio.Runner(loop_factory=_new_loop) as runner:
        return runner.run(run())


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def hit_ids(body: bytes) -> list[int]:
    return [point["id"] for point in json.loads(body)["result"]["points"]]


# -- options and figures ---------------------------------------------------------------------------
def options(
    about: str | None, more: Callable[[argparse.ArgumentParser], None] | None = None
) -> argparse.Namespace:
    """--quick, and what `more` adds. From here on SIGTERM ends this process in order: it stops the
    servers that it started and removes their data."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small sizes, to see that it runs; figures mean nothing",
    )
    if more is not None:
        more(parser)
    return parser.parse_args()


def method(about: str | None, more: str = "") -> str:
    """The part of a module's docstring after its first paragraph, as one line."""
    return " ".join(((about or "").split("\n\n", 1)[-1] + " " + more).split())


def spread(values: Sequence[float], digits: int = 0) -> str:
    """median (smallest to largest)"""
    low, high = min(values), max(values)
    return f"{mid(values):,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def recall(found: Iterable[Sequence[int]], truth: Iterable[Sequence[int]]) -> float:
    """Mean share of the true neighbours that were found. Queries without any count as 1."""
    shares = [
        len(set(map(int, f)) & set(map(int, t))) / len(t) if len(t) else 1.0
        for f, t in zip(found, truth, strict=True)
    ]
    return float(np.mean(shares))


def percentile_ms(latency_ns: NDArray[np.int64], percent: float) -> float:
    return float(np.percentile(latency_ns, percent)) / 1e6


def interleave(variants: dict[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Call every variant once a round with the round's number, in turning order so that none is
    always first. name -> one figure per round."""
    names = list(variants)
    out: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            out[name].append(variants[name](number))
    return out


def mid(values: Sequence[float]) -> float:
    return float(median(values))


# -- reports --------------------------------------------------------------------------------------
@dataclass
class Report:
    """What one benchmark found: a table, claims with goal and figure, and all raw numbers."""

    name: str
    title: str
    method: str
    quick: bool = False
    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    claims: list[dict[str, Any]] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def claim(self, what: str, figure: float, relation: str, goal: float, unit: str) -> bool:
        """Record whether `figure` keeps its goal; relation is "<=" or ">="."""
        kept = figure <= goal if relation == "<=" else figure >= goal
        self.claims.append(
            {
                "what": what,
                "figure": figure,
                "relation": relation,
                "goal": goal,
                "unit": unit,
                "kept": kept,
            }
        )
        return kept

    def write(self) -> Path:
        """results/NAME.json and results/NAME.md; a quick run goes to results/quick/ (not kept)."""
        folder = RESULTS / "quick" if self.quick else RESULTS
        folder.mkdir(parents=True, exist_ok=True)
        about = machine()
        whole = {
            "name": self.name,
            "title": self.title,
            "method": self.method,
            "about": about,
            "claims": self.claims,
            "columns": self.columns,
            "rows": self.rows,
            "notes": self.notes,
            "raw": self.raw,
        }
        (folder / f"{self.name}.json").write_text(json.dumps(whole, indent=1) + "\n")
        text = self.markdown(about)
        (folder / f"{self.name}.md").write_text(text)
        print(text)
        return folder / f"{self.name}.md"

    def markdown(self, about: dict[str, Any]) -> str:
        out = [f"# {self.title}", ""]
        if self.claims:
            out += ["| claim | goal | measured | kept |", "|---|---|---|---|"]
            for c in self.claims:
                sign = {"<=": "≤", ">=": "≥"}[c["relation"]]
                out.append(
                    f"| {c['what']} | {sign} {c['goal']:,g} {c['unit']} | "
                    f"{c['figure']:,.5g} {c['unit']} | {'yes' if c['kept'] else '**no**'} |"
                )
            out.append("")
        if self.columns:
            out += ["| " + " | ".join(self.columns) + " |", "|" + "---|" * len(self.columns)]
            out += ["| " + " | ".join(row) + " |" for row in self.rows] + [""]
        out += [*(f"- {note}" for note in self.notes), ""] if self.notes else []
        out += ["How: " + self.method, ""]
        out.append(
            f"{about['date']}, commit {about['commit']}, {about['cpu']}, {about['cores']} cores, "
            f"{about['memory_gib']:.0f} GiB, load {about['load_1m']:.1f} at the end; "
            + ", ".join(f"{k} {v}" for k, v in about["versions"].items())
            + "."
        )
        return "\n".join(out) + "\n"


def machine() -> dict[str, Any]:
    """Where and what was measured."""
    cpu = platform.processor() or platform.machine()
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    family = {
        line.split(":")[0].strip(): line.split(":")[1].strip()
        for line in _lines("/proc/cpuinfo")[:12]
        if ":" in line
    }
    memory = next(
        (int(x.split()[1]) for x in _lines("/proc/meminfo") if x.startswith("MemTotal")), 0
    )
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "cpu": f"{cpu} (family {family.get('cpu family', '?')}, model {family.get('model', '?')})",
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": memory / 2**20,
        "load_1m": os.getloadavg()[0],
        "versions": {
            "Python": platform.python_version(),
            **{name: _version(name) for name in ("shoal", "faiss-cpu", "numpy", "uvicorn")},
        },
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def _commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"
    )
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+changes" if changed else "")
