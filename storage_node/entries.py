"""Log entries: the writes of shoal/storage_api.py after every question in them was answered, plus
Seal and Merge, which make the segments part of the log. Bytes are shoal.wire.Entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

from shoal.batch import PointBatch
from shoal.errors import ShardStopped, must
from shoal.ids import PointIds
from shoal.rpc.codec import decode_vectors, encode_vectors
from shoal.storage_api import (
    AlterVectors,
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
    """Only entries without filters, modes and conditions can be written: they are effects."""
    match entry:
        case Upsert(points=points):
            message = wire.Entry(upsert=wire.Upsert(points=points.to_wire()))
        case UpdateVectors(points=points, forget=forget):
            must(entry.if_versions is None, "a log entry holds effects, not a condition")
            message = wire.Entry(
                update_vectors=wire.UpdateVectors(points=points.to_wire(), forget=forget)
            )
        case Delete(where=where):
            message = wire.Entry(delete=wire.Delete(ids=_ids(where)))
        case DeleteVectors(where=where, names=names):
            message = wire.Entry(delete_vectors=wire.DeleteVectors(ids=_ids(where), names=names))
        case SetPayload(where=where, payload=payload, key=key, forget=forget):
            message = wire.Entry(
                set_payload=wire.SetPayload(
                    ids=_ids(where), payload=payload, key=key, forget=forget
                )
            )
        case OverwritePayload(where=where, payload=payload, forget=forget):
            message = wire.Entry(
                overwrite_payload=wire.OverwritePayload(
                    ids=_ids(where), payload=payload, forget=forget
                )
            )
        case DeletePayload(where=where, keys=keys, forget=forget):
            message = wire.Entry(
                delete_payload=wire.DeletePayload(ids=_ids(where), keys=keys, forget=forget)
            )
        case ClearPayload(where=where, forget=forget):
            message = wire.Entry(clear_payload=wire.ClearPayload(ids=_ids(where), forget=forget))
        case AlterVectors(add=add, drop=drop, epoch=epoch):
            message = wire.Entry(
                alter_vectors=wire.AlterVectors(add=encode_vectors(add), drop=drop, epoch=epoch)
            )
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
            update = message.update_vectors
            return UpdateVectors(PointBatch.from_wire(update.points), forget=tuple(update.forget))
        case "delete":
            return Delete(_where(message.delete.ids))
        case "delete_vectors":
            names = tuple(message.delete_vectors.names)
            return DeleteVectors(_where(message.delete_vectors.ids), names)
        case "set_payload":
            op = message.set_payload
            key = op.key if op.HasField("key") else None
            return SetPayload(_where(op.ids), op.payload, key, tuple(op.forget))
        case "overwrite_payload":
            over = message.overwrite_payload
            return OverwritePayload(_where(over.ids), over.payload, tuple(over.forget))
        case "delete_payload":
            less = message.delete_payload
            return DeletePayload(_where(less.ids), tuple(less.keys), tuple(less.forget))
        case "clear_payload":
            clear = message.clear_payload
            return ClearPayload(_where(clear.ids), tuple(clear.forget))
        case "alter_vectors":
            alter = message.alter_vectors
            return AlterVectors(decode_vectors(alter.add), tuple(alter.drop), epoch=alter.epoch)
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
        case AlterVectors():
            return 128 * (1 + len(op.add) + len(op.drop))
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
    """Whether it changes nothing, whatever there is: then it need not be logged."""
    match entry:
        case AlterVectors():
            return not entry.add and not entry.drop and not entry.epoch
        case Seal() | Merge():
            return False
        case Upsert(points=points) | UpdateVectors(points=points):
            return len(points) == 0
        case _:
            return entry.where.ids is not None and len(entry.where.ids) == 0
