"""One suite for every implementation of `MetadataStore`, and what the embedded one adds."""

from __future__ import annotations

import asyncio
import random
import signal
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from etcd_server import EtcdCluster

from shoal.errors import (
    BadRequest,
    BodyTooLarge,
    DataDirectoryLocked,
    FormatTooNew,
    StartupError,
    StorageFull,
    Unavailable,
)
from shoal.metadata import embedded
from shoal.metadata.contract import (
    LEASE_TTL_S_MAX,
    TXN_BYTES_MAX,
    TXN_OPERATIONS_MAX,
    Compacted,
    Compare,
    Event,
    KeyValue,
    LeaseLost,
    MetadataStore,
    Uncertain,
)
from shoal.metadata.embedded import EmbeddedStore
from shoal.metadata.etcd import EtcdStore

Test = Callable[[MetadataStore], Awaitable[None]]


@asynccontextmanager
async def embedded_store(path: Path) -> AsyncIterator[MetadataStore]:
    store = await EmbeddedStore.open(path / "metadata.sqlite")
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def etcd_store(etcd: EtcdCluster) -> AsyncIterator[MetadataStore]:
    store = await EtcdStore.open(etcd.endpoints, prefix=f"/shoal/{uuid.uuid4().hex}")
    try:
        yield store
    finally:
        await store.close()


@pytest.fixture(params=["embedded", "etcd"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Test], None]:
    """run(test) calls `test(store)` on a new, empty store."""

    def call(test: Test) -> None:
        async def main() -> None:
            if request.param == "etcd":
                opening = etcd_store(request.getfixturevalue("etcd"))
            else:
                opening = embedded_store(tmp_path)
            async with opening as store:
                await asyncio.wait_for(test(store), 20)

        asyncio.run(main())

    return call


def test_a_put_is_read_back_with_its_revision(run):
    async def test(store):
        assert await store.get("a") is None
        first = await store.txn([], {"a": b"x", "b": b""})
        second = await store.txn([], {"a": b"\x00\xff"})
        assert (first.ok, second.ok) == (True, True)
        assert second.revision > first.revision > 0
        assert await store.get("a") == KeyValue("a", b"\x00\xff", second.revision)
        assert await store.get("b") == KeyValue("b", b"", first.revision)

    run(test)


def test_range_is_ordered_exact_and_tells_the_revision(run):
    async def test(store):
        keys = ["a", "a/1", "a/10", "a/2", "A/1", "a%", "a_", "a/ü", "a/\U0001f600", "b"]
        for key in keys:
            last = await store.txn([], {key: key.encode()})
        found, revision = await store.range("a/")
        wanted = sorted((k for k in keys if k.startswith("a/")), key=str.encode)
        assert [kv.key for kv in found] == wanted
        assert all(kv.value == kv.key.encode() for kv in found)
        assert revision >= last.revision
        everything, _ = await store.range("")
        assert [kv.key for kv in everything] == sorted(keys, key=str.encode)
        nothing, later = await store.range("zzz")
        assert (nothing, later >= revision) == ([], True)

    run(test)


def test_txn_changes_all_or_nothing(run):
    async def test(store):
        made = await store.txn([Compare("a", 0)], {"a": b"1"})
        assert made.ok
        refused = await store.txn([Compare("a", 0), Compare("b", 0)], {"a": b"2", "b": b"2"}, ["c"])
        assert not refused.ok
        assert refused.revision >= made.revision
        assert (await store.get("a")).value == b"1"
        assert await store.get("b") is None
        moved = await store.txn([Compare("a", made.revision), Compare("b", 0)], {"b": b"3"}, ["a"])
        assert moved.ok
        assert await store.get("a") is None
        again = await store.txn([Compare("a", made.revision)], {"c": b""})
        assert not again.ok
        assert (await store.txn([Compare("a", 0)], {"a": b"4"})).ok

    run(test)


def test_what_changes_nothing_is_no_event(run):
    async def test(store):
        made = await store.txn([], {"a": b"1"})
        for nothing in (
            await store.txn([], {}, ["absent"]),
            await store.txn([Compare("a", made.revision)], {}),
        ):
            assert nothing.ok
            assert nothing.revision >= made.revision
        put_again = await store.txn([], {"a": b"1"})
        assert put_again.revision > made.revision  # a put is a change, whatever its value
        events = await take(store.watch("", 0), 2)
        assert [event.revision for event in events] == [made.revision, put_again.revision]

    run(test)


