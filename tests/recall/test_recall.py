"""What a search promises, held against brute force: recall, completeness, order, exactness.

The default run uses vectors shaped like text embeddings (topics of very unequal size around a few
themes, noise in few directions) small enough to be indexed in a second. Points carry a topic
(correlated with the vector: most queries then lie outside what a filter allows, the hard case for a
graph) and a random number (not correlated). The slow test does the same with 100k real embeddings.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from index_node.builder import ProcessBuilder
from shoal import limits
from shoal.api.filter import Filter, parse_filter
from shoal.batch import DenseBlock, PointBatch
from shoal.ids import PointIds
from shoal.settings import StorageSettings
from shoal.storage_api import (
    Delete,
    Distance,
    Hits,
    Search,
    Selector,
    ShardKey,
    ShardSpec,
    Upsert,
    VectorSpec,
)
from storage_node.node import StorageNode

ROOT = Path(__file__).resolve().parents[2]
KEY = ShardKey(1, 0)
K = 10
DIM = 64
SEED = 7
TOPICS = 120
DRAWS = 10_000
RECALL_MIN = 0.95

Vectors = NDArray[np.float32]
Run = Callable[[Coroutine[Any, Any, None]], None]


@dataclass(frozen=True)
class Points:
    """Row r is point id r. vectors (n, dim) float32; topic, draw (n,) int64; queries (q, dim)."""

    vectors: Vectors
    topic: NDArray[np.int64]
    draw: NDArray[np.int64]
    queries: Vectors

    def payload(self, row: int) -> bytes:
        return b'{"topic":"t%d","draw":%d}' % (self.topic[row], self.draw[row])


def textlike(count: int, *, unit: bool = True, queries: int = 100) -> Points:
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    spectrum = 1 / np.sqrt(1 + np.arange(DIM))  # a few directions carry most of the variance
    themes = rng.standard_normal((8, DIM)) * spectrum
    centres = (
        themes[rng.integers(0, 8, TOPICS)] + 0.7 * rng.standard_normal((TOPICS, DIM)) * spectrum
    )
    share = 1 / np.arange(1, TOPICS + 1) ** 0.8
    topic = rng.choice(TOPICS, count + queries, p=share / share.sum())
    noise = rng.standard_normal((count + queries, DIM)) * spectrum
    vectors = (centres[topic] + 0.8 * noise).astype(np.float32)
    if unit:
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    draw = rng.integers(0, DRAWS, count)
    return Points(vectors[:count], topic[:count], draw, vectors[count:])


def topics_filter(names: range) -> tuple[Filter, Callable[[Points], NDArray[np.bool_]]]:
    body = {"must": [{"key": "topic", "match": {"any": [f"t{i}" for i in names]}}]}
    return parsed(body), lambda points: np.isin(points.topic, np.array(names))


def draw_filter(below: int) -> tuple[Filter, Callable[[Points], NDArray[np.bool_]]]:
    body = {"must": [{"key": "draw", "range": {"lt": below}}]}
    return parsed(body), lambda points: points.draw < below


def parsed(body: dict[str, Any]) -> Filter:
    found = parse_filter(body)
    assert found is not None
    return found


# name -> filter and the rows that it allows; topics are the larger the smaller their number
FILTERS = {
    "50 % correlated": topics_filter(range(14)),
    "50 % random": draw_filter(5_000),
    "25 % correlated": topics_filter(range(2, 120, 3)),
    "25 % random": draw_filter(2_500),
    "10 % correlated": topics_filter(range(1, 2)),
    "10 % random": draw_filter(1_000),
    "1 % correlated": topics_filter(range(30, 32)),
    "1 % random": draw_filter(100),
    "0.1 % correlated": topics_filter(range(119, 120)),
    "0.1 % random": draw_filter(10),
}


# -- a node with the points in it -----------------------------------------------------------------
@asynccontextmanager
async def node_with(
    folder: Path, points: Points, distance: Distance, *, seal_bytes: int = 1 << 20
) -> AsyncIterator[StorageNode]:
    """All points written, sealed, merged and indexed as far as it goes."""
    vector = VectorSpec(points.vectors.shape[1], distance, index_bytes_min=1)
    # One thread, so that the graph is the same in every run.
    settings = StorageSettings(seal_bytes=seal_bytes, disk_free_bytes_min=0, index_threads=1)
    builder = ProcessBuilder()
    node = StorageNode(folder, builder=builder, settings=settings)
    await node.start([])
    try:
        await node.create_shard(ShardSpec(KEY, "test", {"": vector}))
        await upsert(node, points, np.arange(len(points.vectors)))
        await settled(node)
        yield node
    finally:
        await node.close()
        await builder.close()


async def upsert(node: StorageNode, points: Points, rows: NDArray[np.int64]) -> None:
    for start in range(0, len(rows), 2_000):
        part = rows[start : start + 2_000]
        batch = PointBatch(PointIds(part.astype(np.uint64)), {"": DenseBlock(points.vectors[part])})
        batch.set_payloads([points.payload(int(row)) for row in part])
        await node.write(KEY, Upsert(batch))


async def settled(node: StorageNode) -> None:
    while (await node.info(KEY)).pending:  # noqa: ASYNC110 (work in another process)
        await asyncio.sleep(0.01)


def exact(points: Points, query: Vectors, distance: Distance) -> NDArray[np.float64]:
    """(n,) scores by the definition of the distance, in float64."""
    vectors, q = points.vectors.astype(np.float64), query.astype(np.float64)
    match distance:
        case Distance.COSINE | Distance.DOT:
            return vectors @ q
        case Distance.EUCLID:
            return np.sqrt(((vectors - q) ** 2).sum(axis=1))
        case Distance.MANHATTAN:
            return np.abs(vectors - q).sum(axis=1)


def check(
    hits: Hits, scores: NDArray[np.float64], mask: NDArray[np.bool_], distance: Distance, k: int = K
) -> float:
    """Complete, allowed, distinct, in order, with right scores. Returns the recall."""
    ids = hits.points.ids.lo.astype(np.int64)
    rows = np.flatnonzero(mask)
    wanted = min(k, len(rows))
    assert len(ids) == len(set(ids.tolist())) == wanted
    assert mask[ids].all()
    np.testing.assert_allclose(hits.scores, scores[ids], rtol=1e-4, atol=1e-5)
    towards = -hits.scores if distance.larger_is_better else hits.scores
    assert (np.diff(towards) >= 0).all()
    best = scores[rows] if not distance.larger_is_better else -scores[rows]
    truth = rows[np.argpartition(best, wanted - 1)[:wanted]] if wanted < len(rows) else rows
    return len(set(ids.tolist()) & set(truth.tolist())) / wanted if wanted else 1.0


# -- the tests ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "scan_floats_max",
    [
        pytest.param(limits.SCAN_FLOATS_MAX, id="default"),
        pytest.param(0, id="graph", marks=pytest.mark.slow),
    ],
)
def test_recall_and_completeness_with_every_selectivity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scan_floats_max: int
) -> None:
    """ "graph": so few points would be scanned; this makes the planner treat them as a large segment."""
    monkeypatch.setattr(limits, "SCAN_FLOATS_MAX", scan_floats_max)
    points = textlike(12_000)
    cases = {"none": (None, np.ones(12_000, np.bool_))}
    cases |= {name: (f, mask(points)) for name, (f, mask) in FILTERS.items()}

    async def run() -> None:
        async with node_with(tmp_path, points, Distance.COSINE) as node:
            assert (await node.info(KEY)).indexed_vectors >= 9_000
            for name, (chosen, mask) in cases.items():
                found = []
                for query in points.queries:
                    hits = (await node.search(KEY, Search("", query, K, filter=chosen))).value
                    found.append(
                        check(hits, exact(points, query, Distance.COSINE), mask, Distance.COSINE)
                    )
                print(f"{name:16} {100 * mask.mean():5.2f} % recall {np.mean(found):.3f}")
                assert np.mean(found) >= RECALL_MIN, name

    asyncio.run(run())


def test_more_results_than_the_beam_is_wide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """k = 300 of the 25 % that lie elsewhere: a narrow beam alone would come back with fewer."""
    monkeypatch.setattr(limits, "SCAN_FLOATS_MAX", 0)
    points = textlike(12_000, queries=30)
    chosen, mask_of = FILTERS["25 % correlated"]
    mask = mask_of(points)

    async def run() -> None:
        async with node_with(tmp_path, points, Distance.COSINE) as node:
            for query in points.queries:
                hits = (await node.search(KEY, Search("", query, 300, filter=chosen, ef=16))).value
                check(hits, exact(points, query, Distance.COSINE), mask, Distance.COSINE, 300)

    asyncio.run(run())


@pytest.mark.parametrize("distance", list(Distance))
def test_exact_search_is_brute_force_after_deletes_and_updates(
    tmp_path: Path, distance: Distance
) -> None:
    points = textlike(6_000, unit=distance is Distance.COSINE, queries=30)

    async def run() -> None:
        async with node_with(tmp_path, points, distance, seal_bytes=256 << 10) as node:
            alive = await change(node, points)
            for query in points.queries:
                for name in ("none", "10 % correlated", "10 % random"):
                    chosen, mask_of = FILTERS.get(
                        name, (None, lambda p: np.ones(len(p.draw), bool))
                    )
                    scores = exact(points, query, distance)
                    search = Search("", query, K, filter=chosen, exact=True)
                    hits = (await node.search(KEY, search)).value
                    assert check(hits, scores, alive & mask_of(points), distance) == 1.0

    asyncio.run(run())


@pytest.mark.parametrize("distance", list(Distance))
def test_recall_after_deletes_and_updates(tmp_path: Path, distance: Distance) -> None:
    """A third of the indexed rows are dead, others moved to the growing segment."""
    points = textlike(8_000, unit=distance is Distance.COSINE)

    async def run() -> None:
        async with node_with(tmp_path, points, distance) as node:
            alive = await change(node, points)
            found = []
            for query in points.queries:
                hits = (await node.search(KEY, Search("", query, K))).value
                found.append(check(hits, exact(points, query, distance), alive, distance))
            print(f"recall {np.mean(found):.3f}")
            assert np.mean(found) >= RECALL_MIN

    asyncio.run(run())


async def change(node: StorageNode, points: Points) -> NDArray[np.bool_]:
    """Delete every third point, and give every seventh one of the others a vector near another
    point's: `points` changes with it. Returns (n,) who is alive."""
    count = len(points.vectors)
    rows = np.arange(count)
    alive = rows % 3 != 0
    gone = PointIds(rows[~alive].astype(np.uint64))
    await node.write(KEY, Delete(Selector(ids=gone)))
    moved = rows[alive & (rows % 7 == 0)]
    length = np.linalg.norm(points.vectors[moved], axis=1, keepdims=True)
    near = points.vectors[(moved + 1) % count] + 0.2 * points.vectors[(moved + 2) % count]
    points.vectors[moved] = near * (length / np.linalg.norm(near, axis=1, keepdims=True))
    await upsert(node, points, moved)
    assert (await node.count(KEY, None)).value == int(alive.sum())
    return alive


