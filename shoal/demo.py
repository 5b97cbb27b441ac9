"""`shoal demo`: index the documentation of Python's standard library and ask it questions.

    1. start `shoal serve` as a child, on the data folder given (or use the server that has it)
    2. send the texts; the server turns them into vectors (what is there already is not sent again)
    3. print the answers to five questions, and leave the server up with its page at /dashboard

`shoal demo --check` does the same on a free port and a temporary folder, checks that the right
functions are found, prints timings and exits: 0 when all is well, else 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from shoal.cli import Parser
from shoal.corpus import CorpusEntry, python_stdlib_corpus
from shoal.data_dir import DataDirectory, ServerInfo
from shoal.encoder_api import DEFAULT_MODEL
from shoal.errors import ShoalError, StartupError, Unavailable

__all__ = [
    "COLLECTION",
    "QUESTIONS",
    "Indexed",
    "create_collection",
    "index_corpus",
    "run",
    "run_demo",
]

COLLECTION = "python-stdlib"
DIMENSION = 384

BATCH_POINTS = 64  # of one request: a few tenths of a second of embedding
REQUESTS_AT_ONCE = 4  # so that the encoder never waits for the next request
ANSWERS_SHOWN = 3
ANSWERS_CHECKED = 5
START_S_MAX = 60.0
STOP_S_MAX = 40.0
REQUEST_TIMEOUT_S = 120.0

SERVER_LOG = "server.log"
DEFAULT_PORT = 6333


@dataclass(frozen=True, slots=True)
class Question:
    """`expected`: a name that must be among the first five answers."""

    text: str
    expected: str


QUESTIONS = (
    Question("split a path into directory and file name", "os.path.split"),
    Question("run a shell command and capture its output", "subprocess.run"),
    Question("parse a date from a string", "datetime.datetime.strptime"),
    Question("compress bytes", "zlib.compress"),
    Question("temporary directory that is removed afterwards", "tempfile.TemporaryDirectory"),
)


@dataclass(frozen=True, slots=True)
class Indexed:
    """texts_total: in the corpus; texts_sent: of these, sent and embedded in this run.
    embed_s: of `took_s`, what the encoder computed."""

    texts_total: int
    texts_sent: int
    took_s: float
    embed_s: float


def run(arguments: list[str]) -> int:
    """The command; the exit status. Raises StartupError when the server cannot start."""
    parser = Parser("shoal demo", "Index Python's own documentation and ask it questions.")
    parser.add_argument(
        "--check",
        action="store_true",
        help="free port, temporary folder: check the answers, print timings, exit",
    )
    parser.add_argument(
        "--data-dir", type=Path, default=Path("shoal-data"), help="[default shoal-data]"
    )
    parser.add_argument("--http-port", type=int, default=DEFAULT_PORT, help="[default %(default)s]")
    given = parser.parse_args(arguments)
    console = Console(highlight=False)
    with _ended_by_signals():
        if given.check:
            with (
                tempfile.TemporaryDirectory(prefix="shoal-demo-") as folder,
                _Server(Path(folder) / "data", port=0) as server,
            ):
                return asyncio.run(run_demo(server.url, check=True, console=console))
        running = DataDirectory(given.data_dir).holder()
        if isinstance(running, ServerInfo) and _answers(running.url):
            console.print(f"A server with this data folder runs at {running.url}; using that one.")
            return asyncio.run(run_demo(running.url, check=False, console=console))
        with _Server(given.data_dir, port=given.http_port) as server:
            console.print(f"[green]●[/] Shoal serves at {server.url}  [dim]log: {server.log}[/]")
            status = asyncio.run(run_demo(server.url, check=False, console=console))
            if status == 0:
                with contextlib.suppress(KeyboardInterrupt):
                    console.print(
                        f"\nAsk your own questions at [bold]{server.url}/dashboard[/]"
                        "   [dim](Ctrl-C stops the server)[/]",
                        soft_wrap=True,
                    )
                    server.wait()
                console.print("\nStopping; everything is on disk.")
            return status


async def run_demo(base_url: str, *, check: bool, console: Console | None = None) -> int:
    """Index the corpus on a running server and ask the questions.

    check    compare the answers with what is expected and print timings.
    Returns  0, or 1 when an expected function is not among the first five answers.
    Raises   ShoalError with the server's sentence when it refuses something.
    """
    console = console or Console(highlight=False)
    began = time.perf_counter()
    corpus = await asyncio.to_thread(python_stdlib_corpus)
    read_s = time.perf_counter() - began
    async with httpx.AsyncClient(
        base_url=base_url, timeout=REQUEST_TIMEOUT_S, trust_env=False
    ) as http:
        await create_collection(http)
        indexed = await index_corpus(http, corpus, console)
        _say_what_was_indexed(console, indexed)
        await _ask(http, QUESTIONS[0].text, limit=1)  # loads the model, if indexing had no need to
        failed = []
        took_ms = []
        for question in QUESTIONS:
            started = time.perf_counter()
            answers = await _ask(http, question.text, limit=ANSWERS_CHECKED)
            took_ms.append((time.perf_counter() - started) * 1e3)
            _show_answers(console, question, answers[:ANSWERS_SHOWN], took_ms[-1])
            if question.expected not in [answer["payload"]["name"] for answer in answers]:
                failed.append(question)
        if not check:
            return 0
        vector_s = await _seconds_per_query(http)
    console.print(
        f"\n[bold]Timings[/]  reading the library {read_s:.1f} s · "
        f"{indexed.texts_sent} texts in {indexed.took_s:.1f} s, "
        f"of which embedding {indexed.embed_s:.1f} s, "
        f"storing and the rest {indexed.took_s - indexed.embed_s:.1f} s "
        f"({indexed.texts_sent / max(indexed.took_s, 1e-9):.0f} texts/s) · "
        f"question p50 {statistics.median(took_ms):.1f} ms · "
        f"search by vector p50 {vector_s * 1e3:.2f} ms",
        soft_wrap=True,
    )
    for question in failed:
        console.print(f"[red]missing[/] {question.expected} for “{question.text}”")
    console.print("[red]Some answers are wrong.[/]" if failed else "[green]All answers found.[/]")
    return 1 if failed else 0


async def index_corpus(
    http: httpx.AsyncClient, corpus: Sequence[CorpusEntry], console: Console
) -> Indexed:
    """Send what the collection does not have yet, in batches, several at once.

    A point's payload has the digest of everything that was sent for it; an equal digest means that
    it is there. So a second run sends nothing, and one after an upgrade of Python what changed.
    """
    points = [_point(entry) for entry in corpus]
    embed_s_before = await _embed_s_total(http)
    began = time.perf_counter()
    missing = await _missing(http, points)
    batches = [missing[at : at + BATCH_POINTS] for at in range(0, len(missing), BATCH_POINTS)]
    room = asyncio.Semaphore(REQUESTS_AT_ONCE)
    with _progress(console, visible=bool(missing)) as progress:
        bar = progress.add_task("Indexing", total=len(points), completed=len(points) - len(missing))

        async def send(batch: list[dict[str, Any]]) -> None:
            async with room:
                path = f"/collections/{COLLECTION}/points"
                await _call(http, "PUT", path, {"points": batch}, params={"wait": "true"})
                progress.advance(bar, len(batch))

        async with _all_or_first_error() as group:
            for batch in batches:
                group.create_task(send(batch))
    took_s = time.perf_counter() - began
    embed_s = await _embed_s_total(http) - embed_s_before
    return Indexed(len(points), len(missing), took_s, embed_s)


# -- requests -------------------------------------------------------------------------------------


async def create_collection(http: httpx.AsyncClient) -> None:
    """Make the collection unless it is there; its metadata tells the page how to show it."""
    found = await _call(http, "GET", f"/collections/{COLLECTION}/exists")
    if not found["exists"]:
        await _call(
            http,
            "PUT",
            f"/collections/{COLLECTION}",
            {
                "vectors": {
                    "size": DIMENSION,
                    "distance": "Cosine",
                    "shoal_model": DEFAULT_MODEL,
                },
                "metadata": {
                    "title": f"the Python {sys.version_info.major}.{sys.version_info.minor} "
                    "standard library",
                    "text_model": DEFAULT_MODEL,
                    "filter_key": "package",  # these two are for the page
                    "examples": [question.text for question in QUESTIONS],
                },
            },
        )


def _point(entry: CorpusEntry) -> dict[str, Any]:
    payload = entry.payload()
    sent = json.dumps([entry.text, DEFAULT_MODEL, payload], sort_keys=True)
    digest = hashlib.sha256(sent.encode()).hexdigest()[:16]
    return {
        "id": entry.id,
        "vector": {"text": entry.text, "model": DEFAULT_MODEL},
        "payload": {**payload, "digest": digest},
    }


async def _missing(
    http: httpx.AsyncClient, points: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    held: dict[str, str] = {}
    for at in range(0, len(points), 1_000):
        ids = [point["id"] for point in points[at : at + 1_000]]
        for record in await _call(
            http,
            "POST",
            f"/collections/{COLLECTION}/points",
            {"ids": ids, "with_payload": ["digest"], "with_vector": False},
        ):
            held[record["id"]] = (record["payload"] or {}).get("digest", "")
    return [point for point in points if held.get(point["id"]) != point["payload"]["digest"]]


async def _embed_s_total(http: httpx.AsyncClient) -> float:
    models = (await _call(http, "GET", "/shoal/v1/status"))["models"]
    return sum(float(model["busy_s_total"]) for model in models)


async def _ask(http: httpx.AsyncClient, text: str, *, limit: int) -> list[dict[str, Any]]:
    result = await _call(
        http,
        "POST",
        f"/collections/{COLLECTION}/points/query",
        {"query": {"text": text, "model": DEFAULT_MODEL}, "limit": limit, "with_payload": True},
    )
    answers: list[dict[str, Any]] = result["points"]
    return answers


async def _seconds_per_query(http: httpx.AsyncClient) -> float:
    """Median over 50 searches by a stored point's own vector: no embedding, only the search."""
    path = f"/collections/{COLLECTION}/points"
    result = await _call(http, "POST", f"{path}/scroll", {"limit": 50, "with_vector": True})
    took = []
    for record in result["points"]:
        started = time.perf_counter()
        await _call(http, "POST", f"{path}/query", {"query": record["vector"], "limit": 10})
        took.append(time.perf_counter() - started)
    return statistics.median(took)


