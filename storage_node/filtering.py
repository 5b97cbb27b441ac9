"""Filter -> bitmap of the rows of a segment for which it holds.

Conditions become packed bitmaps through columns, and clauses combine them byte-wise. What columns
cannot decide is read row by row, and only where it still matters: `must` evaluates the cheap
conditions first and hands the survivors on as candidates. Row reading is the slow part (about 2 us a
row), so its extent is all that this module tries to keep small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, assert_never

import numpy as np
from numpy.typing import NDArray

from shoal.api.filter import (
    Condition,
    FieldCondition,
    Filter,
    HasIdCondition,
    HasVectorCondition,
    IsEmptyCondition,
    IsNullCondition,
    NestedCondition,
    Slice,
    SliceCondition,
    condition_key,
)
from shoal.payload import decode, parse_path
from storage_node import bits as bitmaps
from storage_node.bits import Bits
from storage_node.columns import Columns
from storage_node.path_column import PathColumn, Verdict
from storage_node.raw_hint import hint_of
from storage_node.row_filter import Point, compile_condition, compile_filter
from storage_node.siphash import hash_keys

__all__ = ["Rows", "allowed", "matches"]

PayloadCondition = FieldCondition | IsEmptyCondition | IsNullCondition | NestedCondition


class Rows(Protocol):
    """A segment as a filter sees it. Rows are 0..row_count-1, deleted ones included."""

    row_count: int

    @property
    def columns(self) -> Columns: ...

    def payload_bytes(self, row: int) -> bytes:
        """One JSON object, or b"" for none."""
        ...

    def rows_with_keys(self, keys: Sequence[int]) -> NDArray[np.uint32]:
        """Rows whose id is one of the keys, any order."""
        ...

    def keys_of(self, rows: NDArray[np.integer]) -> list[int]: ...

    def present_bits(self, name: str) -> Bits | None:
        """Rows that have the vector; None = every row. KeyError: no such vector."""
        ...


def allowed(filter: Filter, rows: Rows) -> Bits:
    """(ceil(row_count / 8),) uint8: the rows for which `filter` holds; bits past the last row are 0.

    The array may be shared with other callers and must not be changed.
    """
    rows.columns.catch_up(rows.row_count, rows.payload_bytes)
    return _Evaluation(rows).filter(filter, None)


def matches(filter: Filter, payload: bytes, key: int, has_vector: Callable[[str], bool]) -> bool:
    """Whether `filter` holds for one point: its payload (b"" for none), id key and vectors."""
    return compile_filter(filter)(decode(payload), Point(key, has_vector))


class _Evaluation:
    """One filter on one segment. Every method takes candidates (None = all rows) and answers
    correctly for these only; of other rows it may say anything."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._n = rows.row_count
        self._columns = rows.columns

    def filter(self, filter: Filter, candidates: Bits | None) -> Bits:
        """Unlike the other methods exact: no row outside of the candidates."""
        held = candidates
        for condition, wanted in self._by_cost(filter):
            bits = self._condition(condition, held)
            if not wanted:
                bits = bitmaps.inverted(bits, self._n)
            held = bits if held is None else held & bits
        if filter.should:
            held = self._any(filter.should, held)
        if filter.min_should is not None:
            some = filter.min_should
            held = self._at_least(some.min_count, some.conditions, held)
        return bitmaps.full(self._n) if held is None else held

    def _by_cost(self, filter: Filter) -> list[tuple[Condition, bool]]:
        """The conditions of must and must_not, cheapest first, and whether they should hold."""
        conditions = [(condition, True) for condition in filter.must or ()]
        conditions += [(condition, False) for condition in filter.must_not or ()]
        if len(conditions) > 1:
            conditions.sort(key=lambda pair: self._cost(pair[0]))
        return conditions

    def _cost(self, condition: Condition) -> int:
        """0: columns alone. 1: rows may be read. 2: a filter. 3: rows are read."""
        match condition:
            case Filter():
                return 2
            case SliceCondition() | NestedCondition():
                return 3
            case HasIdCondition() | HasVectorCondition():
                return 0
            case _:
                path = parse_path(_key_of(condition))
                if path.plain is None:
                    return 3
                return 0 if self._columns.complete else 1

    def _any(self, conditions: Sequence[Condition], candidates: Bits | None) -> Bits:
        found: Bits | None = None
        for condition in sorted(conditions, key=self._cost):
            # Rows that are in already need no second reason.
            if found is None:
                left = candidates
            else:
                everything = bitmaps.full(self._n) if candidates is None else candidates
                left = everything & ~found
            bits = self._condition(condition, left)
            bits = bits if left is None else bits & left
            found = bits if found is None else found | bits
        return bitmaps.none(self._n) if found is None else found

    def _at_least(
        self, least: int, conditions: Sequence[Condition], candidates: Bits | None
    ) -> Bits:
        if len(conditions) < least:
            return bitmaps.none(self._n)
        counts = np.zeros(self._n, np.uint16)  # FILTER_CONDITIONS_MAX fits
        for condition in conditions:
            counts += bitmaps.to_mask(self._condition(condition, candidates), self._n)
        bits = np.packbits(counts >= np.uint16(least), bitorder="little")
        return bits if candidates is None else bits & candidates

    # -- conditions -------------------------------------------------------------------------------
    def _condition(self, condition: Condition, candidates: Bits | None) -> Bits:
        match condition:
            case Filter():
                return self.filter(condition, candidates)
            case HasIdCondition():
                found = self._rows.rows_with_keys(condition.has_id)
                return bitmaps.of_rows(found[found < np.uint32(self._n)], self._n)
            case HasVectorCondition():
                return self._has_vector(condition.has_vector)
            case SliceCondition():
                return self._cached(condition, lambda: self._slice(condition.slice))
            case FieldCondition() | IsEmptyCondition() | IsNullCondition() | NestedCondition():
                return self._payload_condition(condition, candidates)
            case _:
                assert_never(condition)

    def _cached(self, condition: SliceCondition, compute: Callable[[], Bits]) -> Bits:
        cache = self._columns.cache
        if cache is None:
            return compute()
        key = (self._columns.owner, condition_key(condition))
        bits = cache.get(key)
        if bits is None:
            bits = compute()
            cache.put(key, bits)
        return bits

    def _has_vector(self, name: str) -> Bits:
        try:
            bits = self._rows.present_bits(name)
        except KeyError:  # no point has a vector that the collection does not have
            return bitmaps.none(self._n)
        return bitmaps.full(self._n) if bits is None else bits

    def _slice(self, part: Slice) -> Bits:
        keys = self._rows.keys_of(np.arange(self._n, dtype=np.int64))
        inside = hash_keys(keys) % np.uint64(part.total) == np.uint64(part.index)
        return np.packbits(inside, bitorder="little")

    def _payload_condition(self, condition: PayloadCondition, candidates: Bits | None) -> Bits:
        cache = self._columns.cache
        key = None if cache is None else (self._columns.owner, condition_key(condition))
        if cache is not None and (held := cache.get(key)) is not None:
            return held
        bits, unsure = self._verdict(condition)
        if len(unsure):
            waiting = bitmaps.of_rows(unsure, self._n) & ~bits
            if candidates is not None:
                waiting &= candidates
            bits = bits | self._read(condition, waiting)
        if cache is not None and (candidates is None or not len(unsure)):
            cache.put(key, bits)
        return bits

    def _verdict(self, condition: PayloadCondition) -> Verdict:
        """What columns know about a condition."""
        path = parse_path(_key_of(condition))
        if path.plain is not None and not isinstance(condition, NestedCondition):
            column = self._columns.column(path.plain, self._n)
            if column is None:
                return self._without_column(condition)
            if isinstance(condition, IsEmptyCondition):
                return Verdict(column.empty_bits())
            if isinstance(condition, IsNullCondition):
                return Verdict(column.null_bits())
            return column.evaluate(condition)
        # The path goes on below a plain one: only rows that have the plain one need reading.
        column = self._columns.column(path.prefix, self._n)
        if column is None:
            return self._without_column(condition)
        return self._below(condition, column)

    def _without_column(self, condition: PayloadCondition) -> Verdict:
        if not self._columns.complete:
            return Verdict(bitmaps.none(self._n), np.arange(self._n, dtype=np.uint32))
        return Verdict(self._of_absent(condition))

    def _below(self, condition: PayloadCondition, column: PathColumn) -> Verdict:
        present = column.present_bits()
        absent = bitmaps.inverted(present, self._n)
        return Verdict(self._of_absent(condition) & absent, bitmaps.to_rows(present, self._n))

    def _of_absent(self, condition: PayloadCondition) -> Bits:
        """All rows or none: whether the condition holds where its path selects nothing."""
        holds = compile_condition(condition)({}, None)
        return bitmaps.full(self._n) if holds else bitmaps.none(self._n)

    def _read(self, condition: PayloadCondition, candidates: Bits) -> Bits:
        """Decide the candidates by their payloads."""
        test, hint = compile_condition(condition), hint_of(condition)
        payload_bytes = self._rows.payload_bytes
        found = []
        for row in bitmaps.to_rows(candidates, self._n).tolist():
            raw = payload_bytes(row)
            if (hint is None or hint(raw)) and test(decode(raw), None):
                found.append(row)
        return bitmaps.of_rows(np.array(found, np.uint32), self._n)


def _key_of(condition: PayloadCondition) -> str:
    match condition:
        case FieldCondition():
            return condition.key
        case IsEmptyCondition():
            return condition.is_empty.key
        case IsNullCondition():
            return condition.is_null.key
        case NestedCondition():
            return condition.nested.key
