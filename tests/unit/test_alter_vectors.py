"""Vectors that a shard gets and loses while it lives: against a dictionary, over restarts and crashes,
under readers in threads, and what is left of them on the disk."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import random
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from alter_oracle import KEY, NAMES, Oracle, created, some_write, vector
from fakes.storage import FakeStorage

from index_node.builder import ProcessBuilder
from shoal.api.filter import parse_filter
from shoal.batch import DenseBlock, PointBatch
from shoal.errors import BadRequest, Stale
from shoal.faiss_index import FlatVectors, build_graph
from shoal.ids import PointIds
from shoal.index_api import BuildJob
from shoal.settings import StorageSettings
from shoal.storage_api import (
    AlterVectors,
    Distance,
    Scroll,
    Search,
    Selector,
    SetPayload,
    ShardInfo,
    ShardSpec,
    UpdateVectors,
    Upsert,
    VectorSpec,
    Write,
)
from storage_node import faults, upkeep
from storage_node.entries import Merge, Seal, byte_size, decode, encode, is_empty
from storage_node.files import open_array_file
from storage_node.log import Log
from storage_node.manifest import Manifest, read_manifest
from storage_node.node import StorageNode
from storage_node.recovery import recover
from storage_node.searching import Snapshot, scroll, search, take_rows
from storage_node.state import ShardState
from storage_node.vector_set import altered, as_of, changes, columns_of, resolve_alter

SETTINGS = StorageSettings(disk_free_bytes_min=0).model_copy(update={"seal_bytes": 4096})
NEW = "v\x1f1"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seals, merges and indexes come in every pause. No power fails here: what was written stays."""
    for name, seconds in (("_SHORT_PAUSE_S", 0.0), ("_LONG_PAUSE_S", 0.01), ("_POLL_S", 0.01)):
        monkeypatch.setattr(upkeep, name, seconds)
    for call in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, call, lambda descriptor: None)


# -- which vectors there are ----------------------------------------------------------------------
def test_what_is_there_already_is_left_out():
    spec = created()
    op = AlterVectors({"v": spec.dense["v"], NEW: vector(5)}, ("w", "unknown", "w"))
    assert resolve_alter(spec, op) == AlterVectors({NEW: vector(5)}, ("w",))
    after = altered(spec, resolve_alter(spec, op), 7)
    assert list(columns_of(after).items()) == [("v", 0), (NEW, 7), ("s", 0)]
    again = resolve_alter(after, op)
    assert again == AlterVectors()
    assert is_empty(again)
    assert not is_empty(op)
    assert byte_size(op) > 0


@pytest.mark.parametrize(
    ("op", "why"),
    [
        (AlterVectors({"v": vector(4)}), "other settings"),
        (AlterVectors({"v": VectorSpec(3, Distance.COSINE, index_bytes_min=0)}), "other settings"),
        (AlterVectors({"s": vector(4)}), "cannot be added"),
        (AlterVectors({"x": VectorSpec(4, Distance.DOT, multi=True)}), "cannot be added"),
        (AlterVectors({"x": vector(0)}), "cannot be added"),
        (AlterVectors({"x": vector(70_000)}), "cannot be added"),
        (AlterVectors(drop=("s",)), "cannot be dropped"),
        (AlterVectors(drop=("m",)), "cannot be dropped"),
        (AlterVectors({f"x{number}": vector(2) for number in range(125)}), "129 vectors"),
    ],
)
def test_what_cannot_be_is_refused(op: AlterVectors, why: str):
    dense = created().dense | {"m": VectorSpec(2, Distance.DOT, multi=True)}
    with pytest.raises(BadRequest, match=why):
        resolve_alter(ShardSpec(KEY, "test", dense, ("s",)), op)


