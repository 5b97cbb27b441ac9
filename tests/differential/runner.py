"""One differential run: the same random calls to a server and to the oracle, compared all along.

What happens is planned first (`plan`, pure) and then carried out (`Execution`), so a failing plan
can be cut down to the few events that matter (`shrink`).
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from compare import Recall, differ, perform, same_contents
from moves import any_read, any_write, bulk_upsert
from qdrant_client import QdrantClient
from world import SHAPES, Call, World

__all__ = [
    "RECALL_MIN",
    "Call",
    "Difference",
    "Event",
    "Execution",
    "Restart",
    "Run",
    "Target",
    "plan",
    "shrink",
]

CHECK_EVERY = 12  # steps between comparisons of the whole contents
RECALL_MIN = 0.95
T = TypeVar("T")


class Target(Protocol):
    """The side under test."""

    client: QdrantClient

    def restart(self, *, kill: bool) -> None:
        """Go away and come back with everything that was acknowledged."""
        ...


class Difference(AssertionError):
    """The two sides do not agree; `step` says since when."""

    def __init__(self, step: int, story: str) -> None:
        super().__init__(story)
        self.step = step


@dataclass(frozen=True)
class Restart:
    kill: bool

    def __str__(self) -> str:
        return "restart by kill -9" if self.kill else "restart by SIGTERM"


@dataclass(frozen=True)
class Run:
    """Names a plan. restarts: how many, at random steps, half of them by kill -9."""

    shape: str
    seed: int
    steps: int
    restarts: int = 0

    @classmethod
    def parse(cls, text: str) -> Run:
        shape, *numbers = text.split(":")
        return cls(shape, *map(int, numbers))

    def __str__(self) -> str:
        return f"{self.shape}:{self.seed}:{self.steps}:{self.restarts}"


Event = Call | Restart


def plan(run: Run) -> list[Event]:
    rng = random.Random(f"{run.shape}/{run.seed}")
    world = World(rng, SHAPES[run.shape])
    events: list[Event] = []
    for step in range(run.steps):
        if step % 6 == 0 and rng.random() < 0.4:
            events.append(bulk_upsert(world))
        else:
            events.append(any_write(world) if rng.random() < 0.5 else any_read(world))
    for number in range(run.restarts):
        events.insert(rng.randrange(run.steps), Restart(kill=number % 2 == 1))
    return events


def plan_reads(run: Run, count: int = 40) -> list[Call]:
    """Reads only, to be asked again and again of the same contents."""
    world = World(random.Random(f"reads/{run.shape}/{run.seed}"), SHAPES[run.shape])
    return [any_read(world) for _ in range(count)]


@dataclass
class Execution:
    """Carries events out on both sides and raises Difference at the first one."""

    shape: str
    target: Target
    oracle: QdrantClient
    name: str
    recall: Recall = field(default_factory=Recall)

    def go(self, events: Sequence[Event]) -> None:
        arguments = SHAPES[self.shape].create_arguments()
        for side in (self.target.client, self.oracle):
            side.create_collection(self.name, **arguments)
        for step, event in enumerate(events):
            if isinstance(event, Restart):
                self.target.restart(kill=event.kill)
                self._check_contents(step, event)
            else:
                self._step(step, event)
                if step % CHECK_EVERY == CHECK_EVERY - 1:
                    self._check_contents(step, event)
        self.check_contents(len(events))

    def reads(self, calls: Sequence[Call]) -> None:
        for step, call in enumerate(calls):
            self._step(step, call)

    def check_contents(self, step: int) -> None:
        self._check_contents(step, "everything so far")

    def _step(self, step: int, call: Call) -> None:
        try:
            ours = _quietly(lambda: perform(self.target.client, self.name, call))
        except Exception as error:
            raise Difference(step, f"step {step}: {call}\nours failed: {error}") from error
        theirs = _quietly(lambda: perform(self.oracle, self.name, call))
        recall = self.recall if self._may_be_approximate(call) else None
        problem = _quietly(lambda: differ(ours, theirs, call, self.oracle, self.name, recall))
        if problem:
            raise Difference(step, f"step {step}: {call}\n{problem}")
        if call.writes and ours.refused is not None:  # refused: nothing may have changed
            self._check_contents(step, call)

    def _may_be_approximate(self, call: Call) -> bool:
        if not SHAPES[self.shape].indexed or call.method != "query_points":
            return False
        params = call.arguments.get("search_params")
        return params is None or not params.exact

    def _check_contents(self, step: int, after: object) -> None:
        if problem := same_contents(self.target.client, self.oracle, self.name):
            raise Difference(step, f"contents differ at step {step}, after {after}\n{problem}")


def shrink(events: Sequence[Event], fails: Callable[[Sequence[Event]], bool]) -> list[Event]:
    """The events without those that the failure does not need (ddmin's complements, greedy)."""
    kept, chunk = list(events), max(1, len(events) // 2)
    while True:
        start = 0
        while start < len(kept):
            without = kept[:start] + kept[start + chunk :]
            if without and fails(without):
                kept = without
            else:
                start += chunk
        if chunk == 1:
            return kept
        chunk = max(1, chunk // 2)


def _quietly(call: Callable[[], T]) -> T:
    """The oracle warns that it has no indexes and searches exactly; that is what it is for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return call()
