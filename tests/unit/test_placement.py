"""Which nodes get the replicas of a new collection."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from shoal.errors import BadRequest, Unavailable
from shoal.metadata.schema import NodeRecord, NodeRole, ShardRecord
from shoal.placement import place, shards_by_default, storage_nodes


def node(name: str, zone: str = "", **more: object) -> NodeRecord:
    fields = {"role": NodeRole.STORAGE, "incarnation": "1"} | more
    return NodeRecord(id=name, zone=zone, **fields)  # type: ignore[arg-type]


def test_only_storage_nodes_that_do_not_drain_are_taken() -> None:
    nodes = [node("b"), node("a"), node("c", draining=True), node("d", role=NodeRole.COORDINATOR)]
    assert [one.id for one in storage_nodes(nodes)] == ["a", "b"]


def test_replicas_and_primaries_spread_evenly() -> None:
    nodes = [node(name) for name in ("a", "b", "c", "d")]
    placed = place(8, 2, nodes, [])
    assert all(len(set(members)) == 2 for members in placed)
    assert set(Counter(m for members in placed for m in members).values()) == {4}
    assert set(Counter(members[0] for members in placed).values()) == {2}


def test_new_shards_go_where_the_fewest_are() -> None:
    nodes = [node(name) for name in ("a", "b", "c")]
    present = [
        ShardRecord(collection_id=1, shard=n, primary="a", in_sync=["a"], joining=["b"])
        for n in range(3)
    ]
    assert place(3, 1, nodes, present) == [["c"], ["c"], ["c"]]
    assert place(1, 2, nodes, present) == [["c", "a"]]


def test_zones_are_kept_apart_while_there_are_enough() -> None:
    nodes = [node("a", "z1"), node("b", "z1"), node("c", "z2"), node("d", "z3")]
    for members in place(6, 3, nodes, []):
        assert len({one.zone for one in nodes if one.id in members}) == 3
    for members in place(2, 4, nodes, []):
        assert sorted(members) == ["a", "b", "c", "d"]


def test_too_few_nodes_are_told_with_both_numbers() -> None:
    with pytest.raises(BadRequest, match=r"replication_factor 3 .* there are 2"):
        place(1, 3, [node("a"), node("b")], [])
    with pytest.raises(Unavailable, match="no storage node"):
        place(1, 1, [], [])


def test_the_same_cluster_gives_the_same_answer() -> None:
    rng = random.Random(5)
    nodes = [node(f"n{i}", f"z{i % 3}") for i in range(7)]
    wanted = place(9, 3, nodes, [])
    for _ in range(5):
        rng.shuffle(nodes)
        assert place(9, 3, storage_nodes(nodes), []) == wanted


def test_shards_by_default() -> None:
    assert shards_by_default(1, 1, 1) == 1
    assert shards_by_default(0, 1, 4) == 4
    assert shards_by_default(3, 1, 1) == 6
    assert shards_by_default(3, 3, 1) == 2
    assert shards_by_default(3, 3, 5) == 5
    assert shards_by_default(1000, 1, 1) == 64
