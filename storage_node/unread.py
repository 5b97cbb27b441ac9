"""What becomes of messages of other replicas that this node cannot read. Pure: the time is given.

Nodes of two versions may run side by side while a cluster is upgraded, and a newer one may say what
an older one does not know. Such a message is dropped, as if it had been lost on the way, and the
others go on. It must not be lost in silence: `Complaints` says when it is time for a line in the log,
`Unread` which replicas lately missed something, for their status.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal import limits
from shoal.storage_api import ShardKey

__all__ = ["Complaints", "Unread"]


@dataclass(slots=True)
class _Count:
    dropped: int = 0
    told_at_s: float = float("-inf")


class Complaints:
    """Counts dropped messages by peer. total: of all peers, since the start."""

    def __init__(self) -> None:
        self.total = 0
        self._peers: dict[str, _Count] = {}

    def dropped(self, peer: str, now_s: float) -> int | None:
        """One more of this peer. The number to tell people now; None: they were told less than
        limits.COMPLAINT_S ago."""
        self.total += 1
        if peer not in self._peers and len(self._peers) >= limits.COMPLAINT_PEERS_MAX:
            self._peers.clear()  # names that somebody makes up cost lines in the log, not memory
        count = self._peers.setdefault(peer, _Count())
        count.dropped += 1
        if now_s - count.told_at_s < limits.COMPLAINT_S:
            return None
        count.told_at_s = now_s
        return count.dropped


class Unread:
    """The last sender that a replica here could not read, for limits.COMPLAINT_S."""

    def __init__(self) -> None:
        self._last: dict[ShardKey, tuple[str, float]] = {}

    def note(self, shard: ShardKey, sender: str, now_s: float) -> None:
        """shard: one that is here, so that these are no more than there are shards."""
        self._last[shard] = (sender, now_s)

    def sender(self, shard: ShardKey, now_s: float) -> str:
        """ "" when everything could be read lately."""
        sender, at_s = self._last.get(shard, ("", 0.0))
        if sender and now_s - at_s >= limits.COMPLAINT_S:
            del self._last[shard]
            return ""
        return sender
