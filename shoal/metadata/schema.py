"""The records in the metadata store, and what follows from them.

    collections/{name}              CollectionRecord   what the collection is; creating or active
    shards/{collection_id}/{shard}  ShardRecord        who holds the shard, in which term
    ids/collection                  IdRecord           the next free collection id
    nodes/{id}                      NodeRecord         a running process, under its lease
    jobs/index/{collection_id}/{shard}/{segment}/{file}
                                    IndexJobRecord     an index to build; see index_node/jobs.py
    monitor/leader                  LeaderRecord       which monitor acts, under its lease
    migrations/leader               LeaderRecord       which coordinator copies, under its lease
    migrations/{collection_id}/{vector}
                                    MigrationProgress  how far its copying is, for people
    monitor/actions                 ActionsRecord      what it did last, for people

One JSON document per key, each with the version of its form. A form that is newer than this code is
refused (FormatTooNew), never guessed at. Records are small; every change is one compare-and-swap on
the revision that was read.

A collection's id is never used twice, so that a shard folder left behind by a crash cannot be
mistaken for a later collection of the same name.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from shoal.api.models import CreateCollection, HnswConfig, VectorParams
from shoal.errors import FormatTooNew, InvariantError
from shoal.limits import KIB
from shoal.storage_api import Distance, ShardKey, ShardSpec, VectorSpec
from shoal.vectors import Datatype, VectorField, VectorFields

__all__ = [
    "ACTIONS_KEY",
    "COLLECTIONS_PREFIX",
    "COLLECTION_ID_KEY",
    "INDEX_JOBS_PREFIX",
    "LEADER_KEY",
    "LOCAL_NODE",
    "MIGRATIONS_LEADER_KEY",
    "NEVER_INDEXED",
    "NODES_PREFIX",
    "SHARDS_PREFIX",
    "ActionsRecord",
    "BoundModel",
    "CollectionRecord",
    "CollectionState",
    "EncoderFacts",
    "Generation",
    "IdRecord",
    "IndexArtifact",
    "IndexJobRecord",
    "IndexJobState",
    "LeaderRecord",
    "MigratedVector",
    "Migration",
    "MigrationPhase",
    "MigrationProgress",
    "NodeRecord",
    "NodeRole",
    "ShardRecord",
    "TakenAction",
    "collection_key",
    "index_job_key",
    "migration_key",
    "node_key",
    "shard_key",
    "shard_spec",
    "stored_name",
    "vector_fields",
    "vector_spec",
]

COLLECTIONS_PREFIX = "collections/"
COLLECTION_ID_KEY = "ids/collection"
SHARDS_PREFIX = "shards/"
NODES_PREFIX = "nodes/"
INDEX_JOBS_PREFIX = "jobs/index/"
LEADER_KEY = "monitor/leader"
ACTIONS_KEY = "monitor/actions"
MIGRATIONS_LEADER_KEY = "migrations/leader"
LOCAL_NODE = "local"  # the one node of a one-machine server
NEVER_INDEXED = 2**62  # index_bytes_min of a vector whose index is switched off


def collection_key(name: str) -> str:
    return COLLECTIONS_PREFIX + name


def shard_key(collection_id: int, shard: int) -> str:
    return f"shards/{collection_id}/{shard}"


def stored_name(vector: str, generation: int) -> str:
    """Under which name a shard holds that generation of a vector. Names that clients give have no
    control characters."""
    return f"{vector}\x1f{generation}" if generation else vector


def index_job_key(shard: ShardKey, segment: int, file: str) -> str:
    return f"{INDEX_JOBS_PREFIX}{shard.collection_id}/{shard.shard}/{segment}/{file}"


def migration_key(collection_id: int, vector: str) -> str:
    return f"migrations/{collection_id}/{vector}"


def node_key(node: str) -> str:
    return NODES_PREFIX + node


class Record(BaseModel):
    """Common to all records. `newest` is the newest form that this code can read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    newest: ClassVar[int] = 1
    version: int = Field(default=1, ge=1)

    def to_bytes(self) -> bytes:
        return self.model_dump_json().encode()

    @classmethod
    def from_bytes(cls, key: str, value: bytes) -> Self:
        """Raises FormatTooNew for a newer form, InvariantError for what we cannot have written."""
        try:
            version = _Versioned.model_validate_json(value).version
            if version > cls.newest:
                raise FormatTooNew(
                    f"the metadata record {key!r} has version {version} and this Shoal reads up to "
                    f"{cls.newest}: start the newer Shoal that wrote it"
                )
            return cls.model_validate_json(value)
        except ValidationError as error:
            raise InvariantError(f"the metadata record {key!r} is damaged: {error}") from error


class _Versioned(BaseModel):
    version: int


