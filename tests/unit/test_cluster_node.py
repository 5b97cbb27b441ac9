"""Storage nodes of one cluster in one process: what a cluster does, and what becomes of it when nodes
go and come back. What could go wrong on the way is in test_cluster_troubles.py."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_cluster import KEY, World, points, world

from shoal import limits
from shoal.batch import DenseBlock, PointBatch
from shoal.errors import NotPrimary, ShoalError, TimedOut, Unavailable
from shoal.ids import PointIds
from shoal.index_api import BuildJob
from shoal.metadata.schema import NodeRecord, NodeRole
from shoal.storage_api import (
    AlterVectors,
    Delete,
    Distance,
    Guard,
    Selector,
    ShardKey,
    UpdateVectors,
    Upsert,
    VectorSpec,
)
from storage_node import member, replica
from storage_node.segment import stored_names
from storage_node.transfer import download


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


def test_vectors_come_and_go_on_every_replica(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on one that was away, and gets files of after the change; one index node builds for all."""
    monkeypatch.setattr(limits, "LOG_RETAIN_BYTES", 0)
    monkeypatch.setattr(replica, "RECENT_BYTES_MAX", 0)
    later, count = "\x1f1", 4_000
    vector = VectorSpec(3, Distance.DOT, index_bytes_min=1)
    fetched: list[str] = []

    async def spied(source: object, shard: ShardKey, folder: Path, **options: Any) -> object:
        fetched.append(folder.parts[-3])
        return await download(source, shard, folder, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(member, "download", spied)

    async def copy(w: World) -> None:
        for start in range(0, count, 500):
            keys = list(range(start, start + 500))
            values = np.random.default_rng(start).standard_normal((500, 3)).astype(np.float32)
            batch = PointBatch(PointIds.from_keys(keys), {later: DenseBlock(values)})
            await w.nodes["a"].storage.write(KEY, UpdateVectors(batch))

    def files(name: str) -> dict[str, bytes]:
        folder = w_folder(name) / "segments"
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.glob("*/*")}

    def w_folder(name: str) -> Path:
        return tmp_path / name / "1" / "0"

    async def main() -> None:
        async with world(tmp_path, seal_bytes=65_536, indexes=True) as w:
            await w.start_index_node("x")
            for start in range(0, count, 500):
                await w.write("a", *range(start, start + 500))
            await w.nodes["a"].storage.write(KEY, AlterVectors({later: vector}))
            await w.stop("c")
            await w.change(in_sync=["a", "b"])
            shutil.rmtree(w_folder("c"))
            await copy(w)
            dropped = await w.nodes["a"].storage.write(KEY, AlterVectors(drop=("",)))
            for start in range(count, count + 3_000, 500):
                await w.write("a", *range(start, start + 500))

            def trimmed() -> bool:
                return w.shard("a")._log.first_sequence > dropped.sequence

            await w.until(trimmed, "a checkpoint behind the drop")
            await w.start("c")
            await w.change(joining=["c"])
            await w.in_sync("a", "b", "c")
            assert "c" in fetched
            await w.change(term=(await w.record())[0].term + 1, primary="b")
            await w.until(lambda: w.shard("b").status(0).role == "primary", "b to lead")
            await w.write("b", count + 3_000)
            await w.until(lambda: not any(w.shard(n).info().pending for n in "abc"), "quiet")
            applied = w.shard("b").state.applied
            await w.until(lambda: all(w.shard(n).state.applied == applied for n in "abc"), "all")
            for name in "abc":
                info = w.shard(name).info()
                assert info.vectors == {later: count}, "the last points brought none"
                assert list(w.shard(name).state.spec.dense) == [later]
            for path in (w_folder("a") / "segments").glob("*/*"):
                if path.name.startswith(("vectors.", "index.")):
                    number = int(path.name.partition(".")[2])
                    assert stored_names(path.parent)[number] == later, path
            assert files("a") == files("b") == files("c")
            assert any("index." in path for path in files("a"))

    asyncio.run(main())


def test_an_error_is_typed(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            with pytest.raises(ShoalError):
                await w.nodes["a"].storage.count(ShardKey(7, 0), None)

    asyncio.run(main())


def test_a_node_that_stops_is_waited_for_by_nobody(tmp_path: Path) -> None:
    """It leads the shard, then it is a secondary: both times writes go on at once."""

    async def main() -> None:
        async with world(tmp_path) as w:
            monitor = NodeRecord(id="m", role=NodeRole.MONITOR, incarnation="m1")
            await w.store.txn([], {monitor.key: monitor.to_bytes()})
            await w.until(lambda: w.nodes["a"].held_up == [KEY], "a to know that others can go on")
            writes = [asyncio.create_task(w.write("a", key)) for key in range(20)]
            await asyncio.sleep(0)
            await w.nodes["a"].depart()
            await w.say_draining("a")
            with pytest.raises(Unavailable, match="being stopped"):
                await w.nodes["a"].storage.write(KEY, Upsert(points([99], 1.0)))
            await w.promote("b", ["b", "c"])
            await w.nodes["a"].until_spared()
            await w.write("b", 30)
            for write in writes:
                write.cancel()
            await w.stop("a")
            await w.start("a")
            await w.change(joining=["a"])
            await w.in_sync("a", "b", "c")

            await w.nodes["a"].depart()
            await w.say_draining("a")
            await w.nodes["a"].until_spared()
            await w.in_sync("b", "c")
            w.isolate("a")
            await w.write("b", 31)
            assert await w.found("c", [30, 31], applied=w.shard("b").state.applied)

    asyncio.run(main())


def test_a_node_that_nobody_misses_need_not_wait(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            assert w.nodes["a"].held_up == []  # there is no monitor that could promote another
            await w.until(lambda: w.nodes["b"].held_up == [KEY], "b to be missed by a")
            for name in "ac":
                await w.say_draining(name)
            await w.until(lambda: not w.nodes["b"].held_up, "b to hear that the others stop, too")

    asyncio.run(main())
