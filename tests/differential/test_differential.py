"""Random operations on a real server and on the oracle, `QdrantClient(":memory:")`: equal answers.

A failure prints the line that replays it. Two variables help to look into one:

    SHOAL_DIFF_RUN=shape:seed:steps:restarts   the run of `-k replay`
    SHOAL_DIFF_SHRINK=1                        cut the run down to the events that it needs
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from harness import MakeServer, Server, wait_until
from qdrant_client import QdrantClient
from qdrant_client import models as m
from runner import (
    RECALL_MIN,
    Call,
    Difference,
    Event,
    Execution,
    Restart,
    Run,
    plan,
    plan_reads,
    shrink,
)
from world import SHAPES

# Where the oracle differs from the contract by its own nature, why, and what is done about it here.
DIFFERENCES = {
    "equal scores": "The oracle leaves their order to an unstable sort, we order them by id. "
    "compare.py accepts any order among equal scores.",
    "exactness": "The oracle always searches exactly. On the shapes called indexed, searches that "
    "do not ask for exact=True are measured by recall instead.",
    "version": "The oracle says 0 for every point. Not compared.",
    "payload indexes": "The oracle has none and only warns. Ours must not change any answer.",
}

SEAL_BYTES = 65_536  # the smallest allowed: sealing and merging happen all the time
QUICK = [Run(shape, seed=1, steps=100) for shape in SHAPES]
QUICK_RESTARTS = [Run("named", 2, 80, restarts=2), Run("everything", 2, 80, restarts=2)]
SLOW = [Run(shape, seed, 1000, restarts=4) for shape in SHAPES for seed in (11, 12)]


class ServerTarget:
    """A server in another process, through a real client and real HTTP."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.client = server.client()

    def restart(self, *, kill: bool) -> None:
        self.client.close()
        self.server.restart(kill=kill)
        self.client = self.server.client()


class MemoryTarget:
    """A second oracle in the place of the server: what these tests themselves are tested with."""

    def __init__(self) -> None:
        self.client = QdrantClient(":memory:")

    def restart(self, *, kill: bool) -> None:
        """Nothing is on a disk, and nothing is lost."""


@pytest.fixture
def oracle() -> QdrantClient:
    """Not closed: the quick runs are compared once more after all have ended."""
    return QdrantClient(":memory:")


_names = (f"diff-{number}" for number in itertools.count())


def execute(run: Run, target: Any, oracle: QdrantClient) -> Execution:
    """Carry out the run; a difference is told with its replay line, and shrunk if so wished."""
    events = plan(run)
    print(f"run {run}")
    try:
        return _execute(run, events, target, oracle)
    except Difference as difference:
        line = f"SHOAL_DIFF_RUN={run} python -m pytest tests/differential -k replay"
        story = f"{difference}\nreplay: {line}"
        if os.environ.get("SHOAL_DIFF_SHRINK"):
            story += "\n" + _shrunk(run, events[: difference.step + 1], target)
        raise AssertionError(story) from difference


def _execute(run: Run, events: Sequence[Event], target: Any, oracle: QdrantClient) -> Execution:
    execution = Execution(run.shape, target, oracle, next(_names))
    execution.go(events)
    return execution


def _shrunk(run: Run, events: Sequence[Event], target: Any) -> str:
    last = ""

    def fails(some: Sequence[Event]) -> bool:
        nonlocal last
        try:
            _execute(run, some, target, QdrantClient(":memory:"))
        except Difference as difference:
            last = str(difference)
            return True
        return False

    needed = shrink(events, fails) if fails(events) else list(events)
    return "\n".join(["what it needs:", *map(str, needed), "and then:", last])


def settled(client: QdrantClient, name: str) -> bool:
    return client.get_collection(name).status == m.CollectionStatus.GREEN


def check_settled(execution: Execution, run: Run) -> None:
    """Wait until nothing is left to seal, merge or index, and compare again: contents and reads."""
    client = execution.target.client
    wait_until(lambda: settled(client, execution.name), within_s=60, what="status green")
    execution.check_contents(run.steps)
    execution.reads(plan_reads(run))
    if SHAPES[run.shape].indexed:
        assert client.get_collection(execution.name).indexed_vectors_count, "no index was built"
        assert execution.recall.wanted > 20
    print(f"approximate searches: {execution.recall}")
    assert execution.recall.ratio >= RECALL_MIN, f"recall {execution.recall} in run {run}"


