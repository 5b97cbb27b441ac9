"""Which replica to ask, when to ask a second one, and what an error allows. Pure: time is given.

    replicas in sync          s1: 2 under way   s2: 0   s3: 0, failed just now
    pick                      s2, then s1, then s3

What is decided about errors, and why:

* A write that did not happen (`NotPrimary`, an unreachable node, `maybe_applied` False) is sent again
  until a primary takes it or the wait is over. Nobody can have seen it.
* A write that *may* have happened is never sent again from here, also not an upsert or a delete by
  id. Those may be repeated, but not late: between the two copies another client may have read the
  point, deleted it, and been told so; the second copy would bring a deleted point back. Only the
  client knows whether somebody else changes these points, so it gets an error that says that the
  write may have happened, and sends it again if that is right for it.
* A read that fails is asked of the next replica, whatever the reason, unless the request is wrong.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from shoal.errors import (
    Busy,
    NotFound,
    NotPrimary,
    ShardStopped,
    ShoalError,
    Stale,
    TimedOut,
    Unavailable,
)
from shoal.storage_api import ShardKey

__all__ = [
    "ASK_ANOTHER",
    "HEDGE_DELAY_S_MIN",
    "HEDGE_DELAY_UNKNOWN_S",
    "Backoff",
    "Budget",
    "Latencies",
    "ShardGone",
    "Target",
    "may_send_again",
    "pick",
    "worth_waiting",
]

HEDGE_DELAY_S_MIN = 0.005  # below, the second question costs more than the wait
HEDGE_DELAY_UNKNOWN_S = 0.1  # while too few answers are known
_WINDOW = 128  # answers that count as recent
_FEW = 16  # answers below which a p95 means nothing, and how often it is taken anew
_AVOID_S_MIN, _AVOID_S_MAX = (
    0.1,
    2.0,
)  # how long a node that failed is asked last; doubled each time

# A read that met one of these is asked of another replica.
ASK_ANOTHER = (Unavailable, TimedOut, NotFound, ShardStopped, Busy)


class ShardGone(NotFound):
    """The shard has no record any more: its collection was deleted, perhaps by another coordinator
    and made anew under the same name. What the request has changed is gone with it."""

    def __init__(self, key: ShardKey) -> None:
        super().__init__(
            f"Not found: shard {key.shard} of collection {key.collection_id} does not exist: the "
            "collection was deleted"
        )
        self.collection_id = key.collection_id


class Target:
    """One node as this coordinator sees it.

    outstanding  requests of this coordinator that it has not answered.
    """

    __slots__ = ("avoid_until", "failures", "id", "outstanding")

    def __init__(self, node_id: str) -> None:
        self.id = node_id
        self.outstanding = 0
        self.failures = 0
        self.avoid_until = 0.0

    def failed(self, now: float) -> None:
        """It could not be reached, or another one was asked later and answered earlier."""
        self.avoid_until = now + min(_AVOID_S_MAX, _AVOID_S_MIN * 2**self.failures)
        self.failures = min(self.failures + 1, 10)

    def answered(self) -> None:
        if self.failures:
            self.failures = 0
            self.avoid_until = 0.0


def pick(
    targets: Sequence[Target], asked: Container[Target], turn: int, now: float
) -> Target | None:
    """The target to ask next: none that was asked; those that failed lately last; then the one with
    the fewest requests under way. `turn` rotates who is first among equals. None: all were asked."""
    best: Target | None = None
    best_load = 0.0
    count = len(targets)
    for step in range(count):
        target = targets[(turn + step) % count]
        if target in asked:
            continue
        load = float(target.outstanding)
        if target.avoid_until > now:
            load += 1e9
        if best is None or load < best_load:
            best, best_load = target, load
    return best


class Latencies:
    """The p95 of the last 128 answers, in seconds, looked at anew every 16: 0.3 µs an answer."""

    __slots__ = ("_at", "_seconds", "p95_s")

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._at = 0
        self.p95_s: float | None = None

    def add(self, seconds: float) -> None:
        if len(self._seconds) < _WINDOW:
            self._seconds.append(seconds)
        else:
            self._seconds[self._at % _WINDOW] = seconds
        self._at += 1
        if self._at % _FEW == 0:
            self.p95_s = sorted(self._seconds)[int(0.95 * len(self._seconds))]

    def hedge_delay_s(self) -> float:
        """How long to wait for an answer before another replica is asked too."""
        p95_s = self.p95_s
        if p95_s is None:
            return HEDGE_DELAY_UNKNOWN_S
        return p95_s if p95_s > HEDGE_DELAY_S_MIN else HEDGE_DELAY_S_MIN


class Budget:
    """How many extra requests may be sent: a share of the first ones and a few per second, so that
    help in need never becomes the load that keeps everybody down.

    share   of every first request; per_s: with little traffic; most: saved up at the most.
    taken   how many were sent.
    """

    __slots__ = ("_left", "_most", "_per_s", "_share", "_since", "taken")

    def __init__(self, *, share: float, per_s: float, most: float, now: float = 0.0) -> None:
        self._share, self._per_s, self._most = share, per_s, most
        self._left, self._since = most, now
        self.taken = 0

    def earn(self) -> None:
        """A first request was sent."""
        left = self._left + self._share
        self._left = left if left < self._most else self._most

    def take(self, now: float) -> bool:
        """Whether one more may be sent; counts it."""
        self._left = min(self._most, self._left + max(0.0, now - self._since) * self._per_s)
        self._since = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        self.taken += 1
        return True


class Backoff:
    """Pauses between attempts: 50 ms, doubled up to 1 s. A change of the shard's record ends one."""

    __slots__ = ("_next_s",)

    def __init__(self) -> None:
        self._next_s = 0.05

    def pause_s(self) -> float:
        pause = self._next_s
        self._next_s = min(1.0, pause * 2)
        return pause


def may_send_again(error: ShoalError, *, alone: bool) -> bool:
    """Whether a write that met `error` did not happen and another attempt may meet a primary that
    takes it. alone: no other replica is in sync that could become primary."""
    if error.maybe_applied:
        return False
    if isinstance(error, ShardStopped):
        return not alone
    return isinstance(error, Unavailable | NotFound)


def worth_waiting(error: ShoalError, *, alone: bool) -> bool:
    """Whether a read that no replica answered may be answered a little later."""
    if isinstance(error, Busy):
        return False
    if isinstance(error, ShardStopped):
        return not alone
    return isinstance(error, NotPrimary | Stale | Unavailable | NotFound | TimedOut)
