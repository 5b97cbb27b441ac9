"""Which process of a kind acts: the one whose record stands at a key of that kind, under its lease.

Being the leader is only ever a belief: the lease may have ended a moment ago, or the process may
have been stopped for a minute. So every change that a leader makes compares the revision of the
leader's record in the same transaction (`fence`). Another leader's record has another revision,
hence who lost its place changes nothing, however late it notices.
"""

from __future__ import annotations

from collections.abc import Callable

from shoal import telemetry
from shoal.errors import ShoalError, must
from shoal.metadata.contract import Compare, LeaseLost, MetadataStore, Uncertain
from shoal.metadata.schema import LeaderRecord

__all__ = ["Leadership"]

_log = telemetry.logger("metadata")


class Leadership:
    """The candidacy of one process.

    key          LEADER_KEY for monitors, MIGRATIONS_LEADER_KEY for coordinators.
    incarnation  of this process: a restarted one does not take its old record for its own.
    lease        gives the process's lease, None while it has none.
    """

    def __init__(
        self,
        store: MetadataStore,
        key: str,
        *,
        node_id: str,
        incarnation: str,
        lease: Callable[[], int | None],
    ) -> None:
        self._store, self._key, self._lease = store, key, lease
        self._record = LeaderRecord(node=node_id, incarnation=incarnation)
        self._revision: int | None = None  # of our record, while we lead
        self.leader: str | None = None  # who led when we last looked

    @property
    def leading(self) -> bool:
        return self._revision is not None

    def fence(self) -> Compare:
        """Put it into every transaction that only the leader may make."""
        revision = self._revision
        must(revision is not None, "only a leader has a fence")
        assert revision is not None
        return Compare(self._key, revision)

    async def campaign(self) -> bool:
        """Look who leads, and take a free place. Cost: one read, now and then one transaction.

        Raises  Unavailable, or FormatTooNew for the record of a newer Shoal; we do not lead then.
        """
        was = self._revision
        try:
            self._revision, self.leader = await self._look()
        except Exception:  # not when cancelled: `resign` still has a place to give back
            self._revision = None
            raise
        if self.leading and was is None:
            _log.info("leads", what=self._key, node=self._record.node, revision=self._revision)
        elif was is not None and not self.leading:
            _log.warning(
                "leads_no_more", what=self._key, node=self._record.node, leader=self.leader
            )
        return self.leading

    async def _look(self) -> tuple[int | None, str | None]:
        """The revision of our record, if it is ours, and the leader's name."""
        found = await self._store.get(self._key)
        if found is None:
            revision = await self._take()
            return revision, None if revision is None else self._record.node
        record = LeaderRecord.from_bytes(self._key, found.value)
        return found.revision if record == self._record else None, record.node

    async def _take(self) -> int | None:
        lease = self._lease()
        if lease is None:
            return None
        value = {self._key: self._record.to_bytes()}
        try:
            result = await self._store.txn([Compare(self._key, 0)], value, lease=lease)
        except (LeaseLost, Uncertain):
            return None  # the next look tells
        return result.revision if result.ok else None

    async def resign(self) -> None:
        """Free the place at once, so that nobody has to wait for the lease. Best effort."""
        revision, self._revision = self._revision, None
        if revision is None:
            return
        try:
            await self._store.txn([Compare(self._key, revision)], {}, [self._key])
        except ShoalError as error:
            _log.info("leader_record_stays", why=error.message)
