from shoal.wire import ops_pb2 as _ops_pb2
from shoal.node.v1 import replication_pb2 as _replication_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class UpdateMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UPSERT: _ClassVar[UpdateMode]
    INSERT_ONLY: _ClassVar[UpdateMode]
    UPDATE_ONLY: _ClassVar[UpdateMode]
UPSERT: UpdateMode
INSERT_ONLY: UpdateMode
UPDATE_ONLY: UpdateMode

class Frames(_message.Message):
    __slots__ = ("requests", "answers", "cancelled")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[Request]
    answers: _containers.RepeatedCompositeFieldContainer[Answer]
    cancelled: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, requests: _Optional[_Iterable[_Union[Request, _Mapping]]] = ..., answers: _Optional[_Iterable[_Union[Answer, _Mapping]]] = ..., cancelled: _Optional[_Iterable[int]] = ...) -> None: ...

class ShardKey(_message.Message):
    __slots__ = ("collection_id", "shard")
    COLLECTION_ID_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    collection_id: int
    shard: int
    def __init__(self, collection_id: _Optional[int] = ..., shard: _Optional[int] = ...) -> None: ...

class Request(_message.Message):
    __slots__ = ("id", "collection_id", "shard", "min_applied", "strong", "search", "retrieve", "scroll", "count", "info", "write")
    ID_FIELD_NUMBER: _ClassVar[int]
    COLLECTION_ID_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    MIN_APPLIED_FIELD_NUMBER: _ClassVar[int]
    STRONG_FIELD_NUMBER: _ClassVar[int]
    SEARCH_FIELD_NUMBER: _ClassVar[int]
    RETRIEVE_FIELD_NUMBER: _ClassVar[int]
    SCROLL_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    INFO_FIELD_NUMBER: _ClassVar[int]
    WRITE_FIELD_NUMBER: _ClassVar[int]
    id: int
    collection_id: int
    shard: int
    min_applied: int
    strong: bool
    search: Search
    retrieve: Retrieve
    scroll: Scroll
    count: Count
    info: Info
    write: Write
    def __init__(self, id: _Optional[int] = ..., collection_id: _Optional[int] = ..., shard: _Optional[int] = ..., min_applied: _Optional[int] = ..., strong: bool = ..., search: _Optional[_Union[Search, _Mapping]] = ..., retrieve: _Optional[_Union[Retrieve, _Mapping]] = ..., scroll: _Optional[_Union[Scroll, _Mapping]] = ..., count: _Optional[_Union[Count, _Mapping]] = ..., info: _Optional[_Union[Info, _Mapping]] = ..., write: _Optional[_Union[Write, _Mapping]] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("id", "applied", "hits", "points", "count", "info", "written", "error")
    ID_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    POINTS_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    INFO_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: int
    applied: int
    hits: Hits
    points: _ops_pb2.PointBatch
    count: int
    info: ShardInfo
    written: WriteResult
    error: Error
    def __init__(self, id: _Optional[int] = ..., applied: _Optional[int] = ..., hits: _Optional[_Union[Hits, _Mapping]] = ..., points: _Optional[_Union[_ops_pb2.PointBatch, _Mapping]] = ..., count: _Optional[int] = ..., info: _Optional[_Union[ShardInfo, _Mapping]] = ..., written: _Optional[_Union[WriteResult, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("type", "message", "status", "retryable", "maybe_applied", "retry_after_s")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    MAYBE_APPLIED_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    type: str
    message: str
    status: int
    retryable: bool
    maybe_applied: bool
    retry_after_s: float
    def __init__(self, type: _Optional[str] = ..., message: _Optional[str] = ..., status: _Optional[int] = ..., retryable: bool = ..., maybe_applied: bool = ..., retry_after_s: _Optional[float] = ...) -> None: ...

class Search(_message.Message):
    __slots__ = ("using", "vector", "limit", "filter", "exclude", "score_threshold", "exact", "ef", "with_payload", "all_vectors", "vectors", "some_vectors")
    USING_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_FIELD_NUMBER: _ClassVar[int]
    SCORE_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    EF_FIELD_NUMBER: _ClassVar[int]
    WITH_PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    ALL_VECTORS_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    SOME_VECTORS_FIELD_NUMBER: _ClassVar[int]
    using: str
    vector: bytes
    limit: int
    filter: bytes
    exclude: _ops_pb2.PointIds
    score_threshold: float
    exact: bool
    ef: int
    with_payload: bool
    all_vectors: bool
    vectors: _containers.RepeatedScalarFieldContainer[str]
    some_vectors: bool
    def __init__(self, using: _Optional[str] = ..., vector: _Optional[bytes] = ..., limit: _Optional[int] = ..., filter: _Optional[bytes] = ..., exclude: _Optional[_Union[_ops_pb2.PointIds, _Mapping]] = ..., score_threshold: _Optional[float] = ..., exact: bool = ..., ef: _Optional[int] = ..., with_payload: bool = ..., all_vectors: bool = ..., vectors: _Optional[_Iterable[str]] = ..., some_vectors: bool = ...) -> None: ...

class Hits(_message.Message):
    __slots__ = ("points", "scores")
    POINTS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    points: _ops_pb2.PointBatch
    scores: bytes
    def __init__(self, points: _Optional[_Union[_ops_pb2.PointBatch, _Mapping]] = ..., scores: _Optional[bytes] = ...) -> None: ...

class Retrieve(_message.Message):
    __slots__ = ("ids", "with_payload", "all_vectors", "vectors", "some_vectors")
    IDS_FIELD_NUMBER: _ClassVar[int]
    WITH_PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    ALL_VECTORS_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    SOME_VECTORS_FIELD_NUMBER: _ClassVar[int]
    ids: _ops_pb2.PointIds
    with_payload: bool
    all_vectors: bool
    vectors: _containers.RepeatedScalarFieldContainer[str]
    some_vectors: bool
    def __init__(self, ids: _Optional[_Union[_ops_pb2.PointIds, _Mapping]] = ..., with_payload: bool = ..., all_vectors: bool = ..., vectors: _Optional[_Iterable[str]] = ..., some_vectors: bool = ...) -> None: ...

class Scroll(_message.Message):
    __slots__ = ("limit", "start", "filter", "with_payload", "all_vectors", "vectors", "some_vectors")
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    WITH_PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    ALL_VECTORS_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    SOME_VECTORS_FIELD_NUMBER: _ClassVar[int]
    limit: int
    start: _ops_pb2.PointIds
    filter: bytes
    with_payload: bool
    all_vectors: bool
    vectors: _containers.RepeatedScalarFieldContainer[str]
    some_vectors: bool
    def __init__(self, limit: _Optional[int] = ..., start: _Optional[_Union[_ops_pb2.PointIds, _Mapping]] = ..., filter: _Optional[bytes] = ..., with_payload: bool = ..., all_vectors: bool = ..., vectors: _Optional[_Iterable[str]] = ..., some_vectors: bool = ...) -> None: ...

class Count(_message.Message):
    __slots__ = ("filter",)
    FILTER_FIELD_NUMBER: _ClassVar[int]
    filter: bytes
    def __init__(self, filter: _Optional[bytes] = ...) -> None: ...

class Info(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ShardInfo(_message.Message):
    __slots__ = ("points", "indexed_vectors", "vectors", "segments", "pending", "applied", "bytes_on_disk", "stopped")
    class VectorsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    POINTS_FIELD_NUMBER: _ClassVar[int]
    INDEXED_VECTORS_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    BYTES_ON_DISK_FIELD_NUMBER: _ClassVar[int]
    STOPPED_FIELD_NUMBER: _ClassVar[int]
    points: int
    indexed_vectors: int
    vectors: _containers.ScalarMap[str, int]
    segments: int
    pending: int
    applied: int
    bytes_on_disk: int
    stopped: str
    def __init__(self, points: _Optional[int] = ..., indexed_vectors: _Optional[int] = ..., vectors: _Optional[_Mapping[str, int]] = ..., segments: _Optional[int] = ..., pending: _Optional[int] = ..., applied: _Optional[int] = ..., bytes_on_disk: _Optional[int] = ..., stopped: _Optional[str] = ...) -> None: ...

class Selector(_message.Message):
    __slots__ = ("ids", "filter")
    IDS_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    ids: _ops_pb2.PointIds
    filter: bytes
    def __init__(self, ids: _Optional[_Union[_ops_pb2.PointIds, _Mapping]] = ..., filter: _Optional[bytes] = ...) -> None: ...

class Upsert(_message.Message):
    __slots__ = ("points", "update_filter", "mode")
    POINTS_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FILTER_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    points: _ops_pb2.PointBatch
    update_filter: bytes
    mode: UpdateMode
    def __init__(self, points: _Optional[_Union[_ops_pb2.PointBatch, _Mapping]] = ..., update_filter: _Optional[bytes] = ..., mode: _Optional[_Union[UpdateMode, str]] = ...) -> None: ...

class UpdateVectors(_message.Message):
    __slots__ = ("points", "update_filter", "if_versions", "forget")
    POINTS_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FILTER_FIELD_NUMBER: _ClassVar[int]
    IF_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    FORGET_FIELD_NUMBER: _ClassVar[int]
    points: _ops_pb2.PointBatch
    update_filter: bytes
    if_versions: bytes
    forget: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, points: _Optional[_Union[_ops_pb2.PointBatch, _Mapping]] = ..., update_filter: _Optional[bytes] = ..., if_versions: _Optional[bytes] = ..., forget: _Optional[_Iterable[str]] = ...) -> None: ...

class Delete(_message.Message):
    __slots__ = ("where",)
    WHERE_FIELD_NUMBER: _ClassVar[int]
    where: Selector
    def __init__(self, where: _Optional[_Union[Selector, _Mapping]] = ...) -> None: ...

class DeleteVectors(_message.Message):
    __slots__ = ("where", "names")
    WHERE_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    where: Selector
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, where: _Optional[_Union[Selector, _Mapping]] = ..., names: _Optional[_Iterable[str]] = ...) -> None: ...

class SetPayload(_message.Message):
    __slots__ = ("where", "payload", "key", "forget")
    WHERE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    FORGET_FIELD_NUMBER: _ClassVar[int]
    where: Selector
    payload: bytes
    key: str
    forget: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, where: _Optional[_Union[Selector, _Mapping]] = ..., payload: _Optional[bytes] = ..., key: _Optional[str] = ..., forget: _Optional[_Iterable[str]] = ...) -> None: ...

class OverwritePayload(_message.Message):
    __slots__ = ("where", "payload", "forget")
    WHERE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    FORGET_FIELD_NUMBER: _ClassVar[int]
    where: Selector
    payload: bytes
    forget: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, where: _Optional[_Union[Selector, _Mapping]] = ..., payload: _Optional[bytes] = ..., forget: _Optional[_Iterable[str]] = ...) -> None: ...

class DeletePayload(_message.Message):
    __slots__ = ("where", "keys", "forget")
    WHERE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    FORGET_FIELD_NUMBER: _ClassVar[int]
    where: Selector
    keys: _containers.RepeatedScalarFieldContainer[str]
    forget: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, where: _Optional[_Union[Selector, _Mapping]] = ..., keys: _Optional[_Iterable[str]] = ..., forget: _Optional[_Iterable[str]] = ...) -> None: ...

