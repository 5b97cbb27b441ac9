"""What a server's state is, given what was seen of it. Pure: no clock, no disk, no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.health import DiskSpace, Health, HealthReport, ShardHealth, worst
from shoal.storage_api import ShardInfo, ShardKey

__all__ = ["DISK_SHORT_FACTOR", "Seen", "assess", "assess_shard"]

DISK_SHORT_FACTOR = 10  # warn when less than this many times the refusal bound is free


@dataclass(frozen=True, slots=True)
class Seen:
    """What one look at one shard gave: its info, or the text of the error."""

    key: ShardKey
    collection: str
    info: ShardInfo | None
    error: str | None = None


def assess(
    seen: Sequence[Seen], disk: DiskSpace | None, *, disk_free_bytes_min: int | None, ready: bool
) -> HealthReport:
    """The report on everything that was seen; its age is 0.

    disk                 None: could not be read, which is a reason for yellow.
    disk_free_bytes_min  below it the storage refuses writes; None: no data of ours is on a disk here.
    """
    shards = tuple(assess_shard(look) for look in seen)
    disk_state, disk_reason = _assess_disk(disk, disk_free_bytes_min)
    findings = [(shard.state, shard.reason) for shard in shards]
    findings.append((disk_state, disk_reason))
    reasons = [
        reason
        for state in (Health.RED, Health.YELLOW)
        for found, reason in findings
        if found is state and reason is not None
    ]
    return HealthReport(
        state=worst(state for state, _ in findings),
        ready=ready,
        writable=disk_state is not Health.RED,
        reasons=tuple(reasons),
        shards=shards,
        disk=disk,
        age_s=0.0,
    )


def assess_shard(seen: Seen) -> ShardHealth:
    where = f"Shard {seen.key.shard} of collection {seen.collection}"
    info = seen.info
    if info is None:
        state, reason = Health.RED, f"{where} does not answer: {seen.error}"
    elif info.stopped is not None:
        state, reason = Health.RED, f"{where} has stopped: {info.stopped}"
    elif info.pending:
        segments = "1 segment waits" if info.pending == 1 else f"{info.pending} segments wait"
        state, reason = Health.YELLOW, f"{where}: {segments} for a merge or an index."
    else:
        return ShardHealth(seen.key, seen.collection, Health.GREEN, None, info)
    return ShardHealth(seen.key, seen.collection, state, reason, info)


def _assess_disk(disk: DiskSpace | None, free_bytes_min: int | None) -> tuple[Health, str | None]:
    if free_bytes_min is None:
        return Health.GREEN, None
    if disk is None:
        return Health.YELLOW, "The free space of the disk cannot be read."
    free = f"{disk.free_bytes / 2**20:.0f} MiB of the disk are free"
    if disk.free_bytes < free_bytes_min:
        return Health.RED, f"{free}; writes are refused until there is more. Reads go on."
    if disk.free_bytes < free_bytes_min * DISK_SHORT_FACTOR:
        return (
            Health.YELLOW,
            f"{free}; writes will be refused below {free_bytes_min / 2**20:.0f} MiB.",
        )
    return Health.GREEN, None
