"""What replication asks of a log: terms, cuts, reading the tail, keeping it; against a plain list."""

from __future__ import annotations

import errno
import os
import random
import threading
from pathlib import Path

import pytest

from shoal.errors import InvariantError, ShardStopped, StorageFull
from storage_node import log as log_module
from storage_node.faults import PLACES
from storage_node.log import EntriesGone, Log

Entry = tuple[int, int, bytes]  # sequence, term, data
SEEDS = range(40)


class Crash(Exception):
    """The process ends here; what reached the files stays."""


def entry(sequence: int, term: int, size: int = 20) -> bytes:
    return b"%d/%d " % (sequence, term) + b"x" * size


def flat(groups: list[log_module.Group]) -> list[Entry]:
    return [(g.first + i, g.term, data) for g in groups for i, data in enumerate(g.entries)]


def opened(folder: Path, after: int = 0, terms: log_module.Terms = ()) -> tuple[Log, list[Entry]]:
    log = Log(folder)
    return log, flat(list(log.open(after, new=True, terms=terms)))


def filled(folder: Path, groups: list[tuple[int, int]], rotate_after: tuple[int, ...] = ()) -> Log:
    """groups: (term, entries); a new file after those whose number is in rotate_after."""
    log, _ = opened(folder)
    for number, (term, count) in enumerate(groups):
        first = log.next_sequence
        log.append([entry(s, term) for s in range(first, first + count)], term)
        if number in rotate_after:
            log.rotate()
    return log


