"""A write that failed never says that nothing happened when something did."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import httpx
from fakes.clock import run_virtual
from fakes.metadata import FakeStore
from fakes.storage import FakeStorage

from coordinator.app import create_app
from coordinator.service import Coordinator
from shoal.errors import InvariantError, StorageFull
from shoal.health import Health, HealthReport
from shoal.settings import CoordinatorSettings
from shoal.storage_api import ShardKey, Write, WriteResult

READY = HealthReport(Health.GREEN, True, True, (), (), None, 0.0)
POINTS = "/collections/c/points"


class Storage(FakeStorage):
    """troubles: what the next writes meet; None is nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.troubles: list[Exception | None] = []

    async def write(self, shard: ShardKey, op: Write) -> WriteResult:
        trouble = self.troubles.pop(0) if self.troubles else None
        if trouble is not None:
            raise trouble
        return await super().write(shard, op)


def run(test: Callable[[httpx.AsyncClient, Storage], Awaitable[None]], *, shards: int = 1) -> None:
    async def main() -> None:
        storage = Storage()
        coordinator = Coordinator(
            store=FakeStore(), storage=storage, encoder=None, settings=CoordinatorSettings()
        )
        await coordinator.start()
        app = create_app(coordinator, health=lambda: READY, api_key=None, read_only_api_key=None)
        transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://shoal") as http:
            body = {"vectors": {"size": 2, "distance": "Dot"}, "shard_number": shards}
            assert (await http.put("/collections/c", json=body)).status_code == 200
            await test(http, storage)
        await coordinator.close()

    run_virtual(main())


def upsert(*ids: int) -> dict[str, Any]:
    return {"points": [{"id": each, "vector": [1, 2]} for each in ids]}


def test_a_batch_that_fails_half_way_has_happened_in_part() -> None:
    async def test(http: httpx.AsyncClient, storage: Storage) -> None:
        storage.troubles = [None, StorageFull("Storage is full: no space left.")]
        operations = [{"upsert": upsert(1)}, {"delete": {"points": [2]}}]
        answer = await http.post(f"{POINTS}/batch", json={"operations": operations})
        assert answer.status_code == 507
        assert answer.headers["shoal-maybe-applied"] == "true"
        assert "1 of 2 operations" in answer.text
        storage.troubles = [StorageFull("Storage is full: no space left.")]
        answer = await http.post(f"{POINTS}/batch", json={"operations": operations})
        assert answer.headers["shoal-maybe-applied"] == "false"

    run(test)


def test_a_write_that_misses_one_of_its_points_has_changed_the_others() -> None:
    async def test(http: httpx.AsyncClient, storage: Storage) -> None:
        assert (await http.put(POINTS, json=upsert(1))).status_code == 200
        body = {"payload": {"a": 1}, "points": [1, 2]}
        answer = await http.post(f"{POINTS}/payload", json=body)
        assert answer.status_code == 404
        assert answer.headers["shoal-maybe-applied"] == "true"
        body["points"] = [2]
        answer = await http.post(f"{POINTS}/payload", json=body)
        assert answer.status_code == 404
        assert answer.headers["shoal-maybe-applied"] == "false"

    run(test)


def test_a_shard_with_a_bug_may_have_applied_its_part() -> None:
    async def test(http: httpx.AsyncClient, storage: Storage) -> None:
        storage.troubles = [StorageFull("Storage is full: no space left."), InvariantError("a bug")]
        answer = await http.put(POINTS, json=upsert(*range(20)))
        assert answer.headers["shoal-maybe-applied"] == "true"

    run(test, shards=2)
