"""The child process of `ProcessBuilder`: reads the fields of a BuildJob, builds, exits."""

from __future__ import annotations

import json
import os
from pathlib import Path

from shoal.child import child_main
from shoal.faiss_index import FlatVectors, Graph, build_graph
from shoal.index_api import BuildJob
from shoal.storage_api import Distance

__all__ = ["main"]


def main(argument: str) -> str:
    fields = json.loads(argument)
    fields |= {"vectors": Path(fields["vectors"]), "output": Path(fields["output"])}
    job = BuildJob(**fields | {"distance": Distance(fields["distance"])})
    flat = FlatVectors(job.vectors, job.dim, job.count, job.distance)
    build_graph(flat.values, job.distance, job.m, job.ef_construct, job.output, job.threads)
    Graph(job.output, flat)  # Faiss does not report a write that failed at the end of the file
    descriptor = os.open(job.output, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    return "{}"


if __name__ == "__main__":
    child_main(main)
