"""SipHash-2-4 with a zero key over the bytes of point ids, for many ids at once.

Aumasson and Bernstein, "SipHash: a fast short-input PRF", 2012. The slice condition is defined by it:
a number is hashed as its 8 little-endian bytes, a UUID as its 16 bytes in network order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shoal.ids import PointIds

__all__ = ["hash_keys"]

_U64 = NDArray[np.uint64]


def hash_keys(keys: Sequence[int]) -> _U64:
    """(n,) uint64, one hash for each id key."""
    ids = PointIds.from_keys(keys)
    if ids.is_uuid is None or ids.hi is None:
        return _siphash([ids.lo], 8)
    numbers = _siphash([ids.lo], 8)
    uuids = _siphash([ids.hi.byteswap(), ids.lo.byteswap()], 16)
    return np.where(ids.is_uuid, uuids, numbers)


def _siphash(blocks: list[_U64], byte_count: int) -> _U64:
    shape = blocks[0].shape
    v0 = np.full(shape, 0x736F6D6570736575, np.uint64)
    v1 = np.full(shape, 0x646F72616E646F6D, np.uint64)
    v2 = np.full(shape, 0x6C7967656E657261, np.uint64)
    v3 = np.full(shape, 0x7465646279746573, np.uint64)
    for block in [*blocks, np.full(shape, byte_count << 56, np.uint64)]:
        v3 = v3 ^ block
        for _ in range(2):
            v0, v1, v2, v3 = _round(v0, v1, v2, v3)
        v0 = v0 ^ block
    v2 = v2 ^ np.uint64(0xFF)
    for _ in range(4):
        v0, v1, v2, v3 = _round(v0, v1, v2, v3)
    return v0 ^ v1 ^ v2 ^ v3


def _round(v0: _U64, v1: _U64, v2: _U64, v3: _U64) -> tuple[_U64, _U64, _U64, _U64]:
    v0 = v0 + v1
    v1 = _rotated(v1, 13) ^ v0
    v0 = _rotated(v0, 32)
    v2 = v2 + v3
    v3 = _rotated(v3, 16) ^ v2
    v0 = v0 + v3
    v3 = _rotated(v3, 21) ^ v0
    v2 = v2 + v1
    v1 = _rotated(v1, 17) ^ v2
    v2 = _rotated(v2, 32)
    return v0, v1, v2, v3


def _rotated(x: _U64, by: int) -> _U64:
    return (x << np.uint64(by)) | (x >> np.uint64(64 - by))
