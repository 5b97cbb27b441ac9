"""Bitmaps of conditions that were asked before, for segments that do not change."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict, deque
from collections.abc import Hashable

from shoal import limits
from storage_node.bits import Bits

__all__ = ["SHARED", "BitmapCache"]

_ENTRY_BYTES = 300  # key, dictionary entry and array object; measured, roughly


class BitmapCache:
    """Least recently used bitmaps, at most `bytes_max` bytes of them. Safe for several threads.

    Bitmaps are made read-only when they are put, because all callers get the same array.
    """

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.byte_count = 0
        self._bits: OrderedDict[Hashable, Bits] = OrderedDict()
        self._lock = threading.Lock()
        self._owners = itertools.count()
        self._forgotten: deque[int] = deque()

    def new_owner(self) -> int:
        """A number that no other segment has: the first part of its keys."""
        return next(self._owners)

    def get(self, key: Hashable) -> Bits | None:
        with self._lock:
            bits = self._bits.get(key)
            if bits is not None:
                self._bits.move_to_end(key)
            return bits

    def put(self, key: Hashable, bits: Bits) -> None:
        size = bits.nbytes + _ENTRY_BYTES
        if size > self.bytes_max:
            return
        bits.setflags(write=False)
        with self._lock:
            while self._forgotten:
                self._drop_all_of(self._forgotten.popleft())
            self._drop(key)
            self._bits[key] = bits
            self.byte_count += size
            while self.byte_count > self.bytes_max:
                self._drop(next(iter(self._bits)))

    def forget(self, owner: int) -> None:
        """Drop everything of one segment, at the next `put`. Takes no lock: the garbage collector may
        call this in the middle of any other method."""
        self._forgotten.append(owner)

    def _drop(self, key: Hashable) -> None:
        bits = self._bits.pop(key, None)
        if bits is not None:
            self.byte_count -= bits.nbytes + _ENTRY_BYTES

    def _drop_all_of(self, owner: int) -> None:
        for key in [k for k in self._bits if isinstance(k, tuple) and k[0] == owner]:
            self._drop(key)


SHARED = BitmapCache(limits.FILTER_CACHE_BYTES_MAX)
"""The one of this process: the bound is for all segments together."""
