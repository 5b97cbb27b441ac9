from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReplicaMessage(_message.Message):
    __slots__ = ("sender", "to", "collection_id", "shard", "body")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    TO_FIELD_NUMBER: _ClassVar[int]
    COLLECTION_ID_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    sender: str
    to: str
    collection_id: int
    shard: int
    body: bytes
    def __init__(self, sender: _Optional[str] = ..., to: _Optional[str] = ..., collection_id: _Optional[int] = ..., shard: _Optional[int] = ..., body: _Optional[bytes] = ...) -> None: ...

class ReplicaBody(_message.Message):
    __slots__ = ("term", "append", "appended", "probe", "position", "refused", "need_files", "released")
    TERM_FIELD_NUMBER: _ClassVar[int]
    APPEND_FIELD_NUMBER: _ClassVar[int]
    APPENDED_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    NEED_FILES_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    term: int
    append: Append
    appended: Appended
    probe: Probe
    position: Position
    refused: Refused
    need_files: NeedFiles
    released: Released
    def __init__(self, term: _Optional[int] = ..., append: _Optional[_Union[Append, _Mapping]] = ..., appended: _Optional[_Union[Appended, _Mapping]] = ..., probe: _Optional[_Union[Probe, _Mapping]] = ..., position: _Optional[_Union[Position, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ..., need_files: _Optional[_Union[NeedFiles, _Mapping]] = ..., released: _Optional[_Union[Released, _Mapping]] = ...) -> None: ...

class LogEntry(_message.Message):
    __slots__ = ("term", "data")
    TERM_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    term: int
    data: bytes
    def __init__(self, term: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Append(_message.Message):
    __slots__ = ("prev", "prev_term", "entries", "committed", "sent_at")
    PREV_FIELD_NUMBER: _ClassVar[int]
    PREV_TERM_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    SENT_AT_FIELD_NUMBER: _ClassVar[int]
    prev: int
    prev_term: int
    entries: _containers.RepeatedCompositeFieldContainer[LogEntry]
    committed: int
    sent_at: float
    def __init__(self, prev: _Optional[int] = ..., prev_term: _Optional[int] = ..., entries: _Optional[_Iterable[_Union[LogEntry, _Mapping]]] = ..., committed: _Optional[int] = ..., sent_at: _Optional[float] = ...) -> None: ...

class Appended(_message.Message):
    __slots__ = ("match", "echo")
    MATCH_FIELD_NUMBER: _ClassVar[int]
    ECHO_FIELD_NUMBER: _ClassVar[int]
    match: int
    echo: float
    def __init__(self, match: _Optional[int] = ..., echo: _Optional[float] = ...) -> None: ...

class Probe(_message.Message):
    __slots__ = ("sent_at",)
    SENT_AT_FIELD_NUMBER: _ClassVar[int]
    sent_at: float
    def __init__(self, sent_at: _Optional[float] = ...) -> None: ...

class Epoch(_message.Message):
    __slots__ = ("term", "first")
    TERM_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    term: int
    first: int
    def __init__(self, term: _Optional[int] = ..., first: _Optional[int] = ...) -> None: ...

class Position(_message.Message):
    __slots__ = ("incarnation", "durable", "committed", "epochs", "echo")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    ECHO_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    durable: int
    committed: int
    epochs: _containers.RepeatedCompositeFieldContainer[Epoch]
    echo: float
    def __init__(self, incarnation: _Optional[int] = ..., durable: _Optional[int] = ..., committed: _Optional[int] = ..., epochs: _Optional[_Iterable[_Union[Epoch, _Mapping]]] = ..., echo: _Optional[float] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NeedFiles(_message.Message):
    __slots__ = ("incarnation",)
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    def __init__(self, incarnation: _Optional[int] = ...) -> None: ...

class Released(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
