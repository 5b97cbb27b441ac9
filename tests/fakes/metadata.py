"""A metadata store in memory, on the event loop alone: for tests on a virtual clock."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence

from shoal.errors import Unavailable
from shoal.metadata.contract import Compare, Event, KeyValue, TxnResult, Uncertain, check_txn

__all__ = ["FakeStore"]


class FakeStore:
    """What `shoal.metadata.contract` says, without leases.

    down       every call raises Unavailable.
    uncertain  of the next transactions: True, it happens and nobody is told; False, it does not;
               None, nothing is wrong with it.
    deaf       watches tell nothing until it is False again and something changes.
    """

    def __init__(self) -> None:
        self.down = self.deaf = False
        self.uncertain: list[bool | None] = []
        self.reads = 0
        self._kv: dict[str, KeyValue] = {}
        self._history: list[Event] = []
        self._revision = 0
        self._changed = asyncio.Event()

    def _check(self) -> None:
        if self.down:
            raise Unavailable("the metadata store does not answer")

    async def get(self, key: str) -> KeyValue | None:
        self._check()
        self.reads += 1
        return self._kv.get(key)

    async def range(self, prefix: str) -> tuple[list[KeyValue], int]:
        self._check()
        found = [self._kv[key] for key in sorted(self._kv) if key.startswith(prefix)]
        return found, self._revision

    async def txn(
        self,
        compares: Sequence[Compare],
        puts: Mapping[str, bytes],
        deletes: Sequence[str] = (),
        *,
        lease: int | None = None,
    ) -> TxnResult:
        assert lease is None
        self._check()
        check_txn(compares, puts, deletes)
        unsure = self.uncertain.pop(0) if self.uncertain else None
        if unsure is False:
            raise Uncertain("no answer to the transaction")
        for compare in compares:
            found = self._kv.get(compare.key)
            if compare.revision != (0 if found is None else found.revision):
                return TxnResult(False, self._revision)
        gone = [key for key in deletes if key in self._kv]
        if puts or gone:
            self._revision += 1
        for key, value in puts.items():
            self._kv[key] = KeyValue(key, value, self._revision)
            self._history.append(Event(key, value, self._revision))
        for key in gone:
            del self._kv[key]
            self._history.append(Event(key, None, self._revision))
        self._changed.set()
        self._changed = asyncio.Event()
        if unsure:
            raise Uncertain("no answer to the transaction")
        return TxnResult(True, self._revision)

    async def watch(self, prefix: str, from_revision: int) -> AsyncIterator[list[Event]]:
        while True:
            changed = self._changed
            events = [e for e in self._history if e.revision > from_revision]
            if events and not self.deaf:
                from_revision = events[-1].revision
                if wanted := [event for event in events if event.key.startswith(prefix)]:
                    yield wanted
            await changed.wait()

    async def close(self) -> None:
        self.down = True
