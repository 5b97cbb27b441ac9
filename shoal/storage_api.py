"""What is asked of storage, at two levels. Nothing here knows about HTTP or about disks.

    Storage   what the coordinator asks: a shard, wherever it is. coordinator/router.py answers it
    Node      what the router asks of one storage node: in this process, or over gRPC (shoal/rpc)

Requests may ask questions ("all points that match this filter"); the primary turns them into log
entries that hold effects only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from shoal.api.filter import Filter
from shoal.batch import PointBatch
from shoal.errors import ShoalError
from shoal.ids import PointIds

__all__ = [
    "AlterVectors",
    "ClearPayload",
    "Delete",
    "DeletePayload",
    "DeleteVectors",
    "Distance",
    "FreshRead",
    "Guard",
    "Hits",
    "Node",
    "OverwritePayload",
    "Read",
    "ReplicaStatus",
    "Scroll",
    "Search",
    "Selector",
    "SetPayload",
    "ShardInfo",
    "ShardKey",
    "ShardSpec",
    "Storage",
    "UpdateMode",
    "UpdateVectors",
    "Upsert",
    "VectorSpec",
    "Write",
    "WriteResult",
]


class Distance(StrEnum):
    COSINE = "Cosine"
    DOT = "Dot"
    EUCLID = "Euclid"
    MANHATTAN = "Manhattan"

    @property
    def larger_is_better(self) -> bool:
        return self in (Distance.COSINE, Distance.DOT)


@dataclass(frozen=True, slots=True)
class VectorSpec:
    """One dense vector (or multivector) of a collection, with the settings of its index.

    index_bytes_min: a segment whose vectors take fewer bytes is scanned exactly.
    """

    dim: int
    distance: Distance
    multi: bool = False
    hnsw_m: int = 16
    hnsw_ef_construct: int = 128
    index_bytes_min: int | None = None  # None: from limits.INDEX_FLOATS_MIN


@dataclass(frozen=True, slots=True)
class ShardKey:
    collection_id: int
    shard: int


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """What a shard is created with. What AlterVectors changes later, the shard keeps by itself.

    since  of vectors that came later: the log entry that added each; for storage nodes only.
    epoch  writes of an older one are refused; for storage nodes only.
    """

    key: ShardKey
    collection: str  # for messages to people only; the key identifies
    dense: dict[str, VectorSpec]
    sparse: tuple[str, ...] = ()
    since: Mapping[str, int] = field(default_factory=dict)
    epoch: int = 0


# -- writes ---------------------------------------------------------------------------------------
class UpdateMode(StrEnum):
    UPSERT = "upsert"
    INSERT_ONLY = "insert_only"
    UPDATE_ONLY = "update_only"


@dataclass(frozen=True, slots=True)
class Selector:
    """Which points: exactly one of the two is set. Ids may repeat."""

    ids: PointIds | None = None
    filter: Filter | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """Common to all writes. epoch: of the collection's vectors, as the coordinator knew them that made
    this write; see AlterVectors."""

    epoch: int = 0


@dataclass(frozen=True, slots=True)
class Upsert(Known):
    """Replace whole points. The same id twice in `points`: the later row wins.
    update_filter: an existing point is replaced only if it matches; new ones are inserted."""

    points: PointBatch
    update_filter: Filter | None = None
    mode: UpdateMode = UpdateMode.UPSERT


@dataclass(frozen=True, slots=True)
class UpdateVectors(Known):
    """Replace the vectors present in `points`, keep the rest of each point.

    if_versions  (n,) uint64: a row is applied only if its point exists and its version
                 (PointBatch.versions, which every change of a point moves) is this one. Other rows
                 are left out, and are not reported as missing.
    forget       vectors that a changed point loses by the same entry, unless its row brings them;
                 unknown names are passed over
    """

    points: PointBatch
    update_filter: Filter | None = None
    if_versions: NDArray[np.uint64] | None = None
    forget: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Delete(Known):
    where: Selector


@dataclass(frozen=True, slots=True)
class DeleteVectors(Known):
    where: Selector
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SetPayload(Known):
    """Merge `payload` (JSON object bytes) into each point, at the top or at JSON path `key`.

    forget, here and in the next three: vectors that each changed point loses by the same entry;
    unknown names are passed over."""

    where: Selector
    payload: bytes
    key: str | None = None
    forget: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OverwritePayload(Known):
    where: Selector
    payload: bytes
    forget: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DeletePayload(Known):
    where: Selector
    keys: tuple[str, ...]
    forget: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ClearPayload(Known):
    where: Selector
    forget: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AlterVectors(Known):
    """Change which dense vectors the shard has; nothing is rewritten, and no read fails.

    drop  these are gone from every point; their files follow. An unknown name: nothing.
    add   no point has one of these yet. A name that is there with the same VectorSpec: nothing; with
          another: BadRequest. A name that was dropped, here or before, begins empty again.
    A name in both is dropped first. BadRequest also for sparse vectors and multivectors, which can be
    neither, and beyond limits.SHARD_VECTORS_MAX. Sent again it changes nothing, but for such a name.

    epoch  writes of an older one that come after this are refused with VectorsChanged: they may lack
           what points need by now, or bring what is gone. It never falls.
    """

    add: Mapping[str, VectorSpec] = field(default_factory=dict)
    drop: tuple[str, ...] = ()


Write = (
    Upsert
    | UpdateVectors
    | Delete
    | DeleteVectors
    | SetPayload
    | OverwritePayload
    | DeletePayload
    | ClearPayload
    | AlterVectors
)


@dataclass(frozen=True, slots=True)
class WriteResult:
    """sequence: log position; the write is durable and visible.
    missing: the first selected id that does not exist, as a key. The others were changed."""

    sequence: int
    missing: int | None = None


# -- reads ----------------------------------------------------------------------------------------
@dataclass(slots=True)
class Search:
    """The `limit` best points for one dense query vector.

    vector           (dim,) float32, finite; already normalised when the distance is Cosine
    ef               beam width; None = default. exact: no index.
    score_threshold  keep only better scores: > it (Cosine, Dot) or < it (Euclid, Manhattan)
    with_vectors     True = all, or the names wanted
    """

    using: str
    vector: NDArray[np.float32]
    limit: int
    filter: Filter | None = None
    exclude: tuple[int, ...] = ()  # keys
    score_threshold: float | None = None
    exact: bool = False
    ef: int | None = None
    with_payload: bool = False
    with_vectors: bool | tuple[str, ...] = False


@dataclass(slots=True)
class Hits:
    """points and scores (n,) float32, best first; equal scores in ascending id order. n == limit
    whenever at least `limit` points match; all n match the filter."""

    points: PointBatch
    scores: NDArray[np.float32]


@dataclass(slots=True)
class Scroll:
    """Points in ascending id order from key `start` (inclusive), at most `limit`."""

    limit: int
    start: int | None = None
    filter: Filter | None = None
    with_payload: bool = True
    with_vectors: bool | tuple[str, ...] = False


@dataclass(slots=True)
class ShardInfo:
    points: int = 0
    indexed_vectors: int = 0  # vectors in segments that have an index
    vectors: dict[str, int] = field(default_factory=dict)  # name -> points having it
    segments: int = 0
    pending: int = 0  # segments waiting for a merge or an index; 0 = settled
    applied: int = 0  # log sequence number
    bytes_on_disk: int = 0
    stopped: str | None = None  # why this shard serves nothing, for people


# -- how fresh a read must be ---------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Read:
    """What a client asks of the freshness of one read.

    strong   sees every write that anybody was told of before the read began: asked of the primary
             inside its lease. Else: every write that this coordinator, or `token`, has seen.
    token    shard -> sequence number that the answer must include at least (read-your-writes
             across coordinators).
    """

    strong: bool = False
    token: Mapping[ShardKey, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Guard:
    """The same, as one replica is asked: answer only with `min_applied` applied (waiting shortly for
    it), and if `strong` only as a primary inside its lease. Otherwise it raises Stale or NotPrimary,
    and another replica can be asked."""

    min_applied: int = 0
    strong: bool = False


T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class FreshRead(Generic[T_co]):
    """An answer, and the sequence number up to which the replica had applied the log when it read."""

    value: T_co
    applied: int


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """One replica as it sees itself: for the monitor, for health, for joining.

    role      "primary", "secondary", "joining", "stopped"
    durable   last sequence number on its disk; committed: last one that all in-sync replicas hold
    writable  False while its disk is too full to take writes
    metadata_lost_s  how long ago this node last heard from the metadata store; 0 while it does
    unread    the node that said, within the last minute, what this replica could not read: it runs
              another version; "" for none
    """

    node: str
    role: str
    term: int
    durable: int
    committed: int
    writable: bool
    key: ShardKey
    info: ShardInfo
    metadata_lost_s: float = 0.0
    unread: str = ""


class Node(Protocol):
    """One storage node. Reads name the shard and a guard; every answer says how fresh it is.

    Raises, besides the errors of the request itself:
      NotPrimary    a write, or a strong read, came to a replica that is not the primary in its lease
      Stale         the replica has not applied what the guard asks for, and did not within a moment
      Unavailable   unreachable; for a write `maybe_applied` says whether it may have happened
      TimedOut      the deadline passed; a write may have happened
    """

    async def write(self, shard: ShardKey, op: Write) -> WriteResult: ...
    async def search(self, shard: ShardKey, query: Search, guard: Guard) -> FreshRead[Hits]: ...
    async def retrieve(
        self,
        shard: ShardKey,
        ids: PointIds,
        with_payload: bool,
        with_vectors: bool | tuple[str, ...],
        guard: Guard,
    ) -> FreshRead[PointBatch]: ...
    async def scroll(
        self, shard: ShardKey, query: Scroll, guard: Guard
    ) -> FreshRead[PointBatch]: ...
    async def count(
        self, shard: ShardKey, filter: Filter | None, guard: Guard
    ) -> FreshRead[int]: ...
    async def info(self, shard: ShardKey) -> ShardInfo: ...
    async def status(self) -> list[ReplicaStatus]:
        """Every replica on this node."""
        ...

    async def create_shard(self, spec: ShardSpec) -> None:
        """Make an empty replica: only while the collection is being created. Again: nothing."""
        ...

    async def drop_shard(self, shard: ShardKey) -> None: ...


class Storage(Protocol):
    """All shards, wherever they are. Every method may raise the errors of shoal.errors.

    A write is durable (fsynced by every in-sync replica) and visible when `write` returns. Cancelled
    or timed out, it may still happen. Reads see every write that returned before they were called
    through the same Storage, and never less than an earlier read saw; see Read for more.
    """

    async def write(self, shard: ShardKey, op: Write) -> WriteResult: ...
    async def search(self, shard: ShardKey, query: Search, read: Read = ...) -> Hits: ...
    async def retrieve(
        self,
        shard: ShardKey,
        ids: PointIds,
        with_payload: bool,
        with_vectors: bool | tuple[str, ...],
        read: Read = ...,
    ) -> PointBatch:
        """The points that exist, in the order asked; missing ids are skipped."""
        ...

    async def scroll(self, shard: ShardKey, query: Scroll, read: Read = ...) -> PointBatch: ...
    async def count(self, shard: ShardKey, filter: Filter | None, read: Read = ...) -> int: ...
    async def info(self, shard: ShardKey) -> ShardInfo: ...
    async def statuses(self) -> dict[str, list[ReplicaStatus] | ShoalError]:
        """What every node that holds a shard says of its replicas, or why it says nothing."""
        ...

    def extra_requests(self) -> dict[str, int]:
        """Kind -> how many requests beyond the first ones were sent since the start."""
        ...

    async def create_shard(self, spec: ShardSpec) -> None:
        """On every node of the shard's record."""
        ...

    async def drop_shard(self, shard: ShardKey) -> None: ...
