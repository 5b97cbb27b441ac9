from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

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
