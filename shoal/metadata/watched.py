"""A part of the metadata store, kept up to date in memory.

    store ──range──▶ entries ──events──▶ on_change
          ──watch──▶

A store that went back (a restored backup) is not followed: `entries` stay as they are, and whoever
started the process is told, see `MetadataStore.on_went_back`.

Nothing a watch can do loses a change for good: after Compacted, and every `recheck_s` in any case,
everything is read anew and the difference is reported as events, deletes too. (Old etcd servers can
lose watch events without a word; `missed` counts what only the rereading found.)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from os.path import commonprefix
from types import MappingProxyType

from shoal.errors import ShoalError
from shoal.metadata.contract import (
    Compacted,
    Event,
    KeyValue,
    MetadataStore,
    StoreRefused,
    StoreWentBack,
)
from shoal.telemetry import logger

__all__ = ["Watched"]

_BACKOFF_S_MIN, _BACKOFF_S_MAX = 0.1, 3.0
_COMPACTED_S = 0.02  # a member that lags may say it a few times in a row

_log = logger("metadata")


class Watched:
    """All keys under some prefixes, with every change that comes later.

    One watch serves all prefixes, so entries show whole transactions: never one key of a change
    without the other. It covers what the prefixes have in common and drops the rest here.

    prefixes    key prefixes such as "shards/"
    on_change   called in the event loop with the events of one or more whole revisions, after
                `entries` has them; first with everything that exists at the start. Events come in
                revision order, those of a reread in key order. What it raises is logged.
    recheck_s   between two rereads
    """

    def __init__(
        self,
        store: MetadataStore,
        prefixes: Sequence[str],
        *,
        on_change: Callable[[Sequence[Event]], None] | None = None,
        recheck_s: float = 60.0,
    ) -> None:
        self._store = store
        self._prefixes = tuple(prefixes)
        self._common = commonprefix(self._prefixes)  # noqa: RUF071, characters are meant
        self._on_change = on_change
        self._recheck_s = recheck_s
        self._entries: dict[str, KeyValue] = {}
        self._seen = 0  # every change up to this revision is in the entries
        self._reread_at_s = 0.0  # by the loop's clock
        self._task: asyncio.Task[None] | None = None
        self.entries: Mapping[str, KeyValue] = MappingProxyType(self._entries)
        self.missed = 0
        self.failing: ShoalError | None = None

    @property
    def revision(self) -> int:
        """Every change up to this revision is in `entries`; there may be later ones."""
        return self._seen

    async def start(self) -> None:
        """Read everything, then follow. Raises what `range` raises; nothing is left running then."""
        await self._reread()
        self._task = asyncio.create_task(self._follow())

    async def close(self) -> None:
        """`entries` stay as they are. May be called twice."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def _follow(self) -> None:
        """`failing` says what keeps us from following, until it works again."""
        backoff_s = _BACKOFF_S_MIN
        again = False
        while True:
            try:
                if again:
                    await self._reread()
                self._recovered()
                again = False
                backoff_s = _BACKOFF_S_MIN
                await self._watch()
                return  # the store is closed
            except Compacted:
                again = True
                await asyncio.sleep(_COMPACTED_S)
            except StoreWentBack as error:
                _log.error("store_went_back", prefix=self._common, why=error.message)
                self.failing = error
                if self._store.on_went_back is not None:
                    self._store.on_went_back(error)
                return
            except ShoalError as error:
                if self.failing is None:
                    level = _log.error if isinstance(error, StoreRefused) else _log.warning
                    level("watch_failed", prefix=self._common, why=error.message)
                self.failing = error
                again = True
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _BACKOFF_S_MAX)

    def _recovered(self) -> None:
        if self.failing is not None:
            _log.info("watch_resumed", prefix=self._common, revision=self._seen)
            self.failing = None

    async def _watch(self) -> None:
        watch = self._store.watch(self._common, self._seen)
        try:
            while (events := await self._next(watch)) is not None:
                self._apply([e for e in events if e.revision > self._seen])
        finally:
            close = getattr(watch, "aclose", None)
            if close is not None:
                await close()

    async def _next(self, watch: AsyncIterator[list[Event]]) -> list[Event] | None:
        """The next events, with a reread before them when it is due. None: the watch has ended."""
        coming = asyncio.ensure_future(anext(watch, None))
        now_s = asyncio.get_running_loop().time
        try:
            while True:
                done, _ = await asyncio.wait([coming], timeout=max(0, self._reread_at_s - now_s()))
                if done and self._reread_at_s > now_s():
                    return coming.result()
                try:
                    await self._reread()
                except StoreWentBack:
                    raise
                except ShoalError as error:
                    _log.warning("recheck_failed", prefix=self._common, why=error.message)
                    self._reread_at_s = now_s() + self._recheck_s
        finally:
            if not coming.done():
                coming.cancel()
                await asyncio.wait([coming])

    async def _reread(self) -> None:
        told = self._seen
        found, revision = await self._store.range(self._common)
        fresh = {kv.key: kv for kv in found if self._wanted(kv.key)}
        await self._check_goes_on(fresh, revision)
        events = [
            Event(key, kv.value, kv.revision)
            for key, kv in fresh.items()
            if self._entries.get(key) != kv
        ]
        gone = [Event(key, None, revision) for key in self._entries if key not in fresh]
        # A watch keeps the order, so what is older than its last news was lost on the way.
        late = sum(event.revision <= told for event in events)
        if late:
            self.missed += late
            _log.warning("watch_missed_changes", prefix=self._common, keys=late)
        self._apply(sorted([*events, *gone], key=lambda event: event.key))
        self._seen = revision
        self._reread_at_s = asyncio.get_running_loop().time() + self._recheck_s

    async def _check_goes_on(self, fresh: Mapping[str, KeyValue], revision: int) -> None:
        """Raises StoreWentBack. Reads are linearizable, so what we knew is old, never too new. A
        restored store may have passed the revision that we knew. Then its history tells: what is in
        it at one revision is proof of everything before, so the latest that is no more is enough."""
        if revision < self._seen:
            raise StoreWentBack.because(f"it is at revision {revision} and was at {self._seen}")
        changed = [kv for key, kv in self._entries.items() if fresh.get(key) != kv]
        if not changed:
            return
        latest = max(changed, key=lambda kv: kv.revision)
        if not await self._store.remembers(latest):
            raise StoreWentBack.because(
                f"{latest.key} was of revision {latest.revision}, and its history knows nothing of it"
            )

    def _wanted(self, key: str) -> bool:
        return key.startswith(self._prefixes)

    def _apply(self, events: Sequence[Event]) -> None:
        if not events:
            return
        self._seen = max(self._seen, events[-1].revision)
        wanted = [event for event in events if self._wanted(event.key)]
        for event in wanted:
            if event.value is None:
                self._entries.pop(event.key, None)
            else:
                self._entries[event.key] = KeyValue(event.key, event.value, event.revision)
        if wanted and self._on_change is not None:
            try:
                self._on_change(wanted)
            except Exception as error:
                _log.error("watcher_failed", prefix=self._common, error=error)
