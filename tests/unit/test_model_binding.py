"""Vectors that belong to a model, and `POST /v1/embeddings`, over the whole HTTP application."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fakes.storage import FakeStorage
from qdrant_client import models as qdrant

import coordinator.embeddings
from coordinator.app import create_app
from coordinator.binding import bound_models, check_text
from coordinator.service import Coordinator
from shoal.api.models import CreateCollection
from shoal.encoder_api import Embedding, ModelInfo, resolve_model, wrong_weights
from shoal.errors import BadRequest, Busy, ShoalError
from shoal.health import Health, HealthReport
from shoal.metadata.embedded import EmbeddedStore
from shoal.metadata.schema import BoundModel
from shoal.settings import CoordinatorSettings

READY = HealthReport(Health.GREEN, True, True, (), (), None, 0.0)
C = "/collections/c"
OLD, NEW = "a" * 64, "b" * 64


class TwoModels:
    """Two models of four dimensions; the vector of a text is its length. Texts of more than eight
    letters are cut. `weights` is what is served at the moment."""

    def __init__(self) -> None:
        self.weights = {"org/lengths": OLD, "other": "c" * 64}
        self.fails: ShoalError | None = None

    def models(self) -> list[ModelInfo]:
        return [
            ModelInfo("org/lengths", 4, 8, None, ("lengths",)),
            ModelInfo("other", 4, 8, None),
        ]

    async def encode(
        self, texts: list[str], model: str, fingerprint: str | None = None
    ) -> Embedding:
        if self.fails is not None:
            raise self.fails
        name = resolve_model(model, {info.name: info.aliases for info in self.models()})
        if fingerprint not in (None, self.weights[name]):
            raise wrong_weights(name, str(fingerprint), self.weights[name])
        lengths = np.array([len(text) for text in texts], np.int32)
        vectors = np.array([[n, 1, 0, 0] for n in lengths], np.float32).reshape(-1, 4)
        return Embedding(vectors, np.minimum(lengths, 8), lengths > 8, self.weights[name])


class World:
    def __init__(
        self, coordinator: Coordinator, encoder: TwoModels, http: httpx.AsyncClient
    ) -> None:
        self.coordinator, self.encoder, self.http = coordinator, encoder, http

    async def ask(
        self, method: str, path: str, body: Any, status: int = 200, **headers: str
    ) -> Any:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        answer = await self.http.request(method, path, content=json.dumps(body), headers=named)
        assert answer.status_code == status, answer.text
        said = answer.json()
        return said["result"] if status == 200 else said["status"]["error"]

    def bound(self) -> dict[str, tuple[str, str | None]]:
        models = self.coordinator.catalog.get("c").record.models
        return {name: (to.model, to.fingerprint) for name, to in models.items()}


def run(tmp_path: Path, test: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        store = await EmbeddedStore.open(tmp_path / "metadata.sqlite")
        encoder = TwoModels()
        try:
            coordinator = Coordinator(
                store=store,
                storage=FakeStorage(),
                encoder=encoder,  # type: ignore[arg-type]
                settings=CoordinatorSettings(),
            )
            await coordinator.start()
            app = create_app(
                coordinator, health=lambda: READY, api_key=None, read_only_api_key=None
            )
            transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
            async with httpx.AsyncClient(transport=transport, base_url="http://shoal") as http:
                await test(World(coordinator, encoder, http))
            await coordinator.close()
        finally:
            await store.close()

    asyncio.run(main())


def point(vector: Any) -> dict[str, Any]:
    return {"points": [{"id": 1, "vector": vector}]}


def text(words: str, model: str = "lengths") -> dict[str, str]:
    return {"text": words, "model": model}


ONE = {"vectors": {"size": 4, "distance": "Dot", "shoal_model": "Lengths"}}


def test_texts_of_another_model_are_refused(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.ask("PUT", C, ONE)
        assert world.bound() == {"": ("org/lengths", None)}
        await world.ask("PUT", f"{C}/points", point(text("four", "org/lengths")))
        assert world.bound() == {"": ("org/lengths", OLD)}
        refused = await world.ask("PUT", f"{C}/points", point(text("four", "other")), 400)
        assert "bound to the model org/lengths, and the text names other" in refused
        refused = await world.ask("POST", f"{C}/points/query", {"query": text("x", "other")}, 400)
        assert "vectors of different models cannot be compared" in refused
        found = await world.ask("POST", f"{C}/points/query", {"query": text("word")})
        assert [hit["id"] for hit in found["points"]] == [1]

    run(tmp_path, test)


def test_of_two_coordinators_with_other_weights_only_the_first_one_writes(tmp_path: Path) -> None:
    """Both have embedded before either has heard of the other."""

    async def test(world: World) -> None:
        await world.ask("PUT", C, ONE)
        embed = world.encoder.encode

        async def slowly(*given: Any) -> Embedding:
            answer = await embed(*given)
            await world.coordinator.catalog.set_fingerprint("c", "", NEW)  # as the other one does
            return answer

        world.encoder.encode = slowly  # type: ignore[method-assign]
        refused = await world.ask("PUT", f"{C}/points", point(text("four")), 400)
        assert OLD in refused
        assert NEW in refused
        assert world.bound() == {"": ("org/lengths", NEW)}
        said = await world.ask("POST", f"{C}/points/count", {"exact": True})
        assert said["count"] == 0

    run(tmp_path, test)


def test_other_weights_under_the_same_name_are_refused(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.ask("PUT", C, ONE)
        await world.ask("PUT", f"{C}/points", point(text("four")))
        world.encoder.weights["org/lengths"] = NEW
        for method, path, body in (
            ("PUT", f"{C}/points", point(text("more"))),
            ("POST", f"{C}/points/query", {"query": text("more")}),
        ):
            refused = await world.ask(method, path, body, 400)
            assert OLD in refused
            assert NEW in refused
        world.encoder.weights["org/lengths"] = OLD
        await world.ask("PUT", f"{C}/points", point(text("more")))

    run(tmp_path, test)


def test_vectors_that_say_that_they_are_of_another_model_are_refused(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.ask("PUT", C, ONE)
        plain = point([1, 2, 3, 4])
        for model in ("lengths", "ORG/Lengths"):
            await world.ask("PUT", f"{C}/points", plain, shoal_model=model)
        await world.ask("PUT", f"{C}/points", plain)  # says nothing
        refused = await world.ask("PUT", f"{C}/points", plain, 400, shoal_model="other")
        assert "bound to the model org/lengths" in refused
        assert "not known yet" in refused
        query = {"query": [1, 2, 3, 4]}
        await world.ask("POST", f"{C}/points/query", query, 400, shoal_model="other")
        operations = {"operations": [{"upsert": plain}]}
        await world.ask("POST", f"{C}/points/batch", operations, 400, shoal_model="other")
        await world.ask("PUT", f"{C}/points", point(text("four")))
        await world.ask("POST", f"{C}/points/query", query, shoal_model=OLD)
        await world.ask("POST", f"{C}/points/query", query, 400, shoal_model=NEW)

    run(tmp_path, test)


def test_clients_that_check_fields_name_the_model_in_the_metadata(tmp_path: Path) -> None:
    request = qdrant.CreateCollection(
        vectors={
            "title": qdrant.VectorParams(size=4, distance=qdrant.Distance.DOT),
            "free": qdrant.VectorParams(size=2, distance=qdrant.Distance.DOT),
        },
        metadata={"shoal_models": {"title": "lengths"}},
    )

    async def test(world: World) -> None:
        await world.ask("PUT", C, request.model_dump(mode="json", exclude_none=True))
        assert world.bound() == {"title": ("org/lengths", None)}
        await world.ask("PUT", f"{C}/points", point({"title": text("x", "other")}), 400)
        await world.ask("PUT", f"{C}/points", point({"free": [1, 2]}), shoal_model="other")

    run(tmp_path, test)


def test_bindings_that_cannot_be_are_refused_when_the_collection_is_made(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        small = {"vectors": {"size": 3, "distance": "Dot", "shoal_model": "lengths"}}
        assert "3 dimensions and the model org/lengths makes 4" in await world.ask(
            "PUT", C, small, 400
        )
        for wrong in ({"nothing": "lengths"}, {"": 7}, "lengths"):
            body = {"vectors": {"size": 4, "distance": "Dot"}, "metadata": {"shoal_models": wrong}}
            assert "shoal_models" in await world.ask("PUT", C, body, 400)
        both = {**ONE, "metadata": {"shoal_models": {"": "other"}}}
        assert "name one" in await world.ask("PUT", C, both, 400)
        unknown = {"vectors": {"size": 4, "distance": "Dot", "shoal_model": "Later/Served"}}
        await world.ask("PUT", C, unknown)
        assert world.bound() == {"": ("later/served", None)}

    run(tmp_path, test)


def test_texts_that_were_cut_are_told_in_a_header(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.ask("PUT", C, ONE)
        for words, told in (("x" * 20, "1"), ("short", None)):
            answer = await world.http.put(f"{C}/points", content=json.dumps(point(text(words))))
            assert answer.headers.get("shoal-truncated-texts") == told

    run(tmp_path, test)


# -- names, with nobody and with several behind them ----------------------------------------------
LENGTHS = ModelInfo("org/lengths", 4, 8, OLD, ("lengths",))
BOUND = BoundModel(model="org/lengths", fingerprint=OLD)


@pytest.mark.parametrize("given", ["org/lengths", "lengths", " Org/Lengths", "LENGTHS"])
@pytest.mark.parametrize("known", [(), (LENGTHS,), (ModelInfo("other", 4, 8, NEW),)])
def test_a_name_means_the_same_while_nobody_serves_it(
    given: str, known: tuple[ModelInfo, ...]
) -> None:
    check_text(BOUND, "", given, known)
    check_text(BoundModel(model="lengths"), "", given, (LENGTHS,))  # bound when nobody was there
    with pytest.raises(BadRequest):
        check_text(BOUND, "", "other", known)


def test_an_alias_that_several_have_means_the_one_that_is_bound() -> None:
    known = (LENGTHS, ModelInfo("acme/lengths", 4, 8, NEW, ("lengths",)))
    check_text(BOUND, "", "lengths", known)
    with pytest.raises(BadRequest):
        check_text(BOUND, "", "acme/lengths", known)


def test_of_several_weights_none_is_bound_by_chance() -> None:
    request = CreateCollection.model_validate(ONE, strict=False)
    other = ModelInfo("org/lengths", 4, 8, NEW, ("lengths",))
    longer = ModelInfo("org/lengths", 5, 8, NEW, ("lengths",))
    for known, fingerprint in (
        ((LENGTHS,), OLD),
        ((LENGTHS, other), None),
        ((LENGTHS, longer), OLD),
        ((longer, LENGTHS), OLD),
    ):
        bound = bound_models(request, known)
        assert bound == {"": BoundModel(model="org/lengths", fingerprint=fingerprint)}
    with pytest.raises(BadRequest, match="4 dimensions and the model org/lengths makes 5"):
        bound_models(request, (longer,))


# -- /v1/embeddings --------------------------------------------------------------------------------
@pytest.mark.parametrize("inline", [True, False])
def test_embeddings_have_the_shape_that_openai_clients_read(
    inline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not inline:  # as of many texts
        monkeypatch.setattr(coordinator.embeddings, "INLINE_NUMBERS_MAX", 0)

    async def test(world: World) -> None:
        async def post(status: int = 200, **body: Any) -> Any:
            answer = await world.http.post("/v1/embeddings", content=json.dumps(body))
            assert answer.status_code == status, answer.text
            return answer.json()

        said = await post(model="lengths", input=["four", "a longer text"], user="me")
        assert said["object"] == "list"
        assert [item["index"] for item in said["data"]] == [0, 1]
        assert said["data"][0] == {"object": "embedding", "index": 0, "embedding": [4, 1, 0, 0]}
        assert said["usage"] == {"prompt_tokens": 12, "total_tokens": 12}
        assert said["truncated"] == [1]
        packed = await post(model="lengths", input="four", encoding_format="base64")
        raw = base64.b64decode(packed["data"][0]["embedding"])
        assert np.frombuffer(raw, "<f4").tolist() == [4, 1, 0, 0]
        assert (await post(model="lengths", input="four", dimensions=4))["truncated"] == []
        for wrong in (
            {"input": "x", "model": "lengths", "dimensions": 2},
            {"input": "x", "model": "lengths", "prompt": "query: "},
            {"input": "x", "model": "nobody's"},
            {"input": [], "model": "lengths"},
            {"input": [[1, 2]], "model": "lengths"},
            {"model": "lengths"},
        ):
            answer = await world.http.post("/v1/embeddings", content=json.dumps(wrong))
            assert answer.status_code in (400, 422), answer.text
            refused = answer.json()
            assert refused["error"]["type"] == "invalid_request_error"
            assert refused["error"]["message"]
        for count in (0, 5_000):
            answer = await post(422, model="lengths", input=["x"] * count)
            assert f"takes 1 to 4096 texts, not {count}" in answer["error"]["message"]
        world.encoder.fails = Busy("many texts wait", retry_after_s=7)
        assert (await post(429, model="lengths", input="x"))["error"]["type"] == "rate_limit_error"

    run(tmp_path, test)
