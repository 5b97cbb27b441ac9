"""When a client sends a request again, and what it remembers: pure decisions."""

from __future__ import annotations

import random

import pytest

from shoal.client.core import parse_addresses
from shoal.client.retry import Retries, RetryPolicy
from shoal.client.seen import Seen
from shoal.errors import (
    BadRequest,
    Busy,
    NotFound,
    ShardStopped,
    ShoalError,
    StorageFull,
    TimedOut,
    Unavailable,
)


def retries(**policy: float) -> Retries:
    return Retries(RetryPolicy(**policy), random.Random(7))  # type: ignore[arg-type]


def with_doubt(error: ShoalError) -> ShoalError:
    error.maybe_applied = True
    return error


@pytest.mark.parametrize("idempotent", [False, True])
def test_reads_go_on_after_what_passes(idempotent):
    for error in (Unavailable("x"), Busy("x"), TimedOut("x"), with_doubt(Unavailable("x"))):
        assert retries().pause_s(error, 1, writes=False, idempotent=idempotent) is not None


@pytest.mark.parametrize("writes", [False, True])
def test_what_does_not_pass_is_given_to_the_caller(writes):
    for error in (BadRequest("x"), NotFound("x"), ShardStopped("x"), StorageFull("x")):
        assert retries().pause_s(error, 1, writes=writes, idempotent=True) is None


def test_a_write_that_may_have_happened_is_repeated_only_if_that_is_harmless():
    for error in (with_doubt(Unavailable("x")), TimedOut("x")):
        assert retries().pause_s(error, 1, writes=True, idempotent=False) is None
        assert retries().pause_s(error, 1, writes=True, idempotent=True) is not None


def test_a_write_that_did_not_happen_is_repeated():
    for error in (Unavailable("x"), Busy("x")):
        assert retries().pause_s(error, 1, writes=True, idempotent=False) is not None


def test_attempts_end():
    decide = retries(attempts_max=3)
    pauses = [
        decide.pause_s(Unavailable("x"), n, writes=False, idempotent=False) for n in (1, 2, 3)
    ]
    assert [pause is None for pause in pauses] == [False, False, True]


def test_pauses_grow_to_a_bound_and_differ():
    decide = retries(attempts_max=100, pause_s=0.1, pause_s_max=1.0, budget=1000)
    pauses = []
    for attempt in range(1, 20):
        pause = decide.pause_s(Unavailable("x"), attempt, writes=False, idempotent=False)
        assert pause is not None
        longest = min(1.0, 0.1 * 2 ** (attempt - 1))
        assert longest / 2 <= pause <= longest
        pauses.append(pause)
    assert len(set(pauses)) == len(pauses)


def test_a_server_that_says_when_is_believed_up_to_a_bound():
    decide = retries(pause_s_max=5.0)
    for said, least, most in ((0.2, 0.2, 0.25), (3_600.0, 5.0, 6.25)):
        pause = decide.pause_s(Busy("x", retry_after_s=said), 1, writes=True, idempotent=False)
        assert pause is not None
        assert least <= pause <= most


def test_the_budget_bounds_what_a_failing_server_is_asked_for():
    decide = retries(budget=10.0, budget_per_call=0.1)
    sent = retried = 0
    for _ in range(1_000):
        decide.earn()
        sent += 1
        for attempt in range(1, 6):
            if decide.pause_s(Unavailable("x"), attempt, writes=False, idempotent=False) is None:
                break
            retried += 1
    assert retried <= 10 + sent * 0.1
    assert retried >= sent * 0.1 - 1


# -- tokens ---------------------------------------------------------------------------------------
def test_the_highest_number_of_each_shard_is_remembered():
    seen = Seen()
    assert seen.token("c") == ""
    seen.remember("c", "7.0:12")
    seen.remember("c", "7.1:5,7.0:9")
    seen.remember("d", "8.0:1")
    assert seen.token("c") == "7.0:12,7.1:5"
    seen.remember("c", "7.1:6")
    assert seen.token("c") == "7.0:12,7.1:6"
    assert seen.token("d") == "8.0:1"


def test_a_collection_that_was_made_again_is_another_one():
    seen = Seen()
    seen.remember("c", "7.0:12")
    seen.remember("c", "9.0:1")
    assert seen.token("c") == "9.0:1"
    seen.remember("c", "7.0:13")  # the answer to a write that was late
    assert seen.token("c") == "9.0:1"
    seen.forget("c")
    assert seen.token("c") == ""


@pytest.mark.parametrize("token", ["x", "7:1", "7.0:", "7.0", "a.0:1", "7.0:1;7.1:2"])
def test_what_is_no_token(token):
    with pytest.raises(ValueError, match="no token"):
        Seen().remember("c", token)


# -- addresses ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("localhost", ["localhost:6334"]),
        ("localhost:7000", ["localhost:7000"]),
        ("a:1, b", ["a:1", "b:6334"]),
        (["a:1", "b:2"], ["a:1", "b:2"]),
        ("[::1]", ["[::1]:6334"]),
        ("[::1]:7000", ["[::1]:7000"]),
    ],
)
def test_addresses(given, expected):
    assert parse_addresses(given) == expected


@pytest.mark.parametrize("given", ["", [], "http://localhost:6333", ":6334"])
def test_what_is_no_address(given):
    with pytest.raises(BadRequest):
        parse_addresses(given)
