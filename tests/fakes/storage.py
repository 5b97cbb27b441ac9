"""A storage node in memory: dictionaries, exact arithmetic, no disk, no threads, no index.

It keeps the contract of `shoal.storage_api.Storage` by the shortest way, so that the coordinator's
tests take milliseconds and a difference to the real node is a bug in one of the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from shoal.api.filter import Filter
from shoal.batch import DenseBlock, MultiBlock, PointBatch, SparseBlock
from shoal.errors import BadRequest, NotFound, ShoalError, Stale, StorageFull
from shoal.ids import PointIds
from shoal.payload import decode, delete_keys, merge_payload
from shoal.storage_api import (
    AlterVectors,
    ClearPayload,
    Delete,
    DeletePayload,
    DeleteVectors,
    Distance,
    Hits,
    OverwritePayload,
    Read,
    ReplicaStatus,
    Scroll,
    Search,
    Selector,
    SetPayload,
    ShardInfo,
    ShardKey,
    ShardSpec,
    UpdateMode,
    UpdateVectors,
    Upsert,
    Write,
    WriteResult,
)
from storage_node.row_filter import Point, compile_filter

__all__ = ["FakeStorage"]

ANY = Read()


@dataclass
class Row:
    """One point. A vector is (dim,) dense, (rows, dim) multi, or a pair (indices, values) sparse."""

    payload: bytes = b""
    dense: dict[str, np.ndarray] = field(default_factory=dict)
    multi: dict[str, np.ndarray] = field(default_factory=dict)
    sparse: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    version: int = 0

    def has(self, name: str) -> bool:
        return name in self.dense or name in self.multi or name in self.sparse


@dataclass
class FakeShard:
    spec: ShardSpec
    rows: dict[int, Row] = field(default_factory=dict)
    sequence: int = 0


class FakeStorage:
    """info_overrides: how a shard says that it is. error: what every call raises from now on.
    full: numbers of shards that refuse writes. reads: how fresh each read was asked to be."""

    def __init__(self) -> None:
        self.shards: dict[ShardKey, FakeShard] = {}
        self.info_overrides: dict[ShardKey, ShardInfo] = {}
        self.error: Exception | None = None
        self.full: set[int] = set()
        self.reads: list[Read] = []

    def _shard(self, key: ShardKey) -> FakeShard:
        if self.error is not None:
            raise self.error
        if key not in self.shards:
            raise NotFound(f"shard {key} is not here")
        return self.shards[key]

    async def create_shard(self, spec: ShardSpec) -> None:
        if self.error is not None:
            raise self.error
        self.shards.setdefault(spec.key, FakeShard(spec))

    async def drop_shard(self, shard: ShardKey) -> None:
        self.shards.pop(shard, None)

    async def statuses(self) -> dict[str, list[ReplicaStatus] | ShoalError]:
        here = [
            ReplicaStatus(
                "local", "primary", 1, one.sequence, one.sequence, True, key, await self.info(key)
            )
            for key, one in self.shards.items()
        ]
        return {"local": here}

    def extra_requests(self) -> dict[str, int]:
        return {"hedge": 1, "retry": 2}

    # -- reads ------------------------------------------------------------------------------------
    async def search(self, shard: ShardKey, query: Search, read: Read = ANY) -> Hits:
        self.reads.append(read)
        here = self._shard(shard)
        if query.using not in here.spec.dense:
            raise Stale(f"shard {shard} has no vector {query.using!r}")
        distance = here.spec.dense[query.using].distance
        sign = -1.0 if distance.larger_is_better else 1.0
        ranked = []
        for key, row in _matching(here, query.filter):
            if query.using in row.dense and key not in query.exclude:
                score = _score(distance, query.vector, row.dense[query.using])
                limit = query.score_threshold
                if limit is None or sign * score < sign * limit:
                    ranked.append((sign * score, key, score))
        ranked = sorted(ranked)[: query.limit]
        points = _batch(here, [key for _, key, _ in ranked], query.with_payload, query.with_vectors)
        return Hits(points, np.array([score for *_, score in ranked], np.float32))

    async def retrieve(
        self,
        shard: ShardKey,
        ids: PointIds,
        with_payload: bool,
        with_vectors: bool | tuple[str, ...],
        read: Read = ANY,
    ) -> PointBatch:
        self.reads.append(read)
        here = self._shard(shard)
        keys = ids.keys()
        return _batch(here, [k for k in keys if k in here.rows], with_payload, with_vectors)

    async def scroll(self, shard: ShardKey, query: Scroll, read: Read = ANY) -> PointBatch:
        self.reads.append(read)
        here = self._shard(shard)
        keys = sorted(k for k, _ in _matching(here, query.filter) if k >= (query.start or 0))
        return _batch(here, keys[: query.limit], query.with_payload, query.with_vectors)

    async def count(self, shard: ShardKey, filter: Filter | None, read: Read = ANY) -> int:
        self.reads.append(read)
        return sum(1 for _ in _matching(self._shard(shard), filter))

    async def info(self, shard: ShardKey) -> ShardInfo:
        here = self._shard(shard)
        if shard in self.info_overrides:
            return self.info_overrides[shard]
        names = (*here.spec.dense, *here.spec.sparse)
        having = {name: sum(row.has(name) for row in here.rows.values()) for name in names}
        return ShardInfo(points=len(here.rows), segments=1, applied=here.sequence, vectors=having)

    # -- writes -----------------------------------------------------------------------------------
    async def write(self, shard: ShardKey, op: Write) -> WriteResult:
        here = self._shard(shard)
        if shard.shard in self.full:
            raise StorageFull("Storage is full: no space left.")
        here.sequence += 1
        missing: list[int] = []
        match op:
            case Upsert():
                _upsert(here, op)
            case UpdateVectors():
                _update_vectors(here, op, missing)
            case AlterVectors():
                _alter(here, op)
            case Delete():
                for key in _selected(here, op.where, []):
                    del here.rows[key]
            case (
                DeleteVectors()
                | SetPayload()
                | OverwritePayload()
                | DeletePayload()
                | ClearPayload()
            ):
                for key in _selected(here, op.where, missing):
                    _change(here.rows[key], op)
                    here.rows[key].version = here.sequence
        return WriteResult(here.sequence, missing[0] if missing else None)


def _change(
    row: Row, op: DeleteVectors | SetPayload | OverwritePayload | DeletePayload | ClearPayload
) -> None:
    match op:
        case DeleteVectors():
            _forget(row, op.names)
        case SetPayload():
            row.payload = merge_payload(row.payload, op.payload, op.key)
        case OverwritePayload():
            row.payload = op.payload
        case DeletePayload():
            row.payload = delete_keys(row.payload, op.keys)
        case ClearPayload():
            row.payload = b""
    if not isinstance(op, DeleteVectors):
        _forget(row, op.forget)


def _forget(row: Row, names: Iterable[str]) -> None:
    for name in names:
        for vectors in (row.dense, row.multi, row.sparse):
            vectors.pop(name, None)


def _alter(shard: FakeShard, op: AlterVectors) -> None:
    kept = {name: spec for name, spec in shard.spec.dense.items() if name not in op.drop}
    for name, spec in op.add.items():
        if kept.get(name, spec) != spec:
            raise BadRequest(f"Wrong input: the vector {name!r} exists with other settings")
    shard.spec = replace(shard.spec, dense=kept | dict(op.add))
    for row in shard.rows.values():
        _forget(row, op.drop)


def _update_vectors(shard: FakeShard, op: UpdateVectors, missing: list[int]) -> None:
    allowed = {key for key, _ in _matching(shard, op.update_filter)}
    brought: dict[int, list[int]] = {}  # key -> the rows that are applied
    for position, key in enumerate(op.points.ids.keys()):
        row = shard.rows.get(key)
        if op.if_versions is not None and (row is None or row.version != op.if_versions[position]):
            continue
        if row is None:
            missing.append(key)
        elif key in allowed:
            brought.setdefault(key, []).append(position)
    for key, positions in brought.items():
        row = shard.rows[key]
        _forget(row, op.forget)
        row.version = shard.sequence
        for position in positions:
            _set_vectors(row, op.points, position, shard.spec)


def _matching(shard: FakeShard, filter: Filter | None) -> Iterator[tuple[int, Row]]:
    if filter is None:
        yield from list(shard.rows.items())
        return
    holds = compile_filter(filter)
    for key, row in list(shard.rows.items()):
        if holds(decode(row.payload), Point(key, row.has)):
            yield key, row


def _selected(shard: FakeShard, where: Selector, missing: list[int]) -> Iterable[int]:
    if where.ids is None:
        return [key for key, _ in _matching(shard, where.filter)]
    keys = list(dict.fromkeys(where.ids.keys()))
    missing += [key for key in keys if key not in shard.rows]
    return [key for key in keys if key in shard.rows]


def _upsert(shard: FakeShard, op: Upsert) -> None:
    allowed = {key for key, _ in _matching(shard, op.update_filter)}
    for position, key in enumerate(op.points.ids.keys()):
        exists = key in shard.rows
        if exists and (op.mode is UpdateMode.INSERT_ONLY or key not in allowed):
            continue
        if not exists and op.mode is UpdateMode.UPDATE_ONLY:
            continue
        row = Row(payload=op.points.payload_of(position), version=shard.sequence)
        _set_vectors(row, op.points, position, shard.spec)
        shard.rows[key] = row


def _set_vectors(row: Row, points: PointBatch, position: int, spec: ShardSpec) -> None:
    for name, dense in points.dense.items():
        if name not in spec.dense or spec.dense[name].dim != dense.values.shape[1]:
            continue  # of a vector that was dropped
        if dense.present is None or dense.present[position]:
            row.dense[name] = dense.values[position].copy()
    for name, multi in points.multi.items():
        if multi.present is None or multi.present[position]:
            span = slice(multi.indptr[position], multi.indptr[position + 1])
            row.multi[name] = multi.values[span].copy()
    for name, sparse in points.sparse.items():
        if sparse.present is None or sparse.present[position]:
            span = slice(sparse.indptr[position], sparse.indptr[position + 1])
            row.sparse[name] = (sparse.indices[span].copy(), sparse.values[span].copy())


def _score(distance: Distance, query: np.ndarray, vector: np.ndarray) -> float:
    q, v = query.astype(np.float64), vector.astype(np.float64)
    if distance.larger_is_better:
        return float(np.float32(q @ v))
    if distance is Distance.EUCLID:
        return float(np.float32(np.sqrt(((q - v) ** 2).sum())))
    return float(np.float32(np.abs(q - v).sum()))


def _batch(
    shard: FakeShard, keys: list[int], with_payload: bool, with_vectors: bool | tuple[str, ...]
) -> PointBatch:
    rows = [shard.rows[key] for key in keys]
    batch = PointBatch(PointIds.from_keys(keys))
    batch.versions = np.array([row.version for row in rows], np.uint64)
    if with_payload:
        batch.set_payloads([row.payload for row in rows])

    def wanted(name: str) -> bool:
        return with_vectors is True or (with_vectors is not False and name in with_vectors)

    for name, spec in shard.spec.dense.items():
        present = np.array([row.has(name) for row in rows], np.bool_)
        if not wanted(name) or not present.any():
            continue
        if spec.multi:
            parts = [row.multi.get(name, np.empty((0, spec.dim), np.float32)) for row in rows]
            batch.multi[name] = MultiBlock(_ends(parts), np.concatenate(parts), present)
        else:
            zeros = np.zeros(spec.dim, np.float32)
            batch.dense[name] = DenseBlock(
                np.stack([row.dense.get(name, zeros) for row in rows]), present
            )
    for name in shard.spec.sparse:
        present = np.array([row.has(name) for row in rows], np.bool_)
        if wanted(name) and present.any():
            none = (np.empty(0, np.uint32), np.empty(0, np.float32))
            pairs = [row.sparse.get(name, none) for row in rows]
            batch.sparse[name] = SparseBlock(
                _ends([indices for indices, _ in pairs]),
                np.concatenate([indices for indices, _ in pairs]),
                np.concatenate([values for _, values in pairs]),
                present,
            )
    return batch


def _ends(parts: list[np.ndarray]) -> np.ndarray:
    ends = np.zeros(len(parts) + 1, np.uint32)
    np.cumsum([len(part) for part in parts], out=ends[1:])
    return ends
