"""How fresh a read must be: what a client may ask for, and the token that carries it. Pure.

    shoal-token: 7.0:1234,7.3:998        collection 7, shard 0, up to sequence number 1234; ...

A write answers with a token; a read that sends it back, through whichever coordinator, sees that
write. Tokens are opaque to clients: they keep the last one, or join several with commas. One
coordinator needs none for its own writes: it remembers what it saw acknowledged.

| `consistency` | means here |
|---|---|
| none, 1 | any replica in sync that has applied all that this coordinator (or the token) has seen |
| N from 2 on, `majority`, `quorum`, `all` | every write that anybody was told of before the read began |

The primary answers the second kind inside its lease: an acknowledged write is on *every* replica in
sync, so asking more of them would not show more. A number above the replication factor is refused:
there are not so many replicas to agree. `ordering` of writes needs no choice: all writes of a shard
go through its primary, one after the other, which is `strong`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from shoal.errors import BadRequest
from shoal.limits import SHARDS_PER_COLLECTION_MAX
from shoal.storage_api import Read, ShardKey

__all__ = ["ANY_READ", "TOKEN_BYTES_MAX", "format_token", "parse_token", "read_wanted"]

ANY_READ = Read()
TOKEN_BYTES_MAX = 8 * SHARDS_PER_COLLECTION_MAX * 32  # of several writes to all shards of one

_ENTRY = re.compile(r"([0-9]{1,18})\.([0-9]{1,9}):([0-9]{1,18})")


def format_token(seen: Mapping[ShardKey, int]) -> str:
    """Shard -> sequence number that was acknowledged, as text of ASCII."""
    return ",".join(f"{key.collection_id}.{key.shard}:{seen[key]}" for key in seen)


def parse_token(text: str) -> dict[ShardKey, int]:
    """The inverse; of a shard that stands twice the larger number. Raises BadRequest."""
    if len(text) > TOKEN_BYTES_MAX:
        raise BadRequest(
            f"Wrong input: a shoal-token may have {TOKEN_BYTES_MAX} bytes: send those of the last "
            "writes only"
        )
    seen: dict[ShardKey, int] = {}
    for part in text.split(","):
        match = _ENTRY.fullmatch(part.strip())
        if match is None:
            raise BadRequest(
                "Wrong input: this is no shoal-token: send back what a write answered with, as it is"
            )
        key, sequence = ShardKey(int(match[1]), int(match[2])), int(match[3])
        seen[key] = max(sequence, seen.get(key, 0))
    return seen


def read_wanted(consistency: str | int | None, token: str | None, replication_factor: int) -> Read:
    """consistency: as the client gave it, its form checked. replication_factor: the collection's.
    Raises BadRequest when there are fewer replicas than have to agree, or the token is none."""
    if consistency is None and token is None:
        return ANY_READ
    strong = consistency is not None and str(consistency) != "1"
    if strong and str(consistency).isdigit() and int(str(consistency)) > replication_factor:
        raise BadRequest(
            f"Wrong input: consistency {consistency} is more than the replication factor "
            f"{replication_factor} of this collection: ask for at most {replication_factor}, or "
            "`all`"
        )
    return Read(strong=strong, token={} if token is None else parse_token(token))
