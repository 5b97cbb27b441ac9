"""Whether to send a request again, and when. Pure: time and dice are given.

Three rules, in this order:

1. **A write that may have happened is not sent again** unless the caller says that doing it twice is
   the same as doing it once (`idempotent=True`). An upsert by id looks as if it always were; it is
   not when somebody else writes the same id in between: the repetition would undo that.
2. **Only what may succeed without change**: the server is busy, unreachable, or did not answer a read
   in time. What it refuses, and a full disk, go to the caller at once.
3. **Within a budget**: every call earns a fraction of a retry, every retry costs one. When everything
   fails, clients so add a tenth to the load and not a multiple of it.

Pauses grow from `pause_s` to `pause_s_max`, each drawn from the upper half of its length, so that
clients that failed together do not come back together. A server that says when to come back is
believed, up to `pause_s_max`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from shoal.errors import Busy, ShoalError, StorageFull

__all__ = ["Retries", "RetryPolicy"]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """attempts_max     of one call, the first included; 1 switches retries off.
    budget              retries that a client may be ahead of what it has earned.
    budget_per_call     what each call earns.
    """

    attempts_max: int = 6
    pause_s: float = 0.1
    pause_s_max: float = 5.0
    budget: float = 20.0
    budget_per_call: float = 0.1


class Retries:
    """The decisions of one client."""

    def __init__(self, policy: RetryPolicy, dice: random.Random) -> None:
        self._policy, self._dice = policy, dice
        self._left = policy.budget

    def earn(self) -> None:
        """A call begins."""
        self._left = min(self._policy.budget, self._left + self._policy.budget_per_call)

    def pause_s(
        self, error: ShoalError, attempt: int, *, writes: bool, idempotent: bool
    ) -> float | None:
        """Seconds until the next attempt; None: give the error to the caller.

        attempt: how many have failed, this one included.
        """
        if attempt >= self._policy.attempts_max or not error.retryable:
            return None
        if isinstance(error, StorageFull):
            return None  # nobody frees a disk within seconds
        if writes and error.maybe_applied and not idempotent:
            return None
        if self._left < 1.0:
            return None
        self._left -= 1.0
        if isinstance(error, Busy):
            return min(error.retry_after_s, self._policy.pause_s_max) * self._dice.uniform(
                1.0, 1.25
            )
        longest = min(self._policy.pause_s * 2.0 ** (attempt - 1), self._policy.pause_s_max)
        return longest * self._dice.uniform(0.5, 1.0)
