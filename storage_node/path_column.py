"""One payload path as a column: how every condition on it becomes a bitmap.

`PathColumn` holds the logic and names the few primitives that differ between a sealed segment
(sorted arrays, postings) and a growing one (arrays in row order): see storage_node.columns and
storage_node.column_collector.

A value is kept as one of: true, false, an integer of 64 bits, a keyword (a string of at most
KEYWORD_LENGTH_MAX characters), a long string (its hash only), an *odd* value (an integer beyond 64
bits), a point on the globe, or *other* (float, object, array: no match condition can equal it; floats
are numbers besides). A condition is decided for keywords, numbers and points here; rows whose long
or odd values it might touch are returned as unsure and are read from the payload.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple, assert_never

import numpy as np
from numpy.typing import NDArray

from shoal import limits
from shoal.api.filter import (
    DatetimeRange,
    FieldCondition,
    Match,
    MatchAny,
    MatchExcept,
    MatchPhrase,
    MatchPrefix,
    MatchSubstring,
    MatchText,
    MatchTextAny,
    MatchValue,
    Range,
    ValuesCount,
)
from shoal.datetimes import microseconds, parse_datetime
from storage_node import bits as bitmaps
from storage_node.bits import Bits, Rows
from storage_node.geo import Area
from storage_node.row_filter import area_of, count_test, datetime_bounds, holds_phrase, tokens

__all__ = [
    "I64_MAX",
    "I64_MIN",
    "FloatInterval",
    "GeoArrays",
    "PathColumn",
    "TokenIndex",
    "Verdict",
    "moments_of",
    "text_hash",
]

I64_MIN, I64_MAX = -(1 << 63), (1 << 63) - 1
NO_MOMENT = I64_MIN  # in an array of microseconds: this keyword is no datetime
NO_ROWS = np.empty(0, np.uint32)

Ids = NDArray[np.uint32]  # of keywords in the dictionary of a column
Int64s = NDArray[np.int64]
GeoArrays = tuple[NDArray[np.float64], NDArray[np.float64], Rows]  # lon, lat, row


class Verdict(NamedTuple):
    """bits: rows for which the condition holds for sure. unsure: rows (any order, repeats allowed)
    that have to be read before one knows; a row may be in both."""

    bits: Bits
    unsure: Rows = NO_ROWS


class FloatInterval(NamedTuple):
    low: float
    low_open: bool
    high: float
    high_open: bool


class PathColumn(ABC):
    """What one path holds in rows 0..n-1."""

    n: int
    single: bool  # no row has more than one value: known when there are no arrays of two or more

    # -- primitives -------------------------------------------------------------------------------
    @abstractmethod
    def flag(self, name: str) -> Bits:
        """Rows that have the property: "present" (the key is there), "empty" (null or []), "null"
        (null or an array holding one), and with such a value: "true", "false", "other"."""

    @abstractmethod
    def keyword_count(self) -> int: ...

    @abstractmethod
    def keyword(self, i: int) -> str: ...

    @abstractmethod
    def keywords(self) -> Iterable[str]:
        """All of them, in the order of their ids."""

    @abstractmethod
    def keyword_ids(self, texts: Sequence[str]) -> Ids:
        """Ids of those texts that are in the dictionary, ascending."""

    @abstractmethod
    def prefix_ids(self, prefix: str) -> Ids: ...

    @abstractmethod
    def keyword_bits(self, ids: Ids) -> Bits:
        """Rows with at least one of the keywords."""

    @abstractmethod
    def other_keyword_bits(self, ids: Ids) -> Bits:
        """Rows with at least one keyword that is not listed."""

    @abstractmethod
    def moments(self) -> Int64s:
        """Microseconds of each keyword, NO_MOMENT where it is no datetime. Kept once computed."""

    @abstractmethod
    def token_index(self) -> TokenIndex:
        """Words to keywords. Kept once computed."""

    @abstractmethod
    def int_bits(self, low: int, high: int) -> Bits:
        """Rows with an integer in low..high (64-bit, inclusive)."""

    @abstractmethod
    def listed_int_bits(self, values: Int64s) -> Bits: ...

    @abstractmethod
    def other_int_bits(self, values: Int64s) -> Bits:
        """Rows with an integer that is not listed."""

    @abstractmethod
    def float_bits(self, interval: FloatInterval) -> Bits: ...

    @abstractmethod
    def geo(self) -> GeoArrays | None: ...

    @abstractmethod
    def counts(self) -> tuple[Rows, NDArray[np.uint32]]:
        """Rows with an array of two or more elements, ascending, and how many each has."""

    @abstractmethod
    def odd_rows(self) -> Rows: ...

    @abstractmethod
    def long_rows(self, text: str | None = None) -> Rows:
        """Rows with a long string; with `text` only those that may equal it."""

    # -- conditions -------------------------------------------------------------------------------
    def present_bits(self) -> Bits:
        return self.flag("present")

    def empty_bits(self) -> Bits:
        return bitmaps.inverted(self.flag("present"), self.n) | self.flag("empty")

    def null_bits(self) -> Bits:
        return self.flag("null")

    def evaluate(self, condition: FieldCondition) -> Verdict:
        if condition.match is not None:
            return self._match(condition.match)
        if condition.range is not None:
            if isinstance(condition.range, Range):
                return self._range(condition.range)
            return self._datetimes(condition.range)
        if condition.values_count is not None:
            return Verdict(self._values_count(condition.values_count))
        if condition.is_empty is not None:
            return self._wanted(self.empty_bits(), condition.is_empty)
        if condition.is_null is not None:
            return self._wanted(self.null_bits(), condition.is_null)
        area = area_of(condition)
        return Verdict(bitmaps.none(self.n) if area is None else self._area(area))

    def _wanted(self, bits: Bits, wanted: bool) -> Verdict:
        return Verdict(bits if wanted else bitmaps.inverted(bits, self.n))

    def _match(self, match: Match) -> Verdict:
        match match:
            case MatchValue(value=bool(value)):
                return Verdict(self.flag("true" if value else "false"))
            case MatchValue(value=str(value)):
                return self._texts((value,))
            case MatchValue(value=int(value)):
                return self._ints((value,))
            case MatchAny(any=values):
                texts, numbers = _split(values)
                return self._texts(texts) if texts else self._ints(numbers)
            case MatchExcept(except_=values):
                return self._except(*_split(values))
            case MatchPrefix():
                ids = self.prefix_ids(match.prefix)
                return Verdict(self.keyword_bits(ids), self.long_rows())
            case MatchSubstring():
                wanted = match.substring
                found = [i for i, text in enumerate(self.keywords()) if wanted in text]
                return Verdict(self.keyword_bits(np.array(found, np.uint32)), self.long_rows())
            case MatchText() | MatchTextAny() | MatchPhrase():
                return Verdict(self.keyword_bits(self._text_ids(match)), self.long_rows())
            case MatchValue():
                raise AssertionError("unreachable: a match value is bool, str or int")
            case _:
                assert_never(match)

    def _texts(self, texts: Sequence[str]) -> Verdict:
        short = [text for text in texts if len(text) <= limits.KEYWORD_LENGTH_MAX]
        unsure = [self.long_rows(t) for t in texts if len(t) > limits.KEYWORD_LENGTH_MAX]
        bits = self.keyword_bits(self.keyword_ids(short))
        return Verdict(bits, np.concatenate(unsure) if unsure else NO_ROWS)

    def _ints(self, numbers: Sequence[int]) -> Verdict:
        if len(numbers) == 1 and numbers[0] <= I64_MAX:
            return Verdict(self.int_bits(numbers[0], numbers[0]))
        small, all_small = _int64s(numbers)
        return Verdict(self.listed_int_bits(small), NO_ROWS if all_small else self.odd_rows())

    def _except(self, texts: Sequence[str], numbers: Sequence[int]) -> Verdict:
        short = [text for text in texts if len(text) <= limits.KEYWORD_LENGTH_MAX]
        small, all_small = _int64s(numbers)
        bits = (
            self.flag("other")
            | self.flag("true")
            | self.flag("false")
            | self.other_keyword_bits(self.keyword_ids(short))
            | self.other_int_bits(small)
        )
        # A long or odd value differs for sure unless a value of its kind is listed.
        unsure = NO_ROWS
        for rows, sure in (
            (self.long_rows(), len(short) == len(texts)),
            (self.odd_rows(), all_small),
        ):
            if sure and len(rows):
                bits = bits | bitmaps.of_rows(rows, self.n)
            elif len(rows):
                unsure = np.concatenate([unsure, rows])
        return Verdict(bits, unsure)

    def _text_ids(self, match: MatchText | MatchTextAny | MatchPhrase) -> Ids:
        index = self.token_index()
        if isinstance(match, MatchTextAny):
            return index.with_any(tokens(match.text_any))
        if isinstance(match, MatchText):
            return index.with_all(tokens(match.text))
        phrase = tokens(match.phrase)
        ids = index.with_all(phrase)
        if len(phrase) < 2:
            return ids
        found = [i for i in ids.tolist() if holds_phrase(tokens(self.keyword(i)), phrase)]
        return np.array(found, np.uint32)

    def _range(self, bounds: Range) -> Verdict:
        low, high = _int_interval(bounds)
        bits = self.float_bits(_float_interval(bounds))
        if low <= high:
            bits = bits | self.int_bits(low, high)
        return Verdict(bits, self.odd_rows())

    def _datetimes(self, bounds: DatetimeRange) -> Verdict:
        # Long strings are no datetimes: DATETIME_TEXT_MAX is smaller than KEYWORD_LENGTH_MAX.
        first, last = datetime_bounds(bounds)
        moments = self.moments()
        inside = (moments >= np.int64(first)) & (moments <= np.int64(last))
        return Verdict(self.keyword_bits(np.flatnonzero(inside).astype(np.uint32)))

    def _area(self, area: Area) -> Bits:
        points = self.geo()
        if points is None:
            return bitmaps.none(self.n)
        lon, lat, rows = points
        return bitmaps.of_rows(rows[area.holds_many(lon, lat)], self.n)

    def _values_count(self, bounds: ValuesCount) -> Bits:
        test = count_test(bounds)
        some = bitmaps.inverted(self.empty_bits(), self.n)
        bits = some if test(1) else bitmaps.none(self.n)
        rows, counts = self.counts()
        if len(rows):
            distinct = np.unique(counts)
            good = distinct[[test(count) for count in distinct.tolist()]]
            bits = bits & ~bitmaps.of_rows(rows, self.n)
            bits |= bitmaps.of_rows(rows[np.isin(counts, good)], self.n)
        return bits | self.empty_bits() if test(0) else bits


# -- helpers --------------------------------------------------------------------------------------
def _split(values: tuple[str, ...] | tuple[int, ...]) -> tuple[list[str], list[int]]:
    return (
        [value for value in values if isinstance(value, str)],
        [value for value in values if isinstance(value, int)],
    )


def _int64s(numbers: Sequence[int]) -> tuple[Int64s, bool]:
    """Those that fit 64 signed bits, and whether all did."""
    small = [number for number in numbers if number <= I64_MAX]
    return np.array(small, np.int64), len(small) == len(numbers)


def _int_interval(bounds: Range) -> tuple[int, int]:
    """The integers within the bounds, exactly, as low..high clamped to 64 bits; low > high: none."""
    low, high = I64_MIN, I64_MAX
    if bounds.gt is not None:
        low = max(low, math.floor(bounds.gt) + 1)
    if bounds.gte is not None:
        low = max(low, math.ceil(bounds.gte))
    if bounds.lt is not None:
        high = min(high, math.ceil(bounds.lt) - 1)
    if bounds.lte is not None:
        high = min(high, math.floor(bounds.lte))
    return low, high


def _float_interval(bounds: Range) -> FloatInterval:
    """The floats within the bounds, exactly, even where an integer bound is no float itself."""
    low, low_open, high, high_open = -math.inf, False, math.inf, False
    for bound, strict in ((bounds.gt, True), (bounds.gte, False)):
        if bound is not None:
            near = _nearest_float(bound)
            is_open = near < bound or (near == bound and strict)
            if (near, is_open) > (low, low_open):
                low, low_open = near, is_open
    for bound, strict in ((bounds.lt, True), (bounds.lte, False)):
        if bound is not None:
            near = _nearest_float(bound)
            is_open = near > bound or (near == bound and strict)
            if (near, not is_open) < (high, not high_open):
                high, high_open = near, is_open
    return FloatInterval(low, low_open, high, high_open)


def _nearest_float(bound: float) -> float:
    try:
        return float(bound)
    except OverflowError:
        return math.inf if bound > 0 else -math.inf


def text_hash(text: str) -> int:
    """32 bits; a collision costs one row read, never a wrong answer."""
    return zlib.crc32(text.encode())


def moments_of(keywords: Iterable[str]) -> Int64s:
    """Microseconds since 1970 of each keyword, NO_MOMENT where it is no datetime."""
    parsed = map(parse_datetime, keywords)
    return np.array([NO_MOMENT if m is None else microseconds(m) for m in parsed], np.int64)


class TokenIndex:
    """word -> ids of the keywords that contain it. Grows at the end only."""

    def __init__(self) -> None:
        self.size = 0  # keywords indexed so far
        self._ids: dict[str, array[int]] = {}

    def extend(self, keywords: Iterable[str]) -> None:
        """Index the keywords with ids size, size + 1, …"""
        ids = self._ids
        number = self.size
        for number, keyword in enumerate(keywords, self.size):
            for word in set(tokens(keyword)):
                held = ids.get(word)
                if held is None:
                    ids[word] = array("I", (number,))
                else:
                    held.append(number)
            self.size = number + 1

    def with_all(self, words: Sequence[str]) -> Ids:
        """Keywords that contain every word, ascending; none for no words."""
        held = [self._of(word) for word in set(words)]
        if not held:
            return NO_ROWS
        held.sort(key=len)
        found = held[0]
        for more in held[1:]:
            found = np.intersect1d(found, more, assume_unique=True)
        return found

    def with_any(self, words: Sequence[str]) -> Ids:
        held = [self._of(word) for word in set(words)]
        return np.unique(np.concatenate(held)) if held else NO_ROWS

    def _of(self, word: str) -> Ids:
        held = self._ids.get(word)
        return NO_ROWS if held is None else np.array(held, np.uint32)
