"""What keeping a lease alive has in common, whatever the store: the clock and the news of its end.

Time is counted by CLOCK_BOOTTIME, which also runs while the machine is suspended: a lease ends in
etcd whether or not our machine was asleep. It counts from when a keep-alive was *sent*.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

__all__ = ["Keeper", "boottime_s"]

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # macOS: monotonic counts sleep


def boottime_s() -> float:
    """Seconds since the machine started, time asleep included."""
    return time.clock_gettime(_CLOCK)


class Keeper:
    """Implements `LeaseKeeper`; a store tells it what happens. Made in the event loop; `renewed` may
    be called from any thread, the rest from the loop.

    on_close    called once by `close`.
    """

    def __init__(self, lease: int, on_close: Callable[[], None]) -> None:
        self.lease = lease
        self._on_close: Callable[[], None] | None = on_close
        self._sent_s = boottime_s()
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def silent_for_s(self) -> float:
        return boottime_s() - self._sent_s

    async def lost(self) -> None:
        await asyncio.shield(self._end)

    async def close(self) -> None:
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close()

    @property
    def closed(self) -> bool:
        return self._on_close is None

    def renewed(self, sent_s: float) -> None:
        """The store answered a keep-alive that was sent at `sent_s`, by `boottime_s`."""
        self._sent_s = sent_s

    def ended(self, error: Exception | None = None) -> None:
        """The lease is gone, or cannot be kept because of `error`."""
        if self._end.done():
            return
        if error is None:
            self._end.set_result(None)
        else:
            self._end.set_exception(error)
            self._end.exception()  # seen: nobody need be waiting for it
