"""Packed bitmaps over the rows of a segment: what filters compute and Faiss selectors read.

Bits of n rows are (ceil(n / 8),) uint8; row r is bit r % 8 of byte r // 8, and the bits past the last
row are always 0, so that AND, OR, counting and inverting need no special case for the last byte.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Bits", "Rows", "count", "full", "inverted", "none", "of_rows", "to_mask", "to_rows"]

Bits = NDArray[np.uint8]
Rows = NDArray[np.uint32]

# With fewer rows than one in so many, setting single bits beats writing a byte for every row first.
# Measured with 100,000 rows: 390 rows take 6.6 us against 5.4, 97 rows 4.3 against 4.9.
_SPARSE_SHARE = 256


def none(n: int) -> Bits:
    return np.zeros((n + 7) // 8, np.uint8)


def full(n: int) -> Bits:
    """All n rows."""
    out = np.full((n + 7) // 8, 255, np.uint8)
    if n % 8:
        out[-1] = (1 << (n % 8)) - 1
    return out


def inverted(bits: Bits, n: int) -> Bits:
    return np.bitwise_xor(bits, full(n))


def of_rows(rows: Rows, n: int) -> Bits:
    """The bitmap of some rows < n; any order, repeats allowed."""
    if len(rows) * _SPARSE_SHARE < n:
        out = none(n)
        np.bitwise_or.at(out, rows >> np.uint32(3), _BIT[rows & np.uint32(7)])
        return out
    mask = np.zeros(n, np.bool_)
    mask[rows] = True
    return np.packbits(mask, bitorder="little")


_BIT = np.array([1, 2, 4, 8, 16, 32, 64, 128], np.uint8)


def to_mask(bits: Bits, n: int) -> NDArray[np.bool_]:
    return np.unpackbits(bits, count=n, bitorder="little").view(np.bool_)


def to_rows(bits: Bits, n: int) -> Rows:
    """The rows of a bitmap, ascending."""
    return np.flatnonzero(to_mask(bits, n)).astype(np.uint32)


def count(bits: Bits) -> int:
    return int(np.bitwise_count(bits).sum())
