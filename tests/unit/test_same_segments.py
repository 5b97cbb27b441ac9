"""Replicas that apply the same log hold the same segments, byte for byte, whatever their timing.

One replica writes a log; others replay it. On each, seals and merges proceed in steps, in an order
drawn from a seed: between any two entries, any piece of background work may be done, or left. A
restarted one goes on from a copy of its folder, taken between two steps, as after a kill.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.batch import DenseBlock, PointBatch, SparseBlock
from shoal.errors import StorageFull
from shoal.ids import UUID_BIT, PointIds
from shoal.settings import StorageSettings
from shoal.storage_api import (
    AlterVectors,
    ClearPayload,
    Delete,
    DeleteVectors,
    Distance,
    Scroll,
    Selector,
    SetPayload,
    ShardKey,
    ShardSpec,
    UpdateVectors,
    Upsert,
    VectorSpec,
    Write,
)
from storage_node import upkeep as upkeep_module
from storage_node.entries import LogEntry, Merge, Seal, decode, encode
from storage_node.log import Log
from storage_node.manifest import Manifest, read_manifest
from storage_node.recovery import recover
from storage_node.searching import scroll
from storage_node.upkeep import Upkeep
from storage_node.vector_set import resolve_alter

SPEC = ShardSpec(
    ShardKey(1, 0),
    "test",
    {
        "a": VectorSpec(4, Distance.DOT),
        "b": VectorSpec(3, Distance.EUCLID),
        "m": VectorSpec(2, Distance.DOT, multi=True),
    },
    ("s",),
)
SETTINGS = StorageSettings(disk_free_bytes_min=0)
ENTRIES = 120
KEYS = [*range(30), *(UUID_BIT | (i << 70) | i for i in range(15))]


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power fails here: what was written stays."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: None)


class StepLanes:
    """In place of threads: work waits until the test does it, one piece at a time."""

    def __init__(self) -> None:
        self.waiting: list[tuple[asyncio.Future[Any], Callable[..., Any], tuple[object, ...]]] = []
        self.build = asyncio.Semaphore(1)

    def files(self, work: Callable[..., Any], *arguments: object) -> Awaitable[Any]:
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.waiting.append((done, work, arguments))
        return done

    async def step(self, rng: random.Random) -> bool:
        """Do one piece of work; False when none waits."""
        await settle()
        if not self.waiting:
            return False
        done, work, arguments = self.waiting.pop(rng.randrange(len(self.waiting)))
        try:
            result = work(*arguments)
        except Exception as error:
            done.set_exception(error)
        else:
            done.set_result(result)
        await settle()
        return True


async def settle() -> None:
    """Let everything run that can."""
    for _ in range(10):
        await asyncio.sleep(0)


class Replica:
    """State, log and upkeep as a shard has them, with its own timing."""

    def __init__(self, folder: Path, seed: object) -> None:
        self.folder, self.random = folder, random.Random(repr(seed))
        self.lives = 0
        self.tasks: list[asyncio.Task[None]] = []
        self.open(new=True)

    def open(self, *, new: bool) -> None:
        folder = self.life
        self.log = Log(folder / "log")
        recovered = recover(folder, SPEC, self.log, 1 << 30, new=new)
        assert not recovered.tail
        self.state, self.lanes = recovered.state, StepLanes()
        self.upkeep = Upkeep(
            folder,
            SPEC,
            SETTINGS,
            None,
            self.lanes,  # type: ignore[arg-type]
            self.log,
            propose=self._propose,
            may_propose=lambda: False,
        )
        self.upkeep.open(recovered)
        self.tasks = [asyncio.create_task(loop()) for loop in self.upkeep.loops]

    async def _propose(self, entry: Seal | Merge) -> None:
        raise AssertionError("it may not propose")

    @property
    def life(self) -> Path:
        return self.folder / str(self.lives)

    def apply(self, data: bytes) -> None:
        entry = decode(data)
        sequence = self.log.append([data], 1 + self.log.next_sequence // 50)
        self.state.apply(entry, sequence)
        self.upkeep.applied(entry)
        if isinstance(entry, Seal):
            self.log.rotate()

    async def work(self, steps: int) -> None:
        for _ in range(steps):
            if not await self.lanes.step(self.random):
                break
        self.check()

    async def finish(self) -> None:
        while await self.lanes.step(self.random):
            self.check()
        assert not self.state.checkpoints
        assert not self.state.merges
        assert self.upkeep.pending_work() == 0

    def check(self) -> None:
        for task in self.tasks:
            if task.done() and not task.cancelled() and task.exception() is not None:
                raise AssertionError("a loop ended") from task.exception()

    async def restart(self) -> None:
        """As after kill -9: what was not done is not done, and no cleaning up."""
        old = self.life
        self.lives += 1
        shutil.copytree(old, self.life)
        await self.stop()
        shutil.rmtree(old)
        self.open(new=False)

    async def stop(self) -> None:
        self.upkeep.end()
        for task in self.tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*self.tasks, return_exceptions=True)
        for done, _, _ in self.lanes.waiting:
            done.cancel()
        self.log.close()

    def contents(self) -> tuple[Manifest, dict[str, bytes]]:
        """What must be the same: the manifest's segments and all of their files."""
        manifest = read_manifest(self.life)
        assert manifest is not None
        root = self.life / "segments"
        files = {
            path.relative_to(root).as_posix(): path.read_bytes()
            for path in root.rglob("*")
            if path.is_file()
        }
        named = {f"{r.segment_id}/{name}" for r in manifest.segments for name in r.files}
        assert files.keys() == named, "files that no manifest names stay on the disk"
        return manifest, files

    def points(self) -> bytes:
        page = scroll(self.state.snapshot(), Scroll(limit=1000, with_vectors=True))
        for block in page.dense.values():
            if block.present is not None and block.present.all():
                block.present = None  # two ways to say the same
        return page.to_wire().SerializeToString(deterministic=True)


