"""Answering a search, scroll or count over the segments of one shard.

A `Snapshot` fixes what is read (which segments, how many rows, which are alive), so a read may run in
any thread while the shard goes on changing. The promise: k results whenever k points match.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from shoal.api.filter import FieldCondition, Filter, MatchAny, MatchExcept, MatchValue
from shoal.batch import PointBatch, pack_bits, unpack_bits
from shoal.errors import Stale, must
from shoal.faiss_index import Graph, distances
from shoal.ids import PointIds
from shoal.payload import parse_path
from shoal.storage_api import Distance, Hits, Scroll, Search, ShardSpec
from storage_node.filtering import allowed as filter_allowed
from storage_node.growing import GrowingVector, GrowingView
from storage_node.planner import Strategy, plan_search, widen
from storage_node.segment import SealedSegment, SealedVector, complete, concat

__all__ = [
    "Snapshot",
    "SnapshotUnit",
    "count_points",
    "expected_floats",
    "is_quick",
    "matching_ids",
    "scroll",
    "search",
    "take_rows",
    "vector_counts",
]

_SCROLL_WINDOW_ROWS = 8192
_QUICK_FILTER_ROWS_MAX = 2_000
_COLUMN_FILTER_ROWS_MAX = 200_000
_FLOAT32_MAX = float(np.finfo(np.float32).max)
Bits = NDArray[np.uint8]


@dataclass(slots=True)
class SnapshotUnit:
    """One segment as of the snapshot. live: packed bitmap, not shared; None = every row lives.
    vectors: those there were; a vector that is dropped meanwhile stays readable here."""

    rows: GrowingView | SealedSegment
    row_count: int
    live: Bits | None
    lock: threading.Lock | None = None  # guards the columns of a growing segment
    vectors: Mapping[str, GrowingVector | SealedVector] = field(init=False)

    def __post_init__(self) -> None:
        self.vectors = self.rows.vectors


@dataclass(slots=True)
class Snapshot:
    spec: ShardSpec
    units: Sequence[SnapshotUnit]


def search(snapshot: Snapshot, query: Search) -> Hits:
    """The `limit` best points; exact wherever no index is used. See shoal.storage_api.Search.
    Raises Stale for a vector that the shard does not have (any more, or yet)."""
    vector = snapshot.spec.dense.get(query.using)
    if vector is None or vector.dim != len(query.vector):
        raise Stale(
            f"this replica of shard {snapshot.spec.key.shard} has no vector {query.using!r} of "
            f"{len(query.vector)} dimensions: it was dropped, or was added a moment ago; try again"
        )
    must(not vector.multi, f"{query.using!r} is not a dense vector")
    found: list[tuple[int, NDArray[np.int64], NDArray[np.float32]]] = []
    for number, unit in enumerate(snapshot.units):
        if unit.row_count == 0:
            continue
        rows, scores = _search_unit(unit, query, vector.distance)
        if query.score_threshold is not None:
            limit = np.float32(query.score_threshold)
            keep = scores > limit if vector.distance.larger_is_better else scores < limit
            rows, scores = rows[keep], scores[keep]
        if len(rows):
            found.append((number, rows, scores))
    return _collect(snapshot, query, found, vector.distance.larger_is_better)


def _collect(
    snapshot: Snapshot,
    query: Search,
    found: Sequence[tuple[int, NDArray[np.int64], NDArray[np.float32]]],
    larger_is_better: bool,
) -> Hits:
    """The best of all segments. Contents are fetched for the winners only."""
    best: list[tuple[float, int, int, int]] = []  # rank (small is good), key, unit, row
    for number, rows, scores in found:
        ranks = -scores if larger_is_better else scores
        keys = snapshot.units[number].rows.keys_of(rows)
        best += zip(ranks.tolist(), keys, repeat(number), rows.tolist(), strict=False)
    best.sort()  # equal ranks: the smaller id first, so that every replica says the same
    del best[query.limit :]
    towards = np.array([rank for rank, _, _, _ in best], np.float32)
    scores = -towards if larger_is_better else towards
    if query.with_vectors:
        places = [(number, row) for _, _, number, row in best]
        return Hits(take_rows(snapshot, places, query.with_payload, query.with_vectors), scores)
    places_of = [(snapshot.units[number].rows, row) for _, _, number, row in best]
    points = PointBatch(PointIds.from_keys([key for _, key, _, _ in best]))
    points.versions = np.array([rows.version(row) for rows, row in places_of], np.uint64)
    if query.with_payload:
        points.set_payloads([rows.payload_bytes(row) for rows, row in places_of])
    return Hits(points, scores)


def _search_unit(
    unit: SnapshotUnit, query: Search, distance: Distance
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Up to `limit` best rows of one segment, best first, with their scores."""
    vector = unit.vectors.get(query.using)
    values = None if vector is None else vector.values(unit.row_count)
    if vector is None or values is None:  # no row has it, or none any more
        return np.empty(0, np.int64), np.empty(0, np.float32)
    bits = _allowed_bits(unit, query.filter, query.exclude, vector)
    of_row = vector.places(unit.row_count)
    if of_row is not None and bits is not None:  # from here on, count vectors and not rows
        bits = pack_bits(unpack_bits(bits, unit.row_count)[of_row])
    found, scores = _search_vectors(vector.graph, query, distance, values, bits)
    return (found if of_row is None else of_row[found]), scores


