"""python -m tests.sim SEED            replay one run and tell its story
python -m tests.sim --seeds 5000      many runs, on every core
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence
from multiprocessing import Pool

from storage_node import replica as core

from .world import World

__all__ = ["attempt", "main"]


def attempt(seed: int) -> str | None:
    """What is wrong with this seed, in a line; None when nothing is."""
    try:
        World(seed, core).run()
    except Exception as error:  # whatever the core raises is a finding
        return f"{type(error).__name__}: {error}"
    return None


def sweep(seeds: Sequence[int], workers: int, failures_max: int) -> int:
    started, failed, done = time.perf_counter(), 0, 0
    with Pool(workers) as pool:
        results = pool.imap_unordered(_one, seeds, chunksize=10)
        for seed, problem in results:
            done += 1
            if done % 1_000 == 0:
                print(f"{done} seeds, {failed} failed", flush=True)
            if problem is not None:
                failed += 1
                print(f"seed {seed}: {problem}\n    replay: python -m tests.sim {seed}", flush=True)
                if failed >= failures_max:
                    pool.terminate()
                    break
    took = time.perf_counter() - started
    print(f"{done} seeds, {failed} failed, {took:.1f} s, {done / took:.1f} seeds/s")
    return 1 if failed else 0


def _one(seed: int) -> tuple[int, str | None]:
    return seed, attempt(seed)


def replay(seed: int, lines: int) -> int:
    world = World(seed, core, story=True)
    print(world.dice)
    try:
        world.run()
    except Exception:
        print("\n".join(world.story[-lines:]))
        traceback.print_exc(file=sys.stdout)
        return 1
    print(f"seed {seed} holds: {world.events} events, {len(world.oracle.history)} entries")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("seed", nargs="?", type=int, help="replay this one")
    parser.add_argument("--lines", type=int, default=60, help="of the story, from its end")
    parser.add_argument("--seeds", type=int, default=5_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--failures", type=int, default=5, help="stop after so many")
    options = parser.parse_args()
    if options.seed is not None:
        return replay(options.seed, options.lines)
    seeds = range(options.first, options.first + options.seeds)
    return sweep(seeds, options.workers, options.failures)


if __name__ == "__main__":
    sys.exit(main())
