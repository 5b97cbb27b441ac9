from google.protobuf import any_pb2 as _any_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Consistency(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONSISTENCY_DEFAULT: _ClassVar[Consistency]
    CONSISTENCY_STRONG: _ClassVar[Consistency]
CONSISTENCY_DEFAULT: Consistency
CONSISTENCY_STRONG: Consistency

class PointId(_message.Message):
    __slots__ = ("number", "uuid")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    UUID_FIELD_NUMBER: _ClassVar[int]
    number: int
    uuid: str
    def __init__(self, number: _Optional[int] = ..., uuid: _Optional[str] = ...) -> None: ...

class ReadOptions(_message.Message):
    __slots__ = ("consistency", "token")
    CONSISTENCY_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    consistency: Consistency
    token: str
    def __init__(self, consistency: _Optional[_Union[Consistency, str]] = ..., token: _Optional[str] = ...) -> None: ...

class PayloadSelector(_message.Message):
    __slots__ = ("all", "include", "exclude")
    class Paths(_message.Message):
        __slots__ = ("paths",)
        PATHS_FIELD_NUMBER: _ClassVar[int]
        paths: _containers.RepeatedScalarFieldContainer[str]
        def __init__(self, paths: _Optional[_Iterable[str]] = ...) -> None: ...
    ALL_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_FIELD_NUMBER: _ClassVar[int]
    all: bool
    include: PayloadSelector.Paths
    exclude: PayloadSelector.Paths
    def __init__(self, all: bool = ..., include: _Optional[_Union[PayloadSelector.Paths, _Mapping]] = ..., exclude: _Optional[_Union[PayloadSelector.Paths, _Mapping]] = ...) -> None: ...

class VectorSelector(_message.Message):
    __slots__ = ("all", "names")
    ALL_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    all: bool
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, all: bool = ..., names: _Optional[_Iterable[str]] = ...) -> None: ...

class ErrorDetail(_message.Message):
    __slots__ = ("name", "message", "retryable", "maybe_applied", "retry_after_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    MAYBE_APPLIED_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    message: str
    retryable: bool
    maybe_applied: bool
    retry_after_s: float
    def __init__(self, name: _Optional[str] = ..., message: _Optional[str] = ..., retryable: bool = ..., maybe_applied: bool = ..., retry_after_s: _Optional[float] = ...) -> None: ...

class RpcStatus(_message.Message):
    __slots__ = ("code", "message", "details")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    details: _containers.RepeatedCompositeFieldContainer[_any_pb2.Any]
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., details: _Optional[_Iterable[_Union[_any_pb2.Any, _Mapping]]] = ...) -> None: ...
