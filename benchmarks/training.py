"""Fine-tuning: every mode learns the same task, and a real model gets better.

Modes: a random BERT of 4 layers, 64 wide, learns to find the text that has the three words of a query
in it; two processes (the parameter server: two workers and the server), 3 seeds, the same number of
pairs each. Local SGD and the parameter server know their own negatives only, so their losses are lower
and not to be compared with the others'. Held-out nDCG@10 before and after; all curves, a colour for
each mode, are in training.png. Real: all-MiniLM-L6-v2 on words and definitions of WordNet
(examples/wordnet_pairs.py), 3 seeds, each with a split of its own; means with 95 % bootstrap intervals
over the held-out queries. --modes leaves the real one out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, ROOT, BenchmarkFailed, Report, method, options
from tests.encoder.training_ranks import run_ranks, tiny_model, tiny_pairs

SEEDS = (1, 2, 3)
MODES: dict[str, dict[str, Any]] = {
    "synchronous": {"dp": 2},
    "fp16": {"dp": 2, "compress": "fp16"},
    "PowerSGD, rank 8": {"dp": 2, "compress": "powersgd"},
    "local SGD, 4 steps": {"dp": 2, "mode": "local-sgd", "local_period": 4},
    "parameter server, staleness 4": {"dp": 3, "mode": "parameter-server"},
}
TINY = {
    "batch_pairs": 32,
    "warmup_steps": 10,
    "lr": 1e-3,
    "held_out": 200,
    "documents": 400,
    "eval_every": 20,
    "checkpoint_every": 0,
    "timeout_s": 120.0,
}


def one_rank(settings: Any) -> None:
    from encoder.train.loop import train

    train(settings)


def modes(report: Report, folder: Path, *, steps: int) -> None:
    from encoder.train.report import draw_curves, read_history
    from encoder.train.settings import TrainSettings

    tiny_pairs(folder / "pairs.jsonl", 4_000)
    model = str(tiny_model(folder / "tiny"))
    histories: dict[str, list[Path]] = {}
    after_all: dict[str, list[float]] = {}
    for name, chosen in MODES.items():
        for seed in SEEDS:
            out = folder / f"{name}-{seed}"
            settings = TrainSettings(
                model, folder / "pairs.jsonl", out, steps=steps, seed=seed, **(TINY | chosen)
            )
            if any(run_ranks(settings.processes, one_rank, settings)):
                raise BenchmarkFailed(f"{name}, seed {seed} did not end well")
            lines = read_history(out / "history.jsonl")
            judged = [x["ndcg@10"] for x in lines if x["kind"] == "held-out"]
            last = [x["loss"] for x in lines if x["kind"] == "train"][-10:]
            after_all.setdefault(name, []).append(judged[-1])
            histories.setdefault(name, []).append(out / "history.jsonl")
            loss = sum(last) / len(last)
            report.rows.append(
                [name, str(seed), f"{judged[0]:.3f}", f"{judged[-1]:.3f}", f"{loss:.3f}"]
            )
    report.raw["modes"] = after_all
    for name, values in after_all.items():
        ratio = min(values) / max(1e-9, sum(after_all["synchronous"]) / len(SEEDS))
        report.claim(f"{name}: worst seed's nDCG@10 against synchronous", ratio, ">=", 0.7, "x")
    draw_curves(histories, (RESULTS / "quick" if report.quick else RESULTS) / "training.png")


def real(report: Report, folder: Path, *, steps: int) -> None:
    pairs = folder / "wordnet.jsonl"
    example = [sys.executable, str(ROOT / "examples/wordnet_pairs.py"), str(pairs)]
    subprocess.run(example, check=True)
    for seed in SEEDS:
        out = folder / f"wordnet-{seed}"
        flags = f"--steps {steps} --warmup-steps 12 --lr 5e-5 --batch-pairs 64 --held-out 500"
        flags += f" --documents 2500 --eval-every 40 --precision bfloat16 --seed {seed}"
        command = [sys.executable, "-m", "encoder.train", "--pairs", str(pairs), "--out", str(out)]
        subprocess.run([*command, *flags.split()], check=True, cwd=ROOT)
        found = json.loads((out / "result.json").read_text())
        report.raw[f"wordnet-{seed}"] = found
        for metric in ("recall@10", "ndcg@10"):
            before, after = found["before"][metric], found["after"][metric]
            report.notes.append(
                f"WordNet, seed {seed}, {metric}: {_shown(before)} before, {_shown(after)} after"
            )
        gain = found["verdict"]["gain"]
        report.claim(f"WordNet, seed {seed}: low end of nDCG@10's gain", gain["low"], ">=", 0, "")


def _shown(interval: dict[str, float]) -> str:
    return f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--modes", action="store_true", help="the tiny model only")
        parser.add_argument("--steps", type=int, default=80, help="of the tiny model")

    given = options(__doc__, more)
    report = Report("training", "Fine-tuning", method(__doc__), quick=given.quick)
    report.columns = ["mode", "seed", "nDCG@10 before", "after", "loss of the last 10 steps"]
    (RESULTS / "quick").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        modes(report, Path(scratch), steps=10 if given.quick else given.steps)
        if not given.modes:
            real(report, Path(scratch), steps=2 if given.quick else 120)
    report.write()


if __name__ == "__main__":
    main()
