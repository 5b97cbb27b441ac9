"""The child process of `ProcessBuilder`: builds one index and exits.

python -m index_node.worker '{"vectors": …, "count": …, …}'   (the fields of shoal.index_api.BuildJob)
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

from shoal.faiss_index import FlatVectors, build_graph
from shoal.index_api import BuildJob
from shoal.storage_api import Distance

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1


def main(argument: str) -> None:
    _end_with_parent()
    os.nice(19)  # searches and writes go first
    fields = json.loads(argument)
    fields |= {"vectors": Path(fields["vectors"]), "output": Path(fields["output"])}
    job = BuildJob(**fields | {"distance": Distance(fields["distance"])})
    flat = FlatVectors(job.vectors, job.dim, job.count, job.distance)
    build_graph(flat.values, job.distance, job.m, job.ef_construct, job.output, job.threads)
    descriptor = os.open(job.output, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _end_with_parent() -> None:
    """A server that is killed leaves no builder behind (Linux; elsewhere it ends when done)."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
