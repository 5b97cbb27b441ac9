"""One shard as a deterministic state machine over its log.

`resolve` turns a write that asks a question into an entry that holds its effect; `apply` applies an
entry. Neither touches disk, clock or network (sealed segments are memory maps). The same entries in
the same order give the same rows in the same segments.

A key lives in at most one segment. An update kills the old row and appends a new one.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from shoal import limits
from shoal.batch import DenseBlock, MultiBlock, PointBatch, pack_bits, unpack_bits
from shoal.errors import BadRequest, BodyTooLarge, must
from shoal.ids import PointIds
from shoal.payload import delete_keys, merge_payload
from shoal.storage_api import (
    AlterVectors,
    ClearPayload,
    Delete,
    DeletePayload,
    DeleteVectors,
    OverwritePayload,
    Selector,
    SetPayload,
    ShardSpec,
    UpdateMode,
    UpdateVectors,
    Upsert,
    Write,
)
from storage_node.entries import LogEntry, Merge, Seal
from storage_node.filtering import matches
from storage_node.growing import GrowingSegment
from storage_node.manifest import PendingMerge, SegmentRecord
from storage_node.searching import Snapshot, SnapshotUnit, matching_ids, take_rows
from storage_node.segment import SealedSegment, concat
from storage_node.vector_set import altered, columns_of, resolve_alter

__all__ = ["Checkpoint", "ShardState"]

Bits = NDArray[np.uint8]
_CHANGED_AT_ONCE = 64  # points that a change of payloads copies at once
_ENTRY_IDS_MAX = 1_000  # points that one log entry of a change names: what the loop does at once


@dataclass(slots=True)
class Checkpoint:
    """The shard as of a Seal entry, to be written to disk while the shard goes on.

    live_at: segment id -> packed bitmap of the rows alive at `sequence`, for every segment there was.
    """

    sequence: int
    frozen: GrowingSegment
    live_at: dict[int, Bits]


class ShardState:
    def __init__(self, spec: ShardSpec, next_segment_id: int = 1, applied: int = 0) -> None:
        self.spec = spec
        self.applied = applied
        self.next_segment_id = next_segment_id
        self.sealed: list[SealedSegment] = []
        self.frozen: list[GrowingSegment] = []  # sealed in the log, not yet on disk; oldest first
        self.checkpoints: list[Checkpoint] = []  # one for each of `frozen`
        self.merges: list[PendingMerge] = []  # in the order of the log, which is theirs
        self.growing = GrowingSegment(0, spec)
        self._locks: dict[int, threading.Lock] = {}

    # -- reading ----------------------------------------------------------------------------------
    def snapshot(self) -> Snapshot:
        """What a read sees: fixed segments, row counts and live rows."""
        units = [
            SnapshotUnit(s, s.row_count, s.live.copy() if s.dead_count else None)
            for s in self.sealed
        ]
        for growing in (*self.frozen, self.growing):
            if growing.row_count == 0:
                continue
            view = growing.view()
            lock = self._locks.setdefault(id(growing), threading.Lock())
            live = view.live if growing.dead_count else None
            units.append(SnapshotUnit(view, view.row_count, live, lock))
        return Snapshot(self.spec, units)

    @property
    def point_count(self) -> int:
        return self._alive(self.sealed) + self._alive((*self.frozen, self.growing))

    @staticmethod
    def _alive(segments: Sequence[SealedSegment | GrowingSegment]) -> int:
        return sum(s.row_count - s.dead_count for s in segments)

    def locate(self, ids: PointIds) -> list[tuple[int, int] | None]:
        """(unit number in `snapshot()`, row) of each id; None = no such point."""
        places: list[tuple[int, int] | None] = [None] * len(ids)
        number = 0
        for segment in self.sealed:
            _note(places, number, segment.find(ids))
            number += 1
        keys = ids.keys()
        for growing in (*self.frozen, self.growing):
            if growing.row_count:
                _note(places, number, growing.find(keys))
                number += 1
        return places

    def current(
        self, ids: PointIds, payload: bool = True, vectors: bool | tuple[str, ...] = True
    ) -> tuple[PointBatch, NDArray[np.int64], int | None]:
        """The points of these ids that exist, in order; which of `ids` they are (positions); and
        the first id that does not exist, as a key."""
        places = self.locate(ids)
        found = [i for i, place in enumerate(places) if place is not None]
        missing = None
        if len(found) < len(places):
            missing = ids.key(next(i for i, place in enumerate(places) if place is None))
        rows = [place for place in places if place is not None]
        points = take_rows(self.snapshot(), rows, payload, vectors)
        return points, np.array(found, np.int64), missing

    # -- questions to effects ---------------------------------------------------------------------
    @staticmethod
    def asks(op: Write) -> bool:
        """Whether `resolve` must see every earlier write applied, or makes several entries."""
        match op:
            case Upsert():
                return op.update_filter is not None or op.mode is not UpdateMode.UPSERT
            case UpdateVectors():
                return op.update_filter is not None or op.if_versions is not None
            case AlterVectors():
                return True
            case _:
                return op.where.ids is None or len(op.where.ids) > _ENTRY_IDS_MAX

    def resolve(self, op: Write) -> list[Write]:
        """The same write as effects: no filter, no mode, and in parts when it changes many points."""
        match op:
            case Upsert():
                return [self._resolve_upsert(op)]
            case UpdateVectors():
                return [self._resolve_update_vectors(op)]
            case AlterVectors():
                return [resolve_alter(self.spec, op)]
            case _:
                ids = op.where.ids
                if ids is None:
                    assert op.where.filter is not None
                    ids = PointIds.from_keys(matching_ids(self.snapshot(), op.where.filter))
                each = op.payload if isinstance(op, SetPayload | OverwritePayload) else b""
                if len(ids) * len(each) > limits.CHANGE_BYTES_MAX:
                    raise BodyTooLarge(
                        f"Wrong input: this payload of {len(each) >> 10} KiB would be stored in "
                        f"{len(ids)} points, more than {limits.CHANGE_BYTES_MAX >> 20} MiB in all; "
                        "select fewer points at once"
                    )
                return [replace(op, where=Selector(ids=part)) for part in self._parts(ids, each)]

    def _parts(self, ids: PointIds, payload: bytes) -> list[PointIds]:
        """So many ids to an entry that neither the loop nor memory is held for long."""
        floats = sum(vector.dim for vector in self.spec.dense.values())
        at_once = limits.LOG_GROUP_BYTES_MAX // (len(payload) + 4 * floats + 64)
        at_once = max(1, min(at_once, _ENTRY_IDS_MAX))
        starts = range(0, len(ids), at_once)
        return [ids.take(np.arange(s, min(s + at_once, len(ids)))) for s in starts]

    def _resolve_upsert(self, op: Upsert) -> Upsert:
        if not self.asks(op):
            return op
        keys = op.points.ids.keys()
        places = self.locate(op.points.ids)
        snapshot = self.snapshot()
        chosen: dict[int, int] = {}  # key -> the row that stands after this batch
        for row, key in enumerate(keys):
            place = places[row]
            exists = key in chosen or place is not None
            if exists and op.mode is UpdateMode.INSERT_ONLY:
                continue
            if not exists and op.mode is UpdateMode.UPDATE_ONLY:
                continue
            if exists and op.update_filter is not None:
                if key in chosen:
                    point, at = op.points, chosen[key]
                else:
                    assert place is not None
                    point, at = take_rows(snapshot, [place], True, True), 0
                names = self._vectors_of(point, at)
                if not matches(op.update_filter, point.payload_of(at), key, names.__contains__):
                    continue
            chosen[key] = row
        rows = np.array(sorted(chosen.values()), np.int64)
        return Upsert(op.points.take(rows))

    def _resolve_update_vectors(self, op: UpdateVectors) -> UpdateVectors:
        if op.if_versions is not None:
            op = self._at_versions(op, op.if_versions)
        if op.update_filter is None:
            return op
        snapshot, places = self.snapshot(), self.locate(op.points.ids)
        names: dict[int, set[str]] = {}  # key -> vectors it has after the rows before
        keep: list[int] = []
        for row, key in enumerate(op.points.ids.keys()):
            place = places[row]
            if place is None:
                keep.append(row)  # stays, so that `apply` can report it as missing
                continue
            point = take_rows(snapshot, [place], True, True)
            has = names.setdefault(key, self._vectors_of(point, 0))
            payload = point.payload_of(0)
            if matches(op.update_filter, payload, key, has.__contains__):
                keep.append(row)
                has |= self._vectors_of(op.points, row)
        points = op.points.take(np.array(keep, np.int64))
        return UpdateVectors(points, forget=op.forget)

    def _at_versions(self, op: UpdateVectors, versions: NDArray[np.uint64]) -> UpdateVectors:
        """Without the rows whose point does not exist or was changed."""
        if len(versions) != len(op.points):
            raise BadRequest(
                f"Bad request: {len(op.points)} points came with {len(versions)} versions"
            )
        now, positions, _ = self.current(op.points.ids, payload=False, vectors=False)
        assert now.versions is not None
        unchanged = positions[now.versions == versions[positions]]
        return replace(op, points=op.points.take(unchanged), if_versions=None)

    def _vectors_of(self, points: PointBatch, row: int) -> set[str]:
        return {
            name
            for blocks in (points.dense, points.sparse, points.multi)
            for name, block in blocks.items()
            if block.present is None or block.present[row]
        }

    # -- effects ----------------------------------------------------------------------------------
    def apply(self, entry: LogEntry, sequence: int) -> int | None:
        """Returns the first id that the entry names and that does not exist, as a key."""
        must(sequence == self.applied + 1, f"entry {sequence} after {self.applied}")
        missing: int | None = None
        match entry:
            case Upsert(points=points):
                self._replace(_last_of_each(points), sequence)
            case Delete(where=where):
                assert where.ids is not None
                self._kill(where.ids, where.ids.keys())
            case UpdateVectors(points=points, forget=forget):
                missing = self._update_vectors(_folded(points), forget, sequence)
            case Seal(segment=segment):
                self._freeze(segment, sequence)
            case Merge():
                self._begin_merge(entry, sequence)
            case AlterVectors():
                self._alter(entry, sequence)
            case (
                SetPayload()
                | OverwritePayload()
                | DeletePayload()
                | ClearPayload()
                | DeleteVectors()
            ):
                missing = self._change(entry, sequence)
            case _:
                assert_never(entry)
        self.applied = sequence
        return missing

    def _change(
        self,
        entry: SetPayload | OverwritePayload | DeletePayload | ClearPayload | DeleteVectors,
        sequence: int,
    ) -> int | None:
        assert entry.where.ids is not None
        ids, missing = _distinct(entry.where.ids), None
        # A few at a time: payloads may be large, and all of them at once need not fit in memory.
        for start in range(0, len(ids), _CHANGED_AT_ONCE):
            part = ids.take(np.arange(start, min(start + _CHANGED_AT_ONCE, len(ids))))
            points, _, missed = self.current(part)
            missing = missed if missing is None else missing
            if len(points):
                self._replace(_changed(entry, points), sequence)
        return missing

    def _update_vectors(
        self, points: PointBatch, forget: Sequence[str], sequence: int
    ) -> int | None:
        existing, positions, missing = self.current(points.ids)
        if len(existing) == 0:
            return missing
        update = points.take(positions)
        _forget(existing, forget)
        for kind in ("dense", "sparse", "multi"):
            before, after = getattr(existing, kind), getattr(update, kind)
            for name, block in after.items():
                if name not in before:  # forgotten; or dropped, and then `append` passes it over
                    before[name] = block
                elif kind == "sparse" or _dim(before[name]) == _dim(block):
                    before[name] = _overlaid(existing, update, kind, name, block.present)
        self._replace(existing, sequence)
        return missing

    def _alter(self, entry: AlterVectors, sequence: int) -> None:
        self.spec = altered(self.spec, entry, sequence)
        self.growing.alter(self.spec)
        for frozen in self.frozen:
            frozen.follow(self.spec)
        for sealed in self.sealed:
            sealed.follow(self.spec)

    def _replace(self, points: PointBatch, sequence: int) -> None:
        """Kill the rows of these ids and append the new ones. Ids do not repeat."""
        keys = points.ids.keys()
        self._kill(points.ids, keys)
        self.growing.append(points, keys, sequence)

    def _kill(self, ids: PointIds, keys: Sequence[int]) -> None:
        left = len(set(keys))
        for growing in (self.growing, *self.frozen):
            left -= growing.kill(keys)
        for segment in self.sealed:
            if left <= 0:
                break
            rows = segment.find(ids)
            rows = np.unique(rows[rows >= 0])
            segment.kill(rows)
            left -= len(rows)

    # -- segments ---------------------------------------------------------------------------------
    def new_segment_id(self) -> int:
        """Taken at once: a seal and a merge may both be on their way to the log."""
        self.next_segment_id += 1
        return self.next_segment_id - 1

    def _freeze(self, segment: int, sequence: int) -> None:
        self.next_segment_id = max(self.next_segment_id, segment + 1)
        frozen = self.growing
        frozen.segment_id = segment
        self.frozen.append(frozen)
        live_at = {s.segment_id: s.live.copy() for s in self.sealed}
        live_at |= {g.segment_id: g.view().live for g in self.frozen}
        self.checkpoints.append(Checkpoint(sequence, frozen, live_at))
        self.growing = GrowingSegment(0, self.spec)

    def _begin_merge(self, merge: Merge, sequence: int) -> None:
        self.next_segment_id = max(self.next_segment_id, merge.output + 1)
        there = {s.segment_id for s in self.sealed} | {f.segment_id for f in self.frozen}
        for earlier in self.merges:
            there = there - set(earlier.inputs) | {earlier.output}
        if there.issuperset(merge.inputs):  # else it was done before a restart, or comes too late
            columns = columns_of(self.spec)
            self.merges.append(
                PendingMerge(
                    sequence=sequence, inputs=merge.inputs, output=merge.output, columns=columns
                )
            )
            self._fix_merges()

    def _fix_merges(self) -> None:
        """What a merge leaves out is as of the last checkpoint before it in the log, so that every
        replica leaves out the same, however late it seals or merges."""
        here = {segment.segment_id: segment.record for segment in self.sealed}
        for number, merge in enumerate(self.merges):
            if merge.tombstones is not None:
                continue
            if self.checkpoints and self.checkpoints[0].sequence < merge.sequence:
                return
            if not here.keys() >= set(merge.inputs):
                return  # an earlier merge makes one of them
            tombstones = tuple(here[segment].tombstones for segment in merge.inputs)
            self.merges[number] = merge.model_copy(update={"tombstones": tombstones})

    def may_install(self, checkpoint: Checkpoint) -> bool:
        """Whether the merges before it know already what to leave out."""
        return all(
            merge.tombstones is not None
            for merge in self.merges
            if merge.sequence < checkpoint.sequence
        )

    def install_seal(
        self,
        checkpoint: Checkpoint,
        sealed: SealedSegment | None,
        rows: NDArray[np.int64],
        records: Mapping[int, SegmentRecord],
    ) -> None:
        """The oldest frozen segment is on disk now. rows: which of its rows each sealed row was.
        sealed is None when none of them was alive. records: by segment, as of the checkpoint."""
        must(self.checkpoints[0] is checkpoint, "checkpoints are installed in their order")
        must(self.may_install(checkpoint), "a merge before the checkpoint would see it")
        frozen = checkpoint.frozen
        self.checkpoints.pop(0)
        self.frozen.pop(0)
        self._locks.pop(id(frozen), None)
        for segment in self.sealed:
            segment.set_checkpoint(checkpoint.live_at[segment.segment_id])
            segment.record = records[segment.segment_id]
        if sealed is not None:
            sealed.live = _pick(frozen.view().live, rows)
            sealed.dead_count = sealed.row_count - int(np.bitwise_count(sealed.live).sum())
            for later in self.checkpoints:
                later.live_at[frozen.segment_id] = _pick(later.live_at[frozen.segment_id], rows)
            sealed.follow(self.spec)  # it was opened a moment ago
            self.sealed.append(sealed)
        self._fix_merges()

    def install_merge(
        self,
        merge: PendingMerge,
        output: SealedSegment | None,
        source: NDArray[np.integer],
        rows: NDArray[np.int64],
    ) -> None:
        """Replace the inputs by the output. Output row r was row rows[r] of inputs[source[r]]."""
        inputs = [self.segment(i) for i in merge.inputs]
        self.sealed = [s for s in self.sealed if s.segment_id not in merge.inputs]
        self.merges = [m for m in self.merges if m.output != merge.output]
        for later in self.checkpoints:
            bits = [later.live_at.pop(s.segment_id) for s in inputs]
            if output is not None:
                later.live_at[merge.output] = pick_merged(bits, source, rows)
        if output is not None:
            output.live = pick_merged([s.live for s in inputs], source, rows)
            output.set_checkpoint(pick_merged([s.checkpoint_live for s in inputs], source, rows))
            output.dead_count = output.row_count - int(np.bitwise_count(output.live).sum())
            output.follow(self.spec)
            self.sealed.append(output)
        self._fix_merges()

    def segment(self, segment_id: int) -> SealedSegment:
        return next(s for s in self.sealed if s.segment_id == segment_id)


def pick_merged(bits: Sequence[Bits], source: NDArray[np.integer], rows: NDArray[np.int64]) -> Bits:
    """Packed bits of the output rows, from those of the inputs."""
    out = np.zeros(len(rows), np.bool_)
    for number, part in enumerate(bits):
        here = source == number
        out[here] = unpack_bits(part, len(part) * 8)[rows[here]]
    return pack_bits(out)


def _pick(bits: Bits, rows: NDArray[np.int64]) -> Bits:
    return pack_bits(unpack_bits(bits, len(bits) * 8)[rows])


def _note(places: list[tuple[int, int] | None], number: int, rows: NDArray[np.int64]) -> None:
    for position in np.flatnonzero(rows >= 0).tolist():
        places[position] = (number, int(rows[position]))


def _distinct(ids: PointIds) -> PointIds:
    keys = ids.keys()
    distinct = list(dict.fromkeys(keys))
    return ids if len(distinct) == len(keys) else PointIds.from_keys(distinct)


def _last_of_each(points: PointBatch) -> PointBatch:
    """Without the rows that a later row of the same id replaces."""
    keys = points.ids.keys()
    last = {key: row for row, key in enumerate(keys)}
    if len(last) == len(keys):
        return points
    return points.take(np.array(sorted(last.values()), np.int64))


def _folded(points: PointBatch) -> PointBatch:
    """One row per id. Of each vector the last row that has it counts."""
    keys = points.ids.keys()
    number: dict[int, int] = {}
    places = np.array([number.setdefault(key, len(number)) for key in keys], np.int64)
    if len(number) == len(keys):
        return points
    out = PointBatch(PointIds.from_keys(list(number)))
    for mine, theirs in (
        (out.dense, points.dense),
        (out.sparse, points.sparse),
        (out.multi, points.multi),
    ):
        for name, block in theirs.items():
            has = np.ones(len(keys), np.bool_) if block.present is None else block.present
            rows = np.zeros(len(number), np.int64)
            rows[places] = np.arange(len(keys))  # any row will do where none has the vector
            rows[places[has]] = np.flatnonzero(has)  # later rows overwrite earlier ones
            mine[name] = block.take(rows)  # type: ignore[assignment]
    return out


def _changed(
    entry: SetPayload | OverwritePayload | DeletePayload | ClearPayload | DeleteVectors,
    points: PointBatch,
) -> PointBatch:
    """The points as the entry leaves them; changes `points` in place."""
    old = [points.payload_of(row) for row in range(len(points))]
    match entry:
        case SetPayload():
            points.set_payloads([merge_payload(p, entry.payload, entry.key) for p in old])
        case OverwritePayload():
            points.set_payloads([entry.payload] * len(old))
        case DeletePayload():
            points.set_payloads([delete_keys(p, entry.keys) for p in old])
        case ClearPayload():
            points.set_payloads([b""] * len(old))
        case DeleteVectors():
            pass
        case _:
            assert_never(entry)
    _forget(points, entry.names if isinstance(entry, DeleteVectors) else entry.forget)
    return points


def _forget(points: PointBatch, names: Sequence[str]) -> None:
    for name in names:
        points.dense.pop(name, None)
        points.sparse.pop(name, None)
        points.multi.pop(name, None)


def _dim(block: DenseBlock | MultiBlock) -> int:
    return int(block.values.shape[1])


def _overlaid(
    before: PointBatch, after: PointBatch, kind: str, name: str, new: NDArray[np.bool_] | None
) -> Any:
    """The block of one vector: rows of `after` where it has the vector, else of `before`."""
    count = len(before)
    old = np.arange(count)
    pick = old + count if new is None else np.where(new, old + count, old)
    parts = []
    for points in (before, after):
        part = PointBatch(points.ids)
        getattr(part, kind)[name] = getattr(points, kind)[name]
        parts.append(part)
    return getattr(concat(parts), kind)[name].take(pick)
