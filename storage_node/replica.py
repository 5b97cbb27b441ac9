"""One replica of one shard: who may write, what is on every disk, what may be applied.

Primary-backup replication under a configuration that the metadata store holds (after PacificA,
Lin et al., MSR-TR-2008-25). Pure: events and the time in, effects out; no clock, disk, network or
dice. `storage_node/replication.py` carries the effects out; `tests/sim` breaks it on purpose.

    client ─Submit─▶ primary ─Persist─▶ disk           Persisted ┐  all of the in-sync set
                        └─────Append──▶ secondary ─▶ disk ─▶ Appended ┴▶ Commit ─▶ applied, answered

What it promises, as long as every member keeps what it fsynced:

1. An entry is committed when every in-sync replica has it on disk. A committed entry is never cut.
2. Only the holder of the highest term commits: the others refuse an older term, and a term has one
   primary in one incarnation (a primary that restarts takes a new term before it speaks).
3. The in-sync set is changed in the metadata store first. While a change is under way, the old and
   the new set must both hold an entry before it is committed.
4. A new primary holds every committed entry. It commits all that it inherited before it takes
   writes; the others cut what it does not have.
5. `strong_until`: until then no other primary can have committed anything, so a read here sees
   every write that anybody was told of. Rests on clocks whose *rates* differ by CLOCK_DRIFT at most.
   A primary that is replaced while it lives gives its lease back (Released), for its own term only.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import assert_never

from shoal.errors import must
from shoal.limits import MIB
from storage_node.replica_types import (
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
    Message,
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
    Send,
    Settled,
    Submit,
    TailRead,
    Tick,
    Timing,
)

__all__ = [
    "CLOCK_DRIFT",
    "Abandon",
    "Append",
    "Appended",
    "Commit",
    "Config",
    "Configured",
    "Cut",
    "Departing",
    "Effect",
    "Entry",
    "Event",
    "FetchFiles",
    "Message",
    "NeedFiles",
    "Persist",
    "PersistFailed",
    "Persisted",
    "Position",
    "Probe",
    "Propose",
    "ReadTail",
    "Received",
    "Refused",
    "Released",
    "Replica",
    "Send",
    "Settled",
    "Submit",
    "TailRead",
    "Tick",
    "Timing",
]

CLOCK_DRIFT = 0.05  # how much faster one node's clock may run than another's
APPEND_BYTES_MAX = 4 * MIB  # of one message; a larger single entry travels alone
RECENT_BYTES_MAX = 32 * MIB  # committed entries kept in memory for replicas that lag a little
WINDOW_ENTRIES_MAX = 4_096  # sent to a replica and not yet acknowledged by it
_EARLIER_LIFE = -1  # in place of a term that nobody remembers
EPOCHS_MAX = 64  # newest terms remembered; older ones lie under everybody's committed prefix


@dataclass(slots=True)
class _Peer:
    """What the primary knows of another member, in this term."""

    since: float  # what answers a message from before this moment was said in another life
    heard: float  # when it last answered
    acked: float  # when it last held everything, or made progress
    window: int  # entries that may be under way: 1 after a loss, doubled with each progress
    match: int = 0  # it holds our log up to here on its disk
    sent: int = 0
    rewound_at: float = float("-inf")  # when we last began to send anew from `match`
    told: int = 0  # the commit that it was told of
    sent_at: float = 0.0
    lease_from: float = float("-inf")  # our clock, when the newest message that it answered left
    incarnation: int | None = None
    aligned: bool = False  # it answered a Probe of this term: `match` is of this term
    reading: bool = False
    needs_files: bool = False


@dataclass(slots=True)
class _OnDisk:
    ticket: int
    upto: int  # what is durable once this ticket is done


class Replica:
    """node          this node's id
    incarnation   differs for each Replica that is made, in this process or another
    epochs        where each term begins in the log that was found on disk
    durable       its last sequence number; committed: the last one known to be committed
    tail          the entries committed + 1 .. durable
    fresh         nobody can have heard an earlier incarnation: this one made the replica, or there
                  is no other node
    now           seconds that never go back; only differences count
    """

    def __init__(
        self,
        node: str,
        *,
        incarnation: int,
        epochs: Sequence[tuple[int, int]] = (),
        durable: int = 0,
        committed: int = 0,
        tail: Iterable[Entry] = (),
        fresh: bool = False,
        now: float = 0.0,
        timing: Timing | None = None,
    ) -> None:
        self.node, self.incarnation, self.timing = node, incarnation, timing or Timing()
        self.epochs = list(epochs)
        self.last = self.durable = durable
        self.committed = committed
        self.recent: deque[Entry] = deque(tail)  # ends with `last`; begins where it begins
        self._recent_bytes = sum(len(entry.data) for entry in self.recent)
        self.term = self.epochs[-1][0] if self.epochs else 0
        self.config: Config | None = None
        self._fresh = fresh
        self._primary = False  # of self.term, in this incarnation
        self._needs_term = False  # primary by the record, but not in this incarnation or log
        self._verified = committed  # secondary: our log is the primary's up to here
        self._leader: str | None = None  # secondary: who spoke as primary of self.term
        self._told = 0  # secondary: the newest commit that it named
        self._echo = float("-inf")
        # Until when the primary of a term may answer strong reads, because we answered it. An earlier
        # incarnation may have answered one just before it died: nobody can give that back.
        self._grants: dict[int, float] = {}
        if not fresh:
            self._grants[_EARLIER_LIFE] = now + self.timing.lease_s * (1 + CLOCK_DRIFT)
        self._departing: frozenset[str] = frozenset()
        self._fetching = False  # our part is over, see FetchFiles
        self._inherited = 0  # primary: `last` when its term began
        self._shown = 0  # primary: the last entry that anybody else may have
        self._peers: dict[str, _Peer] = {}
        self._sent_away: set[int] = (
            set()
        )  # incarnations that were told, in this term, to fetch files
        self._proposal: Config | None = None
        self._tickets: deque[_OnDisk] = deque()
        self._ticket = 0
        self._ticked = now
        must(durable >= committed, "committed past the end of the log")
        must(len(self.recent) == durable - committed, "the tail does not reach from commit to end")

    # -- questions --------------------------------------------------------------------------------
    @property
    def is_primary(self) -> bool:
        return self._primary

    @property
    def role(self) -> str:
        if self._primary:
            return "primary"
        config = self.config
        return "joining" if config is not None and self.node in config.joining else "secondary"

    def refusal(self, now: float) -> str | None:
        """Why a write cannot be taken now; None: it can. "not primary" is one of the reasons."""
        config = self.config
        if not self._primary or config is None:
            return "not primary"
        if self.committed < self._inherited or now < self._granted_until:
            return "this replica became primary a moment ago and is not ready yet"
        if self.node in self._departing and len(config.in_sync) > 1:
            return "this node is being stopped, and another replica is to take over"
        if len(config.in_sync) < config.writers_min:
            return (
                f"{len(config.in_sync)} of the replicas are in sync and "
                f"write_consistency_factor asks for {config.writers_min}"
            )
        return None

    @property
    def strong_until(self) -> float:
        """While now < this, a read of everything committed here sees every acknowledged write."""
        if not self._primary or self.committed < self._inherited:
            return float("-inf")
        others = self._waited_for() - {self.node}
        return min(
            (self._peers[peer].lease_from + self.timing.lease_s for peer in others),
            default=float("inf"),
        )

    @property
    def inherited(self) -> int:
        """Primary: the last entry of the terms before its own. Strong reads, and writes that ask
        about what is there, must wait until it is applied: an earlier primary answered for it."""
        return self._inherited

    @property
    def _granted_until(self) -> float:
        """Before, a primary of an earlier term may still answer strong reads."""
        return max(self._grants.values(), default=float("-inf"))

    def match_of(self, node: str) -> int | None:
        """Primary: up to where that member holds the log, as far as known."""
        peer = self._peers.get(node)
        return peer.match if peer is not None and peer.aligned else None

    def term_at(self, sequence: int) -> int:
        """The term of an entry of our log; -1 when no longer known; 0 before the first."""
        if sequence == 0:
            return 0
        # Everything after `committed` is in memory: however many terms it spans, none is forgotten.
        if self.recent and self.recent[0].sequence <= sequence <= self.last:
            return self.recent[sequence - self.recent[0].sequence].term
        found = bisect_right(self.epochs, sequence, key=lambda epoch: epoch[1]) - 1
        return self.epochs[found][0] if found >= 0 else -1

    # -- the one entry point ----------------------------------------------------------------------
    def step(self, event: Event, now: float) -> list[Effect]:
        match event:
            case Configured(config):
                return self._on_configured(config, now)
            case Submit(data):
                return self._on_submit(data, now)
            case Persisted(ticket):
                return self._on_persisted(ticket, now)
            case PersistFailed(ticket):
                return self._on_persist_failed(ticket, now)
            case Received(sender, message):
                return self._on_message(sender, message, now)
            case Settled(config):
                return self._on_configured(config, now)
            case TailRead(to, first, entries):
                return self._on_tail(to, first, entries, now)
            case Departing(nodes):
                self._departing = nodes
                return self._shrink(now) if self._primary else []
            case Tick():
                return self._on_tick(now)
            case _:
                assert_never(event)

    # -- configuration ----------------------------------------------------------------------------
    def _on_configured(self, config: Config, now: float) -> list[Effect]:
        if config.term < self.term:
            return []  # read before what we heard since from a newer primary
        if self.config is not None and config.revision <= self.config.revision:
            return []
        first = self.config is None
        self.config = config
        # Whatever was proposed went out on an older revision: it is in this record, or it can no
        # longer happen. Settled cannot say that by itself: it may be about an earlier proposal.
        self._proposal = None
        if self._primary and config.term == self.term:
            return self._members_changed(now)
        effects: list[Effect] = []
        if config.term > self.term:
            effects += self._resign(now)
            self.term, self._needs_term = config.term, False
        elif not first and not self._needs_term:
            return []  # a secondary that heard from its primary before it saw the record
        if config.primary != self.node:
            return effects
        if self._needs_term or (first and not self._fresh):
            # An earlier incarnation may have spoken in this term and sent what it did not keep.
            self._needs_term = True
            return effects + self._propose(replace(config, term=config.term + 1))
        self._primary, self._fresh = True, False
        self._inherited = self.last
        # Others have what we inherited, and what they hold is counted by its number: if our disk
        # does not take it, these numbers cannot be given to other entries in this term.
        self._shown = max(self._shown, self.last)
        return effects + self._members_changed(now)

    def _resign(self, now: float) -> list[Effect]:
        """Another term begins: what was said in the old one counts no more."""
        was_primary, peers = self._primary, sorted(self._peers)
        self._primary = False
        self._peers.clear()
        self._sent_away.clear()
        self._proposal = None
        self._verified = self.committed
        self._leader, self._told, self._echo = None, 0, float("-inf")
        effects: list[Effect] = [Abandon(self.committed)] if was_primary else []
        if was_primary and now >= self._granted_until:
            # From here on this node answers no strong read in its term, in this life or another. One
            # that still waits gives nothing back: others may wait for an older lease through its own.
            effects += (Send(peer, Released(self.term)) for peer in peers)
        return effects

    def _members_changed(self, now: float) -> list[Effect]:
        must(self.config is not None, "a primary without a configuration")
        assert self.config is not None
        for gone in self._peers.keys() - (self.config.members | self._waited_for()):
            del self._peers[gone]
        effects: list[Effect] = []
        for node in sorted(self.config.members - {self.node}):
            # One that joins may have left and come back empty between two records that we saw.
            if node not in self._peers or node in self.config.joining:
                self._peers[node] = _Peer(
                    since=now, heard=now, acked=now, window=WINDOW_ENTRIES_MAX
                )
                effects += self._probe(node, now)
        return effects + self._advance(now)

    def _propose(self, config: Config) -> list[Effect]:
        if self._proposal is not None:
            return []
        self._proposal = config
        return [Propose(config)]

    def _waited_for(self) -> frozenset[str]:
        """Whose acknowledgement a commit needs: the in-sync set, and the proposed one as well while
        nobody knows which of the two holds."""
        if self.config is None:
            return frozenset()
        proposed = frozenset() if self._proposal is None else self._proposal.in_sync
        return self.config.in_sync | proposed

    # -- writing ----------------------------------------------------------------------------------
    def _on_submit(self, data: tuple[bytes, ...], now: float) -> list[Effect]:
        must(self.refusal(now) is None, "a write was submitted that had to be refused")
        first = self.last + 1
        entries = tuple(Entry(first + i, self.term, piece) for i, piece in enumerate(data))
        effects = self._extend(entries)
        # To the others' disks while it goes to ours: an entry that only they keep after a crash
        # belongs to a term that this node will not speak in again.
        for node in sorted(self._peers):
            effects += self._pump(node, now)
        return effects

    def _extend(self, entries: tuple[Entry, ...]) -> list[Effect]:
        """Put entries at the end of the log."""
        for entry in entries:
            must(entry.sequence == self.last + 1, "an entry does not follow the one before")
            must(entry.term >= self.term_at(self.last), "terms never fall along a log")
            if entry.term != (self.epochs[-1][0] if self.epochs else 0):
                self.epochs.append((entry.term, entry.sequence))
                del self.epochs[:-EPOCHS_MAX]
            self.last = entry.sequence
            self.recent.append(entry)
            self._recent_bytes += len(entry.data)
        self._ticket += 1
        self._tickets.append(_OnDisk(self._ticket, self.last))
        return [Persist(self._ticket, entries)]

    def _cut(self, after: int) -> list[Effect]:
        must(after >= self.committed, "a committed entry would be cut")
        self._forget(after)
        self._ticket += 1
        for earlier in self._tickets:
            earlier.upto = min(earlier.upto, after)
        self._tickets.append(_OnDisk(self._ticket, min(self.last, after)))
        return [Cut(self._ticket, after)]

    def _forget(self, after: int) -> None:
        while self.recent and self.recent[-1].sequence > after:
            self._recent_bytes -= len(self.recent.pop().data)
        while self.epochs and self.epochs[-1][1] > after:
            self.epochs.pop()
        self.last = min(self.last, after)
        self.durable = min(self.durable, after)
        self._verified = min(self._verified, after)

    def _on_persisted(self, ticket: int, now: float) -> list[Effect]:
        while self._tickets and self._tickets[0].ticket <= ticket:
            self.durable = max(self.durable, self._tickets.popleft().upto)
        if self._primary:
            return self._advance(now)
        return self._acknowledge()

    def _on_persist_failed(self, ticket: int, now: float) -> list[Effect]:
        """Nothing after the durable prefix reached our disk."""
        self._tickets = deque(t for t in self._tickets if t.ticket < ticket)
        kept = max([self.durable, *(t.upto for t in self._tickets)])
        effects = self._cut(kept)  # in place of the Cuts that were given up with the rest
        if not self._primary:
            return effects  # it will be sent again; or the primary goes on without us
        must(self.config is not None, "a primary without a configuration")
        assert self.config is not None
        if kept >= self._shown:
            return [*effects, Abandon(kept, lost=True)]
        # Others may hold what we do not: this node does not speak in this term again.
        self._needs_term = True
        config = replace(self.config, term=self.term + 1)
        return [*effects, *self._resign(now), *self._propose(config)]

    # -- the primary and its members --------------------------------------------------------------
    def _probe(self, node: str, now: float) -> list[Effect]:
        peer = self._peers[node]
        peer.aligned, peer.sent_at = False, now
        return [Send(node, Probe(self.term, now))]

    def _pump(self, node: str, now: float) -> list[Effect]:
        """Send what the member lacks, as far as the window goes."""
        peer = self._peers[node]
        effects: list[Effect] = []
        while (
            peer.aligned
            and not peer.reading
            and not peer.needs_files
            and peer.sent < self.last
            and peer.sent - peer.match < peer.window
        ):
            if not self.recent or peer.sent + 1 < self.recent[0].sequence:
                peer.reading = True
                effects.append(ReadTail(node, peer.sent + 1))
                break
            effects.append(self._append(node, self._recent_from(peer.sent + 1), now))
        return effects

    def _recent_from(self, first: int) -> tuple[Entry, ...]:
        entries: list[Entry] = []
        size = 0
        for position in range(first - self.recent[0].sequence, len(self.recent)):
            entry = self.recent[position]
            size += len(entry.data)
            if entries and size > APPEND_BYTES_MAX:
                break
            entries.append(entry)
        return tuple(entries)

    def _append(self, node: str, entries: tuple[Entry, ...], now: float) -> Send:
        peer = self._peers[node]
        # A heartbeat names the last entry that was sent: who lacks it says so, and gets it again.
        prev = entries[0].sequence - 1 if entries else peer.sent
        if entries:
            peer.sent = entries[-1].sequence
            self._shown = max(self._shown, peer.sent)
        peer.sent_at, peer.told = now, self.committed
        prev_term = self.term_at(prev)
        return Send(node, Append(self.term, prev, prev_term, entries, self.committed, now))

    def _on_tail(
        self, to: str, first: int, entries: tuple[Entry, ...] | None, now: float
    ) -> list[Effect]:
        peer = self._peers.get(to)
        if not self._primary or peer is None or not peer.reading:
            return []
        peer.reading = False
        if entries is None:
            peer.needs_files = True
            return self._send_away(to)
        if not peer.aligned or peer.sent + 1 != first or not entries:
            return self._pump(to, now)
        if not all(self._is_ours(entry) for entry in entries):
            return self._pump(to, now)  # read in an earlier term, before they were cut
        return [self._append(to, entries, now), *self._pump(to, now)]

    def _is_ours(self, entry: Entry) -> bool:
        return entry.sequence <= self.last and self.term_at(entry.sequence) in (entry.term, -1)

    def _send_away(self, node: str) -> list[Effect]:
        """Tell it to fetch files. Not while it is in sync: it may hold more than the files, which it
        would give up. It makes no progress now, so `_shrink` takes it out of the set first. Nor may
        it come into sync afterwards, whatever it says: a copy of the order may be on its way yet."""
        peer = self._peers[node]
        if node in self._waited_for() or peer.incarnation is None:
            return []
        peer.aligned = False
        self._sent_away.add(peer.incarnation)
        return [Send(node, NeedFiles(self.term, peer.incarnation))]

    def _on_position(self, sender: str, m: Position, now: float) -> list[Effect]:
        peer = self._peers[sender]
        if m.incarnation in self._sent_away:
            peer.incarnation = m.incarnation
            return self._send_away(sender)
        agreed = self._agreed(m)
        if peer.incarnation != m.incarnation:
            peer.incarnation, peer.match, peer.needs_files = m.incarnation, agreed, False
        elif peer.aligned:
            if m.echo < peer.rewound_at:
                return []  # it lacked what has been sent again since
            # Each of many messages behind a lost one is answered so: stop them from starting as
            # many avalanches.
            peer.window = 1
        if peer.needs_files:
            return self._send_away(sender)
        peer.match = max(peer.match, agreed)
        peer.sent, peer.aligned, peer.rewound_at = peer.match, True, now
        if self.term_at(peer.sent) < 0:  # it could not check where such a message begins
            peer.sent = min(peer.sent, m.committed)
        return self._pump(sender, now) + self._advance(now)

    def _agreed(self, m: Position) -> int:
        """Up to where the member's durable log is the same as ours."""
        agreed = min(m.committed, self.last)  # the committed prefix is everybody's
        theirs = [*m.epochs, (0, m.durable + 1)]
        for (term, _), (_, following) in pairwise(theirs):
            # A term has one log. Whoever has an entry of it has all before that entry, too, even if
            # the beginning was trimmed and `epochs` says that the term began later.
            agreed = max(agreed, min(following - 1, self._end_of(term), m.durable))
        return agreed

    def _end_of(self, term: int) -> int:
        """Last sequence number of this term in our log; -1 when we have none."""
        for number, (mine, _) in enumerate(self.epochs):
            if mine == term:
                following = self.epochs[number + 1 :]
                return following[0][1] - 1 if following else self.last
        return -1

    def _advance(self, now: float) -> list[Effect]:
        """Commit what everybody holds who has to."""
        if not self._primary or now < self._granted_until:
            return []
        held = self.durable
        for node in self._waited_for() - {self.node}:
            peer = self._peers.get(node)
            held = min(held, peer.match if peer is not None and peer.aligned else 0)
        effects = self._commit(held)
        if effects:
            for node, peer in sorted(self._peers.items()):
                if peer.aligned and peer.sent >= self.last and peer.told < self.committed:
                    effects.append(self._append(node, (), now))  # nothing follows to carry it
        return effects

    def _commit(self, upto: int) -> list[Effect]:
        if upto <= self.committed:
            return []
        skip = self.committed + 1 - self.recent[0].sequence
        entries = tuple(self.recent[i] for i in range(skip, skip + upto - self.committed))
        must(entries[-1].sequence == upto, "committed entries are not in memory")
        self.committed = upto
        while self._recent_bytes > RECENT_BYTES_MAX and self.recent[0].sequence <= upto:
            self._recent_bytes -= len(self.recent.popleft().data)
        return [Commit(entries)]

    # -- messages ---------------------------------------------------------------------------------
    def _on_message(self, sender: str, message: Message, now: float) -> list[Effect]:
        if self.config is None or self._fetching:
            return []  # which terms are over is not known yet; or our part is
        if isinstance(message, Released):
            self._grants.pop(message.term, None)
            return self._advance(now)
        if message.term < self.term:
            asks = isinstance(message, Append | Probe)
            return [Send(sender, Refused(self.term))] if asks else []
        match message:
            case Append() | Probe() | NeedFiles():
                return self._on_primary_says(sender, message, now)
            case Refused():
                if message.term == self.term or not self._primary:
                    return []
                return self._resign(
                    now
                )  # who follows us is in the record, which we have yet to see
            case Appended() | Position():
                if message.term != self.term or not self._primary or sender not in self._peers:
                    return []
                peer = self._peers[sender]
                if message.echo < peer.since:
                    return []
                peer.heard = now
                peer.lease_from = max(peer.lease_from, message.echo)
                if isinstance(message, Position):
                    effects = self._on_position(sender, message, now)
                else:
                    effects = self._on_appended(sender, message, now)
                return effects + self._grow(now)
            case _:
                assert_never(message)

    def _on_appended(self, sender: str, m: Appended, now: float) -> list[Effect]:
        peer = self._peers[sender]
        if not peer.aligned:
            return []  # of an earlier time in this term; the Position is on its way
        if m.match > peer.match:
            peer.match, peer.acked, peer.needs_files = m.match, now, False
            peer.window = min(2 * peer.window, WINDOW_ENTRIES_MAX)
        peer.sent = max(peer.sent, peer.match)
        if peer.match == self.last:
            peer.acked = now
        return self._pump(sender, now) + self._advance(now)

    def _on_primary_says(
        self, sender: str, m: Append | Probe | NeedFiles, now: float
    ) -> list[Effect]:
        effects: list[Effect] = []
        if m.term > self.term:  # the metadata store will tell us too, later
            effects = self._resign(now)
            self.term = m.term
            self._grants = {term: until for term, until in self._grants.items() if until > now}
        must(not self._primary, "two primaries in one term")
        self._leader = sender
        if isinstance(m, NeedFiles):
            if m.incarnation != self.incarnation:
                return effects
            self._fetching = True
            return [*effects, FetchFiles(sender)]
        # Until then we take no part in another primary's commits: its lease rests on this.
        self._grants[m.term] = now + self.timing.lease_s * (1 + CLOCK_DRIFT)
        self._echo = max(self._echo, m.sent_at)
        if isinstance(m, Probe) or not self._has(m.prev, m.prev_term):
            position = Position(
                self.term,
                self.incarnation,
                self.durable,
                self.committed,
                tuple(e for e in self.epochs if e[1] <= self.durable),
                self._echo,
            )
            return [*effects, Send(sender, position)]
        return effects + self._on_append(m)

    def _has(self, prev: int, prev_term: int) -> bool:
        if prev <= max(self.committed, self._verified):
            return True  # what is known to be the same needs no comparison
        return prev <= self.last and self.term_at(prev) == prev_term

    def _on_append(self, m: Append) -> list[Effect]:
        effects: list[Effect] = []
        new = 0
        while new < len(m.entries) and (
            m.entries[new].sequence <= self.committed
            or (
                m.entries[new].sequence <= self.last
                and self.term_at(m.entries[new].sequence) == m.entries[new].term
            )
        ):
            new += 1
        if new < len(m.entries):
            # Only a different entry makes ours wrong: a late copy of an old message does not.
            if m.entries[new].sequence <= self.last:
                effects += self._cut(m.entries[new].sequence - 1)
            effects += self._extend(m.entries[new:])
        self._verified = max(self._verified, m.prev + len(m.entries))
        self._told = max(self._told, m.committed)
        effects += self._commit(min(m.committed, self._verified, self.durable))
        if new == len(m.entries):  # else when it is on disk
            effects += self._acknowledge()
        return effects

    def _acknowledge(self) -> list[Effect]:
        """Secondary: commit what became durable, and tell the primary what we hold."""
        effects = self._commit(min(self._told, self._verified, self.durable))
        match = min(self.durable, self._verified)
        if self._leader is not None:
            effects.append(Send(self._leader, Appended(self.term, match, self._echo)))
        return effects

    # -- time -------------------------------------------------------------------------------------
    def _on_tick(self, now: float) -> list[Effect]:
        if not self._primary:
            self._ticked = now
            return []
        effects: list[Effect] = []
        slept = now - self._ticked >= self.timing.resend_s  # stopped, or starved: not their fault
        self._ticked = now
        for node, peer in sorted(self._peers.items()):
            if slept:
                peer.heard = now
            if slept or (peer.match == self.last and peer.aligned):
                peer.acked = now
            quiet = now - peer.sent_at
            if not peer.aligned or peer.needs_files:
                if quiet >= self.timing.resend_s:
                    effects += self._probe(node, now)
            elif quiet >= self.timing.heartbeat_s:
                effects.append(self._append(node, (), now))
        return effects + self._advance(now) + self._shrink(now) + self._grow(now)

    def _shrink(self, now: float) -> list[Effect]:
        """Take replicas that fail or lag out of the in-sync set; and those that are about to stop, so
        that no write waits until they count as failed. For that alone no primary stays behind as the
        only one: when a whole cluster stops, each node is to have all when it starts again."""
        assert self.config is not None
        late = {
            node
            for node in self.config.in_sync - {self.node}
            if now - min(self._peers[node].heard, self._peers[node].acked)
            >= self.timing.replica_timeout_s
        }
        if self.node not in self._departing:
            left = self.config.in_sync - late - self._departing
            if len(left) > 1:
                late |= self.config.in_sync & self._departing
        if not late:
            return []
        return self._propose(replace(self.config, in_sync=self.config.in_sync - late))

    def _grow(self, now: float) -> list[Effect]:
        """Take joining replicas that hold all that is committed into the in-sync set."""
        assert self.config is not None
        there = {
            node
            for node in self.config.joining - self._departing
            if (peer := self._peers[node]).aligned
            and peer.match >= self.committed
            and self.last - peer.match <= WINDOW_ENTRIES_MAX
            and now - peer.heard < self.timing.resend_s
        }
        if not there or self.committed < self._inherited:
            return []
        return self._propose(
            replace(
                self.config,
                in_sync=self.config.in_sync | there,
                joining=self.config.joining - there,
            )
        )

    # -- for tests --------------------------------------------------------------------------------
    def check(self) -> None:
        """Raise InvariantError when the state contradicts itself."""
        must(0 <= self.committed <= self.durable <= self.last, "committed, durable, last")
        must(not self.recent or self.recent[-1].sequence == self.last, "memory ends with the log")
        must(all(a < b for a, b in pairwise(self.epochs)), "epochs ascend")
        must(not self._peers or self._primary, "only a primary has members")
