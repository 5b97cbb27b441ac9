"""Merging the answers of shards, against sorting everything."""

from __future__ import annotations

import random

import numpy as np
import pytest

from coordinator.gather import concat, first_by_id, in_request_order, merge_hits
from shoal.batch import DenseBlock, MultiBlock, PointBatch, SparseBlock
from shoal.errors import InvariantError
from shoal.ids import UUID_BIT, PointIds
from shoal.storage_api import Hits


def points(keys: list[int]) -> PointBatch:
    batch = PointBatch(PointIds.from_keys(keys))
    batch.set_payloads([b'{"k":"%x"}' % key for key in keys])
    batch.versions = np.array([key % 97 for key in keys], np.uint64)
    batch.dense["v"] = DenseBlock(
        np.array([[key % 1000] for key in keys], np.float32).reshape(-1, 1)
    )
    return batch


def hits(pairs: list[tuple[int, float]]) -> Hits:
    return Hits(points([k for k, _ in pairs]), np.array([s for _, s in pairs], np.float32))


@pytest.mark.parametrize("larger", [True, False])
def test_merge_is_the_same_as_sorting_everything(larger: bool) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(200):
        pool = [rng.choice([n, UUID_BIT | rng.getrandbits(128)]) for n in range(40)]
        score = {
            key: rng.choice([0.5, 0.25, 1.0, -3.0, float(np.float32(rng.random()))]) for key in pool
        }
        shards: list[list[int]] = [[] for _ in range(rng.randint(1, 5))]
        for key in pool:
            for shard in rng.sample(shards, min(len(shards), rng.choice([1, 1, 1, 2]))):
                shard.append(key)  # in two shards while it moves

        def rank(key: int, score: dict[int, float] = score) -> tuple[float, int]:
            return (-score[key] if larger else score[key], key)

        limit = rng.randint(1, 50)
        parts = [hits([(k, score[k]) for k in sorted(s, key=rank)[:limit]]) for s in shards]
        merged = merge_hits(parts, limit, larger_is_better=larger)
        expected = sorted(pool, key=rank)[:limit]
        assert merged.points.ids.keys() == expected
        assert merged.scores.tolist() == [score[key] for key in expected]
        assert [merged.points.payload_of(r) for r in range(len(expected))] == [
            b'{"k":"%x"}' % key for key in expected
        ]


def test_nothing_merges_to_nothing() -> None:
    merged = merge_hits([hits([]), hits([])], 5, larger_is_better=True)
    assert len(merged.points) == 0


def test_a_score_that_is_nan_is_our_bug() -> None:
    with pytest.raises(InvariantError):
        merge_hits([hits([(1, float("nan"))]), hits([])], 5, larger_is_better=True)


def test_scroll_pages_come_in_id_order_numbers_before_uuids() -> None:
    low = UUID_BIT | 1
    page = first_by_id([points([3, 9, low]), points([1, 9]), points([])], 4)
    assert page.ids.keys() == [1, 3, 9, low]


def test_retrieved_points_come_in_request_order() -> None:
    found = in_request_order([points([5, 2]), points([7])], PointIds.from_keys([7, 4, 2, 7, 5]))
    assert found.ids.keys() == [7, 2, 7, 5]
    assert found.payload_of(1) == b'{"k":"2"}'


def test_columns_that_only_some_shards_have() -> None:
    one, two = points([1, 2]), points([3])
    del two.dense["v"]
    two.sparse["s"] = SparseBlock(
        np.array([0, 2], np.uint32), np.array([1, 4], np.uint32), np.array([1, 2], np.float32)
    )
    one.multi["m"] = MultiBlock(
        np.array([0, 0, 2], np.uint32), np.ones((2, 3), np.float32), np.array([False, True])
    )
    both = concat([one, two])
    assert both.dense["v"].present is not None
    assert both.dense["v"].present.tolist() == [True, True, False]
    assert both.sparse["s"].indptr.tolist() == [0, 0, 0, 2]
    assert both.sparse["s"].present is not None
    assert both.sparse["s"].present.tolist() == [False, False, True]
    assert both.multi["m"].indptr.tolist() == [0, 0, 2, 2]
    assert both.multi["m"].present is not None
    assert both.multi["m"].present.tolist() == [False, True, False]
    assert concat([one]) is one
