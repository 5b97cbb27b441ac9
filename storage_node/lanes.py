"""The threads of a storage node, by what they wait for."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from shoal.child import Children
from shoal.faiss_index import use_one_thread

__all__ = ["Lanes"]

_T = TypeVar("_T")
_LOG_THREADS = 4  # fsyncs of different shards overlap; they hold no GIL
_FILE_THREADS = 2  # seals, merges, checksums


class Lanes:
    """log: appends, kept apart so that no merge stands before an acknowledgement. files: everything
    else that touches the disk. search: reads that are too long for the event loop; each thread has
    one OpenMP thread. build: at most one index at a time. children: processes for long work."""

    def __init__(self) -> None:
        self._log = ThreadPoolExecutor(_LOG_THREADS, "log")
        self._files = ThreadPoolExecutor(_FILE_THREADS, "files", use_one_thread)
        self._search = ThreadPoolExecutor(os.cpu_count() or 1, "search", use_one_thread)
        self.build = asyncio.Semaphore(1)
        self.children = Children()

    def log(self, work: Callable[..., _T], *arguments: object) -> Awaitable[_T]:
        return asyncio.get_running_loop().run_in_executor(self._log, work, *arguments)

    def files(self, work: Callable[..., _T], *arguments: object) -> Awaitable[_T]:
        return asyncio.get_running_loop().run_in_executor(self._files, work, *arguments)

    def search(self, work: Callable[..., _T], *arguments: object) -> Awaitable[_T]:
        return asyncio.get_running_loop().run_in_executor(self._search, work, *arguments)

    async def close(self) -> None:
        """Waits for what is running; nothing new begins."""
        await self.children.close()
        for pool in (self._search, self._files, self._log):
            pool.shutdown(wait=True, cancel_futures=True)