def test_range_of_many_keys_is_one_moment(run):
    async def test(store):
        keys = [f"{number:04}" for number in range(1_100)]
        for start in range(0, len(keys), 100):
            await store.txn([], dict.fromkeys(keys[start : start + 100], b"0"))
        going = True

        async def change() -> None:
            number = 0
            while going:
                number += 1
                # The first and the last key always agree.
                await store.txn([], dict.fromkeys((keys[0], keys[-1]), str(number).encode()))

        changing = asyncio.ensure_future(change())
        for _ in range(5):
            found, revision = await store.range("")
            assert [kv.key for kv in found] == keys
            assert found[0].value == found[-1].value
            assert max(kv.revision for kv in found) <= revision
        going = False
        await changing

    run(test)


def test_bounds(run):
    async def test(store):
        many = {f"k{i}": b"" for i in range(TXN_OPERATIONS_MAX)}
        assert (await store.txn([], many)).ok
        with pytest.raises(BadRequest, match="121 operations"):
            await store.txn([Compare("x", 0)], many)
        with pytest.raises(BodyTooLarge):
            await store.txn([], {"a": bytes(TXN_BYTES_MAX)})
        with pytest.raises(BadRequest, match="twice"):
            await store.txn([], {"a": b""}, ["a"])
        with pytest.raises(BadRequest, match="twice"):
            await store.txn([Compare("a", 0), Compare("a", 1)], {})
        with pytest.raises(BadRequest, match="empty"):
            await store.txn([], {"": b""})

    run(test)


def test_compare_and_swap_never_loses_an_increment(run):
    async def test(store):
        await store.txn([], {"n": b"0"})
        refused = 0

        async def add(times: int) -> None:
            nonlocal refused
            while times:
                now = await store.get("n")
                value = str(int(now.value) + 1).encode()
                result = await store.txn([Compare("n", now.revision)], {"n": value})
                times -= result.ok
                refused += not result.ok

        await asyncio.gather(*(add(10) for _ in range(5)))
        assert (await store.get("n")).value == b"50"
        assert refused > 0  # else this test saw no contention and shows nothing

    run(test)


async def take(watch: AsyncIterator[list[Event]], count: int) -> list[Event]:
    events: list[Event] = []
    while len(events) < count:
        batch = await anext(watch)
        assert batch
        assert not events or batch[0].revision > events[-1].revision
        events += batch
    return events


def test_watch_gives_every_later_change_in_order(run):
    async def test(store):
        await store.txn([], {"p/a": b"old"})
        first = await store.txn([], {"p/b": b"1"})
        _, revision = await store.range("p/")
        second = await store.txn([], {"p/a": b"2", "q": b"other", "p/c": b"2"})
        await store.txn([], {"q": b"other"})
        third = await store.txn([], {}, ["p/b", "p/absent"])
        watch = store.watch("p/", revision)
        events = await take(watch, 3)
        assert sorted(events[:2], key=lambda e: e.key) == [
            Event("p/a", b"2", second.revision),
            Event("p/c", b"2", second.revision),
        ]
        assert events[2] == Event("p/b", None, third.revision)
        waiting = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0)
        assert not waiting.done()
        fourth = await store.txn([], {"p/d": b"4"})
        assert await waiting == [Event("p/d", b"4", fourth.revision)]
        earlier = store.watch("p/b", first.revision - 1)
        assert [e.value for e in await take(earlier, 2)] == [b"1", None]

    run(test)


def test_watchers_agree_with_a_model_under_random_changes(run):
    seed = random.randrange(2**32)
    print(f"seed {seed}")

    async def test(store):
        dice = random.Random(seed)
        model: dict[str, bytes] = {}
        seen: dict[str, bytes] = {}
        last = 0

        async def follow() -> None:
            nonlocal last
            async for batch in store.watch("", 0):
                for event in batch:
                    assert event.revision >= last
                    last = event.revision
                    if event.value is None:
                        del seen[event.key]
                    else:
                        seen[event.key] = event.value
                if "end" in seen:
                    return

        follower = asyncio.ensure_future(follow())
        for _ in range(100):
            keys = dice.sample("abcdefgh", 4)
            puts = {key: dice.randbytes(3) for key in keys[: dice.randrange(3)]}
            deletes = keys[2 : 2 + dice.randrange(3)]
            await store.txn([], puts, deletes)
            model |= puts
            for key in deletes:
                model.pop(key, None)
        await store.txn([], {"end": b""})
        await follower
        assert seen == model | {"end": b""}
        found, revision = await store.range("")
        assert {kv.key: kv.value for kv in found} == seen
        assert revision >= last

    run(test)