class Model:
    """A log beside the list that it has to be, and random things done to both."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.entries: list[Entry] = []  # all that there ever were and were not cut
        self.term, self.checkpoint, self.oldest = 1, 0, 1
        self.cutting = 0
        self.log, _ = opened(folder)
        self.log.retain_bytes = self.random.choice([0, 2000, 6000])

    def step(self) -> None:
        kind = self.random.choice(["append"] * 8 + ["rotate", "trim", "cut", "reopen", "term"])
        if kind == "append":
            self.append()
        elif kind == "rotate":
            self.log.rotate()
        elif kind == "trim":
            self.checkpoint = self.random.randint(self.checkpoint, self.end - 1)
            self.log.trim(self.checkpoint)
            assert self.log.first_sequence <= self.checkpoint + 1
            self.oldest = max(self.oldest, self.log.first_sequence)
        elif kind == "cut":
            self.cut(self.random.randint(self.checkpoint, self.end - 1))
        elif kind == "reopen":
            self.reopen()
        else:
            self.term += self.random.randint(1, 3)

    @property
    def end(self) -> int:
        return len(self.entries) + 1

    def append(self) -> None:
        first = self.log.next_sequence
        assert first == self.end
        new = [
            (s, self.term, entry(s, self.term, self.random.choice([0, 5, 300])))
            for s in range(first, first + self.random.randint(1, 5))
        ]
        self.log.append([data for _, _, data in new], self.term, first)
        self.entries += new

    def cut(self, after: int) -> None:
        self.cutting = after
        self.log.cut(after)
        del self.entries[after:]
        self.term += 1  # only another term cuts

    def reopen(self) -> None:
        """As recovery does: what the manifest knows of the terms, and the entries behind it."""
        known = tuple(t for t in self.terms() if t[1] <= self.checkpoint)
        retain = self.log.retain_bytes
        self.log.close()
        self.log, found = opened(self.folder, self.checkpoint, known)
        self.log.retain_bytes = retain
        found = [e for e in found if e[0] > self.checkpoint]
        assert found[: self.end - 1 - self.checkpoint] == self.entries[self.checkpoint :]
        self.entries += found[self.end - 1 - self.checkpoint :]

    def terms(self) -> tuple[tuple[int, int], ...]:
        first: dict[int, int] = {}
        for sequence, term, _ in self.entries:
            first.setdefault(term, sequence)
        return tuple(first.items())

    def check(self) -> None:
        assert self.log.next_sequence == self.end
        assert self.log.terms == self.terms()
        assert self.log.term_at(0) == 0
        for sequence, term, _ in self.entries:
            assert self.log.term_at(sequence) == term
        if self.oldest > 1:
            with pytest.raises(EntriesGone):
                self.log.read(self.oldest - 1, 1)
        first = self.random.randint(self.oldest, self.end)
        bytes_max = self.random.choice([1, 50, 500, 100_000])
        part = self.log.read(first, bytes_max)
        got = flat(part)
        assert got == self.entries[first - 1 : first - 1 + len(got)]
        assert bool(got) == (first < self.end)
        size = sum(len(data) for _, _, data in got)
        assert size <= bytes_max or len(got) == 1
        if first + len(got) < self.end:
            assert size + len(self.entries[first - 1 + len(got)][2]) > bytes_max


@pytest.fixture(autouse=True)
def _small_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "_MARK_BYTES", 256)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_steps_agree_with_a_list(tmp_path: Path, seed: int) -> None:
    print(f"seed {seed}")
    model = Model(tmp_path, seed)
    for _ in range(150):
        model.step()
        model.check()
    model.reopen()
    model.check()
    model.log.close()


@pytest.mark.parametrize("place", [place for place in PLACES if place.startswith("log.")])
@pytest.mark.parametrize("seed", range(12))
def test_a_crash_leaves_a_log_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, seed: int
) -> None:
    """At any step of any change: what was not being changed is there, and the change can be made."""
    print(f"seed {seed}")
    model = Model(tmp_path, seed)
    passes = model.random.randint(1, 3)

    def fault(here: str) -> None:
        nonlocal passes
        passes -= here == place
        if passes == 0 and here == place:
            raise Crash

    monkeypatch.setattr(log_module, "fault_point", fault)
    for _ in range(2000):
        before = list(model.entries)
        try:
            model.step()
        except Crash:
            break
        model.check()
    else:
        raise AssertionError(f"{place} was never passed")
    if "cut" in place:
        # Some of what was to go may be there; it goes when the cut is made again.
        after = model.checkpoint
        model.log.close()
        known = tuple(t for t in model.terms() if t[1] <= after)
        model.log, found = opened(model.folder, after, known)
        model.entries = [e for e in before if e[0] <= after] + [e for e in found if e[0] > after]
        assert model.entries == before[: len(model.entries)]
        assert len(model.entries) >= model.cutting
    model.reopen()
    if place in ("log.after_write", "log.after_fsync"):
        assert len(model.entries) > len(before), "what was written is there, or the fsync is vain"
    model.oldest = max(model.oldest, model.log.first_sequence)
    model.check()
    for _ in range(50):
        model.step()
        model.check()
    model.log.close()


@pytest.mark.parametrize("after", range(13))
def test_every_cut_is_exact_and_lasts(tmp_path: Path, after: int) -> None:
    log = filled(tmp_path, [(1, 3), (1, 2), (3, 4), (4, 3)], rotate_after=(0, 2))
    before = flat(log.read(1, 10**6))
    assert len(before) == 12
    log.cut(after)
    assert log.next_sequence == after + 1
    assert flat(log.read(1, 10**6)) == before[:after]
    assert log.append([b"new"], 9) == after + 1
    terms = log.terms
    assert terms[-1] == (9, after + 1)
    log.close()
    log, found = opened(tmp_path)
    assert found == [*before[:after], (after + 1, 9, b"new")]
    assert log.terms == terms
    log.close()


def test_a_cut_leaves_no_file_behind(tmp_path: Path) -> None:
    log = filled(tmp_path, [(1, 2), (1, 2), (1, 2)], rotate_after=(0, 1, 2))
    log.cut(3)
    log.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{n:020d}.log" for n in (1, 3)]


def test_a_cut_for_which_there_is_no_room_can_be_made_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = filled(tmp_path, [(1, 3), (1, 3)])
    with monkeypatch.context() as patch:
        patch.setattr(
            os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, ""))
        )
        with pytest.raises(StorageFull):
            log.cut(4)
    assert len(flat(log.read(1, 10**6))) == 6
    assert log.append([b"seven"], 1) == 7
    log.cut(4)
    assert len(flat(log.read(1, 10**6))) == 4
    assert [path.name for path in tmp_path.iterdir()] == [f"{1:020d}.log"]
    log.close()


def test_damage_before_a_cut_is_not_swept_away_by_it(tmp_path: Path) -> None:
    log = filled(tmp_path, [(1, 3), (1, 3)])
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[100] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ShardStopped, match="damaged"):
        log.cut(4)
    assert path.read_bytes() == data
    log.close()


def test_an_entry_has_one_place_and_terms_never_fall(tmp_path: Path) -> None:
    log = filled(tmp_path, [(2, 2)])
    with pytest.raises(InvariantError):
        log.append([b"x"], 2, first=5)
    with pytest.raises(InvariantError):
        log.append([b"x"], 1)
    assert log.append([b"x"], 2, first=3) == 3
    log.close()


def test_the_newest_files_are_kept_for_replicas_that_were_away(tmp_path: Path) -> None:
    log = filled(tmp_path, [(1, 1)] * 10, rotate_after=tuple(range(10)))
    size = next(tmp_path.iterdir()).stat().st_size
    log.retain_bytes = 3 * size
    log.trim(10)
    assert log.first_sequence == 8
    log.close()
    log, found = opened(tmp_path, after=10, terms=((1, 1),))
    assert found == []
    assert [e[0] for e in flat(log.read(8, 10**6))] == [8, 9, 10]
    log.retain_bytes = 0
    log.trim(10)
    assert log.first_sequence == log.next_sequence == 11
    log.close()


def test_damage_in_what_is_only_kept_for_others_stops_nobody(tmp_path: Path) -> None:
    log = filled(tmp_path, [(1, 2), (1, 2), (1, 2)], rotate_after=(0, 1))
    log.close()
    path = sorted(tmp_path.iterdir())[0]
    data = bytearray(path.read_bytes())
    data[-30] ^= 0xFF
    path.write_bytes(data)
    log, found = opened(tmp_path, after=3, terms=((1, 1),))
    assert [e[0] for e in found] == [3, 4, 5, 6]
    with pytest.raises(EntriesGone):
        log.read(1, 10**6)
    assert [e[0] for e in flat(log.read(3, 10**6))] == [3, 4, 5, 6]
    log.close()


def test_reset_begins_after_a_checkpoint_that_came_from_elsewhere(tmp_path: Path) -> None:
    log = filled(tmp_path, [(1, 3), (2, 3)], rotate_after=(0,))
    log.reset(101, ((1, 1), (5, 70)))
    assert log.read(101, 10) == []
    assert log.append([b"x"], 5) == 101
    assert log.terms == ((1, 1), (5, 70))
    log.close()
    log, found = opened(tmp_path, after=100, terms=((1, 1), (5, 70)))
    assert found == [(101, 5, b"x")]
    with pytest.raises(EntriesGone):
        log.read(100, 10)
    log.close()


def test_reading_goes_on_beside_appends_trims_and_new_files(tmp_path: Path) -> None:
    log = filled(tmp_path, [(1, 1)])
    done, trouble = threading.Event(), []

    def reader() -> None:
        rng, reads = random.Random(5), 0
        while not done.is_set() or not reads:
            first = rng.randint(log.first_sequence, log.next_sequence)
            try:
                found = flat(log.read(first, 3000))
            except EntriesGone:
                continue  # trimmed since
            reads += 1
            expected = [(first + i, 1, entry(first + i, 1)) for i in range(len(found))]
            if found != expected:
                trouble.append((first, found[:3]))

    threads = [threading.Thread(target=reader) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(300):
        first = log.next_sequence
        log.append([entry(s, 1) for s in range(first, first + 1 + number % 7)], 1)
        if number % 10 == 9:
            log.rotate()
            log.trim(first - 60)
    done.set()
    for thread in threads:
        thread.join(30)
    log.close()
    assert not trouble
