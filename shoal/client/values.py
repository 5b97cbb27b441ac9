"""What goes into the client and what comes out of it: arrays and small dataclasses.

Vectors are numpy arrays on both sides, (n, dim) float32, one row a point. What is not one dense
vector per point has a type of its own: `Dense` (some points lack it), `Texts` (the server makes the
vectors), `Sparse`, `Multi`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar, overload
from uuid import UUID

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Batch",
    "CollectionInfo",
    "Consistency",
    "Datatype",
    "Dense",
    "Distance",
    "Exclude",
    "Hit",
    "Hits",
    "Hnsw",
    "Ids",
    "Include",
    "Multi",
    "Page",
    "Payload",
    "Point",
    "PointId",
    "Points",
    "Sparse",
    "SparseVector",
    "Texts",
    "UpdateMode",
    "UploadProgress",
    "VectorParams",
    "Vectors",
    "WithPayload",
    "WriteResult",
]

PointId: TypeAlias = int | str  # a number from 0 to 2**64 - 1, or a UUID as text
Ids: TypeAlias = Sequence[int | str | UUID] | NDArray[np.integer]
Payload: TypeAlias = dict[str, Any]
Distance: TypeAlias = Literal["Cosine", "Dot", "Euclid", "Manhattan"]
Datatype: TypeAlias = Literal["float32", "float16", "uint8"]
UpdateMode: TypeAlias = Literal["upsert", "insert_only", "update_only"]
# "strong": sees every write that anybody was told of; asked of the primaries.
Consistency: TypeAlias = Literal["default", "strong"]


# -- in -------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """values (n, dim), any real dtype. present (n,) bool; None: every point has the vector."""

    values: ArrayLike
    present: ArrayLike | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """One text per point, which the server turns into the vector; None: this point has none.
    model: "" is the one that the vector is bound to, else the one that comes with Shoal."""

    texts: Sequence[str | None]
    model: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class SparseVector:
    """indices (k,) uint32, ascending and unique; values (k,) float32."""

    indices: NDArray[np.uint32]
    values: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Sparse:
    """One sparse vector per point; None: this point has none. A pair is (indices, values)."""

    rows: Sequence[SparseVector | tuple[ArrayLike, ArrayLike] | None]


@dataclass(frozen=True, slots=True, eq=False)
class Multi:
    """One multivector per point, (t, dim) with a t of its own; None: this point has none."""

    rows: Sequence[ArrayLike | None]


Column: TypeAlias = ArrayLike | Dense | Texts | Sparse | Multi
# The unnamed vector, or a column for each name.
Vectors: TypeAlias = Column | Mapping[str, Column]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Points to write. payloads: one JSON object per point, None for none."""

    ids: Ids
    vectors: Vectors | None = None
    payloads: Sequence[Mapping[str, Any] | None] | None = None


@dataclass(frozen=True, slots=True)
class Include:
    """Only these parts of each payload, by JSON path."""

    paths: Sequence[str]


@dataclass(frozen=True, slots=True)
class Exclude:
    """All of each payload but these parts, by JSON path."""

    paths: Sequence[str]


# A sequence of paths is an Include.
WithPayload: TypeAlias = bool | Include | Exclude | Sequence[str]


@dataclass(frozen=True, slots=True)
class Hnsw:
    """Settings of the graph index; None: the server's default. m = 0 switches it off.
    full_scan_threshold_kib: segments with fewer KiB of vectors are scanned exactly."""

    m: int | None = None
    ef_construct: int | None = None
    full_scan_threshold_kib: int | None = None


@dataclass(frozen=True, slots=True)
class VectorParams:
    """One vector of a collection. Under Cosine vectors are stored with length 1."""

    size: int
    distance: Distance = "Cosine"
    datatype: Datatype = "float32"
    multivector: bool = False
    hnsw: Hnsw | None = None


