"""A sealed segment: files that are written once and then mapped.

    segments/{id}/
      rows.arr       ids in ascending key order, versions, payload offsets, sparse and multivectors,
                     which rows have which vector
      columns.arr    payload columns, for filters
      payload.bin    JSON objects end to end
      vectors.{i}    the i-th dense vector of the rows that have it: Faiss flat header, then (m, dim)
                     float32. Rows without it are left out: as zeros they would ruin a graph
      index.{i}      an HNSW graph over vectors.{i}, without the vectors; comes later
      tombstones.{n} packed bitmap of n rows that were dead at a checkpoint; the manifest says which

vectors.{i} and index.{i} of a vector that was dropped are deleted; rows.arr stays as it is and tells
which rows had it. A vector that was added later is not in older segments: no row of them has it.

Row number = rank of the id, so an id is found by bisection and a scroll is a range of rows. Names of
vectors are a user's text, so files carry their number; rows.arr holds the names.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.batch import DenseBlock, MultiBlock, PointBatch, SparseBlock, pack_bits, unpack_bits
from shoal.errors import must
from shoal.faiss_index import FlatVectors, Graph
from shoal.ids import UUID_BIT, PointIds
from shoal.storage_api import ShardSpec
from storage_node.columns import SealedColumns
from storage_node.files import open_array_file
from storage_node.manifest import SegmentRecord
from storage_node.vector_set import has_column

__all__ = [
    "SealedSegment",
    "SealedVector",
    "Vector",
    "complete",
    "concat",
    "stored_names",
    "without_files",
]


class Vector(Protocol):
    def take(self, name: str, rows: NDArray[np.int64], count: int, out: PointBatch) -> None:
        """Copy the given rows, of the first `count`, into `out`; zeros for those without it."""
        ...


@dataclass(frozen=True, slots=True)
class SealedVector:
    """One dense vector of a segment.

    flat  (m, dim), and must be kept as long as they are read. None: the log says further on that the
          vector is dropped, and its file was deleted before this replica was restarted. Its rows are
          zeros until then, so that what is made of them has it where other replicas have it.
    rows  (m,) ascending, the row of each vector; None = every row has one. bits: the same, packed.
    """

    dim: int
    flat: FlatVectors | None
    rows: NDArray[np.int64] | None
    bits: NDArray[np.uint8] | None
    graph: Graph | None = None

    def values(self, count: int) -> NDArray[np.float32] | None:
        return None if self.flat is None else self.flat.values

    def places(self, count: int) -> NDArray[np.int64] | None:
        return self.rows

    def present(self, count: int) -> NDArray[np.uint8] | None:
        return self.bits

    def take(self, name: str, rows: NDArray[np.int64], count: int, out: PointBatch) -> None:
        present = None if self.bits is None else _test_bits(self.bits, rows)
        if self.flat is not None and (self.rows is None or present is None):
            out.dense[name] = DenseBlock(self.flat.values[rows])
            return
        values = np.zeros((len(rows), self.dim), np.float32)
        if self.flat is not None and self.rows is not None and present is not None:
            values[present] = self.flat.values[np.searchsorted(self.rows, rows[present])]
        out.dense[name] = DenseBlock(values, present)


class SealedSegment:
    """The rows of one segment, ready to be read.

    vectors          dense ones that the shard has today and this segment holds. A new dictionary with
                     each change: readers in threads may hold the one before.
    live             (ceil(rows / 8),) uint8 packed: alive now. Changed in place by `kill`.
    checkpoint_live  the same as of the manifest's checkpoint: what its tombstones say.
    """

    def __init__(self, folder: Path, record: SegmentRecord, spec: ShardSpec) -> None:
        self.folder, self.record, self.spec = folder, record, spec
        self.segment_id, self.row_count = record.segment_id, record.rows
        self._arrays, meta = open_array_file(folder / "rows.arr")
        must(meta["rows"] == record.rows, f"{folder}: rows.arr does not fit the manifest")
        self._ints: NDArray[np.uint64] = self._arrays["ints"]
        self._uuids = self._arrays["uuids"].view("S16").reshape(-1)  # big-endian: sorts as bytes
        self.columns = SealedColumns(*open_array_file(folder / "columns.arr"))
        self._payload = map_bytes(folder / "payload.bin")
        self._offsets: NDArray[np.uint64] = self._arrays["payload_offsets"]
        self._names: list[str] = meta["vectors"]
        self._since: dict[str, int] = meta.get("since", {})
        self._ragged = {  # never dropped
            name
            for name in self._names
            if name in spec.sparse or (name in spec.dense and spec.dense[name].multi)
        }
        self.vectors: Mapping[str, SealedVector] = {}
        self.follow(spec)
        self.live = self._read_tombstones()
        self.dead_count = self.row_count - _popcount(self.live)
        self.set_checkpoint(self.live.copy())

    def _open_vector(self, name: str, spec: ShardSpec) -> SealedVector:
        vector, bits = spec.dense[name], self._stored_bits(name)
        rows = None if bits is None else np.flatnonzero(unpack_bits(bits, self.row_count))
        count, path = self.row_count if rows is None else len(rows), self.vectors_file(name)
        if path.name not in self.record.files:
            return SealedVector(vector.dim, None, rows, bits)
        flat = FlatVectors(path, vector.dim, count, vector.distance)
        return SealedVector(vector.dim, flat, rows, bits)

    def _read_tombstones(self) -> NDArray[np.uint8]:
        if self.record.tombstones is None:
            return pack_bits(np.ones(self.row_count, np.bool_))
        raw = (self.folder / self.record.tombstones).read_bytes()
        dead = np.frombuffer(raw, np.uint8)
        return pack_bits(~unpack_bits(dead, self.row_count))

    def set_checkpoint(self, live: NDArray[np.uint8]) -> None:
        self.checkpoint_live = live
        self.checkpoint_dead = self.row_count - _popcount(live)

    # -- its vectors ------------------------------------------------------------------------------
    def follow(self, spec: ShardSpec) -> None:
        """Have the vectors that the shard has now. Reads under way keep what they see. A vector comes
        anew only while a log is replayed from before it was added, to a merge after that; no row has
        it then."""
        self.vectors = {
            name: self.vectors.get(name) or self._open_vector(name, spec)
            for name in self._names
            if name not in self._ragged and has_column(spec, name, self._since.get(name, 0))
        }

    def unused_files(self, applied: int) -> list[str]:
        """What the record names and nobody will read: of vectors that were dropped. applied: of the
        shard; what was added later is not dropped."""
        used = {
            number
            for number, name in enumerate(self._names)
            if name in self.vectors or self._since.get(name, 0) > applied
        }
        kinds = ("vectors", "index")
        return [
            file
            for file in self.record.files
            if (parts := file.partition("."))[0] in kinds and int(parts[2]) not in used
        ]

    def without(self, files: Collection[str]) -> SegmentRecord:
        return without_files(self.record, files, self._names)

    def open_graph(self, name: str) -> None:
        """Map the index of a vector, unless that was dropped. Raises if it is not there or does not
        fit."""
        vector = self.vectors.get(name)
        if vector is not None and vector.flat is not None:
            self.set_graph(name, Graph(self.folder / self.index_file(name), vector.flat))

    def set_graph(self, name: str, graph: Graph | None) -> None:
        """None: searches under way keep the one there was; later ones scan."""
        if name in self.vectors:  # else it was dropped meanwhile
            changed = replace(self.vectors[name], graph=graph)
            self.vectors = {**self.vectors, name: changed}

    def drop_graph(self, file: str) -> None:
        self.set_graph(self._names[int(file.removeprefix("index."))], None)

    def vectors_file(self, name: str) -> Path:
        return self.folder / f"vectors.{self._names.index(name)}"

    def index_file(self, name: str) -> str:
        return f"index.{self._names.index(name)}"

    # -- ids --------------------------------------------------------------------------------------
    def find(self, ids: PointIds) -> NDArray[np.int64]:
        """Live row of each id, -1 = none."""
        rows = self._rank(ids)
        found = np.flatnonzero(rows >= 0)
        if len(found):
            rows[found[~_test_bits(self.live, rows[found])]] = -1
        return rows

    def _rank(self, ids: PointIds) -> NDArray[np.int64]:
        """Row of each id, dead or alive, -1 = none."""
        rows = np.full(len(ids), -1, np.int64)
        if ids.is_uuid is None or ids.hi is None:
            _bisect(self._ints, ids.lo, rows, slice(None), 0)
        else:
            flags = ids.is_uuid
            _bisect(self._ints, ids.lo[~flags], rows, ~flags, 0)
            _bisect(self._uuids, uuid_bytes(ids, flags), rows, flags, len(self._ints))
        return rows

    def rows_with_keys(self, keys: Sequence[int]) -> NDArray[np.uint32]:
        """Dead rows too: which rows live is the snapshot's business."""
        rows = self._rank(PointIds.from_keys(keys))
        return np.unique(rows[rows >= 0]).astype(np.uint32)

    def keys_of(self, rows: NDArray[np.integer]) -> list[int]:
        if len(self._ints) == self.row_count:
            numbers: list[int] = self._ints[rows].tolist()
            return numbers
        return [self.key(row) for row in rows.tolist()]

    def key(self, row: int) -> int:
        ints = len(self._ints)
        if row < ints:
            return int(self._ints[row])
        raw = self._arrays["uuids"][row - ints].tobytes()
        return UUID_BIT | int.from_bytes(raw, "big")

    def ids_of(self, rows: NDArray[np.int64]) -> PointIds:
        ints = len(self._ints)
        if ints == self.row_count:
            return PointIds(self._ints[rows])
        flags = rows >= ints
        pairs = self._arrays["uuids"].view(">u8").reshape(-1, 2)[rows[flags] - ints]
        lo, hi = np.empty(len(rows), np.uint64), np.zeros(len(rows), np.uint64)
        lo[~flags], lo[flags], hi[flags] = self._ints[rows[~flags]], pairs[:, 1], pairs[:, 0]
        return PointIds(lo, hi, flags)

    def ordered_rows(self, start: int | None) -> range:
        """Rows with key >= start, ascending by key; dead rows included."""
        if start is None:
            first = 0
        elif start < UUID_BIT:
            first = int(np.searchsorted(self._ints, np.uint64(start)))
        else:
            raw = np.array([(start ^ UUID_BIT).to_bytes(16, "big")], "S16")
            first = len(self._ints) + int(np.searchsorted(self._uuids, raw)[0])
        return range(first, self.row_count)

    def kill(self, rows: NDArray[np.int64]) -> None:
        """Mark live rows dead; rows do not repeat."""
        np.bitwise_and.at(self.live, rows >> 3, ~(np.uint8(1) << (rows & 7).astype(np.uint8)))
        self.dead_count += len(rows)

    # -- contents ---------------------------------------------------------------------------------
    def payload_bytes(self, row: int) -> bytes:
        return self._payload[int(self._offsets[row]) : int(self._offsets[row + 1])]

    def version(self, row: int) -> int:
        return int(self._arrays["versions"][row])

    def present_bits(self, name: str) -> NDArray[np.uint8] | None:
        """Packed bitmap of the rows that have the vector; None = every row. KeyError: none has."""
        if name in self._ragged:
            return self._stored_bits(name)
        return self.vectors[name].bits

    def _stored_bits(self, name: str) -> NDArray[np.uint8] | None:
        return self._arrays.get(f"present.{self._names.index(name)}")

    def stored(self, name: str, since: int, rows: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        if name not in self._names or self._since.get(name, 0) != since:
            return np.zeros(len(rows), np.bool_)
        bits = self._stored_bits(name)
        return None if bits is None else _test_bits(bits, rows)

    def payload_lengths(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return (self._offsets[rows + 1] - self._offsets[rows]).astype(np.int64)

    def vector_count(self, name: str) -> int:
        """Vectors that could be searched."""
        vector = self.vectors.get(name)
        return 0 if vector is None or vector.flat is None else len(vector.flat.values)

    def graph(self, name: str) -> Graph | None:
        vector = self.vectors.get(name)
        return None if vector is None else vector.graph

    def take(
        self,
        rows: NDArray[np.int64],
        payload: bool,
        names: Sequence[str],
        vectors: Mapping[str, Vector] | None = None,
    ) -> PointBatch:
        """Copies of the given rows, in that order, with those of the named vectors that are here.
        vectors: the dense ones as of a snapshot; None: as of now."""
        out = PointBatch(self.ids_of(rows))
        out.versions = self._arrays["versions"][rows]
        if payload:
            out.set_payloads([self.payload_bytes(row) for row in rows.tolist()])
        dense = self.vectors if vectors is None else vectors
        for name in names:
            if name in dense:
                dense[name].take(name, rows, self.row_count, out)
            elif name in self._ragged:
                self._take_ragged(name, rows, out)
        return out

    def _take_ragged(self, name: str, rows: NDArray[np.int64], out: PointBatch) -> None:
        number, bits = self._names.index(name), self._stored_bits(name)
        present = None if bits is None else _test_bits(bits, rows)
        indptr, values = self._arrays[f"indptr.{number}"], self._arrays[f"values.{number}"]
        if name in self.spec.sparse:
            indices = self._arrays[f"indices.{number}"]
            out.sparse[name] = SparseBlock(indptr, indices, values).take(rows)
            out.sparse[name].present = present
        else:
            out.multi[name] = MultiBlock(indptr, values).take(rows)
            out.multi[name].present = present


def _test_bits(bits: NDArray[np.uint8], rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = ((bits[rows >> 3] >> (rows & 7).astype(np.uint8)) & 1).view(np.bool_)
    return found


def _bisect(
    ordered: NDArray[Any], wanted: NDArray[Any], rows: NDArray[np.int64], where: Any, base: int
) -> None:
    if len(ordered) == 0 or len(wanted) == 0:
        return
    numbers = ordered.dtype.kind == "u"
    if numbers and (wanted.max() < ordered[0] or wanted.min() > ordered[-1]):
        return  # numbers often come in order: the usual case of an insert
    at = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    rows[where] = np.where(ordered[at] == wanted, at + base, -1)


def uuid_bytes(ids: PointIds, flags: NDArray[np.bool_]) -> NDArray[np.bytes_]:
    assert ids.hi is not None
    pairs = np.stack([ids.hi[flags], ids.lo[flags]], axis=1).astype(">u8")
    return np.frombuffer(pairs.tobytes(), "S16")


def _popcount(bits: NDArray[np.uint8]) -> int:
    return int(np.bitwise_count(bits).sum(dtype=np.int64))


def map_bytes(path: Path) -> mmap.mmap | bytes:
    with path.open("rb") as file:
        if file.seek(0, 2) == 0:
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def complete(points: PointBatch, spec: ShardSpec, names: Sequence[str]) -> PointBatch:
    """Add the dense vectors that its segment does not have: no row has them. Names that the shard
    does not have are passed over."""
    for name in names:
        vector = spec.dense.get(name)
        if vector is not None and not vector.multi and name not in points.dense:
            zeros = np.zeros((len(points), vector.dim), np.float32)
            points.dense[name] = DenseBlock(zeros, np.zeros(len(points), np.bool_))
    return points


def stored_names(folder: Path) -> list[str]:
    """The vectors of a segment, in the order that numbers its files."""
    names: list[str] = open_array_file(folder / "rows.arr")[1]["vectors"]
    return names


def without_files(
    record: SegmentRecord, files: Collection[str], names: Sequence[str]
) -> SegmentRecord:
    """The record without these files of vectors and indexes. names: see `stored_names`."""
    gone = {names[int(f.removeprefix("index."))] for f in files if f.startswith("index.")}
    return record.model_copy(
        update={
            "files": {f: total for f, total in record.files.items() if f not in files},
            "indexes": tuple(name for name in record.indexes if name not in gone),
        }
    )


def concat(parts: Sequence[PointBatch]) -> PointBatch:
    """All rows of several batches, in order. All must have the same columns."""
    if len(parts) == 1:
        return parts[0]
    out = PointBatch(PointIds.concat(part.ids for part in parts))
    counts = [len(part) for part in parts]
    for name in parts[0].dense:
        blocks = [part.dense[name] for part in parts]
        values = np.concatenate([block.values for block in blocks])
        out.dense[name] = DenseBlock(values, _joined_present(blocks, counts))
    for name in parts[0].sparse:
        sparse = [part.sparse[name] for part in parts]
        out.sparse[name] = SparseBlock(
            _joined_indptr([block.indptr for block in sparse]),
            np.concatenate([block.indices for block in sparse]),
            np.concatenate([block.values for block in sparse]),
            _joined_present(sparse, counts),
        )
    for name in parts[0].multi:
        multi = [part.multi[name] for part in parts]
        out.multi[name] = MultiBlock(
            _joined_indptr([block.indptr for block in multi]),
            np.concatenate([block.values for block in multi]),
            _joined_present(multi, counts),
        )
    offsets = [part.payload_offsets for part in parts if part.payload_offsets is not None]
    if len(offsets) == len(parts):
        out.payload = b"".join(part.payload for part in parts)
        out.payload_offsets = _joined_indptr(offsets)
    versions = [part.versions for part in parts if part.versions is not None]
    if len(versions) == len(parts):
        out.versions = np.concatenate(versions)
    return out


def _joined_present(
    blocks: Sequence[DenseBlock | SparseBlock | MultiBlock], counts: Sequence[int]
) -> NDArray[np.bool_] | None:
    if all(block.present is None for block in blocks):
        return None
    return np.concatenate(
        [
            np.ones(count, np.bool_) if block.present is None else block.present
            for block, count in zip(blocks, counts, strict=True)
        ]
    )


def _joined_indptr(parts: Sequence[NDArray[np.uint32]]) -> NDArray[np.uint32]:
    total, out = 0, [np.zeros(1, np.uint32)]
    for part in parts:
        out.append(part[1:] + np.uint32(total))
        total += int(part[-1])
    return np.concatenate(out)