def test_a_name_in_both_begins_anew():
    spec = created()
    op = AlterVectors({"v": vector(9)}, ("v",))
    assert resolve_alter(spec, op) == op
    after = altered(spec, op, 3)
    assert columns_of(after) == {"w": 0, "v": 3, "s": 0}
    assert altered(after, AlterVectors(drop=("v",)), 4) == ShardSpec(
        KEY, "test", {"w": spec.dense["w"]}, ("s",)
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_manifest_brings_the_vectors_back(seed: int):
    print(f"seed {seed}")
    dice, spec = random.Random(seed), created()
    for sequence in range(1, 30):
        add = {name: vector(dice.randint(1, 4)) for name in dice.sample(NAMES, dice.randint(0, 2))}
        drop = (*add, *dice.sample(NAMES, dice.randint(0, 2)))
        spec = altered(spec, resolve_alter(spec, AlterVectors(add, drop)), sequence)
        manifest = Manifest.model_validate({"collection_id": 1, "shard": 0})
        manifest = manifest.model_copy(update=changes(created(), spec))
        again = as_of(created(), Manifest.model_validate_json(manifest.model_dump_json()))
        assert again == spec
        assert columns_of(again) == columns_of(spec)
        assert list(again.dense) == list(spec.dense), "it numbers the files"


def test_entries_come_back_the_same():
    entry = AlterVectors({NEW: vector(4), "": VectorSpec(2, Distance.COSINE, hnsw_m=4)}, ("a", "v"))
    again = decode(encode(entry))
    assert again == entry
    assert isinstance(again, AlterVectors)
    assert list(again.add) == list(entry.add)
    where = Selector(ids=PointIds.from_keys([1]))
    found = decode(encode(SetPayload(where, b"{}", None, ("v", NEW))))
    assert isinstance(found, SetPayload)
    assert found.forget == ("v", NEW)


# -- a state by itself ----------------------------------------------------------------------------
def floats(keys: list[int], dim: int = 3, name: str = "v", start: float = 0.0) -> PointBatch:
    """Every row another vector, and all greater than 0."""
    values = start + np.arange(1, 1 + len(keys) * dim, dtype=np.float32).reshape(len(keys), dim)
    return PointBatch(PointIds.from_keys(keys), {name: DenseBlock(values)})


def done(state: ShardState, op: Write) -> int | None:
    missing = None
    for entry in state.resolve(op):
        if not is_empty(entry):
            found = state.apply(decode(encode(entry)), state.applied + 1)
            missing = found if missing is None else missing
    return missing


def having(state: ShardState, name: str) -> list[int]:
    page = scroll(
        state.snapshot(), Scroll(100, filter=parse_filter({"must": {"has_vector": name}}))
    )
    return page.ids.keys()


def versions(state: ShardState) -> dict[int, int]:
    page = scroll(state.snapshot(), Scroll(100))
    assert page.versions is not None
    return dict(zip(page.ids.keys(), page.versions.tolist(), strict=True))


def test_rows_are_updated_only_at_the_version_that_was_read():
    state = ShardState(created())
    done(state, Upsert(floats([1, 2, 3, 4])))
    seen = versions(state)
    done(state, AlterVectors({NEW: vector(2)}))
    assert versions(state) == seen, "it changes no point"
    done(state, SetPayload(Selector(ids=PointIds.from_keys([2])), b'{"a":1}'))
    done(state, Upsert(floats([3], start=50)))
    keys = [1, 2, 3, 4, 99, 1]
    expected = np.array([seen.get(key, 0) for key in keys], np.uint64)
    expected[5] = 77  # the second row of point 1 is of another version
    missing = done(state, UpdateVectors(floats(keys, 2, NEW), if_versions=expected))
    assert missing is None, "what is not there was not asked for"
    assert having(state, NEW) == [1, 4]
    assert versions(state)[1] == versions(state)[4] == state.applied
    page = scroll(state.snapshot(), Scroll(10, with_vectors=(NEW,)))
    assert page.dense[NEW].values[[0, 3]].tolist() == [[1, 2], [7, 8]]
    before = state.applied
    done(state, UpdateVectors(floats(keys, 2, NEW), if_versions=expected))
    assert state.applied == before, "nothing fits: nothing is logged"
    with pytest.raises(BadRequest, match="6 points came with 2 versions"):
        state.resolve(UpdateVectors(floats(keys, 2, NEW), if_versions=expected[:2]))


def test_both_rows_of_a_point_count_and_a_filter_too():
    state = ShardState(created())
    done(state, AlterVectors({NEW: vector(2)}))
    done(state, Upsert(floats([1, 2])))
    done(state, SetPayload(Selector(ids=PointIds.from_keys([1])), b'{"odd":true}'))
    seen = versions(state)
    both = floats([1, 1, 2], 2, NEW)
    both.dense["w"] = DenseBlock(np.ones((3, 2), np.float32), np.array([True, False, True]))
    expected = np.array([seen[1], seen[1], seen[2]], np.uint64)
    odd = parse_filter({"must": {"key": "odd", "match": {"value": True}}})
    done(state, UpdateVectors(both, odd, expected))
    assert having(state, NEW) == having(state, "w") == [1]
    page = scroll(state.snapshot(), Scroll(10, with_vectors=True))
    assert page.dense[NEW].values[0].tolist() == [3, 4], "the later row"
    assert page.dense["w"].values[0].tolist() == [1, 1]


def test_a_change_may_forget_vectors():
    state = ShardState(created())
    done(state, AlterVectors({NEW: vector(2)}))
    points = floats([1, 2, 3])
    points.dense[NEW] = DenseBlock(np.ones((3, 2), np.float32))
    done(state, Upsert(points))
    done(state, SetPayload(Selector(ids=PointIds.from_keys([1])), b"{}", None, (NEW, "unknown")))
    assert (having(state, "v"), having(state, NEW)) == ([1, 2, 3], [2, 3])
    update = floats([2, 3])
    update.dense[NEW] = DenseBlock(np.full((2, 2), 5, np.float32), np.array([True, False]))
    done(state, UpdateVectors(update, forget=(NEW, "v")))
    assert (having(state, "v"), having(state, NEW)) == ([1, 2, 3], [2])


def test_every_point_lacks_what_was_added_and_what_was_dropped():
    state = ShardState(created())
    done(state, Upsert(floats([1, 2, 3])))
    assert having(state, NEW) == []
    done(state, AlterVectors({NEW: vector(4)}))
    assert having(state, NEW) == []
    page = scroll(state.snapshot(), Scroll(10, with_vectors=True))
    assert sorted(page.dense) == ["v", NEW, "w"]
    assert page.dense[NEW].values.tolist() == [[0] * 4] * 3
    assert page.dense[NEW].present is not None
    assert not page.dense[NEW].present.any()
    hits = search(state.snapshot(), Search(NEW, np.ones(4, np.float32), 10))
    assert len(hits.points) == 0
    done(state, AlterVectors({"v": vector(2)}, ("v",)))
    assert having(state, "v") == []
    done(state, UpdateVectors(floats([2])))  # of the old length: passed over
    assert having(state, "v") == []
    done(state, UpdateVectors(floats([2], 2)))
    assert having(state, "v") == [2]


def test_a_search_for_a_vector_that_is_not_there_can_be_tried_again():
    state = ShardState(created())
    done(state, Upsert(floats([1])))
    for using, dim in ((NEW, 3), ("v", 4)):
        with pytest.raises(Stale, match=f"of {dim} dimensions") as error:
            search(state.snapshot(), Search(using, np.ones(dim, np.float32), 1))
        assert error.value.retryable
    everything = take_rows(state.snapshot(), [(0, 0)], True, ("v", NEW, "unknown"))
    assert list(everything.dense) == ["v"]


def test_a_read_keeps_what_it_began_with():
    state = ShardState(created())
    done(state, Upsert(floats([1, 2, 3])))
    snapshot = state.snapshot()
    query = Search("v", np.ones(3, np.float32), 10)
    before = search(snapshot, query)
    done(state, AlterVectors({"v": vector(7)}, ("v",)))
    done(state, Upsert(floats([1], 7)))
    after = search(snapshot, query)
    assert after.points.ids.keys() == before.points.ids.keys() == [3, 2, 1]
    assert np.array_equal(after.scores, before.scores)
    page = scroll(snapshot, Scroll(10, with_vectors=True))
    assert page.dense["v"].values.tolist() == floats([1, 2, 3]).dense["v"].values.tolist()


@pytest.mark.parametrize("seed", range(4))
def test_the_storage_of_other_tests_does_the_same(seed: int) -> None:
    print(f"seed {seed}")
    dice, oracle, fake = random.Random(seed), Oracle(), FakeStorage()

    async def run() -> None:
        await fake.create_shard(created())
        for _ in range(300):
            op = some_write(dice, oracle)
            result = await fake.write(KEY, op)
            assert result.missing == oracle.apply(op, result.sequence)
            page = await fake.scroll(KEY, Scroll(1000, with_vectors=True))
            assert oracle.page(page) == dict(sorted(oracle.points.items()))
        with pytest.raises(Stale):
            await fake.search(KEY, Search("unknown", np.ones(3, np.float32), 1))

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(3))
def test_readers_in_threads_see_their_snapshot(tmp_path: Path, seed: int) -> None:
    """While vectors come and go, rows are added and segments are sealed and merged."""
    print(f"seed {seed}")
    dice, oracle = random.Random(seed), Oracle()
    waiting: queue.SimpleQueue[tuple[Snapshot, Oracle] | None] = queue.SimpleQueue()

    def read() -> int:
        count = 0
        while (found := waiting.get()) is not None:
            snapshot, expected = found
            assert expected.holds(scroll(snapshot, Scroll(1000, with_vectors=True)))
            for name, spec in expected.dense.items():
                hits = search(snapshot, Search(name, np.ones(spec.dim, np.float32), 100))
                having = {k for k, point in expected.points.items() if name in point.vectors}
                assert set(hits.points.ids.keys()) == having
            count += 1
        return count

    async def run() -> None:
        node = StorageNode(tmp_path, builder=None, settings=SETTINGS)
        await node.start([])
        await node.create_shard(created())
        with ThreadPoolExecutor(2) as readers:
            reads = [readers.submit(read) for _ in range(2)]
            try:
                for _ in range(150):
                    await written(node, oracle, some_write(dice, oracle))
                    shard = node.find(KEY)
                    assert shard is not None
                    waiting.put((shard.state.snapshot(), oracle.copy()))
            finally:
                waiting.put(None)
                waiting.put(None)
            assert sum(each.result() for each in reads) == 150
        await node.close()

    asyncio.run(run())


