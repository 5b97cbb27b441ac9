"""Kill the server at any moment: what it acknowledged is there when it is back, and nothing else.

Writers keep a ledger (ledger.py) while the server is killed, by kill -9 from outside at random
moments or by itself at a named fault point (storage_node/faults.py), again and again on one data
directory. Every start checks everything. A failure prints the seed and the round.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from harness import Server, wait_until
from ledger import Content, Ledger
from writers import Writer, create_collection, read_all, verify

pytestmark = pytest.mark.one_machine("it kills one process at its fault points")

FAULT_POINTS = [
    "log.after_write",
    "log.after_fsync",
    "seal.before_write",
    "seal.after_segment",
    "manifest.before_rename",
    "manifest.after_rename",
    "log.after_trim",
    "merge.after_segment",
    "merge.after_install",
    "index.after_publish",
]
SEAL_BYTES = 65_536
ONE_SEGMENT_ROWS = 500  # more than SEAL_BYTES: sealed as one
FAULT_S_MAX = 90.0  # by then a server under these writers has passed every fault point
QUICK_SEED = 1
SLOW_ROUNDS = 60


class Rounds:
    """Kills and restarts on one data directory, with a check of everything after each."""

    def __init__(self, folder: Path, seed: int) -> None:
        print(f"crash test: seed {seed}")
        self.seed, self.rng = seed, random.Random(seed)
        self.server = Server(folder / "data", settings={"seal_bytes": SEAL_BYTES})
        self.writers = [Writer(number, seed) for number in range(2)]
        self.number = 0
        self.indexed: list[str] = []
        self.server.start()
        create_collection(self.server)

    def fault(self, point: str, passes: int) -> None:
        """The server kills itself at a fault point under load; maybe while it recovers already."""
        self.server.kill9()
        self.server.fault = f"{point}:{passes}"
        if self.server.start_or_die():
            if point == "index.after_publish":
                self._make_indexes(passes)
                self._await_fault()
            else:
                self._load(self._await_fault)
        assert self.server.returncode == -signal.SIGKILL, self.server.log_tail()
        self.server.fault = None
        self._restart(f"fault {point}:{passes}")

    def kill(self) -> None:
        """kill -9 after a random number of acknowledged operations, at no special moment."""
        goal = self._operations() + self.rng.randint(5, 150)

        def wait_and_kill() -> None:
            self._until(goal)
            self.server.exit_within(self.rng.random() * 0.01)
            self.server.kill9()

        self._load(wait_and_kill)
        self._restart("kill -9")

    def kill_while_starting(self) -> None:
        """kill -9 while it recovers: recovery itself can be interrupted and repeated."""
        self.server.kill9()
        for _ in range(2):
            self.server.launch()
            self.server.exit_within(self.rng.uniform(0.2, 1.5))
            self.server.kill9()
        self._restart("kill -9 during recovery")

    def close(self) -> None:
        try:
            assert self.server.stop() == 0, self.server.log_tail()
        finally:
            self.server.kill9()

    # -- parts ------------------------------------------------------------------------------------
    def _operations(self) -> int:
        return sum(writer.ledger.operations for writer in self.writers)

    def _make_indexes(self, count: int) -> None:
        """Under load an index comes with a merge. One by itself is for a segment that stays alone
        when the writes have ended: the first of a collection."""
        for number in range(count):
            name = f"indexed-{self.number}-{number}"
            create_collection(self.server, name, shards=1)
            points = [Content(1, 1).point_json(id_) for id_ in range(ONE_SEGMENT_ROWS)]
            try:
                with self.server.http() as http:
                    body = {"points": points}
                    http.put(f"/collections/{name}/points?wait=true", json=body).raise_for_status()
            except httpx.TransportError:
                return
            self.indexed.append(name)

    def _until(self, goal: int) -> None:
        """Wait until so many operations were acknowledged, or the server or a writer has failed."""
        wait_until(
            lambda: (
                self._operations() >= goal
                or not self.server.running
                or any(writer.failure for writer in self.writers)
            ),
            within_s=FAULT_S_MAX,
            what=f"{goal} acknowledged operations",
        )

    def _load(self, ending: Callable[[], None]) -> None:
        for writer in self.writers:
            writer.start(self.server)
        try:
            ending()
        finally:
            if any(writer.failure for writer in self.writers):
                self.server.kill9()
            for writer in self.writers:
                writer.stop()

    def _await_fault(self) -> None:
        status = self.server.exit_within(FAULT_S_MAX)
        if status is None:
            self.server.kill9()
            raise self.server.failed(f"the server never passed {self.server.fault}")

    def _restart(self, what: str) -> None:
        self.number += 1
        story = f"seed {self.seed}, round {self.number}, after {what}"
        self.server.kill9()
        self.server.start()
        verify(self.server, self.writers, story)
        self._verify_indexed(story)

    def _verify_indexed(self, story: str) -> None:
        expected = {id_: Content(1, 1).point_json(id_) for id_ in range(ONE_SEGMENT_ROWS)}
        with self.server.http() as http:
            while self.indexed:
                name = self.indexed.pop()
                found = {
                    id_: {key: point[key] for key in ("id", "vector", "payload")}
                    for id_, point in read_all(http, name).items()
                }
                assert found == expected, f"{story}: {name}"
                http.delete(f"/collections/{name}").raise_for_status()


@pytest.fixture
def rounds(tmp_path: Path) -> Iterator[Rounds]:
    made = Rounds(tmp_path, seed=int(os.environ.get("SHOAL_CRASH_SEED", QUICK_SEED)))
    yield made
    made.server.kill9()


def test_acknowledged_writes_survive_random_kills(rounds: Rounds) -> None:
    for _ in range(3):
        rounds.kill()
    rounds.kill_while_starting()
    rounds.close()


def test_acknowledged_writes_survive_every_fault_point(rounds: Rounds) -> None:
    for point in FAULT_POINTS:
        rounds.fault(point, passes=rounds.rng.randint(1, 2))
    rounds.close()


@pytest.mark.slow
def test_acknowledged_writes_survive_many_crashes(rounds: Rounds) -> None:
    """At least SLOW_ROUNDS crashes, of every kind, on one data directory."""
    points = itertools.cycle(FAULT_POINTS)
    for number in range(SLOW_ROUNDS):
        if number % 10 == 9:
            rounds.kill_while_starting()
        elif number % 3 == 2:
            rounds.kill()
        else:
            rounds.fault(next(points), rounds.rng.randint(1, 4))
    rounds.close()


# -- the test of the test -------------------------------------------------------------------------
def _stored(ledger: Ledger) -> dict[int, dict[str, object]]:
    return {id_: content.point_json(id_) for id_, content in ledger.acknowledged.items()}


def test_ledger_accepts_either_outcome_of_a_write_in_flight() -> None:
    ledger = Ledger()
    ledger.sent({1: Content(1, 1), 2: Content(1, 1)})
    ledger.answered()
    ledger.sent({1: Content(2, 2), 2: None, 3: Content(2, 2)})
    # one shard had it, the other not: point 1 is new, 2 is deleted, 3 never came
    assert ledger.check({1: Content(2, 2).point_json(1)}) == []
    assert ledger.acknowledged == {1: Content(2, 2)}


@pytest.mark.parametrize("damage", ["lost", "old", "returned", "mixed", "invented"])
def test_ledger_finds_what_is_wrong(damage: str) -> None:
    ledger = Ledger()
    for change in ({1: Content(1, 1), 2: Content(1, 1)}, {1: Content(2, 2), 2: None}):
        ledger.sent(change)
        ledger.answered()
    points = _stored(ledger)
    if damage == "lost":
        del points[1]
    elif damage == "old":
        points[1] = Content(1, 1).point_json(1)
    elif damage == "returned":
        points[2] = Content(1, 1).point_json(2)
    elif damage == "mixed":
        points[1] = Content(1, 2).point_json(1)
    else:
        points[7] = Content(1, 1).point_json(7)
    assert len(ledger.check(points)) == 1
