"""`PointBatch`: many points as columns. The one format from the edge to the disk and back.

A coordinator parses a request into a PointBatch once; its bytes go into the log, over the wire and
into segments. No per-point Python object is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from shoal.ids import PointIds
from shoal.wire import ops_pb2 as wire

__all__ = ["DenseBlock", "MultiBlock", "PointBatch", "SparseBlock", "pack_bits", "unpack_bits"]

Mask = NDArray[np.bool_]


def pack_bits(mask: Mask) -> NDArray[np.uint8]:
    """(n,) bool -> (ceil(n / 8),) uint8, bit r of byte r // 8: the bit order Faiss selectors use."""
    return np.packbits(mask, bitorder="little")


def unpack_bits(bits: NDArray[np.uint8] | bytes, count: int) -> Mask:
    raw = np.frombuffer(bits, np.uint8) if isinstance(bits, bytes) else bits
    return np.unpackbits(raw, count=count, bitorder="little").view(np.bool_)


@dataclass(slots=True)
class DenseBlock:
    """values (n, dim) float32, C order; rows that lack the vector hold zeros.
    present (n,) bool; None = every row has it."""

    values: NDArray[np.float32]
    present: Mask | None = None

    def take(self, rows: NDArray[np.integer]) -> DenseBlock:
        return DenseBlock(self.values[rows], _take_mask(self.present, rows))


@dataclass(slots=True)
class SparseBlock:
    """CSR. indptr (n + 1,) uint32; indices (nnz,) uint32, ascending in a row; values (nnz,) float32."""

    indptr: NDArray[np.uint32]
    indices: NDArray[np.uint32]
    values: NDArray[np.float32]
    present: Mask | None = None

    def take(self, rows: NDArray[np.integer]) -> SparseBlock:
        indptr, picks = _take_ranges(self.indptr, rows)
        return SparseBlock(
            indptr, self.indices[picks], self.values[picks], _take_mask(self.present, rows)
        )


@dataclass(slots=True)
class MultiBlock:
    """Row r holds values[indptr[r]:indptr[r + 1]], (t, dim) float32."""

    indptr: NDArray[np.uint32]
    values: NDArray[np.float32]
    present: Mask | None = None

    def take(self, rows: NDArray[np.integer]) -> MultiBlock:
        indptr, picks = _take_ranges(self.indptr, rows)
        return MultiBlock(indptr, self.values[picks], _take_mask(self.present, rows))


