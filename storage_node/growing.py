"""The growing segment: rows in memory, in the order in which they were written.

Searched exactly. Nothing here is durable: the log rebuilds it. A row is never changed once written;
a dead row only loses its bit in `live`. Arrays grow by doubling, so a view taken earlier stays valid.
One thread appends, kills and alters; `view()` gives readers a fixed number of rows and the vectors
there were. Vectors come and go with a new dictionary, never by changing one that readers may hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.batch import DenseBlock, MultiBlock, PointBatch, SparseBlock, pack_bits
from shoal.errors import must
from shoal.ids import UUID_BIT, PointIds
from shoal.storage_api import ShardSpec
from storage_node.columns import GrowingColumns
from storage_node.segment import Vector
from storage_node.vector_set import columns_of, has_column

__all__ = ["GrowingSegment", "GrowingVector", "GrowingView"]


class _Array:
    """A numpy array that grows at its end."""

    __slots__ = ("_data", "size")

    def __init__(self, dtype: Any, width: int | None = None, zeros: int = 0) -> None:
        capacity = max(256, zeros)
        self._data = np.zeros((capacity,) if width is None else (capacity, width), dtype)
        self.size = zeros

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


class GrowingVector:
    """One vector of all rows; the first `count` of them lack it. dim: 0 for a sparse one.

    A dense one has a place for every row after these; `present` says which are filled.
    """

    __slots__ = ("_absent", "_dense", "_first", "_multi", "_present", "_sparse", "dim")

    graph = None

    def __init__(self, count: int, dim: int = 0, *, multi: bool = False) -> None:
        self._present = _Array(np.bool_, zeros=count)
        self._absent = count
        self._first = count
        self.dim = dim
        self._dense: _Array | None = None
        self._multi: _Ragged | None = None
        self._sparse: _Ragged | None = None
        if dim and not multi:
            self._dense = _Array(np.float32, dim)
        elif dim:
            self._multi = _Ragged(values=_Array(np.float32, dim))
            self._multi.skip(count)
        else:
            self._sparse = _Ragged(indices=_Array(np.uint32), values=_Array(np.float32))
            self._sparse.skip(count)

    def append(self, name: str, batch: PointBatch, count: int) -> int:
        """Add the rows of a batch; the bytes that they take. A block that does not fit, which a vector
        of this name had before it was dropped, is passed over."""
        block: DenseBlock | SparseBlock | MultiBlock | None
        size = 0
        if self._dense is not None:
            block = dense = batch.dense.get(name)
            if dense is None or dense.values.shape[1] != self.dim:
                block = None
                self._dense.fill(count, 0.0)
            else:
                self._dense.extend(dense.values)
                size = dense.values.nbytes
        elif self._multi is not None:
            block = multi = batch.multi.get(name)
            if multi is None:
                self._multi.skip(count)
            else:
                self._multi.extend(multi.indptr, values=multi.values)
                size = multi.values.nbytes
        else:
            assert self._sparse is not None
            block = sparse = batch.sparse.get(name)
            if sparse is None:
                self._sparse.skip(count)
            else:
                self._sparse.extend(sparse.indptr, indices=sparse.indices, values=sparse.values)
                size = 2 * sparse.values.nbytes
        if block is None:
            self._present.fill(count, False)
            self._absent += count
        elif block.present is None:
            self._present.fill(count, True)
        else:
            self._present.extend(block.present)
            self._absent += count - int(np.count_nonzero(block.present))
        return size

    def mask(self, count: int) -> NDArray[np.bool_] | None:
        """(count,) which rows have it; None = all."""
        mask = self._present.view(count)
        return mask if self._absent else None

    def present(self, count: int) -> NDArray[np.uint8] | None:
        mask = self.mask(count)
        return None if mask is None else pack_bits(mask)

    def values(self, count: int) -> NDArray[np.float32]:
        """(m, dim), of a dense vector: of the rows `places` names."""
        assert self._dense is not None
        return self._dense.view(max(0, count - self._first))

    def places(self, count: int) -> NDArray[np.int64] | None:
        """(m,) ascending: the row of each of `values`; None = every row has a place."""
        return np.arange(self._first, count) if self._first else None

    def take(self, name: str, rows: NDArray[np.int64], count: int, out: PointBatch) -> None:
        """Copy the given rows into `out`."""
        mask = self.mask(count)
        if self._dense is not None:
            out.dense[name] = DenseBlock(
                self._taken(self._dense, rows), None if mask is None else mask[rows]
            )
        elif self._multi is not None:
            indptr, parts = self._multi.rows(count)
            out.multi[name] = MultiBlock(indptr, parts["values"], mask).take(rows)
        else:
            assert self._sparse is not None
            indptr, parts = self._sparse.rows(count)
            block = SparseBlock(indptr, parts["indices"], parts["values"], mask)
            out.sparse[name] = block.take(rows)

    def _taken(self, dense: _Array, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        values: NDArray[np.float32] = dense.view()
        if not self._first:
            return values[rows]
        out = np.zeros((len(rows), self.dim), np.float32)
        later = rows >= self._first
        out[later] = values[rows[later] - self._first]
        return out


def _vector(spec: ShardSpec, name: str, count: int) -> GrowingVector:
    found = spec.dense.get(name)
    if found is None:
        return GrowingVector(count)
    return GrowingVector(count, found.dim, multi=found.multi)


class GrowingSegment:
    """spec: as of now, or as of the Seal entry that ended it.
    vectors: what readers see. stored: what its files will tell of, which is more when some were
    dropped after its Seal."""

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
        self.stored: Mapping[str, GrowingVector] = {
            n: _vector(spec, n, 0) for n in columns_of(spec)
        }
        self.vectors = self.stored
        self._order: NDArray[np.intp] | None = None  # rows by key, for the rows there were then

    # -- its vectors ------------------------------------------------------------------------------
    def alter(self, spec: ShardSpec) -> None:
        """While it grows: from now on it has the vectors of `spec`."""
        before, self.spec = self.spec, spec
        self.stored = {
            name: self.stored[name]
            if name in self.stored and has_column(before, name, since)
            else _vector(spec, name, self.row_count)
            for name, since in columns_of(spec).items()
        }
        self.vectors = self.stored

    def follow(self, spec: ShardSpec) -> None:
        """After its Seal: readers no longer see what `spec` lacks. It will be written all the same
        which rows had that, because another replica may have written it by now."""
        mine = columns_of(self.spec)
        self.vectors = {n: v for n, v in self.vectors.items() if has_column(spec, n, mine[n])}

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
        for name, vector in self.stored.items():
            self.byte_size += vector.append(name, batch, count)
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

    def versions(self, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
        found: NDArray[np.uint64] = self._versions.view()[rows]
        return found


class GrowingView:
    """A growing segment with a fixed number of rows, its live bits and its vectors as they are now."""

    __slots__ = ("_stored", "columns", "live", "row_count", "segment", "vectors")

    def __init__(self, segment: GrowingSegment) -> None:
        self.segment = segment
        self.row_count = segment.row_count
        self.live: NDArray[np.uint8] = segment.live[: -(-segment.row_count // 8)].copy()
        self.columns = segment.columns
        self.vectors = segment.vectors
        self._stored = segment.stored

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

    def stored(self, name: str, since: int, rows: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        mask = self._stored[name].mask(self.row_count)
        return None if mask is None else mask[rows]

    def payload_lengths(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.segment.payload_lengths(rows)

    def present_bits(self, name: str) -> NDArray[np.uint8] | None:
        """KeyError for a name that the segment does not have."""
        return self.vectors[name].present(self.row_count)

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
        self,
        rows: NDArray[np.int64],
        payload: bool,
        names: Sequence[str],
        vectors: Mapping[str, Vector] | None = None,
    ) -> PointBatch:
        """Copies of the given rows, in that order, with those of the named vectors that are here."""
        must(len(rows) == 0 or int(rows.max()) < self.row_count, "a row past the end")
        out = PointBatch(self.segment.ids().take(rows))
        out.versions = self.segment.versions(rows)
        if payload:
            out.set_payloads([self.payload_bytes(row) for row in rows.tolist()])
        here = self.vectors if vectors is None else vectors
        for name in names:
            if name in here:
                here[name].take(name, rows, self.row_count, out)
        return out
