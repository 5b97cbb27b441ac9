"""`shoal migrate`: change the model of a vector of a live collection, from the command line.

    start     begin, or change the rate; shows the progress until every point has both vectors
    status    how far it is
    compare   ask both models the same queries
    switch, rollback, drop

The work is the server's: this command may be interrupted at any time, and `start` given again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from shoal.errors import ShoalError
from shoal.importing.sender import Refused, Server

__all__ = ["MigrateFailed", "run"]

DEFAULT_URL = "http://localhost:6333"
_LOOK_S = 0.5


class MigrateFailed(ShoalError):
    """The server refused it, or the file is wrong; the message says what to do."""


def run(argv: Sequence[str]) -> int:
    """The command line. Raises MigrateFailed or ImportFailed with a sentence for people."""
    arguments = _parser().parse_args(argv)
    server = Server(arguments.url, arguments.api_key or os.environ.get("SHOAL_API_KEY"))
    migration = _Migration(server, arguments.collection, arguments.vector)
    try:
        _refuse_others(arguments)
        return _ACTIONS[arguments.action](migration, arguments)
    except Refused as refused:
        raise MigrateFailed(refused.message) from None
    finally:
        server.close()


class _Migration:
    """The operations of the HTTP API on one vector."""

    def __init__(self, server: Server, collection: str, vector: str) -> None:
        name = "-" if vector == "" else quote(vector, safe="")
        self._server = server
        self._path = f"/collections/{quote(collection, safe='')}/vectors/{name}/migrate"

    def status(self) -> dict[str, Any]:
        return self._result("GET", "", None)

    def ask(self, action: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._result("POST", f"/{action}" if action else "", json.dumps(body).encode())

    def _result(self, method: str, tail: str, body: bytes | None) -> dict[str, Any]:
        kind = "application/json" if body is not None else ""
        result: dict[str, Any] = self._server.request(method, self._path + tail, body, kind)[
            "result"
        ]
        return result


# -- actions ---------------------------------------------------------------------------------------
def _start(migration: _Migration, arguments: argparse.Namespace) -> int:
    for name in ("model", "text_field"):
        if getattr(arguments, name) is None:
            raise MigrateFailed(f"`start` needs --{name.replace('_', '-')}.")
    wanted = ("model", "fingerprint", "text_field", "current_model", "points_per_second")
    body = {name: value for name in wanted if (value := getattr(arguments, name)) is not None}
    if body.get("points_per_second") == math.inf:
        body["points_per_second"] = None  # JSON has no infinity
    migration.ask("", body)
    try:
        with _shown() as show:
            while True:
                status = migration.status()
                show(status)
                left = status["left"] - (status.get("without_text") or 0)
                if status["phase"] == "copying" and (left <= 0 or _paused(status)):
                    break
                threading.Event().wait(_LOOK_S)
    except KeyboardInterrupt:
        print("The server goes on; `shoal migrate status` tells how far it is.", file=sys.stderr)
        return 130
    _say(status)
    if left > 0:
        print("Go on with `shoal migrate start` and another --points-per-second; `inf`: no bound.")
    elif status["switched"]:
        print("Next: `shoal migrate drop`, or `rollback`.")
    else:
        print("Next: `shoal migrate compare`, then `switch`.")
    return 0


def _paused(status: dict[str, Any]) -> bool:
    return status.get("points_per_second_max") == 0


def _status(migration: _Migration, arguments: argparse.Namespace) -> int:
    _say(migration.status())
    return 0


def _say(status: dict[str, Any]) -> None:
    current, other = status["current"]["model"], status["other"]["model"]
    if status["phase"] == "dropping":
        print(f"dropping: searched with {current}, the vectors of {other} are being removed")
        return
    phase = "switched" if status["switched"] else status["phase"]
    print(f"{phase}: searched with {current}, {other} kept beside it")
    print(
        f"{status['done']:,} of {status['points']:,} points have both, {status['left']:,} lack the other"
    )
    if without := status.get("without_text"):
        print(f"{without:,} have no text at `{status['text_field']}`, so they cannot get it")
    if status["left"] > (status.get("without_text") or 0):
        if _paused(status):
            print("It is paused: --points-per-second is 0")
        elif rate := status.get("points_per_second"):
            print(f"{rate:,.0f} points/s lately")
    if error := status.get("error"):
        print(f"It waits: {error}")


def _compare(migration: _Migration, arguments: argparse.Namespace) -> int:
    body: dict[str, Any] = {} if arguments.limit is None else {"limit": arguments.limit}
    if arguments.queries is not None:
        body["queries"] = _read_queries(arguments.queries)
    said = migration.ask("compare", body)
    k = said["limit"]
    print(
        f"{said['queries']} {said['source']} queries: {said['current']} now, {said['other']} beside it"
    )
    print(f"overlap@{k}   {_interval(said['overlap'])}")
    if quality := said.get("ndcg"):
        for name in ("current", "other", "gain"):
            print(f"nDCG@{k} {name:<8}{_interval(quality[name])}")
    if said["left"]:
        print(f"{said['left']:,} points lack the other vector: its answers cannot hold them yet")
    worst = said["most_different"][0]
    if worst["overlap"] < 1:
        print(f"Answers differ most for {worst['text']!r} (overlap {worst['overlap']:.2f})")
    return 0


def _interval(figures: dict[str, float]) -> str:
    return f"{figures['mean']:.3f} [{figures['low']:.3f}, {figures['high']:.3f}]"


def _read_queries(path: Path) -> list[dict[str, Any]]:
    """JSON lines: {"text": …} with, for nDCG, "relevant": {id: gain}."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MigrateFailed(f"{path} cannot be read: {error}") from None
    queries = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            queries.append(json.loads(line))
        except ValueError as error:
            raise MigrateFailed(f"{path}, line {number} is no JSON: {error}") from None
    return queries


