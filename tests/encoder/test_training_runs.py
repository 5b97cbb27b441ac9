"""Whole runs on a tiny model: one that is cut off and goes on, on its own layout and on another; all
modes learn the same task; what comes out is what is served."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from etcd_server import free_ports
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from training_ranks import run_ranks, tiny_model, tiny_pairs

from encoder.model import ModelFolder, TextModel
from encoder.train.data import read_pairs
from encoder.train.report import read_history
from encoder.train.settings import TrainSettings

STEPS = 12
CRASH_AT = 8
ROOT = Path(__file__).resolve().parents[2]


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
    assert "| nDCG@10 |" in card
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


# Local SGD and PowerSGD have something that is in no parameter; sums over three depend on their order.
CUT_OFF = {
    "one": {"dropout": 0.1},
    "dp3": {"dp": 3, "batch_pairs": 24, "dropout": 0.1},
    "powersgd": {"dp": 2, "compress": "powersgd"},
    "local-sgd": {"dp": 2, "mode": "local-sgd", "local_period": 3},
    "fsdp-tp": {"dp": 2, "tp": 2, "dropout": 0.1},
    "dp-pp": {"dp": 2, "pp": 2, "dropout": 0.1, "accumulate": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", CUT_OFF)
def test_a_run_that_is_cut_off_goes_on_as_if_nothing_had_been(world, tmp_path, layout):
    whole, cut = (
        settings_for(world, tmp_path / name, steps=16, **CUT_OFF[layout]) for name in "ab"
    )
    count = whole.processes
    assert run_ranks(count, whole_run, whole) == [0] * count
    assert 17 in run_ranks(count, whole_run, cut, 14)
    assert json.loads((cut.out / "checkpoints/latest.json").read_text())["step"] == 12
    assert run_ranks(count, whole_run, cut) == [0] * count
    assert losses(cut.out) == losses(whole.out)
    assert same_weights(cut.out, whole.out) == 0


@pytest.mark.slow
@pytest.mark.parametrize("second", [{"dp": 4}, {"dp": 2, "powersgd_rank": 4}], ids=["dp4", "rank4"])
def test_what_powersgd_kept_is_of_no_use_to_another_layout(world, tmp_path, second):
    settings = settings_for(world, tmp_path, steps=16, dp=2, compress="powersgd")
    assert 17 in run_ranks(2, whole_run, settings, 14)
    other = settings_for(world, tmp_path, steps=16, compress="powersgd", **second)
    assert run_ranks(other.processes, whole_run, other) == [0] * other.processes


def stopped_run(settings: TrainSettings, number: int) -> None:
    """Somebody sends a signal to the last process, after step 5."""
    from encoder.train.errors import Stopped
    from encoder.train.loop import train

    def on_step(done: int) -> None:
        if done == 5 and os.environ["RANK"] == str(settings.processes - 1):
            os.kill(os.getpid(), number)

    with pytest.raises(Stopped, match="step 6 of 12"):
        train(settings, on_step)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_answered_with_a_checkpoint(world, tmp_path, number):
    whole, stopped = (settings_for(world, tmp_path / name, dp=2) for name in "ab")
    assert run_ranks(2, whole_run, whole) == [0, 0]
    assert run_ranks(2, stopped_run, stopped, number) == [0, 0]
    assert json.loads((stopped.out / "checkpoints/latest.json").read_text())["step"] == 6
    assert run_ranks(2, whole_run, stopped) == [0, 0]
    assert losses(stopped.out) == losses(whole.out)
    assert same_weights(stopped.out, whole.out) == 0


PARAMETER_SERVER = {"dp": 3, "mode": "parameter-server", "staleness": 2}


@pytest.mark.slow
def test_a_parameter_server_goes_on_from_its_checkpoint(world, tmp_path):
    settings = settings_for(world, tmp_path, eval_every=3, timeout_s=10.0, **PARAMETER_SERVER)
    assert 17 in run_ranks(3, whole_run, settings, CRASH_AT)
    checkpoint = tmp_path / f"checkpoints/step-{CRASH_AT:06d}"
    dcp_to_torch_save(checkpoint, tmp_path / "whole.pt")
    moments = torch.load(tmp_path / "whole.pt", weights_only=True)["optimizer"]
    updates = {float(value) for name, value in moments.items() if name.endswith(".step")}
    assert updates == {2.0 * CRASH_AT}  # the server's: two workers
    assert run_ranks(3, whole_run, settings) == [0, 0, 0]
    assert list(losses(tmp_path)) == list(range(1, STEPS + 1))
    history = read_history(tmp_path / "history.jsonl")
    assert [x["step"] for x in history if x["kind"] == "held-out"] == [0, 3, 6, 9, 12]


def stopped_server(settings: TrainSettings, rank: int) -> None:
    """A process of a parameter server gets a signal after step 4."""
    from encoder.train.errors import Stopped
    from encoder.train.loop import train

    def on_step(done: int) -> None:
        if done == 4 and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), signal.SIGTERM)

    # A worker's signal is heard where all meet; the server calls all together.
    with pytest.raises(Stopped, match=r"step 8 of 12" if rank else r"step [567] of 12"):
        train(settings, on_step)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_a_parameter_server_answers_a_signal_with_a_checkpoint(world, tmp_path, rank):
    settings = settings_for(world, tmp_path, **PARAMETER_SERVER)
    assert run_ranks(3, stopped_server, settings, rank) == [0, 0, 0]
    done = json.loads((tmp_path / "checkpoints/latest.json").read_text())["step"]
    assert list(losses(tmp_path)) == list(range(1, done + 1))
    assert run_ranks(3, whole_run, settings) == [0, 0, 0]
    assert list(losses(tmp_path)) == list(range(1, STEPS + 1))


def failing_run(settings: TrainSettings, told: str, file_bytes_max: int | None = None) -> None:
    """file_bytes_max: of what is written from step 5 on, as on a disk that is full."""
    import resource

    from encoder.train.errors import TrainingFailed
    from encoder.train.loop import train

    def on_step(done: int) -> None:
        if done == 5 and file_bytes_max is not None:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes_max, hard))

    with pytest.raises(TrainingFailed, match=told):
        train(settings, on_step)


@pytest.mark.slow
@pytest.mark.parametrize("compress", ["none", "powersgd"])
def test_a_full_disk_costs_no_more_than_the_steps_since_the_checkpoint(world, tmp_path, compress):
    whole, full = (settings_for(world, tmp_path / n, dp=2, compress=compress) for n in "ab")
    assert run_ranks(2, whole_run, whole) == [0, 0]
    assert run_ranks(2, failing_run, full, "step 8 could not be written", 100_000) == [0, 0]
    assert sorted(p.name for p in (full.out / "checkpoints").iterdir()) == [
        "latest.json",
        "step-000004",
    ]
    assert run_ranks(2, whole_run, full) == [0, 0]
    assert same_weights(full.out, whole.out) == 0


@pytest.mark.slow
def test_a_model_that_cannot_be_written_leaves_the_one_before(world, tmp_path):
    settings = settings_for(world, tmp_path, checkpoint_every=4, steps=6)
    assert run_ranks(1, whole_run, settings) == [0]
    before = (tmp_path / "model/model.safetensors").read_bytes()
    assert run_ranks(1, failing_run, settings, "could not be written to", 100_000) == [0]
    assert (tmp_path / "model/model.safetensors").read_bytes() == before
    assert not (tmp_path / "model.tmp").exists()


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_the_run(world, tmp_path):
    settings = settings_for(world, tmp_path, dp=2, lr=1e30, warmup_steps=0)
    assert run_ranks(2, failing_run, settings, "no number") == [0, 0]
    server = settings_for(world, tmp_path / "s", lr=1e30, warmup_steps=0, **PARAMETER_SERVER)
    assert run_ranks(3, failing_run, server, "no number") == [0, 0, 0]
    one = settings_for(world, tmp_path / "one", lr=1e30, warmup_steps=0, steps=1)
    assert run_ranks(1, failing_run, one, "vectors are no numbers") == [0]


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


def flags_of(settings: TrainSettings) -> list[str]:
    given = settings.flags(without=["model", "pairs"])
    return [*given, "--model", str(settings.model), "--pairs", str(settings.pairs)]


@contextlib.contextmanager
def started(*arguments: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """`python ARGUMENTS` in a process group of its own, which is gone afterwards."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables,
        stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def launched(world: tuple[Path, Path], out: Path, fault: str) -> tuple[int, str]:
    """The command over two processes, with a fault of tests/encoder/training_that_crashes.py: exit
    status and all that it said."""
    flags = flags_of(settings_for(world, out, dp=2, max_restarts=1))
    program = str(Path(__file__).with_name("training_that_crashes.py"))
    with started(program, *flags, TRAINING_FAULT=fault) as process:
        output, _ = process.communicate(timeout=400)
    print(output[-3000:], file=sys.stderr)
    return process.returncode, output