class CollectionState(StrEnum):
    """creating: the shards may not all exist; nobody was told that the collection exists. After a
    crash such a record is removed. active: everything exists."""

    CREATING = "creating"
    ACTIVE = "active"


class BoundModel(BaseModel):
    """The model that a vector is bound to. fingerprint: of its weights, once a text was embedded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    fingerprint: str | None = None


class Generation(BaseModel):
    """The vectors that one model made, of all points, where a vector's model is changed. The first
    one, 0, is stored under the vector's own name; see `stored_name`. size: dimensions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    number: int = Field(ge=0)
    size: int
    model: BoundModel


class MigrationPhase(StrEnum):
    """preparing: the shards are told of the other generation; nothing is written there.
    copying: every write brings both, and points that lack the other one get it.
    dropping: nobody uses the other one any more, and the shards are told to forget it."""

    PREPARING = "preparing"
    COPYING = "copying"
    DROPPING = "dropping"


class Migration(BaseModel):
    """What is under way for one vector.

    other       the generation that is kept beside the current one: the new one, after a switch the old
    text_field  JSON path in the payload; a point's vector of the other model is made of this text
    points_per_second  at most, by the background copy. None: no bound. 0: it waits
    switched    the current one is the newer of the two
    complete    all points that have a vector have both, or somebody said that this is good enough;
                then queries may name the other model, too
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    phase: MigrationPhase
    other: Generation
    text_field: str
    points_per_second: float | None = None
    switched: bool = False
    complete: bool = False
    started_at: datetime


class MigratedVector(BaseModel):
    """A vector whose model is being changed, or was. current: what its name means to clients.
    last: the highest number that a generation of it ever had, since none is used twice. floor: for each
    shard how far its log was when the current one was chosen: a read must see at least that, since the
    last vectors may just have been made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    current: Generation
    last: int
    floor: tuple[int, ...] = ()
    migration: Migration | None = None


class CollectionRecord(Record):
    """config is the creation request as it was sent; payload_schema maps a JSON path to the payload
    index that was asked for, as it was sent; models maps a vector to the model that it is bound to,
    which makes it the second form of this record; migrated maps a vector to its generations, which
    makes it the third. Shards are made as `config` says and learn of other generations by their log.
    epoch rises whenever a write must bring, or leave, other vectors than before; shards then refuse
    writes of an older one."""

    newest: ClassVar[int] = 3

    id: int = Field(ge=1)
    name: str
    state: CollectionState
    shard_number: int = Field(ge=1)
    config: dict[str, JsonValue]
    payload_schema: dict[str, dict[str, JsonValue]] = {}
    models: dict[str, BoundModel] = {}
    migrated: dict[str, MigratedVector] = {}
    epoch: int = 0

    @property
    def key(self) -> str:
        return collection_key(self.name)

    def request(self) -> CreateCollection:
        return CreateCollection.model_validate(self.config, strict=False)

    def shards(self) -> list[ShardKey]:
        return [ShardKey(self.id, shard) for shard in range(self.shard_number)]


class ShardRecord(Record):
    """Who holds a shard. The term rises whenever the primary changes."""

    collection_id: int
    shard: int
    term: int = 1
    primary: str = LOCAL_NODE
    in_sync: list[str] = [LOCAL_NODE]
    joining: list[str] = []
    leaving: list[str] = []

    @property
    def key(self) -> str:
        return shard_key(self.collection_id, self.shard)

    def members(self) -> list[str]:
        """Nodes that hold the shard or are about to."""
        return list(dict.fromkeys([*self.in_sync, *self.joining]))


class IdRecord(Record):
    next_id: int = 1


class NodeRole(StrEnum):
    COORDINATOR = "coordinator"
    STORAGE = "storage"
    INDEX = "index"
    MONITOR = "monitor"
    ENCODER = "encoder"


class EncoderFacts(BaseModel):
    """What a rank group serves: see shoal/encoder_api.py, ModelInfo. tp, pp: how it is split."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    aliases: list[str] = []
    dim: int
    max_tokens: int
    fingerprint: str
    precision: str
    tp: int = 1
    pp: int = 1


class NodeRecord(Record):
    """A running process. The record lives under the lease of that process, and a restarted process
    has a new incarnation. grpc, http: "host:port" as others reach it. encoder: of an encoder, which
    has the second form of this record. Statistics are not here: they are asked of the node itself,
    because every change here wakes all watchers."""

    newest: ClassVar[int] = 2

    id: str
    role: NodeRole
    incarnation: str
    grpc: str = ""
    http: str = ""
    zone: str = ""
    draining: bool = False
    encoder: EncoderFacts | None = None

    @property
    def key(self) -> str:
        return node_key(self.id)


class IndexJobState(StrEnum):
    WAITING = "waiting"
    BUILDING = "building"
    DONE = "done"


class IndexArtifact(BaseModel):
    """The finished file, at the index node that is the job's owner. built_on: for people."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int
    crc32c: int
    built_on: str
    seconds: float


