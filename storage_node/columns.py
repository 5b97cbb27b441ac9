"""Payload columns of a segment: what filters read instead of payloads.

Every path that leads through objects only (`a`, `a.b`) gets a column by itself when a segment is
sealed, up to COLUMN_PATHS_MAX of them in order of first appearance; no index has to be declared.
Paths through arrays (`a[].b`) have none: the column of `a` tells which rows to read.

The arrays of path number i, all named "i/…" and left out when empty:

    present empty null true false other   packed bitmaps; `present` left out = every row
    text, text_ends                       the dictionary: keywords sorted by their UTF-8 bytes, end
                                          to end, and where each ends
    dense, dense_bits                     ids of keywords in more than 1/32 of the rows, and their
                                          packed bitmaps end to end: smaller than a list of rows
    postings, posting_ends                rows of the other keywords, ascending for each
    ints, int_rows   floats, float_rows   sorted by value, then row
    lon, lat, geo_rows                    one for each point on the globe, by row
    counts, count_rows                    arrays of two or more elements
    odd_rows   long_hashes, long_rows     see storage_node.path_column

They are read through a memory map: a condition touches the pages that it needs.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.errors import must
from storage_node import bits as bitmaps
from storage_node.bitmap_cache import SHARED, BitmapCache
from storage_node.bits import Bits, Rows
from storage_node.column_collector import FLAGS, GrowingColumns, PathValues
from storage_node.path_column import (
    NO_ROWS,
    FloatInterval,
    GeoArrays,
    PathColumn,
    TokenIndex,
    moments_of,
    text_hash,
)

__all__ = ["Columns", "GrowingColumns", "SealedColumns", "build_columns"]

_FORMAT = 1
_DENSE_SHARE = 32  # a row number takes as many bits
Arrays = Mapping[str, NDArray[Any]]


class Columns(Protocol):
    """The columns of a sealed or growing segment.

    complete  False: some paths have no column, so a path without one may still have values
    cache     where bitmaps of whole conditions are kept; None for columns that change
    owner     the first part of their keys in the cache
    """

    complete: bool
    cache: BitmapCache | None
    owner: int

    def catch_up(self, row_count: int, payload_bytes: Callable[[int], bytes]) -> None:
        """Make the rows up to `row_count` known."""
        ...

    def column(self, keys: tuple[str, ...], row_count: int) -> PathColumn | None:
        """The column of a plain path for rows 0..row_count-1; None if it has none."""
        ...


# -- building -------------------------------------------------------------------------------------
def build_columns(
    payloads: Iterable[bytes], row_count: int
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Arrays and JSON-able meta of `row_count` payloads, each a JSON object or b"". Deterministic.

    Cost: about 3 us a row of four keys; memory: the dictionaries of all keywords, and 12 bytes a
    value.
    """
    collected = GrowingColumns()
    collected.extend(payloads)
    must(collected.row_count == row_count, "there is one payload, maybe empty, for each row")
    arrays: dict[str, NDArray[Any]] = {}
    paths: list[list[str]] = []
    for number, path in enumerate(collected.paths()):
        paths.append(list(path.keys))
        for name, array in _path_arrays(path, row_count):
            if len(array):
                arrays[f"{number}/{name}"] = array
    meta = {
        "format": _FORMAT,
        "rows": row_count,
        "complete": collected.complete,
        "paths": paths,
    }
    return arrays, meta


def _path_arrays(path: PathValues, n: int) -> Iterator[tuple[str, NDArray[Any]]]:
    for name in FLAGS:
        rows = path.array(name)
        if len(rows) and not (name == "present" and len(rows) == n):
            yield name, bitmaps.of_rows(rows, n)
    yield from _dictionary(path, n)
    for values, rows_name in (("ints", "int_rows"), ("floats", "float_rows")):
        numbers, rows = _by_value(path.array(values), path.array(rows_name))
        yield values, numbers
        yield rows_name, rows
    hashes, rows = _by_value(path.array("long_hashes"), path.array("long_rows"))
    yield "long_hashes", hashes
    yield "long_rows", rows
    for name in ("lon", "lat", "geo_rows", "counts", "count_rows", "odd_rows"):
        yield name, path.array(name).copy()


