"""Vectors on their way in: finite, in the collection's datatype, and of length 1 under Cosine.

The coordinator runs this once, on whole blocks, before a point reaches a log. Everything behind it
relies on it: storage never sees NaN or infinity, and treats Cosine as the inner product of unit
vectors. What is left out here: dimensions and names (coordinator/parse.py knows which point to
blame for those).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from shoal.storage_api import Distance

__all__ = ["Datatype", "VectorField", "VectorFields", "prepare_query", "prepare_rows"]

_FLOAT32_MAX = float(np.finfo(np.float32).max)
# A sum of squares up to here proves that every element fits a float32.
_SQUARES_MAX = _FLOAT32_MAX * _FLOAT32_MAX
# |length^2 - 1| up to here counts as length 1: a vector that was read from us and is written back
# stays bit for bit the same. The score moves by less than float32 rounding over the dimensions.
_UNIT_TOLERANCE = 1e-6


class Datatype(StrEnum):
    """What one element of a stored vector can express. Memory holds float32 for all of them."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    UINT8 = "uint8"


@dataclass(frozen=True, slots=True)
class VectorField:
    """How one dense vector (or multivector) of a collection is written."""

    dim: int
    distance: Distance
    datatype: Datatype = Datatype.FLOAT32
    multi: bool = False


@dataclass(frozen=True, slots=True)
class VectorFields:
    """All vectors of a collection. The unnamed one is called ""."""

    dense: Mapping[str, VectorField] = field(default_factory=dict)
    sparse: frozenset[str] = frozenset()

    def __contains__(self, name: str) -> bool:
        return name in self.dense or name in self.sparse


def prepare_rows(values: NDArray[np.float32], to: VectorField) -> int | None:
    """Bring the rows of a block into the form that is stored, in place.

    values   (n, dim) float32, C order, writable. Rows of zeros stay zeros (also under Cosine).
    Returns  the first row that holds NaN or infinity, or that does not fit the datatype; None when
             all are fine. After a bad row the block is to be thrown away.

    uint8 cuts the fraction off and clamps to 0..255; under Cosine the result is then normalised,
    so that scores are the cosine of the stored bytes. float16 rounds to nearest, after normalising.
    """
    if len(values) == 0:
        return None
    bad = _first_not_finite(values)
    if bad is not None:
        return bad
    if to.datatype is Datatype.UINT8:
        np.trunc(values, out=values)
        np.clip(values, 0, 255, out=values)
    if to.distance is Distance.COSINE:
        _normalize(values)
    if to.datatype is Datatype.FLOAT16:
        with np.errstate(over="ignore"):
            values[:] = values.astype(np.float16)
        return _first_not_finite(values)
    return None


def prepare_query(vector: NDArray[np.float64], to: VectorField) -> NDArray[np.float32] | None:
    """(dim,) float64 -> (dim,) float32 to search with; of length 1 under Cosine unless it is zero.
    None when an element is NaN, infinite, or too large for float32. The datatype does not matter:
    a query is not rounded."""
    with np.errstate(over="ignore"):
        squares = float(np.dot(vector, vector))
    if not squares <= _SQUARES_MAX and not (np.abs(vector) <= _FLOAT32_MAX).all():
        return None
    if to.distance is not Distance.COSINE or abs(squares - 1.0) <= _UNIT_TOLERANCE:
        return vector.astype(np.float32)
    # elements are float32 at most here, so their squares cannot overflow a float64
    return (
        (vector / math.sqrt(squares)).astype(np.float32) if squares else vector.astype(np.float32)
    )


def _first_not_finite(values: NDArray[np.float32]) -> int | None:
    finite = np.isfinite(values)
    if finite.all():
        return None
    return int(np.argmin(finite.all(axis=1)))


def _normalize(values: NDArray[np.float32]) -> None:
    # float64: the squares of large float32 overflow a float32, those of small ones vanish in it
    squares = np.einsum("ij,ij->i", values, values, dtype=np.float64)
    lengths = np.sqrt(squares)
    lengths[(squares == 0.0) | (np.abs(squares - 1.0) <= _UNIT_TOLERANCE)] = 1.0
    # lengths that are no proper float32 themselves: these rows are divided in float64
    extreme = (lengths > 1e30) | (lengths < 1e-30)
    values /= np.where(extreme, 1.0, lengths).astype(np.float32)[:, np.newaxis]
    for row in np.flatnonzero(extreme):
        values[row] = values[row] / lengths[row]