# -- on the disk ----------------------------------------------------------------------------------
async def written(node: StorageNode, oracle: Oracle, op: Write) -> None:
    result = await node.write(KEY, op)
    assert result.missing == oracle.apply(op, result.sequence)


async def check(node: StorageNode, oracle: Oracle) -> None:
    page = (await node.scroll(KEY, Scroll(1000, with_vectors=True))).value
    assert oracle.page(page) == dict(sorted(oracle.points.items()))
    info = await node.info(KEY)
    assert info.stopped is None
    names = (*oracle.dense, "s")
    having = {n: sum(n in point.vectors for point in oracle.points.values()) for n in names}
    assert info.vectors == having
    for name in (*NAMES, "unknown"):
        where = parse_filter({"must": {"has_vector": name}})
        assert (await node.count(KEY, where)).value == having.get(name, 0)
    for name, spec in oracle.dense.items():
        query = np.linspace(-1, 2, spec.dim, dtype=np.float32)
        hits = (await node.search(KEY, Search(name, query, 8, exact=True))).value
        scored = [
            (-float(np.dot(query, np.array(point.vectors[name], np.float32))), key)
            for key, point in oracle.points.items()
            if name in point.vectors
        ]
        assert [*zip((-hits.scores).tolist(), hits.points.ids.keys(), strict=True)] == [
            (pytest.approx(score), key) for score, key in sorted(scored)[:8]
        ]