@pytest.mark.slow
def test_recall_on_100k_real_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's claim, by default settings; needs WordNet and the encoder (minutes, once)."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import data

    try:
        corpus = data.load()
    except data.MissingData as missing:
        pytest.skip(str(missing))
    vectors = np.ascontiguousarray(corpus.vectors)
    vector = VectorSpec(data.DIM, Distance.COSINE)
    cases: list[tuple[str, Filter | None, NDArray[np.bool_]]] = [
        ("none", None, np.ones(len(vectors), np.bool_))
    ]
    cases += [(case.name, parsed(case.body), case.mask(corpus)) for case in data.FILTERS]
    truth = {name: data.exact_top_k(vectors, corpus.queries, K, mask) for name, _, mask in cases}

    async def run() -> None:
        builder = ProcessBuilder()
        node = StorageNode(tmp_path, builder=builder, settings=StorageSettings())
        await node.start([])
        await node.create_shard(ShardSpec(KEY, "test", {"": vector}))
        for start in range(0, len(vectors), 4_000):
            ids = PointIds(np.arange(start, start + 4_000, dtype=np.uint64))
            batch = PointBatch(ids, {"": DenseBlock(vectors[start : start + 4_000])})
            batch.set_payloads(corpus.payloads[start : start + 4_000])
            await node.write(KEY, Upsert(batch))
        await settled(node)
        for name, chosen, mask in cases:
            share = 0.0
            for query, best in zip(corpus.queries, truth[name], strict=True):
                hits = (await node.search(KEY, Search("", query, K, filter=chosen))).value
                ids = hits.points.ids.lo.astype(np.int64)
                assert len(set(ids.tolist())) == len(ids) == len(best)
                assert mask[ids].all()
                share += len(set(ids.tolist()) & set(best.tolist())) / len(best)
            figure = share / len(corpus.queries)
            print(f"{name:18} {100 * mask.mean():6.3f} % recall@{K} {figure:.4f}")
            assert figure >= RECALL_MIN, name
        await node.close()
        await builder.close()

    asyncio.run(run())


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
