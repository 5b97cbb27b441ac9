"""The metadata store of a single machine: one SQLite file, one process.

Durability: write-ahead log with synchronous=FULL, so every commit is fsynced before `txn` returns
(synchronous=NORMAL would not: see docs/decisions/0001). One thread of our own owns the connection;
the event loop never waits for the disk. The file is locked while it is open.

What is left out: the history of changes is kept in memory only, the last HISTORY_REVISIONS_MAX
revisions. Every watcher lives in this process and starts from a `range`, so after a restart nobody
can ask for older ones; who does gets Compacted, as with etcd.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from shoal.errors import (
    DataDirectoryLocked,
    FormatTooNew,
    StartupError,
    StorageFull,
    Unavailable,
)
from shoal.metadata.contract import (
    Compacted,
    Compare,
    Event,
    KeyValue,
    TxnResult,
    Uncertain,
    check_txn,
)

__all__ = ["HISTORY_REVISIONS_MAX", "EmbeddedStore"]

HISTORY_REVISIONS_MAX = 1_000  # kept for watchers: far more than any of ours falls behind
FORMAT = 1  # of the file, in its user_version
APPLICATION_ID = 0x53484F4C  # "SHOL": tells our file from any other SQLite file

_SCHEMA = """
CREATE TABLE kv (
    key TEXT PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE counter (one INTEGER PRIMARY KEY CHECK (one = 1), revision INTEGER NOT NULL);
INSERT INTO counter VALUES (1, 0);
"""

T = TypeVar("T")


class EmbeddedStore:
    """Implements `MetadataStore`. Make one with `await EmbeddedStore.open(path)`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shoal-metadata")
        self._loop = asyncio.get_running_loop()
        self._db: sqlite3.Connection | None = None  # the thread's
        self._refusal: str | None = None  # why nothing works any more
        # The loop's: whole revisions in order, and the revision after which they are complete.
        self._history: deque[list[Event]] = deque()
        self._history_after = 0
        self._changed = asyncio.Event()

    @classmethod
    async def open(cls, path: Path) -> EmbeddedStore:
        """Open the file, or make it. Its folder must exist.

        Raises  DataDirectoryLocked: another process has it open. FormatTooNew: a newer Shoal wrote
                it. StartupError: it is damaged, no file of Shoal, or cannot be opened.
        """
        store = cls(path)
        try:
            opening = store._loop.run_in_executor(store._thread, _connect, path)
            store._db, store._history_after = await opening
        except BaseException:
            store._thread.shutdown(wait=False)
            raise
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

    async def txn(
        self,
        compares: Sequence[Compare],
        puts: Mapping[str, bytes],
        deletes: Sequence[str] = (),
    ) -> TxnResult:
        check_txn(compares, puts, deletes)
        wanted = dict(puts)  # the caller's may change before the thread comes to it
        return await self._run(lambda: self._commit(tuple(compares), wanted, tuple(deletes)))

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

    async def close(self) -> None:
        if self._refusal is None:
            self._refuse("The metadata store is closed.")
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

    # -- the thread's side -------------------------------------------------------------------------

    def _connection(self) -> sqlite3.Connection:
        if self._db is None:
            raise Unavailable("The metadata store is closed.")
        return self._db

    def _commit(
        self, compares: Sequence[Compare], puts: Mapping[str, bytes], deletes: Sequence[str]
    ) -> TxnResult:
        db = self._connection()
        try:
            db.execute("BEGIN IMMEDIATE")
            result, events = _apply(db, compares, puts, deletes)
            db.execute("COMMIT" if events else "ROLLBACK")
        except sqlite3.Error as error:
            raise self._failed(db, error) from error
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


def _apply(
    db: sqlite3.Connection,
    compares: Sequence[Compare],
    puts: Mapping[str, bytes],
    deletes: Sequence[str],
) -> tuple[TxnResult, list[Event]]:
    """Inside a transaction; no events means that there is nothing to commit."""
    revision = _revision(db)
    for compare in compares:
        row = db.execute("SELECT revision FROM kv WHERE key = ?", (compare.key,)).fetchone()
        if (row[0] if row else 0) != compare.revision:
            return TxnResult(False, revision), []
    after = revision + 1
    events = [Event(key, bytes(value), after) for key, value in puts.items()]
    db.executemany(
        "INSERT OR REPLACE INTO kv VALUES (?, ?, ?)", [(e.key, e.value, after) for e in events]
    )
    for key in deletes:
        if db.execute("DELETE FROM kv WHERE key = ?", (key,)).rowcount:
            events.append(Event(key, None, after))
    if not events:
        return TxnResult(True, revision), []
    db.execute("UPDATE counter SET revision = ?", (after,))
    return TxnResult(True, after), events


def _revision(db: sqlite3.Connection) -> int:
    revision: int = db.execute("SELECT revision FROM counter").fetchone()[0]
    return revision


def _connect(path: Path) -> tuple[sqlite3.Connection, int]:
    """The open connection and the store's revision."""
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
        return db, _revision(db)
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
    """Make the tables of a new file; refuse what a newer Shoal, or somebody else, wrote."""
    db.execute("BEGIN IMMEDIATE")
    version = db.execute("PRAGMA user_version").fetchone()[0]
    owner = db.execute("PRAGMA application_id").fetchone()[0]
    tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if version == owner == tables == 0:
        for statement in _SCHEMA.strip().split(";\n"):
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
