"""The shards, wherever they are: `Storage` for the coordinator, over many storage nodes.

    write ──▶ the primary ── NotPrimary, unreachable ──▶ look at the record, wait, again
    read  ──▶ a replica in sync ── late ──▶ a second one as well; the first answer counts
                                └─ fails ─▶ the next one

Who holds a shard stands in its record in the metadata store, which this follows by a watch; where a
record proves old it is read anew. What is decided, and why writes that may have happened are never
sent again, is in `coordinator/routing.py`; this file has the clock and the calls.

Per shard a floor is kept: the largest sequence number that this coordinator saw acknowledged or
read. A replica answers only when it has applied that much, so through one coordinator reads see its
writes and never go back, whichever replica they meet. A client's token raises the floor for its own
read only: a made-up one must not lock others out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from coordinator.freshness import ANY_READ
from coordinator.routing import (
    ASK_ANOTHER,
    Backoff,
    Budget,
    Latencies,
    ShardGone,
    Target,
    may_send_again,
    pick,
    worth_waiting,
)
from shoal.api.filter import Filter
from shoal.batch import PointBatch
from shoal.errors import (
    FormatTooNew,
    InvariantError,
    NotFound,
    NotPrimary,
    ShoalError,
    Stale,
    TimedOut,
    Unavailable,
)
from shoal.ids import PointIds
from shoal.metadata.contract import Event, MetadataStore
from shoal.metadata.schema import SHARDS_PREFIX, ShardRecord, shard_key
from shoal.metadata.watched import Watched
from shoal.storage_api import (
    FreshRead,
    Guard,
    Hits,
    Node,
    Read,
    ReplicaStatus,
    Scroll,
    Search,
    ShardInfo,
    ShardKey,
    ShardSpec,
    Write,
    WriteResult,
)
from shoal.telemetry import logger

__all__ = ["LocalNodes", "Nodes", "Router", "RouterSettings"]

T = TypeVar("T")
_log = logger("router")

_RETRIES = {"share": 0.1, "per_s": 10.0, "most": 100.0}
_HEDGES = {"share": 0.1, "per_s": 10.0, "most": 100.0}
_LATE_AGAIN_S = 0.25  # how often a read that waits looks whether there is somebody else to ask
_REMOVED_MAX = 4_096  # shards that are gone, remembered until somebody drops them
_CREATE_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """write_wait_s    how long a write (or a strong read) waits for a primary that takes it: longer
                       than a failover takes, lease and grace together.
    read_wait_s     how long a read waits when no replica can answer.
    write_timeout_s, read_timeout_s  how long an answer may take; a write may have happened then.
    status_timeout_s  how long a node may take to say how it is.
    """

    write_wait_s: float = 15.0
    read_wait_s: float = 5.0
    write_timeout_s: float = 60.0
    read_timeout_s: float = 60.0
    status_timeout_s: float = 1.0


class Nodes(Protocol):
    """The storage nodes by id."""

    def get(self, node_id: str) -> Node:
        """Raises Unavailable for a node that nobody knows how to reach."""
        ...


class LocalNodes:
    """The one node of a one-machine server, in this process."""

    def __init__(self, node_id: str, node: Node) -> None:
        self._node_id, self._node = node_id, node

    def get(self, node_id: str) -> Node:
        if node_id != self._node_id:
            raise Unavailable(f"there is no storage node {node_id}: this server is one machine")
        return self._node


_SEARCH, _RETRIEVE, _SCROLL, _COUNT, _INFO = range(
    5
)  # kinds of reads: each has latencies of its own


class _Shard:
    """One shard as its record says, and what this coordinator has seen of it.

    local    its only replica, when that is in this process: asked without timers or tasks.
    guard    for reads without a wish of their own; made anew when the floor rises.
    """

    __slots__ = (
        "_changed", "floor", "guard", "in_sync", "key", "latencies", "local", "primary", "record",
        "revision",
    )  # fmt: skip

    def __init__(self, key: ShardKey) -> None:
        self.key = key
        self.revision = -1
        self.record: ShardRecord
        self.primary: Target
        self.in_sync: tuple[Target, ...] = ()
        self.local: Node | None = None
        self.floor = 0
        self.guard = Guard()
        self.latencies = [Latencies() for _ in range(5)]
        self._changed: asyncio.Future[None] | None = None

    def __str__(self) -> str:
        return f"shard {self.key.shard} of collection {self.key.collection_id}"

    @property
    def alone(self) -> bool:
        return len(self.in_sync) <= 1

    def seen(self, applied: int) -> None:
        if applied > self.floor:
            self.floor = applied
            self.guard = Guard(applied)

    def guard_for(self, read: Read) -> Guard:
        if read is ANY_READ:
            return self.guard
        floor = max(self.floor, read.token.get(self.key, 0))
        return Guard(floor, read.strong)

    def tell(self) -> None:
        """The record has changed, or is gone."""
        if self._changed is not None:
            self._changed.set_result(None)
            self._changed = None

    async def changes(self, within_s: float) -> None:
        """Wait for the next change, `within_s` seconds at most."""
        if self._changed is None:
            self._changed = asyncio.get_running_loop().create_future()
        await asyncio.wait([self._changed], timeout=within_s)


class Router:
    """Implements `shoal.storage_api.Storage`. Safe to call from many tasks of one event loop.

    store   the metadata store; follows `shards/` by a watch.
    local   the id of the node in this process, when there is one.
    """

    def __init__(
        self,
        store: MetadataStore,
        nodes: Nodes,
        *,
        local: str | None = None,
        settings: RouterSettings | None = None,
    ) -> None:
        self._store, self._nodes, self._local = store, nodes, local
        self._settings = settings or RouterSettings()
        self._shards: dict[ShardKey, _Shard] = {}
        self._removed: dict[ShardKey, list[str]] = {}  # members of shards that are gone
        self._targets: dict[str, Target] = {}
        self._refreshing: dict[ShardKey, asyncio.Task[None]] = {}
        self._watched = Watched(store, [SHARDS_PREFIX], on_change=self._changed)
        self.retries, self.hedges = Budget(**_RETRIES), Budget(**_HEDGES)
        self._turn = 0

    async def start(self) -> None:
        """Read all records, then follow them."""
        await self._watched.start()

    async def close(self) -> None:
        await self._watched.close()

    def records(self) -> list[ShardRecord]:
        """Every shard as last heard, by collection and number."""
        shards = [self._shards[key].record for key in self._shards]
        return sorted(shards, key=lambda record: (record.collection_id, record.shard))

    # -- the records ------------------------------------------------------------------------------
    def _changed(self, events: Sequence[Event]) -> None:
        for event in events:
            if event.value is None:
                self._forget(event.key, event.revision)
                continue
            try:
                self._learn(event.key, event.value, event.revision)
            except (FormatTooNew, InvariantError) as error:  # the others are none the worse
                _log.error("shard_not_read", key=event.key, why=str(error))

    def _learn(self, text: str, value: bytes, revision: int) -> _Shard:
        record = ShardRecord.from_bytes(text, value)
        key = ShardKey(record.collection_id, record.shard)
        shard = self._shards.get(key)
        if shard is None:
            shard = self._shards[key] = _Shard(key)
        if revision > shard.revision:
            shard.revision, shard.record = revision, record
            shard.primary = self._target(record.primary)
            shard.in_sync = tuple(self._target(node) for node in record.in_sync)
            only = record.in_sync == [self._local] and record.primary == self._local
            shard.local = self._nodes.get(record.primary) if only else None
            shard.tell()
        return shard

    def _forget(self, text: str, revision: int) -> None:
        collection, _, number = text.removeprefix(SHARDS_PREFIX).partition("/")
        key = ShardKey(int(collection), int(number))
        shard = self._shards.get(key)
        if shard is None or shard.revision > revision:
            return
        del self._shards[key]
        self._removed[key] = [*shard.record.members(), *shard.record.leaving]
        if len(self._removed) > _REMOVED_MAX:  # others drop theirs themselves: the oldest goes
            del self._removed[next(iter(self._removed))]
        shard.tell()

    def _target(self, node_id: str) -> Target:
        target = self._targets.get(node_id)
        if target is None:
            target = self._targets[node_id] = Target(node_id)
        return target

    async def _find(self, key: ShardKey) -> _Shard:
        """A shard that the watch has not told of: read its record now. Raises ShardGone."""
        entry = await self._store.get(shard_key(key.collection_id, key.shard))
        if entry is None:
            raise ShardGone(key)
        return self._learn(entry.key, entry.value, entry.revision)

    async def _refresh(self, key: ShardKey, within_s: float) -> None:
        """Read a record that proved old, once for all that wait for it. Without a metadata store
        the old one has to do."""
        task = self._refreshing.get(key)
        if task is None:
            task = asyncio.create_task(self._read_record(key), name=f"refresh {key}")
            self._refreshing[key] = task
            task.add_done_callback(lambda _: self._refreshing.pop(key, None))
        await asyncio.wait([task], timeout=within_s)

    async def _read_record(self, key: ShardKey) -> None:
        text = shard_key(key.collection_id, key.shard)
        shard = self._shards.get(key)
        try:
            entry = await self._store.get(text)
        except ShoalError as error:
            _log.debug("record_not_read", key=text, why=error.message)
            return
        if entry is not None:
            self._learn(entry.key, entry.value, entry.revision)
        elif shard is not None:
            self._forget(text, shard.revision)

    async def _look_again(
        self, shard: _Shard, revision: int, backoff: Backoff, deadline: float
    ) -> bool:
        """After an attempt under the record of `revision`: wait until another one makes sense. At
        once when the record is another one by now; else after a pause, within the budget of
        retries. False: the deadline has passed."""
        now = asyncio.get_running_loop().time
        if shard.revision == revision:
            await self._refresh(shard.key, max(0.0, deadline - now()))
        while shard.revision == revision and shard.key in self._shards:
            left_s = deadline - now()
            if left_s <= 0:
                return False
            await shard.changes(min(left_s, backoff.pause_s()))
            if shard.revision == revision and now() < deadline and self.retries.take(now()):
                break
        return now() < deadline

    # -- writes -----------------------------------------------------------------------------------
    async def write(self, shard: ShardKey, op: Write) -> WriteResult:
        found = self._shards.get(shard)
        if found is not None and found.local is not None:
            try:
                result = await found.local.write(shard, op)
            except (NotPrimary, NotFound):
                pass
            else:
                found.seen(result.sequence)
                return result
        return await self._write(shard, op)

    async def _write(self, key: ShardKey, op: Write) -> WriteResult:
        deadline = asyncio.get_running_loop().time() + self._settings.write_wait_s
        backoff = Backoff()
        self.retries.earn()
        while True:
            shard = self._shards.get(key) or await self._find(key)
            revision = shard.revision
            try:
                result = await self._written(shard, op)
            except ShoalError as error:
                if not may_send_again(error, alone=shard.alone):
                    raise _told(error) from None
                last = error
            else:
                shard.seen(result.sequence)
                return result
            if not await self._look_again(shard, revision, backoff, deadline):
                raise Unavailable(
                    f"{shard}: no primary took the write within {self._settings.write_wait_s:g} s, "
                    f"and it did not happen: try again. Last asked: {shard.primary.id}: "
                    f"{last.message}"
                )

    async def _written(self, shard: _Shard, op: Write) -> WriteResult:
        primary, timeout_s = shard.primary, self._settings.write_timeout_s
        node = self._nodes.get(primary.id)
        primary.outstanding += 1
        try:
            async with asyncio.timeout(timeout_s):
                return await node.write(shard.key, op)
        except TimeoutError:
            raise TimedOut(
                f"{shard}: {primary.id} did not answer within {timeout_s:g} s."
            ) from None
        finally:
            primary.outstanding -= 1

    # -- reads ------------------------------------------------------------------------------------
    async def search(self, shard: ShardKey, query: Search, read: Read = ANY_READ) -> Hits:
        found = self._shards.get(shard)
        if found is not None and found.local is not None:
            try:
                return (await found.local.search(shard, query, found.guard_for(read))).value
            except (NotPrimary, Stale, NotFound):
                pass
        return await self._read(shard, _SEARCH, lambda n, g: n.search(shard, query, g), read)

    async def retrieve(
        self,
        shard: ShardKey,
        ids: PointIds,
        with_payload: bool,
        with_vectors: bool | tuple[str, ...],
        read: Read = ANY_READ,
    ) -> PointBatch:
        def ask(node: Node, guard: Guard) -> Awaitable[FreshRead[PointBatch]]:
            return node.retrieve(shard, ids, with_payload, with_vectors, guard)

        return await self._read(shard, _RETRIEVE, ask, read)

    async def scroll(self, shard: ShardKey, query: Scroll, read: Read = ANY_READ) -> PointBatch:
        return await self._read(shard, _SCROLL, lambda n, g: n.scroll(shard, query, g), read)

    async def count(self, shard: ShardKey, filter: Filter | None, read: Read = ANY_READ) -> int:
        return await self._read(shard, _COUNT, lambda n, g: n.count(shard, filter, g), read)

    async def info(self, shard: ShardKey) -> ShardInfo:
        """As the primary sees it, or while that does not answer another replica."""

        async def ask(node: Node, guard: Guard) -> FreshRead[ShardInfo]:
            return FreshRead(await node.info(shard), 0)

        return await self._read(shard, _INFO, ask, ANY_READ)

    async def _read(
        self,
        key: ShardKey,
        kind: int,
        ask: Callable[[Node, Guard], Awaitable[FreshRead[T]]],
        read: Read,
    ) -> T:
        shard = self._shards.get(key) or await self._find(key)
        local = shard.local
        if local is not None:
            try:
                return (await ask(local, shard.guard_for(read))).value
            except (NotPrimary, Stale, NotFound):
                pass
        started = asyncio.get_running_loop().time()
        wait_s = self._settings.write_wait_s if read.strong else self._settings.read_wait_s
        backoff = Backoff()
        self.hedges.earn()
        while True:
            revision = shard.revision
            try:
                answer = await _Race(self, shard, kind, ask, shard.guard_for(read), started).run()
            except ShoalError as error:
                if not worth_waiting(error, alone=shard.alone):
                    raise
                last = error
            else:
                if answer.applied > shard.floor:
                    shard.seen(answer.applied)
                return answer.value
            if not await self._look_again(shard, revision, backoff, started + wait_s):
                raise self._not_read(shard, last, wait_s, strong=read.strong)
            shard = self._shards.get(key) or await self._find(key)

    def _not_read(
        self, shard: _Shard, last: ShoalError, waited_s: float, *, strong: bool
    ) -> ShoalError:
        asked = [shard.primary] if strong else shard.in_sync
        names = ", ".join(target.id for target in asked)
        failure = TimedOut if isinstance(last, TimedOut) else Unavailable
        error = failure(
            f"{shard}: {'its primary' if strong else 'no replica in sync'} ({names}) could answer "
            f"the read within {waited_s:g} s: try again. Last: {last.message}"
        )
        error.maybe_applied = False
        return error

    # -- shards come and go -----------------------------------------------------------------------
    async def create_shard(self, spec: ShardSpec) -> None:
        """Make the shard on all nodes of its record. Raises Unavailable when one does not answer;
        the others may have made it then."""
        shard = await self._find(spec.key)
        outcomes = await asyncio.gather(
            *(self._create_on(node, spec) for node in shard.record.members()),
            return_exceptions=True,
        )
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _create_on(self, node_id: str, spec: ShardSpec) -> None:
        """Creating again is no change, so an attempt that got no answer may be repeated."""
        backoff = Backoff()
        for attempt in range(1, _CREATE_ATTEMPTS + 1):
            try:
                await self._nodes.get(node_id).create_shard(spec)
                return
            except (Unavailable, TimedOut) as error:
                if attempt == _CREATE_ATTEMPTS:
                    raise Unavailable(
                        f"the storage node {node_id} cannot make shard {spec.key.shard} of "
                        f"collection {spec.collection}: {error.message}"
                    ) from error
            await asyncio.sleep(backoff.pause_s())

    async def drop_shard(self, shard: ShardKey) -> None:
        """Delete all replicas of a shard whose record is gone. A node that does not hear of it here
        learns it from the metadata store."""
        members = self._removed.pop(shard, None)
        found = self._shards.get(shard)
        if members is None and found is not None:
            members = [*found.record.members(), *found.record.leaving]
        outcomes = await asyncio.gather(
            *(self._drop_on(node, shard) for node in members or ()), return_exceptions=True
        )
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _drop_on(self, node_id: str, shard: ShardKey) -> None:
        try:
            await self._nodes.get(node_id).drop_shard(shard)
        except ShoalError as error:
            _log.info("drop_left_to_node", node=node_id, shard=str(shard), why=error.message)

    # -- how the nodes are ------------------------------------------------------------------------
    async def statuses(self) -> dict[str, list[ReplicaStatus] | ShoalError]:
        """What every node that holds a shard says of its replicas, or why it says nothing."""
        records = [shard.record for shard in self._shards.values()]
        names = sorted(
            {node for record in records for node in [*record.members(), *record.leaving]}
        )
        said = await asyncio.gather(*(self._status_of(node) for node in names))
        return dict(zip(names, said, strict=True))

    def extra_requests(self) -> dict[str, int]:
        return {"hedge": self.hedges.taken, "retry": self.retries.taken}

    async def _status_of(self, node_id: str) -> list[ReplicaStatus] | ShoalError:
        try:
            async with asyncio.timeout(self._settings.status_timeout_s):
                return await self._nodes.get(node_id).status()
        except TimeoutError:
            return TimedOut(f"no answer within {self._settings.status_timeout_s:g} s")
        except ShoalError as error:
            return error

    # -- for races --------------------------------------------------------------------------------
    def next_target(
        self, shard: _Shard, kind: int, guard: Guard, asked: list[Target], now: float
    ) -> Target | None:
        if guard.strong or (kind == _INFO and not asked):
            return None if shard.primary in asked else shard.primary
        self._turn += 1
        return pick(shard.in_sync, asked, self._turn, now)

    def node(self, target: Target) -> Node:
        return self._nodes.get(target.id)

    @property
    def read_timeout_s(self) -> float:
        return self._settings.read_timeout_s


class _Race(Generic[T]):
    """One read of one shard. The first replica is asked in the task of the caller: a task costs more
    than the rest of this. Only when its answer is late is a second one asked, in a task of its own,
    and the winner ends the wait of the caller by a cancellation that `run` takes back, the way that
    `asyncio.timeout` does it.
    """

    __slots__ = (
        "_ask", "_asked", "_cut", "_error", "_expired", "_guard", "_hedges", "_kind", "_latencies",
        "_loop", "_others", "_router", "_shard", "_started", "_task", "_timer", "_waiting", "_winner",
    )  # fmt: skip

    def __init__(
        self,
        router: Router,
        shard: _Shard,
        kind: int,
        ask: Callable[[Node, Guard], Awaitable[FreshRead[T]]],
        guard: Guard,
        started: float,
    ) -> None:
        self._router, self._shard, self._kind, self._ask = router, shard, kind, ask
        self._guard, self._started = guard, started
        self._loop = asyncio.get_running_loop()
        self._asked: list[Target] = []
        self._hedges: set[asyncio.Task[None]] | None = None
        self._latencies = shard.latencies[kind]
        self._winner: FreshRead[T] | None = None
        self._error: Exception | None = None
        self._waiting = self._cut = self._expired = False

    async def run(self) -> FreshRead[T]:
        """The first answer. Raises the last error when no replica gave one."""
        loop = self._loop
        task = self._task = asyncio.current_task(loop)
        self._others = 0 if task is None else task.cancelling()
        began = loop.time()
        self._timer = loop.call_later(self._latencies.hedge_delay_s(), self._late)
        try:
            while (answer := await self._next(loop.time())) is None:
                if self._winner is not None:
                    answer = self._winner
                    break
            self._latencies.add(loop.time() - began)
            return answer
        finally:
            self._timer.cancel()
            for hedge in self._hedges or ():
                hedge.cancel()

    async def _next(self, now: float) -> FreshRead[T] | None:
        """Ask one more replica, or wait for one that was asked. None: look whether there is a winner,
        or somebody else to ask."""
        target = None
        if not self._expired:
            target = self._router.next_target(
                self._shard, self._kind, self._guard, self._asked, now
            )
        if target is None and (self._expired or not self._hedges):
            raise self._error or Unavailable(f"{self._shard}: no replica is in sync")
        self._waiting = True
        try:
            if target is not None:
                self._asked.append(target)
                return await self._answer(target)
            await asyncio.wait(self._hedges or (), return_when=asyncio.FIRST_COMPLETED)
            return None
        except asyncio.CancelledError:
            if not self._cut or self._take_back() > self._others:
                raise
            return None
        except ASK_ANOTHER as error:
            if not self._expired:
                self._error = error
            return None
        finally:
            self._waiting = False
            if self._cut:
                self._take_back()

    def _take_back(self) -> int:
        """Withdraw our own cancellation of the caller; how many of others are left."""
        self._cut = False
        return 0 if self._task is None else self._task.uncancel()

    async def _answer(self, target: Target) -> FreshRead[T]:
        target.outstanding += 1
        try:
            answer = await self._ask(self._router.node(target), self._guard)
        except (Unavailable, TimedOut) as error:
            if not isinstance(error, Stale | NotPrimary):
                target.failed(self._loop.time())
            raise
        finally:
            target.outstanding -= 1
        if target.failures:
            target.answered()
        return answer

    # -- when it takes long -----------------------------------------------------------------------
    def _late(self) -> None:
        now = self._loop.time()
        router = self._router
        if now - self._started >= router.read_timeout_s:
            self._expired = True
            self._error = TimedOut(f"{self._shard}: no answer within {router.read_timeout_s:g} s")
            self._end_wait()
            return
        again_s = _LATE_AGAIN_S
        target = router.next_target(self._shard, self._kind, self._guard, self._asked, now)
        if target is not None and router.hedges.take(now):
            self._asked.append(target)
            self._hedges = self._hedges or set()
            hedge = self._loop.create_task(self._hedged(target))
            self._hedges.add(hedge)
            hedge.add_done_callback(self._hedges.discard)
            again_s = self._latencies.hedge_delay_s()
        self._timer = self._loop.call_later(again_s, self._late)

    async def _hedged(self, target: Target) -> None:
        try:
            answer = await self._answer(target)
        except Exception as error:
            self._error = self._error or error
            return
        if self._winner is None:
            self._winner = answer
            now = self._loop.time()
            for slower in self._asked[: self._asked.index(target)]:
                slower.failed(now)
            self._end_wait()

    def _end_wait(self) -> None:
        if self._waiting and self._task is not None and not self._cut:
            self._cut = True
            self._task.cancel()


def _told(error: ShoalError) -> ShoalError:
    """With what to do about a write that may have happened, for people."""
    if error.maybe_applied:
        error.message += (
            " The write may have happened: read it back, or send it again if nobody else changes "
            "these points."
        )
    return error
