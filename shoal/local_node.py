"""A storage that holds the only replica of every shard, asked as one node of a cluster is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from shoal.api.filter import Filter
from shoal.batch import PointBatch
from shoal.ids import PointIds
from shoal.metadata.schema import LOCAL_NODE
from shoal.storage_api import (
    FreshRead,
    Guard,
    Hits,
    ReplicaStatus,
    Scroll,
    Search,
    ShardInfo,
    ShardKey,
    ShardSpec,
    Write,
    WriteResult,
)

__all__ = ["LocalNode", "OnlyReplicas"]


class OnlyReplicas(Protocol):
    """Nothing can be staler than the only replica, and nothing fresher."""

    async def write(self, shard: ShardKey, op: Write) -> WriteResult: ...
    async def search(self, shard: ShardKey, query: Search) -> Hits: ...
    async def retrieve(
        self,
        shard: ShardKey,
        ids: PointIds,
        with_payload: bool,
        with_vectors: bool | tuple[str, ...],
    ) -> PointBatch: ...
    async def scroll(self, shard: ShardKey, query: Scroll) -> PointBatch: ...
    async def count(self, shard: ShardKey, filter: Filter | None) -> int: ...
    async def info(self, shard: ShardKey) -> ShardInfo: ...
    async def create_shard(self, spec: ShardSpec) -> None: ...
    async def drop_shard(self, shard: ShardKey) -> None: ...


class LocalNode:
    """Implements `shoal.storage_api.Node`. shards: all that there are now, for `status`."""

    def __init__(self, storage: OnlyReplicas, shards: Callable[[], Sequence[ShardKey]]) -> None:
        self._storage, self._shards = storage, shards
        self.write = storage.write
        self.info = storage.info
        self.create_shard = storage.create_shard
        self.drop_shard = storage.drop_shard

    async def search(self, shard: ShardKey, query: Search, guard: Guard) -> FreshRead[Hits]:
        return FreshRead(await self._storage.search(shard, query), guard.min_applied)

    async def retrieve(
        self,
        shard: ShardKey,
        ids: PointIds,
        with_payload: bool,
        with_vectors: bool | tuple[str, ...],
        guard: Guard,
    ) -> FreshRead[PointBatch]:
        found = await self._storage.retrieve(shard, ids, with_payload, with_vectors)
        return FreshRead(found, guard.min_applied)

    async def scroll(self, shard: ShardKey, query: Scroll, guard: Guard) -> FreshRead[PointBatch]:
        return FreshRead(await self._storage.scroll(shard, query), guard.min_applied)

    async def count(self, shard: ShardKey, filter: Filter | None, guard: Guard) -> FreshRead[int]:
        return FreshRead(await self._storage.count(shard, filter), guard.min_applied)

    async def status(self) -> list[ReplicaStatus]:
        said = []
        for key in self._shards():
            info = await self._storage.info(key)
            role = "primary" if info.stopped is None else "stopped"
            said.append(
                ReplicaStatus(LOCAL_NODE, role, 1, info.applied, info.applied, True, key, info)
            )
        return said
