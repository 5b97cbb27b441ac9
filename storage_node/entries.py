"""Log entries: the writes of shoal/storage_api.py after every question in them was answered, plus
Seal and Merge, which make the segments part of the log. Bytes are shoal.wire.Entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

from shoal.batch import PointBatch
from shoal.errors import ShardStopped, must
from shoal.ids import PointIds
from shoal.storage_api import (
    ClearPayload,
    Delete,
    DeletePayload,
    DeleteVectors,
    OverwritePayload,
    Selector,
    SetPayload,
    UpdateVectors,
    Upsert,
    Write,
)
from shoal.wire import ops_pb2 as wire

__all__ = ["LogEntry", "Merge", "Seal", "byte_size", "decode", "encode", "is_empty"]


@dataclass(frozen=True, slots=True)
class Seal:
    """The growing segment ends here and becomes segment `segment`."""

    segment: int


@dataclass(frozen=True, slots=True)
class Merge:
    """The rows of `inputs` that were alive at the last Seal before this become segment `output`.
    Nothing, when an earlier merge took one of the inputs."""

    inputs: tuple[int, ...]
    output: int


LogEntry = Write | Seal | Merge


def encode(entry: LogEntry) -> bytes:
    """Only entries without filters and modes can be written: they are effects."""
    match entry:
        case Upsert(points=points):
            message = wire.Entry(upsert=wire.Upsert(points=points.to_wire()))
        case UpdateVectors(points=points):
            message = wire.Entry(update_vectors=wire.UpdateVectors(points=points.to_wire()))
        case Delete(where=where):
            message = wire.Entry(delete=wire.Delete(ids=_ids(where)))
        case DeleteVectors(where=where, names=names):
            message = wire.Entry(delete_vectors=wire.DeleteVectors(ids=_ids(where), names=names))
        case SetPayload(where=where, payload=payload, key=key):
            message = wire.Entry(
                set_payload=wire.SetPayload(ids=_ids(where), payload=payload, key=key)
            )
        case OverwritePayload(where=where, payload=payload):
            message = wire.Entry(
                overwrite_payload=wire.OverwritePayload(ids=_ids(where), payload=payload)
            )
        case DeletePayload(where=where, keys=keys):
            message = wire.Entry(delete_payload=wire.DeletePayload(ids=_ids(where), keys=keys))
        case ClearPayload(where=where):
            message = wire.Entry(clear_payload=wire.ClearPayload(ids=_ids(where)))
        case Seal(segment=segment):
            message = wire.Entry(seal=wire.Seal(segment=segment))
        case Merge(inputs=inputs, output=output):
            message = wire.Entry(merge=wire.Merge(inputs=inputs, output=output))
        case _:
            assert_never(entry)
    return message.SerializeToString()


def _ids(where: Selector) -> wire.PointIds:
    must(where.ids is not None and where.filter is None, "a log entry holds ids, not a filter")
    assert where.ids is not None
    return where.ids.to_wire()


def decode(data: bytes) -> LogEntry:
    message = wire.Entry.FromString(data)
    kind = message.WhichOneof("op")
    match kind:
        case "upsert":
            return Upsert(PointBatch.from_wire(message.upsert.points))
        case "update_vectors":
            return UpdateVectors(PointBatch.from_wire(message.update_vectors.points))
        case "delete":
            return Delete(_where(message.delete.ids))
        case "delete_vectors":
            names = tuple(message.delete_vectors.names)
            return DeleteVectors(_where(message.delete_vectors.ids), names)
        case "set_payload":
            op = message.set_payload
            return SetPayload(_where(op.ids), op.payload, op.key if op.HasField("key") else None)
        case "overwrite_payload":
            where = _where(message.overwrite_payload.ids)
            return OverwritePayload(where, message.overwrite_payload.payload)
        case "delete_payload":
            keys = tuple(message.delete_payload.keys)
            return DeletePayload(_where(message.delete_payload.ids), keys)
        case "clear_payload":
            return ClearPayload(_where(message.clear_payload.ids))
        case "seal":
            return Seal(message.seal.segment)
        case "merge":
            return Merge(tuple(message.merge.inputs), message.merge.output)
        case None:
            raise ShardStopped("the log holds an entry that this version of Shoal does not know")
        case _:
            assert_never(kind)


def _where(ids: wire.PointIds) -> Selector:
    return Selector(ids=PointIds.from_wire(ids))


def byte_size(op: Write) -> int:
    """About how many bytes it will take in the log."""
    match op:
        case Upsert(points=points) | UpdateVectors(points=points):
            return _batch_size(points)
        case SetPayload() | OverwritePayload():
            return len(op.payload) + _ids_size(op.where)
        case DeletePayload(keys=names) | DeleteVectors(names=names):
            return sum(map(len, names)) + _ids_size(op.where)
        case Delete() | ClearPayload():
            return _ids_size(op.where)
        case _:
            assert_never(op)


def _ids_size(where: Selector) -> int:
    return 64 + (0 if where.ids is None else 24 * len(where.ids))


def _batch_size(points: PointBatch) -> int:
    size = 64 * (1 + len(points)) + len(points.payload)
    size += sum(block.values.nbytes for block in points.dense.values())
    size += sum(2 * block.values.nbytes for block in points.sparse.values())
    return size + sum(block.values.nbytes for block in points.multi.values())


def is_empty(entry: LogEntry) -> bool:
    """Whether it names no point: then it need not be logged."""
    match entry:
        case Seal() | Merge():
            return False
        case Upsert(points=points) | UpdateVectors(points=points):
            return len(points) == 0
        case _:
            return entry.where.ids is not None and len(entry.where.ids) == 0