def test_a_lease_that_nobody_keeps_takes_its_keys_along(run):
    async def test(store):
        lease = await store.lease_grant(1)
        assert lease.ttl_s >= 1
        kept = await store.lease_grant(1)
        keeper = store.lease_keep(kept)
        await store.txn([], {"kept": b""}, lease=kept.id)
        await store.txn([], {"moved": b"", "freed": b"", "gone": b"", "too": b""}, lease=lease.id)
        await store.txn([], {"moved": b""}, lease=kept.id)
        last = await store.txn([], {"freed": b""})
        found = await take(store.watch("", last.revision), 2)
        assert [(e.key, e.value) for e in found] == [("gone", None), ("too", None)]
        assert found[0].revision == found[1].revision > last.revision
        assert [kv.key for kv in (await store.range(""))[0]] == ["freed", "kept", "moved"]
        assert not (await store.txn([Compare("gone", last.revision)], {})).ok
        with pytest.raises(LeaseLost):
            await store.txn([], {"b": b""}, lease=lease.id)
        assert await store.get("b") is None
        with pytest.raises(LeaseLost):
            await store.lease_keep_alive(lease.id)
        await store.lease_revoke(lease.id)
        assert keeper.silent_for_s() < kept.ttl_s
        await keeper.close()

    run(test)


def test_keep_alive_keeps_and_revoke_ends_at_once(run):
    async def test(store):
        first, second = await store.lease_grant(30), await store.lease_grant(30)
        assert first.id != second.id
        made = await store.txn([], {"a": b"", "c": b""}, lease=first.id)
        await store.txn([], {"b": b""}, lease=second.id)
        assert 29 < await store.lease_keep_alive(first.id) <= first.ttl_s
        keeper = store.lease_keep(first)
        await store.lease_revoke(first.id)
        events = await take(store.watch("", made.revision), 3)
        assert [(e.key, e.value) for e in events] == [("b", b""), ("a", None), ("c", None)]
        await asyncio.wait_for(keeper.lost(), 8)
        await keeper.close()
        assert [kv.key for kv in (await store.range(""))[0]] == ["b"]

    run(test)


@pytest.mark.parametrize("ttl_s", [0, -1, float("nan"), LEASE_TTL_S_MAX + 1])
def test_a_lease_has_bounds(run, ttl_s):
    async def test(store):
        with pytest.raises(BadRequest, match="a lease of"):
            await store.lease_grant(ttl_s)

    run(test)


def test_close_ends_watches_and_refuses_the_rest(run):
    async def test(store):
        watch = store.watch("", 0)
        waiting = asyncio.ensure_future(anext(watch, None))
        await asyncio.sleep(0)
        await store.close()
        assert await waiting is None
        with pytest.raises(Unavailable, match="closed"):
            await store.get("a")
        with pytest.raises(Unavailable, match="closed"):
            await store.txn([], {"a": b""})
        await store.close()

    run(test)


# -- what only the embedded store promises --------------------------------------------------------


def test_embedded_keeps_everything_over_a_restart(tmp_path):
    async def main() -> None:
        async with embedded_store(tmp_path) as store:
            await store.txn([], {"a": b"1", "b": b"2"})
            last = await store.txn([], {}, ["b"])
        async with embedded_store(tmp_path) as store:
            found, revision = await store.range("")
            assert (revision, [kv.key for kv in found]) == (last.revision, ["a"])
            watch = store.watch("", revision)
            changed = await store.txn([], {"c": b""})
            assert await anext(watch) == [Event("c", b"", changed.revision)]
            with pytest.raises(Compacted, match="Read anew"):
                await anext(store.watch("", revision - 1))

    asyncio.run(main())


