"""The HTTP API in types: every request and response of level L1, as /openapi.json shows them.

Three rules:

- **What is asked of points is closed** (`Strict`): an unknown field in a query, a selector or a
  point is an error, because a filter that is dropped in silence returns other people's data.
- **How a collection is kept is open** (`ConfigBlock`): clients send new tuning fields every few
  months. Unknown ones are kept, shown again by `GET`, and otherwise without effect.
- **What we know and cannot do is refused by name** (`Unsupported`), never ignored.

The hot paths (query, upsert, scroll) do not go through these models when the request has the common
shape (coordinator/parse.py); both readings must agree, and tests compare them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    StrictBool,
    StrictInt,
    StrictStr,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from shoal.api.filter import FilterField
from shoal.errors import BadRequest, InvalidField
from shoal.limits import (
    BATCH_OPERATIONS_MAX,
    BATCH_POINTS_MAX,
    HNSW_EF_MAX,
    HNSW_M_MAX,
    HNSW_M_MIN,
    IDS_MAX,
    SCROLL_LIMIT_MAX,
    SEARCH_LIMIT_MAX,
    SHARDS_PER_COLLECTION_MAX,
    TEXTS_PER_REQUEST_MAX,
    VECTOR_DIM_MAX,
    VECTORS_PER_POINT_MAX,
)
from shoal.storage_api import Distance, UpdateMode
from shoal.vectors import Datatype

__all__ = [
    "AliasesResult",
    "Batch",
    "BatchResult",
    "ClusterPeers",
    "ClusterReport",
    "CollectionCluster",
    "CollectionDescription",
    "CollectionInfo",
    "CollectionsResult",
    "CountRequest",
    "CountResult",
    "CreateCollection",
    "CreateFieldIndex",
    "DeletePayload",
    "DeleteVectors",
    "Document",
    "EmbedRequest",
    "EmbedResult",
    "Envelope",
    "ErrorBody",
    "ExistsResult",
    "HnswConfig",
    "MultiVectorConfig",
    "NearestQuery",
    "PayloadExclude",
    "PayloadInclude",
    "PointRequest",
    "PointStruct",
    "PointVectors",
    "PointsBatch",
    "PointsList",
    "PointsSelector",
    "QueryRequest",
    "QueryResult",
    "Record",
    "ScoredPoint",
    "ScrollRequest",
    "ScrollResult",
    "SearchParams",
    "Selection",
    "SetPayload",
    "SparseVector",
    "SparseVectorParams",
    "UpdateOperations",
    "UpdateResult",
    "UpdateStatus",
    "UpdateVectors",
    "VectorParams",
    "VersionInfo",
    "WithPayload",
    "WithVector",
]


class Strict(BaseModel):
    """A closed request: unknown fields are errors, and no text is taken for a number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ConfigBlock(BaseModel):
    """An open block of settings: unknown fields are kept as they came."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


_UNSUPPORTED = {
    "prefetch": "several query stages",
    "lookup_from": "vectors from another collection",
    "order_by": "order by a payload value",
    "shard_key": "custom sharding",
    "group_by": "grouping",
    "mmr": "maximal marginal relevance",
    "idf": "inverse document frequencies of another corpus",
}


def _refuse(value: JsonValue, info: ValidationInfo) -> None:
    if value in (None, []):
        return
    name = info.field_name or ""
    raise BadRequest(
        f"Wrong input: `{name}` ({_UNSUPPORTED[name]}) is not supported by this version of Shoal: "
        "leave it out"
    )


# A field of the API that this version cannot honour. Null counts as absent.
Unsupported = Annotated[
    JsonValue,
    AfterValidator(_refuse),
    WithJsonSchema({"type": "null", "description": "Not supported by this version."}),
]

PointId = Annotated[
    StrictInt | StrictStr,
    Field(description="An unsigned 64-bit number or a UUID.", examples=[42]),
]
PointIdList = Annotated[list[PointId], Field(max_length=IDS_MAX)]
Payload = Annotated[dict[str, JsonValue], Field(description="Any JSON object.")]


# -- collections ----------------------------------------------------------------------------------
class HnswConfig(ConfigBlock):
    """Settings of the graph index. m = 0 switches the index off."""

    m: Literal[0] | Annotated[int, Field(ge=HNSW_M_MIN, le=HNSW_M_MAX)] | None = None
    ef_construct: Annotated[int, Field(ge=4, le=10_000)] | None = None
    full_scan_threshold: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="KiB of vectors in a segment below which it is scanned exactly."
    )


class OptimizersConfig(ConfigBlock):
    indexing_threshold: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="KiB of vectors in a segment from which it gets an index; 0 = never.",
    )


class MultiVectorConfig(ConfigBlock):
    comparator: Literal["max_sim"] = "max_sim"


class VectorParams(ConfigBlock):
    """One dense vector, or a multivector when `multivector_config` is there."""

    size: Annotated[int, Field(ge=1, le=VECTOR_DIM_MAX)]
    distance: Distance
    datatype: Datatype | None = None
    hnsw_config: HnswConfig | None = None
    multivector_config: MultiVectorConfig | None = None
    on_disk: bool | None = None
    shoal_model: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="The model that its vectors are of; see coordinator/binding.py."
    )


class SparseVectorParams(ConfigBlock):
    """A sparse vector. It is stored and returned; searching it is not supported yet."""

    modifier: Literal["none", "idf"] | None = None


def _vectors_kind(value: object) -> str:
    # {"size": 4, "distance": …} or {"title": {"size": …}}; a vector may itself be named "size"
    if isinstance(value, VectorParams):
        return "one"
    if isinstance(value, dict) and not all(
        isinstance(v, dict | VectorParams) for v in value.values()
    ):
        return "one"
    return "named"


VectorsConfig = Annotated[
    Annotated[VectorParams, Tag("one")]
    | Annotated[dict[str, VectorParams], Field(max_length=VECTORS_PER_POINT_MAX), Tag("named")],
    Discriminator(_vectors_kind),
]


class CreateCollection(ConfigBlock):
    """What a collection is to be. Everything that was sent is shown again by `GET`."""

    vectors: VectorsConfig | None = None
    sparse_vectors: (
        Annotated[dict[str, SparseVectorParams], Field(max_length=VECTORS_PER_POINT_MAX)] | None
    ) = None
    shard_number: Annotated[int, Field(ge=1, le=SHARDS_PER_COLLECTION_MAX)] | None = None
    replication_factor: Annotated[int, Field(ge=1)] | None = None
    write_consistency_factor: Annotated[int, Field(ge=1)] | None = None
    sharding_method: Literal["auto", "custom"] | None = None
    on_disk_payload: bool | None = None
    hnsw_config: HnswConfig | None = None
    optimizers_config: OptimizersConfig | None = None
    wal_config: ConfigBlock | None = None
    quantization_config: ConfigBlock | None = None
    strict_mode_config: ConfigBlock | None = None
    metadata: Payload | None = None


class CollectionDescription(BaseModel):
    name: str


class CollectionsResult(BaseModel):
    collections: list[CollectionDescription]


class ExistsResult(BaseModel):
    exists: bool


class AliasesResult(BaseModel):
    aliases: list[dict[str, str]] = Field(max_length=0, description="Always empty: no aliases yet.")


class PayloadIndexInfo(BaseModel):
    data_type: str
    params: dict[str, Any] | None = None
    points: int = Field(description="Points that have a value under this key.")


class CollectionConfig(BaseModel):
    """`params`, `hnsw_config` and so on as they are in force: what was sent over our defaults."""

    params: dict[str, Any]
    hnsw_config: dict[str, Any]
    optimizer_config: dict[str, Any]
    wal_config: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None
    strict_mode_config: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None


class CollectionInfo(BaseModel):
    """status: green = settled; yellow = segments wait for an index or a merge; red = a shard
    stopped (optimizer_status says why)."""

    status: Literal["green", "yellow", "red"]
    optimizer_status: Literal["ok"] | dict[str, str]
    points_count: int
    indexed_vectors_count: int
    segments_count: int
    config: CollectionConfig
    payload_schema: dict[str, PayloadIndexInfo]


class FieldType(StrEnum):
    KEYWORD = "keyword"
    INTEGER = "integer"
    FLOAT = "float"
    GEO = "geo"
    TEXT = "text"
    BOOL = "bool"
    DATETIME = "datetime"
    UUID = "uuid"


class FieldParams(ConfigBlock):
    type: FieldType


class CreateFieldIndex(Strict):
    """A payload index. Results never change with it; columns are made without it as well."""

    field_name: Annotated[str, Field(min_length=1, max_length=1024)]
    field_schema: FieldType | FieldParams


# -- points in ------------------------------------------------------------------------------------
class SparseVector(Strict):
    indices: list[Annotated[int, Field(ge=0, le=2**32 - 1)]]
    values: list[float]


class Document(Strict):
    """Text in place of a vector: the server's encoder turns it into one. model: left out, or
    empty, it is the one that the vector is bound to, else the one that comes with Shoal."""

    text: str
    model: str = ""
    options: JsonValue = None


DenseVector = list[float]
MultiVector = list[list[float]]
AnyVector = DenseVector | SparseVector | MultiVector | Document


class PointStruct(Strict):
    """A whole point. A vector is a list for the unnamed one, else a map from name to vector."""

    id: PointId
    vector: DenseVector | MultiVector | dict[str, AnyVector] | Document
    payload: Payload | None = None


class Batch(Strict):
    """Points as columns of equal length."""

    ids: list[PointId]
    vectors: list[DenseVector] | list[MultiVector] | dict[str, list[AnyVector]] | list[Document]
    payloads: list[Payload | None] | None = None


class PointsList(Strict):
    points: Annotated[list[PointStruct], Field(min_length=1, max_length=BATCH_POINTS_MAX)]
    shard_key: Unsupported = None
    update_filter: FilterField | None = None
    update_mode: UpdateMode | None = None


class PointsBatch(Strict):
    batch: Batch
    shard_key: Unsupported = None
    update_filter: FilterField | None = None
    update_mode: UpdateMode | None = None


class PointVectors(Strict):
    id: PointId
    vector: DenseVector | MultiVector | dict[str, AnyVector] | Document


class UpdateVectors(Strict):
    points: Annotated[list[PointVectors], Field(min_length=1, max_length=BATCH_POINTS_MAX)]
    shard_key: Unsupported = None
    update_filter: FilterField | None = None


class Selection(Strict):
    points: PointIdList | None = None
    filter: FilterField | None = None
    shard_key: Unsupported = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Selection:
        if self.points is None and self.filter is None:
            raise BadRequest("Wrong input: No filter or points provided: give one of the two")
        if self.points is not None and self.filter is not None:
            raise BadRequest(
                "Wrong input: both `points` and `filter` are given: leave one out, or put the ids "
                "into the filter as a has_id condition"
            )
        if self.points is not None and not self.points:
            raise BadRequest("Wrong input: Empty update request: `points` is an empty list")
        return self


class PointsSelector(Selection):
    """Either `points` (ids) or `filter`."""


class SetPayload(Selection):
    """Merged into each point's payload at the top, or at the JSON path `key`."""

    payload: Payload
    key: str | None = None