@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 40))]
)
def test_random_writes_agree_with_a_dictionary(tmp_path: Path, seed: int) -> None:
    print(f"seed {seed}")
    dice, oracle = random.Random(seed), Oracle()

    async def run() -> None:
        node = StorageNode(tmp_path, builder=None, settings=SETTINGS)
        await node.start([])
        await node.create_shard(created())
        for _ in range(3):
            for step in range(150):
                await written(node, oracle, some_write(dice, oracle))
                if dice.random() < 0.1:
                    await asyncio.sleep(0.002)  # its threads write segments meanwhile
                if step % 30 == 0:
                    await check(node, oracle)
            await node.close()
            node = StorageNode(tmp_path, builder=None, settings=SETTINGS)
            await node.start([created()])
            await check(node, oracle)
        await node.close()

    asyncio.run(run())


def vector_files(folder: Path) -> set[str]:
    return {
        path.name
        for path in (folder / "1" / "0" / "segments").glob("*/*")
        if path.name.startswith(("vectors.", "index."))
    }


async def settled(node: StorageNode) -> ShardInfo:
    """Wait for background work; fails after half a minute."""
    for _ in range(3000):
        info = await node.info(KEY)
        if info.stopped or not info.pending:
            return info
        await asyncio.sleep(0.01)  # its own clock decides what is idle
    raise AssertionError(f"still {await node.info(KEY)}")


async def seal(node: StorageNode) -> None:
    """As the primary does it when the growing segment is full."""
    shard = node.find(KEY)
    assert shard is not None
    await shard._enqueue(Seal(shard.state.new_segment_id()), 0)