# -- out ------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """payload: None when it was not asked for. vectors: those asked for that the point has: (dim,)
    float32, (t, dim) float32 for a multivector, or a SparseVector."""

    id: PointId
    payload: Payload | None = None
    vectors: Mapping[str, NDArray[np.float32] | SparseVector] = field(default_factory=dict)

    @property
    def vector(self) -> NDArray[np.float32] | SparseVector | None:
        """The unnamed one."""
        return self.vectors.get("")


@dataclass(frozen=True, slots=True, eq=False)
class Hit(Point):
    """score: larger is better under Cosine and Dot, smaller under Euclid and Manhattan."""

    score: float = 0.0


P = TypeVar("P", bound=Point)


@dataclass(frozen=True, slots=True, eq=False)
class Columns(Sequence[P]):
    """n points, as columns and as a sequence.

    payloads  None when they were not asked for.
    dense     name -> (n, dim) float32; the row of a point that lacks the vector holds NaN.
    sparse, multi  name -> one entry per point, None where it lacks the vector.
    """

    ids: list[PointId]
    payloads: list[Payload] | None = None
    dense: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    sparse: Mapping[str, Sequence[SparseVector | None]] = field(default_factory=dict)
    multi: Mapping[str, Sequence[NDArray[np.float32] | None]] = field(default_factory=dict)

    @abstractmethod
    def _at(self, row: int) -> P: ...

    @property
    def vectors(self) -> NDArray[np.float32]:
        """(n, dim) float32: the unnamed vector. KeyError when it was not asked for."""
        return self.dense[""]

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> P: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[P]: ...
    def __getitem__(self, index: int | slice) -> P | Sequence[P]:
        rows = range(len(self))[index]
        return self._at(rows) if isinstance(rows, int) else [self._at(row) for row in rows]

    def __iter__(self) -> Iterator[P]:
        return map(self._at, range(len(self)))

    def _payload_of(self, row: int) -> Payload | None:
        return None if self.payloads is None else self.payloads[row]

    def _vectors_of(self, row: int) -> dict[str, NDArray[np.float32] | SparseVector]:
        found: dict[str, NDArray[np.float32] | SparseVector] = {
            name: values[row] for name, values in self.dense.items() if not np.isnan(values[row, 0])
        }
        for name, sparse in self.sparse.items():
            if (one := sparse[row]) is not None:
                found[name] = one
        for name, multi in self.multi.items():
            if (many := multi[row]) is not None:
                found[name] = many
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Points(Columns[Point]):
    """Points that were read."""

    def _at(self, row: int) -> Point:
        return Point(self.ids[row], self._payload_of(row), self._vectors_of(row))


@dataclass(frozen=True, slots=True, eq=False)
class Hits(Columns[Hit]):
    """Points that were found, best first. scores (n,) float32. truncated_texts: 1 when the text that
    was asked for is longer than its model reads, so that only its beginning counted."""

    scores: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    truncated_texts: int = 0

    def _at(self, row: int) -> Hit:
        return Hit(
            self.ids[row], self._payload_of(row), self._vectors_of(row), float(self.scores[row])
        )


@dataclass(frozen=True, slots=True)
class Page:
    """One step through a collection. next: where to go on; None at the end."""

    points: Points
    next: PointId | None


@dataclass(frozen=True, slots=True)
class WriteResult:
    """The write is durable and visible.

    operation_id     log sequence number; the largest of the shards touched.
    token            another client that gives it to `remember` sees this write. This client has done
                     so already.
    truncated_texts  that are longer than their model reads: the vectors are of their beginnings.
    """

    operation_id: int
    token: str
    truncated_texts: int = 0


@dataclass(frozen=True, slots=True)
class UploadProgress:
    """points, batches: acknowledged so far, and so durable. seconds: since the beginning.
    truncated_texts: see `WriteResult`."""

    points: int
    batches: int
    seconds: float
    truncated_texts: int = 0


@dataclass(frozen=True, slots=True)
class CollectionInfo:
    """status: green = settled; yellow = segments wait for an index or a merge; red = a shard
    stopped, and `why` says what of."""

    name: str
    status: Literal["green", "yellow", "red"]
    why: str
    points_count: int
    indexed_vectors_count: int
    segments_count: int
    vectors: Mapping[str, VectorParams]
    sparse_vectors: Sequence[str]
    shard_number: int
    replication_factor: int
    write_consistency_factor: int
    metadata: Mapping[str, Any] | None
