"""One shard, its nodes, a bad network and a metadata store, on one thread, out of one seed.

The nodes run the real core (storage_node/replica.py). Everything that the core leaves to others is
here: clocks, disks, messages, the record in the metadata store and who changes it, the monitor,
clients behind coordinators. Everything that varies is drawn from the seed, the severity of each
fault included (a fault may not exist at all in a run). First anything may fail and nothing may be
lost; then the faults stop, and within a bounded time every node must be back in sync.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from typing import Any

from .oracle import Oracle, Violation

__all__ = ["LIMITS", "Dice", "Node", "World"]

LIMITS = ("RECENT_BYTES_MAX", "APPEND_BYTES_MAX", "WINDOW_ENTRIES_MAX", "EPOCHS_MAX")  # of the core
HEALING_S_MAX = 60.0
TICK_S = 0.25
EVENTS_MAX = 60_000  # of a run; the busiest sane ones take a fourth of that


@dataclass(slots=True)
class Dice:
    """How severe each fault is in this run. Rates are per second, chances per case."""

    nodes: int
    copies: int  # how many replicas the monitor wants
    faulty_s: float
    loss: float
    duplication: float
    ordered: bool  # links keep their order, as one stream does while it lives
    delay_s: float
    straggler: float  # chance that a message takes straggler_s
    straggler_s: float
    partition: float
    metadata_cut: float
    metadata_delay_s: float
    cas_lost: float  # chance that the outcome of a compare-and-swap does not come back
    watch_skips: float
    crash: float
    down_s: float
    pause: float
    pause_s: float
    fsync_s: float
    stall: float  # chance that one fsync takes stall_s
    stall_s: float
    full: float
    full_s: float
    depart: float  # a node is stopped cleanly, and says so some time before
    depart_s: float
    suspicion: float  # the monitor promotes for no good reason
    membership: float
    checkpoint: float
    epochs_kept: bool  # a checkpoint remembers where the terms in it began
    write: float
    read: float
    entries_max: int
    bytes_max: int
    drift: bool
    recent_bytes_max: int
    append_bytes_max: int
    window_entries_max: int
    epochs_max: int
    writers_min: int

    @classmethod
    def throw(cls, rng: random.Random) -> Dice:
        def some(chance: float, *values: float) -> float:
            return rng.choice(values) if rng.random() < chance else 0.0

        nodes = rng.choice((3, 3, 4, 4, 5))
        return cls(
            nodes=nodes,
            copies=rng.choice((2, 3, 3, 3)),
            faulty_s=rng.choice((8.0, 15.0, 30.0)),
            loss=some(0.6, 0.01, 0.1, 0.3),
            duplication=some(0.5, 0.05, 0.3),
            ordered=rng.random() < 0.4,
            delay_s=rng.choice((0.002, 0.02, 0.2)),
            straggler=some(0.5, 0.01, 0.1),
            straggler_s=rng.choice((1.0, 3.0, 5.0, 12.0)),
            partition=some(0.6, 0.03, 0.15, 0.4),
            metadata_cut=some(0.5, 0.03, 0.15),
            metadata_delay_s=rng.choice((0.01, 0.2, 2.0)),
            cas_lost=some(0.5, 0.1, 0.4),
            watch_skips=some(0.5, 0.1, 0.7),
            crash=some(0.7, 0.03, 0.1, 0.4),
            down_s=rng.choice((0.1, 1.0, 6.0)),
            pause=some(0.5, 0.03, 0.15),
            pause_s=rng.choice((0.8, 3.0, 8.0)),
            fsync_s=rng.choice((0.001, 0.02, 0.3)),
            stall=some(0.4, 0.01, 0.1),
            stall_s=rng.choice((0.5, 4.0)),
            full=some(0.3, 0.03, 0.15),
            full_s=rng.choice((0.3, 3.0)),
            depart=some(0.5, 0.05, 0.3),
            depart_s=rng.choice((0.3, 5.0)),
            suspicion=some(0.6, 0.05, 0.15, 0.5),
            membership=some(0.7, 0.1, 0.5),
            checkpoint=some(0.7, 0.05, 0.4, 1.0),
            epochs_kept=rng.random() < 0.7,
            write=rng.choice((1.0, 3.0, 8.0)),
            read=rng.choice((0.0, 1.0)),
            entries_max=rng.choice((1, 2, 6)),
            bytes_max=rng.choice((10, 100)),
            drift=rng.random() < 0.7,
            recent_bytes_max=rng.choice((0, 300, 1 << 20)),
            append_bytes_max=rng.choice((1, 200, 1 << 20)),
            window_entries_max=rng.choice((3, 20, 4096)),
            epochs_max=rng.choice((4, 64)),
            writers_min=rng.choice((1, 1, 1, 2)),
        )


@dataclass(frozen=True, slots=True)
class Record:
    """The shard's record. What a replica is told is its `config`."""

    config: Any
    leaving: frozenset[str] = frozenset()

    @property
    def in_sync(self) -> frozenset[str]:
        return self.config.in_sync

    @property
    def primary(self) -> str:
        return self.config.primary


