"""A shard whose vectors change, as a dictionary; and random writes for it."""

from __future__ import annotations

import random
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np

from shoal.api.filter import parse_filter
from shoal.batch import DenseBlock, PointBatch, SparseBlock
from shoal.ids import UUID_BIT, PointIds
from shoal.payload import delete_keys, merge_payload
from shoal.storage_api import (
    AlterVectors,
    ClearPayload,
    Delete,
    DeletePayload,
    DeleteVectors,
    Distance,
    OverwritePayload,
    Selector,
    SetPayload,
    ShardKey,
    ShardSpec,
    UpdateVectors,
    Upsert,
    VectorSpec,
    Write,
)

__all__ = ["KEY", "NAMES", "Oracle", "Point", "created", "some_write"]

KEY = ShardKey(1, 0)
NAMES = ("v", "v\x1f1", "v\x1f2", "w")
KEYS = [*range(40), *(UUID_BIT | (number << 70) | number for number in range(12))]


def created(index_bytes_min: int = 0) -> ShardSpec:
    """What the shard is created with."""
    return ShardSpec(
        KEY, "test", {"v": vector(3, index_bytes_min), "w": vector(2, index_bytes_min)}, ("s",)
    )


def vector(dim: int, index_bytes_min: int = 0) -> VectorSpec:
    return VectorSpec(dim, Distance.DOT, index_bytes_min=index_bytes_min)


@dataclass
class Point:
    """vectors: name -> floats, of "s" pairs. version: of the write that changed it last."""

    payload: bytes
    vectors: dict[str, tuple[object, ...]]
    version: int


@dataclass
class Oracle:
    """`apply` takes the writes that some_write makes, as their definition in storage_api says."""

    dense: dict[str, VectorSpec] = field(default_factory=lambda: dict(created().dense))
    points: dict[int, Point] = field(default_factory=dict)

    def apply(self, op: Write, version: int) -> int | None:
        """Returns the first id that is missing."""
        missing: int | None = None
        match op:
            case Upsert(points=points):
                for row, key in enumerate(points.ids.keys()):
                    brought = self._vectors(points, row)
                    self.points[key] = Point(points.payload_of(row), brought, version)
            case UpdateVectors():
                missing = self._update(op, version)
            case AlterVectors():
                self._alter(op)
            case Delete(where=where):
                for key in self._selected(where):
                    self.points.pop(key, None)
            case _:
                keys = self._selected(op.where)
                missing = next((key for key in keys if key not in self.points), None)
                for key in set(keys) & set(self.points):
                    self._change(self.points[key], op)
                    self.points[key].version = version
        return missing

    def copy(self) -> Oracle:
        return deepcopy(self)

    def holds(self, points: PointBatch) -> bool:
        """Whether these are all points, but for their versions."""
        return all(name in self.dense for name in points.dense) and (
            {key: (point.payload, point.vectors) for key, point in self.page(points).items()}
            == {key: (point.payload, point.vectors) for key, point in self.points.items()}
        )

    def _alter(self, op: AlterVectors) -> None:
        for name in op.drop:
            self.dense.pop(name, None)
            for point in self.points.values():
                point.vectors.pop(name, None)
        for name, spec in op.add.items():
            assert self.dense.setdefault(name, spec) == spec

    def _update(self, op: UpdateVectors, version: int) -> int | None:
        missing: int | None = None
        brought: dict[int, dict[str, tuple[object, ...]]] = {}
        for row, key in enumerate(op.points.ids.keys()):
            point = self.points.get(key)
            if op.if_versions is not None and (
                point is None or point.version != int(op.if_versions[row])
            ):
                continue
            if point is None:
                missing = key if missing is None else missing
                continue
            if op.update_filter is not None and not self._odd(point):
                continue
            brought.setdefault(key, {}).update(self._vectors(op.points, row))
        for key, vectors in brought.items():
            point = self.points[key]
            kept = {n: v for n, v in point.vectors.items() if n not in op.forget}
            point.vectors, point.version = kept | vectors, version
        return missing

    def _change(self, point: Point, op: Write) -> None:
        match op:
            case DeleteVectors(names=names):
                lost = names
            case SetPayload(forget=lost):
                point.payload = merge_payload(point.payload, op.payload, op.key)
            case OverwritePayload(forget=lost):
                point.payload = op.payload
            case DeletePayload(forget=lost):
                point.payload = delete_keys(point.payload, op.keys)
            case ClearPayload(forget=lost):
                point.payload = b""
            case _:
                raise AssertionError(op)
        point.vectors = {n: v for n, v in point.vectors.items() if n not in lost}

    def _selected(self, where: Selector) -> list[int]:
        if where.ids is not None:
            return where.ids.keys()
        return sorted(key for key, point in self.points.items() if self._odd(point))

    @staticmethod
    def _odd(point: Point) -> bool:
        return b'"odd":true' in point.payload

    def _vectors(self, points: PointBatch, row: int) -> dict[str, tuple[object, ...]]:
        """What a row brings of the vectors that there are."""
        found: dict[str, tuple[object, ...]] = {}
        for name, dense in points.dense.items():
            spec = self.dense.get(name)
            has = dense.present is None or bool(dense.present[row])
            if has and spec is not None and spec.dim == dense.values.shape[1]:
                found[name] = tuple(dense.values[row].tolist())
        for name, sparse in points.sparse.items():
            if sparse.present is None or sparse.present[row]:
                span = slice(int(sparse.indptr[row]), int(sparse.indptr[row + 1]))
                pairs = zip(
                    sparse.indices[span].tolist(), sparse.values[span].tolist(), strict=True
                )
                found[name] = tuple(pairs)
        return found

    def page(self, points: PointBatch) -> dict[int, Point]:
        """What a node answered, as points."""
        for name, dense in points.dense.items():
            assert dense.values.shape[1] == self.dense[name].dim
        assert points.versions is not None
        return {
            key: Point(points.payload_of(row), self._vectors(points, row), int(version))
            for row, (key, version) in enumerate(
                zip(points.ids.keys(), points.versions, strict=True)
            )
        }


