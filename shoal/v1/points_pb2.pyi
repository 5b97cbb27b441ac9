from shoal.v1 import common_pb2 as _common_pb2
from shoal.wire import ops_pb2 as _ops_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class UpdateStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UPDATE_STATUS_UNSPECIFIED: _ClassVar[UpdateStatus]
    UPDATE_STATUS_ACKNOWLEDGED: _ClassVar[UpdateStatus]
    UPDATE_STATUS_COMPLETED: _ClassVar[UpdateStatus]

class UpdateMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UPDATE_MODE_UPSERT: _ClassVar[UpdateMode]
    UPDATE_MODE_INSERT_ONLY: _ClassVar[UpdateMode]
    UPDATE_MODE_UPDATE_ONLY: _ClassVar[UpdateMode]
UPDATE_STATUS_UNSPECIFIED: UpdateStatus
UPDATE_STATUS_ACKNOWLEDGED: UpdateStatus
UPDATE_STATUS_COMPLETED: UpdateStatus
UPDATE_MODE_UPSERT: UpdateMode
UPDATE_MODE_INSERT_ONLY: UpdateMode
UPDATE_MODE_UPDATE_ONLY: UpdateMode

class Text(_message.Message):
    __slots__ = ("text", "model")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    text: str
    model: str
    def __init__(self, text: _Optional[str] = ..., model: _Optional[str] = ...) -> None: ...

class SearchRequest(_message.Message):
    __slots__ = ("collection", "vector", "point", "text", "using", "limit", "offset", "filter", "score_threshold", "exact", "ef", "with_payload", "with_vectors", "read", "model")
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    POINT_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    USING_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    SCORE_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    EF_FIELD_NUMBER: _ClassVar[int]
    WITH_PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    WITH_VECTORS_FIELD_NUMBER: _ClassVar[int]
    READ_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    collection: str
    vector: bytes
    point: _common_pb2.PointId
    text: Text
    using: str
    limit: int
    offset: int
    filter: bytes
    score_threshold: float
    exact: bool
    ef: int
    with_payload: _common_pb2.PayloadSelector
    with_vectors: _common_pb2.VectorSelector
    read: _common_pb2.ReadOptions
    model: str
    def __init__(self, collection: _Optional[str] = ..., vector: _Optional[bytes] = ..., point: _Optional[_Union[_common_pb2.PointId, _Mapping]] = ..., text: _Optional[_Union[Text, _Mapping]] = ..., using: _Optional[str] = ..., limit: _Optional[int] = ..., offset: _Optional[int] = ..., filter: _Optional[bytes] = ..., score_threshold: _Optional[float] = ..., exact: bool = ..., ef: _Optional[int] = ..., with_payload: _Optional[_Union[_common_pb2.PayloadSelector, _Mapping]] = ..., with_vectors: _Optional[_Union[_common_pb2.VectorSelector, _Mapping]] = ..., read: _Optional[_Union[_common_pb2.ReadOptions, _Mapping]] = ..., model: _Optional[str] = ...) -> None: ...

class SearchResponse(_message.Message):
    __slots__ = ("points", "scores", "truncated_texts")
    POINTS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_TEXTS_FIELD_NUMBER: _ClassVar[int]
    points: _ops_pb2.PointBatch
    scores: bytes
    truncated_texts: int
    def __init__(self, points: _Optional[_Union[_ops_pb2.PointBatch, _Mapping]] = ..., scores: _Optional[bytes] = ..., truncated_texts: _Optional[int] = ...) -> None: ...

class SearchBatchRequest(_message.Message):
    __slots__ = ("searches",)
    SEARCHES_FIELD_NUMBER: _ClassVar[int]
    searches: _containers.RepeatedCompositeFieldContainer[SearchRequest]
    def __init__(self, searches: _Optional[_Iterable[_Union[SearchRequest, _Mapping]]] = ...) -> None: ...

class SearchBatchResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[SearchResponse]
    def __init__(self, results: _Optional[_Iterable[_Union[SearchResponse, _Mapping]]] = ...) -> None: ...

class SearchStreamRequest(_message.Message):
    __slots__ = ("items",)
    class Item(_message.Message):
        __slots__ = ("tag", "search", "timeout_ms")
        TAG_FIELD_NUMBER: _ClassVar[int]
        SEARCH_FIELD_NUMBER: _ClassVar[int]
        TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
        tag: int
        search: SearchRequest
        timeout_ms: int
        def __init__(self, tag: _Optional[int] = ..., search: _Optional[_Union[SearchRequest, _Mapping]] = ..., timeout_ms: _Optional[int] = ...) -> None: ...
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[SearchStreamRequest.Item]
    def __init__(self, items: _Optional[_Iterable[_Union[SearchStreamRequest.Item, _Mapping]]] = ...) -> None: ...