# -- a log ----------------------------------------------------------------------------------------
def batch(
    rng: random.Random, keys: list[int], *, payload: bool, spec: ShardSpec = SPEC
) -> PointBatch:
    """With the vectors of `spec`, and at times with one that was dropped or has another length now."""
    points = PointBatch(PointIds.from_keys(keys))
    count = len(keys)
    dims = {"a": 4, "b": 3, "a2": 5}
    if rng.random() < 0.9:
        dims = {name: vector.dim for name, vector in spec.dense.items() if not vector.multi}
    for name, dim in dims.items():
        if rng.random() < 0.9:
            values = np.array([[rng.randint(-8, 8) / 4 for _ in range(dim)] for _ in keys])
            some = np.array([rng.random() < 0.8 for _ in keys])
            present = None if rng.random() < 0.5 else some
            points.dense[name] = DenseBlock(values.astype(np.float32), present)
    if rng.random() < 0.5:
        lengths = [rng.randint(0, 3) for _ in keys]
        indptr = np.cumsum([0, *lengths]).astype(np.uint32)
        indices = np.concatenate([np.arange(n) for n in lengths]).astype(np.uint32)
        has = np.array([n > 0 for n in lengths])
        points.sparse["s"] = SparseBlock(indptr, indices, indices.astype(np.float32), has)
    if payload:
        points.set_payloads(
            [
                b'{"n":%d,"t":"%s","f":[%d,1.5]}' % (rng.randint(0, 9), b"x" * rng.randint(0, 9), i)
                if rng.random() < 0.9
                else b""
                for i in range(count)
            ]
        )
    return points


def some_alter(rng: random.Random, spec: ShardSpec) -> AlterVectors:
    names = ("a", "b", "a2", "b2")
    drop = tuple(rng.sample(names, rng.choice([0, 1, 1, 2])))
    new = VectorSpec(rng.randint(2, 5), Distance.DOT)
    add = {name: spec.dense.get(name, new) for name in rng.sample(names, rng.choice([0, 1, 2]))}
    return resolve_alter(spec, AlterVectors(add, drop))


