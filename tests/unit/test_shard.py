"""A shard against a plain dictionary: random writes, seals, merges, indexes and restarts.

The dictionary is the oracle; after every few operations each point is read back, counted, scrolled
and searched exactly.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from pathlib import Path

import numpy as np
import pytest

from index_node.builder import ProcessBuilder
from shoal.batch import DenseBlock, PointBatch, SparseBlock
from shoal.ids import UUID_BIT, PointIds
from shoal.settings import StorageSettings
from shoal.storage_api import (
    ClearPayload,
    Delete,
    DeleteVectors,
    Distance,
    OverwritePayload,
    Scroll,
    Search,
    Selector,
    SetPayload,
    ShardKey,
    ShardSpec,
    UpdateVectors,
    Upsert,
    VectorSpec,
)
from storage_node import upkeep
from storage_node.node import StorageNode

KEY = ShardKey(1, 0)
DIM = 8


def spec(index_bytes_min: int = 0) -> ShardSpec:
    vector = VectorSpec(DIM, Distance.DOT, index_bytes_min=index_bytes_min)
    return ShardSpec(KEY, "test", {"": vector, "b": VectorSpec(4, Distance.EUCLID)}, ("s",))


class Model:
    """key -> (payload bytes, {vector name: list of floats or (indices, values)})"""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.points: dict[int, tuple[bytes, dict[str, object]]] = {}
        self.keys = [*range(40), *(UUID_BIT | uuid.UUID(int=i).int for i in range(20))]

    def some_keys(self, most: int) -> list[int]:
        return [self.random.choice(self.keys) for _ in range(self.random.randint(1, most))]

    def vector(self, dim: int) -> list[float]:
        return [self.random.randint(-8, 8) / 4 for _ in range(dim)]

    def batch(self, keys: list[int], with_payload: bool) -> tuple[PointBatch, list[dict]]:
        rows = []
        for _ in keys:
            row: dict[str, object] = {}
            if self.random.random() < 0.8:
                row[""] = self.vector(DIM)
            if self.random.random() < 0.5:
                row["b"] = self.vector(4)
            if self.random.random() < 0.5:
                indices = sorted(self.random.sample(range(50), self.random.randint(0, 5)))
                row["s"] = (indices, [float(i) for i in range(len(indices))])
            rows.append(row)
        batch = PointBatch(PointIds.from_keys(keys))
        for name, dim in (("", DIM), ("b", 4)):
            values = np.array([row.get(name, [0.0] * dim) for row in rows], np.float32)
            present = np.array([name in row for row in rows])
            batch.dense[name] = DenseBlock(values, None if present.all() else present)
        sparse = [row.get("s", ([], [])) for row in rows]
        indptr = np.cumsum([0, *(len(s[0]) for s in sparse)]).astype(np.uint32)
        indices = np.array([i for s in sparse for i in s[0]], np.uint32)
        values = np.array([v for s in sparse for v in s[1]], np.float32)
        present = np.array(["s" in row for row in rows])
        batch.sparse["s"] = SparseBlock(indptr, indices, values, present)
        if with_payload:
            batch.set_payloads(
                [
                    b'{"n":%d,"t":"%s"}' % (i, b"x" * self.random.randint(0, 400))
                    for i in range(len(keys))
                ]
            )
        return batch, rows

    async def step(self, node: StorageNode) -> None:
        kind = self.random.choice(
            ["upsert"] * 6 + ["delete", "vectors", "drop", "set", "overwrite", "clear"]
        )
        keys = self.some_keys(30)
        where = Selector(ids=PointIds.from_keys(keys))
        missing = next((key for key in keys if key not in self.points), None)
        if kind == "upsert":
            batch, rows = self.batch(keys, True)
            await node.write(KEY, Upsert(batch))
            for row, key in enumerate(keys):
                self.points[key] = (batch.payload_of(row), rows[row])
            return
        if kind == "vectors":
            batch, rows = self.batch(keys, False)
            result = await node.write(KEY, UpdateVectors(batch))
            for row, key in enumerate(keys):
                if key in self.points:
                    payload, vectors = self.points[key]
                    self.points[key] = (payload, vectors | rows[row])
        elif kind == "delete":
            result = await node.write(KEY, Delete(where))
            missing = None
            for key in keys:
                self.points.pop(key, None)
        elif kind == "drop":
            result = await node.write(KEY, DeleteVectors(where, ("b", "s")))
            for key in set(keys) & set(self.points):
                payload, vectors = self.points[key]
                kept = {n: v for n, v in vectors.items() if n == ""}
                self.points[key] = (payload, kept)
        elif kind == "set":
            result = await node.write(KEY, SetPayload(where, b'{"n":-1}'))
            for key in set(keys) & set(self.points):
                old, vectors = self.points[key]
                text = old[old.index(b'"t"') :] if b'"t"' in old else b""
                new = b'{"n":-1,' + text if text else b'{"n":-1}'
                self.points[key] = (new, vectors)
        elif kind == "overwrite":
            result = await node.write(KEY, OverwritePayload(where, b'{"n":7,"t":"new"}'))
            for key in set(keys) & set(self.points):
                self.points[key] = (b'{"n":7,"t":"new"}', self.points[key][1])
        else:
            result = await node.write(KEY, ClearPayload(where))
            for key in set(keys) & set(self.points):
                self.points[key] = (b"", self.points[key][1])
        assert result.missing == missing

    async def check(self, node: StorageNode) -> None:
        assert (await node.info(KEY)).stopped is None
        assert (await node.count(KEY, None)).value == len(self.points)
        page = (await node.scroll(KEY, Scroll(limit=1000, with_vectors=True))).value
        assert page.ids.keys() == sorted(self.points)
        for row, key in enumerate(page.ids.keys()):
            payload, vectors = self.points[key]
            assert page.payload_of(row) == payload
            for name in ("", "b"):
                block = page.dense[name]
                has = block.present is None or bool(block.present[row])
                assert has == (name in vectors), (key, name)
                if has:
                    assert block.values[row].tolist() == vectors[name]
            block = page.sparse["s"]
            has = block.present is None or bool(block.present[row])
            assert has == ("s" in vectors)
            if has:
                span = slice(block.indptr[row], block.indptr[row + 1])
                assert (block.indices[span].tolist(), block.values[span].tolist()) == vectors["s"]
        start = self.random.choice(self.keys)
        page = (await node.scroll(KEY, Scroll(limit=7, start=start))).value
        assert page.ids.keys() == [k for k in sorted(self.points) if k >= start][:7]
        for exact in (True, False):
            query = np.array(self.vector(DIM), np.float32)
            hits = (
                await node.search(KEY, Search("", query, 10, exact=exact, with_payload=True))
            ).value
            scored = [
                (-float(np.dot(query, np.array(v[""], np.float32))), key)
                for key, (_, v) in self.points.items()
                if "" in v
            ]
            expected = sorted(scored)[:10]
            if exact:
                assert hits.points.ids.keys() == [key for _, key in expected]
            assert len(hits.scores) == len(expected)
            for row, key in enumerate(hits.points.ids.keys()):
                assert hits.points.payload_of(row) == self.points[key][0]


def settings() -> StorageSettings:
    return StorageSettings(seal_bytes=64 * 1024, disk_free_bytes_min=0)


@pytest.mark.parametrize("seed", range(6))
def test_random_writes_agree_with_a_dictionary(tmp_path: Path, seed: int) -> None:
    print(f"seed {seed}")
    model = Model(seed)

    async def run() -> None:
        node = StorageNode(tmp_path, builder=None, settings=settings())
        await node.start([])
        await node.create_shard(spec())
        for _ in range(3):
            for step in range(120):
                await model.step(node)
                if step % 20 == 0:
                    await model.check(node)
            await model.check(node)
            await node.close()
            node = StorageNode(tmp_path, builder=None, settings=settings())
            await node.start([spec()])
            await model.check(node)
        await node.close()

    asyncio.run(run())


@pytest.mark.parametrize("merge_in", ["thread", "child process"])
def test_a_graph_is_built_published_and_used_after_a_restart(
    tmp_path: Path, merge_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if merge_in != "thread":
        monkeypatch.setattr(upkeep, "_MERGE_IN_THREAD_ROWS_MAX", 0)
    rng = np.random.default_rng(5)
    vectors = rng.standard_normal((4000, DIM)).astype(np.float32)

    async def run() -> None:
        builder = ProcessBuilder()
        node = StorageNode(tmp_path, builder=builder, settings=settings())
        await node.start([])
        await node.create_shard(spec(index_bytes_min=1))
        for start in range(0, 4000, 500):
            ids = PointIds(np.arange(start, start + 500, dtype=np.uint64))
            batch = PointBatch(ids, {"": DenseBlock(vectors[start : start + 500])})
            await node.write(KEY, Upsert(batch))
        while (await node.info(KEY)).pending:  # noqa: ASYNC110
            await asyncio.sleep(0.02)  # its own clock decides: idle after a second
        info = await node.info(KEY)
        assert info.indexed_vectors >= 2000
        assert info.points == 4000
        assert info.segments <= 2, "idle merges leave one segment beside the growing one"
        await node.close()
        node = StorageNode(tmp_path, builder=builder, settings=settings())
        await node.start([spec(index_bytes_min=1)])
        assert (await node.info(KEY)).indexed_vectors == info.indexed_vectors
        hits = found = 0
        for query in vectors[::200]:
            got = (await node.search(KEY, Search("", query, 10))).value
            want = np.argsort(-(vectors @ query), kind="stable")[:10]
            found += len(set(got.points.ids.keys()) & set(want.tolist()))
            hits += 10
        assert found / hits >= 0.95
        await node.close()
        await builder.close()

    asyncio.run(run())
