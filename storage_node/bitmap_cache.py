"""Bitmaps of conditions that were asked before, for segments that do not change."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
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
            old = self._bits.pop(key, None)
            if old is not None:
                self.byte_count -= old.nbytes + _ENTRY_BYTES
            self._bits[key] = bits
            self.byte_count += size
            while self.byte_count > self.bytes_max:
                _, dropped = self._bits.popitem(last=False)
                self.byte_count -= dropped.nbytes + _ENTRY_BYTES

    def forget(self, owner: int) -> None:
        """Drop everything of one segment."""
        with self._lock:
            for key in [k for k in self._bits if isinstance(k, tuple) and k[0] == owner]:
                self.byte_count -= self._bits.pop(key).nbytes + _ENTRY_BYTES


SHARED = BitmapCache(limits.FILTER_CACHE_BYTES_MAX)
"""The one of this process: the bound is for all segments together."""
