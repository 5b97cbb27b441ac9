"""Builds indexes in child processes: their memory goes back whole, their work never holds this
process's interpreter, and they run at the lowest priority."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import sys

from shoal.errors import Unavailable
from shoal.index_api import BuildJob

__all__ = ["ProcessBuilder"]

_ERROR_BYTES_MAX = 4096


class ProcessBuilder:
    """`shoal.index_api.IndexBuilder` by one child process per job."""

    def __init__(self) -> None:
        self._children: set[asyncio.subprocess.Process] = set()
        self._closed = False

    async def build(self, job: BuildJob) -> None:
        if self._closed:
            raise Unavailable(
                "the server is shutting down; the index will be built after a restart"
            )
        fields = dataclasses.asdict(job)
        fields |= {"vectors": str(job.vectors), "output": str(job.output)}
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "index_node.worker",
            json.dumps(fields),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        self._children.add(child)
        try:
            _, errors = await child.communicate()
        except asyncio.CancelledError:
            _end(child)
            await child.wait()
            raise
        finally:
            self._children.discard(child)
        if child.returncode != 0:
            last = errors[-_ERROR_BYTES_MAX:].decode(errors="replace").strip()
            raise Unavailable(
                f"building the index {job.output} failed (exit status {child.returncode}): {last}"
            )

    async def close(self) -> None:
        self._closed = True
        for child in list(self._children):
            _end(child)
            await child.wait()


def _end(child: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.kill()