def _by_value(values: NDArray[Any], rows: Rows) -> tuple[NDArray[Any], Rows]:
    """Sorted by value, then row (rows come ascending), each pair once."""
    order = np.argsort(values, kind="stable")
    values, rows = values[order], rows[order]
    if len(values) < 2:
        return values, rows
    keep = np.ones(len(values), np.bool_)
    keep[1:] = (values[1:] != values[:-1]) | (rows[1:] != rows[:-1])
    return values[keep], rows[keep]


def _dictionary(path: PathValues, n: int) -> Iterator[tuple[str, NDArray[Any]]]:
    count = len(path.keywords)
    if not count:
        return
    # Code points sort as their UTF-8 bytes do.
    order = sorted(range(count), key=path.keywords.__getitem__)
    texts = [path.keywords[code].encode() for code in order]
    ends = np.cumsum([len(text) for text in texts])
    yield "text", np.frombuffer(b"".join(texts), np.uint8)
    yield "text_ends", ends.astype(np.uint32 if ends[-1] < 1 << 32 else np.uint64)

    rank = np.empty(count, np.uint32)
    rank[order] = np.arange(count, dtype=np.uint32)
    ids, rows = _by_value(rank[path.array("codes")], path.array("code_rows"))
    held = np.bincount(ids, minlength=count)
    is_dense = held * _DENSE_SHARE > n
    dense = np.flatnonzero(is_dense).astype(np.uint32)
    starts = np.cumsum(held) - held
    yield "dense", dense
    if len(dense):
        yield (
            "dense_bits",
            np.concatenate(
                [bitmaps.of_rows(rows[starts[i] : starts[i] + held[i]], n) for i in dense.tolist()]
            ),
        )
    yield "postings", rows[~is_dense[ids]]
    yield "posting_ends", np.cumsum(np.where(is_dense, 0, held)).astype(np.uint32)


# -- reading --------------------------------------------------------------------------------------
class SealedColumns:
    """The columns of a sealed segment, over the arrays and meta that `build_columns` made. The
    arrays may be read-only memory maps. Safe for several threads."""

    def __init__(
        self, arrays: Arrays, meta: Mapping[str, Any], cache: BitmapCache | None = SHARED
    ) -> None:
        must(meta["format"] == _FORMAT, f"columns of format {meta['format']} cannot be read")
        self.row_count: int = meta["rows"]
        self.complete: bool = meta["complete"]
        self.cache = cache
        self.owner = 0
        if cache is not None:
            self.owner = cache.new_owner()
            weakref.finalize(self, cache.forget, self.owner)
        self._arrays = arrays
        self._number = {tuple(keys): number for number, keys in enumerate(meta["paths"])}
        self._columns: dict[tuple[str, ...], _SealedColumn] = {}

    def catch_up(self, row_count: int, payload_bytes: Callable[[int], bytes]) -> None:
        must(row_count == self.row_count, "sealed columns belong to a segment of other size")

    def column(self, keys: tuple[str, ...], row_count: int) -> PathColumn | None:
        column = self._columns.get(keys)
        if column is None and (number := self._number.get(keys)) is not None:
            column = self._columns[keys] = _SealedColumn(self._arrays, number, self.row_count)
        return column