def random_floats(keys: range, dim: int, name: str) -> PointBatch:
    values = np.random.default_rng(dim).standard_normal((len(keys), dim)).astype(np.float32)
    return PointBatch(PointIds.from_keys(list(keys)), {name: DenseBlock(values)})


def test_a_vector_comes_is_indexed_takes_over_and_the_old_one_leaves_the_disk(
    tmp_path: Path,
) -> None:
    spec = ShardSpec(KEY, "test", {"v": vector(8, index_bytes_min=1)})
    settings = StorageSettings(disk_free_bytes_min=0)
    keys = range(2000)
    both = random_floats(keys, 16, NEW).dense[NEW].values

    async def run() -> None:
        builder = ProcessBuilder()
        node = StorageNode(tmp_path, builder=builder, settings=settings)
        await node.start([])
        await node.create_shard(spec)
        try:
            for start in range(0, 2000, 500):
                await node.write(KEY, Upsert(random_floats(range(start, start + 500), 8, "v")))
            await seal(node)
            await settled(node)
            await node.write(KEY, AlterVectors({NEW: vector(16, index_bytes_min=1)}))
            for start in range(0, 2000, 500):
                part = range(start, start + 500)
                points = PointBatch(PointIds.from_keys(list(part)))
                points.dense[NEW] = DenseBlock(both[start : start + 500])
                await node.write(KEY, UpdateVectors(points))
            await seal(node)
            info = await settled(node)
            assert info.vectors == {"v": 2000, NEW: 2000}
            assert info.indexed_vectors == 4000
            assert vector_files(tmp_path) == {"vectors.0", "vectors.1", "index.0", "index.1"}
            before = info.bytes_on_disk
            await node.write(KEY, AlterVectors(drop=("v",)))
            info = await settled(node)
            assert vector_files(tmp_path) == {"vectors.1", "index.1"}
            assert info.vectors == {NEW: 2000}
            assert info.indexed_vectors == 2000
            assert before - info.bytes_on_disk > 2000 * 8 * 4
        finally:
            await node.close()
        node = StorageNode(tmp_path, builder=builder, settings=settings)
        await node.start([spec])
        try:
            again = await node.info(KEY)
            assert (again.vectors, again.indexed_vectors) == ({NEW: 2000}, 2000)
            for row in (0, 777):
                hits = (await node.search(KEY, Search(NEW, both[row], 5))).value
                best = np.argsort(-(both @ both[row]), kind="stable")[:5]
                assert len(set(hits.points.ids.keys()) & set(best.tolist())) >= 4
        finally:
            await node.close()
            await builder.close()

    asyncio.run(run())


def test_vectors_are_exchanged_while_their_indexes_are_built(tmp_path: Path) -> None:
    """In the middle of a merge: what is built then is of the vectors that were there, or is not built."""
    spec = ShardSpec(
        KEY, "test", {"v": vector(3, index_bytes_min=1), "w": vector(2, index_bytes_min=1)}
    )
    new = {"w": vector(4, index_bytes_min=1), "v": vector(5, index_bytes_min=1)}

    class Exchanging:
        node: StorageNode
        built = 0

        async def build(self, job: BuildJob) -> None:
            if not self.built:
                await self.node.write(KEY, AlterVectors(new, ("v", "w")))
            self.built += 1
            flat = FlatVectors(job.vectors, job.dim, job.count, job.distance)
            build_graph(flat.values, job.distance, job.m, job.ef_construct, job.output, 1)

        async def close(self) -> None:
            """Nothing is running."""

    async def run() -> None:
        builder = Exchanging()
        node = builder.node = StorageNode(tmp_path, builder=builder, settings=SETTINGS)
        await node.start([])
        await node.create_shard(spec)
        shard = node.find(KEY)
        assert shard is not None
        for start in (0, 200):
            both = random_floats(range(start, start + 200), 3, "v")
            both.dense |= random_floats(range(start, start + 200), 2, "w").dense
            shard._enqueue(Upsert(both), 0)
            shard._enqueue(Seal(shard.state.new_segment_id()), 0)
        await shard._enqueue(Merge((1, 2), shard.state.new_segment_id()), 0)
        info = await settled(node)
        assert (info.stopped, info.segments, info.indexed_vectors) == (None, 1, 0)
        assert info.vectors == {"w": 0, "v": 0}
        assert vector_files(tmp_path) == set()
        assert builder.built == 1, "the other one was gone when its turn came"
        for name, other in new.items():
            await node.write(KEY, UpdateVectors(random_floats(range(400), other.dim, name)))
        await seal(node)
        info = await settled(node)
        assert info.indexed_vectors == 800
        await node.close()

    asyncio.run(run())


