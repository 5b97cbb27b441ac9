"""The messages of storage_node/replica.py as bytes, and back (proto/shoal/node/v1/replication.proto)."""

from __future__ import annotations

from typing import assert_never

from google.protobuf.message import DecodeError

from shoal.errors import BadRequest
from shoal.node.v1 import replication_pb2 as wire
from storage_node.replica import (
    Append,
    Appended,
    Entry,
    Message,
    NeedFiles,
    Position,
    Probe,
    Refused,
    Released,
)

__all__ = ["decode_message", "encode_message"]


def encode_message(message: Message) -> bytes:
    match message:
        case Append():
            return _encode_append(message)
        case Appended(term=term, match=match, echo=echo):
            body = wire.ReplicaBody(term=term, appended=wire.Appended(match=match, echo=echo))
        case Probe(term=term, sent_at=sent_at):
            body = wire.ReplicaBody(term=term, probe=wire.Probe(sent_at=sent_at))
        case Position():
            position = wire.Position(
                incarnation=message.incarnation,
                durable=message.durable,
                committed=message.committed,
                epochs=[wire.Epoch(term=term, first=first) for term, first in message.epochs],
                echo=message.echo,
            )
            body = wire.ReplicaBody(term=message.term, position=position)
        case Refused(term=term):
            body = wire.ReplicaBody(term=term, refused=wire.Refused())
        case Released(term=term):
            body = wire.ReplicaBody(term=term, released=wire.Released())
        case NeedFiles(term, incarnation):
            body = wire.ReplicaBody(term=term, need_files=wire.NeedFiles(incarnation=incarnation))
        case _:
            assert_never(message)
    return body.SerializeToString()


class _LastAppend:
    """A primary says the same to each of its followers, one after the other."""

    message: Append | None = None
    data = b""


def _encode_append(message: Append) -> bytes:
    if message == _LastAppend.message:
        return _LastAppend.data
    # Filled in place: a message that is put into another one later is copied, with all its points.
    body = wire.ReplicaBody(term=message.term)
    append = body.append
    append.prev, append.prev_term = message.prev, message.prev_term
    append.committed, append.sent_at = message.committed, message.sent_at
    add = append.entries.add
    for entry in message.entries:
        add(term=entry.term, data=entry.data)
    _LastAppend.message, _LastAppend.data = message, body.SerializeToString()
    return _LastAppend.data


def decode_message(data: bytes) -> Message:
    """Raises BadRequest for what no replica of this version says."""
    try:
        body = wire.ReplicaBody.FromString(data)
    except DecodeError as error:
        raise BadRequest(f"Bad request: not a message between replicas: {error}") from error
    kind, term = body.WhichOneof("says"), body.term
    match kind:
        case "append":
            m = body.append
            entries = tuple(
                Entry(m.prev + 1 + i, entry.term, entry.data) for i, entry in enumerate(m.entries)
            )
            return Append(term, m.prev, m.prev_term, entries, m.committed, m.sent_at)
        case "appended":
            return Appended(term, body.appended.match, body.appended.echo)
        case "probe":
            return Probe(term, body.probe.sent_at)
        case "position":
            p = body.position
            epochs = tuple((epoch.term, epoch.first) for epoch in p.epochs)
            return Position(term, p.incarnation, p.durable, p.committed, epochs, p.echo)
        case "refused":
            return Refused(term)
        case "need_files":
            return NeedFiles(term, body.need_files.incarnation)
        case "released":
            return Released(term)
        case None:
            raise BadRequest("Bad request: replicas of this version do not say that")
        case _:
            assert_never(kind)
