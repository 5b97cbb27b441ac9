"""LocalEncoder with several models: their names, whose turn it is, and folders that change."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from fakes.text_models import make_text_model

from encoder import service
from encoder.model import ModelFolder, find_model, load_network
from encoder.service import LocalEncoder
from shoal.cli import main
from shoal.configuration import load_settings
from shoal.encoder_api import DEFAULT_MODEL
from shoal.errors import BadRequest, SettingsError, ShoalError, Unavailable
from shoal.settings import EncoderSettings

TEXTS = ["word1 word2 word3", "word4"]
SHORT = "all-minilm-l6-v2"


@asynccontextmanager
async def encoder_of(*models: object, precision: Any = "float32") -> AsyncIterator[LocalEncoder]:
    given = EncoderSettings(
        encoder_model=tuple(map(str, models)), encoder_precision=precision, encoder_threads=1
    )
    encoder = LocalEncoder(given)
    try:
        yield encoder
    finally:
        await encoder.close()


def run(scenario: Any) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return make_text_model(root / "A"), make_text_model(root / "B", seed=2, dim=8)


def test_each_model_answers_for_itself(folders: tuple[Path, Path]) -> None:
    async def scenario() -> None:
        async with encoder_of(*folders) as encoder:
            assert [m.name for m in encoder.models()] == ["a", "b", DEFAULT_MODEL]
            assert not any(m.loaded for m in encoder.models())
            one, two, again = await asyncio.gather(
                encoder.encode(TEXTS, "A"), encoder.encode(TEXTS, "b"), encoder.encode(TEXTS, "a")
            )
            assert one.vectors.shape == (2, 16)
            assert two.vectors.shape == (2, 8)
            assert np.allclose(one.vectors, again.vectors, atol=1e-6)
            assert one.fingerprint == ModelFolder.read(folders[0]).fingerprint()
            assert two.fingerprint == ModelFolder.read(folders[1]).fingerprint()
            loaded = {m.name: (m.loaded, m.texts_total) for m in encoder.models()}
            assert loaded == {"a": (True, 4), "b": (True, 2), DEFAULT_MODEL: (False, 0)}
            with pytest.raises(BadRequest, match="fingerprint"):
                await encoder.encode(TEXTS, "a", two.fingerprint)

    run(scenario())


def test_a_fingerprint_costs_no_loading(folders: tuple[Path, Path]) -> None:
    async def scenario() -> None:
        async with encoder_of(*folders) as encoder:
            with pytest.raises(BadRequest, match="fingerprint"):
                await encoder.encode(TEXTS, "a", "0" * 64)
            info = encoder.models()[0]
            assert info.fingerprint == await encoder.fingerprint("a")
            assert not info.loaded

    run(scenario())


# -- loading ---------------------------------------------------------------------------------------
class Gate:
    """Loading of the model in `folder` waits until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        real = service.TextModel.load

        def load(of: ModelFolder, **given: Any) -> Any:
            if of.path == folder:
                self.reached.set()
                assert self.open.wait(30)
            return real(of, **given)

        monkeypatch.setattr(service.TextModel, "load", load)