def _switch(migration: _Migration, arguments: argparse.Namespace) -> int:
    status = migration.ask("switch", {"allow_missing": arguments.allow_missing})
    print(f"Searched with {status['current']['model']} now; `rollback` goes back, `drop` ends it.")
    return 0


def _rollback(migration: _Migration, arguments: argparse.Namespace) -> int:
    status = migration.ask("rollback", {})
    print(f"Searched with {status['current']['model']} again.")
    return 0


def _drop(migration: _Migration, arguments: argparse.Namespace) -> int:
    if arguments.model is None:
        raise MigrateFailed("`drop` needs --model: the one whose vectors are to go, to be sure.")
    migration.ask("drop", {"model": arguments.model, "allow_missing": arguments.allow_missing})
    print(f"The vectors of {arguments.model} are being removed.")
    return 0


_ACTIONS: dict[str, Callable[[_Migration, argparse.Namespace], int]] = {
    "start": _start,
    "status": _status,
    "compare": _compare,
    "switch": _switch,
    "rollback": _rollback,
    "drop": _drop,
}
# What one action alone reads would do nothing in another, and whoever gave it thinks that it did.
_FLAGS = {
    "model": ("start", "drop"),
    "fingerprint": ("start",),
    "text_field": ("start",),
    "current_model": ("start",),
    "points_per_second": ("start",),
    "queries": ("compare",),
    "limit": ("compare",),
    "allow_missing": ("switch", "drop"),
}


def _refuse_others(arguments: argparse.Namespace) -> None:
    for name, actions in _FLAGS.items():
        given = getattr(arguments, name)
        if given is not None and given is not False and arguments.action not in actions:
            flag, readers = name.replace("_", "-"), " and ".join(f"`{x}`" for x in actions)
            raise MigrateFailed(
                f"`{arguments.action}` takes no --{flag}, which is for {readers}: leave it out."
            )


@contextmanager
def _shown() -> Iterator[Callable[[dict[str, Any]], None]]:
    """A progress bar on a terminal; silence in a pipe."""
    if not sys.stderr.isatty():
        yield lambda status: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,} of {task.total:,} points"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bars:
        task = bars.add_task("copying", total=1)

        def show(status: dict[str, Any]) -> None:
            error = status.get("error")
            bars.update(
                task,
                description=f"waits: {error}" if error else status["phase"],
                completed=status["done"],
                total=max(1, status["points"]),
            )

        yield show


def _parser() -> argparse.ArgumentParser:
    from shoal.cli import Parser

    parser = Parser(
        "shoal migrate",
        "Change the model of a vector of a live collection.\n"
        "  start     make vectors of --model of the texts at --text-field, in the background\n"
        "  status    how far it is\n"
        "  compare   ask both models the same queries: those it has seen, or --queries\n"
        "  switch    search with the new model;  rollback: with the old one again\n"
        "  drop      remove the vectors of --model, which must not be in use",
    )
    add = parser.add_argument
    add("action", choices=list(_ACTIONS))
    add("collection", metavar="COLLECTION")
    add("--vector", default="", metavar="NAME", help="[default: the unnamed one]")
    add("--model", metavar="NAME", help="as the server's encoders know it")
    add("--fingerprint", metavar="HEX", help="of its weights, where several have that name")
    add("--text-field", metavar="PATH", help="the payload field that holds the text")
    add("--current-model", metavar="NAME", help="of a vector that is not bound to one yet")
    add(
        "--points-per-second",
        type=float,
        metavar="RATE",
        help="of the background copy, at most; 0: it waits; inf: no bound [default: as it was]",
    )
    add("--queries", type=Path, metavar="FILE", help='JSON lines: {"text", "relevant": {id: gain}}')
    add("--limit", type=int, metavar="K", help="of overlap@k and nDCG@k [default 10]")
    add(
        "--allow-missing",
        action="store_true",
        help="switch or drop although points would be left without a vector",
    )
    add("--url", default=DEFAULT_URL, help=f"the server [default {DEFAULT_URL}]")
    add("--api-key", metavar="KEY", help="[default: SHOAL_API_KEY]")
    return parser
