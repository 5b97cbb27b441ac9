"""Storage nodes of one cluster in one process: real logs and segments, a bus that can be cut."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest

from index_node.service import IndexNode
from shoal import limits
from shoal.api.models import CreateCollection
from shoal.batch import DenseBlock, PointBatch
from shoal.errors import NotPrimary, ShoalError, TimedOut, Unavailable
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
from shoal.storage_api import Delete, Guard, Selector, ShardKey, Upsert
from storage_node.member import ClusterNode
from storage_node.replica import Timing
from storage_node.shard import Shard

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


def test_a_write_is_on_every_replica(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            await w.write("a", 1, 2, value=3.0)
            for name in "abc":
                assert await w.found(name, [1, 2, 3], applied=1) == {1: 3.0, 2: 3.0}
            with pytest.raises(NotPrimary):
                await w.nodes["b"].storage.write(KEY, Upsert(points([9], 1.0)))

    asyncio.run(main())


def test_a_dead_replica_leaves_and_comes_back_by_its_log(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            await w.write("a", 1)
            await w.stop("c")
            await w.write("a", 2)  # waits until c is out
            await w.in_sync("a", "b")
            await w.start("c")
            await w.change(joining=["c"])
            await w.in_sync("a", "b", "c")
            await w.write("a", 3)
            assert await w.found("c", [1, 2, 3], applied=3) == {1: 1.0, 2: 1.0, 3: 1.0}

    asyncio.run(main())


def test_a_deposed_primary_acknowledges_nothing_and_cuts_what_nobody_has(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            await w.write("a", 1)
            w.isolate("a")
            lost = asyncio.create_task(w.nodes["a"].storage.write(KEY, Upsert(points([2], 5.0))))
            await w.promote("b", ["b", "c"])
            with pytest.raises(TimedOut) as told:
                await lost
            assert told.value.maybe_applied
            await w.write("b", 3, value=7.0)
            w.cut.clear()
            await w.change(joining=["a"])
            await w.in_sync("a", "b", "c")
            for name in "abc":
                assert await w.found(name, [1, 2, 3], applied=2) == {1: 1.0, 3: 7.0}

    asyncio.run(main())


def test_a_strong_read_needs_the_lease(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            await w.write("a", 1)
            a = w.nodes["a"].storage
            assert (await a.count(KEY, None, Guard(strong=True))).value == 1
            with pytest.raises(NotPrimary):
                await w.nodes["b"].storage.count(KEY, None, Guard(strong=True))
            w.isolate("a")
            await w.until(
                lambda: not w.shard("a").may_answer(Guard(strong=True)), "the lease to end"
            )

    asyncio.run(main())


def test_a_restarted_primary_takes_a_new_term(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            await w.write("a", 1)
            await w.stop("a")
            await w.start("a")
            await w.write("a", 2)
            record, _ = await w.record()
            assert (record.primary, record.term) == ("a", 2)
            assert await w.found("b", [1, 2], applied=2) == {1: 1.0, 2: 1.0}

    asyncio.run(main())


def test_a_new_replica_gets_files_then_the_log(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, seal_bytes=65_536) as w:
            await w.stop("c")
            await w.change(in_sync=["a", "b"])
            for start in range(0, 20_000, 500):
                await w.write("a", *range(start, start + 500))
            await w.nodes["a"].storage.write(
                KEY, Delete(Selector(ids=PointIds.from_keys(list(range(0, 20_000, 7)))))
            )
            await w.until(lambda: not w.shard("a").state.checkpoints, "segments on disk")
            await w.start("c")
            await w.change(joining=["c"])
            await w.in_sync("a", "b", "c")
            applied = w.shard("a").state.applied
            wanted = list(range(0, 20_000, 131))
            for name in "abc":
                got = await w.found(name, wanted, applied=applied)
                assert got == {key: 1.0 for key in wanted if key % 7}, name

    asyncio.run(main())


def test_everything_restarts_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, seal_bytes=65_536) as w:
            for start in range(0, 5_000, 500):
                await w.write("a", *range(start, start + 500))
            for name in "abc":
                await w.stop(name)
            for name in "cba":
                await w.start(name)
            await w.write("a", 5_000)
            assert (await w.nodes["a"].storage.count(KEY, None)).value == 5_001

    asyncio.run(main())


def test_a_deleted_collection_is_deleted_on_every_node(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            await w.stop("c")
            await w.store.txn([], {}, ["shards/1/0", "collections/books"])
            await w.until(lambda: w.nodes["a"].storage.find(KEY) is None, "a to drop it")
            await w.start("c")  # it was away when that happened
            for name in "abc":
                folder = w.nodes[name].storage.folder(KEY)
                await w.until(lambda folder=folder: not folder.exists(), "files to go")

    asyncio.run(main())


async def indexed_everywhere(w: World) -> None:
    for start in range(0, 6_000, 500):
        await w.write("a", *range(start, start + 500))
    await indexed(w)


async def indexed(w: World) -> None:
    def done() -> bool:
        infos = [w.shard(name).info() for name in w.nodes]
        return all(info.indexed_vectors >= 4_000 and not info.pending for info in infos)

    await w.until(done, "an index on every replica")


def test_one_index_node_builds_for_all_replicas(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, seal_bytes=65_536, indexes=True) as w:
            await w.start_index_node("x")
            await indexed_everywhere(w)
            assert w.builder("x").built >= 1
            assert [w.builder(name).built for name in "abc"] == [0, 0, 0]
            files = [
                sorted(
                    (p.name, p.read_bytes())
                    for p in w.nodes[name].storage.folder(KEY).glob("segments/*/index.*")
                )
                for name in "abc"
            ]
            assert files[0] == files[1] == files[2] != []

    asyncio.run(main())


def test_the_job_of_a_dead_index_node_goes_to_another(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, seal_bytes=65_536, indexes=True) as w:
            gone = await w.start_index_node("x")
            w.builder("x").built = 0

            hanging = asyncio.Event()

            async def hang(job: BuildJob) -> None:
                hanging.set()
                await asyncio.Event().wait()

            w.builder("x").build = hang  # type: ignore[method-assign]
            for start in range(0, 6_000, 500):
                await w.write("a", *range(start, start + 500))
            await w.until(hanging.is_set, "the job to be claimed")
            await gone.close()  # as its lease ends: its registration goes
            w.index_nodes.pop("x")
            await w.store.txn([], {}, ["nodes/x"])
            await w.start_index_node("y")
            await indexed(w)
            assert w.builder("y").built >= 1

    asyncio.run(main())


def test_without_an_index_node_replicas_build_for_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "INDEX_JOB_WAIT_S", 0.1)

    async def main() -> None:
        async with world(tmp_path, seal_bytes=65_536, indexes=True) as w:
            await indexed_everywhere(w)
            assert all(w.builder(name).built >= 1 for name in "abc")

    asyncio.run(main())


def test_an_error_is_typed(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            with pytest.raises(ShoalError):
                await w.nodes["a"].storage.count(ShardKey(7, 0), None)

    asyncio.run(main())
