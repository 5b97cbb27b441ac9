"""Which process of a rank group is dead or hangs. Pure: told what was heard and when, asked who is lost.

    every process ──a beat each 0.1 s: what its computing thread does──▶ the group's parent
    silence          the process is stopped; if it runs, or waits for a core, it gets more time: Python
                     says nothing while it collects garbage or a library holds its lock
    no progress      a batch is under way and no computing thread of the group used the CPU meanwhile:
                     one of them waits for something that will not come, the others for that one

A batch may be long on a busy machine, so time alone proves nothing; CPU time that stands still does.
Before a process is ready it imports and loads, and may say nothing for seconds while it does: then it
counts as lost when it is silent for longer and neither runs nor waits for a core or a disk.
"""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass

__all__ = ["BEAT_S", "Beat", "Liveness", "Lost"]

BEAT_S = 0.1
SILENCE_S_MAX = 0.6  # six beats; with the way to the callers this keeps errors within a second
SILENCE_AT_WORK_S_MAX = 5.0  # of a process that runs, or waits for a core or a disk
SILENCE_STARTING_S_MAX = 20.0  # of one that is not ready, and does none of these
JOIN_S_MAX = 60.0  # from the first word of the first process to that of the last
STANDSTILL_S_MAX = 0.6
PROGRESS_S_MIN = 0.001  # CPU seconds that count as progress; a thread that waits uses less
BATCH_S_MAX = 60.0  # of each 1,024 tokens begun, whatever the CPU does
BATCH_TOKENS = 1_024
_LATE_S = 3 * BEAT_S  # a look that comes later than this judges nobody: we were not there ourselves


@dataclass(frozen=True, slots=True)
class Beat:
    """ready: it is loaded and serves. step: batches begun so far. busy: one is under way, of so many
    tokens, padding included. cpu_s: of the computing thread, since its start."""

    rank: int
    ready: bool
    step: int
    busy: bool
    cpu_s: float
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Lost:
    """rank: who, or None when it cannot be told."""

    rank: int | None
    why: str


@dataclass(slots=True)
class _Heard:
    beat: Beat
    at_s: float


class Liveness:
    """What is known of the processes of one attempt of a group. Times are seconds of one clock that
    does not jump."""

    def __init__(self, now_s: float, *, size: int) -> None:
        self._size, self._began_s = size, now_s
        self._heard: dict[int, _Heard] = {}
        self._looked_s = now_s
        self._moved_s = now_s  # when some computing thread was last seen to move
        self._step_began_s: float | None = None

    def heard(self, beat: Beat, now_s: float) -> None:
        before = self._heard.get(beat.rank)
        if (
            before is None
            or beat.step != before.beat.step
            or beat.busy != before.beat.busy
            or beat.cpu_s - before.beat.cpu_s >= PROGRESS_S_MIN
        ):
            self._moved_s = now_s
        self._heard[beat.rank] = _Heard(beat, now_s)
        busy = any(h.beat.busy for h in self._heard.values())
        if not busy or before is None or beat.step != before.beat.step:
            self._step_began_s = now_s if busy else None

    def silent(self, now_s: float) -> list[int]:
        """Ranks that have missed some beats."""
        return [rank for rank, heard in sorted(self._heard.items()) if now_s - heard.at_s > _LATE_S]

    def look(self, now_s: float, at_work: Container[int] = ()) -> Lost | None:
        """To be asked about every BEAT_S. at_work: of the silent ranks, those that run at this moment
        or wait for a core or a disk."""
        late = now_s - self._looked_s > _LATE_S
        self._looked_s = now_s
        if late:
            for heard in self._heard.values():
                heard.at_s = now_s
            self._moved_s = self._began_s = now_s
            return None
        for rank, heard in sorted(self._heard.items()):
            if now_s - heard.at_s > _silence_s_max(heard.beat.ready, rank in at_work):
                return Lost(rank, f"rank {rank} hangs: not a word for {now_s - heard.at_s:.1f} s")
        if len(self._heard) < self._size and now_s - self._began_s > JOIN_S_MAX:
            missing = min(set(range(self._size)) - self._heard.keys())
            return Lost(missing, f"rank {missing} has not come within {JOIN_S_MAX:g} s")
        if not all(heard.beat.ready for heard in self._heard.values()):
            return None
        if not any(heard.beat.busy for heard in self._heard.values()):
            return None
        if now_s - self._moved_s > STANDSTILL_S_MAX:
            return Lost(None, f"a batch has stood still for {now_s - self._moved_s:.1f} s")
        tokens = max(heard.beat.tokens for heard in self._heard.values())
        bound_s = BATCH_S_MAX * max(1, math.ceil(tokens / BATCH_TOKENS))
        if self._step_began_s is not None and now_s - self._step_began_s > bound_s:
            return Lost(None, f"a batch has not ended within {bound_s:g} s")
        return None


def _silence_s_max(ready: bool, at_work: bool) -> float:
    if ready:
        return SILENCE_AT_WORK_S_MAX if at_work else SILENCE_S_MAX
    return float("inf") if at_work else SILENCE_STARTING_S_MAX