def test_embedded_lease_has_its_full_ttl_after_a_restart(tmp_path):
    async def main() -> None:
        async with embedded_store(tmp_path) as store:
            lease = await store.lease_grant(0.5)
            await store.txn([], {"a": b""}, lease=lease.id)
        async with embedded_store(tmp_path) as store:
            assert await store.lease_keep_alive(lease.id) == 0.5
            _, revision = await store.range("")
            assert await anext(store.watch("", revision)) == [Event("a", None, revision + 1)]
            assert (await store.lease_grant(9)).id != lease.id
        async with embedded_store(tmp_path) as store:
            with pytest.raises(LeaseLost):
                await store.lease_keep_alive(lease.id)

    asyncio.run(main())


def test_embedded_lease_outlives_a_stall_of_the_loop(tmp_path):
    async def main() -> None:
        async with embedded_store(tmp_path) as store:
            lease = await store.lease_grant(0.6)
            asyncio.get_running_loop().call_soon(subprocess.run, ["sleep", "1"])
            await asyncio.sleep(1.5 * embedded.LEASE_TICK_S)  # the stall, and one more tick
            assert await store.lease_keep_alive(lease.id) == 0.6

    asyncio.run(main())


def test_embedded_file_of_the_first_format_is_taken_over(tmp_path):
    path = tmp_path / "metadata.sqlite"
    with sqlite3.connect(path) as db:
        for statement in embedded._SCHEMA.strip().split(";\n"):
            db.execute(statement)
        db.execute("INSERT INTO kv VALUES ('a', 'x', 1)")
        db.execute("UPDATE counter SET revision = 1")
        db.execute(f"PRAGMA application_id = {embedded.APPLICATION_ID}")
        db.execute("PRAGMA user_version = 1")
    db.close()

    async def main() -> None:
        for revision in (2, 3):
            async with embedded_store(tmp_path) as store:
                assert await store.get("a") == KeyValue("a", "x", 1)
                lease = await store.lease_grant(9)
                assert (await store.txn([], {"b": b""}, lease=lease.id)).revision == revision

    asyncio.run(main())


def test_embedded_slow_watcher_is_told_that_it_lost_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "HISTORY_REVISIONS_MAX", 3)

    async def main() -> None:
        async with embedded_store(tmp_path) as store:
            slow = store.watch("", 0)
            await store.txn([], {"a": b"0"})
            assert len(await anext(slow)) == 1
            for _ in range(3):
                last = await store.txn([], {"a": b"1"})
            assert len(await anext(slow)) == 3
            for _ in range(4):
                last = await store.txn([], {"a": b"2"})
            with pytest.raises(Compacted):
                await anext(slow)
            fresh = store.watch("", last.revision - 3)
            assert len(await anext(fresh)) == 3

    asyncio.run(main())


def test_embedded_change_of_a_cancelled_caller_is_not_half_done(tmp_path):
    async def main() -> None:
        async with embedded_store(tmp_path) as store:
            task = asyncio.ensure_future(store.txn([], {"a": b"1", "b": b"1"}))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            found, revision = await store.range("")
            assert len(found) in (0, 2)
            if found:
                assert len(await anext(store.watch("", 0))) == 2
            assert revision == (1 if found else 0)

    asyncio.run(main())


def test_embedded_second_opener_is_refused(tmp_path):
    async def main() -> None:
        async with embedded_store(tmp_path):
            with pytest.raises(DataDirectoryLocked):
                await EmbeddedStore.open(tmp_path / "metadata.sqlite")
        async with embedded_store(tmp_path) as store:
            assert await store.get("a") is None

    asyncio.run(main())


def test_embedded_full_disk_changes_nothing_and_is_survived(tmp_path):
    async def main() -> None:
        async with AsyncExitStack() as stack:
            store = await stack.enter_async_context(embedded_store(tmp_path))
            made = await store.txn([], {"a": b"1"})
            db = store._db
            pages = db.execute("PRAGMA page_count").fetchone()[0]
            db.execute(f"PRAGMA max_page_count = {pages}")
            with pytest.raises(StorageFull, match="not made"):
                await store.txn([], {"a": bytes(100_000)})
            assert await store.get("a") == KeyValue("a", b"1", made.revision)
            db.execute("PRAGMA max_page_count = 100000")
            assert (await store.txn([Compare("a", made.revision)], {"a": b"2"})).ok

    asyncio.run(main())


