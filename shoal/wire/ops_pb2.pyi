from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PointIds(_message.Message):
    __slots__ = ("ints", "uuids", "kinds")
    INTS_FIELD_NUMBER: _ClassVar[int]
    UUIDS_FIELD_NUMBER: _ClassVar[int]
    KINDS_FIELD_NUMBER: _ClassVar[int]
    ints: bytes
    uuids: bytes
    kinds: bytes
    def __init__(self, ints: _Optional[bytes] = ..., uuids: _Optional[bytes] = ..., kinds: _Optional[bytes] = ...) -> None: ...

class DenseColumn(_message.Message):
    __slots__ = ("name", "dim", "values", "present")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    dim: int
    values: bytes
    present: bytes
    def __init__(self, name: _Optional[str] = ..., dim: _Optional[int] = ..., values: _Optional[bytes] = ..., present: _Optional[bytes] = ...) -> None: ...

class SparseColumn(_message.Message):
    __slots__ = ("name", "indptr", "indices", "values", "present")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INDPTR_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    indptr: bytes
    indices: bytes
    values: bytes
    present: bytes
    def __init__(self, name: _Optional[str] = ..., indptr: _Optional[bytes] = ..., indices: _Optional[bytes] = ..., values: _Optional[bytes] = ..., present: _Optional[bytes] = ...) -> None: ...

class MultiColumn(_message.Message):
    __slots__ = ("name", "dim", "indptr", "values", "present")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    INDPTR_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    dim: int
    indptr: bytes
    values: bytes
    present: bytes
    def __init__(self, name: _Optional[str] = ..., dim: _Optional[int] = ..., indptr: _Optional[bytes] = ..., values: _Optional[bytes] = ..., present: _Optional[bytes] = ...) -> None: ...

class PointBatch(_message.Message):
    __slots__ = ("count", "ids", "dense", "sparse", "multi", "payload", "payload_offsets", "versions")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    DENSE_FIELD_NUMBER: _ClassVar[int]
    SPARSE_FIELD_NUMBER: _ClassVar[int]
    MULTI_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_OFFSETS_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    count: int
    ids: PointIds
    dense: _containers.RepeatedCompositeFieldContainer[DenseColumn]
    sparse: _containers.RepeatedCompositeFieldContainer[SparseColumn]
    multi: _containers.RepeatedCompositeFieldContainer[MultiColumn]
    payload: bytes
    payload_offsets: bytes
    versions: bytes
    def __init__(self, count: _Optional[int] = ..., ids: _Optional[_Union[PointIds, _Mapping]] = ..., dense: _Optional[_Iterable[_Union[DenseColumn, _Mapping]]] = ..., sparse: _Optional[_Iterable[_Union[SparseColumn, _Mapping]]] = ..., multi: _Optional[_Iterable[_Union[MultiColumn, _Mapping]]] = ..., payload: _Optional[bytes] = ..., payload_offsets: _Optional[bytes] = ..., versions: _Optional[bytes] = ...) -> None: ...

class VectorSpec(_message.Message):
    __slots__ = ("name", "dim", "distance", "multi", "hnsw_m", "hnsw_ef_construct", "index_bytes_min")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    DISTANCE_FIELD_NUMBER: _ClassVar[int]
    MULTI_FIELD_NUMBER: _ClassVar[int]
    HNSW_M_FIELD_NUMBER: _ClassVar[int]
    HNSW_EF_CONSTRUCT_FIELD_NUMBER: _ClassVar[int]
    INDEX_BYTES_MIN_FIELD_NUMBER: _ClassVar[int]
    name: str
    dim: int
    distance: str
    multi: bool
    hnsw_m: int
    hnsw_ef_construct: int
    index_bytes_min: int
    def __init__(self, name: _Optional[str] = ..., dim: _Optional[int] = ..., distance: _Optional[str] = ..., multi: bool = ..., hnsw_m: _Optional[int] = ..., hnsw_ef_construct: _Optional[int] = ..., index_bytes_min: _Optional[int] = ...) -> None: ...

class Upsert(_message.Message):
    __slots__ = ("points",)
    POINTS_FIELD_NUMBER: _ClassVar[int]
    points: PointBatch
    def __init__(self, points: _Optional[_Union[PointBatch, _Mapping]] = ...) -> None: ...

class UpdateVectors(_message.Message):
    __slots__ = ("points", "forget")
    POINTS_FIELD_NUMBER: _ClassVar[int]
    FORGET_FIELD_NUMBER: _ClassVar[int]
    points: PointBatch
    forget: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, points: _Optional[_Union[PointBatch, _Mapping]] = ..., forget: _Optional[_Iterable[str]] = ...) -> None: ...

class Delete(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: PointIds
    def __init__(self, ids: _Optional[_Union[PointIds, _Mapping]] = ...) -> None: ...

class DeleteVectors(_message.Message):
    __slots__ = ("ids", "names")
    IDS_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    ids: PointIds
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, ids: _Optional[_Union[PointIds, _Mapping]] = ..., names: _Optional[_Iterable[str]] = ...) -> None: ...

