"""`python -m encoder.train`, but rank 1 ends without a word after step 5 of the first attempt."""

from __future__ import annotations

import os
import sys

from encoder.train.loop import train
from encoder.train.settings import parse

ATTEMPT = os.environ["TORCHELASTIC_RESTART_COUNT"]


def on_step(done: int) -> None:
    if ATTEMPT == "0" and done == 5 and os.environ["RANK"] == "1":
        os._exit(17)


if ATTEMPT != "0":
    sys.stdout.write(f"attempt {ATTEMPT} goes on\n")
    sys.stdout.flush()
train(parse(sys.argv[1:]), on_step)
