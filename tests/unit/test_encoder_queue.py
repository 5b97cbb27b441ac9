"""What a rank group decides: which texts go together, who is lost, and what is done about it."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import threading
from dataclasses import asdict
from pathlib import Path

import pytest

from encoder import link
from encoder.batching import Lane, Row, TokenQueue, halves
from encoder.link import Hub, Work
from encoder.liveness import (
    BATCH_S_MAX,
    BEAT_S,
    JOIN_S_MAX,
    SILENCE_AT_WORK_S_MAX,
    SILENCE_S_MAX,
    SILENCE_STARTING_S_MAX,
    STANDSTILL_S_MAX,
    Beat,
    Liveness,
)


def rows(request: int, *lengths: int) -> list[Row]:
    return [Row(request, place, [7] * length) for place, length in enumerate(lengths)]


def places(batch: list[Row]) -> list[tuple[int, int]]:
    return [(row.request_id, row.position) for row in batch]


def test_the_bound_is_in_tokens_and_a_request_that_is_alone_is_let_in() -> None:
    queue = TokenQueue(tokens_max=100)
    assert queue.offer(rows(1, 500), Lane.BULK)
    assert not queue.offer(rows(2, 1), Lane.BULK)
    assert (len(queue), queue.tokens) == (1, 500)
    queue.forget(1)
    assert (len(queue), queue.tokens) == (0, 0)
    assert queue.offer(rows(3, 60), Lane.BULK)
    assert queue.offer(rows(4, 40), Lane.BULK)
    assert not queue.offer(rows(5, 1), Lane.BULK)


def test_queries_go_before_an_import_and_do_not_starve_it() -> None:
    queue = TokenQueue(tokens_max=10_000)
    queue.offer(rows(1, *[10] * 8), Lane.BULK)
    queue.offer(rows(2, 5), Lane.INTERACTIVE)
    taken = []
    for query in range(3, 6):
        taken.append(places(queue.take(tokens_max=20, rows_max=99)))
        queue.offer(rows(query, 5), Lane.INTERACTIVE)
    assert taken[0] == [(2, 0)]
    assert taken[1] == [(1, 0), (1, 1)]  # its turn, though a query waits
    assert taken[2] == [(3, 0), (4, 0)]  # the queries that came meanwhile, together


def test_imports_that_fill_their_lane_leave_room_for_queries() -> None:
    queue = TokenQueue(tokens_max=100)
    assert queue.offer(rows(1, *[10] * 50), Lane.BULK)
    assert queue.offer(rows(2, 90), Lane.INTERACTIVE)
    assert not queue.offer(rows(3, 11), Lane.INTERACTIVE)
    assert places(queue.take(tokens_max=512, rows_max=99)) == [(2, 0)]
    assert (len(queue), queue.tokens) == (50, 500)


def test_what_is_forgotten_is_not_computed_and_its_room_is_free() -> None:
    queue = TokenQueue(tokens_max=100)
    queue.offer(rows(1, 10, 20, 30), Lane.BULK)
    queue.offer(rows(2, 40), Lane.BULK)
    assert places(queue.take(tokens_max=20, rows_max=1)) == [(1, 0)]
    queue.forget(1)
    queue.forget(1)
    assert (len(queue), queue.tokens) == (1, 40)
    assert queue.offer(rows(3, 60), Lane.BULK)
    assert places(queue.take(tokens_max=512, rows_max=99)) == [(2, 0), (3, 0)]
    assert queue.take(tokens_max=512, rows_max=99) == []
    assert (len(queue), queue.tokens) == (0, 0)


def test_like_lengths_go_together_and_the_oldest_text_is_never_passed_over() -> None:
    queue = TokenQueue(tokens_max=10_000)
    queue.offer(rows(1, 50, 3, 48, 4, 5, 47), Lane.BULK)
    assert places(queue.take(tokens_max=150, rows_max=99)) == [(1, 0), (1, 2), (1, 5)]
    assert places(queue.take(tokens_max=150, rows_max=99)) == [(1, 1), (1, 3), (1, 4)]
    assert queue.take(tokens_max=150, rows_max=99) == []


@pytest.mark.parametrize("seed", range(20))
def test_every_text_comes_out_once_within_the_bounds(seed: int) -> None:
    dice = random.Random(seed)
    queue = TokenQueue(tokens_max=1 << 30)
    offered, taken = set(), []
    for request in range(30):
        lengths = [dice.randint(1, 300) for _ in range(dice.randint(1, 20))]
        assert queue.offer(rows(request, *lengths), dice.choice(list(Lane)))
        offered |= {(request, place) for place in range(len(lengths))}
        if dice.random() < 0.5:
            taken.append(queue.take(tokens_max=512, rows_max=16))
    while batch := queue.take(tokens_max=512, rows_max=16):
        taken.append(batch)
    for batch in taken:
        longest = max((len(row.token_ids) for row in batch), default=0)
        assert len(batch) <= 16
        assert len(batch) * longest <= 512 or len(batch) == 1
    out = [place for batch in taken for place in places(batch)]
    assert sorted(out) == sorted(offered), f"seed {seed}"
    assert queue.tokens == 0


def test_halves_keep_every_text_and_part_short_from_long() -> None:
    short, long = halves(rows(1, 9, 2, 7, 3, 8))
    assert [len(row.token_ids) for row in short] == [2, 3]
    assert [len(row.token_ids) for row in long] == [7, 8, 9]


# -- who is lost -----------------------------------------------------------------------------------
class Watched:
    """A group of two whose beats are given by hand, and a clock that only moves when told."""

    def __init__(self) -> None:
        self.now = 100.0
        self.cpu = [0.0, 0.0]
        self.liveness = Liveness(self.now, size=2)

    def tick(self, *, beats: tuple[int, ...] = (0, 1), busy: bool = False, works: bool = True,
             ready: bool = True, step: int = 1, tokens: int = 0) -> object:  # fmt: skip
        self.now += BEAT_S
        for rank in beats:
            self.cpu[rank] += BEAT_S if works and busy else 0.0
            self.liveness.heard(Beat(rank, ready, step, busy, self.cpu[rank], tokens), self.now)
        return self.liveness.look(self.now)


def test_a_process_that_falls_silent_is_named_soon() -> None:
    group = Watched()
    assert all(group.tick() is None for _ in range(20))
    silent_from = group.now
    while (lost := group.tick(beats=(0,))) is None:
        assert group.now < silent_from + 2
    assert group.now - silent_from <= SILENCE_S_MAX + 2 * BEAT_S
    assert lost.rank == 1  # type: ignore[attr-defined]
    assert "rank 1 hangs" in lost.why  # type: ignore[attr-defined]


def test_a_batch_that_stands_still_is_found_though_everybody_beats() -> None:
    group = Watched()
    for _ in range(100):  # a long batch that computes is none of our business
        assert group.tick(busy=True) is None
    stuck_from = group.now
    while (lost := group.tick(busy=True, works=False)) is None:
        assert group.now < stuck_from + 2
    assert group.now - stuck_from <= STANDSTILL_S_MAX + 2 * BEAT_S
    assert lost.rank is None  # type: ignore[attr-defined]


def test_a_group_without_work_may_stand_still() -> None:
    group = Watched()
    assert all(group.tick(busy=False, works=False) is None for _ in range(100))


def test_nobody_is_missed_while_loading_or_while_we_were_away() -> None:
    group = Watched()
    group.tick(ready=False)
    silent_for = int((SILENCE_STARTING_S_MAX - 1) / BEAT_S)
    assert all(group.tick(beats=(0,), ready=False) is None for _ in range(silent_for))
    group.tick()
    group.now += 30  # this machine was suspended; both beats and looks stood still
    assert group.liveness.look(group.now) is None
    assert group.tick() is None


def test_a_process_that_hangs_while_it_starts_is_found_unless_it_is_at_work() -> None:
    group = Watched()
    group.tick(ready=False)
    silent_from = group.now
    for _ in range(
        int(3 * SILENCE_STARTING_S_MAX / BEAT_S)
    ):  # it imports, or reads from a slow disk
        group.now += BEAT_S
        group.liveness.heard(Beat(0, False, 0, False, 0.0), group.now)
        assert group.liveness.look(group.now, [1]) is None
    lost = group.tick(beats=(0,), ready=False)
    assert group.now - silent_from > SILENCE_STARTING_S_MAX
    assert lost.rank == 1  # type: ignore[attr-defined]


def test_a_process_that_never_comes_is_missed() -> None:
    group = Watched()
    began = group.now
    while (lost := group.tick(beats=(0,), ready=False)) is None:
        assert group.now < began + 2 * JOIN_S_MAX
    assert group.now - began >= JOIN_S_MAX
    assert "rank 1 has not come" in lost.why  # type: ignore[attr-defined]


@pytest.mark.parametrize(("tokens", "bounds"), [(1, 1), (1_024, 1), (2_048, 2), (8_000, 8)])
def test_a_batch_has_a_last_bound_whatever_the_cpu_does(tokens: int, bounds: int) -> None:
    group = Watched()
    group.tick(busy=False, step=1)
    began = group.now
    while group.tick(busy=True, step=2, tokens=tokens) is None:
        assert group.now < began + (bounds + 1) * BATCH_S_MAX
    assert group.now - began >= bounds * BATCH_S_MAX


def test_a_silent_process_that_wants_a_core_gets_more_time() -> None:
    group = Watched()
    group.tick()
    silent_from = group.now
    lost = None
    while lost is None:
        group.now += BEAT_S
        group.liveness.heard(Beat(0, True, 1, False, 0.0), group.now)
        at_work = [rank for rank in group.liveness.silent(group.now) if rank == 1]
        lost = group.liveness.look(group.now, at_work)
        assert group.now < silent_from + 2 * SILENCE_AT_WORK_S_MAX
    assert group.now - silent_from > SILENCE_AT_WORK_S_MAX
    assert lost.rank == 1


# -- what the parent does about it ------------------------------------------------------------------
def test_of_several_that_hang_none_is_waited_for(tmp_path: Path) -> None:
    """Two stopped processes: one is found, and neither hears that the group is over."""
    hub = Hub(tmp_path, size=2)
    sleepers = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    lines = []
    try:
        for rank, sleeper in enumerate(sleepers):
            line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            line.connect(str(hub.path))
            lines.append(line)
            hello = {"rank": rank, "pid": sleeper.pid, "attempt": 0}
            for message in (hello, asdict(Beat(rank, True, 1, False, 0.0))):
                line.sendall(json.dumps(message).encode() + b"\n")
        assert [sleeper.wait(10) for sleeper in sleepers] == [-signal.SIGKILL] * 2
    finally:
        hub.close()
        for sleeper in sleepers:
            sleeper.kill()
            sleeper.wait()
        for line in lines:
            line.close()


# -- what a process says of itself -----------------------------------------------------------------
def test_a_loop_that_stands_still_makes_its_process_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work()
    monkeypatch.setattr(link, "STALL_S_MAX", -1.0)
    assert not work.stalled  # it does not tick yet, or never does: a rank that only follows
    work.tick()
    assert work.stalled
    monkeypatch.setattr(link, "STALL_S_MAX", 60.0)
    assert not work.stalled


def test_a_beat_outlives_the_thread_that_computes() -> None:
    work = Work()
    thread = threading.Thread(target=work.begin, args=(8,))
    thread.start()
    thread.join()
    before = work.beat(0)
    assert (before.step, before.busy) == (1, True)
    assert work.beat(0) == before
