from shoal.wire import ops_pb2 as _ops_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class MigrationPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MIGRATION_PHASE_UNSPECIFIED: _ClassVar[MigrationPhase]
    MIGRATION_PHASE_PREPARING: _ClassVar[MigrationPhase]
    MIGRATION_PHASE_COPYING: _ClassVar[MigrationPhase]
    MIGRATION_PHASE_DROPPING: _ClassVar[MigrationPhase]

class QuerySource(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    QUERY_SOURCE_UNSPECIFIED: _ClassVar[QuerySource]
    QUERY_SOURCE_GIVEN: _ClassVar[QuerySource]
    QUERY_SOURCE_RECORDED: _ClassVar[QuerySource]
MIGRATION_PHASE_UNSPECIFIED: MigrationPhase
MIGRATION_PHASE_PREPARING: MigrationPhase
MIGRATION_PHASE_COPYING: MigrationPhase
MIGRATION_PHASE_DROPPING: MigrationPhase
QUERY_SOURCE_UNSPECIFIED: QuerySource
QUERY_SOURCE_GIVEN: QuerySource
QUERY_SOURCE_RECORDED: QuerySource

class StartMigrationRequest(_message.Message):
    __slots__ = ("collection", "vector", "model", "fingerprint", "text_field", "current_model", "points_per_second")
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_FIELD_NUMBER: _ClassVar[int]
    CURRENT_MODEL_FIELD_NUMBER: _ClassVar[int]
    POINTS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    collection: str
    vector: str
    model: str
    fingerprint: str
    text_field: str
    current_model: str
    points_per_second: float
    def __init__(self, collection: _Optional[str] = ..., vector: _Optional[str] = ..., model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., text_field: _Optional[str] = ..., current_model: _Optional[str] = ..., points_per_second: _Optional[float] = ...) -> None: ...

class MigrationStatusRequest(_message.Message):
    __slots__ = ("collection", "vector")
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    collection: str
    vector: str
    def __init__(self, collection: _Optional[str] = ..., vector: _Optional[str] = ...) -> None: ...

class MigratedModel(_message.Message):
    __slots__ = ("model", "fingerprint", "size")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    model: str
    fingerprint: str
    size: int
    def __init__(self, model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class MigrationStatus(_message.Message):
    __slots__ = ("vector", "phase", "switched", "complete", "current", "other", "text_field", "points_per_second_max", "started_at", "recorded_queries", "points", "done", "left", "only_other", "without_text", "points_per_second", "seconds_left", "copied_by", "error")
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    SWITCHED_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    CURRENT_FIELD_NUMBER: _ClassVar[int]
    OTHER_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_FIELD_NUMBER: _ClassVar[int]
    POINTS_PER_SECOND_MAX_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    RECORDED_QUERIES_FIELD_NUMBER: _ClassVar[int]
    POINTS_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    ONLY_OTHER_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_TEXT_FIELD_NUMBER: _ClassVar[int]
    POINTS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    SECONDS_LEFT_FIELD_NUMBER: _ClassVar[int]
    COPIED_BY_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    vector: str
    phase: MigrationPhase
    switched: bool
    complete: bool
    current: MigratedModel
    other: MigratedModel
    text_field: str
    points_per_second_max: float
    started_at: str
    recorded_queries: int
    points: int
    done: int
    left: int
    only_other: int
    without_text: int
    points_per_second: float
    seconds_left: float
    copied_by: str
    error: str
    def __init__(self, vector: _Optional[str] = ..., phase: _Optional[_Union[MigrationPhase, str]] = ..., switched: bool = ..., complete: bool = ..., current: _Optional[_Union[MigratedModel, _Mapping]] = ..., other: _Optional[_Union[MigratedModel, _Mapping]] = ..., text_field: _Optional[str] = ..., points_per_second_max: _Optional[float] = ..., started_at: _Optional[str] = ..., recorded_queries: _Optional[int] = ..., points: _Optional[int] = ..., done: _Optional[int] = ..., left: _Optional[int] = ..., only_other: _Optional[int] = ..., without_text: _Optional[int] = ..., points_per_second: _Optional[float] = ..., seconds_left: _Optional[float] = ..., copied_by: _Optional[str] = ..., error: _Optional[str] = ...) -> None: ...

class CompareModelsRequest(_message.Message):
    __slots__ = ("collection", "vector", "given", "limit", "exact")
    class Query(_message.Message):
        __slots__ = ("text", "filter", "relevant", "gains")
        TEXT_FIELD_NUMBER: _ClassVar[int]
        FILTER_FIELD_NUMBER: _ClassVar[int]
        RELEVANT_FIELD_NUMBER: _ClassVar[int]
        GAINS_FIELD_NUMBER: _ClassVar[int]
        text: str
        filter: bytes
        relevant: _ops_pb2.PointIds
        gains: _containers.RepeatedScalarFieldContainer[float]
        def __init__(self, text: _Optional[str] = ..., filter: _Optional[bytes] = ..., relevant: _Optional[_Union[_ops_pb2.PointIds, _Mapping]] = ..., gains: _Optional[_Iterable[float]] = ...) -> None: ...
    class Queries(_message.Message):
        __slots__ = ("queries",)
        QUERIES_FIELD_NUMBER: _ClassVar[int]
        queries: _containers.RepeatedCompositeFieldContainer[CompareModelsRequest.Query]
        def __init__(self, queries: _Optional[_Iterable[_Union[CompareModelsRequest.Query, _Mapping]]] = ...) -> None: ...
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    GIVEN_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    collection: str
    vector: str
    given: CompareModelsRequest.Queries
    limit: int
    exact: bool
    def __init__(self, collection: _Optional[str] = ..., vector: _Optional[str] = ..., given: _Optional[_Union[CompareModelsRequest.Queries, _Mapping]] = ..., limit: _Optional[int] = ..., exact: bool = ...) -> None: ...

class Interval(_message.Message):
    __slots__ = ("mean", "low", "high")
    MEAN_FIELD_NUMBER: _ClassVar[int]
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    mean: float
    low: float
    high: float
    def __init__(self, mean: _Optional[float] = ..., low: _Optional[float] = ..., high: _Optional[float] = ...) -> None: ...

class ComparedModels(_message.Message):
    __slots__ = ("current", "other", "limit", "queries", "source", "left", "overlap", "ndcg", "most_different")
    class Quality(_message.Message):
        __slots__ = ("queries", "current", "other", "gain")
        QUERIES_FIELD_NUMBER: _ClassVar[int]
        CURRENT_FIELD_NUMBER: _ClassVar[int]
        OTHER_FIELD_NUMBER: _ClassVar[int]
        GAIN_FIELD_NUMBER: _ClassVar[int]
        queries: int
        current: Interval
        other: Interval
        gain: Interval
        def __init__(self, queries: _Optional[int] = ..., current: _Optional[_Union[Interval, _Mapping]] = ..., other: _Optional[_Union[Interval, _Mapping]] = ..., gain: _Optional[_Union[Interval, _Mapping]] = ...) -> None: ...
    class Different(_message.Message):
        __slots__ = ("text", "overlap", "current", "other")
        TEXT_FIELD_NUMBER: _ClassVar[int]
        OVERLAP_FIELD_NUMBER: _ClassVar[int]
        CURRENT_FIELD_NUMBER: _ClassVar[int]
        OTHER_FIELD_NUMBER: _ClassVar[int]
        text: str
        overlap: float
        current: _ops_pb2.PointIds
        other: _ops_pb2.PointIds
        def __init__(self, text: _Optional[str] = ..., overlap: _Optional[float] = ..., current: _Optional[_Union[_ops_pb2.PointIds, _Mapping]] = ..., other: _Optional[_Union[_ops_pb2.PointIds, _Mapping]] = ...) -> None: ...
    CURRENT_FIELD_NUMBER: _ClassVar[int]
    OTHER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    OVERLAP_FIELD_NUMBER: _ClassVar[int]
    NDCG_FIELD_NUMBER: _ClassVar[int]
    MOST_DIFFERENT_FIELD_NUMBER: _ClassVar[int]
    current: str
    other: str
    limit: int
    queries: int
    source: QuerySource
    left: int
    overlap: Interval
    ndcg: ComparedModels.Quality
    most_different: _containers.RepeatedCompositeFieldContainer[ComparedModels.Different]
    def __init__(self, current: _Optional[str] = ..., other: _Optional[str] = ..., limit: _Optional[int] = ..., queries: _Optional[int] = ..., source: _Optional[_Union[QuerySource, str]] = ..., left: _Optional[int] = ..., overlap: _Optional[_Union[Interval, _Mapping]] = ..., ndcg: _Optional[_Union[ComparedModels.Quality, _Mapping]] = ..., most_different: _Optional[_Iterable[_Union[ComparedModels.Different, _Mapping]]] = ...) -> None: ...

class SwitchModelRequest(_message.Message):
    __slots__ = ("collection", "vector", "allow_missing")
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    ALLOW_MISSING_FIELD_NUMBER: _ClassVar[int]
    collection: str
    vector: str
    allow_missing: bool
    def __init__(self, collection: _Optional[str] = ..., vector: _Optional[str] = ..., allow_missing: bool = ...) -> None: ...

class RollbackModelRequest(_message.Message):
    __slots__ = ("collection", "vector")
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    collection: str
    vector: str
    def __init__(self, collection: _Optional[str] = ..., vector: _Optional[str] = ...) -> None: ...

class DropModelRequest(_message.Message):
    __slots__ = ("collection", "vector", "model", "allow_missing")
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ALLOW_MISSING_FIELD_NUMBER: _ClassVar[int]
    collection: str
    vector: str
    model: str
    allow_missing: bool
    def __init__(self, collection: _Optional[str] = ..., vector: _Optional[str] = ..., model: _Optional[str] = ..., allow_missing: bool = ...) -> None: ...
