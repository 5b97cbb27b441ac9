"""The engine of a rank group over a model of the test's own: order, bounds, halving, failure; and its
gRPC face with the client of coordinators on the other end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

pytest.importorskip("tokenizers")

from fakes.encoder_groups import DIM, INFO, Group, Lengths, client, engine_over, group, until

from encoder.batching import Lane
from shoal.errors import BadRequest, Busy, InvariantError, NotSupported, Unavailable
from shoal.metadata.contract import KeyValue
from shoal.metadata.schema import NodeRecord
from shoal.rpc import encoder as rpc
from shoal.rpc.encoder import EncoderClient


def ids(*lengths: int) -> list[list[int]]:
    return [[length] * length for length in lengths]


def test_answers_are_in_the_order_of_the_texts() -> None:
    engine, _ = engine_over(Lengths())
    _, future = engine.submit(ids(9, 1, 30, 2), Lane.BULK)
    assert future.result(30)[:, 0].tolist() == [9, 1, 30, 2]
    engine.close(Unavailable("end"))


def test_a_batch_that_does_not_fit_is_halved_and_later_ones_are_smaller() -> None:
    model = Lengths(fits=20)
    engine, _ = engine_over(model)
    _, future = engine.submit(ids(8, 8, 8, 8, 8, 8), Lane.BULK)
    assert future.result(30)[:, 0].tolist() == [8] * 6
    assert all(len(batch) * max(batch) <= 20 for batch in model.batches if batch)
    assert engine.splits_total >= 2
    _, lost = engine.submit(ids(30), Lane.BULK)
    with pytest.raises(InvariantError, match="single text of 30 tokens does not fit"):
        lost.result(30)
    _, future = engine.submit(ids(3), Lane.BULK)
    assert future.result(30)[0, 0] == 3
    engine.close(Unavailable("end"))


def test_beyond_the_bound_callers_are_told_to_come_back() -> None:
    model = Lengths()
    model.gate.clear()
    engine, _ = engine_over(model, queue_tokens_max=40)
    _, running = engine.submit(ids(5), Lane.BULK)
    assert model.at_work.wait(30)
    engine.submit(ids(35), Lane.BULK)
    with pytest.raises(Busy, match="1 texts with 35 tokens already wait") as caught:
        engine.submit(ids(6), Lane.BULK)
    assert caught.value.retry_after_s >= 1
    _, query = engine.submit(ids(6), Lane.INTERACTIVE)
    model.gate.set()
    assert running.result(30)[0, 0] == 5
    assert query.result(30)[0, 0] == 6
    engine.close(Unavailable("end"))


def test_a_query_overtakes_an_import() -> None:
    model = Lengths()
    model.gate.clear()
    engine, _ = engine_over(model)
    _, first = engine.submit(ids(60), Lane.BULK)
    assert model.at_work.wait(30)
    _, bulk = engine.submit(ids(*[50] * 6), Lane.BULK)
    _, query = engine.submit(ids(7), Lane.INTERACTIVE)
    model.gate.set()
    bulk.result(30)
    assert first.done()
    assert query.done()
    batches = [batch for batch in model.batches if batch]
    assert batches[1] == [7]
    engine.close(Unavailable("end"))


def test_a_broken_group_fails_everybody_at_once_and_who_comes_later() -> None:
    model = Lengths()
    model.gate.clear()
    engine, _ = engine_over(model)
    _, running = engine.submit(ids(5), Lane.BULK)
    assert model.at_work.wait(30)
    _, waiting = engine.submit(ids(6), Lane.BULK)
    engine.fail(Unavailable("a process is lost"))
    for future in (running, waiting):
        with pytest.raises(Unavailable, match="a process is lost"):
            future.result(1)
    with pytest.raises(Unavailable, match="a process is lost"):
        engine.submit(ids(1), Lane.BULK)
    model.gate.set()
    engine.close(Unavailable("end"))


def test_what_ends_the_thread_is_reported() -> None:
    model = Lengths()
    engine, broken = engine_over(model)
    model.fails = RuntimeError("connection closed by peer")
    engine.submit(ids(5), Lane.BULK)
    assert model.at_work.wait(30)
    engine.close(Unavailable("end"))
    assert [str(error) for error in broken] == ["connection closed by peer"]


# -- over gRPC -------------------------------------------------------------------------------------
async def occupy(encoder: EncoderClient, *groups: Group) -> list[Any]:
    """One request at work in each group; their gates are closed."""
    asked = []
    for number, _ in enumerate(groups):
        asked.append(asyncio.ensure_future(encoder.embed([f"text {number}"], "len")))
        await until(lambda: sum(g.model.at_work.is_set() for g in groups) == len(asked))
    return asked


def run(scenario: Any) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


def test_texts_come_back_as_vectors_and_what_was_cut_is_told() -> None:
    async def scenario() -> None:
        async with group("e1") as one, client(one) as encoder:
            said = await encoder.encode(["a bb", "x " * 20, ""], "LEN")
            assert said.vectors[:, 0].tolist() == [2, 8, 1]
            assert said.tokens.tolist() == [2, 8, 1]
            assert said.truncated.tolist() == [False, True, False]
            assert said.fingerprint == INFO.fingerprint
            assert (await encoder.embed([], "len")).shape == (0, DIM)
            (info,) = encoder.models()
            assert (info.name, info.texts_total, info.truncated_total) == ("lengths", 3, 1)
            (described,) = await encoder.describe()
            assert described["state"] == "up"
            assert described["ranks"][0]["parameter_bytes"] == 64
            with pytest.raises(BadRequest, match="model 'other' is not known"):
                await encoder.embed(["a"], "other")
            with pytest.raises(BadRequest, match=r"fingerprint 0000.*has ffff"):
                await encoder.encode(["a"], "len", "0" * 64)

    run(scenario())


def test_without_any_encoder_people_are_told_what_to_start() -> None:
    async def scenario() -> None:
        async with client() as encoder:
            with pytest.raises(NotSupported, match="shoal encoder serve"):
                await encoder.embed(["a"], "len")

    run(scenario())


def test_work_goes_to_the_group_with_less_of_it() -> None:
    async def scenario() -> None:
        async with group("e1") as one, group("e2") as two, client(one, two) as encoder:
            one.model.gate.clear()
            two.model.gate.clear()
            asked = await occupy(encoder, one, two)
            asked += [asyncio.ensure_future(encoder.embed([f"text {i}"], "len")) for i in range(6)]
            await until(lambda: one.engine.waiting[0] + two.engine.waiting[0] == 6)
            assert abs(one.engine.waiting[0] - two.engine.waiting[0]) <= 2
            one.model.gate.set()
            two.model.gate.set()
            await asyncio.gather(*asked)

    run(scenario())


def test_another_group_takes_over_when_one_is_lost_or_busy() -> None:
    async def scenario() -> None:
        async with group("e1") as one, group("e2") as two, client(one, two) as encoder:
            one.model.gate.clear()
            two.model.gate.clear()
            asked = await occupy(encoder, one, two)
            one.engine.fail(Unavailable("a process is lost"))
            two.model.gate.set()
            answers = await asyncio.gather(*asked)
            assert [int(answer[0, 0]) for answer in answers] == [2, 2]
            await one.server.close()
            assert (await encoder.embed(["still here"], "len"))[0, 0] == 2

    run(scenario())


@asynccontextmanager
async def mute() -> AsyncIterator[str]:
    """The address of a machine that takes connections and says nothing."""
    open_ones: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _, writer: open_ones.append(writer), "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in open_ones:
            writer.transport.abort()


def at(entry: KeyValue, address: str) -> KeyValue:
    known = NodeRecord.from_bytes(entry.key, entry.value)
    record = known.model_copy(update={"grpc": address})
    return KeyValue(record.key, record.to_bytes(), 2)


def test_a_group_that_comes_back_elsewhere_leaves_nobody_without_an_answer() -> None:
    async def scenario() -> None:
        async with mute() as address, group("e1") as one:
            entries = {one.entry.key: at(one.entry, address)}
            encoder = EncoderClient(entries)
            asked = [asyncio.ensure_future(encoder.embed(["a b"], "len")) for _ in range(3)]
            described = asyncio.ensure_future(encoder.describe())
            await asyncio.sleep(0.05)  # they wait for the connection
            entries[one.entry.key] = one.entry
            assert (await encoder.embed(["a b c"], "len"))[0, 0] == 3
            answers = await asyncio.gather(*asked)  # no error: asked again, there
            assert [int(answer[0, 0]) for answer in answers] == [2, 2, 2]
            (said,) = await described
            assert said["state"] == "lost"
            await encoder.close()

    run(scenario())


def test_depths_are_asked_for_on_when_a_group_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "POLL_S", 0.01)

    async def scenario() -> None:
        async with mute() as address, group("e1") as one, group("e2") as two:
            entries = {one.entry.key: one.entry, two.entry.key: at(two.entry, address)}
            encoder = EncoderClient(entries)
            await encoder.embed(["a"], "len")
            await asyncio.sleep(0.1)  # a question for its depth is on its way
            entries[two.entry.key] = two.entry
            await encoder.embed(["a"], "len")
            two.model.gate.clear()
            two.engine.submit(ids(5), Lane.BULK)
            assert await asyncio.to_thread(two.model.at_work.wait, 30)
            two.engine.submit(ids(7), Lane.BULK)
            await until(lambda: encoder._groups["e2"].waiting_tokens == 7)
            await encoder.close()

    run(scenario())


def test_groups_that_are_gone_for_good_leave_no_connection() -> None:
    async def scenario() -> None:
        async with group("e1") as one, group("e2") as two:
            entries = {one.entry.key: one.entry}
            encoder = EncoderClient(entries)
            await encoder.embed(["a"], "len")
            del entries[one.entry.key]
            entries[two.entry.key] = two.entry
            await encoder.embed(["a"], "len")
            assert list(encoder._groups) == ["e2"]
            await encoder.close()

    run(scenario())


def test_what_comes_when_a_group_has_finished_may_be_sent_again() -> None:
    async def scenario() -> None:
        async with group("e1") as one, client(one) as encoder:
            await encoder.embed(["a"], "len")  # the call is open
            await one.face.finish(5)
            with pytest.raises(Unavailable, match="closing"):
                await encoder.embed(["word " * 2_000], "len")

    run(scenario())


def test_many_texts_are_asked_for_in_parts_over_all_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "CHUNK_TEXTS", 10)

    async def scenario() -> None:
        async with group("e1") as one, group("e2") as two, client(one, two) as encoder:
            texts = ["a " * (1 + n % 11) for n in range(43)]
            said = await encoder.encode(texts, "len")
            assert said.vectors[:, 0].tolist() == [min(8, 1 + n % 11) for n in range(43)]
            assert said.truncated.tolist() == [1 + n % 11 > 8 for n in range(43)]
            assert said.tokens.shape == (43,)
            assert one.engine.texts_total + two.engine.texts_total == 43
            assert min(one.engine.texts_total, two.engine.texts_total) >= 10
            assert encoder.models()[0].texts_total == 43
            one.engine.fail(Unavailable("a process is lost"))
            two.engine.fail(Unavailable("a process is lost"))
            with pytest.raises(Unavailable, match="a process is lost"):
                await encoder.encode(texts, "len")

    run(scenario())


def test_a_request_is_never_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of 80 tokens has no room beside another one; together they are one request."""
    monkeypatch.setattr(rpc, "CHUNK_TEXTS", 10)

    async def scenario() -> None:
        async with group("e1") as one, client(one) as encoder:
            one.model.gate.clear()
            texts = ["a " * 8] * 45
            asked = asyncio.ensure_future(encoder.encode(texts, "len"))
            await until(one.model.at_work.is_set)
            one.model.gate.set()
            assert (await asked).vectors[:, 0].tolist() == [8] * 45
            one.model.gate.clear()
            one.model.at_work.clear()
            (running,) = await occupy(encoder, one)
            other = asyncio.ensure_future(encoder.encode(texts[:10], "len"))
            await until(lambda: one.engine.waiting[0] == 10)
            with pytest.raises(Busy):  # by others
                await encoder.encode(texts, "len")
            one.model.gate.set()
            await running
            await other

    run(scenario())


