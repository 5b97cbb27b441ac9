"""Runs one `Replica`: feeds it what happens, and carries out what it decides.

    Persist, Cut  one after the other in a thread of the log lane; what waits together is one fsync
    Send          to the node's bus; lost messages are the replica's business
    Commit        to the shard, which applies
    Propose       compare-and-swap in the metadata store, until its outcome is known
    ReadTail      from the log's files, in a thread

Everything here runs on the event loop; `step` never waits.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, assert_never

from shoal import limits, telemetry
from shoal.errors import InvariantError, ShoalError, StorageFull
from storage_node.lanes import Lanes
from storage_node.log import EntriesGone, Log
from storage_node.replica import (
    APPEND_BYTES_MAX,
    Abandon,
    Commit,
    Config,
    Configured,
    Cut,
    Departing,
    Entry,
    Event,
    FetchFiles,
    Message,
    Persist,
    Persisted,
    PersistFailed,
    Propose,
    ReadTail,
    Received,
    Replica,
    Send,
    Settled,
    Submit,
    TailRead,
    Tick,
)

__all__ = ["Replication", "ReplicationOwner"]

_log = telemetry.logger("storage")
_RETRY_S = 0.5  # of a change of the record while the metadata store does not answer


class ReplicationOwner(Protocol):
    """The shard, as its replication sees it. None of these may wait."""

    def commit(self, entries: Sequence[Entry]) -> None: ...
    def abandon(self, after: int, lost: bool) -> None: ...
    def send(self, to: str, message: Message) -> None: ...
    def fetch_files(self, source: str) -> None: ...
    def broke(self, error: Exception) -> None:
        """Nothing is carried out any more: the shard must stop."""
        ...


class _ClosedWithoutSpace(Exception):
    """The shard closes while a cut waits for space."""


@dataclass(frozen=True, slots=True)
class _Rotate:
    """Begin a new log file, so that the ones before can be trimmed."""


class Replication:
    """propose  changes the shard's record from config.revision; returns the record as it is then,
    whether that succeeded or not. Raises ShoalError when the store does not answer.
    """

    def __init__(
        self,
        replica: Replica,
        log: Log,
        lanes: Lanes,
        owner: ReplicationOwner,
        propose: Callable[[Config], Awaitable[Config]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.replica = replica
        self._log, self._lanes, self._owner, self._propose = log, lanes, owner, propose
        self._clock = clock
        self._disk: deque[Persist | Cut | _Rotate] = deque()
        self._disk_wake = asyncio.Event()
        self._moved = asyncio.Event()  # something of the replica changed
        self._closing = False
        self._broken = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._proposing: asyncio.Task[None] | None = None

    # -- questions --------------------------------------------------------------------------------
    def refusal(self) -> str | None:
        return self.replica.refusal(self._clock())

    @property
    def is_primary(self) -> bool:
        return self.replica.is_primary

    @property
    def lease_held(self) -> bool:
        """Whether a read at this moment sees every acknowledged write."""
        return self._clock() < self.replica.strong_until

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return when the condition, about the replica, holds."""
        while not condition():
            self._moved.clear()
            await self._moved.wait()

    # -- events -----------------------------------------------------------------------------------
    def configure(self, config: Config) -> None:
        self._step(Configured(config))

    def receive(self, sender: str, message: Message) -> None:
        self._step(Received(sender, message))

    def departing(self, nodes: frozenset[str]) -> None:
        self._step(Departing(nodes))

    def tick(self) -> None:
        self._step(Tick())

    def submit(self, data: tuple[bytes, ...]) -> int:
        """Sequence number of the first. Only while `refusal` is None."""
        first = self.replica.last + 1
        self._step(Submit(data))
        return first

    def rotate(self) -> None:
        self._disk.append(_Rotate())
        self._disk_wake.set()

    def _step(self, event: Event) -> None:
        if self._broken:
            return
        try:
            for effect in self.replica.step(event, self._clock()):
                self._carry_out(effect)
        except Exception as error:
            self._broken = True
            self._owner.broke(error)
        self._moved.set()

    def _carry_out(self, effect: Any) -> None:
        match effect:
            case Persist() | Cut():
                self._disk.append(effect)
                self._disk_wake.set()
            case Commit(entries):
                self._owner.commit(entries)
            case Send(to, message):
                self._owner.send(to, message)
            case Abandon(after, lost):
                self._owner.abandon(after, lost)
            case Propose(config):
                self._begin_proposal(config)
            case ReadTail(to, first):
                self._spawn(self._read_tail(to, first))
            case FetchFiles(source):
                self._owner.fetch_files(source)
            case _:
                raise InvariantError(f"an effect that nobody carries out: {effect}")

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._broken = True
            self._owner.broke(error)

    # -- the disk ---------------------------------------------------------------------------------
    async def run(self) -> None:
        """The disk's work, until `close`. Ends with an error when the log breaks."""
        while True:
            await self._disk_wake.wait()
            self._disk_wake.clear()
            while self._disk:
                try:
                    await self._next_on_disk()
                except _ClosedWithoutSpace:
                    return
            if self._closing:
                return

    async def _next_on_disk(self) -> None:
        work = self._disk.popleft()
        match work:
            case _Rotate():
                try:
                    await self._lanes.log(self._log.rotate)
                except StorageFull as error:  # the old file goes on; it is trimmed a seal later
                    _log.warning("log_not_rotated", why=error.message)
                return
            case Cut(ticket, after):
                await self._cut(after)
            case Persist():
                ticket, entries = self._gathered(work)
                try:
                    await self._lanes.log(self._append, entries)
                except StorageFull as error:
                    _log.warning("log_full", why=error.message)
                    self._disk = deque(w for w in self._disk if isinstance(w, _Rotate))
                    self._step(PersistFailed(work.ticket))
                    return
            case _:
                assert_never(work)
        self._step(Persisted(ticket))

    async def _cut(self, after: int) -> None:
        """A cut writes a file anew, so it takes space, and nothing can go on before it is done."""
        while True:
            try:
                await self._lanes.log(self._log.cut, after)
                return
            except StorageFull as error:
                _log.warning("log_not_cut", why=error.message)
            if self._closing:
                raise _ClosedWithoutSpace  # the next start finds the entries, as after a crash
            await asyncio.sleep(_RETRY_S)

    def _gathered(self, first: Persist) -> tuple[int, list[Entry]]:
        """The Persists of one term that wait one after the other, as one; the ticket of the last.
        What fails for want of space must leave nothing on the disk, hence one term: one write."""
        entries, ticket = list(first.entries), first.ticket
        size = sum(len(entry.data) for entry in entries)
        while self._disk and isinstance(following := self._disk[0], Persist):
            if following.entries[0].term != entries[-1].term:
                break
            size += sum(len(entry.data) for entry in following.entries)
            if size > limits.LOG_GROUP_BYTES_MAX:
                break
            self._disk.popleft()
            ticket = following.ticket
            entries += following.entries
        return ticket, entries

    def _append(self, entries: list[Entry]) -> None:
        """One group, and one fsync, for each run of entries of one term: nearly always one."""
        start = 0
        for end in range(1, len(entries) + 1):
            if end == len(entries) or entries[end].term != entries[start].term:
                data = [entry.data for entry in entries[start:end]]
                self._log.append(data, entries[start].term, entries[start].sequence)
                start = end

    async def _read_tail(self, to: str, first: int) -> None:
        try:
            groups = await self._lanes.files(self._log.read, first, APPEND_BYTES_MAX)
        except EntriesGone:
            self._step(TailRead(to, first, None))
            return
        entries = tuple(
            Entry(group.first + i, group.term, data)
            for group in groups
            for i, data in enumerate(group.entries)
        )
        self._step(TailRead(to, first, entries))

    # -- the record -------------------------------------------------------------------------------
    def _begin_proposal(self, config: Config) -> None:
        """A proposal of an earlier term may still be under way; its outcome is in the record that
        the new one meets."""
        earlier = self._proposing
        self._proposing = self._spawn(self._settle(config, earlier))

    async def _settle(self, config: Config, earlier: asyncio.Task[None] | None) -> None:
        if earlier is not None:
            await asyncio.wait([earlier])
        while True:
            try:
                record = await self._propose(config)
            except ShoalError as error:
                _log.warning("record_not_changed", why=error.message)
                await asyncio.sleep(_RETRY_S)
                continue
            self._step(Settled(record))
            return

    async def close(self) -> None:
        """Let the disk's work run to its end; drop the rest. `run` ends by itself."""
        self._closing = True
        self._disk_wake.set()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
