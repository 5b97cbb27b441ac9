"""Builds indexes in child processes (see shoal/child.py)."""

from __future__ import annotations

import dataclasses
import json

from shoal.child import Children
from shoal.index_api import BuildJob

__all__ = ["ProcessBuilder"]


class ProcessBuilder:
    """`shoal.index_api.IndexBuilder` by one child process per job."""

    def __init__(self) -> None:
        self._children = Children()

    async def build(self, job: BuildJob) -> None:
        fields = dataclasses.asdict(job)
        fields |= {"vectors": str(job.vectors), "output": str(job.output)}
        await self._children.run("index_node.worker", json.dumps(fields))

    async def close(self) -> None:
        await self._children.close()
