"""What a storage node asks of whoever builds indexes: a child process here, an index node later."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shoal.storage_api import Distance, ShardKey

__all__ = ["BuildJob", "IndexBuilder", "IndexOf"]


@dataclass(frozen=True, slots=True)
class IndexOf:
    """Which index of a collection: the same one on every replica, since all hold the same segments.
    file: the name of the index in the folder of the segment."""

    shard: ShardKey
    segment: int
    file: str


@dataclass(frozen=True, slots=True)
class BuildJob:
    """Build an HNSW graph over a file of vectors (Faiss flat file, see shoal/faiss_index.py).

    output is written, synced, and complete when `build` returns; on an error it may be half there.
    of: what the index belongs to, so that replicas can share one; None: nobody shares it.
    """

    vectors: Path
    count: int
    dim: int
    distance: Distance
    m: int
    ef_construct: int
    output: Path
    threads: int
    of: IndexOf | None = None


class IndexBuilder(Protocol):
    async def build(self, job: BuildJob) -> None:
        """Raises Unavailable when the build failed and may be tried again. Cancelling ends it."""
        ...

    async def close(self) -> None: ...
