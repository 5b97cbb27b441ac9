"""One process of a training run, under torchrun."""

from __future__ import annotations

import sys

from encoder.train.command import GateRefused, run_here
from encoder.train.settings import parse
from shoal.errors import ShoalError


def main() -> int:
    try:
        return run_here(parse(sys.argv[1:]))
    except GateRefused:
        # All processes know; restarting them would not make the model better.
        return 0
    except ShoalError as error:
        sys.stderr.write(f"shoal: {error.message}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
