"""Storage nodes of one cluster in one process: what goes wrong at the worst moment, and must not leave
a replica, a job or a node stuck."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from small_cluster import KEY, World, points, world

from shoal import limits
from shoal.errors import (
    BadRequest,
    NotPrimary,
    ShoalError,
    Stale,
    StorageFull,
    TimedOut,
    Unavailable,
)
from shoal.files_api import FileSnapshot
from shoal.index_api import BuildJob
from shoal.metadata.contract import Uncertain
from shoal.metadata.schema import CollectionRecord, shard_spec
from shoal.node.v1.replication_pb2 import ReplicaMessage
from shoal.storage_api import Guard, ShardKey, UpdateMode, Upsert
from storage_node import member, replica
from storage_node.entries import Seal
from storage_node.member import ClusterNode


async def many(w: World, name: str = "a", count: int = 6_000) -> None:
    for start in range(0, count, 500):
        await w.write(name, *range(start, start + 500))


async def c_needs_files(w: World) -> None:
    """c is away until the log of a no longer reaches back to where it is."""
    await w.stop("c")
    shutil.rmtree(w.folder / "c")
    await w.change(in_sync=["a", "b"])
    await many(w)
    await w.until(lambda: not w.shard("a").state.checkpoints, "segments on disk")
    await w.start("c")


@pytest.fixture(autouse=True)
def _short_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LOG_RETAIN_BYTES", 0)
    monkeypatch.setattr(replica, "RECENT_BYTES_MAX", 0)


# -- another primary ------------------------------------------------------------------------------
def test_a_failover_while_a_seal_is_proposed_stops_nobody(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, indexes=True) as w:
            await w.write("a", 1)
            upkeep = w.shard("a")._upkeep
            w.isolate("a")
            once = [True]

            async def optimise() -> bool:  # as it does after a pause without writes
                if once:
                    once.clear()
                    await upkeep._propose(Seal(upkeep.state.new_segment_id()))
                return False

            upkeep._optimise_once = optimise  # type: ignore[method-assign]
            upkeep.role_changed()
            await w.until(lambda: w.shard("a")._waiting, "the proposal to be in the log")
            await w.promote("b", ["b", "c"])
            await w.until(lambda: not w.shard("a")._replication.is_primary, "a to hear of it")
            await asyncio.sleep(0.1)
            assert w.shard("a").stopped is None

    asyncio.run(main())


def test_what_a_new_primary_inherited_is_applied_before_it_is_read_or_asked_about(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            b = w.shard("b")
            b._has_room = lambda: False  # type: ignore[method-assign]
            room = asyncio.Event()

            async def wait_for_room() -> None:
                await room.wait()

            b._upkeep.wait_for_room = wait_for_room  # type: ignore[method-assign]
            await w.write("a", 1, value=1.0)  # answered; b has it, committed and not yet applied
            await w.until(lambda: b._to_apply, "b to have something to apply")
            w.isolate("a")
            await w.promote("b", ["b", "c"])
            await w.until(lambda: b._replication.refusal() is None, "b to be ready")
            await w.until(lambda: b._replication.lease_held, "the lease of b")
            strong = asyncio.create_task(w.nodes["b"].storage.count(KEY, None, Guard(strong=True)))
            done, _ = await asyncio.wait([strong], timeout=0.05)
            for task in done:
                with pytest.raises(NotPrimary):
                    await task
            insert = Upsert(points([1], 9.0), mode=UpdateMode.INSERT_ONLY)
            asked = asyncio.create_task(w.nodes["b"].storage.write(KEY, insert))
            await asyncio.sleep(0.05)
            room.set()
            await asked
            await asyncio.gather(strong, return_exceptions=True)
            assert await w.found("b", [1]) == {1: 1.0}

    asyncio.run(main())


def test_a_node_stops_although_a_write_can_never_be_committed(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            await w.write("a", 1)
            w.isolate("a")
            write = asyncio.create_task(w.nodes["a"].storage.write(KEY, Upsert(points([2], 5.0))))
            await w.until(lambda: w.shard("a")._waiting, "the write to be in the log")
            await asyncio.wait_for(w.stop("a"), 8)
            with pytest.raises(ShoalError) as told:
                await write
            assert told.value.maybe_applied

    asyncio.run(main())


# -- indexes --------------------------------------------------------------------------------------
@pytest.mark.parametrize("error", [TimedOut("late"), Uncertain("who knows"), OSError(28, "full")])
def test_an_index_that_cannot_be_had_stops_no_shard(tmp_path: Path, error: Exception) -> None:
    async def main() -> None:
        async with world(tmp_path, seal_bytes=65_536, indexes=True) as w:
            asked = [0]

            async def build(job: BuildJob) -> None:
                asked[0] += 1
                raise error

            for node in w.nodes.values():
                node._builder.build = build  # type: ignore[method-assign, union-attr]
            await many(w)
            await w.until(lambda: asked[0] >= 3, "builds")
            await asyncio.sleep(0.1)
            assert [w.shard(name).stopped for name in "abc"] == [None] * 3

    asyncio.run(main())


def test_an_index_node_whose_disk_is_full_gives_its_job_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with world(tmp_path, seal_bytes=65_536, indexes=True) as w:
            x = await w.start_index_node("x")
            x._scratch = tmp_path / "not there"  # every file operation fails
            await many(w)
            await w.until(
                lambda: all(w.shard(name).info().indexed_vectors >= 4_000 for name in "abc"),
                "the replicas to build for themselves",
            )

    asyncio.run(main())


# -- files ----------------------------------------------------------------------------------------
def test_a_replica_that_leaves_while_it_fetches_files_can_join_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, seal_bytes=65_536) as w:
            await c_needs_files(w)
            begun, go_on = asyncio.Event(), asyncio.Event()
            snapshot = ClusterNode.snapshot

            async def slow(shard: ShardKey) -> FileSnapshot:
                begun.set()
                await go_on.wait()
                return await snapshot(w.nodes["a"], shard)

            w.nodes["a"].snapshot = slow  # type: ignore[method-assign]
            await w.change(joining=["c"])
            await w.until(begun.is_set, "the download to begin")
            await w.change(joining=[], leaving=["c"])
            await gone(w)
            go_on.set()
            await asyncio.sleep(1.5)
            assert not w.nodes["c"].storage.folder(KEY).exists()
            await w.change(joining=["c"])
            await w.in_sync("a", "b", "c")

    asyncio.run(main())


async def gone(w: World) -> None:
    """Until c is out of `leaving`."""
    record, _ = await w.record()
    deadline = asyncio.get_running_loop().time() + 5
    while record.leaving:
        assert asyncio.get_running_loop().time() < deadline, record
        await asyncio.sleep(0.01)
        record, _ = await w.record()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), StorageFull("full")])
@pytest.mark.parametrize("step", ["download", "install", "finish_install"])
def test_a_copy_that_fails_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: Exception
) -> None:
    monkeypatch.setattr(member, "_REPAIR_S", 0.05)
    monkeypatch.setattr(member, "_RETRY_S", 0.05)
    left = [3]

    def failing(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            if left[0]:
                left[0] -= 1
                raise error
            return real(*arguments, **named)

        return call

    async def main() -> None:
        async with world(tmp_path, seal_bytes=65_536) as w:
            await c_needs_files(w)
            monkeypatch.setattr(member, step, failing(getattr(member, step)))
            await w.change(joining=["c"])
            await w.in_sync("a", "b", "c")
            assert not left[0]

    asyncio.run(main())


def test_an_install_that_cannot_be_finished_does_not_keep_the_node_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(member, "_REPAIR_S", 0.05)

    async def main() -> None:
        async with world(tmp_path) as w:
            await w.write("a", 1)
            await w.stop("c")

            def finish(folder: Path) -> None:
                raise StorageFull("no room")

            with monkeypatch.context() as patch:
                patch.setattr(member, "finish_install", finish)
                await w.start("c")
            await w.until(lambda: w.nodes["c"].storage.find(KEY), "the replica to be opened")

    asyncio.run(main())


# -- coming and going -----------------------------------------------------------------------------
def test_a_replica_leaves_although_the_store_fails_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(member, "_REPAIR_S", 0.05)

    async def main() -> None:
        async with world(tmp_path) as w:
            await w.write("a", 1)
            node = w.nodes["c"]
            store = node._store

            class Moody:
                failures = 2

                def __getattr__(self, name: str) -> object:
                    return getattr(store, name)

                async def txn(self, *arguments: object) -> object:
                    if self.failures:
                        self.failures -= 1
                        raise Unavailable("the store does not answer")
                    return await store.txn(*arguments)  # type: ignore[arg-type]

            node._store = Moody()  # type: ignore[assignment]
            await w.change(in_sync=["a", "b"], leaving=["c"])
            await gone(w)

    asyncio.run(main())


def test_a_crash_while_a_joining_replica_is_made(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            await w.write("a", 1)
            await w.stop("c")
            shutil.rmtree(w.folder / "c")
            await w.change(in_sync=["a", "b"], joining=["c"])
            (w.folder / "c" / "1" / "0").mkdir(parents=True)  # and then the process died
            await w.start("c")
            await w.in_sync("a", "b", "c")

    asyncio.run(main())


def test_a_replica_whose_creation_was_called_off_is_made_all_the_same(tmp_path: Path) -> None:
    """As when the coordinator goes away, or does not wait any longer."""

    async def main() -> None:
        async with world(tmp_path) as w:
            record = CollectionRecord.from_bytes(
                "collections/books", (await w.store.get("collections/books")).value
            )
            spec = shard_spec(record.model_copy(update={"id": 1}), 0)
            storage = w.nodes["a"].storage
            await storage.drop_shard(KEY)
            creating = asyncio.create_task(storage.create_shard(spec))
            await asyncio.sleep(0)
            creating.cancel()
            await asyncio.gather(creating, return_exceptions=True)
            await storage.create_shard(spec)
            shard = w.shard("a")
            assert shard._replication is not None
            assert shard._replication.replica.config is not None

    asyncio.run(main())


# -- full disks -----------------------------------------------------------------------------------
def test_a_cut_waits_for_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            await w.write("a", 1)
            w.isolate("a")
            lost = asyncio.create_task(w.nodes["a"].storage.write(KEY, Upsert(points([2], 5.0))))
            await w.until(lambda: w.shard("a")._replication.replica.durable == 2, "its own disk")
            log, tries = w.shard("a")._log, [0]
            cut = log.cut

            def full(after: int) -> None:
                tries[0] += 1
                if tries[0] <= 2:
                    raise StorageFull("no room for a new file")
                cut(after)

            log.cut = full  # type: ignore[method-assign]
            await w.promote("b", ["b", "c"])
            await asyncio.gather(lost, return_exceptions=True)
            await w.write("b", 3)
            w.cut.clear()
            await w.change(joining=["a"])
            await w.in_sync("a", "b", "c")
            assert w.shard("a").stopped is None

    asyncio.run(main())


def test_a_replica_says_whom_it_cannot_read(tmp_path: Path) -> None:
    """A peer of another version; and the messages that can be read still count."""

    async def main() -> None:
        async with world(tmp_path) as w:
            await w.write("a", 1)
            strange = ReplicaMessage(sender="b", to="a", collection_id=1, shard=0, body=b"\x08\x01")
            with pytest.raises(BadRequest):
                w.nodes["a"].deliver(strange)
            await w.write("a", 2)
            said = {name: await w.nodes[name].storage.status() for name in "abc"}
            assert {name: status[0].unread for name, status in said.items()} == {
                "a": "b",
                "b": "",
                "c": "",
            }

    asyncio.run(main())


def test_a_write_that_nobody_waits_for_is_not_done_when_its_turn_comes(tmp_path: Path) -> None:
    """Late, it could bring back what was deleted meanwhile."""

    async def main() -> None:
        async with world(tmp_path) as w:
            storage = w.nodes["a"].storage
            await w.write("a", 1)
            write = asyncio.create_task(storage.write(KEY, Upsert(points([2], 1.0))))
            await asyncio.sleep(0)  # it waits in the queue
            write.cancel()
            await w.write("a", 3)
            assert await w.found("a", [1, 2, 3]) == {1: 1.0, 3: 1.0}

    asyncio.run(main())


def test_a_replica_that_was_restarted_answers_from_no_past(tmp_path: Path) -> None:
    """Its files are older than its log, and it does not know how much of that was committed. When
    everything was restarted no coordinator knows what to ask for."""

    async def main() -> None:
        async with world(tmp_path, seal_bytes=65_536) as w:
            await many(w)
            await w.until(lambda: not w.shard("b").state.checkpoints, "segments on disk")
            await w.write("a", 1, value=7.0)
            for name in "abc":
                await w.stop(name)
            await w.start("b")
            with pytest.raises(Stale, match="started a moment ago"):
                await w.found("b", [1])
            await w.start("a")
            await w.start("c")
            await w.until(lambda: w.shard("b").may_answer(Guard()), "b to hear from a")
            assert await w.found("b", [1]) == {1: 7.0}

    asyncio.run(main())
