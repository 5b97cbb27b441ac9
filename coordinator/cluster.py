"""The cluster as answers describe it: who there is, who holds what, what is missing. Pure.

Two forms: the one that Qdrant's clients know, whose peers are numbers, and Shoal's own with terms and
positions in the log. A replica counts as lost while its node has no record: its lease has ended.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coordinator.catalog import Collection
from shoal.errors import ShoalError
from shoal.metadata.schema import NodeRecord, NodeRole, ShardRecord, TakenAction
from shoal.storage_api import ReplicaStatus, ShardInfo, ShardKey

__all__ = [
    "ClusterState",
    "describe_cluster",
    "describe_collection_cluster",
    "describe_peers",
    "peer_id",
]


@dataclass(frozen=True, slots=True)
class ClusterState:
    """One look at the metadata.

    node    who looks. alone: a server of one machine, which has no other nodes to speak of.
    leader  the monitor that acts, None while there is none. actions: its last ones, oldest first.
    """

    node: str
    alone: bool
    nodes: Mapping[str, NodeRecord]
    shards: Mapping[ShardKey, ShardRecord]
    leader: str | None
    actions: Sequence[TakenAction] = ()

    def lost(self, node: str) -> bool:
        return node not in self.nodes


def peer_id(node: str) -> int:
    """A node's name as a number, for clients that know no names. 53 bits, so that JavaScript keeps
    it; two of a thousand nodes share one with a chance of 1 in 10^10."""
    return int.from_bytes(hashlib.blake2b(node.encode(), digest_size=8).digest(), "big") >> 11


def describe_peers(state: ClusterState) -> dict[str, Any]:
    """`GET /cluster`. There is no Raft among these nodes, so its part says nothing was ever agreed."""
    if state.alone:
        return {"status": "disabled"}
    peers = {
        str(peer_id(node.id)): {"uri": f"http://{node.http or node.grpc}/"}
        for node in state.nodes.values()
        if node.role in (NodeRole.COORDINATOR, NodeRole.STORAGE)
    }
    return {
        "status": "enabled",
        "peer_id": peer_id(state.node),
        "peers": peers,
        "raft_info": {
            "term": 0,
            "commit": 0,
            "pending_operations": 0,
            "leader": None if state.leader is None else peer_id(state.leader),
            "role": None,
            "is_voter": False,
        },
        "consensus_thread_status": {
            "consensus_thread_status": "stopped",
        },
        "message_send_failures": {},
    }


def describe_collection_cluster(
    collection: Collection, state: ClusterState, infos: Mapping[ShardKey, ShardInfo]
) -> dict[str, Any]:
    """`GET /collections/{c}/cluster`. infos: of the shards that this process holds itself."""
    local: list[dict[str, Any]] = []
    remote: list[dict[str, Any]] = []
    for key in collection.shards:
        record = state.shards.get(key)
        if record is None:
            continue
        for node, part in _replicas(record):
            replica_state = "Dead" if part == "leaving" or state.lost(node) else _STATES[part]
            if node == state.node:
                info = infos.get(key)
                local.append(
                    {
                        "shard_id": key.shard,
                        "points_count": 0 if info is None else info.points,
                        "state": replica_state,
                    }
                )
            else:
                remote.append(
                    {"shard_id": key.shard, "peer_id": peer_id(node), "state": replica_state}
                )
    return {
        "peer_id": peer_id(state.node),
        "shard_count": len(collection.shards),
        "local_shards": local,
        "remote_shards": remote,
        "shard_transfers": [],
        "replication_factor": collection.replication_factor,
        "under_replicated_shards": sum(
            _in_sync_alive(state.shards.get(key), state) < collection.replication_factor
            for key in collection.shards
        ),
    }


_STATES = {"in_sync": "Active", "joining": "Partial"}


def describe_cluster(
    state: ClusterState,
    collections: Sequence[Collection],
    statuses: Mapping[str, list[ReplicaStatus] | ShoalError],
) -> dict[str, Any]:
    """`GET /shoal/v1/cluster`. statuses: what the storage nodes say, or why they say nothing."""
    said: dict[tuple[str, ShardKey], ReplicaStatus] = {}
    silent: dict[str, str] = {}
    for node, answer in statuses.items():
        if isinstance(answer, ShoalError):
            silent[node] = answer.message
        else:
            said.update({(node, status.key): status for status in answer})
    names = {collection.record.id: collection.name for collection in collections}
    holders = {node for record in state.shards.values() for node, _ in _replicas(record)}
    return {
        "node": state.node,
        "mode": "one machine" if state.alone else "cluster",
        "leader": state.leader,
        "actions": [_action(action, names) for action in reversed(state.actions)],
        "nodes": [
            _node(name, state, silent.get(name)) for name in sorted({*state.nodes, *holders})
        ],
        "collections": [_collection(collection, state, said) for collection in collections],
    }


def _action(action: TakenAction, names: Mapping[int, str]) -> dict[str, Any]:
    """collection: None when it is gone."""
    return {
        "at": action.at.isoformat(timespec="milliseconds"),
        "action": action.action,
        "collection": names.get(action.collection_id),
        "shard": action.shard,
        "node": action.node,
        "outcome": action.outcome,
        "reason": action.reason,
    }


def _node(name: str, state: ClusterState, why_silent: str | None) -> dict[str, Any]:
    record = state.nodes.get(name)
    return {
        "id": name,
        "role": NodeRole.STORAGE if record is None else record.role,
        "registered": record is not None,
        "unreachable": why_silent,
        "zone": "" if record is None else record.zone,
        "draining": record is not None and record.draining,
        "grpc": "" if record is None else record.grpc,
        "http": "" if record is None else record.http,
        "replicas": sum(name in record.members() for record in state.shards.values()),
        "primaries": sum(name == record.primary for record in state.shards.values()),
    }


def _collection(
    collection: Collection,
    state: ClusterState,
    said: Mapping[tuple[str, ShardKey], ReplicaStatus],
) -> dict[str, Any]:
    wanted = collection.replication_factor
    shards = []
    for key in collection.shards:
        record = state.shards.get(key)
        if record is None:
            continue
        alive = _in_sync_alive(record, state)
        shards.append(
            {
                "shard": key.shard,
                "term": record.term,
                "primary": record.primary,
                "in_sync": record.in_sync,
                "joining": record.joining,
                "leaving": record.leaving,
                "state": _shard_state(record, state, alive, wanted),
                "replicas": [
                    _replica(node, part, state, said.get((node, key)))
                    for node, part in _replicas(record)
                ],
            }
        )
    return {
        "name": collection.name,
        "replication_factor": wanted,
        "write_consistency_factor": collection.request.write_consistency_factor or 1,
        "shards": shards,
    }


def _shard_state(record: ShardRecord, state: ClusterState, alive: int, wanted: int) -> str:
    """`unavailable`: nobody in sync is alive; `no primary`: reads go on, writes wait for a new one."""
    if alive == 0:
        return "unavailable"
    if state.lost(record.primary):
        return "no primary"
    return "under-replicated" if alive < wanted else "ok"


def _replica(
    node: str, part: str, state: ClusterState, status: ReplicaStatus | None
) -> dict[str, Any]:
    replica: dict[str, Any] = {"node": node, "part": part, "lost": state.lost(node)}
    if status is not None:
        replica |= {
            "role": status.role,
            "term": status.term,
            "applied": status.info.applied,
            "committed": status.committed,
            "durable": status.durable,
            "writable": status.writable,
            "points": status.info.points,
            "bytes_on_disk": status.info.bytes_on_disk,
            "stopped": status.info.stopped,
        }
    return replica


def _replicas(record: ShardRecord) -> list[tuple[str, str]]:
    """(node, part) of everybody in the record, the primary first."""
    in_sync = sorted(record.in_sync, key=lambda node: (node != record.primary, node))
    return [
        *((node, "in_sync") for node in in_sync),
        *((node, "joining") for node in record.joining),
        *((node, "leaving") for node in record.leaving),
    ]


def _in_sync_alive(record: ShardRecord | None, state: ClusterState) -> int:
    return 0 if record is None else sum(not state.lost(node) for node in record.in_sync)