class ClearPayload(_message.Message):
    __slots__ = ("where", "forget")
    WHERE_FIELD_NUMBER: _ClassVar[int]
    FORGET_FIELD_NUMBER: _ClassVar[int]
    where: Selector
    forget: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, where: _Optional[_Union[Selector, _Mapping]] = ..., forget: _Optional[_Iterable[str]] = ...) -> None: ...

class AlterVectors(_message.Message):
    __slots__ = ("add", "drop")
    ADD_FIELD_NUMBER: _ClassVar[int]
    DROP_FIELD_NUMBER: _ClassVar[int]
    add: _containers.RepeatedCompositeFieldContainer[_ops_pb2.VectorSpec]
    drop: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, add: _Optional[_Iterable[_Union[_ops_pb2.VectorSpec, _Mapping]]] = ..., drop: _Optional[_Iterable[str]] = ...) -> None: ...

class Write(_message.Message):
    __slots__ = ("upsert", "update_vectors", "delete", "delete_vectors", "set_payload", "overwrite_payload", "delete_payload", "clear_payload", "alter_vectors", "epoch")
    UPSERT_FIELD_NUMBER: _ClassVar[int]
    UPDATE_VECTORS_FIELD_NUMBER: _ClassVar[int]
    DELETE_FIELD_NUMBER: _ClassVar[int]
    DELETE_VECTORS_FIELD_NUMBER: _ClassVar[int]
    SET_PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    OVERWRITE_PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    DELETE_PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    CLEAR_PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    ALTER_VECTORS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    upsert: Upsert
    update_vectors: UpdateVectors
    delete: Delete
    delete_vectors: DeleteVectors
    set_payload: SetPayload
    overwrite_payload: OverwritePayload
    delete_payload: DeletePayload
    clear_payload: ClearPayload
    alter_vectors: AlterVectors
    epoch: int
    def __init__(self, upsert: _Optional[_Union[Upsert, _Mapping]] = ..., update_vectors: _Optional[_Union[UpdateVectors, _Mapping]] = ..., delete: _Optional[_Union[Delete, _Mapping]] = ..., delete_vectors: _Optional[_Union[DeleteVectors, _Mapping]] = ..., set_payload: _Optional[_Union[SetPayload, _Mapping]] = ..., overwrite_payload: _Optional[_Union[OverwritePayload, _Mapping]] = ..., delete_payload: _Optional[_Union[DeletePayload, _Mapping]] = ..., clear_payload: _Optional[_Union[ClearPayload, _Mapping]] = ..., alter_vectors: _Optional[_Union[AlterVectors, _Mapping]] = ..., epoch: _Optional[int] = ...) -> None: ...

