"""Health: the decision as a table, and the service over a storage that answers as told."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from monitor.health import Seen, assess, assess_shard
from monitor.service import Monitor
from shoal.errors import Unavailable
from shoal.health import DiskSpace, Health, worst
from shoal.settings import StorageSettings
from shoal.storage_api import ShardInfo, ShardKey, ShardSpec

KEY = ShardKey(3, 1)
ROOMY = DiskSpace(10**12, 10**12)


def look(info: ShardInfo | None, error: str | None = None) -> Seen:
    return Seen(KEY, "books", info, error)


@pytest.mark.parametrize(
    ("seen", "state", "reason"),
    [
        (look(ShardInfo(points=5)), Health.GREEN, None),
        (look(ShardInfo(pending=1)), Health.YELLOW, "1 segment waits"),
        (look(ShardInfo(pending=2)), Health.YELLOW, "2 segments wait"),
        (look(ShardInfo(stopped="log/3: bad crc", pending=2)), Health.RED, "log/3: bad crc"),
        (look(None, "timed out"), Health.RED, "does not answer: timed out"),
    ],
)
def test_state_of_a_shard(seen, state, reason):
    found = assess_shard(seen)
    assert found.state is state
    if reason is None:
        assert found.reason is None
    else:
        assert reason in found.reason
        assert "Shard 1 of collection books" in found.reason


@pytest.mark.parametrize(
    ("disk", "state", "writable"),
    [
        (DiskSpace(1000, 10**6), Health.GREEN, True),
        (DiskSpace(999, 10**6), Health.YELLOW, True),
        (DiskSpace(100, 10**6), Health.YELLOW, True),
        (DiskSpace(99, 10**6), Health.RED, False),
        (None, Health.YELLOW, True),
    ],
)
def test_state_of_the_disk(disk, state, writable):
    report = assess([look(ShardInfo())], disk, disk_free_bytes_min=100, ready=True)
    assert (report.state, report.writable) == (state, writable)
    assert bool(report.reasons) == (state is not Health.GREEN)


def test_worst_reason_comes_first_and_collections_are_told_apart():
    seen = [
        Seen(ShardKey(1, 0), "a", ShardInfo(pending=1)),
        Seen(ShardKey(2, 0), "b", ShardInfo(stopped="damage")),
        Seen(ShardKey(3, 0), "c", ShardInfo()),
    ]
    report = assess(seen, ROOMY, disk_free_bytes_min=1, ready=True)
    assert report.state is Health.RED
    assert "damage" in report.reasons[0]
    assert [report.of_collection(name) for name in "abcd"] == [
        Health.YELLOW,
        Health.RED,
        Health.GREEN,
        Health.GREEN,
    ]


def test_worst_of_none_is_green():
    assert worst([]) is Health.GREEN
    assert worst([Health.YELLOW, Health.RED, Health.GREEN]) is Health.RED


class ToldStorage:
    """Answers `info` as told; the only method that a monitor calls."""

    def __init__(self) -> None:
        self.answers: dict[ShardKey, ShardInfo | Exception] = {}

    async def info(self, shard: ShardKey) -> ShardInfo:
        answer = self.answers[shard]
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_monitor_looks_at_what_the_catalog_names(tmp_path: Path):
    async def main() -> None:
        storage, now = ToldStorage(), 100.0
        specs = [ShardSpec(ShardKey(1, n), "books", {}) for n in range(2)]
        settings = StorageSettings(disk_free_bytes_min=0)
        monitor = Monitor(storage, lambda: specs, tmp_path, settings, clock=lambda: now)
        assert not monitor.report().ready
        storage.answers = {specs[0].key: ShardInfo(points=1), specs[1].key: Unavailable("gone")}
        await monitor.start()
        monitor.set_ready(True)
        now = 103.0
        report = monitor.report()
        assert (report.ready, report.state, report.age_s) == (True, Health.RED, 3.0)
        assert "gone" in report.reasons[0]
        assert report.disk.total_bytes > 0
        storage.answers[specs[1].key] = ShardInfo(points=2)
        assert (await monitor.look()).state is Health.GREEN
        del specs[:]
        assert (await monitor.look()).shards == ()
        monitor.set_ready(False)
        assert not monitor.report().ready
        await monitor.close()
        await monitor.close()

    asyncio.run(main())


def test_monitor_survives_a_bug_in_a_look(tmp_path: Path):
    async def main() -> None:
        storage = ToldStorage()
        specs = [ShardSpec(ShardKey(1, 0), "books", {})]
        monitor = Monitor(storage, lambda: specs, tmp_path / "gone", StorageSettings())
        storage.answers = {specs[0].key: ShardInfo()}
        assert (await monitor.look()).disk is None
        storage.answers = {}
        with pytest.raises(KeyError):
            await monitor.look()
        assert monitor.report().state is Health.YELLOW  # the last look stands, and grows old

    asyncio.run(main())
