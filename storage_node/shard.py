"""One shard: the driver around `ShardState`. It opens, takes writes, and closes.

    write   resolve -> log append + fsync (with all waiting writes: one group) -> apply -> answer

What happens to the segments in between is storage_node/upkeep.py.

State changes and reads that are expected to be short run on the event loop, so they need no locks;
everything that waits for a disk, and long searches, run in threads on snapshots or on frozen data.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shoal import limits, telemetry
from shoal.errors import Busy, ShardStopped, ShoalError, StorageFull, Unavailable
from shoal.index_api import IndexBuilder
from shoal.settings import StorageSettings
from shoal.storage_api import (
    ShardInfo,
    ShardSpec,
    Write,
    WriteResult,
)
from storage_node.entries import LogEntry, Merge, Seal, byte_size, encode, is_empty
from storage_node.files import check_space
from storage_node.lanes import Lanes
from storage_node.log import Log
from storage_node.recovery import recover
from storage_node.state import ShardState
from storage_node.upkeep import Upkeep

__all__ = ["Shard"]

_log = telemetry.logger("storage")


@dataclass(slots=True)
class _Pending:
    op: LogEntry
    size: int
    done: asyncio.Future[WriteResult]


class Shard:
    def __init__(
        self,
        folder: Path,
        spec: ShardSpec,
        settings: StorageSettings,
        builder: IndexBuilder | None,
        lanes: Lanes,
    ) -> None:
        self.folder, self.spec = folder, spec
        self.stopped: str | None = None
        self.state = ShardState(spec)
        self._settings, self._lanes = settings, lanes
        self._log = Log(folder / "log")
        self._upkeep = Upkeep(
            folder,
            spec,
            settings,
            builder,
            lanes,
            self._log,
            propose=lambda entry: self._enqueue(entry, 0),
            may_propose=lambda: True,
        )
        self._queue: deque[_Pending] = deque()
        self._queued_bytes = 0
        self._wake = asyncio.Event()  # the queue has something
        self._closing = False
        self._tasks: list[asyncio.Task[None]] = []
        self.stop_error: BaseException | None = None

    # -- opening and closing ----------------------------------------------------------------------
    async def open(self, *, new: bool) -> None:
        """Recover from disk. Damage stops this shard (`stopped` says why) and nothing else. new:
        there may be nothing yet."""
        try:
            limit = self._settings.verify_on_open_bytes_max
            recovered = await self._lanes.files(
                lambda: recover(self.folder, self.spec, self._log, limit, new=new)
            )
        except Exception as error:  # a damaged file can make anything fail
            known = isinstance(error, ShoalError | OSError)
            self._stop(f"{error}" if known else f"{type(error).__name__}: {error}", error)
            return
        self.state = recovered.state
        self._upkeep.open(recovered)
        for loop in (self._commit_loop, *self._upkeep.loops):
            self._tasks.append(asyncio.create_task(self._guard(loop)))

    async def close(self) -> None:
        """Finish the writes that were accepted; stop the background work where it is."""
        self._closing = True
        self._upkeep.end()
        self._wake.set()
        if self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await self._tasks[0]
        for task in self._tasks[1:]:
            task.cancel()
        await asyncio.gather(*self._tasks[1:], return_exceptions=True)
        await self._upkeep.close()
        self._log.close()

    async def _guard(self, loop: Callable[[], object]) -> None:
        """A background loop that ends with an error stops the shard: never on in silence."""
        try:
            await loop()  # type: ignore[misc]
        except Exception as error:
            self._stop(f"{type(error).__name__}: {error}", error)
            for task in self._tasks:  # whatever the others would do next rests on what broke
                if task is not asyncio.current_task():
                    task.cancel()

    def _stop(self, why: str, error: BaseException | None = None) -> None:
        name = f"collection {self.spec.collection!r}, shard {self.spec.key.shard}"
        self.stopped = f"{name} stopped: {why}"
        self.stop_error = error
        _log.error("shard_stopped", error=error, why=self.stopped)
        while self._queue:
            pending = self._queue.popleft()
            if not pending.done.done():
                pending.done.set_exception(ShardStopped(self.stopped))

    def check_serving(self) -> None:
        if self.stopped is not None:
            raise ShardStopped(self.stopped)

    # -- writing ----------------------------------------------------------------------------------
    async def write(self, op: Write) -> WriteResult:
        """Durable and visible when it returns."""
        self.check_serving()
        if self._closing:
            raise Unavailable("the server is shutting down; nothing was written")
        size = byte_size(op)
        too_many = len(self._queue) >= limits.LOG_QUEUE_ENTRIES_MAX
        if too_many or self._queued_bytes + size > limits.LOG_QUEUE_BYTES_MAX:
            raise Busy(
                f"{len(self._queue)} writes ({self._queued_bytes >> 20} MiB) wait for the disk; "
                "nothing was written. Send again later, or fewer at once."
            )
        return await self._enqueue(op, size)

    def _enqueue(self, op: LogEntry, size: int) -> asyncio.Future[WriteResult]:
        pending = _Pending(op, size, asyncio.get_running_loop().create_future())
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
                    await self._commit(group)
                except BaseException as error:
                    for pending in group:  # those answered already stay answered
                        _fail(pending, ShardStopped(f"the shard stopped: {error}"))
                    raise
                await self._seal_if_full()
            if self._closing:
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

    async def _commit(self, group: list[_Pending]) -> None:
        accepted: list[tuple[_Pending, LogEntry]] = []
        for pending in group:
            op = pending.op
            try:
                parts = [op] if isinstance(op, Seal | Merge) else self.state.resolve(op)
            except ShoalError as error:
                _fail(pending, error)
                continue
            entries = [entry for entry in parts if not is_empty(entry)]
            if not entries:
                _answer(pending, WriteResult(self.state.applied))
            elif len(entries) == 1:
                accepted.append((pending, entries[0]))
            else:
                await self._commit_parts(pending, entries)
        if not accepted:
            return
        try:
            first = await self._log_entries([entry for _, entry in accepted])
        except StorageFull as error:
            for pending, _ in accepted:
                _fail(pending, error)
            return
        for position, (pending, entry) in enumerate(accepted):
            missing = self._apply(entry, first + position)
            _answer(pending, WriteResult(first + position, missing))
        if isinstance(accepted[-1][1], Seal):
            await self._begin_log_file()

    async def _commit_parts(self, pending: _Pending, entries: list[LogEntry]) -> None:
        """A write of many points, an entry at a time: reads go on in between."""
        missing: int | None = None
        for position, entry in enumerate(entries):
            try:
                sequence = await self._log_entries([entry])
            except StorageFull as error:
                done = (
                    f" {position} of {len(entries)} parts of this write were done: send it again."
                )
                _fail(pending, StorageFull(error.message + done))
                return
            missed = self._apply(entry, sequence)
            missing = missed if missing is None else missing
            await self._seal_if_full()
        _answer(pending, WriteResult(self.state.applied, missing))

    async def _log_entries(self, entries: list[LogEntry]) -> int:
        """Durable when it returns, or StorageFull."""
        await self._upkeep.wait_for_room()
        return await self._lanes.log(self._append, entries)

    def _append(self, entries: list[LogEntry]) -> int:
        check_space(self.folder, self._settings.disk_free_bytes_min)
        return self._log.append([encode(entry) for entry in entries], self._upkeep.manifest.term)

    def _apply(self, entry: LogEntry, sequence: int) -> int | None:
        missing = self.state.apply(entry, sequence)
        self._upkeep.applied(entry)
        return missing

    async def _seal_if_full(self) -> None:
        seal = self._upkeep.seal_due()
        if seal is None:
            return
        with contextlib.suppress(StorageFull):  # stays growing; the next write finds it full again
            self._apply(seal, await self._lanes.log(self._append, [seal]))
            await self._begin_log_file()

    async def _begin_log_file(self) -> None:
        """A segment was frozen: the next entries go to a file that will outlive it."""
        with contextlib.suppress(StorageFull):  # the old file goes on; it is trimmed a seal later
            await self._lanes.log(self._log.rotate)

    # -- reporting --------------------------------------------------------------------------------
    def info(self) -> ShardInfo:
        if self.stopped is not None:
            return ShardInfo(stopped=self.stopped)
        state = self.state
        indexed = 0
        for segment in state.sealed:
            graphs = sum(1 for name in self.spec.dense if segment.graph(name) is not None)
            share = segment.row_count - segment.dead_count
            indexed += graphs * share
        size = sum(n for s in state.sealed for n, _ in s.record.files.values())
        return ShardInfo(
            points=state.point_count,
            indexed_vectors=indexed,
            segments=len(state.sealed) + len(state.frozen) + int(state.growing.row_count > 0),
            pending=self._upkeep.pending_work(),
            applied=state.applied,
            bytes_on_disk=size + self._log.size_on_disk(),
        )


def _answer(pending: _Pending, result: WriteResult) -> None:
    if not pending.done.done():  # the caller may have given up
        pending.done.set_result(result)


def _fail(pending: _Pending, error: Exception) -> None:
    if not pending.done.done():
        pending.done.set_exception(error)