def some_write(rng: random.Random, spec: ShardSpec) -> Write:
    keys = rng.sample(KEYS, rng.randint(1, 12))
    where = Selector(ids=PointIds.from_keys(keys))
    match rng.choice(
        ["upsert"] * 5 + ["delete"] * 3 + ["vectors", "drop", "set", "clear", "alter"]
    ):
        case "alter":
            return some_alter(rng, spec)
        case "upsert":
            return Upsert(batch(rng, keys, payload=True, spec=spec))
        case "delete":
            return Delete(where)
        case "vectors":
            forget = tuple(rng.sample(["a", "a2", "s", "unknown"], rng.randint(0, 2)))
            return UpdateVectors(batch(rng, keys, payload=False, spec=spec), forget=forget)
        case "drop":
            return DeleteVectors(where, ("b", "s"))
        case "set":
            return SetPayload(where, b'{"n":-1}', forget=("b",) if rng.random() < 0.5 else ())
        case _:
            return ClearPayload(where)


async def write_log(replica: Replica) -> list[bytes]:
    """A log as a primary makes it: it merges what it holds, when it has nothing left to merge."""
    rng, state, written = replica.random, replica.state, []
    for _ in range(ENTRIES):
        sealed = [segment.segment_id for segment in state.sealed]
        drawn = rng.random()
        entry: LogEntry = some_write(rng, state.spec)
        if drawn < 0.15:
            entry = Seal(state.new_segment_id())
        elif drawn < 0.35 and sealed and not state.merges:
            inputs = sorted(rng.sample(sealed, rng.randint(1, min(3, len(sealed)))))
            entry = Merge(tuple(inputs), state.new_segment_id())
        elif drawn < 0.37 and sealed:  # of a primary that did not know: must change nothing
            entry = Merge((max(sealed) + 1000, *sealed), state.new_segment_id())
        written.append(encode(entry))
        replica.apply(written[-1])
        await replica.work(rng.choice([0, 0, 1, 2, 5, 30]))
    # Seals and merges in turn until a merge read what every other one made.
    for _ in range(2):
        written.append(encode(Seal(state.new_segment_id())))
        replica.apply(written[-1])
    await replica.finish()
    return written


@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 60))]
)
def test_replicas_hold_the_same_bytes_whatever_their_timing(tmp_path: Path, seed: int) -> None:
    print(f"seed {seed}")

    async def run() -> None:
        primary = Replica(tmp_path / "primary", (seed, "primary"))
        log = await write_log(primary)
        expected, files = primary.contents()
        assert sum(isinstance(decode(data), Merge) for data in log) > 5
        for name, steps, restarts in (
            ("eager", [1000], 0.0),
            ("lazy", [0], 0.0),
            ("uneven", [0, 0, 0, 1, 2, 3, 10], 0.0),
            ("restarted", [0, 0, 1, 2, 3, 10], 0.15),
            ("restarted lazy", [0, 0, 0, 1], 0.15),
        ):
            replica = Replica(tmp_path / name, (seed, name))
            for data in log:
                replica.apply(data)
                await replica.work(replica.random.choice(steps))
                if replica.random.random() < restarts:
                    await replica.restart()
                    await replica.work(replica.random.choice(steps))
            await replica.finish()
            found, bytes_found = replica.contents()
            assert found.checkpoint == expected.checkpoint
            assert found.terms == expected.terms
            assert found.segments == expected.segments, name
            assert found.merges == expected.merges == ()
            assert (found.added, found.dropped) == (expected.added, expected.dropped)
            assert bytes_found == files, name
            assert replica.points() == primary.points()
            await replica.stop()
        await primary.stop()

    asyncio.run(run())


def test_a_replica_may_be_several_merges_and_seals_behind(tmp_path: Path) -> None:
    """A merge of what an earlier merge makes, with seals in between, all of it still to be done."""

    async def run() -> None:
        def upsert(keys: range) -> bytes:
            values = DenseBlock(np.ones((len(keys), 4), np.float32))
            return encode(Upsert(PointBatch(PointIds.from_keys(list(keys)), {"a": values})))

        def delete(*keys: int) -> bytes:
            return encode(Delete(Selector(ids=PointIds.from_keys(list(keys)))))

        first = [upsert(range(10)), encode(Seal(1)), upsert(range(10, 20)), encode(Seal(2))]
        chain = [
            delete(0),
            encode(Seal(3)),
            encode(Merge((1, 2), 4)),  # without 0
            delete(1),
            upsert(range(20, 30)),
            encode(Seal(5)),
            encode(Merge((4, 5), 6)),  # without 0 and 1
            delete(2),
            encode(Seal(7)),
            delete(3),
            encode(Merge((6,), 8)),  # without 0, 1 and 2
            encode(Seal(9)),
        ]
        eager, lazy = Replica(tmp_path / "eager", 1), Replica(tmp_path / "lazy", 2)
        for data in first + chain:
            eager.apply(data)
            await eager.finish()
            lazy.apply(data)
        assert len(lazy.state.merges) == 3
        assert len(lazy.state.checkpoints) == 6
        while await lazy.lanes.step(lazy.random):
            merges = lazy.upkeep.manifest.merges
            assert all(merge.tombstones is not None for merge in merges)
        await lazy.finish()
        assert lazy.contents() == eager.contents()
        (record,) = eager.contents()[0].segments
        assert (record.segment_id, record.rows) == (8, 27)
        await eager.stop()
        await lazy.stop()

    asyncio.run(run())