class DeletePayload(Selection):
    keys: list[str]


class DeleteVectors(Selection):
    vector: Annotated[list[str], Field(min_length=1)]


class UpsertOperation(Strict):
    upsert: PointsList | PointsBatch


class DeleteOperation(Strict):
    delete: PointsSelector


class SetPayloadOperation(Strict):
    set_payload: SetPayload


class OverwritePayloadOperation(Strict):
    overwrite_payload: SetPayload


class DeletePayloadOperation(Strict):
    delete_payload: DeletePayload


class ClearPayloadOperation(Strict):
    clear_payload: PointsSelector


class UpdateVectorsOperation(Strict):
    update_vectors: UpdateVectors


class DeleteVectorsOperation(Strict):
    delete_vectors: DeleteVectors


class UpdateOperations(Strict):
    """Applied in order. All are checked before the first is applied."""

    operations: Annotated[
        list[
            UpsertOperation
            | DeleteOperation
            | SetPayloadOperation
            | OverwritePayloadOperation
            | DeletePayloadOperation
            | ClearPayloadOperation
            | UpdateVectorsOperation
            | DeleteVectorsOperation
        ],
        Field(max_length=BATCH_OPERATIONS_MAX),
    ]


class UpdateStatus(StrEnum):
    ACKNOWLEDGED = "acknowledged"
    COMPLETED = "completed"