ODD = parse_filter({"must": {"key": "odd", "match": {"value": True}}})
PAYLOADS = (b"", b'{"odd":true}', b'{"odd":false,"t":"x"}', b'{"odd":true,"t":"%s"}' % (b"y" * 90))


def some_points(dice: random.Random, oracle: Oracle, keys: list[int], payload: bool) -> PointBatch:
    """At times with a vector that does not exist, or that has another length by now."""
    points, dims = PointBatch(PointIds.from_keys(keys)), {n: v.dim for n, v in oracle.dense.items()}
    if dice.random() < 0.15:
        dims[dice.choice(NAMES)] = dice.randint(2, 4)
    for name, dim in dims.items():
        if dice.random() < 0.7:
            values = np.array([[dice.randint(-8, 8) / 4 for _ in range(dim)] for _ in keys])
            present = np.array([dice.random() < 0.7 for _ in keys])
            values[~present] = 0
            points.dense[name] = DenseBlock(
                values.astype(np.float32), None if present.all() else present
            )
    if dice.random() < 0.5:
        lengths = [dice.randint(0, 2) for _ in keys]
        indptr = np.cumsum([0, *lengths]).astype(np.uint32)
        indices = np.concatenate([np.arange(n) for n in lengths]).astype(np.uint32)
        points.sparse["s"] = SparseBlock(
            indptr, indices, indices.astype(np.float32), np.array([n > 0 for n in lengths])
        )
    if payload:
        points.set_payloads([dice.choice(PAYLOADS) for _ in keys])
    return points


def some_write(dice: random.Random, oracle: Oracle, *, at_versions: bool = True) -> Write:
    """at_versions: also updates of points that were not changed since; `apply` must know versions."""
    keys = [dice.choice(KEYS) for _ in range(dice.randint(1, 20))]
    where = Selector(ids=PointIds.from_keys(keys))
    if dice.random() < 0.2:
        where = Selector(filter=ODD)
    forget = tuple(dice.sample((*NAMES, "s", "unknown"), dice.choice([0, 0, 1, 2])))
    match dice.choice(["upsert"] * 6 + ["update"] * 4 + ["alter"] * 2 + [*"abcdef"]):
        case "upsert":
            distinct = list(dict.fromkeys(keys))
            return Upsert(some_points(dice, oracle, distinct, payload=True))
        case "update":
            return _some_update(dice, oracle, keys, forget, at_versions)
        case "alter":
            drop = tuple(dice.sample(NAMES, dice.choice([0, 0, 1, 2])))
            add = {
                name: oracle.dense[name]
                if name in oracle.dense and name not in drop
                else vector(dice.randint(2, 4))
                for name in dice.sample(NAMES, dice.choice([0, 1, 2]))
            }
            return AlterVectors(add, drop)
        case "a":
            return Delete(Selector(ids=PointIds.from_keys(keys[:5])))
        case "b":
            return DeleteVectors(where, tuple(dice.sample((*oracle.dense, "s"), 1)))
        case "c":
            return SetPayload(where, b'{"odd":true}', None, forget)
        case "d":
            return OverwritePayload(where, dice.choice(PAYLOADS[1:]), forget)
        case "e":
            return DeletePayload(where, ("odd", "t"), forget)
        case _:
            return ClearPayload(where, forget)


def _some_update(
    dice: random.Random,
    oracle: Oracle,
    keys: list[int],
    forget: tuple[str, ...],
    at_versions: bool,
) -> UpdateVectors:
    versions = None
    if at_versions and dice.random() < 0.5:
        known = [oracle.points[key].version if key in oracle.points else 0 for key in keys]
        versions = np.array([v - (dice.random() < 0.3) for v in known], np.int64).astype(np.uint64)
    points = some_points(dice, oracle, keys, payload=False)
    return UpdateVectors(points, ODD if dice.random() < 0.2 else None, versions, forget)
