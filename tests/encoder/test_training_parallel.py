"""One step's gradient is the same on every layout: data × pipeline × tensor, up to 2 × 2 × 2.

The reference is written out here: one process, the whole batch, torch's own autograd from the loss to
the parameters. No part of the code under test is in it but the loading of the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_ranks import run_ranks, tiny_model, tiny_pairs

from encoder.model import ModelFolder, TextTokenizer, load_network, pad
from encoder.train.data import Pair, read_pairs
from encoder.train.settings import TrainSettings

PAIRS = 16
# Of the largest entry: rounding grows with what is summed. Of one process in float32 against float64 it
# is 0.7e-6 to 1.3e-6 for these families, of layouts against one process up to 2.0e-6. Qwen3's largest
# entry is 4.5, the others' are below 1: there a bound on the difference itself would be another bound.
TOLERANCE = 4e-6


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("training")
    tiny_pairs(folder / "pairs.jsonl", PAIRS, negatives=1)
    return tiny_model(folder / "tiny"), folder / "pairs.jsonl"


def reference(model: Path, pairs: list[Pair]) -> tuple[float, dict[str, torch.Tensor]]:
    folder = ModelFolder.read(model)
    network = load_network(folder).requires_grad_(True)
    texts = [p.query for p in pairs] + [p.positive for p in pairs]
    texts += [text for p in pairs for text in p.negatives]
    tokens = [t.token_ids for t in TextTokenizer(folder).tokenize(texts)]
    ids, mask = (torch.from_numpy(a) for a in pad(tokens, 0))
    states = network(input_ids=ids, attention_mask=mask).last_hidden_state
    weights = mask[:, :, None].float()
    vectors = torch.nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)
    queries, documents = vectors[: len(pairs)], vectors[len(pairs) :]
    loss = torch.nn.functional.cross_entropy(20.0 * queries @ documents.T, torch.arange(len(pairs)))
    loss.backward()
    gradients = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients


def gradients_of(settings: TrainSettings, file: Path, device: str = "cpu") -> None:
    """In each process: the gradient of one batch; rank 0 writes it down, whole."""
    import torch.distributed as dist

    from encoder.parallel import Layout, join_group, make_mesh
    from encoder.train.saving import unfused, whole_parameters
    from encoder.train.trainer import Trainer

    join_group(timeout_s=60, device=device)
    mesh = make_mesh(Layout(settings.dp, settings.pp, settings.tp), device)
    trainer = Trainer(settings, ModelFolder.read(Path(settings.model)), mesh, {})
    pairs = read_pairs(settings.pairs)
    loss = trainer.gradients(0, [pairs])
    norm = trainer.clip()
    for parameter in trainer.stage.parameters():
        assert parameter.grad is not None
        with torch.no_grad():
            parameter.copy_(parameter.grad)
    whole = whole_parameters(trainer.stage, mesh)
    if whole:
        whole = unfused(whole, trainer.family, settings.tp)
    if dist.get_rank() == 0:
        torch.save({"loss": loss, "norm": norm, "gradients": whole}, file)
    dist.barrier()
    dist.destroy_process_group()


def check(
    world: tuple[Path, Path],
    tmp_path: Path,
    *,
    device: str = "cpu",
    tolerance: float = TOLERANCE,
    **layout: Any,
) -> None:
    """tolerance: of the largest entry, against one process in float32 on the CPU."""
    model, file = world
    settings = TrainSettings(
        model=str(model), pairs=file, out=tmp_path, batch_pairs=PAIRS, clip_norm=0.0, **layout
    )
    codes = run_ranks(settings.processes, gradients_of, settings, tmp_path / "out.pt", device)
    assert codes == [0] * settings.processes
    found = torch.load(tmp_path / "out.pt")
    loss, gradients = reference(model, read_pairs(file))
    assert found["loss"] == pytest.approx(loss, abs=max(1e-5, tolerance))
    assert set(found["gradients"]) == set(gradients)
    worst = max(float((found["gradients"][n] - g).abs().max()) for n, g in gradients.items())
    largest = max(float(g.abs().max()) for g in gradients.values())
    norm = float(torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt())
    print(f"{layout}: gradient differs by {worst:.1e} at most; the largest is {largest:.3f}")
    assert worst <= tolerance * largest
    assert found["norm"] == pytest.approx(norm, rel=max(1e-4, tolerance))


def test_one_process_at_once_and_in_parts(world, tmp_path):
    check(world, tmp_path)
    check(world, tmp_path, chunk_rows=10)


def test_two_data_parallel_processes_share_their_negatives(world, tmp_path):
    check(world, tmp_path, dp=2)


LAYOUTS = [
    {"dp": 2, "chunk_rows": 10},
    {"dp": 2, "shard": "fsdp"},
    {"dp": 2, "shard": "fsdp", "chunk_rows": 10},
    {"pp": 2},
    {"pp": 2, "schedule": "gpipe", "chunk_rows": 10},
    {"pp": 4},
    {"tp": 2},
    {"tp": 4, "chunk_rows": 10},
    {"dp": 2, "tp": 2},
    {"dp": 2, "pp": 2},
    {"dp": 2, "pp": 2, "schedule": "gpipe", "chunk_rows": 7},
    {"pp": 2, "tp": 2},
    {"dp": 2, "pp": 2, "tp": 2},
    {"dp": 2, "pp": 2, "tp": 2, "schedule": "gpipe"},
]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda kw: "-".join(map(str, kw.values())))
def test_gradient_is_that_of_one_process(world, tmp_path, layout):
    check(world, tmp_path, **layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"dp": 2, "tp": 2}, {"pp": 2, "tp": 2}], ids=["dp-tp", "pp-tp"])
@pytest.mark.parametrize("model_type", ["roberta", "mpnet", "modernbert", "qwen3"])
def test_gradient_of_other_families(world, tmp_path, model_type, layout):
    model = tiny_model(tmp_path / model_type, model_type)
    check((model, world[1]), tmp_path, **layout)


def replayed(settings: TrainSettings, device: str = "cpu") -> None:
    """In each process: what the stage gives in the pass without a graph, and in the one with it."""
    import torch.distributed as dist

    from encoder.parallel import Layout, join_group, make_mesh
    from encoder.train.trainer import Trainer

    join_group(timeout_s=60, device=device)
    mesh = make_mesh(Layout(settings.dp, settings.pp, settings.tp), device)
    trainer = Trainer(settings, ModelFolder.read(Path(settings.model)), mesh, {})
    given: list[tuple[bool, torch.Tensor]] = []
    trainer.stage.register_forward_hook(
        lambda module, inputs, out: given.append((torch.is_grad_enabled(), out.detach().clone()))
    )
    pairs = read_pairs(settings.pairs)
    trainer.gradients(0, [pairs])
    # A pipeline runs its stage once more before each, to see the shapes.
    count = -(-3 * PAIRS // settings.dp // settings.chunk_rows)
    without, graph = ([out for g, out in given if g is wanted][-count:] for wanted in (False, True))
    assert len(without) == len(graph) == count
    for first, second in zip(without, graph, strict=True):
        assert torch.equal(first, second)
    given.clear()
    trainer.gradients(1, [pairs])  # other dice: the first did drop something
    other = [out for g, out in given if g][-count:]
    assert not any(torch.equal(a, b) for a, b in zip(graph, other, strict=True))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [{}, {"dp": 2, "shard": "fsdp"}, {"tp": 2}, {"pp": 2}, {"pp": 2, "schedule": "gpipe"}],
    ids=["one", "fsdp", "tp", "1f1b", "gpipe"],
)
def test_the_second_pass_drops_what_the_first_one_dropped(world, tmp_path, layout):
    model, file = world
    settings = TrainSettings(
        str(model), file, tmp_path, batch_pairs=PAIRS, chunk_rows=10, dropout=0.3, **layout
    )
    assert run_ranks(settings.processes, replayed, settings) == [0] * settings.processes