@pytest.mark.slow
def test_a_dead_process_is_started_again(world, straight, tmp_path):
    status, output = launched(world, tmp_path, "exit")
    assert status == 0
    assert "attempt 1 begins" in output
    ours, theirs = losses(tmp_path), losses(straight)
    assert max(abs(ours[step] - theirs[step]) for step in theirs) < 2e-3


@pytest.mark.slow
def test_the_command_passes_a_signal_on_and_its_processes_stop_in_order(world, tmp_path):
    status, output = launched(world, tmp_path, "stop")
    assert status == 130
    assert "attempt 1 begins" not in output
    assert "Traceback" not in output
    assert re.search(r"Stopped after step \d+ of 12", output)
    done = json.loads((tmp_path / "checkpoints/latest.json").read_text())["step"]
    assert list(losses(tmp_path)) == list(range(1, done + 1))


@pytest.mark.slow
def test_processes_whose_launcher_was_killed_stop_by_themselves(world, tmp_path):
    status, output = launched(world, tmp_path, "kill launcher")
    assert status == -signal.SIGKILL
    assert re.search(r"Stopped after step \d+ of 12", output)


@pytest.mark.slow
def test_what_cannot_help_is_not_tried_again(world, straight, tmp_path):
    status, output = launched((world[0], tmp_path / "none.jsonl"), tmp_path / "out", "exit")
    assert status == 2
    assert output.count("There is no file") == 1
    assert "attempt 1 begins" not in output


