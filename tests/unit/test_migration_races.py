"""Requests that began before a migration went on: none leaves a vector out of date, or a point without
one that it could have."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from qdrant_client.http.models import CollectionInfo
from test_migration import START, C, M, World, _fast, doc, point, run, vector_of  # noqa: F401

from shoal import limits
from shoal.encoder_api import Embedding


class Held:
    """Texts that are "slow", for the old model, are embedded when `go` is set."""

    def __init__(self, world: World) -> None:
        self.waits, self.go = asyncio.Event(), asyncio.Event()
        self._encode = world.encoder.encode
        world.encoder.encode = self.encode  # type: ignore[method-assign]

    async def encode(
        self, texts: list[str], model: str, fingerprint: str | None = None
    ) -> Embedding:
        if "slow" in texts and "old" in model:
            self.waits.set()
            await self.go.wait()
        return await self._encode(texts, model, fingerprint)


def test_a_request_from_before_leaves_no_vector_of_an_old_text(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.create()
        await world.put(point(1, doc("first"), text="first"))
        held = Held(world)
        operations = {
            "operations": [
                {"upsert": {"points": [point(9, doc("slow", "old"), text="slow")]}},
                {"set_payload": {"payload": {"text": "changed"}, "points": [1]}},
            ]
        }
        batch = asyncio.create_task(world.ask("POST", f"{C}/points/batch?wait=true", operations))
        await held.waits.wait()
        await world.ask("POST", M, START)
        await world.copied()
        held.go.set()
        await batch
        await world.copied()
        stored = await world.stored()
        assert stored[1]["v\x1f1"] == vector_of("org/new", "changed")
        assert stored[9]["v\x1f1"] == vector_of("org/new", "slow")

    run(tmp_path, test)


@pytest.mark.parametrize("grace_s", [0.0, 0.3])
def test_a_write_from_before_the_drop_keeps_a_vector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grace_s: float
) -> None:
    """It arrives after the end, or in the moment that a drop waits."""
    monkeypatch.setattr(limits, "DROP_GRACE_S", grace_s)

    async def test(world: World) -> None:
        await world.create()
        await world.put(point(1, doc("one"), text="one"))
        await world.ask("POST", M, START)
        await world.copied()
        held = Held(world)
        texts = [point(k, doc("slow" if k == 10 else f"t{k}"), text=f"t{k}") for k in range(10, 80)]
        put = asyncio.create_task(world.put(*texts))
        await held.waits.wait()
        await world.ask("POST", f"{M}/switch", {})
        await world.ask("POST", f"{M}/drop", {"model": "old"})
        if not grace_s:
            await world.over()
        held.go.set()
        await put
        await world.over()
        stored = await world.stored()
        assert all(list(stored[k]) == ["v\x1f1"] for k in range(10, 80))

    run(tmp_path, test)


def test_a_drop_takes_no_points_only_vector(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.create()
        await world.put(*(point(k, doc(f"t{k}"), text=f"t{k}") for k in range(20)))
        await world.ask("POST", M, START | {"points_per_second": 0})
        await world.until(lambda s: s["phase"] == "copying")
        await world.ask("POST", f"{M}/switch", {"allow_missing": True})
        refused = await world.ask("POST", f"{M}/drop", {"model": "old"}, 400)
        assert "20 points have a vector of org/old only" in refused
        assert (await world.ask("GET", M))["only_other"] == 20
        # said to be good enough: what can be made of a text is made all the same
        await world.ask("POST", f"{M}/drop", {"model": "old", "allow_missing": True})
        await world.over()
        stored = await world.stored()
        assert all(stored[k] == {"v\x1f1": vector_of("org/new", f"t{k}")} for k in range(20))

    run(tmp_path, test)


def test_numbers_that_only_one_model_has_are_not_dropped_unasked(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.create()
        await world.put(point(1, doc("one"), text="one"))
        await world.ask("POST", M, START)
        await world.copied()
        await world.ask("POST", f"{M}/switch", {})
        await world.put(point(2, vector_of("org/new", "numbers")))
        await world.ask("POST", f"{M}/rollback")
        refused = await world.ask("POST", f"{M}/drop", {"model": "new"}, 400)
        assert "1 points have a vector of org/new only" in refused

    run(tmp_path, test)


def test_a_drop_and_a_rollback_at_once_never_drop_what_was_not_named(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.create()
        await world.put(point(1, doc("one"), text="one"))
        await world.ask("POST", M, START)
        await world.copied()
        await world.ask("POST", f"{M}/switch", {})
        drop = world.http.post(f"{M}/drop", content='{"model": "old"}')
        back, dropped = await asyncio.gather(world.http.post(f"{M}/rollback"), drop)
        assert sorted((back.status_code, dropped.status_code)) == [200, 400]
        if dropped.status_code == 200:
            await world.over()
        assert "v\x1f1" in (await world.stored())[1]

    run(tmp_path, test)


def test_of_one_id_twice_the_last_row_decides_about_both(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.create()
        await world.put(point(1, doc("one"), text="payload"))
        await world.ask("POST", M, START)
        await world.copied()
        numbers = vector_of("org/old", "numbers")
        rows: list[dict[str, Any]] = [
            {"id": 1, "vector": {"v": doc("replaced")}},
            {"id": 1, "vector": {"v": numbers, "w": [1, 2]}},
        ]
        await world.ask("PUT", f"{C}/points/vectors", {"points": rows})
        await world.copied()
        stored = (await world.stored())[1]
        assert stored["v"] == numbers
        assert stored["v\x1f1"] == vector_of("org/new", "payload")

    run(tmp_path, test)


def test_a_missing_point_does_not_keep_others_from_their_change(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.create()
        await world.put(point(1, doc("one"), text="one"))
        await world.ask("POST", M, START)
        await world.copied()
        rows = [{"id": 77, "vector": {"v": doc("x")}}, {"id": 1, "vector": {"w": [1, 2]}}]
        await world.ask("PUT", f"{C}/points/vectors", {"points": rows}, 404)
        assert (await world.stored())[1]["w"] == [1, 2]

    run(tmp_path, test)


def test_bytes_cannot_hold_what_models_make(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        vectors = {"v": {"size": 4, "distance": "Dot", "datatype": "uint8", "shoal_model": "old"}}
        await world.ask("PUT", C, {"vectors": vectors})
        assert "from 0 to 255" in await world.ask("POST", M, START, 400)

    run(tmp_path, test)


@pytest.mark.parametrize("where", ["metadata", "nowhere"])
def test_clients_that_check_fields_can_read_the_collection(tmp_path: Path, where: str) -> None:
    async def test(world: World) -> None:
        said = {"metadata": {"shoal_models": {"v": "old"}}} if where == "metadata" else {}
        await world.create(bound=None, **said)
        await world.put(point(1, doc("one", "old"), text="one"))
        more = {} if where == "metadata" else {"current_model": "old"}
        await world.ask("POST", M, START | more)
        await world.copied()
        await world.ask("POST", f"{M}/switch", {})
        info = CollectionInfo.model_validate(await world.ask("GET", C))
        assert info.config.params.vectors["v"].size == 6  # type: ignore[index]
        assert info.config.metadata == {"shoal_models": {"v": "org/new"}}

    run(tmp_path, test)


def test_queries_are_remembered_within_bounds_and_for_no_longer(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.create()
        await world.put(*(point(k, doc(f"t{k}"), text=f"t{k}", n=k % 2) for k in range(9)))
        await world.ask("POST", M, START)
        await world.copied()
        await world.query(doc("x" * (limits.RECORDED_QUERY_BYTES_MAX + 1)))
        await world.query(doc("t1", "unknown"), status=400)
        assert (await world.ask("GET", M))["recorded_queries"] == 0
        odd = {"must": [{"key": "n", "match": {"value": 1}}]}
        body = {"query": doc("t1"), "using": "v", "filter": odd}
        await world.ask("POST", f"{C}/points/query", body)
        said = await world.ask("POST", f"{M}/compare", {})
        assert sorted(said["most_different"][0]["current"]) == [1, 3, 5, 7]
        migrations = world.coordinator.migrations
        assert migrations._recorded
        await world.ask("POST", f"{M}/drop", {"model": "new"})
        await world.over()
        assert not migrations._recorded

    run(tmp_path, test)