def _search_vectors(
    graph: Graph | None,
    query: Search,
    distance: Distance,
    vectors: NDArray[np.float32],
    bits: Bits | None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    count = len(vectors)
    allowed = count if bits is None else int(np.bitwise_count(bits).sum(dtype=np.int64))
    strategy, ef = plan_search(
        rows=count,
        allowed=allowed,
        dim=vectors.shape[1],
        has_graph=graph is not None,
        exact=query.exact,
        ef=query.ef,
        limit=query.limit,
    )
    if strategy is Strategy.SKIP:
        return np.empty(0, np.int64), np.empty(0, np.float32)
    if strategy is Strategy.GRAPH and graph is not None:
        found = _search_graph(graph, query, ef, bits, min(query.limit, allowed))
        if found is not None:
            return found
        strategy = Strategy.SCAN_ALLOWED if bits is not None else Strategy.SCAN_ALL
    return _scan(query, distance, vectors, bits, strategy)


def _search_graph(
    graph: Graph, query: Search, ef: int, bits: Bits | None, wanted: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
    """None when even the widest beam finds fewer than `wanted`, which are known to exist."""
    width: int | None = ef
    while width is not None:
        rows, scores = graph.search(query.vector, query.limit, width, bits)
        if len(rows) >= wanted:
            return rows, scores
        width = widen(width)
    return None


def _scan(
    query: Search,
    distance: Distance,
    vectors: NDArray[np.float32],
    bits: Bits | None,
    strategy: Strategy,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    if strategy is Strategy.SCAN_ALLOWED and bits is not None:
        rows = np.flatnonzero(unpack_bits(bits, len(vectors)))
        scores = distances(query.vector, vectors, distance, rows)
    else:
        scores = distances(query.vector, vectors, distance)
        rows = np.arange(len(scores))
        if bits is not None:
            mask = unpack_bits(bits, len(vectors))
            rows, scores = rows[mask], scores[mask]
    if not np.isfinite(scores).all():  # products of large finite numbers: worst, but still results
        worst = -_FLOAT32_MAX if distance.larger_is_better else _FLOAT32_MAX
        scores = np.nan_to_num(scores, nan=worst)
    towards = -scores if distance.larger_is_better else scores
    if len(rows) > query.limit:
        # Ties with the last place are kept: the caller lets the smallest ids of them win.
        last = np.partition(towards, query.limit - 1)[query.limit - 1]
        keep = np.flatnonzero(towards <= last)
        rows, scores, towards = rows[keep], scores[keep], towards[keep]
    order = np.argsort(towards, kind="stable")
    return rows[order], scores[order]


def _allowed_bits(
    unit: SnapshotUnit,
    filter: Filter | None,
    exclude: Sequence[int],
    vector: GrowingVector | SealedVector | None,
) -> Bits | None:
    """Packed bitmap of the rows that may be returned; None = every row."""
    bits = unit.live
    if vector is not None:
        bits = _and(bits, vector.present(unit.row_count), unit.row_count)
    if filter is not None:
        bits = _and(bits, _filter_bits(unit, filter), unit.row_count)
    if exclude:
        rows = unit.rows.rows_with_keys(exclude)
        rows = rows[rows < unit.row_count].astype(np.int64)
        if len(rows):
            mask = np.ones(unit.row_count, np.bool_)
            mask[rows] = False
            bits = _and(bits, pack_bits(mask), unit.row_count)
    return bits


def _filter_bits(unit: SnapshotUnit, filter: Filter) -> Bits:
    if unit.lock is None:
        return filter_allowed(filter, unit.rows)
    with unit.lock:
        return filter_allowed(filter, unit.rows)


def _and(a: Bits | None, b: Bits | None, row_count: int) -> Bits | None:
    if a is None:
        return None if b is None else b[: -(-row_count // 8)]
    if b is None:
        return a
    return a & b[: len(a)]


def count_points(snapshot: Snapshot, filter: Filter | None) -> int:
    total = 0
    for unit in snapshot.units:
        bits = _allowed_bits(unit, filter, (), None)
        total += unit.row_count if bits is None else int(np.bitwise_count(bits).sum(dtype=np.int64))
    return total


def vector_counts(snapshot: Snapshot) -> dict[str, int]:
    """Name -> points that have the vector, for every vector of the shard. 10 us per 100,000 rows."""
    counts = dict.fromkeys((*snapshot.spec.dense, *snapshot.spec.sparse), 0)
    for unit in snapshot.units:
        for name in counts:
            try:
                bits = _and(unit.live, unit.rows.present_bits(name), unit.row_count)
            except KeyError:  # added later
                continue
            all_rows = unit.row_count
            counts[name] += all_rows if bits is None else int(np.bitwise_count(bits).sum())
    return counts


def matching_ids(snapshot: Snapshot, filter: Filter) -> list[int]:
    """Keys of all points that match, ascending."""
    keys: list[int] = []
    for unit in snapshot.units:
        bits = _allowed_bits(unit, filter, (), None)
        assert bits is not None
        keys += unit.rows.keys_of(np.flatnonzero(unpack_bits(bits, unit.row_count)))
    return sorted(keys)


def scroll(snapshot: Snapshot, query: Scroll) -> PointBatch:
    """Points in ascending id order. Each segment gives its first `limit`; the smallest win."""
    picks: list[tuple[int, int, int]] = []  # key, unit, row
    for number, unit in enumerate(snapshot.units):
        if unit.row_count == 0:
            continue
        bits = _allowed_bits(unit, query.filter, (), None)
        mask = None if bits is None else unpack_bits(bits, unit.row_count)
        rows = unit.rows.ordered_rows(query.start)
        taken = 0
        for start in range(0, len(rows), _SCROLL_WINDOW_ROWS):
            window = np.asarray(rows[start : start + _SCROLL_WINDOW_ROWS], np.int64)
            if mask is not None:
                window = window[mask[window]]
            window = window[: query.limit - taken]
            taken += len(window)
            keys = unit.rows.keys_of(window)
            picks += [(k, number, r) for k, r in zip(keys, window.tolist(), strict=True)]
            if taken >= query.limit:
                break
    picks = sorted(picks)[: query.limit]
    return take_rows(
        snapshot, [(n, row) for _, n, row in picks], query.with_payload, query.with_vectors
    )


def take_rows(
    snapshot: Snapshot,
    places: Sequence[tuple[int, int]],
    payload: bool,
    vectors: bool | tuple[str, ...],
) -> PointBatch:
    """The rows at (unit, row), in the given order. vectors: True = all that the shard has; names
    that it does not have are passed over."""
    if not places:
        return PointBatch.empty(payload)
    names: Sequence[str] = vectors if isinstance(vectors, tuple) else ()
    if vectors is True:
        names = (*snapshot.spec.dense, *snapshot.spec.sparse)
    source = np.array([n for n, _ in places], np.int64)
    rows = np.array([row for _, row in places], np.int64)
    parts: list[PointBatch] = []
    order = []
    for number in np.unique(source).tolist():
        here = np.flatnonzero(source == number)
        unit = snapshot.units[number]
        taken = unit.rows.take(rows[here], payload, names, unit.vectors)
        parts.append(complete(taken, snapshot.spec, names))
        order.append(here)
    if len(parts) == 1:
        return parts[0]
    back = np.empty(len(rows), np.int64)
    back[np.concatenate(order)] = np.arange(len(rows))
    return concat(parts).take(back)


def expected_floats(snapshot: Snapshot, query: Search) -> int:
    """A rough cost, in floats read. Decides which thread runs the search."""
    total = 0
    dim = len(query.vector)
    for unit in snapshot.units:
        vector = unit.vectors.get(query.using)
        if vector is None:
            continue
        if query.exact or vector.graph is None:
            total += unit.row_count * dim
        else:  # a beam of `ef` looks at some 30 neighbours of each step
            total += max(query.ef or 0, query.limit, 64) * 30 * dim
    return total


def is_quick(snapshot: Snapshot, filter: Filter | None) -> bool:
    """Whether the filter is sure to cost little: no rows are read, or few, and nobody holds the
    columns of the growing segment."""
    if filter is None:
        return True
    if any(unit.lock is not None and unit.lock.locked() for unit in snapshot.units):
        return False
    rows = sum(unit.row_count for unit in snapshot.units)
    return rows <= _QUICK_FILTER_ROWS_MAX or (
        rows <= _COLUMN_FILTER_ROWS_MAX and _by_columns(filter)
    )


def _by_columns(filter: Filter) -> bool:
    """Only conditions that columns answer without looking at text."""
    for condition in (*(filter.must or ()), *(filter.must_not or ()), *(filter.should or ())):
        if not isinstance(condition, FieldCondition) or parse_path(condition.key).plain is None:
            return False
        match = condition.match
        if match is not None and not isinstance(match, MatchValue | MatchAny | MatchExcept):
            return False
        if condition.geo_polygon is not None or condition.geo_radius is not None:
            return False
    return filter.min_should is None
