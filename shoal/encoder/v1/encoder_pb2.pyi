from shoal.node.v1 import node_pb2 as _node_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Lane(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LANE_BY_SIZE: _ClassVar[Lane]
    LANE_INTERACTIVE: _ClassVar[Lane]
    LANE_BULK: _ClassVar[Lane]
LANE_BY_SIZE: Lane
LANE_INTERACTIVE: Lane
LANE_BULK: Lane

class EmbedRequest(_message.Message):
    __slots__ = ("id", "model", "fingerprint", "texts", "lane", "cancelled")
    ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    id: int
    model: str
    fingerprint: str
    texts: _containers.RepeatedScalarFieldContainer[str]
    lane: Lane
    cancelled: bool
    def __init__(self, id: _Optional[int] = ..., model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., texts: _Optional[_Iterable[str]] = ..., lane: _Optional[_Union[Lane, str]] = ..., cancelled: bool = ...) -> None: ...

class EmbedReply(_message.Message):
    __slots__ = ("id", "vectors", "tokens", "truncated", "fingerprint", "waiting_tokens", "error")
    ID_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: int
    vectors: bytes
    tokens: bytes
    truncated: _containers.RepeatedScalarFieldContainer[int]
    fingerprint: str
    waiting_tokens: int
    error: _node_pb2.Error
    def __init__(self, id: _Optional[int] = ..., vectors: _Optional[bytes] = ..., tokens: _Optional[bytes] = ..., truncated: _Optional[_Iterable[int]] = ..., fingerprint: _Optional[str] = ..., waiting_tokens: _Optional[int] = ..., error: _Optional[_Union[_node_pb2.Error, _Mapping]] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("model", "aliases", "fingerprint", "dim", "max_tokens", "precision", "tp", "pp", "attempt", "ranks", "waiting_texts", "waiting_tokens", "texts_total", "truncated_total", "batches_total", "splits_total", "busy_s_total")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    TP_FIELD_NUMBER: _ClassVar[int]
    PP_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    WAITING_TEXTS_FIELD_NUMBER: _ClassVar[int]
    WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEXTS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BATCHES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    SPLITS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BUSY_S_TOTAL_FIELD_NUMBER: _ClassVar[int]
    model: str
    aliases: _containers.RepeatedScalarFieldContainer[str]
    fingerprint: str
    dim: int
    max_tokens: int
    precision: str
    tp: int
    pp: int
    attempt: int
    ranks: _containers.RepeatedCompositeFieldContainer[Rank]
    waiting_texts: int
    waiting_tokens: int
    texts_total: int
    truncated_total: int
    batches_total: int
    splits_total: int
    busy_s_total: float
    def __init__(self, model: _Optional[str] = ..., aliases: _Optional[_Iterable[str]] = ..., fingerprint: _Optional[str] = ..., dim: _Optional[int] = ..., max_tokens: _Optional[int] = ..., precision: _Optional[str] = ..., tp: _Optional[int] = ..., pp: _Optional[int] = ..., attempt: _Optional[int] = ..., ranks: _Optional[_Iterable[_Union[Rank, _Mapping]]] = ..., waiting_texts: _Optional[int] = ..., waiting_tokens: _Optional[int] = ..., texts_total: _Optional[int] = ..., truncated_total: _Optional[int] = ..., batches_total: _Optional[int] = ..., splits_total: _Optional[int] = ..., busy_s_total: _Optional[float] = ...) -> None: ...

class Rank(_message.Message):
    __slots__ = ("rank", "tp", "pp", "pid", "parameters", "parameter_bytes", "resident_bytes", "device")
    RANK_FIELD_NUMBER: _ClassVar[int]
    TP_FIELD_NUMBER: _ClassVar[int]
    PP_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    rank: int
    tp: int
    pp: int
    pid: int
    parameters: int
    parameter_bytes: int
    resident_bytes: int
    device: str
    def __init__(self, rank: _Optional[int] = ..., tp: _Optional[int] = ..., pp: _Optional[int] = ..., pid: _Optional[int] = ..., parameters: _Optional[int] = ..., parameter_bytes: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., device: _Optional[str] = ...) -> None: ...
