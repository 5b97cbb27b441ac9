"""From payloads to columns, row by row: what a growing segment filters with, and the first half of
building the columns of a sealed one.

Values are collected in lists and moved to typed arrays in batches; the arrays stay in row order, so
adding is O(1) and a condition is a vectorised scan of at most a growing segment's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from shoal import limits
from storage_node import bits as bitmaps
from storage_node.bitmap_cache import BitmapCache
from storage_node.bits import Bits, Rows
from storage_node.geo import geo_point
from storage_node.path_column import (
    I64_MAX,
    I64_MIN,
    FloatInterval,
    GeoArrays,
    PathColumn,
    TokenIndex,
    moments_of,
    text_hash,
)

__all__ = ["FLAGS", "GrowingColumns", "PathValues"]

FLAGS = ("present", "empty", "null", "true", "false", "other")
_FLUSH_ROWS = 4096  # rows between moves from lists to arrays: bounds the Python objects alive
_FIRST_CAPACITY = 64


class _Growable:
    """An array that grows at its end: appends are amortised O(1), views stay valid."""

    __slots__ = ("_data", "_size")

    def __init__(self, dtype: type[np.generic]) -> None:
        self._data: NDArray[Any] = np.empty(_FIRST_CAPACITY, dtype)
        self._size = 0

    def extend(self, values: Sequence[Any] | NDArray[Any]) -> None:
        needed = self._size + len(values)
        if needed > len(self._data):
            larger = np.empty(max(needed, 2 * len(self._data)), self._data.dtype)
            larger[: self._size] = self._data[: self._size]
            self._data = larger
        self._data[self._size : needed] = values
        self._size = needed

    def view(self) -> NDArray[Any]:
        return self._data[: self._size]


# The arrays of a path: name -> element type. Those of one kind grow together; each `…_rows` array is
# ascending, a row repeated once for each of its values.
_ARRAYS: dict[str, type[np.generic]] = {
    "present": np.uint32,
    "empty": np.uint32,
    "null": np.uint32,
    "true": np.uint32,
    "false": np.uint32,
    "other": np.uint32,
    "codes": np.uint32,
    "code_rows": np.uint32,
    "ints": np.int64,
    "int_rows": np.uint32,
    "floats": np.float64,
    "float_rows": np.uint32,
    "lon": np.float64,
    "lat": np.float64,
    "geo_rows": np.uint32,
    "counts": np.uint32,
    "count_rows": np.uint32,
    "odd_rows": np.uint32,
    "long_hashes": np.uint32,
    "long_rows": np.uint32,
}


class PathValues:
    """All values under one path so far."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self.keys = keys
        self.children: dict[str, PathValues] = {}
        self.code_of: dict[str, int] = {}  # keyword -> code, in order of appearance
        self.keywords: list[str] = []  # by code
        self._lists: dict[str, list[Any]] = {name: [] for name in _ARRAYS}
        self._arrays: dict[str, _Growable] = {}
        self._moments = _Growable(np.int64)
        self._tokens = TokenIndex()
        # The lists as attributes: what the hot loop touches.
        self.present: list[int] = self._lists["present"]
        self.codes: list[int] = self._lists["codes"]
        self.code_rows: list[int] = self._lists["code_rows"]
        self.ints: list[int] = self._lists["ints"]
        self.int_rows: list[int] = self._lists["int_rows"]
        self.floats: list[float] = self._lists["floats"]
        self.float_rows: list[int] = self._lists["float_rows"]

    def add(self, value: Any, row: int) -> None:
        """One value of a row: the value itself, or an element of its array."""
        kind = type(value)
        if kind is str:
            if len(value) <= limits.KEYWORD_LENGTH_MAX:
                code = self.code_of.get(value)
                if code is None:
                    code = self.code_of[value] = len(self.keywords)
                    self.keywords.append(value)
                self.codes.append(code)
                self.code_rows.append(row)
            else:
                self._lists["long_hashes"].append(text_hash(value))
                self._lists["long_rows"].append(row)
        elif kind is int:
            if I64_MIN <= value <= I64_MAX:
                self.ints.append(value)
                self.int_rows.append(row)
            else:
                self._lists["odd_rows"].append(row)
        elif kind is float:
            self.floats.append(value)
            self.float_rows.append(row)
            self._lists["other"].append(row)
        elif kind is bool:
            self._lists["true" if value else "false"].append(row)
        elif value is None:
            self._lists["null"].append(row)
        else:
            self._lists["other"].append(row)
            if (point := geo_point(value)) is not None:
                self._lists["lon"].append(point[0])
                self._lists["lat"].append(point[1])
                self._lists["geo_rows"].append(row)

    def add_array(self, values: list[Any], row: int) -> None:
        if not values:
            self._lists["empty"].append(row)
        elif len(values) > 1:
            self._lists["counts"].append(len(values))
            self._lists["count_rows"].append(row)
        for value in values:
            self.add(value, row)

    def add_null(self, row: int) -> None:
        self._lists["empty"].append(row)
        self._lists["null"].append(row)

    def flush(self) -> None:
        """Move what the lists hold to the arrays."""
        for name, values in self._lists.items():
            if values:
                self._arrays.setdefault(name, _Growable(_ARRAYS[name])).extend(values)
                values.clear()

    def array(self, name: str) -> NDArray[Any]:
        held = self._arrays.get(name)
        return np.empty(0, _ARRAYS[name]) if held is None else held.view()

    def moments(self) -> NDArray[np.int64]:
        known = len(self._moments.view())
        if known < len(self.keywords):
            self._moments.extend(moments_of(self.keywords[known:]))
        return self._moments.view()

    def tokens(self) -> TokenIndex:
        if self._tokens.size < len(self.keywords):
            self._tokens.extend(self.keywords[self._tokens.size :])
        return self._tokens


