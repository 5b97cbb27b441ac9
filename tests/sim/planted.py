"""Bugs planted into the core, one at a time: the simulation must find every one of them.

    python -m tests.sim.planted           try all, print the table
    python -m tests.sim.planted --write   and put it into docs/failure_model.md

A bug is a small change of the text of storage_node/replica.py. When that text is gone, the bug says
so instead of passing in silence. This tests the test: run it again when the simulation or the core
changes.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pool
from pathlib import Path

from storage_node import replica as sound

from .world import World

__all__ = ["BUGS", "Bug", "Found", "find", "main"]

SEEDS_MAX = 3_000
DOCUMENT = Path(__file__).resolve().parents[2] / "docs/failure_model.md"
BEGIN, END = "<!-- planted bugs: begin -->", "<!-- planted bugs: end -->"


@dataclass(frozen=True)
class Bug:
    """changes: (what stands in the core, what stands there instead)."""

    name: str
    changes: tuple[tuple[str, str], ...]

    def plant(self) -> types.ModuleType:
        text = inspect.getsource(sound)
        for old, new in self.changes:
            if old not in text:
                raise LookupError(f"{self.name!r}: the core no longer reads {old!r}")
            text = text.replace(old, new)
        module = types.ModuleType("planted")
        sys.modules["planted"] = module  # dataclasses look their module up
        exec(compile(text, "planted", "exec"), module.__dict__)
        return module


@dataclass(frozen=True)
class Found:
    bug: str
    seeds: int | None  # how many were tried; None: never found
    how: str


def bug(name: str, *changes: str) -> Bug:
    return Bug(name, tuple(zip(changes[::2], changes[1::2], strict=True)))


BUGS = (
    bug(
        "a secondary acknowledges before its fsync",
        "match = min(self.durable, self._verified)",
        "match = self._verified",
    ),
    bug(
        "the primary does not wait for its own fsync",
        "held = self.durable\n",
        "held = self.last\n",
    ),
    bug(
        "a majority counts as everybody",
        "held = min(held, peer.match if peer is not None and peer.aligned else 0)",
        "votes = sorted(p.match for p in self._peers.values() if p.aligned)\n"
        "            held = min(held, votes[len(votes) // 2] if votes else 0)",
    ),
    bug(
        "an in-sync set holds as soon as it is proposed",
        "return self.config.in_sync | proposed",
        "return proposed or self.config.in_sync",
    ),
    bug(
        "an in-sync set does not hold before the answer came",
        "return self.config.in_sync | proposed",
        "return self.config.in_sync",
    ),
    bug(
        "the outcome of an old proposal settles a new one",
        "case Settled(config):\n",
        "case Settled(config):\n                self._proposal = None\n",
    ),
    bug(
        "a restarted primary speaks in its old term",
        "if self._needs_term or (first and not self._fresh):",
        "if self._needs_term:",
    ),
    bug(
        "an older term is listened to",
        "        if message.term < self.term:\n",
        "        if message.term < self.term and not self._primary:\n"
        "            message = replace(message, term=self.term)\n"
        "        if message.term < self.term:\n",
    ),
    bug(
        "a new primary does not wait for the old one's lease",
        "if not self._primary or now < self._granted_until:",
        "if not self._primary:",
    ),
    bug(
        "a lease begins when the answer arrives",
        "peer.lease_from = max(peer.lease_from, message.echo)",
        "peer.lease_from = now",
    ),
    bug(
        "clocks are taken to run alike",
        "self.timing.lease_s * (1 + CLOCK_DRIFT)",
        "self.timing.lease_s",
    ),
    bug(
        "a new primary is ready before it committed what it inherited",
        "self._inherited = self.last\n",
        "self._inherited = 0\n",
    ),
    bug(
        "a joining replica comes into sync before it caught up",
        "            and peer.match >= self.committed\n",
        "",
    ),
    bug(
        "a late copy of a message cuts the log",
        "        if new < len(m.entries):\n",
        "        if m.prev + len(m.entries) < self.last and m.prev >= self.committed:\n"
        "            effects += self._cut(m.prev + len(m.entries))\n"
        "        if new < len(m.entries):\n",
    ),
    bug(
        "what the primary never had counts as held",
        "match = min(self.durable, self._verified)",
        "match = self.durable",
    ),
    bug(
        "a secondary commits entries that it did not compare",
        "effects = self._commit(min(self._told, self._verified, self.durable))",
        "effects = self._commit(min(self._told, self.durable))",
    ),
    bug(
        "what was compared in an older term counts in the new one",
        "        self._verified = self.committed\n        self._leader",
        "        self._leader",
    ),
    bug(
        "logs are compared by their length",
        "agreed = min(m.committed, self.last)",
        "agreed = min(m.durable, self.last)",
    ),
    bug(
        "entries are compared without their terms",
        "                and self.term_at(m.entries[new].sequence) == m.entries[new].term\n",
        "",
    ),
    bug(
        "a primary whose disk is full goes on in its term",
        "if kept >= self._shown:",
        "if kept >= 0:",
    ),
    bug(
        "… or forgets that others have what it inherited",
        "        self._shown = max(self._shown, self.last)\n",
        "",
    ),
    bug(
        "writes without an answer are called lost",
        "[Abandon(self.committed)] if",
        "[Abandon(self.committed, lost=True)] if",
    ),
    bug(
        "a message that was lost is not missed",
        "prev = entries[0].sequence - 1 if entries else peer.sent",
        "prev = entries[0].sequence - 1 if entries else peer.match",
    ),
    bug(
        "a late copy of NeedFiles is obeyed",
        "if m.incarnation != self.incarnation:",
        "if m.incarnation < 0:",
    ),
    bug(
        "a replica that fetches files still takes part",
        "            self._fetching = True\n",
        "",
    ),
    bug(
        "a write that a Cut overtook counts as durable",
        "            earlier.upto = min(earlier.upto, after)\n",
        "            continue\n",
    ),
    bug(
        "a lease that is given back ends all others",
        "self._grants.pop(message.term, None)",
        "self._grants.clear()",
    ),
    bug(
        "a lease is given back by a primary that goes on",
        "self._departing = nodes\n",
        "self._departing = nodes\n"
        "                if self._primary and self.node in nodes:\n"
        "                    return [Send(p, Released(self.term)) for p in sorted(self._peers)]\n",
    ),
    bug(
        "nobody waits any more for a node that is about to stop",
        "return self.config.in_sync | proposed",
        "return (self.config.in_sync | proposed) - (self._departing - {self.node})",
    ),
)


def find(planted: Bug, seeds_max: int = SEEDS_MAX) -> Found:
    core = planted.plant()
    for seed in range(seeds_max):
        try:
            World(seed, core).run()
        except Exception as error:  # however it shows
            return Found(planted.name, seed + 1, _brief(error))
    return Found(planted.name, None, f"not in {seeds_max} seeds")


def _brief(error: Exception) -> str:
    """The message without what differs from seed to seed."""
    text = str(error).partition(":")[0]
    text = re.sub(r"\bs\d\b", "a node", text)
    return re.sub(r"\(.*?\)|[\d.]*\d", "…", text)


def table(found: list[Found]) -> Iterator[str]:
    yield "| Bug | Seeds until found | How it shows |"
    yield "|---|---:|---|"
    for one in found:
        yield f"| {one.bug} | {one.seeds or '–'} | {one.how} |"


def write(lines: list[str]) -> None:
    text = DOCUMENT.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        raise LookupError(f"{DOCUMENT} has no place for the table: {BEGIN} … {END}")
    DOCUMENT.write_text("\n".join([before + BEGIN, *lines, END]) + after)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim.planted", description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/failure_model.md")
    parser.add_argument("--only", default="", help="bugs whose name contains this")
    parser.add_argument("--seeds", type=int, default=SEEDS_MAX, help="tried for each")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    bugs = [one for one in BUGS if options.only in one.name]
    found = []
    with Pool(options.workers) as pool:
        for one in pool.imap(partial(find, seeds_max=options.seeds), bugs):
            found.append(one)
            print(f"{one.seeds or 'NOT FOUND':>9}  {one.bug}: {one.how}", flush=True)
    if options.write:
        write(list(table(found)))
    return 1 if any(one.seeds is None for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
