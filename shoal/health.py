"""The state of a server as the monitor last saw it: what health checks and the dashboard show.

green   everything serves, nothing waits
yellow  everything serves; segments wait for a merge or an index, or disk space is short
red     a shard has stopped, or the disk is full and writes are refused
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from shoal.storage_api import ShardInfo, ShardKey

__all__ = ["DiskSpace", "Health", "HealthReport", "ShardHealth", "worst"]


class Health(StrEnum):
    GREEN = "green"
    YELLOW = "yellow"
    RED = "red"


@dataclass(frozen=True, slots=True)
class DiskSpace:
    """Of the file system that holds the data folder. free_bytes: what this user may still write."""

    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class ShardHealth:
    """reason: a sentence for people when the state is not green. info: None when unreachable."""

    key: ShardKey
    collection: str
    state: Health
    reason: str | None
    info: ShardInfo | None


@dataclass(frozen=True, slots=True)
class HealthReport:
    """One look at everything.

    ready     requests are answered: the server has started and is not stopping. A stopped shard
              does not make the server unready; the other collections go on.
    writable  the disk has room for writes.
    reasons   sentences for people, worst first; empty when green.
    age_s     how long ago this was measured.
    """

    state: Health
    ready: bool
    writable: bool
    reasons: tuple[str, ...]
    shards: tuple[ShardHealth, ...]
    disk: DiskSpace | None
    age_s: float

    def of_collection(self, collection: str) -> Health:
        """The worst state of its shards; green when it has none."""
        return worst(shard.state for shard in self.shards if shard.collection == collection)


def worst(states: Iterable[Health]) -> Health:
    """Green when there are none."""
    return max(states, key=_SEVERITY.index, default=Health.GREEN)


_SEVERITY = (Health.GREEN, Health.YELLOW, Health.RED)
