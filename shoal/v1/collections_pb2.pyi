from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Distance(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DISTANCE_UNSPECIFIED: _ClassVar[Distance]
    DISTANCE_COSINE: _ClassVar[Distance]
    DISTANCE_DOT: _ClassVar[Distance]
    DISTANCE_EUCLID: _ClassVar[Distance]
    DISTANCE_MANHATTAN: _ClassVar[Distance]

class Datatype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATATYPE_DEFAULT: _ClassVar[Datatype]
    DATATYPE_FLOAT32: _ClassVar[Datatype]
    DATATYPE_FLOAT16: _ClassVar[Datatype]
    DATATYPE_UINT8: _ClassVar[Datatype]

class CollectionStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COLLECTION_STATUS_UNSPECIFIED: _ClassVar[CollectionStatus]
    COLLECTION_STATUS_GREEN: _ClassVar[CollectionStatus]
    COLLECTION_STATUS_YELLOW: _ClassVar[CollectionStatus]
    COLLECTION_STATUS_RED: _ClassVar[CollectionStatus]
DISTANCE_UNSPECIFIED: Distance
DISTANCE_COSINE: Distance
DISTANCE_DOT: Distance
DISTANCE_EUCLID: Distance
DISTANCE_MANHATTAN: Distance
DATATYPE_DEFAULT: Datatype
DATATYPE_FLOAT32: Datatype
DATATYPE_FLOAT16: Datatype
DATATYPE_UINT8: Datatype
COLLECTION_STATUS_UNSPECIFIED: CollectionStatus
COLLECTION_STATUS_GREEN: CollectionStatus
COLLECTION_STATUS_YELLOW: CollectionStatus
COLLECTION_STATUS_RED: CollectionStatus

class HnswConfig(_message.Message):
    __slots__ = ("m", "ef_construct", "full_scan_threshold_kib")
    M_FIELD_NUMBER: _ClassVar[int]
    EF_CONSTRUCT_FIELD_NUMBER: _ClassVar[int]
    FULL_SCAN_THRESHOLD_KIB_FIELD_NUMBER: _ClassVar[int]
    m: int
    ef_construct: int
    full_scan_threshold_kib: int
    def __init__(self, m: _Optional[int] = ..., ef_construct: _Optional[int] = ..., full_scan_threshold_kib: _Optional[int] = ...) -> None: ...

class VectorConfig(_message.Message):
    __slots__ = ("name", "size", "distance", "datatype", "multivector", "hnsw")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    DISTANCE_FIELD_NUMBER: _ClassVar[int]
    DATATYPE_FIELD_NUMBER: _ClassVar[int]
    MULTIVECTOR_FIELD_NUMBER: _ClassVar[int]
    HNSW_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    distance: Distance
    datatype: Datatype
    multivector: bool
    hnsw: HnswConfig
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ..., distance: _Optional[_Union[Distance, str]] = ..., datatype: _Optional[_Union[Datatype, str]] = ..., multivector: bool = ..., hnsw: _Optional[_Union[HnswConfig, _Mapping]] = ...) -> None: ...

class CollectionConfig(_message.Message):
    __slots__ = ("vectors", "sparse_vectors", "shard_number", "replication_factor", "write_consistency_factor", "hnsw", "metadata")
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    SPARSE_VECTORS_FIELD_NUMBER: _ClassVar[int]
    SHARD_NUMBER_FIELD_NUMBER: _ClassVar[int]
    REPLICATION_FACTOR_FIELD_NUMBER: _ClassVar[int]
    WRITE_CONSISTENCY_FACTOR_FIELD_NUMBER: _ClassVar[int]
    HNSW_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    vectors: _containers.RepeatedCompositeFieldContainer[VectorConfig]
    sparse_vectors: _containers.RepeatedScalarFieldContainer[str]
    shard_number: int
    replication_factor: int
    write_consistency_factor: int
    hnsw: HnswConfig
    metadata: bytes
    def __init__(self, vectors: _Optional[_Iterable[_Union[VectorConfig, _Mapping]]] = ..., sparse_vectors: _Optional[_Iterable[str]] = ..., shard_number: _Optional[int] = ..., replication_factor: _Optional[int] = ..., write_consistency_factor: _Optional[int] = ..., hnsw: _Optional[_Union[HnswConfig, _Mapping]] = ..., metadata: _Optional[bytes] = ...) -> None: ...

class CreateCollectionRequest(_message.Message):
    __slots__ = ("name", "config")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    name: str
    config: CollectionConfig
    def __init__(self, name: _Optional[str] = ..., config: _Optional[_Union[CollectionConfig, _Mapping]] = ...) -> None: ...

class CreateCollectionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetCollectionRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class CollectionInfo(_message.Message):
    __slots__ = ("name", "status", "why", "points_count", "indexed_vectors_count", "segments_count", "config")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    POINTS_COUNT_FIELD_NUMBER: _ClassVar[int]
    INDEXED_VECTORS_COUNT_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_COUNT_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    name: str
    status: CollectionStatus
    why: str
    points_count: int
    indexed_vectors_count: int
    segments_count: int
    config: CollectionConfig
    def __init__(self, name: _Optional[str] = ..., status: _Optional[_Union[CollectionStatus, str]] = ..., why: _Optional[str] = ..., points_count: _Optional[int] = ..., indexed_vectors_count: _Optional[int] = ..., segments_count: _Optional[int] = ..., config: _Optional[_Union[CollectionConfig, _Mapping]] = ...) -> None: ...

class ListCollectionsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListCollectionsResponse(_message.Message):
    __slots__ = ("names",)
    NAMES_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, names: _Optional[_Iterable[str]] = ...) -> None: ...

class DeleteCollectionRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DeleteCollectionResponse(_message.Message):
    __slots__ = ("deleted",)
    DELETED_FIELD_NUMBER: _ClassVar[int]
    deleted: bool
    def __init__(self, deleted: bool = ...) -> None: ...

class CollectionExistsRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class CollectionExistsResponse(_message.Message):
    __slots__ = ("exists",)
    EXISTS_FIELD_NUMBER: _ClassVar[int]
    exists: bool
    def __init__(self, exists: bool = ...) -> None: ...