@pytest.mark.slow
def test_two_agents_as_on_two_machines(world, straight, tmp_path):
    """Each starts one of the two processes, and reads its part of the disk that they share."""
    meet = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "run", "--rdzv-backend", "c10d"]
    meet += ["--rdzv-endpoint", f"127.0.0.1:{free_ports(1)[0]}"]
    flags = flags_of(settings_for(world, tmp_path, dp=2))
    agent = ["-m", "torch.distributed.run", *meet, "-m", "encoder.train", *flags]
    with started(*agent) as one, started(*agent) as other:
        agents = (one, other)
        said = [each.communicate(timeout=300)[0] for each in agents]
    print(*said, sep="\n", file=sys.stderr)
    assert [agent.returncode for agent in agents] == [0, 0]
    ours, theirs = losses(tmp_path), losses(straight)
    assert list(ours) == list(theirs)
    assert max(abs(ours[step] - theirs[step]) for step in theirs) < 2e-3


MODES = {
    "sync": {"dp": 2},
    "fp16": {"dp": 2, "compress": "fp16"},
    "powersgd": {"dp": 2, "compress": "powersgd"},
    "local-sgd": {"dp": 2, "mode": "local-sgd", "local_period": 4},
    "parameter-server": PARAMETER_SERVER,
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
def test_a_folder_of_another_run_is_not_taken(world, straight):
    for other in ({"seed": 2}, {"documents": 90}):
        told = f"another {next(iter(other))}"
        assert run_ranks(1, refused_run, settings_for(world, straight, **other), told) == [0]


@pytest.mark.slow
def test_what_stands_where_the_model_shall_stand_is_left_alone(world, straight, tmp_path):
    for out in (tmp_path, straight):
        (out / "photos").mkdir()
        (out / "photos/one.jpg").write_text("a photo")
        settings = settings_for(world, out, name="photos")
        assert run_ranks(1, refused_run, settings, "left alone") == [0]
        assert (out / "photos/one.jpg").is_file()


def another_machine(settings: TrainSettings, other: dict[str, Any], told: str) -> None:
    """Process 1 was started otherwise than process 0."""
    refused_run(replace(settings, **other) if os.environ["RANK"] == "1" else settings, told)


@pytest.mark.slow
def test_processes_that_were_told_different_things_do_not_train(world, tmp_path):
    tiny_pairs(tmp_path / "pairs.jsonl", 300)
    for other, told in (
        ({"lr": 2e-3}, r"lr 0.001, process 1 with 0.002"),
        ({"pairs": tmp_path / "pairs.jsonl"}, "the same files"),
        ({"out": tmp_path / "of another machine"}, "all machines share"),
    ):
        settings = settings_for(world, tmp_path / "out", dp=2)
        assert run_ranks(2, another_machine, settings, other, told) == [0, 0]
        assert not list((tmp_path / "out").glob("seen-*"))


@pytest.mark.slow
def test_two_runs_do_not_share_a_folder(world, tmp_path):
    with (tmp_path / "lock").open("w") as lock:
        lock.write("4711\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        settings = settings_for(world, tmp_path, dp=2)
        assert run_ranks(2, refused_run, settings, "Process 4711 is training") == [0, 0]


@pytest.mark.slow
def test_a_checkpoint_of_an_unknown_run_is_not_taken(world, tmp_path):
    settings = settings_for(world, tmp_path)
    assert run_ranks(1, whole_run, settings, 9) == [17]
    (tmp_path / "run.json").unlink()
    assert run_ranks(1, refused_run, settings, "no run.json") == [0]


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_read_is_named(world, tmp_path):
    settings = settings_for(world, tmp_path)
    assert run_ranks(1, whole_run, settings, 9) == [17]
    for part in (tmp_path / "checkpoints/step-000008").glob("*.distcp"):
        part.write_bytes(b"")
    assert run_ranks(1, refused_run, settings, "cannot be read") == [0]


@pytest.mark.slow
def test_a_part_of_a_checkpoint_that_one_process_cannot_read_ends_all(world, tmp_path):
    settings = settings_for(world, tmp_path, dp=2, compress="powersgd")
    assert 17 in run_ranks(2, whole_run, settings, 9)
    part = tmp_path / "checkpoints/step-000008/own-1-of-2.pt"
    part.write_bytes(part.read_bytes()[:100])
    assert run_ranks(2, refused_run, settings, "cannot be read") == [0, 0]
    part.unlink()  # then both start anew
    assert run_ranks(2, whole_run, settings) == [0, 0]


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
