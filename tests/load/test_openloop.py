"""The arithmetic of the load tests: arrivals, percentiles, and what a stall must look like."""

from __future__ import annotations

import numpy as np
import pytest
from openloop import LAG_MS_MAX, Outcomes, markdown, poisson, summary

SEED = 9


def test_arrivals_are_a_poisson_process() -> None:
    moments = poisson(2_000.0, 10.0, np.random.default_rng(SEED))
    assert np.all(np.diff(moments) >= 0)
    assert moments[0] >= 0
    assert moments[-1] < 10
    assert abs(len(moments) - 20_000) < 5 * np.sqrt(20_000)
    gaps = np.diff(moments)
    assert abs(gaps.mean() * 2_000 - 1) < 0.05
    assert abs(gaps.std() / gaps.mean() - 1) < 0.05  # exponential; a metronome would have 0


def test_arrivals_are_drawn_beforehand_and_again_the_same() -> None:
    once, again = (poisson(50.0, 3.0, np.random.default_rng(SEED)) for _ in range(2))
    assert np.array_equal(once, again)


@pytest.mark.parametrize("rate", [0.5, 3.0])
def test_few_arrivals_are_drawn_to_the_end(rate: float) -> None:
    counts = [len(poisson(rate, 20.0, np.random.default_rng(seed))) for seed in range(200)]
    assert abs(np.mean(counts) - rate * 20) < rate * 2


def answered(scheduled: np.ndarray, latency_s: np.ndarray | float) -> Outcomes:
    outcomes = Outcomes(scheduled)
    outcomes.begun[:] = scheduled
    outcomes.done[:] = scheduled + latency_s
    return outcomes


def test_percentiles_are_latencies_that_occurred() -> None:
    latency = np.random.default_rng(SEED).permutation(np.arange(1, 1_001)) / 1_000
    row = summary("x", 100, answered(np.arange(1_000) / 100, latency))
    assert row.percentiles == pytest.approx((501, 901, 991, 1_000))
    assert row.longest == pytest.approx(1_000)
    assert row.answered == 1_000
    assert not row.errors
    assert not row.behind


def test_a_stall_shows_in_every_arrival_of_it() -> None:
    """A server that answers at once but for one second in ten. Asked in a closed loop it would show
    one slow request; here a tenth of all arrivals waited, half a second on average."""
    scheduled = np.arange(10_000) / 1_000
    done = np.where((scheduled >= 5) & (scheduled < 6), 6.0, scheduled)
    row = summary("x", 1_000, answered(scheduled, done - scheduled))
    assert row.percentiles[0] == 0
    assert row.percentiles[2] == pytest.approx(900, abs=2)
    assert row.longest == pytest.approx(1_000)


def test_what_got_no_good_answer_is_infinitely_late() -> None:
    outcomes = answered(np.arange(1_000) / 100, 0.001)
    outcomes.done[:30] = np.nan
    outcomes.errors["429"] = 20
    row = summary("x", 100, outcomes)
    assert row.percentiles[:2] == pytest.approx((1, 1))
    assert np.isinf(row.percentiles[2:]).all()
    assert row.longest == pytest.approx(1)
    assert row.errors == {"429": 20, "not answered in time": 10}
    assert row.answered == 970
    line = markdown([row]).splitlines()[-1]
    assert "∞" in line
    assert "20 of 1000 429, 10 of 1000 not answered in time" in line


def test_a_generator_that_falls_behind_is_marked_and_its_lag_counts() -> None:
    scheduled = np.arange(100) / 100
    outcomes = answered(scheduled, 0.5)
    outcomes.begun[90:] += LAG_MS_MAX * 2 / 1_000
    row = summary("x", 100, outcomes)
    assert row.behind
    assert row.percentiles[0] == pytest.approx(500)  # from the schedule, not from the sending
    assert "10 *" in markdown([row])
    outcomes.begun[0] = np.nan  # one that was never begun is a generator that fell behind, too
    assert summary("x", 100, outcomes).behind


def test_nothing_answered_is_a_row_too() -> None:
    row = summary("x", 10, Outcomes(np.arange(20) / 10))
    assert row.per_s == 0
    assert row.errors == {"not answered in time": 20}
    assert "∞" in markdown([row])


def test_a_run_without_arrivals_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing arrived"):
        summary("x", 1, Outcomes(np.empty(0)))