def test_texts_for_one_model_do_not_wait_while_another_is_loaded(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        gate = Gate(monkeypatch, folders[1])
        async with encoder_of(*folders) as encoder:
            await encoder.prepare("a")
            late = [
                asyncio.ensure_future(encoder.encode(TEXTS, "b")),
                asyncio.ensure_future(encoder.prepare("b")),
            ]
            assert await asyncio.to_thread(gate.reached.wait, 30)
            assert len(await encoder.embed(TEXTS, "a")) == 2
            assert not any(task.done() for task in late)
            gate.open.set()
            embedded, info = await asyncio.gather(*late)
            assert (embedded.vectors.shape, info.name) == ((2, 8), "b")

    run(scenario())


def test_closing_while_a_model_is_loaded_answers_who_waits_for_it(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        gate = Gate(monkeypatch, folders[1])
        async with encoder_of(*folders) as encoder:
            waiting = [
                asyncio.ensure_future(encoder.encode(TEXTS, "b")),
                asyncio.ensure_future(encoder.prepare("b")),
            ]
            assert await asyncio.to_thread(gate.reached.wait, 30)
            closing = asyncio.ensure_future(encoder.close())
            for task in waiting:
                with pytest.raises(Unavailable, match="closed"):
                    await task
            gate.open.set()
            await closing

    run(scenario())


@pytest.mark.parametrize("damaged", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_model_that_cannot_be_loaded_fails_its_own_texts_only(
    damaged: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folders[1], broken)

    async def scenario() -> None:
        async with encoder_of(folders[0], broken) as encoder:
            (broken / damaged).write_bytes(b"\0" * 64)
            bad, good = await asyncio.gather(
                encoder.encode(TEXTS, "broken"), encoder.encode(TEXTS, "a"), return_exceptions=True
            )
            assert isinstance(bad, ShoalError), bad
            assert str(broken) in bad.message
            assert not isinstance(good, BaseException)
            with pytest.raises(ShoalError, match=str(broken)):
                await encoder.prepare("broken")

    run(scenario())


# -- folders that change ---------------------------------------------------------------------------
def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to, dirs_exist_ok=True)
    return to


def test_a_folder_that_is_removed_is_told_until_it_is_back(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    async def scenario() -> None:
        folder = copied(folders[0], tmp_path / "notes")
        async with encoder_of(folder) as encoder:
            shutil.rmtree(folder)
            for asked in (encoder.encode(TEXTS, "notes"), encoder.fingerprint("notes")):
                with pytest.raises(Unavailable, match="put it back"):
                    await asked
            copied(folders[0], folder)
            first = await encoder.embed(TEXTS, "notes")
            shutil.rmtree(folder)  # what is loaded stays
            assert np.array_equal(await encoder.embed(TEXTS, "notes"), first)

    run(scenario())


@pytest.mark.parametrize("asked_before", [False, True])
def test_weights_that_were_replaced_before_they_were_loaded_are_not_taken_for_the_old_ones(
    asked_before: bool, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    async def scenario() -> None:
        folder = copied(folders[0], tmp_path / "notes")
        async with encoder_of(folder) as encoder:
            old = ModelFolder.read(folder).fingerprint()
            if asked_before:
                assert await encoder.fingerprint("notes") == old
            shutil.rmtree(folder)
            copied(folders[1], folder)  # of other dimensions, too
            with pytest.raises(Unavailable, match="replaced just now"):
                await encoder.prepare("notes")
            info = await encoder.prepare("notes")
            assert (info.dim, info.fingerprint) == (8, ModelFolder.read(folder).fingerprint())
            with pytest.raises(BadRequest, match="fingerprint"):
                await encoder.encode(TEXTS, "notes", old)
            assert (await encoder.embed(TEXTS, "notes")).shape == (2, 8)

    run(scenario())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_writing_to_the_files_of_a_model_in_use_changes_nothing(
    precision: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    async def scenario() -> None:
        folder = copied(folders[0], tmp_path / "notes")
        async with encoder_of(folder, precision=precision) as encoder:
            before = await encoder.embed(TEXTS, "notes")
            with (folder / "model.safetensors").open("r+b") as file:
                file.seek(4_096)
                file.write(b"\x01" * 30_000)
            assert np.array_equal(await encoder.embed(TEXTS, "notes"), before)

    run(scenario())


def test_weights_saved_in_16_bits_are_computed_with_as_float32(tmp_path: Path) -> None:
    folder = ModelFolder.read(make_text_model(tmp_path / "half", saved_as="bfloat16"))
    kinds = {str(parameter.dtype) for parameter in load_network(folder).parameters()}
    assert kinds == {"torch.float32"}


# -- names -----------------------------------------------------------------------------------------
def linked(folder: Path, to: Path) -> Path:
    to.mkdir(parents=True)
    for item in folder.iterdir():
        (to / item.name).symlink_to(item)
    return to


def test_two_models_of_one_name_are_refused_and_a_name_of_one_s_own_helps(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    one, two = linked(folders[0], tmp_path / "x/notes"), linked(folders[1], tmp_path / "y/Notes")

    async def scenario() -> None:
        with pytest.raises(SettingsError, match="two models of the name notes") as caught:
            async with encoder_of(one, two):
                pass
        assert str(one) in caught.value.message
        assert f"as in Notes-2={two}." in caught.value.message
        async with encoder_of(one, f"Notes-v2={two}") as encoder:
            assert [m.name for m in encoder.models()] == ["notes", "notes-v2", DEFAULT_MODEL]
            assert (await encoder.embed(TEXTS, "NOTES-V2")).shape == (2, 8)

    run(scenario())


def test_no_model_takes_the_name_of_the_one_that_comes_with_shoal(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = linked(folders[0], tmp_path / "all-MiniLM-L6-v2")
    with pytest.raises(SettingsError, match="comes with Shoal"):
        find_model(str(folder))
    for name in (SHORT, DEFAULT_MODEL, f"acme/{SHORT}"):
        with pytest.raises(SettingsError, match=f"two models of the name .*{SHORT}"):
            LocalEncoder(EncoderSettings(encoder_model=(f"{name}={folder}",)))


def test_names_of_one_s_own(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_model(f"acme/Notes={folders[0]}") == ("acme/notes", ("notes",), folders[0])
    assert find_model(f" mine = {folders[0]}")[0] == "mine"
    assert find_model(f"mine={SHORT}")[2] == find_model(DEFAULT_MODEL)[2]
    odd = linked(folders[0], tmp_path / "lr=3")
    monkeypatch.chdir(tmp_path)
    assert find_model("lr=3") == ("lr=3", (), Path("lr=3"))  # a folder is a folder
    assert find_model(f"mine={odd}")[2] == odd
    with pytest.raises(SettingsError, match="'/nowhere' is neither"):
        find_model("mine=/nowhere")


@pytest.mark.parametrize("many", [100, 1])
def test_two_models_share_the_time(many: int, folders: tuple[Path, Path]) -> None:
    async def scenario() -> None:
        async with encoder_of(*folders) as encoder:
            await asyncio.gather(encoder.prepare("a"), encoder.prepare("b"))
            texts = [f"word{n % 100}" for n in range(many)]
            answers = await asyncio.gather(*(encoder.embed(texts, "ab"[n % 2]) for n in range(40)))
            assert {answer.shape for answer in answers} == {(many, 16), (many, 8)}
            for number, answer in enumerate(answers):
                assert np.allclose(answer, answers[number % 2], atol=1e-5)

    run(scenario())


def test_settings_name_several(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SHOAL_ENCODER_MODEL", raising=False)
    file = tmp_path / "shoal.toml"

    def models(flags: dict[str, object]) -> tuple[str, ...]:
        return load_settings(flags, file).settings.encoder_model

    file.write_text("")
    assert models({}) == (DEFAULT_MODEL,)
    file.write_text('encoder_model = "one"')
    assert models({}) == ("one",)
    file.write_text('encoder_model = ["one", "two, with a comma"]')
    assert models({}) == ("one", "two, with a comma")
    monkeypatch.setenv("SHOAL_ENCODER_MODEL", "three, n=four")
    assert models({}) == ("three", "n=four")
    assert models({"encoder_model": "five,six"}) == ("five", "six")
    for wrong in ("", " , ", "none,one"):
        with pytest.raises(SettingsError, match="encoder_model"):
            models({"encoder_model": wrong})
    file.write_text("encoder_model = [1]")
    monkeypatch.delenv("SHOAL_ENCODER_MODEL")
    with pytest.raises(SettingsError, match=r"encoder_model.*\[1\]"):
        models({})
    assert EncoderSettings(encoder_model="NONE").encoder_is_off


def test_the_flag_may_be_given_several_times(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "--encoder-model", "one", "--encoder-model", "two,three"]) == 0
    assert "encoder_model = one, two, three  # --encoder-model" in capsys.readouterr().out