@dataclass(slots=True)
class PointBatch:
    """n points.

    payload          JSON objects end to end, UTF-8; row r is payload[offsets[r]:offsets[r + 1]].
                     An empty slice is a point without payload.
    payload_offsets  (n + 1,) uint32; None in an answer that was asked for without payload.
    versions         (n,) uint64, answers only: log sequence number of the point's last change.
    """

    ids: PointIds
    dense: dict[str, DenseBlock] = field(default_factory=dict)
    sparse: dict[str, SparseBlock] = field(default_factory=dict)
    multi: dict[str, MultiBlock] = field(default_factory=dict)
    payload: bytes = b""
    payload_offsets: NDArray[np.uint32] | None = None
    versions: NDArray[np.uint64] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def empty(cls, with_payload: bool) -> PointBatch:
        """No points; an answer."""
        out = cls(PointIds(np.empty(0, np.uint64)), versions=np.empty(0, np.uint64))
        if with_payload:
            out.set_payloads([])
        return out

    def payload_of(self, row: int) -> bytes:
        """JSON bytes of one row, b"" where it has none."""
        if self.payload_offsets is None:
            return b""
        return self.payload[self.payload_offsets[row] : self.payload_offsets[row + 1]]

    def take(self, rows: NDArray[np.integer]) -> PointBatch:
        """The given rows, in the given order; copies."""
        out = PointBatch(self.ids.take(rows))
        out.dense = {name: block.take(rows) for name, block in self.dense.items()}
        out.sparse = {name: block.take(rows) for name, block in self.sparse.items()}
        out.multi = {name: block.take(rows) for name, block in self.multi.items()}
        if self.payload_offsets is not None:
            out.set_payloads([self.payload_of(int(row)) for row in rows])
        if self.versions is not None:
            out.versions = self.versions[rows]
        return out

    def set_payloads(self, payloads: Sequence[bytes]) -> None:
        """Store one JSON object (or b"") per row, n in all."""
        ends = accumulate(map(len, payloads), initial=0)  # numpy's cumsum costs 10x for ten rows
        self.payload_offsets = np.fromiter(ends, np.uint32, len(payloads) + 1)
        self.payload = b"".join(payloads)

    def to_wire(self) -> wire.PointBatch:
        message = wire.PointBatch()
        self.fill(message)
        return message

    def fill(self, message: wire.PointBatch) -> None:
        """`to_wire` into an empty message that is part of another one: a message that is put into
        another one later is copied, with all its vectors."""
        message.count = len(self)
        self.ids.fill(message.ids)
        for name, dense in self.dense.items():
            message.dense.add(
                name=name,
                dim=dense.values.shape[1],
                values=_bytes(dense.values, "<f4"),
                present=_mask_bytes(dense.present),
            )
        for name, sparse in self.sparse.items():
            message.sparse.add(
                name=name,
                indptr=_bytes(sparse.indptr, "<u4"),
                indices=_bytes(sparse.indices, "<u4"),
                values=_bytes(sparse.values, "<f4"),
                present=_mask_bytes(sparse.present),
            )
        for name, multi in self.multi.items():
            message.multi.add(
                name=name,
                dim=multi.values.shape[1],
                indptr=_bytes(multi.indptr, "<u4"),
                values=_bytes(multi.values, "<f4"),
                present=_mask_bytes(multi.present),
            )
        if self.payload_offsets is not None:
            message.payload = self.payload
            message.payload_offsets = _bytes(self.payload_offsets, "<u4")
        if self.versions is not None:
            message.versions = _bytes(self.versions, "<u8")

    @classmethod
    def from_wire(cls, message: wire.PointBatch) -> PointBatch:
        """Arrays are read-only views of the message's bytes. Sizes are checked: ValueError."""
        count = message.count
        out = cls(PointIds.from_wire(message.ids))
        if len(out.ids) != count:
            raise ValueError(f"a batch of {count} points has {len(out.ids)} ids")
        for d in message.dense:
            values = np.frombuffer(d.values, "<f4").reshape(count, d.dim)
            out.dense[d.name] = DenseBlock(values, _mask_from(d.present, count))
        for s in message.sparse:
            indptr = np.frombuffer(s.indptr, "<u4")
            sparse = SparseBlock(
                indptr,
                np.frombuffer(s.indices, "<u4"),
                np.frombuffer(s.values, "<f4"),
                _mask_from(s.present, count),
            )
            _check_ranges(indptr, count, len(sparse.indices))
            out.sparse[s.name] = sparse
        for m in message.multi:
            rows = np.frombuffer(m.values, "<f4").reshape(-1, m.dim)
            multi = MultiBlock(np.frombuffer(m.indptr, "<u4"), rows, _mask_from(m.present, count))
            _check_ranges(multi.indptr, count, len(rows))
            out.multi[m.name] = multi
        if message.payload_offsets:
            out.payload = message.payload
            out.payload_offsets = np.frombuffer(message.payload_offsets, "<u4")
            _check_ranges(out.payload_offsets, count, len(out.payload))
        if message.versions:
            out.versions = np.frombuffer(message.versions, "<u8")
        return out


def _bytes(array: NDArray[np.generic], dtype: str) -> bytes:
    return array.astype(dtype, copy=False).tobytes()


def _mask_bytes(mask: Mask | None) -> bytes:
    return b"" if mask is None else pack_bits(mask).tobytes()


def _mask_from(bits: bytes, count: int) -> Mask | None:
    if not bits:
        return None
    if len(bits) != (count + 7) // 8:
        raise ValueError(f"a bitmap of {len(bits)} bytes does not fit {count} points")
    return unpack_bits(bits, count)


def _take_mask(mask: Mask | None, rows: NDArray[np.integer]) -> Mask | None:
    return None if mask is None else mask[rows]


def _take_ranges(
    indptr: NDArray[np.uint32], rows: NDArray[np.integer]
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """New indptr and the flat positions of the picked rows' ranges."""
    starts = indptr[rows].astype(np.int64)
    lengths = indptr[rows + 1].astype(np.int64) - starts
    out = np.zeros(len(rows) + 1, np.uint32)
    np.cumsum(lengths, out=out[1:])
    within = np.arange(int(out[-1])) - np.repeat(out[:-1].astype(np.int64), lengths)
    return out, np.repeat(starts, lengths) + within


def _check_ranges(indptr: NDArray[np.uint32], count: int, total: int) -> None:
    if len(indptr) != count + 1 or indptr[0] != 0 or indptr[-1] != total:
        raise ValueError(f"ranges of a batch of {count} points do not fit {total} values")
    if count <= 64:  # an answer, mostly: numpy costs more than the numbers
        ends = indptr.tolist()
        ascending = ends == sorted(ends)
    else:
        ascending = not (indptr[1:] < indptr[:-1]).any()
    if not ascending:
        raise ValueError("ranges of a batch are not ascending")
