"""The upkeep of one shard: what happens to its segments between the writes.

    seal    log entry -> segment files + tombstones, fsynced -> manifest -> install -> trim the log
    merge   log entry -> segment files -> index -> manifest -> install -> delete the inputs
    index   graph file -> manifest -> install
    drop    of a vector: log entry -> manifest without its files -> delete them

Upkeep decides when to seal and merge and proposes it; whoever owns the log makes it an entry, applies
it to the state, and tells (`applied`). What an entry then asks for is done here, on every replica.

At any crash the manifest names whole files, and the log holds everything after its checkpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from shoal import limits, telemetry
from shoal.batch import unpack_bits
from shoal.errors import ShardStopped, ShoalError, StorageFull, Unavailable, must
from shoal.faiss_index import Graph
from shoal.index_api import BuildJob, IndexBuilder, IndexOf
from shoal.settings import StorageSettings
from shoal.storage_api import AlterVectors, ShardSpec
from storage_node.entries import LogEntry, Merge, Seal
from storage_node.faults import fault_point
from storage_node.files import (
    check_space,
    checked_sum,
    storage_errors,
    sync_folder,
    verify_file,
    write_file,
)
from storage_node.growing import GrowingView
from storage_node.lanes import Lanes
from storage_node.log import Log
from storage_node.manifest import Manifest, PendingMerge, SegmentRecord, write_manifest
from storage_node.merging import MergeJob, encode_job, read_answer, write_merged
from storage_node.planner import Pause, SegmentStats, choose_merge, needs_index, seals_in_pause
from storage_node.recovery import Recovered
from storage_node.segment import SealedSegment
from storage_node.segment_writing import write_segment
from storage_node.state import Checkpoint, ShardState, pick_merged
from storage_node.vector_set import changes, columns_of

__all__ = ["Upkeep"]

_log = telemetry.logger("storage")
_T = TypeVar("_T")
_SHORT_PAUSE_S, _LONG_PAUSE_S = 1.0, 5.0  # without writes: see planner.Pause
_POLL_S = 0.5  # how often that is looked at, only while something may be left to do
_MERGE_IN_THREAD_ROWS_MAX = 20_000
_RETRY_S = 2.0  # after a full disk or a failed build; doubled for a build that fails again
_RETRY_S_MAX = 600.0
_LOG_PER_SEAL = 4  # bytes of log to bytes of segment from which a shard seals anyway


class Upkeep:
    """What its owner calls: `open`, then the `loops` as tasks; `applied` after every entry;
    `wait_for_room` and `seal_due` before more are logged; `end`, then `close`.

    spec         what the shard was created with
    propose      put a Seal or Merge in the log; done when it is applied. Raises ShoalError when it is
                 not, or nobody knows: it is proposed again later, if it is still due.
    may_propose  whether this replica decides; the others only do what the log says. Only one that
                 has applied all that is in its log may: segment numbers in there are taken.
    """

    def __init__(
        self,
        folder: Path,
        spec: ShardSpec,
        settings: StorageSettings,
        builder: IndexBuilder | None,
        lanes: Lanes,
        log: Log,
        *,
        propose: Callable[[Seal | Merge], Awaitable[object]],
        may_propose: Callable[[], bool],
    ) -> None:
        self.folder, self._created = folder, spec
        self.state = ShardState(spec)
        self.manifest = Manifest(collection_id=spec.key.collection_id, shard=spec.key.shard)
        self._settings, self._builder, self._lanes, self._log = settings, builder, lanes, log
        self._propose, self._may_propose = propose, may_propose
        self._manifest_lock = asyncio.Lock()  # one change of the manifest at a time
        self._room = asyncio.Event()  # fewer than FROZEN_SEGMENTS_MAX are frozen
        self._seal_due = asyncio.Event()
        self._changed = asyncio.Event()  # segments or indexes may want work
        self._last_write = 0.0
        self._merging = False
        self._settled = False  # nothing to do until something changes: no polling
        self._unverified: list[SegmentRecord] = []
        self._closing = False
        self._jobs: set[asyncio.Future[Any]] = set()
        self._seal_blocked: StorageFull | None = None  # why the oldest frozen segment stays
        self._merge_blocked: StorageFull | None = None
        self._merge_ended = asyncio.Event()  # a merge was installed, or cannot be
        self._build_after: dict[
            tuple[int, str], tuple[float, float]
        ] = {}  # failed: when again, wait

    # -- its owner --------------------------------------------------------------------------------
    def open(self, recovered: Recovered) -> None:
        """Take over what recovery found, and go on with what a crash cut off."""
        self.state, self.manifest = recovered.state, recovered.manifest
        self._unverified = recovered.unverified
        self._room.set()
        if self.state.checkpoints:
            self._seal_due.set()
        self._changed.set()

    @property
    def loops(self) -> tuple[Callable[[], Coroutine[Any, Any, None]], ...]:
        """To be run as tasks from `open` on. One that ends with an error has broken the shard."""
        return self._seal_loop, self._optimise_loop, self._scrub_loop

    def end(self) -> None:
        """Begin nothing more. The tasks of the loops may then be cancelled."""
        self._closing = True

    async def close(self) -> None:
        """Wait for the threads under way: they cannot be cancelled. After the loops ended."""
        await asyncio.gather(*self._jobs, return_exceptions=True)

    def applied(self, entry: LogEntry) -> None:
        """The state has applied it, this moment."""
        match entry:
            case Seal():
                self._seal_due.set()
            case Merge() | AlterVectors():
                self._changed.set()
            case _:
                self._last_write = time.monotonic()
                if self._settled and self._seals_in(Pause.LONG):
                    self._changed.set()

    def role_changed(self) -> None:
        """`may_propose` may answer otherwise from now on."""
        self._changed.set()

    def seal_due(self) -> Seal | None:
        """The entry that must come next, because the growing segment is full. It stays full until
        that is applied: ask again then, or when the entry was given up."""
        growing = self.state.growing
        full = growing.byte_size >= self._settings.seal_bytes
        # Deletes add no rows, but a log that only grows would take ever longer to replay.
        full = full or self._log.appended_bytes >= _LOG_PER_SEAL * self._settings.seal_bytes
        if not full and growing.row_count < limits.SEAL_ROWS_MAX:
            return None
        return Seal(self.state.new_segment_id())

    async def wait_for_room(self) -> None:
        """Waits while too much is frozen; StorageFull when that will not change by itself."""
        while len(self.state.frozen) >= limits.FROZEN_SEGMENTS_MAX:
            if self._seal_blocked is not None:
                raise self._seal_blocked
            self._room.clear()
            await self._room.wait()

    def pending_work(self) -> int:
        """Segments that still wait to be written, merged or indexed; 0 = settled."""
        waiting = len(self.state.frozen) + len(self.state.merges) + int(self._merging)
        waiting += sum(len(self._index_wanted(s)) for s in self.state.sealed)
        waiting += len(self._with_dropped())
        if not self._may_propose():
            return waiting
        waiting += int(self._seals_in(Pause.LONG))
        return waiting + len(choose_merge(self._stats(), Pause.LONG))

    async def _in_files(self, work: Callable[..., _T], *arguments: object) -> _T:
        """Run work in the files lane. `close` waits for it even when the caller was cancelled."""
        job = asyncio.ensure_future(self._lanes.files(work, *arguments))
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        return await asyncio.shield(job)

    # -- sealing ----------------------------------------------------------------------------------
    async def _seal_loop(self) -> None:
        while True:
            await self._seal_due.wait()
            self._seal_due.clear()
            while self.state.checkpoints:
                try:
                    await self._wait_for_merges(self.state.checkpoints[0])
                    await self._seal(self.state.checkpoints[0])
                    self._seal_blocked = None
                except StorageFull as error:
                    _log.warning("seal_waits", why=error.message)
                    self._seal_blocked = error
                    self._room.set()  # who waits for room must hear it
                    await asyncio.sleep(_RETRY_S)

    async def _wait_for_merges(self, checkpoint: Checkpoint) -> None:
        """Only where a replica is a whole merge behind: see `ShardState.may_install`."""
        while not self.state.may_install(checkpoint):
            if self._merge_blocked is not None:
                raise self._merge_blocked
            self._merge_ended.clear()
            await self._merge_ended.wait()

    async def _seal(self, checkpoint: Checkpoint) -> None:
        frozen = checkpoint.frozen
        view, spec = frozen.view(), self.state.spec
        record, rows = await self._in_files(self._write_frozen, checkpoint, view, spec)
        fault_point("seal.after_segment")
        async with self._manifest_lock:
            manifest = await self._in_files(self._checkpointed, checkpoint, record)
            opened = None
            if record is not None:
                folder = self._segment_folder(record.segment_id)
                opened = await self._in_files(SealedSegment, folder, record, self.state.spec)
            await self._in_files(write_manifest, self.folder, manifest)
            self.manifest = manifest
            before = [(segment, segment.record.files) for segment in self.state.sealed]
            records = {record.segment_id: record for record in manifest.segments}
            self.state.install_seal(checkpoint, opened, rows, records)
            for segment, files in before:
                for name in files.keys() - segment.record.files.keys():
                    await self._in_files((segment.folder / name).unlink)
        self._room.set()
        self._changed.set()
        await self._in_files(self._log.trim, checkpoint.sequence)
        await self._in_files(_give_memory_back)
        _log.info("sealed", shard=self.folder, segment=frozen.segment_id, rows=len(rows))

    def _write_frozen(
        self, checkpoint: Checkpoint, view: GrowingView, spec: ShardSpec
    ) -> tuple[SegmentRecord | None, NDArray[np.int64]]:
        fault_point("seal.before_write")
        frozen = checkpoint.frozen
        alive = unpack_bits(checkpoint.live_at[frozen.segment_id], frozen.row_count)
        order = frozen.by_key().astype(np.int64)
        rows = order[alive[order]]
        if len(rows) == 0:
            return None, rows
        folder = self._segment_folder(frozen.segment_id)
        check_space(self.folder, frozen.byte_size)  # seals may use what writes leave
        source = np.zeros(len(rows), np.uint8)
        try:
            files = write_segment(folder, spec, [view], source, rows, columns_of(frozen.spec))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        sync_folder(folder)
        sync_folder(folder.parent)
        return SegmentRecord(segment_id=frozen.segment_id, rows=len(rows), files=files), rows

    def _checkpointed(self, checkpoint: Checkpoint, record: SegmentRecord | None) -> Manifest:
        """The manifest as of the checkpoint; writes the tombstones that changed since the last."""
        records = []
        for segment in self.state.sealed:
            bits = checkpoint.live_at[segment.segment_id]
            current = segment.record
            if not np.array_equal(bits, segment.checkpoint_live):
                current = self._with_tombstones(segment.folder, current, bits)
            records.append(current)
        if record is not None:
            records.append(record)
        merges = [merge for merge in self.state.merges if merge.sequence < checkpoint.sequence]
        return self.manifest.model_copy(
            update={
                "checkpoint": checkpoint.sequence,
                "terms": tuple(t for t in self._log.terms if t[1] <= checkpoint.sequence),
                "next_segment_id": max(
                    self.manifest.next_segment_id, checkpoint.frozen.segment_id + 1
                ),
                "segments": _ascending(records),
                "merges": tuple(merges),
                **changes(self._created, checkpoint.frozen.spec),
            }
        )

    def _with_tombstones(
        self, folder: Path, record: SegmentRecord, live: NDArray[np.uint8]
    ) -> SegmentRecord:
        dead = ~unpack_bits(live, record.rows)
        # Rows only ever die: their number says which they are, on every replica the same.
        name = f"tombstones.{int(dead.sum())}"
        wanted = {
            tombstones
            for merge in self.state.merges
            for segment, tombstones in zip(merge.inputs, merge.tombstones or (), strict=False)
            if segment == record.segment_id
        }
        files = {
            file: total
            for file, total in record.files.items()
            if file != record.tombstones or file in wanted
        }
        files[name] = write_file(folder / name, [np.packbits(dead, bitorder="little")])
        sync_folder(folder)
        return record.model_copy(update={"files": files, "tombstones": name})

    # -- merging and indexing ---------------------------------------------------------------------
    async def _optimise_loop(self) -> None:
        # asyncio.wait_for may swallow a cancellation (Python 3.11): `close` must not rest on it.
        while not self._closing:
            self._settled = self.pending_work() == 0
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if self._settled else _POLL_S):
                    await self._changed.wait()
            self._changed.clear()
            try:
                while not self._closing and await self._optimise_once():
                    pass
            except ShardStopped:
                raise
            except ShoalError as error:
                _log.warning("optimise_waits", why=error.message)
                if isinstance(error, StorageFull) and self.state.merges:
                    self._merge_blocked = error
                    self._merge_ended.set()  # a seal that waits for it must hear it
                await asyncio.sleep(_RETRY_S)

    async def _optimise_once(self) -> bool:
        """Do the next merge or index; False when there is nothing to do now."""
        if await self._delete_dropped():  # first: it may be what a merge has no room for
            return True
        if self.state.merges:
            if self.state.merges[0].tombstones is None:
                return False  # the seal loop goes on from here
            await self._merge(self.state.merges[0])
            return True
        pause = self._pause()
        if self._may_propose():
            inputs = choose_merge(self._stats(), pause)
            if inputs:
                rows = sum(self.state.segment(i).row_count for i in inputs)
                _log.info("merging", shard=self.folder, segments=len(inputs), rows=rows)
                await self._propose(Merge(inputs, self.state.new_segment_id()))
                return True
            if self._seals_in(pause):
                await self._propose(Seal(self.state.new_segment_id()))
                return False  # the seal loop goes on from here
        for segment in self.state.sealed if pause else ():
            for name in self._buildable(segment):
                await self._index(segment, name)
                return True
        return False

    def _pause(self) -> Pause:
        passed = time.monotonic() - self._last_write
        if passed < _SHORT_PAUSE_S or self.state.frozen:
            return Pause.NONE
        return Pause.SHORT if passed < _LONG_PAUSE_S else Pause.LONG

    def _seals_in(self, pause: Pause) -> bool:
        if self._builder is None or self.state.frozen or pause is Pause.NONE:
            return False
        dims = [v.dim for v in self.state.spec.dense.values() if not v.multi]
        if seals_in_pause(self.state.growing.row_count, dims, pause):
            return True
        # Rows that died since the checkpoint: only a seal lets a merge clear them away.
        return any((s.dead_count - s.checkpoint_dead) * 3 > s.row_count for s in self.state.sealed)

    def _stats(self) -> list[SegmentStats]:
        # As of the checkpoint, because that is what a merge leaves out: a row that died since stays
        # until the next seal, and counting it here would rewrite the same segment again and again.
        return [
            SegmentStats(s.segment_id, s.row_count, s.row_count - s.checkpoint_dead)
            for s in self.state.sealed
        ]

    def _index_wanted(self, segment: SealedSegment) -> list[str]:
        if self._builder is None:
            return []
        return [
            name
            for name, vector in self.state.spec.dense.items()
            if name in segment.vectors
            and segment.graph(name) is None
            and needs_index(segment.vector_count(name), vector)
        ]

    def _buildable(self, segment: SealedSegment) -> list[str]:
        """Of the wanted indexes those that did not fail a moment ago."""
        now = time.monotonic()
        never = (0.0, 0.0)
        return [
            name
            for name in self._index_wanted(segment)
            if self._build_after.get((segment.segment_id, name), never)[0] <= now
        ]

    async def _merge(self, merge: PendingMerge) -> None:
        self._merging = True
        inputs = [self.state.segment(i) for i in merge.inputs]
        named = False  # the output may stand in the manifest: never delete it then
        try:
            size = sum(n for s in inputs for n, _ in s.record.files.values())
            await self._in_files(
                check_space, self.folder, size + self._settings.disk_free_bytes_min
            )
            output, source, rows = await self._write_merged(merge)
            fault_point("merge.after_segment")
            if output is not None:
                for name in output.vectors:
                    output.follow(self.state.spec)  # a vector may be dropped meanwhile
                    # Without an index rather than not at all: `_index` will try again.
                    with contextlib.suppress(Unavailable):
                        if name in self._index_wanted(output):
                            output.record = await self._build(output, name)
            async with self._manifest_lock:
                manifest = await self._in_files(self._merged, merge, output, source, rows)
                named = True
                await self._in_files(write_manifest, self.folder, manifest)
                self.manifest = manifest
                if output is not None:
                    records = {record.segment_id: record for record in manifest.segments}
                    output.record = records[merge.output]
                self.state.install_merge(merge, output, source, rows)
            self._merge_blocked = None
            self._merge_ended.set()
            fault_point("merge.after_install")
            for segment in inputs:  # readers that still map these files keep them alive
                await self._in_files(shutil.rmtree, segment.folder)
        finally:
            self._merging = False
            if not named:  # a try that failed must not keep the space that may have failed it
                shutil.rmtree(self._segment_folder(merge.output), ignore_errors=True)
        await self._in_files(_give_memory_back)
        self._changed.set()

    async def _write_merged(
        self, merge: PendingMerge
    ) -> tuple[SealedSegment | None, NDArray[np.uint16], NDArray[np.int64]]:
        """Small merges run in a thread, large ones in a child process: starting one costs half a
        second of CPU, and a thread would share this interpreter for seconds."""
        must(merge.tombstones is not None, "a merge that does not know yet what to leave out")
        assert merge.tombstones is not None
        records = tuple(
            self.state.segment(segment).record.model_copy(update={"tombstones": tombstones})
            for segment, tombstones in zip(merge.inputs, merge.tombstones, strict=True)
        )
        must(merge.columns is not None, "a merge that does not know its vectors")
        assert merge.columns is not None
        job = MergeJob(
            self.folder / "segments", self.state.spec, records, merge.output, merge.columns
        )
        if sum(record.rows for record in records) <= _MERGE_IN_THREAD_ROWS_MAX:
            merged = await self._in_files(write_merged, job)
        else:
            answer = await self._lanes.children.run("storage_node.merging", encode_job(job))
            merged = await self._in_files(read_answer, job, answer)
        if merged.record is None:
            return None, merged.source, merged.rows
        folder = self._segment_folder(merge.output)
        opened = await self._in_files(SealedSegment, folder, merged.record, job.spec)
        return opened, merged.source, merged.rows

    def _merged(
        self,
        merge: PendingMerge,
        output: SealedSegment | None,
        source: NDArray[np.uint16],
        rows: NDArray[np.int64],
    ) -> Manifest:
        records = [s.record for s in self.state.sealed if s.segment_id not in merge.inputs]
        if output is not None:
            inputs = [self.state.segment(i) for i in merge.inputs]
            live = pick_merged([s.checkpoint_live for s in inputs], source, rows)
            record = output.record
            if int(np.bitwise_count(live).sum()) < record.rows:
                record = self._with_tombstones(output.folder, record, live)
            records.append(record)
        merges = [pending for pending in self.manifest.merges if pending.output != merge.output]
        return self.manifest.model_copy(
            update={
                "next_segment_id": max(self.manifest.next_segment_id, merge.output + 1),
                "segments": _ascending(records),
                "merges": tuple(merges),
            }
        )

    async def _build(self, segment: SealedSegment, name: str) -> SegmentRecord:
        """Build the graph of one vector beside its segment; returns the record that names it."""
        assert self._builder is not None
        vector, flat = self.state.spec.dense[name], segment.vectors[name].flat
        must(flat is not None, "an index of vectors that are gone")
        path = segment.folder / segment.index_file(name)
        temporary = path.with_name(path.name + ".new")
        job = BuildJob(
            vectors=segment.vectors_file(name),
            count=segment.vector_count(name),
            dim=vector.dim,
            distance=vector.distance,
            m=vector.hnsw_m,
            ef_construct=vector.hnsw_ef_construct,
            output=temporary,
            threads=self._settings.index_threads,
            of=IndexOf(self._created.key, segment.segment_id, segment.index_file(name)),
        )
        key = (segment.segment_id, name)
        try:
            graph_bytes = job.count * (8 * vector.hnsw_m + 24)
            await self._in_files(
                check_space, self.folder, graph_bytes + self._settings.disk_free_bytes_min
            )
            async with self._lanes.build:
                with storage_errors(temporary):
                    await self._builder.build(job)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            # Whatever the builder, or the metadata store behind it, has to say: later once more.
            if isinstance(error, ShoalError) and not isinstance(error, StorageFull | ShardStopped):
                wait = min(2 * self._build_after.get(key, (0.0, _RETRY_S / 2))[1], _RETRY_S_MAX)
                self._build_after[key] = (time.monotonic() + wait, wait)
                _log.error("index_failed", segment=segment.folder, why=error.message, retry_s=wait)
                raise Unavailable(error.message) from error
            raise
        self._build_after.pop(key, None)

        def publish() -> tuple[int, int]:
            with storage_errors(path):
                os.replace(temporary, path)
                sync_folder(segment.folder)
            return checked_sum(path)

        total = await self._in_files(publish)
        segment.set_graph(name, await self._in_files(Graph, path, flat))
        files = {**segment.record.files, path.name: total}
        indexes = tuple(dict.fromkeys((*segment.record.indexes, name)))
        return segment.record.model_copy(update={"files": files, "indexes": indexes})

    async def _index(self, segment: SealedSegment, name: str) -> None:
        """Build the index of a live segment and publish it."""
        built = await self._build(segment, name)
        async with self._manifest_lock:
            # The record may have got new tombstones while the graph was being built.
            path = segment.index_file(name)
            record = segment.record.model_copy(
                update={
                    "files": {**segment.record.files, path: built.files[path]},
                    "indexes": built.indexes,
                }
            )
            segment.record = record
            records = tuple(
                record if r.segment_id == record.segment_id else r for r in self.manifest.segments
            )
            manifest = self.manifest.model_copy(update={"segments": records})
            await self._in_files(write_manifest, self.folder, manifest)
            self.manifest = manifest
        fault_point("index.after_publish")
        self._changed.set()

    async def _delete_dropped(self) -> bool:
        """Give back the space of vectors that were dropped."""
        async with self._manifest_lock:
            found = self._with_dropped()
            if not found:
                return False
            records = {segment.segment_id: segment.without(files) for segment, files in found}
            kept = tuple(records.get(r.segment_id, r) for r in self.manifest.segments)
            manifest = self.manifest.model_copy(update={"segments": kept})
            await self._in_files(write_manifest, self.folder, manifest)
            self.manifest = manifest
            for segment, _ in found:
                segment.record = records[segment.segment_id]
        fault_point("drop.after_manifest")
        for segment, files in found:
            for file in files:
                await self._in_files((segment.folder / file).unlink, True)
        _log.info("vectors_deleted", shard=self.folder, files=sum(len(files) for _, files in found))
        return True

    def _with_dropped(self) -> list[tuple[SealedSegment, list[str]]]:
        """The segments with files of vectors that were dropped, and those files."""
        applied = self.state.applied
        return [(s, files) for s in self.state.sealed if (files := s.unused_files(applied))]

    # -- checking --------------------------------------------------------------------------------------
    async def _scrub_loop(self) -> None:
        """Check what was too much to check before the shard was ready."""
        for record in self._unverified:
            folder = self._segment_folder(record.segment_id)
            for name, expected in record.files.items():
                try:
                    await self._in_files(verify_file, folder / name, expected)
                except (ShardStopped, OSError) as error:
                    here = [s for s in self.state.sealed if s.segment_id == record.segment_id]
                    if not here or name not in here[0].record.files:
                        continue  # a merge or newer tombstones replaced it meanwhile
                    if not name.startswith("index."):
                        raise
                    _log.error("index_damaged", why=str(error))
                    here[0].drop_graph(name)
                    self._changed.set()

    def _segment_folder(self, segment_id: int) -> Path:
        return self.folder / "segments" / str(segment_id)


def _ascending(records: list[SegmentRecord]) -> tuple[SegmentRecord, ...]:
    return tuple(sorted(records, key=lambda record: record.segment_id))


def _give_memory_back() -> None:
    """What a frozen segment held goes back to the system: glibc keeps it otherwise (measured: 247 MB
    where 71 are used). Elsewhere there is no such call, and no such need."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
