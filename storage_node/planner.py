"""Pure decisions of a shard: how to search a segment, when to seal, what to merge, what to index.

Sizes are counted in floats (rows x dimensions): that is what an exact scan reads. The constants are
in shoal/limits.py, with the measurements in docs/decisions/0004-search-planner.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum, auto

from shoal import limits
from shoal.storage_api import VectorSpec

__all__ = [
    "Pause",
    "SegmentStats",
    "Strategy",
    "choose_merge",
    "needs_index",
    "plan_search",
    "seals_in_pause",
    "widen",
]

DEFAULT_EF = 64


class Strategy(Enum):
    SKIP = auto()  # nothing is allowed
    SCAN_ALL = auto()  # exact, over every row, then mask
    SCAN_ALLOWED = auto()  # exact, over the allowed rows only
    GRAPH = auto()  # approximate, beam width beside it


def plan_search(
    *,
    rows: int,
    allowed: int,
    dim: int,
    has_graph: bool,
    exact: bool,
    ef: int | None,
    limit: int,
) -> tuple[Strategy, int]:
    """How to find the `limit` best of `allowed` rows among `rows`. Returns strategy and beam width.

    A graph that is asked for few of its rows must walk past all the others, and finds less the more
    the filter and the vectors have to do with each other. Measured on 100k text embeddings: below a
    fifth of the rows some filters are hopeless at any beam width (recall 0.67 for "animals or
    plants" at 512); from a fifth on, a beam widened by 2 x rows / allowed keeps recall above 0.95;
    below about 20k rows a scan is exact and costs 1.6 ms at most.
    """
    if allowed == 0:
        return Strategy.SKIP, 0
    scan = Strategy.SCAN_ALL if allowed * 4 > rows * 3 else Strategy.SCAN_ALLOWED
    if exact or not has_graph:
        return scan, 0
    few = allowed * dim <= limits.SCAN_FLOATS_MAX
    if allowed * 5 < rows or (allowed * 2 < rows and few):
        return scan, 0
    base = max(DEFAULT_EF if ef is None else ef, limit)
    if allowed * 4 > rows * 3:
        return Strategy.GRAPH, base
    return Strategy.GRAPH, max(base, min(2 * base * rows // allowed, limits.BEAM_WIDTH_MAX))


def widen(ef: int) -> int | None:
    """The next beam width after a graph returned too few; None = scan instead."""
    return ef * 4 if ef * 4 <= limits.BEAM_WIDTH_MAX else None


class Pause(IntEnum):
    """How long no write came."""

    NONE = 0
    SHORT = 1
    LONG = 2


def seals_in_pause(rows: int, dims: Sequence[int], pause: Pause) -> bool:
    """Whether a growing segment that nobody adds to should be sealed: scanning it costs every
    search. After a short pause when it is worth an index of its own, later when it costs at all."""
    least = limits.INDEX_FLOATS_MIN if pause is Pause.SHORT else limits.INDEX_FLOATS_MIN // 8
    return pause is not Pause.NONE and any(rows * dim >= least for dim in dims)


def needs_index(rows: int, vector: VectorSpec) -> bool:
    """Whether a sealed segment of so many rows is worth a graph for this vector."""
    if vector.multi or vector.hnsw_m == 0:
        return False
    if vector.index_bytes_min is not None:
        return vector.index_bytes_min > 0 and rows * vector.dim * 4 >= vector.index_bytes_min
    return rows * vector.dim >= limits.INDEX_FLOATS_MIN


@dataclass(frozen=True, slots=True)
class SegmentStats:
    segment_id: int
    rows: int
    live: int


# pause -> segments at least, and their share of the largest
_MERGE_RULES = {Pause.NONE: (4, 0.5), Pause.SHORT: (2, 0.05), Pause.LONG: (2, 0.01)}


def choose_merge(segments: Sequence[SegmentStats], pause: Pause) -> tuple[int, ...]:
    """Which segments to merge into one now; () = none.

    Tiered: the smaller segments join the next larger one once together they are no longer small
    beside it, so that a row is rewritten O(log n) times. While writes come in, at least four go
    together (an index is built for each result). When they stop, two will do, down to a twentieth,
    and later to a hundredth: a search costs once per segment. A segment of which a third is dead is
    rewritten by itself.
    """
    ordered = sorted(segments, key=lambda s: (s.live, s.segment_id))
    count_min, share = _MERGE_RULES[pause]
    best: tuple[int, ...] = ()
    smaller = 0
    for position, segment in enumerate(ordered):
        total = smaller + segment.live
        if total > limits.SEGMENT_ROWS_MAX:
            break
        if position + 1 >= count_min and smaller >= share * segment.live:
            best = tuple(sorted(s.segment_id for s in ordered[: position + 1]))
        smaller = total
    if best:
        return best
    for segment in ordered:
        dead = segment.rows - segment.live
        if segment.rows and dead * 3 > segment.rows and (pause or dead * 2 > segment.rows):
            return (segment.segment_id,)
    return ()
