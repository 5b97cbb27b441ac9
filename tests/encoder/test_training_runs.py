"""Whole runs on a tiny model: one that is cut off and goes on, on its own layout and on another; all
modes learn the same task; what comes out is what is served."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_ranks import run_ranks, tiny_model, tiny_pairs

from encoder.model import ModelFolder, TextModel
from encoder.train import command
from encoder.train.data import read_pairs
from encoder.train.report import read_history
from encoder.train.settings import TrainSettings

STEPS = 12
CRASH_AT = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("training")
    tiny_pairs(folder / "pairs.jsonl", 400)
    return tiny_model(folder / "tiny"), folder / "pairs.jsonl"


def settings_for(world: tuple[Path, Path], out: Path, **given: Any) -> TrainSettings:
    chosen = {
        "batch_pairs": 16,
        "steps": STEPS,
        "warmup_steps": 3,
        "lr": 1e-3,
        "held_out": 40,
        "documents": 100,
        "eval_every": 0,
        "checkpoint_every": 4,
        "timeout_s": 60.0,
    }
    return TrainSettings(model=str(world[0]), pairs=world[1], out=out, **(chosen | given))


def whole_run(settings: TrainSettings, crash_at: int | None = None) -> None:
    """One process of a run; rank 1 dies after step `crash_at`."""
    from encoder.train.loop import train

    def on_step(done: int) -> None:
        if done == crash_at and os.environ.get("RANK", "0") == str(min(1, settings.processes - 1)):
            os._exit(17)

    train(settings, on_step)


def losses(out: Path) -> dict[int, float]:
    lines = [line for line in read_history(out / "history.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    return {line["step"]: line["loss"] for line in lines}


def weights(out: Path, name: str = "model") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(out / name / "model.safetensors")


def same_weights(one: Path, other: Path) -> float:
    ours, theirs = weights(one), weights(other)
    assert set(ours) == set(theirs)
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory) -> Path:
    """A run of one process that nothing happened to."""
    out = tmp_path_factory.mktemp("straight")
    assert run_ranks(1, whole_run, settings_for(world, out)) == [0]
    return out


def test_a_run_leaves_a_model_its_card_and_its_curves(world, straight):
    found = losses(straight)
    assert list(found) == list(range(1, STEPS + 1))
    assert np.mean([found[s] for s in range(STEPS - 2, STEPS + 1)]) < found[1]
    for name in ("history.jsonl", "curves.png", "model/README.md", "checkpoints/latest.json"):
        assert (straight / name).is_file(), name
    assert any((straight / "tensorboard").iterdir())
    card = (straight / "model/README.md").read_text()
    assert "| ndcg@10 |" in card
    assert "seed 1" in card


def test_the_model_is_served_as_it_was_trained(world, straight):
    from encoder.service import LocalEncoder
    from shoal.settings import EncoderSettings

    texts = [pair.query for pair in read_pairs(world[1])[:5]]
    given = EncoderSettings(encoder_model=str(straight / "model"), encoder_precision="float32")

    async def served() -> np.ndarray:
        encoder = LocalEncoder(given)
        try:
            return await encoder.embed(texts, "model")
        finally:
            await encoder.close()

    vectors = asyncio.run(served())
    before = TextModel.load(ModelFolder.read(world[0]), precision="float32")
    old = before.forward([t.token_ids for t in before.tokenize(texts)])
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5
    assert np.abs(vectors - old).max() > 1e-3  # it learned something


@pytest.mark.slow
def test_a_run_that_is_cut_off_goes_on_as_if_nothing_had_been(world, straight, tmp_path):
    settings = settings_for(world, tmp_path, dropout=0.0)
    assert run_ranks(1, whole_run, settings, CRASH_AT + 1) == [17]
    assert json.loads((tmp_path / "checkpoints/latest.json").read_text())["step"] == CRASH_AT
    assert run_ranks(1, whole_run, settings) == [0]
    assert losses(tmp_path) == losses(straight)
    assert same_weights(tmp_path, straight) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"dp": 2, "shard": "fsdp"}, {"tp": 2}),
        ({"dp": 2}, {"pp": 2}),
        ({"pp": 2, "tp": 2}, {"dp": 2, "pp": 2}),
    ],
    ids=["dp2-tp2", "ddp2-pp2", "pp2tp2-dp2pp2"],
)
def test_a_checkpoint_of_one_layout_goes_on_on_another(world, straight, tmp_path, first, second):
    before, after = (settings_for(world, tmp_path, **layout) for layout in (first, second))
    codes = run_ranks(before.processes, whole_run, before, CRASH_AT + 1)
    assert codes != [0] * before.processes
    assert run_ranks(after.processes, whole_run, after) == [0] * after.processes
    # Not bit by bit: sums are taken in another order, and AdamW makes the most of small gradients.
    ours, theirs = losses(tmp_path), losses(straight)
    assert list(ours) == list(theirs)
    difference = max(abs(ours[step] - theirs[step]) for step in ours)
    print(f"{first} -> {second}: losses differ by {difference:.1e} at most")
    assert difference < 2e-3


@pytest.mark.slow
def test_dropout_is_the_same_after_a_restart_and_in_both_passes(world, tmp_path):
    outs = [tmp_path / name for name in ("whole", "cut", "parts")]
    runs = [settings_for(world, out, dropout=0.2, steps=6) for out in outs[:2]]
    assert run_ranks(1, whole_run, runs[0]) == [0]
    assert run_ranks(1, whole_run, runs[1], 5) == [17]
    assert run_ranks(1, whole_run, runs[1]) == [0]
    assert losses(outs[0]) == losses(outs[1])
    assert same_weights(outs[0], outs[1]) == 0


@pytest.mark.slow
def test_torchrun_starts_a_dead_process_again(world, straight, tmp_path):
    """The command itself, two processes; one of them kills itself on the first attempt."""
    settings = settings_for(world, tmp_path, dp=2, max_restarts=1)
    flags = []
    for name, value in settings.shown().items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flag, value = (flag if value else flag.replace("--", "--no-", 1)), None
        flags += [flag] if value is None else [flag, str(value)]
    launch = command._torchrun(settings, flags)
    at = launch.index("encoder.train") - 1
    launch[at : at + 2] = [str(Path(__file__).with_name("training_that_crashes.py"))]
    import subprocess

    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        launch,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=400)
    finally:
        import contextlib
        import signal

        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    print(output[-3000:], file=sys.stderr)
    assert process.returncode == 0
    assert "attempt 1 goes on" in output
    ours, theirs = losses(tmp_path), losses(straight)
    assert max(abs(ours[step] - theirs[step]) for step in theirs) < 2e-3


MODES = {
    "sync": {"dp": 2},
    "fp16": {"dp": 2, "compress": "fp16"},
    "powersgd": {"dp": 2, "compress": "powersgd"},
    "local-sgd": {"dp": 2, "mode": "local-sgd", "local_period": 4},
    "parameter-server": {"dp": 3, "mode": "parameter-server", "staleness": 2},
    "accumulate": {"accumulate": 2},
    "bfloat16": {"precision": "bfloat16"},
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_learns(world, tmp_path, mode):
    settings = settings_for(world, tmp_path, steps=40, checkpoint_every=0, **MODES[mode])
    assert run_ranks(settings.processes, whole_run, settings) == [0] * settings.processes
    judged = [x for x in read_history(tmp_path / "history.jsonl") if x["kind"] == "held-out"]
    print(f"{mode}: nDCG@10 {judged[0]['ndcg@10']:.3f} -> {judged[-1]['ndcg@10']:.3f}")
    assert judged[-1]["ndcg@10"] > judged[0]["ndcg@10"] + 0.05


@pytest.mark.slow
def test_another_runs_checkpoint_is_not_taken(world, straight, tmp_path):
    assert run_ranks(1, refused_run, settings_for(world, straight, seed=2), "another seed") == [0]


def refused_run(settings: TrainSettings, told: str) -> None:
    from encoder.train.loop import train
    from shoal.errors import SettingsError

    with pytest.raises(SettingsError, match=told):
        train(settings)


@pytest.mark.slow
def test_gate_refuses_what_learned_nothing(world, tmp_path, monkeypatch):
    settings = settings_for(world, tmp_path, lr=1e-9, steps=1, gate=True)
    assert run_ranks(1, whole_run, settings) == [0]
    assert (tmp_path / "rejected/model.safetensors").is_file()
    assert not (tmp_path / "model").exists()
