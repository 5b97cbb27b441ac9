"""`shoal encoder train`: starts the processes of a run, and tells how it ended."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from encoder.train.errors import GateRefused, Stopped, TrainingFailed
from encoder.train.settings import TrainSettings, parse
from shoal.errors import ShoalError, StartupError

__all__ = ["EXIT_STATUS_FILE", "exit_status", "launch", "run", "run_here"]

EXIT_STATUS_FILE = "SHOAL_TRAIN_EXIT_STATUS"  # where rank 0 writes it, for the launcher
STOP_S_MAX = 120  # for a step and a checkpoint after a signal; then processes are killed
INTERRUPTED = 130


def run(arguments: Sequence[str]) -> int:
    """The command line: in this process if one is enough, else over several. The exit status."""
    settings = parse(arguments)
    if settings.processes > 1 or settings.max_restarts:
        return launch(settings, ["-m", "encoder.train", *arguments])
    try:
        return run_here(settings)
    except Stopped as stopped:
        sys.stderr.write(f"shoal: {stopped.message}\n")
        return INTERRUPTED
    except OSError as error:
        raise TrainingFailed(f"{error}.") from error


def run_here(settings: TrainSettings, on_step: Callable[[int], None] | None = None) -> int:
    """This process's part; under torchrun one of several. Rank 0 tells the result. As `train`."""
    from encoder.train.loop import train

    outcome = train(settings, on_step)
    if int(os.environ.get("RANK", "0")) == 0:
        console = Console(stderr=True, soft_wrap=True)
        lines = [f"{k:>9}  {v}  ->  {outcome.after[k]}" for k, v in outcome.before.items()]
        if outcome.verdict.accepted or not settings.gate:  # else the error says it
            lines.append(outcome.verdict.sentence())
        lines.append(f"The model is in {outcome.model}")
        console.print("\n".join(lines), highlight=False, markup=False)
    if settings.gate and not outcome.verdict.accepted:
        raise GateRefused(outcome.verdict.sentence())
    return 0


def exit_status(error: ShoalError) -> int:
    """As everywhere in `shoal`: 1 failed, 2 cannot start, 130 interrupted."""
    if isinstance(error, Stopped):
        return INTERRUPTED
    return 2 if isinstance(error, StartupError) else 1


def launch(settings: TrainSettings, program: Sequence[str]) -> int:
    """Run `python PROGRAM` in dp × pp × tp processes under torchrun's agent, which starts all of them
    again when one ends, up to --max-restarts times. The exit status that rank 0 found.

    A signal is passed on; processes have STOP_S_MAX to write a checkpoint. Raises TrainingFailed.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # A process says by itself why it ended; the agent would add its own traceback.
    for name in ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # more would fight over the cores
    with tempfile.TemporaryDirectory(prefix="shoal-train-") as scratch:
        status = Path(scratch) / "status"
        os.environ[EXIT_STATUS_FILE] = str(status)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=settings.processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=settings.max_restarts,
            monitor_interval=0.1,
            shutdown_timeout=STOP_S_MAX,
        )
        try:
            elastic_launch(config, sys.executable)("-u", *program)
        except SignalException:
            return INTERRUPTED  # rank 0 has told where it stopped
        except ChildFailedError as error:
            how = "; ".join(_ended(rank, f.exitcode) for rank, f in sorted(error.failures.items()))
            raise TrainingFailed(
                f"The run ended before its model was saved: {how}. The same command goes on from the "
                "last checkpoint, or begins anew where there is none."
            ) from None
        return int(status.read_text(encoding="ascii")) if status.is_file() else 0


def _ended(rank: int, status: int) -> str:
    if status >= 0:
        return f"process {rank} with status {status}"
    try:
        return f"process {rank} by {signal.Signals(-status).name}"
    except ValueError:
        return f"process {rank} by signal {-status}"