def in_segments(folder: Path, oracle: Oracle, writes: list[Write]) -> Path:
    """A shard that was closed after these writes, each in a segment of its own. Returns its folder."""

    async def run() -> None:
        node = StorageNode(folder, builder=None, settings=SETTINGS)
        await node.start([])
        await node.create_shard(created())
        for op in writes:
            await written(node, oracle, op)
            await seal(node)
        await settled(node)
        await node.close()

    asyncio.run(run())
    return folder / "1" / "0"


def opened(shard: Path, committed: int | None = None) -> ShardState:
    log = Log(shard / "log")
    try:
        return recover(shard, created(), log, 1 << 30, new=False, committed=committed).state
    finally:
        log.close()


def rewritten(shard: Path, **changed: object) -> None:
    """Give its manifest other fields; None: without it."""
    line, _, _ = (shard / "MANIFEST").read_bytes().partition(b"\n")
    fields = {n: v for n, v in (json.loads(line) | changed).items() if v is not None}
    line = json.dumps(fields).encode()
    (shard / "MANIFEST").write_bytes(line + b"\n%08x\n" % google_crc32c.value(line))


@pytest.fixture
def merges_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "choose_merge", lambda stats, pause: ())


@pytest.mark.usefixtures("merges_by_hand")
@pytest.mark.parametrize("format", [1, 2])
def test_what_an_older_shoal_wrote_is_opened(tmp_path: Path, format: int) -> None:
    """A merge that it left has the vectors that the shard was created with."""
    oracle = Oracle()
    shard = in_segments(tmp_path, oracle, [Upsert(floats([1, 2])), Upsert(floats([2, 3]))])
    merge = {"sequence": 4, "inputs": [1, 2], "output": 9, "tombstones": ["tombstones.1", None]}
    old: dict[str, object] = {"format": format, "added": None, "dropped": None, "merges": [merge]}
    rewritten(shard, **(old if format == 2 else old | {"merges": None, "terms": None}))
    state = opened(shard)
    assert columns_of(state.spec) == {"v": 0, "w": 0, "s": 0}
    assert having(state, "v") == [1, 2, 3]
    if format == 1:
        return
    assert state.merges[0].columns == {"v": 0, "w": 0, "s": 0}

    async def run() -> None:
        node = StorageNode(tmp_path, builder=None, settings=SETTINGS)
        await node.start([created()])
        info = await settled(node)
        assert (info.stopped, info.segments) == (None, 1)
        await written(node, oracle, AlterVectors({NEW: vector(2)}))
        await check(node, oracle)
        await node.close()

    asyncio.run(run())
    manifest = read_manifest(shard)
    assert manifest is not None
    assert manifest.format == 3
    assert [record.segment_id for record in manifest.segments] == [9]


@pytest.mark.usefixtures("merges_by_hand")
def test_files_that_are_gone_before_the_log_says_so(tmp_path: Path) -> None:
    """A crash after the files of a dropped vector went: the manifest is of before the drop."""
    oracle = Oracle()
    shard = in_segments(tmp_path, oracle, [Upsert(floats([1, 2])), Upsert(floats([3]))])

    async def drop() -> None:
        node = StorageNode(tmp_path, builder=None, settings=SETTINGS)
        await node.start([created()])
        where = Selector(ids=PointIds.from_keys([2]))
        await written(node, oracle, SetPayload(where, b'{"a":1}'))
        await written(node, oracle, AlterVectors(drop=("v",)))
        await settled(node)
        await node.close()

    asyncio.run(drop())
    assert vector_files(tmp_path) == {"vectors.1"}
    manifest = read_manifest(shard)
    assert manifest is not None
    assert (manifest.checkpoint, manifest.dropped) == (4, ())
    state = opened(shard, committed=5)
    assert state.applied == 5
    assert "v" in state.spec.dense
    assert len(state.snapshot().units) == 3, "point 2 was written anew by the log"
    hits = search(state.snapshot(), Search("v", np.ones(3, np.float32), 9))
    assert hits.points.ids.keys() == [2], "of the others nothing is left to search"
    assert hits.scores.tolist() == [0.0]
    page = scroll(state.snapshot(), Scroll(9, with_vectors=True))
    assert page.dense["v"].values.tolist() == [[0] * 3] * 3
    assert all(segment.vector_count("v") == 0 for segment in state.sealed)
    state = opened(shard)
    assert list(state.spec.dense) == ["w"]
    assert state.applied == 6