class SetPayload(_message.Message):
    __slots__ = ("ids", "payload", "key", "forget")
    IDS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    FORGET_FIELD_NUMBER: _ClassVar[int]
    ids: PointIds
    payload: bytes
    key: str
    forget: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, ids: _Optional[_Union[PointIds, _Mapping]] = ..., payload: _Optional[bytes] = ..., key: _Optional[str] = ..., forget: _Optional[_Iterable[str]] = ...) -> None: ...

class OverwritePayload(_message.Message):
    __slots__ = ("ids", "payload", "forget")
    IDS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    FORGET_FIELD_NUMBER: _ClassVar[int]
    ids: PointIds
    payload: bytes
    forget: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, ids: _Optional[_Union[PointIds, _Mapping]] = ..., payload: _Optional[bytes] = ..., forget: _Optional[_Iterable[str]] = ...) -> None: ...

class DeletePayload(_message.Message):
    __slots__ = ("ids", "keys", "forget")
    IDS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    FORGET_FIELD_NUMBER: _ClassVar[int]
    ids: PointIds
    keys: _containers.RepeatedScalarFieldContainer[str]
    forget: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, ids: _Optional[_Union[PointIds, _Mapping]] = ..., keys: _Optional[_Iterable[str]] = ..., forget: _Optional[_Iterable[str]] = ...) -> None: ...

class ClearPayload(_message.Message):
    __slots__ = ("ids", "forget")
    IDS_FIELD_NUMBER: _ClassVar[int]
    FORGET_FIELD_NUMBER: _ClassVar[int]
    ids: PointIds
    forget: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, ids: _Optional[_Union[PointIds, _Mapping]] = ..., forget: _Optional[_Iterable[str]] = ...) -> None: ...

class AlterVectors(_message.Message):
    __slots__ = ("add", "drop", "epoch")
    ADD_FIELD_NUMBER: _ClassVar[int]
    DROP_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    add: _containers.RepeatedCompositeFieldContainer[VectorSpec]
    drop: _containers.RepeatedScalarFieldContainer[str]
    epoch: int
    def __init__(self, add: _Optional[_Iterable[_Union[VectorSpec, _Mapping]]] = ..., drop: _Optional[_Iterable[str]] = ..., epoch: _Optional[int] = ...) -> None: ...

class Seal(_message.Message):
    __slots__ = ("segment",)
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    segment: int
    def __init__(self, segment: _Optional[int] = ...) -> None: ...

class Merge(_message.Message):
    __slots__ = ("inputs", "output")
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    inputs: _containers.RepeatedScalarFieldContainer[int]
    output: int
    def __init__(self, inputs: _Optional[_Iterable[int]] = ..., output: _Optional[int] = ...) -> None: ...

class Entry(_message.Message):
    __slots__ = ("upsert", "update_vectors", "delete", "delete_vectors", "set_payload", "overwrite_payload", "delete_payload", "clear_payload", "seal", "merge", "alter_vectors")
    UPSERT_FIELD_NUMBER: _ClassVar[int]
    UPDATE_VECTORS_FIELD_NUMBER: _ClassVar[int]
    DELETE_FIELD_NUMBER: _ClassVar[int]
    DELETE_VECTORS_FIELD_NUMBER: _ClassVar[int]
    SET_PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    OVERWRITE_PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    DELETE_PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    CLEAR_PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    SEAL_FIELD_NUMBER: _ClassVar[int]
    MERGE_FIELD_NUMBER: _ClassVar[int]
    ALTER_VECTORS_FIELD_NUMBER: _ClassVar[int]
    upsert: Upsert
    update_vectors: UpdateVectors
    delete: Delete
    delete_vectors: DeleteVectors
    set_payload: SetPayload
    overwrite_payload: OverwritePayload
    delete_payload: DeletePayload
    clear_payload: ClearPayload
    seal: Seal
    merge: Merge
    alter_vectors: AlterVectors
    def __init__(self, upsert: _Optional[_Union[Upsert, _Mapping]] = ..., update_vectors: _Optional[_Union[UpdateVectors, _Mapping]] = ..., delete: _Optional[_Union[Delete, _Mapping]] = ..., delete_vectors: _Optional[_Union[DeleteVectors, _Mapping]] = ..., set_payload: _Optional[_Union[SetPayload, _Mapping]] = ..., overwrite_payload: _Optional[_Union[OverwritePayload, _Mapping]] = ..., delete_payload: _Optional[_Union[DeletePayload, _Mapping]] = ..., clear_payload: _Optional[_Union[ClearPayload, _Mapping]] = ..., seal: _Optional[_Union[Seal, _Mapping]] = ..., merge: _Optional[_Union[Merge, _Mapping]] = ..., alter_vectors: _Optional[_Union[AlterVectors, _Mapping]] = ...) -> None: ...
