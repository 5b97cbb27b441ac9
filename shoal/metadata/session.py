"""A process says in the metadata store that it is there, for as long as it is.

The record `nodes/{id}` lives under a lease. A lease is a hint that others act on after a grace
period, and it may be lost without our fault, so a lost one is granted anew and the record is put
back at once.

Two processes with one id would take the record from each other for ever. So a start takes it in any
case (it may be the record of our own last life), and who finds it taken by another incarnation
later gives up, for good.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from shoal.errors import ShoalError, Unavailable, must
from shoal.metadata.contract import (
    Compare,
    Event,
    LeaseKeeper,
    LeaseLost,
    MetadataStore,
    StoreRefused,
    StoreWentBack,
    Uncertain,
)
from shoal.metadata.schema import NodeRecord
from shoal.metadata.watched import Watched
from shoal.telemetry import logger

__all__ = ["Session"]

_BACKOFF_S_MIN, _BACKOFF_S_MAX = 0.1, 2.0
_REVOKE_S_MAX = 2.0  # at the end; without it the record goes when the lease ends

_log = logger("metadata")


class Session:
    """Keeps `record` registered from `start` to `close`.

    ttl_s        of the lease; etcd grants at least 2 s, and less than 10 s is lost by mere leader
                 changes
    on_replaced  called once when another process took over this id: this one must stop
    """

    def __init__(
        self,
        store: MetadataStore,
        record: NodeRecord,
        *,
        ttl_s: float = 10.0,
        on_replaced: Callable[[], None] | None = None,
    ) -> None:
        self._store = store
        self._wanted_ttl_s = ttl_s
        self._on_replaced = on_replaced
        self._keeper: LeaseKeeper | None = None
        self._revision = 0  # of the record as we put it
        self._touched = 0  # the revision at which somebody else last touched it
        self._changed = asyncio.Event()  # that was later than our put
        self._held: list[int] = []  # leases that we have not given back
        self._one_at_a_time = asyncio.Lock()
        self._watched = Watched(store, [record.key], on_change=self._look)
        self._task: asyncio.Task[None] | None = None
        self.record = record
        self.ttl_s = ttl_s  # what the store granted
        self.lease: int | None = None  # None: lost, and not granted anew yet
        self.replaced = False

    async def start(self) -> None:
        """Register. Raises Unavailable, StoreRefused or Uncertain; start it again then."""
        must(self._task is None, "a session is started once")
        await self._register(take=True)
        await self._watched.start()
        self._task = asyncio.create_task(self._keep())

    async def close(self) -> None:
        """End the lease, so that the record goes at once. May be called twice."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        await self._watched.close()
        self.lease = None
        if self._keeper is not None:
            await self._keeper.close()
        for lease in list(self._held):
            await self._give_back(lease)

    async def update(self, record: NodeRecord) -> None:
        """Register a changed record of the same id and incarnation (`draining`).

        Raises Unavailable also while the lease is lost: it is registered with the next one then.
        """
        must(
            (record.id, record.incarnation) == (self.record.id, self.record.incarnation),
            "a session keeps its id and incarnation",
        )
        async with self._one_at_a_time:
            self.record = record
            try:
                if self.lease is not None and await self._put(self._revision, self.lease):
                    return
            except LeaseLost:
                pass  # the keeper is about to say so, too
            self._changed.set()
            raise Unavailable(f"Node {record.id} is not registered at the moment.")

    def lost_for_s(self) -> float:
        """Seconds since the last keep-alive that the store answered was sent: about a third of
        `ttl_s` at most while all is well. From `ttl_s` on, others may think that we are gone."""
        return self._keeper.silent_for_s() if self._keeper is not None else float("inf")

    def healthy_for_s(self) -> float:
        """Seconds that the lease still has by our own clock; 0: it may be gone."""
        return max(0.0, self.ttl_s - self.lost_for_s()) if self.lease is not None else 0.0

    # -- inside ------------------------------------------------------------------------------------

    def _look(self, events: Sequence[Event]) -> None:
        """The prefix `nodes/s1` also covers `nodes/s10`; and our own puts come by, too."""
        for event in events:
            if event.key == self.record.key and event.revision > self._revision:
                ours = event.value is not None and self._is_ours(event.value)
                if not ours:
                    self._touched = event.revision
                    self._changed.set()

    def _is_ours(self, value: bytes) -> bool:
        try:
            found = NodeRecord.from_bytes(self.record.key, value)
        except ShoalError:
            return False  # of a newer Shoal, so not ours
        return found.incarnation == self.record.incarnation

    async def _keep(self) -> None:
        backoff_s = _BACKOFF_S_MIN
        while not self.replaced:
            try:
                await self._until_gone()
                await self._register(take=False)
                backoff_s = _BACKOFF_S_MIN
            except StoreWentBack as error:
                _log.error("store_went_back", node=self.record.id, why=error.message)
                if self._store.on_went_back is not None:
                    self._store.on_went_back(error)
                return
            except ShoalError as error:
                level = _log.error if isinstance(error, StoreRefused) else _log.warning
                level("not_registered", node=self.record.id, why=error.message)
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _BACKOFF_S_MAX)

    async def _until_gone(self) -> None:
        """Until the lease is lost or somebody touched the record."""
        if self._keeper is None or self.lease is None:
            return
        waiting = [
            asyncio.ensure_future(self._keeper.lost()),
            asyncio.ensure_future(self._changed.wait()),
        ]
        try:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in waiting:
                task.cancel()

    async def _register(self, *, take: bool) -> None:
        """A new lease, and the record under it. take: whoever holds the record."""
        async with self._one_at_a_time:
            silent_s = self.lost_for_s()
            self.lease = None
            if self._keeper is not None:
                await self._keeper.close()  # and goes on counting the silence
            old = list(self._held)
            lease = await self._store.lease_grant(self._wanted_ttl_s)
            self._held.append(lease.id)
            keeper = self._store.lease_keep(lease)
            try:
                await self._take_record(lease.id, take=take)
            except BaseException:
                await keeper.close()
                raise
            if self.replaced:
                await keeper.close()
            else:
                self.lease, self.ttl_s, self._keeper = lease.id, lease.ttl_s, keeper
        for useless in [*old, *([lease.id] if self.replaced else [])]:
            await self._give_back(useless)
        if not take and not self.replaced:
            _log.warning("registered_again", node=self.record.id, silent_s=silent_s)

    async def _take_record(self, lease: int, *, take: bool) -> None:
        while True:
            found = await self._store.get(self.record.key)
            if found is not None and found.revision < self._revision:
                # The record of an earlier life: nobody else registered with this id.
                raise StoreWentBack.because(
                    f"{found.key} is of revision {found.revision} and was of {self._revision}"
                )
            if found is not None and not take and not self._is_ours(found.value):
                self._stop(found.revision)
                return
            if await self._put(found.revision if found is not None else 0, lease):
                return

    async def _put(self, revision: int, lease: int) -> bool:
        """Raises LeaseLost, Unavailable, StoreRefused."""
        key = self.record.key
        try:
            result = await self._store.txn(
                [Compare(key, revision)], {key: self.record.to_bytes()}, lease=lease
            )
        except Uncertain:
            return False  # reading it again tells
        if result.ok:
            self._revision = result.revision
            if self._touched < self._revision:
                self._changed.clear()  # what woke us came before
        return result.ok

    def _stop(self, revision: int) -> None:
        _log.error(
            "node_id_taken",
            node=self.record.id,
            revision=revision,
            what="another process registered with this node id; give every process its own",
        )
        self.replaced = True
        if self._on_replaced is not None:
            self._on_replaced()

    async def _give_back(self, lease: int) -> None:
        """Best effort: what is not revoked ends by itself."""
        try:
            # Not wait_for: in Python 3.11 it may swallow that `close` cancelled us.
            async with asyncio.timeout(_REVOKE_S_MAX):
                await self._store.lease_revoke(lease)
        except (ShoalError, TimeoutError) as error:
            _log.info("lease_not_revoked", node=self.record.id, why=str(error) or "no answer")
        self._held.remove(lease)