_WRITE_FAILS = """
import asyncio, resource, signal, sys
from pathlib import Path
from shoal.errors import Unavailable
from shoal.metadata.contract import Uncertain
from shoal.metadata.embedded import EmbeddedStore

async def main():
    store = await EmbeddedStore.open(Path(sys.argv[1]))
    await store.txn([], {"a": b"1"})
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # writes now fail with EFBIG
    for error in (Uncertain, Unavailable):
        try:
            await store.txn([], {"a": bytes(50_000)})
        except error as found:
            assert "start Shoal again" in found.message
        else:
            raise SystemExit(f"no {error}")

asyncio.run(main())
"""


def test_embedded_stops_after_a_disk_error(tmp_path):
    path = tmp_path / "metadata.sqlite"
    subprocess.run([sys.executable, "-c", _WRITE_FAILS, path], check=True, timeout=30)

    async def main() -> None:
        async with embedded_store(tmp_path) as store:
            assert (await store.get("a")).value == b"1"

    assert issubclass(Uncertain, Exception)
    assert Uncertain.maybe_applied
    asyncio.run(main())


_WRITER = """
import asyncio, sys
from pathlib import Path
from shoal.metadata.embedded import EmbeddedStore

async def main():
    store = await EmbeddedStore.open(Path(sys.argv[1]))
    number = 0
    while True:
        number += 1
        key = str(number).encode()
        await store.txn([], {"last": key, f"n/{number % 7}": key})
        sys.stdout.write(f"{number}\\n")
        sys.stdout.flush()

asyncio.run(main())
"""


def test_embedded_loses_no_acknowledged_write_to_kill_9(tmp_path):
    path = tmp_path / "metadata.sqlite"
    dice = random.Random(7)
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", _WRITER, path], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            acknowledged = 0
            for _ in range(dice.randrange(5, 60)):
                acknowledged = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
            rest = writer.stdout.read().splitlines(keepends=True)
            acknowledged = int(next((x for x in reversed(rest) if x.endswith("\n")), acknowledged))

        async def main(acknowledged: int) -> None:
            async with embedded_store(tmp_path) as store:
                last = int((await store.get("last")).value)
                assert last in (acknowledged, acknowledged + 1)
                assert (await store.get(f"n/{last % 7}")).value == str(last).encode()

        asyncio.run(main(acknowledged))


def test_embedded_syncs_every_commit(tmp_path):
    async def main() -> None:
        async with embedded_store(tmp_path) as store:
            assert store._db.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL
            assert store._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"

    asyncio.run(main())


def test_embedded_refuses_a_newer_format(tmp_path):
    path = tmp_path / "metadata.sqlite"

    async def main() -> None:
        async with embedded_store(tmp_path):
            pass
        with sqlite3.connect(path) as db:
            db.execute("PRAGMA user_version = 3")
        db.close()
        before = path.read_bytes()
        with pytest.raises(FormatTooNew, match="format 3"):
            await EmbeddedStore.open(path)
        assert path.read_bytes() == before

    asyncio.run(main())


@pytest.mark.parametrize("damage", ["not sqlite", "other database", "torn page", "folder"])
def test_embedded_says_what_is_wrong_with_its_file(tmp_path, damage):
    path = tmp_path / "metadata.sqlite"

    async def fill() -> None:
        async with embedded_store(tmp_path) as store:
            await store.txn([], {f"k{i}": bytes(5000) for i in range(100)})

    if damage == "not sqlite":
        path.write_bytes(b"hello" * 1000)
    elif damage == "other database":
        db = sqlite3.connect(path)
        db.execute("CREATE TABLE t (x)")
        db.close()
    elif damage == "torn page":
        asyncio.run(fill())
        content = bytearray(path.read_bytes())
        content[4096 * 2 : 4096 * 20] = bytes(4096 * 18)
        path.write_bytes(content)
    else:
        path.mkdir()

    before = path.read_bytes() if path.is_file() else b""

    async def main() -> None:
        with pytest.raises(StartupError, match=r"metadata\.sqlite"):
            await EmbeddedStore.open(path)

    asyncio.run(main())
    assert (path.read_bytes() if path.is_file() else b"") == before
