"""The growing segment: rows in memory, in the order in which they were written.

Searched exactly. Nothing here is durable: the log rebuilds it. A row is never changed once written;
a dead row only loses its bit in `live`. Arrays grow by doubling, so a view taken earlier stays valid.
One thread appends and kills; `view()` gives readers a fixed number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.batch import DenseBlock, MultiBlock, PointBatch, SparseBlock, pack_bits
from shoal.errors import must
from shoal.ids import UUID_BIT, PointIds
from shoal.storage_api import ShardSpec
from storage_node.columns import GrowingColumns

__all__ = ["GrowingSegment", "GrowingView"]


class _Array:
    """A numpy array that grows at its end."""

    __slots__ = ("_data", "size")

    def __init__(self, dtype: Any, width: int | None = None) -> None:
        self._data = np.empty((256,) if width is None else (256, width), dtype)
        self.size = 0

    def extend(self, values: NDArray[Any]) -> None:
        end = self.size + len(values)
        if end > len(self._data):
            grown = np.empty(
                (max(end, 2 * len(self._data)), *self._data.shape[1:]), self._data.dtype
            )
            grown[: self.size] = self._data[: self.size]
            self._data = grown
        self._data[self.size : end] = values
        self.size = end

    def fill(self, count: int, value: Any) -> None:
        self.extend(np.full((count, *self._data.shape[1:]), value, self._data.dtype))

    def view(self, count: int | None = None) -> NDArray[Any]:
        return self._data[: self.size if count is None else count]


class _Ragged:
    """Rows of differing length: offsets (n + 1) and the values end to end."""

    __slots__ = ("offsets", "parts")

    def __init__(self, **parts: _Array) -> None:
        self.offsets = _Array(np.int64)
        self.offsets.extend(np.zeros(1, np.int64))
        self.parts = parts

    def extend(self, indptr: NDArray[np.uint32], **values: NDArray[Any]) -> None:
        base = int(self.offsets.view()[-1])
        self.offsets.extend(indptr[1:].astype(np.int64) + base)
        for name, array in values.items():
            self.parts[name].extend(array)

    def skip(self, count: int) -> None:
        self.offsets.fill(count, self.offsets.view()[-1])

    def rows(self, count: int) -> tuple[NDArray[np.uint32], dict[str, NDArray[Any]]]:
        offsets = self.offsets.view(count + 1)
        end = int(offsets[-1])
        return offsets.astype(np.uint32), {n: a.view(end) for n, a in self.parts.items()}


class GrowingSegment:
    def __init__(self, segment_id: int, spec: ShardSpec) -> None:
        self.segment_id = segment_id
        self.spec = spec
        self.row_count = 0
        self.dead_count = 0
        self.byte_size = 0  # vectors and payload, dead rows included: what decides when to seal
        self.live = np.zeros(32, np.uint8)  # packed; bits past row_count are zero
        self.row_of: dict[int, int] = {}  # key -> live row
        self.columns = GrowingColumns()
        self._lo = _Array(np.uint64)
        self._hi: _Array | None = None  # made when the first UUID comes
        self._is_uuid: _Array | None = None
        self._versions = _Array(np.uint64)
        self._payload = bytearray()
        self._offsets = _Array(np.uint64)
        self._offsets.extend(np.zeros(1, np.uint64))
        self._present = {name: _Array(np.bool_) for name in (*spec.dense, *spec.sparse)}
        self._absent = dict.fromkeys(self._present, 0)
        self._dense = {n: _Array(np.float32, v.dim) for n, v in spec.dense.items() if not v.multi}
        self._multi = {
            n: _Ragged(values=_Array(np.float32, v.dim)) for n, v in spec.dense.items() if v.multi
        }
        self._sparse = {
            n: _Ragged(indices=_Array(np.uint32), values=_Array(np.float32)) for n in spec.sparse
        }
        self._order: NDArray[np.intp] | None = None  # rows by key, for the rows there were then

    # -- writing ----------------------------------------------------------------------------------
    def append(self, batch: PointBatch, keys: Sequence[int], version: int) -> None:
        """Add rows. The caller has killed earlier rows of the same keys; keys do not repeat."""
        count, start = len(batch), self.row_count
        before = len(self._payload)
        self._append_ids(batch.ids)
        self._versions.fill(count, version)
        if batch.payload_offsets is None:
            self._offsets.fill(count, len(self._payload))
        else:
            self._offsets.extend(batch.payload_offsets[1:].astype(np.uint64) + np.uint64(before))
            self._payload += batch.payload
        for name in self._present:
            self._append_vector(name, batch, count)
        self._mark_live(start, count)
        self.row_count = start + count
        self.row_of.update(zip(keys, range(start, start + count), strict=True))
        self.byte_size += len(self._payload) - before + count * 16

    def _append_ids(self, ids: PointIds) -> None:
        if ids.hi is not None and ids.is_uuid is not None and self._hi is None:
            # Filled before they are seen: a reader in a thread may come in between.
            hi, is_uuid = _Array(np.uint64), _Array(np.bool_)
            hi.fill(self.row_count, 0)
            is_uuid.fill(self.row_count, False)
            self._is_uuid, self._hi = is_uuid, hi
        self._lo.extend(ids.lo)
        if self._hi is not None and self._is_uuid is not None:
            if ids.hi is not None and ids.is_uuid is not None:
                self._hi.extend(ids.hi)
                self._is_uuid.extend(ids.is_uuid)
            else:
                self._hi.fill(len(ids), 0)
                self._is_uuid.fill(len(ids), False)

    def _append_vector(self, name: str, batch: PointBatch, count: int) -> None:
        block: DenseBlock | SparseBlock | MultiBlock | None
        if name in self._dense:
            block = dense = batch.dense.get(name)
            if dense is None:
                self._dense[name].fill(count, 0.0)
            else:
                self._dense[name].extend(dense.values)
                self.byte_size += dense.values.nbytes
        elif name in self._multi:
            block = multi = batch.multi.get(name)
            if multi is None:
                self._multi[name].skip(count)
            else:
                self._multi[name].extend(multi.indptr, values=multi.values)
                self.byte_size += multi.values.nbytes
        else:
            block = sparse = batch.sparse.get(name)
            if sparse is None:
                self._sparse[name].skip(count)
            else:
                self._sparse[name].extend(
                    sparse.indptr, indices=sparse.indices, values=sparse.values
                )
                self.byte_size += 2 * sparse.values.nbytes
        if block is None:
            self._present[name].fill(count, False)
            self._absent[name] += count
        elif block.present is None:
            self._present[name].fill(count, True)
        else:
            self._present[name].extend(block.present)
            self._absent[name] += count - int(np.count_nonzero(block.present))

    def _mark_live(self, start: int, count: int) -> None:
        needed = -(-(start + count) // 8)
        if needed > len(self.live):
            grown = np.zeros(max(needed, 2 * len(self.live)), np.uint8)
            grown[: len(self.live)] = self.live
            self.live = grown
        first = start // 8
        mask = np.zeros((needed - first) * 8, np.bool_)
        mask[start - first * 8 : start - first * 8 + count] = True
        self.live[first:needed] |= pack_bits(mask)

    def kill(self, keys: Sequence[int]) -> int:
        """Mark the rows of these keys dead; unknown keys are skipped. Returns how many there were."""
        killed = 0
        for key in keys:
            row = self.row_of.pop(key, None)
            if row is not None:
                self.live[row >> 3] &= 0xFF ^ (1 << (row & 7))
                killed += 1
        self.dead_count += killed
        return killed

    # -- reading ----------------------------------------------------------------------------------
    def find(self, keys: Sequence[int]) -> NDArray[np.int64]:
        """Live row of each key, -1 = none."""
        row_of = self.row_of
        return np.fromiter((row_of.get(key, -1) for key in keys), np.int64, len(keys))

    def view(self) -> GrowingView:
        return GrowingView(self)

    def by_key(self) -> NDArray[np.intp]:
        """All rows, dead ones too, in ascending key order."""
        order = self._order
        if order is None or len(order) != self.row_count:
            self._order = order = self.ids().order()
        return order

    def ids(self) -> PointIds:
        n = self.row_count
        if self._hi is None or self._is_uuid is None:
            return PointIds(self._lo.view(n))
        return PointIds(self._lo.view(n), self._hi.view(n), self._is_uuid.view(n))

    def payload_bytes(self, row: int) -> bytes:
        offsets = self._offsets.view(row + 2)
        # Slicing first copies once: no exported view may stand in the way of the next append.
        return bytes(self._payload[int(offsets[row]) : int(offsets[row + 1])])

    def key(self, row: int) -> int:
        low = int(self._lo.view()[row])
        if self._hi is None or self._is_uuid is None or not self._is_uuid.view()[row]:
            return low
        return UUID_BIT | (int(self._hi.view()[row]) << 64) | low

    def version(self, row: int) -> int:
        return int(self._versions.view()[row])

    def payload_lengths(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        offsets: NDArray[np.int64] = self._offsets.view().astype(np.int64)
        return offsets[rows + 1] - offsets[rows]

    def vectors(self, name: str, count: int) -> NDArray[np.float32]:
        return self._dense[name].view(count)

    def present(self, name: str, count: int) -> NDArray[np.bool_] | None:
        """KeyError for a name that the collection does not have."""
        mask = self._present[name].view(count)
        return mask if self._absent[name] else None

    def take(
        self, rows: NDArray[np.int64], payload: bool, vectors: bool | tuple[str, ...]
    ) -> PointBatch:
        """Copies of the given rows, in that order."""
        must(len(rows) == 0 or int(rows.max()) < self.row_count, "a row past the end")
        out = PointBatch(self.ids().take(rows))
        out.versions = self._versions.view()[rows]
        if payload:
            out.set_payloads([self.payload_bytes(row) for row in rows.tolist()])
        if not vectors:
            return out
        for name in self._present if isinstance(vectors, bool) else vectors:
            mask = self.present(name, self.row_count)
            if name in self._dense:
                out.dense[name] = DenseBlock(self._dense[name].view(), mask).take(rows)
            elif name in self._multi:
                indptr, parts = self._multi[name].rows(self.row_count)
                out.multi[name] = MultiBlock(indptr, parts["values"], mask).take(rows)
            else:
                indptr, parts = self._sparse[name].rows(self.row_count)
                block = SparseBlock(indptr, parts["indices"], parts["values"], mask)
                out.sparse[name] = block.take(rows)
        return out


class GrowingView:
    """A growing segment with a fixed number of rows and its live bits as they are now."""

    __slots__ = ("columns", "live", "row_count", "segment")

    def __init__(self, segment: GrowingSegment) -> None:
        self.segment = segment
        self.row_count = segment.row_count
        self.live: NDArray[np.uint8] = segment.live[: -(-segment.row_count // 8)].copy()
        self.columns = segment.columns

    @property
    def segment_id(self) -> int:
        return self.segment.segment_id

    @property
    def dead_count(self) -> int:
        return self.segment.dead_count

    def payload_bytes(self, row: int) -> bytes:
        return self.segment.payload_bytes(row)

    def version(self, row: int) -> int:
        return self.segment.version(row)

    def rows_with_keys(self, keys: Sequence[int]) -> NDArray[np.uint32]:
        """Dead rows too: which rows live is the snapshot's business."""
        ids, wanted = self.segment.ids().take(np.arange(self.row_count)), PointIds.from_keys(keys)
        found = np.flatnonzero(np.isin(ids.lo, wanted.lo))
        if ids.is_uuid is not None or wanted.is_uuid is not None:
            exact = frozenset(keys)
            found = np.array([row for row in found.tolist() if ids.key(row) in exact], np.int64)
        return found.astype(np.uint32)

    def keys_of(self, rows: NDArray[np.integer]) -> list[int]:
        return [self.segment.key(row) for row in rows.tolist()]

    def has_vector(self, name: str, rows: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        mask = self.segment.present(name, self.row_count)
        return None if mask is None else mask[rows]

    def payload_lengths(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.segment.payload_lengths(rows)

    def present_bits(self, name: str) -> NDArray[np.uint8] | None:
        mask = self.segment.present(name, self.row_count)
        return None if mask is None else pack_bits(mask)

    def vectors(self, name: str) -> NDArray[np.float32]:
        return self.segment.vectors(name, self.row_count)

    def vector_rows(self, name: str) -> None:
        """None: there is a place for every row; `present_bits` says which are filled."""
        return

    def graph(self, name: str) -> None:
        return None

    def ordered_rows(self, start: int | None) -> NDArray[np.int64]:
        """Rows with key >= start, ascending by key; dead rows included."""
        order = self.segment.by_key().astype(np.int64)
        order = order[order < self.row_count]
        if start is None:
            return order
        low, high = 0, len(order)
        while low < high:
            middle = (low + high) // 2
            if self.segment.key(int(order[middle])) < start:
                low = middle + 1
            else:
                high = middle
        return order[low:]

    def take(
        self, rows: NDArray[np.int64], payload: bool, vectors: bool | tuple[str, ...]
    ) -> PointBatch:
        return self.segment.take(rows, payload, vectors)
