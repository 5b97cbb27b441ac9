"""Some hundred runs of the simulation on every `make test`; `make sim` makes thousands.

A failing seed is replayed, with its story, by  python -m tests.sim SEED
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from storage_node import replica as core

from .__main__ import attempt
from .planted import BUGS, find
from .world import LIMITS, World

ROOT = Path(__file__).resolve().parents[2]
FIRST_SEED = 1_000_000  # others than `make sim` takes


@pytest.fixture(autouse=True)
def own_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run sets the limits of the core as its seed says: put them back."""
    for name in LIMITS:
        monkeypatch.setattr(core, name, getattr(core, name))


@pytest.mark.parametrize("block", range(10))
def test_nothing_is_lost_and_everything_heals(block: int) -> None:
    first = FIRST_SEED + 30 * block
    for seed in range(first, first + 30):
        problem = attempt(seed)
        assert problem is None, f"{problem}\nreplay with: python -m tests.sim {seed}"


def fingerprint(seed: int) -> str:
    world = World(seed, core)
    world.run()
    last = world.oracle.history[-1] if world.oracle.history else None
    return f"{world.events} {world.now} {world.record.config.revision} {last}"


def test_a_seed_is_the_whole_run() -> None:
    """Whatever the hash seed of the process: nothing hangs on the order of a set."""
    program = "from tests.sim.test_sim import fingerprint; print(fingerprint(11))"
    answers = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
            text=True,
            timeout=60,
        ).stdout.strip()
        for hash_seed in ("1", "2", "3")
    }
    assert answers == {fingerprint(11)}


@pytest.mark.parametrize("bug", BUGS[:4], ids=lambda b: b.name)
def test_it_would_notice(bug) -> None:
    """Planted bugs that show soon; `python -m tests.sim.planted` tries them all."""
    assert find(bug).seeds is not None


def test_a_planted_bug_whose_place_is_gone_says_so() -> None:
    for bug in BUGS:
        bug.plant()