def test_what_would_wait_too_long_is_refused_before_it_is_tokenized() -> None:
    engine, _ = engine_over(Lengths())
    engine._seconds_per_token = 1.0  # of a slow machine
    model = engine._model
    model.gate.clear()  # type: ignore[attr-defined]
    engine.submit(ids(5), Lane.BULK)
    assert model.at_work.wait(30)  # type: ignore[attr-defined]
    engine.submit(ids(40), Lane.BULK)
    for refused in (
        lambda: engine.submit(ids(1), Lane.BULK),
        lambda: engine.check_room(1, Lane.BULK),
    ):
        with pytest.raises(Busy) as caught:
            refused()
        assert caught.value.retry_after_s >= 30
    engine.check_room(1, Lane.INTERACTIVE)
    _, query = engine.submit(ids(1), Lane.INTERACTIVE)
    model.gate.set()  # type: ignore[attr-defined]
    assert query.result(30)[0, 0] == 1
    engine.close(Unavailable("end"))


def test_when_all_groups_are_lost_the_error_may_be_retried() -> None:
    async def scenario() -> None:
        async with group("e1") as one, client(one) as encoder:
            assert len(await encoder.embed(["a"], "len")) == 1
            await one.server.close()
            with pytest.raises(Unavailable) as caught:
                await encoder.embed(["a"], "len")
            assert caught.value.retryable

    run(scenario())


def test_a_caller_that_leaves_frees_its_place() -> None:
    async def scenario() -> None:
        async with group("e1") as one, client(one) as encoder:
            one.model.gate.clear()
            first = asyncio.ensure_future(encoder.embed(["a"], "len"))
            await asyncio.to_thread(one.model.at_work.wait, 30)
            second = asyncio.ensure_future(encoder.embed(["b c d"], "len"))
            await until(lambda: one.engine.waiting[0] == 1)
            second.cancel()
            await until(lambda: one.engine.waiting[0] == 0)
            one.model.gate.set()
            assert len(await first) == 1

    run(scenario())
