"""Storage nodes for tests of the router: scripted to be late, to fail, to lag."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Iterable

from shoal.api.filter import Filter
from shoal.batch import PointBatch
from shoal.errors import NotPrimary, Stale, Unavailable
from shoal.ids import PointIds
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

__all__ = ["FakeNode", "FakeNodes"]

Trouble = Exception | asyncio.Event | float | None


class FakeNode:
    """Answers every read with how often it was asked, so that a test sees who answered.

    script   what the next calls meet, by method: an error is raised, an event waited for, seconds
             waited; None is nothing. An empty script: nothing.
    applied  how far its log is; a read that wants more is Stale.
    leads    whether it takes writes and strong reads.
    calls    (method, guard) of every call that arrived.
    """

    def __init__(self, node_id: str, *, leads: bool = False) -> None:
        self.id, self.leads = node_id, leads
        self.applied = 0
        self.script: dict[str, deque[Trouble]] = defaultdict(deque)
        self.calls: list[tuple[str, Guard | None]] = []
        self.shards: set[ShardKey] = set()
        self.cancelled = 0

    def plan(self, method: str, *troubles: Trouble) -> None:
        self.script[method].extend(troubles)

    def called(self, method: str) -> int:
        return sum(1 for name, _ in self.calls if name == method)

    async def _meet(self, method: str, guard: Guard | None = None) -> None:
        self.calls.append((method, guard))
        trouble = self.script[method].popleft() if self.script[method] else None
        try:
            if isinstance(trouble, asyncio.Event):
                await trouble.wait()
            elif isinstance(trouble, float):
                await asyncio.sleep(trouble)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if isinstance(trouble, Exception):
            raise trouble
        if guard is not None and guard.strong and not self.leads:
            raise NotPrimary(f"{self.id} is not the primary")
        if guard is not None and guard.min_applied > self.applied:
            raise Stale(f"{self.id} has applied {self.applied}")

    async def write(self, shard: ShardKey, op: Write) -> WriteResult:
        await self._meet("write")
        if not self.leads:
            raise NotPrimary(f"{self.id} is not the primary")
        self.applied += 1
        return WriteResult(self.applied)

    async def search(self, shard: ShardKey, query: Search, guard: Guard) -> FreshRead[Hits]:
        await self._meet("search", guard)
        hits: Hits = self.id  # type: ignore[assignment]
        return FreshRead(hits, self.applied)

    async def retrieve(
        self,
        shard: ShardKey,
        ids: PointIds,
        with_payload: bool,
        with_vectors: bool | tuple[str, ...],
        guard: Guard,
    ) -> FreshRead[PointBatch]:
        await self._meet("retrieve", guard)
        return FreshRead(PointBatch(ids), self.applied)

    async def scroll(self, shard: ShardKey, query: Scroll, guard: Guard) -> FreshRead[PointBatch]:
        await self._meet("scroll", guard)
        return FreshRead(PointBatch(PointIds.from_keys([])), self.applied)

    async def count(self, shard: ShardKey, filter: Filter | None, guard: Guard) -> FreshRead[int]:
        await self._meet("count", guard)
        return FreshRead(self.called("count"), self.applied)

    async def info(self, shard: ShardKey) -> ShardInfo:
        await self._meet("info")
        return ShardInfo(points=7, applied=self.applied)

    async def status(self) -> list[ReplicaStatus]:
        await self._meet("status")
        role = "primary" if self.leads else "secondary"
        return [
            ReplicaStatus(self.id, role, 1, self.applied, self.applied, True, key, ShardInfo())
            for key in sorted(self.shards, key=str)
        ]

    async def create_shard(self, spec: ShardSpec) -> None:
        await self._meet("create_shard")
        self.shards.add(spec.key)

    async def drop_shard(self, shard: ShardKey) -> None:
        await self._meet("drop_shard")
        self.shards.discard(shard)


class FakeNodes:
    """The directory of them. A node in `lost` cannot even be found."""

    def __init__(self, nodes: Iterable[FakeNode]) -> None:
        self.by_id = {node.id: node for node in nodes}
        self.lost: set[str] = set()

    def get(self, node_id: str) -> FakeNode:
        if node_id not in self.by_id or node_id in self.lost:
            raise Unavailable(f"nobody knows where {node_id} is")
        return self.by_id[node_id]
