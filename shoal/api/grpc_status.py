"""Errors of shoal/errors.py as gRPC statuses, and back: one table for the server and the client.

    BadRequest, InvalidField, BodyTooLarge  INVALID_ARGUMENT
    Unauthorized                            UNAUTHENTICATED
    Forbidden                               PERMISSION_DENIED
    NotFound                                NOT_FOUND
    AlreadyExists                           ALREADY_EXISTS
    Busy, StorageFull                       RESOURCE_EXHAUSTED
    NotSupported                            UNIMPLEMENTED
    TimedOut                                DEADLINE_EXCEEDED
    ShardStopped                            FAILED_PRECONDITION
    Unavailable, NotPrimary, Stale,
    VectorsChanged                          UNAVAILABLE
    a bug                                   INTERNAL

The status is for programs that know gRPC only. What it cannot say (which error it is, whether a write
may have happened, when to try again) is in an `ErrorDetail`, in the trailing metadata
`grpc-status-details-bin` as all of gRPC does it. A status without one did not come from Shoal but
from a proxy, or from gRPC itself; `error_of_status` says what it can mean then.
"""

from __future__ import annotations

from typing import Final

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError

from shoal import errors
from shoal.errors import ShoalError
from shoal.limits import GRPC_ERROR_BYTES_MAX
from shoal.v1 import common_pb2 as pb

__all__ = [
    "DETAILS_KEY",
    "code_of",
    "detail_of",
    "error_of",
    "error_of_status",
    "pack_details",
    "unpack_details",
]

DETAILS_KEY: Final = "grpc-status-details-bin"

_CODES: dict[type[ShoalError], grpc.StatusCode] = {
    errors.BadRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Unauthorized: grpc.StatusCode.UNAUTHENTICATED,
    errors.Forbidden: grpc.StatusCode.PERMISSION_DENIED,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.TimedOut: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.Busy: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.StorageFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.NotSupported: grpc.StatusCode.UNIMPLEMENTED,
    errors.ShardStopped: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.VectorsChanged: grpc.StatusCode.UNAVAILABLE,
}
# A detail names one of these; a client that is older than the server meets names that it has not.
_TYPES: dict[str, type[ShoalError]] = {
    name: kind
    for name in errors.__all__
    if isinstance(kind := getattr(errors, name), type) and issubclass(kind, ShoalError)
}
_KNOWN = frozenset(_TYPES.values())
# What a status without a detail means: gRPC itself gave it, or something between client and server.
_BARE: dict[grpc.StatusCode, type[ShoalError]] = {
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    grpc.StatusCode.INTERNAL: errors.Unavailable,  # a connection that broke; bugs have a detail
    grpc.StatusCode.UNKNOWN: errors.Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.TimedOut,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Busy,
    grpc.StatusCode.UNIMPLEMENTED: errors.NotSupported,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthorized,
    grpc.StatusCode.PERMISSION_DENIED: errors.Forbidden,
    grpc.StatusCode.INVALID_ARGUMENT: errors.BadRequest,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
}
_TOO_LARGE = "larger than max"  # how gRPC words it that a message is beyond the receiver's bound
_IN_DOUBT = (errors.Unavailable, errors.TimedOut)


# -- an error -> what goes over the wire ----------------------------------------------------------
def code_of(error: ShoalError) -> grpc.StatusCode:
    for kind in type(error).__mro__:
        if kind in _CODES:
            return _CODES[kind]
    return grpc.StatusCode.INTERNAL


def detail_of(error: ShoalError) -> pb.ErrorDetail:
    """The message is cut to what a header may hold."""
    message = error.message
    if len(message) > GRPC_ERROR_BYTES_MAX or len(message.encode()) > GRPC_ERROR_BYTES_MAX:
        message = message.encode()[:GRPC_ERROR_BYTES_MAX].decode(errors="ignore") + "…"
    return pb.ErrorDetail(
        # of a type that only one part of Shoal knows: what it is to everybody
        name=next(kind.__name__ for kind in type(error).__mro__ if kind in _KNOWN),
        message=message,
        retryable=error.retryable,
        maybe_applied=error.maybe_applied,
        retry_after_s=getattr(error, "retry_after_s", 0.0),
    )


def pack_details(code: grpc.StatusCode, detail: pb.ErrorDetail) -> bytes:
    """The value of `grpc-status-details-bin`."""
    packed = Any()
    packed.Pack(detail)
    number: int = code.value[0]
    return pb.RpcStatus(code=number, message=detail.message, details=[packed]).SerializeToString()


# -- and back -------------------------------------------------------------------------------------
def unpack_details(raw: bytes) -> pb.ErrorDetail | None:
    """The ErrorDetail in `grpc-status-details-bin`; None when there is none that we can read."""
    try:
        status = pb.RpcStatus.FromString(raw)
    except DecodeError:
        return None
    for packed in status.details:
        detail = pb.ErrorDetail()
        if packed.Unpack(detail):
            return detail
    return None


def error_of(detail: pb.ErrorDetail) -> ShoalError:
    """The error that was raised on the other side, as its own type where we have it."""
    kind = _TYPES.get(detail.name, ShoalError)
    error = kind(detail.message)
    error.maybe_applied = detail.maybe_applied
    error.retryable = detail.retryable
    if isinstance(error, errors.Busy) and detail.retry_after_s:
        error.retry_after_s = detail.retry_after_s
    return error


def error_of_status(
    code: grpc.StatusCode, message: str, detail: pb.ErrorDetail | None, *, may_have_happened: bool
) -> ShoalError:
    """The error of a call that ended with `code`.

    may_have_happened  the call was a write, and it left this process.
    """
    if detail is not None:
        return error_of(detail)
    kind = _BARE.get(code, ShoalError)
    if kind is errors.Busy and _TOO_LARGE in message:
        return errors.BodyTooLarge(f"Payload too large: {message}: send several smaller requests")
    error = kind(message or f"the call ended with {code.name}")
    # A server of ours says so when it refuses. Without its word only these leave it open.
    error.maybe_applied = may_have_happened and (kind in _IN_DOUBT or kind is ShoalError)
    return error