class IndexJobRecord(Record):
    """An index that all replicas of a shard want, since they all hold the same segment.

    vectors  size in bytes and crc32c of the file to build over
    source   the node that gives that file, under the id `offer`; "" when it is gone: any replica
             that waits for the index puts itself there
    owner    the index node that builds or has built it, in that incarnation
    failures of index nodes so far; after limits.INDEX_JOB_FAILURES_MAX replicas build for themselves
    """

    collection_id: int
    shard: int
    segment: int
    file: str
    vectors: tuple[int, int]
    count: int
    dim: int
    distance: Distance
    m: int
    ef_construct: int
    state: IndexJobState = IndexJobState.WAITING
    source: str = ""
    offer: str = ""
    owner: str = ""
    incarnation: str = ""
    failures: int = 0
    artifact: IndexArtifact | None = None

    @property
    def key(self) -> str:
        return index_job_key(ShardKey(self.collection_id, self.shard), self.segment, self.file)


class LeaderRecord(Record):
    """The process that acts for all of its kind; the record lives under its lease."""

    node: str
    incarnation: str


class MigrationProgress(Record):
    """How the copying of one migration is going, as the coordinator that does it last said.

    copied             points that it has written since it took this on
    without_text       points that cannot get the other vector, as of its last full pass
    points_per_second  lately. error: why it waits, a sentence; "" while it does not
    """

    node: str
    at: datetime
    copied: int = 0
    without_text: int = 0
    points_per_second: float = 0.0
    error: str = ""


class TakenAction(BaseModel):
    """One change of a shard's record by a monitor, or an attempt at one. at: wall clock, for people.
    reason: a sentence."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    at: datetime
    action: str
    collection_id: int
    shard: int
    node: str
    outcome: str
    reason: str


class ActionsRecord(Record):
    """The last limits.ACTIONS_SHOWN_MAX, oldest first."""

    actions: list[TakenAction] = []


# -- what a creation request means ----------------------------------------------------------------
def vector_fields(request: CreateCollection) -> VectorFields:
    """What a point of this collection may hold."""
    dense = {
        name: VectorField(
            dim=params.size,
            distance=params.distance,
            datatype=params.datatype or Datatype.FLOAT32,
            multi=params.multivector_config is not None,
        )
        for name, params in named_vectors(request).items()
    }
    return VectorFields(dense, frozenset(request.sparse_vectors or ()))


def shard_spec(record: CollectionRecord, shard: int) -> ShardSpec:
    """What a storage node must know to hold one shard of the collection."""
    request = record.request()
    return ShardSpec(
        key=ShardKey(record.id, shard),
        collection=record.name,
        dense={
            name: vector_spec(params, request) for name, params in named_vectors(request).items()
        },
        sparse=tuple(sorted(request.sparse_vectors or ())),
    )


def named_vectors(request: CreateCollection) -> dict[str, VectorParams]:
    """Name -> vector; the unnamed one is ""."""
    vectors = request.vectors
    if vectors is None:
        return {}
    return {"": vectors} if isinstance(vectors, VectorParams) else vectors


def vector_spec(params: VectorParams, request: CreateCollection) -> VectorSpec:
    """How a shard holds one vector of a collection that was made by this request."""
    hnsw = _merged(request.hnsw_config, params.hnsw_config)
    settings: dict[str, Any] = {}
    if hnsw.m:
        settings["hnsw_m"] = hnsw.m
    if hnsw.ef_construct:
        settings["hnsw_ef_construct"] = hnsw.ef_construct
    return VectorSpec(
        dim=params.size,
        distance=params.distance,
        multi=params.multivector_config is not None,
        index_bytes_min=_index_bytes_min(hnsw, request),
        **settings,
    )


def _merged(collection: HnswConfig | None, vector: HnswConfig | None) -> HnswConfig:
    """The vector's own settings over the collection's."""
    merged: dict[str, Any] = {}
    for block in (collection, vector):
        if block is not None:
            merged |= {name: value for name, value in block if value is not None}
    return HnswConfig(**merged)


def _index_bytes_min(hnsw: HnswConfig, request: CreateCollection) -> int | None:
    """Two settings speak about the same bound, both in KiB: the larger one holds."""
    optimizers = request.optimizers_config
    threshold = optimizers.indexing_threshold if optimizers is not None else None
    if hnsw.m == 0 or threshold == 0:
        return NEVER_INDEXED
    given = [kib for kib in (hnsw.full_scan_threshold, threshold) if kib is not None]
    return max(given) * KIB if given else None