@dataclass(slots=True)
class Disk:
    """What survives a crash. log holds entries 1, 2, …; those up to `base` were trimmed and only
    live in the checkpoint, which reaches up to `checkpoint`."""

    log: list[Any] = field(default_factory=list)
    base: int = 0
    checkpoint: int = 0
    holds: bool = False  # there is a replica here


class Node:
    """One storage node: a driver that keeps the contract of the core to the letter."""

    def __init__(self, world: World, name: str, rate: float) -> None:
        self.world, self.name, self.rate = world, name, rate
        self.disk = Disk()
        self.replica: Any = None
        self.running = True
        self.incarnation = 0
        self.applied = 0
        self.queue: deque[Any] = deque()  # Persist and Cut that are not on disk yet
        self.writing = self.failing = False
        self.full_until = self.paused_until = 0.0
        self.waiting: dict[int, tuple[bytes, int]] = {}  # sequence -> data, coordinator
        self.seen = -1  # the newest record that it was told of; -1: none yet
        self.boots = 0
        self.departing: frozenset[str] = frozenset()  # as far as it was told

    def clock(self) -> float:
        return self.world.now * self.rate

    # -- life -------------------------------------------------------------------------------------
    def boot(self) -> None:
        self.running = True
        self.departing = frozenset()
        self.world.at(self.world._metadata_s(), self, self.told_departing)
        if self.disk.holds:
            self.open()
        self.reread()

    def reread(self) -> None:
        """The first record that a replica is told of must have been read after it was made."""
        self.seen = -1
        self.boots += 1
        self.world.read_record(self, self.boots)

    def open(self, *, fresh: bool = False) -> None:
        """Make a replica of what is on disk."""
        world, disk = self.world, self.disk
        self._drop()
        world.incarnations += 1
        self.incarnation = world.incarnations
        log, self.applied = disk.log, disk.checkpoint
        epochs: list[tuple[int, int]] = []
        for entry in log[0 if world.dice.epochs_kept else disk.base :]:
            if not epochs or epochs[-1][0] != entry.term:
                epochs.append((entry.term, entry.sequence))
        self.replica = world.core.Replica(
            self.name,
            incarnation=self.incarnation,
            epochs=epochs[-world.core.EPOCHS_MAX :],
            durable=len(log),
            committed=self.applied,
            tail=log[self.applied :],
            fresh=fresh,
            now=self.clock(),
        )
        if self.departing:
            self.feed(world.core.Departing(self.departing))
        world.at(world.rng.random() * TICK_S, self, self.tick, self.replica)

    def _drop(self) -> None:
        self.replica = None
        self.queue.clear()
        self.writing = self.failing = False
        self.waiting.clear()

    def crash(self) -> None:
        """The process dies. Of what was not fsynced any prefix may be on disk."""
        world = self.world
        world.tell(f"{self.name} crashes, {len(self.queue)} writes in flight")
        self._tear()
        self._drop()
        self.running = False
        self.paused_until = 0.0

    def _tear(self) -> None:
        rng = self.world.rng
        for effect in list(self.queue)[: rng.randint(0, len(self.queue))]:
            if self.failing:
                break  # that write left the disk as it was, and so must all after it
            entries = getattr(effect, "entries", ())
            kept = len(entries) if rng.random() < 0.7 else rng.randint(0, len(entries))
            self._to_disk(effect, entries[:kept])
            if kept < len(entries):
                break

    def learn(self, record: Record, number: int) -> None:
        """A record was read, or watched."""
        if number <= self.seen:
            return
        self.seen = number
        if self.name in record.leaving:
            if self.disk.holds:
                self.world.tell(f"{self.name} deletes its replica")
            self._drop()
            self.disk = Disk()
            self.world.leave(self)
        elif self.name in record.config.joining and not self.disk.holds:
            self.disk = Disk(holds=True)
            self.open(fresh=True)
        if self.replica is not None:
            self.feed(self.world.core.Configured(record.config))

    def told_departing(self) -> None:
        world = self.world
        if not world._reaches_metadata(self):
            world.at(0.5, self, self.told_departing)
            return
        self.departing = world.departing
        if self.replica is not None:
            self.feed(world.core.Departing(self.departing))

    def tick(self, replica: Any) -> None:
        if self.replica is replica:
            self.world.at(TICK_S / self.rate, self, self.tick, replica)
            self.feed(self.world.ticking)

    # -- the core and its effects -----------------------------------------------------------------
    def feed(self, event: Any) -> None:
        world, replica = self.world, self.replica
        if world.story is not None:
            world.tell_event(self, event)
        effects = replica.step(event, self.clock())
        for effect in effects:
            self.do(effect)
        world.oracle.stepped(self, replica)

    def do(self, effect: Any) -> None:
        world = self.world
        match effect.__class__.__name__:
            case "Send":
                world.send(self, effect.to, effect.message)
            case "Persist" | "Cut":
                self.queue.append(effect)
                if not self.writing:
                    self._write()
            case "Commit":
                world.oracle.committed(self, self.replica, effect.entries)
                for entry in effect.entries:
                    if entry.sequence in self.waiting:
                        data, coordinator = self.waiting.pop(entry.sequence)
                        world.oracle.answered(entry.sequence, data)
                        world.answer(coordinator, entry.sequence)
            case "Abandon":
                for sequence in [s for s in self.waiting if s > effect.after]:
                    data, _ = self.waiting.pop(sequence)
                    if effect.lost:
                        world.oracle.never.add(data)
            case "Propose":
                world.propose(self, self.replica, effect.config)
            case "ReadTail":
                world.at(world.fsync_s(self), self, self.read_tail, self.replica, effect)
            case "FetchFiles":
                world.fetch(self, self.replica, effect.source)
            case name:
                raise Violation(f"unknown effect {name}")

    def submit(self, data: tuple[bytes, ...], coordinator: int) -> None:
        replica = self.replica
        if replica is None or replica.refusal(self.clock()) is not None:
            self.world.oracle.never.update(data)
            self.world.refusals += 1
            return
        for i, piece in enumerate(data):
            self.waiting[replica.last + 1 + i] = piece, coordinator
        self.feed(self.world.core.Submit(data))

    def read_tail(self, replica: Any, effect: Any) -> None:
        if self.replica is not replica:
            return
        entries = None
        if effect.first > self.disk.base:
            found, size = [], 0
            for entry in self.disk.log[effect.first - 1 :]:
                size += len(entry.data)
                if found and size > self.world.core.APPEND_BYTES_MAX:
                    break
                found.append(entry)
            entries = tuple(found)
        late = self.world.fsync_s(self)  # read now, told later
        answer = self.world.core.TailRead(effect.to, effect.first, entries)
        self.world.at(late, self, self._told, replica, answer)

    def _told(self, replica: Any, event: Any) -> None:
        if self.replica is replica:
            self.feed(event)

    # -- the disk ---------------------------------------------------------------------------------
    def _write(self) -> None:
        self.writing = True
        world = self.world
        count = len(self.queue) if world.rng.random() < 0.5 else 1  # group commit, or none
        world.at(world.fsync_s(self), self, self._written, self.replica, count)

    def _written(self, replica: Any, count: int) -> None:
        if self.replica is not replica:
            return
        core, done = self.world.core, None
        for _ in range(count):
            effect = self.queue[0]
            if effect.__class__.__name__ == "Persist" and self.full_until > self.world.now:
                self.failing = True
                delay = self.world.rng.choice((0.0, 0.01, 0.1))
                self.world.at(delay, self, self._failed, replica, effect.ticket)
                break
            self.queue.popleft()
            self._to_disk(effect, getattr(effect, "entries", ()))
            done = effect.ticket
        if not self.failing:
            self.writing = False
            if self.queue:
                self._write()
        if done is not None:
            self.feed(core.Persisted(done))

    def _failed(self, replica: Any, ticket: int) -> None:
        if self.replica is not replica:
            return
        self.queue.clear()
        self.writing = self.failing = False
        self.world.tell(f"{self.name}: no space for write {ticket}")
        self.feed(self.world.core.PersistFailed(ticket))

    def _to_disk(self, effect: Any, entries: tuple[Any, ...]) -> None:
        log, oracle = self.disk.log, self.world.oracle
        if effect.__class__.__name__ == "Cut":
            oracle.removed(self, log[effect.after :])
            del log[effect.after :]
            return
        for entry in entries:
            oracle.must(entry.sequence == len(log) + 1, f"{self.name}: a hole in the log on disk")
            log.append(entry)

    def checkpoint(self) -> None:
        """Seal what is applied; trim the log, up to somewhere before that."""
        disk, rng = self.disk, self.world.rng
        if self.replica is not None:
            disk.checkpoint = self.applied
            if rng.random() < 0.5:
                disk.base = disk.checkpoint
            else:
                disk.base = rng.randint(disk.base, disk.checkpoint)


