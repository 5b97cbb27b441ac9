"""Pure decisions: how a segment is searched, what is merged, what gets an index."""

from __future__ import annotations

import random

from shoal import limits
from shoal.storage_api import Distance, VectorSpec
from storage_node.planner import (
    DEFAULT_EF,
    Pause,
    SegmentStats,
    Strategy,
    choose_merge,
    needs_index,
    plan_search,
    seals_in_pause,
    widen,
)


def plan(allowed: int, rows: int = 100_000, **changed: object) -> tuple[Strategy, int]:
    question: dict[str, object] = {
        "rows": rows,
        "allowed": allowed,
        "dim": 384,
        "has_graph": True,
        "exact": False,
        "ef": None,
        "limit": 10,
    }
    return plan_search(**(question | changed))  # type: ignore[arg-type]


def test_nothing_allowed_is_skipped() -> None:
    assert plan(0)[0] is Strategy.SKIP


def test_without_a_filter_the_graph_is_used_with_the_default_beam() -> None:
    assert plan(100_000) == (Strategy.GRAPH, DEFAULT_EF)


def test_the_beam_is_never_narrower_than_the_limit() -> None:
    assert plan(100_000, limit=500) == (Strategy.GRAPH, 500)
    assert plan(100_000, ef=16) == (Strategy.GRAPH, 16)


def test_a_selective_filter_is_scanned_exactly() -> None:
    assert plan(1_000)[0] is Strategy.SCAN_ALLOWED
    assert plan(20_000)[0] is Strategy.SCAN_ALLOWED
    assert plan(150_000, rows=1_000_000)[0] is Strategy.SCAN_ALLOWED, "a graph is wrong there"


def test_a_wide_filter_widens_the_beam() -> None:
    strategy, ef = plan(30_000)
    assert strategy is Strategy.GRAPH
    assert ef == 2 * DEFAULT_EF * 100 // 30
    assert plan(300_000, rows=1_000_000, ef=900) == (Strategy.GRAPH, limits.BEAM_WIDTH_MAX)


def test_a_few_dead_rows_do_not_cost_the_graph() -> None:
    assert plan(14_999, rows=15_000)[0] is Strategy.GRAPH


def test_exact_and_unindexed_are_scanned() -> None:
    assert plan(100_000, exact=True)[0] is Strategy.SCAN_ALL
    assert plan(100_000, has_graph=False)[0] is Strategy.SCAN_ALL
    assert plan(10, has_graph=False)[0] is Strategy.SCAN_ALLOWED


def test_widening_ends() -> None:
    ef, steps = DEFAULT_EF, 0
    while (wider := widen(ef)) is not None:
        assert wider > ef
        ef, steps = wider, steps + 1
    assert steps < 10


def test_which_segments_get_an_index() -> None:
    vector = VectorSpec(384, Distance.COSINE)
    assert not needs_index(1_000, vector)
    assert needs_index(10_000, vector)
    assert needs_index(1, VectorSpec(384, Distance.COSINE, index_bytes_min=1))
    assert not needs_index(10**6, VectorSpec(384, Distance.COSINE, hnsw_m=0))
    assert not needs_index(10**6, VectorSpec(384, Distance.COSINE, multi=True))
    assert seals_in_pause(10_000, [384], Pause.SHORT)
    assert not seals_in_pause(1_000, [384], Pause.SHORT)
    assert seals_in_pause(1_000, [384], Pause.LONG)
    assert not seals_in_pause(100_000, [384], Pause.NONE)
    assert not seals_in_pause(100, [384], Pause.LONG)


def stats(*live: int) -> list[SegmentStats]:
    return [SegmentStats(number, n, n) for number, n in enumerate(live)]


def test_merges_wait_for_four_while_writes_come_in() -> None:
    assert choose_merge(stats(10, 10, 10), Pause.NONE) == ()
    assert choose_merge(stats(10, 10, 10, 10), Pause.NONE) == (0, 1, 2, 3)
    assert choose_merge(stats(10, 10), Pause.SHORT) == (0, 1)


def test_a_large_segment_is_not_rewritten_for_a_little() -> None:
    assert choose_merge(stats(100_000, 1_000), Pause.SHORT) == ()
    assert choose_merge(stats(100_000, 6_000), Pause.SHORT) == (0, 1)
    assert choose_merge(stats(100_000, 1_500), Pause.LONG) == (0, 1)


def test_a_merge_never_exceeds_the_largest_segment() -> None:
    most = limits.SEGMENT_ROWS_MAX
    assert choose_merge(stats(most, most), Pause.SHORT) == ()
    assert choose_merge(stats(most - 5, 10, 10), Pause.SHORT) == (1, 2)


def test_dead_rows_are_cleared() -> None:
    mostly_dead = [SegmentStats(0, 1_000, 400)]
    assert choose_merge(mostly_dead, Pause.NONE) == (0,)
    assert choose_merge([SegmentStats(0, 1_000, 990)], Pause.SHORT) == ()
    assert choose_merge([SegmentStats(0, 1_000, 0)], Pause.SHORT) == (0,)


def test_merging_ends_and_rewrites_each_row_a_few_times() -> None:
    """Segments of 10k rows come one by one until there are a million; then writes stop."""
    for seed in range(20):
        rng = random.Random(seed)
        sizes: dict[int, int] = {}
        rewritten = number = 0
        for _ in range(100):
            number += 1
            sizes[number] = rng.randint(5_000, 10_000)
            chosen = choose_merge([SegmentStats(i, n, n) for i, n in sizes.items()], Pause.NONE)
            if chosen:
                number += 1
                rewritten += sum(sizes[i] for i in chosen)
                sizes[number] = sum(sizes.pop(i) for i in chosen)
        total = sum(sizes.values())
        assert rewritten < 8 * total, f"seed {seed}"
        while chosen := choose_merge(
            [SegmentStats(i, n, n) for i, n in sizes.items()], Pause.SHORT
        ):
            number += 1
            sizes[number] = sum(sizes.pop(i) for i in chosen)
        assert len(sizes) <= 4, f"seed {seed}: {sizes}"
