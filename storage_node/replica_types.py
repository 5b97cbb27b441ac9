"""What a `Replica` is told, what it decides, and what replicas say to each other. Values only.

events    what happened, in         messages  between the replicas of a shard
effects   what to do, out           Config    the shard's record, as the core needs it
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "Abandon",
    "Append",
    "Appended",
    "Commit",
    "Config",
    "Configured",
    "Cut",
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
    "Send",
    "Settled",
    "Submit",
    "TailRead",
    "Tick",
    "Timing",
]


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. heartbeat_s: between messages to an idle replica. lease_s: how long a secondary's
    answer keeps the primary's strong reads alive. replica_timeout_s: silence, or an entry without
    acknowledgement, after which the primary takes a replica out of the in-sync set. resend_s: after
    which the primary asks a silent replica anew what it holds."""

    heartbeat_s: float = 0.5
    lease_s: float = 2.0
    replica_timeout_s: float = 3.0
    resend_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Entry:
    sequence: int
    term: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Config:
    """The shard's record in the metadata store, as of `revision`."""

    revision: int
    term: int
    primary: str
    in_sync: frozenset[str]
    joining: frozenset[str] = frozenset()
    writers_min: int = 1  # fewer replicas in sync than this, and writes are refused

    @property
    def members(self) -> frozenset[str]:
        return self.in_sync | self.joining


# -- messages between replicas --------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Append:
    """Entries prev + 1, … of the primary's log, whose entry `prev` is of `prev_term`. Without
    entries: a heartbeat. sent_at: the primary's clock, echoed; it counts for the lease."""

    term: int
    prev: int
    prev_term: int
    entries: tuple[Entry, ...]
    committed: int
    sent_at: float


@dataclass(frozen=True, slots=True)
class Appended:
    """The sender holds the primary's log up to `match` on disk. echo: the newest `sent_at` it saw."""

    term: int
    match: int
    echo: float


@dataclass(frozen=True, slots=True)
class Probe:
    """What do you hold? Answered by Position."""

    term: int
    sent_at: float


@dataclass(frozen=True, slots=True)
class Position:
    """durable: last sequence number on disk. epochs: (term, its first sequence number), ascending.
    incarnation: of the sender's process; a new one may hold less than the old one said."""

    term: int
    incarnation: int
    durable: int
    committed: int
    epochs: tuple[tuple[int, int], ...]
    echo: float


@dataclass(frozen=True, slots=True)
class Refused:
    """Your term is over: mine is `term`."""

    term: int


@dataclass(frozen=True, slots=True)
class NeedFiles:
    """The log no longer reaches back to where you are: fetch the files. incarnation: whom this is
    about; one that came after it has the files already."""

    term: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Released:
    """The sender was the primary of this term and answers no strong reads in it any more: what was
    granted to it, by answering it, no longer keeps a new primary waiting."""

    term: int


Message = Append | Appended | Probe | Position | Refused | NeedFiles | Released


# -- events ---------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Configured:
    """The shard's record was read, or changed. Older ones than the known are ignored. The first one
    must have been read, linearizably, after this Replica was made: it is what keeps a restarted one
    from following a primary whose term is over. Messages that come before it are ignored."""

    config: Config


@dataclass(frozen=True, slots=True)
class Submit:
    """New entries; only while `refusal()` is None."""

    data: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Persisted:
    """The Persist or Cut with this ticket, and all before it, are on disk."""

    ticket: int


@dataclass(frozen=True, slots=True)
class PersistFailed:
    """The Persist with this ticket left the disk as it was (no space), and so must all after it."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Received:
    sender: str
    message: Message


@dataclass(frozen=True, slots=True)
class Settled:
    """The outcome of Propose is known: this is the record now, of a later revision than the one that
    Propose named. (While the record is the same, the swap may still happen.)"""

    config: Config


@dataclass(frozen=True, slots=True)
class TailRead:
    """Answer to ReadTail: entries from `first` on, or None when the log no longer has them."""

    to: str
    first: int
    entries: tuple[Entry, ...] | None


@dataclass(frozen=True, slots=True)
class Departing:
    """These nodes are about to stop, perhaps this one among them. All that are known, each time."""

    nodes: frozenset[str]


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed. At least every heartbeat_s / 2."""


Event = (
    Configured
    | Submit
    | Persisted
    | PersistFailed
    | Received
    | Settled
    | TailRead
    | Departing
    | Tick
)


# -- effects --------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Persist:
    """Append to the log and fsync. Persist and Cut are carried out in the order of their tickets."""

    ticket: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Cut:
    """Remove every entry after `after` from the log: they were never committed."""

    ticket: int
    after: int


@dataclass(frozen=True, slots=True)
class Send:
    to: str
    message: Message


@dataclass(frozen=True, slots=True)
class Commit:
    """Apply these, in order, and answer who waits for them."""

    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Abandon:
    """No answer will come for the writes after `after` that wait for one. lost: they did not and
    will not happen; else nobody knows yet."""

    after: int
    lost: bool = False


@dataclass(frozen=True, slots=True)
class Propose:
    """Compare-and-swap the shard's record from `config.revision` to these values, until it is known
    whether that happened; then Settled."""

    config: Config


@dataclass(frozen=True, slots=True)
class ReadTail:
    """Read entries from `first` on from the log, at most APPEND_BYTES_MAX; then TailRead."""

    to: str
    first: int


@dataclass(frozen=True, slots=True)
class FetchFiles:
    """The log of `source` does not reach back to us: fetch its files. This Replica takes no part
    any more. Whether or not the files come, make another one of what the disk then holds, under a
    new incarnation."""

    source: str


Effect = Persist | Cut | Send | Commit | Abandon | Propose | ReadTail | FetchFiles