class SearchStreamResponse(_message.Message):
    __slots__ = ("items",)
    class Item(_message.Message):
        __slots__ = ("tag", "result", "error")
        TAG_FIELD_NUMBER: _ClassVar[int]
        RESULT_FIELD_NUMBER: _ClassVar[int]
        ERROR_FIELD_NUMBER: _ClassVar[int]
        tag: int
        result: SearchResponse
        error: _common_pb2.ErrorDetail
        def __init__(self, tag: _Optional[int] = ..., result: _Optional[_Union[SearchResponse, _Mapping]] = ..., error: _Optional[_Union[_common_pb2.ErrorDetail, _Mapping]] = ...) -> None: ...
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[SearchStreamResponse.Item]
    def __init__(self, items: _Optional[_Iterable[_Union[SearchStreamResponse.Item, _Mapping]]] = ...) -> None: ...

class ScrollRequest(_message.Message):
    __slots__ = ("collection", "start", "limit", "filter", "with_payload", "with_vectors", "read")
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    WITH_PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    WITH_VECTORS_FIELD_NUMBER: _ClassVar[int]
    READ_FIELD_NUMBER: _ClassVar[int]
    collection: str
    start: _common_pb2.PointId
    limit: int
    filter: bytes
    with_payload: _common_pb2.PayloadSelector
    with_vectors: _common_pb2.VectorSelector
    read: _common_pb2.ReadOptions
    def __init__(self, collection: _Optional[str] = ..., start: _Optional[_Union[_common_pb2.PointId, _Mapping]] = ..., limit: _Optional[int] = ..., filter: _Optional[bytes] = ..., with_payload: _Optional[_Union[_common_pb2.PayloadSelector, _Mapping]] = ..., with_vectors: _Optional[_Union[_common_pb2.VectorSelector, _Mapping]] = ..., read: _Optional[_Union[_common_pb2.ReadOptions, _Mapping]] = ...) -> None: ...

class ScrollResponse(_message.Message):
    __slots__ = ("points", "next")
    POINTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    points: _ops_pb2.PointBatch
    next: _common_pb2.PointId
    def __init__(self, points: _Optional[_Union[_ops_pb2.PointBatch, _Mapping]] = ..., next: _Optional[_Union[_common_pb2.PointId, _Mapping]] = ...) -> None: ...

class RetrieveRequest(_message.Message):
    __slots__ = ("collection", "ids", "with_payload", "with_vectors", "read")
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    WITH_PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    WITH_VECTORS_FIELD_NUMBER: _ClassVar[int]
    READ_FIELD_NUMBER: _ClassVar[int]
    collection: str
    ids: _ops_pb2.PointIds
    with_payload: _common_pb2.PayloadSelector
    with_vectors: _common_pb2.VectorSelector
    read: _common_pb2.ReadOptions
    def __init__(self, collection: _Optional[str] = ..., ids: _Optional[_Union[_ops_pb2.PointIds, _Mapping]] = ..., with_payload: _Optional[_Union[_common_pb2.PayloadSelector, _Mapping]] = ..., with_vectors: _Optional[_Union[_common_pb2.VectorSelector, _Mapping]] = ..., read: _Optional[_Union[_common_pb2.ReadOptions, _Mapping]] = ...) -> None: ...

class RetrieveResponse(_message.Message):
    __slots__ = ("points",)
    POINTS_FIELD_NUMBER: _ClassVar[int]
    points: _ops_pb2.PointBatch
    def __init__(self, points: _Optional[_Union[_ops_pb2.PointBatch, _Mapping]] = ...) -> None: ...

class CountRequest(_message.Message):
    __slots__ = ("collection", "filter", "read")
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    READ_FIELD_NUMBER: _ClassVar[int]
    collection: str
    filter: bytes
    read: _common_pb2.ReadOptions
    def __init__(self, collection: _Optional[str] = ..., filter: _Optional[bytes] = ..., read: _Optional[_Union[_common_pb2.ReadOptions, _Mapping]] = ...) -> None: ...

class CountResponse(_message.Message):
    __slots__ = ("count",)
    COUNT_FIELD_NUMBER: _ClassVar[int]
    count: int
    def __init__(self, count: _Optional[int] = ...) -> None: ...

class WriteResult(_message.Message):
    __slots__ = ("operation_id", "status", "token", "truncated_texts")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_TEXTS_FIELD_NUMBER: _ClassVar[int]
    operation_id: int
    status: UpdateStatus
    token: str
    truncated_texts: int
    def __init__(self, operation_id: _Optional[int] = ..., status: _Optional[_Union[UpdateStatus, str]] = ..., token: _Optional[str] = ..., truncated_texts: _Optional[int] = ...) -> None: ...

class TextColumn(_message.Message):
    __slots__ = ("name", "model", "texts", "present")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    model: str
    texts: _containers.RepeatedScalarFieldContainer[str]
    present: bytes
    def __init__(self, name: _Optional[str] = ..., model: _Optional[str] = ..., texts: _Optional[_Iterable[str]] = ..., present: _Optional[bytes] = ...) -> None: ...