def run_on_own_server(run: Run, make_server: MakeServer, oracle: QdrantClient) -> None:
    target = ServerTarget(make_server(seal_bytes=SEAL_BYTES))
    try:
        execution = execute(run, target, oracle)
        check_settled(execution, run)
        target.restart(kill=False)
        execution.check_contents(run.steps)
    finally:
        target.client.close()


@pytest.fixture(scope="module")
def shared_target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerTarget]:
    """One server for the quick runs: starting one costs more than such a run."""
    folder = tmp_path_factory.mktemp("differential") / "data"
    server = Server(folder, settings={"seal_bytes": SEAL_BYTES}).start()
    target = ServerTarget(server)
    yield target
    target.client.close()
    server.kill9()


@pytest.fixture(scope="module")
def done() -> list[Execution]:
    """The quick runs that have ended well."""
    return []


@pytest.mark.parametrize("run", QUICK, ids=str)
def test_server_answers_like_the_oracle(
    run: Run, shared_target: ServerTarget, done: list[Execution], oracle: QdrantClient
) -> None:
    execution = execute(run, shared_target, oracle)
    check_settled(execution, run)
    done.append(execution)


@pytest.mark.parametrize("kill", [True, False], ids=["kill-9", "SIGTERM"])
def test_everything_is_there_after_a_restart(
    kill: bool, shared_target: ServerTarget, done: list[Execution]
) -> None:
    """The collections of all quick runs above, in one data directory."""
    shared_target.restart(kill=kill)
    for execution in done:
        execution.check_contents(0)
        execution.reads(plan_reads(Run(execution.shape, seed=7, steps=0)))


@pytest.mark.parametrize("run", QUICK_RESTARTS, ids=str)
def test_restarts_in_the_middle(run: Run, make_server: MakeServer, oracle: QdrantClient) -> None:
    run_on_own_server(run, make_server, oracle)


@pytest.mark.slow
@pytest.mark.parametrize("run", SLOW, ids=str)
def test_server_answers_like_the_oracle_for_long(
    run: Run, make_server: MakeServer, oracle: QdrantClient
) -> None:
    run_on_own_server(run, make_server, oracle)


@pytest.mark.skipif("SHOAL_DIFF_RUN" not in os.environ, reason="SHOAL_DIFF_RUN names the run")
def test_replay(make_server: MakeServer, oracle: QdrantClient) -> None:
    run_on_own_server(Run.parse(os.environ["SHOAL_DIFF_RUN"]), make_server, oracle)


# -- the tests of the test ------------------------------------------------------------------------
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_two_oracles_agree(shape: str, oracle: QdrantClient) -> None:
    """The comparison itself finds nothing where there is nothing to find."""
    execute(Run(shape, seed=3, steps=60, restarts=1), MemoryTarget(), oracle)


def test_plan_covers_everything() -> None:
    """Every write and read of the API is in a run of this length, and so are refusals."""
    methods = {e.method for e in plan(Run("everything", 1, 400, 2)) if isinstance(e, Call)}
    assert methods == {
        "upsert", "delete", "set_payload", "overwrite_payload", "delete_payload", "clear_payload",
        "update_vectors", "delete_vectors", "batch_update_points", "create_payload_index",
        "delete_payload_index", "retrieve", "scroll", "count", "query_points",
    }  # fmt: skip


class LosesDeletes(MemoryTarget):
    """A planted bug: deletes by id are acknowledged and forgotten."""

    def __init__(self) -> None:
        super().__init__()
        forgetful, honest = self.client, self.client.delete

        def delete(name: str, points_selector: Any, **arguments: Any) -> Any:
            if isinstance(points_selector, list) and points_selector:
                return None
            return honest(name, points_selector=points_selector, **arguments)

        forgetful.delete = delete  # type: ignore[method-assign]


def test_a_planted_bug_is_found_and_shrunk(oracle: QdrantClient) -> None:
    run = Run("cosine", seed=30, steps=20)
    with pytest.raises(AssertionError, match=r"replay: SHOAL_DIFF_RUN=cosine:30:20:0"):
        execute(run, LosesDeletes(), oracle)

    def fails(events: Sequence[Event]) -> bool:
        try:
            _execute(run, events, LosesDeletes(), QdrantClient(":memory:"))
        except Difference:
            return True
        return False

    needed = shrink(plan(run), fails)
    assert len(needed) <= 2  # an upsert and the delete that forgot it
    assert not any(isinstance(event, Restart) for event in needed)
