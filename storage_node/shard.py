"""One replica of a shard: the driver around `ShardState`. It opens, takes writes, and closes.

    write   resolve -> Replication: on the disk of every in-sync replica -> apply -> answer

Only the primary takes writes; the others get the same entries and apply them in the same order.
Several waiting writes are one group: one message, one fsync. What happens to the segments in between
is storage_node/upkeep.py.

State changes and reads that are expected to be short run on the event loop, so they need no locks;
everything that waits for a disk, and long searches, run in threads on snapshots or on frozen data.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

from shoal import limits, telemetry
from shoal.errors import (
    Busy,
    NotPrimary,
    ShardStopped,
    ShoalError,
    Stale,
    StorageFull,
    TimedOut,
    Unavailable,
    VectorsChanged,
)
from shoal.index_api import IndexBuilder
from shoal.metadata.keeper import boottime_s
from shoal.settings import StorageSettings
from shoal.storage_api import (
    AlterVectors,
    Guard,
    ReplicaStatus,
    ShardInfo,
    ShardKey,
    ShardSpec,
    Write,
    WriteResult,
)
from storage_node.entries import LogEntry, Merge, Seal, byte_size, decode, encode, is_empty
from storage_node.files import check_space
from storage_node.lanes import Lanes
from storage_node.log import Log
from storage_node.manifest import Manifest
from storage_node.recovery import recover
from storage_node.replica import Config, Entry, Message, Replica, Timing
from storage_node.replication import Replication
from storage_node.searching import vector_counts
from storage_node.state import ShardState
from storage_node.upkeep import Upkeep

__all__ = ["Membership", "Shard"]

_log = telemetry.logger("storage")
_APPLY_AT_ONCE_BYTES = limits.MIB  # more, and the event loop gets a turn in between
_APPLY_RETRY_S = 1.0


class Membership(Protocol):
    """What a replica must know of its node, and ask of it.

    alone            there are no other nodes: everything in the log is committed
    metadata_lost_s  how long ago the metadata store was last heard from; 0 while it answers
    """

    @property
    def node(self) -> str: ...
    @property
    def alone(self) -> bool: ...
    @property
    def timing(self) -> Timing: ...
    @property
    def metadata_lost_s(self) -> float: ...
    async def opened(self, shard: Shard) -> None:
        """The replica was opened: tell it its configuration."""
        ...

    def send(self, shard: ShardKey, to: str, message: Message) -> None: ...
    def propose(self, shard: ShardKey, config: Config) -> Awaitable[Config]: ...
    def fetch_files(self, shard: ShardKey, source: str) -> None: ...
    def unread(self, shard: ShardKey) -> str:
        """See ReplicaStatus.unread."""
        ...


@dataclass(slots=True)
class _Pending:
    """term: of the primary that took it. In another one it is refused: what it rests on (segment
    numbers, what a condition found) may have changed in between."""

    op: LogEntry
    size: int
    term: int
    done: asyncio.Future[WriteResult]


@dataclass(slots=True)
class _Waiting:
    """In the log, not yet committed. part: another entry of the same write follows."""

    sequence: int
    entry: LogEntry
    done: asyncio.Future[WriteResult]


class Shard:
    def __init__(
        self,
        folder: Path,
        spec: ShardSpec,
        settings: StorageSettings,
        builder: IndexBuilder | None,
        lanes: Lanes,
        membership: Membership,
    ) -> None:
        self.folder, self.spec = folder, spec
        self.stopped: str | None = None
        self.state = ShardState(spec)
        self._settings, self._lanes, self._membership = settings, lanes, membership
        retained = 0 if membership.alone else limits.LOG_RETAIN_BYTES
        self._log = Log(folder / "log", retain_bytes=retained)
        self._upkeep = Upkeep(
            folder,
            spec,
            settings,
            builder,
            lanes,
            self._log,
            propose=lambda entry: self._enqueue(entry, 0),
            may_propose=self._may_propose,
        )
        self._replication: Replication | None = None
        self._queue: deque[_Pending] = deque()
        self._queued_bytes = 0
        self._epoch = 0  # of the vectors, by changes that are on their way to the log
        self._wake = asyncio.Event()  # the queue has something
        self._found = 0  # the end of the log that was on the disk; 0 once all of that is applied
        self._waiting: deque[_Waiting] = deque()
        self._to_apply: deque[Entry] = deque()  # committed, not yet applied
        self._to_apply_bytes = 0
        self._apply_wake = asyncio.Event()
        self._applied = asyncio.Event()  # something was applied, or another read may be answered
        self._closing = False
        self._tasks: list[asyncio.Task[None]] = []
        self.stop_error: BaseException | None = None

    # -- opening and closing ----------------------------------------------------------------------
    async def open(self, *, new: bool, fresh: bool = False) -> None:
        """Recover from disk. Damage stops this shard (`stopped` says why) and nothing else. new:
        there may be nothing yet. fresh: see Replica."""
        alone = self._membership.alone
        try:
            limit = self._settings.verify_on_open_bytes_max
            recovered = await self._lanes.files(
                lambda: recover(
                    self.folder,
                    self.spec,
                    self._log,
                    limit,
                    new=new,
                    committed=None if alone else 0,
                )
            )
        except Exception as error:  # a damaged file can make anything fail
            known = isinstance(error, ShoalError | OSError)
            self._stop(f"{error}" if known else f"{type(error).__name__}: {error}", error)
            return
        self.state = recovered.state
        self._upkeep.open(recovered)
        self._found = 0 if alone else self._log.next_sequence - 1
        replica = Replica(
            self._membership.node,
            incarnation=secrets.randbits(63),
            epochs=self._log.terms,
            durable=self._log.next_sequence - 1,
            committed=self.state.applied,
            tail=[Entry(*entry) for entry in recovered.tail],
            fresh=fresh or alone,
            now=boottime_s(),
            timing=self._membership.timing,
        )
        self._replication = Replication(
            replica,
            self._log,
            self._lanes,
            self,
            lambda config: self._membership.propose(self.spec.key, config),
            clock=boottime_s,
        )
        loops = (
            self._commit_loop,
            self._replication.run,
            self._apply_loop,
            *self._upkeep.loops,
        )
        for loop in loops:
            self._tasks.append(asyncio.create_task(self._guard(loop)))

    async def close(self) -> None:
        """Finish the writes that were accepted; stop the background work where it is."""
        self._closing = True
        self._upkeep.end()
        for event in (self._wake, self._apply_wake):
            event.set()
        gone = Unavailable("the server shut down before this write was done")
        if self._tasks and self._replication is not None:
            # Other replicas may never answer: nobody takes them out of the in-sync set any more.
            wait_s = None if self._membership.alone else limits.CLOSE_WAIT_S
            await asyncio.wait(self._tasks[:1], timeout=wait_s)
            self._abandon_all(gone, maybe=True)
            self._tasks[0].cancel()
            await self._replication.close()
            await asyncio.wait(self._tasks[:2])
        for task in self._tasks[2:]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._abandon_all(gone, maybe=True)
        await self._upkeep.close()
        self._log.close()

    async def _guard(self, loop: Callable[[], object]) -> None:
        """A background loop that ends with an error stops the shard: never on in silence."""
        try:
            await loop()  # type: ignore[misc]
        except Exception as error:
            self._stop(f"{type(error).__name__}: {error}", error)

    def _stop(self, why: str, error: BaseException | None = None) -> None:
        if self.stopped is not None:
            return
        name = f"collection {self.spec.collection!r}, shard {self.spec.key.shard}"
        self.stopped = f"{name} stopped: {why}"
        self.stop_error = error
        _log.error("shard_stopped", error=error, why=self.stopped)
        while self._queue:
            _fail(self._queue.popleft().done, ShardStopped(self.stopped))
        self._abandon_all(ShardStopped(self.stopped), maybe=True)
        for task in self._tasks:  # whatever the others would do next rests on what broke
            if task is not asyncio.current_task():
                task.cancel()
        self._applied.set()

    def check_serving(self) -> None:
        if self.stopped is not None:
            raise ShardStopped(self.stopped)

    # -- its node ---------------------------------------------------------------------------------
    @property
    def term(self) -> int:
        """The highest that this replica has seen."""
        return 0 if self._replication is None else self._replication.replica.term

    def configure(self, config: Config) -> None:
        """The shard's record was read, or has changed."""
        if self._replication is not None and self.stopped is None:
            self._replication.configure(config)
            self._upkeep.role_changed()
            self._applied.set()

    def receive(self, sender: str, message: Message) -> None:
        if self._replication is not None and self.stopped is None:
            self._replication.receive(sender, message)
            self._applied.set()  # the lease may have come

    def departing(self, nodes: frozenset[str]) -> None:
        """These nodes are about to stop."""
        if self._replication is not None and self.stopped is None:
            self._replication.departing(nodes)

    async def settled(self) -> None:
        """Return when no write waits for other replicas, or this is no primary any more."""
        replication = self._replication
        if replication is not None and self.stopped is None:
            replica = replication.replica
            await replication.until(
                lambda: not replica.is_primary or replica.committed == replica.last
            )

    def tick(self) -> None:
        if self._replication is not None and self.stopped is None:
            self._replication.tick()

    def status(self, metadata_lost_s: float) -> ReplicaStatus:
        replica = None if self._replication is None else self._replication.replica
        return ReplicaStatus(
            node=self._membership.node,
            role="stopped" if self.stopped is not None or replica is None else replica.role,
            term=self.term,
            durable=0 if replica is None else replica.durable,
            committed=0 if replica is None else replica.committed,
            writable=self._writable(),
            key=self.spec.key,
            info=self.info(),
            metadata_lost_s=metadata_lost_s,
        )

    def _may_propose(self) -> bool:
        """Not before everything inherited is applied: it may name segment ids that look free."""
        replication = self._replication
        return replication is not None and replication.refusal() is None and not self._to_apply

    def _writable(self) -> bool:
        try:
            check_space(self.folder, self._settings.disk_free_bytes_min)
        except StorageFull:
            return False
        return True

    @property
    def manifest(self) -> Manifest:
        """As it is on the disk now."""
        return self._upkeep.manifest

    # -- reading ----------------------------------------------------------------------------------
    def may_answer(self, guard: Guard) -> bool:
        """Whether a read under this guard can be answered this moment."""
        return (
            self.state.applied >= guard.min_applied
            and self._replication is not None
            and self._in_sync()
            and self._knows_itself()
            and not (guard.strong and (self._lags() or not self._replication.lease_held))
        )

    def _knows_itself(self) -> bool:
        """Whether all that was answered before this replica was opened is applied. It is in the log that
        was found, of which nobody knows how much was committed before the primary says so; and a
        coordinator that was restarted, too, asks for nothing in particular."""
        if self._found and self._replication is not None:
            if self.state.applied < min(self._found, self._replication.replica.last):
                return False
            self._found = 0
        return True

    def _lags(self) -> bool:
        """Whether this primary has not yet applied all that earlier ones may have answered for."""
        replication = self._replication
        return (
            replication is not None
            and replication.is_primary
            and self.state.applied < replication.replica.inherited
        )

    def _in_sync(self) -> bool:
        if self._membership.alone:
            return True
        assert self._replication is not None
        config = self._replication.replica.config
        return config is not None and self._membership.node in config.in_sync

    async def become_fresh(self, guard: Guard) -> None:
        """Wait a moment for `may_answer`. Raises Stale or NotPrimary."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limits.STALE_WAIT_S):
                while not self.may_answer(guard):
                    self.check_serving()
                    self._applied.clear()
                    await self._applied.wait()
                return
        if guard.strong:
            raise NotPrimary(
                f"the replica of shard {self.spec.key.shard} on {self._membership.node} is not the "
                "primary, or has not heard from all in-sync replicas for a moment"
            )
        if self._found:
            raise Stale(
                f"the replica of shard {self.spec.key.shard} on {self._membership.node} was started a "
                "moment ago and has not heard from a primary yet how much of its log is committed"
            )
        raise Stale(
            f"the replica of shard {self.spec.key.shard} on {self._membership.node} has applied "
            f"{self.state.applied} of the {guard.min_applied} log entries that the read must see"
            + ("" if self._replication and self._in_sync() else ", and is not in sync")
        )

    # -- writing ----------------------------------------------------------------------------------
    async def write(self, op: Write) -> WriteResult:
        """Durable on every in-sync replica, and visible here, when it returns."""
        self.check_serving()
        if self._closing:
            raise Unavailable("the server is shutting down; nothing was written")
        self._check_primary()
        size = byte_size(op)
        too_many = len(self._queue) >= limits.LOG_QUEUE_ENTRIES_MAX
        if too_many or self._queued_bytes + size > limits.LOG_QUEUE_BYTES_MAX:
            raise Busy(
                f"{len(self._queue)} writes ({self._queued_bytes >> 20} MiB) wait for the disk; "
                "nothing was written. Send again later, or fewer at once."
            )
        return await self._enqueue(op, size)

    def _check_primary(self) -> None:
        assert self._replication is not None
        why = self._replication.refusal()
        if why is None:
            return
        kind = Unavailable if self._replication.is_primary else NotPrimary
        raise kind(
            f"shard {self.spec.key.shard} of collection {self.spec.collection!r} takes no writes on "
            f"{self._membership.node}: {why}; nothing was written"
        )

    def _check_term(self, term: int) -> None:
        if term != self.term:
            raise NotPrimary(
                f"the primary of shard {self.spec.key.shard} changed while this write waited; nothing "
                "was written"
            )

    def _check_epoch(self, op: LogEntry) -> None:
        """A change of the vectors counts from when it is on its way to the log: what is logged after it
        is never older. Raises VectorsChanged."""
        if isinstance(op, Seal | Merge):
            return
        if isinstance(op, AlterVectors):
            self._epoch = max(self._epoch, op.epoch)
        elif op.epoch < max(self._epoch, self.state.spec.epoch):
            raise VectorsChanged(
                f"the vectors of collection {self.spec.collection!r} are being changed, and this write "
                "was made before; nothing was written: try again"
            )

    def _enqueue(self, op: LogEntry, size: int) -> asyncio.Future[WriteResult]:
        pending = _Pending(op, size, self.term, asyncio.get_running_loop().create_future())
        self._queue.append(pending)
        self._queued_bytes += size
        self._wake.set()
        return pending.done

    async def _commit_loop(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                group = self._next_group()
                try:
                    await self._log_group(group)
                except BaseException as error:
                    stopped = ShardStopped(f"the shard stopped: {error}")
                    stopped.maybe_applied = True
                    for pending in group:  # those answered already stay answered
                        _fail(pending.done, stopped)
                    raise
                await self._seal_if_full()
            if self._closing:
                await self._all_applied()
                return

    def _next_group(self) -> list[_Pending]:
        """The waiting writes that one fsync takes. A write that asks a question must see all before
        it applied, so it only ever comes first."""
        group: list[_Pending] = []
        size = 0
        while self._queue and (
            not group or size + self._queue[0].size < limits.LOG_GROUP_BYTES_MAX
        ):
            op = self._queue[0].op
            if group and not isinstance(op, Seal | Merge) and ShardState.asks(op):
                break
            if group and isinstance(group[-1].op, Seal):
                break  # it ends its log file
            pending = self._queue.popleft()
            self._queued_bytes -= pending.size
            size += pending.size
            group.append(pending)
        return group

    async def _log_group(self, group: list[_Pending]) -> None:
        """Put the writes in the log. Returns when the next group may follow: this one is on our own
        disk then, so that whatever came meanwhile shares the next fsync."""
        first = group[0].op
        if isinstance(first, Seal | Merge) or ShardState.asks(first) or self._lags():
            await self._all_applied()  # also what an earlier primary was told of the vectors
        accepted: list[tuple[asyncio.Future[WriteResult], LogEntry]] = []
        term = self.term
        for pending in group:
            op = pending.op
            if pending.done.cancelled():
                continue  # nobody waits for it any more, and nothing was written
            try:
                self._check_term(pending.term)
                self._check_epoch(op)
                parts = [op] if isinstance(op, Seal | Merge) else self.state.resolve(op)
            except ShoalError as error:
                _fail(pending.done, error)
                continue
            entries = [entry for entry in parts if not is_empty(entry)]
            if not entries:
                _answer(pending.done, WriteResult(self.state.applied))
            elif len(entries) == 1:
                accepted.append((pending.done, entries[0]))
            else:
                await self._log_parts(pending, entries)
        await self._submit(accepted, term)

    async def _log_parts(self, pending: _Pending, entries: list[LogEntry]) -> None:
        """A write of many points, an entry at a time: reads go on in between."""
        missing: int | None = None
        for position, entry in enumerate(entries):
            part: asyncio.Future[WriteResult] = asyncio.get_running_loop().create_future()
            await self._submit([(part, entry)], pending.term)
            try:
                result = await part
            except ShoalError as error:
                if position:
                    error.maybe_applied = True
                    error.message += (
                        f" {position} of {len(entries)} parts of this write were done: send it "
                        "again."
                    )
                _fail(pending.done, error)
                return
            missing = result.missing if missing is None else missing
            await self._seal_if_full()
        _answer(pending.done, WriteResult(self.state.applied, missing))

    async def _submit(
        self, accepted: Sequence[tuple[asyncio.Future[WriteResult], LogEntry]], term: int
    ) -> None:
        """Hand entries of this term to the replication; returns when they are on our disk, or will
        never be."""
        if not accepted:
            return
        replication = self._replication
        assert replication is not None
        try:
            await self._upkeep.wait_for_room()
            check_space(self.folder, self._settings.disk_free_bytes_min)
            self._check_primary()  # it was when the write came
            self._check_term(term)
        except ShoalError as error:
            for done, _ in accepted:
                _fail(done, error)
            return
        sequence = replication.replica.last + 1
        for position, (done, entry) in enumerate(accepted):
            self._waiting.append(_Waiting(sequence + position, entry, done))
        last = sequence + len(accepted) - 1
        replication.submit(tuple(encode(entry) for _, entry in accepted))
        await replication.until(
            lambda: (
                replication.replica.durable >= last
                or replication.replica.term != term
                or replication.replica.last < last
                or self.stopped is not None
            )
        )

    async def _all_applied(self) -> None:
        """Every entry that was submitted is applied, or was given up; and all that was inherited."""
        while (self._waiting or self._lags()) and self.stopped is None:
            self._applied.clear()
            await self._applied.wait()

    async def _seal_if_full(self) -> None:
        if not self._may_propose():
            return
        seal = self._upkeep.seal_due()
        if seal is None:
            return
        done: asyncio.Future[WriteResult] = asyncio.get_running_loop().create_future()
        await self._submit([(done, seal)], self.term)
        await self._all_applied()
        with contextlib.suppress(ShoalError):  # stays growing; the next write finds it full again
            await done

    # -- what the replication decided -------------------------------------------------------------
    def send(self, to: str, message: Message) -> None:
        self._membership.send(self.spec.key, to, message)

    def fetch_files(self, source: str) -> None:
        self._membership.fetch_files(self.spec.key, source)

    def broke(self, error: Exception) -> None:
        self._stop(f"{type(error).__name__}: {error}", error)

    def commit(self, entries: Sequence[Entry]) -> None:
        size = sum(len(entry.data) for entry in entries)
        if not self._to_apply and size <= _APPLY_AT_ONCE_BYTES and self._has_room():
            self._apply_some(entries)
            return
        self._to_apply.extend(entries)
        self._to_apply_bytes += size
        if self._to_apply_bytes > limits.APPLY_QUEUE_BYTES_MAX:
            raise StorageFull(
                f"{self._to_apply_bytes >> 20} MiB of committed entries wait to be applied: this "
                "replica cannot write its segments. Free disk space and restart it."
            )
        self._apply_wake.set()

    def _has_room(self) -> bool:
        """The primary looked before it logged; a secondary must not freeze without end."""
        return len(self.state.frozen) < limits.FROZEN_SEGMENTS_MAX

    async def _apply_loop(self) -> None:
        while True:
            await self._apply_wake.wait()
            self._apply_wake.clear()
            while self._to_apply:
                try:
                    await self._upkeep.wait_for_room()
                except StorageFull:
                    await asyncio.sleep(_APPLY_RETRY_S)
                    continue
                some, size = [self._to_apply[0]], len(self._to_apply[0].data)
                for entry in islice(self._to_apply, 1, 64):
                    size += len(entry.data)
                    if size > _APPLY_AT_ONCE_BYTES:
                        break
                    some.append(entry)
                self._apply_some(some)
                for entry in some:
                    self._to_apply.popleft()
                    self._to_apply_bytes -= len(entry.data)
                await asyncio.sleep(0)

    def _apply_some(self, entries: Sequence[Entry]) -> None:
        assert self._replication is not None
        for entry in entries:
            waiting = None
            if self._waiting and self._waiting[0].sequence == entry.sequence:
                waiting = self._waiting.popleft()
            op = decode(entry.data) if waiting is None else waiting.entry
            missing = self.state.apply(op, entry.sequence)
            self._upkeep.applied(op)
            if waiting is not None:
                _answer(waiting.done, WriteResult(entry.sequence, missing))
            if isinstance(op, Seal):
                self._replication.rotate()
        self._applied.set()

    def abandon(self, after: int, lost: bool) -> None:
        error: ShoalError
        if lost:
            error = StorageFull(
                "Storage is full: the log could not be extended and nothing was written. Reads go "
                "on; free disk space and send the write again."
            )
        else:
            error = TimedOut(
                f"the primary of shard {self.spec.key.shard} changed while this write was on its "
                "way: it may have happened. Read before sending it again, or send it again if that "
                "does no harm."
            )
        kept = deque(w for w in self._waiting if w.sequence <= after)
        for waiting in self._waiting:
            if waiting.sequence > after:
                _fail(waiting.done, error)
        self._waiting = kept
        self._applied.set()

    def _abandon_all(self, error: ShoalError, *, maybe: bool) -> None:
        error.maybe_applied = maybe
        while self._waiting:
            _fail(self._waiting.popleft().done, error)
        while self._queue:
            _fail(self._queue.popleft().done, error)
        self._applied.set()

    # -- reporting --------------------------------------------------------------------------------
    def info(self) -> ShardInfo:
        if self.stopped is not None:
            return ShardInfo(stopped=self.stopped)
        state = self.state
        indexed = 0
        for segment in state.sealed:
            graphs = sum(1 for vector in segment.vectors.values() if vector.graph is not None)
            share = segment.row_count - segment.dead_count
            indexed += graphs * share
        size = sum(n for s in state.sealed for n, _ in s.record.files.values())
        return ShardInfo(
            points=state.point_count,
            indexed_vectors=indexed,
            vectors=vector_counts(state.snapshot()),
            segments=len(state.sealed) + len(state.frozen) + int(state.growing.row_count > 0),
            pending=self._upkeep.pending_work(),
            applied=state.applied,
            bytes_on_disk=size + self._log.size_on_disk(),
        )


def _answer(done: asyncio.Future[WriteResult], result: WriteResult) -> None:
    if not done.done():  # the caller may have given up
        done.set_result(result)


def _fail(done: asyncio.Future[WriteResult], error: Exception) -> None:
    if not done.done():
        done.set_exception(error)
