"""`shoal encoder train`: starts the processes of a run, and tells how it ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence

from rich.console import Console

from encoder.train.settings import TrainSettings, parse
from shoal.errors import ShoalError

__all__ = ["GateRefused", "TrainingFailed", "run", "run_here"]


class TrainingFailed(ShoalError):
    """A process of the run ended with an error, which it has told on standard error."""


class GateRefused(ShoalError):
    """--gate was given, and the model did not surely improve."""


def run(arguments: Sequence[str]) -> int:
    """The command line: in this process if one is enough, else under torchrun."""
    settings = parse(arguments)
    if settings.processes == 1 and not settings.max_restarts:
        return run_here(settings)
    status = subprocess.call(_torchrun(settings, arguments), env=_environment())
    if status:
        raise TrainingFailed(
            "The run ended before its model was saved; what went wrong stands above. The same command "
            "goes on from the last checkpoint."
        )
    result = json.loads((settings.out / "result.json").read_text(encoding="utf-8"))
    return 1 if settings.gate and not result["verdict"]["accepted"] else 0  # rank 0 has told why


def run_here(settings: TrainSettings) -> int:
    """This process's part; under torchrun one of several. Rank 0 tells the result."""
    from encoder.train.loop import train

    outcome = train(settings)
    if int(os.environ.get("RANK", "0")) == 0:
        console = Console(stderr=True, soft_wrap=True)
        lines = [f"{k:>9}  {v}  ->  {outcome.after[k]}" for k, v in outcome.before.items()]
        lines += [outcome.verdict.sentence(), f"The model is in {outcome.model}"]
        console.print("\n".join(lines), highlight=False, markup=False)
    if settings.gate and not outcome.verdict.accepted:
        raise GateRefused(outcome.verdict.sentence())
    return 0


def _torchrun(settings: TrainSettings, arguments: Sequence[str]) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(settings.processes)),
        *("--max-restarts", str(settings.max_restarts)),
        *("-m", "encoder.train"),
        *arguments,
    ]


def _environment() -> dict[str, str]:
    """One thread a process unless told otherwise: more would fight over the cores."""
    return {"OMP_NUM_THREADS": "1", **os.environ}
