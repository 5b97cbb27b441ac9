"""Which index to build next. Pure.

waiting ─claim─▶ building ─▶ done ─▶ (record deleted once it is old; replicas have fetched it)
   ▲                │
   └────────────────┘  the index node failed, or is gone
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from shoal import limits
from shoal.metadata.schema import IndexJobRecord, IndexJobState

__all__ = ["claimed", "failed", "next_job"]


def next_job(
    jobs: Iterable[tuple[IndexJobRecord, int]], incarnations: Collection[str]
) -> tuple[IndexJobRecord, int] | None:
    """The oldest job that nobody builds, with its revision.

    jobs          every record with its revision
    incarnations  of the index nodes that are alive: what another one had claimed is free again
    """
    free = [
        (revision, job)
        for job, revision in jobs
        if job.source
        and job.failures < limits.INDEX_JOB_FAILURES_MAX
        and (
            job.state is IndexJobState.WAITING
            or (job.state is IndexJobState.BUILDING and job.incarnation not in incarnations)
        )
    ]
    if not free:
        return None
    revision, job = min(free, key=lambda pair: pair[0])
    return job, revision


def claimed(job: IndexJobRecord, node: str, incarnation: str) -> IndexJobRecord:
    return job.model_copy(
        update={
            "state": IndexJobState.BUILDING,
            "owner": node,
            "incarnation": incarnation,
            "artifact": None,
        }
    )


def failed(job: IndexJobRecord, *, source_gone: bool) -> IndexJobRecord:
    """Back in the queue. source_gone: not the build failed, but whoever gave the vectors."""
    free = {"state": IndexJobState.WAITING, "owner": "", "incarnation": ""}
    if source_gone:
        return job.model_copy(update={**free, "source": "", "offer": ""})
    return job.model_copy(update={**free, "failures": job.failures + 1})
