"""The paths of the replication protocol, step by step. tests/sim goes through them at random.

`Shard` carries out what the replicas ask for: their disks, the messages between them, and the record
in the metadata store. Nothing moves before `settle`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace

import pytest

from storage_node.replica import (
    CLOCK_DRIFT,
    Abandon,
    Append,
    Appended,
    Commit,
    Config,
    Configured,
    Cut,
    Departing,
    Effect,
    Entry,
    Event,
    FetchFiles,
    NeedFiles,
    Persist,
    Persisted,
    PersistFailed,
    Position,
    Probe,
    Propose,
    ReadTail,
    Received,
    Refused,
    Released,
    Replica,
    Send,
    Settled,
    Submit,
    TailRead,
    Tick,
    Timing,
)

TIMING = Timing()
GRANT_S = TIMING.lease_s * (1 + CLOCK_DRIFT)


class Shard:
    """trimmed: entries up to there are in the files of a checkpoint and no longer in the log."""

    def __init__(self, *nodes: str, writers_min: int = 1) -> None:
        self.now = 0.0
        self.record = Config(1, 1, nodes[0], frozenset(nodes), writers_min=writers_min)
        self.replicas: dict[str, Replica] = {}
        self.disks: dict[str, list[Entry]] = {}
        self.trimmed: dict[str, int] = {}
        self.applied: dict[str, list[bytes]] = {}
        self.effects: list[tuple[str, Effect]] = []  # all that was asked for, in order
        self.away: set[str] = set()  # no message goes to them or comes from them
        self.full: set[str] = set()
        self.slow: set[str] = set()  # their disks do nothing
        self.store_is_away = False
        self.incarnations = 0
        self._todo: deque[Callable[[], None]] = deque()
        self._waiting: dict[str, list[Persist | Cut]] = {}
        for node in nodes:
            self.disks[node] = []
            self.start(node, fresh=True)
        self.settle()

    # -- the world --------------------------------------------------------------------------------
    def start(self, node: str, *, fresh: bool = False) -> None:
        """A new process, on what the disk holds."""
        log, done = self.disks.setdefault(node, []), self.trimmed.get(node, 0)
        epochs = []
        for entry in log:
            if not epochs or epochs[-1][0] != entry.term:
                epochs.append((entry.term, entry.sequence))
        self.incarnations += 1
        self.replicas[node] = Replica(
            node,
            incarnation=self.incarnations,
            epochs=epochs,
            durable=len(log),
            committed=done,
            tail=log[done:],
            fresh=fresh,
            now=self.now,
        )
        self.applied[node] = [entry.data for entry in log[:done]]
        self._waiting[node] = []
        self.step(node, Configured(self.record))

    def change(self, **values: object) -> None:
        """Somebody else changes the record. Nobody hears of it yet: `tell`."""
        values = {
            k: frozenset(v) if isinstance(v, set | list | tuple) else v for k, v in values.items()
        }
        self.record = replace(self.record, revision=self.record.revision + 1, **values)

    def tell(self, *nodes: str) -> None:
        for node in nodes:
            self.step(node, Configured(self.record))

    def step(self, node: str, event: Event) -> list[Effect]:
        replica = self.replicas[node]
        effects = replica.step(event, self.now)
        replica.check()
        for effect in effects:
            self.effects.append((node, effect))
            self._do(node, replica, effect)
        return effects

    def _do(self, node: str, replica: Replica, effect: Effect) -> None:
        match effect:
            case Persist() | Cut():
                self._waiting[node].append(effect)
                self._todo.append(lambda: self._write(node, replica))
            case Send(to, message):
                self._todo.append(lambda: self._deliver(node, to, message))
            case Commit(entries):
                self.applied[node] += [entry.data for entry in entries]
            case Propose(config):
                self._todo.append(lambda: self._swap(node, replica, config))
            case ReadTail(to, first):
                log = self.disks[node]
                found = tuple(log[first - 1 :]) if first > self.trimmed.get(node, 0) else None
                self._todo.append(lambda: self.step(node, TailRead(to, first, found)))
            case Abandon() | FetchFiles():
                """Looked at by the tests."""

    def _write(self, node: str, replica: Replica) -> None:
        if node in self.slow or self.replicas[node] is not replica or not self._waiting[node]:
            return
        effect = self._waiting[node].pop(0)
        if isinstance(effect, Cut):
            del self.disks[node][effect.after :]
        elif node in self.full:
            self._waiting[node].clear()
            self.step(node, PersistFailed(effect.ticket))
            return
        else:
            self.disks[node] += effect.entries
        self.step(node, Persisted(effect.ticket))

    def _deliver(self, sender: str, to: str, message: object) -> None:
        if sender not in self.away and to not in self.away and to in self.replicas:
            self.step(to, Received(sender, message))

    def _swap(self, node: str, replica: Replica, config: Config) -> None:
        if self.store_is_away or self.replicas[node] is not replica:
            return
        if config.revision == self.record.revision:
            self.record = replace(config, revision=config.revision + 1)
        self.step(node, Settled(self.record))

    def settle(self) -> None:
        while self._todo:
            self._todo.popleft()()

    def wake(self, node: str) -> None:
        """Its disk works again."""
        self.slow.discard(node)
        for _ in range(len(self._waiting[node])):
            self._write(node, self.replicas[node])

    def wait(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.25)):
            self.now += 0.25
            for node in sorted(self.replicas):
                if node not in self.away or self.replicas[node].is_primary:
                    self.step(node, Tick())
            self.settle()

    # -- questions --------------------------------------------------------------------------------
    def write(self, node: str, *data: bytes) -> None:
        self.step(node, Submit(data))

    def asked(self, node: str, kind: type) -> list:
        return [effect for who, effect in self.effects if who == node and isinstance(effect, kind)]

    def said(self, node: str, kind: type) -> list:
        return [s.message for s in self.asked(node, Send) if isinstance(s.message, kind)]

    def logs(self) -> list[list[tuple[int, bytes]]]:
        return [[(e.term, e.data) for e in self.disks[n]] for n in sorted(self.disks)]


@pytest.fixture
def shard() -> Shard:
    return Shard("a", "b", "c")


# -- writing ---------------------------------------------------------------------------------------
def test_a_write_is_committed_when_every_replica_in_sync_has_it_on_disk(shard):
    shard.slow = {"c"}
    shard.write("a", b"1", b"2")
    shard.settle()
    assert [len(shard.disks[n]) for n in "abc"] == [2, 2, 0]
    assert shard.applied["a"] == []

    shard.wake("c")
    shard.settle()
    assert shard.applied == {"a": [b"1", b"2"], "b": [b"1", b"2"], "c": [b"1", b"2"]}


def test_the_primary_waits_for_its_own_disk_too(shard):
    shard.slow = {"a"}
    shard.write("a", b"1")
    shard.settle()
    assert shard.applied["a"] == []
    shard.wake("a")
    shard.settle()
    assert shard.applied["a"] == [b"1"]


def test_only_the_primary_takes_writes_and_only_with_enough_replicas():
    shard = Shard("a", "b", writers_min=2)
    assert shard.replicas["a"].refusal(shard.now) is None
    assert shard.replicas["b"].refusal(shard.now) == "not primary"
    shard.away = {"b"}
    shard.wait(TIMING.replica_timeout_s + 1)
    assert shard.record.in_sync == {"a"}
    assert "write_consistency_factor asks for 2" in shard.replicas["a"].refusal(shard.now)


def test_a_message_that_was_lost_is_sent_again(shard):
    shard.away = {"c"}
    shard.write("a", b"1")
    shard.settle()
    shard.away = set()
    shard.wait(2 * TIMING.heartbeat_s)
    assert shard.applied["a"] == shard.applied["c"] == [b"1"]
    assert shard.record.in_sync == {"a", "b", "c"}


def test_a_late_copy_of_a_message_cuts_nothing(shard):
    shard.write("a", b"1")
    shard.settle()
    first = shard.said("a", Append)[0]
    shard.write("a", b"2")
    shard.settle()
    shard.step("b", Received("a", first))
    assert shard.asked("b", Cut) == []
    assert [e.data for e in shard.disks["b"]] == [b"1", b"2"]


# -- the in-sync set -------------------------------------------------------------------------------
def test_a_silent_replica_leaves_the_set_before_the_primary_goes_on_without_it(shard):
    shard.away, shard.store_is_away = {"c"}, True
    shard.write("a", b"1")
    shard.wait(TIMING.replica_timeout_s + 1)
    assert shard.asked("a", Propose)[-1].config.in_sync == {"a", "b"}
    assert shard.applied["a"] == [], "the metadata store has not said yes"

    shard.store_is_away = False
    shard._swap("a", shard.replicas["a"], shard.asked("a", Propose)[-1].config)
    assert shard.record.in_sync == {"a", "b"}
    assert shard.applied["a"] == [b"1"]


def test_a_primary_that_was_replaced_cannot_shrink_the_set_and_so_acknowledges_nothing(shard):
    shard.away = {"a"}
    shard.change(term=2, primary="b", in_sync={"b", "c"})
    shard.write("a", b"1")
    shard.wait(TIMING.replica_timeout_s + 1)  # its swap fails: Settled brings the new record
    assert not shard.replicas["a"].is_primary
    assert shard.applied["a"] == []
    assert shard.asked("a", Abandon) == [Abandon(after=0, lost=False)]


def test_a_joining_replica_comes_into_sync_when_it_holds_all_that_is_committed(shard):
    shard.write("a", b"1", b"2")
    shard.settle()
    shard.change(joining={"d"})
    shard.start("d", fresh=True)
    shard.tell("a")
    shard.settle()
    assert shard.record.in_sync == {"a", "b", "c", "d"}
    assert shard.record.joining == frozenset()
    shard.wait(1)
    assert shard.applied["d"] == [b"1", b"2"]


def test_a_swap_whose_outcome_is_unknown_makes_the_primary_wait_for_both_sets(shard):
    shard.slow, shard.store_is_away = {"d"}, True
    shard.change(joining={"d"})
    shard.start("d", fresh=True)
    shard.tell("a")
    shard.settle()
    assert shard.asked("a", Propose)[-1].config.in_sync == {"a", "b", "c", "d"}
    shard.write("a", b"1")
    shard.settle()
    assert shard.applied["a"] == [], "d may be in sync already"


def test_the_outcome_of_an_old_proposal_settles_no_new_one(shard):
    shard.store_is_away = True
    shard.change(joining={"d"})
    shard.start("d", fresh=True)
    shard.tell("a")
    shard.settle()
    first = shard.asked("a", Propose)[-1].config
    shard.change(joining={"d", "e"})
    shard.tell("a")  # the first one can no longer happen
    shard.settle()
    second = shard.asked("a", Propose)[-1].config
    assert second.revision > first.revision
    assert second.in_sync == {"a", "b", "c", "d"}

    shard.slow = {"d"}
    shard.write("a", b"1")
    shard.settle()
    shard.step("a", Settled(shard.record))  # of the first one, late
    shard.step("a", Tick())
    assert shard.applied["a"] == [], "the second one may have happened: d may be in sync"
    shard.wake("d")
    shard.settle()
    assert shard.applied["a"] == [b"1"]


# -- another primary -------------------------------------------------------------------------------
def test_a_new_primary_commits_what_it_inherited_before_it_takes_writes(shard):
    shard.slow = {"c"}
    shard.write("a", b"1")
    shard.settle()  # on the disks of a and b, acknowledged to nobody
    shard.away, shard.slow = {"a"}, set()
    shard.replicas["c"].step(Tick(), shard.now)
    shard.wake("c")
    shard.change(term=2, primary="b", in_sync={"b", "c"})
    shard.tell("b")
    assert "became primary a moment ago" in shard.replicas["b"].refusal(shard.now)
    shard.wait(GRANT_S + 1)
    assert shard.applied["b"] == shard.applied["c"] == [b"1"]
    assert shard.replicas["b"].refusal(shard.now) is None


def test_it_commits_nothing_while_the_old_primary_may_answer_strong_reads(shard):
    shard.wait(1)
    until = shard.replicas["a"].strong_until
    assert shard.now < until <= shard.now + TIMING.lease_s
    shard.away = {"a"}
    shard.change(term=2, primary="b", in_sync={"b", "c"})
    shard.tell("b", "c")
    while shard.now <= until:
        assert shard.replicas["b"].refusal(shard.now) is not None
        shard.wait(0.25)
    shard.wait(0.5)
    assert shard.replicas["b"].refusal(shard.now) is None
    assert shard.replicas["a"].strong_until <= shard.now


def test_a_primary_that_is_replaced_while_it_lives_gives_its_lease_back(shard):
    shard.wait(1)
    shard.change(term=2, primary="b", in_sync={"b", "c"})
    shard.tell("b")
    shard.settle()
    assert shard.replicas["b"].refusal(shard.now) is not None
    shard.tell("a")  # it stops, and says so
    shard.settle()
    assert shard.said("a", Released) == [Released(1)] * 2
    assert shard.replicas["b"].refusal(shard.now) is None
    shard.write("b", b"1")
    shard.settle()
    assert shard.applied["b"] == [b"1"]


def test_a_primary_that_waits_for_another_lease_gives_nothing_back(shard):
    """d never answered a, whose lease runs on: it only knows that it answered b, who knew of a."""
    shard.wait(1)
    until = shard.replicas["a"].strong_until
    shard.away = {"a"}
    shard.change(term=2, primary="b", in_sync={"b", "c"}, joining={"d"})
    shard.start("d", fresh=True)
    shard.tell("b", "c", "d")
    shard.settle()
    assert shard.record.in_sync == {"b", "c", "d"}
    shard.change(term=3, primary="d", in_sync={"c", "d"})
    shard.tell("b", "c", "d")
    shard.settle()
    assert not shard.said("b", Released)
    assert shard.now < until
    assert shard.replicas["d"].refusal(shard.now) is not None


def test_a_lease_is_given_back_for_its_own_term_only(shard):
    shard.wait(1)
    shard.away = {"a"}
    shard.change(term=2, primary="b", in_sync={"b", "c"})
    shard.tell("b", "c")
    shard.settle()
    refused = shard.replicas["b"].refusal(shard.now)
    shard.step("b", Received("c", Released(2)))
    assert shard.replicas["b"].refusal(shard.now) == refused is not None


# -- nodes that stop -------------------------------------------------------------------------------
def test_a_node_that_is_about_to_stop_leaves_the_set_at_once(shard):
    shard.wait(1)
    for node in "abc":
        shard.step(node, Departing(frozenset("c")))
    shard.settle()
    assert shard.record.in_sync == {"a", "b"}
    shard.away = {"c"}
    shard.write("a", b"1")
    shard.settle()
    assert shard.applied["a"] == [b"1"]
    shard.away = set()
    shard.change(joining={"c"})
    shard.tell("a", "c")
    shard.wait(1)
    assert "c" not in shard.record.in_sync  # it may be gone any moment
    shard.step("a", Departing(frozenset()))
    shard.wait(1)
    assert shard.record.in_sync == {"a", "b", "c"}


def test_when_all_stop_no_primary_stays_behind_as_the_only_one(shard):
    shard.step("a", Departing(frozenset("bc")))
    shard.wait(1)
    assert shard.record.in_sync == {"a", "b", "c"}
    shard.step("a", Departing(frozenset("abc")))
    shard.wait(1)
    assert shard.record.in_sync == {"a", "b", "c"}


def test_a_primary_that_is_about_to_stop_takes_no_more_writes_where_others_can(shard):
    shard.write("a", b"1")
    shard.step("a", Departing(frozenset("a")))
    assert "being stopped" in shard.replicas["a"].refusal(shard.now)
    shard.settle()
    assert shard.applied["a"] == [b"1"]
    alone = Shard("a")
    alone.step("a", Departing(frozenset("a")))
    assert alone.replicas["a"].refusal(alone.now) is None


def test_an_old_primary_is_told_that_its_term_is_over(shard):
    shard.change(term=2, primary="b", in_sync={"b", "c"})
    shard.tell("b", "c")
    shard.settle()
    shard.write("a", b"1")
    shard.settle()
    assert shard.said("b", Refused)
    assert not shard.replicas["a"].is_primary
    assert [len(shard.disks[n]) for n in "abc"] == [1, 0, 0]


def test_a_returning_primary_cuts_what_nobody_else_has(shard):
    shard.write("a", b"1")
    shard.settle()
    shard.away = {"a"}
    shard.write("a", b"2", b"3")  # acknowledged to nobody
    shard.settle()
    shard.change(term=2, primary="b", in_sync={"b", "c"})
    shard.tell("b", "c")
    shard.wait(GRANT_S + 1)
    shard.write("b", b"4")
    shard.settle()

    shard.away = set()
    shard.change(joining={"a"})
    shard.tell("a", "b")
    shard.wait(1)
    assert shard.asked("a", Cut) == [Cut(ticket=3, after=1)]
    assert shard.record.in_sync == {"a", "b", "c"}
    assert shard.logs() == [[(1, b"1"), (2, b"4")]] * 3
    assert shard.applied["a"] == [b"1", b"4"]


# -- restarts --------------------------------------------------------------------------------------
def test_a_primary_that_restarts_takes_a_new_term_before_it_speaks(shard):
    shard.write("a", b"1")
    shard.settle()
    shard.effects.clear()
    shard.store_is_away = True
    shard.start("a")
    shard.settle()
    assert not shard.replicas["a"].is_primary
    assert shard.asked("a", Propose)[0].config.term == 2
    assert shard.asked("a", Send) == []

    shard.store_is_away = False
    shard._swap("a", shard.replicas["a"], shard.asked("a", Propose)[0].config)
    shard.wait(GRANT_S + 1)
    assert shard.replicas["a"].is_primary
    assert shard.replicas["a"].term == 2
    assert shard.applied["a"] == [b"1"], "what it had acknowledged is committed again"


def test_entries_that_a_crash_took_from_the_primary_alone_are_replaced(shard):
    shard.slow = {"a", "c"}
    shard.write("a", b"1")
    shard.settle()  # on the disk of b, on the way to that of c
    shard.slow = set()
    shard.start("a")
    shard.wake("c")
    shard.wait(GRANT_S + 1)
    shard.write("a", b"2")
    shard.wait(1)
    assert shard.logs() == [[(2, b"2")]] * 3
    assert shard.applied["b"] == [b"2"]


def test_a_restarted_replica_listens_to_nobody_before_it_read_the_record():
    """Its log may be older than the term that it had promised to follow."""
    restarted = Replica("b", incarnation=2, now=0.0)
    late = Append(1, 0, 0, (Entry(1, 1, b"1"),), 0, 0.0)
    assert restarted.step(Received("a", late), 0.0) == []
    restarted.step(Configured(Config(9, 3, "c", frozenset("bc"))), 0.0)
    assert restarted.step(Received("a", late), 0.0) == [Send("a", Refused(3))]


def test_a_replica_that_was_just_made_need_not_wait():
    alone = Replica("a", incarnation=1, fresh=True, now=5.0)
    alone.step(Configured(Config(1, 1, "a", frozenset("a"))), 5.0)
    assert alone.refusal(5.0) is None
    assert alone.strong_until == float("inf")


# -- files -----------------------------------------------------------------------------------------
def joining_behind_a_trimmed_log() -> Shard:
    shard = Shard("a", "b")
    shard.write("a", b"1", b"2", b"3")
    shard.settle()
    shard.trimmed["a"] = 2  # the files hold 1 and 2
    shard.start("a")  # and its memory is gone
    shard.wait(GRANT_S + 1)
    shard.change(joining={"c"})
    shard.start("c", fresh=True)
    shard.tell("a")
    shard.settle()
    return shard


def test_a_replica_behind_the_log_fetches_files_then_the_tail():
    shard = joining_behind_a_trimmed_log()
    assert shard.asked("c", FetchFiles) == [FetchFiles("a")]
    before = len(shard.effects)
    shard.wait(1)
    assert all(node != "c" for node, _ in shard.effects[before:]), "it takes no part meanwhile"

    shard.disks["c"], shard.trimmed["c"] = shard.disks["a"][:2], 2
    shard.start("c")
    shard.wait(2)
    assert shard.record.in_sync == {"a", "b", "c"}
    assert shard.applied["c"] == [b"1", b"2", b"3"]


def test_a_late_copy_of_need_files_is_about_another_incarnation():
    shard = joining_behind_a_trimmed_log()
    (late,) = set(shard.said("a", NeedFiles))
    shard.disks["c"], shard.trimmed["c"] = shard.disks["a"][:2], 2
    shard.start("c")
    shard.wait(2)
    assert shard.step("c", Received("a", late)) == []


def test_a_replica_in_sync_is_never_sent_for_files(shard):
    """It may hold acknowledged entries that the files do not have."""
    a = shard.replicas["a"]
    shard.write("a", b"1")
    shard.settle()
    a._peers["b"].reading = True
    assert not [e for e in shard.step("a", TailRead("b", 1, None)) if isinstance(e, Send)]


def test_a_replica_that_was_sent_for_files_does_not_come_into_sync_before(shard):
    """Its late answers may say that it caught up; the order to fetch files may still reach it."""
    shard.write("a", b"1")
    shard.settle()
    shard.change(joining={"d"})
    shard.start("d", fresh=True)
    shard.tell("a")
    a, d = shard.replicas["a"], shard.replicas["d"].incarnation
    shard.step("a", Received("d", Position(1, d, 0, 0, (), echo=shard.now)))
    a._peers["d"].reading = True
    assert shard.step("a", TailRead("d", 1, None)) == [Send("d", NeedFiles(1, d))]
    shard.step("a", Received("d", Appended(1, 1, shard.now)))
    shard.step("a", Received("d", Position(1, d, 1, 1, ((1, 1),), echo=shard.now)))
    assert shard.asked("a", Propose) == []


def test_what_was_read_from_the_log_before_a_cut_is_not_sent(shard):
    old = Entry(1, 1, b"old")
    shard.away = {"a"}
    shard.write("a", old.data)
    shard.settle()
    shard.change(term=2, primary="b", in_sync={"b", "c"})
    shard.tell("b", "c")
    shard.wait(GRANT_S + 1)
    shard.write("b", b"new")
    shard.away = set()
    shard.change(joining={"a"})
    shard.tell("a", "b")
    shard.wait(2)
    shard.change(term=3, primary="a", in_sync={"a", "c"}, joining={"b"})
    shard.tell("a")
    a = shard.replicas["a"]
    a._peers["b"].aligned = a._peers["b"].reading = True
    effects = shard.step("a", TailRead("b", 1, (old,)))
    sent = [e.message.entries for e in effects if isinstance(e.message, Append)]
    assert old not in [entry for entries in sent for entry in entries]


def test_answers_from_before_a_replica_left_do_not_count_after_it_came_back(shard):
    shard.wait(1)
    shard.write("a", b"1")
    shard.settle()
    shard.change(in_sync={"a", "b"}, joining={"c"})  # c was emptied in between
    shard.now += 0.1
    shard.tell("a")
    position = Position(1, 3, 1, 1, ((1, 1),), echo=shard.now - 0.05)
    assert shard.step("a", Received("c", position)) == []
    assert shard.step("a", Received("c", Appended(1, 1, shard.now - 0.05))) == []
    assert shard.replicas["a"].match_of("c") is None


# -- a full disk -----------------------------------------------------------------------------------
def test_writes_that_reached_no_disk_and_nobody_are_lost_for_certain():
    shard = Shard("a")
    shard.full = {"a"}
    shard.write("a", b"1")
    shard.settle()
    assert shard.asked("a", Abandon) == [Abandon(after=0, lost=True)]
    shard.full = set()
    shard.write("a", b"2")
    shard.settle()
    assert shard.applied["a"] == [b"2"]
    assert shard.record.term == 1


def test_a_primary_without_space_for_what_others_have_takes_a_new_term(shard):
    shard.full = {"a"}
    shard.write("a", b"1")
    shard.settle()
    assert shard.asked("a", Abandon) == [Abandon(after=0, lost=False)]
    assert shard.record.term == 2
    assert shard.record.primary == "a"
    shard.full = set()
    shard.wait(GRANT_S + 1)
    shard.write("a", b"2")
    shard.wait(1)
    assert shard.logs() == [[(2, b"2")]] * 3


def test_a_new_primary_without_space_for_what_it_inherited_takes_a_new_term(shard):
    """The others have it under the numbers that the next writes would get."""
    shard.slow = {"b"}
    shard.write("a", b"1")
    shard.settle()
    shard.away = {"a"}
    shard.change(term=2, primary="b", in_sync={"b", "c"})
    shard.tell("b")
    shard.settle()
    assert shard.replicas["b"].match_of("c") == 1
    shard.full = {"b"}
    shard.wake("b")
    shard.settle()
    assert (shard.record.term, shard.record.primary) == (3, "b")
    shard.full = set()
    shard.wait(GRANT_S + 1)
    shard.write("b", b"2")
    shard.wait(1)
    assert shard.logs()[1:] == [[(3, b"2")]] * 2


def test_a_secondary_without_space_gets_it_again_or_leaves_the_set(shard):
    shard.full = {"b"}
    shard.write("a", b"1")
    shard.wait(1)
    assert shard.applied["a"] == []
    shard.full = set()
    shard.wait(1)
    assert shard.applied["a"] == shard.applied["b"] == [b"1"]

    shard.full = {"b"}
    shard.write("a", b"2")
    shard.wait(TIMING.replica_timeout_s + 1)
    assert shard.record.in_sync == {"a", "c"}
    assert shard.applied["a"] == [b"1", b"2"]


def test_probe_is_answered_with_what_is_on_disk(shard):
    shard.slow = {"b"}
    shard.write("a", b"1")
    shard.settle()
    (answer,) = shard.step("b", Received("a", Probe(1, 7.0)))
    assert answer == Send("a", Position(1, 2, 0, 0, (), echo=7.0))
