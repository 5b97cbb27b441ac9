"""Watched and Session over the embedded store: what they do when the store fails them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from shoal.errors import Unavailable
from shoal.metadata import embedded
from shoal.metadata.contract import Compare, Event, KeyValue, StoreWentBack
from shoal.metadata.embedded import EmbeddedStore
from shoal.metadata.schema import NodeRecord, NodeRole
from shoal.metadata.session import Session
from shoal.metadata.watched import Watched


@pytest.fixture
def run(tmp_path: Path) -> Callable[[Callable[[EmbeddedStore], Awaitable[None]]], None]:
    def call(test: Callable[[EmbeddedStore], Awaitable[None]]) -> None:
        async def main() -> None:
            store = await EmbeddedStore.open(tmp_path / "metadata.sqlite")
            try:
                await asyncio.wait_for(test(store), 10)
            finally:
                await store.close()

        asyncio.run(main())

    return call


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110, the conditions are of many kinds
        await asyncio.sleep(0.005)


# -- Watched ---------------------------------------------------------------------------------------


def test_watched_has_what_is_there_and_then_every_change(run):
    async def test(store):
        first = await store.txn([], {"a/1": b"1", "b/1": b"1", "ab": b"", "z": b""})
        seen: list[list[Event]] = []
        watched = Watched(store, ["a/", "b/"], on_change=lambda e: seen.append(list(e)))
        await watched.start()
        assert set(watched.entries) == {"a/1", "b/1"}
        assert watched.entries["a/1"] == KeyValue("a/1", b"1", first.revision)
        both = await store.txn([], {"a/2": b"2", "b/2": b"2", "ab": b"x"}, ["a/1"])
        await until(lambda: watched.revision == both.revision)
        assert set(watched.entries) == {"a/2", "b/1", "b/2"}
        assert [[(e.key, e.value) for e in batch] for batch in seen] == [
            [("a/1", b"1"), ("b/1", b"1")],
            [("a/2", b"2"), ("b/2", b"2"), ("a/1", None)],
        ]
        await watched.close()
        await watched.close()

    run(test)


def test_watched_that_fell_behind_reports_the_difference(run, monkeypatch):
    monkeypatch.setattr(embedded, "HISTORY_REVISIONS_MAX", 2)

    async def test(store):
        await store.txn([], {"a": b"1", "b": b"1", "c": b"1"})
        seen: list[tuple[str, bytes | None]] = []
        watched = Watched(
            store, [""], on_change=lambda events: seen.extend((e.key, e.value) for e in events)
        )
        await watched.start()
        seen.clear()
        await asyncio.sleep(0)  # the watch is under way
        # All of this happens before the follower runs again: its place in the history is gone.
        for change in ({"a": b"2"}, {"d": b"2"}, {"a": b"3"}):
            await store.txn([], change, ["b"] if "d" in change else [])
            store._history_after = (await store.range(""))[1]
            store._history.clear()
        last = await store.txn([], {"e": b"5"})
        await until(lambda: watched.revision == last.revision)
        assert {k: kv.value for k, kv in watched.entries.items()} == {
            "a": b"3",
            "c": b"1",
            "d": b"2",
            "e": b"5",
        }
        model = {"a": b"1", "b": b"1", "c": b"1"}
        for key, value in seen:
            model[key] = value
        assert model.pop("b") is None
        assert model == {k: kv.value for k, kv in watched.entries.items()}
        await watched.close()

    run(test)


class Flaky:
    """The store, but `refuse` fails every call, and `deaf` lets the watch miss keys."""

    def __init__(self, store: EmbeddedStore) -> None:
        self._store = store
        self.refuse = False
        self.deaf: set[str] = set()

    def __getattr__(self, name: str):
        return getattr(self._store, name)

    async def range(self, prefix: str):
        if self.refuse:
            raise Unavailable("no answer")
        return await self._store.range(prefix)

    async def watch(self, prefix: str, revision: int):
        if self.refuse:
            raise Unavailable("no answer")
        async for events in self._store.watch(prefix, revision):
            if self.refuse:
                raise Unavailable("the connection broke")
            if heard := [event for event in events if event.key not in self.deaf]:
                yield heard


def test_watched_comes_back_after_an_outage(run):
    async def test(store):
        flaky = Flaky(store)
        watched = Watched(flaky, ["a"])
        flaky.refuse = True
        with pytest.raises(Unavailable):
            await watched.start()
        flaky.refuse = False
        await watched.start()
        flaky.refuse = True
        await store.txn([], {"a1": b""})
        await until(lambda: watched.failing is not None)
        assert not watched.entries
        flaky.refuse = False
        await until(lambda: "a1" in watched.entries and watched.failing is None)
        await watched.close()

    run(test)


def test_watched_finds_and_counts_what_the_watch_lost(run):
    async def test(store):
        flaky = Flaky(store)
        flaky.deaf = {"a1", "a2"}
        await store.txn([], {"a1": b""})
        watched = Watched(flaky, ["a"], recheck_s=0.2)
        await watched.start()
        await store.txn([], {"a2": b"lost"}, ["a1"])
        last = await store.txn([], {"a3": b"heard"})
        await until(lambda: watched.revision == last.revision and "a3" in watched.entries)
        await until(lambda: set(watched.entries) == {"a2", "a3"})
        assert watched.missed == 1
        await watched.close()

    run(test)


class Restored(Flaky):
    """The store, until `restore`: then another one, which has what a backup had."""

    def __init__(self, store: EmbeddedStore) -> None:
        super().__init__(store)
        self.found: list[StoreWentBack] = []
        self.on_went_back = self.found.append
        self.changes: tuple[dict[str, bytes], ...] | None = None  # of revisions 1, 2, ...

    async def remembers(self, known: KeyValue) -> bool:
        if self.changes is None:
            return True
        return self.changes[known.revision - 1].get(known.key) == known.value

    async def restore(self, *changes: dict[str, bytes]) -> None:
        self.refuse = True
        self.changes = changes
        await self._store.txn([], {"breaks the watch": b""})
        self._store = await EmbeddedStore.open(self._store._path.with_name("restored.sqlite"))
        for change in changes:
            await self._store.txn([], change)
        self.refuse = False


@pytest.mark.parametrize(
    "backup",
    [
        [],  # wiped
        [{"a1": b"1"}],
        [{"a1": b"1"}, *({"b": b""} for _ in range(9))],  # and has overtaken what we knew
        [*({"b": b""} for _ in range(3)), {"a1": b"other"}],
        [{"a1": b"1"}, {"a2": b"2"}, {"a1": b"3"}, {"b": b""}, {"a1": b"later"}],
    ],
)
def test_watched_does_not_follow_a_store_that_went_back(run, backup):
    """Above all it reports no deletions: those would be believed, and data deleted."""

    async def test(store):
        restored = Restored(store)
        told: list[str] = []
        watched = Watched(
            restored, ["a"], on_change=lambda events: told.extend(e.key for e in events)
        )
        for change in ({"a1": b"1"}, {"a2": b"2"}, {"a1": b"3"}, {"a1": b"4"}):
            await store.txn([], change)
        await watched.start()
        told.clear()
        before = dict(watched.entries)
        await restored.restore(*backup)
        await until(lambda: restored.found)
        assert "restored from a backup" in restored.found[0].message
        assert watched.failing is restored.found[0]
        assert told == []
        assert dict(watched.entries) == before
        await watched.close()
        fresh = Watched(restored, ["a"])
        await fresh.start()
        assert fresh.failing is None
        await fresh.close()
        await restored._store.close()

    run(test)


def test_session_does_not_take_its_own_past_for_somebody_else(run):
    """The backup holds the record of the process before this one."""

    async def test(store):
        restored = Restored(store)
        await store.txn([], {"x": b""})
        session = Session(restored, record("i2"), ttl_s=30)
        await session.start()
        await restored.restore({record("i1").key: record("i1").to_bytes()})
        session._changed.set()
        await until(lambda: restored.found)
        assert not session.replaced
        await session.close()
        await restored._store.close()

    run(test)


def test_watched_survives_a_callback_that_raises(run):
    async def test(store):
        def fail(events: object) -> None:
            raise ValueError("a bug of the caller's")

        watched = Watched(store, [""], on_change=fail)
        await watched.start()
        for key in "ab":
            await store.txn([], {key: b""})
        await until(lambda: set(watched.entries) == {"a", "b"})
        await watched.close()

    run(test)


# -- Session ---------------------------------------------------------------------------------------


def record(incarnation: str = "i1", **more: object) -> NodeRecord:
    return NodeRecord(id="s1", role=NodeRole.STORAGE, incarnation=incarnation, **more)


async def registered(store: EmbeddedStore) -> NodeRecord | None:
    found = await store.get("nodes/s1")
    return NodeRecord.from_bytes("nodes/s1", found.value) if found is not None else None


def test_session_registers_and_its_end_is_seen_at_once(run):
    async def test(store):
        session = Session(store, record(), ttl_s=5)
        await session.start()
        assert await registered(store) == record()
        assert session.lease is not None
        assert session.lost_for_s() < 1
        assert 4 < session.healthy_for_s() <= 5
        await session.update(record(draining=True))
        assert await registered(store) == record(draining=True)
        await session.close()
        assert await registered(store) is None
        assert session.lease is None
        assert session.healthy_for_s() == 0
        await session.close()

    run(test)


@pytest.mark.parametrize("how", ["lease revoked", "record deleted"])
def test_session_registers_again_at_once(run, how):
    async def test(store):
        session = Session(store, record(), ttl_s=30)
        await session.start()
        first = session.lease
        if how == "lease revoked":
            await store.lease_revoke(first)
        else:
            await store.txn([], {}, ["nodes/s1"])
        await until(lambda: session.lease not in (None, first))
        assert await registered(store) == record()
        await session.close()
        assert await registered(store) is None

    run(test)


def test_session_survives_that_the_old_life_of_the_process_ends(run):
    async def test(store):
        await store.txn([], {"nodes/s10": b"somebody else"})
        old = await store.lease_grant(0.3)
        await store.txn([], {"nodes/s1": record("i0").to_bytes()}, lease=old.id)
        session = Session(store, record(), ttl_s=0.6)
        await session.start()
        lease = session.lease
        watch = store.watch("gone", (await store.range(""))[1])
        await store.txn([], {"gone": b""}, lease=old.id)
        await anext(watch)
        assert (await anext(watch))[0].value is None  # the old lease has ended
        assert (await registered(store), session.lease) == (record(), lease)
        await session.close()

    run(test)


def test_session_that_was_replaced_gives_up(run):
    async def test(store):
        stopped: list[bool] = []
        session = Session(store, record(), ttl_s=30, on_replaced=lambda: stopped.append(True))
        await session.start()
        other = Session(store, record("i2"), ttl_s=30)
        await other.start()
        await until(lambda: stopped == [True])
        assert session.replaced
        assert session.lease is None
        assert await registered(store) == record("i2")
        with pytest.raises(Unavailable):
            await session.update(record(draining=True))
        await session.close()
        assert await registered(store) == record("i2")
        assert not other.replaced
        await other.close()

    run(test)


def test_session_tries_until_the_store_answers_again(run):
    async def test(store):
        class Refusing(Flaky):
            async def lease_grant(self, ttl_s: float):
                if self.refuse:
                    raise Unavailable("no answer")
                return await self._store.lease_grant(ttl_s)

        flaky = Refusing(store)
        flaky.refuse = True
        session = Session(flaky, record(), ttl_s=30)
        with pytest.raises(Unavailable):
            await session.start()
        flaky.refuse = False
        await session.start()
        flaky.refuse = True
        await store.lease_revoke(session.lease)
        await until(lambda: session.lease is None)
        before = session.lost_for_s()
        assert session.healthy_for_s() == 0
        with pytest.raises(Unavailable, match="not registered"):
            await session.update(record(draining=True))
        await until(lambda: session.lost_for_s() > before)
        flaky.refuse = False
        await until(lambda: session.lease is not None)
        assert await registered(store) == record(draining=True)
        assert not (await store.txn([Compare("nodes/s1", 0)], {})).ok
        await session.close()

    run(test)