class UpdateResult(BaseModel):
    """Both statuses mean: durable and visible. `acknowledged` answers wait=false."""

    operation_id: int = Field(description="Log sequence number; the largest of the shards touched.")
    status: UpdateStatus


# -- points out -----------------------------------------------------------------------------------
class PayloadInclude(Strict):
    include: list[str]


class PayloadExclude(Strict):
    exclude: list[str]


WithPayload = StrictBool | list[StrictStr] | PayloadInclude | PayloadExclude
WithVector = StrictBool | list[StrictStr]


class SearchParams(Strict):
    """exact: no index. hnsw_ef: beam width. Scores always come from the stored vectors and a search
    always covers all points that match, so `quantization` and `acorn` ask for no more than what
    happens anyway, and indexed_only can only be false."""

    hnsw_ef: Annotated[int, Field(ge=1, le=HNSW_EF_MAX)] | None = None
    exact: bool | None = None
    indexed_only: bool | None = None
    quantization: ConfigBlock | None = None
    acorn: ConfigBlock | None = None
    idf: Unsupported = None

    @model_validator(mode="after")
    def _covers_all(self) -> SearchParams:
        if self.indexed_only:
            raise BadRequest(
                "Wrong input: `indexed_only` is not supported by this version of Shoal, a search "
                "always covers all points: leave it out"
            )
        return self