@pytest.mark.usefixtures("merges_by_hand")
def test_what_was_added_behind_the_checkpoint_is_known_to_a_merge_before_it(tmp_path: Path) -> None:
    """The output of a merge has the vectors of its entry, and stands in a manifest of before."""
    oracle = Oracle()
    shard = in_segments(tmp_path, oracle, [Upsert(floats([1])), Upsert(floats([2]))])

    async def run() -> None:
        node = StorageNode(tmp_path, builder=None, settings=SETTINGS)
        await node.start([created()])
        await written(node, oracle, AlterVectors({NEW: vector(2)}))
        here = node.find(KEY)
        assert here is not None
        await here._enqueue(Merge((1, 2), here.state.new_segment_id()), 0)
        await settled(node)
        await node.close()

    asyncio.run(run())
    manifest = read_manifest(shard)
    assert manifest is not None
    assert (manifest.checkpoint, dict(manifest.added)) == (4, {})
    (record,) = manifest.segments
    folder = shard / "segments" / str(record.segment_id)
    assert open_array_file(folder / "rows.arr")[1]["since"] == {NEW: 5}
    early, late = opened(shard, committed=4), opened(shard)
    assert NEW not in early.sealed[0].vectors
    assert early.sealed[0].unused_files(early.applied) == []
    assert NEW in late.sealed[0].vectors
    assert late.sealed[0].unused_files(late.applied) == []
    assert having(late, NEW) == []


# -- killed anywhere ------------------------------------------------------------------------------
PLACES = (
    "log.after_write",
    "log.after_trim",
    "seal.before_write",
    "seal.after_segment",
    "manifest.before_rename",
    "manifest.after_rename",
    "merge.after_segment",
    "merge.after_install",
    "drop.after_manifest",
)


async def until_killed(folder: Path, writes: list[Write], told: int) -> None:
    node = StorageNode(folder, builder=None, settings=SETTINGS)
    await node.start([created()])
    for op in writes:
        await node.write(KEY, op)
        os.write(told, b".")
        await asyncio.sleep(0)
    await settled(node)
    await node.close()


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))]
)
@pytest.mark.parametrize("place", PLACES)
def test_killed_anywhere_it_comes_back_with_what_it_told(
    tmp_path: Path, place: str, seed: int
) -> None:
    """By itself at a named place, again and again on one folder. What was not told may have been."""
    print(f"seed {seed}")
    dice, oracle = random.Random(f"{seed}{place}"), Oracle()
    in_segments(tmp_path, oracle, [])
    killed = 0
    for passes in (1, 1, 2, 4, 8):
        ahead, writes = oracle.copy(), []
        for _ in range(60):
            writes.append(some_write(dice, ahead, at_versions=False))
            ahead.apply(writes[-1], 0)
        writes.append(AlterVectors({"v": vector(3)}, ("v", NAMES[dice.randint(1, 3)])))
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            faults._place, faults._passes_left = place, passes
            try:
                asyncio.run(until_killed(tmp_path, writes, write))
            finally:
                os._exit(1)  # it was not passed so often
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            told = len(pipe.read())
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        for op in writes[:told]:
            oracle.apply(op, 0)
        oracle = asyncio.run(came_back(tmp_path, oracle, writes[told : told + 1]))
    assert killed, f"{place} was never passed"


async def came_back(folder: Path, oracle: Oracle, maybe: list[Write]) -> Oracle:
    """What the shard holds now: what was told, and perhaps the one write after."""
    node = StorageNode(folder, builder=None, settings=SETTINGS)
    await node.start([created()])
    try:
        for _ in range(2):  # as it was found, and when the work that was cut off is done
            page = (await node.scroll(KEY, Scroll(1000, with_vectors=True))).value
            found = oracle.copy()
            state = node.find(KEY)
            assert state is not None
            if state.state.spec.dense != oracle.dense or not found.holds(page):
                for op in maybe:
                    found.apply(op, 0)
            assert state.state.spec.dense == found.dense
            assert found.holds(page)
            await settled(node)
        return found
    finally:
        await node.close()
