"""Errors of Shoal in the clothes of gRPC, and back.

raised by a node   ->  status code + text for tools, and the whole error in a trailer
met by a caller    ->  that error; or, when the call itself failed, what it means here
"""

from __future__ import annotations

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from shoal.errors import (
    BadRequest,
    Busy,
    NotFound,
    NotSupported,
    ShoalError,
    StorageFull,
    TimedOut,
    Unauthorized,
    Unavailable,
)
from shoal.limits import ERROR_TEXT_BYTES_MAX
from shoal.node.v1 import node_pb2 as pb
from shoal.rpc.codec import decode_error, encode_error

__all__ = ["ERROR_TRAILER", "from_rpc_error", "lost", "rpc_code", "timed_out", "to_trailer"]

ERROR_TRAILER = "shoal-error-bin"

_CODES: list[tuple[type[ShoalError], grpc.StatusCode]] = [  # the first that fits
    (NotFound, grpc.StatusCode.NOT_FOUND),
    (BadRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (Unauthorized, grpc.StatusCode.UNAUTHENTICATED),
    (TimedOut, grpc.StatusCode.DEADLINE_EXCEEDED),
    (Busy, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (StorageFull, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (NotSupported, grpc.StatusCode.UNIMPLEMENTED),
    (Unavailable, grpc.StatusCode.UNAVAILABLE),
]


def rpc_code(error: ShoalError) -> grpc.StatusCode:
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return grpc.StatusCode.UNKNOWN


def to_trailer(error: ShoalError) -> tuple[tuple[str, bytes], ...]:
    message = encode_error(error)
    text = message.message.encode()
    if len(text) > ERROR_TEXT_BYTES_MAX:
        message.message = text[:ERROR_TEXT_BYTES_MAX].decode(errors="ignore") + "…"
    return ((ERROR_TRAILER, message.SerializeToString()),)


def from_rpc_error(error: grpc.aio.AioRpcError, peer: str, *, write: bool) -> ShoalError:
    """What a failed call means to whoever made it.

    peer   "storage node s1 at 10.0.0.7:7001", for the message.
    write  it may have changed something: unless the node itself says more, it may have happened.
    """
    for name, value in error.trailing_metadata() or ():
        if name == ERROR_TRAILER and isinstance(value, bytes):
            try:
                return decode_error(pb.Error.FromString(value))
            except DecodeError:
                break
    code, why = error.code(), error.details() or error.code().name
    match code:
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return timed_out(peer, write=write)
        case grpc.StatusCode.UNIMPLEMENTED:
            return NotSupported(f"{peer} does not know this call: does it run an older version?")
        case grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.PERMISSION_DENIED:
            return Unavailable(f"{peer} refuses this node: {why}")
        case _:
            return lost(peer, why, maybe_applied=write)


def lost(peer: str, why: str, *, maybe_applied: bool) -> Unavailable:
    """No answer will come."""
    perhaps = ". The write may have happened" if maybe_applied else ""
    error = Unavailable(f"{peer} cannot be reached: {why}{perhaps}")
    error.maybe_applied = maybe_applied
    return error


def timed_out(peer: str, *, write: bool) -> TimedOut:
    error = TimedOut(f"{peer} did not answer in time")
    error.maybe_applied = write
    return error
