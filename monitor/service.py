"""Looks at every shard and the disk at intervals, and keeps the latest report.

All that it concludes is concluded in `monitor/health.py`; this file has the clock and the calls.
"""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from monitor.health import Seen, assess
from shoal.errors import ShoalError
from shoal.health import DiskSpace, Health, HealthReport
from shoal.settings import StorageSettings
from shoal.storage_api import ShardSpec, Storage
from shoal.telemetry import logger

__all__ = ["POLL_INTERVAL_S", "Monitor"]

POLL_INTERVAL_S = 2.0  # a look costs microseconds per shard; people refresh no faster
LOOK_S_MAX = 5.0  # a shard that takes longer to say how it is counts as not answering

_log = logger("monitor")


class Monitor:
    """storage      the node to ask.
    specs        the shards that should exist, as the catalog says now.
    directory    the data folder, for free space; None: the data is elsewhere.
    clock        seconds that never go back.
    """

    def __init__(
        self,
        storage: Storage,
        specs: Callable[[], Sequence[ShardSpec]],
        directory: Path | None,
        settings: StorageSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._storage, self._specs, self._directory = storage, specs, directory
        self._clock = clock
        self._disk_free_bytes_min = settings.disk_free_bytes_min if directory is not None else None
        self._ready = False
        self._task: asyncio.Task[None] | None = None
        self._report = assess([], None, disk_free_bytes_min=self._disk_free_bytes_min, ready=False)
        self._looked_at = clock()
        self._told: Health | None = None  # the state that the log had last

    def report(self) -> HealthReport:
        """The latest look, with its age and whether the server is ready this instant."""
        return dataclasses.replace(
            self._report, ready=self._ready, age_s=self._clock() - self._looked_at
        )

    def set_ready(self, ready: bool) -> None:
        """True when requests are answered; False as soon as the server begins to stop."""
        self._ready = ready

    async def start(self) -> None:
        """Look once, then at intervals until `close`."""
        await self.look()
        self._task = asyncio.create_task(self._run(), name="monitor")

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def look(self) -> HealthReport:
        """Look at everything now. A shard that fails to answer is a finding, not an error."""
        seen = await asyncio.gather(*(self._look_at(spec) for spec in self._specs()))
        self._looked_at = self._clock()
        self._report = assess(
            seen,
            self._disk(),
            disk_free_bytes_min=self._disk_free_bytes_min,
            ready=self._ready,
        )
        self._tell()
        return self.report()

    def _tell(self) -> None:
        state, before = self._report.state, self._told or Health.GREEN
        self._told = state
        if state is not before:
            tell = _log.warning if state is Health.RED else _log.info
            first = self._report.reasons[0] if self._report.reasons else None
            tell("health_changed", was=before, now=state, why=first)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(POLL_INTERVAL_S)
            try:
                await self.look()
            except Exception as error:  # a bug must not end the watch; it must be seen
                _log.error("look_failed", error=error)

    async def _look_at(self, spec: ShardSpec) -> Seen:
        try:
            async with asyncio.timeout(LOOK_S_MAX):
                return Seen(spec.key, spec.collection, await self._storage.info(spec.key))
        except TimeoutError:
            return Seen(spec.key, spec.collection, None, f"no answer within {LOOK_S_MAX:g} s")
        except ShoalError as error:
            return Seen(spec.key, spec.collection, None, error.message)

    def _disk(self) -> DiskSpace | None:
        if self._directory is None:
            return None
        try:
            usage = shutil.disk_usage(self._directory)
        except OSError:
            return None
        return DiskSpace(free_bytes=usage.free, total_bytes=usage.total)
