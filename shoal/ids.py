"""Point ids: unsigned 64-bit numbers or UUIDs, and their packed form.

Inside Shoal an id is a *key*, one Python int: a number is itself, a UUID is its 128-bit value plus
2**128. Keys order as the API does (numbers before UUIDs, then by value), and cannot collide.
A `PointIds` holds many keys as numpy arrays, with no Python object per id.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from shoal.errors import BadRequest
from shoal.wire import ops_pb2 as wire

__all__ = ["UUID_BIT", "PointIds", "format_id", "parse_id"]

UUID_BIT = 1 << 128
_U64_MAX = (1 << 64) - 1


def parse_id(value: object) -> int:
    """A JSON value -> key. Accepts 0..2**64-1 and every spelling of a UUID that `uuid.UUID` does
    (simple, hyphenated, urn, braced, any case). Raises BadRequest for everything else."""
    if type(value) is int:
        if 0 <= value <= _U64_MAX:
            return value
    elif isinstance(value, str):
        try:
            return UUID_BIT | uuid.UUID(value).int
        except ValueError:
            pass
    raise BadRequest(
        f"Wrong input: {value!r} is not a valid point ID, valid values are either an unsigned "
        "integer or a UUID"
    )


def format_id(key: int) -> int | str:
    """A key -> its JSON value: the number, or the canonical UUID text."""
    return key if key < UUID_BIT else str(uuid.UUID(int=key ^ UUID_BIT))


class PointIds:
    """n ids in row order.

    hi, lo   (n,) uint64: the upper and lower halves; hi is 0 for a number.
    is_uuid  (n,) bool, or None when no row is a UUID (the common case costs nothing).
    """

    __slots__ = ("hi", "is_uuid", "lo")

    def __init__(
        self,
        lo: NDArray[np.uint64],
        hi: NDArray[np.uint64] | None = None,
        is_uuid: NDArray[np.bool_] | None = None,
    ) -> None:
        if is_uuid is not None and not is_uuid.any():
            hi = is_uuid = None
        self.lo, self.hi, self.is_uuid = lo, hi, is_uuid

    def __len__(self) -> int:
        return len(self.lo)

    @classmethod
    def from_keys(cls, keys: Sequence[int]) -> PointIds:
        if not keys or max(keys) <= _U64_MAX:
            return cls(np.array(keys, dtype=np.uint64))
        lo = np.fromiter((key & _U64_MAX for key in keys), np.uint64, len(keys))
        hi = np.fromiter(((key >> 64) & _U64_MAX for key in keys), np.uint64, len(keys))
        is_uuid = np.fromiter((key >= UUID_BIT for key in keys), np.bool_, len(keys))
        return cls(lo, hi, is_uuid)

    def keys(self) -> list[int]:
        low: list[int] = self.lo.tolist()
        if self.is_uuid is None or self.hi is None:
            return low
        high: list[int] = self.hi.tolist()
        flags: list[bool] = self.is_uuid.tolist()
        return [
            (UUID_BIT | (h << 64) | bottom) if flag else bottom
            for bottom, h, flag in zip(low, high, flags, strict=True)
        ]

    def key(self, row: int) -> int:
        low = int(self.lo[row])
        if self.is_uuid is None or self.hi is None or not self.is_uuid[row]:
            return low
        return UUID_BIT | (int(self.hi[row]) << 64) | low

    def take(self, rows: NDArray[np.integer]) -> PointIds:
        if self.is_uuid is None or self.hi is None:
            return PointIds(self.lo[rows])
        return PointIds(self.lo[rows], self.hi[rows], self.is_uuid[rows])

    @classmethod
    def concat(cls, parts: Iterable[PointIds]) -> PointIds:
        parts = list(parts)
        lo = np.concatenate([p.lo for p in parts]) if parts else np.empty(0, np.uint64)
        if all(p.is_uuid is None for p in parts):
            return cls(lo)
        hi = np.concatenate([np.zeros(len(p), np.uint64) if p.hi is None else p.hi for p in parts])
        flags = [np.zeros(len(p), np.bool_) if p.is_uuid is None else p.is_uuid for p in parts]
        return cls(lo, hi, np.concatenate(flags))

    def order(self) -> NDArray[np.intp]:
        """Rows in ascending key order; stable."""
        if self.is_uuid is None or self.hi is None:
            return np.argsort(self.lo, kind="stable")
        return np.lexsort((self.lo, self.hi, self.is_uuid))

    def shards(self, shard_count: int) -> NDArray[np.uint32]:
        """(n,) uint32: the shard of each id. A pure function of id and count: splitmix64 finaliser
        (Steele, Lea, Flood 2014) of both halves, modulo `shard_count`."""
        if shard_count == 1:
            return np.zeros(len(self), np.uint32)
        mixed = _mix(self.lo)
        if self.is_uuid is not None and self.hi is not None:
            mixed = np.where(self.is_uuid, _mix(mixed ^ self.hi), mixed)
        return (mixed % np.uint64(shard_count)).astype(np.uint32)

    def to_wire(self) -> wire.PointIds:
        message = wire.PointIds()
        self.fill(message)
        return message

    def fill(self, message: wire.PointIds) -> None:
        """`to_wire` into an empty message that is part of another one."""
        message.SetInParent()
        if self.is_uuid is None or self.hi is None:
            message.ints = self.lo.astype("<u8", copy=False).tobytes()
            return
        flags = self.is_uuid
        pairs = np.stack([self.hi[flags], self.lo[flags]], axis=1).astype(">u8")
        message.ints = self.lo[~flags].astype("<u8", copy=False).tobytes()
        message.uuids = pairs.tobytes()
        if not flags.all():
            message.kinds = flags.astype(np.uint8).tobytes()

    @classmethod
    def from_wire(cls, message: wire.PointIds) -> PointIds:
        ints = np.frombuffer(message.ints, "<u8")
        if not message.uuids:
            return cls(ints)
        pairs = np.frombuffer(message.uuids, ">u8").reshape(-1, 2).astype(np.uint64)
        if message.kinds:
            flags = np.frombuffer(message.kinds, np.uint8).astype(np.bool_)
        else:
            flags = np.ones(len(pairs), np.bool_)
        uuid_count = int(np.count_nonzero(flags))
        if uuid_count != len(pairs) or len(flags) - uuid_count != len(ints):
            raise ValueError(f"{len(ints)} numbers and {len(pairs)} UUIDs do not fit their kinds")
        lo, hi = np.empty(len(flags), np.uint64), np.zeros(len(flags), np.uint64)
        lo[~flags], lo[flags], hi[flags] = ints, pairs[:, 1], pairs[:, 0]
        return cls(lo, hi, flags)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