class WriteResult(_message.Message):
    __slots__ = ("sequence", "missing")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    missing: _ops_pb2.PointIds
    def __init__(self, sequence: _Optional[int] = ..., missing: _Optional[_Union[_ops_pb2.PointIds, _Mapping]] = ...) -> None: ...

class ShardSpec(_message.Message):
    __slots__ = ("key", "collection", "dense", "sparse")
    KEY_FIELD_NUMBER: _ClassVar[int]
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    DENSE_FIELD_NUMBER: _ClassVar[int]
    SPARSE_FIELD_NUMBER: _ClassVar[int]
    key: ShardKey
    collection: str
    dense: _containers.RepeatedCompositeFieldContainer[_ops_pb2.VectorSpec]
    sparse: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, key: _Optional[_Union[ShardKey, _Mapping]] = ..., collection: _Optional[str] = ..., dense: _Optional[_Iterable[_Union[_ops_pb2.VectorSpec, _Mapping]]] = ..., sparse: _Optional[_Iterable[str]] = ...) -> None: ...

class CreateShardRequest(_message.Message):
    __slots__ = ("spec",)
    SPEC_FIELD_NUMBER: _ClassVar[int]
    spec: ShardSpec
    def __init__(self, spec: _Optional[_Union[ShardSpec, _Mapping]] = ...) -> None: ...

class CreateShardReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DropShardRequest(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: ShardKey
    def __init__(self, key: _Optional[_Union[ShardKey, _Mapping]] = ...) -> None: ...

class DropShardReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("replicas",)
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaStatus]
    def __init__(self, replicas: _Optional[_Iterable[_Union[ReplicaStatus, _Mapping]]] = ...) -> None: ...

class ReplicaStatus(_message.Message):
    __slots__ = ("key", "node", "role", "term", "durable", "committed", "writable", "info", "metadata_lost_s", "unread")
    KEY_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    WRITABLE_FIELD_NUMBER: _ClassVar[int]
    INFO_FIELD_NUMBER: _ClassVar[int]
    METADATA_LOST_S_FIELD_NUMBER: _ClassVar[int]
    UNREAD_FIELD_NUMBER: _ClassVar[int]
    key: ShardKey
    node: str
    role: str
    term: int
    durable: int
    committed: int
    writable: bool
    info: ShardInfo
    metadata_lost_s: float
    unread: str
    def __init__(self, key: _Optional[_Union[ShardKey, _Mapping]] = ..., node: _Optional[str] = ..., role: _Optional[str] = ..., term: _Optional[int] = ..., durable: _Optional[int] = ..., committed: _Optional[int] = ..., writable: bool = ..., info: _Optional[_Union[ShardInfo, _Mapping]] = ..., metadata_lost_s: _Optional[float] = ..., unread: _Optional[str] = ...) -> None: ...

class ReplicaMessages(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[_replication_pb2.ReplicaMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[_replication_pb2.ReplicaMessage, _Mapping]]] = ...) -> None: ...

class ReplicateReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SnapshotRequest(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: ShardKey
    def __init__(self, key: _Optional[_Union[ShardKey, _Mapping]] = ...) -> None: ...

class FileInfo(_message.Message):
    __slots__ = ("path", "size", "crc32c")
    PATH_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    path: str
    size: int
    crc32c: int
    def __init__(self, path: _Optional[str] = ..., size: _Optional[int] = ..., crc32c: _Optional[int] = ...) -> None: ...

class SnapshotReply(_message.Message):
    __slots__ = ("id", "manifest", "files")
    ID_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    id: str
    manifest: bytes
    files: _containers.RepeatedCompositeFieldContainer[FileInfo]
    def __init__(self, id: _Optional[str] = ..., manifest: _Optional[bytes] = ..., files: _Optional[_Iterable[_Union[FileInfo, _Mapping]]] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("snapshot_id", "path", "offset")
    SNAPSHOT_ID_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    snapshot_id: str
    path: str
    offset: int
    def __init__(self, snapshot_id: _Optional[str] = ..., path: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class FileChunk(_message.Message):
    __slots__ = ("offset", "data", "crc32c")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    crc32c: int
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ..., crc32c: _Optional[int] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("snapshot_id",)
    SNAPSHOT_ID_FIELD_NUMBER: _ClassVar[int]
    snapshot_id: str
    def __init__(self, snapshot_id: _Optional[str] = ...) -> None: ...

class ReleaseReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