class _SealedColumn(PathColumn):
    def __init__(self, arrays: Arrays, number: int, row_count: int) -> None:
        self.n = row_count
        self._arrays = arrays
        self._prefix = f"{number}/"
        self._postings: Rows = self._array("postings", np.uint32)
        self._posting_ends: NDArray[np.uint32] = self._array("posting_ends", np.uint32)
        self._int_values: NDArray[np.int64] = self._array("ints", np.int64)
        self._int_rows: Rows = self._array("int_rows", np.uint32)
        # Memory views give Python numbers and bytes several times faster than arrays do.
        self._text = self._array("text", np.uint8).data
        self._text_ends = self._array("text_ends", np.uint32).data
        self.single = not len(self._array("count_rows", np.uint32))
        byte_count = (row_count + 7) // 8
        self._dense = self._array("dense", np.uint32)
        self._dense_bits = self._array("dense_bits", np.uint8).reshape(-1, max(byte_count, 1))
        self._dense_slot = {i: slot for slot, i in enumerate(self._dense.tolist())}
        # Computed when first asked for; two threads may both compute it, to the same end.
        self._moments: NDArray[np.int64] | None = None
        self._tokens: TokenIndex | None = None

    def _array(self, name: str, dtype: type[np.generic]) -> NDArray[Any]:
        held = self._arrays.get(self._prefix + name)
        return np.empty(0, dtype) if held is None else held

    def flag(self, name: str) -> Bits:
        held = self._arrays.get(self._prefix + name)
        if held is not None:
            return held
        return bitmaps.full(self.n) if name == "present" else bitmaps.none(self.n)

    # -- keywords ---------------------------------------------------------------------------------
    def keyword_count(self) -> int:
        return len(self._text_ends)

    def _keyword_bytes(self, i: int) -> bytes:
        start = self._text_ends[i - 1] if i else 0
        return self._text[start : self._text_ends[i]].tobytes()

    def keyword(self, i: int) -> str:
        return self._keyword_bytes(i).decode()

    def keywords(self) -> Iterable[str]:
        text, start = self._text, 0
        for end in self._text_ends:
            yield str(text[start:end], "utf-8")
            start = end

    def _find(self, text: bytes) -> int:
        """The id of the first keyword >= text."""
        return bisect_left(range(self.keyword_count()), text, key=self._keyword_bytes)

    def keyword_ids(self, texts: Sequence[str]) -> NDArray[np.uint32]:
        count = self.keyword_count()
        if len(texts) * 16 > count:  # a pass over all is cheaper than so many searches
            wanted = set(texts)
            found = [i for i, text in enumerate(self.keywords()) if text in wanted]
            return np.array(found, np.uint32)
        ids = set()
        for text in texts:
            raw = text.encode()
            i = self._find(raw)
            if i < count and self._keyword_bytes(i) == raw:
                ids.add(i)
        return np.array(sorted(ids), np.uint32)

    def prefix_ids(self, prefix: str) -> NDArray[np.uint32]:
        raw = prefix.encode()
        first = self._find(raw)
        # The bytes after every text with this prefix: 0xff occurs in no UTF-8 text.
        return np.arange(first, self._find(raw + b"\xff"), dtype=np.uint32)

    def _rows_of(self, ids: NDArray[np.uint32]) -> Rows:
        """Posting rows of the keywords, end to end; none for dense ones."""
        if len(ids) == 1:
            i = int(ids[0])
            start = int(self._posting_ends[i - 1]) if i else 0
            only: Rows = self._postings[start : int(self._posting_ends[i])]
            return only
        if len(ids) == self.keyword_count():
            return self._postings
        ends = self._posting_ends[ids].astype(np.int64)
        starts = np.where(ids == 0, 0, self._posting_ends[ids - (ids > 0)]).astype(np.int64)
        sizes = ends - starts
        within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        several: Rows = self._postings[np.repeat(starts, sizes) + within]
        return several

    def keyword_bits(self, ids: NDArray[np.uint32]) -> Bits:
        if not len(ids):
            return bitmaps.none(self.n)
        slots = self._slots(ids)
        if len(ids) == 1 and slots:
            only: Bits = self._dense_bits[slots[0]]
            return only
        out = bitmaps.of_rows(self._rows_of(ids), self.n)
        for slot in slots:
            out |= self._dense_bits[slot]
        return out

    def _slots(self, ids: NDArray[np.uint32]) -> list[int]:
        if len(ids) <= len(self._dense_slot):
            return [slot for i in ids.tolist() if (slot := self._dense_slot.get(i)) is not None]
        held: list[int] = np.flatnonzero(np.isin(self._dense, ids)).tolist()
        return held

    def other_keyword_bits(self, ids: NDArray[np.uint32]) -> Bits:
        every = np.arange(self.keyword_count(), dtype=np.uint32)
        if self.single or not len(ids):
            return self.keyword_bits(every) & ~self.keyword_bits(ids)
        # A row has an unlisted keyword if it has more keywords than listed ones.
        more = self._keywords_per_row(every) > self._keywords_per_row(ids)
        return np.packbits(more, bitorder="little")

    def _keywords_per_row(self, ids: NDArray[np.uint32]) -> NDArray[np.int64]:
        counts = np.bincount(self._rows_of(ids), minlength=self.n)
        for slot in self._slots(ids):
            counts += bitmaps.to_mask(self._dense_bits[slot], self.n)
        return counts

    def moments(self) -> NDArray[np.int64]:
        if self._moments is None:
            self._moments = moments_of(self.keywords())
        return self._moments

    def token_index(self) -> TokenIndex:
        if self._tokens is None:
            index = TokenIndex()
            index.extend(self.keywords())
            self._tokens = index
        return self._tokens

    # -- numbers, points and the rest -------------------------------------------------------------
    def _int_rows_in(self, low: int, high: int) -> Rows:
        # The keys must have the array's type, or numpy converts the whole array first.
        start = self._int_values.searchsorted(np.int64(low), "left")
        return self._int_rows[start : self._int_values.searchsorted(np.int64(high), "right")]

    def int_bits(self, low: int, high: int) -> Bits:
        return bitmaps.of_rows(self._int_rows_in(low, high), self.n)

    def _listed_int_rows(self, values: NDArray[np.int64]) -> Rows:
        found = [self._int_rows_in(v, v) for v in np.unique(values).tolist()]
        return np.concatenate(found) if found else NO_ROWS

    def listed_int_bits(self, values: NDArray[np.int64]) -> Bits:
        return bitmaps.of_rows(self._listed_int_rows(values), self.n)

    def other_int_bits(self, values: NDArray[np.int64]) -> Bits:
        if self.single or not len(values):
            return bitmaps.of_rows(self._int_rows, self.n) & ~self.listed_int_bits(values)
        every = np.bincount(self._int_rows, minlength=self.n)
        listed = np.bincount(self._listed_int_rows(values), minlength=self.n)
        return np.packbits(every > listed, bitorder="little")

    def float_bits(self, interval: FloatInterval) -> Bits:
        floats = self._array("floats", np.float64)
        start = floats.searchsorted(interval.low, "right" if interval.low_open else "left")
        end = floats.searchsorted(interval.high, "left" if interval.high_open else "right")
        return bitmaps.of_rows(self._array("float_rows", np.uint32)[start:end], self.n)

    def geo(self) -> GeoArrays | None:
        rows = self._array("geo_rows", np.uint32)
        if not len(rows):
            return None
        return self._array("lon", np.float64), self._array("lat", np.float64), rows

    def counts(self) -> tuple[Rows, NDArray[np.uint32]]:
        return self._array("count_rows", np.uint32), self._array("counts", np.uint32)

    def odd_rows(self) -> Rows:
        return self._array("odd_rows", np.uint32)

    def long_rows(self, text: str | None = None) -> Rows:
        rows = self._array("long_rows", np.uint32)
        if text is None:
            return rows
        hashes, wanted = self._array("long_hashes", np.uint32), np.uint32(text_hash(text))
        return rows[hashes.searchsorted(wanted, "left") : hashes.searchsorted(wanted, "right")]
