"""Who waits, who is next, and which texts go together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from encoder.batching import Lane, Slice, WaitingTexts, plan_batches
from shoal.errors import InvariantError
from shoal.limits import ENCODER_QUERY_TEXTS_MAX

MANY = ENCODER_QUERY_TEXTS_MAX + 1


def waiting(texts_max: int = 1_000, bytes_max: int = 1_000_000) -> WaitingTexts:
    return WaitingTexts(texts_max=texts_max, bytes_max=bytes_max)


@given(
    st.lists(st.integers(1, 256), max_size=200),
    st.integers(1, 2_048),
    st.integers(1, 64),
)
def test_every_text_is_in_one_batch_and_every_batch_within_bounds(
    lengths: list[int], tokens_max: int, rows_max: int
) -> None:
    batches = plan_batches(lengths, tokens_max=tokens_max, rows_max=rows_max)
    assert sorted(position for batch in batches for position in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[position] for position in batch)
        assert 1 <= len(batch) <= rows_max
        assert len(batch) == 1 or len(batch) * longest <= tokens_max


def test_texts_of_like_length_go_together() -> None:
    assert plan_batches([100, 5, 100, 5, 5], tokens_max=200, rows_max=8) == [[1, 3, 4], [0, 2]]


def test_no_texts_make_no_batches() -> None:
    assert plan_batches([], tokens_max=10, rows_max=10) == []


def test_few_texts_are_interactive_and_many_are_bulk() -> None:
    assert Lane.of(1) is Lane.INTERACTIVE
    assert Lane.of(ENCODER_QUERY_TEXTS_MAX) is Lane.INTERACTIVE
    assert Lane.of(MANY) is Lane.BULK


def test_interactive_requests_that_wait_are_taken_together() -> None:
    queue = waiting()
    assert queue.offer(1, "m", 1, 10)
    assert queue.offer(2, "m", 500, 5_000)
    assert queue.offer(3, "m", 2, 20)
    assert queue.take(Lane.INTERACTIVE, 64) == ("m", [Slice(1, 0, 1), Slice(3, 0, 2)])
    assert queue.take(Lane.INTERACTIVE, 64) is None
    assert queue.text_count == 500


def test_a_bulk_request_is_given_out_in_windows_and_the_next_one_follows_on() -> None:
    queue = waiting()
    queue.offer(1, "m", 20, 200)
    queue.offer(2, "m", 10, 100)
    assert queue.take(Lane.BULK, 16) == ("m", [Slice(1, 0, 16)])
    assert queue.take(Lane.BULK, 16) == ("m", [Slice(1, 16, 20), Slice(2, 0, 10)])
    assert queue.take(Lane.BULK, 16) is None
    assert (queue.text_count, queue.byte_count, len(queue)) == (0, 0, 0)


def test_texts_for_two_models_are_never_in_one_window() -> None:
    queue = waiting()
    for request_id, model in enumerate(["a", "a", "b", "a", "b"]):
        queue.offer(request_id, model, 1, 1)
    of_a = [Slice(0, 0, 1), Slice(1, 0, 1), Slice(3, 0, 1)]
    assert queue.take(Lane.INTERACTIVE, 64) == ("a", of_a)  # in turns they would be one by one
    assert queue.take(Lane.INTERACTIVE, 64) == ("b", [Slice(2, 0, 1), Slice(4, 0, 1)])
    assert (len(queue), queue.text_count, queue.byte_count) == (0, 0, 0)


def test_the_oldest_text_says_which_model_is_next() -> None:
    queue = waiting()
    for request_id, model in enumerate(["a", "b", "a", "a"]):
        queue.offer(request_id, model, MANY, 1)
    assert queue.take(Lane.BULK, MANY + 1) == ("a", [Slice(0, 0, MANY), Slice(2, 0, 1)])
    assert queue.take(Lane.BULK, MANY + 1) == ("b", [Slice(1, 0, MANY)])
    assert queue.take(Lane.BULK, MANY) == ("a", [Slice(2, 1, MANY), Slice(3, 0, 1)])


def test_texts_for_a_model_that_is_not_ready_wait_and_hold_up_nobody() -> None:
    queue = waiting()
    queue.offer(1, "a", 1, 1)
    queue.offer(2, "b", 1, 1)
    assert not queue.any_for({"c"})
    assert queue.take(Lane.INTERACTIVE, 64, {"b"}) == ("b", [Slice(2, 0, 1)])
    assert queue.take(Lane.INTERACTIVE, 64, {"b"}) is None
    assert queue.of("a") == [1]
    assert queue.any_for({"a"})


def test_a_full_queue_refuses_by_texts_and_by_bytes() -> None:
    by_texts = waiting(texts_max=100)
    assert by_texts.offer(1, "m", 90, 1)
    assert not by_texts.offer(2, "m", 11, 1)
    assert by_texts.offer(3, "m", 10, 1)
    by_bytes = waiting(bytes_max=100)
    assert by_bytes.offer(1, "m", 1, 90)
    assert not by_bytes.offer(2, "m", 1, 11)


def test_a_request_that_is_alone_fits_whatever_its_size() -> None:
    queue = waiting(texts_max=10, bytes_max=10)
    assert queue.offer(1, "m", 4_096, 1_000)
    assert not queue.offer(2, "m", MANY, 1)


def test_imports_that_fill_their_lane_leave_room_for_queries() -> None:
    queue = waiting(texts_max=20)
    assert queue.offer(1, "m", 4_096, 1)
    assert all(queue.offer(number, "m", 1, 1) for number in range(2, 22))
    assert not queue.offer(22, "m", 1, 1)
    assert queue.text_count == 4_096 + 20


def test_room_comes_back_when_texts_are_taken() -> None:
    queue = waiting(texts_max=20)
    queue.offer(1, "m", 20, 20)
    queue.take(Lane.BULK, 15)
    assert queue.offer(2, "m", 15, 15)
    assert not queue.offer(3, "m", MANY, 1)


def test_a_forgotten_request_leaves_nothing_behind() -> None:
    queue = waiting()
    queue.offer(1, "m", 20, 200)
    queue.offer(2, "m", 30, 300)
    queue.take(Lane.BULK, 5)
    queue.forget(1)
    queue.forget(1)  # a second time, or one that was taken in full, is nothing
    assert (queue.text_count, queue.byte_count) == (30, 300)
    assert queue.take(Lane.BULK, 64) == ("m", [Slice(2, 0, 30)])


def test_drain_names_every_request_that_waited() -> None:
    queue = waiting()
    queue.offer(1, "m", 1, 1)
    queue.offer(2, "m", MANY, 1)
    assert sorted(queue.drain()) == [1, 2]
    assert (len(queue), queue.text_count, queue.byte_count) == (0, 0, 0)


def test_a_request_without_texts_is_a_bug_of_the_caller() -> None:
    with pytest.raises(InvariantError):
        waiting().offer(1, "m", 0, 0)
