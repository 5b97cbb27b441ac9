"""`shoal encoder train`, but rank 1 does something bad after step 5 of the first attempt. Which,
TRAINING_FAULT says: "exit" without a word, "stop" or "kill launcher", the process that started it.

    python training_that_crashes.py FLAGS   the command; its processes run this file too
"""

from __future__ import annotations

import os
import signal
import sys

from encoder.train.__main__ import as_process
from encoder.train.command import launch, run_here
from encoder.train.settings import parse
from shoal.errors import ShoalError


def on_step(done: int) -> None:
    if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0" or done != 5 or os.environ["RANK"] != "1":
        return
    match os.environ["TRAINING_FAULT"]:
        case "exit":
            os._exit(17)
        case "stop":
            os.kill(os.getppid(), signal.SIGTERM)
        case "kill launcher":
            os.kill(os.getppid(), signal.SIGKILL)


def main(arguments: list[str]) -> int:
    settings = parse(arguments)
    if "RANK" not in os.environ:
        try:
            return launch(settings, [__file__, *arguments])
        except ShoalError as error:
            sys.stderr.write(f"{error.message}\n")
            return 1
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    sys.stdout.write(f"attempt {attempt} begins\n")
    sys.stdout.flush()
    return as_process(lambda: run_here(settings, on_step))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
