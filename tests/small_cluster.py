"""Storage nodes of one cluster in one process: real logs and segments, a bus that can be cut."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np

from index_node.service import IndexNode
from shoal.api.models import CreateCollection
from shoal.batch import DenseBlock, PointBatch
from shoal.errors import Unavailable
from shoal.faiss_index import FlatVectors, build_graph
from shoal.files_api import FileSource
from shoal.ids import PointIds
from shoal.index_api import BuildJob
from shoal.metadata.contract import Compare
from shoal.metadata.embedded import EmbeddedStore
from shoal.metadata.schema import (
    CollectionRecord,
    CollectionState,
    IdRecord,
    NodeRecord,
    NodeRole,
    ShardRecord,
    shard_spec,
)
from shoal.node.v1.replication_pb2 import ReplicaMessage
from shoal.settings import StorageSettings
from shoal.storage_api import Guard, ShardKey, Upsert
from storage_node.member import ClusterNode
from storage_node.replica import Timing
from storage_node.shard import Shard

__all__ = ["DIM", "KEY", "TIMING", "World", "points", "world"]

KEY = ShardKey(1, 0)
DIM = 4
TIMING = Timing(heartbeat_s=0.02, lease_s=0.1, replica_timeout_s=0.3, resend_s=0.06)


class CountingBuilder:
    """Builds here, in a thread, and counts. fail: says no."""

    def __init__(self) -> None:
        self.built = 0
        self.fail = False

    async def build(self, job: BuildJob) -> None:
        if self.fail:
            raise Unavailable("this builder is told to fail")
        flat = FlatVectors(job.vectors, job.dim, job.count, job.distance)
        await asyncio.to_thread(
            build_graph, flat.values, job.distance, job.m, job.ef_construct, job.output, 1
        )
        self.built += 1

    async def close(self) -> None:
        """Nothing is running."""


class World:
    """Nodes a, b, c over one metadata store."""

    def __init__(self, folder: Path, store: EmbeddedStore, seal_bytes: int, indexes: bool) -> None:
        self.folder, self.store, self.indexes = folder, store, indexes
        self.builders: dict[str, CountingBuilder] = {}
        self.settings = StorageSettings(seal_bytes=seal_bytes, disk_free_bytes_min=0)
        self.nodes: dict[str, ClusterNode] = {}
        self.index_nodes: dict[str, IndexNode] = {}
        self.cut: set[tuple[str, str]] = set()  # (from, to): nothing passes

    async def start(self, name: str) -> ClusterNode:
        node = ClusterNode(
            self.folder / name,
            node_id=name,
            store=self.store,
            send=lambda to, message, size: self._send(name, to, message),
            sources=self._source,
            metadata_lost=lambda: 0.0,
            builder=self.builder(name) if self.indexes else None,
            settings=self.settings,
            timing=TIMING,
        )
        self.nodes[name] = node
        record = NodeRecord(id=name, role=NodeRole.STORAGE, incarnation=name)
        await self.store.txn([], {record.key: record.to_bytes()})
        await node.start()
        return node

    def _send(self, sender: str, to: str, message: ReplicaMessage) -> bool:
        if (sender, to) in self.cut or to not in self.nodes:
            return False
        data = message.SerializeToString()
        asyncio.get_running_loop().call_soon(self._deliver, sender, to, data)
        return True

    def _deliver(self, sender: str, to: str, data: bytes) -> None:
        node = self.nodes.get(to)
        if node is not None and (sender, to) not in self.cut:
            node.deliver(ReplicaMessage.FromString(data))

    def _source(self, name: str) -> FileSource:
        if name in self.index_nodes:
            return self.index_nodes[name]  # type: ignore[return-value]
        if name not in self.nodes:
            raise Unavailable(f"{name} is not there")
        return self.nodes[name]

    def builder(self, name: str) -> CountingBuilder:
        return self.builders.setdefault(name, CountingBuilder())

    async def start_index_node(self, name: str) -> IndexNode:
        record = NodeRecord(id=name, role=NodeRole.INDEX, incarnation=name + "1")
        await self.store.txn([], {record.key: record.to_bytes()})
        node = IndexNode(
            self.store,
            node_id=name,
            incarnation=record.incarnation,
            sources=self._source,
            builder=self.builder(name),
            scratch=self.folder / f"scratch-{name}",
            threads=1,
        )
        self.index_nodes[name] = node
        await node.start()
        return node

    def isolate(self, name: str) -> None:
        for other in {"a", "b", "c"} - {name}:
            self.cut |= {(name, other), (other, name)}

    async def stop(self, name: str) -> None:
        await self.nodes.pop(name).close()
        await self.store.txn([], {}, [f"nodes/{name}"])

    async def create(self, nodes: list[str]) -> None:
        request = CreateCollection.model_validate(
            {
                "vectors": {"size": DIM, "distance": "Dot"},
                "hnsw_config": {"full_scan_threshold": 10},
            },
            strict=False,
        )
        record = CollectionRecord(
            id=1,
            name="books",
            state=CollectionState.ACTIVE,
            shard_number=1,
            config=request.model_dump(mode="json", exclude_unset=True),
        )
        shard = ShardRecord(collection_id=1, shard=0, primary=nodes[0], in_sync=nodes)
        ids = IdRecord(next_id=2)
        puts = {r.key: r.to_bytes() for r in (record, shard)} | {"ids/collection": ids.to_bytes()}
        await self.store.txn([], puts)
        for name in nodes:
            await self.nodes[name].storage.create_shard(shard_spec(record, 0))

    async def record(self) -> tuple[ShardRecord, int]:
        entry = await self.store.get("shards/1/0")
        assert entry is not None
        return ShardRecord.from_bytes(entry.key, entry.value), entry.revision

    async def change(self, **fields: object) -> None:
        """As the monitor does it."""
        while True:
            record, revision = await self.record()
            changed = record.model_copy(update=fields)
            if (
                await self.store.txn(
                    [Compare(record.key, revision)], {record.key: changed.to_bytes()}
                )
            ).ok:
                return

    async def say_draining(self, name: str) -> None:
        """As its process does it."""
        record = NodeRecord(id=name, role=NodeRole.STORAGE, incarnation=name, draining=True)
        await self.store.txn([], {record.key: record.to_bytes()})

    async def promote(self, name: str, in_sync: list[str]) -> None:
        record, _ = await self.record()
        await self.change(term=record.term + 1, primary=name, in_sync=in_sync)

    def shard(self, name: str) -> Shard:
        found = self.nodes[name].storage.find(KEY)
        assert found is not None
        return found

    async def until(self, condition: Callable[[], object], what: str) -> None:
        deadline = asyncio.get_running_loop().time() + 10
        while not condition():
            assert asyncio.get_running_loop().time() < deadline, f"still waiting for: {what}"
            await asyncio.sleep(0.005)

    async def in_sync(self, *names: str) -> None:
        record, _ = await self.record()
        deadline = asyncio.get_running_loop().time() + 10
        while sorted(record.in_sync) != sorted(names):
            assert asyncio.get_running_loop().time() < deadline, f"{names}; {record}"
            await asyncio.sleep(0.005)
            record, _ = await self.record()

    async def write(self, name: str, *keys: int, value: float = 1.0) -> None:
        """Retried while the replica says that nothing happened."""
        async with asyncio.timeout(10):
            while True:
                try:
                    await self.nodes[name].storage.write(KEY, Upsert(points(keys, value)))
                    return
                except Unavailable:
                    await asyncio.sleep(0.01)

    async def found(self, name: str, keys: list[int], applied: int = 0) -> dict[int, float]:
        read = await self.nodes[name].storage.retrieve(
            KEY, PointIds.from_keys(keys), False, True, Guard(min_applied=applied)
        )
        batch = read.value
        values = batch.dense[""].values[:, 0].tolist() if len(batch) else []
        return dict(zip(batch.ids.keys(), values, strict=True))


def points(keys: object, value: float) -> PointBatch:
    ids = PointIds.from_keys(list(keys))  # type: ignore[call-overload]
    batch = PointBatch(ids)
    batch.dense[""] = DenseBlock(np.full((len(ids), DIM), value, np.float32))
    return batch


@contextlib.asynccontextmanager
async def world(
    tmp_path: Path, seal_bytes: int = 1 << 24, *, indexes: bool = False
) -> AsyncIterator[World]:
    store = await EmbeddedStore.open(tmp_path / "metadata.sqlite")
    made = World(tmp_path, store, seal_bytes, indexes)
    try:
        for name in ("a", "b", "c"):
            await made.start(name)
        await made.create(["a", "b", "c"])
        yield made
    finally:
        for index_node in made.index_nodes.values():
            await index_node.close()
        for name in list(made.nodes):
            await made.stop(name)
        await store.close()
