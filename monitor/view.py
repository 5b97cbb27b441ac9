"""What the monitor saw of the cluster, as values: the input of `monitor/failover.py`. Pure.

A view holds the records, what each node answered when it was asked directly, and since when the
facts that matter have been so. The driver carries these facts from view to view with `remember`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from shoal.metadata.schema import NodeRecord, NodeRole, ShardRecord
from shoal.storage_api import ReplicaStatus, ShardKey

__all__ = [
    "ClusterView",
    "Fact",
    "NodeView",
    "Setback",
    "ShardView",
    "full",
    "is_stopped",
    "joining_at",
    "lasting",
    "outdated",
    "remember",
    "short",
    "silent",
    "unregistered",
    "unusable",
]

Fact = tuple[Hashable, ...]  # something that is so now; the driver remembers since when


@dataclass(frozen=True, slots=True)
class NodeView:
    """One node that has a record, or that a shard record names.

    record    None: its lease is lost.
    replicas  what it answered when it was asked directly; None: no answer in time.
    asked     False: it could not be asked, because nobody knows its address.
    """

    id: str
    record: NodeRecord | None = None
    replicas: Mapping[ShardKey, ReplicaStatus] | None = None
    asked: bool = True

    @property
    def registered(self) -> bool:
        return self.record is not None and self.record.role is NodeRole.STORAGE

    @property
    def answered(self) -> bool:
        return self.replicas is not None

    @property
    def in_touch(self) -> bool:
        """It can learn of a new record, and we of its state."""
        return self.registered and self.answered

    @property
    def departing(self) -> bool:
        """It is about to stop, and says so: others are to take over what it leads."""
        return self.record is not None and self.record.draining

    @property
    def writable(self) -> bool:
        """No replica says that the disk is full. A node without replicas says nothing of its disk."""
        return all(replica.writable for replica in (self.replicas or {}).values())

    def replica(self, key: ShardKey) -> ReplicaStatus | None:
        return (self.replicas or {}).get(key)

    def sound_replica(self, key: ShardKey) -> ReplicaStatus | None:
        """The replica, unless it found damage and stopped."""
        found = self.replica(key)
        return None if found is None or is_stopped(found) else found


@dataclass(frozen=True, slots=True)
class ShardView:
    """A shard of an active collection. revision: of `record`. wanted: the replication factor."""

    key: ShardKey
    collection: str
    wanted: int
    record: ShardRecord
    revision: int

    @property
    def name(self) -> str:
        return f"collection {self.collection}, shard {self.key.shard}"


@dataclass(frozen=True, slots=True)
class Setback:
    """A copy was given up `count` times in a row on a node that could not take it, last at `at_s`."""

    count: int
    at_s: float


@dataclass(frozen=True, slots=True)
class ClusterView:
    """now_s: seconds that never go back. since: when the facts of `remember` began. setbacks: of
    joining copies, by shard and node; the driver carries them on with `lasting`."""

    now_s: float
    shards: Sequence[ShardView]
    nodes: Mapping[str, NodeView]
    since: Mapping[Fact, float] = field(default_factory=dict)
    setbacks: Mapping[tuple[ShardKey, str], Setback] = field(default_factory=dict)

    def node(self, node: str) -> NodeView:
        return self.nodes.get(node) or NodeView(node)

    def held_s(self, fact: Fact) -> float:
        """How long this has been so; 0 for what was not so, or not remembered, until now."""
        return self.now_s - self.since.get(fact, self.now_s)


def lasting(view: ClusterView, forget_s: float) -> dict[tuple[ShardKey, str], Setback]:
    """The setbacks that still count: not those of nodes that are in sync by now, of shards that are
    gone, or after `forget_s` without another one."""
    in_sync = {shard.key: shard.record.in_sync for shard in view.shards}
    return {
        (key, node): setback
        for (key, node), setback in view.setbacks.items()
        if key in in_sync and node not in in_sync[key] and view.now_s - setback.at_s < forget_s
    }


def remember(view: ClusterView) -> dict[Fact, float]:
    """The facts that hold now, each with the time since when. Hand it to the next view: a monitor
    that has just begun counts from its own first look, never from what it did not see itself."""
    return {fact: view.since.get(fact, view.now_s) for fact in _facts(view)}


def _facts(view: ClusterView) -> Iterator[Fact]:
    named = {name for shard in view.shards for name in shard.record.members()}
    for name in sorted(named | view.nodes.keys()):
        node = view.node(name)
        if not node.registered:
            yield unregistered(node.id)
        if not node.answered:
            yield silent(node.id)
        if node.answered and not node.writable:
            yield full(node.id)
    for shard in view.shards:
        if len(shard.record.in_sync) < shard.wanted:
            yield short(shard)
        for member in shard.record.members():
            node = view.node(member)
            if node.answered and node.sound_replica(shard.key) is None:
                yield unusable(shard, node)
        if any(
            (replica := view.node(member).replica(shard.key)) is not None
            and replica.term > shard.record.term
            for member in shard.record.members()
        ):
            yield outdated(shard)
        for member in shard.record.joining:
            yield joining_at(shard, view.node(member))


def unregistered(node: str) -> Fact:
    return ("unregistered", node)


def silent(node: str) -> Fact:
    return ("silent", node)


def full(node: str) -> Fact:
    return ("full", node)


def short(shard: ShardView) -> Fact:
    return ("short", shard.key)


def outdated(shard: ShardView) -> Fact:
    """A replica knows of a later term than the record."""
    return ("outdated", shard.key, shard.record.term)


def unusable(shard: ShardView, node: NodeView) -> Fact:
    """Missing is not the beginning of stopped: each counts for itself."""
    kind = "missing" if node.replica(shard.key) is None else "stopped"
    return (kind, shard.key, node.id, shard.record.term)


def joining_at(shard: ShardView, node: NodeView) -> Fact:
    replica = node.replica(shard.key)
    return ("joining", shard.key, node.id, replica.durable if replica is not None else None)


def is_stopped(replica: ReplicaStatus) -> bool:
    return replica.role == "stopped" or replica.info.stopped is not None
