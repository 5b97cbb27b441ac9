"""One process of a training run, under torchrun."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from encoder.train.command import EXIT_STATUS_FILE, exit_status, run_here
from encoder.train.errors import GateRefused
from encoder.train.settings import parse
from shoal.errors import ShoalError


def as_process(work: Callable[[], int]) -> int:
    """The exit status of this process, one of several that do `work` together.

    An agent starts all processes again when one of them fails. Errors with a sentence of their
    own would only come again, so the launcher is told in a file, and the agent is told nothing."""
    try:
        status = work()
    except ShoalError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            sys.stderr.write(f"shoal: {error.message}\n")
        status = exit_status(error)
        if EXIT_STATUS_FILE not in os.environ:  # somebody else's torchrun
            return 0 if isinstance(error, GateRefused) else status
    except RuntimeError as error:
        if not _lost_others(error):
            raise
        rank = os.environ.get("RANK", "0")
        sys.stderr.write(f"shoal: Process {rank} lost the others: {_short(error)}\n")
        return 1
    except OSError as error:  # only this process may have met it, so it cannot speak for all
        sys.stderr.write(f"shoal: {error}.\n")
        return 1
    if EXIT_STATUS_FILE in os.environ and os.environ.get("RANK") == "0":
        Path(os.environ[EXIT_STATUS_FILE]).write_text(str(status), encoding="ascii")
    return 0


def _lost_others(error: RuntimeError) -> bool:
    """One of them has ended, and says why by itself; where the others noticed tells nothing."""
    return isinstance(error, dist.DistError) or any(
        sign in str(error) for sign in ("Connection closed", "Connection reset", "Timed out")
    )


def _short(error: RuntimeError) -> str:
    """The first sentence, without the place in the library's source that comes before it."""
    return re.sub(r"^\[[^\]]*\]\s*", "", str(error)).splitlines()[0].split(". ")[0] + "."


if __name__ == "__main__":
    sys.exit(as_process(lambda: run_here(parse(sys.argv[1:]))))
