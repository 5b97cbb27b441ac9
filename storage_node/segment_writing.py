"""Writing the files of a segment, for a seal or a merge. What they are: storage_node/segment.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.batch import MultiBlock, PointBatch, SparseBlock, pack_bits
from shoal.errors import must
from shoal.faiss_index import flat_header
from shoal.storage_api import ShardSpec
from storage_node.columns import build_columns
from storage_node.files import FileSum, FileWriter, write_array_file
from storage_node.segment import complete, concat, map_bytes, uuid_bytes
from storage_node.vector_set import has_column

__all__ = ["Source", "write_segment"]

_CHUNK_ROWS = 4096  # rows that a seal or merge holds in memory at once
_CHUNK_PAYLOAD_BYTES = 64 << 20  # … unless their payloads are larger than this


class Source(Protocol):
    """A segment whose rows are written anew: growing or sealed."""

    def take(self, rows: NDArray[np.int64], payload: bool, names: Sequence[str]) -> PointBatch: ...
    def stored(self, name: str, since: int, rows: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """(n,) bool, which of the given rows have the vector, also one that was dropped since; None =
        all have it. since: see vector_set.py."""
        ...

    def payload_lengths(self, rows: NDArray[np.int64]) -> NDArray[np.int64]: ...


@dataclass(slots=True)
class _Collected:
    """What of a segment is small enough to be collected in memory while it is written."""

    lo: list[NDArray[np.uint64]] = field(default_factory=list)
    uuids: list[bytes] = field(default_factory=list)
    versions: list[NDArray[np.uint64]] = field(default_factory=list)
    lengths: list[NDArray[np.int64]] = field(default_factory=list)
    present: dict[str, NDArray[np.bool_]] = field(default_factory=dict)  # only if some lack it
    ragged: dict[str, list[SparseBlock | MultiBlock]] = field(default_factory=dict)


def write_segment(
    folder: Path,
    spec: ShardSpec,
    sources: Sequence[Source],
    source: NDArray[np.integer],
    rows: NDArray[np.int64],
    columns: Mapping[str, int],
) -> dict[str, FileSum]:
    """Write the files of a segment; each is fsynced, the folder is not.

    columns  the vectors that it has (vector_set.py). Of those that were dropped since, so that `spec`
             lacks them, it is only written which rows had them.
    source   (n,) which of `sources` output row r comes from
    rows     (n,) and which row of it. Output order must be ascending by id.
    Memory: a chunk of rows at a time, plus ids, offsets, sparse and multivectors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count = len(rows)
    kept = [name for name, since in columns.items() if has_column(spec, name, since)]
    numbers = {name: number for number, name in enumerate(columns)}
    flat = {f"vectors.{numbers[n]}": n for n in kept if n in spec.dense and not spec.dense[n].multi}
    collected = _Collected(ragged={name: [] for name in kept if name not in flat.values()})
    for name, since in columns.items():
        parts = [s.stored(name, since, rows[source == i]) for i, s in enumerate(sources)]
        if any(part is not None for part in parts):
            collected.present[name] = _present(source, parts)
    writers = {"payload.bin": FileWriter(folder / "payload.bin")}
    try:
        for file, name in flat.items():
            writers[file] = FileWriter(folder / file)
            vector, having = spec.dense[name], collected.present.get(name)
            total = count if having is None else int(np.count_nonzero(having))
            writers[file].write(flat_header(vector.dim, total, vector.distance))
        for start, end in _chunks(sources, source, rows):
            chunk = _gather(sources, source[start:end], rows[start:end], spec, kept)
            _collect(collected, chunk)
            writers["payload.bin"].write(chunk.payload)
            for file, name in flat.items():
                block = chunk.dense[name]
                here = block.values if block.present is None else block.values[block.present]
                writers[file].write(here)
        files = {file: writer.close() for file, writer in writers.items()}
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    arrays = _rows_arrays(collected, list(columns), count)
    later = {name: since for name, since in columns.items() if since}
    meta = {"rows": count, "vectors": list(columns)} | ({"since": later} if later else {})
    files["rows.arr"] = write_array_file(folder / "rows.arr", arrays, meta)
    payload = map_bytes(folder / "payload.bin")
    offsets = arrays["payload_offsets"].tolist()
    paths = build_columns((payload[offsets[r] : offsets[r + 1]] for r in range(count)), count)
    files["columns.arr"] = write_array_file(folder / "columns.arr", *paths)
    return files