class GrowingColumns:
    """The columns of a segment that still gets rows. Rows are read when a filter first needs them:
    a collection that is never filtered pays nothing. One caller at a time.

    Cost of a row: about 0.5 us a key and 1 us for the parse.
    """

    cache: BitmapCache | None = None  # bitmaps change with every row
    owner = 0

    def __init__(self) -> None:
        self.row_count = 0
        self.complete = True  # every path has a column
        self._root: dict[str, PathValues] = {}
        self._paths: dict[tuple[str, ...], PathValues] = {}
        self._decode = msgspec.json.Decoder().decode

    def catch_up(self, row_count: int, payload_bytes: Callable[[int], bytes]) -> None:
        """Add the rows up to `row_count` that are not in yet."""
        if row_count > self.row_count:
            self.extend(payload_bytes(row) for row in range(self.row_count, row_count))

    def extend(self, payloads: Iterable[bytes]) -> None:
        """Add the next rows: a JSON object each, or b"" for none."""
        row = self.row_count
        decode, ingest, root = self._decode, self._ingest, self._root
        for payload in payloads:
            if payload:
                ingest(root, (), decode(payload), row)
            row += 1
            if row % _FLUSH_ROWS == 0:
                self._flush()
        self._flush()
        self.row_count = row

    def _flush(self) -> None:
        for path in self._paths.values():
            if path.present:
                path.flush()

    def _ingest(
        self, level: dict[str, PathValues], above: tuple[str, ...], node: dict[str, Any], row: int
    ) -> None:
        for key, value in node.items():
            path = level.get(key)
            if path is None:
                path = self._new_path(level, (*above, key))
                if path is None:
                    continue
            path.present.append(row)
            kind = type(value)
            # The two commonest kinds without a call: a third of the time of a small payload.
            if kind is str and (code := path.code_of.get(value)) is not None:
                path.codes.append(code)
                path.code_rows.append(row)
            elif kind is list:
                path.add_array(value, row)
            elif value is None:
                path.add_null(row)
            else:
                path.add(value, row)
                if kind is dict:
                    self._ingest(path.children, path.keys, value, row)

    def _new_path(self, level: dict[str, PathValues], keys: tuple[str, ...]) -> PathValues | None:
        if len(self._paths) >= limits.COLUMN_PATHS_MAX:
            self.complete = False
            return None
        path = level[keys[-1]] = self._paths[keys] = PathValues(keys)
        return path

    def paths(self) -> Iterator[PathValues]:
        """In order of first appearance."""
        return iter(self._paths.values())

    def column(self, keys: tuple[str, ...], row_count: int) -> PathColumn | None:
        """The column of a plain path for rows 0..row_count-1; None if there is none."""
        path = self._paths.get(keys)
        return None if path is None else _GrowingColumn(path, row_count)