class UpsertRequest(_message.Message):
    __slots__ = ("collection", "points", "texts", "update_filter", "update_mode", "wait", "model")
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    POINTS_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FILTER_FIELD_NUMBER: _ClassVar[int]
    UPDATE_MODE_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    collection: str
    points: _ops_pb2.PointBatch
    texts: _containers.RepeatedCompositeFieldContainer[TextColumn]
    update_filter: bytes
    update_mode: UpdateMode
    wait: bool
    model: str
    def __init__(self, collection: _Optional[str] = ..., points: _Optional[_Union[_ops_pb2.PointBatch, _Mapping]] = ..., texts: _Optional[_Iterable[_Union[TextColumn, _Mapping]]] = ..., update_filter: _Optional[bytes] = ..., update_mode: _Optional[_Union[UpdateMode, str]] = ..., wait: bool = ..., model: _Optional[str] = ...) -> None: ...

class UpsertStreamRequest(_message.Message):
    __slots__ = ("tag", "upsert", "timeout_ms")
    TAG_FIELD_NUMBER: _ClassVar[int]
    UPSERT_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    tag: int
    upsert: UpsertRequest
    timeout_ms: int
    def __init__(self, tag: _Optional[int] = ..., upsert: _Optional[_Union[UpsertRequest, _Mapping]] = ..., timeout_ms: _Optional[int] = ...) -> None: ...

class UpsertStreamResponse(_message.Message):
    __slots__ = ("tag", "result", "error")
    TAG_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    tag: int
    result: WriteResult
    error: _common_pb2.ErrorDetail
    def __init__(self, tag: _Optional[int] = ..., result: _Optional[_Union[WriteResult, _Mapping]] = ..., error: _Optional[_Union[_common_pb2.ErrorDetail, _Mapping]] = ...) -> None: ...

class UpdateVectorsRequest(_message.Message):
    __slots__ = ("collection", "points", "texts", "update_filter", "wait", "model")
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    POINTS_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FILTER_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    collection: str
    points: _ops_pb2.PointBatch
    texts: _containers.RepeatedCompositeFieldContainer[TextColumn]
    update_filter: bytes
    wait: bool
    model: str
    def __init__(self, collection: _Optional[str] = ..., points: _Optional[_Union[_ops_pb2.PointBatch, _Mapping]] = ..., texts: _Optional[_Iterable[_Union[TextColumn, _Mapping]]] = ..., update_filter: _Optional[bytes] = ..., wait: bool = ..., model: _Optional[str] = ...) -> None: ...

class PointSelector(_message.Message):
    __slots__ = ("ids", "filter")
    IDS_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    ids: _ops_pb2.PointIds
    filter: bytes
    def __init__(self, ids: _Optional[_Union[_ops_pb2.PointIds, _Mapping]] = ..., filter: _Optional[bytes] = ...) -> None: ...

class DeletePointsRequest(_message.Message):
    __slots__ = ("collection", "where", "wait")
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    WHERE_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    collection: str
    where: PointSelector
    wait: bool
    def __init__(self, collection: _Optional[str] = ..., where: _Optional[_Union[PointSelector, _Mapping]] = ..., wait: bool = ...) -> None: ...

class DeleteVectorsRequest(_message.Message):
    __slots__ = ("collection", "where", "names", "wait")
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    WHERE_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    collection: str
    where: PointSelector
    names: _containers.RepeatedScalarFieldContainer[str]
    wait: bool
    def __init__(self, collection: _Optional[str] = ..., where: _Optional[_Union[PointSelector, _Mapping]] = ..., names: _Optional[_Iterable[str]] = ..., wait: bool = ...) -> None: ...

class SetPayloadRequest(_message.Message):
    __slots__ = ("collection", "where", "payload", "key", "wait")
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    WHERE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    collection: str
    where: PointSelector
    payload: bytes
    key: str
    wait: bool
    def __init__(self, collection: _Optional[str] = ..., where: _Optional[_Union[PointSelector, _Mapping]] = ..., payload: _Optional[bytes] = ..., key: _Optional[str] = ..., wait: bool = ...) -> None: ...

class OverwritePayloadRequest(_message.Message):
    __slots__ = ("collection", "where", "payload", "wait")
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    WHERE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    collection: str
    where: PointSelector
    payload: bytes
    wait: bool
    def __init__(self, collection: _Optional[str] = ..., where: _Optional[_Union[PointSelector, _Mapping]] = ..., payload: _Optional[bytes] = ..., wait: bool = ...) -> None: ...

class DeletePayloadRequest(_message.Message):
    __slots__ = ("collection", "where", "keys", "wait")
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    WHERE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    collection: str
    where: PointSelector
    keys: _containers.RepeatedScalarFieldContainer[str]
    wait: bool
    def __init__(self, collection: _Optional[str] = ..., where: _Optional[_Union[PointSelector, _Mapping]] = ..., keys: _Optional[_Iterable[str]] = ..., wait: bool = ...) -> None: ...

class ClearPayloadRequest(_message.Message):
    __slots__ = ("collection", "where", "wait")
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    WHERE_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    collection: str
    where: PointSelector
    wait: bool
    def __init__(self, collection: _Optional[str] = ..., where: _Optional[_Union[PointSelector, _Mapping]] = ..., wait: bool = ...) -> None: ...