_OTHER_QUERIES = {
    "recommend": "recommendation",
    "discover": "discovery",
    "context": "context search",
    "order_by": "order by a payload value",
    "fusion": "fusion of several queries",
    "rrf": "fusion of several queries",
    "formula": "a score formula",
    "sample": "random sampling",
    "relevance_feedback": "relevance feedback",
    "indices": "search by a sparse vector",
    "image": "images",
    "object": "custom objects",
}


def _input_kind(value: object) -> str:
    """Which alternative of `VectorInput` a value means; refuses by name what this version lacks."""
    match value:
        case bool():
            return "vector"  # and so an error that says what is expected
        case int() | str():
            return "id"
        case [list(), *_]:
            raise BadRequest(
                "Wrong input: search by a multivector is not supported by this version of Shoal: "
                "send one list of numbers"
            )
        case dict() if "text" in value and "model" not in value and isinstance(value["text"], dict):
            raise BadRequest(
                "Wrong input: full-text scoring is not supported by this version of Shoal; to "
                'embed a text, send {"text": "…", "model": "…"}'
            )
        case dict() if "text" in value or "model" in value:
            return "text"
        case dict():
            for key in value:
                if key in _OTHER_QUERIES:
                    raise BadRequest(
                        f"Wrong input: `{key}` ({_OTHER_QUERIES[key]}) is not supported by this "
                        "version of Shoal"
                    )
    return "vector"


VectorInput = Annotated[
    Annotated[DenseVector, Tag("vector")]
    | Annotated[PointId, Tag("id")]
    | Annotated[Document, Tag("text")],
    Discriminator(_input_kind),
]


class NearestQuery(Strict):
    nearest: VectorInput
    mmr: Unsupported = None


def _query_kind(value: object) -> str:
    return "nearest" if isinstance(value, dict) and "nearest" in value else _input_kind(value)


Query = Annotated[
    Annotated[DenseVector, Tag("vector")]
    | Annotated[PointId, Tag("id")]
    | Annotated[Document, Tag("text")]
    | Annotated[NearestQuery, Tag("nearest")],
    Discriminator(_query_kind),
]


class QueryRequest(Strict):
    """The best points for a query: a vector, a point id (its vector; the point itself is left out),
    or a text. Without a query: points by ascending id."""

    query: Query | None = None
    using: str | None = None
    filter: FilterField | None = None
    params: SearchParams | None = None
    score_threshold: float | None = None
    limit: Annotated[int, Field(ge=1, le=SEARCH_LIMIT_MAX)] | None = None
    offset: Annotated[int, Field(ge=0, le=SEARCH_LIMIT_MAX)] | None = None
    with_vector: WithVector | None = None
    with_payload: WithPayload | None = None
    prefetch: Unsupported = None
    lookup_from: Unsupported = None
    shard_key: Unsupported = None

    @model_validator(mode="after")
    def _consistent(self) -> QueryRequest:
        if (self.limit or 10) + (self.offset or 0) > SEARCH_LIMIT_MAX:
            raise InvalidField(
                "Validation error in JSON body: [limit: limit + offset must be at most "
                f"{SEARCH_LIMIT_MAX}; to read everything, scroll]"
            )
        if self.score_threshold is not None and self.query is None:
            raise BadRequest("Wrong input: A query is needed to use the score_threshold")
        return self


