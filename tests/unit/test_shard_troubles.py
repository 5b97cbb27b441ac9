"""A shard in trouble: damaged and missing files, full disks, builders that fail, readers in between."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from index_node.builder import ProcessBuilder
from shoal.api.filter import Filter, HasIdCondition
from shoal.batch import DenseBlock, PointBatch
from shoal.errors import BodyTooLarge, NotFound, ShardStopped, StorageFull, Unavailable
from shoal.ids import UUID_BIT, PointIds, format_id
from shoal.index_api import BuildJob, IndexBuilder
from shoal.settings import StorageSettings
from shoal.storage_api import (
    Delete,
    Distance,
    OverwritePayload,
    Search,
    Selector,
    SetPayload,
    ShardInfo,
    ShardKey,
    ShardSpec,
    UpdateVectors,
    Upsert,
    VectorSpec,
)
from storage_node import files
from storage_node.node import StorageNode
from storage_node.searching import count_points, search

KEY = ShardKey(1, 0)
DIM = 8
WAIT_S = 30.0


def spec(dim: int = DIM, distance: Distance = Distance.DOT, least: int | None = 0) -> ShardSpec:
    return ShardSpec(KEY, "test", {"": VectorSpec(dim, distance, index_bytes_min=least)})


def settings(**changed: int) -> StorageSettings:
    return StorageSettings(**({"seal_bytes": 64 * 1024, "disk_free_bytes_min": 0} | changed))


def points(keys: range | list[int], dim: int = DIM) -> PointBatch:
    values = np.random.default_rng(7).standard_normal((len(keys), dim)).astype(np.float32)
    return PointBatch(PointIds.from_keys(list(keys)), {"": DenseBlock(values)})


def where(keys: range | list[int]) -> Selector:
    return Selector(ids=PointIds.from_keys(list(keys)))


async def until(node: StorageNode, enough: Callable[[ShardInfo], bool]) -> ShardInfo:
    """Wait for background work; fails after WAIT_S."""
    for _ in range(int(WAIT_S / 0.05)):
        info = await node.info(KEY)
        if info.stopped or enough(info):
            return info
        await asyncio.sleep(0.05)  # its own clock decides what is idle
    raise AssertionError(f"still {await node.info(KEY)}")


async def settled(node: StorageNode) -> ShardInfo:
    return await until(node, lambda info: info.pending == 0)


def with_node(
    folder: Path,
    test: Callable[[StorageNode], Awaitable[None]],
    *,
    specs: list[ShardSpec] | None = None,
    builder: IndexBuilder | None = None,
    changed: dict[str, int] | None = None,
) -> None:
    """Run a test on a node; without `specs` on a new shard."""

    async def run() -> None:
        node = StorageNode(folder, builder=builder, settings=settings(**(changed or {})))
        await node.start(specs or [])
        if specs is None:
            await node.create_shard(spec())
        try:
            await test(node)
        finally:
            await node.close()
            if builder is not None:
                await builder.close()

    asyncio.run(run())


async def fill(node: StorageNode) -> None:
    """Three thousand points in sealed segments, and some in the log."""
    for start in range(0, 3000, 1000):
        await node.write(KEY, Upsert(points(range(start, start + 1000))))
    await settled(node)


def stopped_because(folder: Path, text: str, **changed: int) -> None:
    async def test(node: StorageNode) -> None:
        info = await until(node, lambda info: False)
        assert info.stopped is not None
        assert text in info.stopped
        with pytest.raises(ShardStopped):
            await node.count(KEY, None)

    with_node(folder, test, specs=[spec()], changed=changed)


# -- what is missing or damaged -------------------------------------------------------------------
def test_a_missing_manifest_stops_the_shard_and_nothing_is_deleted(tmp_path: Path) -> None:
    with_node(tmp_path, fill)
    folder = tmp_path / "1" / "0"
    (folder / "MANIFEST").unlink()
    before = sorted(p for p in folder.rglob("*") if p.is_file())
    stopped_because(tmp_path, "MANIFEST is missing")
    assert sorted(p for p in folder.rglob("*") if p.is_file()) == before


def test_a_shard_that_the_catalog_knows_and_the_disk_does_not_is_not_made_anew(
    tmp_path: Path,
) -> None:
    with_node(tmp_path, fill)
    shutil.rmtree(tmp_path / "1")
    stopped_because(tmp_path, "MANIFEST is missing")


@pytest.mark.parametrize("lost", ["all", "first"])
def test_a_missing_log_stops_the_shard(tmp_path: Path, lost: str) -> None:
    async def two_files(node: StorageNode) -> None:
        await node.write(KEY, Upsert(points(range(10))))
        node._shards[KEY]._log.rotate()
        await node.write(KEY, Upsert(points(range(10, 20))))

    with_node(tmp_path, two_files)
    logs = sorted((tmp_path / "1" / "0" / "log").iterdir())
    assert len(logs) == 2
    for path in logs if lost == "all" else logs[:1]:
        path.unlink()
    stopped_because(tmp_path, "no log file" if lost == "all" else "are missing")


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("rows.arr", lambda data: data[:10]),
        ("rows.arr", lambda data: data.replace(b'"ints"', b'"intz"', 1)),
        ("rows.arr", lambda data: data[:20] + b"\xff" * 10 + data[30:]),
        ("columns.arr", lambda data: data[:10]),
        ("vectors.0", lambda data: bytes(8) + data[8:]),
    ],
)
@pytest.mark.parametrize("verify", [0, 1 << 30])
def test_damage_stops_the_shard_and_not_the_node(
    tmp_path: Path, file: str, damage: Callable[[bytes], bytes], verify: int
) -> None:
    with_node(tmp_path, fill)
    path = next((tmp_path / "1" / "0" / "segments").iterdir()) / file
    path.write_bytes(damage(path.read_bytes()))
    stopped_because(tmp_path, "damaged", verify_on_open_bytes_max=verify)


@pytest.mark.parametrize("verify", [0, 1 << 30])
def test_a_damaged_index_is_built_again(tmp_path: Path, verify: int) -> None:
    builder = ProcessBuilder()

    async def indexed(node: StorageNode) -> None:
        await node.drop_shard(KEY)
        await node.create_shard(spec(least=1))
        await fill(node)

    with_node(tmp_path, indexed, builder=builder)
    (path,) = (tmp_path / "1" / "0" / "segments").glob("*/index.0")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    async def serves(node: StorageNode) -> None:
        found = (await node.search(KEY, Search("", np.ones(DIM, np.float32), 10))).value
        assert len(found.scores) == 10
        info = await until(node, lambda info: info.indexed_vectors > 0 and not info.pending)
        assert info.stopped is None

    with_node(
        tmp_path,
        serves,
        specs=[spec(least=1)],
        builder=ProcessBuilder(),
        changed={"verify_on_open_bytes_max": verify},
    )


# -- full disks -----------------------------------------------------------------------------------
def test_writes_are_refused_and_not_left_waiting_when_seals_find_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        f_bavail, f_frsize = 10, 4096

    async def test(node: StorageNode) -> None:
        async def write_on() -> None:
            for start in range(0, 40_000, 1000):
                write = node.write(KEY, Upsert(points(range(start, start + 1000))))
                await asyncio.wait_for(write, 20)

        monkeypatch.setattr(files.os, "statvfs", lambda path: Full)
        with pytest.raises(StorageFull):
            await write_on()
        readable = (await node.count(KEY, None)).value
        assert readable >= 1000
        monkeypatch.undo()
        await settled(node)
        await node.write(KEY, Upsert(points([10**6])))
        assert (await node.count(KEY, None)).value == readable + 1

    with_node(tmp_path, test)


def test_a_shard_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    async def run() -> None:
        node = StorageNode(tmp_path, builder=None, settings=settings())
        await node.start([])
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        try:
            with pytest.raises(StorageFull):
                await node.create_shard(spec())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        with pytest.raises(NotFound):
            await node.count(KEY, None)
        await node.create_shard(spec())
        await node.write(KEY, Upsert(points(range(3))))
        assert (await node.count(KEY, None)).value == 3
        await node.close()

    asyncio.run(run())


# -- background work ------------------------------------------------------------------------------
def test_an_index_that_cannot_be_built_does_not_stop_merging(tmp_path: Path) -> None:
    class Broken:
        async def build(self, job: BuildJob) -> None:
            raise Unavailable("no memory left")

        async def close(self) -> None:
            return

    async def test(node: StorageNode) -> None:
        await node.drop_shard(KEY)
        await node.create_shard(spec(least=1))
        for start in range(0, 14_000, 1000):
            await node.write(KEY, Upsert(points(range(start, start + 1000))))
        info = await until(node, lambda info: info.segments <= 3)
        assert info.points == 14_000
        assert not node._shards[KEY].state.merges

    with_node(tmp_path, test, builder=Broken())


def test_deletes_seal_and_give_the_space_back(tmp_path: Path) -> None:
    async def test(node: StorageNode) -> None:
        await fill(node)
        await node.write(KEY, Delete(where(range(3000))))
        for _ in range(4):
            await node.write(KEY, Delete(where(range(65_536))))
        shard = node._shards[KEY]
        await until(node, lambda info: not info.pending and info.segments == 0)
        assert shard._log.size_on_disk() < 3 * 64 * 1024 * 4
        assert not list((tmp_path / "1" / "0" / "segments").iterdir())

    with_node(tmp_path, test, builder=ProcessBuilder())


def test_a_dropped_shard_leaves_no_file_whatever_was_under_way(tmp_path: Path) -> None:
    async def test(node: StorageNode) -> None:
        for start in range(0, 8000, 2000):
            await node.write(KEY, Upsert(points(range(start, start + 2000))))
        await node.drop_shard(KEY)
        assert not (tmp_path / "1").exists()

    with_node(tmp_path, test)


# -- reads ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("key", [7, UUID_BIT | 7])
def test_a_read_sees_its_snapshot_and_not_the_present(
    tmp_path: Path, sealed: bool, key: int
) -> None:
    async def test(node: StorageNode) -> None:
        await node.write(KEY, Upsert(points([key, 8, UUID_BIT | 9])))
        if sealed:
            await node.write(KEY, Upsert(points(range(5000, 8000))))
            await settled(node)
        snapshot = node._shards[KEY].state.snapshot()
        await node.write(KEY, Upsert(points([key])))
        has_it = Filter(must=[HasIdCondition(has_id=[format_id(key)])])
        query = np.ones(DIM, np.float32)
        assert count_points(snapshot, has_it) == 1
        assert search(snapshot, Search("", query, 5, filter=has_it)).points.ids.keys() == [key]
        rest = search(snapshot, Search("", query, 10_000, exclude=(key,)))
        assert key not in rest.points.ids.keys()  # noqa: SIM118

    with_node(tmp_path, test)


@pytest.mark.parametrize("distance", [Distance.EUCLID, Distance.DOT, Distance.MANHATTAN])
def test_rows_without_the_vector_do_not_ruin_its_graph(tmp_path: Path, distance: Distance) -> None:
    """As zeros they once did: 2 % of such rows took recall under Euclid from 0.8 to 0."""
    rng = np.random.default_rng(11)
    vectors = rng.standard_normal((4000, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    present = np.arange(4000) % 20 != 3

    async def test(node: StorageNode) -> None:
        await node.drop_shard(KEY)
        await node.create_shard(spec(16, distance, 1))
        for start in range(0, 4000, 500):
            part = slice(start, start + 500)
            batch = PointBatch(PointIds(np.arange(start, start + 500, dtype=np.uint64)))
            values = np.where(present[part, None], vectors[part], 0).astype(np.float32)
            batch.dense[""] = DenseBlock(values, present[part])
            await node.write(KEY, Upsert(batch))
        info = await settled(node)
        assert info.indexed_vectors > 3000
        found = 0
        for query in vectors[3::80]:
            near = (await node.search(KEY, Search("", query, 10, ef=200, with_vectors=True))).value
            exact = (await node.search(KEY, Search("", query, 10, exact=True))).value
            keys = near.points.ids.keys()
            assert present[keys].all()
            assert np.array_equal(near.points.dense[""].values, vectors[keys])
            found += len(set(keys) & set(exact.points.ids.keys()))
        assert found / (10 * len(vectors[3::80])) >= 0.95

    with_node(tmp_path, test, builder=ProcessBuilder())


def test_scores_that_overflow_are_still_results(tmp_path: Path) -> None:
    async def test(node: StorageNode) -> None:
        huge = np.full((50, DIM), 3e38, np.float32)
        huge[:, ::2] *= -1
        await node.write(
            KEY, Upsert(PointBatch(PointIds.from_keys(list(range(50))), {"": DenseBlock(huge)}))
        )
        found = (await node.search(KEY, Search("", np.full(DIM, 3e38, np.float32), 10))).value
        assert found.points.ids.keys() == list(range(10))

    with_node(tmp_path, test)


# -- large changes --------------------------------------------------------------------------------
def test_a_change_of_many_points_is_done_in_parts_and_refused_when_too_large(
    tmp_path: Path,
) -> None:
    async def test(node: StorageNode) -> None:
        await node.write(KEY, Upsert(points(range(2500))))
        result = await node.write(KEY, SetPayload(where(range(2600)), b'{"a":1}'))
        assert result.missing == 2500
        found = (await node.retrieve(KEY, PointIds.from_keys([0, 1234, 2499]), True, False)).value
        assert [found.payload_of(row) for row in range(3)] == [b'{"a":1}'] * 3
        large = b'{"a":"' + b"x" * (4 << 20) + b'"}'
        with pytest.raises(BodyTooLarge):
            await node.write(KEY, OverwritePayload(where(range(2500)), large))
        assert (await node.info(KEY)).stopped is None

    with_node(tmp_path, test)


def test_one_point_named_many_times_gets_the_last_of_each_vector(tmp_path: Path) -> None:
    async def test(node: StorageNode) -> None:
        await node.write(KEY, Upsert(points([1, 2])))
        batch = points([1] * 500 + [2, 1])
        batch.dense[""].present = np.array([True] * 500 + [True, False])
        await node.write(KEY, UpdateVectors(batch))
        found = (await node.retrieve(KEY, PointIds.from_keys([1, 2]), False, True)).value
        assert np.array_equal(found.dense[""].values, batch.dense[""].values[[499, 500]])

    with_node(tmp_path, test)


def test_orphans_are_deleted_and_others_kept(tmp_path: Path) -> None:
    with_node(tmp_path, fill)
    shutil.copytree(tmp_path / "1", tmp_path / "2")

    async def test(node: StorageNode) -> None:
        assert (await node.count(KEY, None)).value == 3000
        assert os.listdir(tmp_path) == ["1"]

    with_node(tmp_path, test, specs=[spec()])
