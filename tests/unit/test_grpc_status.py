"""Errors keep their meaning on the way through a gRPC status."""

from __future__ import annotations

import grpc
import pytest

from shoal import errors
from shoal.api.grpc_status import (
    code_of,
    detail_of,
    error_of,
    error_of_status,
    pack_details,
    unpack_details,
)
from shoal.errors import Busy, ShoalError
from shoal.limits import GRPC_ERROR_BYTES_MAX
from shoal.v1 import common_pb2

KINDS = sorted(
    (
        kind
        for name in errors.__all__
        if isinstance(kind := getattr(errors, name), type) and issubclass(kind, ShoalError)
    ),
    key=lambda kind: kind.__name__,
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("maybe_applied", [False, True])
def test_every_error_comes_back_as_itself(kind, maybe_applied):
    error = kind("näh: a sentence")
    error.maybe_applied = maybe_applied
    detail = unpack_details(pack_details(code_of(error), detail_of(error)))
    assert detail is not None
    back = error_of(detail)
    assert type(back) is kind
    assert (back.message, back.maybe_applied, back.retryable) == (
        "näh: a sentence",
        maybe_applied,
        error.retryable,
    )


def test_an_error_that_only_one_part_knows_is_what_it_is_to_everybody():
    class ShardGone(errors.NotFound):
        pass

    back = error_of(detail_of(ShardGone("x")))
    assert type(back) is errors.NotFound


def test_when_to_come_back():
    back = error_of(detail_of(Busy("x", retry_after_s=3.5)))
    assert isinstance(back, Busy)
    assert back.retry_after_s == 3.5


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.InvalidField, grpc.StatusCode.INVALID_ARGUMENT),
        (errors.Stale, grpc.StatusCode.UNAVAILABLE),
        (errors.ShardStopped, grpc.StatusCode.FAILED_PRECONDITION),
        (ShoalError, grpc.StatusCode.INTERNAL),
    ],
)
def test_codes(kind, code):
    assert code_of(kind("x")) is code


@pytest.mark.parametrize("letter", ["x", "ä", "界"])
def test_a_long_message_fits_into_a_header(letter):
    detail = detail_of(errors.BadRequest(letter * 100_000))
    assert len(detail.message.encode()) <= GRPC_ERROR_BYTES_MAX + len("…".encode())
    assert detail.message.endswith(letter + "…")


def test_an_error_of_a_newer_server_is_an_error_all_the_same():
    back = error_of(common_pb2.ErrorDetail(name="FluxReversed", message="x", retryable=True))
    assert type(back) is ShoalError
    assert back.retryable


def test_details_of_somebody_else():
    assert unpack_details(b"\xff\xff") is None
    assert unpack_details(common_pb2.RpcStatus(code=5, message="x").SerializeToString()) is None


@pytest.mark.parametrize(
    ("code", "kind", "in_doubt"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.Unavailable, True),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.TimedOut, True),
        (grpc.StatusCode.INTERNAL, errors.Unavailable, True),
        (grpc.StatusCode.ABORTED, ShoalError, True),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Busy, False),
        (grpc.StatusCode.UNIMPLEMENTED, errors.NotSupported, False),
    ],
)
def test_a_status_without_a_detail(code, kind, in_doubt):
    write = error_of_status(code, "said so", None, may_have_happened=True)
    assert (type(write), write.maybe_applied) == (kind, in_doubt)
    read = error_of_status(code, "said so", None, may_have_happened=False)
    assert (type(read), read.maybe_applied) == (kind, False)


def test_a_message_beyond_the_bound_is_no_load():
    said = "CLIENT: Sent message larger than max (40000000 vs. 33554432)"
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    error = error_of_status(code, said, None, may_have_happened=True)
    assert type(error) is errors.BodyTooLarge
    assert not error.retryable
    assert not error.maybe_applied