class _GrowingColumn(PathColumn):
    """A path of a growing segment, cut to the rows of one reader."""

    def __init__(self, values: PathValues, row_count: int) -> None:
        self.n = row_count
        self._values = values
        self.single = not len(values.array("count_rows"))

    def _rows(self, name: str) -> Rows:
        """An ascending array of rows, without those that came after the reader."""
        rows = self._values.array(name)
        if len(rows) and rows[-1] >= self.n:
            rows = rows[: rows.searchsorted(np.uint32(self.n))]
        return rows

    def _cut(self, values: str, rows: str) -> tuple[NDArray[Any], Rows]:
        cut = self._rows(rows)
        return self._values.array(values)[: len(cut)], cut

    def _picked(self, rows: Rows, chosen: NDArray[np.bool_]) -> Bits:
        """The bitmap of rows[chosen]; rows ascending. Picking by a mask is the slow part, so it is
        avoided for columns with one value a row."""
        if not self.single:
            return bitmaps.of_rows(rows[chosen], self.n)
        if len(rows) == self.n:  # rows 0, 1, 2, …
            return np.packbits(chosen, bitorder="little")
        mask = np.zeros(self.n, np.bool_)
        mask[rows] = chosen
        return np.packbits(mask, bitorder="little")

    def flag(self, name: str) -> Bits:
        return bitmaps.of_rows(self._rows(name), self.n)

    def keyword_count(self) -> int:
        return len(self._values.keywords)

    def keyword(self, i: int) -> str:
        return self._values.keywords[i]

    def keywords(self) -> Iterable[str]:
        return self._values.keywords

    def keyword_ids(self, texts: Sequence[str]) -> NDArray[np.uint32]:
        codes = {code for text in texts if (code := self._values.code_of.get(text)) is not None}
        return np.array(sorted(codes), np.uint32)

    def prefix_ids(self, prefix: str) -> NDArray[np.uint32]:
        texts = self._values.keywords
        return np.array([i for i, t in enumerate(texts) if t.startswith(prefix)], np.uint32)

    def _listed(self, ids: NDArray[np.uint32]) -> tuple[NDArray[np.bool_], Rows]:
        codes, rows = self._cut("codes", "code_rows")
        if len(ids) == 1:
            return codes == ids[0], rows  # both uint32: nothing is converted
        table = np.zeros(len(self._values.keywords), np.bool_)
        table[ids] = True
        return table[codes], rows

    def keyword_bits(self, ids: NDArray[np.uint32]) -> Bits:
        if not len(ids):
            return bitmaps.none(self.n)
        listed, rows = self._listed(ids)
        return self._picked(rows, listed)

    def other_keyword_bits(self, ids: NDArray[np.uint32]) -> Bits:
        listed, rows = self._listed(ids)
        return self._picked(rows, ~listed)

    def moments(self) -> NDArray[np.int64]:
        return self._values.moments()

    def token_index(self) -> TokenIndex:
        return self._values.tokens()

    def int_bits(self, low: int, high: int) -> Bits:
        ints, rows = self._cut("ints", "int_rows")
        return self._picked(rows, (ints >= np.int64(low)) & (ints <= np.int64(high)))

    def listed_int_bits(self, values: NDArray[np.int64]) -> Bits:
        ints, rows = self._cut("ints", "int_rows")
        return self._picked(rows, np.isin(ints, values))

    def other_int_bits(self, values: NDArray[np.int64]) -> Bits:
        ints, rows = self._cut("ints", "int_rows")
        return self._picked(rows, ~np.isin(ints, values))

    def float_bits(self, interval: FloatInterval) -> Bits:
        floats, rows = self._cut("floats", "float_rows")
        above = floats > interval.low if interval.low_open else floats >= interval.low
        below = floats < interval.high if interval.high_open else floats <= interval.high
        return self._picked(rows, above & below)

    def geo(self) -> GeoArrays | None:
        rows = self._rows("geo_rows")
        if not len(rows):
            return None
        return self._values.array("lon")[: len(rows)], self._values.array("lat")[: len(rows)], rows

    def counts(self) -> tuple[Rows, NDArray[np.uint32]]:
        counts, rows = self._cut("counts", "count_rows")
        return rows, counts

    def odd_rows(self) -> Rows:
        return self._rows("odd_rows")

    def long_rows(self, text: str | None = None) -> Rows:
        hashes, rows = self._cut("long_hashes", "long_rows")
        return rows if text is None else rows[hashes == np.uint32(text_hash(text))]