def test_tombstones_that_nothing_reads_go_while_a_merge_runs(tmp_path: Path) -> None:
    async def run() -> None:
        replica = Replica(tmp_path, 3)

        def delete(key: int) -> bytes:
            return encode(Delete(Selector(ids=PointIds.from_keys([key]))))

        for start in (0, 10, 20):
            keys = list(range(start, start + 10))
            values = DenseBlock(np.ones((10, 4), np.float32))
            replica.apply(encode(Upsert(PointBatch(PointIds.from_keys(keys), {"a": values}))))
            replica.apply(encode(Seal(1 + start // 10)))
        for key in (0, 20):
            replica.apply(delete(key))
        replica.apply(encode(Seal(4)))
        await replica.finish()
        replica.apply(encode(Merge((1, 2), 10)))
        held: list[Any] = []
        for number, (key, other) in enumerate(((1, 21), (2, 22))):
            await settle()
            # The merge's own work is held back; seals go on.
            held += [job for job in replica.lanes.waiting if job not in held]
            replica.lanes.waiting.clear()
            replica.apply(delete(key))
            replica.apply(delete(other))
            replica.apply(encode(Seal(5 + number)))
            while await replica.lanes.step(replica.random):
                pass

        def tombstones(segment: int) -> set[str]:
            folder = replica.life / "segments" / str(segment)
            return {path.name for path in folder.glob("tombstones.*")}

        assert tombstones(1) == {"tombstones.1", "tombstones.3"}, (
            "what the merge reads, and the newest"
        )
        assert tombstones(3) == {"tombstones.3"}
        assert replica.upkeep.manifest.merges[0].tombstones == ("tombstones.1", None)
        await replica.restart()  # in the middle of the merge
        assert tombstones(1) == {"tombstones.1", "tombstones.3"}
        await replica.finish()
        record = {r.segment_id: r for r in replica.upkeep.manifest.segments}[10]
        assert (record.rows, record.tombstones) == (19, "tombstones.2")
        await replica.stop()

    asyncio.run(run())


def test_a_seal_behind_a_merge_without_room_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chain of merges that cannot be written holds the seals after it: writers must hear of it."""
    monkeypatch.setattr(upkeep_module, "_RETRY_S", 0.0)

    async def run() -> None:
        replica = Replica(tmp_path, 4)

        def no_room(folder: Path, needed: int) -> None:
            raise StorageFull("Storage is full")

        values = DenseBlock(np.ones((5, 4), np.float32))
        points = PointBatch(PointIds.from_keys(list(range(5))), {"a": values})
        replica.apply(encode(Upsert(points)))
        replica.apply(encode(Seal(1)))
        await replica.finish()
        replica.apply(encode(Merge((1,), 2)))
        replica.apply(encode(Merge((2,), 3)))
        for number in range(4, 9):
            replica.apply(encode(Seal(number)))
        with monkeypatch.context() as patch:
            patch.setattr(upkeep_module, "check_space", no_room)
            await replica.work(20)
            assert len(replica.state.merges) == 2
            with pytest.raises(StorageFull):
                await replica.upkeep.wait_for_room()
        replica.upkeep.role_changed()  # it looks again by itself, later
        await replica.finish()
        assert [segment.segment_id for segment in replica.state.sealed] == [3]
        await replica.stop()

    asyncio.run(run())
