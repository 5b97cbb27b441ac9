"""What a storage node asks of whoever builds indexes: a child process here, an index node later."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shoal.storage_api import Distance

__all__ = ["BuildJob", "IndexBuilder"]


@dataclass(frozen=True, slots=True)
class BuildJob:
    """Build an HNSW graph over a file of vectors (Faiss flat file, see shoal/faiss_index.py).

    output is written, synced, and complete when `build` returns; on an error it may be half there.
    """

    vectors: Path
    count: int
    dim: int
    distance: Distance
    m: int
    ef_construct: int
    output: Path
    threads: int


class IndexBuilder(Protocol):
    async def build(self, job: BuildJob) -> None:
        """Raises Unavailable when the build failed and may be tried again. Cancelling ends it."""
        ...

    async def close(self) -> None: ...
