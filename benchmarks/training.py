"""Fine-tuning: every mode learns the same task, a real model gets better, and a crash changes nothing.

Modes: a random BERT of 4 layers, 64 wide, learns to find the text that has the three words of a query
in it; two processes (the parameter server: two workers and the server), 3 seeds, the same number of
pairs each. Local SGD and the parameter server know their own negatives only, so their losses are lower
and not to be compared with the others'; all curves, a colour for each mode, are in training.png.

WordNet: `shoal encoder train --gate` on all-MiniLM-L6-v2 with words and definitions of WordNet
(examples/wordnet_pairs.py), one process in bfloat16, 3 seeds, each with a split of its own; curves of
the first are in training-wordnet.png. Means with 95 % bootstrap intervals over the held-out queries.

Crashes: the same in float32 over two data-parallel processes (DDP), four times with the same settings:
undisturbed; one process killed by SIGKILL under --max-restarts 1; all processes and their launcher
killed by SIGKILL and the same command given again; the same, but gone on with as --tp 2. Compared are
the losses of all steps and the bytes of the model. --modes leaves the real model out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

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
WORDNET = "--batch-pairs 64 --lr 5e-5 --held-out 500 --documents 2500"
QUICK = "--batch-pairs 16 --lr 5e-5 --held-out 40 --documents 80"
STEP_S_MAX = 120.0  # without a new line in the history: then it hangs


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
            last = [x["loss"] for x in read_history(out / "history.jsonl") if x["kind"] == "train"]
            found = _row(report, name, seed, out, f"last losses {sum(last[-10:]) / 10:.3f}")
            after_all.setdefault(name, []).append(found["after"]["ndcg@10"]["mean"])
            histories.setdefault(name, []).append(out / "history.jsonl")
    report.raw["modes"] = after_all
    for name, values in after_all.items():
        ratio = min(values) / max(1e-9, sum(after_all["synchronous"]) / len(SEEDS))
        report.claim(f"{name}: worst seed's nDCG@10 against synchronous", ratio, ">=", 0.9, "x")
    draw_curves(histories, _results(report) / "training.png")


# -- the real model -------------------------------------------------------------------------------


class Training:
    """`shoal encoder train` as a process of its own; what is left of it is killed at the end."""

    def __init__(self, pairs: Path, out: Path, flags: str) -> None:
        self.out = out
        command = [sys.executable, "-m", "shoal", "encoder", "train", "--pairs", str(pairs)]
        self._log = out.with_suffix(".log").open("ab")
        self.process = subprocess.Popen(
            [*command, "--out", str(out), *flags.split()],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=self._log,
            stdout=self._log,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill_all()
        self._log.close()

    def workers(self) -> list[int]:
        """Processes that the launcher has started, by pid."""
        try:
            text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        except FileNotFoundError:
            return []
        return [int(pid) for pid in text.split()]

    def kill_all(self) -> None:
        """SIGKILL to the launcher and its processes, whatever is left."""
        workers = self.workers()
        self.process.kill()
        self.process.wait()
        for pid in workers:
            _kill(pid)

    def until_step(self, step: int) -> None:
        while self.step() < step:
            before, began = self.step(), time.monotonic()
            while self.step() == before:
                if self.process.poll() is not None or time.monotonic() > began + STEP_S_MAX:
                    raise BenchmarkFailed(f"it did not come to step {step}:\n{self.log()}")
                time.sleep(0.1)

    def step(self) -> int:
        return max(_losses(self.out), default=0)

    def ended_well(self) -> None:
        while self.process.poll() is None:
            before, began = self.step(), time.monotonic()
            while self.process.poll() is None and self.step() == before:
                if time.monotonic() > began + 2 * STEP_S_MAX:
                    raise BenchmarkFailed(f"it does not end:\n{self.log()}")
                time.sleep(0.1)
        if self.process.returncode not in (0, 1):  # 1: the gate has refused
            raise BenchmarkFailed(f"status {self.process.returncode}:\n{self.log()}")

    def log(self) -> str:
        return self.out.with_suffix(".log").read_text(errors="replace")[-3_000:]


def wordnet(report: Report, folder: Path, pairs: Path, *, steps: int) -> None:
    for seed in SEEDS:
        out = folder / f"wordnet-{seed}"
        flags = f"{_common(report)} --precision bfloat16 --seed {seed} --steps {steps} --gate"
        flags += f" --warmup-steps {steps // 10} --eval-every {max(1, steps // 6)}"
        cpu_s = -_children_cpu_s()
        with Training(pairs, out, flags) as training:
            training.ended_well()
        cpu_s += _children_cpu_s()
        found = _row(report, f"WordNet, {steps} steps", seed, out, f"{cpu_s:.0f} s of CPU")
        gain = found["verdict"]["gain"]
        report.claim(f"WordNet, seed {seed}: low end of nDCG@10's gain", gain["low"], ">=", 0, "")
    shutil.copy(
        folder / f"wordnet-{SEEDS[0]}/curves.png", _results(report) / "training-wordnet.png"
    )


def crashes(report: Report, folder: Path, pairs: Path, *, steps: int) -> None:
    flags = f"{_common(report)} --steps {steps} --warmup-steps {steps // 10} --eval-every 0"
    flags += f" --checkpoint-every {steps // 4}"
    struck = steps // 2 + steps // 8  # between two checkpoints
    outs = {name: folder / f"crash-{name}" for name in ("undisturbed", "rank", "all", "layout")}
    with Training(pairs, outs["undisturbed"], flags + " --dp 2") as training:
        training.ended_well()
    with Training(pairs, outs["rank"], flags + " --dp 2 --max-restarts 1") as training:
        training.until_step(struck)
        _kill(training.workers()[-1])
        training.ended_well()
    for name, second in (("all", " --dp 2"), ("layout", " --tp 2")):
        with Training(pairs, outs[name], flags + " --dp 2") as training:
            training.until_step(struck)
            training.kill_all()
        report.raw[f"{name}: goes on from"] = json.loads(
            (outs[name] / "checkpoints/latest.json").read_text()
        )
        with Training(pairs, outs[name], flags + second) as training:
            training.ended_well()
    told = {
        "undisturbed": "two processes, float32",
        "rank": f"one killed at step {struck}",
        "all": f"all killed at step {struck}, again",
        "layout": f"all killed at step {struck}, again as --tp 2",
    }
    whole = _losses(outs["undisturbed"])
    for name, out in outs.items():
        losses = _losses(out)
        if list(losses) != list(whole):
            raise BenchmarkFailed(f"{name}: steps {list(losses)}")
        apart = max(abs(losses[step] - whole[step]) for step in whole)
        same = _digest(out) == _digest(outs["undisturbed"])
        found = "the same bytes" if same else "other bytes"
        remark = "" if name == "undisturbed" else f"losses differ by {apart:.1e} at most; {found}"
        _row(report, f"{told[name]}, {steps} steps", 1, out, remark)
        report.raw[f"losses, {name}"] = losses
        if name != "undisturbed":
            goal = 1e-3 if name == "layout" else 0
            report.claim(f"{told[name]}: losses differ from undisturbed by", apart, "<=", goal, "")
        if name in ("rank", "all"):
            report.claim(f"{told[name]}: models with other bytes", float(not same), "<=", 0, "")


def _row(report: Report, name: str, seed: int, out: Path, remark: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "result.json").read_text())
    shown = [
        _shown(found[when][metric])
        for metric in ("recall@10", "ndcg@10")
        for when in ("before", "after")
    ]
    report.rows.append([name, str(seed), *shown, _shown(found["verdict"]["gain"]), remark])
    report.raw[f"{name}, seed {seed}"] = found
    return found


def _shown(interval: dict[str, float]) -> str:
    return f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _losses(out: Path) -> dict[int, float]:
    from encoder.train.report import read_history

    lines = read_history(out / "history.jsonl")
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def _digest(out: Path) -> str:
    (file,) = out.glob("*/model.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _common(report: Report) -> str:
    return QUICK if report.quick else WORDNET


def _results(report: Report) -> Path:
    return RESULTS / "quick" if report.quick else RESULTS


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--modes", action="store_true", help="the tiny model only")
        parser.add_argument("--steps", type=int, default=80, help="of the tiny model")
        parser.add_argument("--keep", type=Path, help="folder for all that the runs leave")

    given = options(__doc__, more)
    report = Report("training", "Fine-tuning", method(__doc__), quick=given.quick)
    report.columns = [
        *("run", "seed", "recall@10 before", "after", "nDCG@10 before", "after"),
        *("gain in nDCG@10", ""),
    ]
    (RESULTS / "quick").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        modes(report, folder, steps=10 if given.quick else given.steps)
        if not given.modes:
            pairs = folder / "wordnet.jsonl"
            example = [sys.executable, str(ROOT / "examples/wordnet_pairs.py"), str(pairs)]
            subprocess.run(example, check=True)
            wordnet(report, folder, pairs, steps=2 if given.quick else 120)
            crashes(report, folder, pairs, steps=8 if given.quick else 40)
    report.write()


if __name__ == "__main__":
    main()
