"""The router over replicas that die, lag, hang and change places at random, on a virtual clock.

Checked: a read sees every write that was answered before it began and never less than an earlier
read; a write that is answered happened once, one that "did not happen" not at all; nobody meets an
error without a type; when everything works again, everything is answered.
"""

from __future__ import annotations

import asyncio
import random
from itertools import count

import pytest
from fakes.clock import run_virtual
from fakes.metadata import FakeStore
from fakes.nodes import FakeNodes

from coordinator.router import Router
from shoal.api.filter import Filter
from shoal.errors import NotPrimary, ShoalError, Stale, Unavailable
from shoal.ids import PointIds
from shoal.metadata.schema import ShardRecord
from shoal.storage_api import (
    Delete,
    FreshRead,
    Guard,
    Read,
    Selector,
    ShardKey,
    Write,
    WriteResult,
)

KEY = ShardKey(1, 0)
SECONDS = 60.0


class Replica:
    """Applies the one log of the cluster, some entries behind unless it leads."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster, self.id = cluster, name
        self.up, self.behind, self.applied = True, 0, 0

    async def _arrive(self, *, writes: bool) -> None:
        rng = self.cluster.rng
        if not self.up:
            raise Unavailable(f"{self.id} refuses connections")
        await asyncio.sleep(rng.choice((0.0, 0.001, 0.004, 0.03, 0.8)))
        if not self.up:  # it died with the request: who knows
            error = Unavailable(f"the connection to {self.id} broke")
            error.maybe_applied = writes
            raise error

    async def write(self, shard: ShardKey, op: Write) -> WriteResult:
        await self._arrive(writes=True)
        if self.cluster.primary is not self:
            raise NotPrimary(f"{self.id} is not the primary")
        assert isinstance(op, Delete)
        assert op.where.ids is not None
        self.cluster.log.append(op.where.ids.key(0))
        at = len(self.cluster.log)
        if self.cluster.rng.random() < 0.05:  # done, and the answer is lost
            error = Unavailable("the connection broke")
            error.maybe_applied = True
            raise error
        return WriteResult(at)

    async def count(self, shard: ShardKey, filter: Filter | None, guard: Guard) -> FreshRead[int]:
        await self._arrive(writes=False)
        leads = self.cluster.primary is self
        if guard.strong and not leads:
            raise NotPrimary(f"{self.id} is not the primary")
        behind = 0 if leads else self.behind
        self.applied = max(self.applied, len(self.cluster.log) - behind)
        if self.applied < guard.min_applied:
            raise Stale(f"{self.id} lags")
        return FreshRead(self.applied, self.applied)


class Cluster:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.store = FakeStore()
        self.log: list[int] = []
        self.replicas = [Replica(self, name) for name in ("s1", "s2", "s3")]
        self.primary = self.replicas[0]
        self.term = 1

    async def record(self) -> None:
        names = [replica.id for replica in self.replicas]
        record = ShardRecord(
            collection_id=1, shard=0, term=self.term, primary=self.primary.id, in_sync=names
        )
        await self.store.txn([], {record.key: record.to_bytes()})

    async def trouble(self) -> None:
        """One thing goes wrong, or right again."""
        rng = self.rng
        victim = rng.choice(self.replicas)
        match rng.randrange(6):
            case 0:
                victim.up = False
            case 1 | 2:
                victim.up = True
            case 3:
                victim.behind = rng.choice((0, 1, 5))
            case 4:
                self.store.deaf = not self.store.deaf
                self.store.down = not self.store.down and rng.random() < 0.2
            case 5 if victim.up:
                self.primary, self.term = victim, self.term + 1
                if not self.store.down:
                    await self.record()

    async def heal(self) -> None:
        self.store.deaf = self.store.down = False
        for replica in self.replicas:
            replica.up, replica.behind = True, 0
        self.term += 1
        await self.record()


@pytest.mark.parametrize("seed", range(25))
def test_promises_hold_while_replicas_come_and_go(seed: int) -> None:
    print(f"seed {seed}")

    async def main() -> None:
        cluster = Cluster(seed)
        await cluster.record()
        router = Router(cluster.store, FakeNodes(cluster.replicas))  # type: ignore[arg-type]
        await router.start()
        numbers = count(1)
        answered: set[int] = set()
        unsure: set[int] = set()
        refused: set[int] = set()
        unread: list[Unavailable] = []
        seen = 0  # the largest that was acknowledged or read
        clock = asyncio.get_running_loop().time

        async def write() -> None:
            nonlocal seen
            number = next(numbers)
            try:
                op = Delete(Selector(ids=PointIds.from_keys([number])))
                result = await router.write(KEY, op)
            except ShoalError as error:
                (unsure if error.maybe_applied else refused).add(number)
            else:
                answered.add(number)
                assert cluster.log[result.sequence - 1] == number
                seen = max(seen, result.sequence)

        async def read() -> None:
            nonlocal seen
            before = seen
            strong = Read(strong=cluster.rng.random() < 0.2)
            acknowledged = len(cluster.log) if strong.strong else 0
            try:
                found = await router.count(KEY, None, strong)
            except Unavailable as error:
                unread.append(error)
            else:
                assert found >= max(before, acknowledged)
                seen = max(seen, found)

        async def client() -> None:
            while clock() < SECONDS:
                await (write() if cluster.rng.random() < 0.4 else read())
                await asyncio.sleep(cluster.rng.random() * 0.5)

        async def world() -> None:
            while clock() < SECONDS - 1:
                await asyncio.sleep(cluster.rng.random() * 2)
                await cluster.trouble()
            await cluster.heal()

        await asyncio.gather(world(), *(client() for _ in range(8)))
        before = len(answered)
        await asyncio.gather(*(write() for _ in range(10)), *(read() for _ in range(10)))
        assert not any(error.maybe_applied for error in unread)
        happened = cluster.log
        assert len(set(happened)) == len(happened), "a write happened twice"
        assert answered <= set(happened)
        assert not refused & set(happened)
        assert set(happened) <= answered | unsure
        assert len(answered) > before, "nothing works after everything was healed"
        assert len(answered) > 100
        await router.close()

    run_virtual(main())
