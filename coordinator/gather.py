"""Answers of several shards -> one answer. Pure: arrays in, arrays out.

A point stands in exactly one shard, but one that is being moved may be seen in two; the answer has
it once. Order never depends on which shard answered first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from shoal.batch import DenseBlock, MultiBlock, PointBatch, SparseBlock
from shoal.errors import must
from shoal.ids import PointIds
from shoal.storage_api import Hits

__all__ = ["concat", "first_by_id", "in_request_order", "merge_hits"]

_Place = tuple[int, int]  # number of the part, row in it


def merge_hits(parts: Sequence[Hits], limit: int, *, larger_is_better: bool) -> Hits:
    """The `limit` best points of all shards, each at most once.

    parts[s]  hits of one shard, best first; a NaN score raises InvariantError.
    Returns   min(limit, distinct points) hits, best first. Ties go to the smaller id, so every
              coordinator gives the same answer.
    Cost      O(N log N) in the N given hits; N <= shards x limit.
    """
    sign = -1.0 if larger_is_better else 1.0
    # Plain tuples: for the hits of most searches numpy's calls cost four times as much as this, and
    # for thousands still more, because the parts are sorted already.
    ranked = sorted(
        (sign * score, key, number, row)
        for number, part in enumerate(parts)
        for row, (score, key) in enumerate(
            zip(part.scores.tolist(), part.points.ids.keys(), strict=True)
        )
    )
    must(all(hit[0] == hit[0] for hit in ranked), "a shard answered with a score that is NaN")
    seen: set[int] = set()
    best: list[_Place] = []
    scores: list[float] = []
    for score, key, number, row in ranked:
        if len(best) == limit:
            break
        if key not in seen:
            seen.add(key)
            best.append((number, row))
            scores.append(sign * score)
    return Hits(_picked([part.points for part in parts], best), np.array(scores, np.float32))


def _picked(parts: Sequence[PointBatch], places: Sequence[_Place]) -> PointBatch:
    """The points at these places, in this order."""
    if any(part.dense or part.sparse or part.multi for part in parts):
        starts = [0, *accumulate(map(len, parts))]
        rows = [starts[number] + row for number, row in places]
        return concat(parts).take(np.array(rows, np.intp))
    keys = [part.ids.keys() for part in parts]
    out = PointBatch(PointIds.from_keys([keys[number][row] for number, row in places]))
    ends = [None if p.payload_offsets is None else p.payload_offsets.tolist() for p in parts]
    if any(end is not None for end in ends):
        payloads = []
        for number, row in places:
            end = ends[number]
            payloads.append(b"" if end is None else parts[number].payload[end[row] : end[row + 1]])
        out.set_payloads(payloads)
    versions = [part.versions.tolist() for part in parts if part.versions is not None]
    if len(versions) == len(parts):
        out.versions = np.array([versions[number][row] for number, row in places], np.uint64)
    return out


def first_by_id(parts: Sequence[PointBatch], limit: int) -> PointBatch:
    """The `limit` points with the smallest ids, ascending, each once.

    parts[s]  points of one shard in ascending id order. When every shard gave at least `limit`, or
              all that it has, the answer is what one shard with all points would have given.
    """
    points = concat(parts)
    return points.take(_distinct(points.ids, points.ids.order())[:limit])


def in_request_order(parts: Sequence[PointBatch], ids: PointIds) -> PointBatch:
    """The found points in the order of `ids`; an id asked twice is answered twice, a missing one is
    left out."""
    points = concat(parts)
    row_of = {key: row for row, key in enumerate(points.ids.keys())}
    rows = [row_of[key] for key in ids.keys() if key in row_of]  # noqa: SIM118
    return points.take(np.array(rows, np.intp))


def concat(parts: Sequence[PointBatch]) -> PointBatch:
    """All rows of all batches, in order. Columns that only some have are filled with absence."""
    if len(parts) == 1:
        return parts[0]
    out = PointBatch(PointIds.concat(part.ids for part in parts))
    counts = [len(part) for part in parts]
    for name in _names([part.dense for part in parts]):
        out.dense[name] = _concat_dense([part.dense.get(name) for part in parts], counts)
    for name in _names([part.sparse for part in parts]):
        out.sparse[name] = _concat_sparse([part.sparse.get(name) for part in parts], counts)
    for name in _names([part.multi for part in parts]):
        out.multi[name] = _concat_multi([part.multi.get(name) for part in parts], counts)
    if any(part.payload_offsets is not None for part in parts):
        out.set_payloads([part.payload_of(row) for part in parts for row in range(len(part))])
    versions = [part.versions for part in parts if part.versions is not None]
    if len(versions) == len(parts):
        out.versions = np.concatenate(versions)
    return out


def _distinct(ids: PointIds, order: NDArray[np.intp]) -> NDArray[np.intp]:
    """`order` without the later rows of an id that was there before."""
    columns = [ids.lo]
    if ids.hi is not None and ids.is_uuid is not None:
        columns += [ids.hi, ids.is_uuid.astype(np.uint64)]
    table = np.stack([column[order] for column in columns], axis=1)
    _, first = np.unique(table, axis=0, return_index=True)
    if len(first) == len(order):
        return order
    return order[np.sort(first)]


def _names(columns: Sequence[Mapping[str, object]]) -> list[str]:
    return sorted({name for column in columns for name in column})


def _concat_dense(blocks: Sequence[DenseBlock | None], counts: Sequence[int]) -> DenseBlock:
    dim = next(block.values.shape[1] for block in blocks if block is not None)
    values = [
        np.zeros((count, dim), np.float32) if block is None else block.values
        for block, count in zip(blocks, counts, strict=True)
    ]
    return DenseBlock(np.concatenate(values), _concat_masks(blocks, counts))


def _concat_sparse(blocks: Sequence[SparseBlock | None], counts: Sequence[int]) -> SparseBlock:
    there = [block for block in blocks if block is not None]
    return SparseBlock(
        _concat_indptr(blocks, counts),
        np.concatenate([block.indices for block in there]),
        np.concatenate([block.values for block in there]),
        _concat_masks(blocks, counts),
    )


def _concat_multi(blocks: Sequence[MultiBlock | None], counts: Sequence[int]) -> MultiBlock:
    return MultiBlock(
        _concat_indptr(blocks, counts),
        np.concatenate([block.values for block in blocks if block is not None]),
        _concat_masks(blocks, counts),
    )


def _concat_indptr(
    blocks: Sequence[SparseBlock | MultiBlock | None], counts: Sequence[int]
) -> NDArray[np.uint32]:
    lengths = [
        np.zeros(count, np.uint32) if block is None else np.diff(block.indptr)
        for block, count in zip(blocks, counts, strict=True)
    ]
    indptr = np.zeros(sum(counts) + 1, np.uint32)
    np.cumsum(np.concatenate(lengths), out=indptr[1:])
    return indptr


def _concat_masks(
    blocks: Sequence[DenseBlock | SparseBlock | MultiBlock | None], counts: Sequence[int]
) -> NDArray[np.bool_] | None:
    masks = [
        np.zeros(count, np.bool_)
        if block is None
        else (np.ones(count, np.bool_) if block.present is None else block.present)
        for block, count in zip(blocks, counts, strict=True)
    ]
    mask = np.concatenate(masks)
    return None if mask.all() else mask
