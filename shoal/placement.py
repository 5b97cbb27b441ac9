"""Which nodes get the replicas of a new collection. Pure: the same cluster, the same answer.

Every replica of a shard is on another node, in another zone while there are enough; the nodes that
hold the fewest replicas get the next one, and of the members of a shard the one that leads the
fewest becomes its primary. Load and disk space are the business of rebalancing, not of this.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from shoal.errors import BadRequest, Unavailable
from shoal.limits import SHARDS_PER_COLLECTION_MAX
from shoal.metadata.schema import NodeRecord, NodeRole, ShardRecord

__all__ = ["place", "shards_by_default", "storage_nodes"]


def storage_nodes(nodes: Iterable[NodeRecord]) -> list[NodeRecord]:
    """Those that may be given a replica: storage nodes that run and do not drain, by id."""
    wanted = [node for node in nodes if node.role is NodeRole.STORAGE and not node.draining]
    return sorted(wanted, key=lambda node: node.id)


def shards_by_default(node_count: int, replication_factor: int, at_least: int) -> int:
    """Enough for every node of a cluster of twice the size to hold a replica; `at_least` when there
    is one node."""
    if node_count <= 1:
        return at_least
    spread = -(-2 * node_count // replication_factor)
    return min(max(at_least, spread), SHARDS_PER_COLLECTION_MAX)


def place(
    shard_count: int,
    replication_factor: int,
    nodes: Sequence[NodeRecord],
    present: Iterable[ShardRecord],
) -> list[list[str]]:
    """Per shard the ids of its nodes, the primary first.

    nodes    that may be given a replica: see `storage_nodes`.
    present  all shards there are, so that the new ones go where least is.
    Raises   Unavailable without any node, BadRequest with fewer nodes than replicas.
    Cost     O(shards x replicas x nodes).
    """
    if not nodes:
        raise Unavailable(
            "no storage node is running that could hold the collection: start one, then try again"
        )
    if replication_factor > len(nodes):
        raise BadRequest(
            f"Wrong input: replication_factor {replication_factor} needs {replication_factor} "
            f"storage nodes that run and are not being drained, and there are {len(nodes)}: ask "
            "for fewer replicas or start more nodes"
        )
    held: Counter[str] = Counter()
    led: Counter[str] = Counter()
    for record in present:
        held.update(record.members())
        led[record.primary] += 1
    zone_of = {node.id: node.zone for node in nodes}
    placed = []
    for _ in range(shard_count):
        members: list[str] = []
        zones: Counter[str] = Counter()
        for _ in range(replication_factor):
            member = min(
                (node for node in zone_of if node not in members),
                key=lambda node: (zones[zone_of[node]], held[node], node),
            )
            members.append(member)
            held[member] += 1
            zones[zone_of[member]] += 1
        members.sort(key=lambda node: (led[node], node))
        led[members[0]] += 1
        placed.append(members)
    return placed