class World:
    """A run. `story` collects what happened when it is a list."""

    def __init__(self, seed: int, core: Any, *, story: bool = False) -> None:
        self.rng = rng = random.Random(seed)
        self.core, self.seed = core, seed
        self.dice = dice = Dice.throw(rng)
        for name in LIMITS:
            setattr(core, name, getattr(dice, name.lower()))
        self.story: list[str] | None = [] if story else None
        self.ticking = core.Tick()
        self.agenda: list[Any] = []
        self.now = 0.0
        self.scheduled = self.incarnations = self.written = self.refusals = self.events = 0
        self.faulty = True
        self.blocked: dict[tuple[str, str], float] = {}  # (from, to) -> until
        self.arrives: dict[tuple[str, str], float] = {}  # the last arrival of a link
        self.oracle = Oracle(self)
        drift = core.CLOCK_DRIFT if dice.drift else 0.0
        names = [f"s{i}" for i in range(dice.nodes)]
        self.nodes = {
            name: Node(self, name, 1.0 + drift * rng.choice((0.0, 0.5, 1.0))) for name in names
        }
        copies = names[: min(dice.copies, dice.nodes)]
        config = core.Config(1, 1, names[0], frozenset(copies), writers_min=dice.writers_min)
        self.departing: frozenset[str] = frozenset()  # who said that it is about to stop
        self.record = Record(config)
        self.records = [self.record]
        for name, node in self.nodes.items():
            if name in copies:
                node.disk.holds = True
                node.open(fresh=True)
            self.at(rng.random() * 0.1, node, self._first_record, node, self.record)

    def _first_record(self, node: Node, record: Record) -> None:
        node.learn(record, 0)
        if len(self.records) > 1:  # it changed before this node began to watch
            self._watched(node)

    # -- time -------------------------------------------------------------------------------------
    def at(self, delay: float, node: Node | None, action: Any, *arguments: Any) -> None:
        """Events of a node that is down are lost, those of one that is stopped come late."""
        self.scheduled += 1
        heappush(self.agenda, (self.now + delay, self.scheduled, node, action, arguments))

    def run(self) -> World:
        dice = self.dice
        for rate, fault in (
            (dice.partition, self._partition),
            (dice.metadata_cut, self._cut_metadata),
            (dice.crash * dice.nodes / 3, self._crash),
            (dice.pause, self._pause),
            (dice.full, self._fill),
            (dice.depart, self._depart),
            (dice.suspicion, self._suspect),
            (dice.membership, self._change_members),
            (dice.checkpoint * dice.nodes, self._checkpoint),
            (dice.write, self._client_writes),
            (dice.read, self._client_reads),
        ):
            if rate:
                self._every(rate, fault)
        self.at(1.0, None, self._watch_over)
        self._until(dice.faulty_s)
        self._heal()
        deadline = self.now + HEALING_S_MAX
        while not self._healed():
            if self.now >= deadline:
                raise Violation(f"not healed after {HEALING_S_MAX} s: {self._state()}")
            self._until(self.now + 0.5)
        self.oracle.bounded(self.core)
        return self

    def _until(self, end: float) -> None:
        agenda = self.agenda
        while agenda and agenda[0][0] <= end:
            when, number, node, action, arguments = heappop(agenda)
            self.now = when
            self.events += 1
            if self.events > EVENTS_MAX:
                raise Violation(f"more than {EVENTS_MAX} events: a storm")
            if node is not None:
                if not node.running:
                    continue
                if node.paused_until > when:
                    heappush(agenda, (node.paused_until, number, node, action, arguments))
                    continue
            action(*arguments)
        self.now = end

    def _every(self, rate: float, action: Any) -> None:
        self.at(self.rng.expovariate(rate), None, self._again, rate, action)

    def _again(self, rate: float, action: Any) -> None:
        if self.faulty or action in (self._client_writes, self._client_reads):
            action()
            self._every(rate if self.faulty else 2.0, action)

    def fsync_s(self, node: Node) -> float:
        rng, dice = self.rng, self.dice
        if not self.faulty:
            return 0.002
        if dice.stall and rng.random() < dice.stall:
            return dice.stall_s * rng.random()
        return dice.fsync_s * (0.2 + rng.random())

    # -- the network ------------------------------------------------------------------------------
    def send(self, node: Node, to: str, message: Any) -> None:
        if message.__class__.__name__ in ("Append", "Probe", "NeedFiles"):
            self.oracle.speaks(node, message.term)
        rng, dice, link = self.rng, self.dice, (node.name, to)
        if not self.faulty:
            self.at(0.002, self.nodes[to], self.deliver, to, node.name, message)
            return
        if self.blocked.get(link, 0.0) > self.now:
            return
        if dice.loss and rng.random() < dice.loss:
            return
        if dice.duplication and message.__class__.__name__ == "NeedFiles":
            late = 15.0 * rng.random()  # a copy, when its time is long over: the worst one to obey
            self.at(late, self.nodes[to], self.deliver, to, node.name, message)
        for _ in range(2 if dice.duplication and rng.random() < dice.duplication else 1):
            delay = dice.delay_s * (0.5 + rng.random())
            if dice.straggler and rng.random() < dice.straggler:
                delay += dice.straggler_s * rng.random()
            if dice.ordered:
                arrival = max(self.now + delay, self.arrives.get(link, 0.0))
                self.arrives[link] = arrival
                delay = arrival - self.now
            self.at(delay, self.nodes[to], self.deliver, to, node.name, message)

    def deliver(self, to: str, sender: str, message: Any) -> None:
        node = self.nodes[to]
        if node.replica is not None:
            node.feed(self.core.Received(sender, message))

    # -- the metadata store -----------------------------------------------------------------------
    def _metadata_s(self) -> float:
        if not self.faulty:
            return 0.005
        return self.dice.metadata_delay_s * self.rng.random() ** 2 + 0.001

    def _reaches_metadata(self, node: Node) -> bool:
        return self.blocked.get((node.name, ""), 0.0) <= self.now

    def swap(self, base: Record, new: Record) -> bool:
        """The compare-and-swap itself, at the store."""
        if base.config.revision != self.record.config.revision:
            return False
        config = replace(new.config, revision=base.config.revision + 1)
        self.record = Record(config, new.leaving)
        self.records.append(self.record)
        if self.story is not None:
            self.tell(f"record {config.revision}: {_brief(config)}")
        self.oracle.recorded(self.record)
        for node in self.nodes.values():
            self.at(self._metadata_s(), node, self._watched, node)
        return True

    def _watched(self, node: Node) -> None:
        if node.seen < 0:
            return  # its first read is on the way
        if not self._reaches_metadata(node):
            self.at(0.5, node, self._watched, node)
            return
        known = len(self.records) - 1
        skips = self.faulty and self.rng.random() < self.dice.watch_skips
        for number in range(known if skips else node.seen + 1, known + 1):
            node.learn(self.records[number], number)

    def read_record(self, node: Node, boot: int) -> None:
        """A linearizable read; the answer may arrive late."""
        self.at(self._metadata_s(), node, self._read, node, boot)

    def _read(self, node: Node, boot: int) -> None:
        if node.boots != boot:
            return
        if not self._reaches_metadata(node):
            self.at(0.3, node, self._read, node, boot)
            return
        number = len(self.records) - 1
        self.at(self._metadata_s(), node, self._was_read, node, boot, self.record, number)

    def _was_read(self, node: Node, boot: int, record: Record, number: int) -> None:
        if node.boots == boot:
            node.learn(record, number)
            self.at(self._metadata_s(), node, self._watched, node)

    def propose(self, node: Node, replica: Any, config: Any) -> None:
        base = self.records[config.revision - 1]
        self._try_swap(node, replica, base, Record(config, base.leaving))

    def _try_swap(self, node: Node, replica: Any, base: Record, new: Record) -> None:
        """Again and again until it is known whether it happened: the record has moved on."""
        if node.replica is not replica:
            return
        if self._reaches_metadata(node):
            # It may arrive after the process died, or after it stopped waiting.
            self.at(self._metadata_s(), None, self._swap_arrives, node, replica, base, new)
        else:
            self.at(0.3, node, self._try_swap, node, replica, base, new)

    def _swap_arrives(self, node: Node, replica: Any, base: Record, new: Record) -> None:
        self.swap(base, new)
        lost = self.faulty and self.rng.random() < self.dice.cas_lost
        if lost or not self._reaches_metadata(node):
            self.at(0.5, node, self._try_swap, node, replica, base, new)
            return
        self.at(self._metadata_s(), node, self._settled, node, replica, self.record)

    def _settled(self, node: Node, replica: Any, record: Record) -> None:
        if node.replica is replica:
            node.feed(self.core.Settled(record.config))

    def leave(self, node: Node) -> None:
        """The node deleted its data and takes itself out of `leaving`, until that is done."""
        record = self.record
        if node.name not in record.leaving:
            return
        if self._reaches_metadata(node):
            self.at(self._metadata_s(), None, self._left, node)
        self.at(0.5, node, self.leave, node)

    def _left(self, node: Node) -> None:
        record = self.record
        if node.name in record.leaving and not node.disk.holds:
            self.swap(record, Record(record.config, record.leaving - {node.name}))

    # -- files ------------------------------------------------------------------------------------
    def fetch(self, node: Node, replica: Any, source: str) -> None:
        rng = self.rng
        self.tell(f"{node.name} fetches files of {source}")
        took = 0.1 + (rng.choice((0.1, 1.0, 5.0, 20.0)) * rng.random() if self.faulty else 0.1)
        checkpoint = self.nodes[source].disk
        log, upto = checkpoint.log[: checkpoint.checkpoint], checkpoint.checkpoint
        good = self.nodes[source].running and not (self.faulty and rng.random() < 0.2)
        self.at(took, node, self._fetched, node, replica, log if good else None, upto)

    def _fetched(self, node: Node, replica: Any, log: list[Any] | None, upto: int) -> None:
        if node.replica is not replica:
            return
        if log is not None:
            node.disk = Disk(log, base=upto, checkpoint=upto, holds=True)
            self.tell(f"{node.name} has the files up to {upto}")
            if node.name in self.record.in_sync:
                self.oracle.recorded(self.record)
        else:
            node._tear()
        node.open()
        node.reread()

    # -- the monitor ------------------------------------------------------------------------------
    def _watch_over(self) -> None:
        """Once a second: promote instead of a dead primary or one that is about to stop, add and
        remove replicas."""
        self.at(1.0, None, self._watch_over)
        record, config = self.record, self.record.config
        if not self.nodes[config.primary].running and self.rng.random() < 0.5:
            alive = [n for n in sorted(config.in_sync) if self.nodes[n].running]
            if alive:
                self._promote(self.rng.choice(alive))
            return
        if config.primary in self.departing and (stay := sorted(config.in_sync - self.departing)):
            self._promote(self.rng.choice(stay))
            return
        free = sorted(self.nodes.keys() - config.members - record.leaving - self.departing)
        wanted = self.dice.copies if self.faulty else self.dice.nodes
        if free and len(config.members) < wanted and (not self.faulty or self.rng.random() < 0.3):
            stale = [name for name in free if self.nodes[name].disk.holds]
            self._join(self.rng.choice(stale or free))

    def _promote(self, name: str) -> None:
        config = self.record.config
        self._later_swap(
            Record(
                replace(
                    config,
                    term=config.term + 1,
                    primary=name,
                    in_sync=config.in_sync - {config.primary} | {name},
                ),
                self.record.leaving,
            )
        )

    def _join(self, name: str) -> None:
        config = replace(self.record.config, joining=self.record.config.joining | {name})
        self._later_swap(Record(config, self.record.leaving))

    def _later_swap(self, new: Record) -> None:
        self.at(self._metadata_s(), None, self.swap, self.record, new)

    # -- faults -----------------------------------------------------------------------------------
    def _any(self) -> Node:
        return self.nodes[self.rng.choice(list(self.nodes))]

    def _some_s(self) -> float:
        return self.rng.choice((0.5, 2.0, 5.0, 12.0)) * self.rng.random()

    def _partition(self) -> None:
        """One link in one direction, a node from all others, or one half from the other."""
        rng, names = self.rng, list(self.nodes)
        rng.shuffle(names)
        until, kind = self.now + self._some_s(), rng.random()
        if kind < 0.4:
            pairs = [(names[0], names[1])]
        elif kind < 0.7:
            pairs = [(names[0], other) for other in names[1:]]
            if rng.random() < 0.5:
                pairs = [(b, a) for a, b in pairs]
        else:
            half = rng.randint(1, len(names) - 1)
            pairs = [(a, b) for a in names[:half] for b in names[half:]]
            pairs += [(b, a) for a, b in pairs]
        if rng.random() < 0.3:
            pairs.append((names[0], ""))
        for pair in pairs:
            self.blocked[pair] = until
        self.tell(f"cut for {until - self.now:.1f} s: {pairs}")

    def _cut_metadata(self) -> None:
        node = self._any()
        self.blocked[node.name, ""] = self.now + self._some_s()
        self.tell(f"{node.name} is cut from the metadata store")

    def _crash(self) -> None:
        victims = [self._any()]
        if self.rng.random() < 0.1:
            victims = list(self.nodes.values())
        elif self.rng.random() < 0.4:
            victims = [self.nodes[self.record.primary]]
        for node in victims:
            if node.running:
                node.crash()
                self.at(self.dice.down_s * self.rng.random(), None, self._boot, node)

    def _boot(self, node: Node) -> None:
        if not node.running:
            self.tell(f"{node.name} starts")
            self._say_departing(self.departing - {node.name})
            node.boot()

    def _depart(self) -> None:
        """A node is told to stop. It says so, and stops a while later, ready or not."""
        node = self._any() if self.rng.random() < 0.4 else self.nodes[self.record.primary]
        if node.running and node.name not in self.departing:
            self.tell(f"{node.name} is about to stop")
            self._say_departing(self.departing | {node.name})
            self.at(self.dice.depart_s * self.rng.random(), None, self._stop, node)

    def _say_departing(self, nodes: frozenset[str]) -> None:
        if nodes != self.departing:
            self.departing = nodes
            for node in self.nodes.values():
                self.at(self._metadata_s(), node, node.told_departing)

    def _stop(self, node: Node) -> None:
        if node.running:
            node.crash()
        self.at(self.dice.down_s * self.rng.random(), None, self._boot, node)

    def _pause(self) -> None:
        node = self._any() if self.rng.random() < 0.5 else self.nodes[self.record.primary]
        node.paused_until = self.now + self.dice.pause_s * self.rng.random()
        self.tell(f"{node.name} is stopped for {node.paused_until - self.now:.1f} s")

    def _fill(self) -> None:
        self._any().full_until = self.now + self.dice.full_s * self.rng.random()

    def _checkpoint(self) -> None:
        self._any().checkpoint()

    def _suspect(self) -> None:
        """Promote another while the primary lives, which may be cut off just then: from everybody,
        only from hearing them, or only from the metadata store."""
        rng, primary = self.rng, self.record.primary
        others = sorted(self.record.in_sync - {primary})
        if not others:
            return
        self._promote(rng.choice(others))
        cut, until = rng.choice(("", "", "store", "in", "both", "both")), self.now + self._some_s()
        for other in self.nodes if cut in ("in", "both") else ():
            self.blocked[other, primary] = until
            if cut == "both":
                self.blocked[primary, other] = until
        if cut:
            self.blocked[primary, ""] = until
            self.tell(f"{primary} is cut off ({cut}) for {until - self.now:.1f} s")

    def _change_members(self) -> None:
        """Join whoever is free, take back a joining one, have a replica removed."""
        record, rng = self.record, self.rng
        config = record.config
        free = sorted(self.nodes.keys() - config.members - record.leaving)
        if config.joining and rng.random() < 0.3:
            gone = rng.choice(sorted(config.joining))
            config = replace(config, joining=config.joining - {gone})
            leaving = record.leaving | {gone} if rng.random() < 0.6 else record.leaving
            self._later_swap(Record(config, leaving))
        elif free and rng.random() < 0.7:
            self._join(rng.choice(free))
        elif free:
            self._later_swap(Record(config, record.leaving | {rng.choice(free)}))

    # -- clients ----------------------------------------------------------------------------------
    def _client_writes(self) -> None:
        rng, dice = self.rng, self.dice
        coordinator, data = rng.randrange(2), []
        for _ in range(rng.randint(1, dice.entries_max)):
            self.written += 1
            padding = b"." * rng.randint(0, dice.bytes_max)
            data.append(b"%d%s" % (self.written, padding))
        newest = len(self.records) - 1  # the coordinator's map of shards may be a little old
        known = self.records[max(0, newest - rng.choice((0, 0, 0, 1, 2)))]
        node = self.nodes[known.primary]
        delay = dice.delay_s * rng.random() if self.faulty else 0.001
        self.at(delay, node, node.submit, tuple(data), coordinator)

    def answer(self, coordinator: int, sequence: int) -> None:
        seen = self.oracle.seen_by
        seen[coordinator] = max(seen.get(coordinator, 0), sequence)

    def _client_reads(self) -> None:
        rng = self.rng
        newest = len(self.records) - 1
        known = self.records[max(0, newest - rng.choice((0, 0, 1, 2)))]
        node = self.nodes[rng.choice(sorted(known.in_sync))]
        coordinator = rng.randrange(2)
        self.at(0.001, node, self._read_at, node, coordinator)

    def _read_at(self, node: Node, coordinator: int) -> None:
        """Answered only where as much is applied as this coordinator has seen."""
        if node.replica is not None and node.applied >= self.oracle.seen_by.get(coordinator, 0):
            self.oracle.read(coordinator, node.applied)

    # -- healing ----------------------------------------------------------------------------------
    def _heal(self) -> None:
        self.tell("the faults stop")
        self.faulty = False
        self.blocked.clear()
        self._say_departing(frozenset())
        for node in self.nodes.values():
            node.full_until = 0.0
            node.paused_until = min(node.paused_until, self.now)
            self._boot(node)
        self._every(2.0, self._client_writes)
        self.acks_then = self.oracle.acks

    def _healed(self) -> bool:
        config, history = self.record.config, self.oracle.history
        if len(config.in_sync) < len(self.nodes) or self.oracle.acks <= self.acks_then:
            return False
        for node in self.nodes.values():
            replica = node.replica
            if replica is None or replica.committed != len(history) or replica.last != len(history):
                return False
            if node.disk.log != history:
                return False
        return True

    def _state(self) -> str:
        lines = [f"record {_brief(self.record.config)} leaving {sorted(self.record.leaving)}"]
        for node in self.nodes.values():
            if (replica := node.replica) is not None:
                lines.append(
                    f"{node.name} {replica.role} term {replica.term} committed {replica.committed} "
                    f"durable {replica.durable} last {replica.last}"
                )
        return "; ".join(lines) + f"; history {len(self.oracle.history)}"

    # -- the story --------------------------------------------------------------------------------
    def tell(self, what: str) -> None:
        if self.story is not None:
            self.story.append(f"{self.now:8.3f}  {what}")

    def tell_event(self, node: Node, event: Any) -> None:
        name = event.__class__.__name__
        if name == "Tick":
            return
        if name == "Received":
            self.tell(f"{node.name} <- {event.sender}: {_short(event.message)}")
        elif name in ("Configured", "Settled"):
            self.tell(f"{node.name} {name} {_brief(event.config)}")
        else:
            self.tell(f"{node.name} {_short(event)}")


def _brief(config: Any) -> str:
    return (
        f"r{config.revision} term {config.term} primary {config.primary} "
        f"in sync {sorted(config.in_sync)} joining {sorted(config.joining)}"
    )


def _short(thing: Any) -> str:
    parts = []
    for name in thing.__dataclass_fields__:
        value = getattr(thing, name)
        if name == "entries":
            spans = [f"{e.sequence}@{e.term}" for e in value or ()]
            value = f"[{spans[0]}..{spans[-1]}]" if spans else "[]" if value is not None else None
        elif name == "data":
            value = len(value)
        elif isinstance(value, float):
            value = round(value, 3)
        parts.append(f"{name}={value}")
    return f"{thing.__class__.__name__}({', '.join(parts)})"
