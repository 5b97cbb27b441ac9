"""A model's name is not enough: groups of one name with different weights, and a coordinator's own model
beside them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from fakes.encoder_groups import INFO, client, group

from shoal.encoder_api import Embedding, ModelInfo, resolve_model, wrong_weights
from shoal.encoder_choice import EitherEncoder
from shoal.errors import BadRequest, NotSupported, Unavailable
from shoal.rpc import encoder as rpc
from shoal.rpc.encoder import EncoderClient

OLD, NEW, OTHER = "a" * 64, "b" * 64, "c" * 64


def info(fingerprint: str, name: str = "lengths", aliases: tuple[str, ...] = ("len",)) -> ModelInfo:
    return ModelInfo(name, INFO.dim, 8, fingerprint, aliases, loaded=True, precision="float32")


def run(scenario: Any) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


# -- groups ----------------------------------------------------------------------------------------
def test_a_fingerprint_chooses_the_group() -> None:
    async def scenario() -> None:
        async with (
            group("e1", info(OLD)) as old,
            group("e2", info(NEW)) as new,
            client(old, new) as encoder,
        ):
            for fingerprint, there, other in ((OLD, old, new), (NEW, new, old)):
                before = other.engine.texts_total
                for _ in range(4):
                    said = await encoder.encode(["a bb"], "len", fingerprint)
                    assert said.fingerprint == fingerprint
                assert (await encoder.prepare("LEN", fingerprint)).fingerprint == fingerprint
                assert other.engine.texts_total == before
                assert there.engine.texts_total == 4
            listed = [(m.name, m.fingerprint, m.texts_total) for m in encoder.models()]
            assert listed == [("lengths", OLD, 4), ("lengths", NEW, 4)]

    run(scenario())


def test_without_a_fingerprint_nobody_guesses_which_weights_are_meant() -> None:
    async def scenario() -> None:
        async with (
            group("e1", info(OLD)) as old,
            group("e2", info(NEW)) as new,
            client(old, new) as encoder,
        ):
            for asked in (encoder.encode(["a"], "len"), encoder.prepare("lengths")):
                with pytest.raises(BadRequest, match="several weights") as caught:
                    await asked
                assert OLD in caught.value.message
                assert NEW in caught.value.message
            with pytest.raises(BadRequest, match=f"fingerprint {OTHER}.*has {OLD} and {NEW}"):
                await encoder.encode(["a"], "len", OTHER)

    run(scenario())


def test_two_groups_of_the_same_weights_are_one_model() -> None:
    async def scenario() -> None:
        async with group("e1") as one, group("e2") as two, client(one, two) as encoder:
            assert len(encoder.models()) == 1
            assert (await encoder.prepare("len")).fingerprint == INFO.fingerprint

    run(scenario())


def test_weights_whose_group_is_lost_are_awaited_and_nothing_else_stands_in() -> None:
    async def scenario() -> None:
        async with group("e1", info(OLD)) as old, group("e2", info(NEW)) as new:
            entries = {g.entry.key: g.entry for g in (old, new)}
            encoder = EncoderClient(entries)
            await encoder.encode(["a"], "len", OLD)
            del entries[old.entry.key]  # its lease has ended
            with pytest.raises(Unavailable, match=f"fingerprint {OLD} at the moment"):
                await encoder.encode(["a"], "len", OLD)
            with pytest.raises(BadRequest, match="several weights"):  # though one is left
                await encoder.encode(["a"], "len")
            entries[old.entry.key] = old.entry
            assert (await encoder.encode(["a"], "len", OLD)).fingerprint == OLD
            await encoder.close()

    run(scenario())


def test_weights_that_are_gone_for_good_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with group("e1", info(OLD)) as old, group("e2", info(NEW)) as new:
            entries = {g.entry.key: g.entry for g in (old, new)}
            encoder = EncoderClient(entries)
            await encoder.encode(["a"], "len", OLD)
            async with group("e1", info(NEW)) as replaced:  # started again with others
                entries[old.entry.key] = replaced.entry
                with pytest.raises(BadRequest, match=f"fingerprint {OLD}.*has {NEW}\\."):
                    await encoder.encode(["a"], "len", OLD)
                assert (await encoder.encode(["a"], "len")).fingerprint == NEW
            del entries[old.entry.key]
            monkeypatch.setattr(rpc, "RETURN_S", 0.0)
            with pytest.raises(BadRequest, match=f"fingerprint {OLD}"):
                await encoder.encode(["a"], "len", OLD)
            await encoder.close()

    run(scenario())


def test_a_group_that_serves_other_weights_than_it_registered_is_passed_over() -> None:
    async def scenario() -> None:
        async with group("e1", info(NEW)) as stale, group("e2", info(OLD)) as right:
            record = stale.entry.value.replace(NEW.encode(), OLD.encode())
            entry = type(stale.entry)(stale.entry.key, record, 1)
            alone = EncoderClient({entry.key: entry})
            with pytest.raises(Unavailable, match=f"e1: .*has {NEW}"):
                await alone.encode(["a"], "len")
            await alone.close()
            both = EncoderClient({entry.key: entry, right.entry.key: right.entry})
            for _ in range(4):
                assert (await both.encode(["a"], "len")).fingerprint == OLD
            await both.close()

    run(scenario())


# -- names -----------------------------------------------------------------------------------------
def test_an_alias_of_two_models_is_nobody_s() -> None:
    known = {"a/notes": ["notes"], "b/notes": ["notes"], "b/len": ["len"]}
    assert resolve_model("Len", known) == "b/len"
    assert resolve_model("a/Notes", known) == "a/notes"
    with pytest.raises(BadRequest, match="may be any of a/notes, b/notes: name it in full"):
        resolve_model("notes", known)


def test_a_full_name_comes_before_an_alias() -> None:
    assert resolve_model("notes", {"a/notes": ["notes"], "notes": []}) == "notes"


# -- this process beside groups --------------------------------------------------------------------
class Own:
    """A model of this process; its vectors are zeros."""

    def __init__(self, fingerprint: str, name: str = "lengths") -> None:
        self._info = ModelInfo(name, INFO.dim, 8, fingerprint, ("len",))
        self.known = False
        self.asked = 0

    async def embed(self, texts: Sequence[str], model: str) -> Any:
        return (await self.encode(texts, model)).vectors

    async def encode(
        self, texts: Sequence[str], model: str, fingerprint: str | None = None
    ) -> Embedding:
        own = str(self._info.fingerprint)
        if fingerprint not in (None, own):
            raise wrong_weights(self._info.name, str(fingerprint), own)
        self.asked += 1
        n = len(texts)
        zeros = np.zeros((n, INFO.dim), np.float32)
        return Embedding(zeros, np.ones(n, np.int32), np.zeros(n, np.bool_), own)

    async def prepare(self, model: str, fingerprint: str | None = None) -> ModelInfo:
        return self._info

    async def fingerprint(self, model: str) -> str:
        assert model == self._info.name
        return str(self._info.fingerprint)

    def models(self) -> list[ModelInfo]:
        return [self._info]

    async def describe(self) -> list[dict[str, Any]]:
        return []

    async def close(self) -> None:
        return


def either(
    test: Callable[[EitherEncoder, Own, dict[str, Any]], Any], own: Own, *infos: ModelInfo
) -> None:
    async def scenario() -> None:
        entries: dict[str, Any] = {}
        async with (
            group("e1", infos[0] if infos else INFO) as one,
            group("e2", infos[-1] if infos else INFO) as two,
        ):
            entries |= {g.entry.key: g.entry for g in (one, two)[: len(infos)]}
            encoder = EitherEncoder(EncoderClient(entries), own)
            await test(encoder, own, entries)
            await encoder.close()

    run(scenario())


def test_what_groups_serve_is_computed_there_and_nowhere_else() -> None:
    async def test(encoder: EitherEncoder, own: Own, entries: dict[str, Any]) -> None:
        assert (await encoder.embed(["a b"], "len"))[0, 0] == 2
        assert (await encoder.encode(["a b"], "len", OLD)).vectors[0, 0] == 2
        assert [m.fingerprint for m in encoder.models()] == [OLD]
        assert own.asked == 0
        entries.clear()  # the group is gone: the same weights are here, too
        assert (await encoder.embed(["a b"], "len"))[0, 0] == 0
        assert (await encoder.encode(["a b"], "len", OLD)).fingerprint == OLD
        assert own.asked == 2

    either(test, Own(OLD), info(OLD))


def test_other_weights_of_the_same_name_are_told_from_one_s_own() -> None:
    async def test(encoder: EitherEncoder, own: Own, entries: dict[str, Any]) -> None:
        assert (await encoder.encode(["a b"], "len", NEW)).vectors[0, 0] == 2
        assert (await encoder.encode(["a b"], "len", OLD)).vectors[0, 0] == 0
        assert (await encoder.prepare("len", OLD)).fingerprint == OLD
        with pytest.raises(BadRequest, match=f"several weights.*{OLD} and {NEW}"):
            await encoder.encode(["a b"], "len")
        assert [m.fingerprint for m in encoder.models()] == [OLD, NEW]
        entries.clear()
        with pytest.raises(Unavailable, match=NEW):  # not one's own in their place
            await encoder.encode(["a b"], "len", NEW)
        with pytest.raises(BadRequest, match="several weights"):
            await encoder.encode(["a b"], "len")  # the same before and after

    either(test, Own(OLD), info(NEW))


def test_without_groups_this_process_computes_and_checks() -> None:
    async def test(encoder: EitherEncoder, own: Own, entries: dict[str, Any]) -> None:
        assert (await encoder.encode(["a"], "len", OLD)).fingerprint == OLD
        with pytest.raises(BadRequest, match=f"fingerprint {NEW}.*has {OLD}"):
            await encoder.encode(["a"], "len", NEW)
        with pytest.raises(BadRequest, match="not known here"):
            await encoder.encode(["a"], "nobody's")

    either(test, Own(OLD))


def test_models_of_groups_and_one_s_own_are_listed_together() -> None:
    async def test(encoder: EitherEncoder, own: Own, entries: dict[str, Any]) -> None:
        listed = [(m.name, m.fingerprint) for m in encoder.models()]
        assert listed == [("lengths", OLD), ("lengths", NEW), ("words", OTHER)]
        assert (await encoder.encode(["a"], "words")).fingerprint == OTHER

    own = Own(OTHER, "words")
    own._info = ModelInfo("words", INFO.dim, 8, OTHER)
    either(test, own, info(OLD), info(NEW))


def test_weights_that_were_served_before_this_process_began_are_awaited() -> None:
    """A coordinator that was started again while the only group is lost."""

    async def scenario() -> None:
        for own in (None, Own(OTHER, "words")):
            encoder = EitherEncoder(EncoderClient({}), own)
            with pytest.raises(
                Unavailable, match=f"No encoder serves notes with the fingerprint {OLD}"
            ):
                await encoder.encode(["a"], "notes", OLD)
            await encoder.close()

    run(scenario())


def test_without_any_encoder_people_are_told() -> None:
    async def scenario() -> None:
        encoder = EitherEncoder(EncoderClient({}), None)
        with pytest.raises(NotSupported, match="shoal encoder serve"):
            await encoder.embed(["a"], "len")
        await encoder.close()

    run(scenario())
