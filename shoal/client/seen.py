"""The writes that a client has seen, so that its reads see them on any coordinator. Pure.

A token is a list of `shard:sequence number` (coordinator/freshness.py); this keeps the highest number
of each shard, by collection. A collection that was deleted and made again has shards of another,
higher id: what was seen of the old one is forgotten.
"""

from __future__ import annotations

__all__ = ["Seen"]


class Seen:
    def __init__(self) -> None:
        self._shards: dict[str, dict[str, int]] = {}  # collection -> "7.0" -> sequence number
        self._tokens: dict[str, str] = {}

    def token(self, collection: str) -> str:
        """For a read that must see what was remembered; "" when that is nothing."""
        return self._tokens.get(collection, "")

    def remember(self, collection: str, token: str) -> None:
        """Take over the token of a write. What is no token raises ValueError."""
        if not token:
            return
        seen = self._shards.get(collection, {})
        for part in token.split(","):
            shard, colon, number = part.strip().partition(":")
            owner, dot, _ = shard.partition(".")
            if not (colon and dot and owner.isdigit() and number.isdigit()):
                raise ValueError(f"{token!r} is no token of a write")
            seen = {s: n for s, n in seen.items() if int(s.partition(".")[0]) >= int(owner)}
            if not seen or int(next(iter(seen)).partition(".")[0]) == int(owner):
                seen[shard] = max(int(number), seen.get(shard, 0))
        self._shards[collection] = seen
        self._tokens[collection] = ",".join(f"{s}:{seen[s]}" for s in sorted(seen))

    def forget(self, collection: str) -> None:
        self._shards.pop(collection, None)
        self._tokens.pop(collection, None)