def _present(
    source: NDArray[np.integer], parts: Sequence[NDArray[np.bool_] | None]
) -> NDArray[np.bool_]:
    present = np.ones(len(source), np.bool_)
    for number, part in enumerate(parts):
        if part is not None:
            present[source == number] = part
    return present


def _chunks(
    sources: Sequence[Source], source: NDArray[np.integer], rows: NDArray[np.int64]
) -> Iterator[tuple[int, int]]:
    """Ranges of output rows, each small in rows and in payload bytes."""
    lengths = np.empty(len(rows), np.int64)
    for i, part in enumerate(sources):
        here = source == i
        lengths[here] = part.payload_lengths(rows[here])
    ends = np.cumsum(lengths)
    start, before = 0, 0
    while start < len(rows):
        full = int(np.searchsorted(ends, before + _CHUNK_PAYLOAD_BYTES, "right"))
        end = min(max(full, start + 1), start + _CHUNK_ROWS, len(rows))
        yield start, end
        start, before = end, int(ends[end - 1])


def _collect(into: _Collected, chunk: PointBatch) -> None:
    ids = chunk.ids
    if ids.is_uuid is None:
        into.lo.append(ids.lo)
    else:
        into.lo.append(ids.lo[~ids.is_uuid])
        into.uuids.append(uuid_bytes(ids, ids.is_uuid).tobytes())
    must(chunk.versions is not None and chunk.payload_offsets is not None, "a chunk lacks columns")
    assert chunk.versions is not None
    assert chunk.payload_offsets is not None
    into.versions.append(chunk.versions)
    into.lengths.append(_lengths(chunk.payload_offsets))
    for name, blocks in into.ragged.items():
        blocks.append(chunk.sparse[name] if name in chunk.sparse else chunk.multi[name])


def _rows_arrays(
    collected: _Collected, names: Sequence[str], count: int
) -> dict[str, NDArray[Any]]:
    uuids = np.frombuffer(b"".join(collected.uuids), np.uint8).reshape(-1, 16)
    offsets = np.zeros(count + 1, np.uint64)
    if count:
        offsets[1:] = np.cumsum(np.concatenate(collected.lengths))
    arrays: dict[str, NDArray[Any]] = {
        "ints": _joined(collected.lo, np.uint64),
        "uuids": uuids,
        "versions": _joined(collected.versions, np.uint64),
        "payload_offsets": offsets,
    }
    ordered = len(arrays["ints"]) < 2 or bool((arrays["ints"][1:] > arrays["ints"][:-1]).all())
    must(ordered and len(arrays["ints"]) + len(uuids) == count, "ids of a segment must ascend")
    for number, name in enumerate(names):
        present = collected.present.get(name)
        if present is not None and not present.all():
            arrays[f"present.{number}"] = pack_bits(present)
        if name not in collected.ragged:
            continue
        blocks = collected.ragged[name]
        lengths = [_lengths(block.indptr) for block in blocks]
        indptr = np.zeros(count + 1, np.uint32)
        if count:
            indptr[1:] = np.cumsum(np.concatenate(lengths))
        arrays[f"indptr.{number}"] = indptr
        arrays[f"values.{number}"] = (
            np.concatenate([b.values for b in blocks]) if blocks else np.empty(0, np.float32)
        )
        sparse = [block.indices for block in blocks if isinstance(block, SparseBlock)]
        if sparse:
            arrays[f"indices.{number}"] = np.concatenate(sparse)
    return arrays


def _lengths(indptr: NDArray[np.uint32]) -> NDArray[np.int64]:
    wide = indptr.astype(np.int64)
    return wide[1:] - wide[:-1]


def _joined(parts: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def _gather(
    sources: Sequence[Source],
    source: NDArray[np.integer],
    rows: NDArray[np.int64],
    spec: ShardSpec,
    names: Sequence[str],
) -> PointBatch:
    parts, order = [], []
    for number, part in enumerate(sources):
        here = np.flatnonzero(source == number)
        if len(here):
            parts.append(complete(part.take(rows[here], True, names), spec, names))
            order.append(here)
    if len(parts) == 1:
        return parts[0]
    back = np.empty(len(rows), np.int64)
    back[np.concatenate(order)] = np.arange(len(rows))
    return concat(parts).take(back)