class ScrollRequest(Strict):
    """Points by ascending id from `offset` (inclusive)."""

    offset: PointId | None = None
    limit: Annotated[int, Field(ge=1, le=SCROLL_LIMIT_MAX)] | None = None
    filter: FilterField | None = None
    with_payload: WithPayload | None = None
    with_vector: WithVector | None = None
    order_by: Unsupported = None
    shard_key: Unsupported = None


class PointRequest(Strict):
    ids: PointIdList
    with_payload: WithPayload | None = None
    with_vector: WithVector | None = None
    shard_key: Unsupported = None


class CountRequest(Strict):
    """Always counted exactly, whatever `exact` says."""

    filter: FilterField | None = None
    exact: bool | None = None
    shard_key: Unsupported = None


VectorOutput = list[float] | SparseVector | list[list[float]]


class Record(BaseModel):
    id: int | str
    payload: Payload | None = None
    vector: VectorOutput | dict[str, VectorOutput] | None = None


class ScoredPoint(Record):
    version: int = Field(description="Log sequence number of the point's last change.")
    score: float


class QueryResult(BaseModel):
    points: list[ScoredPoint]


class ScrollResult(BaseModel):
    points: list[Record]
    next_page_offset: int | str | None


class CountResult(BaseModel):
    count: int


# -- ours, and the envelope -----------------------------------------------------------------------
class EmbedRequest(Strict):
    texts: Annotated[list[str], Field(min_length=1, max_length=TEXTS_PER_REQUEST_MAX)]
    model: str


class EmbedResult(BaseModel):
    """vectors: (texts, dim), each of length 1. tokens: read of each text. truncated: positions of
    texts that were longer than the model reads."""

    vectors: list[list[float]]
    model: str
    tokens: list[int]
    truncated: list[int]


class BatchResult(UpdateResult):
    points: int


class LocalShard(BaseModel):
    shard_id: int
    points_count: int
    state: str


class RemoteShard(BaseModel):
    shard_id: int
    peer_id: int
    state: str = Field(description="Active, Partial (joining) or Dead (its node is lost).")


class CollectionCluster(BaseModel):
    """Where the replicas of a collection are. Local ones are in the process that answers."""

    peer_id: int
    shard_count: int
    local_shards: list[LocalShard]
    remote_shards: list[RemoteShard]
    shard_transfers: list[dict[str, Any]] = Field(max_length=0)
    replication_factor: int
    under_replicated_shards: int = Field(description="With fewer live replicas than asked for.")


class ClusterPeers(BaseModel):
    """status: `disabled` on one machine, and then nothing else is there."""

    status: Literal["disabled", "enabled"]
    peer_id: int | None = None
    peers: dict[str, dict[str, str]] | None = None
    raft_info: dict[str, Any] | None = None
    consensus_thread_status: dict[str, str] | None = None
    message_send_failures: dict[str, Any] | None = None


class ClusterReport(BaseModel):
    """node: who answers. leader: the monitor that acts. actions: what monitors did last and why, the
    latest first."""

    node: str
    mode: Literal["cluster", "one machine"]
    leader: str | None
    actions: list[dict[str, Any]]
    nodes: list[dict[str, Any]]
    collections: list[dict[str, Any]]
    encoders: list[dict[str, Any]] = Field(
        description="Groups of `shoal encoder serve`: model, what waits, memory of each process."
    )


class ServerVersion(BaseModel):
    name: str
    version: str


class VersionInfo(BaseModel):
    """`version` is the version of the REST API that this server speaks, for clients that compare it
    with their own; `server.version` is Shoal's."""

    title: str
    version: str
    commit: str | None
    server: ServerVersion


T = TypeVar("T")


class Envelope(BaseModel, Generic[T]):
    result: T
    status: Literal["ok"]
    time: float = Field(description="Seconds in the server.")


class ErrorStatus(BaseModel):
    error: str = Field(description="What is wrong and what to change, as a sentence.")


class ErrorBody(BaseModel):
    """Every answer that is not a success. `status` comes first: clients show only the beginning."""

    status: ErrorStatus
    time: float
    result: None = None
