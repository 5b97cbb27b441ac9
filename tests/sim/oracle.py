"""What must hold at every moment of a run, checked with the knowledge of the whole cluster.

The oracle sees every disk, every commit and the record in the metadata store at once, which no part
of the real cluster can.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .world import Node, World

__all__ = ["Oracle", "Violation"]


class Violation(AssertionError):
    """The core broke a promise."""


class Oracle:
    """history: the one committed log, as whoever committed first had it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.history: list[Any] = []
        self.extended_in = 0  # the newest term that added to the history
        self.acked = 0  # the highest sequence number that any client was told of
        self.acks = 0
        self.never: set[bytes] = set()  # told to the client as "did not and will not happen"
        self.speakers: dict[int, tuple[str, int]] = {}  # term -> who speaks as its primary
        self.seen_by: dict[int, int] = {}  # coordinator -> the newest that it saw
        self.strong_reads = self.reads = 0

    def must(self, holds: bool, what: str) -> None:
        if not holds:
            raise Violation(what)

    # -- what nodes do ----------------------------------------------------------------------------
    def committed(self, node: Node, replica: Any, entries: tuple[Any, ...]) -> None:
        history = self.history
        for entry in entries:
            sequence = entry.sequence
            self.must(sequence == node.applied + 1, f"{node.name} applies {sequence} out of order")
            node.applied = sequence
            if sequence <= len(history):
                known = history[sequence - 1]
                if known is not entry and known != entry:
                    raise Violation(
                        f"{node.name} commits another entry {sequence} than was committed"
                    )
            else:
                self._extend(node, replica, entry)

    def _extend(self, node: Node, replica: Any, entry: Any) -> None:
        self.must(
            replica.is_primary, f"{node.name} commits {entry.sequence} first, not as a primary"
        )
        self.must(
            replica.term >= self.extended_in,
            f"{node.name} acknowledges in term {replica.term} after term {self.extended_in} did",
        )
        self.extended_in = replica.term
        self.history.append(entry)
        if self.never:
            self.must(entry.data not in self.never, f"entry {entry.sequence} was said to be lost")
        for name in sorted(self.world.record.in_sync):
            self._holds(self.world.nodes[name], entry)
        for other in self.world.nodes.values():
            if other is not node and self._reads_strongly(other):
                raise Violation(f"{node.name} commits while {other.name} answers strong reads")

    def _holds(self, node: Node, entry: Any) -> None:
        log = node.disk.log
        self.must(
            len(log) >= entry.sequence and log[entry.sequence - 1] == entry,
            f"committed entry {entry.sequence} is not on the disk of {node.name}, which is in sync",
        )

    def _reads_strongly(self, node: Node) -> bool:
        replica = node.replica
        return replica is not None and replica.is_primary and node.clock() < replica.strong_until

    def stepped(self, node: Node, replica: Any) -> None:
        """After every event of a node."""
        replica.check()
        if replica.is_primary and node.clock() < replica.strong_until:
            self.strong_reads += 1
            self.must(
                replica.committed >= len(self.history),
                f"a strong read at {node.name} misses entries {replica.committed + 1} and on",
            )

    def answered(self, sequence: int, data: bytes) -> None:
        self.acks += 1
        self.acked = max(self.acked, sequence)
        self.must(data not in self.never, "a write that was refused is acknowledged")
        self.must(
            sequence <= len(self.history) and self.history[sequence - 1].data == data,
            f"write {sequence} is acknowledged and not committed",
        )

    def speaks(self, node: Node, term: int) -> None:
        me = (node.name, node.incarnation)
        first = self.speakers.setdefault(term, me)
        if first != me:
            raise Violation(f"{me} speaks as primary of term {term}, and so did {first}")

    def removed(self, node: Node, entries: list[Any]) -> None:
        """Entries leave the disk of a node by a Cut."""
        for entry in entries:
            known = self.history[entry.sequence - 1 : entry.sequence]
            self.must(known != [entry], f"{node.name} cuts committed entry {entry.sequence}")

    # -- what the record says ---------------------------------------------------------------------
    def recorded(self, record: Any) -> None:
        """Whoever is in sync may be promoted at any moment: it must hold all that is committed."""
        self.must(bool(record.in_sync), "the in-sync set is empty")
        self.must(record.primary in record.in_sync, "the primary is not in sync")
        for name in sorted(record.in_sync):
            node = self.world.nodes[name]
            log = node.disk.log
            if len(log) < len(self.history):
                raise Violation(
                    f"{name} comes into sync with {len(log)} of {len(self.history)} entries"
                )
            self.must(
                log[: len(self.history)] == self.history, f"{name} is in sync with another log"
            )

    # -- what coordinators see --------------------------------------------------------------------
    def read(self, coordinator: int, applied: int) -> None:
        self.reads += 1
        self.must(
            applied >= self.seen_by.get(coordinator, 0),
            f"reads through coordinator {coordinator} went back to {applied}",
        )
        self.seen_by[coordinator] = applied

    # -- bounds -----------------------------------------------------------------------------------
    def bounded(self, core: Any) -> None:
        for node in self.world.nodes.values():
            replica = node.replica
            if replica is None:
                continue
            kept = 0
            for entry in replica.recent:
                if entry.sequence > replica.committed:
                    break
                kept += len(entry.data)
            self.must(kept <= core.RECENT_BYTES_MAX, f"{node.name} keeps {kept} bytes in memory")
            self.must(len(replica.epochs) <= core.EPOCHS_MAX, f"{node.name} keeps its terms")
            for peer in replica._peers.values():
                ahead = peer.sent - peer.match
                self.must(ahead < 2 * core.WINDOW_ENTRIES_MAX + 64, f"{node.name} is {ahead} ahead")
