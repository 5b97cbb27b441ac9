"""Open-loop load as numbers: when requests arrive, and what their latencies say. Pure.

    rate, seconds, dice ──▶ moments of arrival, drawn before anything is sent
    moments, what came of each ──▶ percentiles, errors, how late the generator was ──▶ one row

Arrivals do not wait for answers, as the users of a server do not wait for each other, and a latency
begins at the moment of arrival, not when the generator got round to sending. A server that stalls for
a second therefore shows it in every request of that second; a loop that waits for each answer before
it asks again would show one slow request ("coordinated omission").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "LAG_MS_MAX",
    "PERCENTILES",
    "Outcomes",
    "Row",
    "markdown",
    "poisson",
    "summary",
]

PERCENTILES = (50.0, 90.0, 99.0, 99.9)
LAG_MS_MAX = (
    5.0  # p99 of the generator's own lag; beyond, the run says more about it than the server
)
_UNANSWERED = "not answered in time"


def poisson(rate_per_s: float, seconds: float, dice: np.random.Generator) -> NDArray[np.float64]:
    """Moments of arrival in [0, seconds), ascending: independent of each other, `rate_per_s` on
    average."""
    moments: list[NDArray[np.float64]] = []
    end = 0.0
    while end < seconds:
        count = max(16, int(rate_per_s * (seconds - end) * 1.2))
        moments.append(end + np.cumsum(dice.exponential(1.0 / rate_per_s, count)))
        end = float(moments[-1][-1])
    drawn = np.concatenate(moments)
    return drawn[drawn < seconds]


@dataclass
class Outcomes:
    """What came of n arrivals, in seconds since the run began.

    scheduled  (n,) when each arrived
    begun      (n,) when the generator turned to it; NaN: never
    done       (n,) when its answer was there; NaN: it failed, or has no answer
    errors     what clients were told -> how often
    """

    scheduled: NDArray[np.float64]
    begun: NDArray[np.float64] = field(init=False)
    done: NDArray[np.float64] = field(init=False)
    errors: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.begun = np.full(len(self.scheduled), np.nan)
        self.done = np.full(len(self.scheduled), np.nan)

    @property
    def settled(self) -> int:
        """Arrivals that were answered, well or badly."""
        return int(np.count_nonzero(~np.isnan(self.done))) + self.errors.total()


@dataclass(frozen=True)
class Row:
    """One rate of one way in.

    percentiles  milliseconds for PERCENTILES, over all arrivals; one that got no good answer counts
                 as infinitely late
    longest      of the good answers, milliseconds; NaN when there is none
    per_s        good answers a second, from the first arrival to the last answer
    lag_ms_p99   how late the generator turned to an arrival
    """

    name: str
    offered_per_s: float
    arrivals: int
    answered: int
    per_s: float
    percentiles: tuple[float, ...]
    longest: float
    lag_ms_p99: float
    errors: dict[str, int]

    @property
    def behind(self) -> bool:
        """The generator did not keep its schedule: the latencies are an upper bound."""
        return not self.lag_ms_p99 <= LAG_MS_MAX


def summary(name: str, offered_per_s: float, outcomes: Outcomes) -> Row:
    """Raises ValueError without arrivals."""
    count = len(outcomes.scheduled)
    if count == 0:
        raise ValueError(f"{name}: nothing arrived; the run is too short for its rate")
    good = ~np.isnan(outcomes.done)
    late = np.where(good, outcomes.done - outcomes.scheduled, np.inf) * 1_000
    begun = ~np.isnan(outcomes.begun)
    lag = np.where(begun, outcomes.begun - outcomes.scheduled, np.inf) * 1_000
    answered = int(np.count_nonzero(good))
    errors = dict(sorted(outcomes.errors.items()))
    if unanswered := count - outcomes.settled:
        errors[_UNANSWERED] = unanswered
    took = float(np.max(outcomes.done[good]) - outcomes.scheduled[0]) if answered else 0.0
    return Row(
        name,
        offered_per_s,
        count,
        answered,
        answered / took if took > 0 else 0.0,
        # "higher": a latency that occurred, and none made up between a number and infinity
        tuple(float(np.percentile(late, p, method="higher")) for p in PERCENTILES),
        float(np.max(late[good])) if answered else float("nan"),
        float(np.percentile(lag, 99, method="higher")),
        errors,
    )


def markdown(rows: Sequence[Row]) -> str:
    """A table; ∞ is a percentile of arrivals without a good answer, * a generator that fell behind."""
    heads = ["", "offered/s", "answered/s", *(f"p{p:g} ms" for p in PERCENTILES), "max ms"]
    heads += ["generator's lag p99 ms", "errors"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 2) + "---|"]
    for row in rows:
        told = ", ".join(f"{count} of {row.arrivals} {what}" for what, count in row.errors.items())
        cells = [
            row.name,
            f"{row.offered_per_s:,g}",
            f"{row.per_s:,.0f}",
            *map(_ms, row.percentiles),
            _ms(row.longest),
            _ms(row.lag_ms_p99) + (" *" if row.behind else ""),
            told or "0",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _ms(value: float) -> str:
    if np.isnan(value):
        return ""
    if np.isinf(value):
        return "∞"
    return f"{value:,.2f}" if value < 10 else f"{value:,.0f}"
