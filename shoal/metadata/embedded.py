"""The metadata store of a single machine: one SQLite file, one process.

Durability: write-ahead log with synchronous=FULL, so every commit is fsynced before `txn` returns
(synchronous=NORMAL would not: see docs/decisions/0001). One thread of our own owns the connection;
the event loop never waits for the disk. The file is locked while it is open.

What is left out: the history of changes is kept in memory only, the last HISTORY_REVISIONS_MAX
revisions. Every watcher lives in this process and starts from a `range`, so after a restart nobody
can ask for older ones; who does gets Compacted, as with etcd.

Leases are counted in time during which the event loop ran: whoever keeps them alive lives in the
same loop, so a stall of the loop is no fault of theirs. Keep-alives are not written down; a restart
gives every lease its full TTL.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from shoal.errors import (
    DataDirectoryLocked,
    FormatTooNew,
    ShoalError,
    StartupError,
    StorageFull,
    Unavailable,
)
from shoal.metadata.contract import (
    Compacted,
    Compare,
    Event,
    KeyValue,
    Lease,
    LeaseLost,
    StoreWentBack,
    TxnResult,
    Uncertain,
    check_ttl,
    check_txn,
)
from shoal.metadata.keeper import Keeper, boottime_s
from shoal.telemetry import logger

__all__ = ["HISTORY_REVISIONS_MAX", "EmbeddedStore"]

HISTORY_REVISIONS_MAX = 1_000  # kept for watchers: far more than any of ours falls behind
FORMAT = 2  # of the file, in its user_version
LEASE_TICK_S = 0.25  # leases end up to two of these late
APPLICATION_ID = 0x53484F4C  # "SHOL": tells our file from any other SQLite file

_SCHEMA = """
CREATE TABLE kv (
    key TEXT PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE counter (one INTEGER PRIMARY KEY CHECK (one = 1), revision INTEGER NOT NULL);
INSERT INTO counter VALUES (1, 0);
"""
_FORMAT_2 = """
ALTER TABLE kv ADD COLUMN lease INTEGER;
CREATE INDEX kv_by_lease ON kv (lease) WHERE lease IS NOT NULL;
CREATE TABLE lease (id INTEGER PRIMARY KEY AUTOINCREMENT, ttl_s REAL NOT NULL);
"""  # AUTOINCREMENT: an id that was in use is never given out again

_log = logger("metadata")
T = TypeVar("T")


class EmbeddedStore:
    """Implements `MetadataStore`. Make one with `await EmbeddedStore.open(path)`."""

    def __init__(self, path: Path) -> None:
        self.on_went_back: Callable[[StoreWentBack], None] | None = None
        self._path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shoal-metadata")
        self._loop = asyncio.get_running_loop()
        self._db: sqlite3.Connection | None = None  # the thread's
        self._refusal: str | None = None  # why nothing works any more
        # The loop's: whole revisions in order, and the revision after which they are complete.
        self._history: deque[list[Event]] = deque()
        self._history_after = 0
        self._changed = asyncio.Event()
        # Leases, in seconds during which the loop ran since the store was opened.
        self._awake_s = 0.0
        self._ttls: dict[int, float] = {}
        self._ends: dict[int, float] = {}
        self._keepers: dict[int, Keeper] = {}
        self._ticking: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, path: Path) -> EmbeddedStore:
        """Open the file, or make it. Its folder must exist.

        Raises  DataDirectoryLocked: another process has it open. FormatTooNew: a newer Shoal wrote
                it. StartupError: it is damaged, no file of Shoal, or cannot be opened.
        """
        store = cls(path)
        try:
            opening = store._loop.run_in_executor(store._thread, _connect, path)
            store._db, store._history_after, leases = await opening
        except BaseException:
            store._thread.shutdown(wait=False)
            raise
        for lease, ttl_s in leases.items():
            store._grant(lease, ttl_s)
        return store

    async def get(self, key: str) -> KeyValue | None:
        rows = await self._query("SELECT key, value, revision FROM kv WHERE key = ?", key)
        return KeyValue(*rows[0]) if rows else None

    async def range(self, prefix: str) -> tuple[list[KeyValue], int]:
        def read() -> tuple[list[KeyValue], int]:
            db = self._connection()
            # substr counts characters and compares them exactly; LIKE would fold case and need
            # escapes. The lower bound lets SQLite start at the prefix in its index.
            rows = db.execute(
                "SELECT key, value, revision FROM kv "
                "WHERE key >= ?1 AND substr(key, 1, length(?1)) = ?1 ORDER BY key",
                (prefix,),
            )
            return [KeyValue(*row) for row in rows], _revision(db)

        return await self._run(read)

    async def remembers(self, known: KeyValue) -> bool:
        return True  # the file is locked: nobody can put another in its place

    async def txn(
        self,
        compares: Sequence[Compare],
        puts: Mapping[str, bytes],
        deletes: Sequence[str] = (),
        *,
        lease: int | None = None,
    ) -> TxnResult:
        check_txn(compares, puts, deletes)
        # The caller's own may change before the thread comes to it.
        change = _Change(tuple(compares), dict(puts), tuple(deletes), lease)
        return await self._run(lambda: self._commit(lambda db: _apply(db, change)))

    async def watch(self, prefix: str, from_revision: int) -> AsyncIterator[list[Event]]:
        seen = from_revision
        while self._refusal is None:
            if seen < self._history_after:
                raise Compacted(
                    f"The metadata changes after revision {seen} are no longer kept; they begin "
                    f"after {self._history_after}. Read anew, then watch from there."
                )
            changed = self._changed
            events = [
                event
                for revision in self._history
                if revision[0].revision > seen
                for event in revision
            ]
            if not events:
                await changed.wait()
                continue
            seen = events[-1].revision
            matching = [event for event in events if event.key.startswith(prefix)]
            if matching:
                yield matching

    async def lease_grant(self, ttl_s: float) -> Lease:
        check_ttl(ttl_s)

        def insert(db: sqlite3.Connection) -> tuple[int, list[Event]]:
            cursor = db.execute("INSERT INTO lease (ttl_s) VALUES (?)", (ttl_s,))
            return cursor.lastrowid or 0, []

        lease = await self._run(lambda: self._commit(insert))
        self._grant(lease, ttl_s)
        return Lease(lease, ttl_s)

    async def lease_keep_alive(self, lease: int) -> float:
        if self._refusal is not None:
            raise Unavailable(self._refusal)
        if lease not in self._ends:
            raise LeaseLost(f"The metadata lease {lease} has ended. Register again.")
        self._renew(lease)
        return self._ttls[lease]

    def lease_keep(self, lease: Lease) -> Keeper:
        """See the contract. One keeper per lease."""
        keeper = Keeper(lease.id, lambda: self._forget(lease.id))
        if lease.id in self._ends:
            self._keepers[lease.id] = keeper
        else:
            keeper.ended()
        return keeper

    async def lease_revoke(self, lease: int) -> None:
        if self._refusal is not None:
            raise Unavailable(self._refusal)
        await self._end(lease)

    async def close(self) -> None:
        if self._refusal is None:
            self._refuse("The metadata store is closed.")
        if self._ticking is not None:
            self._ticking.cancel()
            self._ticking = None
        db, self._db = self._db, None
        if db is not None:
            await self._loop.run_in_executor(self._thread, db.close)
        self._thread.shutdown(wait=False)

    # -- the loop's side ---------------------------------------------------------------------------

    async def _run(self, work: Callable[[], T]) -> T:
        if self._refusal is not None:
            raise Unavailable(self._refusal)
        try:
            return await self._loop.run_in_executor(self._thread, work)
        except sqlite3.Error as error:
            raise Unavailable(
                f"The metadata store {self._path} cannot be read "
                f"({error.sqlite_errorname}: {error}). Check the disk."
            ) from error

    async def _query(self, sql: str, *values: object) -> list[tuple[str, bytes, int]]:
        return await self._run(lambda: self._connection().execute(sql, values).fetchall())

    def _publish(self, events: list[Event]) -> None:
        self._history.append(events)
        while len(self._history) > HISTORY_REVISIONS_MAX:
            self._history_after = self._history.popleft()[0].revision
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _refuse(self, why: str) -> None:
        self._refusal = why
        self._wake()

    # -- leases, on the loop's side ----------------------------------------------------------------

    def _grant(self, lease: int, ttl_s: float) -> None:
        self._ttls[lease] = ttl_s
        self._renew(lease)
        if self._ticking is None and self._refusal is None:
            self._ticking = self._loop.create_task(self._tick())

    def _renew(self, lease: int) -> None:
        # One tick more: up to so much of it has passed already and is counted at its end.
        self._ends[lease] = self._awake_s + self._ttls[lease] + LEASE_TICK_S

    def _forget(self, lease: int) -> None:
        self._keepers.pop(lease, None)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(LEASE_TICK_S)
            self._awake_s += LEASE_TICK_S  # however long it took: the rest was a stall
            for lease, keeper in self._keepers.items():
                self._renew(lease)
                keeper.renewed(boottime_s())
            for lease in [x for x, end_s in self._ends.items() if end_s <= self._awake_s]:
                try:
                    await self._end(lease)
                except ShoalError as error:
                    _log.warning("lease_not_ended", lease=lease, error=error.message)
                    self._ends[lease] = self._awake_s  # once more with the next tick

    async def _end(self, lease: int) -> None:
        """Gone for those who keep it alive first, then for everybody: its keys are deleted."""
        self._ends.pop(lease, None)
        keeper = self._keepers.pop(lease, None)
        if keeper is not None:
            keeper.ended()
        await self._run(lambda: self._commit(lambda db: _delete_lease(db, lease)))
        self._ttls.pop(lease, None)

    # -- the thread's side -------------------------------------------------------------------------

    def _connection(self) -> sqlite3.Connection:
        if self._db is None:
            raise Unavailable("The metadata store is closed.")
        return self._db

    def _commit(self, work: Callable[[sqlite3.Connection], tuple[T, list[Event]]]) -> T:
        """Run `work` as one transaction and publish the events that it returns."""
        db = self._connection()
        try:
            db.execute("BEGIN IMMEDIATE")
            changes = db.total_changes
            result, events = work(db)
            db.execute("COMMIT" if db.total_changes > changes else "ROLLBACK")
        except sqlite3.Error as error:
            raise self._failed(db, error) from error
        except ShoalError:
            db.execute("ROLLBACK")
            raise
        if events:
            # Queued before our caller's future is resolved: a watcher learns of a change even when
            # the caller was cancelled meanwhile, and never after the caller went on.
            self._loop.call_soon_threadsafe(self._publish, events)
        return result

    def _failed(self, db: sqlite3.Connection, error: sqlite3.Error) -> Exception:
        """A full disk rolls back and is over. After any other error nobody knows what is on the
        disk (a failed fsync may be reported once only), so the store stops until a restart reads
        what is really there."""
        if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
            if db.in_transaction:
                db.execute("ROLLBACK")
            return StorageFull(
                f"The disk of {self._path} is full: the change was not made. Free some space "
                "and send it again."
            )
        why = (
            f"The metadata store {self._path} stopped after a disk error "
            f"({error.sqlite_errorname}: {error}). Check the disk and start Shoal again."
        )
        self._loop.call_soon_threadsafe(self._refuse, why)
        return Uncertain(why + " The change may have been made.")


@dataclass(frozen=True, slots=True)
class _Change:
    compares: Sequence[Compare]
    puts: Mapping[str, bytes]
    deletes: Sequence[str]
    lease: int | None


def _apply(db: sqlite3.Connection, change: _Change) -> tuple[TxnResult, list[Event]]:
    """Inside a transaction. Raises LeaseLost; nothing was changed then."""
    revision = _revision(db)
    for compare in change.compares:
        row = db.execute("SELECT revision FROM kv WHERE key = ?", (compare.key,)).fetchone()
        if (row[0] if row else 0) != compare.revision:
            return TxnResult(False, revision), []
    lease = change.lease
    if (
        lease is not None
        and not db.execute("SELECT 1 FROM lease WHERE id = ?", (lease,)).fetchone()
    ):
        raise LeaseLost(f"The metadata lease {lease} has ended. Register again.")
    after = revision + 1
    events = [Event(key, bytes(value), after) for key, value in change.puts.items()]
    db.executemany(
        "INSERT OR REPLACE INTO kv (key, value, revision, lease) VALUES (?, ?, ?, ?)",
        [(e.key, e.value, after, lease) for e in events],
    )
    for key in change.deletes:
        if db.execute("DELETE FROM kv WHERE key = ?", (key,)).rowcount:
            events.append(Event(key, None, after))
    if not events:
        return TxnResult(True, revision), []
    db.execute("UPDATE counter SET revision = ?", (after,))
    return TxnResult(True, after), events


def _delete_lease(db: sqlite3.Connection, lease: int) -> tuple[None, list[Event]]:
    """Inside a transaction: the lease and its keys."""
    after = _revision(db) + 1
    keys = db.execute("SELECT key FROM kv WHERE lease = ? ORDER BY key", (lease,)).fetchall()
    db.execute("DELETE FROM lease WHERE id = ?", (lease,))
    if keys:
        db.execute("DELETE FROM kv WHERE lease = ?", (lease,))
        db.execute("UPDATE counter SET revision = ?", (after,))
    return None, [Event(key, None, after) for (key,) in keys]


def _revision(db: sqlite3.Connection) -> int:
    revision: int = db.execute("SELECT revision FROM counter").fetchone()[0]
    return revision


def _connect(path: Path) -> tuple[sqlite3.Connection, int, dict[int, float]]:
    """The open connection, the store's revision, and the TTL of every lease in seconds."""
    db: sqlite3.Connection | None = None
    try:
        # No cross-thread check: the connection is used by one thread of ours, then closed by it.
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0)
        db.execute("PRAGMA locking_mode = EXCLUSIVE")  # before WAL: no shared-memory file then
        db.execute("PRAGMA synchronous = FULL")
        _check_format(db, path)
        db.execute("PRAGMA journal_mode = WAL")
        damage = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if damage != "ok":
            raise StartupError(
                f"The metadata file {path} is damaged ({damage}). Restore it from a backup; the "
                "shards beside it are untouched."
            )
        return db, _revision(db), dict(db.execute("SELECT id, ttl_s FROM lease ORDER BY id"))
    except sqlite3.Error as error:
        if db is not None:
            db.close()
        if error.sqlite_errorcode in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise DataDirectoryLocked(f"Another process has {path} open.") from error
        raise StartupError(
            f"The metadata file {path} cannot be opened ({error.sqlite_errorname}: {error}). "
            "If it is damaged, restore it from a backup; the shards beside it are untouched."
        ) from error
    except StartupError:
        if db is not None:
            db.close()
        raise


def _check_format(db: sqlite3.Connection, path: Path) -> None:
    """Make the tables of a new file, or what an older one lacks; refuse what a newer Shoal, or
    somebody else, wrote."""
    db.execute("BEGIN IMMEDIATE")
    version = db.execute("PRAGMA user_version").fetchone()[0]
    owner = db.execute("PRAGMA application_id").fetchone()[0]
    tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    new = version == owner == tables == 0
    if new or (owner == APPLICATION_ID and version < FORMAT):
        for statement in ((_SCHEMA if new else "") + _FORMAT_2).strip().split(";\n"):
            db.execute(statement)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {FORMAT}")
        db.execute("COMMIT")
        return
    db.execute("ROLLBACK")
    if owner != APPLICATION_ID:
        raise StartupError(f"The file {path} was not written by Shoal; move it away.")
    if version > FORMAT:
        raise FormatTooNew(
            f"The metadata file {path} has format {version}; this Shoal knows up to {FORMAT}. "
            "Use the newer version of Shoal that wrote it."
        )
