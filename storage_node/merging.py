"""Writing the segment that a merge makes: a function of files, so it can run in a child process.

The inputs are read as of the tombstone files that their records name: see PendingMerge.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoal.batch import unpack_bits
from shoal.child import child_main
from shoal.ids import PointIds
from shoal.storage_api import Distance, ShardKey, ShardSpec, VectorSpec
from storage_node.files import open_array_file, sync_folder, write_array_file
from storage_node.manifest import SegmentRecord
from storage_node.segment import SealedSegment
from storage_node.segment_writing import write_segment

__all__ = ["MergeJob", "Merged", "encode_job", "read_answer", "write_merged"]

_MAP = "merge.map"  # in the output's folder, until the parent process has read it


@dataclass(frozen=True, slots=True)
class MergeJob:
    """folder: of segments. spec: as of now; columns: the vectors of the output, see write_segment."""

    folder: Path
    spec: ShardSpec
    inputs: tuple[SegmentRecord, ...]
    output: int
    columns: dict[str, int]


@dataclass(frozen=True, slots=True)
class Merged:
    """Output row r was row rows[r] of inputs[source[r]]. record is None when no row was alive."""

    record: SegmentRecord | None
    source: NDArray[np.uint16]
    rows: NDArray[np.int64]


def write_merged(job: MergeJob) -> Merged:
    """Every file of the output is durable when it returns; an earlier try is written over."""
    inputs = [SealedSegment(job.folder / str(r.segment_id), r, job.spec) for r in job.inputs]
    picked = [np.flatnonzero(unpack_bits(s.live, s.row_count)) for s in inputs]
    source = np.repeat(np.arange(len(inputs), dtype=np.uint16), [len(p) for p in picked])
    rows = np.concatenate(picked).astype(np.int64)
    order = PointIds.concat(s.ids_of(p) for s, p in zip(inputs, picked, strict=True)).order()
    source, rows = source[order], rows[order]
    if len(rows) == 0:
        return Merged(None, source, rows)
    folder = job.folder / str(job.output)
    if folder.exists():
        shutil.rmtree(folder)
    files = write_segment(folder, job.spec, inputs, source, rows, job.columns)
    sync_folder(folder)
    sync_folder(folder.parent)
    record = SegmentRecord(segment_id=job.output, rows=len(rows), files=files)
    return Merged(record, source, rows)


def encode_job(job: MergeJob) -> str:
    return json.dumps(
        {
            "folder": str(job.folder),
            "spec": dataclasses.asdict(job.spec),
            "inputs": [record.model_dump(mode="json") for record in job.inputs],
            "output": job.output,
            "columns": job.columns,
        }
    )


def read_answer(job: MergeJob, answer: str) -> Merged:
    """What the child process did."""
    fields = json.loads(answer)
    if fields["record"] is None:
        return Merged(None, np.empty(0, np.uint16), np.empty(0, np.int64))
    path = job.folder / str(job.output) / _MAP
    arrays, _ = open_array_file(path)
    path.unlink()
    record = SegmentRecord.model_validate(fields["record"])
    return Merged(record, arrays["source"], arrays["rows"])


def _decode_job(text: str) -> MergeJob:
    fields = json.loads(text)
    spec = fields["spec"]
    dense = {
        name: VectorSpec(**vector | {"distance": Distance(vector["distance"])})
        for name, vector in spec["dense"].items()
    }
    key = ShardKey(**spec["key"])
    return MergeJob(
        folder=Path(fields["folder"]),
        spec=ShardSpec(key, spec["collection"], dense, tuple(spec["sparse"]), spec["since"]),
        inputs=tuple(SegmentRecord.model_validate(record) for record in fields["inputs"]),
        output=fields["output"],
        columns=fields["columns"],
    )


def main(argument: str) -> str:
    job = _decode_job(argument)
    merged = write_merged(job)
    if merged.record is None:
        return json.dumps({"record": None})
    arrays: dict[str, NDArray[np.generic]] = {"source": merged.source, "rows": merged.rows}
    write_array_file(job.folder / str(job.output) / _MAP, arrays, {})
    return json.dumps({"record": merged.record.model_dump(mode="json")})


if __name__ == "__main__":
    child_main(main)
