"""What etcd adds to the contract: members that die and freeze, answers that get lost, access.

The first part needs one member and little time. What is marked `cluster` breaks members of a cluster
of three, or waits for leases to end; the whole file takes about a minute.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import subprocess
import uuid
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from etcd_server import EtcdCluster

from shoal.errors import SettingsError, StartupError, Unavailable
from shoal.metadata.contract import (
    Compacted,
    Compare,
    Event,
    KeyValue,
    LeaseLost,
    StoreRefused,
    StoreWentBack,
    TxnResult,
    Uncertain,
)
from shoal.metadata.etcd import EtcdStore, EtcdTls
from shoal.metadata.etcd_members import NoAnswer, refuse_version
from shoal.metadata.schema import NodeRecord, NodeRole
from shoal.metadata.session import Session
from shoal.metadata.watched import Watched


@asynccontextmanager
async def opened(etcd: EtcdCluster, **access: Any) -> AsyncIterator[EtcdStore]:
    access.setdefault("prefix", f"/shoal/{uuid.uuid4().hex}")
    store = await EtcdStore.open(etcd.endpoints, **access)
    try:
        yield store
    finally:
        await store.close()


def run(main: Callable[[], Awaitable[None]], within_s: float = 30) -> None:
    async def timed() -> None:
        await asyncio.wait_for(main(), within_s)

    asyncio.run(timed())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110, the conditions are of many kinds
        await asyncio.sleep(0.01)


async def increment(store: EtcdStore, key: str) -> bool:
    """One compare-and-swap of a counter. False: somebody else was faster."""
    now = await store.get(key)
    value = str(int(now.value) + 1 if now is not None else 1).encode()
    result = await store.txn([Compare(key, now.revision if now is not None else 0)], {key: value})
    return result.ok


# -- transactions whose answer is lost -------------------------------------------------------------


class Lossy:
    """Between a store and its members: the next transaction (not the settling of one) is lost.

    "before"   it never arrives. "after": it happens, but nobody hears. Requests are kept in `lost`.
    """

    def __init__(self, store: EtcdStore) -> None:
        self.members = store._members
        self.attempt = self.members.attempt
        self.members.attempt = self.pass_on  # type: ignore[method-assign]
        self.plan: list[str] = []
        self.lost: list[Any] = []
        self.settle_fails = False

    async def pass_on(self, method: Any, request: Any) -> Any:
        settling = bool(getattr(request, "failure", ()))
        if settling and self.settle_fails:
            raise NoAnswer("lost", maybe=True)
        if method.path.endswith("Txn") and not settling and self.plan:
            how = self.plan.pop(0)
            self.lost.append((method, request))
            if how == "after":
                await self.attempt(method, request)
            raise NoAnswer("lost", maybe=True)
        return await self.attempt(method, request)


def test_a_change_that_never_arrived_is_made_once_even_if_it_arrives_later(etcd):
    async def main() -> None:
        async with opened(etcd) as store:
            lossy = Lossy(store)
            lossy.plan = ["before", "before"]
            made = await store.txn([Compare("a", 0)], {"a": b"1"})
            assert made.ok
            assert await store.get("a") == KeyValue("a", b"1", made.revision)
            await store.txn([], {}, ["a"])  # now its own compare would hold again
            for method, request in lossy.lost:
                assert not (await lossy.attempt(method, request)).succeeded
            assert await store.get("a") is None

    run(main)


def test_a_change_whose_answer_was_lost_is_found_to_have_happened(etcd):
    async def main() -> None:
        async with opened(etcd) as store:
            lossy = Lossy(store)
            lossy.plan = ["after"]
            made = await store.txn([Compare("a", 0)], {"a": b"1"})
            assert made == TxnResult(True, (await store.get("a")).revision)
            lossy.plan = ["after"]
            refused = await store.txn([Compare("a", 0)], {"a": b"2"})
            assert not refused.ok
            assert [e.value for e in await anext(store.watch("", 0))] == [b"1"]

    run(main)


def test_uncertain_is_raised_only_when_nobody_can_tell(etcd, monkeypatch):
    monkeypatch.setattr("shoal.metadata.etcd_members.CALL_S", 0.3)

    async def main() -> None:
        async with opened(etcd) as store:
            lossy = Lossy(store)
            await store.txn([], {"a": b"0"})

            lease = store._op_lease
            lossy.plan = ["after"]
            real = lossy.attempt

            async def revoke_first(method: Any, request: Any) -> Any:
                answer = await real(method, request)
                await store.lease_revoke(lease)
                return answer

            lossy.attempt = revoke_first  # the marker's lease goes, as etcd may do after a freeze
            with pytest.raises(Uncertain, match="may have been made"):
                await store.txn([], {"a": b"1"})
            lossy.attempt = real
            assert (await store.get("a")).value == b"1"
            assert (await store.txn([], {"a": b"2"})).ok  # with the next lease

            lossy.plan, lossy.settle_fails = ["before"], True
            store._members.call = _impatient(store._members.call)
            with pytest.raises(Uncertain, match="asking for it failed"):
                await store.txn([], {"a": b"3"})

    run(main)


def _impatient(call: Any) -> Any:
    async def short(method: Any, request: Any, budget_s: float = 0.3) -> Any:
        return await call(method, request, budget_s)

    return short


def test_a_lost_lease_is_told_from_a_lost_marker_lease(etcd):
    async def main() -> None:
        async with opened(etcd) as store:
            lease = await store.lease_grant(60)
            await store.txn([], {"a": b""}, lease=lease.id)
            await store.lease_revoke(store._op_lease)
            assert (await store.txn([], {"a": b"1"}, lease=lease.id)).ok
            assert (await store.txn([], {"b": b"1"})).ok
            await store.lease_revoke(lease.id)
            await store.lease_revoke(store._op_lease)
            with pytest.raises(LeaseLost):
                await store.txn([], {"a": b"2"}, lease=lease.id)
            assert [kv.key for kv in (await store.range(""))[0]] == ["b"]

    run(main)


def test_counter_is_exact_under_lost_requests_and_answers(etcd):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)

    async def main() -> None:
        async with opened(etcd) as store:
            lossy = Lossy(store)
            wanted, seen = 0, []

            async def follow() -> None:
                async for events in store.watch("n", 0):
                    seen.extend(int(e.value) for e in events)
                    if len(seen) >= 60:
                        return

            following = asyncio.ensure_future(follow())

            async def work() -> None:
                nonlocal wanted
                while wanted < 60:
                    if dice.random() < 0.3:
                        lossy.plan.append(dice.choice(["before", "after"]))
                    done = await increment(store, "n")
                    wanted += done  # not in one line: += would read it before the wait

            await asyncio.gather(work(), work(), work())
            await following
            assert int((await store.get("n")).value) == wanted
            assert seen == list(range(1, len(seen) + 1))

    run(main)


# -- reading and watching --------------------------------------------------------------------------


def test_deployments_do_not_see_each_other(etcd):
    async def main() -> None:
        async with opened(etcd, prefix="/d/one") as one, opened(etcd, prefix="/d/one2/") as two:
            made = await one.txn([], {"a": b"1"})
            await two.txn([], {"a": b"2"})
            assert [kv.value for kv in (await one.range(""))[0]] == [b"1"]
            assert await anext(one.watch("", 0)) == [Event("a", b"1", made.revision)]

    run(main)


def test_a_large_transaction_comes_in_one_piece(etcd):
    async def main() -> None:
        async with opened(etcd) as store:
            watch = store.watch("", 0)
            first = asyncio.ensure_future(anext(watch))
            puts = {f"k{n:02}": bytes(10_000) for n in range(100)}
            for _ in range(5):  # more than one message of 1.5 MB, for a watcher that comes late
                made = await store.txn([], puts)
            assert len(await first) % 100 == 0
            events = [e async for e in _until_revision(store.watch("", 0), made.revision)]
            assert len(events) == 500
            await watch.aclose()

    run(main)


async def _until_revision(watch: Any, revision: int) -> AsyncIterator[Event]:
    async for events in watch:
        assert len(events) % 100 == 0  # never half a revision
        for event in events:
            yield event
        if events[-1].revision >= revision:
            return


def test_compaction_during_a_watch_is_an_ordinary_thing(tmp_path):
    async def main() -> None:
        async with opened(etcd) as store:
            await store.txn([], {"a": b"1", "b": b"1"})
            changes: list[tuple[str, bytes | None]] = []
            watched = Watched(
                store, [""], on_change=lambda es: changes.extend((e.key, e.value) for e in es)
            )
            await watched.start()
            behind = store.watch("", 0)
            await anext(behind)
            for number in range(5):
                last = await store.txn([], {"a": str(number).encode()}, ["b"])
            await asyncio.to_thread(etcd.ask, "kv/compaction", {"revision": str(last.revision)})
            with pytest.raises(Compacted, match="Read anew"):
                await anext(store.watch("", 1))
            # One who is in time goes on; one who reads on from a stream that was open, too.
            assert (await anext(behind))[0].key == "a"
            await until(lambda: watched.revision >= last.revision)
            assert watched.entries["a"].value == b"4"
            assert "b" not in watched.entries
            watched._seen = 1  # as if it had been cut off before the compaction
            await watched.close()
            resumed = Watched(store, [""])
            resumed._entries |= {"b": KeyValue("b", b"1", 1), "a": KeyValue("a", b"0", 1)}
            events: list[Event] = []
            resumed._on_change = events.extend
            resumed._seen = 1
            following = asyncio.ensure_future(resumed._follow())
            await until(lambda: resumed.revision >= last.revision)
            assert [(e.key, e.value) for e in events] == [("a", b"4"), ("b", None)]
            following.cancel()
            await behind.aclose()

    with EtcdCluster.start(tmp_path) as etcd:  # of its own: others watch from the beginning
        run(main)


def test_a_store_that_went_back_is_noticed(etcd):
    async def main() -> None:
        async with opened(etcd) as store:
            with pytest.raises(Compacted, match="earlier"):
                await anext(store.watch("", 10**9))

    run(main)


def test_a_restored_etcd_is_noticed_and_not_followed(tmp_path):
    async def main() -> None:
        async with opened(etcd) as store:
            await store.txn([], {"a": b"1"})
            etcd.kill(0)
            data = tmp_path / "etcd" / "0" / "m0" / "data"
            shutil.copytree(data, tmp_path / "backup")
            etcd.restart(0)
            etcd.wait_healthy([0])
            found: list[StoreWentBack] = []
            store.on_went_back = found.append
            events: list[Event] = []
            watched = Watched(store, [""], on_change=events.extend)
            await store.txn([], {"b": b"2"})
            await watched.start()
            events.clear()
            etcd.kill(0)
            shutil.rmtree(data)
            shutil.copytree(tmp_path / "backup", data)
            etcd.restart(0)
            await until(lambda: found)
            assert events == []
            assert set(watched.entries) == {"a", "b"}
            await watched.close()

            first, last = watched.entries["a"], watched.entries["b"]
            async with opened(
                etcd
            ) as other:  # what is in the history is not hidden by later changes
                for _ in range(3):
                    latest = await other.txn([], {"a": b"2"})
                assert latest.revision > last.revision
            assert await store.remembers(first)
            assert not await store.remembers(last)

    with EtcdCluster.start(tmp_path / "etcd", durable=True) as etcd:
        run(main, 60)


# -- opening ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["3.4.22", "3.5.3", "3.5.16", "3.6.0-rc.1", "4.0.0"])
def test_fit_versions(version):
    refuse_version("here", version)


@pytest.mark.parametrize("version", ["3.4.21", "3.3.27", "3.5.0", "3.5.1", "3.5.2", "nonsense"])
def test_unfit_versions(version):
    with pytest.raises(StartupError, match=f"here has version {version}"):
        refuse_version("here", version)


def test_addresses_that_make_no_sense(tmp_path):
    async def main() -> None:
        for endpoints, tls in (
            ([], None),
            (["http://a:1", "https://b:1"], None),
            (["http://a:1"], EtcdTls()),
            (["a:1"], EtcdTls(cert=tmp_path)),
            (["a:1"], EtcdTls(ca=tmp_path / "absent")),
        ):
            with pytest.raises(SettingsError, match="etcd"):
                await EtcdStore.open(endpoints, prefix="/p", tls=tls)

    run(main)


def test_nobody_there_is_said_with_the_reason(monkeypatch):
    monkeypatch.setattr("shoal.metadata.etcd.CALL_S", 0.5)

    async def main() -> None:
        with pytest.raises(Unavailable, match=r"No member of etcd can be used\. 127\.0\.0\.1:1: "):
            await EtcdStore.open(["127.0.0.1:1"], prefix="/p")

    run(main)


def test_one_of_two_members_that_answers_is_enough(etcd):
    async def main() -> None:
        store = await EtcdStore.open(["127.0.0.1:1", *etcd.endpoints], prefix=f"/{uuid.uuid4()}")
        assert (await store.txn([], {"a": b""})).ok
        await store.close()

    run(main)


# -- three members ---------------------------------------------------------------------------------


@pytest.mark.cluster
@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_losing_the_leader_loses_and_doubles_nothing(tmp_path, how):
    async def main() -> None:
        async with opened(etcd) as store, opened(etcd, prefix=store_prefix(store)) as other:
            seen: list[int] = []
            pauses: list[float] = []
            stop = False
            total = 0

            async def follow(at: EtcdStore) -> None:
                async for events in at.watch("n", 0):
                    seen.extend(int(e.value) for e in events)

            async def work(at: EtcdStore) -> None:
                nonlocal total
                now_s = asyncio.get_running_loop().time
                while not stop:
                    began_s = now_s()
                    done = await increment(at, "n")
                    total += done  # not in one line: += would read it before the wait
                    pauses.append(now_s() - began_s)

            working = [asyncio.ensure_future(work(at)) for at in (store, other)]
            await until(lambda: total > 20)
            leader = await asyncio.to_thread(etcd.leader)
            # The store and its watch sit on the leader: the harder case.
            store._members.choose(leader)
            following = asyncio.ensure_future(follow(store))
            await until(lambda: len(seen) > 20)
            await asyncio.to_thread(getattr(etcd, how), leader)
            before = total
            await until(lambda: total > before + 50)
            await until(lambda: len(seen) > before + 20)
            await asyncio.to_thread(etcd.thaw if how == "freeze" else etcd.restart, leader)
            again = total
            await until(lambda: total > again + 20)
            stop = True
            await asyncio.gather(*working)
            await until(lambda: len(seen) >= total)
            assert int((await store.get("n")).value) == total
            assert seen == list(range(1, total + 1))
            print(f"{how}: {total} increments, longest pause {max(pauses):.1f} s")
            following.cancel()

    with EtcdCluster.start(tmp_path, members=3) as etcd:
        run(main, 60)


def store_prefix(store: EtcdStore) -> str:
    return store._keys.removesuffix(b"/keys/").decode()


def record(incarnation: str = "i1") -> NodeRecord:
    return NodeRecord(id="s1", role=NodeRole.STORAGE, incarnation=incarnation)


@pytest.mark.cluster
def test_a_registration_outlives_its_leader(tmp_path):
    async def main() -> None:
        async with opened(etcd) as store:
            session = Session(store, record(), ttl_s=6)
            await session.start()
            before = session.lease
            _, revision = await store.range("")
            leader = await asyncio.to_thread(etcd.leader)
            await asyncio.to_thread(etcd.freeze, leader)
            for _ in range(2):  # keep-alives that somebody else answers
                await until(lambda: session.lost_for_s() > 1)
                await until(lambda: session.lost_for_s() < 1)
            assert session.healthy_for_s() > 0
            await asyncio.to_thread(etcd.thaw, leader)
            # etcd may lose a lease all the same (etcd-io/etcd 15247): then it is put back at once.
            await until(lambda: session.lease is not None)
            assert await store.get("nodes/s1") is not None
            lost = session.lease != before
            assert lost == any(e.value is None for e in await _so_far(store, revision))
            await session.close()

    with EtcdCluster.start(tmp_path, members=3) as etcd:
        run(main, 40)


async def _so_far(store: EtcdStore, revision: int) -> list[Event]:
    """The events after a revision, up to now."""
    end = await store.txn([], {"end": uuid.uuid4().bytes})
    found: list[Event] = []
    async for events in store.watch("", revision):
        found += events
        if found[-1].revision >= end.revision:
            break
    return found


# -- leases and stalls, one member -----------------------------------------------------------------


@pytest.mark.cluster
def test_a_lease_outlives_a_stall_of_the_event_loop(etcd):
    async def main() -> None:
        async with opened(etcd) as store:
            session = Session(store, record(), ttl_s=3)
            await session.start()
            before = session.lease
            _, revision = await store.range("")
            subprocess.run(["sleep", "4.5"], check=True)  # noqa: ASYNC221, the loop stalls
            await store.lease_keep_alive(before)
            assert session.lease == before
            assert not [e for e in await _so_far(store, revision) if e.key == "nodes/s1"]
            await session.close()

    run(main)


@pytest.mark.cluster
def test_a_process_that_hangs_does_not_look_alive(etcd):
    async def main() -> None:
        async with opened(etcd) as store:
            session = Session(store, record(), ttl_s=2)
            await session.start()
            before = session.lease
            _, revision = await store.range("")
            subprocess.run(["sleep", "6"], check=True)  # noqa: ASYNC221, the loop stalls
            assert session.lost_for_s() > 2
            assert session.healthy_for_s() == 0
            await until(lambda: session.lease not in (None, before))
            values = [e.value for e in await _so_far(store, revision) if e.key == "nodes/s1"]
            assert values == [None, record().to_bytes()]
            await session.close()

    run(main)


@pytest.mark.cluster
def test_a_long_pause_of_etcd_is_visible_and_survived(tmp_path):
    async def main() -> None:
        async with opened(etcd) as store:
            session = Session(store, record(), ttl_s=2)
            watched = Watched(store, ["nodes/"])
            await session.start()
            await watched.start()
            etcd.freeze(0)
            await until(lambda: session.healthy_for_s() == 0 and session.lost_for_s() > 3)
            patient, store._members.call = store._members.call, _impatient(store._members.call)
            with pytest.raises(Unavailable, match="Nothing was changed"):
                await store.get("a")
            store._members.call = patient
            etcd.thaw(0)
            await until(lambda: session.healthy_for_s() > 0 and session.lost_for_s() < 1)
            await until(lambda: "nodes/s1" in watched.entries)
            assert NodeRecord.from_bytes("", (await store.get("nodes/s1")).value) == record()
            await watched.close()
            await session.close()

    with EtcdCluster.start(tmp_path) as etcd:
        run(main)


# -- access ----------------------------------------------------------------------------------------


def _certificates(folder: Path) -> dict[str, Path]:
    """A "ca" with its "ca.key", and a certificate of each: "server", "client"."""

    def openssl(name: str, *more: str) -> None:
        subprocess.run(
            [
                *(
                    "openssl",
                    "req",
                    "-x509",
                    "-newkey",
                    "ec",
                    "-pkeyopt",
                    "ec_paramgen_curve:P-256",
                ),
                *("-nodes", "-days", "2", "-subj", f"/CN={name}"),
                *("-keyout", folder / f"{name}.key", "-out", folder / f"{name}.pem", *more),
            ],
            check=True,
            capture_output=True,
        )

    folder.mkdir()
    openssl("ca")
    for name in ("server", "client"):
        openssl(
            *(name, "-CA", str(folder / "ca.pem"), "-CAkey", str(folder / "ca.key")),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=CA:FALSE"),
        )
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.cluster
def test_tls_both_ways(tmp_path, monkeypatch):
    files, foreign = _certificates(tmp_path / "tls"), _certificates(tmp_path / "foreign")
    monkeypatch.setattr("shoal.metadata.etcd.CALL_S", 1.0)

    async def refused(why: str, tls: EtcdTls | None) -> None:
        with pytest.raises(Unavailable, match=why):
            await EtcdStore.open(etcd.endpoints, prefix="/p", tls=tls)

    async def main() -> None:
        ours = EtcdTls(ca=files["ca.pem"], cert=files["client.pem"], key=files["client.key"])
        async with opened(etcd, tls=ours) as store:
            session = Session(store, record(), ttl_s=2)  # its thread has a connection of its own
            await session.start()
            lease = session.lease
            assert (await store.txn([], {"a": b""})).ok
            await until(lambda: session.lost_for_s() > 0.5)
            await until(lambda: session.lost_for_s() < 0.3)
            assert session.lease == lease
            await session.close()
        await refused("No member of etcd", None)
        await refused("No member of etcd", EtcdTls(ca=files["ca.pem"]))
        await refused(
            "CERTIFICATE_VERIFY_FAILED",
            EtcdTls(ca=foreign["ca.pem"], cert=files["client.pem"], key=files["client.key"]),
        )
        await refused(
            "No member of etcd",
            EtcdTls(ca=files["ca.pem"], cert=foreign["client.pem"], key=foreign["client.key"]),
        )

    tls = {"ca": files["ca.pem"], "cert": files["server.pem"], "key": files["server.key"]}
    with EtcdCluster.start(tmp_path, tls=tls) as etcd:
        run(main)


@pytest.mark.cluster
def test_user_and_password(tmp_path):
    def prepare() -> None:
        def base64(text: str) -> str:
            return b64encode(text.encode()).decode()

        for name, password in (("root", "r"), ("shoal", "s"), ("other", "o")):
            etcd.ask("auth/user/add", {"name": name, "password": password})
        etcd.ask("auth/role/add", {"name": "root"})
        etcd.ask("auth/role/add", {"name": "shoal"})
        allowed = {"permType": 2, "key": base64("/p/"), "range_end": base64("/p0")}
        etcd.ask("auth/role/grant", {"name": "shoal", "perm": allowed})
        for name in ("root", "shoal"):
            etcd.ask("auth/user/grant", {"user": name, "role": name})
        etcd.ask("auth/enable", {})

    async def main() -> None:
        for credentials, why in (
            (None, "user and a password"),
            (("shoal", "wrong"), "does not accept"),
            (("other", "o"), "does not allow it"),
        ):
            with pytest.raises(StoreRefused, match=why):
                async with opened(etcd, prefix="/p", credentials=credentials) as store:
                    await store.get("a")
        async with opened(etcd, prefix="/q", credentials=("shoal", "s")) as elsewhere:
            with pytest.raises(StoreRefused, match="does not allow it"):
                await elsewhere.txn([], {"a": b""})
            with pytest.raises(StoreRefused, match="watch"):
                await anext(elsewhere.watch("", 0))
        async with opened(etcd, prefix="/p", credentials=("shoal", "s")) as store:
            session = Session(store, record(), ttl_s=3)
            await session.start()
            watch = store.watch("count", 0)
            assert await increment(store, "count")
            assert [e.value for e in await anext(watch)] == [b"1"]
            # A member that was restarted knows no token that it gave out before.
            await asyncio.to_thread(etcd.kill, 0)
            await asyncio.to_thread(etcd.restart, 0)
            assert await increment(store, "count")
            assert [e.value for e in await anext(watch)] == [b"2"]
            await until(lambda: session.lost_for_s() > 0.9)
            await until(lambda: session.lost_for_s() < 0.5)
            await session.close()
            assert await store.get("nodes/s1") is None
            await watch.aclose()

    with EtcdCluster.start(tmp_path) as etcd:
        prepare()
        run(main)
