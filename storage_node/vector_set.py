"""Which vectors a shard has. It begins with those that it was created with; AlterVectors entries of
its log add and drop dense ones. Pure.

A name may be dropped and added again, and is another vector then: what tells the two apart is the log
entry that added it (`ShardSpec.since`; 0 for those of the beginning). Segments and pending merges
remember their vectors as `Columns`, name -> that number, and hold a vector of today only where both
agree. The order of `columns_of` numbers the files of a segment, so it is the same on all replicas:
creation order, then the order in which vectors were added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

from shoal import limits
from shoal.errors import BadRequest
from shoal.storage_api import AlterVectors, ShardSpec, VectorSpec
from storage_node.manifest import AddedVector, Manifest

__all__ = ["altered", "as_of", "changes", "columns_of", "has_column", "resolve_alter"]

Columns = Mapping[str, int]


def columns_of(spec: ShardSpec) -> dict[str, int]:
    """Every vector of the shard, dense ones first -> the log entry that added it."""
    return {name: spec.since.get(name, 0) for name in (*spec.dense, *spec.sparse)}


def has_column(spec: ShardSpec, name: str, since: int) -> bool:
    """Whether the shard still has the vector that a segment holds."""
    return (name in spec.dense or name in spec.sparse) and spec.since.get(name, 0) == since


def resolve_alter(spec: ShardSpec, op: AlterVectors) -> AlterVectors:
    """What of it is left to do. BadRequest where it cannot be done."""
    drop = tuple(name for name in dict.fromkeys(op.drop) if name in spec.dense)
    for name in op.drop:
        if name in spec.sparse or (name in spec.dense and spec.dense[name].multi):
            raise BadRequest(
                f"Wrong input: {name!r} is no plain dense vector: it cannot be dropped"
            )
    add: dict[str, VectorSpec] = {}
    for name, vector in op.add.items():
        if name in spec.sparse or vector.multi or not 1 <= vector.dim <= limits.VECTOR_DIM_MAX:
            raise BadRequest(
                f"Wrong input: {name!r} cannot be added: only plain dense vectors of 1 to "
                f"{limits.VECTOR_DIM_MAX} dimensions under a name of their own can"
            )
        if name not in spec.dense or name in drop:
            add[name] = vector
        elif spec.dense[name] != vector:
            raise BadRequest(
                f"Wrong input: the vector {name!r} exists with other settings: drop it first"
            )
    count = len(spec.dense) + len(spec.sparse) - len(drop) + len(add)
    if add and count > limits.SHARD_VECTORS_MAX:
        raise BadRequest(
            f"Wrong input: {count} vectors would be stored for each point, "
            f"{limits.SHARD_VECTORS_MAX} are allowed: drop some first"
        )
    return AlterVectors(add, drop, epoch=op.epoch if op.epoch > spec.epoch else 0)


def altered(spec: ShardSpec, entry: AlterVectors, sequence: int) -> ShardSpec:
    """The shard's vectors after this entry of its log."""
    dense = {name: vector for name, vector in spec.dense.items() if name not in entry.drop}
    since = {name: number for name, number in spec.since.items() if name in dense}
    added = {name: vector for name, vector in entry.add.items() if name not in dense}
    return replace(
        spec,
        dense=dense | added,
        since=since | dict.fromkeys(added, sequence),
        epoch=max(spec.epoch, entry.epoch),
    )


def changes(created: ShardSpec, spec: ShardSpec) -> dict[str, object]:
    """Fields of a Manifest: what became of the vectors that the shard was created with."""
    return {
        "epoch": spec.epoch,
        "added": {
            name: AddedVector(since=since, **asdict(spec.dense[name]))
            for name, since in spec.since.items()
        },
        "dropped": tuple(
            name for name in created.dense if name not in spec.dense or name in spec.since
        ),
    }


def as_of(created: ShardSpec, manifest: Manifest) -> ShardSpec:
    """The shard's vectors at the manifest's checkpoint."""
    kept = {name: v for name, v in created.dense.items() if name not in manifest.dropped}
    added = {name: vector.spec() for name, vector in manifest.added.items()}
    since = {name: vector.since for name, vector in manifest.added.items()}
    return replace(created, dense=kept | added, since=since, epoch=manifest.epoch)