async def _call(
    http: httpx.AsyncClient,
    method: str,
    path: str,
    body: object = None,
    params: dict[str, str] | None = None,
) -> Any:
    """The `result` of one call. A refusal becomes a ShoalError with the server's own sentence."""
    try:
        answer = await http.request(method, path, json=body, params=params)
    except httpx.HTTPError as error:
        raise Unavailable(
            f"The server at {http.base_url} does not answer ({type(error).__name__})."
        ) from error
    try:
        content = answer.json()
        if answer.is_success:
            return content["result"]
        sentence = content["status"]["error"]
    except (ValueError, KeyError, TypeError):
        sentence = answer.text[:200]
    raise ShoalError(f"The server refused {method} {path} with {answer.status_code}: {sentence}")


@contextlib.asynccontextmanager
async def _all_or_first_error() -> AsyncIterator[asyncio.TaskGroup]:
    """A TaskGroup whose first error comes out as itself."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except* ShoalError as errors:
        first: BaseException = errors
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None


# -- what people see ------------------------------------------------------------------------------


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} texts/s", style="cyan")


def _progress(console: Console, *, visible: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        console=console,
        disable=not visible,
    )


def _say_what_was_indexed(console: Console, indexed: Indexed) -> None:
    there = indexed.texts_total - indexed.texts_sent
    rate = indexed.texts_sent / indexed.took_s if indexed.took_s else 0.0
    sent = f"{indexed.texts_sent} texts embedded and stored in {indexed.took_s:.1f} s"
    if not indexed.texts_sent:
        sent = "Nothing to index"
    elif rate:
        sent += f" ({rate:.0f} texts/s)"
    console.print(sent + (f"; {there} were there already" if there else ""))


def _show_answers(
    console: Console, question: Question, answers: Sequence[dict[str, Any]], took_ms: float
) -> None:
    console.print(f"\n[bold]{question.text}[/]  [dim]{took_ms:.0f} ms[/]")
    for answer in answers:
        payload = answer["payload"]
        line = Text(f"  {answer['score']:.3f}  ")
        line.append(payload["name"], style="cyan")
        line.append("  ")
        line.append(payload["summary"], style="dim")
        console.print(line, no_wrap=True, overflow="ellipsis")


# -- the server -----------------------------------------------------------------------------------


class _Server:
    """`shoal serve` as a child process, in a process group of its own: Ctrl-C in the terminal
    reaches only this process, which then stops the child in good order."""

    def __init__(self, data_dir: Path, *, port: int) -> None:
        self._data_dir = data_dir
        self._port = port
        self._child: subprocess.Popen[bytes] | None = None
        self.log = data_dir / SERVER_LOG
        self.url = ""

    def __enter__(self) -> _Server:
        with DataDirectory(self._data_dir):
            pass  # raises here, before a log is written into a folder that is somebody else's
        offset = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                [
                    *(sys.executable, "-m", "shoal", "serve"),
                    *("--data-dir", str(self._data_dir)),
                    *("--http-port", str(self._port)),
                    # one that runs beside another server must not stumble over its gRPC port
                    *(() if self._port == DEFAULT_PORT else ("--grpc-port", "0")),
                    *("--encoder-preload", "true"),
                    *("--encoder-threads", str(os.cpu_count() or 1)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
            )
        try:
            self.url = self._wait_until_ready(self._child, offset)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        child, self._child = self._child, None
        if child is None or child.poll() is not None:
            return
        child.terminate()
        try:
            child.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()

    def wait(self) -> None:
        """Until the server ends, which it does when somebody stops it."""
        if self._child is not None:
            self._child.wait()

    def _wait_until_ready(self, child: subprocess.Popen[bytes], log_offset: int) -> str:
        directory = DataDirectory(self._data_dir)
        deadline = time.monotonic() + START_S_MAX
        while time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.05)
                raise StartupError(self._last_words(log_offset))
            info = directory.holder()
            if isinstance(info, ServerInfo) and info.pid == child.pid:
                return info.url
        raise StartupError(
            f"The server was not ready within {START_S_MAX:.0f} s; its log is {self.log}."
        )

    def _last_words(self, log_offset: int) -> str:
        """What the server said before it ended: its sentence, without the prefix."""
        said = self.log.read_bytes()[log_offset:].decode(errors="replace").strip()
        last = said.splitlines()[-1] if said else f"The server ended at once; see {self.log}."
        return last.removeprefix("shoal: ")


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=2.0, trust_env=False).is_success
    except httpx.HTTPError:
        return False


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM ends the demo as Ctrl-C does, so that the server is stopped too."""

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
